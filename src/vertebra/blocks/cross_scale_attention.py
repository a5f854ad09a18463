"""Long short distance attention: within windows of neighbours, or among places that lie an interval apart.

    short   G x G neighbours, as windows that never move
    long    G x G places, `interval` apart: the places of a window are the first ones of so many groups

Shapes: maps (B, C, H, W) in, the same out, of any size. As a layer of a transformer, `CrossScaleAttention` takes rows
(B, H, W, C). What a head adds to the product of two places is a small network's of their offset, computed anew in
every pass, so that a group may have any size: the dynamic position bias. A map whose shorter side is at most G is one
group. Maps that are no whole number of groups are padded, and what is padded is not attended to. SDA, LDA and DPB are
of CrossFormer (arXiv 2108.00154, sections 3.2 and 3.3). Used alone, through `vertebra.surgery.swap`, and in
`vertebra.backbones.crossformer`.

The authors' classifiers take windows as wide as the shorter side where it is below G, their detectors one group: this
block takes one. Where a map is smaller than G intervals they pad it to as many; the groups here have only the places
that there are, which gives the same numbers at a fraction of the cost.
"""

import torch
from torch import Tensor, nn

from vertebra.blocks.attention import attention
from vertebra.blocks.window_attention import OfMaps
from vertebra.blocks.windows import Sides, group, padded, seen, ungroup
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, int]] = {"short": {"interval": 1}, "long": {"interval": 2}}


def cross_scale_attention(
    channels: int,
    variant: str = "short",
    *,
    heads: int | None = None,
    side: int = 7,
    interval: int | None = None,
    hidden: int | None = None,
) -> OfMaps:
    """The block for maps (B, channels, H, W).

    Args:
        channels: of the map.
        variant: one of `VARIANTS`; sets the interval.
        heads: as in `CrossScaleAttention`.
        side: likewise.
        interval: in place of the variant's.
        hidden: as in `CrossScaleAttention`.

    Raises:
        UsageError: an unknown variant, heads that do not divide the channels, or a number below 1.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"cross_scale_attention has no variant {variant!r}{near(variant, VARIANTS)}; it has {known}")
    interval = VARIANTS[variant]["interval"] if interval is None else interval
    return OfMaps(CrossScaleAttention(dim=channels, heads=heads, side=side, interval=interval, hidden=hidden))


class CrossScaleAttention(nn.Module):
    """Attention within windows or among places an interval apart, of rows (B, H, W, dim).

    Attributes:
        side: G, places of a group down and across.
        interval: places from one member to the next; 1 is the short distance.
        attention: of one group.
        bias: sides of a group -> what is added to the products; None adds nothing.
    """

    bias: nn.Module | None

    def __init__(
        self, *, dim: int, heads: int | None = None, side: int = 7, interval: int = 1, hidden: int | None = None
    ) -> None:
        """Build the layer.

        Args:
            dim: channels.
            heads: of the attention; by default one for each 32 channels.
            side: of a group in places.
            interval: from one member of a group to the next.
            hidden: channels of the network of positions; dim / 16 by default, at least 4.

        Raises:
            UsageError: heads that do not divide dim, or a number below 1.
        """
        hidden = max(4, dim // 16) if hidden is None else hidden
        if min(dim, side, interval, hidden) < 1 or (heads is not None and heads < 1):
            raise UsageError(
                f"cross_scale_attention: dim {dim}, heads {heads}, side {side}, interval {interval}, hidden {hidden};"
                " each must be at least 1"
            )
        super().__init__()
        self.side, self.interval = side, interval
        self.attention = attention(dim, heads=heads)
        self.bias = DynamicPositionBias(heads=self.attention.heads, hidden=hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, dim) to maps of the same shape."""
        real = x.shape[1], x.shape[2]
        sides, interval = self.groups(real)
        x = padded(x, sides[0] * interval[0], sides[1] * interval[1])
        size = x.shape[1], x.shape[2]
        mask = seen(real, size, sides, interval, device=x.device)
        bias = None if self.bias is None else self.bias(sides)
        x = ungroup(self.attention(group(x, sides, interval), bias, mask), sides, interval, size)
        return x if size == real else x[:, : real[0], : real[1]]

    def groups(self, size: Sides) -> tuple[Sides, Sides]:
        """Sides of a group and the interval of its places, for a map of `size`."""
        if min(size) <= self.side:
            return size, (1, 1)
        down, across = (min(self.side, -(-length // self.interval)) for length in size)
        return (down, across), (self.interval, self.interval)


class DynamicPositionBias(nn.Module):
    """Offsets of two places to a number a head, by a small network.

    Attributes:
        layers: a linear layer and three times norm, ReLU and linear layer.
    """

    def __init__(self, *, heads: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2, hidden)]
        for outputs in (hidden, hidden, heads):
            layers += [nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, sides: Sides) -> Tensor:
        """Bias (heads, n, n) of a group of n = h * w places, for all pairs of places that ask and answer."""
        like = self.layers[0].weight
        down, across = (torch.arange(1 - side, side, device=like.device).to(like.dtype) for side in sides)  # type: ignore[arg-type]
        table = self.layers(torch.cartesian_prod(down, across))  # (offsets, heads), offsets by rows
        return of_pairs(table.mT.unflatten(1, (len(down), len(across))), sides)


def of_pairs(table: Tensor, sides: Sides) -> Tensor:
    """Numbers of offsets, for all pairs of places of a group.

    Args:
        table: (heads, 2 h - 1, 2 w - 1), of the offsets from 1 - h to h - 1 and from 1 - w to w - 1.
        sides: h and w of the group.

    Returns:
        (heads, n, n) of n = h * w places by rows; the offset is that of the row's place less the column's.
    """
    h, w = sides
    return table.unfold(1, h, 1).unfold(2, w, 1).flip((3, 4)).reshape(len(table), h * w, h * w)
