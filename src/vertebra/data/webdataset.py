"""WebDataset: tar files in which the members of one sample share a key, `000017.jpg`, `000017.cls`.

Nothing is extracted: the tars are indexed once, header by header, and an image is read where it lies.
The key is the member's name up to the first dot of its last part. The label is the member `cls` (a number or
a name), else a field of the member `json`; `txt` is a caption, not a label.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vertebra.data.dataset import Dataset, Store
from vertebra.data.folders import Folder
from vertebra.data.images import IMAGE_SUFFIXES, decode
from vertebra.data.splits import Found, OnError, assemble, leave_out, splits_of_shards
from vertebra.data.tables import LABEL_COLUMNS
from vertebra.errors import DataError, UsageError, near

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LABEL_FIELDS = {*LABEL_COLUMNS} - {"name"}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, eq=False)
class TarImages(Store):
    """Images inside uncompressed tar files.

    Attributes:
        shards: the tar files.
        shard: which of them holds an image, (n,).
        offsets: first byte of an image in its shard, (n,).
        sizes: bytes of an image, (n,).
        keys: what errors call an image, (n,) array of str.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        shard = self.shards[self.shard[index]]
        data = _bytes(shard, int(self.offsets[index]), int(self.sizes[index]))
        return decode(data, name=f"{shard}, {self.keys[index]}", least=least)

    def size_bytes(self, index: int) -> int:
        return int(self.sizes[index])


def _bytes(shard: Path, offset: int, size: int) -> bytes:
    try:
        with shard.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error.strerror}") from error


def expand(pattern: str) -> list[Path]:
    """Shards of a brace pattern: `a-{000..003}.tar` is a-000.tar to a-003.tar.

    Raises:
        DataError: a shard is missing, or the range runs backwards.
    """
    paths = [pattern]
    while match := _BRACES.search(paths[0]):
        first, last = match.groups()
        if int(first) > int(last):
            raise DataError(f"{pattern}: the range {match.group()} runs backwards; write {{{last}..{first}}}")
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        paths = [_BRACES.sub(number, path, count=1) for path in paths for number in numbers]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" * (len(missing) > 1)
        raise DataError(f"{pattern}: there is no {missing[0]}{more}; mend the range, or download the shard")
    return [Path(path) for path in paths]


def find_tars(root: Path, top: Folder) -> dict[str, list[Path]]:
    """The tars of a folder: split -> shards in order; empty where there is none.

    Raises:
        DataError: compressed tars, or tars whose names do not agree on their splits.
    """
    names = [folder.path + name for folder in top.walk() for name in folder.others]
    tars = sorted(root / name for name in names if name.lower().endswith(".tar"))
    packed = next((name for name in names if name.lower().endswith(_PACKED)), None)
    if packed and not tars and not top.count:
        raise DataError(
            f"{root / packed} is compressed, so no image in it can be reached alone; decompress or unpack it"
        )
    return splits_of_shards(root, tars)


def is_brace_pattern(path: str) -> bool:
    """Whether a path stands for several shards."""
    return bool(_BRACES.search(path))


class _Member(NamedTuple):
    shard: int
    offset: int
    size: int


def _members(shard: Path, on_error: OnError, notes: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """Key, suffix, offset and size of every file in a tar."""
    end = shard.stat().st_size
    faults = []
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                folder, slash, base = info.name.rpartition("/")
                if not info.isreg() or base.startswith(".") or "__MACOSX" in folder:
                    continue
                name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                if info.offset_data + info.size > end:
                    faults.append(f"the tar is truncated in {name}")
                elif name != info.name:
                    faults.append(f"{name}: the name is not UTF-8")
                else:
                    stem, _, suffix = base.partition(".")
                    yield f"{folder}{slash}{stem}", suffix.lower(), info.offset_data, info.size
    except (tarfile.TarError, OSError, ValueError) as error:
        faults.append(f"the tar is truncated or damaged: {error}")
    leave_out(str(shard), faults, on_error, notes)


def _samples(shards: Sequence[Path], on_error: OnError, notes: list[str]) -> dict[tuple[int, str], dict[str, _Member]]:
    """(shard, key) -> suffix -> member."""
    samples: dict[tuple[int, str], dict[str, _Member]] = {}
    for number, shard in enumerate(shards):
        for key, suffix, offset, size in _members(shard, on_error, notes):
            sample = samples.setdefault((number, key), {})
            if suffix in sample:
                raise DataError(f"{shard}: {key}.{suffix} is there twice; each key must be unique in its tar")
            sample[suffix] = _Member(number, offset, size)
    return samples


def read_webdataset(
    path: str,
    shards: Mapping[str, Sequence[Path]],
    *,
    images: str | None = None,
    labels: str | None = None,
    on_error: OnError = "raise",
    notes: Iterable[str] = (),
) -> Dataset:
    """Read tars of samples.

    Args:
        path: the path as the user gave it.
        shards: split -> tars, in order.
        images: suffix of the image's member (`left.png`), where a sample has several images.
        labels: the member (`cls`) or field of the member `json` that holds the label, where the usual names
            do not tell.
        on_error: what to do with samples without image or label, names that are not UTF-8 and the rest of a
            truncated tar.
        notes: what was said so far.

    Raises:
        DataError: a tar is damaged, or a sample lacks a member; the message names tar and key.
    """
    notes, found = list(notes), {}
    for split, tars in shards.items():
        samples = _samples(tars, on_error, notes)
        if not samples:
            raise DataError(f"{tars[0]} holds no files")
        found[split] = _found(tars, samples, (images, labels), on_error, notes)
    return assemble(path, "webdataset", found, notes=notes)


def _found(
    tars: Sequence[Path],
    samples: Mapping[tuple[int, str], Mapping[str, _Member]],
    asked: tuple[str | None, str | None],
    on_error: OnError,
    notes: list[str],
) -> Found:
    label_of = _label_reader(tars, samples, asked[1])
    if not label_of:
        suffixes = sorted({suffix for sample in samples.values() for suffix in sample})
        advice = "; if its folders are classes, unpack it" * all("/" in key for _, key in samples)
        notes.append(
            f"{tars[0].name} has no labels: no member cls or json field label, only {', '.join(suffixes)}{advice}"
        )
    members, keys, labels, faults = [], [], [], []
    for (number, key), sample in samples.items():
        where = f"{tars[number].name}, {key}"
        image = _image_of(sample, asked[0], where)
        label = label_of(where, sample) if label_of else ""
        if image is None or label is None:
            faults.append(f"{where} has no {'image' if image is None else 'label'}, only {', '.join(sample)}")
            continue
        members.append(sample[image])
        keys.append(f"{tars[number].stem}/{key}.{image}")
        labels.append(label)
    leave_out(str(tars[0].parent), faults, on_error, notes)
    columns = np.array([(m.shard, m.offset, m.size) for m in members], dtype=np.int64).reshape(-1, 3).T
    names = np.array(keys, dtype=np.str_)
    store = TarImages(tuple(tars), columns[0], columns[1], columns[2], names)
    return Found(names, labels if label_of else None, store, np.arange(len(names)))


def _image_of(sample: Mapping[str, _Member], asked: str | None, where: str) -> str | None:
    """Suffix of the sample's image."""
    if asked:
        return asked if asked in sample else None
    suffixes = [suffix for suffix in sample if f".{suffix}" in IMAGE_SUFFIXES]
    suffixes = suffixes or [s for s in sample if f".{s.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if len(suffixes) > 1:
        raise DataError(f"{where} has several images: {', '.join(suffixes)}; say images='SUFFIX'")
    return suffixes[0] if suffixes else None


class _Labels:
    """Reads a sample's label: the member `cls`, or a field of the member `json`."""

    def __init__(self, tars: Sequence[Path], member: str, field: str | None) -> None:
        self.tars, self.member, self.field = tars, member, field

    def __call__(self, where: str, sample: Mapping[str, _Member]) -> str | tuple[str, ...] | None:
        """The class name, several, or None where the sample has none."""
        value = self.content(where, sample)
        if self.field and isinstance(value, dict):
            value = value.get(self.field)
        if isinstance(value, list):
            return tuple(map(str, value))
        return None if value in (None, "") else str(value)

    def content(self, where: str, sample: Mapping[str, _Member]) -> Any:
        """The member as text, or as JSON."""
        if self.member not in sample:
            return None
        place = sample[self.member]
        try:
            text = _bytes(self.tars[place.shard], place.offset, place.size).decode().strip()
            return json.loads(text) if self.member == "json" else text
        except ValueError as error:
            raise DataError(f"{where}.{self.member} cannot be read: {error}; write the tar again") from error


def _label_reader(
    tars: Sequence[Path], samples: Mapping[tuple[int, str], Mapping[str, _Member]], asked: str | None
) -> _Labels | None:
    """How the labels of these samples are read; None where they have none."""
    members = {suffix for sample in samples.values() for suffix in sample}
    member = asked or "cls"
    if member in members:
        return _Labels(tars, member, None)
    (number, key), sample = next((item for item in samples.items() if "json" in item[1]), ((0, ""), {}))
    where = f"{tars[number].name}, {key}"
    content = _Labels(tars, "json", None).content(where, sample)
    fields = list(content) if isinstance(content, dict) else []
    chosen = [field for field in fields if (field == asked if asked else field.lower() in _LABEL_FIELDS)]
    if len(chosen) > 1:
        raise DataError(f"{where}.json: which of {', '.join(chosen)} is the label? Say labels='FIELD'")
    if asked and not chosen:
        known = ", ".join([*sorted(members), *fields])
        raise UsageError(
            f"{tars[0]} has no member or json field {asked!r}{near(asked, {*members, *fields})}; it has {known}"
        )
    return _Labels(tars, "json", chosen[0]) if chosen else None
