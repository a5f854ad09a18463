"""Amounts as a user writes them: `10m`, `20ms`, `30M`, `2GB`."""

import re

from vertebra.errors import UsageError

SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1000.0}
MILLIONS = {"K": 1e-3, "M": 1.0, "G": 1000.0, "B": 1000.0}
MEGABYTES = {"KB": 1e-3, "MB": 1.0, "GB": 1000.0, "KiB": 1.024e-3, "MiB": 1.048576, "GiB": 1073.741824}


def amount(text: str | float, units: dict[str, float], bare: str, option: str, example: str) -> float:
    """A number with its unit, in the unit `bare`.

    Args:
        text: `20ms`, `1.5 GB`; a number, or text without a unit, is in `bare` already.
        units: unit -> how many of the result's units it is.
        bare: the unit of a plain number.
        option: for the message.
        example: for the message.

    Raises:
        UsageError: no such number or unit, or not above 0.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _unit(found.group(2) or bare, units) if found else None
    if not found or unit is None or float(found.group(1)) <= 0:
        raise UsageError(
            f"{option} is {str(text)!r}; write a number above 0 with one of {', '.join(units)}, as {example}"
        )
    return float(found.group(1)) * units[unit]


def _unit(word: str, units: dict[str, float]) -> str | None:
    """The unit as `units` spells it; case matters only where it must."""
    if word in units:
        return word
    alike = [unit for unit in units if unit.lower() == word.lower()]
    return alike[0] if len(alike) == 1 else None


def duration(seconds: float) -> str:
    """Seconds as `48 s`, `23 min` or `1 h 12 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
