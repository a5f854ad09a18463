"""Boxes and polygons in YOLO's text files: a `data.yaml` with class names, `images/...`, `labels/...`.

A line is `class x y width height` (centre and size) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon; four corners are also
the form of oriented boxes, which become polygons), all as shares of the image's width and height as it is shown.

The yaml says where the images of `train`, `val` and `test` are: folders, lists of folders, or text files with one image
a line. Paths are relative to `path`, and that to the yaml itself; a path that leads out of the data's folder or nowhere
(`../train/images`, another machine's `path`) is tried below the yaml's folder, with a note. Labels are found by
`labels` in place of the last `images` of an image's path, so that `images/train` and `train/images` both work, and
beside the image where the path has no `images`. Without a yaml, `classes.txt` says the names and the folders the
splits.

=====================================  ==========================================================================
found                                  what becomes of it
=====================================  ==========================================================================
names                                  a list, or a map with any whole numbers as keys
empty label file                       the image shows none of the classes
no label file                          the same, with a note
label file without image               left out with a note
values over the edge                   cut there, as the repairs of `vertebra.data.objects` say
values below -1 or above 2             an error: these are pixels, not shares
lines of another number of columns     an error: with a score (6), an angle (6), or keypoints
class that names do not have           an error
=====================================  ==========================================================================

Errors name the file and the line. `on_error` "skip" leaves out the lines at fault.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vertebra.data.annotations import Objects, Outlines, starts
from vertebra.data.dataset import Dataset
from vertebra.data.folders import Folder, list_folder
from vertebra.data.geometry import outline_areas, outline_boxes
from vertebra.data.objects import Listing, flat_names, found, own_names, shown_sizes, tidy, too_large, with_objects
from vertebra.data.partners import fresh, place
from vertebra.data.splits import OnError, assemble, leave_out, split_of
from vertebra.errors import DataError

_LARGEST_YAML = 1 << 20  # bytes
_LOWEST, _HIGHEST = -1.0, 2.0


@dataclass(frozen=True, eq=False)
class YoloFiles:
    """Where images and labels are.

    Attributes:
        yaml: relative to the root; "" where there is none.
        names: `classes.txt` where there is no yaml, relative to the root.
        top: the listing of the root.
    """

    yaml: str
    names: str
    top: Folder


def find_yolo(root: Path, top: Folder) -> YoloFiles | None:
    """A yaml with names and splits, or a `classes.txt` with folders of labels.

    Raises:
        DataError: there are several such yaml files, or one that is broken.
    """
    yamls = [name for name in top.others if name.lower().endswith((".yaml", ".yml")) and _tells(root / name)]
    if len(yamls) > 1:
        usual = [name for name in yamls if Path(name).stem.lower() in ("data", "dataset")]
        if len(usual) != 1:
            raise DataError(f"{root} has several yaml files with names: {', '.join(yamls)}; keep one, as data.yaml")
        yamls = usual
    if yamls:
        return YoloFiles(yamls[0], "", top)
    labels = [folder for folder in top.walk() if "labels" in folder.path.split("/")]
    if not any(name.endswith(".txt") for folder in labels for name in folder.others):
        return None
    lists = [folder.path + name for folder in (top, *labels) for name in folder.others if name == "classes.txt"]
    return YoloFiles("", lists[0] if lists else "", top)


def yolo_file(file: Path) -> tuple[Path, YoloFiles] | None:
    """The root and the plan for a yaml that was given by its path; None where it is none of YOLO's."""
    if file.suffix.lower() not in (".yaml", ".yml") or not _tells(file):
        return None
    return file.parent, YoloFiles(file.name, "", list_folder(file.parent)[0])


def _tells(file: Path) -> bool:
    """Whether a yaml is about images: it has names and a split."""
    with file.open("rb") as opened:
        text = opened.read(_LARGEST_YAML)
    lines = [line.partition(b":")[0].strip(b"'\" ") for line in text.splitlines() if b":" in line]
    return b"names" in lines and any(split_of(line.decode("utf-8", "replace")) for line in lines)


def read_yolo(
    path: str, root: Path, files: YoloFiles, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read images, boxes and polygons.

    Args:
        path: the path as the user gave it.
        root: the folder that nothing can leave.
        files: of `find_yolo`.
        on_error: what becomes of lines and images that cannot be used.
        notes: what was said so far.

    Raises:
        DataError: a yaml, lists or lines that cannot be used; the message names file and line.
    """
    notes = list(notes)
    settings = _settings(root / files.yaml) if files.yaml else {}
    names = _names(root, files, settings)
    members = _members(root, files, settings, on_error, notes)
    texts = {folder.path + name for folder in files.top.walk() for name in folder.others if name.endswith(".txt")}
    if stray := _stray(texts, members):
        notes.append(f"label files without an image, left out: {len(stray)} ({stray[0]})")
    splits = {}
    for split, images in members.items():
        kept, objects = _objects(root, images, texts, names, on_error, notes)
        splits[split] = found(root, kept, objects, list(names.values()))
    return assemble(path, "yolo", splits, list(names.values()), notes)


def _settings(file: Path) -> dict[str, Any]:
    """The yaml's content."""
    import yaml

    try:
        text = file.read_bytes()
        if len(text) > _LARGEST_YAML:
            raise DataError(f"{file} has {len(text)} bytes; a data.yaml has names and paths only")
        settings = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is no yaml: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file} has no keys; a data.yaml has names, train and val")
    if settings.get("kpt_shape"):
        raise DataError(f"{file}: keypoints (kpt_shape) are not read from YOLO's files; convert them to COCO json")
    return settings


def _names(root: Path, files: YoloFiles, settings: Mapping[str, Any]) -> dict[int, str]:
    """Class number -> name, numbers rising."""
    if not files.yaml:
        if not files.names:
            raise DataError(f"{root} has labels but no class names; add a data.yaml with names, train and val")
        lines = _text(root / files.names).splitlines()
        return _checked(root / files.names, dict(enumerate(line.strip() for line in lines if line.strip())), None)
    file, said = root / files.yaml, settings.get("names")
    if isinstance(said, list):
        said = dict(enumerate(said))
    if not isinstance(said, dict) or not said:
        raise DataError(f"{file}: names is {said!r}; give a list of class names, or a map from numbers to names")
    return _checked(file, said, settings.get("nc"))


def _checked(file: Path, said: Mapping[Any, Any], count: Any) -> dict[int, str]:
    names = {}
    for number, name in said.items():
        if type(number) is str and number.isdecimal():
            number = int(number)
        if type(number) is not int or number < 0:
            raise DataError(f"{file}: names has the key {number!r}; keys are whole numbers from 0")
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name).strip():
            raise DataError(f"{file}: the name of class {number} is read as {name!r}; put it in quotes")
        names[number] = str(name)
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise DataError(f"{file}: two classes are called {twice!r}")
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc is {count}, and names has {len(names)}")
    return dict(sorted(names.items()))


def _members(
    root: Path, files: YoloFiles, settings: Mapping[str, Any], on_error: OnError, notes: list[str]
) -> dict[str, list[str]]:
    """Split -> images, relative to the root."""
    listing = Listing(files.top)
    if not files.yaml:
        members: dict[str, list[str]] = {}
        for name in sorted(listing.names):
            split = next(filter(None, map(split_of, name.split("/")[:-1])), "all")
            members.setdefault(split, []).append(name)
        return members
    members, faults = {}, []
    for key, entry in settings.items():
        split = split_of(str(key))
        if split and entry:
            if split in members:
                raise DataError(f"{root / files.yaml}: {key} is the split {split} again; keep one")
            entries = [str(one) for one in entry] if isinstance(entry, list) else [str(entry)]
            images = [name for one in entries for name in _below(root, files, settings, one, listing, faults, notes)]
            members[split] = list(dict.fromkeys(images))
    leave_out(str(root / files.yaml), faults, on_error, notes)
    if not members:
        raise DataError(f"{root / files.yaml} names no images; give train, val or test")
    return members


def _below(
    root: Path,
    files: YoloFiles,
    settings: Mapping[str, Any],
    entry: str,
    listing: Listing,
    faults: list[str],
    notes: list[str],
) -> list[str]:
    """Images that an entry of the yaml names: a folder, or a list in a text file."""
    said, base = entry.replace("\\", "/"), str(settings.get("path") or "").replace("\\", "/")
    plain = "/".join(part for part in said.split("/") if part not in ("..", ""))
    tries = dict.fromkeys((f"{base}/{said}" if base else said, said, plain))
    for number, one in enumerate(tries):
        inside = _inside(root, one)
        if inside is None:
            continue
        images = _list(root, inside, listing, faults) if inside.endswith(".txt") else _folder(inside, listing)
        if images:
            if number:
                notes.append(f"{files.yaml}: {entry} is read as {inside}")
            return images
    raise DataError(f"{root / files.yaml}: no images in {entry}; tried {', '.join(tries)} below {root}")


def _inside(root: Path, path: str) -> str | None:
    """A path relative to the root, or absolute, as one relative to the root; None where it leads out."""
    top = os.path.abspath(root)  # noqa: PTH100 - keeps links, which Path.resolve follows
    full = os.path.normpath(os.path.join(top, path))  # noqa: PTH118
    if full == top:
        return "."
    return full[len(top) + 1 :].replace(os.sep, "/") if full.startswith(top + os.sep) else None


def _folder(inside: str, listing: Listing) -> list[str]:
    prefix = "" if inside == "." else f"{inside}/"
    return sorted(name for name in listing.names if name.startswith(prefix))


def _list(root: Path, inside: str, listing: Listing, faults: list[str]) -> list[str]:
    """Images of a text file; the paths are relative to the file, or to the root."""
    file = root / inside
    if not file.is_file():
        return []
    images, parent = [], PurePosixPath(inside).parent.as_posix()
    for line, words in enumerate(_text(file).splitlines(), 1):
        if said := words.strip().replace("\\", "/"):
            places = [_inside(root, f"{parent}/{said}"), _inside(root, said)]
            name = next((one for one in places if one in listing.names), None) or listing.by_base(said)
            images += [name] if name else []
            faults += [] if name else [f"{inside}, line {line}: there is no image {said}"]
    return images


def _label_of(image: str) -> str:
    """The label file of an image."""
    parts = image.split("/")
    folders = parts[:-1]
    if "images" in folders:
        parts[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return str(PurePosixPath("/".join(parts)).with_suffix(".txt"))


def _stray(texts: set[str], members: Mapping[str, Sequence[str]]) -> list[str]:
    """Label files, in folders of labels that are read, that no image has."""
    wanted = {_label_of(image) for images in members.values() for image in images}
    folders = {name.rpartition("/")[0] for name in wanted if "labels" in name.split("/")}
    return sorted(
        name for name in texts - wanted if name.rpartition("/")[0] in folders and not name.endswith("classes.txt")
    )


def _objects(
    root: Path,
    images: Sequence[str],
    texts: set[str],
    names: Mapping[int, str],
    on_error: OnError,
    notes: list[str],
) -> tuple[list[str], Objects]:
    """The images that are kept and the columns of one split."""
    sizes, reasons = shown_sizes(root, images)
    reasons |= {index: f"{images[index]} is too large" for index in np.flatnonzero(too_large(sizes)).tolist()}
    leave_out(str(root), list(reasons.values()), on_error, notes)
    kept = [index for index in range(len(images)) if index not in reasons]
    images, sizes = [images[index] for index in kept], sizes[kept]
    labels = [_label_of(image) for image in images]
    bare = [image for image, label in zip(images, labels, strict=True) if label not in texts]
    if bare:
        notes.append(f"images without a label file, taken to show none of the classes: {len(bare)} ({bare[0]})")
    lines = _Lines(root, [label if label in texts else "" for label in labels])
    numbers, boxes, outlines, faults = lines.parsed(list(names), sizes)
    leave_out(str(root), [f"{lines.where(row)}: {fault}" for row, fault in sorted(faults.items())], on_error, notes)
    good = np.flatnonzero(~np.isin(np.arange(len(boxes)), list(faults)))
    cut, sound = tidy(boxes[good], sizes[lines.owner[good]], lambda row: lines.where(int(good[row])), notes)
    good, boxes = good[sound], cut[sound]
    owner = lines.owner[good]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    outlines = outlines.select(good) if len(outlines.points) else None
    if outlines is not None:
        inside = outline_areas(outlines)
        areas = np.where(inside > 0, inside, areas)
    blank = np.zeros(len(good), bool)
    first = starts(np.bincount(owner, minlength=len(images)))
    return images, Objects(first, sizes, boxes, numbers[good], tuple(names), blank, blank.copy(), areas, outlines)


class _Lines:
    """The lines of all label files of a split.

    Attributes:
        owner: (m,) the image of each line.
        cells: the words of each line.
    """

    def __init__(self, root: Path, labels: Sequence[str]) -> None:
        self._labels = labels
        self.cells: list[list[str]] = []
        self._numbers: list[int] = []
        owner: list[int] = []
        for image, label in enumerate(labels):
            for number, words in enumerate(_read(root / label) if label else (), 1):
                if words:
                    self.cells.append(words)
                    self._numbers.append(number)
                    owner.append(image)
        self.owner = np.array(owner, np.int64)

    def where(self, row: int) -> str:
        """File and line of a row."""
        return f"{self._labels[int(self.owner[row])]}, line {self._numbers[row]}"

    def parsed(
        self, known: Sequence[int], sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Outlines, dict[int, str]]:
        """Classes (m,), boxes (m, 4) in pixels, outlines, and row -> what is wrong with it."""
        lengths = np.fromiter(map(len, self.cells), np.int64, len(self.cells))
        values = _numeric(list(chain.from_iterable(self.cells)))
        begin = starts(lengths)[:-1]
        scale = sizes[self.owner][:, ::-1].astype(np.float64)  # (m, 2) width, height
        faults: dict[int, str] = {}
        position = np.searchsorted(known, values[begin])
        classes = np.clip(position, 0, len(known) - 1)
        unknown = np.asarray(known, np.float64)[classes] != values[begin]
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        is_class = np.zeros(len(values), bool)
        is_class[begin] = True
        strange = ~is_class & ~((values >= _LOWEST) & (values <= _HIGHEST))  # NaN too
        is_box, is_polygon = lengths == 5, (lengths >= 7) & (lengths % 2 == 1)
        for row in np.flatnonzero(~(is_box | is_polygon)).tolist():
            faults[row] = _column_fault(int(lengths[row]))
        for row in np.unique(row_of[strange]).tolist():
            faults.setdefault(row, _value_fault(self.cells[row]))
        for row in np.flatnonzero(unknown).tolist():
            faults.setdefault(row, f"class {self.cells[row][0]!r} is not among names ({_span(known)})")
        sound = np.ones(len(lengths), bool)
        sound[list(faults)] = False
        boxes = np.zeros((len(lengths), 4))
        rows = np.flatnonzero(is_box & sound)
        centred = values[begin[rows, None] + np.arange(1, 5)] * np.tile(scale[rows], 2)
        centre, half = centred[:, :2], centred[:, 2:] / 2
        boxes[rows] = np.concatenate([centre - half, centre + half], 1)
        traced = is_polygon & sound
        inside = traced[row_of] & ~is_class
        points = values[inside].reshape(-1, 2) * np.repeat(scale[traced], (lengths[traced] - 1) // 2, axis=0)
        none = starts(np.zeros(len(lengths)))
        outlines = Outlines(starts(traced), starts((lengths[traced] - 1) // 2), points, none, np.empty(0, np.uint32))
        boxes[traced] = outline_boxes(outlines, sizes[self.owner, 0])[traced]
        return classes, boxes, outlines, faults


def _read(file: Path) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in _text(file).splitlines()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error


def _numeric(cells: list[str]) -> np.ndarray:
    """(n,) float64; NaN for what is no number."""
    try:
        return np.array(list(map(float, cells)), np.float64)
    except ValueError:
        return np.array([_number(cell) for cell in cells], np.float64)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _column_fault(count: int) -> str:
    shapes = "5 (class x y width height), or class and pairs x y of three corners or more"
    six = "; a score or an angle is not read" if count == 6 else ""
    return f"{count} columns, not {shapes}{six}"


def _value_fault(cells: Sequence[str]) -> str:
    wrong = next(cell for cell in cells[1:] if not _LOWEST <= _number(cell) <= _HIGHEST)
    return f"{wrong} is no share of the image's width or height (0 to 1)"


def _span(known: Sequence[int]) -> str:
    whole = list(known) == list(range(len(known)))
    return f"0 to {len(known) - 1}" if whole else ", ".join(map(str, known))


def write_yolo(dataset: Dataset, folder: Path) -> None:
    """Write `data.yaml`, `images/SPLIT` and `labels/SPLIT`.

    Numbers are written in full, so that boxes come back within a millionth of a pixel. An object with polygons is
    written as one polygon: parts are joined by a line there and back, which covers nothing. Masks as runs are written
    as their boxes. Crowds are left out; difficult, keypoints, areas and the classes' ids are not kept. Images keep
    their names where these have a folder `images`. Without splits all is written as train.

    Raises:
        UsageError: a split has no objects, two images would have one name, or the folder is not empty.
    """
    import yaml

    pairs, own, flat = with_objects(dataset), own_names(dataset), flat_names(dataset)
    fresh(folder)
    settings: dict[str, Any] = {}
    for name, (split, objects) in pairs.items():
        names = own[name]
        kept = all("images" in one.split("/")[:-1] for one in names)
        written = place(split, folder, names if kept else [f"images/{name}/{one}" for one in flat[name]])
        lines = _written(objects)
        for index, image in enumerate(written):
            file = folder / _label_of(image)
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = objects.rows(index)
            file.write_text("".join(lines[rows]), encoding="utf-8")
        settings["train" if name == "all" else name] = _common(written)
    settings["names"] = dict(enumerate(dataset.classes))
    (folder / "data.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _common(names: Sequence[str]) -> str | list[str]:
    """The folders that hold the images."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    return folders[0] if len(folders) == 1 else folders


def _written(objects: Objects) -> list[str]:
    """One line an object, "" for a crowd."""
    owner = np.repeat(np.arange(len(objects)), np.diff(objects.first))
    scale = objects.sizes[owner][:, ::-1].astype(np.float64)
    low, high = objects.boxes[:, :2], objects.boxes[:, 2:]
    values = np.concatenate([(low + high) / 2 / scale, (high - low) / scale], 1).tolist()
    lines = []
    for row, (label, crowd) in enumerate(zip(objects.labels.tolist(), objects.crowd.tolist(), strict=True)):
        parts = objects.outlines.polygons(row) if objects.outlines is not None else []
        shares = (_joined(parts) / scale[row]).ravel().tolist() if parts else values[row]
        lines.append("" if crowd else f"{label} {' '.join(map(repr, shares))}\n")
    return lines


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon of several: each further part is reached from the first corner of all, and left the same way."""
    if len(parts) == 1:
        return parts[0]
    start = parts[0][:1]
    return np.concatenate([piece for part in parts for piece in (part, part[:1], start)])
