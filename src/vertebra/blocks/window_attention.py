"""Attention within groups of a map: windows, shifted windows, dilated groups, grids, rows and columns.

Shapes: maps (B, C, H, W) in, the same out, of any size: what is no whole number of groups is padded inside and cropped
again, and what is padded is not attended to. As a layer of a transformer, `WindowAttention` takes (B, H, W, C).

    pattern     places of a group                                    of
    window      side x side neighbours; every shift moves the grid   Swin, arXiv 2103.14030
    dilated     side x side places, `interval` apart                 CrossFormer's long distance, arXiv 2108.00154
    grid        side x side places spread over the whole map         MaxViT, arXiv 2204.01697
    row         a whole row; `column` a whole column                 axial attention, arXiv 1912.12180
"""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from vertebra.blocks.attention import attention
from vertebra.blocks.positions import RelativeBias
from vertebra.blocks.windows import Sides, group, padded, seen, ungroup
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"pattern": "window"},
    "shifted": {"pattern": "window", "shifted": True},
    "dilated": {"pattern": "dilated"},
    "grid": {"pattern": "grid"},
    "row": {"pattern": "row"},
    "column": {"pattern": "column"},
}

Pattern = Literal["window", "dilated", "grid", "row", "column"]


def window_attention(
    channels: int,
    variant: str = "window",
    *,
    heads: int | None = None,
    side: int = 7,
    shift: int | None = None,
    interval: int = 2,
) -> "OfMaps":
    """Attention within groups of maps (B, channels, H, W).

    Args:
        channels: of the map.
        variant: one of `VARIANTS`: the pattern.
        heads: of the attention; by default one for each 32 channels.
        side: of a group in places; rows and columns do not have one.
        shift: places that windows are moved by, 0..side - 1; half a window, rounded down, in "shifted", else none.
        interval: places from one member of a "dilated" group to the next.

    Raises:
        UsageError: an unknown variant, or a number out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"window_attention has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    chosen = VARIANTS[variant]
    shift = (side // 2 if "shifted" in chosen else 0) if shift is None else shift
    pattern: Pattern = chosen["pattern"]
    return OfMaps(
        WindowAttention(dim=channels, heads=heads, side=side, pattern=pattern, shift=shift, interval=interval)
    )


class WindowAttention(nn.Module):
    """Attention within groups of maps (B, H, W, C), with a learned bias for each offset within a group.

    Attributes:
        attention: of one group.
        bias: of offsets; None for rows and columns, which have no side of their own.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int | None,
        side: int,
        pattern: Pattern = "window",
        shift: int = 0,
        interval: int = 1,
        relative: bool = True,
    ) -> None:
        if pattern not in get_args(Pattern):
            raise UsageError(f"window_attention: pattern is {pattern!r}; it can be {', '.join(get_args(Pattern))}")
        if side < 1 or interval < 1 or not 0 <= shift < max(side, 1):
            raise UsageError(
                f"window_attention: side {side}, interval {interval}, shift {shift}; side and interval are at least 1"
                " and shift is in 0..side - 1"
            )
        super().__init__()
        self.side, self.pattern, self.shift, self.interval = side, pattern, shift, interval
        self.attention = attention(dim, heads=heads)
        axial = pattern in ("row", "column")
        self.bias = None if axial or not relative else RelativeBias(self.attention.heads, (side, side))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        real = x.shape[1], x.shape[2]
        sides, interval = self.groups(real)
        x = padded(x, sides[0] * interval[0], sides[1] * interval[1])
        size = x.shape[1], x.shape[2]
        shift = self.shift if self.pattern == "window" and max(size) > self.side else 0
        shifts = (shift if size[0] > sides[0] else 0, shift if size[1] > sides[1] else 0)
        x = x.roll((-shifts[0], -shifts[1]), (1, 2)) if shift else x
        mask = seen(real, size, sides, interval, shifts, device=x.device)
        bias = None if self.bias is None else self.bias(sides)
        x = ungroup(self.attention(group(x, sides, interval), bias, mask), sides, interval, size)
        x = x.roll(shifts, (1, 2)) if shift else x
        return x[:, : real[0], : real[1]]

    def groups(self, size: Sides) -> tuple[Sides, Sides]:
        """Sides of a group and the interval of its places, for a map of `size`."""
        height, width = size
        if self.pattern == "row":
            return (1, width), (1, 1)
        if self.pattern == "column":
            return (height, 1), (1, 1)
        side = self.side
        if self.pattern == "grid":
            return (side, side), (-(-height // side), -(-width // side))
        return (side, side), (self.interval, self.interval) if self.pattern == "dilated" else (1, 1)


class OfMaps(nn.Module):
    """A layer of (B, H, W, C), given maps (B, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
