"""U-Net decoder: the coarsest map is enlarged step by step and merged with the finer ones, in 2-D or 3-D.

Shapes: maps (B, C_i, H_i, W_i) in, fine to coarse, or (B, C_i, D_i, H_i, W_i) with `axes=3`; the same sizes out,
with `channels` channels or as many as came in. From the coarsest on, a map is enlarged to the size of the next finer
one, put beside it and passed through residual units. The coarsest map comes out as it went in.

`nearest` is STU-Net's way up (arXiv 2304.06716): a 1x1 convolution and nearest cells. No weight depends on a stride, so
that weights fit a decoder of any other strides, and any size will do. The reference enlarges first; as a 1x1
convolution does not see its neighbours both orders compute the same, and this one does so on a quarter of the cells (an
eighth in 3-D). `transposed` is nnU-Net's: a transposed convolution whose kernel is the stride, to which it ties the
weights.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.blocks.stu_unit import CONVOLUTIONS, STUnit, initialise, per_axis
from vertebra.contracts import Level, Neck
from vertebra.errors import UsageError, near
from vertebra.parity import Rules, convert

VARIANTS = {"nearest": {"upsampling": "nearest"}, "transposed": {"upsampling": "transposed"}}


class UNetDecoderOptions(TypedDict, total=False):
    """Options; a variant sets the first.

    Attributes:
        upsampling: how a map is enlarged.
        channels: of the maps that come out but the coarsest; None keeps each map's own.
        depth: residual units a map.
        axes: 2 for images, 3 for volumes.
        strides: from each map to the next coarser one, a number or one an axis; None takes them from the levels. Only
            "transposed" makes use of them.
    """

    upsampling: Literal["nearest", "transposed"]
    channels: int | None
    depth: int
    axes: Literal[2, 3]
    strides: Sequence[int | Sequence[int]] | None


def unet_decoder(
    levels: Sequence[Level], variant: str = "nearest", **options: Unpack[UNetDecoderOptions]
) -> "UNetDecoder":
    """A decoder on the maps of a backbone.

    Args:
        levels: of the maps that come in, fine to coarse.
        variant: one of `VARIANTS`.
        options: as in `UNetDecoderOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, levels not from fine to coarse, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"unet_decoder has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    chosen: UNetDecoderOptions = {**VARIANTS[variant], **options}  # type: ignore[typeddict-item]
    return UNetDecoder(levels, **chosen)


class UNetDecoder(Neck):
    """The decoder; build it with `unet_decoder`.

    Attributes:
        ups: what enlarges the next coarser map, a module for each map but the coarsest, fine to coarse.
        stages: residual units of the same maps.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        upsampling: Literal["nearest", "transposed"] = "nearest",
        channels: int | None = None,
        depth: int = 1,
        axes: Literal[2, 3] = 2,
        strides: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        steps = _steps(levels, strides)
        _check(upsampling, channels, depth, axes)
        widths = [*(channels or level.channels for level in levels[:-1]), levels[-1].channels]
        kind = _Nearest if upsampling == "nearest" else _Transposed
        self.ups, self.stages = nn.ModuleList(), nn.ModuleList()
        for level, width, coarser, step in zip(levels[:-1], widths, widths[1:], steps, strict=False):
            self.ups.append(kind(coarser, width, axes, per_axis(step, axes)))
            inputs = [width + level.channels] + [width] * (depth - 1)
            units = (STUnit(number, width, axes=axes, project=i == 0) for i, number in enumerate(inputs))
            self.stages.append(nn.Sequential(*units))
        self.levels = tuple(Level(width, level.stride) for width, level in zip(widths, levels, strict=True))

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps (B, C_i, ...) to maps of the same sizes, both fine to coarse."""
        x = pyramid[-1]
        maps = [x]
        for finer, up, stage in zip(pyramid[-2::-1], reversed(self.ups), reversed(self.stages), strict=True):
            x = stage(torch.cat((up(x, finer.shape[2:]), finer), 1))
            maps.append(x)
        return tuple(maps[::-1])


class Heads(nn.Module):
    """A 1x1 convolution to classes on each decoded map, for deep supervision.

    Args:
        levels: of the decoder; its coarsest map is not decoded and gets no head.
        classes: how many.
        axes: 2 for images, 3 for volumes.
    """

    def __init__(self, levels: Sequence[Level], classes: int, axes: Literal[2, 3] = 2) -> None:
        super().__init__()
        self.heads = nn.ModuleList(CONVOLUTIONS[axes](level.channels, classes, 1) for level in levels[:-1])

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A decoder's maps to logits (B, classes, ...), the finest first."""
        return tuple(head(x) for head, x in zip(self.heads, maps[:-1], strict=True))


def published(state: Mapping[str, Tensor], part: UNetDecoder | Heads) -> dict[str, Tensor]:
    """The decoder's, or the heads', share of released STU-Net weights under our names.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules = decoder_rules(len(part.stages)) if isinstance(part, UNetDecoder) else head_rules(len(part.heads))
    return convert(state, rules, part)


def decoder_rules(count: int) -> Rules:
    """The reference's names -> a decoder's: it counts from the coarsest map on. Other parts are dropped."""
    rules: list[tuple[str, str | None]] = [(r"conv_blocks_context\.|seg_outputs\.", None), (r"^module\.", "")]
    for theirs in range(count):
        rules.append((rf"^upsample_layers\.{theirs}\.", f"ups.{count - 1 - theirs}."))
        rules.append((rf"^conv_blocks_localization\.{theirs}\.", f"stages.{count - 1 - theirs}."))
    return [*rules, (r"\.conv3\.", ".shortcut.")]


def head_rules(count: int) -> Rules:
    """The reference's names -> those of the heads. Other parts are dropped."""
    rules: list[tuple[str, str | None]] = [(r"^(module\.)?(conv_blocks_\w+|upsample_layers)\.", None)]
    return rules + [
        (rf"^(module\.)?seg_outputs\.{theirs}\.", f"heads.{count - 1 - theirs}.") for theirs in range(count)
    ]


class _Nearest(nn.Module):
    """A 1x1 convolution, then nearest cells."""

    def __init__(self, inputs: int, outputs: int, axes: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[axes](inputs, outputs, 1)
        initialise(self)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(self.conv(x), size=list(size), mode="nearest")


class _Transposed(nn.Module):
    """A transposed convolution; what it makes of an odd size is brought to the finer map's by nearest cells."""

    def __init__(self, inputs: int, outputs: int, axes: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if axes == 2 else nn.ConvTranspose3d
        self.conv = kind(inputs, outputs, stride, stride)  # type: ignore[arg-type]
        initialise(self)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        x = self.conv(x)
        return x if x.shape[2:] == size else F.interpolate(x, size=list(size), mode="nearest")


def _steps(levels: Sequence[Level], given: Sequence[int | Sequence[int]] | None) -> list[int | Sequence[int]]:
    """The stride from each level to the next."""
    strides = [level.stride for level in levels]
    if not strides or strides != sorted(strides):
        raise UsageError(f"unet_decoder: levels have strides {strides or 'none'}; they must rise, fine to coarse")
    if given is None:
        return [coarse // fine for fine, coarse in pairwise(strides)]
    if len(given) != len(strides) - 1:
        raise UsageError(f"unet_decoder: {len(strides)} levels need {len(strides) - 1} strides and got {given}")
    return list(given)


def _check(upsampling: str, channels: int | None, depth: int, axes: int) -> None:
    if upsampling not in VARIANTS:
        raise UsageError(
            f"unet_decoder: upsampling is {upsampling!r}{near(upsampling, VARIANTS)}; it can be {', '.join(VARIANTS)}"
        )
    if axes not in CONVOLUTIONS:
        raise UsageError(f"unet_decoder: axes is {axes}; it can be 2 for images or 3 for volumes")
    for name, value in (("channels", channels), ("depth", depth)):
        if value is not None and value < 1:
            raise UsageError(f"unet_decoder: {name} is {value}; it must be at least 1")
