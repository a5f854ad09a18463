"""Scenes of the sprite world: f(seed, part, index) -> what is where, then pixels, masks and boxes.

A scene is planned first (classes, places, looks; no pixel is touched) and rendered when it is asked for. Every random
number comes from a Philox generator whose key is (seed, part) and whose counter holds the index and what the number
is for, so a scene is the same in any worker, order or process, train, val and test share none, and a shift of the
domain changes a scene's look and leaves its layout.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from vertebra.data.sprites.pictures import PARTS, Part, Pictures
from vertebra.data.sprites.shapes import DIGITS, GLYPHS, digit_samples
from vertebra.data.sprites.textures import COLOURS, STRANGE, TEXTURES
from vertebra.errors import UsageError, near

Shift = Literal["none", "texture", "colour", "style"]
Stream = Literal["layout", "look", "ground", "shift", "degrade", "words", "referring", "strange"]

SIZES = (("small", 0.09, 0.12), ("medium", 0.145, 0.185), ("large", 0.225, 0.29))
"""Name, smallest and largest radius of things, as a share of the image's side."""

ALONE = (("small", 0.18, 0.22), ("medium", 0.26, 0.32), ("large", 0.36, 0.44))
"""The same where a thing is alone in its image."""

POSITIONS = (
    *("upper left", "top", "upper right"),
    *("left", "centre", "right"),
    *("lower left", "bottom", "lower right"),
)
"""Thirds of the image, row by row."""

ATTRIBUTES = ("colour", "size", "texture", "position")
"""What is known of a thing beside its class."""

TRIES = 48
"""Places that are tried for a thing of a size; then it is made the next smaller size, and in the end left out."""

CROWD = 6
"""Things in a scene from which on they are drawn smaller, so that they fit."""

_WORD = (1 << 64) - 1


def generator(seed: int, part: Part, index: int, stream: Stream) -> np.random.Generator:
    """Random numbers that depend on these four only; the counter's lowest word is left to the draws."""
    key = np.array([seed & _WORD, PARTS.index(part)], dtype=np.uint64)
    counter = np.array([0, index & _WORD, get_args(Stream).index(stream), 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class World:
    """What scenes there are. Hashable and picklable; a scene depends on it, a part and an index alone.

    Attributes:
        size: side of the images in pixels.
        seed: of all scenes.
        classes: names of glyphs or of cut-outs; the order is that of the labels.
        objects: fewest and most things in a scene, drawn uniformly. A thing that finds no place is made smaller,
            and left out where that does not help, as happens in crowds.
        long_tail: exponent of the classes' frequencies: class k of 0.. comes with weight (k + 1) ** -long_tail. Or the
            weights themselves, one a class.
        shift: how the look differs from the usual one. "texture": things and backgrounds bear patterns that are
            never seen else; "colour": coloured light; "style": drawn in ink on paper.
        strength: of the shift, 0..1.
        sizes: name, smallest and largest radius, as a share of the side.
        overlap: share of a thing's surrounding circle that the others may cover together, 0..0.45.
        touching: chance that a thing is placed against an earlier one, so that one of the two may hide some of the
            other, 0..1.
        turn: largest turn of a thing either way, in radians.
        textures: what things bear.
        backgrounds: photographs instead of textures.
        cutouts: class -> its cut-outs.

    Raises:
        UsageError: a value out of range, or a name that is not known.
    """

    size: int = 64
    seed: int = 0
    classes: tuple[str, ...] = GLYPHS
    objects: tuple[int, int] = (1, 3)
    long_tail: float | tuple[float, ...] = 0.0
    shift: Shift = "none"
    strength: float = 1.0
    sizes: tuple[tuple[str, float, float], ...] = SIZES
    overlap: float = 0.35
    touching: float = 0.4
    turn: float = 0.35
    textures: tuple[str, ...] = TEXTURES
    backgrounds: Pictures | None = None
    cutouts: tuple[tuple[str, Pictures], ...] = field(default=())

    def __post_init__(self) -> None:
        known = (*GLYPHS, *(name for name, _ in self.cutouts))
        for name in self.classes:
            if name not in known:
                raise UsageError(f"sprites has no class {name!r}{near(name, known)}; classes: {', '.join(known)}")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise UsageError(f"classes are {self.classes}; name at least one, and each once")
        low, high = self.objects
        if not 1 <= low <= high <= 200:
            raise UsageError(f"objects is {self.objects}; give fewest and most things a scene, within 1..200")
        if self.shift not in get_args(Shift):
            raise UsageError(
                f"shift is {self.shift!r}{near(self.shift, get_args(Shift))}; {', '.join(get_args(Shift))}"
            )
        within = (("strength", self.strength, 1), ("overlap", self.overlap, 0.45), ("touching", self.touching, 1))
        for name, value, most in within:
            if not 0 <= value <= most:
                raise UsageError(f"{name} is {value}; it must be in 0..{most}")
        if isinstance(self.long_tail, tuple):
            if len(self.long_tail) != len(self.classes) or min(self.long_tail) < 0 or sum(self.long_tail) <= 0:
                raise UsageError(
                    f"long_tail is {self.long_tail}; give {len(self.classes)} weights from 0, or an exponent"
                )
        elif self.long_tail < 0:
            raise UsageError(f"long_tail is {self.long_tail}; it must be 0 (even) or above")
        smallest, largest = min(low for _, low, _ in self.sizes), max(high for _, _, high in self.sizes)
        if not 0 < smallest <= largest < 0.5 or smallest * self.scale * self.size < 2:
            raise UsageError(
                f"size is {self.size} pixels; things have radii of {smallest * self.scale:.3g} to "
                f"{largest * self.scale:.3g} of that, which must be 2 pixels or more, and less than 0.5 of it"
            )

    @property
    def scale(self) -> float:
        """What radii are multiplied with where many things have to fit."""
        return min(1.0, (CROWD / self.objects[1]) ** 0.5)

    @cached_property
    def frequencies(self) -> np.ndarray:
        """Chance of each class, (classes,), sum 1."""
        if isinstance(self.long_tail, tuple):
            weights = np.array(self.long_tail, dtype=np.float64)
        else:
            weights = np.arange(1, len(self.classes) + 1) ** -float(self.long_tail)
        return weights / weights.sum()

    @property
    def bearings(self) -> tuple[str, ...]:
        """All textures of things, those of the shift last: what the attribute counts from."""
        return (*self.textures, *(name for name in STRANGE if name not in self.textures))

    def values(self, attribute: str) -> tuple[str, ...]:
        """Names of an attribute's values, in the order of their numbers."""
        sizes = tuple(name for name, _, _ in self.sizes)
        return (tuple(COLOURS), sizes, self.bearings, POSITIONS)[ATTRIBUTES.index(attribute)]


class Plan(NamedTuple):
    """A scene before it has pixels; arrays of one entry a thing.

    Attributes:
        labels: (n,) int64 classes.
        samples: (n,) int64, row of scikit-learn's digits or number of the cut-out.
        x: (n,) centres in pixels.
        y: (n,) centres in pixels.
        radius: (n,) pixels.
        angle: (n,) radians, clockwise.
        depth: (n,) int64, 0 is nearest.
        sizes: (n,) int64 indices into the world's sizes.
        colours: (n,) int64 indices into `COLOURS`, -1 for cut-outs.
        textures: (n,) int64 indices into the world's `bearings`, -1 for cut-outs.
        grain: (n, 2) period and angle of the textures, both 0..1.
    """

    labels: np.ndarray
    samples: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    depth: np.ndarray
    sizes: np.ndarray
    colours: np.ndarray
    textures: np.ndarray
    grain: np.ndarray

    def positions(self, side: int) -> np.ndarray:
        """Which third of the image holds each centre, (n,) int64 indices into `POSITIONS`."""
        column, row = (np.clip(3 * c / side, 0, 2).astype(np.int64) for c in (self.x, self.y))
        return 3 * row + column


def plan(world: World, part: Part, index: int) -> Plan:
    """What is where in a scene; about a tenth of a millisecond."""
    random = generator(world.seed, part, index, "layout")
    low, high = world.objects
    count = low + int(random.random() * (high - low + 1))
    chances = random.random((count, 5))
    labels = np.searchsorted(np.cumsum(world.frequencies)[:-1], chances[:, 0], side="right")
    sizes = (chances[:, 1] * len(world.sizes)).astype(np.int64)
    centres, radius, sizes = _arranged(world, random, sizes, chances[:, 2])
    kept = np.flatnonzero(~np.isnan(centres[:, 0]))
    random = generator(world.seed, part, index, "look")
    looks = random.random((count, 5))
    depth = np.argsort(np.argsort(looks[kept, 0]))
    labels, is_cutout = labels[kept], np.array([name not in GLYPHS for name in world.classes])[labels[kept]]
    textures = (looks[kept, 2] * len(world.textures)).astype(np.int64)
    if world.shift == "texture":
        strange = generator(world.seed, part, index, "shift").random((count, 2))[kept]
        swapped = (strange[:, 1] * len(STRANGE)).astype(np.int64)
        numbers = np.array([world.bearings.index(name) for name in STRANGE])
        textures = np.where(strange[:, 0] < world.strength, numbers[swapped], textures)
    return Plan(
        labels=labels,
        samples=_samples(world, part, labels, chances[kept, 3]),
        x=centres[kept, 0],
        y=centres[kept, 1],
        radius=radius[kept],
        angle=(2 * chances[kept, 4] - 1) * world.turn,
        depth=depth,
        sizes=sizes[kept],
        colours=np.where(is_cutout, -1, (looks[kept, 1] * len(COLOURS)).astype(np.int64)),
        textures=np.where(is_cutout, -1, textures),
        grain=looks[kept, 3:],
    )


def _samples(world: World, part: Part, labels: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Which handwriting or cut-out each thing is, of those that belong to the part."""
    found = np.zeros(len(labels), dtype=np.int64)
    for place, (label, chance) in enumerate(zip(labels.tolist(), chances.tolist(), strict=True)):
        name = world.classes[label]
        if name in DIGITS:
            rows = digit_samples(part)[DIGITS.index(name)]
            found[place] = rows[int(chance * len(rows))]
        elif name not in GLYPHS:
            found[place] = int(chance * len(dict(world.cutouts)[name].of_part(part)))
    return found


def _arranged(
    world: World, random: np.random.Generator, sizes: np.ndarray, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places such that no thing's circle is covered too far.

    What two circles share is judged whichever is in front. A glyph touches its circle on no half of it alone, so an
    overlap below a half leaves something of each thing in sight.

    Args:
        world: sizes and overlap.
        random: draws the places.
        sizes: (n,) indices into the world's sizes that are wished for.
        within: (n,) 0..1, where in its size's range a radius is.

    Returns:
        Centres (n, 2) in pixels, NaN where no place was found; radii (n,) in pixels; sizes (n,) as they came to be.
    """
    bounds = np.array([bounds[1:] for bounds in world.sizes]) * world.size * world.scale
    offers, touches = random.random((len(sizes), TRIES, 2)), random.random((len(sizes), 2)).tolist()
    centres, radius, sizes = np.full((len(sizes), 2), np.nan), np.zeros(len(sizes)), sizes.copy()
    hidden = np.zeros(len(sizes))
    for thing in range(len(sizes)):
        others = np.flatnonzero(~np.isnan(centres[:thing, 0]))
        for size in range(int(sizes[thing]), -1, -1):
            mine = bounds[size, 0] + within[thing] * (bounds[size, 1] - bounds[size, 0])
            places = mine + offers[thing] * (world.size - 2 * mine)  # (TRIES, 2)
            if len(others) and touches[thing][0] < world.touching:
                against = others[int(touches[thing][1] * len(others))]
                around = centres[against] + _around(offers[thing], mine + radius[against])
                inside = (around >= mine).all(1) & (around <= world.size - mine).all(1)
                places = np.concatenate([around[inside], places])
            apart = np.hypot(*(places[:, None] - centres[others]).transpose(2, 0, 1))  # (TRIES, others)
            covered = _covered(mine, radius[others], apart).sum(1)
            theirs = hidden[others] + _covered(radius[others], mine, apart)
            fits = np.flatnonzero((covered <= world.overlap) & (theirs.max(1, initial=0) <= world.overlap))
            if len(fits):
                centres[thing], radius[thing], sizes[thing] = places[fits[0]], mine, size
                hidden[thing], hidden[others] = covered[fits[0]], theirs[fits[0]]
                break
    return centres, radius, sizes


def _around(offers: np.ndarray, reach: float) -> np.ndarray:
    """Places (TRIES, 2) at 0.5 to 0.9 times `reach` from the origin, from numbers of 0..1."""
    angle, apart = 2 * np.pi * offers[:, 0], reach * (0.5 + 0.4 * offers[:, 1])
    return apart[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _covered(mine: np.ndarray | float, other: np.ndarray | float, apart: np.ndarray) -> np.ndarray:
    """Share of circles of radius `mine` that lies in circles of radius `other` at a distance; 0..1."""
    cosine = (apart * apart + mine * mine - other * other) / np.maximum(2 * apart * mine, 1e-9)
    return np.arccos(np.clip(cosine, -1, 1)) / np.pi
