"""Overlays: an image beside the same image under its map, with what is asked and how sure the network is."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INFERNO = ("000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4")
"""Stops of a colour map whose lightness rises evenly, so that it is read the same in print and by the colour-blind."""

PAPER, INK, QUIET = (252, 252, 250), (24, 24, 27), (113, 113, 122)
MARGIN, GAP, BAR = 16, 12, 10


@cache
def _colours() -> np.ndarray:
    """(256, 3) float32, dark to bright."""
    stops = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in INFERNO], dtype=np.float32)
    places = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(places, np.arange(len(stops)), channel) for channel in stops.T], axis=1)


def coloured(heat: np.ndarray) -> np.ndarray:
    """Heat (H, W) in 0..1 as colours (H, W, 3) float32 in 0..255."""
    return _colours()[np.rint(np.clip(heat, 0, 1) * 255).astype(np.int64)]


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """An image under its map: colours where it is hot, grey and a little darker where it is cold.

    Args:
        image: any mode.
        heat: (h, w) in 0..1, any size; it is resized to the image, cells as areas.

    Returns:
        An RGB image of the same size.
    """
    cells = Image.fromarray(np.clip(heat, 0, 1).astype(np.float32), mode="F")
    heat = np.asarray(cells.resize(image.size, Image.Resampling.BILINEAR))[:, :, None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[:, :, None]
    under = 0.75 * (0.35 * np.asarray(image.convert("RGB"), dtype=np.float32) + 0.65 * grey)
    weight = 0.62 * np.clip(heat, 0, 1) ** 0.7
    return Image.fromarray(np.rint(under + weight * (coloured(heat[:, :, 0]) - under)).astype(np.uint8))


def panel(image: Image.Image, heat: np.ndarray, caption: str, remark: str = "", *, side: int = 360) -> Image.Image:
    """An image beside its overlay, with a scale and a caption.

    Args:
        image: as the network sees it.
        heat: (h, w) in 0..1.
        caption: what was asked and found, in a line.
        remark: a quieter line below it.
        side: longer side of each picture in pixels.
    """
    factor = side / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    enlarged = image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 4 else Image.Resampling.LANCZOS)
    width = 2 * MARGIN + 2 * size[0] + 2 * GAP + BAR
    canvas = Image.new("RGB", (width, size[1] + 2 * MARGIN + (58 if remark else 34)), PAPER)
    canvas.paste(enlarged, (MARGIN, MARGIN))
    canvas.paste(overlay(enlarged, heat), (MARGIN + size[0] + GAP, MARGIN))
    scale = np.repeat(np.linspace(1, 0, size[1], dtype=np.float32)[:, None], BAR, axis=1)
    canvas.paste(Image.fromarray(coloured(scale).astype(np.uint8)), (width - MARGIN - BAR, MARGIN))
    draw = ImageDraw.Draw(canvas)
    for text, top, points, colour in ((caption, 12, 18, INK), (remark, 38, 13, QUIET)):
        font = ImageFont.load_default(points)
        draw.text((MARGIN, MARGIN + size[1] + top), _cut(text, font, width - 2 * MARGIN), fill=colour, font=font)
    return canvas


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Text that is no wider than so many pixels; an ellipsis where it was."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
