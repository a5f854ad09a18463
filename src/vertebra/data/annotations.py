"""What is known of the images of a split beside one class: boxes, masks, points, words, another image.

An annotation is one object for the whole split; `target(index)` makes what training and metrics need of one image, as
torchvision's typed tensors where there is one for it. The names are the same in every layout:

==============  ===========================================================  =====================================
name            value                                                        where
==============  ===========================================================  =====================================
boxes           tv_tensors.BoundingBoxes (N, 4) float32, xyxy pixels         objects
labels          (N,) int64 indices into the split's classes                  objects
crowd           (N,) bool: a region of many, ignored by COCO's metrics       objects
difficult       (N,) bool: not counted by VOC's metrics                      objects
area            (N,) float32 pixels, of the mask where there is one          objects
masks           tv_tensors.Mask (N, H, W) bool                               objects with outlines
keypoints       (N, K, 3) float32: x, y, visibility (0, 1, 2)                objects with keypoints
semantic        tv_tensors.Mask (H, W) int64, `IGNORE` where nothing counts  semantic and panoptic masks
panoptic        tv_tensors.Mask (H, W) int64 segment numbers, 0 is void      panoptic masks
segments        (S,) int64 the numbers, `segment_labels` (S,) their classes  panoptic masks
segment_crowd   (S,) bool: a region of many, ignored by PQ                   panoptic masks
points          (N, 2) float32 x, y                                          counting
clean           tv_tensors.Image (C, H, W) uint8                             pairs
captions        tuple of str                                                 image-text
==============  ===========================================================  =====================================

Pixels are counted from the left upper corner of the image as it is shown (EXIF applied), and the left edge of the
first pixel is at 0. Nothing here imports torch before a target is made.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

IGNORE = 255
"""Semantic value of pixels that count for nothing."""


class Annotations(ABC):
    """What is known of the images of a split. Picklable; small whatever the images weigh."""

    @abstractmethod
    def __len__(self) -> int:
        """Images."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Keys of every target, from the table above."""

    @abstractmethod
    def target(self, index: int) -> dict[str, Any]:
        """What is known of image `index`: name -> value, as the table above says."""

    @abstractmethod
    def select(self, indices: np.ndarray) -> "Annotations":
        """Those of the images at `indices`, in that order."""

    @abstractmethod
    def digest(self) -> bytes:
        """Bytes that change with what is annotated, for the data's fingerprint."""


@dataclass(frozen=True, eq=False)
class Outlines:
    """A mask an object, as polygons or as runs; columns, so that a million objects stay small.

    Attributes:
        parts: (m + 1,) int64; parts `parts[i]:parts[i + 1]` are object i's polygons. None of them: no mask, or runs.
        corners: (parts + 1,) int64; corners `corners[j]:corners[j + 1]` of `points` are polygon j's.
        points: (k, 2) float64 x, y in pixels.
        runs: (m + 1,) int64; `counts[runs[i]:runs[i + 1]]` are the run lengths of object i.
        counts: (r,) uint32 lengths of runs down the columns, of 0 and 1 by turns, beginning with 0 (COCO's RLE).
    """

    parts: np.ndarray
    corners: np.ndarray
    points: np.ndarray
    runs: np.ndarray
    counts: np.ndarray

    def polygons(self, index: int) -> list[np.ndarray]:
        """Polygons (k, 2) of object `index`."""
        first, last = self.parts[index], self.parts[index + 1]
        return [self.points[self.corners[j] : self.corners[j + 1]] for j in range(first, last)]

    def run_lengths(self, index: int) -> np.ndarray:
        """Run lengths of object `index`; empty where it has none."""
        return self.counts[self.runs[index] : self.runs[index + 1]]

    def mask(self, index: int, height: int, width: int) -> np.ndarray:
        """The mask of object `index`, (height, width) bool; all False where it has no outline."""
        return self.masks([index], height, width)[0]

    def masks(self, objects: Sequence[int], height: int, width: int) -> np.ndarray:
        """The masks of the objects of one image, (N, height, width) bool; polygons are filled as COCO fills them."""
        found = np.zeros((len(objects), height, width), dtype=bool)
        for place, counts in enumerate(self._filled(objects, height, width)):
            _paint(found[place], counts)
        return found

    def _filled(self, objects: Sequence[int], height: int, width: int) -> list[np.ndarray]:
        """Run lengths of each object, its polygons filled."""
        from faster_coco_eval.core import mask

        from vertebra.data.segmentations import decode_runs

        runs = [self.run_lengths(index) for index in objects]
        traced, texts = [], []
        for place, index in enumerate(objects):
            polygons = [] if len(runs[place]) else [one for one in self.polygons(index) if len(one) >= 3]
            if polygons:  # of two corners each they would be read as boxes
                encoded: Any = mask.frPyObjects([one.ravel().tolist() for one in polygons], height, width)
                text = mask.merge(encoded)["counts"]
                traced.append(place)
                texts.append(text if isinstance(text, bytes) else text.encode())
        first, counts, _ = decode_runs(texts)
        for number, place in enumerate(traced):
            runs[place] = counts[first[number] : first[number + 1]]
        return runs

    def select(self, objects: np.ndarray) -> "Outlines":
        """Those of the objects at `objects`, in that order."""
        parts, part_rows = _taken(self.parts, objects)
        corners, point_rows = _taken(self.corners, part_rows)
        runs, count_rows = _taken(self.runs, objects)
        return Outlines(parts, corners, self.points[point_rows], runs, self.counts[count_rows])

    @classmethod
    def of(cls, shapes: Sequence[Sequence[np.ndarray] | np.ndarray | None]) -> "Outlines":
        """Columns of one shape an object: polygons (k, 2) each, run lengths (r,), or None."""
        polygons = [shape if isinstance(shape, list | tuple) else [] for shape in shapes]
        lengths = [shape if isinstance(shape, np.ndarray) else np.empty(0) for shape in shapes]
        flat = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for some in polygons for polygon in some]
        return cls(
            starts([len(some) for some in polygons]),
            starts([len(polygon) for polygon in flat]),
            np.concatenate([np.empty((0, 2)), *flat]),
            starts([len(some) for some in lengths]),
            np.concatenate([np.empty(0), *lengths]).astype(np.uint32),
        )


@dataclass(frozen=True, eq=False)
class Objects(Annotations):
    """Things in images: a box and a class each, an outline and keypoints where the data has them.

    Attributes:
        first: (n + 1,) int64; objects `first[i]:first[i + 1]` are image i's.
        sizes: (n, 2) int64 height, width of the images in pixels.
        boxes: (m, 4) float64 xyxy.
        labels: (m,) int64 indices into the split's classes.
        class_ids: what the data itself calls its classes (COCO's category ids), in the classes' order.
        crowd: (m,) bool.
        difficult: (m,) bool.
        area: (m,) float64.
        outlines: a mask an object.
        keypoints: (m, K, 3) float64.
        keypoint_names: (K,) what the keypoints are.
    """

    first: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    class_ids: tuple[int, ...]
    crowd: np.ndarray
    difficult: np.ndarray
    area: np.ndarray
    outlines: Outlines | None = None
    keypoints: np.ndarray | None = None
    keypoint_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def names(self) -> tuple[str, ...]:
        found = ["boxes", "labels", "crowd", "difficult", "area"]
        found += ["masks"] if self.outlines is not None else []
        found += ["keypoints"] if self.keypoints is not None else []
        return tuple(found)

    def rows(self, index: int) -> slice:
        """Where the objects of image `index` are."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def masks(self, index: int) -> np.ndarray:
        """Masks (N, H, W) bool of the objects of image `index`."""
        height, width = map(int, self.sizes[index])
        rows = self.rows(index)
        if self.outlines is None:
            return np.zeros((rows.stop - rows.start, height, width), dtype=bool)
        return self.outlines.masks(range(rows.start, rows.stop), height, width)

    def target(self, index: int) -> dict[str, Any]:
        import torch
        from torchvision import tv_tensors

        rows, size = self.rows(index), tuple(map(int, self.sizes[index]))
        boxes = torch.from_numpy(self.boxes[rows].astype(np.float32))  # copies, so that views may change them
        found: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.from_numpy(self.labels[rows].copy()),
            "crowd": torch.from_numpy(self.crowd[rows].copy()),
            "difficult": torch.from_numpy(self.difficult[rows].copy()),
            "area": torch.from_numpy(self.area[rows].astype(np.float32)),
        }
        if self.outlines is not None:
            found["masks"] = tv_tensors.Mask(torch.from_numpy(self.masks(index)))
        if self.keypoints is not None:
            found["keypoints"] = torch.from_numpy(self.keypoints[rows].astype(np.float32))
        return found

    def select(self, indices: np.ndarray) -> "Objects":
        first, rows = _taken(self.first, np.asarray(indices, dtype=np.int64))
        return replace(
            self,
            first=first,
            sizes=self.sizes[indices],
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            difficult=self.difficult[rows],
            area=self.area[rows],
            outlines=None if self.outlines is None else self.outlines.select(rows),
            keypoints=None if self.keypoints is None else self.keypoints[rows],
        )

    def presence(self, classes: int) -> np.ndarray:
        """Which classes an image shows, (n, classes) uint8: what a classifier can learn of it."""
        found = np.zeros((len(self), classes), dtype=np.uint8)
        found[np.repeat(np.arange(len(self)), np.diff(self.first)), self.labels] = 1
        return found

    def digest(self) -> bytes:
        return digest_of(self)


def starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where runs of these lengths start, and after them the end of the last one, (n + 1,) int64."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _paint(mask: np.ndarray, counts: np.ndarray) -> None:
    """Set what runs down the columns cover in a mask (H, W) that is all False: only within their bounds."""
    height = len(mask)
    ends = np.cumsum(counts.astype(np.int64))
    start, stop = ends[:-1:2], ends[1::2]
    start, stop = start[stop > start], stop[stop > start]
    if not len(start):
        return
    first = start // height
    columns = (stop - 1) // height - first + 1  # a run over the bottom goes on at the top of the next column
    column = np.arange(columns.sum()) - np.repeat(np.cumsum(columns) - columns - first, columns)
    top = np.maximum(np.repeat(start, columns) - column * height, 0)
    bottom = np.minimum(np.repeat(stop, columns) - column * height, height)
    upper, lower, left, right = top.min(), bottom.max(), column[0], column[-1] + 1
    edges = np.zeros((lower - upper + 1, right - left), dtype=np.int8)
    np.add.at(edges, (top - upper, column - left), 1)
    np.add.at(edges, (bottom - upper, column - left), -1)
    mask[upper:lower, left:right] = np.cumsum(edges[:-1], axis=0, dtype=np.int8)


def _taken(first: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and rows of the groups that are kept."""
    lengths = first[groups + 1] - first[groups]
    kept = starts(lengths)
    return kept, np.arange(kept[-1]) + np.repeat(first[groups] - kept[:-1], lengths)


def digest_of(columns: Any) -> bytes:
    """A digest of a dataclass of arrays and plain values."""
    found = hashlib.sha256()
    for column in fields(columns):
        value = getattr(columns, column.name)
        if isinstance(value, Outlines):
            found.update(digest_of(value))
        elif isinstance(value, np.ndarray):
            found.update(f"{column.name} {value.shape} {value.dtype}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(f"{column.name} {value!r}".encode())
    return found.digest()
