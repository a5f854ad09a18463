"""The report's charts, as plotly figures in plain JSON: accuracy against cost, robustness, calibration."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from vertebra.battle.wording import VISIBLE, error_percent, label, quantity

# Distinct for colour-blind readers (CIE76 distance of about 22 or more under deuteranopia and protanopia), and each
# has a contrast of 3:1 or more with the light and with the dark page.
HUES = ("#2b6bab", "#b4862a", "#a34172", "#2d9cb2", "#4d6e2c", "#6040ff", "#d57272", "#6680ff")
NEUTRAL = "#808080"
# The light page's colours, as a browser spells them: the style sheet repaints in the dark what a chart drew in them.
PAPER, INK = "rgb(253, 252, 249)", "rgb(27, 29, 33)"
COST_UNITS = ("ms", "s", "img/s", "MB", "GB", "M", "G")
MOST_PANELS = 12


def figures(report: Mapping[str, Any], people: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Plotly figures by section; a section without data has none."""
    panels = [name for name in people if name in report.get("calibration", {})][:MOST_PANELS]
    return {
        "pareto": _pareto(report, people),
        "robustness": _robustness(report, people),
        "calibration": {name: _reliability(report["calibration"][name], people[name]) for name in panels},
        "bins": {name: bins(curve) for name, curve in report.get("calibration", {}).items()},
    }


def _pareto(report: Mapping[str, Any], people: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    pareto, pick = report.get("pareto", {}), report.get("pick", {}).get("name")
    points = [p for p in pareto.get("points", ()) if number(p.get("x")) > 0 and p.get("y") is not None]
    points = [p for p in points if p["name"] in people]
    if not points:
        return None
    x_score, y_score = score_named(report, pareto["x"]), score_named(report, pareto["y"])
    points.sort(key=lambda p: (p["name"] == pick, bool(p.get("front"))))  # what matters is drawn last, on top
    stretched = y_score.get("unit") == "%" and y_score.get("better") != "lower"
    height = error_percent if stretched else float
    reach = [tuple(number(p.get(end), p["y"]) for end in ("low", "high")) for p in points]
    front = sorted((p for p in points if p.get("front")), key=lambda p: p["x"])
    steps = {"shape": "hv", "dash": "dot", "width": 2, "color": NEUTRAL}
    data = [_line([p["x"] for p in front], [height(p["y"]) for p in front], line=steps)]
    for p, (low, high) in zip(points, reach, strict=True):
        person, y = people[p["name"]], height(p["y"])
        colour = HUES[person["hue"]]
        ends = sorted((height(low), height(high)))
        bar = {"type": "data", "symmetric": False, "array": [ends[1] - y], "arrayminus": [y - ends[0]]}
        if p["name"] == pick:
            ring = {"symbol": "circle-open", "size": 33, "color": colour, "line": {"width": 3}}
            data.append(_line([p["x"]], [y], mode="markers", marker=ring))
        hover = f"<b>{inert(p['name'])}</b><br>{_said(p['y'], y_score)}, {_said(p['x'], x_score)}"
        badge = _badge(person, p["x"], y, hover, filled=bool(p.get("front")))
        data.append(badge | {"error_y": {**bar, "width": 0, "thickness": 2, "color": colour}})
    y_axis = _accuracy([end for ends in reach for end in ends]) if stretched else {}
    x_axis = _logarithmic([p["x"] for p in points])
    return {"data": data, "layout": _layout(420, x_axis | _score_title(x_score), y_axis | _score_title(y_score))}


def _robustness(report: Mapping[str, Any], people: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    curves = {name: curve for name, curve in report.get("robustness", {}).items() if name in people}
    curves = {name: curve for name, curve in curves.items() if curve.get("top1") and None not in curve["top1"]}
    if not curves:
        return None
    pick, data = report.get("pick", {}).get("name"), []
    values = [value for curve in curves.values() for value in curve["top1"]]
    ends = apart([curve["top1"][-1] for curve in curves.values()], 0.068 * (max(values) - min(values) or 1))
    for (name, curve), end in zip(curves.items(), ends, strict=True):
        colour, (*x, last), (*_, y) = HUES[people[name]["hue"]], curve["severity"], curve["top1"]
        points = zip((*x, last), curve["top1"], strict=True)
        hover = [f"<b>{inert(name)}</b><br>severity {s}: {quantity(v, '%')}" for s, v in points]
        look = {"color": colour, "width": 4 if name == pick else 2}
        curve_line = _line((*x, last), curve["top1"], mode="lines+markers", line=look, marker={"size": 6})
        data.append(curve_line | {"hoverinfo": "text", "hovertext": hover})
        data.append(_line((last, last + 0.4), (y, end), line={"color": colour, "width": 1}))
        data.append(_badge(people[name], last + 0.4, end, hover[-1]))
    x_axis = {"tickvals": next(iter(curves.values()))["severity"], **_title("severity")}
    return {"data": data, "layout": _layout(420, x_axis, _title("top-1 accuracy, %"))}


def _reliability(curve: Mapping[str, Any], person: Mapping[str, Any]) -> dict[str, Any]:
    filled = bins(curve)
    confidence, accuracy, share = zip(*filled, strict=True) if filled else ((), (), ())
    look = {"line": {"color": HUES[person["hue"]], "width": 1.2}}
    marker = {"size": [5 + 12 * math.sqrt(s) for s in share], "opacity": 1, "line": {"width": 0}}
    hover = [f"said {c:.0%}, right {a:.0%}<br>{s:.1%} of the images" for c, a, s in filled]
    line = _line(confidence, accuracy, mode="lines+markers", marker=marker, cliponaxis=False, **look)
    ideal = _line((0, 1), (0, 1), line={"color": NEUTRAL, "width": 1.5, "dash": "dot"})
    axis = {"range": [0, 1], "tickvals": [0, 0.5, 1], "ticktext": ["0", "50", "100 %"], "automargin": False}
    layout = _layout(170, axis, axis, margin={"l": 44, "r": 22, "t": 12, "b": 24})
    return {"data": [ideal, line | {"hoverinfo": "text", "hovertext": hover}], "layout": layout}


def bins(curve: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(confidence, accuracy, share) of each bin that holds images."""
    columns = (curve.get(name) or () for name in ("confidence", "accuracy", "share"))
    return [(c, a, s) for c, a, s in zip(*columns, strict=True) if None not in (c, a, s) and s > 0]


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved by the least squares that keep each at least `gap` from the next; their order stays."""
    order, steps = np.argsort(heights, kind="stable"), gap * np.arange(len(heights))
    placed = np.empty(len(heights))
    placed[order] = isotonic_regression(np.asarray(heights, dtype=float)[order] - steps).x + steps
    return placed.tolist()


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """An axis around positive values with about four to eight round ticks, however narrow the range."""
    margin = max(1.08, (max(values) / min(values)) ** 0.08)
    low, high = min(values) / margin, max(values) * margin
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [tenth / 10 for tenth in range(10, 100)]):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps if low <= step * 10**power <= high]
        if len(ticks) >= 4:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 8) or 1]
    span = [math.log10(low), math.log10(high)]
    return {"type": "log", "range": span, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _accuracy(percents: Sequence[float]) -> dict[str, Any]:
    """An axis for `error_percent` that reads as accuracy, upwards."""
    axis = _logarithmic([error_percent(percent) for percent in percents])
    labels = [f"{100 - tick:g}" for tick in axis["tickvals"]]
    return axis | {"range": axis["range"][::-1], "ticktext": labels}


def _badge(person: Mapping[str, Any], x: float, y: float, hover: str, filled: bool = True) -> dict[str, Any]:
    """The contender's number on its colour, as the page shows it beside the name."""
    colour = HUES[person["hue"]]
    inside, edge = (colour, PAPER) if filled else (PAPER, colour)
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [x],
        "y": [y],
        "text": [str(person["number"])],
        "textfont": {"size": 12, "weight": 700, "color": ink_on(colour) if filled else INK},
        "marker": {"size": 21, "color": inside, "opacity": 1, "line": {"width": 2, "color": edge}},
        "hoverinfo": "text",
        "hovertext": [hover],
        "cliponaxis": False,
    }


def _line(x: Sequence[Any], y: Sequence[Any], **look: Any) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "hoverinfo": "skip", **look}


def _layout(height: int, x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What all charts share. The colours of text and grid are the page's, set in its style sheet."""
    axis = {"zeroline": False, "automargin": True, "gridcolor": NEUTRAL, "ticks": ""}
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
        **more,
    }


def _title(text: str) -> dict[str, Any]:
    return {"title": {"text": inert(text), "standoff": 8}}


def _score_title(score: Mapping[str, Any]) -> dict[str, Any]:
    """An axis title such as `linear top-1, %`; what a cost is, its name and unit say."""
    probe = "" if score.get("unit") in COST_UNITS else str(score.get("probe", ""))
    name = " ".join(filter(None, (probe, label(score))))
    return _title(", ".join(filter(None, (name, score.get("unit", "")))))


def _said(value: float, score: Mapping[str, Any]) -> str:
    return quantity(value, inert(score.get("unit", "")))


def inert(text: Any) -> str:
    """Text that plotly shows as it is: plotly reads tags, and turns entities back into characters."""
    shown = str(text).translate(VISIBLE)
    return html.escape(shown if len(shown) <= 60 else shown[:59] + "…", quote=False)


def ink_on(colour: str) -> str:
    """White or near-black, whichever can be read on the colour (WCAG relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) >= 4.5 else "#111111"


def score_named(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The score of that name, with or without its probe's name in front."""
    return next((s for s in report.get("scores", ()) if s["name"] == name or s["name"].endswith(f"_{name}")), {})


def number(value: Any, otherwise: float = -math.inf) -> float:
    """A number as it is, anything else as `otherwise`."""
    return value if isinstance(value, int | float) else otherwise
