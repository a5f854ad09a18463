"""Multi-axis gated MLP: half of the channels are mixed within windows, half over a grid that spans the map.

Shapes: (B, C, H, W) in, the same out, any size: what is no multiple of `window` and `grid` is continued by its last row
and column inside and cropped again. Windows have `window` x `window` places and are as many as the map needs, so that
mixing within them is local; the `grid` x `grid` cells grow with the map, and the places at the same spot of every cell
are mixed, which is global. Either way one matrix mixes side x side places: weights fit a map of any size.

A half is a gated MLP (gMLP, arXiv 2105.08050) with a residual: what gates is normalised, mixed over places and added
to 1. Introduced in MAXIM (arXiv 2201.02973, figure 3), which `vertebra.backbones.maxim` builds. Departs from the
reference in nothing.
"""

from collections.abc import Sequence
from math import lcm
from typing import Any, Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from vertebra.blocks.rows import Dense
from vertebra.blocks.windows import group
from vertebra.errors import UsageError, near

Axis = Literal["block", "grid"]

VARIANTS: dict[str, dict[str, Any]] = {
    "multi_axis": {"axes": ("grid", "block")},
    "block": {"axes": ("block", "block")},
    "grid": {"axes": ("grid", "grid")},
}

EPS, SPREAD = 1e-6, 0.02
"""Of the norms; standard deviation of the weights at the start."""


def multi_axis_mlp(
    channels: int, variant: str = "multi_axis", *, window: int = 8, grid: int = 8, ratio: int = 2
) -> "OfMaps":
    """The block for maps of `channels`, with its residual.

    Args:
        channels: of the map.
        variant: "multi_axis", or both halves of the channels along the same axis: "block" (local), "grid" (global).
        window: side of a window in places, which the paper calls a block.
        grid: cells of the grid, down and across.
        ratio: hidden channels of a gated MLP, before the split, over its own.

    Raises:
        UsageError: an unknown variant, or a number out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"multi_axis_mlp has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    if min(channels, window, grid) < 1 or ratio < 2 or channels * ratio % 2:
        raise UsageError(
            f"multi_axis_mlp: channels {channels}, window {window}, grid {grid}, ratio {ratio}; the first three are at"
            " least 1, ratio at least 2, and channels times ratio is even, as multi_axis_mlp(64, window=8, ratio=2)"
        )
    return OfMaps(MultiAxisMlp(channels, VARIANTS[variant]["axes"], block=window, grid=grid, ratio=ratio))


class OfMaps(nn.Module):
    """A block of (B, H, W, C) whose sides are multiples, given maps (B, C, H, W) of any size."""

    def __init__(self, layer: "MultiAxisMlp") -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        height, width = x.shape[2:]
        more = -height % self.layer.multiple, -width % self.layer.multiple
        if any(more):
            x = pad(x, (0, more[1], 0, more[0]), mode="replicate")
        x = self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x[:, :, :height, :width] if any(more) else x


class MultiAxisMlp(nn.Module):
    """The block on (B, H, W, C), H and W multiples of `multiple`.

    Attributes:
        mlps: the gated MLPs of the halves of the channels.
        multiple: of which the sides of a map are.
    """

    def __init__(
        self, dim: int, axes: Sequence[Axis], *, block: int, grid: int, ratio: int = 2, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        sides: dict[Axis, int] = {"block": block, "grid": grid}
        self.multiple = lcm(*(sides[axis] for axis in axes))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.expand, self.reduce = dense(dim, 2 * dim), dense(2 * dim, dim)
        self.mlps = nn.ModuleList(GatedMlp(dim, SpatialMix(axis, sides[axis]), ratio) for axis in axes)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        halves = tanh_gelu(self.expand(self.norm(x))).chunk(2, -1)
        mixed = [mlp(half) for mlp, half in zip(self.mlps, halves, strict=True)]
        return self.drop_path(self.reduce(torch.cat(mixed, -1))) + x


class GatedMlp(nn.Module):
    """A gated MLP along one axis, with its residual."""

    def __init__(self, dim: int, mix: "SpatialMix", ratio: int) -> None:
        super().__init__()
        hidden = ratio * dim // 2
        self.norm, self.gate_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(hidden, eps=EPS)
        self.expand, self.reduce = dense(dim, 2 * hidden), dense(hidden, dim)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        passed, gate = tanh_gelu(self.expand(self.norm(x))).chunk(2, -1)
        gate = self.mix.mixed(self.gate_norm(self.mix.cut(gate)), self.mix.bias + 1)
        return self.reduce(self.mix.joined(gate, passed)) + x


class SpatialMix(nn.Module):
    """A linear layer over the side x side places of each group, the same for all groups and channels.

    Attributes:
        axis: "block": a group is a window; "grid": it has one place of each cell.
        weight: (places, places), to from; those of a group in the order of rows.
    """

    def __init__(self, axis: Axis, side: int, *, bias: float = 0.0) -> None:
        super().__init__()
        self.axis: Axis = axis
        self.side = side
        self.weight = nn.Parameter(torch.empty(side**2, side**2).normal_(std=SPREAD))
        self.bias = nn.Parameter(torch.full((side**2,), bias))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        return self.joined(self.mixed(self.cut(x), self.bias))

    def cut(self, x: Tensor) -> Tensor:
        """Maps to (B, rows, columns, h, w, C): windows, or cells, with the places inside; in contiguous memory."""
        h, w = (self.side, self.side) if self.axis == "block" else (x.shape[1] // self.side, x.shape[2] // self.side)
        rows = x.shape[1] // h
        return group(x, (h, w)).unflatten(1, (rows, -1)).unflatten(3, (h, w))

    def mixed(self, x: Tensor, bias: Tensor) -> Tensor:
        """Mix what `cut` gave: over the places inside of windows, or over cells."""
        # windows (B * R * S, h * w, C); cells (B, R * S, h * w * C)
        groups = x.flatten(3, 4).flatten(0, 2) if self.axis == "block" else x.flatten(3).flatten(1, 2)
        weight = self.weight.expand(len(groups), -1, -1)
        return torch.baddbmm(bias[:, None], weight, groups).view(x.shape)

    def joined(self, x: Tensor, passed: Tensor | None = None) -> Tensor:
        """What `mixed` gave as maps (B, H, W, C), times maps `passed` if given."""
        x = x.transpose(2, 3)  # (B, R, h, S, w, C)
        if passed is not None:
            x = passed.unflatten(2, x.shape[3:5]).unflatten(1, x.shape[1:3]) * x
        return x.flatten(3, 4).flatten(1, 2)


def dense(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts with small weights and no bias."""
    layer = Dense(inputs, outputs)
    nn.init.normal_(layer.weight, std=SPREAD)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that the reference has."""
    return gelu(x, approximate="tanh")
