"""`read`: what lies at this path? The layout is recognised by its marks, and never guessed.

In this order:

1. a brace pattern (`a-{000..003}.tar`) or a file: a tar, a table, a Parquet file with images;
2. the word `digits`, where no file or folder of that name is: the built-in handwriting;
3. a folder whose marks are of a layout that is not read yet (boxes, masks, videos): an error that says so;
4. a Hugging Face dataset: `dataset_dict.json`, or `state.json` with Arrow files, or Parquet with images;
5. WebDataset: tars;
6. a table called metadata, labels or annotations, or one a split, that names files;
7. folders with images: one folder a class, below folders for the splits where there are any;
8. images only: no labels.

Two that hold at once, such as a table beside class folders, are an error that asks; `layout=` answers.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vertebra.data.dataset import Dataset
from vertebra.data.digits import digits
from vertebra.data.folders import Folder, is_image, list_folder, read_flat, read_imagefolder
from vertebra.data.huggingface import find_shards, holds_images, read_huggingface
from vertebra.data.splits import OnError, split_of
from vertebra.data.tables import TABLE_SUFFIXES, find_tables, read_tables
from vertebra.data.webdataset import expand, find_tars, is_brace_pattern, read_webdataset
from vertebra.errors import DataError, UsageError, near

LAYOUTS = ("imagefolder", "flat", "table", "huggingface", "webdataset", "digits")
"""What `read` can be told to expect."""

READS = (
    "class folders (CLASS/x.jpg or train/CLASS/x.jpg), a folder of images, a table (metadata.csv with file_name and "
    "label), a Hugging Face dataset (save_to_disk or Parquet), WebDataset tars, or the word digits"
)
"""What is read, in words, for messages."""

_ARCHIVES = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}


def read(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    images: str | None = None,
    labels: str | None = None,
    on_error: OnError = "raise",
) -> Dataset:
    """Read the dataset at `path`: names, targets and classes now, pixels when they are asked for.

    Args:
        path: a folder, a table, a tar, a brace pattern of tars, or "digits" for the built-in handwriting.
        layout: one of `LAYOUTS`, where more than one would do.
        images: column (table, huggingface) or member (webdataset) of the images, where the usual names do
            not tell.
        labels: column, member or json field of the labels, likewise.
        on_error: what becomes of entries that cannot be used, such as rows whose file is missing: "raise", or
            "skip" with a note. Images that cannot be decoded show later: see `vertebra.data.checking`.

    Raises:
        DataError: nothing there, nothing recognised, more than one layout, or broken; the message says what
            was looked for and what was found.
        UsageError: an unknown layout or column, or an option that the layout does not take.
    """
    path = os.fspath(path)
    _check_options(layout, on_error)
    if layout == "digits" or (path == "digits" and not Path(path).exists()):
        dataset = digits()
    elif is_brace_pattern(path):
        dataset = read_webdataset(path, {"all": expand(path)}, images=images, labels=labels, on_error=on_error)
    elif Path(path).is_dir():
        dataset = _read_folder(path, layout, images, labels, on_error)
    else:
        dataset = _read_file(path, images, labels, on_error)
    if layout not in (None, dataset.layout):
        raise UsageError(f"{path} is read as {dataset.layout}, not as {layout}; leave layout= out")
    if dataset.layout in ("imagefolder", "flat", "digits") and (images or labels):
        raise UsageError(f"{path} is read as {dataset.layout}, where images= and labels= mean nothing; leave them out")
    return dataset


def _check_options(layout: str | None, on_error: str) -> None:
    if layout not in (None, *LAYOUTS):
        raise UsageError(f"no layout is called {layout!r}{near(str(layout), LAYOUTS)}; layouts: {', '.join(LAYOUTS)}")
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error is {on_error!r}; it can be raise or skip")


def _read_file(path: str, images: str | None, labels: str | None, on_error: OnError) -> Dataset:
    file = Path(path)
    if not file.exists():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{path}: there is nothing of that name{near(file.name, siblings)}")
    suffix = file.suffix.lower()
    if suffix == ".tar":
        return read_webdataset(path, {"all": [file]}, images=images, labels=labels, on_error=on_error)
    if suffix == ".parquet" and holds_images(file):
        return read_huggingface(path, file.parent, {"all": [file]}, images=images, labels=labels, on_error=on_error)
    if suffix in TABLE_SUFFIXES:
        return read_tables(path, file.parent, {"": file}, images=images, labels=labels, on_error=on_error)
    if suffix in _ARCHIVES:
        raise DataError(f"{path} is packed; unpack it and give the folder")
    raise DataError(
        f"{path} is {'one image' if is_image(path) else 'a file of a kind that is not read'}; read are {READS}"
    )


def _read_folder(path: str, layout: str | None, images: str | None, labels: str | None, on_error: OnError) -> Dataset:
    root = Path(path)
    top, notes = list_folder(root)
    if layout == "imagefolder":
        return read_imagefolder(path, top, notes, certain=True)
    if layout == "flat":
        return read_flat(path, top, notes)
    if layout is None and (mark := _not_read_yet(top)):
        raise DataError(
            f"{path} looks like {mark}, which is not read yet; read are {READS}. "
            "If it is one of these, say so: layout='imagefolder'"
        )
    choice = {"images": images, "labels": labels, "on_error": on_error, "notes": notes}
    if layout in (None, "huggingface") and (shards := find_shards(root, top)):
        _refuse_both(path, layout, sorted(top.filled) or top.images, shards)
        return read_huggingface(path, root, shards, **choice)
    if layout in (None, "webdataset") and (tars := find_tars(root, top)):
        _refuse_both(path, layout, sorted(top.filled) or top.images, tars)
        return read_webdataset(path, tars, **choice)
    if layout in (None, "table") and (tables := find_tables(root, top)):
        _refuse_both(path, layout, _class_folders(top), {split: [table] for split, table in tables.items()})
        return read_tables(path, root, tables, **choice)
    if layout:
        raise DataError(f"{path} has no files of the layout {layout}; it has {_content(top)}")
    if not top.count:
        raise DataError(f"{path}: nothing that is read; looked for {READS}; found {_content(top)}")
    return read_imagefolder(path, top, notes) if _has_classes(top) else read_flat(path, top, notes)


def _has_classes(top: Folder) -> bool:
    """Whether folders may be classes: there are some that are no splits, or splits with folders in them."""
    return any(folder.filled or not split_of(name) for name, folder in top.filled.items())


def _class_folders(top: Folder) -> list[str]:
    """Folders that may be classes, or splits of classes; a single one may just hold a table's images."""
    folders = [name for name, folder in top.filled.items() if folder.filled or not split_of(name)]
    return folders if len(folders) > 1 or any(map(split_of, folders)) else []


def _refuse_both(path: str, layout: str | None, images: Sequence[str], files: Mapping[str, Sequence[Path]]) -> None:
    """Raise where tables or shards say what is what and images in folders may say so too."""
    if layout is None and images:
        file = next(iter(files.values()))[0]
        raise DataError(
            f"{path} has {file.name} and also images in the usual places ({', '.join(images[:5])}); "
            f"give {file} to read that, or say layout='imagefolder' or layout='flat'"
        )


def _not_read_yet(top: Folder) -> str | None:
    """The layout whose marks a folder bears, where it is one that this version does not read."""
    names = {name.lower() for name in top.filled}
    if "images" in names and names & {"masks", "mask", "annotations", "labels", "segmentation", "gt"}:
        return "images with masks"
    if "jpegimages" in names and names & {"segmentationclass", "segmentationobject"}:
        return "VOC masks"
    if {"gt", "lq"} <= names or ("hr" in names and any(name.startswith("lr") for name in names)):
        return "pairs for restoration"
    for folder in top.walk():
        if mark := _mark(folder):
            return mark
    videos = [name for folder in top.walk() for name in folder.others if Path(name).suffix.lower() in _VIDEOS]
    return f"videos ({videos[0]})" if videos and not top.count else None


def _mark(folder: Folder) -> str | None:
    """The mark that a folder's files bear."""
    name = folder.path.rstrip("/").rpartition("/")[2].lower()
    for file in folder.others:
        stem, _, suffix = file.lower().rpartition(".")
        if suffix == "json" and (
            name == "annotations" or stem.startswith(("instances", "_annotations", "annotations"))
        ):
            return f"COCO boxes or masks ({folder.path}{file})"
        if suffix == "xml" and (name == "annotations" or folder.images):
            return f"VOC boxes ({folder.path}{file})"
        if (suffix == "txt" and name == "labels") or (suffix in ("yaml", "yml") and stem in ("data", "dataset")):
            return f"YOLO boxes ({folder.path}{file})"
        if file.lower() == "captions.json":
            return f"images with captions ({folder.path}{file})"
    return None


def _content(top: Folder) -> str:
    """What lies in a folder, in a line."""
    folders = f"folders {', '.join(list(top.folders)[:5])}" if top.folders else "no folders"
    files = f"files {', '.join([*top.images, *top.others][:5])}" if top.images or top.others else "no files"
    return f"{folders}; {files}"
