"""One policy for every image: upright, 8 bit, mode "RGB" or "L".

====================  ==============================================================================
found                 what comes out
====================  ==============================================================================
EXIF orientation      applied, then forgotten; unreadable EXIF counts as none
grey                  stays "L"; bilevel becomes "L" with 0 and 255
palette               "RGB"
alpha                 composited on white: colour becomes "RGB", grey "L"
CMYK, YCbCr           "RGB"; embedded colour profiles are not applied
16-bit grey           0..65535 rescaled linearly to 0..255, whatever the image uses of it
16-bit colour         the high byte of each channel
32-bit integer, PPM   as 16-bit grey; a value outside 0..65535 is an error
floating point        0..1 rescaled linearly to 0..255; a value outside, or NaN, is an error
animated, many pages  the first frame
truncated, broken     an error: half an image is no evidence
zero bytes, no image  an error, whatever the suffix says
very many pixels      an error before anything is decoded, above $VERTEBRA_MAX_PIXELS (178,956,970)
other formats         an error; AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF and WebP are read
====================  ==============================================================================

Decoding is safe in threads, releases the interpreter lock where Pillow does, and changes none of Pillow's
global settings. Files are recognised by their first bytes and go straight to that format's plugin: no other
plugin sees them, and `Image.open`'s bomb warning, which cannot be silenced thread-safely, is not raised.
"""

import io
import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile
from PIL.ExifTags import Base

from vertebra.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm"),
        *("pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
"""Suffixes, in lower case, of the files that readers take for images."""

MAX_PIXELS = 178_956_970
"""Pixels that an image may have where $VERTEBRA_MAX_PIXELS says nothing: 512 MB as RGB."""

# Said without the file's name, and of no consequence here. Filtering around each call would not be thread-safe.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning, r"PIL\.TiffImagePlugin")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLUGINS = (  # first bytes, where they stand, Pillow's plugin
    ((b"\xff\xd8\xff",), 0, "Jpeg"),
    ((b"\x89PNG\r\n\x1a\n",), 0, "Png"),
    ((b"WEBP",), 8, "WebP"),
    ((b"GIF87a", b"GIF89a"), 0, "Gif"),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), 0, "Tiff"),
    ((b"BM",), 0, "Bmp"),
    ((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), 0, "Ppm"),
    ((b"ftypavif", b"ftypavis"), 4, "Avif"),
)
_FOREIGN = (
    ((b"ftypheic", b"ftypheix"), 4, "HEIC"),
    ((b"%PDF",), 0, "PDF"),
    ((b"%!PS", b"\xc5\xd0\xd3\xc6"), 0, "EPS"),
    ((b"8BPS",), 0, "Photoshop"),
    ((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), 0, "JPEG 2000"),
    ((b"PK\x03\x04",), 0, "zip"),
)


def decode(
    data: bytes | Path, *, name: str, least: tuple[int, int] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode one image by the policy above.

    Args:
        data: the encoded image, or the file that holds it.
        name: what errors call the image.
        least: (height, width) in pixels that are enough. A larger JPEG is decoded at 1/2, 1/4 or 1/8, which
            costs a fraction, and still covers both sides.
        max_pixels: pixels above which the image is refused.

    Returns:
        The image, mode "RGB" or "L", without metadata; `info["whole"]` is its (width, height) upright and before any
        reduction, from which a crop of a reduced image is computed (half of 375 pixels is not 188).

    Raises:
        DataError: the image cannot be read; the message names it, the reason and the remedy.
    """
    limit = pixel_limit() if max_pixels is None else max_pixels
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
            return _decode(file, name, least, limit)
    except DataError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{name}: cannot be opened: {error.strerror}") from error
    except Exception as error:  # on broken bytes Pillow's plugins raise almost any type
        reason = str(error) or type(error).__name__
        raise DataError(f"{name}: {reason}; the image is damaged: copy or download it again, or remove it") from error


def refuse_large(width: int, height: int, name: str, limit: int) -> None:
    """Refuse an image before anything of it is decoded.

    Raises:
        DataError: it has more pixels than `limit`.
    """
    if width * height > limit:
        raise DataError(
            f"{name}: {width} x {height} pixels are more than the {limit} allowed; "
            "make the image smaller, or raise VERTEBRA_MAX_PIXELS if you trust it"
        )


def pixel_limit() -> int:
    """Pixels that an image may have: $VERTEBRA_MAX_PIXELS, or `MAX_PIXELS`.

    Raises:
        UsageError: the variable is no whole number.
    """
    word = os.environ.get("VERTEBRA_MAX_PIXELS", "")
    if not word:
        return MAX_PIXELS
    if not word.isdecimal() or int(word) == 0:
        raise UsageError(f"VERTEBRA_MAX_PIXELS is {word!r}; give a whole number of pixels such as {MAX_PIXELS}")
    return int(word)


def _decode(file: BinaryIO, name: str, least: tuple[int, int] | None, limit: int) -> Image.Image:
    image = open_header(file, name)
    width, height = image.size
    refuse_large(width, height, name, limit)
    turned = orientation(image) >= 5
    if least and image.format == "JPEG":
        height_enough, width_enough = least[::-1] if turned else least  # as it is stored, not as it is shown
        image.draft(None, (max(1, width_enough), max(1, height_enough)))
    image.load()
    result = _eight_bit(_upright(image), name)
    result.info.clear()  # a second reader of the EXIF would turn the image twice
    result.info["whole"] = (height, width) if turned else (width, height)
    return result


def open_header(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    """Read the header; nothing is decoded yet."""
    head = file.read(64)
    file.seek(0)
    for marks, start, plugin in _PLUGINS:
        if head.startswith(marks, start):
            return _plugin(plugin, name)(file, name)
    raise DataError(f"{name}: {_what(head)}")


def _plugin(plugin: str, name: str) -> type[ImageFile.ImageFile]:
    try:
        return getattr(import_module(f"PIL.{plugin}ImagePlugin"), f"{plugin}ImageFile")
    except ImportError as error:
        raise DataError(f"{name}: this Pillow cannot read {plugin.upper()}; pip install --upgrade pillow") from error


def _what(head: bytes) -> str:
    """Why these first bytes are no image that is read."""
    if not head:
        return "is empty (0 bytes); copy or download it again, or remove it"
    for marks, start, format_name in _FOREIGN:
        if head.startswith(marks, start):
            return f"is a {format_name} file, which is not read; convert it to PNG or JPEG"
    if head.isascii() and b"\0" not in head:
        return "is text, not an image; a download that failed often looks so"
    return "is no image that is read (AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WebP); convert it to PNG or JPEG"


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 (upright) where there is none."""
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged metadata, of which Pillow makes almost any type of error, spoils no pixel
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return _scaled(np.asarray(image), 65535, name)
    if image.mode == "F":
        return _scaled(np.asarray(image), 1, name)
    if image.has_transparency_data:
        return _on_white(image, "L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scaled(pixels: np.ndarray, top: int, name: str) -> Image.Image:
    """Grey pixels (H, W) of 0..`top` to 0..255."""
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= top):
        raise DataError(
            f"{name}: values from {low:g} to {high:g} where 0 to {top} is expected; "
            "no scale can be known: save the image as 8 or 16 bit"
        )
    return Image.fromarray(np.rint(pixels * np.float32(255 / top)).astype(np.uint8))


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
    return opaque.convert(mode)
