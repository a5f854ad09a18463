"""One scene as an object with everything that is known of it: `scene(seed, index)`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vertebra.data.sprites.language import RELATIONS, Facts, Referring, captions, facts, referring
from vertebra.data.sprites.pictures import PARTS, Part, backgrounds_in, cutouts_in
from vertebra.data.sprites.rendering import Render, rendered
from vertebra.data.sprites.scenes import ALONE, SIZES, Shift, World
from vertebra.data.sprites.shapes import DIGITS, GLYPHS, SHAPES
from vertebra.errors import DataError, UsageError, near


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing of a scene.

    Attributes:
        label: index into the world's classes, and `name`, the class.
        name: the class.
        colour: such as "red"; "" for a cut-out.
        size: such as "small".
        texture: such as "striped"; "" for a cut-out.
        position: which third of the image holds the centre, such as "upper left".
        x: centre in pixels.
        y: centre in pixels.
        radius: of the circle that the thing fills, in pixels.
        angle: in radians, clockwise.
        depth: 0 is nearest.
        hidden: share of the thing that others hide, 0..1.
        box: (4,) float32 xyxy pixels: the extents of `visible`.
        visible: (H, W) bool, what shows.
        whole: (H, W) float32 0..1, antialiased, as if nothing were in front.
    """

    label: int
    name: str
    colour: str
    size: str
    texture: str
    position: str
    x: float
    y: float
    radius: float
    angle: float
    depth: int
    hidden: float
    box: np.ndarray
    visible: np.ndarray
    whole: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and what is true of it.

    Attributes:
        image: (H, W, 3) uint8, read-only.
        things: what is in it.
        ids: (H, W) int16: 0 where the background shows, i + 1 where thing i does.
        relations: (subject, relation, object): indices of things, and one of `language.RELATIONS`.
        captions: sentences about the whole; the first tells most.
        foils: a caption's words in another order, which are false of the scene; "" where there are none.
        referring: sentences that are true of exactly one thing.
    """

    image: np.ndarray
    things: tuple[Thing, ...]
    ids: np.ndarray
    relations: tuple[tuple[int, str, int], ...]
    captions: tuple[str, ...]
    foils: tuple[str, ...]
    referring: tuple[Referring, ...]

    @property
    def caption(self) -> str:
        """The first of the captions."""
        return self.captions[0]

    @property
    def graph(self) -> dict[str, list[dict[str, Any]]]:
        """The scene graph, ready for JSON: things with attributes and boxes, and relations between them."""
        told = ("name", "colour", "size", "texture", "position")
        things = [
            {"id": number, **{name: getattr(thing, name) for name in told}, "box": thing.box.tolist()}
            for number, thing in enumerate(self.things)
        ]
        relations = [{"subject": a, "relation": relation, "object": b} for a, relation, b in self.relations]
        return {"things": things, "relations": relations}


def world(
    *,
    size: int = 64,
    seed: int = 0,
    classes: str | Sequence[str] = "all",
    objects: int | tuple[int, int] = (1, 3),
    backgrounds: str | Path | None = None,
    cutouts: str | Path | None = None,
    shift: Shift = "none",
    strength: float = 1.0,
    long_tail: float | Sequence[float] = 0.0,
    overlap: float = 0.35,
    touching: float = 0.4,
    sizes: Mapping[str, tuple[float, float]] | None = None,
) -> World:
    """A world from what users write.

    Args:
        size: side of the images in pixels.
        seed: of all scenes.
        classes: "all", "digits", "shapes", "cutouts", or names in the order of the labels.
        objects: things in a scene: a number, or fewest and most.
        backgrounds: folder of photographs; None paints textures.
        cutouts: folder of cut-outs with transparent surround, `CLASS/x.png`; their classes come after the others.
        shift: how the look differs: see `World`.
        strength: of the shift, 0..1.
        long_tail: exponent of the classes' frequencies, or a weight a class; 0 is even.
        overlap: share of a thing's surrounding circle that others may cover, 0..0.45.
        touching: chance that a thing is placed against an earlier one, 0..1.
        sizes: name of a size -> smallest and largest radius as a share of the side, smallest first; None is `SIZES`,
            and `ALONE` where each image has one thing.

    Raises:
        UsageError: a value out of range, or a name that is not known.
        DataError: a folder that is missing or empty, or a class of cut-outs that has a glyph's name.
    """
    own = {} if cutouts is None else cutouts_in(cutouts)
    for name in own:
        if name in GLYPHS:
            raise DataError(f"{cutouts}: the class {name!r} has the name of a built-in one; rename the folder")
    groups = {"all": (*GLYPHS, *own), "digits": DIGITS, "shapes": SHAPES, "cutouts": tuple(own)}
    if isinstance(classes, str) and classes not in groups:
        raise UsageError(f"classes is {classes!r}{near(classes, groups)}; give {', '.join(groups)}, or a list of names")
    chosen = groups[classes] if isinstance(classes, str) else tuple(classes)
    if not chosen:
        raise UsageError(f"classes is {classes!r}, which names none; give cutouts= a folder, or other classes")
    count = (objects, objects) if isinstance(objects, int) else (int(objects[0]), int(objects[1]))
    usual = ALONE if count == (1, 1) else SIZES
    return World(
        size=size,
        seed=seed,
        classes=chosen,
        objects=count,
        long_tail=float(long_tail) if isinstance(long_tail, int | float) else tuple(map(float, long_tail)),
        shift=shift,
        strength=strength,
        overlap=overlap,
        touching=touching,
        sizes=usual if sizes is None else tuple((name, *bounds) for name, bounds in sizes.items()),
        backgrounds=None if backgrounds is None else backgrounds_in(backgrounds),
        cutouts=tuple(own.items()),
    )


def scene(seed: int, index: int, *, part: Part = "train", **options: Any) -> Scene:
    """Scene `index` of a part of the world with that seed; the same one that `sprites` shows there.

    Args:
        seed: of the world.
        index: from 0.
        part: "train", "val" or "test", which share no scene, no handwriting and no picture.
        options: those of `world`.

    Raises:
        UsageError: a part, value or name that is not known.
    """
    if part not in PARTS:
        raise UsageError(f"part is {part!r}{near(part, PARTS)}; there are {', '.join(PARTS)}")
    return scene_of(world(seed=seed, **options), part, index)


def scene_of(world: World, part: Part, index: int) -> Scene:
    """Scene `index` of a world."""
    render = rendered(world, part, index)
    known = facts(world, render)
    told, foils = captions(world, part, index, known)
    held = np.argwhere(known.related).tolist()
    return Scene(
        image=render.image,
        things=tuple(_thing(render, known, number) for number in range(len(known.names))),
        ids=render.ids,
        relations=tuple((subject, RELATIONS[relation], other) for relation, subject, other in held),
        captions=told,
        foils=foils,
        referring=referring(world, part, index, known),
    )


def _thing(render: Render, known: Facts, number: int) -> Thing:
    planned = render.plan
    name, colour, size, texture, position = known.names[number]
    return Thing(
        label=int(planned.labels[number]),
        name=name,
        colour=colour,
        size=size,
        texture=texture,
        position=position,
        x=float(planned.x[number]),
        y=float(planned.y[number]),
        radius=float(planned.radius[number]),
        angle=float(planned.angle[number]),
        depth=int(planned.depth[number]),
        hidden=float(render.hidden[number]),
        box=render.boxes[number],
        visible=render.ids == number + 1,
        whole=render.alpha(number),
    )
