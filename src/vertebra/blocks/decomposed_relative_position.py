"""Attention with decomposed relative positions: a row's vector and a column's vector, each multiplied with the query.

Shapes: tokens (B, N, C) of a map of H x W in, the same out. The product of a query q at (i, j) with the key k at (l, m)
is `scale * q k + q rows[i - l] + q columns[j - m]`: what an offset means depends on what asks, and the tables have
2 H - 1 and 2 W - 1 vectors where one for each offset would have (2 H - 1)(2 W - 1) (arXiv 2112.01526, section 4.1;
arXiv 2203.16527 has them in plain transformers). The query is not scaled where it meets the tables. They start at zero:
then this is plain attention. A map of other sides than they are for takes them stretched, linearly.

    swap(backbone, "*.attn", "decomposed_relative_position", heads=3, prefix=1)      # in a ViT

Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.vitdet`. Beyond the papers: tokens in front of
the map (a class token) have no place, and products with them no positions.
"""

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from vertebra.blocks.attention import attend
from vertebra.blocks.rows import Dense
from vertebra.blocks.windows import Sides
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def decomposed_relative_position(
    dim: int,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    sides: int | Sides = 14,
    prefix: int = 0,
    bias: bool = True,
) -> "DecomposedRelativePosition":
    """The block for tokens (B, N, dim).

    Args:
        dim: width of a token.
        heads: of the attention; by default one for each 64 channels, at least one.
        head_dim: channels of a head; dim / heads by default.
        sides: of the map that the tables are for, in tokens.
        prefix: tokens in front of those of the map, such as a class token.
        bias: whether queries, keys and values have one.

    Raises:
        UsageError: heads that do not divide dim, where head_dim is not given, or a number out of range.
    """
    heads = max(1, dim // 64) if heads is None else heads
    sides = (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))
    if min(dim, heads, *sides) < 1 or prefix < 0:
        raise UsageError(
            f"decomposed_relative_position: dim {dim}, heads {heads}, sides {sides}, prefix {prefix}; prefix is at"
            " least 0 and the others at least 1"
        )
    if head_dim is None and dim % heads:
        raise UsageError(
            f"decomposed_relative_position: {heads} heads do not divide dim {dim}; take a divisor, or give head_dim"
        )
    head_dim = head_dim or dim // heads
    return DecomposedRelativePosition(dim=dim, heads=heads, head_dim=head_dim, sides=sides, prefix=prefix, bias=bias)


class DecomposedRelativePosition(nn.Module):
    """Attention with a table for rows and one for columns; build it with `decomposed_relative_position`.

    Attributes:
        qkv: tokens to all queries, head by head, then all keys, then all values.
        rows: (2 H - 1, head_dim), by the offset from key to query, from 1 - H to H - 1; all heads share it.
        columns: (2 W - 1, head_dim), likewise.
        q_norm: of queries; k_norm of keys; norm of the joined heads. Nothing, unless a ViT that has them put its own.
        proj: of the joined heads.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, sides: Sides, prefix: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.prefix = heads, head_dim, prefix
        self.qkv = Dense(dim, 3 * heads * head_dim, bias=bias)
        self.rows = nn.Parameter(torch.zeros(2 * sides[0] - 1, head_dim))
        self.columns = nn.Parameter(torch.zeros(2 * sides[1] - 1, head_dim))
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.proj = Dense(heads * head_dim, dim)

    def forward(self, x: Tensor, grid: Sides | None = None) -> Tensor:
        """Tokens to tokens.

        Args:
            x: (B, prefix + H * W, dim).
            grid: (H, W); None stands for a square map.

        Raises:
            UsageError: the tokens are not those of such a map.
        """
        grid = self._grid(x.shape[1] - self.prefix, grid)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(self.norm(attend(q, k, v, bias=self._places(q, grid))))

    def _places(self, q: Tensor, grid: Sides) -> Tensor:
        """What positions add to the products of queries (B, heads, prefix + N, d): as many rows and columns."""
        cells = q[:, :, self.prefix :].unflatten(2, grid)  # (B, heads, H, W, d)
        down = cells @ offsets(self.rows, grid[0]).mT  # (B, heads, H, W, H)
        across = (cells.transpose(2, 3) @ offsets(self.columns, grid[1]).mT).transpose(2, 3)  # (B, heads, H, W, W)
        places = (down[..., :, None] + across[..., None, :]).flatten(4, 5).flatten(2, 3)
        return pad(places, (self.prefix, 0, self.prefix, 0)) if self.prefix else places

    def _grid(self, cells: int, grid: Sides | None) -> Sides:
        side = isqrt(max(0, cells))
        height, width = (side, side) if grid is None else (int(grid[0]), int(grid[1]))
        if height * width != cells or not cells:
            what = "a square map" if grid is None else f"a map of {height} x {width}"
            raise UsageError(
                f"decomposed_relative_position: {cells + self.prefix} tokens are not {self.prefix} and {what}; say how"
                " many lie in front of the map with prefix=..., and give its sides as block(x, (H, W))"
            )
        return height, width


def offsets(table: Tensor, side: int) -> Tensor:
    """Vectors (side, side, d) of every offset from a key (second) to a query (first), from a table (2 n - 1, d)."""
    places = torch.arange(side, device=table.device)
    return fitted(table, side)[places[:, None] - places + side - 1]


def fitted(table: Tensor, side: int) -> Tensor:
    """A table (2 n - 1, d) for maps of another side: (2 side - 1, d), stretched linearly."""
    if len(table) == 2 * side - 1:
        return table
    return interpolate(table.mT[None], size=2 * side - 1, mode="linear")[0].mT
