"""FFNet's up-head: an addition path from the coarsest map to the finest, and a small convolution at each.

Shapes: maps (B, C_i, H_i, W_i) in, fine to coarse; the same sizes out with the variant's channels. A 1x1 convolution
brings each map to the head's own width; from the coarsest on, each sum goes through a 1x1 convolution, is enlarged to
the next finer map's size and added to it. What comes out is each sum through a 3x3 convolution; the path itself runs on
what no 3x3 convolution has smoothed. Each convolution has a batch norm and a ReLU.

The variants are the heads A, B and C of FFNet (arXiv 2206.08236, figure 3), as the authors' code has them; networks for
phones enlarge by nearest cells (`upsampling="nearest"`). A variant's channels are for strides 4 to 32, fine to coarse:
of fewer levels the first are used, and what is coarser than the fourth gets the fourth's.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypedDict, Unpack

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.blocks.osa import conv_norm
from vertebra.contracts import Level, Neck
from vertebra.errors import UsageError, near
from vertebra.parity import Rules, convert

VARIANTS = {
    "a": {"inner": (64, 128, 256, 512), "channels": (128, 128, 128, 128)},
    "b": {"inner": (64, 128, 128, 256), "channels": (96, 96, 64, 32)},
    "c": {"inner": (128, 128, 128, 128), "channels": (128, 16, 16, 16)},
}

UPSAMPLINGS = {"bilinear": {"mode": "bilinear", "align_corners": True}, "nearest": {"mode": "nearest"}}


class UpHeadOptions(TypedDict, total=False):
    """Options; a variant sets the first two.

    Attributes:
        inner: channels of the addition path, one number for all maps or one a map.
        channels: of the maps that come out, likewise.
        upsampling: how a map is enlarged; bilinear has its corners aligned.
    """

    inner: int | Sequence[int]
    channels: int | Sequence[int]
    upsampling: Literal["bilinear", "nearest"]


def up_head(levels: Sequence[Level], variant: str = "a", **options: Unpack[UpHeadOptions]) -> "UpHead":
    """An up-head on the maps of a backbone.

    Args:
        levels: of the maps that come in, fine to coarse.
        variant: one of `VARIANTS`.
        options: as in `UpHeadOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, levels not from fine to coarse, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"up_head has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    chosen: UpHeadOptions = {**VARIANTS[variant], **options}  # type: ignore[typeddict-item]
    return UpHead(levels, **chosen)


class UpHead(Neck):
    """The network; build it with `up_head`.

    Attributes:
        adapters: a 1x1 convolution a level, fine to coarse.
        ups: a 1x1 convolution from each level but the finest to the next finer one's width, fine to coarse.
        outputs: a 3x3 convolution a level, fine to coarse.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        inner: int | Sequence[int],
        channels: int | Sequence[int],
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
    ) -> None:
        super().__init__()
        strides = [level.stride for level in levels]
        if not strides or strides != sorted(set(strides)):
            raise UsageError(f"up_head: levels have strides {strides or 'none'}; they must rise, fine to coarse")
        if upsampling not in UPSAMPLINGS:
            known = ", ".join(UPSAMPLINGS)
            raise UsageError(f"up_head: upsampling is {upsampling!r}{near(upsampling, UPSAMPLINGS)}; it can be {known}")
        widths, given = _each("inner", inner, len(strides)), _each("channels", channels, len(strides))
        self.upsampling: Literal["bilinear", "nearest"] = upsampling
        places = list(zip(levels, widths, given, strict=True))
        self.adapters = nn.ModuleList(conv_norm(level.channels, width, 1) for level, width, _ in places)
        self.ups = nn.ModuleList(conv_norm(coarse, fine, 1) for fine, coarse in pairwise(widths))
        self.outputs = nn.ModuleList(conv_norm(width, number, 3) for _, width, number in places)
        self.levels = tuple(Level(number, stride) for number, stride in zip(given, strides, strict=True))

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps (B, C_i, H_i, W_i) to maps (B, channels_i, H_i, W_i), both fine to coarse."""
        maps = [adapter(x) for adapter, x in zip(self.adapters, pyramid, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + enlarged(self.ups[i - 1](maps[i]), maps[i - 1], self.upsampling)
        return tuple(output(x) for output, x in zip(self.outputs, maps, strict=True))


def enlarged(x: Tensor, like: Tensor, upsampling: Literal["bilinear", "nearest"]) -> Tensor:
    """Maps (B, C, h, w) at the size of another (B, ..., H, W), as this paper's networks enlarge."""
    return F.interpolate(x, size=like.shape[-2:], **UPSAMPLINGS[upsampling])  # type: ignore[arg-type]


def published(state: Mapping[str, Tensor], neck: UpHead) -> dict[str, Tensor]:
    """The up-head's share of FFNet's released weights, for segmentation or classification, under our names.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, rules(), neck)


def rules() -> Rules:
    """The names of FFNet's code -> an up-head's. Other parts are dropped."""
    found: list[tuple[str, str | None]] = [
        (r"^(module\.)?(backbone_model|smoothing|head\.layers\.[2-9])\.", None),
        (r"^(module\.)?head\.layers\.0\.adapter_conv\.", "adapters."),
    ]
    for level, stride in enumerate((4, 8, 16, 32)):
        found.append((rf"^(module\.)?head\.layers\.1\.fam_{stride}(_sm)?\.", f"outputs.{level}."))
        found.append((rf"^(module\.)?head\.layers\.1\.fam_{stride}_up\.", f"ups.{level - 1}."))
    return [*found, (r"\.layers\.", ".")]


def _each(name: str, numbers: int | Sequence[int], count: int) -> list[int]:
    """A number a level: one for all, or those of a variant, of which the last goes on."""
    given = [numbers] * count if isinstance(numbers, int) else [*numbers, *[numbers[-1]] * count][:count]
    if min(given) < 1:
        raise UsageError(f"up_head: {name} is {numbers}; it must be at least 1")
    return given
