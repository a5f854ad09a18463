"""The battle's report: one HTML file that needs nothing but itself, and report.json with the same numbers.

Every figure stands in an HTML table, so the page can be read without JavaScript, on a phone and on paper. The
charts come on top: plotly travels inside the file, compressed, and a content security policy lets exactly two
scripts run, named by their hashes. Class names, file names and errors are data: jinja2 escapes them in the page
and `inert` escapes them in the charts, where plotly would read tags.
"""

import base64
import gzip
import hashlib
import io
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, PackageLoader
from PIL import Image

from vertebra.battle.charts import COST_UNITS, HUES, INK, PAPER, figures, ink_on, number, score_named
from vertebra.battle.wording import (
    breakable,
    duration,
    figure,
    label,
    limit,
    probability,
    quantity,
    root,
    stretch,
    visible,
)
from vertebra.errors import DataError
from vertebra.probes.grad_cam.pictures import overlay

MOST_PICTURES = 60
MOST_ROWS = 150
PICTURE_PIXELS = 96


def write_report(
    report: Mapping[str, Any], run_dir: Path, thumbnail: Callable[[str, int], Image.Image] | None = None
) -> Path:
    """Write report.json and report.html into a run directory.

    Both files appear complete or not at all. A picture that cannot be read any more is left out of the page.

    Args:
        report: what `Ranking.to_json` gives; sections may be absent.
        run_dir: an existing directory.
        thumbnail: (split, index) to the image, for the worst mistakes; None shows them without pictures.

    Returns:
        The path of report.html.
    """
    thumbnails = _thumbnails(report, thumbnail) if thumbnail else {}
    overlays = _overlays(report, thumbnail) if thumbnail else {}
    page = run_dir / "report.html"
    _replace(run_dir / "report.json", json.dumps(_finite(report), ensure_ascii=False, indent=1, allow_nan=False))
    _replace(page, render(report, thumbnails, overlays))
    return page


def render(
    report: Mapping[str, Any],
    thumbnails: Mapping[tuple[str, int], str] | None = None,
    overlays: Mapping[tuple[str, int], Mapping[str, str]] | None = None,
) -> str:
    """The page as text.

    Args:
        report: what `Ranking.to_json` gives; sections may be absent.
        thumbnails: (split, index) to a data URI.
        overlays: (split, index) to where a contender looked: its name, the class it said, and a data URI.
    """
    report = {name: section for name, section in _finite(report).items() if section not in (None, {}, [])}
    people = _people(report)
    plotly, plotly_digest = _plotly()
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            people=people,
            hues=[(hue, ink_on(hue)) for hue in HUES],
            paper=PAPER,
            ink=INK,
            most_rows=MOST_ROWS,
            scores={score["name"]: score for score in report.get("scores", ())},
            columns=_columns(report),
            speed=score_named(report, report.get("pareto", {}).get("x", "p50_ms")),
            figures=figures(report, people),
            classes=_worst_classes(report),
            pictures=_pictures(report),
            thumbnails=thumbnails or {},
            overlays=overlays or {},
            next_command=_next_command(report),
            date=_date(report.get("created", "")),
            plotly=plotly,
            plotly_digest=plotly_digest,
        )
    )


def digest(script: str) -> str:
    """The source expression that lets exactly this script run under a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


FILTERS = (figure, quantity, label, limit, probability, duration, stretch, root, breakable, digest)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vertebra.battle", ""),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in FILTERS}
    return environment


@cache
def _plotly() -> tuple[str, str]:
    """The library, compressed, and its digest."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode(), digest(script)


def _replace(path: Path, text: str) -> None:
    """Write beside, flush, rename. File names that are no UTF-8 keep their bytes as visible escapes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become null, which the page shows as a dash."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thumbnails(report: Mapping[str, Any], thumbnail: Callable[[str, int], Image.Image]) -> dict[tuple[str, int], str]:
    uris = {}
    for mistake in _pictures(report):
        place = (mistake["split"], mistake["index"])
        try:
            uris[place] = _data_uri(thumbnail(*place))
        except (OSError, DataError):  # gone since it was scored: the card keeps its name
            continue
    return uris


def _overlays(
    report: Mapping[str, Any], thumbnail: Callable[[str, int], Image.Image]
) -> dict[tuple[str, int], dict[str, str]]:
    """Where the first of the contenders that were explained looked in each picture, on the part that it saw."""
    maps = {
        (contender, entry["index"], entry["predicted"]): entry
        for contender, entries in (report.get("explanations") or {}).items()
        for entry in entries
    }
    found = {}
    for picture in _pictures(report):
        place = (picture["split"], picture["index"])
        said = ((answer["contender"], place[1], answer["predicted"]) for answer in picture["answers"])
        answer = next((answer for answer in said if answer in maps), None)
        if answer is None:
            continue
        contender, entry = answer[0], maps[answer]
        try:
            view = _view(thumbnail(*place), entry["seen"])
        except (OSError, DataError):  # gone since it was scored, as in `_thumbnails`
            continue
        cells = np.frombuffer(base64.b64decode(entry["cells"]), dtype=np.uint8).reshape(entry["grid"])
        buffer = io.BytesIO()
        overlay(view, cells / 255).save(buffer, "jpeg", quality=80)
        uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        found[place] = {"contender": contender, "predicted": entry["predicted"], "source": uri}
    return found


def _view(image: Image.Image, seen: Sequence[float]) -> Image.Image:
    """The part of an image that a network sees, small; `seen` is left, top, right, bottom as shares of its sides."""
    left, top, right, bottom = (round(share * side) for share, side in zip(seen, image.size * 2, strict=True))
    view = image.convert("RGB").crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    factor = PICTURE_PIXELS / max(view.size)
    width, height = (max(1, round(side * factor)) for side in view.size)
    return view.resize((width, height), Image.Resampling.LANCZOS if factor < 2 else Image.Resampling.NEAREST)


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    if (times := PICTURE_PIXELS // max(small.size)) > 1:  # a browser would blur an 8 x 8 digit
        small = small.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
    small.info.clear()  # comments and colour profiles are not for the page
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        encoded.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(encoded, key=len)


def _cell(report: Mapping[str, Any], contender: str, score: str | None) -> Mapping[str, Any]:
    return report.get("table", {}).get(contender, {}).get(score) or {}


def _primary(report: Mapping[str, Any]) -> str | None:
    return report.get("settings", {}).get("primary") or report.get("pick", {}).get("score")


def _people(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The contenders, best first by the primary score; number and hue stay theirs on the whole page."""
    primary, known = _primary(report), {c["name"]: c for c in report.get("contenders", ())}
    sign = -1 if score_named(report, primary or "").get("better") == "lower" else 1
    names = dict.fromkeys([*known, *report.get("table", {})])
    ranked = sorted(names, key=lambda name: -number(sign * number(_cell(report, name, primary).get("value"))))
    return {
        name: {"name": name, **known.get(name, {}), "number": place + 1, "hue": place % len(HUES)}
        for place, name in enumerate(ranked)
    }


def _columns(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables' columns, a group for each probe: what was scored, and what it costs."""
    groups: dict[str, list[dict[str, Any]]] = {"quality": [], "cost": []}
    titles = {probe["name"]: probe.get("title", probe["name"]) for probe in report.get("probes", ())}
    for score in report.get("scores", ()):
        kind = groups["cost" if score.get("unit") in COST_UNITS else "quality"]
        if not kind or kind[-1]["probe"] != score.get("probe"):
            kind.append({"probe": score.get("probe"), "title": titles.get(score.get("probe"), ""), "scores": []})
        kind[-1]["scores"].append(score)
    return groups


def _worst_classes(report: Mapping[str, Any]) -> list[str]:
    per_class = report.get("per_class", {})
    names = dict.fromkeys(name for values in per_class.values() for name in values)

    def mean(name: str) -> float:
        values = [number(row[name], 100.0) for row in per_class.values() if name in row]
        return sum(values) / len(values)

    return sorted(names, key=mean)


def _pictures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mistakes by image: first those that most contenders made, then the most confident."""
    images: dict[tuple[str, int], dict[str, Any]] = {}
    for mistake in report.get("mistakes") or ():
        place = (mistake["split"], mistake["index"])
        images.setdefault(place, {**mistake, "answers": []})["answers"].append(mistake)

    def weight(image: dict[str, Any]) -> tuple[int, float]:
        return len(image["answers"]), max(number(answer.get("confidence")) for answer in image["answers"])

    return sorted(images.values(), key=weight, reverse=True)[:MOST_PICTURES]


def _next_command(report: Mapping[str, Any]) -> str | None:
    """The command that trains the pick as it was judged, quoted for a shell."""
    pick, data = report.get("pick", {}).get("name"), report.get("data", {}).get("path")
    contender = next((c for c in report.get("contenders", ()) if c["name"] == pick), {})
    if pick is None or data is None:
        return None
    words = ["vertebra", "train", str(data), "--backbone", contender.get("address", pick)]
    for name, value in (contender.get("options") or {}).items():
        known = {
            "weights": ["--pretrained"] if value == "pretrained" else None,
            "image_size": ["--img-size", str(value)],
        }
        words += known.get(name) or ["--set", f"backbone.options.{name}={value}"]
        if name == "weights" and value != "pretrained":  # train proposes its recipe before it sees --set
            words += ["--recipe", "finetune" if contender.get("training") == "pretrained" else "scratch"]
    return shlex.join(words)


def _date(iso: str) -> str:
    try:
        return f"{datetime.fromisoformat(iso):%d %B %Y, %H:%M}".lstrip("0")
    except ValueError:
        return iso
