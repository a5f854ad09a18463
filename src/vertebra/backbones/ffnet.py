"""FFNet's backbones: ResNets of basic blocks, deep for a wide receptive field, without bottlenecks or dilation.

Shapes: images (B, 3, H, W) to maps at strides 4, 8, 16, 32, or 8 to 64 in the variants `_d`, whose first stage halves
the map as well. A number is the count of layers, letters are the family:

    86      the vanilla ResNet: 7x7 convolution and max pooling, stages of 64, 128, 256, 512 channels; 50 and 101 have
            bottlenecks, which the paper compares with
    86s     slim: two 3x3 convolutions of stride 2, stages of 64, 128, 192, 320
    74n     narrow: three 3x3 convolutions, the third of which is the first map, then three stages of 96, 160, 320
    46ns    narrower: the same with 64, 128, 256

`halving="blur"` halves the image inside the network, after a 5x5 Gaussian of sigma 0.7: the authors' `pre_down`
networks, which take images of 1024x2048 pixels and compute on 512x1024.

FFNet trains backbone and up-head (`vertebra.necks.up_head`) on ImageNet together: `ffnet("86", twin="a")` is a backbone
that is both, whose pyramid is the up-head's and whose `pooled` is gathered from all its maps. The letters A, B, C of a
name such as ResNet-86-A-B-C mean three different things: the family here, the variant of the up-head, and the
segmentation head.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.osa import conv_norm
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError, near
from vertebra.necks.up_head import UpHead, up_head
from vertebra.necks.up_head import rules as up_head_rules
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="ffnet",
    title="Simple and Efficient Architectures for Semantic Segmentation",
    year=2022,
    arxiv="2206.08236",
    reference="Qualcomm-AI-research/FFNet",
    licence="BSD-3-Clause-Clear",
    claim="plain encoders and decoders on deep ResNets of basic blocks match or beat HRNet, FANet and DDRNet on"
    " Cityscapes at lower latency: ResNet-150-A-A-A 84.4 mIoU, where the bottlenecks of ResNet-101-A-A-A reach 82.1",
    builds_on=("up_head",),
    numbers="the backbones alone, as counted on the authors' code; the networks of the paper's tables, with up-head and"
    " segmentation head, in the page's own test",
    note="The backbones, their classification twins and, as a neck, the up-head. The segmentation heads and the effects"
    " (receptive field, depth against bottlenecks and dilation) come with segmentation. Weights start by He's rule; the"
    " authors' code draws them with a deviation of 0.01.",
)

VARIANTS = {
    "18": {"family": "a", "depths": (2, 2, 2, 2)},
    "34": {"family": "a", "depths": (3, 4, 6, 3)},
    "50": {"family": "a", "depths": (3, 4, 6, 3), "block": "bottleneck"},
    "56": {"family": "a", "depths": (4, 8, 12, 3)},
    "86": {"family": "a", "depths": (8, 12, 16, 6)},
    "101": {"family": "a", "depths": (3, 4, 23, 3), "block": "bottleneck"},
    "134": {"family": "a", "depths": (8, 18, 28, 12)},
    "150": {"family": "a", "depths": (16, 18, 28, 12)},
    "18_d": {"family": "a", "depths": (2, 2, 2, 2), "first_stride": 2},
    "34_d": {"family": "a", "depths": (3, 4, 6, 3), "first_stride": 2},
    "50_d": {"family": "a", "depths": (3, 4, 6, 3), "block": "bottleneck", "first_stride": 2},
    "56_d": {"family": "a", "depths": (4, 8, 12, 3), "first_stride": 2},
    "86_d": {"family": "a", "depths": (8, 12, 16, 6), "first_stride": 2},
    "101_d": {"family": "a", "depths": (3, 4, 23, 3), "block": "bottleneck", "first_stride": 2},
    "134_d": {"family": "a", "depths": (8, 18, 28, 12), "first_stride": 2},
    "150_d": {"family": "a", "depths": (16, 18, 28, 12), "first_stride": 2},
    "22s": {"family": "s", "depths": (2, 3, 3, 2)},
    "30s": {"family": "s", "depths": (3, 4, 4, 3)},
    "40s": {"family": "s", "depths": (4, 5, 6, 4)},
    "54s": {"family": "s", "depths": (5, 8, 8, 5)},
    "78s": {"family": "s", "depths": (6, 12, 12, 8)},
    "86s": {"family": "s", "depths": (8, 12, 16, 6)},
    "150s": {"family": "s", "depths": (16, 18, 28, 12)},
    "22s_d": {"family": "s", "depths": (2, 3, 3, 2), "first_stride": 2},
    "30s_d": {"family": "s", "depths": (3, 4, 4, 3), "first_stride": 2},
    "40s_d": {"family": "s", "depths": (4, 5, 6, 4), "first_stride": 2},
    "54s_d": {"family": "s", "depths": (5, 8, 8, 5), "first_stride": 2},
    "78s_d": {"family": "s", "depths": (6, 12, 12, 8), "first_stride": 2},
    "86s_d": {"family": "s", "depths": (8, 12, 16, 6), "first_stride": 2},
    "150s_d": {"family": "s", "depths": (16, 18, 28, 12), "first_stride": 2},
    "46n": {"family": "n", "depths": (6, 8, 8)},
    "74n": {"family": "n", "depths": (8, 12, 16)},
    "122n": {"family": "n", "depths": (16, 24, 20)},
    "46ns": {"family": "n", "depths": (6, 8, 8), "dims": (64, 64, 128, 256)},
    "74ns": {"family": "n", "depths": (8, 12, 16), "dims": (64, 64, 128, 256)},
    "122ns": {"family": "n", "depths": (16, 24, 20), "dims": (64, 64, 128, 256)},
    "nano": {"family": "s", "depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "stem_strides": (1, 1), "image_size": 32},
}

DIMS = {"a": (64, 128, 256, 512), "s": (64, 128, 192, 320), "n": (64, 96, 160, 320)}
"""Family -> channels of the four maps, a quarter of them where blocks are bottlenecks."""
GATHERED, TWIN_WIDTH = (128, 256, 512, 1024), 2048
"""Channels of the twin's four maps as they are gathered, and of its pooled vector."""


class FFNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first four.

    Attributes:
        family: how images become the first map, and the usual `dims`: "a" vanilla, "s" slim, "n" narrow.
        depths: blocks of the four stages; of three in the narrow family, whose first map has none.
        block: "basic" has two 3x3 convolutions, "bottleneck" one between two 1x1, of four times the channels.
        first_stride: 2 halves the first map as well, for a total stride of 64.
        dims: channels of the four maps; None takes the family's.
        stem_strides: of the two layers of the stem that halve the image.
        halving: "blur" blurs the image and takes every second pixel, before anything else.
        twin: "a", "b" or "c" puts an up-head of that variant on top, for the classification of images.
        upsampling: of the twin's up-head.
    """

    family: Literal["a", "s", "n"]
    depths: Sequence[int]
    block: Literal["basic", "bottleneck"]
    first_stride: Literal[1, 2]
    dims: Sequence[int] | None
    stem_strides: Sequence[int]
    halving: Literal["none", "blur"]
    twin: Literal["none", "a", "b", "c"]
    upsampling: Literal["bilinear", "nearest"]


def ffnet(variant: str = "18", **options: Unpack[FFNetOptions]) -> "FFNet | Twin":
    """Build a backbone, or its classification twin.

    Args:
        variant: one of `VARIANTS`.
        options: as in `FFNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("ffnet", VARIANTS, variant, options, _made)


def _made(
    *,
    twin: Literal["none", "a", "b", "c"] = "none",
    upsampling: Literal["bilinear", "nearest"] = "bilinear",
    **options: Any,
) -> "FFNet | Twin":
    backbone = FFNet(**options)
    return backbone if twin == "none" else Twin(backbone, up_head(backbone.levels, twin, upsampling=upsampling))


class FFNet(Backbone):
    """A stem and four stages; build it with `ffnet`.

    Attributes:
        stem: image to what the first stage takes.
        stages: blocks of the four maps; the first of the narrow family is one convolution.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0.0", "classifier": "fc"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        family: Literal["a", "s", "n"],
        depths: Sequence[int],
        block: Literal["basic", "bottleneck"] = "basic",
        first_stride: Literal[1, 2] = 1,
        dims: Sequence[int] | None = None,
        stem_strides: Sequence[int] = (2, 2),
        halving: Literal["none", "blur"] = "none",
        drop_path: float = 0.0,
    ) -> None:
        widths = tuple(dims or DIMS.get(family, ()))
        _check(family, block, halving, first_stride, depths, widths, stem_strides)
        super().__init__()
        self.preprocess, self.family = preprocess, family
        self.blur = Blur(preprocess.channels) if halving == "blur" else nn.Identity()
        self.stem = _stem(family, preprocess.channels, stem_strides)
        narrow, inputs = family == "n", 64
        rates, stages = drop_rates(drop_path, depths), []
        if narrow:
            stages.append(nn.Sequential(conv_norm(inputs, widths[0], 3, first_stride)))
            inputs = widths[0]
        for stage, drops in enumerate(rates, start=len(stages)):
            stride, blocks = 2 if stage else first_stride, []
            for number, rate in enumerate(drops):
                blocks.append(Residual(inputs, widths[stage], block, 1 if number else stride, rate))
                inputs = blocks[-1].outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        finest = stem_strides[0] * stem_strides[1] * first_stride * (1 + (halving == "blur"))
        times = 4 if block == "bottleneck" else 1
        channels = [width if narrow and not stage else times * width for stage, width in enumerate(widths)]
        self.levels = tuple(Level(number, finest << stage) for stage, number in enumerate(channels))
        self.width = channels[-1]

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images, least=5 if isinstance(self.blur, Blur) else 1)
        x, maps = self.stem(self.blur(images)), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem and the blocks."""
        return [self.stem, *(block for stage in self.stages for block in stage.children())]


class Residual(nn.Module):
    """Convolutions and norms beside a shortcut, which has weights where the shape changes.

    Attributes:
        outputs: channels that come out.
    """

    def __init__(
        self, inputs: int, width: int, block: Literal["basic", "bottleneck"], stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if block == "basic":
            self.outputs = width
            layers = [*conv_norm(inputs, width, 3, stride), *conv_norm(width, width, 3)]
        else:
            self.outputs = 4 * width
            layers = [*conv_norm(inputs, width, 1), *conv_norm(width, width, 3, stride)]
            layers += conv_norm(width, self.outputs, 1)
        self.branch = nn.Sequential(*layers[:-1])
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()
        same = inputs == self.outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, self.outputs, 1, stride)[:2])
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up."""
        branch = self.drop(self.branch(x))
        return self.activation(branch.add_(self.shortcut(x)))


class Blur(nn.Module):
    """A 5x5 Gaussian of sigma 0.7 and stride 2, without weights.

    As the authors have it: the image is mirrored by a row at the top and the bottom and by nothing at the sides, and
    the Gaussian's tails beyond five pixels are mirrored into its ends.
    """

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        tails = torch.exp(-(torch.arange(4, dtype=torch.float64) ** 2) / (2 * 0.7**2))
        centre, near, far, beyond = (tails / (2 * tails.sum() - tails[0])).unbind()
        line = torch.stack([far + beyond, near, centre, near, far + beyond])
        kernel = torch.outer(line, line).float().expand(channels, 1, 5, 5).clone()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, C, (H - 1) // 2, (W - 3) // 2)."""
        images = F.pad(images, (0, 0, 1, 1), mode="reflect")
        return F.conv2d(images, self.kernel, stride=2, groups=images.shape[1])


class Twin(Backbone):
    """The classification twin: a backbone, an up-head, and what gathers its maps into one vector.

    From the finest map on, each is widened by a bottleneck and added to the finer ones, which convolutions of stride 2
    bring to its size; a 1x1 convolution and the mean over cells make the vector.

    Attributes:
        inner: the backbone.
        neck: its up-head, of four levels.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "inner.stem.0.0", "classifier": "classifier"}

    def __init__(self, backbone: FFNet, neck: UpHead) -> None:
        super().__init__()
        self.inner, self.neck, self.preprocess = backbone, neck, backbone.preprocess
        self.levels, self.width = neck.levels, TWIN_WIDTH
        pairs = zip(neck.levels, GATHERED, strict=True)
        self.widen = nn.ModuleList(Residual(level.channels, width // 4, "bottleneck") for level, width in pairs)
        pairs = pairwise(GATHERED)
        self.down = nn.ModuleList(_biased(fine, coarse, 3, 2) for fine, coarse in pairs)
        self.last = _biased(GATHERED[-1], TWIN_WIDTH, 1, 1)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        maps = self.neck(self.inner(images).pyramid)
        x = self.widen[0](maps[0])
        for finer, widen, down in zip(maps[1:], self.widen[1:], self.down, strict=True):  # type: ignore[arg-type]
            x = widen(finer) + down(x)
        return Features(maps, self.last(x).mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The backbone's parts, the up-head, and the layers that gather."""
        return [*self.inner.trunk(), self.neck, self.widen, self.down, self.last]


def published(state: Mapping[str, Tensor], network: FFNet | Twin) -> dict[str, Tensor]:
    """Released weights under our names: the backbone's share, or that of the classification twin.

    Takes the authors' networks for segmentation and classification, and torchvision's ResNets for the vanilla family.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    if isinstance(network, FFNet):
        return convert(state, backbone_rules(network.family), network)
    backbone = published(state, network.inner)
    neck = convert(state, up_head_rules(), network.neck)
    gathering = nn.ModuleDict({"widen": network.widen, "down": network.down, "last": network.last})
    found = {
        **{f"inner.{name}": x for name, x in backbone.items()},
        **{f"neck.{name}": x for name, x in neck.items()},
    }
    return {**found, **convert(state, gathering_rules(), gathering)}


def backbone_rules(family: str) -> Rules:
    """The authors' names -> those of a backbone. Other parts are dropped."""
    rules: list[tuple[str, str | None]] = [(r"^(module\.)?(head|smoothing|fc)\.", None)]
    rules += [(r"^(module\.)?(backbone_model\.)?(?=conv|bn|layer)", "")]
    for number, place in _FIRST[family].items():
        rules += [(rf"^conv{number}\.", f"{place}.0."), (rf"^bn{number}\.", f"{place}.1.")]
    rules += [(rf"^layer{number}\.", f"stages.{number - (family != 'n')}.") for number in (1, 2, 3, 4)]
    return [*rules, *_BLOCK_RULES]


def gathering_rules() -> Rules:
    """The authors' names -> those of what gathers a twin's maps. Other parts are dropped."""
    return [
        (r"^(module\.)?(backbone_model|head\.layers\.[01]|head\.layers\.2\.classifier)\.", None),
        (r"^(module\.)?head\.layers\.2\.expansion_layers\.", "widen."),
        (r"^(module\.)?head\.layers\.2\.downsampling_layers\.", "down."),
        (r"^(module\.)?head\.layers\.2\.final_layer\.", "last."),
        *_BLOCK_RULES,
    ]


_FIRST = {
    "a": {1: "stem.0"},
    "s": {0: "stem.0", 1: "stem.1"},
    "n": {0: "stem.0", 1: "stem.1", 2: "stages.0.0"},
}
"""Family -> the authors' numbers of the first convolutions and norms -> our places."""

_BLOCK_RULES: Rules = [
    (r"\.downsample\.", ".shortcut."),
    *(
        (rf"\.{layer}{number}\.", f".branch.{3 * (number - 1) + place}.")
        for number in (1, 2, 3)
        for place, layer in enumerate(("conv", "bn"))
    ),
]


def _stem(family: str, channels: int, strides: Sequence[int]) -> nn.Sequential:
    """Image to the first stage's input, of 64 channels."""
    if family == "a":
        return nn.Sequential(conv_norm(channels, 64, 7, strides[0]), nn.MaxPool2d(3, strides[1], 1))
    middle = 32 if family == "s" else 64
    return nn.Sequential(conv_norm(channels, middle, 3, strides[0]), conv_norm(middle, 64, 3, strides[1]))


def _biased(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution with a bias, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _check(
    family: str,
    block: str,
    halving: str,
    first_stride: int,
    depths: Sequence[int],
    dims: Sequence[int],
    stem_strides: Sequence[int],
) -> None:
    for name, value, known in (
        ("family", family, tuple(DIMS)),
        ("block", block, ("basic", "bottleneck")),
        ("halving", halving, ("none", "blur")),
    ):
        if value not in known:
            raise UsageError(f"ffnet: {name} is {value!r}{near(str(value), known)}; it can be {', '.join(known)}")
    if first_stride not in (1, 2):
        raise UsageError(f"ffnet: first_stride is {first_stride}; it can be 1 or 2")
    check_at_least("ffnet", 1, depths=depths, dims=dims, stem_strides=stem_strides)
    stages = 3 if family == "n" else 4
    if len(depths) != stages or len(dims) != 4 or len(stem_strides) != 2:
        raise UsageError(
            f"ffnet: depths {tuple(depths)} need a number for each of {stages} stages of family {family!r}, dims"
            f" {tuple(dims)} one for each of four maps, stem_strides {tuple(stem_strides)} one for each of two layers"
        )
