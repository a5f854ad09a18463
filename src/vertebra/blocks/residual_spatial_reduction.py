"""Residual spatial reduction: half the sides and more channels, by a convolution beside a pooled shortcut.

Shapes: maps (B, C, H, W) in, (B, outputs, ceil(H / 2), ceil(W / 2)) out. A layer norm over channels and a 3 x 3
convolution of stride 2, and beside them the mean of each 2 x 2 cells of the maps as they came, before the norm, with
zeros in the channels that are new, which are the last. So a stage of a transformer begins with what the one before has
found, and the first n channels of the shortcut depend on nothing but the first n that came in: narrow networks can
share the weights of wide ones. Learned positions are added where there is a `grid`.

Tokens that have no place in the map (a class token) go through the same norm and a linear layer, beside a shortcut
that widens them with zeros. Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.vit_resnas`
(arXiv 2109.00642, the part between its stages). Maps of odd sides, which the paper does not have, are reduced to the
larger half: the convolution pads with zeros, and the mean is that of the cells that there are.
"""

from typing import Literal, get_args

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from vertebra.blocks.positions import fitted
from vertebra.blocks.windows import Sides
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Shortcut = Literal["pooled", "none"]


def residual_spatial_reduction(
    channels: int,
    outputs: int,
    *,
    grid: Sides | None = None,
    prefix: int = 0,
    shortcut: Shortcut = "pooled",
    eps: float = 1e-6,
) -> "ResidualSpatialReduction":
    """The reduction for maps of `channels`.

    Args:
        channels: of the maps that come.
        outputs: of the maps that go; at least `channels` with a shortcut.
        grid: rows and columns of the maps that come, for learned positions of those that go; resized for maps of
            another size. None for no positions.
        prefix: tokens without a place that come along; 0 for maps alone.
        shortcut: "pooled", or "none" for the convolution and the linear layer alone.
        eps: of the norm.

    Raises:
        UsageError: a number below 1, fewer outputs than channels with a shortcut, or an unknown shortcut.
    """
    if shortcut not in get_args(Shortcut):
        raise UsageError(
            f"residual_spatial_reduction: shortcut is {shortcut!r}; it can be {' or '.join(get_args(Shortcut))}"
        )
    least = channels if shortcut == "pooled" else 1
    if channels < 1 or outputs < least:
        raise UsageError(
            f"residual_spatial_reduction: channels is {channels} and outputs is {outputs}; they must be at least 1, and"
            " with a shortcut, which adds channels and takes none away, outputs at least channels"
        )
    if prefix < 0:
        raise UsageError(f"residual_spatial_reduction: prefix is {prefix}; it must be at least 0")
    return ResidualSpatialReduction(
        channels=channels, outputs=outputs, grid=grid, prefix=prefix, shortcut=shortcut, eps=eps
    )


class ResidualSpatialReduction(nn.Module):
    """Norm and strided convolution beside a pooled shortcut; build it with `residual_spatial_reduction`.

    Attributes:
        norm: over channels, of maps and tokens.
        conv: 3 x 3 of stride 2, channels to outputs.
        widen: channels to outputs, of the tokens without a place; None where there are none.
        positions: (1, N, outputs), learnt on the grid that goes; None where there is none.
        grid: rows and columns of that grid.
    """

    def __init__(
        self, *, channels: int, outputs: int, grid: Sides | None, prefix: int, shortcut: Shortcut, eps: float
    ) -> None:
        super().__init__()
        self.shortcut, self.more = shortcut, outputs - channels
        self.grid = None if grid is None else (-(-grid[0] // 2), -(-grid[1] // 2))
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.conv = nn.Conv2d(channels, outputs, 3, 2, 1)
        self.widen = _widening(channels, outputs) if prefix else None
        table = (
            None if self.grid is None else trunc_normal_(torch.empty(1, self.grid[0] * self.grid[1], outputs), std=0.02)
        )
        self.positions = None if table is None else nn.Parameter(table)

    def forward(self, maps: Tensor, tokens: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Maps, and tokens without a place if they are given, to the same of the next stage.

        Args:
            maps: (B, channels, H, W).
            tokens: (B, K, channels).

        Returns:
            (B, outputs, ceil(H / 2), ceil(W / 2)); with tokens given, also (B, K, outputs).

        Raises:
            UsageError: tokens, where it was built without `prefix`.
        """
        normed = self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.conv(normed.contiguous())  # small wide maps take up to a third less time with the channels first
        if self.positions is not None:
            y = y + self._positions((y.shape[2], y.shape[3]))
        if self.shortcut == "pooled":
            y = y + pad(avg_pool2d(maps, 2, 2, ceil_mode=True), (0, 0, 0, 0, 0, self.more))
        return y if tokens is None else (y, self._widened(tokens))

    def _widened(self, tokens: Tensor) -> Tensor:
        if self.widen is None:
            raise UsageError(
                "residual_spatial_reduction: it is built for maps alone; build it with prefix=1 for tokens"
            )
        y = self.widen(self.norm(tokens))
        return y + pad(tokens, (0, self.more)) if self.shortcut == "pooled" else y

    def _positions(self, grid: Sides) -> Tensor:
        """(1, outputs, h, w) of a grid."""
        assert self.positions is not None and self.grid is not None
        return fitted(self.positions, self.grid, grid).mT.unflatten(2, grid)


def _widening(channels: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(channels, outputs)
    trunc_normal_(layer.weight, std=0.02)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
