"""Shapes and real handwriting as signed distances, drawn as antialiased masks at any size and angle.

Every glyph fills the unit circle: it touches the circle, and its centre is the circle's. So a radius in pixels says
how large a thing is, whatever its shape and angle.

Twelve shapes are formulas, exact at any size. The ten digits are scikit-learn's 1,797 real ones (UCI, public domain),
whose 8 x 8 pixels are interpolated once and kept as a field of distances.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from vertebra.errors import UsageError, near

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Names of the digits; the position is the value."""

FIELD = 64
"""Side of a digit's field of distances, over x and y from -1 to 1."""


class Stamp(NamedTuple):
    """A mask in a window of a canvas.

    Attributes:
        alpha: (h, w) float32, share of each pixel that is covered, 0..1.
        left: column of the window's first pixel; may be negative.
        top: row of the window's first pixel; may be negative.
    """

    alpha: np.ndarray
    left: int
    top: int


def _fold(x: np.ndarray, y: np.ndarray, sides: int) -> tuple[np.ndarray, np.ndarray]:
    """Points turned into the wedge around the upward axis of a figure that repeats `sides` times."""
    turn = 2 * math.pi / sides
    angle, radius = np.arctan2(x, -y), np.hypot(x, y)
    angle = angle - turn * np.rint(angle / turn)
    return radius * np.sin(angle), -radius * np.cos(angle)


def _box(x: np.ndarray, y: np.ndarray, across: float, down: float) -> np.ndarray:
    return np.maximum(np.abs(x) - across, np.abs(y) - down)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _polygon(sides: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A regular polygon that stands on a side where it has an odd number of them."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        _, up = _fold(x, -y, sides)  # the middle of a side points along the axis
        return -up - math.cos(math.pi / sides)

    return distance


def _star(x: np.ndarray, y: np.ndarray, points: int = 5, inner: float = 0.45) -> np.ndarray:
    """Half-plane through a tip (0, -1) and the notch next to it, in one folded wedge."""
    x, y = _fold(x, y, points)
    half = math.pi / points
    notch_x, notch_y = inner * math.sin(half), -inner * math.cos(half)
    edge_x, edge_y = notch_x, notch_y + 1
    return (np.abs(x) * edge_y - (y + 1) * edge_x) / math.hypot(edge_x, edge_y)


def _diamond(x: np.ndarray, y: np.ndarray, width: float = 0.62) -> np.ndarray:
    return (np.abs(x) + width * np.abs(y) - width) / math.hypot(1, width)


def _cross(x: np.ndarray, y: np.ndarray, arm: float = 0.3) -> np.ndarray:
    reach = math.sqrt(1 - arm * arm)
    return np.minimum(_box(x, y, reach, arm), _box(x, y, arm, reach))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two discs on the upper sides of a square that stands on its corner."""
    half, lobe, drop = 0.7928, 0.5606, 0.2069  # half diagonal, radius, centre of the square below the circle's
    x, y = np.abs(x), y - drop
    square = (x + np.abs(y) - half) * math.sqrt(0.5)
    return np.minimum(square, np.hypot(x - half / 2, y + half / 2) - lobe)


def _ring(x: np.ndarray, y: np.ndarray, width: float = 0.46) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 1 + width / 2) - width / 2


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1, 0.78 - np.hypot(x - 0.44, y))


def _arrow(x: np.ndarray, y: np.ndarray, shaft: float = 0.25, head: float = 0.75, base: float = -0.1) -> np.ndarray:
    tail, neck = math.sqrt(1 - shaft * shaft), base - 0.2  # the shaft reaches into the head, so that no seam shows
    x, length = np.abs(x), base + 1
    flank = (x * length - (y + 1) * head) / math.hypot(length, head)
    return np.minimum(
        np.maximum(flank, y - base), np.maximum(x - shaft, np.abs(y - (tail + neck) / 2) - (tail - neck) / 2)
    )


_FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": lambda x, y: _box(x, y, math.sqrt(0.5), math.sqrt(0.5)),
    "triangle": _polygon(3),
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "arrow": _arrow,
    "diamond": _diamond,
    "hexagon": _polygon(6),
    "pentagon": _polygon(5),
}

SHAPES = tuple(_FORMULAS)
"""Names of the shapes; triangle, arrow, heart, star and pentagon stand upright at angle 0."""

GLYPHS = (*DIGITS, *SHAPES)
"""Names of all that can be drawn."""


@cache
def digit_samples(part: str = "all") -> tuple[np.ndarray, ...]:
    """Which samples of scikit-learn's digits may be drawn: rows of its table, one array a digit, zero to nine.

    Args:
        part: "train", "val" or "test" for the rows of that split of `vertebra.data.digits`, so that no handwriting
            is in two splits; "all" for all.
    """
    from vertebra.data.digits import digits

    splits = digits().splits
    chosen = list(splits.values()) if part == "all" else [splits[part]]
    rows = np.concatenate([split.rows for split in chosen])
    labels = np.concatenate([np.asarray(split.targets) for split in chosen])
    return tuple(np.sort(rows[labels == digit]) for digit in range(10))


@cache
def _levels() -> np.ndarray:
    """scikit-learn's digits, (1797, 8, 8) float32 ink, 0..1."""
    from sklearn.datasets import load_digits

    return (np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8) / 16).astype(np.float32)


@cache
def _field(row: int) -> np.ndarray:
    """Signed distances (FIELD, FIELD) float32 of one handwritten digit that fills the unit circle."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates, zoom

    ink = zoom(np.pad(_levels()[row], 2), 8, order=3, grid_mode=True, mode="grid-constant")  # (96, 96)
    inside = ink > 0.45  # of the ink of a full stroke
    outside, within = (np.asarray(distance_transform_edt(mask)) for mask in (~inside, inside))
    distance = gaussian_filter(outside - within, 1.0)
    centre, radius = circle_around(np.argwhere(np.abs(distance + 0.5) <= 1).astype(np.float64))
    steps = ((np.arange(FIELD) + 0.5) * (2 / FIELD) - 1) * radius
    places = np.stack(np.meshgrid(centre[0] + steps, centre[1] + steps, indexing="ij"))
    return (map_coordinates(distance, places, order=1, mode="nearest") / radius).astype(np.float32)


def circle_around(points: np.ndarray, rounds: int = 200) -> tuple[np.ndarray, float]:
    """The smallest circle around points (n, 2), to a few thousandths (Badoiu and Clarkson's iteration)."""
    centre = points.mean(0)
    for step in range(1, rounds + 1):
        away = points - centre
        centre = centre + away[np.argmax((away * away).sum(1))] / (step + 1)
    return centre, float(np.sqrt(((points - centre) ** 2).sum(1).max()))


def _sampled(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A field of distances at points of the unit circle, bilinear; what lies outside is at least as far as its edge."""
    column, row = (np.clip((c + 1) * (FIELD / 2) - 0.5, 0, FIELD - 1.001) for c in (x, y))
    left, top = column.astype(np.intp), row.astype(np.intp)
    across, down = column - left, row - top
    flat, start = field.ravel(), top * FIELD + left
    upper = flat[start] + across * (flat[start + 1] - flat[start])
    lower = flat[start + FIELD] + across * (flat[start + FIELD + 1] - flat[start + FIELD])
    return np.maximum(upper + down * (lower - upper), np.hypot(x, y) - 1)


def distance(name: str, x: np.ndarray, y: np.ndarray, *, sample: int = 0) -> np.ndarray:
    """Signed distance to the outline of a glyph that fills the unit circle; negative inside.

    Exact near straight edges and arcs, and never too large by much elsewhere, which is what antialiasing needs.

    Args:
        name: one of `GLYPHS`.
        x: coordinates to the right, any shape.
        y: coordinates down, the same shape.
        sample: row of scikit-learn's digits (see `digit_samples`); shapes have none.

    Returns:
        Distances in radii, of the shape of `x`.

    Raises:
        UsageError: no glyph has that name.
    """
    if name in _FORMULAS:
        return _FORMULAS[name](x, y)
    if name in DIGITS:
        return _sampled(_field(int(sample)), x, y)
    raise UsageError(f"no glyph is called {name!r}{near(name, GLYPHS)}; glyphs: {', '.join(GLYPHS)}")


def turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the frame of a glyph that is turned by `angle` radians clockwise."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def window(x: float, y: float, radius: float, margin: int = 1) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Pixel centres around a circle, relative to its centre.

    Returns:
        Columns (1, w) and rows (h, 1) float32 in pixels from the centre, and the window's left and top pixel.
    """
    left, top = int(np.floor(x - radius)) - margin, int(np.floor(y - radius)) - margin
    right, bottom = int(np.ceil(x + radius)) + margin, int(np.ceil(y + radius)) + margin
    columns = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x))[None, :]
    rows = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    return columns, rows, left, top


def draw(name: str, x: float, y: float, radius: float, angle: float = 0.0, *, sample: int = 0) -> Stamp:
    """The mask of a glyph, antialiased, in the smallest window that holds it.

    Args:
        name: one of `GLYPHS`.
        x: centre in pixels from the canvas' left edge; need not be whole or inside.
        y: centre in pixels from the canvas' top edge.
        radius: of the circle that the glyph fills, in pixels.
        angle: turn in radians, clockwise.
        sample: row of scikit-learn's digits; shapes have none.

    Raises:
        UsageError: no glyph has that name.
    """
    columns, rows, left, top = window(x, y, radius)
    across, down = turned(columns, rows, angle)
    scale = np.float32(1 / radius)
    inside = distance(name, across * scale, down * scale, sample=sample) * np.float32(-radius)
    return Stamp(np.clip(inside + np.float32(0.5), 0, 1).astype(np.float32, copy=False), left, top)


def placed(stamp: Stamp, height: int, width: int) -> tuple[slice, slice, np.ndarray]:
    """The part of a stamp that is on a canvas.

    Returns:
        Rows and columns of the canvas, and the stamp's alpha (h, w) there; empty where nothing is on the canvas.
    """
    rows, columns = stamp.alpha.shape
    top, left = min(max(stamp.top, 0), height), min(max(stamp.left, 0), width)
    bottom, right = max(min(stamp.top + rows, height), top), max(min(stamp.left + columns, width), left)
    inner = stamp.alpha[top - stamp.top : bottom - stamp.top, left - stamp.left : right - stamp.left]
    return slice(top, bottom), slice(left, right), inner
