"""gnConv: recursive gated convolution, spatial interactions of any order at about the price of one convolution.

Shapes: (B, C, H, W) in, the same out, in channels-last memory. The channels are split into groups that double in
width, C / 2^(n-1) to C. One long mixer, a depthwise convolution or a global filter, runs over all groups at once; then
the narrowest group is gated by its mixed map, widened by a matrix, gated by the next one, n times (arXiv 2207.14284,
section 3.1). There is no activation and no norm: a product is what is not linear. Used alone, through
`vertebra.surgery.swap`, and in `vertebra.backbones.hornet`. Departs from the paper in nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.blocks.depthwise import convolve
from vertebra.blocks.rows import Dense, dense
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, Any]] = {"7x7": {"grid": None}, "gf": {"grid": (14, 14)}}


def gnconv(
    channels: int,
    variant: str = "7x7",
    *,
    order: int = 3,
    kernel: int = 7,
    grid: int | Sequence[int] | None = None,
    scale: float = 1 / 3,
) -> "GnConv":
    """The block for maps of `channels`.

    Args:
        channels: of the maps; a multiple of 2^(order - 1).
        variant: "7x7" mixes with a depthwise convolution, "gf" with a `GlobalLocalFilter`.
        order: gates that follow each other, at least 1; 1 is a plain gated convolution.
        kernel: odd side of the depthwise convolution.
        grid: (height, width), or both in one, of the maps that a global filter is held for; maps of another size get
            it interpolated. Where given, the mixer is a global filter.
        scale: factor on the mixed maps, which keeps the product of many of them small.

    Raises:
        UsageError: channels that cannot be halved so often or split for the filter, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"gnconv has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if order < 1:
        raise UsageError(f"gnconv: order is {order}; it must be at least 1")
    if channels < 1 or channels % 2 ** (order - 1):
        raise UsageError(f"gnconv: channels is {channels}; order {order} needs a multiple of {2 ** (order - 1)}")
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"gnconv: kernel is {kernel}; it must be odd and at least 1")
    if scale <= 0:
        raise UsageError(f"gnconv: scale is {scale}; it must be above 0")
    dims = [channels >> halvings for halvings in reversed(range(order))]
    sides = _sides(VARIANTS[variant]["grid"] if grid is None else grid)
    if sides is None:
        return GnConv(dims=dims, mixer=LongConv(sum(dims), kernel=kernel, scale=scale))
    if sum(dims) % 2:
        raise UsageError(
            f"gnconv: channels is {channels}; a global filter of order {order} halves the {sum(dims)} mixed channels:"
            f" it needs a multiple of {2**order}"
        )
    return GnConv(dims=dims, mixer=GlobalLocalFilter(sum(dims), grid=sides, scale=scale))


def _sides(grid: int | Sequence[int] | None) -> tuple[int, int] | None:
    if grid is None:
        return None
    sides = (grid, grid) if isinstance(grid, int) else tuple(grid)
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"gnconv: grid is {grid!r}; write a side or (height, width), as 14 or (14, 14)")
    return sides[0], sides[1]


class GnConv(nn.Module):
    """Recursive gated convolution; build it with `gnconv`.

    Attributes:
        dims: widths of the groups, rising; the last is that of the maps.
        proj_in: what is gated first, and all that is mixed.
        mixer: the long mixer, over all groups.
        steps: from the width of a group to the next one.
        proj_out: of the last group.
    """

    def __init__(self, *, dims: Sequence[int], mixer: "LongConv | GlobalLocalFilter") -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.proj_in = Dense(dims[-1], dims[0] + sum(dims))
        self.mixer = mixer
        self.steps = nn.ModuleList(Dense(*pair) for pair in pairwise(dims))
        self.proj_out = Dense(dims[-1], dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        x, first = x.permute(0, 2, 3, 1), self.dims[0]  # (B, H, W, C)
        weight, bias = self.proj_in.weight, self.proj_in.bias
        gated = dense(x, weight[:first], bias[:first])
        # a product of its own, since the mixer would copy a slice
        gates = self.mixer(dense(x, weight[first:], bias[first:])).split(self.dims, -1)
        gated = gated * gates[0]
        for step, gate in zip(self.steps, gates[1:], strict=True):
            gated = step(gated) * gate
        return self.proj_out(gated).permute(0, 3, 1, 2)


class LongConv(nn.Conv2d):
    """A depthwise convolution times a constant, on (B, H, W, C)."""

    def __init__(self, channels: int, *, kernel: int, scale: float) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps (B, H, W, C) to mixed maps of that shape."""
        x, weight = input.permute(0, 3, 1, 2), self.weight * self.scale  # weights are smaller than maps
        bias = None if self.bias is None else self.bias * self.scale
        return convolve(x, weight, bias).permute(0, 2, 3, 1)


class GlobalLocalFilter(nn.Module):
    """Half of the channels through a 3 x 3 convolution, half through a filter as large as the map; norms around.

    The filter is a product with learnt weights in the frequencies of the map (GFNet, arXiv 2107.00645), in 32 bit
    whatever the network's type. The halves come out interleaved, channel by channel, as the released weights need it.

    Attributes:
        local: weight of the 3 x 3 convolution, (C / 2, 1, 3, 3).
        spectrum: real and imaginary parts, (C / 2, H, W // 2 + 1, 2) for a grid of H x W; real numbers to optimisers,
            which decay them as any weight.
    """

    def __init__(self, channels: int, *, grid: tuple[int, int], scale: float) -> None:
        super().__init__()
        self.each, self.scale = channels // 2, scale
        self.before = nn.LayerNorm(channels, eps=1e-6)
        self.local = nn.Conv2d(self.each, self.each, 3, padding=1, groups=self.each, bias=False)
        self.spectrum = nn.Parameter(torch.empty(self.each, grid[0], grid[1] // 2 + 1, 2))
        self.after = nn.LayerNorm(channels, eps=1e-6)
        nn.init.trunc_normal_(self.spectrum, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to mixed maps of that shape, times the scale."""
        near_by, far = self.before(x).split(self.each, -1)
        near_by = convolve(near_by.permute(0, 3, 1, 2), self.local.weight).permute(0, 2, 3, 1)
        both = torch.stack((near_by, self.filtered(far).to(near_by.dtype)), -1).flatten(-2)  # interleaved
        gain, shift = self.after.weight * self.scale, self.after.bias * self.scale
        return nn.functional.layer_norm(both, gain.shape, gain, shift, self.after.eps)

    def filtered(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C / 2) times the spectrum in their frequencies, float32 (or float64)."""
        x = x if x.dtype == torch.float64 else x.float()
        height, width = x.shape[1:3]
        spectrum = self.spectrum_for(height, width).to(x.dtype).contiguous()
        found = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(spectrum)
        return torch.fft.irfft2(found, s=(height, width), dim=(1, 2), norm="ortho")

    def spectrum_for(self, height: int, width: int) -> Tensor:
        """The spectrum for maps of a size, (H, W // 2 + 1, C / 2, 2), interpolated where it is held for another."""
        size = (height, width // 2 + 1)
        if tuple(self.spectrum.shape[1:3]) == size:
            return self.spectrum.permute(1, 2, 0, 3)
        planes = self.spectrum.float().permute(3, 0, 1, 2)  # (2, C / 2, H, W // 2 + 1)
        return nn.functional.interpolate(planes, size, mode="bilinear", align_corners=True).permute(2, 3, 1, 0)
