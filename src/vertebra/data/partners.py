"""Files that belong to an image: found by their names, never outside the data's root, written beside the image."""

import filecmp
import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vertebra.data.dataset import Split
from vertebra.data.folders import Files, is_image
from vertebra.data.images import open_header, orientation, pixel_limit, refuse_large
from vertebra.data.splits import split_of
from vertebra.errors import DataError, UsageError

_SIDES = {"images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "lq"}
_CHUNK = 16

Result = TypeVar("Result")


class Header(NamedTuple):
    """What a file says of an image before it is decoded.

    Attributes:
        height: pixels, as the image is shown.
        width: likewise.
        orientation: of the EXIF, 1 (upright) to 8.
        mode: Pillow's mode.
    """

    height: int
    width: int
    orientation: int
    mode: str


def checked(name: str, where: str) -> str:
    """A file name that data states, with "/" between its parts.

    Raises:
        DataError: the name is empty, absolute or leads upwards; `where` says who states it.
    """
    plain = name.strip().replace("\\", "/").removeprefix("./")
    if not plain or "\0" in plain or plain.startswith("/") or re.match(r"[A-Za-z]:", plain):
        raise DataError(f"{where}: {name!r} is no file name relative to the data; write such as images/x.jpg")
    if ".." in plain.split("/"):
        raise DataError(f"{where}: {name!r} leads upwards, out of the data; write it without ..")
    return str(PurePosixPath(plain))


class Lookup:
    """Files by the end of their path: "x.jpg" finds "train/a/x.jpg".

    Args:
        names: paths relative to the root.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._by_name[name.rpartition("/")[2]].append(name)

    def __call__(self, name: str, split: str = "all") -> list[str]:
        """The files that end in `name`; of several, the whole path, else those below a folder of that split."""
        found = [file for file in self._by_name.get(name.rpartition("/")[2], ()) if f"/{file}".endswith(f"/{name}")]
        if len(found) > 1 and name in found:
            return [name]
        if len(found) > 1:
            found = [file for file in found if any(word_of_split(part) == split for part in file.split("/"))] or found
        return found


def word_of_split(name: str) -> str | None:
    """The split that a word of a name means: `panoptic_train2017` is "train"; None where none or two do."""
    found = {split_of(word) for word in re.split(r"[-_.\s\d]+", name)} - {None}
    return found.pop() if len(found) == 1 else None


def stem(name: str) -> str:
    """A path without its suffix."""
    return name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix) else name


def matched(
    names: Sequence[str], others: Sequence[str], plain: Callable[[str], str], roots: tuple[str, str]
) -> tuple[list[str], list[str]]:
    """Find for every file of one folder its partner in another.

    A partner has the same path below its folder and the same stem; where none has, the same after `plain`.

    Args:
        names: files of one side, relative to the data.
        others: files of the other side.
        plain: a stem without the marks of a side: `x_mask` to `x`.
        roots: what the two sides' paths start with, and what does not count.

    Returns:
        The partner of every file, "" where there is none, and the others that nobody took.

    Raises:
        DataError: two files are the partner of one; the message names them.
    """
    exact: dict[str, list[str]] = defaultdict(list)
    loose: dict[str, list[str]] = defaultdict(list)
    for other in others:
        key = stem(other.removeprefix(roots[1]))
        exact[key].append(other)
        loose[plain(key).casefold()].append(other)
    partners = []
    for name in names:
        key = stem(name.removeprefix(roots[0]))
        found = exact.get(key) or loose.get(plain(key).casefold()) or [""]
        if len(found) > 1:
            raise DataError(f"{name}: {found[0]} and {found[1]} may both belong to it; keep one")
        partners.append(found[0])
    taken = set(partners)
    return partners, [other for other in others if other not in taken]


def header(file: Path) -> Header:
    """Height and width of an image as it is shown, from its header.

    Raises:
        DataError: the file cannot be opened, or is no image.
    """
    image, turn = _raw(file, decoded=False)
    width, height = image.size if turn < 5 else image.size[::-1]
    return Header(height, width, turn, image.mode)


def raw(file: Path) -> Image.Image:
    """Decode a file whose pixels are numbers: no rotation, no conversion, the mode as stored.

    Raises:
        DataError: the file cannot be read, has more pixels than $VERTEBRA_MAX_PIXELS, or is a JPEG, which blurs values.
    """
    return _raw(file, decoded=True)[0]


def _raw(file: Path, *, decoded: bool) -> tuple[Image.Image, int]:
    """The image and its EXIF orientation."""
    try:
        with file.open("rb") as stream:
            image = open_header(stream, str(file))
            refuse_large(*image.size, str(file), pixel_limit())
            if decoded and image.format == "JPEG":
                raise DataError(f"{file} is a JPEG, which blurs the values of a mask; save masks as PNG")
            if decoded:
                image.load()
            return image, orientation(image)
    except DataError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{file}: cannot be opened: {error.strerror}") from error
    except Exception as error:  # on broken bytes Pillow's plugins raise almost any type
        reason = str(error) or type(error).__name__
        raise DataError(f"{file}: {reason}; it is damaged: copy or download it again, or remove it") from error


def each(look: Callable[[int], Result], count: int) -> list[Result]:
    """`look` at 0..`count`, in threads: decoders release the interpreter lock."""

    def some(start: int) -> list[Result]:
        return [look(index) for index in range(start, min(start + _CHUNK, count))]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [result for results in pool.map(some, range(0, count, _CHUNK)) for result in results]


def digest_of_files(root: Path, paths: Iterable[str]) -> bytes:
    """A digest of names and sizes in bytes; a file that is gone counts as empty."""
    found = hashlib.sha256()
    for path in paths:
        file = root / path
        found.update(f"{path}\0{file.stat().st_size if path and file.is_file() else 0}\n".encode())
    return found.digest()


def fresh(folder: Path) -> Path:
    """A folder to write data to.

    Raises:
        UsageError: there is something in it already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and is not empty; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def written_names(split: Split, is_side: Callable[[str], bool] | None = None) -> list[str]:
    """What the images of a split are called where they are written: without folders that say split or side.

    `images/train/a/x.jpg` and `train/images/a/x.jpg` are both `a/x.jpg`, so that writing what was read changes no
    name twice. A name without the suffix of an image gets ".png".

    Args:
        split: the images.
        is_side: whether a folder's name says a side, beside the usual names of folders of images.

    Raises:
        DataError: a name leads out of the folder.
    """
    whole = [checked(str(name), f"split {split.name!r}") for name in split.names]
    whole = [name if is_image(name) else f"{name}.png" for name in whole]
    told = {part for name in whole for part in name.split("/")[:-1] if part.lower() in _SIDES or split_of(part)}
    told |= {part for name in whole for part in name.split("/")[:-1] if is_side and is_side(part)}
    short = ["/".join(part for part in name.split("/") if part not in told) for name in whole]
    return short if len({stem(name) for name in short}) == len(short) else whole


def write_images(split: Split, folder: Path, is_side: Callable[[str], bool] | None = None) -> list[str]:
    """Write the images of a split: files as they are, everything else as PNG.

    Returns:
        Their names relative to `folder`, as `written_names` makes them.
    """
    return place(split, folder, written_names(split, is_side))


def place(split: Split, folder: Path, names: Sequence[str]) -> list[str]:
    """Write the images of a split: files are copied as they are, others are decoded and saved as PNG.

    Args:
        split: whose images.
        folder: where to.
        names: relative to the folder.

    Returns:
        The names as they were written: a suffix becomes ".png" where an image was saved anew.

    Raises:
        UsageError: a name leads outside the folder, or is there already.
    """
    written = []
    for index, name in enumerate(names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{name} leads outside {folder}; rename the image")
        source = _file(split, index) if is_image(name) else None
        target = folder / (path if source else path.with_suffix(".png") if is_image(name) else f"{path}.png")
        if target.exists() and not (source and filecmp.cmp(source, target, shallow=False)):
            raise UsageError(f"two images would be written as {target}; rename one")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source:
            shutil.copyfile(source, target)
        else:
            split.image(index).save(target)
        written.append(target.relative_to(folder).as_posix())
    return written


def _file(split: Split, index: int) -> Path | None:
    """The file of an image; None where it is none."""
    store = split.store
    return store.root / str(store.paths[split.rows[index]]) if isinstance(store, Files) else None


def split_folder(split: Split) -> str:
    """Where a split is written below a side's folder: "train/", or "" for the one split of data without splits."""
    return "" if split.name == "all" else f"{split.name}/"


def save_values(pixels: np.ndarray, file: Path) -> None:
    """Write whole numbers (H, W) as a grey PNG of 8 bit, or 16 where they need it; (H, W, 3) uint8 as RGB."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 2:
        pixels = pixels.astype(np.uint8 if pixels.max(initial=0) < 256 else np.uint16)
    Image.fromarray(pixels).save(file)
