"""EfficientNet: depth, width and resolution scaled together from one small base.

The base network, found by search, stacks inverted bottlenecks with squeeze-and-excitation; b1 to b7 grow depth by
1.2, width by 1.1 and resolution by 1.15 a step. The squeeze takes a quarter of the block's input width.

These are timm's `tf_` networks, which match the authors' code: asymmetric "same" padding at stride 2 and BatchNorm
eps 1e-3. timm's `efficientnet_b*`, with symmetric padding and other weights, are at `timm/efficientnet_b0` and so on.
The coarsest map is the one before the last 1x1 convolution; `pooled` comes after it.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
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
    note="Compound scaling as a method for other networks comes with the scaling pages.",
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
