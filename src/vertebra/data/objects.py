"""What the readers and writers of boxes share: image sizes from headers, repairs, and names of written images.

Repairs are the same in every layout, and each leaves a note:

==========================================  ===================================
found                                       what becomes of it
==========================================  ===================================
corners exchanged, negative width, height   exchanged back
box over the edge of the image              cut at the edge
box without extent (before or after that)   left out
==========================================  ===================================

What cannot be repaired (no numbers, an unknown class or image, a missing file) is an error that lists the places, or is
left out with a note where `on_error` is "skip".
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from vertebra.data.annotations import Objects, Outlines, starts
from vertebra.data.dataset import Dataset, Split
from vertebra.data.folders import Files, Folder
from vertebra.data.images import pixel_limit
from vertebra.data.partners import each, header
from vertebra.data.splits import Found
from vertebra.errors import DataError, UsageError

_COLUMNS = {"boxes", "labels", "crowd", "difficult", "area"}
_VISIBLE = 0.01  # pixels; less is rounding, and no note


def shown_sizes(root: Path, names: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Sizes of many images, and why some have none.

    Returns:
        (n, 2) int64 height and width, 0 where unknown; and position -> reason.
    """
    sizes, faults = np.zeros((len(names), 2), np.int64), {}

    def look(index: int) -> None:
        try:
            sizes[index] = header(root / names[index])[:2]
        except DataError as error:
            faults[index] = str(error)

    each(look, len(names))
    return sizes, faults


def too_large(sizes: np.ndarray) -> np.ndarray:
    """Whether images of these sizes (n, 2) have more pixels than are allowed, (n,) bool: a mask would be as large."""
    return sizes.astype(np.float64).prod(1) > pixel_limit()


class Listing:
    """The images below a root, found by name: nothing outside the listing can be reached."""

    def __init__(self, top: Folder) -> None:
        self.names = set(top.names())
        self.folders = [folder.path for folder in top.walk() if folder.images]
        self._by_base: dict[str, str | None] | None = None

    def by_base(self, name: str) -> str | None:
        """The only image that bears the last part of `name`; None where there is none, or more than one."""
        if self._by_base is None:
            self._by_base = {}
            for known in self.names:
                base = known.rpartition("/")[2]
                self._by_base[base] = None if base in self._by_base else known
        return self._by_base.get(name.rpartition("/")[2])


def tidy(
    boxes: np.ndarray, sizes: np.ndarray, where: Callable[[int], str], notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Repair boxes by the table above.

    Args:
        boxes: (m, 4) xyxy, finite.
        sizes: (m, 2) height and width of each box's image.
        where: names a box for the notes.
        notes: takes what was done.

    Returns:
        The boxes, (m, 4), and which of them are kept, (m,) bool.
    """
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    swapped = (low != boxes[:, :2]).any(1)
    edge = sizes[:, ::-1].astype(np.float64)
    cut = np.concatenate([np.clip(low, 0, edge), np.clip(high, 0, edge)], 1)
    flat = np.logical_not((high > low).all(1))
    gone = np.logical_not((cut[:, 2:] > cut[:, :2]).all(1) | flat)
    over = np.abs(cut - np.concatenate([low, high], 1)).max(1, initial=0)
    for what, rows in (
        ("boxes with exchanged corners, put right", swapped),
        ("boxes over the edge of their image, cut there", (over > _VISIBLE) & ~gone & ~flat),
        ("boxes without extent, left out", flat),
        ("boxes wholly outside their image, left out", gone),
    ):
        if rows.any():
            shown = ", ".join(where(int(row)) for row in np.flatnonzero(rows)[:3])
            more = ", ..." if rows.sum() > 3 else ""
            notes.append(f"{what}: {rows.sum()} ({shown}{more})")
    return cut, np.logical_not(flat | gone)


def found(root: Path, names: Sequence[str], objects: Objects, classes: Sequence[str]) -> Found:
    """A split of files with objects; the classes that an image shows are its labels."""
    paths = np.array(names, dtype=np.str_)
    count = max(1, len(classes))
    owner = np.repeat(np.arange(len(objects)), np.diff(objects.first))
    shown = np.unique(owner * count + objects.labels)
    words: list[str] = [classes[int(number)] for number in shown % count]
    first = starts(np.bincount(shown // count, minlength=len(objects))).tolist()
    labels: list[tuple[str, ...]] = [tuple(words[start:stop]) for start, stop in pairwise(first)]
    return Found(paths, labels, Files(root, paths), np.arange(len(paths)), objects)


def with_objects(dataset: Dataset) -> dict[str, tuple[Split, Objects]]:
    """The splits and their objects; annotations of another kind that give boxes are asked image by image.

    Raises:
        UsageError: a split has no boxes.
    """
    pairs = {}
    for name, split in dataset.splits.items():
        known = split.annotations
        if known is None or not {"boxes", "labels"} <= set(known.names):
            raise UsageError(
                f"{dataset.path}: split {name} has no boxes; write a data set that has boxes in every split"
            )
        pairs[name] = (split, known if isinstance(known, Objects) else _gathered(split))
    return pairs


def _gathered(split: Split) -> Objects:
    """Columns of the targets of a split."""
    assert split.annotations is not None
    columns: dict[str, list[np.ndarray]] = {}
    lengths, sizes, shapes = [], [], []
    for index in range(len(split)):
        target = split.annotations.target(index)
        lengths.append(len(target["labels"]))
        sizes.append(tuple(target["boxes"].canvas_size))
        for name in _COLUMNS & target.keys():
            columns.setdefault(name, []).append(target[name].numpy())
        shapes += [run_lengths(mask) for mask in target["masks"].numpy()] if "masks" in target else []
    whole = {name: np.concatenate(some) for name, some in columns.items()}
    boxes, nothing = whole["boxes"].astype(np.float64), np.zeros(sum(lengths), bool)
    area = whole["area"].astype(np.float64) if "area" in whole else (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(
        first=starts(lengths),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        boxes=boxes,
        labels=whole["labels"].astype(np.int64),
        class_ids=tuple(range(1, len(split.classes) + 1)),
        crowd=whole.get("crowd", nothing),
        difficult=whole.get("difficult", nothing.copy()),
        area=area,
        outlines=Outlines.of(shapes) if "masks" in split.annotations.names else None,
    )


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of a mask (H, W) down its columns, of 0 and 1 by turns, beginning with 0."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0] if len(flat) and flat[0] else [], [0], changes, [len(flat)]])
    return np.diff(edges).astype(np.uint32)


def own_names(dataset: Dataset) -> dict[str, list[str]]:
    """The names of the images of each split; below a folder of the split where names alone would meet.

    Files that are in two splits are the same file, and keep their name.
    """
    names = {split: [str(name) for name in one.names] for split, one in dataset.splits.items()}
    files = all(isinstance(one.store, Files) for one in dataset.splits.values())
    if files or len(set(chain.from_iterable(names.values()))) == sum(map(len, names.values())):
        return names
    return {split: [f"{split}/{name}" for name in some] for split, some in names.items()}


def flat_names(dataset: Dataset) -> dict[str, list[str]]:
    """Names without folders for the images of each split; the folders go into the name where it would not be unique.

    Two files that differ only in their suffix count as equal: layouts pair files by stem.

    Raises:
        UsageError: names that stay equal.
    """
    names = own_names(dataset)
    whole = [PurePosixPath(name) for name in dict.fromkeys(chain.from_iterable(names.values()))]
    for flat in ([path.name for path in whole], ["-".join(path.parts) for path in whole]):
        counts = Counter(PurePosixPath(name).stem for name in flat)
        if len(counts) == len(flat):
            new = dict(zip(map(str, whole), flat, strict=True))
            return {split: [new[str(PurePosixPath(name))] for name in some] for split, some in names.items()}
    twice = counts.most_common(1)[0][0]
    raise UsageError(f"{dataset.path}: more than one image is called {twice} without its suffix; rename one")
