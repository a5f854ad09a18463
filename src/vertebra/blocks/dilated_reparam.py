"""Dilated reparam block: a large depthwise convolution that is trained beside small dilated ones and runs as one.

Shapes: (B, C, H, W) in, the same out. A dilated convolution is a large one most of whose weights are zero, so in
evaluation, where a batch norm is an affine map, all branches are one depthwise convolution. The block runs as that one
whenever its norms do not look at the batch, and `fused` keeps it. From UniRepLKNet (arXiv 2311.15599, section 3.1);
used in `vertebra.backbones.unireplknet` and through `vertebra.surgery.swap`.
"""

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from vertebra.blocks.depthwise import convolve, depthwise, span
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Branches: TypeAlias = Sequence[tuple[int, int]]
"""(kernel, dilation) of each branch beside the large convolution."""

TABLE: dict[int, Branches] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""The released branches of each kernel."""


def dilated_reparam(channels: int, *, kernel: int = 13, branches: Branches | None = None) -> "DilatedReparam":
    """The block for maps of `channels`.

    Args:
        channels: of the maps.
        kernel: odd size of the large convolution in cells.
        branches: (kernel, dilation) of each convolution beside it, odd kernels that span at most `kernel` cells; None
            takes the released ones of `TABLE`. ((3, 1),) is RepLKNet's small kernel.

    Raises:
        UsageError: fewer than one channel, an even kernel, one without released branches where none are given, or a
            branch that is even or does not fit into the kernel.
    """
    if channels < 1:
        raise UsageError(f"dilated_reparam: channels is {channels}; it must be at least 1")
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"dilated_reparam: kernel is {kernel}; it must be odd and at least 1")
    if branches is None and kernel not in TABLE:
        raise UsageError(
            f"dilated_reparam: there are no released branches for kernel {kernel}; it has them for"
            f" {', '.join(map(str, TABLE))}; give branches=((kernel, dilation), ...)"
        )
    chosen = tuple(TABLE[kernel] if branches is None else branches)
    for size, dilation in chosen:
        if size < 1 or size % 2 == 0 or dilation < 1 or span(size, dilation) > kernel:
            raise UsageError(
                f"dilated_reparam: a branch of kernel {size} and dilation {dilation} spans {span(size, dilation)}"
                f" cells; branches have odd kernels and span at most kernel={kernel}"
            )
    return DilatedReparam(channels, kernel=kernel, branches=chosen)


class DilatedReparam(nn.Module):
    """A large depthwise convolution and dilated small ones, each with its batch norm, added; see `dilated_reparam`.

    Attributes:
        convs: the large convolution, then the branches.
        norms: one behind each convolution.
    """

    def __init__(self, channels: int, *, kernel: int, branches: Branches) -> None:
        super().__init__()
        sizes = ((kernel, 1), *branches)
        self.convs = nn.ModuleList(depthwise(channels, size, dilation=dilation) for size, dilation in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in self.convs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps; one convolution where no norm looks at the batch."""
        if not any(norm.training for norm in self.norms):
            return convolve(x, *self.merged())
        if x.device.type == "cpu":
            x = x.contiguous()  # once for all branches
        out: Tensor | None = None
        for conv, norm in zip(self.convs, self.norms, strict=True):
            out = norm(conv(x)) if out is None else out.add_(norm(conv(x)))  # no norm's gradient needs its output
        assert out is not None
        return out

    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, k, k) and bias (C,) of the one convolution that all branches are in evaluation."""
        pairs = [folded(conv.weight, norm) for conv, norm in zip(self.convs, self.norms, strict=True)]  # type: ignore[arg-type]
        kernel, bias = pairs[0]
        side = kernel.shape[-1]
        for (small, shift), conv in zip(pairs[1:], self.convs[1:], strict=True):
            kernel, bias = kernel + _spread(small, conv.dilation[0], side), bias + shift  # type: ignore[index]
        return kernel, bias

    def fused(self) -> nn.Conv2d:
        """The one convolution, with a bias."""
        kernel, bias = self.merged()
        return filled(depthwise(len(kernel), kernel.shape[-1], bias=True), kernel, bias)


def _spread(kernel: Tensor, dilation: int, side: int) -> Tensor:
    """A dilated kernel as a dense one of `side` cells: zeros between its weights and around them."""
    first = (side - span(kernel.shape[-1], dilation)) // 2
    places = slice(first, side - first, dilation)
    dense = kernel.new_zeros((*kernel.shape[:2], side, side))
    dense[..., places, places] = kernel
    return dense


def folded(weight: Tensor, norm: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the batch norm behind it folded in, as evaluation has them.

    Args:
        weight: (outputs, ...).
        norm: of the outputs.
        bias: (outputs,) of the layer, where it has one.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return weight * gain.reshape(-1, *[1] * (weight.ndim - 1)), norm.bias + shift * gain


L = TypeVar("L", nn.Conv2d, nn.Linear)


@torch.no_grad()
def filled(layer: L, weight: Tensor, bias: Tensor) -> L:
    """A layer with these numbers, on their device and in their floating type."""
    layer = layer.to(weight.device, weight.dtype)
    assert layer.bias is not None
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
