"""Numbers and names as a reader of the report wants them: the template's filters."""

import math
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

GLUE = "\N{NO-BREAK SPACE}"
SPELLED = {
    **{
        "top1": "top-1",
        "top5": "top-5",
        "acc": "accuracy",
        "f1": "F1",
        "ece": "ECE",
        "nll": "NLL",
        "map": "mAP",
        "auroc": "AUROC",
    },
    **{"gmacs": "MACs", "params": "parameters", "mem": "memory", "p50": "latency p50", "p90": "latency p90"},
}
# Characters that turn the direction of text or cannot be printed show as their escape: no name can pose as another.
_HIDDEN = [*range(0x00, 0x09), *range(0x0B, 0x20), 0x7F, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
VISIBLE = {code: f"\\u{code:04x}" for code in _HIDDEN}


def figure(value: Any, unit: str = "", decimals: int | None = None) -> str:
    """A number as a reader wants it, without its unit: one decimal for %, else three significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if decimals is not None or unit == "%":
        text = f"{value:.{1 if decimals is None else decimals}f}"
    elif value == 0 or abs(value) >= 100 or (isinstance(value, int) and not unit):
        text = f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    else:
        text = f"{value:#.3g}"
    return text.replace("-", "−")


def quantity(value: Any, unit: str = "") -> str:
    """A number with its unit, such as `85.1 %`."""
    number = figure(value, unit)
    return f"{number}{GLUE}{unit}" if unit and number != "–" else number


def label(score: Mapping[str, Any]) -> str:
    """A score's name as a column's head, without the probe and the unit that stand beside it."""
    name = re.sub(r"_(ms|mb|m)$", "", str(score.get("name", "")).removeprefix(f"{score.get('probe')}_"))
    name = re.sub(r"^fewshot_(\d+)$", r"\1-shot", name)
    return "throughput" if name == "img_per_s" else " ".join(SPELLED.get(word, word) for word in name.split("_"))


def limit(name: str, value: Any) -> str:
    """A constraint such as max_latency_ms as words: `max latency 20 ms`."""
    words = name.split("_")
    unit = {"ms": "ms", "m": "M", "mb": "MB"}.get(words[-1], "")
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{' '.join(words[:-1] if unit else words)} {shown} {unit}".rstrip()


def probability(p: Any) -> str:
    """A p value."""
    if not isinstance(p, int | float):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: Any) -> str:
    """Seconds as `48 s`, `23 min` or `1 h 12 min`."""
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f}{GLUE}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}{GLUE}h {minutes}{GLUE}min" if hours else f"{minutes}{GLUE}min"


def stretch(percent: Any) -> float | None:
    """Accuracy on a scale that is logarithmic in the error: near 100 % little differences mean much."""
    return -math.log10(error_percent(percent)) if isinstance(percent, int | float) else None


def root(value: Any) -> float | None:
    """The square root with the sign of the value: large differences do not hide the small ones."""
    return math.copysign(math.sqrt(abs(value)), value) if isinstance(value, int | float) else None


def breakable(name: Any) -> Markup:
    """A name, escaped, that a narrow column may break after `_`, `.`, `/` and `-`."""
    return Markup("<wbr>").join(re.split(r"(?<=[_./-])(?=.)", str(name)))


def error_percent(percent: float) -> float:
    """100 minus an accuracy, kept away from zero for logarithms."""
    return max(100 - percent, 0.05)


def visible(value: Any) -> Any:
    """Text with its hidden characters spelled out."""
    return value.translate(VISIBLE) if isinstance(value, str) else value
