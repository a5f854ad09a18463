"""What is known of the images of the sprite world: targets, arrays and columns.

Beside the names of `vertebra.data.annotations` a target can hold:

===========  =========================================================================================================
name         value
===========  =========================================================================================================
attributes   (N, 4) int64: colour, size, texture, position, as `World.values` numbers them; -1 where there is none
depth        (N,) int64, 0 is nearest
hidden       (N,) float32, share of the thing that others hide
relations    (R, 3) int64: subject, index into `RELATIONS`, object: the scene graph's edges
foils        tuple of str, one a caption: the same words in another order, false of the image; "" where none
sentences    tuple of str, each true of exactly one thing, and `referents` (S,) int64, which one that is
degradation  () int64 index into `DEGRADATIONS`, and `severity` () float32, with pairs
quality      () float32 0..1 of the degraded image, and `psnr` () float32 in dB, with pairs
===========  =========================================================================================================
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from vertebra.data.annotations import Annotations, Objects, Outlines, starts
from vertebra.data.dataset import Split
from vertebra.data.sprites.degradations import DEGRADATIONS, SEVEREST, degrade, psnr, quality
from vertebra.data.sprites.language import captions, facts, referring
from vertebra.data.sprites.pictures import Part
from vertebra.data.sprites.rendering import Render, rendered
from vertebra.data.sprites.scenes import World, generator
from vertebra.errors import DataError

VERSION = 1
"""Changes with what is drawn, so that fingerprints do."""

OBJECTS = ("boxes", "labels", "crowd", "difficult", "area", "masks")
"""What `sprites` annotates where nobody says otherwise."""

GIVES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in OBJECTS},
    "semantic": ("semantic",),
    "panoptic": ("panoptic", "segments", "segment_labels"),
    "points": ("points",),
    "attributes": ("attributes",),
    "depth": ("depth", "hidden"),
    "relations": ("relations",),
    "captions": ("captions", "foils"),
    "sentences": ("sentences", "referents"),
    "clean": ("clean", "degradation", "severity", "quality", "psnr"),
}
"""What can be asked for -> the names that a target has then."""

BACKGROUND = "background"
"""Class of what is no thing, last of the classes where semantic or panoptic masks are asked for."""


class Worse(NamedTuple):
    """A degraded image.

    Attributes:
        image: (H, W, 3) uint8.
        kind: index into `DEGRADATIONS`.
        severity: 1..5.
    """

    image: np.ndarray
    kind: int
    severity: float


def worse(world: World, part: Part, index: int, kinds: tuple[str, ...]) -> Worse:
    """Scene `index` with one of the degradations by chance, at a severity from 1 to 5."""
    random = generator(world.seed, part, index, "degrade")
    choice, amount = random.random(2).tolist()
    kind, severity = kinds[int(choice * len(kinds))], 1 + (SEVEREST - 1) * amount
    image = degrade(rendered(world, part, index).image, kind, severity, random)
    return Worse(image, DEGRADATIONS.index(kind), severity)


@dataclass(frozen=True, eq=False)
class Sprites(Annotations):
    """What is known of scenes; see the table above and that of `vertebra.data.annotations`.

    Attributes:
        world: what is drawn.
        part: of the world.
        indices: (n,) int64 scenes of the part.
        annotate: keys of `GIVES`.
        degrade: kinds of degradation of the images.
    """

    world: World
    part: Part
    indices: np.ndarray
    annotate: tuple[str, ...] = OBJECTS
    degrade: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for asked in self.annotate for name in GIVES[asked])

    def render(self, index: int) -> Render:
        """Pixels, boxes and masks of image `index` in numpy, clean."""
        return rendered(self.world, self.part, int(self.indices[index]))

    def select(self, indices: np.ndarray) -> "Sprites":
        return replace(self, indices=self.indices[np.asarray(indices, dtype=np.int64)])

    def digest(self) -> bytes:
        settings = f"{VERSION} {self.world!r} {self.part} {self.annotate} {self.degrade}"
        return hashlib.sha256(settings.encode() + self.indices.astype(np.int64).tobytes()).digest()

    def target(self, index: int) -> dict[str, Any]:
        render, asked = self.render(index), set(self.annotate)
        found = _geometry(render, len(self.world.classes), asked)
        if asked & {"relations", "captions", "sentences", "attributes"}:
            found |= self._words(int(self.indices[index]), render, asked)
        if "clean" in asked:
            found |= self._pair(int(self.indices[index]), render)
        return {name: found[name] for name in self.names}

    def _words(self, scene: int, render: Render, asked: set[str]) -> dict[str, Any]:
        import torch

        known = facts(self.world, render)
        found: dict[str, Any] = {
            "attributes": torch.from_numpy(known.values[:, 1:].copy()),
            "relations": torch.from_numpy(np.argwhere(known.related)[:, [1, 0, 2]]),
        }
        if "captions" in asked:
            found["captions"], found["foils"] = captions(self.world, self.part, scene, known)
        if "sentences" in asked:
            sentences = referring(self.world, self.part, scene, known)
            found["sentences"] = tuple(one.text for one in sentences)
            found["referents"] = torch.tensor([one.thing for one in sentences], dtype=torch.int64)
        return found

    def _pair(self, scene: int, render: Render) -> dict[str, Any]:
        import torch
        from torchvision import tv_tensors

        shown = worse(self.world, self.part, scene, self.degrade)
        ratio = psnr(render.image, shown.image)
        return {
            "clean": tv_tensors.Image(torch.from_numpy(render.image.transpose(2, 0, 1).copy())),
            "degradation": torch.tensor(shown.kind),
            "severity": torch.tensor(shown.severity),
            "quality": torch.tensor(quality(ratio)),
            "psnr": torch.tensor(ratio),
        }


def _geometry(render: Render, classes: int, asked: set[str]) -> dict[str, Any]:
    """Targets that are read off the drawing."""
    import torch
    from torchvision import tv_tensors

    planned, count, size = render.plan, len(render.boxes), render.ids.shape
    boxes = torch.from_numpy(render.boxes.copy())
    found: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
        "labels": torch.from_numpy(planned.labels.copy()),
        "crowd": torch.zeros(count, dtype=torch.bool),
        "difficult": torch.from_numpy(render.hidden > 0.5),
        "area": torch.from_numpy(render.area.astype(np.float32)),
        "points": torch.from_numpy(np.stack([planned.x, planned.y], 1).astype(np.float32)),
        "depth": torch.from_numpy(planned.depth.copy()),
        "hidden": torch.from_numpy(render.hidden.astype(np.float32)),
    }
    if "masks" in asked:
        found["masks"] = tv_tensors.Mask(torch.from_numpy(render.masks))
    if "semantic" in asked:
        labels = np.concatenate([[classes], planned.labels])  # the background comes after the things' classes
        found["semantic"] = tv_tensors.Mask(torch.from_numpy(labels[render.ids]))
    if "panoptic" in asked:
        numbers = np.where(render.ids == 0, count + 1, render.ids).astype(np.int64)
        found["panoptic"] = tv_tensors.Mask(torch.from_numpy(numbers))
        found["segments"] = torch.arange(1, count + 2)
        found["segment_labels"] = torch.from_numpy(np.append(planned.labels, classes))
    return found


class Arrays(NamedTuple):
    """A split drawn at once, for code that wants numpy.

    Attributes:
        images: (n, H, W, 3) uint8, clean.
        ids: (n, H, W) int16: 0 for the background, i + 1 for thing i of the image.
        first: (n + 1,) int64; things `first[i]:first[i + 1]` are image i's.
        boxes: (m, 4) float32 xyxy pixels.
        labels: (m,) int64.
    """

    images: np.ndarray
    ids: np.ndarray
    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def arrays(split: Split) -> Arrays:
    """Draw a whole split of `sprites`; 64 x 64 pixels take about a millisecond an image on one core.

    Raises:
        DataError: the split is not of `sprites`.
    """
    known, count = _sprites_of(split), len(split)
    side = known.world.size
    images = np.empty((count, side, side, 3), dtype=np.uint8)
    ids = np.empty((count, side, side), dtype=np.int16)
    boxes, labels = [np.empty((0, 4), dtype=np.float32)], [np.empty(0, dtype=np.int64)]
    for place in range(count):
        render = known.render(place)
        images[place], ids[place] = render.image, render.ids
        boxes.append(render.boxes)
        labels.append(render.plan.labels)
    first = starts([len(some) for some in boxes[1:]])
    return Arrays(images, ids, first, np.concatenate(boxes), np.concatenate(labels))


def objects(split: Split) -> Objects:
    """Boxes, classes and masks of a split of `sprites` as columns, for writers of COCO, VOC and YOLO.

    Raises:
        DataError: the split is not of `sprites`.
    """
    known, size = _sprites_of(split), (_sprites_of(split).world.size,) * 2
    lengths, boxes, labels, areas, hidden, shapes = [], [np.empty((0, 4))], [np.empty(0, dtype=np.int64)], [], [], []
    for place in range(len(split)):
        render = known.render(place)
        lengths.append(len(render.boxes))
        boxes.append(render.boxes)
        labels.append(render.plan.labels)
        areas.append(render.area)
        hidden.append(render.hidden)
        shapes += _run_lengths(render.masks)
    return Objects(
        first=starts(lengths),
        sizes=np.tile(np.array(size, dtype=np.int64), (len(split), 1)),
        boxes=np.concatenate(boxes).astype(np.float64),
        labels=np.concatenate(labels),
        class_ids=tuple(range(1, len(split.classes) + 1)),
        crowd=np.zeros(sum(lengths), dtype=bool),
        difficult=np.concatenate([np.empty(0), *hidden]) > 0.5,
        area=np.concatenate([np.empty(0), *areas]).astype(np.float64),
        outlines=Outlines.of(shapes),
    )


def _run_lengths(masks: np.ndarray) -> list[np.ndarray]:
    """Masks (n, H, W) bool as lengths of runs down the columns, beginning with 0 (COCO's RLE)."""
    flat = masks.transpose(0, 2, 1).reshape(len(masks), -1)
    edged = np.pad(flat, ((0, 0), (1, 0)))  # as if a 0 came before, so that runs begin with 0
    found = []
    for row in edged:
        changes = np.flatnonzero(row[1:] != row[:-1])
        found.append(np.diff(np.concatenate([[0], changes, [flat.shape[1]]])).astype(np.uint32))
    return found


def _sprites_of(split: Split) -> Sprites:
    if not isinstance(split.annotations, Sprites):
        raise DataError(f"split {split.name!r} is not drawn by sprites(); its own annotations are in `annotations`")
    return split.annotations
