"""From paths to pixels: all frames of a thing are drawn at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np

from vertebra.data.sprites.clips.motions import (
    DRIFTS,
    MOTIONS,
    PHRASES,
    Camera,
    Path,
    beside,
    bouncing,
    camera_path,
    crossing,
    entering,
    kept_in,
    moved,
)
from vertebra.data.sprites.pictures import PARTS, Part, Pictures, photograph
from vertebra.data.sprites.scenes import generator
from vertebra.data.sprites.shapes import DIGITS, GLYPHS, digit_samples, distance
from vertebra.data.sprites.textures import COLOURS, TEXTURES, ground, mixed, pattern, second_colour
from vertebra.errors import UsageError, near

RADII = (0.11, 0.17)
"""Smallest and largest radius of things, as a share of the side."""

ROUND = ("circle", "ring")
"""Classes that show only by a texture that they turn."""

SHORTER = (
    *(((0, 1), "the {0} {1}"), ((1, 2), "the {1} {2}"), ((0, 2), "the {0} thing {2}")),
    *(((1,), "the {1}"), ((2,), "the thing {2}"), ((0,), "the {0} thing")),
)
"""Traits out of colour, class and motion, and how they are said."""


@dataclass(frozen=True, eq=False)
class Clip:
    """T frames of N things.

    Attributes:
        frames: (T, S, S, 3) uint8 RGB.
        ids: (T, S, S) uint8: 0 is background, else the track of the thing that shows.
        boxes: (T, N, 4) float32 xyxy pixels of what shows; zeros where nothing does.
        whole: (T, N, 4) float32 xyxy pixels of all of the thing, also behind others and outside the frame.
        visibility: (T, N) float32, share of the thing's pixels that shows, 0..1.
        tracks: (N,) int64 numbers from 1.
        labels: (N,) int64 positions in `classes`.
        colours: (N,) int64 positions in `vertebra.data.sprites.textures.COLOURS`.
        motions: (T, N) int64 positions in `MOTIONS`.
        centres: (T, N, 2) float32 x, y pixels in the frame.
        radii: (T, N) float32 pixels of the circle that the thing fills.
        angles: (T, N) float32 radians, clockwise.
        depth: (N,) int64, 0 is nearest.
        camera: (T, 2) int64 x, y pixels that the camera has moved.
        sentences: of each thing, one or more that single it out; the first says colour, class and motion.
        classes: names.
    """

    frames: np.ndarray
    ids: np.ndarray
    boxes: np.ndarray
    whole: np.ndarray
    visibility: np.ndarray
    tracks: np.ndarray
    labels: np.ndarray
    colours: np.ndarray
    motions: np.ndarray
    centres: np.ndarray
    radii: np.ndarray
    angles: np.ndarray
    depth: np.ndarray
    camera: np.ndarray
    sentences: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def masks(self) -> np.ndarray:
        """What shows of each thing, (T, N, S, S) bool; no pixel is in two of them."""
        return self.ids[:, None] == self.tracks.astype(np.uint8)[:, None, None]

    @property
    def action(self) -> int:
        """What the first thing does first, a position in `MOTIONS`: the clip's class where it shows one thing."""
        return int(self.motions[0, 0])


class _Looks(NamedTuple):
    """What each thing is, (N,) each: class, row of scikit-learn's digits, colour, texture, and its period and angle."""

    labels: np.ndarray
    samples: np.ndarray
    colours: np.ndarray
    textures: np.ndarray
    grain: np.ndarray


def clip(
    seed: int,
    index: int,
    *,
    part: Part = "train",
    frames: int = 16,
    size: int = 64,
    objects: tuple[int, int] = (1, 3),
    classes: Sequence[str] = GLYPHS,
    motions: Sequence[str] = MOTIONS,
    changes: int = 0,
    crossings: float = 0.0,
    entries: float = 0.0,
    camera: Camera = "still",
    backgrounds: Pictures | None = None,
) -> Clip:
    """A clip of the sprite world; a function of these arguments alone.

    Args:
        seed: of all clips.
        index: of the clip, from 0.
        part: train, val and test share no clip, no handwriting and, from four on, no photograph.
        frames: how many, 1 to 256.
        size: side of the frames in pixels.
        objects: fewest and most things, within 1..9, drawn uniformly.
        classes: names of glyphs.
        motions: names that are drawn from.
        changes: times that every thing turns to another motion, evenly through the clip.
        crossings: chance that the first two things are at one place halfway, 0..1.
        entries: chance that a thing that drifts comes into the frame late or leaves it early, 0..1; in clips of
            fewer than 4 frames none does.
        camera: whether it stands, shakes by a few pixels, or pans.
        backgrounds: photographs (`vertebra.data.sprites.pictures.backgrounds_in`) instead of textures.

    Raises:
        UsageError: an unknown name, or a number out of range.
    """
    _checked(part, frames, size, objects, classes, motions, changes, crossings, entries, camera)
    random = generator(seed, part, index, "layout")
    count = int(random.integers(objects[0], objects[1] + 1))
    which = _motions(random, count, motions, frames, changes)
    looks = _looks(generator(seed, part, index, "look"), which, tuple(classes), part)
    paths = _paths(random, which, size, crossings, entries)
    view = camera_path(camera, frames, size, random)
    canvas = _ground(generator(seed, part, index, "ground"), view, size, part, backgrounds)
    centres = np.stack([path.centres for path in paths], 1) - view[:, None]
    radii, angles = (np.stack([path[field] for path in paths], 1) for field in (1, 2))
    depth = random.permutation(count)
    ids = np.zeros(canvas.shape[:3], dtype=np.uint8)
    whole, pixels = np.zeros((frames, count, 4), dtype=np.float32), np.zeros((frames, count), dtype=np.int64)
    for thing in np.argsort(-depth).tolist():
        path = Path(centres[:, thing], radii[:, thing], angles[:, thing])
        whole[:, thing], pixels[:, thing] = _draw(canvas, ids, path, looks, thing, tuple(classes))
    boxes, shown = _extents(ids, count)
    return Clip(
        np.rint(canvas).astype(np.uint8),
        ids,
        boxes,
        whole,
        (shown / np.maximum(pixels, 1)).astype(np.float32),
        np.arange(1, count + 1),
        looks.labels,
        looks.colours,
        which,
        centres.astype(np.float32),
        radii.astype(np.float32),
        angles.astype(np.float32),
        depth,
        view,
        _sentences(looks, which, tuple(classes)),
        tuple(classes),
    )


def _checked(
    part: str,
    frames: int,
    size: int,
    objects: tuple[int, int],
    classes: Sequence[str],
    motions: Sequence[str],
    changes: int,
    crossings: float,
    entries: float,
    camera: str,
) -> None:
    for what, names, known in (
        ("part", [part], PARTS),
        ("class", classes, GLYPHS),
        ("motion", motions, MOTIONS),
        ("camera", [camera], get_args(Camera)),
    ):
        if not names:
            raise UsageError(f"no {what} is given; there are {', '.join(known)}")
        for name in names:
            if name not in known:
                raise UsageError(f"no {what} is called {name!r}{near(str(name), known)}; there are {', '.join(known)}")
    if not 1 <= frames <= 256 or size < 16:
        raise UsageError(f"frames is {frames} and size {size}; a clip has 1 to 256 frames of 16 pixels or more")
    if not 1 <= objects[0] <= objects[1] <= 9:
        raise UsageError(f"objects is {objects}; it must rise within 1..9, as (1, 3)")
    if not 0 <= changes < frames or (changes and len(motions) < 2):
        raise UsageError(f"changes is {changes}; {frames} frames of {len(motions)} motions can have 0 to {frames - 1}")
    for name, value in (("crossings", crossings), ("entries", entries)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} is {value}; it is a chance, 0..1")


def _looks(random: np.random.Generator, which: np.ndarray, classes: tuple[str, ...], part: Part) -> _Looks:
    """What things are that move as `which` (T, N) says; no two are of one class and one colour."""
    count = which.shape[1]
    pairs = random.choice(len(classes) * len(COLOURS), size=count, replace=count > len(classes) * len(COLOURS))
    labels, colours = np.divmod(pairs, len(COLOURS))
    chances = random.random(count)
    samples = np.zeros(count, dtype=np.int64)
    for thing, label in enumerate(labels):
        if classes[label] in DIGITS:
            rows = digit_samples(part)[DIGITS.index(classes[label])]
            samples[thing] = rows[int(chances[thing] * len(rows))]
    textures = random.integers(len(TEXTURES), size=count)
    turns = np.isin(which, [MOTIONS.index("clockwise"), MOTIONS.index("anticlockwise")]).any(0)
    blank = turns & np.isin(labels, [place for place, name in enumerate(classes) if name in ROUND])
    textures = np.where(blank, np.maximum(textures, 1), textures)  # the first one is plain
    return _Looks(labels, samples, colours, textures, random.random((count, 2)))


def _motions(random: np.random.Generator, count: int, motions: Sequence[str], frames: int, changes: int) -> np.ndarray:
    """What each thing does in each frame, (T, N) positions in `MOTIONS`; no motion follows itself."""
    chosen = random.integers(len(motions), size=count)
    spell = np.arange(frames) * (changes + 1) // frames
    rounds = [chosen]
    for _ in range(changes):
        chosen = (chosen + random.integers(1, len(motions), size=count)) % len(motions)
        rounds.append(chosen)
    return np.array([MOTIONS.index(name) for name in motions])[np.stack(rounds)][spell]


def _paths(random: np.random.Generator, which: np.ndarray, size: int, crossings: float, entries: float) -> list[Path]:
    chances = random.random((which.shape[1], 2))
    radii = size * (RADII[0] + (RADII[1] - RADII[0]) * random.random(which.shape[1]))
    paths: list[Path] = []
    for thing, (crosses, enters) in enumerate(chances):
        names = [MOTIONS[motion] for motion in dict.fromkeys(which[:, thing].tolist())]
        path = beside(moved(which[:, thing], radii[thing], size, random), paths, size, random)
        if "bounce" in names:
            path = bouncing(path, which[:, thing], size, random)
        elif thing == 1 and crosses < crossings:
            path = kept_in(crossing(path, paths[0]), size)
        elif enters < entries and len(names) == 1 and names[0] in DRIFTS and len(which) > 3:
            path = entering(path, names[0], size, random)
        else:
            path = kept_in(path, size)
        paths.append(path)
    return paths


def _ground(
    random: np.random.Generator, view: np.ndarray, size: int, part: Part, backgrounds: Pictures | None
) -> np.ndarray:
    """What the camera sees behind all things, (T, S, S, 3) float32, 0..255."""
    travel = int(np.abs(view).max())
    side = size + 2 * travel
    if backgrounds is not None:
        wide = photograph(backgrounds.of_part(part), side, random)
    else:
        wide = ground(side, side, random)
    if not travel:
        return np.repeat(wide[None], len(view), axis=0)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (size, size), axis=(0, 1))
    return np.ascontiguousarray(windows[travel + view[:, 1], travel + view[:, 0]].transpose(0, 2, 3, 1))


def _draw(
    canvas: np.ndarray, ids: np.ndarray, path: Path, looks: _Looks, thing: int, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thing into all frames, in place.

    Returns:
        Boxes (T, 4) of all of it, and how many pixels (T,) it has, hidden or not.
    """
    frames, side = ids.shape[:2]
    width = int(np.ceil(2 * path.radii.max())) + 3
    corner = np.floor(path.centres - width / 2).astype(np.int64)  # (T, 2) of a window that moves along
    x, y = ((corner[:, axis, None] + np.arange(width) + 0.5 - path.centres[:, axis, None]) for axis in (0, 1))
    cos, sin = (turn(path.angles).astype(np.float32)[:, None, None] for turn in (np.cos, np.sin))
    x, y = x.astype(np.float32)[:, None, :], y.astype(np.float32)[:, :, None]
    across, down = x * cos + y * sin, y * cos - x * sin  # (T, w, w) pixels in the frame of the thing
    radii = path.radii.astype(np.float32)[:, None, None]
    inside = distance(classes[looks.labels[thing]], across / radii, down / radii, sample=int(looks.samples[thing]))
    alpha = np.clip(0.5 - inside * radii, 0, 1).astype(np.float32)
    solid = alpha >= 0.5
    column, row = corner[:, :1] + np.arange(width), corner[:, 1:] + np.arange(width)  # (T, w)
    on = ((column >= 0) & (column < side))[:, None, :] & ((row >= 0) & (row < side))[:, :, None] & (alpha > 0)
    place = (np.arange(frames)[:, None, None] * side + row[:, :, None]) * side + column[:, None, :]
    place = place[on]
    share, flat = alpha[on][:, None], canvas.reshape(-1, 3)
    under = flat[place]
    grain = float(path.radii.mean()), *looks.grain[thing].tolist()
    colours = _coloured((across / radii)[on], (down / radii)[on], looks.colours[thing], looks.textures[thing], *grain)
    flat[place] = under + share * (colours - under)
    ids.reshape(-1)[place[solid[on]]] = thing + 1
    return _box(solid, corner), solid.sum((1, 2))


def _coloured(
    u: np.ndarray, v: np.ndarray, colour: int, texture: int, radius: float, period: float, turn: float
) -> np.ndarray:
    """Colours (M, 3) or (3,), float32, at coordinates in radii: a texture grows and turns with its thing."""
    first, name = np.array(list(COLOURS.values()), dtype=np.float32)[colour], TEXTURES[texture]
    if name == "plain":
        return first
    weights = pattern(name, u, v, scale=max(4.5 / radius, 0.5 + 0.2 * period), angle=np.pi * turn)
    return mixed(weights, first, second_colour(first))


def _box(solid: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Extents (T, 4) float32 xyxy of masks (T, w, w) in windows at `corner` (T, 2) x, y."""
    found = np.concatenate([corner, corner], 1).astype(np.float32)
    for axis in (0, 1):
        filled = np.asarray(solid.any(1 + axis))  # (T, w) columns, then rows
        found[:, axis] += filled.argmax(1)
        found[:, axis + 2] += filled.shape[1] - filled[:, ::-1].argmax(1)
    return found


def _extents(ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (T, N, 4) float32 xyxy of what shows, zeros where nothing does, and its pixels (T, N)."""
    masks = ids[:, None] == np.arange(1, count + 1, dtype=np.uint8)[:, None, None]
    masks = masks.reshape(-1, *ids.shape[1:])
    pixels = masks.sum((1, 2))
    boxes = _box(masks, np.zeros((len(masks), 2), dtype=np.int64))
    boxes[pixels == 0] = 0
    return boxes.reshape(len(ids), count, 4), pixels.reshape(len(ids), count)


def _sentences(looks: _Looks, which: np.ndarray, classes: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """What singles each thing out: colour, class and motion, then whatever less is enough."""
    colours, count = tuple(COLOURS), len(looks.labels)
    known = []
    for thing in range(count):
        turns = np.diff(which[:, thing], prepend=-1) != 0
        names = [PHRASES[MOTIONS[motion]] for motion in which[turns, thing].tolist()]
        name = classes[looks.labels[thing]]
        noun = str(DIGITS.index(name)) if name in DIGITS else name  # "the red one" would be anything red
        known.append((colours[looks.colours[thing]], noun, ", then ".join(names)))
    found = []
    for thing in known:
        said = [f"the {thing[0]} {thing[1]} {thing[2]}"]
        for traits, words in SHORTER:
            if sum(all(other[trait] == thing[trait] for trait in traits) for other in known) == 1:
                said.append(words.format(*thing))
        found.append(tuple(said))
    return tuple(found)
