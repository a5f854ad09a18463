"""A user's own pictures: photographs as backgrounds, and cut-outs with a transparent surround as things."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vertebra.data.images import IMAGE_SUFFIXES, decode
from vertebra.data.sprites.shapes import Stamp, circle_around, turned, window
from vertebra.errors import DataError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

SHARES = (0.6, 0.75, 1.0)
"""Where the pictures of train, val and test end, of all in the order of their names."""

LARGEST = 256
"""Side in pixels that a cut-out is kept at."""

GRAIN = 32
"""Sides of what is kept are multiples of this, so that they can be halved five times."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Image files below a folder.

    Attributes:
        files: paths, sorted.
        names: the same, below the folder.
        sizes: bytes of each, for the fingerprint.
    """

    files: tuple[str, ...] = field(repr=False)
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def of_part(self, part: Part) -> tuple[str, ...]:
        """Those that a split may show: its own where there are at least four, else all."""
        if len(self.files) < 4:
            return self.files
        ends = [0, *(round(share * len(self.files)) for share in SHARES)]
        place = PARTS.index(part)
        return self.files[ends[place] : max(ends[place + 1], ends[place] + 1)]

    @property
    def shared(self) -> bool:
        """Whether the splits have to share them."""
        return len(self.files) < 4


def _listed(folder: Path, what: str) -> Pictures:
    if not folder.is_dir():
        raise DataError(f"{folder}: {what} are read from a folder of images, and there is none of that name")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{folder} has no images to take as {what}")
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    return Pictures(tuple(map(str, files)), names, tuple(file.stat().st_size for file in files))


def backgrounds_in(folder: str | Path) -> Pictures:
    """Photographs anywhere below a folder.

    Raises:
        DataError: no folder, or no images in it.
    """
    return _listed(Path(folder), "backgrounds")


def cutouts_in(folder: str | Path) -> dict[str, Pictures]:
    """Cut-outs by class: `FOLDER/CLASS/x.png`, or a folder of images, which is one class named after it.

    Raises:
        DataError: no folder, or no images in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: cut-outs are read from a folder of images, and there is none of that name")
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return {child.name: _listed(child, "cut-outs") for child in classes or [root.resolve()]}


@lru_cache(maxsize=64)
def _photograph(file: str, side: int) -> np.ndarray:
    """A photograph whose shorter side has at least `side` pixels and little more, (H, W, 3) uint8."""
    image = decode(Path(file), name=file, least=(side, side)).convert("RGB")
    scale = side / min(image.size)
    return np.asarray(image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale)))))


def photograph(files: tuple[str, ...], side: int, random: np.random.Generator) -> np.ndarray:
    """A random square of one of the photographs, half of the time mirrored, (side, side, 3) float32.

    Args:
        files: to choose from.
        side: in pixels.
        random: draws five numbers.
    """
    choice, zoom, across, down, mirror = random.random(5).tolist()
    pixels = _photograph(files[int(choice * len(files))], round(side * (1 + zoom // 0.25 / 4)))
    left, top = int(across * (pixels.shape[1] - side + 1)), int(down * (pixels.shape[0] - side + 1))
    cut = pixels[top : top + side, left : left + side]
    return (cut[:, ::-1] if mirror < 0.5 else cut).astype(np.float32)


class Cutout(NamedTuple):
    """A cut-out and smaller versions of it.

    Attributes:
        levels: (h, w, 4) float32 each, RGB times alpha and alpha, 0..255 and 0..1, each half the size of the one
            before.
        x: centre of the smallest circle around what is opaque, as a share of the width.
        y: the same of the height.
        radius: of that circle, as a share of the width.
    """

    levels: tuple[np.ndarray, ...]
    x: float
    y: float
    radius: float


@lru_cache(maxsize=256)
def cutout(file: str) -> Cutout:
    """Read a cut-out: colour by the policy of `vertebra.data.images`, and the alpha that this policy paints over.

    Raises:
        DataError: it cannot be read, has no alpha, or nothing of it is opaque.
    """
    on_white = decode(Path(file), name=file).convert("RGB")
    with Image.open(file) as image:  # decode has found it whole and not too large
        if not image.has_transparency_data:
            raise DataError(f"{file} has no transparency; a cut-out is a PNG or WebP whose surround is transparent")
        alpha = image.convert("RGBA").getchannel("A")
    if alpha.size != on_white.size:
        raise DataError(f"{file} is turned by its EXIF; save the cut-out upright")
    scale = min(1.0, LARGEST / max(alpha.size))
    size = max(1, round(alpha.width * scale)), max(1, round(alpha.height * scale))
    cover = np.asarray(alpha.resize(size, Image.Resampling.BOX), dtype=np.float32)[:, :, None] / 255
    white = np.asarray(on_white.resize(size, Image.Resampling.BOX), dtype=np.float32)
    if cover.max() < 0.5:
        raise DataError(f"{file} is transparent all over")
    pixels = np.concatenate([np.clip(white - 255 * (1 - cover), 0, 255), cover], axis=2)
    centre, radius = circle_around(np.argwhere(cover[:, :, 0] > 0.5) + 0.5)
    rows, columns = (-(2 + side) % GRAIN for side in pixels.shape[:2])
    levels = [np.pad(pixels, ((1, 1 + rows), (1, 1 + columns), (0, 0)))]
    while levels[-1].shape[0] % 2 == levels[-1].shape[1] % 2 == 0:
        halved = levels[-1].reshape(levels[-1].shape[0] // 2, 2, levels[-1].shape[1] // 2, 2, 4).mean((1, 3))
        levels.append(halved)
    height, width = levels[0].shape[:2]
    return Cutout(tuple(levels), (centre[1] + 1) / width, (centre[0] + 1) / height, (radius + 0.5) / width)


def draw_cutout(found: Cutout, x: float, y: float, radius: float, angle: float = 0.0) -> tuple[Stamp, np.ndarray]:
    """A cut-out on a canvas, as `shapes.draw` does it.

    Returns:
        Its stamp, and its colours (h, w, 3) float32 in the stamp's window.
    """
    columns, rows, left, top = window(x, y, radius)
    across, down = turned(columns, rows, angle)
    shrink = found.radius * found.levels[0].shape[1] / radius  # pixels of the cut-out a pixel of the canvas
    level = min(len(found.levels) - 1, max(0, int(np.floor(np.log2(max(shrink, 1e-6)) + 0.3))))
    pixels = found.levels[level]
    per_pixel = found.radius * pixels.shape[1] / radius
    places_x = np.clip(across * per_pixel + found.x * pixels.shape[1] - 0.5, 0, pixels.shape[1] - 1.001)
    places_y = np.clip(down * per_pixel + found.y * pixels.shape[0] - 0.5, 0, pixels.shape[0] - 1.001)
    j, i = places_x.astype(np.intp), places_y.astype(np.intp)
    right, below = (places_x - j)[:, :, None], (places_y - i)[:, :, None]
    upper = pixels[i, j] * (1 - right) + pixels[i, j + 1] * right
    lower = pixels[i + 1, j] * (1 - right) + pixels[i + 1, j + 1] * right
    drawn = (upper * (1 - below) + lower * below).astype(np.float32)
    alpha = drawn[:, :, 3]
    return Stamp(alpha, left, top), drawn[:, :, :3] / np.maximum(alpha, 1e-3)[:, :, None]
