"""Feature pyramid network: coarse maps lend their meaning to fine ones, top down.

Shapes: maps (B, C_i, H_i, W_i) in, fine to coarse; the same sizes with `channels` channels out, and with `extra` one or
two coarser maps more. A 1x1 convolution brings each map to `channels`; from the coarsest on, each sum is enlarged by
its nearest pixels and added to the next finer map; a 3x3 convolution per level takes the edges off. What is enlarged
takes the size of the finer map, not twice its own, so any image will do. Of one level, as of a plain ViT, the two
convolutions are left.

Departs from the paper in nothing with the defaults, which are torchvision's `FeaturePyramidNetwork` to the last digit.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.contracts import Level, Neck
from vertebra.errors import UsageError, near
from vertebra.paper import Paper

PAPER = Paper(
    id="fpn",
    title="Feature Pyramid Networks for Object Detection",
    year=2016,
    arxiv="1612.03144",
    claim="+8.0 points of average recall for proposals and +2.3 AP for Faster R-CNN on COCO over one map of ResNet-50",
    parity="torchvision's FeaturePyramidNetwork",
    note='extra="p6p7" is RetinaNet\'s (arXiv 1708.02002), which takes it from the last map of the backbone.',
)

GROUPS = 32
EXTRAS = {"none": 0, "pool": 1, "p6p7": 2}
"""What can be added above the coarsest map -> how many maps."""


def fpn(
    levels: Sequence[Level],
    *,
    channels: int = 256,
    extra: Literal["none", "pool", "p6p7"] = "none",
    source: Literal["output", "input"] = "output",
    norm: Literal["none", "batch", "group"] = "none",
    finest: int = 1,
) -> "FPN":
    """A feature pyramid network on the maps of a backbone.

    Args:
        levels: of the maps that come in, fine to coarse.
        channels: of the maps that come out.
        extra: "pool" adds every second pixel of the coarsest map (Faster and Mask R-CNN), "p6p7" two strided
            convolutions (RetinaNet, FCOS).
        source: what "p6p7" starts from: the coarsest map that comes out, or the one that went in.
        norm: after each convolution of the pyramid; with "group" `channels` is a multiple of 32.
        finest: smallest stride that is used, as 8 for RetinaNet; finer maps that come in are left out.

    Raises:
        UsageError: no level is left, levels not from fine to coarse, or an option out of range.
    """
    return FPN(levels, channels=channels, extra=extra, source=source, norm=norm, finest=finest)


class FPN(Neck):
    """The network; build it with `fpn`.

    Attributes:
        laterals: a 1x1 convolution a level, fine to coarse.
        outputs: a 3x3 convolution a level, fine to coarse.
        extras: the strided convolutions of "p6p7".
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        channels: int,
        extra: Literal["none", "pool", "p6p7"],
        source: Literal["output", "input"],
        norm: Literal["none", "batch", "group"],
        finest: int,
    ) -> None:
        super().__init__()
        used = [level for level in levels if level.stride >= finest]
        _check(levels, used, channels, finest)
        for name, value, known in (
            ("extra", extra, tuple(EXTRAS)),
            ("source", source, ("output", "input")),
            ("norm", norm, ("none", "batch", "group")),
        ):
            if value not in known:
                raise UsageError(f"fpn: {name} is {value!r}{near(str(value), known)}; it can be {', '.join(known)}")
        if norm == "group" and channels % GROUPS:
            raise UsageError(f"fpn: norm='group' has {GROUPS} groups and channels is {channels}; take a multiple")
        self.skipped, self.extra, self.source = len(levels) - len(used), extra, source
        self.laterals = nn.ModuleList(_convolution(level.channels, channels, 1, norm) for level in used)
        self.outputs = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in used)
        start = channels if source == "output" else used[-1].channels
        widths = (start, channels) if extra == "p6p7" else ()
        self.extras = nn.ModuleList(nn.Conv2d(width, channels, 3, stride=2, padding=1) for width in widths)
        strides = [level.stride for level in used]
        strides += [strides[-1] * 2 ** (i + 1) for i in range(EXTRAS[extra])]
        self.levels = tuple(Level(channels, stride) for stride in strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps (B, C_i, H_i, W_i) to maps (B, channels, H_i, W_i), and coarser ones where `extra` adds them."""
        given = pyramid[self.skipped :]
        maps = [lateral(x) for lateral, x in zip(self.laterals, given, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[-2:], mode="nearest")
        maps = [output(x) for output, x in zip(self.outputs, maps, strict=True)]
        return (*maps, *self._above(maps[-1], given[-1]))

    def _above(self, coarsest: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        """The maps above the coarsest one, each half the size, rounded up."""
        if self.extra == "none":
            return ()
        if self.extra == "pool":
            return (F.max_pool2d(coarsest, 1, stride=2),)
        p6 = self.extras[0](coarsest if self.source == "output" else given)
        return p6, self.extras[1](F.relu(p6))


def _convolution(inputs: int, outputs: int, kernel: int, norm: Literal["none", "batch", "group"]) -> nn.Module:
    """A convolution that keeps the size, and its norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
    if norm == "none":
        return layer
    return nn.Sequential(layer, nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(GROUPS, outputs))


def _check(levels: Sequence[Level], used: Sequence[Level], channels: int, finest: int) -> None:
    strides = [level.stride for level in levels]
    if strides != sorted(set(strides)):
        raise UsageError(f"fpn: levels have strides {strides}; they must rise, fine to coarse")
    if not used:
        raise UsageError(f"fpn: finest is {finest} and the levels have strides {strides or 'none'}; none is left")
    if channels < 1:
        raise UsageError(f"fpn: channels is {channels}; it must be at least 1")
