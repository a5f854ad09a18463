"""Low frequencies of a batch of images, as smaller images."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from vertebra.errors import UsageError


def low_frequencies(images: Tensor, band: int) -> Tensor:
    """Keep the square of low frequencies of images, as images of that size (EfficientTrain, arXiv 2211.09703).

    The corners of the unshifted spectrum are those of its frequencies nearest to zero; dividing by the pixels that
    went keeps the mean intensity. Bands are even in the paper; of an odd one, the larger half is of frequencies
    from zero up. Transform, crop and inverse are linear along each axis, so they are one small matrix an axis, which
    takes about half the time of two Fourier transforms.

    Args:
        images: (B, C, H, W) float, normalised.
        band: side of what is kept, 1 to the shorter side of the images.

    Returns:
        (B, C, band, band), of the images' type; the images themselves where they have that size.

    Raises:
        UsageError: a band out of range.
    """
    height, width = images.shape[-2:]
    if not 0 < band <= min(height, width):
        raise UsageError(f"band is {band}; images of {height} x {width} pixels have 1 to {min(height, width)}")
    if band == height == width:
        return images
    exact = images if images.dtype == torch.float64 else images.float()
    down, across = (_transform(size, band).to(images.device) for size in (height, width))
    down_real, across_real = down.real.to(exact.dtype), across.real.to(exact.dtype)
    kept = down_real @ exact @ across_real.T
    if band % 2 == 0:
        # Frequency -band/2 is kept and its partner is not. What is left of it after the real part is taken is a
        # checkerboard: row i of the imaginary matrix is its row 0 times (-1)^i.
        amount = (exact @ across.imag[0].to(exact.dtype)) @ down.imag[0].to(exact.dtype)  # (B, C)
        signs = 1 - 2 * (torch.arange(band, device=images.device, dtype=exact.dtype) % 2)
        kept = kept - amount[..., None, None] * signs[:, None] * signs
    return kept.to(images.dtype)


@lru_cache(maxsize=32)
def _transform(size: int, band: int) -> Tensor:
    """Fourier transform of `size` points, crop to the `band` frequencies nearest to zero, inverse: (band, size)."""
    frequencies = torch.cat([torch.arange((band + 1) // 2), torch.arange(-(band // 2), 0)]).double()
    forward = torch.outer(frequencies, torch.arange(size)) * (-2j * math.pi / size)
    inverse = torch.outer(torch.arange(band), frequencies) * (2j * math.pi / band)
    return inverse.exp() @ forward.exp() / size
