"""Images with masks: a PNG beside each image whose pixels say the class, or the instance, that they belong to.

Recognised are, with `images` and `masks` standing for the names that are in use for them:

- `images/x.jpg` and `masks/x.png`, also with `train`, `val` and `test` inside or above both, or in lists of names
  (`train.txt`, VOC's `ImageSets/Segmentation/train.txt`);
- VOC's `JPEGImages`, `SegmentationClass` and `SegmentationObject`; Cityscapes' `leftImg8bit` and `gtFine`;
- `x.jpg` and `x_mask.png` (`_seg`, `_label`, `_gt`), or `x.jpg` and `x.png`, in one folder.

What pixel values mean is told in `vertebra.data.mask_values`. The classes that an image shows are its many labels, so
that the same folder can be battled. Masks are decoded at reading only where no list says what their values are; the
labels of the others are read off the masks when somebody asks for `targets`. A folder `instances`, and 16-bit masks
without a list of classes, hold ids of objects: 0 is none, every other value one object.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.data.annotations import IGNORE, Annotations, digest_of
from vertebra.data.dataset import Dataset, Split
from vertebra.data.folders import Files
from vertebra.data.mask_folders import CITY, MaskPlan, Trio, find_masks, pairs_of, splits_of_lists
from vertebra.data.mask_values import (
    Listed,
    Meaning,
    Seen,
    codes,
    load_classes,
    look,
    meaning,
    meaning_of_list,
    meaning_of_masks,
    pixel_values,
    places_of,
    word,
)
from vertebra.data.partners import (
    digest_of_files,
    each,
    fresh,
    header,
    save_values,
    split_folder,
    stem,
    write_images,
)
from vertebra.data.splits import Found, OnError, assemble, leave_out
from vertebra.errors import DataError

__all__ = ["MaskFiles", "MaskPlan", "MaskSplit", "faults", "find_masks", "read_masks", "write_masks"]

if TYPE_CHECKING:
    from vertebra.data.checking import Finding

_CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
_VOC_FILE = re.compile(r"(^|/)SegmentationClass/\d{4}_\d{6}\.png$")
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True, eq=False)
class MaskFiles(Annotations):
    """Masks that are files, decoded when asked for.

    Attributes:
        root: the folder.
        images: (n,) paths of the images.
        masks: (n,) paths of the masks that say the class, or none at all.
        objects: (n,) paths of the masks that say the object, or none at all.
        meaning: what the values of `masks` stand for; of objects alone, it has but the one class.
    """

    root: Path
    images: np.ndarray
    masks: np.ndarray
    objects: np.ndarray
    meaning: Meaning

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        found = ("semantic",) if len(self.masks) else ()
        return (*found, *(("boxes", "labels", "crowd", "difficult", "area", "masks") if len(self.objects) else ()))

    def semantic(self, index: int) -> np.ndarray:
        """Class of each pixel of image `index`, (H, W) int64, `IGNORE` where nothing counts.

        Raises:
            DataError: the mask cannot be read, does not fit its image, or holds a value without a class.
        """
        file = self.root / str(self.masks[index])
        pixels = pixel_values(file, self.meaning.coding)
        if message := self.misfit(index, file, pixels.shape[:2]):
            raise DataError(message)
        return _classes_of(pixels, self.meaning, file)

    def misfit(self, index: int, file: Path, shape: tuple[int, int]) -> str:
        """Why a mask of that (height, width) does not fit image `index`, or ""."""
        image = self.root / str(self.images[index])
        height, width, orientation, _ = header(image)
        if shape == (height, width):
            return ""
        what = f"{file} is {shape[1]} x {shape[0]} pixels, and its image {image.name} {width} x {height}"
        if orientation >= 5 and shape == (width, height):
            return f"{what}, as its EXIF turns it (orientation {orientation}): the mask was drawn before; turn it too"
        return f"{what}; make the mask anew, or resize it without smoothing"

    def instances(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Objects of image `index`: (H, W) numbers 0 (none), 1, 2 ..., and the (N,) ids in the file."""
        file = self.root / str(self.objects[index])
        pixels = pixel_values(file, "value")
        if message := self.misfit(index, file, pixels.shape):
            raise DataError(message)
        if pixels.dtype == np.uint8 and len(self.masks):
            pixels = np.where(pixels == IGNORE, 0, pixels)  # the seams between VOC's objects
        if pixels.max(initial=0) > 65535 or pixels.min(initial=0) < 0:
            raise DataError(f"{file} holds the id {pixels.max()}; ids of objects are 0 to 65535")
        there = np.bincount(pixels.ravel(), minlength=1) > 0
        there[0] = False
        ids = np.flatnonzero(there)
        return np.where(there, np.cumsum(there), 0)[pixels], ids

    def target(self, index: int) -> dict[str, Any]:
        import torch
        from torchvision import tv_tensors

        found: dict[str, Any] = {}
        classes = None
        if len(self.masks):
            classes = self.semantic(index)
            found["semantic"] = tv_tensors.Mask(torch.from_numpy(classes))
        if len(self.objects):
            found |= _objects(*self.instances(index), classes, len(self.meaning.classes))
        return found

    def presence(self) -> np.ndarray:
        """Which classes each image shows, (n, classes) uint8: all masks are decoded, in threads.

        Raises:
            DataError: a mask cannot be read, or holds a value without a class.
        """
        if not len(self.masks):
            shown = each(lambda index: len(self.instances(index)[1]) > 0, len(self))
            return np.array(shown, dtype=np.uint8)[:, None]
        return presence_of(each(lambda index: look(self.root / str(self.masks[index])), len(self)), self.meaning)

    def select(self, indices: np.ndarray) -> "MaskFiles":
        return replace(
            self,
            images=self.images[indices],
            masks=self.masks[indices] if len(self.masks) else self.masks,
            objects=self.objects[indices] if len(self.objects) else self.objects,
        )

    def digest(self) -> bytes:
        files = [str(file) for files in (self.images, self.masks, self.objects) for file in files]
        return digest_of(self.meaning) + digest_of_files(self.root, files)


class MaskSplit(Split):
    """A split whose `targets` are read off the masks when they are first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name != "targets" or not isinstance(annotations := vars(self).get("annotations"), MaskFiles):
            raise AttributeError(name)
        targets = annotations.presence()
        vars(self)["targets"] = targets
        return targets

    def select(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> Split:
        if "targets" in vars(self):
            return super().select(indices, name)
        chosen = np.asarray(indices, dtype=np.int64)
        assert self.annotations is not None
        taken = self.annotations.select(chosen)
        return _lazy(
            Split(name or self.name, self.classes, self.names[chosen], None, self.store, self.rows[chosen], taken)
        )


def _lazy(split: Split) -> MaskSplit:
    found = MaskSplit(split.name, split.classes, split.names, None, split.store, split.rows, split.annotations)
    del vars(found)["targets"]  # so that `__getattr__` is asked
    return found


def read_masks(
    path: str, root: Path, plan: MaskPlan, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read images with masks.

    Args:
        path: the path as the user gave it.
        root: the folder.
        plan: what `find_masks` found there.
        on_error: what becomes of images without a mask and masks without an image.
        notes: what was said so far.

    Returns:
        A data set of many labels; the targets of its splits hold "semantic", and "boxes", "labels", "masks" where
        files say which object a pixel belongs to.

    Raises:
        DataError: images and masks do not match, or values and classes do not; the message names file and value.
    """
    notes = list(notes)
    splits = splits_of_lists(root, plan, on_error, notes) if plan.lists else plan.splits
    pairs = {split: pairs_of(path, split, sides, on_error, notes) for split, sides in splits.items()}
    pairs = {split: pair for split, pair in pairs.items() if len(pair[0])}
    if not pairs:
        raise DataError(f"{path} has no image with a mask of its name")
    for place, what in ((1, "masks of classes"), (2, "masks of objects")):
        lacking = [split for split, trio in pairs.items() if not len(trio[place])]
        if 0 < len(lacking) < len(pairs):
            raise DataError(f"{path}: {lacking[0]} has no {what}, and other splits have; add them, or move them away")
    listed = load_classes(root / plan.classes) if plan.classes else None
    seen: dict[str, list[Seen]] = {}
    if _are_objects(root, pairs, listed):
        found = _object_meaning(listed, notes)
    elif listed and listed.values:
        found = meaning_of_list(listed)
    elif told := _city(pairs) or _voc(pairs):
        found = told
    else:
        pairs, seen = _looked_at(path, root, pairs, on_error, notes)
        everything = [one for some in seen.values() for one in some]
        if listed is None and any(one.deep for one in everything):
            found, seen = _object_meaning(listed, notes), {}
        else:
            found = meaning_of_masks(everything, listed, notes)
    return _assembled(path, root, pairs, found, seen, notes)


def _looked_at(
    path: str, root: Path, pairs: Mapping[str, Trio], on_error: OnError, notes: list[str]
) -> tuple[dict[str, Trio], dict[str, list[Seen]]]:
    """What all masks hold, by split; those that cannot be read are left out or raised."""
    files = [root / str(name) for _, masks, _ in pairs.values() for name in masks]

    def looked(index: int) -> Seen | str:
        try:
            return look(files[index])
        except DataError as error:
            return str(error)

    rest = iter(each(looked, len(files)))
    kept: dict[str, Trio] = {}
    seen: dict[str, list[Seen]] = {}
    for split, trio in pairs.items():
        found = [next(rest) for _ in trio[0]]
        leave_out(f"{path}: {split}", [one for one in found if isinstance(one, str)], on_error, notes)
        good = np.array([isinstance(one, Seen) for one in found])
        images, masks, objects = (column[good] if len(column) else column for column in trio)
        kept[split] = (images, masks, objects)
        seen[split] = [one for one in found if isinstance(one, Seen)]
    if not any(seen.values()):
        raise DataError(f"{path}: no mask can be read")
    return kept, seen


def _assembled(
    path: str, root: Path, pairs: Mapping[str, Trio], found: Meaning, seen: Mapping[str, list[Seen]], notes: list[str]
) -> Dataset:
    parts = {}
    none = np.empty(0, dtype=np.str_)
    for split, (images, masks, objects) in pairs.items():
        if not len(found.values):
            masks, objects = none, objects if len(objects) else masks
        annotations = MaskFiles(root, images, masks, objects, found)
        parts[split] = Found(images, None, Files(root, images), np.arange(len(images)), annotations)
    dataset = assemble(path, "masks", parts, found.classes, notes)
    splits = {
        name: replace(split, targets=presence_of(seen[name], found)) if name in seen else _lazy(split)
        for name, split in dataset.splits.items()
    }
    return replace(dataset, label="multi", splits=splits)


def _are_objects(root: Path, pairs: Mapping[str, Trio], listed: Listed | None) -> bool:
    """Whether the masks hold ids of objects: there are no others, or they have 16 bits and no classes to tell apart."""
    if all(not len(masks) for _, masks, _ in pairs.values()):
        return True
    if any(len(objects) for _, _, objects in pairs.values()) or (listed and (listed.values or len(listed.names) > 1)):
        return False
    return any(_is_deep(root / str(masks[0])) for _, masks, _ in pairs.values())


def _is_deep(file: Path) -> bool:
    """Whether a mask has 16 bits or more; what cannot be read is told later, with the others."""
    try:
        return header(file).mode.startswith("I")
    except DataError:
        return False


def _object_meaning(listed: Listed | None, notes: list[str]) -> Meaning:
    names = [name for name in listed.names if name is not None] if listed else ["object"]
    if len(names) > 1:
        raise DataError(f"{listed.file if listed else ''} lists {len(names)} classes, and masks of ids say no class")
    notes.append(
        f"masks hold ids of objects, each of the class {names[0]}; classes.csv (value,name) makes classes of values"
    )
    return Meaning(tuple(names), np.empty(0, np.int64), np.empty(0, np.int64))


def _city(pairs: Mapping[str, Trio]) -> Meaning | None:
    """Cityscapes' classes, where its file names say so."""
    names = [stem(str(name)).lower() for _, masks, _ in pairs.values() for name in masks]
    if not all(CITY.search(name) for name in names):
        return None
    trained = names[0].endswith("trainids")
    numbers = {(number if trained else value): number for number, value in enumerate(_CITYSCAPES)}
    others = {} if trained else {value: IGNORE for value in range(34) if value not in _CITYSCAPES}
    return meaning(list(_CITYSCAPES.values()), {**others, **numbers})


def _voc(pairs: Mapping[str, Trio]) -> Meaning | None:
    """VOC2012's classes, where folders and file names are its own: SegmentationClass/2007_000032.png."""
    if not all(_VOC_FILE.search(str(name)) for _, masks, _ in pairs.values() for name in masks):
        return None
    return meaning(_VOC_CLASSES, {number: number for number in range(len(_VOC_CLASSES))})


def presence_of(seen: Sequence[Seen], found: Meaning) -> np.ndarray:
    """Which classes each mask shows, (n, classes) uint8.

    Raises:
        DataError: a mask holds a value without a class.
    """
    shown = np.zeros((len(seen), len(found.classes)), dtype=np.uint8)
    for row, one in enumerate(seen):
        if one.mode == "RGB" and found.coding == "value":
            pixel_values(one.file, "value")  # says where the colours are
        targets = _classes_of(codes(one, found.coding), found, one.file)
        shown[row, targets[targets != IGNORE]] = 1
    return shown


def _classes_of(pixels: np.ndarray, found: Meaning, file: Path) -> np.ndarray:
    """Classes of pixel values, int64 of the same shape."""
    if found.coding == "value" and pixels.dtype.itemsize <= 2:
        table = np.full(65536, -1, np.int64)
        table[found.values] = found.targets
        classes = table[pixels]
    else:
        classes = np.append(found.targets, -1)[places_of(pixels, found.values)]  # unknown is the last
    if classes.min(initial=0) < 0:
        value = int(pixels[classes < 0].flat[0])
        known = ", ".join(word(int(v), found.coding) for v in found.values[found.targets != IGNORE][:12])
        raise DataError(
            f"{file} holds the value {word(value, found.coding)}, which is no class ({len(found.classes)} classes: "
            f"{known}{', ...' * (len(found.classes) > 12)}); mend the mask, or add the value to classes.csv"
        )
    return classes


def _objects(numbers: np.ndarray, ids: np.ndarray, classes: np.ndarray | None, count: int) -> dict[str, Any]:
    """What is known of the objects of one image.

    Args:
        numbers: (H, W) 0 for none, then 1, 2 ...
        ids: (N,) their ids.
        classes: (H, W) the class of each pixel; an object is of the class that most of its pixels have.
        count: classes.
    """
    import torch
    from scipy.ndimage import find_objects
    from torchvision import tv_tensors

    labels, kept = np.zeros(len(ids), np.int64), np.arange(len(ids))
    if classes is not None and len(ids):
        counted = (numbers > 0) & (classes != IGNORE)
        votes = np.bincount((numbers[counted] - 1) * count + classes[counted], minlength=len(ids) * count)
        votes = votes.reshape(len(ids), count)
        labels, kept = votes.argmax(1), np.flatnonzero(votes.any(1))
    slices = find_objects(numbers)
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in (slices[row] for row in kept)]
    area = np.bincount(numbers.ravel(), minlength=len(ids) + 1)[1:][kept]
    size = numbers.shape
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
        "labels": torch.from_numpy(labels[kept]),
        "crowd": torch.zeros(len(kept), dtype=torch.bool),
        "difficult": torch.zeros(len(kept), dtype=torch.bool),
        "area": torch.from_numpy(area.astype(np.float32)),
        "masks": tv_tensors.Mask(torch.from_numpy(numbers[None] == (kept + 1)[:, None, None])),
    }


def write_masks(dataset: Dataset, folder: Path) -> None:
    """Write a data set with "semantic" targets, or with "masks" of objects of one class, so that `read_masks` reads it.

    `images/SPLIT/x.jpg`, `masks/SPLIT/x.png` (the class of each pixel, 255 where it is ignored) with `classes.csv`, and
    `instances/SPLIT/x.png` (16 bit where 8 do not do) where there are masks of objects.

    Raises:
        DataError: the targets have neither, objects overlap, or objects of many classes have no semantic mask.
        UsageError: there is something in the folder.
    """
    fresh(folder)
    kinds = {"semantic", "masks"}
    for split in dataset.splits.values():
        kinds &= set(split.annotations.names) if split.annotations is not None else set()
    if not kinds:
        raise DataError(f"{dataset.path} has no masks; its targets are written by the layout that it was read as")
    if "semantic" not in kinds and len(dataset.classes) != 1:
        raise DataError(f"{dataset.path} has masks of {len(dataset.classes)} classes of objects; write it as COCO json")
    for split in dataset.splits.values():
        place = split_folder(split)
        names = write_images(split, folder / "images" / place)

        def write(index: int, split: Split = split, place: str = place, names: list[str] = names) -> None:
            _write(split, index, folder, f"{place}{stem(names[index])}.png")

        each(write, len(split))
    _write_classes(dataset.classes, folder, stated="semantic" in kinds)


def _write(split: Split, index: int, folder: Path, name: str) -> None:
    target = split.target(index)
    if "semantic" in target:
        save_values(np.asarray(target["semantic"]), folder / "masks" / name)
    if "masks" in target:
        masks = np.asarray(target["masks"])  # (N, H, W)
        if len(masks) and masks.sum(0).max() > 1:
            raise DataError(f"{split.names[index]}: objects overlap, which ids cannot say; write it as COCO json")
        if len(masks) > 65535:
            raise DataError(f"{split.names[index]} has {len(masks)} objects; 16 bits hold 65535")
        ids = np.arange(1, len(masks) + 1, dtype=np.int64)
        size = split.image(index).size[::-1]
        pixels = np.tensordot(ids, masks.astype(np.int64), 1) if len(masks) else np.zeros(size, np.int64)
        save_values(pixels, folder / "instances" / name)


def _write_classes(classes: Sequence[str], folder: Path, *, stated: bool) -> None:
    if not stated:
        (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        return
    with (folder / "classes.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("value", "name"), *enumerate(classes)])


def faults(split: Split) -> "Iterator[Finding]":
    """What is wrong with the masks of a split: unreadable, of another size, or with values that are no class."""
    from vertebra.data.checking import Finding

    annotations = split.annotations
    if not isinstance(annotations, MaskFiles):
        return

    def looked(index: int) -> tuple[str, str]:
        try:
            turned = header(annotations.root / str(annotations.images[index])).orientation
            if len(annotations.masks):
                annotations.semantic(index)
            if len(annotations.objects):
                annotations.instances(index)
        except DataError as error:
            return "mask", str(error)
        if 2 <= turned <= 4:
            return (
                "mask-turned",
                f"EXIF turns the image (orientation {turned}); its mask fits turned or not: look at it",
            )
        return "", ""

    for index, (kind, message) in enumerate(each(looked, len(split))):
        if kind:
            yield Finding(kind, str(split.names[index]), message)
