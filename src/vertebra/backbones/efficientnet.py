"""EfficientNet: depth, width and resolution scaled together from one small base.

    efficientnet("b3")
    anynet(compound_scale(described("resnet50"), 2))    # any other network, grown by the same rule; see fast_scaling

The base network, found by search, stacks inverted bottlenecks with squeeze-and-excitation; b1 to b7 grow depth by
1.2, width by 1.1 and resolution by 1.15 a step. The squeeze takes a quarter of the block's input width.

These are timm's `tf_` networks, which match the authors' code: asymmetric "same" padding at stride 2 and BatchNorm
eps 1e-3. timm's `efficientnet_b*`, with symmetric padding and other weights, are at `timm/efficientnet_b0` and so on.
The coarsest map is the one before the last 1x1 convolution; `pooled` comes after it.
"""

from dataclasses import replace
from math import ceil
from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.blocks.scaling import Design, compatible, round_group
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="efficientnet",
    title="EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    year=2019,
    arxiv="1905.11946",
    reference="tensorflow/tpu",
    licence="Apache-2.0",
    claim=(
        "84.3 % ImageNet top-1 (b7), 8.4 times smaller and 6.1 times faster than the best ConvNet before it; 91.7 % "
        "on CIFAR-100 by transfer"
    ),
)

VARIANTS = {
    "b0": {"timm": "tf_efficientnet_b0"},
    "b1": {"timm": "tf_efficientnet_b1"},
    "b2": {"timm": "tf_efficientnet_b2"},
    "b3": {"timm": "tf_efficientnet_b3"},
    "b4": {"timm": "tf_efficientnet_b4"},
    "b5": {"timm": "tf_efficientnet_b5"},
    "b6": {"timm": "tf_efficientnet_b6"},
    "b7": {"timm": "tf_efficientnet_b7"},
}


def efficientnet(variant: str = "b0", **options: Unpack[TimmOptions]) -> Timm:
    """Build an EfficientNet; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)


def compound_scale(base: Design, phi: float, *, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> Design:
    """A network that is alpha^phi times as deep, beta^phi as wide, and sees sides gamma^phi times as long (eq. 3).

    MACs grow by about (alpha beta^2 gamma^2)^phi, with the paper's numbers 1.92 a unit, and more where few blocks are
    rounded up.

    Args:
        base: of `vertebra.blocks.scaling.design`, such as `fast_scaling.described("resnet50")`.
        phi: how far; 0 is the base with its widths rounded.
        alpha: growth of the depth a unit.
        beta: of the width.
        gamma: of the side of the image, which goes to a multiple of 4.

    Raises:
        UsageError: factors that are not above 0, or a network that would be too small.
    """
    if min(alpha, beta, gamma) <= 0:
        raise UsageError(f"compound_scale: alpha {alpha}, beta {beta} and gamma {gamma} must be above 0")
    return grown(base, depth=alpha**phi, width=beta**phi, size=round(base.size * gamma**phi / 4) * 4)


def grown(base: Design, *, depth: float = 1.0, width: float = 1.0, size: int | None = None) -> Design:
    """A network with depths and widths multiplied and rounded as the authors' code does it.

    Stem and head widen too, and so do groups (the paper has none): a dense convolution stays dense.

    Args:
        base: of `vertebra.blocks.scaling.design`.
        depth: factor of the depths, above 0.
        width: factor of the widths, above 0.
        size: side of the image in pixels; None keeps the base's.

    Raises:
        UsageError: a factor or a size that makes no network.
    """
    size = base.size if size is None else size
    if min(depth, width) <= 0 or size < 1:
        raise UsageError(f"a network cannot grow by depth {depth} and width {width} to {size} pixels; take more")
    depths = tuple(round_repeats(number, depth) for number in base.depths)
    widths = tuple(round_filters(number, width) for number in base.widths)
    stem, head = round_filters(base.stem_width, width), round_filters(base.head, width) if base.head else 0
    made = replace(base, depths=depths, widths=widths, stem_width=stem, head=head, size=size)
    if base.block == "mbconv":
        return made
    wide = [
        round(new * stage.ratio)
        if stage.group == round(stage.width * stage.ratio)
        else round_group(stage.group * width)
        for stage, new in zip(base.stages, widths, strict=True)
    ]
    fitting, groups = compatible(widths, base.ratios, wide)
    return replace(made, widths=fitting, groups=groups)


def round_filters(filters: int, width: float) -> int:
    """Channels times `width`, to the nearest multiple of 8, at least 8 and never below nine tenths of the product."""
    wanted = filters * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Blocks times `depth`, rounded up."""
    return ceil(repeats * depth)
