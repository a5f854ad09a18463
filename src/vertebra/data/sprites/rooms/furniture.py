"""The things in a house as walkers see them: a ray a pixel, in the columns that a thing is in."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vertebra.data.sprites.orbits.solids import KINDS, span
from vertebra.data.sprites.rooms.eyes import EYE, Eyes
from vertebra.data.sprites.rooms.houses import House
from vertebra.data.sprites.textures import TEXTURES, pattern

_BALL, _BOX, _CYLINDER, _CONE = (KINDS.index(kind) for kind in ("ball", "box", "cylinder", "cone"))

PERIOD = 0.3
"""Metres that one period of a thing's texture takes."""


class _Columns(NamedTuple):
    """Columns of pixels that a thing may be in, (M,) each; or pixels, when they were met.

    Attributes:
        view: number of the walker.
        thing: number of the thing in its house, from 0.
        column: of the image.
        kind: positions in `KINDS`.
        half: (M, 3) half extents of the thing.
        turn: (M, 2) cosine and sine of the thing's turn.
        start: (M, 3) the eye in the thing's unit coordinates.
        step: (M, 3) the ray in them; of a column, the last one is how much it falls a metre down.
    """

    view: np.ndarray
    thing: np.ndarray
    column: np.ndarray
    kind: np.ndarray
    half: np.ndarray
    turn: np.ndarray
    start: np.ndarray
    step: np.ndarray

    def of(self, rows: np.ndarray) -> "_Columns":
        """Those at `rows`."""
        return _Columns(*(values[rows] for values in self))


def furnish(
    houses: Sequence[House],
    view: Eyes,
    walls: np.ndarray,
    depth: np.ndarray,
    things: np.ndarray,
    images: np.ndarray | None,
) -> None:
    """Draw things in front of the walls, in place; the nearest wins.

    Args:
        houses: one a walker.
        view: the walkers' eyes.
        walls: (N, S) depth of the walls in the columns.
        depth: (N, S, S) float32 of the house.
        things: (N, S, S) uint8.
        images: (N, S, S, 3) uint8, or None.
    """
    columns, size = _reached(houses, view, walls), view.size
    if not len(columns.view):
        return
    distance = _distances(columns, view.down)
    pixels = ((columns.view[:, None] * size + np.arange(size)) * size + columns.column[:, None]).ravel()  # (M * S)
    flat, rounded = depth.reshape(-1), distance.astype(np.float32).ravel()
    nearer = np.flatnonzero(rounded < flat[pixels])
    np.minimum.at(flat, pixels[nearer], rounded[nearer])
    nearest = nearer[rounded[nearer] == flat[pixels[nearer]]]
    column, row = np.divmod(nearest, size)
    met, shown = columns.of(column), pixels[nearest]
    things.reshape(-1)[shown] = met.thing + 1
    if images is not None:
        rays = np.c_[met.step[:, :2], met.step[:, 2] * view.down[row]]
        local = met.start + distance.ravel()[nearest, None] * rays
        images.reshape(-1, 3)[shown] = (_painted(houses, met, local.T) * fading(flat[shown])).clip(0, 255)


def fading(depth: np.ndarray) -> np.ndarray:
    """Light at a depth, (..., 1): it is brightest where one stands."""
    return (1 / (1 + np.float32(0.055) * depth))[..., None]


def _reached(houses: Sequence[House], view: Eyes, walls: np.ndarray) -> _Columns:
    """Columns that pass a thing closer than its reach, and nearer than the wall."""
    kinds, places, halves, turns = (
        np.stack([getattr(house, name) for house in houses]) for name in ("kinds", "places", "halves", "turns")
    )
    x, y = places[..., 0] - view.x, places[..., 1] - view.y  # (N, K), from the walker
    ahead, right = (x * view.cos + y * view.sin)[..., None], (x * view.sin - y * view.cos)[..., None]
    reach = (halves[..., 0] * np.where(kinds == _BOX, np.sqrt(2), 1))[..., None]
    passes = np.abs(right - ahead * view.across) <= reach * np.sqrt(1 + view.across**2)
    number, thing, column = np.nonzero(passes & (ahead - reach < walls[:, None]) & (ahead + reach > 0))
    half, turn = halves[number, thing], turns[number, thing]
    cos, sin = np.cos(turn), np.sin(turn)
    x, y, dx, dy = -x[number, thing], -y[number, thing], view.dx[number, column], view.dy[number, column]
    start = np.stack([x * cos + y * sin, y * cos - x * sin, EYE - half[:, 2]], 1) / half
    step = np.stack([dx * cos + dy * sin, dy * cos - dx * sin, np.full(len(dx), -1.0)], 1) / half
    return _Columns(number, thing, column, kinds[number, thing], half, np.stack([cos, sin], 1), start, step)


def _distances(columns: _Columns, down: np.ndarray) -> np.ndarray:
    """Depth (M, S) at which the pixels of columns meet their thing; infinite where they miss it."""
    found = np.full((len(columns.view), len(down)), np.inf)
    for kind, name in enumerate(KINDS):
        rows = np.flatnonzero(columns.kind == kind)
        if len(rows):
            steps = np.repeat(columns.step[rows].T[..., None], len(down), axis=2)  # (3, rows, S)
            steps[2] *= down
            enter, leave = span(name, columns.start[rows].T[..., None], steps)
            found[rows] = np.where((enter < leave) & (enter > 0), enter, np.inf)
    return found


def _painted(houses: Sequence[House], met: _Columns, local: np.ndarray) -> np.ndarray:
    """Colours (M, 3), 0..255, of places (3, M) in the things' unit coordinates."""
    x, y, z = local
    box, wide = met.kind == _BOX, np.hypot(x, y)
    lid = np.where(box, np.abs(z) >= np.maximum(np.abs(x), np.abs(y)), (met.kind == _CYLINDER) & (np.abs(z) > wide))
    side = box & ~lid & (np.abs(x) > np.abs(y))
    place = local * (met.half.T / PERIOD)
    around = np.arctan2(y, x) * (np.rint(2 * np.pi * met.half[:, 0] / PERIOD).clip(2) / (2 * np.pi))
    u = np.where(lid, place[0], np.where(box, np.where(side, place[1], place[0]), around))
    v = np.where(lid, place[1], place[2])
    patterns = np.stack([house.patterns for house in houses])[met.view, met.thing]
    weights = np.zeros(len(u), dtype=np.float32)
    for number, name in enumerate(TEXTURES[1:], 1):  # the first is plain
        rows = np.flatnonzero(patterns == number)
        weights[rows] = pattern(name, u[rows], v[rows])
    first, second = np.stack([house.colours for house in houses])[met.view, met.thing].transpose(1, 0, 2)
    return (first + weights[:, None] * (second - first)) * _lit(met, local, lid, side)[:, None]


def _lit(met: _Columns, local: np.ndarray, lid: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Light (M,), 0.5 to 1.15, that comes from above and from the north-east, so that round things look round."""
    (x, y, z), box, round_ = local / met.half.T, met.kind == _BOX, met.kind == _BALL
    x = np.where(box, np.where(side, np.sign(x), 0), x)
    y = np.where(box, np.where(side, 0, np.sign(y)), y)
    z = np.where(round_, z, np.where(met.kind == _CONE, (1 - local[2]) / (4 * met.half[:, 2]), 0))
    cos, sin = met.turn.T
    north_east = 0.8 * (x * cos - y * sin) + 0.6 * (x * sin + y * cos)
    shares = (0.2 * north_east + 0.25 * z) / (np.sqrt(x * x + y * y + z * z) + 1e-9)
    return np.where(lid, 1.1, 0.85 + shares).clip(0.5, 1.15)
