"""Clean images made worse, by kind and severity, and how good what is left is.

A severity is any number from 0 (as it was) to 5. One random draw serves all severities of a kind: more rain is the
same rain and more, so that an image's quality falls as the severity rises.

===========  =========================================================================================================
kind         severity 5 is
===========  =========================================================================================================
noise        Gaussian noise of 45 grey levels, on each channel
blur         Gaussian, sigma 4 % of the shorter side
rain         slanted streaks over a third of the image, and a light veil
haze         85 % of the far side (the top) lost in bright air (Koschmieder's law)
low light    an eighth of the light and a gamma of 1.2, with the noise that goes with it
downscale    an eighth of the pixels each way, enlarged again
===========  =========================================================================================================
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from vertebra.errors import UsageError, near

SEVEREST = 5.0

Draw = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def _noise(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    return pixels + np.float32(45 * amount) * random.standard_normal(pixels.shape, dtype=np.float32)


def _blur(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    sigma = 0.04 * amount * min(pixels.shape[:2])
    return np.asarray(_image(pixels).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32)


def _rain(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    """Streaks are seeds smeared along a slant; a higher severity lets more of the same seeds through."""
    height, width = pixels.shape[:2]
    slant, seeds = random.uniform(-0.35, 0.35), random.random((height, width), dtype=np.float32)
    length = max(3, height // 7)
    drops = np.clip((seeds - (1 - 0.06 * amount)) / 0.01, 0, 1)
    streaks = np.zeros_like(drops)
    for step in range(length):
        fade = 1 - step / length
        moved = np.roll(drops, (step, round(slant * step)), (0, 1)) * np.float32(fade)
        np.maximum(streaks, moved, out=streaks)
    light = np.float32(0.3 + 0.5 * amount) * streaks
    veiled = pixels + np.float32(0.25 * amount) * (200 - pixels)
    return veiled + light[:, :, None] * (235 - veiled)


def _haze(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    """Light that arrives falls off exponentially with distance, which grows from the lower edge to the upper."""
    air = np.float32(random.uniform(195, 235)) + random.uniform(-8, 8, 3).astype(np.float32)
    distance = np.linspace(1, 0.45, pixels.shape[0], dtype=np.float32)
    arriving = np.exp(math.log(1 - 0.85 * amount) * distance)[:, None, None]
    return air + arriving * (pixels - air)


def _low_light(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    """Fewer photons: darker, and noisier for what is left. The square spreads the qualities: PSNR minds brightness."""
    dark = 255 * (pixels / 255) ** np.float32(1 + 0.2 * amount) * np.float32(8 ** -(amount * amount))
    return dark + np.float32(5 * amount) * random.standard_normal(pixels.shape, dtype=np.float32)


def _downscale(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    factor = 8**amount
    small = _image(pixels).resize(
        (max(1, round(width / factor)), max(1, round(height / factor))), Image.Resampling.BICUBIC
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


_KINDS: dict[str, Draw] = {
    "noise": _noise,
    "blur": _blur,
    "rain": _rain,
    "haze": _haze,
    "low light": _low_light,
    "downscale": _downscale,
}

DEGRADATIONS = tuple(_KINDS)
"""Names of the kinds."""


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Refuse what is no kind of degradation.

    Raises:
        UsageError: the message names it and what there is.
    """
    for kind in kinds:
        if kind not in _KINDS:
            raise UsageError(f"no degradation is called {kind!r}{near(kind, _KINDS)}; there are {', '.join(_KINDS)}")


def degrade(image: np.ndarray, kind: str, severity: float, random: np.random.Generator) -> np.ndarray:
    """A worse version of an image.

    Args:
        image: (H, W, 3) uint8.
        kind: one of `DEGRADATIONS`.
        severity: 0 (the image itself) to 5.
        random: where the noise or the rain falls; for comparable severities give generators in the same state.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UsageError: an unknown kind, or a severity out of range.
    """
    check_kinds((kind,))
    if not 0 <= severity <= SEVEREST:
        raise UsageError(f"severity is {severity}; it must be in 0..{SEVEREST:g}")
    if severity == 0:
        return image
    worse = _KINDS[kind](image.astype(np.float32), severity / SEVEREST, random)
    return np.rint(np.clip(worse, 0, 255)).astype(np.uint8)


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; infinite for equal ones."""
    error = np.square(clean.astype(np.float32) - other.astype(np.float32)).mean(dtype=np.float64)
    return math.inf if error == 0 else 10 * math.log10(255 * 255 / float(error))


def quality(ratio: float) -> float:
    """A quality score of a peak signal-to-noise ratio in dB: 0.5 at 24 dB, 0.95 at 36 dB, 1 without any error."""
    return 1 / (1 + math.exp(-(ratio - 24) / 4))
