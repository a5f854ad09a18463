"""Spatial-reduction attention: every token asks, and square patches of tokens answer.

Shapes: tokens (B, N, C) of a map of H x W in, the same out. Keys and values are read from a map that a convolution of
kernel and stride R has made R times smaller on both sides, with a norm behind it: R^2 times fewer keys, and products
that are as much smaller (arXiv 2102.12122, section 3.3). Used alone, through `vertebra.surgery.swap`, and in
`vertebra.backbones.pvt`.

    swap(backbone, "*.attn", "spatial_reduction_attention", heads=3, reduction=2, prefix=1)      # in a ViT

Beyond the paper: maps that are no multiple of R are padded with zeros at the bottom and on the right, where the
authors' convolution leaves out what remains; and tokens in front of the map (a class token) are keys as they are.
"""

from math import isqrt

import torch
from torch import Tensor, nn

from vertebra.blocks.attention import attend
from vertebra.blocks.rows import Dense
from vertebra.blocks.windows import Sides, padded
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def spatial_reduction_attention(
    dim: int,
    *,
    heads: int | None = None,
    reduction: int = 2,
    prefix: int = 0,
    bias: bool = True,
    drop: float = 0.0,
) -> "SpatialReductionAttention":
    """The block for tokens (B, N, dim).

    Args:
        dim: width of a token.
        heads: of the attention; by default one for each 64 channels, at least one.
        reduction: R, how many times smaller the map of keys and values is on each side; 1 is plain attention.
        prefix: tokens in front of those of the map, such as a class token.
        bias: whether queries, keys and values have one.
        drop: probability that a weight of the attention is dropped in training, 0..1.

    Raises:
        UsageError: heads that do not divide dim, or a number out of range.
    """
    heads = max(1, dim // 64) if heads is None else heads
    if min(dim, heads, reduction) < 1 or prefix < 0 or not 0 <= drop < 1:
        raise UsageError(
            f"spatial_reduction_attention: dim {dim}, heads {heads}, reduction {reduction}, prefix {prefix}, drop"
            f" {drop}; the first three are at least 1, prefix at least 0, and drop is in [0, 1)"
        )
    if dim % heads:
        raise UsageError(f"spatial_reduction_attention: {heads} heads do not divide dim {dim}; take a divisor")
    return SpatialReductionAttention(dim=dim, heads=heads, reduction=reduction, prefix=prefix, bias=bias, drop=drop)


class SpatialReductionAttention(nn.Module):
    """Attention to a reduced map; build it with `spatial_reduction_attention`.

    Attributes:
        q: tokens to queries.
        kv: reduced tokens to all keys, head by head, then all values.
        reduce: the convolution of kernel and stride R; None where R is 1.
        norm: behind it; None where R is 1.
        proj: of the joined heads.
    """

    def __init__(self, *, dim: int, heads: int, reduction: int, prefix: int, bias: bool, drop: float) -> None:
        super().__init__()
        self.heads, self.reduction, self.prefix, self.drop = heads, reduction, prefix, drop
        self.q = Dense(dim, dim, bias=bias)
        self.kv = Dense(dim, 2 * dim, bias=bias)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None  # eps 1e-5, unlike the norms of the reference's blocks
        self.proj = Dense(dim, dim)

    def forward(self, x: Tensor, grid: Sides | None = None) -> Tensor:
        """Tokens to tokens.

        Args:
            x: (B, prefix + H * W, dim).
            grid: (H, W); None stands for a square map.

        Raises:
            UsageError: the tokens are not those of such a map.
        """
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self._reduced(x, grid)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, drop=self.drop if self.training else 0.0))

    def _reduced(self, x: Tensor, grid: Sides | None) -> Tensor:
        """What keys and values are read from: the tokens in front, and the map's made fewer."""
        if self.reduce is None or self.norm is None:
            return x
        height, width = self._grid(x.shape[1] - self.prefix, grid)
        cells = padded(x[:, self.prefix :].unflatten(1, (height, width)), self.reduction, self.reduction)
        fewer = self.norm(self.reduce(cells.movedim(3, 1)).flatten(2).mT)
        return torch.cat((x[:, : self.prefix], fewer), 1) if self.prefix else fewer

    def _grid(self, cells: int, grid: Sides | None) -> Sides:
        side = isqrt(max(0, cells))
        height, width = (side, side) if grid is None else (int(grid[0]), int(grid[1]))
        if height * width != cells or not cells:
            what = "a square map" if grid is None else f"a map of {height} x {width}"
            raise UsageError(
                f"spatial_reduction_attention: {cells + self.prefix} tokens are not {self.prefix} and {what}; say how"
                " many lie in front of the map with prefix=..., and give its sides as block(x, (H, W))"
            )
        return height, width
