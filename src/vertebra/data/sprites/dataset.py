"""The sprite world as a data set: `sprites()`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from vertebra.data.dataset import Dataset, Split, Store
from vertebra.data.sprites.degradations import DEGRADATIONS, check_kinds
from vertebra.data.sprites.pictures import PARTS, SHARES, Part, Pictures
from vertebra.data.sprites.rendering import rendered
from vertebra.data.sprites.scenes import Shift, World, plan
from vertebra.data.sprites.targets import BACKGROUND, GIVES, OBJECTS, Sprites, worse
from vertebra.data.sprites.things import world
from vertebra.errors import UsageError, near


@dataclass(frozen=True, eq=False)
class Scenes(Store):
    """Images that are drawn when they are asked for.

    Attributes:
        world: what is drawn.
        part: of the world.
        degrade: kinds of degradation, one of them an image; none leaves images clean.
    """

    world: World
    part: Part
    degrade: tuple[str, ...] = ()

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        if self.degrade:
            return Image.fromarray(worse(self.world, self.part, index, self.degrade).image)
        return Image.fromarray(rendered(self.world, self.part, index).image)

    def size_bytes(self, index: int) -> int:
        return 3 * self.world.size**2


def sprites(
    images: int = 2000,
    *,
    size: int = 64,
    seed: int = 0,
    classes: str | Sequence[str] = "all",
    objects: int | tuple[int, int] = (1, 3),
    backgrounds: str | Path | None = None,
    cutouts: str | Path | None = None,
    shift: Shift = "none",
    strength: float = 1.0,
    shifted: Sequence[str] = ("test",),
    long_tail: float | Sequence[float] = 0.0,
    tailed: Sequence[str] = ("train",),
    annotate: str | Sequence[str] = OBJECTS,
    degrade: str | Sequence[str] = (),
    overlap: float = 0.35,
    touching: float = 0.4,
    sizes: Mapping[str, tuple[float, float]] | None = None,
    splits: Mapping[str, int] | None = None,
) -> Dataset:
    """The sprite world as a data set; nothing is drawn until it is asked for.

    With one thing an image the targets are its class; with more, the classes that the image shows. Train, val and test
    share no scene, no handwriting, and no picture where there are at least four. A split's scenes depend on the seed
    and the options, not on how many there are; a shift changes their look and leaves their layout, so the test splits
    of two data sets that differ in `shift` alone show the same scenes.

    Args:
        images: over all splits: 60 % train, 15 % val, 25 % test.
        size: side in pixels.
        seed: of all scenes.
        classes: "all" (digits, shapes, and the cut-outs' where there are any), "digits", "shapes", "cutouts", or names
            in the order of the targets.
        objects: things an image: a number, or fewest and most.
        backgrounds: folder of photographs; None paints textures.
        cutouts: folder of cut-outs with transparent surround, `CLASS/x.png`.
        shift: "none", "texture", "colour" or "style": see `World`.
        strength: of the shift, 0..1.
        shifted: splits that are shifted.
        long_tail: exponent a of the classes' frequencies, (k + 1) ** -a for class k; or a weight a class.
        tailed: splits that have the long tail; the others are even.
        annotate: what targets hold: keys of `GIVES`, or "all". Semantic and panoptic masks add the class
            "background", which every image shows.
        degrade: kinds of degradation, "any" for all; each image then gets one of them by chance at a severity from 1
            to 5, and "clean" can be annotated.
        overlap: share of a thing's surrounding circle that others may cover, 0..0.45.
        touching: chance that a thing is placed against an earlier one, 0..1.
        sizes: name of a size -> smallest and largest radius as a share of the side, smallest first; None is `SIZES`,
            and `ALONE` where each image has one thing.
        splits: images of each split, in place of `images`.

    Raises:
        UsageError: a value out of range, or a name that is not known.
        DataError: a folder that is missing or empty.
    """
    kinds = DEGRADATIONS if degrade == "any" else (degrade,) if isinstance(degrade, str) else tuple(degrade)
    check_kinds(kinds)
    asked = _asked(annotate, kinds)
    counts = _counts(images, splits)
    _check_parts("shifted", shifted)
    _check_parts("tailed", tailed)
    whole = world(
        size=size, seed=seed, classes=classes, objects=objects, backgrounds=backgrounds, cutouts=cutouts, shift=shift,
        strength=strength, long_tail=long_tail, overlap=overlap, touching=touching,
        sizes=sizes,
    )  # fmt: skip
    names = (*whole.classes, BACKGROUND) if {"semantic", "panoptic"} & set(asked) else whole.classes
    made = {}
    for part in PARTS:
        if not counts.get(part):
            continue
        here = replace(
            whole,
            shift=whole.shift if part in shifted else "none",
            long_tail=whole.long_tail if part in tailed else 0.0,
        )
        made[part] = _split(here, part, counts[part], names, asked, kinds)
    label = "single" if whole.objects == (1, 1) else "multi"
    return Dataset("sprites", "sprites", label, names, made, _notes(whole))


def _asked(annotate: str | Sequence[str], kinds: tuple[str, ...]) -> tuple[str, ...]:
    if annotate == "all":
        return tuple(name for name in GIVES if name != "clean" or kinds)
    asked = (annotate,) if isinstance(annotate, str) else tuple(annotate)
    for name in asked:
        if name not in GIVES:
            raise UsageError(f"sprites cannot annotate {name!r}{near(name, GIVES)}; it can: all, {', '.join(GIVES)}")
    if "clean" in asked and not kinds:
        raise UsageError("annotate asks for 'clean', and images are clean already; say degrade='any' or a kind")
    return asked


def _counts(images: int, splits: Mapping[str, int] | None) -> dict[str, int]:
    """Images of each split."""
    if splits is None:
        if images < len(PARTS):
            raise UsageError(f"images is {images}; three splits need at least {len(PARTS)}")
        ends = [0, *(round(share * images) for share in SHARES)]
        return {part: max(1, ends[place + 1] - ends[place]) for place, part in enumerate(PARTS)}
    _check_parts("splits", tuple(splits))
    if not any(splits.values()) or min(splits.values()) < 0:
        raise UsageError(f"splits is {dict(splits)}; give images of each split, and at least one")
    return dict(splits)


def _check_parts(name: str, parts: Sequence[str]) -> None:
    for part in (parts,) if isinstance(parts, str) else parts:
        if part not in PARTS:
            raise UsageError(f"{name} has {part!r}{near(part, PARTS)}; the splits are {', '.join(PARTS)}")


def _split(
    world: World, part: Part, count: int, names: tuple[str, ...], asked: tuple[str, ...], kinds: tuple[str, ...]
) -> Split:
    plans = [plan(world, part, index).labels for index in range(count)]
    if world.objects == (1, 1):
        targets = np.concatenate(plans).astype(np.int64)
    else:
        targets = np.zeros((count, len(names)), dtype=np.uint8)
        targets[np.repeat(np.arange(count), [len(labels) for labels in plans]), np.concatenate(plans)] = 1
        targets[:, len(world.classes) :] = 1  # the background, where it is a class
    rows = np.arange(count)
    called = np.array([f"{part}-{index:06d}" for index in range(count)])
    annotations = Sprites(world, part, rows, asked, kinds)
    return Split(part, names, called, targets, Scenes(world, part, kinds), rows, annotations)


def _notes(world: World) -> tuple[str, ...]:
    """What a reader should know of the user's pictures."""

    def note(what: str, pictures: Pictures) -> str:
        return f"{what}: {len(pictures.files)} images are too few to be divided; all splits show them"

    found = [note(name, pictures) for name, pictures in world.cutouts if pictures.shared and name in world.classes]
    if world.backgrounds is not None and world.backgrounds.shared:
        found.append(note("backgrounds", world.backgrounds))
    return tuple(found)
