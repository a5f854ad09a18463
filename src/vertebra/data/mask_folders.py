"""Where images and their masks lie: folders side by side, splits inside or above them, lists, or suffixes in one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vertebra.data.folders import Folder
from vertebra.data.mask_values import CLASS_FILES
from vertebra.data.partners import matched, stem
from vertebra.data.splits import OnError, leave_out, split_of
from vertebra.errors import DataError

_IMAGES = {"images", "image", "imgs", "img", "img_dir", "jpegimages", "leftimg8bit", "frames", "photos", "pictures"}
_MASKS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "ann_dir", "segmentation"),
    *("segmentations", "segmentationclass", "gtfine", "gtcoarse", "gt", "ground_truth", "groundtruth", "semantic"),
}
_INSTANCES = {"segmentationobject", "instances", "instance_masks", "instance_ids"}
CITY = re.compile(r"[_-]gt(fine|coarse)[_-](labelids|labeltrainids)$", re.IGNORECASE)
_MARKS = re.compile(
    r"[_-](leftimg8bit|image|img|sat|rgb|masks?|seg|segmentation|labels?|labelids|labeltrainids|gt|anno|annotation|"
    r"instances?|l)$",
    re.IGNORECASE,
)
_BESIDE = re.compile(r"[_-](masks?|seg|segmentation|labels?|gt)$", re.IGNORECASE)
Trio = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Paths of images, of their masks, and of their masks of objects, (n,) each or none at all."""


@dataclass(frozen=True)
class Sides:
    """Images and masks of one split, before they are matched.

    Attributes:
        images: files relative to the root.
        masks: files that say the class.
        instances: files that say the object.
        roots: what the paths of the three start with, and what does not count.
    """

    images: Sequence[str]
    masks: Sequence[str]
    instances: Sequence[str]
    roots: tuple[str, str, str]


@dataclass(frozen=True)
class MaskPlan:
    """Where images and masks are.

    Attributes:
        splits: split -> its files.
        lists: split -> the file that lists its images' stems, where files say so and not folders.
        classes: the file that lists the classes, relative to the root.
    """

    splits: Mapping[str, Sides]
    lists: Mapping[str, str] = field(default_factory=dict)
    classes: str | None = None


def find_masks(root: Path, top: Folder) -> MaskPlan | None:
    """Images with masks, by the names of folders and files; None where there are none.

    Raises:
        DataError: two folders may both be the images, or the masks.
    """
    splits = _splits_inside(top) or _splits_above(top) or _splits_beside(top)
    if not splits:
        return None
    classes = next(iter(_class_files(top, splits)), None)
    return MaskPlan(splits, _lists(top) if list(splits) == ["all"] else {}, classes)


def _splits_inside(top: Folder) -> dict[str, Sides]:
    """`images/train` and `masks/train`, or `images` and `masks` alone."""
    image_side, *others = (_side(top, words) for words in (_IMAGES, _MASKS, _INSTANCES))
    if image_side is None or not any(others):
        return {}
    names = [name for name in image_side.filled if split_of(name)]
    if not names:
        return {"all": _sides(image_side, *others)}
    if strange := [*(name for name in image_side.filled if name not in names), *image_side.images]:
        where = image_side.path
        raise DataError(
            f"{where} has folders of splits ({', '.join(names)}) and beside them {strange[0]}; move it away"
        )
    return {
        str(split_of(name)): _sides(image_side.filled[name], *(_same_split(other, name) for other in others))
        for name in names
    }


def _same_split(side: Folder | None, name: str) -> Folder | None:
    return (
        next((inner for word, inner in side.filled.items() if split_of(word) == split_of(name)), None) if side else None
    )


def _splits_above(top: Folder) -> dict[str, Sides]:
    """`train/images` and `train/masks`; a split that has images alone is told later."""
    folders = {str(split_of(name)): inner for name, inner in top.filled.items() if split_of(name)}
    found = {split: _splits_inside(inner).get("all") for split, inner in folders.items()}
    if not any(found.values()):
        return {}
    bare = {split: _side(inner, _IMAGES) for split, inner in folders.items() if not found[split]}
    alone = {split: _sides(images, None, None) for split, images in bare.items() if images}
    return {split: sides for split, sides in found.items() if sides} | alone


def _splits_beside(top: Folder) -> dict[str, Sides]:
    """`x.jpg` and `x_mask.png` in one folder, or in one a split; a split that has images alone is told later."""
    if top.images:
        return {"all": sides} if (sides := _beside(top)) else {}
    folders = {str(split_of(name)): inner for name, inner in top.filled.items() if split_of(name)}
    found = {split: _beside(inner) for split, inner in folders.items()}
    if not any(found.values()):
        return {}
    return {split: sides or _sides(folders[split], None, None) for split, sides in found.items()}


def _beside(folder: Folder) -> Sides | None:
    marked = [name for name in folder.images if _BESIDE.search(stem(name))]
    plain = {_BESIDE.sub("", stem(name)) for name in marked}
    images = [name for name in folder.images if not _BESIDE.search(stem(name))]
    if not marked:
        marked = [name for name in folder.images if name.lower().endswith(".png")]
        images = [name for name in folder.images if name.lower().endswith((".jpg", ".jpeg"))]
        plain = {stem(name) for name in marked}
        if {stem(name) for name in images} != plain or len(images) + len(marked) < len(folder.images):
            return None
    if not marked or 2 * len(plain & {_MARKS.sub("", stem(name)) for name in images}) < len(plain):
        return None
    path = folder.path
    return Sides([path + name for name in images], [path + name for name in marked], [], (path, path, path))


def _side(folder: Folder, words: set[str]) -> Folder | None:
    found = [inner for name, inner in folder.filled.items() if name.lower() in words]
    if len(found) > 1:
        raise DataError(f"{found[0].path} and {found[1].path} may both be what is meant; move one of them away")
    return found[0] if found else None


def _sides(images: Folder, masks: Folder | None, instances: Folder | None) -> Sides:
    folders = (images, masks, instances)
    first, second, third = (folder.names() if folder else [] for folder in folders)
    city = [name for name in second if CITY.search(stem(name))]
    trained = [name for name in city if stem(name).lower().endswith("trainids")]
    roots = [folder.path if folder else "" for folder in folders]
    return Sides(first, trained or city or second, third, (roots[0], roots[1], roots[2]))


def _class_files(top: Folder, splits: Mapping[str, Sides]) -> Iterator[str]:
    """Lists of classes, at the root or beside the masks."""
    roots = {"", *(root for sides in splits.values() for root in sides.roots[1:])}
    roots |= {root.rstrip("/").rpartition("/")[0] + "/" for root in roots if root}
    folders = [folder for folder in top.walk() if folder.path in roots]
    for wanted in CLASS_FILES:
        yield from (folder.path + name for folder in folders for name in folder.others if name.lower() == wanted)


def _lists(top: Folder) -> dict[str, str]:
    """Files that list the images of a split."""
    sets = {name.lower(): folder for name, folder in top.folders.items()}.get("imagesets")
    inner = {name.lower(): folder for name, folder in sets.folders.items()}.get("segmentation") if sets else None
    found = {}
    for folder in filter(None, (inner, top)):
        for name in folder.others:
            split = split_of(stem(name))
            if split and name.lower().endswith(".txt"):
                found.setdefault(split, folder.path + name)
    return found


def pairs_of(path: str, split: str, sides: Sides, on_error: OnError, notes: list[str]) -> Trio:
    """Images, masks and objects of a split that belong together; the faults are left out or raised."""
    none = np.empty(0, dtype=np.str_)
    images = list(sides.images)
    if not sides.masks and not sides.instances:
        notes.append(f"{split} has no masks and is left out (images: {len(images)})")
        return none, none, none
    columns, faults = [], []
    for others, root in ((sides.masks, sides.roots[1]), (sides.instances, sides.roots[2])):
        partners, lonely = matched(images, others, _plain, (sides.roots[0], root)) if others else ([], [])
        columns.append(partners)
        faults += [f"{name} has no mask" for name, partner in zip(images, partners, strict=False) if not partner]
        faults += [f"{name} has no image" for name in lonely]
    leave_out(f"{path}: {split}", list(dict.fromkeys(faults)), on_error, notes)
    good = [row for row in range(len(images)) if all(column[row] for column in columns if column)]
    arrays = [np.array([column[row] for row in good] if column else [], dtype=np.str_) for column in (images, *columns)]
    return arrays[0], arrays[1], arrays[2]


def _plain(name: str) -> str:
    return _MARKS.sub("", CITY.sub("", name))


def splits_of_lists(root: Path, plan: MaskPlan, on_error: OnError, notes: list[str]) -> dict[str, Sides]:
    """The one split of a plan cut up by its lists of stems; what no list names is left out.

    Raises:
        DataError: a list names no image, or two lists name the same.
    """
    sides = plan.splits["all"]
    by_stem = {stem(name.removeprefix(sides.roots[0])): name for name in sides.images}
    found, used = {}, set()
    for split, file in plan.lists.items():
        lines = [line.split() for line in (root / file).read_text(encoding="utf-8-sig").splitlines()]
        stems = dict.fromkeys(stem(cells[0].replace("\\", "/")) for cells in lines if cells)
        known = {name: name if name in by_stem else name.rpartition("/")[2] for name in stems}
        strange = [f"no image is called {name}" for name, key in known.items() if key not in by_stem]
        leave_out(str(root / file), strange, on_error, notes)
        keys = {key for key in known.values() if key in by_stem}
        if twice := used & keys:
            raise DataError(f"{root / file} lists {min(twice)}, which another split lists too; keep it in one")
        used |= keys
        plain = {_plain(key) for key in keys}

        def listed(names: Sequence[str], start: str, keys: set[str] = keys, plain: set[str] = plain) -> list[str]:
            stems = ((name, stem(name.removeprefix(start))) for name in names)
            return [name for name, key in stems if key in keys or _plain(key) in plain]

        images = [by_stem[key] for key in known.values() if key in by_stem]
        found[split] = Sides(
            images, listed(sides.masks, sides.roots[1]), listed(sides.instances, sides.roots[2]), sides.roots
        )
    if rest := len(by_stem.keys() - used):
        notes.append(f"left out, as no list names them: {rest} images")
    return found
