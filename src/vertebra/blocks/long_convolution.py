"""Long convolutions: kernels as large as the map itself, in any number of dimensions, by Fourier transforms.

Shapes: maps (B, ..., C, *sides) in, the same sides out; each channel has a kernel of its own. No page: a tool of the
blocks whose kernels reach over the whole map. The work grows as N log N with the cells of a map, in 32 bit at least.

    convolve(x, kernel)                               sequences; kernel[s] meets the cell s places before
    convolve(x, kernel, axes=2)                       maps; a kernel sees the cells above and to the left
    convolve(x, kernel, axes=2, ahead=(h - 1, w - 1)) kernels of 2h - 1 by 2w - 1, centred

One axis after the other is transformed, and cut to the map again on the way back, so that what padding adds is never
transformed along more than one axis at a time. Gradients are real transforms too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """In 32 bit at least: a transform in 16 bit would drown the far end of a kernel."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def transform_length(least: int) -> int:
    """The smallest length from `least` on that transforms are fast for, as measured on a CPU.

    A multiple of 4 whose odd part is 7, or has no prime factor above 5.
    """
    length = least + -least % 4
    while True:
        rest = length // (length & -length)  # the odd part
        if rest == 7:
            return length
        for prime in (3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 4


def convolve(x: Tensor, kernel: Tensor, *, axes: int = 1, ahead: Sequence[int] = ()) -> Tensor:
    """Convolve maps with kernels that may be as large as they are; outside of a map is zero.

    Cell t of the result is the sum over s of kernel[s] x[t - s + ahead], along every axis.

    Args:
        x: (B, ..., C, *sides) in 32 or 64 bit, with `axes` sides.
        kernel: (..., C, *taps) of the same type, one dimension fewer than x. Dimensions before the taps broadcast
            against those of x: (B, 1, C, N) and (K, C, N) give (B, K, C, N). Taps that meet no cell are left out.
        axes: dimensions that are convolved, the last ones.
        ahead: for each axis the taps that come before a cell's own, and so look at cells behind it; none by default,
            which makes the convolution causal.

    Returns:
        (B, ..., C, *sides); in eager mode gradients of gradients are refused.
    """
    ahead = tuple(ahead) or (0,) * axes
    sides, taps = x.shape[-axes:], kernel.shape[-axes:]
    assert len(ahead) == axes and kernel.ndim == x.ndim - 1, (ahead, x.shape, kernel.shape)
    lengths = []
    for axis, (side, tap, before) in enumerate(zip(sides, taps, ahead, strict=True)):
        lengths.append(_length(side, tap, before))
        if before:
            kernel = _turned(kernel, axis - axes, side, before, lengths[-1])
        elif isinstance(side, int) and tap > side:
            kernel = kernel.narrow(axis - axes, 0, side)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Transformed.apply(x, kernel, tuple(lengths))  # type: ignore[return-value]
    return _back(_forth(x, lengths) * _forth(kernel, lengths), lengths, sides)


def _length(side: int, taps: int, before: int) -> int:
    """Length of a transform in which what leaves the map on one side does not come back on the other."""
    if not isinstance(side, int):  # a symbol, while a graph is traced: there is no fast length to look for
        return 2 * side
    return transform_length(side + min(side - 1, max(before, taps - 1 - before)))


def _turned(kernel: Tensor, axis: int, side: int, before: int, length: int) -> Tensor:
    """A kernel of the length of the transform, along one axis: its own cell first, what is before it at the end."""
    first, last = max(0, before - (side - 1)), min(kernel.shape[axis], before + side)
    early, late = kernel.narrow(axis, first, before - first), kernel.narrow(axis, before, last - before)
    shape = list(kernel.shape)
    shape[axis] = length - (last - first)
    return torch.cat([late, kernel.new_zeros(shape), early], axis)


def _forth(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Spectrum of maps that zeros fill up to `lengths`: the last axis first, and that one is first in the result."""
    spectrum = torch.fft.rfft(x, lengths[-1])
    for length in reversed(lengths[:-1]):
        spectrum = torch.fft.fft(spectrum.movedim(-1, -len(lengths)), length)
    return spectrum


def _back(spectrum: Tensor, lengths: Sequence[int], sides: Sequence[int]) -> Tensor:
    """Maps of a spectrum of `_forth`, cut to `sides`."""
    for side in sides[:-1]:
        spectrum = torch.fft.ifft(spectrum)[..., :side].movedim(-len(sides), -1)
    return torch.fft.irfft(spectrum, lengths[-1])[..., : sides[-1]]


class _Transformed(torch.autograd.Function):
    """The convolution with gradients by real transforms; torch's own take complex ones of twice the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, lengths: tuple[int, ...]) -> Tensor:
        spectra = _forth(x, lengths), _forth(kernel, lengths)
        ctx.save_for_backward(*spectra)
        axes = len(lengths)
        ctx.sizes = x.shape[-axes:], kernel.shape[-axes:], lengths
        return _back(spectra[0] * spectra[1], lengths, x.shape[-axes:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, kernel = ctx.saved_tensors
        sides, taps, lengths = ctx.sizes
        grad = _forth(grads[0].contiguous(), lengths)
        to_x = to_kernel = None
        if ctx.needs_input_grad[0]:
            to_x = _back(_summed(grad * kernel.conj_physical(), x.shape), lengths, sides)
        if ctx.needs_input_grad[1]:
            to_kernel = _back(_summed(grad.mul_(x.conj_physical()), kernel.shape), lengths, taps)
        return to_x, to_kernel, None


def _summed(spectrum: Tensor, shape: torch.Size) -> Tensor:
    """The sum over what was broadcast."""
    return spectrum if spectrum.shape == shape else spectrum.sum_to_size(shape)
