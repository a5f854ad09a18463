"""ResNeXt: a bottleneck made of many narrow paths of one shape, summed.

The number of paths (the cardinality) is a third dimension beside depth and width. The sum of C paths equals one
bottleneck whose 3x3 convolution has C groups, which is the form that is trained. The stride sits on the 3x3
convolution. `50_32x4d` reads: 50 layers, 32 paths, 4 channels a path in the first stage.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="resnext",
    title="Aggregated Residual Transformations for Deep Neural Networks",
    year=2016,
    arxiv="1611.05431",
    reference="facebookresearch/ResNeXt",
    licence="BSD-style with a PATENTS note; released weights CC BY-NC 4.0",
    claim=(
        "At equal complexity ImageNet top-1 error falls from 23.9 to 22.2 % (50 layers) and from 22.0 to 21.2 % "
        "(101 layers); 20.4 % for 101 64x4d"
    ),
    note=(
        "101_32x8d is not in the paper. The CIFAR networks and the three equal forms of the block come with the "
        "convolutional pages."
    ),
)

VARIANTS = {
    "50_32x4d": {"timm": "resnext50_32x4d"},
    "101_32x4d": {"timm": "resnext101_32x4d"},
    "101_64x4d": {"timm": "resnext101_64x4d"},
    "101_32x8d": {"timm": "resnext101_32x8d"},
}


def resnext(variant: str = "50_32x4d", **options: Unpack[TimmOptions]) -> Timm:
    """Build a ResNeXt; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
