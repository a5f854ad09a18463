"""Images in folders: one folder a class, with or without folders for the splits, or no labels at all."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from vertebra.data.dataset import Dataset, Store
from vertebra.data.images import IMAGE_SUFFIXES, decode
from vertebra.data.splits import Found, assemble, split_of
from vertebra.errors import DataError, UsageError

_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}
_PLAIN = {"data", "image", "images", "img", "imgs", "jpegimages", "photos", "pictures"}
_MOST_FOLDERS, _DEEPEST = 1_000_000, 64


@dataclass(frozen=True, eq=False)
class Files(Store):
    """Images that are files below a root.

    Attributes:
        root: the folder.
        paths: (n,) array of str, relative to the root, "/" between the parts.
    """

    root: Path
    paths: np.ndarray

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        file = self.root / str(self.paths[index])
        return decode(file, name=str(file), least=least)

    def size_bytes(self, index: int) -> int:
        return (self.root / str(self.paths[index])).stat().st_size


@dataclass(eq=False)
class Folder:
    """What lies in a folder; hidden files, `__MACOSX` and the like are left out.

    Attributes:
        path: relative to the root with "/" between the parts and at the end; "" for the root itself.
        images: names of the files directly inside with one of `IMAGE_SUFFIXES`, in any case, sorted.
        others: names of the other files directly inside, sorted.
        folders: name -> folder directly inside, sorted.
    """

    path: str
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: dict[str, "Folder"] = field(default_factory=dict)

    @cached_property
    def count(self) -> int:
        """Images at any depth."""
        return len(self.images) + sum(folder.count for folder in self.folders.values())

    @cached_property
    def filled(self) -> dict[str, "Folder"]:
        """The folders directly inside that have images at some depth."""
        return {name: folder for name, folder in self.folders.items() if folder.count}

    def walk(self) -> Iterator["Folder"]:
        """This folder and all below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    def names(self) -> list[str]:
        """All images at any depth, relative to the root."""
        return [folder.path + name for folder in self.walk() for name in folder.images]

    @property
    def empty(self) -> bool:
        """Whether no file of any kind lies in it at any depth."""
        return not any(folder.images or folder.others for folder in self.walk())


def list_folder(root: Path) -> tuple[Folder, list[str]]:
    """List a whole tree, about a second for 300,000 files on a local disk.

    Links are followed, also to folders, but not back to a folder that the link lies in.

    Returns:
        The tree, and notes on what was left out: dead links, links that lead round, names that are not UTF-8.

    Raises:
        DataError: a folder cannot be listed, or its links make the tree endless.
    """
    top, notes = Folder(""), []
    pending: list[tuple[Folder, tuple[tuple[int, int], ...]]] = [(top, ())]
    for _ in range(_MOST_FOLDERS):
        if not pending:
            return top, notes
        folder, above = pending.pop()
        status = os.stat(f"{root}/{folder.path}")  # noqa: PTH116 - a Path for each entry would cost seconds
        here = (status.st_dev, status.st_ino)
        if here in above or len(above) > _DEEPEST:
            notes.append(f"{folder.path} leads back to a folder above it, or is too deep: not followed")
            continue
        _fill(folder, root, notes)
        pending += [(inner, (*above, here)) for inner in folder.folders.values()]
    raise DataError(f"{root} leads to more than {_MOST_FOLDERS} folders; do its links lead round?")


def _fill(folder: Folder, root: Path, notes: list[str]) -> None:
    """List one folder."""
    folders = []
    try:
        with os.scandir(f"{root}/{folder.path}") as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.lower() in _IGNORED:
                    continue
                if not _is_utf8(name):
                    shown = os.fsencode(folder.path + name).decode("utf-8", "backslashreplace")
                    notes.append(f"{shown}: the name is not UTF-8: left out")
                elif entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    (folder.images if is_image(name) else folder.others).append(name)
                else:
                    notes.append(f"{folder.path}{name} is no file, or a link that leads nowhere: left out")
    except OSError as error:
        raise DataError(f"{root}/{folder.path} cannot be listed: {error.strerror}") from error
    folder.images.sort()
    folder.others.sort()
    folder.folders.update((name, Folder(f"{folder.path}{name}/")) for name in sorted(folders))


def is_image(name: str) -> bool:
    """Whether a file's suffix says that it is an image."""
    return f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def _is_utf8(name: str) -> bool:
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_flat(path: str, top: Folder, notes: Iterable[str] = ()) -> Dataset:
    """Every image below a folder, without labels; folders that are named as splits are splits."""
    notes = [*notes, *_other_files(top)]
    if top.images or not all(map(split_of, top.filled)):
        return assemble(path, "flat", {"all": _unlabelled(path, top)}, notes=notes)
    splits = _splits(path, top, notes)
    return assemble(path, "flat", {name: _unlabelled(path, folder) for name, folder in splits.items()}, notes=notes)


def read_imagefolder(path: str, top: Folder, notes: Iterable[str] = (), certain: bool = False) -> Dataset:
    """One folder a class; with splits, `SPLIT/CLASS/...`.

    The class is the first folder (below the split); images of deeper folders belong to it. A folder with
    nothing in it is a class without images, and a note says so.

    Args:
        path: the root.
        top: what lies in it.
        notes: what the listing had to say.
        certain: the user said that this is the layout, so images beside the class folders are left out with
            a note and a single folder is a class.

    Raises:
        DataError: the folders can be read in more than one way, or a split has a class that train lacks.
    """
    notes = [*notes, *_other_files(top)]
    if not certain:
        _refuse_unsure(path, top)
    if top.images:
        notes.append(
            f"left out, as they lie beside the class folders: {', '.join(top.images[:5])} (images: {len(top.images)})"
        )
    has_splits = all(map(split_of, top.filled)) and any(folder.filled for folder in top.filled.values())
    splits = _splits(path, top, notes) if has_splits else {"all": top}
    found = {name: _labelled(path, folder) for name, folder in splits.items()}
    authorities = [splits["train"]] if "train" in splits and splits["train"].filled else splits.values()
    classes = sorted({name for folder in authorities for name in _classes(folder)})
    for split, folder in splits.items():
        if missing := [name for name in classes if name not in folder.filled]:
            notes.append(f"{split} has no images of {', '.join(missing[:10])}{', ...' * (len(missing) > 10)}")
    return assemble(path, "imagefolder", found, classes, notes)


def _refuse_unsure(path: str, top: Folder) -> None:
    """Raise where more than one reading makes sense."""
    filled = top.filled
    splits = {name for name in filled if split_of(name)}
    if top.images and filled:
        raise DataError(
            f"{path} has folders with images and beside them images of its own ({', '.join(top.images[:3])}); "
            "move those into a class folder, or say layout='imagefolder' or layout='flat'"
        )
    if strange := sorted(filled.keys() - splits) if any(filled[name].filled for name in splits) else []:
        raise DataError(
            f"{path} has split folders ({', '.join(sorted(splits))}) and beside them {', '.join(strange[:5])}; "
            f"move {strange[0]} away, or say layout='imagefolder' if all are classes"
        )
    for name, folder in filled.items():
        if name in splits and folder.images and folder.filled:
            raise DataError(f"{path}/{name} has images both beside and in class folders; move them into one")
    for name, folder in filled.items():
        if folder.filled and not folder.images and all(map(split_of, folder.filled)):
            raise DataError(f"{path}: {name} holds splits of its own ({', '.join(folder.filled)}); give {path}/{name}")
    if len(filled) == 1 and not splits:
        _refuse_single(path, *next(iter(filled.items())))


def _refuse_single(path: str, name: str, folder: Folder) -> None:
    if (folder.filled and not folder.images) or name.lower() in _PLAIN:
        raise DataError(
            f"{path} has images in one folder only, {name}; give {path}/{name}, "
            "or say layout='imagefolder' if it is a class"
        )


def _splits(path: str, top: Folder, notes: list[str]) -> dict[str, Folder]:
    """Split -> its folder."""
    splits: dict[str, Folder] = {}
    for name, folder in top.filled.items():
        split = split_of(name)
        assert split
        if split in splits:
            raise DataError(f"{path}: {splits[split].path} and {folder.path} both mean the split {split!r}; keep one")
        splits[split] = folder
        if name != split:
            notes.append(f"the folder {name} is read as the split {split!r}")
    return splits


def _classes(folder: Folder) -> list[str]:
    """Folders with images, and those with nothing at all; what holds only other files is no class."""
    return [name for name, inner in folder.folders.items() if inner.count or inner.empty]


def _labelled(path: str, folder: Folder) -> Found:
    if not folder.filled:
        return _unlabelled(path, folder)
    names = {name: inner.names() for name, inner in folder.filled.items()}
    labels = [name for name, inside in names.items() for _ in inside]
    return _found(path, [name for inside in names.values() for name in inside], labels)


def _unlabelled(path: str, folder: Folder) -> Found:
    return _found(path, folder.names(), None)


def _found(path: str, names: list[str], labels: list[str] | None) -> Found:
    paths = np.array(names, dtype=np.str_)
    return Found(paths, labels, Files(Path(path), paths), np.arange(len(names)))


def _other_files(top: Folder) -> list[str]:
    """A note on the files that are no images by their suffix."""
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for folder in top.walk() for name in folder.others)
    if not suffixes:
        return []
    shown = ", ".join(f"{suffix} {count}" for suffix, count in suffixes.most_common(5))
    return [f"left out, as by their suffix they are no images: {shown}"]


def write_imagefolder(dataset: Dataset, folder: Path) -> None:
    """Write `SPLIT/CLASS/x.jpg`, or `CLASS/x.jpg` of data without splits; a class without images is an empty folder.

    Raises:
        UsageError: not one label an image, a class that is no name of a folder, or the folder is not empty.
    """
    from vertebra.data.partners import fresh, place, split_folder, written_names  # which lists with `is_image`

    if dataset.label != "single":
        raise UsageError(f"{dataset.path} has {dataset.label} labels an image; class folders hold one label each")
    for name in dataset.classes:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UsageError(f"{dataset.path}: the class {name!r} is no name of a folder; rename it")
    fresh(folder)
    for split in dataset.splits.values():
        assert split.targets is not None
        for name in split.classes:
            (folder / split_folder(split) / name).mkdir(parents=True, exist_ok=True)
        names = [Path(name).name for name in written_names(split)]
        if len(set(names)) < len(names):
            names = [name.replace("/", "-") for name in written_names(split)]
        labels = [split.classes[target] for target in split.targets]
        place(
            split, folder, [f"{split_folder(split)}{label}/{name}" for label, name in zip(labels, names, strict=True)]
        )
