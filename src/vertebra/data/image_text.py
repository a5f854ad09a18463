"""Images with captions: a table or a json that names images and says what they show, in one sentence or several.

Recognised are, at the root, in `annotations` or in a folder of a split:

- `captions.csv`, `metadata.csv`, `.tsv`, `.jsonl`, `.parquet`, `captions.txt`: a column of file names (file_name,
  image) and one of captions (caption, text); many rows of one image, or a list in a cell, are its many captions;
- a json of entries `{"image": "x.jpg", "captions": ["...", "..."], "split": "train"}`, in a list;
- COCO's `captions_train2017.json` (images, annotations), Karpathy's `dataset_flickr8k.json` (images, sentences).

Images lie anywhere below the root and are found by name. Captions are kept as they are but for blanks at their ends;
one that is empty is a fault. The split is a column, a field, or a word of the file's name.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vertebra.data.annotations import Annotations, digest_of, starts
from vertebra.data.dataset import Dataset, Split
from vertebra.data.folders import Files, Folder
from vertebra.data.partners import Lookup, checked, fresh, split_folder, word_of_split, write_images
from vertebra.data.splits import Found, OnError, assemble, leave_out, split_of
from vertebra.data.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    TABLE_SUFFIXES,
    header,
    load_table,
)
from vertebra.errors import DataError

if TYPE_CHECKING:
    from vertebra.data.checking import Finding

_CAPTIONS = (*CAPTION_COLUMNS, "comment", "sentence", "sentences", "description", "prompt")
_STEMS = {"metadata", "captions", "annotations", "labels"}
_KARPATHY = re.compile(r"dataset_(coco|flickr\d+k)\.json", re.IGNORECASE)
_TRAIN_TOO = "restval"  # Karpathy's word for validation images that are trained on


@dataclass(frozen=True)
class TextPlan:
    """Where things are, relative to the root.

    Attributes:
        files: what says the captions -> the split that its name tells, "" where it tells none.
        images: everything that may be one of the images.
    """

    files: Mapping[str, str]
    images: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Captions(Annotations):
    """Sentences, as one run of bytes, so that a million of them stay small.

    Attributes:
        first: (n + 1,) int64; captions `first[i]:first[i + 1]` are image i's.
        ends: (m + 1,) int64; bytes `ends[j]:ends[j + 1]` are caption j's.
        text: all captions, UTF-8.
    """

    first: np.ndarray
    ends: np.ndarray
    text: bytes

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def names(self) -> tuple[str, ...]:
        return ("captions",)

    def target(self, index: int) -> dict[str, Any]:
        return {"captions": self.captions(index)}

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of image `index`."""
        rows = range(int(self.first[index]), int(self.first[index + 1]))
        return tuple(self.text[self.ends[row] : self.ends[row + 1]].decode() for row in rows)

    def select(self, indices: np.ndarray) -> "Captions":
        return Captions.of([self.captions(int(index)) for index in indices])

    def digest(self) -> bytes:
        return digest_of(self)

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> "Captions":
        """Columns of the captions of each image."""
        encoded = [caption.encode() for some in captions for caption in some]
        return cls(starts([len(some) for some in captions]), starts([len(text) for text in encoded]), b"".join(encoded))


class _Entry(NamedTuple):
    """What a file says of one image: the place for messages, the file's name, the split or "", the captions."""

    where: str
    name: str
    split: str
    captions: tuple[Any, ...]


def find_image_text(root: Path, top: Folder) -> TextPlan | None:
    """Files that caption images, by their names and the first line of tables; None where there are none."""
    files = {}
    for folder in (top, *top.folders.values()):
        name = folder.path.strip("/")
        if folder is not top and name.lower() != "annotations" and not split_of(name):
            continue
        for file in folder.others:
            if _is_json(file) or _is_table(root / folder.path / file):
                files[folder.path + file] = word_of_split(file.rpartition(".")[0]) or split_of(name) or ""
    return TextPlan(files, tuple(top.names())) if files and top.count else None


def _is_json(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(".json") and ("caption" in lower or bool(_KARPATHY.fullmatch(lower)))


def _is_table(file: Path) -> bool:
    """Whether a table names files and captions, and no labels: a table with both is of labels."""
    stem, suffix = file.stem.lower(), file.suffix.lower()
    if suffix not in (*TABLE_SUFFIXES, ".txt") or not (stem in _STEMS or "caption" in stem or split_of(stem)):
        return False
    if suffix == ".jsonl":
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            try:
                record = json.loads(lines.readline())
            except (ValueError, RecursionError):
                return False
        names = set(map(str.lower, record)) if isinstance(record, dict) else set()
    else:
        names = {name.lower() for name in header(file)}
    return bool(names & set(FILE_COLUMNS)) and bool(names & set(_CAPTIONS)) and not names & set(LABEL_COLUMNS)


def read_image_text(
    path: str, root: Path, plan: TextPlan, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read images with captions.

    Args:
        path: the path as the user gave it.
        root: the folder.
        plan: what `find_image_text` found there.
        on_error: what becomes of entries whose image is missing, and of captions that are empty.
        notes: what was said so far.

    Returns:
        A data set without labels whose targets hold "captions".

    Raises:
        DataError: a file cannot be read, a name leads out of the root, or entries are at fault; the message names them.
    """
    notes, find = list(notes), _Finder(plan.images)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for file, told in plan.files.items():
        problems = []
        for entry in _entries(root / file):
            split = _split(entry.split) or told or "all"
            image, fault = find(root / file, file, entry, split)
            texts = [text.strip() for text in entry.captions if isinstance(text, str) and text.strip()]
            if not fault and entry.split and not _split(entry.split):
                fault = f"{entry.split!r} is no split; splits are train, val and test"
            if not fault and splits.get(image, split) != split:
                fault = f"{image} is in two splits, {splits[image]} and {split}"
            if not fault and len(texts) < max(1, len(entry.captions)):
                fault = f"{entry.name} has {'an empty caption' if entry.captions else 'no caption'}"
                problems.append(f"{entry.where}: {fault}")
            elif fault:
                problems.append(f"{entry.where}: {fault}")
                continue
            if texts:
                splits[image] = split
                captions.setdefault(image, []).extend(texts)
        leave_out(str(root / file), problems, on_error, notes)
    if rest := len(plan.images) - len(captions):
        notes.append(f"left out, as nothing captions them: {rest} images")
    found = {}
    for split in dict.fromkeys(splits.values()):
        names = [image for image in captions if splits[image] == split]
        paths = np.array(names, dtype=np.str_)
        annotations = Captions.of([captions[name] for name in names])
        found[split] = Found(paths, None, Files(root, paths), np.arange(len(paths)), annotations)
    return assemble(path, "image_text", found, (), notes)


def _split(word: str) -> str | None:
    return "train" if word == _TRAIN_TOO else split_of(word)


class _Finder:
    """Images by the names that files call them."""

    def __init__(self, images: Sequence[str]) -> None:
        self._lookup, self._there = Lookup(images), set(images)
        self._known: dict[tuple[str, str, str], tuple[str, str]] = {}  # many captions, one name

    def __call__(self, file: Path, relative: str, entry: _Entry, split: str) -> tuple[str, str]:
        """The image that an entry is of, relative to the root; or why there is none."""
        key = (relative, entry.name, split)
        if key not in self._known:
            name = checked(entry.name, f"{file}, {entry.where}")
            self._known[key] = self._find(name, relative.rpartition("/")[0], split)
        return self._known[key]

    def _find(self, name: str, beside: str, split: str) -> tuple[str, str]:
        if (full := f"{beside}/{name}" if beside else name) in self._there:
            return full, ""
        found = self._lookup(name, split) or self._lookup(name.rpartition("/")[2], split)
        if len(found) == 1:
            return found[0], ""
        return "", f"{name} is there more than once: {found[0]}, {found[1]}" if found else f"no such image: {name}"


def _entries(file: Path) -> Iterator[_Entry]:
    """What a file says, in its order."""
    if file.suffix.lower() != ".json":
        yield from _of_table(file)
        return
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("annotations"), list) and isinstance(data.get("images"), list):
        yield from _of_coco(file, data)
    elif isinstance(data, dict) and isinstance(data.get("images"), list):
        yield from _of_records(file, data["images"])
    elif isinstance(data, list):
        yield from _of_records(file, data)
    else:
        raise DataError(f"{file} has no captions in a form that is read: COCO's, Karpathy's, or a list of objects")


def _of_table(file: Path) -> Iterator[_Entry]:
    table = load_table(file)
    names = {name.lower(): name for name in table.columns}
    files, texts, splits = (
        next((table.columns[names[word]] for word in words if word in names), None)
        for words in (FILE_COLUMNS, _CAPTIONS, SPLIT_COLUMNS)
    )
    if files is None or texts is None:
        raise DataError(f"{file} needs a column of file names and one of captions; it has {', '.join(table.columns)}")
    for row, (name, text) in enumerate(zip(files, texts, strict=True)):
        captions = tuple(text) if isinstance(text, list | tuple) else (text,)
        yield _Entry(table.where(row), str(name or ""), str(splits[row] or "") if splits else "", captions)


def _of_records(file: Path, records: Sequence[Any]) -> Iterator[_Entry]:
    for number, record in enumerate(records):
        where = f"entry {number}"
        if not isinstance(record, dict):
            raise DataError(f"{file}, {where}: {type(record).__name__} where an object {{...}} is expected")
        name = next((record[word] for word in FILE_COLUMNS if word in record), None)
        texts = next((record[word] for word in (*_CAPTIONS, "sentences") if word in record), None)
        if name is None or texts is None:
            raise DataError(f"{file}, {where}: it needs an image and captions; it has {', '.join(map(str, record))}")
        listed = texts if isinstance(texts, list) else [texts]
        captions = tuple(text.get("raw") if isinstance(text, dict) else text for text in listed)
        name = f"{record['filepath']}/{name}" if "filename" in record and record.get("filepath") else str(name)
        yield _Entry(where, name, str(record.get("split") or ""), captions)


def _of_coco(file: Path, data: Mapping[str, Any]) -> Iterator[_Entry]:
    images = {str(entry.get("id")): entry for entry in data["images"] if isinstance(entry, dict)}
    for number, entry in enumerate(data["annotations"]):
        image = images.get(str(entry.get("image_id"))) if isinstance(entry, dict) else None
        if image is None or "caption" not in entry:
            raise DataError(
                f"{file}, annotation {number}: it needs the image_id of an image that is listed, and a caption"
            )
        yield _Entry(f"annotation {number}", str(image.get("file_name") or ""), "", (entry["caption"],))


def write_image_text(dataset: Dataset, folder: Path) -> None:
    """Write a data set with "captions" targets so that `read_image_text` reads it.

    `images/SPLIT/x.jpg`, and `captions.jsonl` with a line an image: file_name, split, captions.

    Raises:
        DataError: the targets have no captions.
        UsageError: there is something in the folder.
    """
    fresh(folder)
    lines = []
    for split in dataset.splits.values():
        if split.annotations is None or "captions" not in split.annotations.names:
            raise DataError(f"{dataset.path}: the split {split.name!r} has no captions")
        place = f"images/{split_folder(split)}"
        for index, name in enumerate(write_images(split, folder / place)):
            record = {"file_name": place + name, "captions": list(split.target(index)["captions"])}
            lines.append(
                json.dumps(record if split.name == "all" else record | {"split": split.name}, ensure_ascii=False)
            )
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def faults(split: Split) -> "Iterator[Finding]":
    """What is wrong with the captions of a split: sentences that several images have, so that they tell none."""
    from vertebra.data.checking import Finding

    annotations = split.annotations
    if not isinstance(annotations, Captions):
        return
    counts = Counter(text for index in range(len(annotations)) for text in set(annotations.captions(index)))
    shared = [(text, count) for text, count in counts.most_common() if count > 1]
    if shared:
        text, count = shared[0]
        message = f"{len(shared)} captions belong to more than one image; most often, {count} times: {text[:80]!r}"
        yield Finding("caption-shared", split.name, message)
