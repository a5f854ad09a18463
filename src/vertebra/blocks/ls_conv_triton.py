"""The aggregation of LS convolution as Triton kernels, for CUDA: `ls_conv.aggregate` imports this there alone.

A program has a batch element and a run of (kernel, place) pairs, and walks over the channels that share a kernel, so
that its weights come from memory once; sums are in 32 bit (64 for 64-bit maps). Both layouts are read and written as
they lie: neighbouring lanes are neighbouring places, or, channels-last, neighbouring kernels. Under
`TRITON_INTERPRET=1` the kernels run on the CPU, where tests hold them to the plain form.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

_BLOCK = 256


def aggregate_cuda(x: Tensor, weights: Tensor) -> Tensor:
    """As `ls_conv.aggregate`, for tensors of one number format."""
    out: Any = _Aggregate.apply(x, weights)
    return out


class _Aggregate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x, weights = x.contiguous(memory_format=layout), _laid(weights, layout)
        out = torch.empty_like(x, memory_format=layout)
        _launch(_forward, x, weights, out)
        ctx.save_for_backward(x, weights)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weights = ctx.saved_tensors
        grad, grad_x, grad_weights = grads[0].contiguous(memory_format=ctx.layout), None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            _launch(_backward_x, grad, weights, grad_x)
        if ctx.needs_input_grad[1]:
            grad_weights = torch.empty_like(weights)
            _launch(_backward_weights, x, grad_weights, grad)
        return grad_x, grad_weights


def _laid(weights: Tensor, layout: torch.memory_format) -> Tensor:
    """Weights (B, K, 9, H, W) whose (B, K * 9, H, W) has the layout."""
    return weights.flatten(1, 2).contiguous(memory_format=layout).unflatten(1, weights.shape[1:3])


def _launch(kernel: Any, maps: Tensor, weights: Tensor, other: Tensor) -> None:
    """Run a kernel over all (kernel, place) pairs of contiguous or channels-last tensors."""
    batch, channels, height, width = maps.shape
    kernels, places = weights.shape[1], height * width
    last = not maps.is_contiguous()  # one that is both lies the same in either way
    steps = (1, channels, 9, 1, 9 * kernels) if last else (places, 1, 9 * places, places, 1)
    grid = (triton.cdiv(kernels * places, _BLOCK), batch)
    wide = maps.dtype == torch.float64
    sizes = height, width, kernels
    kernel[grid](maps, weights, other, *sizes, *steps, channels // kernels, last, wide, _BLOCK)


@triton.jit
def _pair(height, width, kernels, LAST: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Kernel, row and column of each lane, and whether there is such a pair."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = height * width
    place, number = lane % places, lane // places
    if LAST:
        place, number = lane // kernels, lane % kernels
    return number, place // width, place % width, lane < kernels * places


@triton.jit
def _forward(
    x, weights, out, height, width, kernels, xc, xp, wk, wt, wp,
    SHARE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    number, row, column, real = _pair(height, width, kernels, LAST, BLOCK)
    place, start = row * width + column, tl.program_id(1).to(tl.int64) * height * width * kernels
    x, out, weights = x + start * SHARE, out + start * SHARE, weights + start * 9
    for share in range(SHARE):
        total = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32)
        for tap in tl.static_range(9):  # type: ignore[misc]
            y, z = row + (tap // 3 - 1), column + (tap % 3 - 1)
            inside = real & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            weight = tl.load(weights + number * wk + tap * wt + place * wp, mask=real, other=0.0)
            value = tl.load(x + (share * kernels + number) * xc + (y * width + z) * xp, mask=inside, other=0.0)
            total += weight.to(total.dtype) * value.to(total.dtype)
        tl.store(out + (share * kernels + number) * xc + place * xp, total, mask=real)


@triton.jit
def _backward_x(
    grad, weights, grad_x, height, width, kernels, xc, xp, wk, wt, wp,
    SHARE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A place gives to the neighbours that look at it, each with its own weight."""
    number, row, column, real = _pair(height, width, kernels, LAST, BLOCK)
    place, start = row * width + column, tl.program_id(1).to(tl.int64) * height * width * kernels
    grad, grad_x, weights = grad + start * SHARE, grad_x + start * SHARE, weights + start * 9
    for share in range(SHARE):
        total = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32)
        for tap in tl.static_range(9):  # type: ignore[misc]
            y, z = row - (tap // 3 - 1), column - (tap % 3 - 1)
            inside = real & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            there = y * width + z
            weight = tl.load(weights + number * wk + tap * wt + there * wp, mask=inside, other=0.0)
            value = tl.load(grad + (share * kernels + number) * xc + there * xp, mask=inside, other=0.0)
            total += weight.to(total.dtype) * value.to(total.dtype)
        tl.store(grad_x + (share * kernels + number) * xc + place * xp, total, mask=real)


@triton.jit
def _backward_weights(
    x, grad_weights, grad, height, width, kernels, xc, xp, wk, wt, wp,
    SHARE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    number, row, column, real = _pair(height, width, kernels, LAST, BLOCK)
    place, start = row * width + column, tl.program_id(1).to(tl.int64) * height * width * kernels
    x, grad, grad_weights = x + start * SHARE, grad + start * SHARE, grad_weights + start * 9
    for tap in tl.static_range(9):  # type: ignore[misc]
        y, z = row + (tap // 3 - 1), column + (tap % 3 - 1)
        inside = real & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        total = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32)
        for share in range(SHARE):
            channel = (share * kernels + number) * xc
            value = tl.load(x + channel + (y * width + z) * xp, mask=inside, other=0.0)
            total += value.to(total.dtype) * tl.load(grad + channel + place * xp, mask=real, other=0.0).to(total.dtype)
        tl.store(grad_weights + number * wk + tap * wt + place * wp, total, mask=real)
