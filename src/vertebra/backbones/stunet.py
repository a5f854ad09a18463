"""STU-Net: a residual U-Net that grows in depth and width together, for images and for volumes.

Shapes: images (B, channels, H, W), or with `axes=3` volumes (B, channels, D, H, W), to maps at strides 1 (the
image's own size) to 32 with `base` times 1, 2, 4, 8, 16 and 16 channels. A stage is `depth` residual units; the first
changes the width and takes the stride, within the unit, and has a 1x1 convolution as its shortcut. `pooled` is the mean
of the deepest map. Strides may differ from axis to axis (`strides`, `plan_strides`): a level's nominal stride is the
largest of its axes, and where a stage does not raise it the pyramid keeps the deeper of the two maps; `maps` gives all.

The published networks take volumes of one channel: `stunet("b", axes=3, channels=1)`. Images are the default because
that is what the other backbones and the tools for them take; the code is one. With the decoder of
`vertebra.necks.unet_decoder` and a head a map it is the paper's whole network:

    network = segmentation(stunet("s", axes=3, channels=1), classes=105)
    logits = network(torch.zeros(1, 1, 64, 64, 64))          # five tensors, full resolution first

Departs from the reference in the order of two layers on the way up, which computes the same with fewer multiply-adds.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Literal, Unpack, cast

import torch
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, drop_rates
from vertebra.blocks.stu_unit import CONVOLUTIONS, STUnit, per_axis
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.necks.unet_decoder import Heads, UNetDecoder, UNetDecoderOptions, decoder_rules, head_rules, unet_decoder
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="stunet",
    title="STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by Large-Scale Supervised"
    " Pre-training",
    year=2023,
    arxiv="2304.06716",
    reference="uni-medical/STU-Net",
    licence="Apache-2.0",
    claim="depth and width grown together segment better from 14 million parameters to 1.4 billion, and transfer"
    " better: weights fit any plan, as none depends on a stride",
    builds_on=("unet_decoder",),
    numbers="the four networks for volumes, with decoder and heads of 105 classes, at 128 voxels a side; the encoders"
    " for images, which are the variants here, as counted on the reference's class with two-dimensional layers",
    note="The network, the conversion of released weights and their transfer between plans. Training (Dice and"
    " cross-entropy with deep supervision), the study of joint scaling and the gain of pre-training come with"
    " segmentation.",
)

VARIANTS = {
    "s": {"base": 16, "depth": 1, "image_size": 256},
    "b": {"base": 32, "depth": 1, "image_size": 256},
    "l": {"base": 64, "depth": 2, "image_size": 256},
    "h": {"base": 96, "depth": 3, "image_size": 256},
    "nano": {"base": 16, "depth": 1, "strides": (2, 2, 2), "image_size": 32},
}

WIDTHS = (1, 2, 4, 8, 16, 16)
"""Channels of the stages, times `base`."""
Stride = int | Sequence[int]


class STUNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first two.

    Attributes:
        base: channels of the first stage.
        depth: residual units a stage.
        axes: 2 for images, 3 for volumes.
        strides: from each stage to the next, at most five; a number, or one an axis.
    """

    base: int
    depth: int
    axes: Literal[2, 3]
    strides: Sequence[Stride]


def stunet(variant: str = "s", **options: Unpack[STUNetOptions]) -> "STUNet":
    """Build the encoder of an STU-Net.

    Args:
        variant: one of `VARIANTS`.
        options: as in `STUNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("stunet", VARIANTS, variant, options, STUNet, crop=1.0, interpolation="bilinear")


class STUNet(Backbone):
    """Six stages of residual units; build it with `stunet`.

    Attributes:
        stages: units of each map.
        scales: every stage's channels and nominal stride; strides may repeat.
        axes: 2 for images, 3 for volumes.
        strides: from each stage to the next, a number an axis.
    """

    pretrained_cfg: Mapping[str, object] = {
        "first_conv": ("stages.0.0.conv1", "stages.0.0.shortcut"),
        "classifier": "heads",
    }

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        base: int,
        depth: int,
        axes: Literal[2, 3] = 2,
        strides: Sequence[Stride] = (2, 2, 2, 2, 2),
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("stunet", 1, base=base, depth=depth)
        if axes not in CONVOLUTIONS:
            raise UsageError(f"stunet: axes is {axes}; it can be 2 for images or 3 for volumes")
        if not 0 < len(strides) < len(WIDTHS):
            raise UsageError(
                f"stunet: {len(strides)} strides; it takes one to five, from stage to stage. Those of an nnU-Net plan"
                " become five with plan_strides(...)"
            )
        super().__init__()
        self.preprocess, self.depth = preprocess, depth
        self.axes: Literal[2, 3] = axes
        self.strides = tuple(per_axis(stride, axes) for stride in strides)
        widths = [base * times for times in WIDTHS[: len(strides) + 1]]
        rates = drop_rates(drop_path, [depth] * len(widths))
        steps, inputs, self.stages = ((1,) * axes, *self.strides), preprocess.channels, nn.ModuleList()
        for step, width, drops in zip(steps, widths, rates, strict=True):
            first = STUnit(inputs, width, axes=axes, stride=step, project=True, drop_path=drops[0])
            others = (STUnit(width, width, axes=axes, drop_path=rate) for rate in drops[1:])
            self.stages.append(nn.Sequential(first, *others))
            inputs = width
        along = [list(accumulate(axis, mul)) for axis in zip(*steps, strict=True)]
        nominal = [max(strides) for strides in zip(*along, strict=True)]
        self.total = tuple(strides[-1] for strides in along)
        self.scales = tuple(Level(width, stride) for width, stride in zip(widths, nominal, strict=True))
        self.kept = [i for i, stride in enumerate(nominal) if stride not in nominal[i + 1 :]]
        self.levels = tuple(self.scales[i] for i in self.kept)
        self.width = widths[-1]

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W), or volumes (B, channels, D, H, W), to features."""
        maps = self.maps(images)
        return Features(tuple(maps[i] for i in self.kept), maps[-1].flatten(2).mean(2))

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The map of every stage, fine to coarse, whether or not its stride is its own."""
        self._check(images)
        x, maps = images, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def trunk(self) -> list[nn.Module]:
        """The residual units."""
        return [unit for stage in self.stages for unit in stage.children()]

    def _check(self, images: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        sides, channels = "H, W" if self.axes == 2 else "D, H, W", self.preprocess.channels
        if images.ndim != self.axes + 2 or images.shape[1] != channels:
            raise UsageError(
                f"STUNet takes {'images' if self.axes == 2 else 'volumes'} (B, {channels}, {sides}) and got"
                f" {tuple(images.shape)}; the number of channels is set by channels=..., that of axes by axes=..."
            )
        if all(side <= total for side, total in zip(images.shape[2:], self.total, strict=True)):
            raise UsageError(
                f"STUNet has total strides {self.total} and got {tuple(images.shape[2:])}: the deepest map would have"
                " one cell, of which its norm leaves nothing; one side must be larger than its stride, so at least"
                f" {tuple(total + 1 for total in self.total)} works"
            )


class Segmentation(nn.Module):
    """Encoder, decoder and a head a decoded map: the paper's network; build it with `segmentation`.

    Attributes:
        backbone: the encoder.
        decoder: of `vertebra.necks.unet_decoder`.
        heads: 1x1 convolutions to classes.
    """

    def __init__(self, backbone: STUNet, decoder: UNetDecoder, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.decoder, self.heads = backbone, decoder, heads

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, channels, ...) to logits (B, classes, ...) at every decoded map's size, full resolution first."""
        return self.heads(self.decoder(self.backbone.maps(images)))


def segmentation(backbone: STUNet, classes: int, **options: Unpack[UNetDecoderOptions]) -> Segmentation:
    """The paper's network around an encoder, with a decoder of the same depth and strides.

    Args:
        backbone: the encoder.
        classes: of each head, with the background.
        options: of the decoder.

    Raises:
        UsageError: classes below 1, or an option of the decoder out of range.
    """
    check_at_least("stunet", 1, classes=classes)
    own: UNetDecoderOptions = {"depth": backbone.depth, "strides": backbone.strides, "axes": backbone.axes}
    decoder = unet_decoder(backbone.scales, **cast(UNetDecoderOptions, {**own, **options}))
    return Segmentation(backbone, decoder, Heads(decoder.levels, classes, backbone.axes))


def plan_strides(pools: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The five strides for an nnU-Net plan's `pool_op_kernel_sizes`.

    A plan's first entry is that of the first stage, which does not shrink; more than five others are cut, fewer are
    filled with ones, so that the network always has six stages.

    Raises:
        UsageError: the first entry shrinks, or there is none.
    """
    if not pools or any(step != 1 for step in pools[0]):
        raise UsageError(f"plan_strides: the plan has {list(pools)}; its first entry must be ones, as [1, 1, 1]")
    strides = [tuple(pool) for pool in pools[1 : len(WIDTHS)]]
    return (*strides, *[(1,) * len(pools[0])] * (len(WIDTHS) - 1 - len(strides)))


def published(state: Mapping[str, Tensor], network: STUNet | Segmentation) -> dict[str, Tensor]:
    """Released weights under our names: the encoder's share, or those of the whole network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    if isinstance(network, STUNet):
        return convert(state, encoder_rules(), network)
    parts = {
        "backbone": (encoder_rules(), network.backbone),
        "decoder": (decoder_rules(len(network.decoder.stages)), network.decoder),
        "heads": (head_rules(len(network.heads.heads)), network.heads),
    }
    found = {part: convert(state, rules, module) for part, (rules, module) in parts.items()}
    return {f"{part}.{name}": tensor for part, tensors in found.items() for name, tensor in tensors.items()}


def encoder_rules() -> Rules:
    """The reference's names -> the encoder's. Other parts are dropped."""
    return [
        (r"^(module\.)?(conv_blocks_localization|upsample_layers|seg_outputs)\.", None),
        (r"^(module\.)?conv_blocks_context\.", "stages."),
        (r"\.conv3\.", ".shortcut."),
    ]
