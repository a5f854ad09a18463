"""`read`: what lies at this path? The layout is recognised by its marks, and never guessed.

In this order:

1. a brace pattern (`a-{000..003}.tar`) or a file: a tar, a table, a Parquet file with images, the json of COCO boxes
   or captions, a yaml of YOLO, a video;
2. the words `digits` and `sprites`, where no file or folder of that name is: the built-in data;
3. a Hugging Face dataset: `dataset_dict.json`, or `state.json` with Arrow files, or Parquet with images;
4. WebDataset: tars;
5. marks of boxes, masks, words, pairs or videos: each layout of `MARKED` looks for its own;
6. a table called metadata, labels or annotations, or one a split, that names files;
7. folders with images: one folder a class, below folders for the splits where there are any;
8. images only: no labels.

Two that hold at once, such as a table beside class folders, or VOC's boxes beside its masks, are an error that asks;
`layout=` answers. Where one tells all that the other does, as a COCO json beside xml files or masks of the same images
(`TELLS_MORE`), it is read, and a note names the other.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vertebra.data.dataset import Dataset
from vertebra.data.digits import digits
from vertebra.data.folders import Folder, is_image, list_folder, read_flat, read_imagefolder
from vertebra.data.huggingface import find_shards, holds_images, read_huggingface
from vertebra.data.splits import OnError, split_of
from vertebra.data.tables import TABLE_SUFFIXES, find_tables, read_tables
from vertebra.data.webdataset import expand, find_tars, is_brace_pattern, read_webdataset
from vertebra.errors import DataError, UsageError, near

MARKED = {
    "panoptic": "panoptic",
    "coco": "coco",
    "voc": "voc",
    "yolo": "yolo",
    "masks": "masks",
    "pairs": "pairs",
    "image_text": "image_text",
    "videos": "videos",
}
"""Layouts of boxes, masks, words, pairs and videos -> the module with `find_LAYOUT` and `read_LAYOUT`."""

TELLS_MORE = {"panoptic": {"coco"}, "coco": {"voc", "yolo", "masks"}}
"""Layout -> those that say less of the same images where both are found."""

LAYOUTS = ("imagefolder", "flat", "table", "huggingface", "webdataset", *MARKED, "digits", "sprites")
"""What `read` can be told to expect."""

READS = (
    "class folders (CLASS/x.jpg or train/CLASS/x.jpg), a folder of images, a table (metadata.csv with file_name and "
    "label), a Hugging Face dataset (save_to_disk or Parquet), WebDataset tars, COCO json, VOC xml, YOLO txt, masks, "
    "panoptic PNGs, pairs for restoration, captions, videos, or the words digits and sprites"
)
"""What is read, in words, for messages."""

_ARCHIVES = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}


def read(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    images: str | None = None,
    labels: str | None = None,
    degraded: str | None = None,
    on_error: OnError = "raise",
) -> Dataset:
    """Read the dataset at `path`: names, targets and classes now, pixels when they are asked for.

    Args:
        path: a folder, a table, a tar, a brace pattern of tars, a json of COCO, a yaml of YOLO, a video, or "digits"
            or "sprites" for what is built in.
        layout: one of `LAYOUTS`, where more than one would do.
        images: column (table, huggingface) or member (webdataset) of the images, where the usual names do
            not tell.
        labels: column, member or json field of the labels, likewise.
        degraded: folder of the degraded images (pairs), where there are several, such as "LR_bicubic_x2".
        on_error: what becomes of entries that cannot be used, such as rows whose file is missing: "raise", or
            "skip" with a note. Images that cannot be decoded show later: see `vertebra.data.checking`.

    Raises:
        DataError: nothing there, nothing recognised, more than one layout, or broken; the message says what
            was looked for and what was found.
        UsageError: an unknown layout or column, or an option that the layout does not take.
    """
    path = os.fspath(path)
    _check_options(layout, on_error)
    if (word := layout or path) in BUILT_IN and (layout or not Path(path).exists()):
        dataset = _built_in(word)
    elif is_brace_pattern(path):
        dataset = read_webdataset(path, {"all": expand(path)}, images=images, labels=labels, on_error=on_error)
    elif Path(path).is_dir():
        dataset = _read_folder(path, layout, images, labels, degraded, on_error)
    else:
        dataset = _read_file(path, layout, images, labels, on_error)
    if layout not in (None, dataset.layout):
        raise UsageError(f"{path} is read as {dataset.layout}, not as {layout}; leave layout= out")
    if dataset.layout not in COLUMNED and (images or labels):
        raise UsageError(f"{path} is read as {dataset.layout}, where images= and labels= mean nothing; leave them out")
    if dataset.layout != "pairs" and degraded:
        raise UsageError(f"{path} is read as {dataset.layout}, where degraded= means nothing; leave it out")
    return dataset


BUILT_IN = ("digits", "sprites")
COLUMNED = ("table", "huggingface", "webdataset")
"""Layouts in which images and labels have names that can be told."""


def _built_in(word: str) -> Dataset:
    if word == "digits":
        return digits()
    from vertebra.data.sprites import sprites

    return sprites(objects=1)  # one class an image, so that it can be battled; boxes and masks come with it


def _check_options(layout: str | None, on_error: str) -> None:
    if layout not in (None, *LAYOUTS):
        raise UsageError(f"no layout is called {layout!r}{near(str(layout), LAYOUTS)}; layouts: {', '.join(LAYOUTS)}")
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error is {on_error!r}; it can be raise or skip")


def _read_file(path: str, layout: str | None, images: str | None, labels: str | None, on_error: OnError) -> Dataset:
    file = Path(path)
    if not file.exists():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{path}: there is nothing of that name{near(file.name, siblings)}")
    suffix = file.suffix.lower()
    if suffix == ".tar":
        return read_webdataset(path, {"all": [file]}, images=images, labels=labels, on_error=on_error)
    if suffix == ".parquet" and holds_images(file):
        return read_huggingface(path, file.parent, {"all": [file]}, images=images, labels=labels, on_error=on_error)
    if dataset := _read_marked_file(path, file, layout, on_error):
        return dataset
    if suffix in TABLE_SUFFIXES:
        return read_tables(path, file.parent, {"": file}, images=images, labels=labels, on_error=on_error)
    if suffix in _ARCHIVES:
        raise DataError(f"{path} is packed; unpack it and give the folder")
    raise DataError(
        f"{path} is {'one image' if is_image(path) else 'a file of a kind that is not read'}; read are {READS}"
    )


def _read_folder(
    path: str, layout: str | None, images: str | None, labels: str | None, degraded: str | None, on_error: OnError
) -> Dataset:
    root = Path(path)
    top, notes = list_folder(root)
    if layout == "imagefolder":
        return read_imagefolder(path, top, notes, certain=True)
    if layout == "flat":
        return read_flat(path, top, notes)
    choice = {"images": images, "labels": labels, "on_error": on_error, "notes": notes}
    if layout in (None, "huggingface") and (shards := find_shards(root, top)):
        _refuse_both(path, layout, sorted(top.filled) or top.images, shards)
        return read_huggingface(path, root, shards, **choice)
    if layout in (None, "webdataset") and (tars := find_tars(root, top)):
        _refuse_both(path, layout, sorted(top.filled) or top.images, tars)
        return read_webdataset(path, tars, **choice)
    if layout in (None, *MARKED) and (dataset := _read_marked(path, root, top, layout, degraded, on_error, notes)):
        return dataset
    if layout in (None, "table") and (tables := find_tables(root, top)):
        _refuse_both(path, layout, _class_folders(top), {split: [table] for split, table in tables.items()})
        return read_tables(path, root, tables, **choice)
    if layout:
        raise DataError(f"{path} has no files of the layout {layout}; it has {_content(top)}")
    if layout is None and (file := _unclaimed(top)):
        raise DataError(
            f"{path}: {file} is called as annotations are and holds none that are read (is it whole?); mend it, or say "
            "layout='imagefolder' or layout='flat' to leave it out"
        )
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


def _read_marked(
    path: str, root: Path, top: Folder, layout: str | None, degraded: str | None, on_error: OnError, notes: list[str]
) -> Dataset | None:
    """The dataset by the one layout of `MARKED` that finds its marks; None where none does.

    Raises:
        DataError: more than one does, and `layout` does not say which.
    """
    found = {}
    for name in MARKED if layout is None else (layout,):
        sure = {"certain": True} if name == layout == "videos" else {}
        plan = _of(name, "find")(root, top, **sure)
        if plan is not None:
            found[name] = plan
    for name in TELLS_MORE:
        if name in found and len(found) > 1 and found.keys() - {name} <= TELLS_MORE[name]:
            others = " or ".join(f"layout='{other}'" for other in found if other != name)
            notes = [*notes, f"read as {name}, which tells more; {others} reads the other"]
            found = {name: found[name]}
    if len(found) > 1:
        raise DataError(f"{path} can be read as {' and as '.join(found)}; say which: layout='{next(iter(found))}'")
    for name, plan in found.items():
        options = {"degraded": degraded} if name == "pairs" else {}
        return _of(name, "read")(path, root, plan, on_error=on_error, notes=notes, **options)
    return None


def _read_marked_file(path: str, file: Path, layout: str | None, on_error: OnError) -> Dataset | None:
    """The dataset that a json, a yaml or a video is; None where it is of no layout of `MARKED`."""
    for name in MARKED if layout is None else (layout,):
        find = getattr(_module(name), f"{name}_file", None) if name in MARKED else None
        if find and (found := find(file)):
            root, plan = found
            return _of(name, "read")(path, root, plan, on_error=on_error)
    return None


def _module(layout: str) -> Any:
    return import_module(f"vertebra.data.{MARKED[layout]}")


def _of(layout: str, what: str) -> Any:
    """`find_LAYOUT` or `read_LAYOUT`; the module is not imported before a folder needs it."""
    return getattr(_module(layout), f"{what}_{layout}")


def _unclaimed(top: Folder) -> str | None:
    """A file that is named as annotations are, after every layout has passed it by."""
    for folder in top.walk():
        for name in folder.others:
            stem, _, suffix = name.lower().rpartition(".")
            if suffix == "json" and stem.lstrip("_").startswith(("instances", "annotations", "panoptic", "captions")):
                return folder.path + name
    return None


def _content(top: Folder) -> str:
    """What lies in a folder, in a line."""
    folders = f"folders {', '.join(list(top.folders)[:5])}" if top.folders else "no folders"
    files = f"files {', '.join([*top.images, *top.others][:5])}" if top.images or top.others else "no files"
    return f"{folders}; {files}"
