"""Panoptic masks as COCO and Cityscapes have them: a json file, and of the same name a folder of PNGs.

A pixel's colour is its segment's number, r + 256 g + 65536 b; 0 is void. The json says of each segment which class it
is (`segments_info`). Images lie anywhere below the root: they are found by the names that the json gives. The split is
a word of the json's name (`panoptic_train2017.json`). The classes that an image shows are its many labels.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from vertebra.data.annotations import IGNORE, Annotations, digest_of, starts
from vertebra.data.dataset import Dataset, Split
from vertebra.data.folders import Files, Folder
from vertebra.data.mask_values import packed, places_of
from vertebra.data.partners import (
    Lookup,
    checked,
    digest_of_files,
    each,
    fresh,
    header,
    raw,
    save_values,
    stem,
    word_of_split,
    write_images,
)
from vertebra.data.splits import Found, OnError, assemble, leave_out
from vertebra.errors import DataError

if TYPE_CHECKING:
    from vertebra.data.checking import Finding

_VOID = 0
_SHOWN = 5


@dataclass(frozen=True)
class PanopticPlan:
    """Where things are, relative to the root.

    Attributes:
        files: split -> the json and the folder of its PNGs, with "/" at the end.
        images: everything that may be one of the images.
    """

    files: Mapping[str, tuple[str, str]]
    images: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PanopticFiles(Annotations):
    """Panoptic PNGs, decoded when asked for, and what is known of their segments.

    Attributes:
        root: the folder.
        images: (n,) paths of the images.
        masks: (n,) paths of the PNGs.
        first: (n + 1,) int64; segments `first[i]:first[i + 1]` are image i's.
        segments: (m,) int64 numbers, rising within an image.
        labels: (m,) int64 indices into the split's classes.
        crowd: (m,) bool: a region of many, which PQ ignores.
        class_ids: what the data itself calls its classes, in their order.
        things: whether each class is of countable things, in their order.
    """

    root: Path
    images: np.ndarray
    masks: np.ndarray
    first: np.ndarray
    segments: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    class_ids: tuple[int, ...]
    things: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        return ("semantic", "panoptic", "segments", "segment_labels", "segment_crowd")

    def rows(self, index: int) -> slice:
        """Where the segments of image `index` are."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def numbers(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Segment number of each pixel of image `index`, (H, W) int64, and its place among 0 and the image's segments.

        Raises:
            DataError: the PNG cannot be read, does not fit the image, or its segments are not those of the json.
        """
        file = self.root / str(self.masks[index])
        image = raw(file)
        if image.mode != "RGB":
            raise DataError(f"{file} has pixels of mode {image.mode}; panoptic PNGs are RGB, r + 256 g + 65536 b")
        height, width, orientation, _ = header(self.root / str(self.images[index]))
        if image.size != (width, height):
            turned = f", as its EXIF turns it (orientation {orientation})" * (orientation >= 5)
            raise DataError(
                f"{file} is {image.size[0]} x {image.size[1]} pixels, and its image {width} x {height}{turned}; "
                "make it anew, or resize it without smoothing"
            )
        red, green, blue = image.split()  # COCO counts red as the lowest byte
        numbers = packed(Image.merge("RGB", (blue, green, red)))
        known = np.concatenate([[_VOID], self.segments[self.rows(index)]])
        places = places_of(numbers, known)
        strange = np.unique(numbers[places < 0])
        absent = known[1:][np.bincount(places[places >= 0], minlength=len(known))[1:] == 0]
        for what, some in (("has segments that the json lacks", strange), ("lacks segments of the json", absent)):
            if len(some):
                shown = ", ".join(map(str, some[:_SHOWN].tolist())) + ", ..." * (len(some) > _SHOWN)
                raise DataError(f"{file} {what}: {shown}; take the PNG and the json from one source")
        return numbers.astype(np.int64), places

    def target(self, index: int) -> dict[str, Any]:
        import torch
        from torchvision import tv_tensors

        rows = self.rows(index)
        numbers, places = self.numbers(index)
        semantic = np.concatenate([[IGNORE], self.labels[rows]])[places]
        return {
            "semantic": tv_tensors.Mask(torch.from_numpy(semantic)),
            "panoptic": tv_tensors.Mask(torch.from_numpy(numbers)),
            "segments": torch.from_numpy(self.segments[rows]),
            "segment_labels": torch.from_numpy(self.labels[rows]),
            "segment_crowd": torch.from_numpy(self.crowd[rows]),
        }

    def presence(self) -> np.ndarray:
        """Which classes each image shows, (n, classes) uint8."""
        shown = np.zeros((len(self), len(self.class_ids)), dtype=np.uint8)
        shown[np.repeat(np.arange(len(self)), np.diff(self.first)), self.labels] = 1
        return shown

    def select(self, indices: np.ndarray) -> "PanopticFiles":
        lengths = np.diff(self.first)[indices]
        first = starts(lengths)
        rows = np.arange(first[-1]) + np.repeat(self.first[:-1][indices] - first[:-1], lengths)
        return replace(
            self,
            images=self.images[indices],
            masks=self.masks[indices],
            first=first,
            segments=self.segments[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
        )

    def digest(self) -> bytes:
        return digest_of(replace(self, root=Path())) + digest_of_files(self.root, map(str, self.masks))


def find_panoptic(root: Path, top: Folder) -> PanopticPlan | None:
    """Json files beside a folder of their name with images in it; None where there are none.

    Raises:
        DataError: two of them are of one split.
    """
    files: dict[str, tuple[str, str]] = {}
    for folder in top.walk():
        for name in folder.others:
            if not name.lower().endswith(".json") or stem(name) not in folder.filled or "panoptic" not in name.lower():
                continue
            split, found = word_of_split(stem(name)) or "all", (folder.path + name, f"{folder.path}{stem(name)}/")
            if split in files:
                raise DataError(f"{root}: {files[split][0]} and {found[0]} both are of the split {split!r}; keep one")
            files[split] = found
    if not files:
        return None
    pngs = tuple(place for _, place in files.values())
    return PanopticPlan(files, tuple(name for name in top.names() if not name.startswith(pngs)))


class _Category(NamedTuple):
    name: str
    thing: bool


def read_panoptic(
    path: str, root: Path, plan: PanopticPlan, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read images with panoptic masks.

    Args:
        path: the path as the user gave it.
        root: the folder.
        plan: what `find_panoptic` found there.
        on_error: what becomes of images or PNGs that are missing, and of entries that contradict others.
        notes: what was said so far.

    Returns:
        A data set of many labels; targets hold "panoptic", "segments", "segment_labels", "segment_crowd", "semantic".

    Raises:
        DataError: a json is none of this kind, entries are at fault, or the splits have other classes.
    """
    notes = list(notes)
    loaded = {split: _load(root / file) for split, (file, _) in plan.files.items()}
    categories = {split: _categories(root / plan.files[split][0], data) for split, data in loaded.items()}
    known = next(iter(categories.values()))
    for split, other in categories.items():
        if other != known:
            raise DataError(
                f"{root / plan.files[split][0]} has other categories than {next(iter(plan.files.values()))[0]}"
            )
    lookup, found = Lookup(plan.images), {}
    for split, data in loaded.items():
        rows = _rows(root, plan.files[split], data, known, lookup, split, on_error, notes)
        if rows:
            found[split] = _found(root, rows, known)
    if not found:
        raise DataError(f"{path}: no image of {', '.join(file for file, _ in plan.files.values())} is there")
    return assemble(path, "panoptic", found, [category.name for category in known.values()], notes)


class _Row(NamedTuple):
    """An image: its file, its PNG, its segments as (number, category id, crowd)."""

    image: str
    mask: str
    segments: list[tuple[int, int, bool]]


def _found(root: Path, rows: list[_Row], known: Mapping[int, _Category]) -> Found:
    images = np.array([row.image for row in rows], dtype=np.str_)
    ids = list(known)
    number = {identity: place for place, identity in enumerate(ids)}
    segments = [sorted(row.segments) for row in rows]
    flat = [segment for some in segments for segment in some]
    annotations = PanopticFiles(
        root,
        images,
        np.array([row.mask for row in rows], dtype=np.str_),
        starts([len(some) for some in segments]),
        np.array([segment[0] for segment in flat], dtype=np.int64),
        np.array([number[segment[1]] for segment in flat], dtype=np.int64),
        np.array([segment[2] for segment in flat], dtype=bool),
        tuple(ids),
        tuple(category.thing for category in known.values()),
    )
    names = [category.name for category in known.values()]
    labels = [tuple(dict.fromkeys(names[number[segment[1]]] for segment in some)) for some in segments]
    return Found(images, labels, Files(root, images), np.arange(len(images)), annotations)


def _load(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
        raise DataError(f"{file} is no panoptic json: it needs the lists {', '.join(parts)}")
    for part in parts:
        if wrong := [number for number, entry in enumerate(data[part]) if not isinstance(entry, dict)]:
            raise DataError(f"{file}: entry {wrong[0]} of {part} is no object {{...}}")
    for part, key in (("images", "id"), ("annotations", "image_id")):
        if wrong := [number for number, entry in enumerate(data[part]) if not isinstance(entry.get(key), int | str)]:
            raise DataError(f"{file}: entry {wrong[0]} of {part} has no {key}, a number or a word")
    return data


def _categories(file: Path, data: Mapping[str, Any]) -> dict[int, _Category]:
    """Category id -> what it is, by rising id."""
    found: dict[int, _Category] = {}
    for entry in data["categories"]:
        identity, name = entry.get("id"), entry.get("name")
        if not _whole(identity) or not isinstance(name, str):
            raise DataError(f"{file}: the category {entry} needs a whole number as id, and a name")
        if identity in found or name in {category.name for category in found.values()}:
            raise DataError(f"{file}: the category {name!r} (id {identity}) is there twice")
        found[identity] = _Category(name, bool(entry.get("isthing", 1)))
    if not 0 < len(found) <= IGNORE:
        raise DataError(f"{file} has {len(found)} categories; read are 1 to {IGNORE}, as {IGNORE} is ignored")
    return dict(sorted(found.items()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rows(
    root: Path,
    files: tuple[str, str],
    data: Mapping[str, Any],
    known: Mapping[int, _Category],
    lookup: Lookup,
    split: str,
    on_error: OnError,
    notes: list[str],
) -> list[_Row]:
    """The entries of one json whose files are there; the faults are left out or raised."""
    file, folder = root / files[0], files[1]
    images = {entry.get("id"): entry for entry in data["images"]}
    faults, rows, seen = [], [], set()
    for entry in data["annotations"]:
        identity = entry.get("image_id")
        image = images.get(identity)
        row, fault = None, ""
        if image is None:
            fault = f"an annotation is of image {identity!r}, which images do not list"
        elif identity in seen:
            fault = f"image {identity} is annotated twice"
        else:
            row, fault = _row(file, root, folder, image, entry, known, lookup, split)
        seen.add(identity)
        if row:
            rows.append(row)
        else:
            faults.append(fault)
    faults += [f"image {identity} has no annotation" for identity in images.keys() - seen]
    leave_out(str(file), faults, on_error, notes)
    return sorted(rows)


def _row(
    file: Path,
    root: Path,
    folder: str,
    image: Mapping[str, Any],
    entry: Mapping[str, Any],
    known: Mapping[int, _Category],
    lookup: Lookup,
    split: str,
) -> tuple[_Row | None, str]:
    """The row of one annotation, or None and why there is none."""
    name = checked(str(image.get("file_name", "")), str(file))
    png = folder + checked(str(entry.get("file_name") or f"{stem(name)}.png"), str(file))
    last = name.rpartition("/")[2]
    places = lookup(name, split) or lookup(last, split) or lookup(last.replace("_gtFine_", "_"), split)  # Cityscapes
    if not places:
        return None, f"no such image: {name}"
    if len(places) > 1:
        return None, f"{name} is there more than once: {places[0]}, {places[1]}"
    if not (root / png).is_file():
        return None, f"{name} has no PNG {png}"
    segments = []
    listed = entry.get("segments_info", [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        return None, f"{name}: segments_info is no list of objects {{...}}"
    for one in listed:
        number, category = one.get("id"), one.get("category_id")
        if not _whole(number) or not 0 < number < 1 << 24:
            return None, f"{name}: segment id {number!r}; ids are 1 to {(1 << 24) - 1}, as {_VOID} is void"
        if not _whole(category) or category not in known:
            return None, f"{name}: segment {number} is of category {category!r}, which is not listed"
        segments.append((number, category, bool(one.get("iscrowd", 0))))
    if len({number for number, _, _ in segments}) < len(segments):
        return None, f"{name}: a segment id is there twice"
    return _Row(places[0], png, segments), ""


def write_panoptic(dataset: Dataset, folder: Path) -> None:
    """Write a data set with "panoptic" targets so that `read_panoptic` reads it.

    `SPLIT/x.jpg`, `annotations/panoptic_SPLIT.json` and `annotations/panoptic_SPLIT/x.png`; data without splits are
    `images/x.jpg` and `annotations/panoptic.json`. Category ids, things and crowds stay what they were.

    Raises:
        DataError: the targets have no panoptic masks, or a segment number is no colour.
        UsageError: there is something in the folder.
    """
    fresh(folder)
    for name, split in dataset.splits.items():
        if split.annotations is None or "panoptic" not in split.annotations.names:
            raise DataError(f"{dataset.path}: the split {name!r} has no panoptic masks")
    (folder / "annotations").mkdir()
    for split in dataset.splits.values():
        place, title = ("images", "panoptic") if split.name == "all" else (split.name, f"panoptic_{split.name}")
        names = write_images(split, folder / place)
        annotations = split.annotations
        ids = annotations.class_ids if isinstance(annotations, PanopticFiles) else range(1, len(split.classes) + 1)
        things = annotations.things if isinstance(annotations, PanopticFiles) else [True] * len(split.classes)

        def write(
            index: int, split: Split = split, names: list[str] = names, title: str = title, ids: Any = ids
        ) -> Any:
            return _write(split, index, folder / "annotations" / title, names[index], ids)

        written = each(write, len(split))
        categories = [
            {"id": identity, "name": name, "isthing": int(thing)}
            for identity, name, thing in zip(ids, split.classes, things, strict=True)
        ]
        sizes = [{"id": index, "file_name": names[index], **size} for index, (size, _) in enumerate(written)]
        found = [{"image_id": index, **entry} for index, (_, entry) in enumerate(written)]
        text = json.dumps({"images": sizes, "annotations": found, "categories": categories})
        (folder / "annotations" / f"{title}.json").write_text(text, encoding="utf-8")


def _write(split: Split, index: int, folder: Path, name: str, ids: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """Write one PNG; the size for `images`, and the entry for `annotations`."""
    target = split.target(index)
    numbers, segments = np.asarray(target["panoptic"]), np.asarray(target["segments"])
    labels = np.asarray(target["segment_labels"])
    crowd = np.asarray(target.get("segment_crowd", np.zeros(len(segments), bool)))
    if numbers.max(initial=0) >= 1 << 24 or numbers.min(initial=0) < 0:
        raise DataError(f"{split.names[index]}: a segment number is {numbers.max()}; colours hold 0 to {(1 << 24) - 1}")
    pixels = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1).astype(np.uint8)
    save_values(pixels, folder / f"{stem(name)}.png")
    order = np.argsort(segments)
    ranks = places_of(numbers, segments[order]) + 1 if len(segments) else np.zeros(numbers.shape, np.int64)
    if (lost := (numbers != _VOID) & (ranks == 0)).any():
        raise DataError(
            f"{split.names[index]} has pixels of segment {numbers[lost][0]}, which its segments do not list"
        )
    boxes = _boxes(ranks, len(segments))
    area = np.bincount(ranks.ravel(), minlength=len(segments) + 1)[1:]
    entries = [
        {
            "id": int(segments[row]),
            "category_id": int(ids[labels[row]]),
            "iscrowd": int(crowd[row]),
            "area": int(area[rank]),
            "bbox": boxes[rank],
        }
        for rank, row in enumerate(order)
    ]
    size = {"height": int(numbers.shape[0]), "width": int(numbers.shape[1])}
    return size, {"file_name": f"{stem(name)}.png", "segments_info": entries}


def _boxes(ranks: np.ndarray, count: int) -> list[list[int]]:
    """x, y, width, height of the pixels of each rank from 1."""
    from scipy.ndimage import find_objects

    found = [one or (slice(0, 0), slice(0, 0)) for one in find_objects(ranks, count)]
    return [[x.start, y.start, x.stop - x.start, y.stop - y.start] for y, x in found]


def faults(split: Split) -> "Iterator[Finding]":
    """What is wrong with the panoptic masks of a split: unreadable, another size, other segments than the json."""
    from vertebra.data.checking import Finding

    annotations = split.annotations
    if not isinstance(annotations, PanopticFiles):
        return

    def looked(index: int) -> str:
        try:
            annotations.numbers(index)
        except DataError as error:
            return str(error)
        return ""

    for index, message in enumerate(each(looked, len(split))):
        if message:
            yield Finding("panoptic", str(split.names[index]), message)
