"""Balls, boxes, cylinders and cones, met by rays in closed form and vectorised over views and pixels.

Lengths are in metres, z is up, and the ground is the plane z = 0. A solid is the unit ball, the cube from -1 to 1, the
cylinder of radius 1 from z = -1 to 1, or the cone on that cylinder's floor with its tip at z = 1, then scaled, turned
and moved. Rays keep their own parameter through that map, so a ray whose direction has 1 along the optical axis of a
camera yields depth along that axis.
"""

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from vertebra.data.sprites.textures import mixed, pattern

Kind = Literal["ball", "box", "cylinder", "cone"]
KINDS: tuple[Kind, ...] = ("ball", "box", "cylinder", "cone")
PATTERNS = ("plain", "striped", "dotted", "checked", "marbled")
"""How the two colours of a solid meet, as `vertebra.data.sprites.textures` draws them."""

PERIOD = 0.24
"""Metres that one period of a pattern takes."""

GROUND = -1
"""What `Hits.solid` says of the ground."""
NOTHING = -2
"""What `Hits.solid` says of the sky."""

_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Solids:
    """K solids as columns.

    Attributes:
        kinds: (K,) int64 positions in `KINDS`.
        centres: (K, 3) float64 metres.
        turns: (K, 3, 3) float64 rotations, local to world.
        halves: (K, 3) float64 half extents along the local axes, metres.
        colours: (K, 2, 3) float64, two RGB colours in 0..1 that the pattern mixes.
        patterns: (K,) int64 positions in `PATTERNS`.
        things: (K,) int64, the thing that the solid is a part of, from 1.
    """

    kinds: np.ndarray
    centres: np.ndarray
    turns: np.ndarray
    halves: np.ndarray
    colours: np.ndarray
    patterns: np.ndarray
    things: np.ndarray

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def corners(self) -> np.ndarray:
        """Corners of each solid's box, (K, 8, 3) metres."""
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(8, 3)
        return self.centres[:, None] + np.einsum("kij,knj->kni", self.turns, signs * self.halves[:, None])

    @classmethod
    def joined(cls, many: "list[Solids]") -> "Solids":
        """The solids of several, in order."""
        return cls(*(np.concatenate([getattr(one, column.name) for one in many]) for column in fields(cls)))


class Hits(NamedTuple):
    """What rays meet first.

    Attributes:
        distance: (V, P) float64 in the rays' own parameter; infinite where there is nothing.
        solid: (V, P) int64 position in the solids, `GROUND` or `NOTHING`.
    """

    distance: np.ndarray
    solid: np.ndarray


def span(kind: Kind, start: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave a unit solid.

    All four are convex: each is an intersection of intervals.

    Args:
        kind: which.
        start: (3, ...) where rays start, local coordinates.
        step: (3, ...) their directions, of any length; broadcasts with `start`.

    Returns:
        Ray parameters of entry and exit; the ray misses where entry is not below exit.
    """
    if kind == "box":
        axes = [_between(start[axis], step[axis]) for axis in range(3)]
        return np.maximum.reduce([low for low, _ in axes]), np.minimum.reduce([high for _, high in axes])
    if kind == "ball":
        return _roots(_dot(step, step), _dot(start, step), _dot(start, start) - 1)
    low, high = _between(start[2], step[2])
    if kind == "cylinder":
        enter, leave = _roots(_flat(step, step), _flat(start, step), _flat(start, start) - 1)
    else:
        enter, leave = _cone(start, step)
    return np.maximum(enter, low), np.minimum(leave, high)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _flat(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1]


def _between(start: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a coordinate is within -1..1."""
    slope = 1 / np.where(np.abs(step) < _TINY, _TINY, step)
    middle, half = -start * slope, np.abs(slope)
    return middle - half, middle + half


def _roots(square: np.ndarray, half: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where square t^2 + 2 half t + rest is below 0, for square > 0; entry above exit where nowhere."""
    square = np.maximum(square, _TINY)
    inside = half * half - square * rest
    root = np.sqrt(np.maximum(inside, 0))
    low, high = (-half - root) / square, (-half + root) / square
    return np.where(inside > 0, low, np.inf), high


def _cone(start: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Within the cone x^2 + y^2 < ((1 - z) / 2)^2, on the side of its floor.

    A ray steeper than the cone lies outside of the roots; which of the two parts is below the tip depends on whether
    it falls or rises.
    """
    below = 1 - start[2]
    square = _flat(step, step) - step[2] * step[2] / 4
    half = _flat(start, step) + step[2] * below / 4
    rest = _flat(start, start) - below * below / 4
    square = np.where(np.abs(square) < _TINY, _TINY, square)
    inside = half * half - square * rest
    root = np.sqrt(np.maximum(inside, 0))
    first, second = (-half - root) / square, (-half + root) / square  # in falling order where square < 0
    steep, falls = square < 0, step[2] < 0
    enter = np.where(steep, np.where(falls, first, -np.inf), first)
    leave = np.where(steep, np.where(falls, np.inf, second), second)
    return np.where(inside > 0, enter, np.inf), leave


def cast(solids: Solids, starts: np.ndarray, steps: np.ndarray, *, ground: bool = True) -> Hits:
    """What rays meet first.

    Args:
        solids: the scene.
        starts: (V, 3) where the rays of a view start; outside of every solid and above the ground.
        steps: (V, 3, P) their directions, of any length.
        ground: whether the plane z = 0 is there.
    """
    nearest = np.full((len(steps), steps.shape[2]), np.inf)
    found = np.full(nearest.shape, NOTHING, dtype=np.int64)
    if ground:
        falling = steps[:, 2] < -_TINY
        np.divide(-starts[:, 2, None], steps[:, 2], out=nearest, where=falling)
        found[falling] = GROUND
    for number, kind in enumerate(solids.kinds):
        shrunk = solids.turns[number].T / solids.halves[number, :, None]  # world to unit solid
        start = (shrunk @ (starts - solids.centres[number]).T)[:, :, None]  # (3, V, 1)
        enter, leave = span(KINDS[kind], start, np.moveaxis(shrunk @ steps, 1, 0))
        closer = (enter < leave) & (enter > 0) & (enter < nearest)
        nearest[closer], found[closer] = enter[closer], number
    return Hits(nearest, found)


def covered(solids: Solids, points: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Which points have a solid between them and a distant light.

    Args:
        solids: the scene.
        points: (N, 3), a little off the surfaces they belong to, or they shade themselves.
        towards: (3,) direction of the light.

    Returns:
        (N,) bool.
    """
    found = np.zeros(len(points), dtype=bool)
    for number, kind in enumerate(solids.kinds):
        shrunk = solids.turns[number].T / solids.halves[number, :, None]
        start = shrunk @ (points - solids.centres[number]).T  # (3, N)
        enter, leave = span(KINDS[kind], start, (shrunk @ towards)[:, None])
        found |= (enter < leave) & (leave > 0)
    return found


def outward(solids: Solids, points: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (N, 3) of points (N, 3) on solid `number`, and the points in its unit coordinates."""
    turn, halves = solids.turns[number], solids.halves[number]
    local = (points - solids.centres[number]) @ turn / halves
    kind = KINDS[solids.kinds[number]]
    slope = local.copy()
    if kind == "box":
        face = np.abs(local).argmax(1)[:, None]
        slope = np.where(np.arange(3) == face, np.sign(local), 0.0)
    elif kind == "cylinder":
        lid = np.abs(local[:, 2]) > np.hypot(local[:, 0], local[:, 1])
        slope[~lid, 2], slope[lid, :2] = 0, 0
    elif kind == "cone":
        floor = local[:, 2] < -1 + 1e-9
        slope[:, 2] = np.where(floor, -1, (1 - local[:, 2]) / 4)
        slope[floor, :2] = 0
    normals = (slope / halves) @ turn.T
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), _TINY), local


def painted(solids: Solids, local: np.ndarray, number: int) -> np.ndarray:
    """Colours (N, 3) in 0..1 of points (N, 3) in the unit coordinates of solid `number`."""
    name = PATTERNS[solids.patterns[number]]
    first, second = solids.colours[number]
    if name == "plain":
        return np.broadcast_to(first, local.shape)
    across, up = _unrolled(KINDS[solids.kinds[number]], local, solids.halves[number])
    return mixed(pattern(name, across, up), first, second)


def _unrolled(kind: Kind, local: np.ndarray, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates on a surface in periods of its pattern; a whole number of them goes around what is round."""
    place = local * (halves / PERIOD)
    if kind == "box":
        face = np.abs(local).argmax(1)
        return np.where(face == 0, place[:, 1], place[:, 0]), np.where(face == 2, place[:, 1], place[:, 2])
    around = max(2.0, np.rint(np.pi * (halves[0] + halves[1]) / PERIOD))
    if kind == "ball" or halves[2] > 0.3 * halves[0]:
        return np.arctan2(local[:, 1], local[:, 0]) * (around / (2 * np.pi)), place[:, 2]
    return place[:, 0], place[:, 1]  # what is flat is seen from above
