"""SkipblockNet: a MobileNetV3-Large-like network whose first map reaches its deep parts through two skip blocks.

"SkipNet" in the paper that brought the bias loss (arXiv 2107.11170), SkipblockNet in its code. A skip block pools the
first map of 16 channels to the size of a later one, runs an inverted residual without a shortcut over it, and is added
there: low-level detail meets semantics at strides 8 and 16.

Shapes: images (B, channels, H, W) of any size, five levels of strides 2 to 32, pooled (B, 1280) behind the hidden layer
of the classifier. Poolings follow the maps' sizes, which the authors' code fixes at 28 and 14 pixels. Of the paper's
sizes only M can be told from its text and code.
"""

from collections.abc import Mapping
from typing import Unpack

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from timm.layers.helpers import make_divisible
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.parity import convert

VARIANTS = {
    "m": {"width": 1.0},
    "m_075": {"width": 0.75},
    "nano": {"width": 0.35, "stem_stride": 1, "hidden": 256, "image_size": 32},
}

# kernel, expansion, channels, squeeze-and-excitation, h-swish (else ReLU), stride: a row a block, a list a group
_GROUPS = (
    (
        (3, 4, 24, False, False, 2),
        (3, 3, 24, False, False, 1),
        (5, 3, 40, True, False, 2),
        (5, 3, 40, True, False, 1),
        (5, 6, 40, True, True, 1),
    ),
    (
        (3, 6, 80, False, True, 2),
        (3, 2.5, 80, False, True, 1),
        (3, 2.3, 80, False, True, 1),
        (3, 2.3, 80, False, True, 1),
    ),
    (
        (3, 6, 112, True, True, 1),
        (3, 6, 112, True, True, 1),
    ),
    (
        (5, 6, 160, True, True, 2),
        (5, 6, 160, True, True, 1),
        (5, 6, 160, True, True, 1),
    ),
)
_SKIPS = ((5, 6), (3, 2.3))
"""Kernel and expansion of the skip blocks behind the first and the second group."""
_STEM, _LAST_EXPANSION, _HIDDEN = 16, 6, 1280


class SkipblockNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first.

    Attributes:
        width: factor of all channels but the hidden layer's.
        stem_stride: 2, or 1 for small images, which halves all strides.
        hidden: outputs of the hidden layer behind the pooling.
    """

    width: float
    stem_stride: int
    hidden: int


def skipblocknet(variant: str = "m", **options: Unpack[SkipblockNetOptions]) -> "SkipblockNet":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `SkipblockNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("skipblocknet", VARIANTS, variant, options, SkipblockNet)


class SkipblockNet(Backbone):
    """Stem, four groups of inverted residuals, two skip blocks; build it with `skipblocknet`.

    Attributes:
        stem: image to the first map.
        base: the block that both skip blocks read.
        groups: of inverted residuals.
        skips: what is added behind the first two groups.
        last: 1 x 1 convolution before the pooling.
        hidden: layer between pooling and classifier.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "classifier"}

    def __init__(
        self, *, preprocess: Preprocess, width: float, stem_stride: int = 2, hidden: int = _HIDDEN, drop_path: float = 0
    ) -> None:
        check_at_least("skipblocknet", 1, hidden=hidden)
        if width <= 0 or stem_stride not in (1, 2) or drop_path:
            raise UsageError(
                f"skipblocknet: width is {width}, stem_stride {stem_stride}, drop_path {drop_path}; width must be above"
                " 0, the stride 1 or 2, and there is no stochastic depth"
            )
        super().__init__()
        self.preprocess = preprocess
        first = make_divisible(_STEM * width, 8)
        self.stem = nn.Sequential(*_layer(preprocess.channels, first, 3, stem_stride), nn.Hardswish(inplace=True))
        self.base = InvertedResidual(first, first, first, 3, 1, squeeze=False, swish=True)
        inputs, stride, levels, groups = first, stem_stride, {stem_stride: first}, []
        for rows in _GROUPS:
            blocks = []
            for kernel, expansion, channels, squeeze, swish, step in rows:
                outputs, inner = make_divisible(channels * width, 8), make_divisible(inputs * expansion, 8)
                blocks.append(InvertedResidual(inputs, inner, outputs, kernel, step, squeeze=squeeze, swish=swish))
                inputs, stride = outputs, stride * step
                levels[stride] = outputs
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.ModuleList(groups)
        ends = [group[-1].project[0].out_channels for group in groups[:2]]  # type: ignore[union-attr, index]
        self.skips = nn.ModuleList(
            _inverted(first, make_divisible(first * expansion, 8), end, kernel)
            for (kernel, expansion), end in zip(_SKIPS, ends, strict=True)
        )
        deepest = make_divisible(inputs * _LAST_EXPANSION, 8)
        self.last = nn.Sequential(*_layer(inputs, deepest, 1), nn.Hardswish(inplace=True))
        self.hidden = nn.Sequential(nn.Linear(deepest, hidden), nn.Hardswish(inplace=True))
        levels[stride] = deepest
        self.levels, self.width = tuple(Level(channels, at) for at, channels in levels.items()), hidden

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features; the last map is that behind the last convolution."""
        check_images(self, images)
        first = x = self.base(self.stem(images))
        stride = self.levels[0].stride
        maps = {stride: x}
        for number, group in enumerate(self.groups):
            for block in group:  # type: ignore[union-attr]
                x, stride = block(x), stride * block.stride
                maps[stride] = x
            if number < len(self.skips):
                x = maps[stride] = x + self.skips[number](F.adaptive_avg_pool2d(first, x.shape[2:]))
        x = maps[stride] = self.last(x)
        return Features(tuple(maps.values()), self.hidden(x.mean((2, 3))))

    def trunk(self) -> list[nn.Module]:
        """Stem, base and blocks, each skip block before the group that reads it, the two last layers."""
        parts: list[nn.Module] = [self.stem, self.base, *self.groups[0]]  # type: ignore[misc]
        for number in range(1, len(self.groups)):
            parts += [*self.skips[number - 1 : number], *self.groups[number]]  # type: ignore[misc, list-item]
        return [*parts, self.last, self.hidden]


class InvertedResidual(nn.Module):
    """1 x 1 expansion, depthwise convolution, squeeze-and-excitation, 1 x 1 projection; a shortcut where shapes agree.

    (B, inputs, H, W) to (B, outputs, H / stride, W / stride).
    """

    def __init__(
        self, inputs: int, inner: int, outputs: int, kernel: int, stride: int, *, squeeze: bool, swish: bool
    ) -> None:
        super().__init__()
        self.stride, self.shortcut = stride, stride == 1 and inputs == outputs
        activation = nn.Hardswish if swish else nn.ReLU
        self.expand = nn.Sequential(*_layer(inputs, inner, 1), activation(inplace=True))
        self.depthwise = nn.Sequential(*_layer(inner, inner, kernel, stride, inner), activation(inplace=True))
        self.squeeze = Squeeze(inner) if squeeze else nn.Identity()
        self.project = nn.Sequential(*_layer(inner, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """One map to the next."""
        out = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + out if self.shortcut else out


class Squeeze(nn.Module):
    """Channels times a hard sigmoid of two linear layers on their means; (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = make_divisible(channels // 4, 8)
        self.gates = nn.Sequential(
            nn.Linear(channels, reduced), nn.ReLU(), nn.Linear(reduced, channels), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """The weighed map."""
        return x * self.gates(x.mean((2, 3)))[..., None, None]


def _inverted(inputs: int, inner: int, outputs: int, kernel: int) -> nn.Sequential:
    """A skip block: ReLU and no shortcut."""
    return nn.Sequential(
        *_layer(inputs, inner, 1),
        nn.ReLU(inplace=True),
        *_layer(inner, inner, kernel, 1, inner),
        nn.ReLU(inplace=True),
        *_layer(inner, outputs, 1),
    )


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv, nn.BatchNorm2d(outputs)


def published(state: Mapping[str, Tensor], backbone: SkipblockNet) -> dict[str, Tensor]:
    """The authors' released weights under our names; their classifier is left out.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    inside = r"(base|groups\.\d\.\d)\.conv\."
    rules = [
        (r"^module\.", ""),
        (r"^classifier\.3\.", None),
        (r"^classifier\.0\.", "hidden.0."),
        (r"^first_layer\.", "stem."),
        (r"^base_block\.", "base."),
        (r"^blocks\.", "groups."),
        (r"^skip1\.core_block\.", "skips.0."),
        (r"^skip2\.core_block\.", "skips.1."),
        (r"^conv\.", "last."),
        (rf"^{inside}([01])\.", r"\1.expand.\2."),
        (rf"^{inside}3\.", r"\1.depthwise.0."),
        (rf"^{inside}4\.", r"\1.depthwise.1."),
        (rf"^{inside}6\.fc\.", r"\1.squeeze.gates."),
        (rf"^{inside}7\.", r"\1.project.0."),
        (rf"^{inside}8\.", r"\1.project.1."),
    ]
    return convert(state, rules, backbone)
