"""Pre-activation ResNet: norm and activation come before the convolution, and the skip path stays clean.

With nothing after the addition, a deep unit's input is a plain sum of what all units before it put out, and the
gradient reaches every one of them undiminished. A unit that changes width shares its first norm and activation
between both paths and has no norm on the shortcut; `vertebra.blocks.residual_unit` has the paper's ablations too.

The networks of 18 to 152 layers are timm's `resnetv2`, which puts the stride on the 3 x 3 convolution where the
authors' Lua code has it on the first 1 x 1. Those written here are the authors': of 164 and 1001 layers for images of
32 pixels, whose stem has neither norm nor activation, and of 200 layers for ImageNet.

Shapes: images (B, channels, H, W), maps behind the last unit of each stage, the last one and `pooled` behind the final
norm and activation.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack

from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images
from vertebra.backbones.timm import Timm, TimmOptions, build_either
from vertebra.blocks.residual_unit import Order, ResidualUnit, Shortcut, residual_unit
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="preact_resnet",
    title="Identity Mappings in Deep Residual Networks",
    year=2016,
    arxiv="1603.05027",
    reference="KaimingHe/resnet-1k-layers",
    licence="BSD-style, by reference to fb.resnet.torch",
    claim=(
        "A network of 1001 layers trains, to 4.62 % error on CIFAR-10; identity shortcuts and pre-activation are "
        "what makes it easy"
    ),
    parity="timm's resnetv2_50 from the same weights; one unit of each kind in numpy",
    note="Released weights of the authors are Lua's, which no reader here opens.",
)

VARIANTS = {
    "50": {"timm": "resnetv2_50"},
    "18": {"timm": "resnetv2_18"},
    "34": {"timm": "resnetv2_34"},
    "101": {"timm": "resnetv2_101"},
    "152": {"timm": "resnetv2_152"},
    "200": {"depths": (3, 24, 36, 3), "dims": (256, 512, 1024, 2048), "stem": "large"},
    "164": {"depths": (18, 18, 18), "dims": (64, 128, 256), "image_size": 32},
    "1001": {"depths": (111, 111, 111), "dims": (64, 128, 256), "image_size": 32},
    "nano": {"depths": (2, 2, 2), "dims": (64, 128, 256), "image_size": 32},
}


class PreactResNetOptions(TimmOptions, total=False):
    """Options; those below are of the networks written here, and `network` of timm's. A variant sets some.

    Attributes:
        depths: units a stage.
        dims: channels that a stage gives.
        stem: "small" is one 3 x 3 convolution to a quarter of the first dims, "large" a 7 x 7 one of stride 2 with
            norm, activation and max-pooling, behind which the first unit has no pre-activation of its own; "bare" is
            the large one without norm and activation, as timm has it.
        order: of norm, activation and convolution, as in `vertebra.blocks.residual_unit`.
        shortcut: of units that keep the shape, likewise.
        bottleneck: likewise.
        stride_in: likewise.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem: Literal["small", "large", "bare"]
    order: Order
    shortcut: Shortcut
    bottleneck: bool
    stride_in: Literal["1x1", "3x3"]


def preact_resnet(variant: str = "50", **options: Unpack[PreactResNetOptions]) -> "Timm | PreactResNet":
    """Build a pre-activation ResNet.

    Args:
        variant: one of `VARIANTS`.
        options: as in `PreactResNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range or of the other kind of network.
    """
    return build_either(PAPER.id, VARIANTS, variant, options, PreactResNet)


class PreactResNet(Backbone):
    """Stem, stages of residual units, a last norm and activation; build it with `preact_resnet`.

    Attributes:
        stem: image to the first map.
        stages: units.
        last: norm and activation behind the last unit; nothing where each unit ends in an activation.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "head.fc"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depths: Sequence[int],
        dims: Sequence[int],
        stem: Literal["small", "large", "bare"] = "small",
        order: Order = "full",
        shortcut: Shortcut = "identity",
        bottleneck: bool = True,
        stride_in: Literal["1x1", "3x3"] = "1x1",
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("preact_resnet", 1, depths=depths, dims=dims)
        if len(depths) != len(dims) or drop_path or stem not in ("small", "large", "bare"):
            raise UsageError(
                f"preact_resnet: depths {depths} and dims {dims} need as many numbers, stem ({stem}) is small, large or"
                f" bare, and there is no stochastic depth (drop_path is {drop_path})"
            )
        residual_unit(4 * dims[0], order, shortcut=shortcut, stride_in=stride_in)  # refuses what is unknown
        super().__init__()
        self.preprocess = preprocess
        inputs = max(1, dims[0] // 4)
        activated = stem == "large" or (stem == "small" and order != "full")
        self.stem = _stem(preprocess.channels, inputs, stem, activated)
        kind = {"order": order, "shortcut": shortcut, "bottleneck": bottleneck, "stride_in": stride_in}
        stages = []
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            units = []
            for unit in range(depth):
                first = activated and stage == unit == 0
                units.append(ResidualUnit(inputs, dim, 2 if stage and not unit else 1, activated=first, **kind))  # type: ignore[arg-type]
                inputs = dim
            stages.append(nn.Sequential(*units))
        self.stages = nn.ModuleList(stages)
        ends = order in ("original", "norm_behind")
        self.last = nn.Identity() if ends else nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        finest = 1 if stem == "small" else 4
        self.levels = tuple(Level(dim, finest << stage) for stage, dim in enumerate(dims))
        self.width = inputs

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = maps[-1] = self.last(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, the units, the last norm where there is one."""
        units = [unit for stage in self.stages for unit in stage.children()]
        return [self.stem, *units, *([] if isinstance(self.last, nn.Identity) else [self.last])]


def _stem(channels: int, dim: int, stem: str, activated: bool) -> nn.Sequential:
    side, stride = (3, 1) if stem == "small" else (7, 2)
    conv = nn.Conv2d(channels, dim, side, stride, side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    norm = [nn.BatchNorm2d(dim), nn.ReLU()] if activated else []
    return nn.Sequential(conv, *norm, *([] if stem == "small" else [nn.MaxPool2d(3, 2, 1)]))


def published(state: Mapping[str, Tensor], backbone: PreactResNet) -> dict[str, Tensor]:
    """Weights of timm's `resnetv2` under our names, for a network with a bare stem and the stride in 3 x 3.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules: list[tuple[str, str | None]] = [(r"^head\.", None), (r"^stem\.conv\.", "stem.0."), (r"^norm\.", "last.0.")]
    rules += [(r"\.blocks\.", "."), (r"\.downsample\.conv\.", ".shortcut.way.")]
    for stage, units in enumerate(backbone.stages):
        for number, unit in enumerate(units.children()):
            shared = len(getattr(unit, "common")) > 0  # noqa: B009 - a submodule
            names = ("common.0", "common.1") if shared else ("branch.0", "branch.1")
            places = (
                ["branch.0", "branch.1", "branch.3", "branch.4", "branch.6"]
                if shared
                else ["branch.2", "branch.3", "branch.5", "branch.6", "branch.8"]
            )
            theirs = ("conv1", "norm2", "conv2", "norm3", "conv3")
            rules.append((rf"^(stages\.{stage}\.{number})\.norm1\.", rf"\1.{names[0]}."))
            rules += [
                (rf"^(stages\.{stage}\.{number})\.{a}\.", rf"\1.{b}.") for a, b in zip(theirs, places, strict=True)
            ]
    return convert(state, rules, backbone)
