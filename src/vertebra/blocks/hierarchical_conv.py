"""The convolution of Res2Net: a chain of 3 x 3 convolutions over groups of channels, in place of one over all.

Shapes: (B, C, H, W) in, (B, C, H / stride, W / stride) out. The channels are split into s groups. Each group but the
last has a 3 x 3 convolution, batch norm and ReLU of its own, and is given the output of the group before it on top of
its own channels; the last group is passed on. So the groups that come out have seen 1, 3, 5 ... 2 s - 1 pixels across.
Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.res2net` (arXiv 1904.01169, eq. 1; the authors'
code leaves the last group untouched, the paper the first).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError, near

VARIANTS = {
    "chain": {"chained": True, "pooled": False},
    "parallel": {"chained": False, "pooled": False},
    "stage": {"chained": False, "pooled": True},
}

Form = Literal["chain", "parallel", "stage"]


def hierarchical_conv(
    channels: int,
    variant: Form = "chain",
    *,
    scales: int = 4,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: Literal["counted", "left_out"] = "counted",
) -> "HierarchicalConv":
    """The block for maps of `channels`.

    Args:
        channels: of the maps, a multiple of `scales`.
        variant: "chain" adds the output of the group before; "parallel" does not; "stage", with which the authors begin
            each stage, does not either, and averages the last group over 3 x 3 pixels, with the stride.
        scales: groups that the channels are split into; 1 is one plain convolution with norm and ReLU.
        stride: of "stage"; the others keep the size.
        dilation: of the convolutions.
        groups: within each convolution, the cardinality of ResNeXt; divides channels / scales.
        padding: whether the zeros around the map count in the averages of "stage".

    Raises:
        UsageError: an unknown variant, an option out of range, or channels that cannot be split so.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"hierarchical_conv has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    given = {"channels": channels, "scales": scales, "stride": stride, "dilation": dilation, "groups": groups}
    for name, value in given.items():
        if value < 1:
            raise UsageError(f"hierarchical_conv: {name} is {value}; it must be at least 1")
    if channels % scales or (channels // scales) % groups:
        raise UsageError(
            f"hierarchical_conv: {channels} channels cannot be split into {scales} scales of {groups} groups each; take"
            f" a multiple of {scales * groups}"
        )
    if stride > 1 and scales > 1 and variant != "stage":
        raise UsageError(
            f"hierarchical_conv: {variant!r} passes the last group on as it is, so that stride {stride} cannot be; take"
            " the variant 'stage'"
        )
    if padding not in ("counted", "left_out"):
        raise UsageError(f"hierarchical_conv: padding is {padding!r}; it can be counted or left_out")
    chosen, counted = VARIANTS[variant], padding == "counted"
    pool = nn.AvgPool2d(3, stride, 1, count_include_pad=counted) if chosen["pooled"] else nn.Identity()
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    return HierarchicalConv(channels // scales, scales, pool, chained=chosen["chained"], **options)


def from_conv(layer: nn.Module, *, scales: int = 4) -> "HierarchicalConv":
    """The block, with new weights, for the place of a 3 x 3 convolution: `swap(backbone, "*.conv2", from_conv)`.

    Strided convolutions become "stage", others "chain"; dilation stays, and so does the width of groups.

    Args:
        layer: a convolution of as many channels out as in, padded to keep the size.
        scales: groups of channels.

    Raises:
        UsageError: another layer, or channels or groups that are no multiple of `scales`.
    """
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (3, 3) or layer.in_channels != layer.out_channels:
        raise UsageError(
            f"hierarchical_conv takes the place of 3 x 3 convolutions of as many channels out as in, not of {layer}"
        )
    stride, dilation = layer.stride[0], layer.dilation[0]
    even = layer.stride == (stride, stride) and layer.dilation == (dilation, dilation)
    if not even or layer.padding not in ((dilation, dilation), "same"):
        raise UsageError(
            f"hierarchical_conv takes the place of convolutions that are padded by their dilation, not {layer}"
        )
    if layer.groups > 1 and layer.groups % scales:
        raise UsageError(f"hierarchical_conv: {layer.groups} groups are no multiple of {scales} scales")
    groups = max(1, layer.groups // scales)
    form = "chain" if stride == 1 else "stage"
    return hierarchical_conv(layer.in_channels, form, scales=scales, stride=stride, dilation=dilation, groups=groups)


class HierarchicalConv(nn.Module):
    """Convolutions over groups of channels, one after the other; build it with `hierarchical_conv`.

    Attributes:
        convs: of all groups but the last; of the only one where there is one.
        bns: behind them.
        pool: what the last group goes through.
    """

    def __init__(
        self,
        width: int,
        scales: int,
        pool: nn.Module,
        *,
        chained: bool,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.width, self.scales, self.chained = width, scales, chained
        made = range(max(1, scales - 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False) for _ in made
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in made)
        self.pool = pool
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, scales * width, H, W) to maps of the same channels."""
        parts, seen = x.split(self.width, 1), []
        for number, (conv, norm) in enumerate(zip(self.convs, self.bns, strict=True)):
            given = parts[number] + seen[-1] if self.chained and number else parts[number]
            seen.append(nn.functional.relu(norm(conv(given)), inplace=True))
        if self.scales == 1:
            return seen[0]
        return torch.cat((*seen, self.pool(parts[-1])), 1)
