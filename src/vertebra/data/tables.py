"""Tables that name image files and their labels: CSV, TSV, JSON lines and Parquet.

File names are relative to the table's own folder. The columns are known by their names, in any case; where
those do not tell, `images=` and `labels=` do.

A cell holds many labels where it is a list (JSON, Parquet), or where cells of the column hold "|" or ";"; in
a column with a plural name ("labels", "tags") also ",". One separator counts for the whole column.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vertebra.data.dataset import Dataset
from vertebra.data.folders import Files, Folder
from vertebra.data.splits import Found, OnError, assemble, leave_out, split_of
from vertebra.errors import DataError, UsageError, near

FILE_COLUMNS = (
    *("file_name", "filename", "file", "filepath", "file_path", "image", "images", "image_path", "image_file"),
    *("image_name", "img", "img_path", "path"),
)
LABEL_COLUMNS = (
    *("label", "labels", "label_name", "class", "classes", "class_name", "category", "categories"),
    *("target", "targets", "tag", "tags", "name"),
)
SPLIT_COLUMNS = ("split", "subset", "partition")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_STEMS = {"metadata", "labels", "annotations"}
_PLURAL = {"labels", "classes", "categories", "targets", "tags"}


@dataclass(frozen=True)
class Table:
    """A table in memory.

    Attributes:
        path: its file.
        columns: name -> one cell a row.
        lines: where each row stands in the file, from 1.
        unit: what `lines` counts, "line" or "row".
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    unit: str = "line"

    def where(self, row: int) -> str:
        """The place of a row, for messages."""
        return f"{self.unit} {self.lines[row]}"


def arrow(module: str) -> Any:
    """A module of pyarrow, such as "pyarrow.parquet".

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError("this data needs pyarrow: pip install 'vertebra[tables]'") from error


def load_table(path: Path) -> Table:
    """Read a table by its suffix, one of `TABLE_SUFFIXES`.

    Raises:
        DataError: the file is no such table; the message names the line.
        UsageError: Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _load_parquet(path)
    try:
        table = _load_jsonl(path) if suffix == ".jsonl" else _load_csv(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if not table.lines:
        raise DataError(f"{path} has no rows")
    return table


def _load_csv(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        delimiter = _delimiter(path, first)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            rows = list(_numbered(reader))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    if twice := {name for name in header if header.count(name) > 1}:
        raise DataError(f"{path}, line 1: more than one column is called {twice.pop()!r}")
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}")
    columns = {name: [cells[index] for _, cells in rows] for index, name in enumerate(header)}
    return Table(path, columns, [line for line, _ in rows])


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line that it starts on: quoted cells may span lines."""
    start = reader.line_num + 1
    for cells in reader:
        if cells:
            yield start, cells
        start = reader.line_num + 1


def _load_jsonl(path: Path) -> Table:
    records, lines = [], []
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}, line {line}: no JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {line}: {type(record).__name__} where an object {{...}} is expected")
            records.append(record)
            lines.append(line)
    names = dict.fromkeys(name for record in records for name in record)
    return Table(path, {name: [record.get(name) for record in records] for name in names}, lines)


def _load_parquet(path: Path) -> Table:
    parquet, pyarrow = arrow("pyarrow.parquet"), arrow("pyarrow")
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from error
    return Table(path, table.to_pydict(), range(1, table.num_rows + 1), "row")


def find_tables(root: Path, top: Folder) -> dict[str, Path]:
    """Tables of a folder that name images: split -> table, or "" -> the one table of all splits.

    Looks for `metadata`, `labels` or `annotations` in the folder, for tables named as splits, and for one of
    the former in each split's folder. A table without a file column (a list of class names, say) is none.

    Raises:
        DataError: two tables both say it.
    """
    found: dict[str, Path] = {}
    for name in top.others:
        stem = Path(name).stem.lower()
        if stem in _STEMS or split_of(stem):
            _add_table(found, split_of(stem) or "", root / name)
    if "" in found and len(found) > 1:
        raise DataError(f"{root} has several tables: {', '.join(t.name for t in found.values())}; give one by its path")
    if found:
        return found
    for folder in top.filled.values():
        for name in folder.others if split_of(folder.path.strip("/")) else ():
            if Path(name).stem.lower() in _STEMS:
                _add_table(found, split_of(folder.path.strip("/")) or "", root / folder.path / name)
    return found


def _add_table(found: dict[str, Path], split: str, table: Path) -> None:
    if table.suffix.lower() not in TABLE_SUFFIXES or not _known(header(table), FILE_COLUMNS):
        return
    if split in found:
        raise DataError(f"{found[split]} and {table} both list images; give one of them by its path")
    found[split] = table


def header(table: Path) -> list[str]:
    """Names of a table's columns, from its first line or its schema; columns that hold no text are left out."""
    if table.suffix.lower() == ".parquet":
        schema = arrow("pyarrow.parquet").read_schema(table)
        return [field.name for field in schema if str(field.type).endswith(("string", "string_view"))]
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    if table.suffix.lower() == ".jsonl":
        return re.findall(r'"([^"]*)"\s*:', first)
    return [name.strip().strip('"') for name in first.split(_delimiter(table, first))]


def _delimiter(path: Path, first: str) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)


def _known(names: Iterable[str], columns: Sequence[str]) -> list[str]:
    """Those of a table's columns that bear one of the names `columns`, in that order of preference."""
    by_name = {name.lower(): name for name in names}
    return [by_name[column] for column in columns if column in by_name]


class _Row(NamedTuple):
    """A row that names a file: the file relative to the root, its split, its label."""

    file: str
    split: str
    label: str | tuple[str, ...] | None


def read_tables(
    path: str,
    root: Path,
    tables: Mapping[str, Path],
    *,
    images: str | None = None,
    labels: str | None = None,
    on_error: OnError = "raise",
    notes: Iterable[str] = (),
) -> Dataset:
    """Read images and labels that tables name.

    Args:
        path: the path as the user gave it.
        root: the folder that file names cannot leave.
        tables: split -> table; the split "" stands for one table with all splits.
        images: the column with the file names, where the usual names do not tell.
        labels: the column with the labels, likewise.
        on_error: what to do with rows whose file is missing, whose label is empty, or that repeat another:
            "skip" leaves them out with a note.
        notes: what was said so far.

    Raises:
        DataError: a column cannot be told, or rows are at fault; the message names their lines.
        UsageError: `images` or `labels` is no column.
    """
    notes, rows = list(notes), []
    for split, file in tables.items():
        rows += _rows(load_table(file), root, split, (images, labels), on_error, notes)
    found = {}
    for split in dict.fromkeys(row.split for row in rows):
        chosen = [row for row in rows if row.split == split]
        files = np.array([row.file for row in chosen], dtype=np.str_)
        marks: list = [row.label for row in chosen]
        found[split] = Found(files, None if marks[0] is None else marks, Files(root, files), np.arange(len(files)))
    return assemble(path, "table", found, notes=notes)


def _rows(
    table: Table, root: Path, split: str, asked: tuple[str | None, str | None], on_error: OnError, notes: list[str]
) -> list[_Row]:
    """The rows of one table, less those at fault."""
    files = table.columns[_file_column(table, asked[0])]
    column = _label_column(table, asked[1], notes)
    labels = _labels(column, table.columns[column], notes) if column else [None] * len(files)
    splits = [split or "all"] * len(files)
    if not split and (columns := _known(table.columns, SPLIT_COLUMNS)):
        splits = [split_of(str(cell)) for cell in table.columns[columns[0]]]
    labelled = {word for word, label in zip(splits, labels, strict=True) if label is not None}
    inside = _Inside(table.path.parent, root)
    rows: list[_Row] = []
    faults: list[str] = []
    lines: dict[str, int] = {}
    for number, (cell, word, label) in enumerate(zip(files, splits, labels, strict=True)):
        file = inside(str(cell or "").strip(), table, number)
        fault = None
        if file in lines:
            fault = f"{file} is listed again ({table.where(lines[file])})"
        elif not file or not inside.has(file):
            fault = f"no such file: {cell}"
        elif word is None:
            fault = f"{table.columns[columns[0]][number]!r} is no split; splits are train, val and test"
        elif label is None and word in labelled:
            fault = f"{file} has no label"
        if fault or word is None:
            faults.append(f"{table.where(number)}: {fault}")
            continue
        lines[file] = number
        rows.append(_Row(file, word, label))
    leave_out(str(table.path), faults, on_error, notes)
    return rows


class _Inside:
    """File names of a table, relative to the root that they cannot leave."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = os.path.abspath(folder)  # noqa: PTH100 - keeps links, which Path.resolve follows
        self.roots = (os.path.abspath(root), os.path.realpath(root))  # noqa: PTH100

    def __call__(self, cell: str, table: Table, row: int) -> str:
        full = os.path.normpath(os.path.join(self.folder, cell.replace("\\", "/")))  # noqa: PTH118
        for root in self.roots:
            if full.startswith(root + os.sep):
                return full[len(root) + 1 :].replace(os.sep, "/")
            if full == root:
                return ""
        raise DataError(f"{table.path}, {table.where(row)}: {cell} lies outside {self.roots[0]}; move it inside")

    def has(self, file: str) -> bool:
        return os.path.isfile(f"{self.roots[0]}/{file}")  # noqa: PTH113 - a Path a row would cost seconds


def _asked(table: Table, column: str) -> str:
    if column not in table.columns:
        known = ", ".join(table.columns)
        raise UsageError(f"{table.path} has no column {column!r}{near(column, table.columns)}; columns: {known}")
    return column


def _file_column(table: Table, asked: str | None) -> str:
    if asked:
        return _asked(table, asked)
    columns = _known(table.columns, FILE_COLUMNS)
    if len(columns) > 1:  # the one whose first cell is a file there
        columns = [c for c in columns if (table.path.parent / str(table.columns[c][0]).strip()).is_file()] or columns
    if len(columns) == 1:
        return columns[0]
    seen = f"which of {', '.join(columns)} names the files?" if columns else f"none of {', '.join(table.columns)} does"
    raise DataError(
        f"{table.path}: no column surely names the files: {seen} Say images='COLUMN'; usual: file_name, image"
    )


def _label_column(table: Table, asked: str | None, notes: list[str]) -> str | None:
    """The column of the labels; None where the table clearly has none."""
    if asked:
        return _asked(table, asked)
    columns = _known(table.columns, LABEL_COLUMNS)
    if len(columns) > 1:
        columns = _one_of_equal(table, columns)
    if len(columns) == 1:
        return columns[0]
    if columns:
        raise DataError(f"{table.path}: which of {', '.join(columns)} is the label? Say labels='COLUMN'")
    usual = {*FILE_COLUMNS, *SPLIT_COLUMNS, *CAPTION_COLUMNS, "id", "width", "height"}
    if strange := [name for name in table.columns if name.lower() not in usual]:
        raise DataError(f"{table.path}: no column is called label; say labels='COLUMN', one of {', '.join(strange)}")
    notes.append(f"{table.path.name} has no column with labels")
    return None


def _one_of_equal(table: Table, columns: list[str]) -> list[str]:
    """Of columns that tell the same classes apart (a number and a name, say), one with words."""
    cells = [[str(cell) for cell in table.columns[column]] for column in columns]
    together = len(set(zip(*cells, strict=True)))
    if any(len(set(column)) != together for column in cells):
        return columns
    words = [name for name, column in zip(columns, cells, strict=True) if not all(map(str.isdecimal, column))]
    return (words or columns)[:1]


def _labels(name: str, cells: Sequence[Any], notes: list[str]) -> list[str | None] | list[tuple[str, ...]]:
    """Class names: one a cell, or a tuple a cell where the column holds many."""
    if any(isinstance(cell, list | tuple) for cell in cells):
        return [tuple(dict.fromkeys(map(_text, cell or ()))) for cell in cells]
    words = [_text(cell) for cell in cells]
    for separator in "|;," if name.lower() in _PLURAL else "|;":
        if any(separator in word for word in words):
            notes.append(f"cells of {name} hold many labels, separated by {separator!r}")
            parts = ([part.strip() for part in word.split(separator)] for word in words)
            return [tuple(dict.fromkeys(filter(None, part))) for part in parts]
    return [word or None for word in words]


def _text(cell: Any) -> str:
    """A cell as a class name: whole numbers without point, nothing for what is missing."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell).strip()
