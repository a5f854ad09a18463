"""Boxes, masks and keypoints in COCO's json: `annotations/instances_train2017.json` and its relatives.

Recognised are json files with `images`, `annotations` and `categories` in the folder itself, in a folder such as
`annotations`, or in the folders of the splits (Roboflow's `train/_annotations.coco.json`). The split is in the file's
name or is the folder's. Where `instances_*` and others tell of one split, `instances_*` is read, and a note names the
others; give a file's own path to read that one.

Images are in the order of their ids, as in COCO's own evaluation, so that ties between scores fall as they do there.
Classes are the categories of train in the order of their ids, whatever holes these have; other splits are matched by
name. What is done with what is odd:

=====================================  =============================================================================
found                                  what becomes of it
=====================================  =============================================================================
file_name                              looked for beside the json, in `images`, in the split's folder and so on;
                                       then by its last part, if only one image below the root is called so
absolute or `../` file_name            an error: nothing outside the root is opened
width or height missing                read from the image's header, EXIF applied
RLE                                    compressed or not; an error where its size is not the image's or its runs do
                                       not add up to it: nothing is decoded before that is known
polygon of less than three corners     left out
bbox missing                           taken from the outline
area missing                           of the outline, or of the box
background category without objects    left out; so is the category 0 that Roboflow adds
annotation ids given twice, or none    kept, with a note: nothing refers to them
image without annotations              kept: it shows none of the classes
=====================================  =============================================================================

and the repairs of `vertebra.data.objects`. Errors are: entries without what they need, numbers that are none, unknown
images or categories, ids of images given twice, images that are not there. Licences, supercategories and skeletons are
not kept.
"""

import gc
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from vertebra.data.annotations import Objects, Outlines, starts
from vertebra.data.dataset import Dataset
from vertebra.data.folders import Folder, list_folder
from vertebra.data.geometry import outline_areas, outline_boxes
from vertebra.data.objects import Listing, found, own_names, shown_sizes, tidy, too_large, with_objects
from vertebra.data.partners import fresh, place
from vertebra.data.segmentations import floats, numeric, read_outlines, write_outline
from vertebra.data.splits import OnError, assemble, leave_out, split_of
from vertebra.errors import DataError, near

_MARKS = (b'"images"', b'"annotations"', b'"categories"')
_MOST_JSON = 20  # files a folder that are looked into
_SAMPLE = 500  # names that tell the folder of the images
_BACKGROUND = {"background", "__background__", "_background_", "bg"}


@dataclass(frozen=True, eq=False)
class CocoFiles:
    """Where the json files of a data set are.

    Attributes:
        files: split -> json, relative to the root.
        top: the listing of the root.
        notes: what was passed over.
    """

    files: Mapping[str, str]
    top: Folder
    notes: tuple[str, ...] = ()


class _Json(NamedTuple):
    """What one json holds, its path, and where in a data set it is."""

    path: Path
    split: str
    images: list[dict]
    annotations: list[dict]
    categories: list[dict]


def find_coco(root: Path, top: Folder) -> CocoFiles | None:
    """The json files that tell of objects in the images below `root`.

    Raises:
        DataError: two of them tell of one split and neither is called instances.
    """
    by_split: dict[str, list[str]] = {}
    for folder in _places(top):
        stems = {Path(name).stem for name in folder.images}
        names = [name for name in folder.others if name.lower().endswith(".json") and Path(name).stem not in stems]
        names.sort(key=lambda name: not re.match(r"_?annotations|instances", name.lower()))
        for name in names[:_MOST_JSON]:
            if is_coco(root / folder.path / name):
                by_split.setdefault(_split_of(name, folder), []).append(folder.path + name)
    if not by_split:
        return None
    files, notes = {}, []
    for split, paths in by_split.items():
        instances = [path for path in paths if path.rpartition("/")[2].lower().startswith("instances")]
        if len(paths) > 1 and len(instances) != 1:
            raise DataError(f"{root} has several json files on {split}: {', '.join(paths)}; give one by its path")
        files[split] = instances[0] if len(paths) > 1 else paths[0]
        notes += [
            f"{path} is not read: {files[split]} tells of the same images" for path in paths if path != files[split]
        ]
    if "all" in files and len(files) > 1:
        raise DataError(f"{root}: {files['all']} does not tell its split and others do; give one json by its path")
    return CocoFiles(files, top, tuple(notes))


def coco_file(file: Path) -> tuple[Path, CocoFiles] | None:
    """The root and the plan for one json that was given by its path; None where it is no COCO json.

    The root is the json's folder, or the one above where that is a folder of annotations without images.
    """
    if not is_coco(file):
        return None
    root = file.parent
    top, _ = list_folder(root)
    if not top.count and root.parent != root:
        root = root.parent
        top, _ = list_folder(root)
    return root, CocoFiles({"all": file.relative_to(root).as_posix()}, top)


def is_coco(file: Path) -> bool:
    """Whether a json has images, annotations and categories, and is not panoptic; nothing is parsed."""
    try:
        opened = file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be opened: {error.strerror}") from error
    with opened:
        if not re.match(rb"\s*\{", opened.read(64).removeprefix(b"\xef\xbb\xbf")):
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
            places = [text.find(mark) for mark in _MARKS]
            return min(places) >= 0 and text.find(b'"segments_info"', places[1], places[1] + 100_000) < 0


def _places(top: Folder) -> Iterator[Folder]:
    """Folders where such json files lie."""
    yield top
    for folder in top.folders.values():
        yield folder
        yield from folder.folders.values()


def _split_of(name: str, folder: Folder) -> str:
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[-_.]", Path(name).stem)]
    words += folder.path.rstrip("/").split("/")[::-1]
    return next(filter(None, map(split_of, words)), "all")


def read_coco(
    path: str, root: Path, plan: CocoFiles, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read images, boxes, masks and keypoints.

    Args:
        path: the path as the user gave it.
        root: the folder that no file name can leave.
        plan: of `find_coco` or `coco_file`.
        on_error: what becomes of images and annotations that cannot be used.
        notes: what was said so far.

    Raises:
        DataError: broken json, or entries that cannot be used; the message names the file and the ids.
    """
    notes = [*notes, *plan.notes]
    parsed = [_load(root / file, split) for split, file in plan.files.items()]
    parsed.sort(key=lambda one: one.split != "train")  # train says which classes there are
    classes, ids = _classes(parsed, notes)
    listing = Listing(plan.top)
    splits = {}
    for one in parsed:
        names, rows, sizes = _images(one, root, listing, on_error, notes)
        numbers = _numbers(one, classes, parsed[0])
        objects = _objects(one, rows, sizes, numbers, ids, on_error, notes)
        splits[one.split] = found(root, names, objects, classes)
    _note_unlisted(parsed, {str(name) for one in splits.values() for name in one.names}, listing, notes)
    return assemble(path, "coco", splits, classes, notes)


def _load(file: Path, split: str) -> _Json:
    try:
        with file.open("rb") as opened, _no_collection():
            whole = json.load(opened)
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{file} is no COCO json: lists within lists without end") from error
    lists = []
    for name in ("images", "annotations", "categories"):
        entries = whole.get(name) if isinstance(whole, dict) else None
        if not isinstance(entries, list) or not all(type(entry) is dict for entry in entries):
            raise DataError(
                f"{file}: {name} is no list of objects {{...}}; COCO json has images, annotations, categories"
            )
        lists.append(entries)
    return _Json(file, split, *lists)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the cyclic collector, which costs a third of the parsing of large json and finds nothing there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _classes(parsed: Sequence[_Json], notes: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and COCO's ids of them, from the first json."""
    first = parsed[0]
    categories = sorted(_categories(first).items())
    used = {annotation.get("category_id") for one in parsed for annotation in one.annotations}
    parents = {entry.get("supercategory") for entry in first.categories if entry.get("id") != 0}
    for number, name in categories:
        added = number == 0 and parents == {name} and len(categories) > 1
        if number not in used and (name.lower() in _BACKGROUND or added):
            notes.append(f"category {number} ({name}) has no objects and is no class: left out")
            categories = [entry for entry in categories if entry[0] != number]
    if not categories:
        raise DataError(f"{first.path} has no categories")
    return tuple(name for _, name in categories), tuple(number for number, _ in categories)


def _categories(one: _Json) -> dict[int, str]:
    """Category id -> name."""
    names: dict[int, str] = {}
    for entry in one.categories:
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or name is None or not str(name).strip():
            raise DataError(f"{one.path}: category {entry} needs a whole number as id and a name")
        if number in names or str(name) in names.values():
            raise DataError(f"{one.path}: category {number} ({name}) is there twice; ids and names must differ")
        names[number] = str(name)
    return names


def _numbers(one: _Json, classes: Sequence[str], first: _Json) -> dict[int, int]:
    """Category id of one json -> class; categories without objects need no class."""
    numbers = {name: number for number, name in enumerate(classes)}
    categories = _categories(one)
    unknown = {number for number, name in categories.items() if name not in numbers}
    for annotation in one.annotations if unknown else ():
        if (number := annotation.get("category_id")) in unknown:
            name = categories[number]
            hint = near(name, classes) or f"; the classes are {', '.join(classes[:10])}"
            raise DataError(f"{one.path}: category {number} ({name}) is none of {first.path.name}{hint}")
    return {number: numbers[name] for number, name in categories.items() if name in numbers}


def _images(
    one: _Json, root: Path, listing: Listing, on_error: OnError, notes: list[str]
) -> tuple[list[str], dict[Any, int], np.ndarray]:
    """Names of the images relative to the root, image id -> position, and sizes (n, 2)."""
    entries = one.images
    if all(type(entry.get("id")) is int for entry in entries):
        entries = sorted(entries, key=lambda entry: entry["id"])
    cells = [str(entry.get("file_name") or "").replace("\\", "/") for entry in entries]
    files = _located(one, cells, root, listing, notes)
    faults: dict[int, str] = {}
    rows: dict[Any, int] = {}
    owners: dict[str, Any] = {}
    for index, (entry, cell, file) in enumerate(zip(entries, cells, files, strict=True)):
        number = entry.get("id")
        if type(number) not in (int, str):
            faults[index] = f"image {cell or index}: its id is {number!r}, not a number"
        elif number in rows:
            faults[index] = f"image {number} ({cell}): the id is there twice"
        elif file is None:
            faults[index] = f"image {number}: {_why_not(cell)}"
        elif file in owners:
            faults[index] = f"image {number}: {file} is also image {owners[file]}"
        else:
            rows[number], owners[file] = index, number
    sizes = _sizes(entries, [file or "" for file in files], root, faults, notes)
    leave_out(str(one.path), [faults[index] for index in sorted(faults)], on_error, notes)
    kept = [index for index in range(len(entries)) if index not in faults]
    place_of = {index: position for position, index in enumerate(kept)}
    rows = {number: place_of.get(index, -1) for number, index in rows.items()}
    rows |= {entry["id"]: -1 for index, entry in enumerate(entries) if index in faults and _plain(entry, rows)}
    return [str(files[index]) for index in kept], rows, sizes[kept]


def _plain(entry: dict, rows: Mapping[Any, int]) -> bool:
    """Whether an image that is left out has an id of its own, so that its annotations go with it."""
    return type(entry.get("id")) in (int, str) and entry["id"] not in rows


def _why_not(cell: str) -> str:
    if not cell:
        return "it has no file_name"
    if _leads_out(cell):
        return f"{cell} leads out of the data's folder; write names relative to it"
    return f"there is no image {cell}, and not exactly one that is called so in another folder"


def _leads_out(cell: str) -> bool:
    return cell.startswith("/") or bool(re.match(r"[A-Za-z]:", cell)) or ".." in cell.split("/")


def _located(one: _Json, cells: Sequence[str], root: Path, listing: Listing, notes: list[str]) -> list[str | None]:
    """Where the images are, relative to the root: below the folder that has most of them, or by their last part."""
    plain = [str(PurePosixPath(cell)) if cell and not _leads_out(cell) else "" for cell in cells]
    beside = one.path.parent.relative_to(root).as_posix().removeprefix(".")
    folders = dict.fromkeys([f"{beside}/" if beside else "", "", *_likely(one, listing)])
    sample = plain[:: 1 + len(plain) // _SAMPLE]
    base = max(folders, key=lambda folder: sum(folder + name in listing.names for name in sample))
    files = [base + name if name and base + name in listing.names else None for name in plain]
    moved = [index for index, file in enumerate(files) if file is None and plain[index]]
    for index in moved:
        files[index] = listing.by_base(plain[index])
    if moved := [index for index in moved if files[index]]:
        shown = f"{plain[moved[0]]} is {files[moved[0]]}"
        notes.append(f"{one.path.name}: images found by the last part of their name: {len(moved)} ({shown})")
    return files


def _likely(one: _Json, listing: Listing) -> list[str]:
    """Folders with images, those named as the split first."""

    def rank(folder: str) -> tuple[bool, bool, str]:
        words = [re.sub(r"\d+$", "", word) for word in folder.lower().split("/")]
        return one.split not in map(split_of, words), "images" not in words, folder

    return sorted(listing.folders, key=rank)


def _note_unlisted(parsed: Sequence[_Json], used: set[str], listing: Listing, notes: list[str]) -> None:
    """Say so where the folders of the images hold others, too."""
    folders = {name.rpartition("/")[0] for name in used}
    others = sorted(name for name in listing.names - used if name.rpartition("/")[0] in folders)
    if others:
        files = " or ".join(one.path.name for one in parsed)
        notes.append(f"images beside those of {files} that are not listed, left out: {len(others)} ({others[0]})")


def _sizes(
    entries: Sequence[dict], files: Sequence[str], root: Path, faults: dict[int, str], notes: list[str]
) -> np.ndarray:
    """Height and width (n, 2); from the header where the json has none."""
    said = floats([[entry.get("height"), entry.get("width")] for entry in entries], 2)
    known = (said >= 1).all(1) & (said == np.floor(said)).all(1)  # False for NaN
    sizes = np.where(known[:, None], said, 0).astype(np.int64)
    missing = [index for index in np.flatnonzero(~known).tolist() if index not in faults]
    if missing:
        sizes[missing], reasons = shown_sizes(root, [files[index] for index in missing])
        faults |= {missing[place]: f"image {entries[missing[place]]['id']}: {why}" for place, why in reasons.items()}
        notes.append(f"images without width and height, read from their headers: {len(missing)}")
    for index in np.flatnonzero(too_large(sizes)).tolist():
        height, width = sizes[index]
        said_size = f"{width} x {height} pixels are more than are allowed; see VERTEBRA_MAX_PIXELS"
        faults.setdefault(index, f"image {entries[index].get('id')}: {said_size}")
    return sizes


def _objects(
    one: _Json,
    rows: Mapping[Any, int],
    sizes: np.ndarray,
    numbers: Mapping[int, int],
    ids: tuple[int, ...],
    on_error: OnError,
    notes: list[str],
) -> Objects:
    """The columns of one split."""
    entries = one.annotations
    faults: dict[int, str] = {}
    image = np.array([_known(rows, entry.get("image_id")) for entry in entries], np.int64)
    label = np.array([_known(numbers, entry.get("category_id")) for entry in entries], np.int64)
    for column, unknown, what in ((image, _UNKNOWN, "image"), (label, _UNKNOWN, "category")):
        for index in np.flatnonzero(column == unknown).tolist():
            faults.setdefault(index, f"no {what} {entries[index].get(f'{what}_id')!r}")
    size = sizes[np.where(image >= 0, image, 0)] if len(sizes) else np.zeros((len(entries), 2), np.int64)
    outlines = read_outlines(entries, size, faults, notes)
    boxes = _boxes(entries, outlines, size, faults, notes)
    keypoints, keypoint_names = _keypoints(one, faults)
    leave_out(str(one.path), [_at(entries, index, faults[index]) for index in sorted(faults)], on_error, notes)
    _note_ids(one, notes)
    good = image >= 0
    good[list(faults)] = False
    kept = np.flatnonzero(good)
    boxes, sound = tidy(boxes[kept], size[kept], lambda row: f"annotation {_name(entries, int(kept[row]))}", notes)
    kept, boxes = kept[sound], boxes[sound]
    order = np.argsort(image[kept], kind="stable")
    kept, boxes = kept[order], boxes[order]
    outlines = outlines.select(kept) if outlines else None
    return Objects(
        first=starts(np.bincount(image[kept], minlength=len(sizes))),
        sizes=sizes,
        boxes=boxes,
        labels=label[kept],
        class_ids=ids,
        crowd=np.array([bool(entries[index].get("iscrowd")) for index in kept], bool),
        difficult=np.array([bool(entries[index].get("difficult")) for index in kept], bool),
        area=_areas([entries[index].get("area") for index in kept], boxes, outlines),
        outlines=outlines,
        keypoints=None if keypoints is None else keypoints[kept],
        keypoint_names=keypoint_names,
    )


_UNKNOWN = -2


def _known(numbers: Mapping[Any, int], key: Any) -> int:
    return numbers.get(key, _UNKNOWN) if isinstance(key, int | str) else _UNKNOWN


def _name(entries: Sequence[dict], index: int) -> str:
    """The annotation's id, or its position where it has none."""
    return str(entries[index].get("id", f"at position {index}"))


def _at(entries: Sequence[dict], index: int, fault: str) -> str:
    return f"annotation {_name(entries, index)}: {fault}"


def _note_ids(one: _Json, notes: list[str]) -> None:
    seen = [str(entry.get("id")) for entry in one.annotations]
    if len(set(seen)) < len(seen):
        notes.append(f"{one.path.name}: {len(seen) - len(set(seen))} annotation ids are missing or there twice")


def _boxes(
    entries: Sequence[dict], outlines: Outlines | None, size: np.ndarray, faults: dict[int, str], notes: list[str]
) -> np.ndarray:
    """(m, 4) xyxy; from the outline where there is no bbox."""
    cells = [entry.get("bbox") for entry in entries]
    corners = floats(cells, 4)
    corners[:, 2:] += corners[:, :2]
    missing = np.array([not cell for cell in cells], bool)
    if outlines is not None and missing.any():
        taken = missing & (np.diff(outlines.parts) + np.diff(outlines.runs) > 0)
        corners[taken] = outline_boxes(outlines, size[:, 0])[taken]
        notes.append(f"annotations without bbox, taken from their outline: {taken.sum()}")
    for index in np.flatnonzero(~np.isfinite(corners).all(1)).tolist():
        faults.setdefault(index, f"bbox is {cells[index]}; four numbers x, y, width, height are needed")
    return np.where(np.isfinite(corners), corners, 0)


def _areas(cells: list, boxes: np.ndarray, outlines: Outlines | None) -> np.ndarray:
    """(m,) float64; of the outline or the box where the json has none."""
    areas = numeric(cells)
    missing = ~(np.isfinite(areas) & (areas >= 0))
    if missing.any():
        of_box = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        of_outline = outline_areas(outlines) if outlines is not None else np.zeros(len(boxes))
        areas[missing] = np.where(of_outline > 0, of_outline, of_box)[missing]
    return areas


def _keypoints(one: _Json, faults: dict[int, str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(m, K, 3) and the names of the K points; None where no annotation has any."""
    cells = [entry.get("keypoints") for entry in one.annotations]
    if not any(cells):
        return None, ()
    named = [entry["keypoints"] for entry in one.categories if isinstance(entry.get("keypoints"), list)]
    names = tuple(map(str, max(named, key=len))) if named else ()
    count = len(names) or max(len(cell) for cell in cells if isinstance(cell, list)) // 3
    found_points = floats(cells, 3 * count)
    wrong = np.logical_not(np.isfinite(found_points).all(1))
    for index in np.flatnonzero(wrong).tolist():
        if cells[index]:
            faults.setdefault(index, f"keypoints are not {count} times x, y, visibility")
    names = names or tuple(f"point {number}" for number in range(1, count + 1))
    return np.where(wrong[:, None], 0, found_points).reshape(-1, count, 3), names


def write_coco(dataset: Dataset, folder: Path) -> None:
    """Write `annotations/instances_SPLIT.json` and the images under their own names.

    Reading it again gives the same names, order, classes, ids and columns, to the last bit. Images that are no files
    are saved as PNG. `difficult`, which COCO does not have, is written where an object is.

    Raises:
        UsageError: a split has no objects, or the folder is not empty.
    """
    pairs, own = with_objects(dataset), own_names(dataset)
    fresh(folder)
    (folder / "annotations").mkdir()
    for name, (split, objects) in pairs.items():
        names = place(split, folder, own[name])
        whole = {
            "images": [
                {"id": number, "file_name": file, "width": width, "height": height}
                for number, (file, (height, width)) in enumerate(zip(names, objects.sizes.tolist(), strict=True), 1)
            ],
            "annotations": _entries(objects),
            "categories": _category_entries(dataset, objects),
        }
        stem = "instances" if name == "all" else f"instances_{name}"
        (folder / "annotations" / f"{stem}.json").write_text(json.dumps(whole), encoding="utf-8")


def _category_entries(dataset: Dataset, objects: Objects) -> list[dict]:
    entries: list[dict] = [
        {"id": number, "name": name} for number, name in zip(_ids(dataset, objects), dataset.classes, strict=True)
    ]
    if objects.keypoints is not None:
        for entry in entries:
            entry["keypoints"] = list(objects.keypoint_names)
    return entries


def _ids(dataset: Dataset, objects: Objects) -> Sequence[int]:
    """The data's own ids where there is one a class and they rise, else 1, 2, ..."""
    ids = objects.class_ids
    rising = len(ids) == len(dataset.classes) and all(a < b for a, b in pairwise(ids))
    return ids if rising else range(1, len(dataset.classes) + 1)


def _entries(objects: Objects) -> list[dict]:
    images = np.repeat(np.arange(1, len(objects) + 1), np.diff(objects.first)).tolist()
    low = objects.boxes[:, :2]
    boxes = np.concatenate([low, _extent(low, objects.boxes[:, 2:])], 1).tolist()
    ids = np.asarray(objects.class_ids)[objects.labels].tolist()
    columns = zip(
        images, ids, boxes, objects.area.tolist(), objects.crowd.tolist(), objects.difficult.tolist(), strict=True
    )
    entries: list[dict] = []
    for number, (image, category, box, area, crowd, difficult) in enumerate(columns, 1):
        entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area}
        entry |= {"iscrowd": int(crowd)} | ({"difficult": 1} if difficult else {})
        if objects.outlines is not None:
            entry["segmentation"] = write_outline(objects.outlines, number - 1, objects.sizes[image - 1].tolist())
        if objects.keypoints is not None:
            points = objects.keypoints[number - 1]
            entry |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        entries.append(entry)
    return entries


def _extent(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Width and height whose sum with `low` is `high` to the last bit, which the plain difference may miss by one."""
    extent = high - low
    for _ in range(2):
        extent = np.where(low + extent < high, np.nextafter(extent, np.inf), extent)
        extent = np.where(low + extent > high, np.nextafter(extent, -np.inf), extent)
    return extent
