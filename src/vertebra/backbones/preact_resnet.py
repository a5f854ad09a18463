"""Pre-activation ResNet: norm and activation come before the convolution, and the skip path stays clean.

With nothing after the addition, a deep unit's input is a plain sum of what all units before it put out, and the
gradient reaches every one of them undiminished. A unit that changes width shares its first norm and activation
between both paths and has no norm on the shortcut.

timm's `resnetv2` puts the stride on the 3x3 convolution where the authors' Lua code has it on the first 1x1, at the
same parameters and slightly more compute.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

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
    note=(
        "The CIFAR networks of 164 and 1001 layers, ResNet-200, the authors' stride and the ablation switches come "
        "with the convolutional pages."
    ),
)

VARIANTS = {
    "50": {"timm": "resnetv2_50"},
    "18": {"timm": "resnetv2_18"},
    "34": {"timm": "resnetv2_34"},
    "101": {"timm": "resnetv2_101"},
    "152": {"timm": "resnetv2_152"},
}


def preact_resnet(variant: str = "50", **options: Unpack[TimmOptions]) -> Timm:
    """Build a pre-activation ResNet; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
