"""Colours with names, and procedural textures: functions of coordinates, so that they move, turn and wrap with things.

A pattern is a field of mixing weights, 0..1, between a first and a second colour. Coordinates are in any unit; `scale`
says how many of them one period of the pattern takes.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from vertebra.errors import UsageError, near

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 30),
    "yellow": (245, 216, 60),
    "green": (46, 158, 72),
    "cyan": (60, 200, 215),
    "blue": (44, 92, 214),
    "purple": (140, 70, 190),
    "pink": (244, 130, 180),
}
"""Names and RGB of the things' colours."""

Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

LATTICE = 16
"""Side of the table of random values that a noise repeats."""


def _soft(wave: np.ndarray, edge: float = 4.0) -> np.ndarray:
    """A wave in -1..1 made a band with soft edges, 0..1."""
    return np.clip(wave * edge + 0.5, 0, 1)


def _plain(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.zeros(np.broadcast_shapes(u.shape, v.shape), dtype=np.float32)


def _striped(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return _soft(np.sin(math.tau * v) + 0 * u)


def _dotted(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return _soft(np.cos(math.tau * u) + np.cos(math.tau * v) - 0.5, 3.0)


def _checked(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return _soft(np.sin(math.pi * u) * np.sin(math.pi * v), 8.0)


def _zigzag(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    fold = np.abs((u * 0.5) % 1 - 0.5) * 2
    return _soft(np.sin(math.tau * (v + 0.8 * fold)))


def _brick(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    row = np.floor(2 * v)
    across = (u + 0.5 * (row % 2)) % 1
    joint = np.minimum(np.minimum(across, 1 - across) * 2, 0.5 - np.abs((2 * v) % 1 - 0.5))
    return np.clip(1.5 - joint * 10, 0, 1)


def _woven(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    over = np.floor(2 * u) + np.floor(2 * v)
    along = np.where(over % 2 < 1, 2 * u, 2 * v) % 1
    return np.clip(4 * (along - 0.5) ** 2 + 0.25 * (over % 2), 0, 1)


def _marbled(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(math.tau * (u + 0.7 * v + 1.6 * (noise(0.7 * u, 0.7 * v, table) - 0.5)))


def _cloudy(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.clip(1.5 * (0.65 * noise(u, v, table) + 0.35 * noise(2.1 * u, 2.1 * v, table)) - 0.25, 0, 1)


def _grainy(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    return noise(6 * u, 6 * v, table)


def _wooden(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    rings = v * 2 + 1.2 * noise(0.4 * u, 1.2 * v, table)
    return 0.7 * (rings % 1) ** 1.5 + 0.3 * noise(2 * u, 14 * v, table)


_PATTERNS: dict[str, Pattern] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
    "zigzag": _zigzag,
    "brick": _brick,
    "woven": _woven,
    "marbled": _marbled,
    "cloudy": _cloudy,
    "grainy": _grainy,
    "wooden": _wooden,
}

TEXTURES = ("plain", "striped", "dotted", "checked")
"""Textures of things, of which captions speak."""

STRANGE = ("zigzag", "brick", "woven", "marbled")
"""Textures that things bear under the shift of texture, and never else."""

GROUNDS = ("plain", "cloudy", "grainy", "marbled", "striped", "checked")
"""Textures of backgrounds."""

STRANGE_GROUNDS = ("brick", "woven", "wooden", "zigzag")
"""Textures of backgrounds under the shift of texture, and never else."""

PATTERNS = tuple(_PATTERNS)
"""Names of all patterns."""


def lattice(random: np.random.Generator) -> np.ndarray:
    """Random values that patterns with noise read, (LATTICE, LATTICE) float32, 0..1."""
    return random.random((LATTICE, LATTICE), dtype=np.float32)


@cache
def _default_table() -> np.ndarray:
    return lattice(np.random.default_rng(0))


def noise(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Smooth noise that reads its lattice at whole coordinates and repeats after LATTICE of them; 0..1."""
    left, top = np.floor(u), np.floor(v)
    across, down = u - left, v - top
    across, down = across * across * (3 - 2 * across), down * down * (3 - 2 * down)
    columns, rows = left.astype(np.intp), top.astype(np.intp) * LATTICE
    next_columns, next_rows = (columns + 1) % LATTICE, (rows + LATTICE) % (LATTICE * LATTICE)
    columns, rows, flat = columns % LATTICE, rows % (LATTICE * LATTICE), table.ravel()
    upper = flat[rows + columns] * (1 - across) + flat[rows + next_columns] * across
    lower = flat[next_rows + columns] * (1 - across) + flat[next_rows + next_columns] * across
    return upper + down * (lower - upper)


def pattern(
    name: str, u: np.ndarray, v: np.ndarray, *, scale: float = 1.0, angle: float = 0.0, table: np.ndarray | None = None
) -> np.ndarray:
    """Mixing weights of a texture at coordinates.

    Args:
        name: one of `PATTERNS`.
        u: coordinates to the right, float32; any shape that broadcasts with `v`.
        v: coordinates down.
        scale: of the coordinates, what one period takes.
        angle: turn of the pattern in radians.
        table: what `lattice` drew, for patterns with noise.

    Returns:
        Weights of the second colour, float32, 0..1.

    Raises:
        UsageError: no pattern has that name.
    """
    if name not in _PATTERNS:
        raise UsageError(f"no texture is called {name!r}{near(name, PATTERNS)}; textures: {', '.join(PATTERNS)}")
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    found = _PATTERNS[name](u * cos + v * sin, v * cos - u * sin, _default_table() if table is None else table)
    return found.astype(np.float32, copy=False)


def mixed(weights: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two RGB colours (3,) mixed by weights (...), as (..., 3) float32."""
    first, second = np.asarray(first, dtype=np.float32), np.asarray(second, dtype=np.float32)
    return first + weights[..., None] * (second - first)


def second_colour(first: np.ndarray, contrast: float = 0.45) -> np.ndarray:
    """The colour that goes with one in a pattern: lighter where it is dark, darker where it is light; (3,) float32.

    The hue stays, so that a red thing with dots is red all over.
    """
    first = np.asarray(first, dtype=np.float32)
    bright = float(first @ np.array([0.299, 0.587, 0.114], dtype=np.float32)) > 120
    return first * np.float32(1 - contrast) if bright else first + np.float32(contrast) * (255 - first)


def muted(random: np.random.Generator, low: float = 70, high: float = 190) -> np.ndarray:
    """A colour of low saturation for backgrounds, (3,) float32."""
    level, tint = random.uniform(low, high), random.uniform(-28, 28, 3).astype(np.float32)
    return np.clip(level + tint - tint.mean(), 0, 255).astype(np.float32)


@cache
def _pixels(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres, (1, W) and (H, 1) float32."""
    return np.arange(width, dtype=np.float32)[None, :] + 0.5, np.arange(height, dtype=np.float32)[:, None] + 0.5


def ground(
    height: int, width: int, random: np.random.Generator, *, texture: str | None = None, strange: bool = False
) -> np.ndarray:
    """A background: two muted colours in a pattern, with a slope of light across.

    Args:
        height: in pixels.
        width: in pixels.
        random: draws colours, pattern, period and angle; always the same number of times.
        texture: one of `PATTERNS`; None draws from `GROUNDS`.
        strange: draws from `STRANGE_GROUNDS` instead.

    Returns:
        (H, W, 3) float32, 0..255.
    """
    choice, period, angle, slope, turn = random.random(5).tolist()
    first = muted(random)
    second = np.clip(first + (1 if random.random() < 0.5 else -1) * random.uniform(18, 46), 0, 255)
    table = lattice(random)
    names = STRANGE_GROUNDS if strange else GROUNDS
    name = texture or names[int(choice * len(names))]
    u, v = _pixels(height, width)
    scale = max(height, width) * (0.12 + 0.22 * period)
    weights = pattern(name, u, v, scale=scale, angle=math.tau * angle, table=table)
    light = (u - width / 2) * (math.cos(math.tau * turn) / width) + (v - height / 2) * (
        math.sin(math.tau * turn) / height
    )
    return np.clip(mixed(weights, first, second) + (50 * slope * light)[..., None], 0, 255)
