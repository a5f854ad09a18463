"""Decode and resize once: what the network sees of each image, as uint8 on disk.

`fitted` takes one image to the network's size, `Pixels` keeps a whole split of them in a memory-mapped file,
and `normalised` turns any part of it into the float tensor that a backbone takes.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vertebra.contracts import Preprocess
from vertebra.data.dataset import Split
from vertebra.data.splits import OnError
from vertebra.errors import DataError, UsageError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
DRAFT_MARGIN = 2.0
"""How much larger than the resize target a reduced JPEG must stay; see `least_fitted`."""
ROWS_AT_ONCE = 16
STALE_SECONDS = 3600


class Bad(NamedTuple):
    """An image that could not be read.

    Attributes:
        index: position in the split.
        name: what the user calls the image.
        reason: the reader's message.
    """

    index: int
    name: str
    reason: str


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mode_of(preprocess: Preprocess) -> Literal["L", "RGB"]:
    """Pillow's mode of the images that a network takes.

    Raises:
        UsageError: the network takes neither 1 nor 3 channels.
    """
    if preprocess.channels == 1:
        return "L"
    if preprocess.channels == 3:
        return "RGB"
    raise UsageError(
        f"the network takes {preprocess.channels} channels; images have 1 (grey) or 3 (RGB): choose a network of these"
    )


def as_array(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, C) uint8 of a grey or RGB image."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _targets(preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) that the image is resized to before the central crop; timm rounds down too."""
    height, width = preprocess.size
    return math.floor(height / preprocess.crop), math.floor(width / preprocess.crop)


def _resized(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    """(width, height) of the whole image after resizing."""
    target_height, target_width = _targets(preprocess)
    if preprocess.fit == "squash":
        return target_width, target_height
    if target_height == target_width:
        short = min(width, height)
        return int(target_width * width / short), int(target_height * height / short)
    ratio = min(width / target_width, height / target_height)
    return round(width / ratio), round(height / ratio)


def fitted(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """One image at the network's size, as the network's weights expect it.

    The resize and the central crop of timm's evaluation transform, done as one resampling: pixels outside the box
    still feed the filter at its edges, so the result is the same.

    Args:
        image: any size, mode "RGB" or "L" (others are converted). Where a decoder reduced it, `info["whole"]` is the
            (width, height) it had: half of 375 pixels is 187.5, not 188, and that is a visible shift.
        preprocess: size, filter and fit.

    Returns:
        (H, W, C) uint8.

    Raises:
        UsageError: the network takes neither 1 nor 3 channels.
    """
    mode = mode_of(preprocess)
    if image.mode not in ("L", mode):
        image = image.convert(mode)
    whole_width, whole_height = image.info.get("whole", image.size)
    box = central(whole_width, whole_height, preprocess) / round(whole_width / image.width)  # reduced by 1, 2, 4 or 8
    box = np.minimum(box, (*image.size, *image.size))  # rounding
    height, width = preprocess.size
    image = image.resize((width, height), FILTERS[preprocess.interpolation], box=tuple(box.tolist()))
    return as_array(image if image.mode == mode else image.convert(mode))


def central(width: int, height: int, preprocess: Preprocess) -> np.ndarray:
    """(left, top, right, bottom) of what the network sees, in pixels of an image of this size."""
    seen_height, seen_width = preprocess.size
    resized_width, resized_height = _resized(width, height, preprocess)
    across, down = width / resized_width, height / resized_height
    left, top = round((resized_width - seen_width) / 2), round((resized_height - seen_height) / 2)
    return np.array([left * across, top * down, (left + seen_width) * across, (top + seen_height) * down])


def least_fitted(preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) that a source needs so that `fitted` loses next to nothing.

    A JPEG decoded at 1/2, 1/4 or 1/8 is a little softer than one resized from full size. With twice the target left
    to the filter, photographs differ by 0.5 grey levels on average (99.9 % of their pixels by less than 6); with
    the target alone by 1.7, with four times the target by 0.2.
    """
    height, width = _targets(preprocess)
    if preprocess.fit == "crop":
        height = width = max(height, width)
    return math.ceil(height * DRAFT_MARGIN), math.ceil(width * DRAFT_MARGIN)


def normalised(batch: np.ndarray | Tensor, preprocess: Preprocess) -> Tensor:
    """A batch of pixels as a network takes it: `(x / 255 - mean) / std` as one multiply-add.

    Args:
        batch: (B, H, W, C) uint8; an array, or a tensor on any device.
        preprocess: mean and standard deviation.

    Returns:
        (B, C, H, W) float32, contiguous, on the batch's device.
    """
    mean, std = np.asarray(preprocess.mean, dtype=np.float64), np.asarray(preprocess.std, dtype=np.float64)
    scale = (1 / (255 * std)).astype(np.float32)[:, None, None]  # (C, 1, 1)
    shift = (-mean / std).astype(np.float32)[:, None, None]
    if isinstance(batch, Tensor) and batch.device.type != "cpu":
        images = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.mul_(torch.from_numpy(scale).to(batch.device)).add_(torch.from_numpy(shift).to(batch.device))
    pixels = batch.numpy() if isinstance(batch, Tensor) else batch
    planes = pixels.transpose(0, 3, 1, 2)
    images = np.empty(planes.shape, dtype=np.float32)
    np.multiply(planes, scale, out=images)  # transposes, converts and scales in one pass: twice as fast as torch here
    images += shift
    return torch.from_numpy(images)


@dataclass(frozen=True, eq=False)
class Pixels:
    """A split at the network's size.

    Attributes:
        array: (n, H, W, C) uint8, memory-mapped where it has a file; rows of unreadable images are zero.
        bad: images that could not be read.
    """

    array: np.ndarray
    bad: tuple[Bad, ...] = ()

    def __len__(self) -> int:
        return len(self.array)

    @classmethod
    def of(
        cls,
        split: Split,
        preprocess: Preprocess,
        folder: Path | None,
        threads: int | None = None,
        on_error: OnError = "raise",
    ) -> "Pixels":
        """Decode and resize every image of a split, or open the file in which that was done before.

        Args:
            split: the images.
            preprocess: size, filter and fit; mean and std do not matter here, so networks share files.
            folder: where the file is kept; None keeps the array in memory.
            threads: decoding threads; None takes one a core. Each holds one decoded image at a time.
            on_error: what an unreadable image does: "raise", or "skip", which leaves its row zero and lists it.

        Raises:
            DataError: an image cannot be read and `on_error` is "raise"; nothing is kept then.
            UsageError: the network takes neither 1 nor 3 channels.
        """
        mode_of(preprocess)
        shape = (len(split), *preprocess.size, preprocess.channels)
        if folder is None or not len(split):
            array = np.zeros(shape, dtype=np.uint8)
            return cls(array, _fill(array, split, preprocess, threads, on_error))
        path = folder / f"pixels-{_key(split, preprocess)}.npy"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _written_beside(path, shape) as array:
                bad = _fill(array, split, preprocess, threads, on_error)
                _replace_text(path.with_suffix(".json"), json.dumps(bad))
        bad = tuple(Bad(*entry) for entry in json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        _refuse(bad, on_error)
        return cls(np.load(path, mmap_mode="r", allow_pickle=False), bad)


def _refuse(bad: tuple[Bad, ...], on_error: OnError) -> None:
    if bad and on_error == "raise":
        raise DataError(bad[0].reason)


def _fill(
    array: np.ndarray, split: Split, preprocess: Preprocess, threads: int | None, on_error: OnError
) -> tuple[Bad, ...]:
    """Write each image into its row; returns those that could not be read."""
    least = least_fitted(preprocess)

    def rows(start: int) -> list[Bad]:
        bad = []
        for index in range(start, min(start + ROWS_AT_ONCE, len(split))):
            try:
                array[index] = fitted(split.image(index, least), preprocess)
            except DataError as error:
                bad.append(Bad(index, str(split.names[index]), str(error)))
                _refuse(tuple(bad), on_error)
        return bad

    with ThreadPoolExecutor(threads or available_cores()) as pool:
        futures = [pool.submit(rows, start) for start in range(0, len(split), ROWS_AT_ONCE)]
        try:
            return tuple(entry for future in futures for entry in future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _key(split: Split, preprocess: Preprocess) -> str:
    """16 hex digits that change with the images, their order or what is done to them."""
    done = (preprocess.size, preprocess.channels, preprocess.interpolation, preprocess.crop, preprocess.fit)
    digest = hashlib.sha256(f"{done} {DRAFT_MARGIN}".encode())
    digest.update("\0".join(map(str, split.names)).encode())
    digest.update(np.array([split.store.size_bytes(int(row)) for row in split.rows], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _written_beside(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """An array in a file beside `path`, which takes that name once it is whole."""
    for left in path.parent.glob(f"{path.name}.*.part"):  # of processes that were killed
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            left.unlink(missing_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        yield array
        array.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
