"""Hugging Face datasets on disk: what `save_to_disk` writes, and the Parquet shards of the hub.

Arrow files are memory-mapped: an image is read where it lies. Parquet has no way to a single row: a row group
is decompressed at once and the last few are kept, so reading in order costs each group once and reading at
random a group an image.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vertebra.data.dataset import Dataset, Store
from vertebra.data.folders import Folder
from vertebra.data.images import decode
from vertebra.data.splits import Found, OnError, assemble, leave_out, split_of, splits_of_shards
from vertebra.data.tables import FILE_COLUMNS, LABEL_COLUMNS, arrow
from vertebra.errors import DataError, UsageError, near

_CHUNKS_KEPT = 4
_BINARY_COLUMNS = {*FILE_COLUMNS, "bytes", "image_bytes", "jpg", "jpeg", "png", "webp"}


@dataclass(frozen=True, eq=False)
class Shards(Store):
    """Images in a column of Arrow or Parquet files, `bytes` or `struct<bytes, path>`.

    A chunk is what is read at once: a record batch of an Arrow file, a row group of a Parquet file.

    Attributes:
        root: the folder that images given by their path must lie in.
        files: the shards, in order.
        column: the column of the images.
    """

    root: Path
    files: tuple[Path, ...]
    column: str

    def __reduce__(self) -> tuple:
        return type(self), (self.root, self.files, self.column)  # open files stay in this process

    @cached_property
    def _chunks(self) -> list["_Chunk"]:
        return [chunk for file in self.files for chunk in _chunks(file, self.column)]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(chunk.rows for chunk in self._chunks)])

    @cached_property
    def _recent(self) -> "_Recent":
        return _Recent()

    def _locate(self, index: int) -> tuple["_Chunk", int]:
        """The chunk of a row, and the row's place in it."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._chunks[number], index - int(self._starts[number])

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        chunk, row = self._locate(index)
        name = f"{chunk.file}, row {chunk.first + row}"
        value = self._recent(chunk)[row].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        return decode(self._file(path, name) if data is None else data, name=name, least=least)

    def _file(self, path: str | None, name: str) -> Path:
        if not path:
            raise DataError(f"{name}: no image; the row has neither bytes nor a path")
        file = Path(os.path.normpath(self.root / path))
        if not file.is_relative_to(self.root):
            raise DataError(f"{name}: {path} lies outside {self.root}; save the dataset with its images embedded")
        return file

    def size_bytes(self, index: int) -> int:
        """Bytes of the encoded image; in Parquet the mean of its row group, as single sizes need all the data."""
        chunk, row = self._locate(index)
        if chunk.mean_bytes:
            return chunk.mean_bytes
        array = chunk.read()
        data = array.field("bytes") if hasattr(array, "field") else array
        return len(data[row].as_buffer() or b"")


class _Chunk(NamedTuple):
    """Rows of a shard that are read at once."""

    file: Path
    first: int
    rows: int
    read: Callable[[], Any]
    mean_bytes: int = 0


class _Recent:
    """The chunks that were read last."""

    def __init__(self) -> None:
        self.arrays: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self.lock = Lock()

    def __call__(self, chunk: _Chunk) -> Any:
        with self.lock:  # one thread decompresses, the others wait for its group
            key = chunk.file, chunk.first
            if key not in self.arrays:
                self.arrays[key] = chunk.read()
            self.arrays.move_to_end(key)
            if len(self.arrays) > _CHUNKS_KEPT:
                self.arrays.popitem(last=False)
            return self.arrays[key]


def _chunks(file: Path, column: str) -> list[_Chunk]:
    """The chunks of one shard."""
    if file.suffix == ".arrow":
        arrays = open_arrow(file).column(column).chunks
        firsts = np.cumsum([0, *map(len, arrays)]).tolist()
        return [
            _Chunk(file, first, len(array), partial(_same, array)) for first, array in zip(firsts, arrays, strict=False)
        ]
    parquet = open_parquet(file)
    groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
    firsts = np.cumsum([0, *(group.num_rows for group in groups)]).tolist()
    return [
        _Chunk(
            file, firsts[number], group.num_rows, partial(_group, parquet, number, column), _mean_bytes(group, column)
        )
        for number, group in enumerate(groups)
    ]


def _same(array: Any) -> Any:
    return array


def _group(parquet: Any, number: int, column: str) -> Any:
    return parquet.read_row_group(number, columns=[column]).column(column).combine_chunks()


def _mean_bytes(group: Any, column: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    total = sum(c.total_compressed_size for c in columns if c.path_in_schema.partition(".")[0] == column)
    return total // max(1, group.num_rows)


def open_arrow(file: Path) -> Any:
    """A memory-mapped Arrow table, streamed (as Hugging Face writes) or not.

    Raises:
        DataError: the file is no Arrow file, or truncated.
    """
    pyarrow = arrow("pyarrow")
    try:
        source = pyarrow.memory_map(str(file))
        if source.read(6) == b"ARROW1":
            return pyarrow.ipc.open_file(source).read_all()
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Arrow file that can be read: {error}; save the dataset again") from error


def open_parquet(file: Path) -> Any:
    """A Parquet file of which only the schema and the places of the row groups were read.

    Raises:
        DataError: the file is no Parquet file, or truncated.
    """
    pyarrow = arrow("pyarrow")
    try:
        return arrow("pyarrow.parquet").ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file that can be read: {error}; download it again") from error


def holds_images(shard: Path) -> bool:
    """Whether a Parquet file has a column of encoded images."""
    return bool(_image_columns(open_parquet(shard).schema_arrow, {}))


def find_shards(root: Path, top: Folder) -> dict[str, list[Path]]:
    """Shards of a Hugging Face dataset in a folder: split -> files in order; empty where there is none.

    Raises:
        DataError: a saved dataset that lacks files or was saved with an order apart from its rows, or several
            configurations side by side.
    """
    if "dataset_dict.json" in top.others:
        splits = _json(root / "dataset_dict.json").get("splits", sorted(top.folders))
        return {split_of(split) or split: _saved(root / split) for split in splits}
    if "state.json" in top.others and "dataset_info.json" in top.others:
        return {split_of(str(_json(root / "state.json").get("_split"))) or "all": _saved(root)}
    shards = [root / f.path / name for f in top.walk() for name in f.others if name.endswith((".parquet", ".arrow"))]
    shards = [shard for shard in shards if shard.suffix == ".arrow" or holds_images(shard)]
    folders = {shard.parent.parent if split_of(shard.parent.name) else shard.parent for shard in shards}
    if len(folders) > 1:
        raise DataError(f"{root} has shards in {len(folders)} folders; give one, as {min(folders)}")
    return splits_of_shards(root, sorted(shards))


def _saved(folder: Path) -> list[Path]:
    """The shards of one split that `save_to_disk` wrote; caches that lie beside them are not among them."""
    state = _json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder} keeps its order in a file apart; call flatten_indices() before save_to_disk()")
    shards = [folder / entry["filename"] for entry in state.get("_data_files", ())]
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard} is missing, though {folder / 'state.json'} lists it; copy the dataset again")
    return shards


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; copy the dataset again") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}; copy the dataset again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object; copy the dataset again")
    return content


def read_huggingface(
    path: str,
    root: Path,
    shards: Mapping[str, Sequence[Path]],
    *,
    images: str | None = None,
    labels: str | None = None,
    on_error: OnError = "raise",
    notes: Iterable[str] = (),
) -> Dataset:
    """Read a Hugging Face dataset.

    Class names come from the dataset's `ClassLabel`, in its order; a label of -1 or null is none.

    Args:
        path: the path as the user gave it.
        root: the folder of the dataset.
        shards: split -> Arrow or Parquet files, in order.
        images: the column of the images, where there is more than one.
        labels: the column of the labels, likewise.
        on_error: what to do with rows without a label in a split where others have one.
        notes: what was said so far.

    Raises:
        DataError: a file cannot be read, or a column cannot be told.
        UsageError: `images` or `labels` is no column; or pyarrow is not installed.
    """
    notes, found, classes = list(notes), {}, None
    for split, files in shards.items():
        schema = _schema(files[0])
        features = _features(schema, files[0])
        image_column = _choose(files[0], "images", images, _image_columns(schema, features), schema.names)
        label_column = _label_column(files[0], labels, schema, features)
        store = Shards(root, tuple(files), image_column)
        marks = None
        if label_column:
            stated = _class_names(features.get(label_column))
            classes = stated or classes
            marks = _labels(files, label_column, stated)
        found[split] = _found(split, store, marks, _rows(files), on_error, notes)
    return assemble(path, "huggingface", found, classes, notes)


def _schema(file: Path) -> Any:
    return open_arrow(file).schema if file.suffix == ".arrow" else open_parquet(file).schema_arrow


def _features(schema: Any, file: Path) -> Mapping[str, Any]:
    """What Hugging Face wrote of the columns, in the file or beside it; empty where it wrote nothing."""
    if text := (schema.metadata or {}).get(b"huggingface"):
        return json.loads(text).get("info", {}).get("features") or {}
    beside = file.parent / "dataset_info.json"
    return _json(beside).get("features") or {} if beside.is_file() else {}


def _image_columns(schema: Any, features: Mapping[str, Any]) -> list[str]:
    typed = [
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"
    ]
    if typed:
        return typed
    types = arrow("pyarrow").types
    structs = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    encoded = (f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type))
    binary = [name for name in encoded if name.lower() in _BINARY_COLUMNS]
    return structs or binary


def _class_names(feature: Any) -> Sequence[str] | None:
    """Names of a `ClassLabel`, or of a list of them."""
    if isinstance(feature, list):
        feature = {"feature": feature[0]} if feature else None
    if not isinstance(feature, dict):
        return None
    return feature.get("names") or _class_names(feature.get("feature"))


def _label_column(file: Path, asked: str | None, schema: Any, features: Mapping[str, Any]) -> str | None:
    columns = [name for name in schema.names if _class_names(features.get(name))]
    columns = columns or [name for name in schema.names if name.lower() in LABEL_COLUMNS]
    return _choose(file, "labels", asked, columns, schema.names) if columns or asked else None


def _choose(file: Path, what: str, asked: str | None, columns: Sequence[str], known: Sequence[str]) -> str:
    """The one column that it can be."""
    if asked and asked not in known:
        raise UsageError(f"{file} has no column {asked!r}{near(asked, known)}; columns: {', '.join(known)}")
    if asked:
        return asked
    if len(columns) == 1:
        return columns[0]
    seen = f"{', '.join(columns)} could be" if columns else "no column seems to be"
    raise DataError(f"{file}: {seen} the {what}; say {what}='COLUMN', one of {', '.join(columns or known)}")


def _rows(files: Sequence[Path]) -> int:
    return sum(open_arrow(f).num_rows if f.suffix == ".arrow" else open_parquet(f).metadata.num_rows for f in files)


def _labels(files: Sequence[Path], column: str, names: Sequence[str] | None) -> list:
    """A class name a row, a tuple of names, or None."""
    values: list[Any] = []
    for file in files:
        table = open_arrow(file).select([column]) if file.suffix == ".arrow" else open_parquet(file).read([column])
        values += table.column(column).to_pylist()
    if any(isinstance(value, list) for value in values):
        return [tuple(_name(v, names, column) for v in value or ()) for value in values]
    return [None if value in (None, -1) else _name(value, names, column) for value in values]


def _name(value: Any, names: Sequence[str] | None, column: str) -> str:
    if names is None or isinstance(value, str):
        return str(value)
    if not 0 <= value < len(names):
        raise DataError(f"the column {column} holds {value}, and the dataset names {len(names)} classes; save it again")
    return names[int(value)]


def _found(split: str, store: Shards, labels: list | None, count: int, on_error: OnError, notes: list[str]) -> Found:
    """One split, without the rows that lack a label where others have one."""
    names = np.array([f"{split}/{row:06d}" for row in range(count)], dtype=np.str_)
    rows = np.arange(count)
    if labels is None or all(label is None for label in labels):
        return Found(names, None, store, rows)
    bare = [row for row in rows.tolist() if labels[row] is None]
    leave_out(split, [f"row {row} has no label" for row in bare], on_error, notes)
    kept = np.delete(rows, bare)
    return Found(names[kept], [labels[row] for row in kept], store, kept)
