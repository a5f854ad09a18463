"""LS convolution: a large static kernel looks around and says how a small kernel gathers, at every place anew.

Shapes: (B, C, H, W) in, the same out, C a multiple of `share`. Perception: half the channels, a 7 x 7 depth-wise
convolution, and from it nine weights a place for each of C / 8 kernels, normalised over the nine taps and all places.
Aggregation: each channel is summed over its 3 x 3 neighbourhood (zeros outside) with the weights of its kernel; the
kernels take turns, so channel c has number c mod C / 8. Then a batch norm and the shortcut. Used alone, through
`vertebra.surgery.swap`, and in `vertebra.backbones.lsnet`. Section 3.2 of arXiv 2503.23135; departs from it in nothing.
"""

from collections import OrderedDict
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

_TRITON = find_spec("triton") is not None


def ls_conv(channels: int, *, kernel: int = 7, share: int = 8) -> "LSConv":
    """The block for maps of `channels`.

    Args:
        channels: of the maps.
        kernel: odd size in pixels of the depth-wise convolution that looks around.
        share: channels that have one small kernel in common.

    Raises:
        UsageError: an even kernel, or channels that are no multiple of `share` or are odd.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"ls_conv: kernel is {kernel}; it must be odd and at least 1")
    if share < 1 or channels < 2 or channels % 2 or channels % share:
        raise UsageError(f"ls_conv: channels is {channels}; it must be even and a multiple of share, which is {share}")
    return LSConv(channels=channels, kernel=kernel, share=share)


class LSConv(nn.Module):
    """Perception, aggregation, norm, shortcut; build it with `ls_conv`.

    Attributes:
        perception: maps to the weights of the small kernels.
        norm: after the aggregation.
    """

    def __init__(self, *, channels: int, kernel: int = 7, share: int = 8) -> None:
        super().__init__()
        self.perception = Perception(channels=channels, kernel=kernel, share=share)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        return self.norm(aggregate(x, self.perception(x))).add_(x)


class Perception(nn.Module):
    """The weights of the small kernels, from a large neighbourhood (eq. 5).

    Attributes:
        narrow: to half the channels.
        look: the large depth-wise convolution.
        mix: of the channels.
        weigh: to nine numbers a kernel, the taps of a kernel side by side.
        norm: a group is the nine taps of one kernel.
    """

    def __init__(self, *, channels: int, kernel: int, share: int) -> None:
        super().__init__()
        half, kernels = channels // 2, channels // share
        self.narrow = conv_norm(channels, half)
        self.look = conv_norm(half, half, kernel, groups=half)
        self.mix = conv_norm(half, half)
        self.weigh = nn.Conv2d(half, 9 * kernels, 1)
        self.norm = nn.GroupNorm(kernels, 9 * kernels)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to weights (B, C / share, 9, H, W)."""
        x = self.look(self.narrow(x).relu_())
        weights = self.norm(self.weigh(self.mix(x).relu_()))
        return weights.unflatten(1, (self.kernels, 9))


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), without bias, and its batch norm: `conv` and `norm`."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def aggregate(x: Tensor, weights: Tensor) -> Tensor:
    """Sum each channel over its 3 x 3 neighbourhood, zeros outside, with weights of every place's own (eq. 6).

    Args:
        x: maps (B, C, H, W).
        weights: (B, K, 9, H, W), taps row by row; C is a multiple of K, and channel c takes kernel c mod K.

    Returns:
        Maps (B, C, H, W) in the number format and layout of `x`. Derivatives are of first order.
    """
    weights = weights.to(x.dtype)  # automatic mixed precision leaves a group norm in 32 bit
    if torch.compiler.is_compiling():
        return plain_aggregate(x, weights)
    if x.is_cuda and _TRITON:
        from vertebra.blocks.ls_conv_triton import aggregate_cuda

        return aggregate_cuda(x, weights)
    out: Any = _Aggregate.apply(x, weights)  # (B, C, H * W)
    return out.unflatten(2, x.shape[2:])


def plain_aggregate(x: Tensor, weights: Tensor) -> Tensor:
    """`aggregate` by operations that a compiler fuses and exports; slow without one."""
    height, width = x.shape[2:]
    groups = (-1, weights.shape[1])
    around = nn.functional.pad(x, (1, 1, 1, 1)).unflatten(1, groups)  # (B, C / K, K, H + 2, W + 2)
    out = torch.zeros_like(x).unflatten(1, groups)
    for tap in range(9):
        row, column = divmod(tap, 3)
        out = out + around[..., row : row + height, column : column + width] * weights[:, None, :, tap]
    return out.flatten(1, 2)


class _Aggregate(Function):
    """The same with rows laid end to end, so that a tap is a shift and every operation runs over long lines.

    A shift past the end of a row meets the next row: the weights there are set to zero once, for all channels.
    Memory has the layout of `x`: places innermost, or the channels of a place. S channels share each of K kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernels, places, last = weights.shape[1], height * width, _is_last(x)
        lines = _room(x, last, batch, channels, places + 2 * width + 2)  # a row and a place more on either side
        lines[..., : width + 1] = 0
        lines[..., width + 1 : width + 1 + places] = x.flatten(2)
        lines[..., width + 1 + places :] = 0
        taps = _room(x, last, 9, batch, kernels, places)
        taps.copy_(weights.flatten(3).permute(2, 0, 1, 3))
        _no_wrap(taps, height, width)
        out = _room(x, last, batch, channels, places)
        lines, shared = lines.unflatten(1, (-1, kernels)), out.unflatten(1, (-1, kernels))  # (B, S, K, ...)
        torch.mul(lines[..., :places], taps[0, :, None], out=shared)
        for tap, shift in _shifts(width)[1:]:
            shared.addcmul_(lines[..., shift : shift + places], taps[tap, :, None])
        ctx.save_for_backward(lines, taps)
        ctx.sides = height, width
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        lines, taps = ctx.saved_tensors
        (height, width), places, last = ctx.sides, taps.shape[3], taps.stride(3) > 1
        grad = _room(grads[0], last, *grads[0].shape).copy_(grads[0]).unflatten(1, lines.shape[1:3])
        grad_lines = torch.zeros_like(lines)
        for tap, shift in _shifts(width):
            grad_lines[..., shift : shift + places].addcmul_(grad, taps[tap, :, None])
        step = lines.stride(3)  # windows: the nine shifts of all lines, none of them copied
        windows = lines.as_strided((3, 3, *grad.shape), (width * step, step, *lines.stride()))
        grad_taps = torch.zeros_like(taps)
        for shared in range(lines.shape[1]):
            grad_taps.unflatten(0, (3, 3)).addcmul_(windows[:, :, :, shared], grad[:, shared])
        _no_wrap(grad_taps, height, width)
        grad_x = grad_lines[..., width + 1 : width + 1 + places].flatten(1, 2)
        sides = (height, width)
        return grad_x.unflatten(2, sides), grad_taps.permute(1, 2, 0, 3).unflatten(3, sides)


def _is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _room(like: Tensor, last: bool, *shape: int) -> Tensor:
    """Memory for a tensor (..., channels, places), with the channels innermost or the places."""
    return like.new_empty(*shape[:-2], shape[-1], shape[-2]).mT if last else like.new_empty(shape)


def _shifts(width: int) -> list[tuple[int, int]]:
    """Taps, row by row, and how far along the padded line each looks."""
    return [(tap, tap // 3 * width + tap % 3) for tap in range(9)]


def _no_wrap(taps: Tensor, height: int, width: int) -> None:
    """Set the weights of neighbours beyond the left and the right edge to zero, in place."""
    grid = taps.unflatten(3, (height, width))
    grid[0::3, ..., 0] = 0
    grid[2::3, ..., -1] = 0
