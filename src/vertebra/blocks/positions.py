"""Where a token is, told to a transformer: tables that fit any grid, waves, rotations, relative biases.

No page: a tool of the transformers.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import interpolate

Sides = tuple[int, int]


def sinusoids(length: int, dim: int) -> Tensor:
    """Waves of geometric periods (arXiv 1706.03762, section 3.5), (length, dim): sines at even, cosines at odd places.

    Channels 2j and 2j + 1 have the angle place / 10000^(2j / dim).
    """
    periods = 10000 ** (2 * torch.arange(dim).div(2, rounding_mode="floor").double() / dim)
    angles = torch.arange(length)[:, None].double() / periods
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos()).float()


def fitted(
    table: Tensor,
    before: Sequence[int],
    after: Sequence[int],
    prefix: int = 0,
    *,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    smooth: bool = False,
) -> Tensor:
    """Learned positions of a grid, for another grid.

    Args:
        table: (1, prefix + N, dim); N is the product of `before`.
        before: rows and columns that it was learned on.
        after: rows and columns that are wanted.
        prefix: positions in front that belong to no cell, and stay.
        mode: of the interpolation.
        smooth: whether a filter goes before it where the grid becomes coarser, as timm has it by default.

    Returns:
        (1, prefix + N', dim).
    """
    if tuple(before) == tuple(after):
        return table
    return resample_abs_pos_embed(
        table, list(after), list(before), num_prefix_tokens=prefix, interpolation=mode, antialias=smooth
    )


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of channels, (2j, 2j + 1), turned by an angle: rotary positions (arXiv 2104.09864, eq. 15).

    Args:
        x: (..., N, d).
        angles: (N, d / 2), or what broadcasts with the pairs of x, in radians; 32 bit is enough for maps, and is kept
            whatever x has.

    Returns:
        Like x.
    """
    pairs = x.to(angles.dtype).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():  # one pass over memory, where compilers want plain arithmetic
        turns = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns).flatten(-2).to(x.dtype)
    (even, odd), cos, sin = pairs.unbind(-1), angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number for each head and offset between two places of a group, as Swin has it (arXiv 2103.14030).

    Attributes:
        table: ((2 h - 1) * (2 w - 1), heads), by rows of the offset.
    """

    index: Tensor

    def __init__(self, heads: int, sides: Sides) -> None:
        super().__init__()
        self.sides = sides
        offsets = (2 * sides[0] - 1) * (2 * sides[1] - 1)
        self.table = nn.Parameter(trunc_normal_(torch.empty(offsets, heads), std=0.02))
        self.register_buffer("index", gen_relative_position_index(sides), persistent=False)

    def forward(self, sides: Sides | None = None) -> Tensor:
        """Bias (heads, n, n) of a group of n = h * w places; bicubic from the table where it has other sides."""
        if sides is None or sides == self.sides:
            return self.table[self.index].permute(2, 0, 1).contiguous()
        offsets = self.table.mT.view(1, -1, 2 * self.sides[0] - 1, 2 * self.sides[1] - 1)
        wanted = 2 * sides[0] - 1, 2 * sides[1] - 1
        resized = interpolate(offsets, size=wanted, mode="bicubic", align_corners=False)[0].flatten(1)
        return resized[:, gen_relative_position_index(sides, device=resized.device)]
