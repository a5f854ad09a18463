"""Boxes in Pascal VOC's xml: `Annotations/*.xml` with `JPEGImages` and `ImageSets/Main`, or xml beside the images.

VOC counts pixels from 1, and its corners are the first and the last pixel inside: the box (1, 1, W, H) is the whole
image and becomes (0, 0, W, H) here. Splits are the lists of `ImageSets/Main` (trainval is train where there is no
train), or the folders `train`, `valid`, `test` that hold images with their xml. Classes are the names that objects
bear, in `vertebra.data.splits.class_order`; the format has no list of them.

=================================  ==================================================================================
found                              what becomes of it
=================================  ==================================================================================
difficult                          kept
truncated, occluded, pose, parts   not kept
corners that are not whole         kept as they are
corners that are equal             a box without extent: left out
file name in the xml               counts only where no image is called as the xml is; a note where they differ
size missing or 0                  read from the image's header, EXIF applied
image without xml                  left out with a note: it is not known to be empty
xml that no list names             left out with a note
image in two lists                 is in both splits
=================================  ==================================================================================

and the repairs of `vertebra.data.objects`. Errors are: xml that is broken or declares entities, objects without a name
or a box, coordinates that are no numbers, listed images that are not there.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError, SubElement, indent, tostring

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from vertebra.data.annotations import Objects, starts
from vertebra.data.dataset import Dataset
from vertebra.data.folders import Folder
from vertebra.data.objects import flat_names, found, shown_sizes, tidy, too_large, with_objects
from vertebra.data.partners import fresh, place
from vertebra.data.splits import OnError, assemble, class_order, leave_out, split_of
from vertebra.errors import DataError, near

_IMAGES = ("jpegimages", "images", "image", "imgs", "img")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, eq=False)
class VocFiles:
    """Where xml and images of a data set are.

    Attributes:
        pairs: xml -> image, both relative to the root; "" where no image is called as the xml is.
        images: images that may belong to an xml of another name, by their last part.
        lists: split -> its list, relative to the root; empty where folders tell the splits or there are none.
        unpaired: images without xml.
    """

    pairs: Mapping[str, str]
    images: Mapping[str, str]
    lists: Mapping[str, str]
    unpaired: tuple[str, ...]


class _Xml(NamedTuple):
    """One xml file, parsed.

    Attributes:
        file: relative to the root.
        image: the image, relative to the root.
        size: height and width, 0 where the xml does not say.
        names: a class an object.
        corners: four numbers an object, as written.
        difficult: one an object.
    """

    file: str
    image: str
    size: tuple[int, int]
    names: list[str]
    corners: list[list[float]]
    difficult: list[bool]


def find_voc(root: Path, top: Folder) -> VocFiles | None:
    """The xml files that tell of objects in the images below `root`, in the folder itself or one level down.

    Raises:
        DataError: there are several such data sets.
    """
    bases = [folder for folder in (top, *top.folders.values()) if _child(folder, ("annotations",)) and _xml_of(folder)]
    if len(bases) > 1:
        raise DataError(
            f"{root} holds several VOC data sets: {', '.join(base.path for base in bases)}; give one of them"
        )
    files = _standard(bases[0]) if bases else _beside(top)
    if not files.pairs or b"<annotation" not in _head(root / next(iter(files.pairs))):
        return None
    return files


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(4096)
    except OSError as error:
        raise DataError(f"{file} cannot be opened: {error.strerror}") from error


def _child(folder: Folder, names: Sequence[str]) -> Folder | None:
    """The folder directly inside that bears one of the names, in any case."""
    by_name = {name.lower(): inner for name, inner in folder.folders.items()}
    return next((by_name[name] for name in names if name in by_name), None)


def _xml_of(base: Folder) -> dict[str, str]:
    """Name without suffix, relative to the folder of annotations -> xml."""
    folder = _child(base, ("annotations",))
    return _stems(folder, "others", ".xml") if folder else {}


def _stems(folder: Folder, kind: str, suffix: str = "") -> dict[str, str]:
    files = (inner.path + name for inner in folder.walk() for name in getattr(inner, kind))
    chosen = [file for file in files if file.lower().endswith(suffix)]
    return {str(PurePosixPath(file[len(folder.path) :]).with_suffix("")): file for file in chosen}


def _standard(base: Folder) -> VocFiles:
    """`Annotations`, a folder of images, and perhaps `ImageSets/Main`."""
    xml, home = _xml_of(base), _child(base, _IMAGES) or base
    images = _stems(home, "images")
    sets = _child(base, ("imagesets",))
    main = (_child(sets, ("main",)) or sets) if sets else None
    lists = {}
    for name in main.others if main else ():
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() == "txt" and (split := split_of(stem)):
            lists[split] = f"{main.path}{name}" if main else name
        elif name.lower() == "trainval.txt" and main and "train.txt" not in main.others:
            lists["train"] = main.path + name
    return _files({file: images.get(stem, "") for stem, file in xml.items()}, images.values(), lists)


def _beside(top: Folder) -> VocFiles:
    """Xml in the folders of the images."""
    pairs: dict[str, str] = {}
    for folder in top.walk():
        stems = {Path(name).stem: folder.path + name for name in folder.images}
        xml = [name for name in folder.others if name.lower().endswith(".xml")]
        if stems:
            pairs |= {folder.path + name: stems.get(Path(name).stem, "") for name in xml}
    return _files(pairs, top.names(), {}) if any(pairs.values()) else _files({}, (), {})


def _files(pairs: dict[str, str], images: Iterable[str], lists: dict[str, str]) -> VocFiles:
    taken = set(pairs.values())
    images = list(images)
    counts = Counter(PurePosixPath(name).name for name in images)
    by_name = {PurePosixPath(name).name: name for name in images if counts[PurePosixPath(name).name] == 1}
    return VocFiles(pairs, by_name, lists, tuple(name for name in images if name not in taken))


def read_voc(
    path: str, root: Path, files: VocFiles, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read images and boxes.

    Args:
        path: the path as the user gave it.
        root: the folder that no file name can leave.
        files: of `find_voc`.
        on_error: what becomes of xml files and listed images that cannot be used.
        notes: what was said so far.

    Raises:
        DataError: xml or lists that cannot be used; the message names the files and lines.
    """
    notes = list(notes)
    parsed, faults, renamed = {}, [], []
    for xml, image in files.pairs.items():
        try:
            parsed[xml] = one = _parse(root / xml, xml, image, files.images)
        except DataError as error:
            faults.append(f"{xml}: {error}")
            continue
        if one.image != image:
            renamed.append(f"{xml} is about {one.image}")
    leave_out(path, faults, on_error, notes)
    if renamed:
        notes.append(f"images that are not called as their xml: {len(renamed)} ({renamed[0]})")
    used = {one.image for one in parsed.values()}
    if bare := [name for name in files.unpaired if name not in used]:
        notes.append(f"images without xml, left out: {len(bare)} ({bare[0]})")
    members = _members(path, root, files, parsed, on_error, notes)
    words = {split: {name for one in some for name in one.names} for split, some in members.items()}
    classes = class_order(set().union(*words.values()))
    _note_strange(words, notes)
    splits = {}
    for split, some in members.items():
        names, objects = _objects(some, root, classes, on_error, notes)
        splits[split] = found(root, names, objects, classes)
    return assemble(path, "voc", splits, classes, notes)


def _note_strange(words: Mapping[str, set[str]], notes: list[str]) -> None:
    """The format has no list of classes, so a misspelt one can only be noticed."""
    for split, names in words.items():
        strange = sorted(names - words.get("train", names))
        notes += [f"{split} has a class {name!r} that train lacks{near(name, words['train'])}" for name in strange]


def _parse(file: Path, xml: str, image: str, by_name: Mapping[str, str]) -> _Xml:
    """One xml file.

    Raises:
        DataError: it cannot be used; the message says why, and not where.
    """
    try:
        tree = fromstring(file.read_bytes())
    except ParseError as error:
        raise DataError(f"no xml: {error}") from error
    except DefusedXmlException as error:
        raise DataError(
            f"declares entities or refers to other files, which is refused ({type(error).__name__})"
        ) from error
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"cannot be read: {error}") from error
    said = (tree.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    names, corners, difficult = [], [], []
    for number, entry in enumerate(tree.findall("object"), 1):
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise DataError(f"object {number} has no name")
        names.append(name)
        corners.append(_corners(entry, f"object {number} ({name})"))
        difficult.append((entry.findtext("difficult") or "0").strip() not in ("0", "", "false", "False"))
    image = image or by_name.get(said, "")
    if not image:
        raise DataError(f"there is no image of that name{f', and none called {said}' if said else ''}")
    size = tree.find("size")
    height, width = (_whole(size.findtext(side)) if size is not None else 0 for side in ("height", "width"))
    return _Xml(xml, image, (height, width) if height and width else (0, 0), names, corners, difficult)


def _corners(entry: Element, what: str) -> list[float]:
    box = entry.find("bndbox")
    if box is None:
        rotated = entry.find("robndbox") is not None
        raise DataError(f"{what} has no bndbox{'; rotated boxes (robndbox) are not read' if rotated else ''}")
    cells = [(box.findtext(corner) or "").strip() for corner in _CORNERS]
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        values = [float("nan")]
    if not np.isfinite(values).all():
        raise DataError(f"{what}: its corners are {dict(zip(_CORNERS, cells, strict=True))}, not four numbers")
    return values


def _whole(text: str | None) -> int:
    """A side in pixels; 0 where the text is none."""
    text = (text or "").strip()
    return int(float(text)) if re.fullmatch(r"\d{1,9}(\.0*)?", text) else 0


def _members(
    path: str, root: Path, files: VocFiles, parsed: Mapping[str, _Xml], on_error: OnError, notes: list[str]
) -> dict[str, list[_Xml]]:
    """Split -> its xml files."""
    if not files.lists:
        members: dict[str, list[_Xml]] = {}
        splits = {xml: next(filter(None, map(split_of, xml.split("/")[:-1])), "all") for xml in parsed}
        if "all" in splits.values() and len(set(splits.values())) > 1:
            stray = next(xml for xml, split in splits.items() if split == "all")
            raise DataError(f"{path}: {stray} is in the folder of no split, and others are; move it into train")
        for xml, one in parsed.items():
            members.setdefault(splits[xml], []).append(one)
        return members
    by_stem = {PurePosixPath(xml).stem: one for xml, one in parsed.items()}
    if len(by_stem) < len(parsed):
        raise DataError(f"{path}: xml files in different folders have one name, so that lists cannot tell them apart")
    left_out = {PurePosixPath(xml).stem for xml in files.pairs.keys() - parsed.keys()}
    listed = {split: list(_listed(root / file)) for split, file in files.lists.items()}
    faults = []
    members = {}
    for split, lines in listed.items():
        seen: dict[str, int] = {}
        for line, text in lines:
            stem = text if text in by_stem else PurePosixPath(text.split()[0]).name
            stem = stem if stem in by_stem or stem in left_out else PurePosixPath(stem).stem
            if stem in seen:
                faults.append(f"{files.lists[split]}, line {line}: {stem} is listed again (line {seen[stem]})")
            elif stem in by_stem:
                members.setdefault(split, []).append(by_stem[stem])
            elif stem not in left_out:
                faults.append(f"{files.lists[split]}, line {line}: there is no xml for {text}")
            seen.setdefault(stem, line)
    leave_out(path, faults, on_error, notes)
    if rest := by_stem.keys() - {PurePosixPath(one.file).stem for some in members.values() for one in some}:
        notes.append(f"xml that no list of a split names, left out: {len(rest)} ({min(rest)})")
    return members


def _listed(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of a list that are not blank, and their numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8: {error}") from error
    for line, words in enumerate(text.splitlines(), 1):
        if words.strip():
            yield line, words.strip()


def _objects(
    parsed: Sequence[_Xml], root: Path, classes: Sequence[str], on_error: OnError, notes: list[str]
) -> tuple[list[str], Objects]:
    """Names of the images and the columns of one split."""
    sizes = np.array([one.size for one in parsed], np.int64).reshape(-1, 2)
    missing = np.flatnonzero((sizes == 0).any(1)).tolist()
    files = [one.file for one in parsed]
    faults: dict[int, str] = {}
    if missing:
        sizes[missing], reasons = shown_sizes(root, [parsed[index].image for index in missing])
        faults |= {missing[place]: reason for place, reason in reasons.items()}
        notes.append(f"images without a size in their xml, read from their headers: {len(missing)}")
    for index in map(int, np.flatnonzero(too_large(sizes))):
        faults[index] = f"{files[index]}: a size of {sizes[index].tolist()} is more than is allowed"
    leave_out(str(root), list(faults.values()), on_error, notes)
    kept = [index for index in range(len(parsed)) if index not in faults]
    parsed, sizes = [parsed[index] for index in kept], sizes[kept]
    owner = np.repeat(np.arange(len(parsed)), [len(one.names) for one in parsed])
    corners = np.array([box for one in parsed for box in one.corners], np.float64).reshape(-1, 4)
    boxes = corners - _before(corners)
    numbers = {name: number for number, name in enumerate(classes)}
    files = [one.file for one in parsed]
    boxes, sound = tidy(boxes, sizes[owner], lambda row: files[int(owner[row])], notes)
    difficult = np.array([flag for one in parsed for flag in one.difficult], bool)
    labels = np.array([numbers[name] for one in parsed for name in one.names], np.int64)
    boxes, owner = boxes[sound], owner[sound]
    objects = Objects(
        first=starts(np.bincount(owner, minlength=len(parsed))),
        sizes=sizes,
        boxes=boxes,
        labels=labels[sound],
        class_ids=tuple(range(len(classes))),
        crowd=np.zeros(len(boxes), bool),
        difficult=difficult[sound],
        area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
    )
    return [one.image for one in parsed], objects


def _before(corners: np.ndarray) -> np.ndarray:
    """What leads from the first pixel inside, counted from 1, to the edge before it: 1 for the smaller of two corners.

    Equal corners are a mark without extent, not a box of one pixel: nobody draws those.
    """
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate([low < high, high < low], 1).astype(np.float64)


def write_voc(dataset: Dataset, folder: Path) -> None:
    """Write `Annotations`, `JPEGImages` and `ImageSets/Main`.

    Corners are rounded to whole pixels counted from 1, and a box has at least two pixels a side, as equal corners
    would not be read again. Reading a data set of whole pixels again gives the same columns. Outlines, keypoints,
    areas, and classes without objects are not kept, and a crowd becomes a difficult object: neither is counted.

    Raises:
        UsageError: a split has no objects, two images would have one name, or the folder is not empty.
    """
    pairs = with_objects(dataset)
    names = flat_names(dataset)
    fresh(folder)
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name, (split, objects) in pairs.items():
        written = place(split, folder, [f"JPEGImages/{one}" for one in names[name]])
        stems = [PurePosixPath(one).stem for one in written]
        corners = _rounded(objects).tolist()
        hard = (objects.crowd | objects.difficult).tolist()
        for index, file in enumerate(written):
            rows = range(objects.rows(index).start, objects.rows(index).stop)
            things = [(dataset.classes[objects.labels[row]], hard[row], corners[row]) for row in rows]
            xml = _xml(PurePosixPath(file).name, objects.sizes[index].tolist(), things)
            (folder / "Annotations" / f"{stems[index]}.xml").write_bytes(xml)
        if name != "all":
            (folder / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems), "utf-8")


def _rounded(objects: Objects) -> np.ndarray:
    """Whole corners counted from 1, (m, 4) int64, at least two pixels a side and inside the image."""
    owner = np.repeat(np.arange(len(objects)), np.diff(objects.first))
    edge = np.maximum(objects.sizes[owner][:, ::-1], 2)
    corners = np.rint(objects.boxes).astype(np.int64)
    low = np.clip(corners[:, :2] + 1, 1, edge - 1)
    return np.concatenate([low, np.clip(corners[:, 2:], low + 1, edge)], 1)


def _xml(file: str, size: list[int], things: Iterable[tuple[str, bool, list[int]]]) -> bytes:
    tree = Element("annotation")
    SubElement(tree, "folder").text = "JPEGImages"
    SubElement(tree, "filename").text = file
    sides = SubElement(tree, "size")
    for name, value in (("width", size[1]), ("height", size[0]), ("depth", 3)):
        SubElement(sides, name).text = str(value)
    for name, hard, corners in things:
        entry = SubElement(tree, "object")
        SubElement(entry, "name").text = name
        SubElement(entry, "difficult").text = str(int(hard))
        box = SubElement(entry, "bndbox")
        for corner, value in zip(_CORNERS, corners, strict=True):
            SubElement(box, corner).text = str(value)
    indent(tree)
    return tostring(tree, encoding="utf-8")
