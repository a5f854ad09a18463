"""ResNet-RS: the old ResNet with a new recipe and better scaling rules.

ResNet-D (a deep stem, its max-pooling replaced by a strided convolution, average-pooled shortcuts) with
squeeze-and-excitation of ratio 0.25 of the block's output. Most of the gain is the recipe; long training calls for
more depth, short training for more width, and resolution should grow slowly.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="resnet_rs",
    title="Revisiting ResNets: Improved Training and Scaling Strategies",
    year=2021,
    arxiv="2103.07579",
    reference="tensorflow/tpu",
    licence="Apache-2.0",
    claim=(
        "1.7 to 2.7 times faster than EfficientNets on TPU at equal ImageNet accuracy; 86.2 % top-1 with pseudo- "
        "labels at 4.7 times NoisyStudent's speed"
    ),
    note="The training recipe and the study of scaling rules come with the recipes and the scaling pages.",
)

VARIANTS = {
    "50": {"timm": "resnetrs50"},
    "101": {"timm": "resnetrs101"},
    "152": {"timm": "resnetrs152"},
    "200": {"timm": "resnetrs200"},
    "270": {"timm": "resnetrs270"},
    "350": {"timm": "resnetrs350"},
    "420": {"timm": "resnetrs420"},
}


def resnet_rs(variant: str = "50", **options: Unpack[TimmOptions]) -> Timm:
    """Build a ResNet-RS; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
