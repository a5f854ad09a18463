"""Areas, bounds and run lengths of objects, and what is wrong with the boxes and masks of a split.

====================  =======  ===================================================================================
kind                  rank     what it says
====================  =======  ===================================================================================
size-mismatch         defect   an image is not as large as its annotations say; with the sides exchanged, its
                               boxes were drawn before the EXIF rotation
degenerate-box        defect   a box without extent, or with a coordinate that is no number
outside-image         defect   a box that leaves its image by more than a pixel
empty-mask            defect   an outline that covers nothing
duplicate-object      warning  the same box with the same class twice in one image
mask-box              warning  an outline whose bounds are elsewhere than its box
mask-area             warning  an area that is far from what the outline covers, or larger than the box
keypoint-outside      warning  a visible keypoint outside the image
no-countable-object   warning  a class whose objects in a split are all crowd or difficult
tiny-objects          warning  boxes with a side under 4 pixels
====================  =======  ===================================================================================

Readers already repair or refuse much of this and say so in their notes; the rest, and data sets made in Python, show
here. All is computed on columns: no loop over boxes, points or pixels.
"""

from collections.abc import Iterator

import numpy as np

from vertebra.data.annotations import Objects, Outlines, starts
from vertebra.data.checking import Finding
from vertebra.data.dataset import Split

DEFECTS = frozenset({"size-mismatch", "degenerate-box", "outside-image", "empty-mask"})
"""Kinds that make results wrong; the others are warnings."""

_TINY = 4  # pixels
_EDGE = 1.0  # pixels by which rounding may carry a box over the edge
_LOOSE = 0.05  # share of the box's side by which an outline may miss it, beside two pixels


def outline_areas(outlines: Outlines) -> np.ndarray:
    """Pixels that each outline covers, (m,) float64: polygons by the shoelace formula, runs by counting."""
    x, y = outlines.points.T
    after = np.arange(len(x)) + 1  # the next corner of the same polygon
    filled = np.diff(outlines.corners) > 0
    after[outlines.corners[1:][filled] - 1] = outlines.corners[:-1][filled]
    parts = np.abs(_each(np.add, x * y[after] - x[after] * y, outlines.corners)) / 2
    ones = np.where(places(outlines.runs) % 2 == 1, outlines.counts, 0).astype(np.float64)
    return _each(np.add, parts, outlines.parts) + _each(np.add, ones, outlines.runs)


def outline_boxes(outlines: Outlines, heights: np.ndarray) -> np.ndarray:
    """Bounds of each outline, (m, 4) float64 xyxy; NaN where it covers nothing.

    Args:
        outlines: of m objects.
        heights: (m,) heights of the images that the objects are in.
    """
    per_object = outlines.corners[outlines.parts]  # parts of one object lie together, and so do their corners
    low, high = (
        np.stack([_each(pick, outlines.points[:, axis], per_object, empty=np.nan) for axis in (0, 1)], 1)
        for pick in (np.minimum, np.maximum)
    )
    found = np.concatenate([low, high], 1)
    runs = np.flatnonzero(np.diff(outlines.runs))
    found[runs] = _run_boxes(outlines, heights)[runs]
    return found


def _run_boxes(outlines: Outlines, heights: np.ndarray) -> np.ndarray:
    """Bounds of what runs down the columns cover, (m, 4)."""
    lengths = outlines.counts.astype(np.int64)
    owner = np.repeat(np.arange(len(outlines.runs) - 1), np.diff(outlines.runs))
    total = starts(lengths)
    begin = total[:-1] - total[outlines.runs[:-1]][owner]  # within the object's own image
    inside = (places(outlines.runs) % 2 == 1) & (lengths > 0)
    first, last, owner = begin[inside], (begin + lengths)[inside] - 1, owner[inside]
    height = np.maximum(heights[owner], 1)
    one_column = first // height == last // height  # a run over the bottom goes on at the top of the next column
    bounds = (
        (np.minimum, first // height),
        (np.minimum, np.where(one_column, first % height, 0)),
        (np.maximum, last // height + 1),
        (np.maximum, np.where(one_column, last % height + 1, height)),
    )
    kept = starts(np.bincount(owner, minlength=len(heights)))
    return np.stack([_each(pick, value.astype(np.float64), kept, empty=np.nan) for pick, value in bounds], 1)


def places(first: np.ndarray) -> np.ndarray:
    """Position of each member within its group."""
    return np.arange(first[-1]) - np.repeat(first[:-1], np.diff(first))


def _each(function: np.ufunc, values: np.ndarray, first: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """`function` over each group of values; `empty` where a group has none."""
    found = np.full(len(first) - 1, empty)
    filled = np.diff(first) > 0
    if filled.any():
        found[filled] = function.reduceat(values, first[:-1][filled])
    return found


def faults(split: Split, sizes: np.ndarray | None = None) -> Iterator[Finding]:
    """What is wrong with the objects of a split, one finding an image and kind; nothing where it has no objects.

    Args:
        split: any split.
        sizes: (n, 2) height and width of its images as they are shown, 0 where one is not known; without them
            image sizes are not compared.
    """
    objects = split.annotations
    if not isinstance(objects, Objects):
        return
    if sizes is not None:
        yield from _sizes(split, objects, sizes)
    owner = np.repeat(np.arange(len(objects)), np.diff(objects.first))
    height, width = objects.sizes[owner].T
    x0, y0, x1, y1 = objects.boxes.T
    flat = ~((x1 > x0) & (y1 > y0))  # NaN too
    beyond = np.max([-x0, -y0, x1 - width, y1 - height], axis=0, initial=0) > _EDGE
    yield from _listed(split, owner, "degenerate-box", flat, "boxes without extent", objects)
    yield from _listed(split, owner, "outside-image", beyond, "boxes that leave the image", objects)
    yield from _listed(split, owner, "duplicate-object", _repeated(owner, objects), "boxes given twice", objects)
    if objects.outlines is not None:
        yield from _outlines(split, owner, objects)
    if objects.keypoints is not None:
        x, y, seen = np.moveaxis(objects.keypoints, 2, 0)  # (m, K) each
        out = (x < 0) | (y < 0) | (x > width[:, None]) | (y > height[:, None])
        far = (out & (seen > 0)).any(1)
        yield from _listed(split, owner, "keypoint-outside", far, "objects with keypoints outside the image", objects)
    yield from _uncounted(split, objects)
    small = ~flat & (np.minimum(x1 - x0, y1 - y0) < _TINY)
    if small.any():
        message = f"{small.sum()} of {len(small)} boxes have a side under {_TINY} pixels"
        yield Finding("tiny-objects", split.name, message)


def _sizes(split: Split, objects: Objects, sizes: np.ndarray) -> Iterator[Finding]:
    for index in np.flatnonzero((sizes != objects.sizes).any(1) & (sizes > 0).all(1)):
        (height, width), (said_height, said_width) = sizes[index].tolist(), objects.sizes[index].tolist()
        message = f"is {width} x {height}, its annotations say {said_width} x {said_height}"
        if (height, width) == (said_width, said_height):
            message += ": drawn before the EXIF rotation? Turn the boxes, or save the image without EXIF"
        yield Finding("size-mismatch", str(split.names[index]), message)


def _outlines(split: Split, owner: np.ndarray, objects: Objects) -> Iterator[Finding]:
    outlines, boxes = objects.outlines, objects.boxes
    assert outlines is not None
    has = (np.diff(outlines.parts) > 0) | (np.diff(outlines.runs) > 0)
    areas, bounds = outline_areas(outlines), outline_boxes(outlines, objects.sizes[owner, 0])
    low, high = np.zeros_like(bounds), np.tile(objects.sizes[owner][:, ::-1], 2)
    apart = np.abs(np.clip(bounds, low, high) - boxes).max(1, initial=0)
    side = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    empty = has & ~(areas > 0)
    loose = has & ~empty & (apart > 2 + _LOOSE * side)
    box_area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    most = np.maximum(areas, objects.area)
    wrong = has & ~empty & ((np.abs(areas - objects.area) > 0.5 * most + 4) | (objects.area > 1.1 * box_area + 4))
    yield from _listed(split, owner, "empty-mask", empty, "masks that cover nothing", objects)
    yield from _listed(split, owner, "mask-box", loose, "boxes that do not fit their mask", objects)
    yield from _listed(split, owner, "mask-area", wrong, "areas that do not fit their mask", objects)


def _repeated(owner: np.ndarray, objects: Objects) -> np.ndarray:
    """Whether an object's image, class and box were there before; crowds may repeat."""
    keys = np.column_stack([owner, objects.labels, np.round(np.nan_to_num(objects.boxes), 2)])
    _, first = np.unique(keys, axis=0, return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return again & ~objects.crowd & ~np.isnan(objects.boxes).any(1)


def _uncounted(split: Split, objects: Objects) -> Iterator[Finding]:
    count = len(split.classes)
    present = np.bincount(objects.labels, minlength=count)
    counted = np.bincount(objects.labels[~(objects.crowd | objects.difficult)], minlength=count)
    for number in np.flatnonzero((present > 0) & (counted == 0)):
        message = f"all its objects in {split.name} ({present[number]}) are crowd or difficult"
        yield Finding("no-countable-object", split.classes[number], message)


def _listed(
    split: Split, owner: np.ndarray, kind: str, wrong: np.ndarray, what: str, objects: Objects
) -> Iterator[Finding]:
    """One finding an image, with the first object that is wrong."""
    rows = np.flatnonzero(wrong)
    images, first, counts = np.unique(owner[rows], return_index=True, return_counts=True)
    for image, row, count in zip(images, rows[first], counts, strict=True):
        box = ", ".join(f"{value:g}" for value in objects.boxes[row])
        name = split.classes[objects.labels[row]]
        yield Finding(kind, str(split.names[image]), f"{what}: {count}; the first is {name} at [{box}]")
