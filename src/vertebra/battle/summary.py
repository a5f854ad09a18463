"""From rows to report.json: what `Ranking.to_json` gives and the report renders."""

import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vertebra.battle.cells import Row, plain
from vertebra.battle.contenders import Contender, Facts, allows_commercial
from vertebra.battle.pools import memory_bytes
from vertebra.battle.ranking import (
    LATENCY,
    MEMORY,
    Column,
    Constraints,
    Table,
    best_of,
    choose,
    columns,
    comparable,
    comparisons,
    tabulate,
    tied,
)
from vertebra.battle.statistics import Comparison
from vertebra.data.dataset import Dataset
from vertebra.data.pixels import available_cores
from vertebra.paper import pages
from vertebra.studies.bob import Setting, bob

WORST = 24
"""Mistakes of each contender in the report."""

TASKS: Sequence[tuple[str, Callable[[str], bool]]] = (
    ("classification", lambda name: name in ("linear_top1", "linear_map", "finetune_top1", "finetune_map")),
    ("low-label", lambda name: name.startswith("fewshot_")),
    ("retrieval", lambda name: name in ("map", "retrieval_map")),
    ("robustness", lambda name: name.startswith("corruption_top1") or name == "robust_top1"),
)
"""Tasks of Battle of the Backbones -> which scores are their settings."""


@dataclass(frozen=True)
class Told:
    """What a battle knows beside its rows.

    Attributes:
        command: that runs it again.
        data: with splits train, val and test.
        fingerprint: of the data.
        contenders: all of them.
        facts: contender -> what is known of it.
        fixed: whether a contender's result on a probe does not depend on the seed.
        probes: in the user's order.
        primary: the score that decides, or None to take the probe's first.
        constraints: of the pick.
        settings: seeds, budget and image_size as the report shows them.
        notes: beside those of the data.
        seconds: that the battle took.
    """

    command: str
    data: Dataset
    fingerprint: str
    contenders: Sequence[Contender]
    facts: Mapping[str, Facts]
    fixed: Callable[[str, str], bool]
    probes: Sequence[str]
    primary: str
    constraints: Constraints
    settings: Mapping[str, Any]
    notes: Sequence[str]
    seconds: float


def summarise(told: Told, rows: Iterable[Row]) -> dict[str, Any]:
    """The whole of report.json."""
    rows = sorted(rows, key=lambda row: (told.probes.index(row.cell.probe), row.cell.seed))
    done, aside = comparable((row for row in rows if row.state == "done"), told.fixed)
    named = columns(done)
    table = tabulate(done, named)
    shown = {column.name: column for column in named.values()}
    judged = {
        name: comparisons(table, column, [c for c in table if told.fixed(c, column.probe)])
        for name, column in shown.items()
        if column.unit not in ("M", "G")
    }
    refused, excess = judge_constraints(told, table)
    primary = shown.get(told.primary) or Column(told.primary, "", "%", "higher")
    params = {name: facts.params_m for name, facts in told.facts.items()}
    still = [name for name in table if told.fixed(name, primary.probe)]
    pick = choose(primary, table, judged.get(primary.name, []), refused, params, excess, still)
    order = _order(told, table, primary)
    return plain(
        {
            "vertebra": version("vertebra"),
            "created": datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
            "command": told.command,
            "data": _data(told, aside),
            "machine": machine(),
            "settings": {**told.settings, "constraints": _given(told.constraints), "primary": told.primary},
            "contenders": [_contender(one, told, refused[one.name]) for one in told.contenders],
            "probes": [{"name": name, "title": _title(name)} for name in told.probes],
            "scores": [asdict(column) for column in shown.values()],
            "table": {name: _cells(name, table, shown, judged, _unstable(done)) for name in order if name in table},
            "comparisons": {name: [_pair(pair) for pair in pairs] for name, pairs in judged.items() if pairs},
            "pick": asdict(pick),
            "pareto": _pareto(table, primary),
            "aggregate": _aggregate(table, shown),
            "per_class": _per_class(done, primary),
            "mistakes": _mistakes(done, primary),
            "explanations": _explanations(done),
            "robustness": _robustness(done),
            "calibration": _calibration(done),
            "left_out": _left_out(rows),
            "failed": _failed(rows),
            "seconds": told.seconds,
        }
    )


def judge_constraints(told: Told, table: Table) -> tuple[dict[str, list[str]], dict[str, float]]:
    """What each contender breaks, and by what factor it exceeds the worst of it."""
    refused: dict[str, list[str]] = {}
    excess: dict[str, float] = {}
    for contender in told.contenders:
        name = contender.name
        broken = list(_broken(told.constraints, told.facts.get(name), table.get(name, {})))
        refused[name] = [why for why, _ in broken]
        if broken and name in table:
            excess[name] = max(factor for _, factor in broken)
    return refused, excess


def _broken(limits: Constraints, facts: Facts | None, row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    measured = [
        ("latency", limits.max_latency, LATENCY, "ms"),
        ("peak memory", limits.max_memory, MEMORY, "MB"),
    ]
    for what, limit, score, unit in measured:
        if limit is None:
            continue
        if score not in row:
            yield f"its {what} was not measured", float("inf")
        elif row[score].value > limit:
            yield f"its {what} is {row[score].value:.3g} {unit}, above {limit:g} {unit}", row[score].value / limit
    if facts is None:
        return
    if limits.max_params is not None and facts.params_m > limits.max_params:
        yield (
            f"it has {facts.params_m:.3g} M parameters, above {limits.max_params:g} M",
            facts.params_m / limits.max_params,
        )
    if limits.licence == "commercial" and facts.weights is not None:
        licence = facts.weights["licence"]
        if not licence:
            yield "the licence of its weights is not known", float("inf")
        elif not allows_commercial(licence):
            yield f"its weights are under {licence}, which is not known to allow commercial use", float("inf")


def machine() -> dict[str, Any]:
    """What the battle ran on."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "accelerator": accelerator,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name: Linux keeps it in a file, elsewhere Python knows it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _data(told: Told, aside: Sequence[str]) -> dict[str, Any]:
    data = told.data
    return {
        "path": data.path,
        "layout": data.layout,
        "label": data.label,
        "classes": list(data.classes),
        "fingerprint": told.fingerprint,
        "sizes": {name: len(split) for name, split in data.splits.items()},
        "notes": [*data.notes, *told.notes, *aside],
    }


def _given(constraints: Constraints) -> dict[str, Any]:
    """Constraints that ask something, with their units in the names."""
    names = {"max_latency": "max_latency_ms", "max_params": "max_params_m", "max_memory": "max_memory_mb"}
    return {names.get(name, name): value for name, value in asdict(constraints).items() if value not in (None, "any")}


def _contender(contender: Contender, told: Told, why_not: Sequence[str]) -> dict[str, Any]:
    facts = told.facts.get(contender.name)
    known: dict[str, Any] = {
        "training": contender.training,
        "weights": None,
        "params_m": None,
        "gmacs": None,
        "input": None,
    }
    if facts:
        known = {
            "training": facts.training,
            "weights": facts.weights,
            "params_m": round(facts.params_m, 3),
            "gmacs": round(facts.gmacs, 4),
            "input": facts.size,
        }
    address = contender.spec.address
    options = dict(contender.spec.options)
    return {
        "name": contender.name,
        "address": address,
        "options": options,
        **known,
        "allowed": not why_not,
        "why_not": list(why_not),
    }


def _title(probe: str) -> str:
    """First line of the probe's page, or its address."""
    page = next((page for page in pages() if page.kind == "probes" and page.name == probe.partition("?")[0]), None)
    return page.summary.rstrip(".").partition(":")[0] if page else probe


def _order(told: Told, table: Table, primary: Column) -> list[str]:
    """Contenders, best first; those without the primary score last."""
    sign = 1 if primary.better == "higher" else -1
    names = [contender.name for contender in told.contenders]

    def place(name: str) -> float:
        one = table.get(name, {}).get(primary.name)
        return float("inf") if one is None else -sign * one.value

    return sorted(names, key=place)


def _cells(
    name: str,
    table: Table,
    shown: Mapping[str, Column],
    judged: Mapping[str, Sequence[Comparison]],
    unstable: Collection[tuple[str, str]],
) -> dict[str, Any]:
    cells = {}
    for score, one in table[name].items():
        best = best_of(table, table, shown[score])
        cells[score] = {
            "value": one.value,
            "low": one.low,
            "high": one.high,
            "n": one.n,
            "seeds": one.seeds,
            "best": name == best,
            "tied": best is not None and name in tied(best, judged.get(score, [])),
        }
        if (name, shown[score].probe) in unstable:
            cells[score]["unstable"] = True
    return cells


def _unstable(done: Iterable[Row]) -> set[tuple[str, str]]:
    """(contender, probe) whose timings the machine was too busy for."""
    return {(row.cell.contender, row.cell.probe) for row in done if row.report.details.get("unstable")}


def _pair(pair: Comparison) -> dict[str, Any]:
    verdict = pair.verdict if pair.verdict == "tie" else f"{pair.verdict} is better"
    return {**asdict(pair), "verdict": verdict}


def _pareto(table: Table, primary: Column) -> dict[str, Any]:
    """Latency against the primary score; on the front is who is not beaten in both."""
    both = {name: row for name, row in table.items() if LATENCY in row and primary.name in row}
    sign = 1 if primary.better == "higher" else -1
    points = []
    for name, row in both.items():
        x, y = row[LATENCY], row[primary.name]
        beaten = any(
            other[LATENCY].value <= x.value
            and sign * other[primary.name].value >= sign * y.value
            and (other[LATENCY].value, other[primary.name].value) != (x.value, y.value)
            for other in both.values()
        )
        points.append({"name": name, "x": x.value, "y": y.value, "low": y.low, "high": y.high, "front": not beaten})
    return {"x": LATENCY, "y": primary.name, "points": points}


def _aggregate(table: Table, shown: Mapping[str, Column]) -> dict[str, Any]:
    """Battle of the Backbones' ranking, where two contenders have every score that its tasks need."""
    settings = []
    for task, belongs in TASKS:
        for column in shown.values():
            if belongs(column.name):
                rows = {name: row[column.name] for name, row in table.items() if column.name in row}
                samples = {name: np.stack(list(one.samples.values())) for name, one in rows.items() if one.samples}
                scores = {name: one.value for name, one in rows.items()}
                settings.append(Setting(task, column.name, scores, column.better, samples))
    complete = [name for name in table if all(name in setting.scores for setting in settings)]
    if len(complete) < 2 or not settings:
        return {}
    report = bob(settings)()
    found = dict(report.details)
    z = {name: score.value for name, score in report.scores.items()}
    return {"bob": {**found, "z": z, "stability": _said(found["stability"]), "leave_one_out": found["stability"]}}


def _said(stability: Mapping[str, Any]) -> str:
    """Leave-one-task-out stability in a sentence."""
    if not stability:
        return "One task only: nothing can be left out."
    same = sum(found["same_first"] for found in stability.values())
    least = min(found["tau"] for found in stability.values())
    return (
        f"Leaving one task out keeps the first place in {same} of {len(stability)} cases; "
        f"Kendall's tau with the full order is {least:.2f} or more."
    )


def _first_seed(done: Iterable[Row], probe: str) -> dict[str, Mapping[str, Any]]:
    """Contender -> details of a probe, of its first seed."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in done:
        if row.cell.probe == probe:
            found.setdefault(row.cell.contender, row.report.details)
    return found


def _every_seed(done: Iterable[Row], probe: str) -> dict[str, list[Mapping[str, Any]]]:
    """Contender -> details of a probe, one a seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in done:
        if row.cell.probe == probe:
            found.setdefault(row.cell.contender, []).append(row.report.details)
    return found


def _per_class(done: Sequence[Row], primary: Column) -> dict[str, dict[str, float | None]]:
    """Score of each class in percent, mean over seeds."""
    found: dict[str, dict[str, float | None]] = {}
    for name, details in _every_seed(done, primary.probe).items():
        values: dict[str, list[float]] = {}
        for entry in (entry for one in details for entry in one.get("per_class", ())):
            values.setdefault(entry["class"], []).extend([] if entry["value"] is None else [entry["value"]])
        found[name] = {label: float(np.mean(row)) if row else None for label, row in values.items()}
    return {name: row for name, row in found.items() if row}


def _mistakes(done: Sequence[Row], primary: Column) -> list[dict[str, Any]]:
    """The most confident errors of each contender, of its first seed."""
    return [
        {"contender": name, "split": "test", **mistake}
        for name, details in _first_seed(done, primary.probe).items()
        for mistake in details.get("mistakes", ())[:WORST]
    ]


def _explanations(done: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Where contenders looked in their worst mistakes, of their first seed."""
    found = _first_seed(done, "grad_cam")
    return {name: details["explanations"] for name, details in found.items() if details.get("explanations")}


def _calibration(done: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Reliability of each contender, of its first seed; shares are 0..1."""
    found = {}
    for name, details in _first_seed(done, "calibration").items():
        bins = details["reliability"]
        images = sum(entry["n"] for entry in bins)
        score = next(r.report.scores["ece"] for r in done if (r.cell.contender, r.cell.probe) == (name, "calibration"))
        found[name] = {
            "confidence": [entry["confidence"] / 100 for entry in bins],
            "accuracy": [entry["accuracy"] / 100 for entry in bins],
            "share": [entry["n"] / images for entry in bins],
            "ece": score.value,
        }
    return found


def _robustness(done: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Accuracy by severity and corruption of each contender, of its first seed."""
    return {
        name: {key: details[key] for key in ("severity", "top1", "corruptions")}
        for name, details in _first_seed(done, "corruption").items()
        if "top1" in details
    }


def _left_out(rows: Iterable[Row]) -> list[dict[str, str]]:
    """What was not run, and why: cells of one contender and probe in one line."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row.state in ("left_out", "not_applicable"):
            found.setdefault((row.cell.contender, row.cell.probe, row.error or ""), []).append(row.cell.seed)
    said = []
    for (contender, probe, why), seeds in found.items():
        said.append(
            {"what": f"{contender}, {probe}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", "why": why}
        )
    return said


def _failed(rows: Iterable[Row]) -> list[dict[str, str | None]]:
    """Failures, one line for all seeds that failed alike."""
    found = {(row.cell.contender, row.cell.probe, row.error): row for row in rows if row.state == "failed"}
    return [{"contender": contender, "probe": probe, "error": error} for contender, probe, error in found]
