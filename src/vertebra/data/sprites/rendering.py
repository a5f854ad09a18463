"""Pixels of planned scenes: what shows where, boxes, and the look that a shift gives them."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vertebra.data.sprites.pictures import Part, cutout, draw_cutout, photograph
from vertebra.data.sprites.scenes import Plan, World, generator, plan
from vertebra.data.sprites.shapes import Stamp, distance, placed, turned, window
from vertebra.data.sprites.textures import COLOURS, ground, mixed, pattern, second_colour

RIM = 0.4
"""How much darker things are along their outline, which tells them from a background of their own colour."""

BLACK = np.zeros(3, dtype=np.float32)
_RGB = np.array(list(COLOURS.values()), dtype=np.float32)


class Render(NamedTuple):
    """A scene's pixels, before any words are made.

    Attributes:
        image: (H, W, 3) uint8, read-only.
        ids: (H, W) int16, read-only: 0 where the background shows, i + 1 where thing i does.
        boxes: (n, 4) float32 xyxy pixels: the extents of what shows.
        area: (n,) int64 pixels that show.
        whole: (n,) int64 pixels that would show with nothing in front.
        plan: what is where; its depth is the one that was drawn.
        stamps: the things' whole masks.
    """

    image: np.ndarray
    ids: np.ndarray
    boxes: np.ndarray
    area: np.ndarray
    whole: np.ndarray
    plan: Plan
    stamps: tuple[Stamp, ...]

    @property
    def masks(self) -> np.ndarray:
        """What shows of each thing, (n, H, W) bool; no pixel is in two of them."""
        return self.ids == np.arange(1, len(self.boxes) + 1, dtype=np.int16)[:, None, None]

    @property
    def hidden(self) -> np.ndarray:
        """Share of each thing that others hide, (n,) float64 0..1."""
        return 1 - self.area / self.whole

    def alpha(self, thing: int) -> np.ndarray:
        """The whole mask of a thing, antialiased, (H, W) float32 0..1, as if nothing were in front."""
        found = np.zeros(self.ids.shape, dtype=np.float32)
        rows, columns, alpha = placed(self.stamps[thing], *self.ids.shape)
        found[rows, columns] = alpha
        return found


@lru_cache(maxsize=16)
def rendered(world: World, part: Part, index: int) -> Render:
    """`render`, with the last few kept: an image and its target ask for the same scene."""
    return render(world, part, index)


def render(world: World, part: Part, index: int) -> Render:
    """Draw a scene."""
    planned = plan(world, part, index)
    drawn = [_drawn(world, part, planned, thing) for thing in range(len(planned.labels))]
    stamps = tuple(stamp for stamp, _ in drawn)
    parts = [placed(stamp, world.size, world.size) for stamp in stamps]
    solid = [alpha >= min(0.5, float(alpha.max())) for _, _, alpha in parts]
    planned, ids = _painted(world.size, planned, parts, solid)
    canvas = _ground(world, part, index)
    for thing in np.argsort(-planned.depth).tolist():
        (rows, columns, alpha), stamp, colours = parts[thing], stamps[thing], drawn[thing][1]
        top, left = rows.start - stamp.top, columns.start - stamp.left
        colours = colours[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        under = canvas[rows, columns]
        under += alpha[:, :, None] * (colours - under)
    image = np.rint(_shifted(world, part, index, canvas)).astype(np.uint8)
    image.setflags(write=False)
    ids.setflags(write=False)
    boxes, area = _extents(ids, len(stamps))
    return Render(image, ids, boxes, area, np.array([mask.sum() for mask in solid]), planned, stamps)


def _drawn(world: World, part: Part, planned: Plan, thing: int) -> tuple[Stamp, np.ndarray]:
    """The stamp of a thing, and its colours (h, w, 3) float32 in the stamp's window."""
    name = world.classes[planned.labels[thing]]
    x, y, radius, angle = (float(column[thing]) for column in planned[2:6])
    if planned.colours[thing] < 0:
        files = dict(world.cutouts)[name].of_part(part)
        return draw_cutout(cutout(files[planned.samples[thing]]), x, y, radius, angle)
    columns, rows, left, top = window(x, y, radius)
    across, down = turned(columns, rows, angle)
    scale = np.float32(1 / radius)
    inside = distance(name, across * scale, down * scale, sample=int(planned.samples[thing])) * np.float32(-radius)
    alpha = np.clip(inside + np.float32(0.5), 0, 1)
    first, texture = _RGB[planned.colours[thing]], world.bearings[planned.textures[thing]]
    rim = np.float32(RIM) * np.clip(1 - inside / np.float32(max(1.5, 0.1 * radius)), 0, 1)
    if texture == "plain":
        return Stamp(alpha, left, top), mixed(rim, first, BLACK)
    period, turn = planned.grain[thing].tolist()
    weights = pattern(texture, across, down, scale=max(4.5, radius * (0.5 + 0.2 * period)), angle=np.pi * turn)
    colours = mixed(weights, first, second_colour(first))
    colours *= 1 - rim[:, :, None]
    return Stamp(alpha, left, top), colours


def _painted(side: int, planned: Plan, parts: list, solid: list[np.ndarray]) -> tuple[Plan, np.ndarray]:
    """Which thing shows at each pixel, (side, side) int16.

    A thing that others hide altogether comes to the front. The layout all but rules that out, and the loop ends: each
    round brings another thing to the front.
    """
    depth = planned.depth
    for _ in range(len(parts)):
        ids = np.zeros((side, side), dtype=np.int16)
        for thing in np.argsort(-depth).tolist():
            rows, columns, _ = parts[thing]
            ids[rows, columns][solid[thing]] = thing + 1
        hidden = np.flatnonzero(np.bincount(ids.ravel(), minlength=len(parts) + 1)[1:] == 0)
        if not len(hidden):
            return planned._replace(depth=depth), ids
        depth = np.argsort(np.argsort(np.where(np.arange(len(parts)) == hidden[0], -1, depth)))
    raise AssertionError("things hide each other in a circle")


def _ground(world: World, part: Part, index: int) -> np.ndarray:
    random = generator(world.seed, part, index, "ground")
    if world.backgrounds is not None:
        return photograph(world.backgrounds.of_part(part), world.size, random)
    strange = world.shift == "texture" and generator(world.seed, part, index, "strange").random() < world.strength
    return ground(world.size, world.size, random, strange=strange)


def _shifted(world: World, part: Part, index: int, canvas: np.ndarray) -> np.ndarray:
    """A canvas (H, W, 3) float32 under the world's shift of colour or style."""
    if world.shift in ("none", "texture"):
        return canvas
    random = generator(world.seed, part, index, "shift")
    look = _lit if world.shift == "colour" else _inked
    return np.clip(canvas + world.strength * (look(canvas, random) - canvas), 0, 255)


def _lit(canvas: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Under coloured light, and paler: gains of the channels from 0.4 to 1.4, no two alike."""
    gains = np.linspace(0.4, 1.4, 3) + random.uniform(-0.1, 0.1, 3)
    grey = canvas @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pale = canvas + np.float32(0.35) * (grey[:, :, None] - canvas)
    return pale * random.permutation(gains).astype(np.float32)


def _inked(canvas: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Drawn in ink: lines where brightness or colour changes, hatching where it is dark, on tinted paper."""
    paper = np.array([245, 238, 222], dtype=np.float32) + random.uniform(-10, 8, 3).astype(np.float32)
    ink = random.uniform(20, 80, 3).astype(np.float32)
    down, across = np.gradient(canvas, axis=(0, 1))
    lines = np.clip(np.sqrt(down * down + across * across).max(2) / 60 - 0.12, 0, 1)
    side = canvas.shape[0]
    rows, columns = np.arange(side, dtype=np.float32)[:, None], np.arange(side, dtype=np.float32)[None, :]
    dark = 1 - canvas @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    hatching = np.clip(np.sin((rows + columns) * np.float32(2 * np.pi / 5)) - 1.5 + 1.5 * dark, 0, 1)
    return paper + np.maximum(lines, 0.8 * hatching)[:, :, None] * (ink - paper)


def _extents(ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) float32 and areas (n,) of the things in a map of ids."""
    rows, columns = np.nonzero(ids)
    things = ids[rows, columns] - 1
    boxes = np.empty((count, 4), dtype=np.float32)
    for place, (values, reduce, start) in enumerate(
        (
            (columns, np.minimum, ids.shape[1]),
            (rows, np.minimum, ids.shape[0]),
            (columns, np.maximum, -1),
            (rows, np.maximum, -1),
        )
    ):
        extreme = np.full(count, start)
        reduce.at(extreme, things, values)
        boxes[:, place] = extreme + (place > 1)
    return boxes, np.bincount(things, minlength=count)
