"""Cross-gating: two maps gate each other with what a multi-axis MLP makes of them.

Shapes: maps x (B, C_x, H, W) and y (B, C_y, H, W), or y of half the size, to two maps of (B, channels, H, W). Both are
projected to `channels`; from each come gates, half of them mixed within windows and half over a grid
(`vertebra.blocks.multi_axis_mlp`); y is multiplied by those of x and x by those of y, and x gets the new y too. Maps
of any size: sides are continued by their last row and column, and cropped again. Introduced in MAXIM (arXiv 2201.02973,
section 3.3), where x is a skip connection, or the features of a stage, and y the signal from a coarser map, or from the
stage before. Departs from the reference in nothing else.
"""

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.blocks.multi_axis_mlp import EPS, Axis, SpatialMix, tanh_gelu
from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, Any]] = {
    "multi_axis": {"axes": ("grid", "block")},
    "block": {"axes": ("block", "block")},
    "grid": {"axes": ("grid", "grid")},
}

TRUNCATED = 0.87962566103423978
"""Standard deviation of a unit normal distribution that is cut at two: what flax divides by."""


def cross_gating(
    inputs: int,
    signal: int,
    variant: str = "multi_axis",
    *,
    channels: int | None = None,
    window: int = 8,
    grid: int = 8,
    upsample: bool = False,
) -> "OfMaps":
    """The block for two maps.

    Args:
        inputs: channels of x.
        signal: channels of y.
        variant: "multi_axis", or all gates mixed along one axis: "block" (local), "grid" (global).
        channels: of both results; those of x by default.
        window: side of a window in places, which the paper calls a block.
        grid: cells of the grid, down and across.
        upsample: whether y comes at half the size, and is enlarged by a transposed convolution.

    Raises:
        UsageError: an unknown variant, or a number below 1.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"cross_gating has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    channels = inputs if channels is None else channels
    if min(inputs, signal, channels, window, grid) < 1:
        raise UsageError(
            f"cross_gating: inputs {inputs}, signal {signal}, channels {channels}, window {window}, grid {grid}; all"
            " are at least 1, as cross_gating(64, 64)"
        )
    project, axes = dense(inputs, channels), VARIANTS[variant]["axes"]
    return OfMaps(CrossGating(project, signal, channels, axes, block=window, grid=grid, upsample=upsample))


class OfMaps(nn.Module):
    """The block, given maps (B, C, H, W)."""

    def __init__(self, layer: "CrossGating") -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x and y to what became of them.

        Raises:
            UsageError: maps that do not fit each other.
        """
        sides, times = (x.shape[2], x.shape[3]), 2 if self.layer.upsample is not None else 1
        if tuple(y.shape[2:]) != tuple(-(-side // times) for side in sides):
            raise UsageError(
                f"cross_gating got maps of {sides} and {tuple(y.shape[2:])}; y has"
                f" {'half of the sides of x, rounded up' if times == 2 else 'the sides of x'}"
            )
        wanted = [side + -side % lcm(self.layer.multiple, times) for side in sides]
        x, y = (_continued(x, wanted), _continued(y, [side // times for side in wanted]))
        found = self.layer(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1))
        x, y = (each.permute(0, 3, 1, 2)[:, :, : sides[0], : sides[1]] for each in found)
        return x, y


def _continued(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Maps with their last row and column again and again, up to larger sides."""
    more = sides[0] - x.shape[2], sides[1] - x.shape[3]
    return pad(x, (0, more[1], 0, more[0]), mode="replicate") if any(more) else x


class CrossGating(nn.Module):
    """The block on (B, H, W, C).

    Attributes:
        project_x: what makes (B, H, W, channels) of whatever x is; `project_y` does so of y.
        upsample: enlarges y, or None.
        multiple: of which the sides of a map are.
    """

    def __init__(
        self,
        project_x: nn.Module,
        signal: int,
        channels: int,
        axes: Sequence[Axis] = ("grid", "block"),
        *,
        block: int,
        grid: int,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.multiple = lcm(block, grid)
        self.upsample = enlarging(signal, channels) if upsample else None
        self.project_x, self.project_y = project_x, dense(channels if upsample else signal, channels)
        self.norm_x, self.norm_y = nn.LayerNorm(channels, eps=EPS), nn.LayerNorm(channels, eps=EPS)
        self.expand_x, self.expand_y = dense(channels, channels), dense(channels, channels)
        self.gates_x, self.gates_y = (SpatialGates(channels, axes, block=block, grid=grid) for _ in range(2))
        self.reduce_x, self.reduce_y = dense(channels, channels), dense(channels, channels)

    def forward(self, x: object, y: Tensor) -> tuple[Tensor, Tensor]:
        """Whatever `project_x` takes, and maps (B, h, w, signal), to two maps (B, H, W, channels)."""
        if self.upsample is not None:
            y = self.upsample(y)
        x, y = self.project_x(x), self.project_y(y)
        inner_x, inner_y = tanh_gelu(self.expand_x(self.norm_x(x))), tanh_gelu(self.expand_y(self.norm_y(y)))
        y = self.reduce_y(inner_y * self.gates_x(inner_x)) + y
        return self.reduce_x(inner_x * self.gates_y(inner_y)) + y + x, y


class SpatialGates(nn.Module):
    """Gates from maps (B, H, W, C): the channels doubled, half mixed along each axis."""

    def __init__(self, dim: int, axes: Sequence[Axis], *, block: int, grid: int) -> None:
        super().__init__()
        sides: dict[Axis, int] = {"block": block, "grid": grid}
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.expand, self.reduce = dense(dim, 2 * dim), dense(2 * dim, dim)
        self.mixes = nn.ModuleList(SpatialMix(axis, sides[axis], bias=1.0) for axis in axes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        halves = tanh_gelu(self.expand(self.norm(x))).chunk(2, -1)
        return self.reduce(torch.cat([mix(half) for mix, half in zip(self.mixes, halves, strict=True)], -1))


class Channelled(nn.Conv2d):
    """A convolution of maps (B, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps (B, H, W, C) to (B, H', W', outputs)."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Enlarging(nn.ConvTranspose2d):
    """A transposed convolution of maps (B, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # noqa: A002 - torch's name
        """Maps (B, H, W, C) to (B, 2 * H, 2 * W, outputs)."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def dense(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer over channels as flax starts it."""
    layer = Dense(inputs, outputs)
    lecun_(layer, inputs)
    return layer


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Channelled:
    """A convolution as flax starts it, padded so that `stride` divides the sides."""
    layer = Channelled(inputs, outputs, kernel, stride, (kernel - stride + 1) // 2)
    lecun_(layer, inputs * kernel**2)
    return layer


def enlarging(inputs: int, outputs: int) -> Enlarging:
    """A transposed convolution to twice the size as flax starts it."""
    layer = Enlarging(inputs, outputs, 2, 2)
    lecun_(layer, 4 * inputs)
    return layer


def lecun_(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, inputs: int) -> None:
    """Weights of variance 1 / inputs, cut at two standard deviations; no bias."""
    std = inputs**-0.5 / TRUNCATED
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
