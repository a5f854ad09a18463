"""Res2Net: a bottleneck whose 3x3 convolution is split into a chain over groups of channels.

The channels of a block are cut into s groups; each group's 3x3 convolution also sees the output of the group
before it, so that one block holds receptive fields of many sizes. The first block of a stage has no chain, and its
last group is average-pooled. `50_26w_4s` reads: 50 layers, width 26, 4 scales. `next` has grouped convolutions,
`dla60` puts the block into DLA, and the `v1b` networks have a deep stem and average-pooled shortcuts.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="res2net",
    title="Res2Net: A New Multi-scale Backbone Architecture",
    year=2019,
    arxiv="1904.01169",
    reference="Res2Net/Res2Net-PretrainedModels",
    licence="none stated",
    claim=(
        "ImageNet top-1 error 22.01 % for Res2Net-50 against 23.85 % for ResNet-50 at equal complexity; gains for "
        "ResNeXt and DLA alike"
    ),
    note=(
        "timm's DLA networks have 1.4 to 1.8 % fewer parameters than the authors' README states. Res2Net-200 and "
        "the CIFAR setting come with the convolutional pages."
    ),
)

VARIANTS = {
    "50_26w_4s": {"timm": "res2net50_26w_4s"},
    "50_48w_2s": {"timm": "res2net50_48w_2s"},
    "50_14w_8s": {"timm": "res2net50_14w_8s"},
    "50_26w_6s": {"timm": "res2net50_26w_6s"},
    "50_26w_8s": {"timm": "res2net50_26w_8s"},
    "101_26w_4s": {"timm": "res2net101_26w_4s"},
    "next50": {"timm": "res2next50"},
    "dla60": {"timm": "dla60_res2net"},
    "next_dla60": {"timm": "dla60_res2next"},
    "50_v1b": {"timm": "res2net50d"},
    "101_v1b": {"timm": "res2net101d"},
}


def res2net(variant: str = "50_26w_4s", **options: Unpack[TimmOptions]) -> Timm:
    """Build a Res2Net; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
