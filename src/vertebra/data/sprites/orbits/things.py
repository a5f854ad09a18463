"""Ten classes of things, put together from a few solids each; no two of a class have the same proportions."""

import colorsys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vertebra.data.sprites.orbits.solids import KINDS, PATTERNS, Kind, Solids
from vertebra.errors import UsageError, near

Triple = Sequence[float]


class Part(NamedTuple):
    """One solid of a thing.

    Attributes:
        kind: which solid.
        centre: x, y, z in metres; z is up, x is where the thing looks.
        halves: half extents along the axes, before the turn.
        paint: which of the thing's three paints.
        turn: degrees about an axis.
        axis: the axis of the turn.
    """

    kind: Kind
    centre: Triple
    halves: Triple
    paint: int = 0
    turn: float = 0.0
    axis: int = 0


def turned(degrees: float, axis: int = 2) -> np.ndarray:
    """The rotation (3, 3) by an angle about a coordinate axis."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    found = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    found[a, a], found[a, b], found[b, a], found[b, b] = cosine, -sine, sine, cosine
    return found


def _legs(random: np.random.Generator, across: float, deep: float, tall: float, paint: int) -> list[Part]:
    """Four legs under a board of half extents `across` and `deep`."""
    thick = random.uniform(0.035, 0.07)
    kind: Kind = "box" if random.random() < 0.5 else "cylinder"
    corners = [(x * (across - thick), y * (deep - thick)) for x in (-1, 1) for y in (-1, 1)]
    return [Part(kind, (x, y, tall / 2), (thick, thick, tall / 2), paint) for x, y in corners]


def _car(random: np.random.Generator) -> list[Part]:
    half, wide, wheel = random.uniform(0.65, 0.9), random.uniform(0.3, 0.38), random.uniform(0.14, 0.2)
    tall, cabin = random.uniform(0.13, 0.2), random.uniform(0.3, 0.5)
    wheels = [
        Part("cylinder", (x * half * 0.62, y * wide, wheel), (wheel, wheel, 0.06), 2, 90, 0)
        for x in (-1, 1)
        for y in (-1, 1)
    ]
    body = Part("box", (0, 0, wheel + tall), (half, wide, tall), 0)
    top = Part("box", (-0.12 * half, 0, wheel + 2 * tall + 0.13), (cabin, wide * 0.85, 0.13), 1)
    return [body, top, *wheels]


def _castle(random: np.random.Generator) -> list[Part]:
    half, tall, tower = random.uniform(0.4, 0.55), random.uniform(0.25, 0.4), random.uniform(0.14, 0.2)
    height, roof = tall + random.uniform(0.1, 0.3), random.uniform(0.15, 0.28)
    parts = [Part("box", (0, 0, tall), (half, half, tall), 0)]
    for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        parts.append(Part("cylinder", (x * half, y * half, height), (tower, tower, height), 1))
        parts.append(Part("cone", (x * half, y * half, 2 * height + roof), (tower * 1.25, tower * 1.25, roof), 2))
    return parts


def _chair(random: np.random.Generator) -> list[Part]:
    across, deep, tall = random.uniform(0.32, 0.42), random.uniform(0.32, 0.42), random.uniform(0.5, 0.7)
    back, thick = random.uniform(0.3, 0.5), random.uniform(0.03, 0.06)
    lean = random.uniform(-12, 0)
    seat = Part("box", (0, 0, tall + thick), (across, deep, thick), 0)
    rest = Part("box", (-across + thick, 0, tall + 2 * thick + back * 0.95), (thick, deep, back), 1, lean, 1)
    return [seat, rest, *_legs(random, across, deep, tall, 2)]


def _dog(random: np.random.Generator) -> list[Part]:
    long, fat, leg = random.uniform(0.4, 0.6), random.uniform(0.17, 0.25), random.uniform(0.25, 0.42)
    head, spine = random.uniform(0.17, 0.24), leg + fat
    parts = [Part("ball", (0, 0, spine), (long * 1.15, fat, fat * 1.1), 0)]
    parts += [
        Part("cylinder", (x * long * 0.72, y * fat * 0.6, leg / 2 + 0.03), (0.06, 0.06, leg / 2 + 0.03), 0)
        for x in (-1, 1)
        for y in (-1, 1)
    ]
    brow = spine + fat + head * 0.6
    parts.append(Part("ball", (long + head * 0.5, 0, brow), (head, head * 0.9, head), 0))
    parts.append(Part("ball", (long + head * 1.45, 0, brow - head * 0.25), (head * 0.5, head * 0.4, head * 0.35), 1))
    parts += [
        Part("cone", (long + head * 0.35, y * head * 0.55, brow + head * 0.95), (0.07, 0.05, 0.14), 1) for y in (-1, 1)
    ]
    tail = random.uniform(-60, -20)
    parts.append(Part("cylinder", (-long * 1.2, 0, spine + 0.2), (0.035, 0.035, 0.25), 1, tail, 1))
    return parts


def _dumbbell(random: np.random.Generator) -> list[Part]:
    long, thick, weight = random.uniform(0.45, 0.7), random.uniform(0.06, 0.1), random.uniform(0.25, 0.38)
    kind: Kind = "ball" if random.random() < 0.5 else "cylinder"
    wide = weight if kind == "ball" else random.uniform(0.1, 0.2)
    bar = Part("cylinder", (0, 0, weight), (thick, thick, long), 1, 90, 1)
    return [bar, *(Part(kind, (x * long, 0, weight), (weight, weight, wide), 0, 90, 1) for x in (-1, 1))]


def _lamp(random: np.random.Generator) -> list[Part]:
    foot, pole, shade = random.uniform(0.25, 0.38), random.uniform(0.5, 0.75), random.uniform(0.3, 0.5)
    tall = random.uniform(0.25, 0.38)
    kind: Kind = "cone" if random.random() < 0.65 else "cylinder"
    return [
        Part("cylinder", (0, 0, 0.05), (foot, foot, 0.05), 1),
        Part("cylinder", (0, 0, pole), (0.04, 0.04, pole), 2),
        Part(kind, (0, 0, 2 * pole + tall * 0.6), (shade, shade, tall), 0),
    ]


def _rocket(random: np.random.Generator) -> list[Part]:
    wide, tall, nose = random.uniform(0.18, 0.28), random.uniform(0.4, 0.6), random.uniform(0.18, 0.3)
    fin, count = random.uniform(0.15, 0.24), int(random.integers(3, 5))
    parts = [
        Part("cylinder", (0, 0, tall + 0.15), (wide, wide, tall), 0),
        Part("cone", (0, 0, 2 * tall + 0.15 + nose), (wide, wide, nose), 1),
        Part("ball", (wide * 0.88, 0, tall * 1.45), (0.07, 0.1, 0.1), 2),
    ]
    for number in range(count):
        angle = 360 * number / count + 45
        x, y = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        parts.append(
            Part("box", (x * (wide + fin * 0.6), y * (wide + fin * 0.6), 0.25), (fin, 0.03, 0.25), 1, angle, 2)
        )
    return parts


def _snowman(random: np.random.Generator) -> list[Part]:
    low, middle, head = random.uniform(0.36, 0.45), random.uniform(0.26, 0.34), random.uniform(0.18, 0.25)
    second = low * 1.75 + middle * 0.6
    third = second + middle * 0.75 + head * 0.75
    brim, hat = head * random.uniform(1.0, 1.3), random.uniform(0.1, 0.2)
    top = third + head * 0.8
    return [
        Part("ball", (0, 0, low), (low, low, low), 0),
        Part("ball", (0, 0, second), (middle, middle, middle), 0),
        Part("ball", (0, 0, third), (head, head, head), 0),
        Part("cone", (head + 0.1, 0, third), (0.06, 0.06, 0.14), 2, 90, 1),
        Part("cylinder", (0, 0, top), (brim, brim, 0.025), 1),
        Part("cylinder", (0, 0, top + hat), (head * 0.7, head * 0.7, hat), 1),
    ]


def _table(random: np.random.Generator) -> list[Part]:
    across, deep, tall = random.uniform(0.6, 0.85), random.uniform(0.4, 0.6), random.uniform(0.6, 0.9)
    thick = random.uniform(0.03, 0.06)
    if random.random() < 0.35:  # a round one on one foot
        foot = Part("cylinder", (0, 0, 0.03), (deep * 0.6, deep * 0.6, 0.03), 1)
        pole = Part("cylinder", (0, 0, tall / 2), (0.07, 0.07, tall / 2), 1)
        return [Part("cylinder", (0, 0, tall + thick), (across * 0.85, across * 0.85, thick), 0), pole, foot]
    return [Part("box", (0, 0, tall + thick), (across, deep, thick), 0), *_legs(random, across, deep, tall, 1)]


def _tree(random: np.random.Generator) -> list[Part]:
    trunk, thick, wide = random.uniform(0.2, 0.4), random.uniform(0.07, 0.12), random.uniform(0.4, 0.55)
    parts = [Part("cylinder", (0, 0, trunk), (thick, thick, trunk), 1)]
    if random.random() < 0.3:
        crown = (wide, wide, wide * random.uniform(0.85, 1.2))
        return [*parts, Part("ball", (0, 0, 2 * trunk + crown[2] * 0.85), crown, 0)]
    floor, tall = 2 * trunk * 0.8, random.uniform(0.28, 0.36)
    for number in range(int(random.integers(2, 4))):
        shrink = 0.78**number
        parts.append(Part("cone", (0, 0, floor + tall * shrink), (wide * shrink, wide * shrink, tall * shrink), 0))
        floor += tall * shrink
    return parts


_BUILDERS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "car": _car,
    "castle": _castle,
    "chair": _chair,
    "dog": _dog,
    "dumbbell": _dumbbell,
    "lamp": _lamp,
    "rocket": _rocket,
    "snowman": _snowman,
    "table": _table,
    "tree": _tree,
}
THINGS = tuple(_BUILDERS)
"""Names of the classes; the position is the target."""


def thing(name: str, random: np.random.Generator, *, number: int = 1) -> Solids:
    """One thing, standing on the ground at the origin, within a ball of radius 1 m around (0, 0, its middle).

    Args:
        name: one of `THINGS`.
        random: what its proportions, its colours and its heading are drawn from.
        number: what `Solids.things` says of it.

    Raises:
        UsageError: an unknown name.
    """
    if name not in _BUILDERS:
        raise UsageError(f"no thing is called {name!r}{near(name, THINGS)}; there are {', '.join(THINGS)}")
    parts = _BUILDERS[name](random)
    paints = [paint(random) for _ in range(3)]
    solids = Solids(
        np.array([KINDS.index(part.kind) for part in parts]),
        np.array([part.centre for part in parts], dtype=float),
        np.stack([turned(part.turn, part.axis) for part in parts]),
        np.array([part.halves for part in parts], dtype=float),
        np.stack([paints[part.paint][0] for part in parts]),
        np.array([paints[part.paint][1] for part in parts]),
        np.full(len(parts), number),
    )
    return placed(solids, (0.0, 0.0), random.uniform(0, 360))


def placed(solids: Solids, where: Triple, heading: float) -> Solids:
    """Solids turned about the vertical axis by `heading` degrees, then moved on the ground to `where` (x, y)."""
    turn = turned(heading)
    return Solids(
        solids.kinds,
        solids.centres @ turn.T + np.array([*where, 0.0]),
        turn @ solids.turns,
        solids.halves,
        solids.colours,
        solids.patterns,
        solids.things,
    )


def paint(random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Two colours (2, 3) in 0..1 that differ well, and a pattern; plain as often as patterned."""
    hue, strong, light = random.random(), random.uniform(0.35, 0.85), random.uniform(0.6, 1.0)
    other = light - 0.35 if light > 0.75 else light + 0.3
    colours = [
        colorsys.hsv_to_rgb(hue, strong, light),
        colorsys.hsv_to_rgb(hue + random.uniform(-0.2, 0.2), strong * random.uniform(0.3, 1), other),
    ]
    pattern = 0 if random.random() < 0.5 else int(random.integers(1, len(PATTERNS)))
    return np.array(colours), pattern
