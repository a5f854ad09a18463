"""ConvNeXt: a ResNet brought up to date step by step until it keeps pace with Swin.

A 4x4 patch stem, then four stages at strides 4, 8, 16 and 32. A block is one 7x7 depthwise convolution, LayerNorm,
and a pointwise MLP of ratio 4 with GELU, scaled per channel by a learned gamma that starts at 1e-6.

timm's layout is the authors' under other parameter names. Atto to nano are timm's own smaller settings; they are
counted against timm's published table. timm's `norm` before the classifier stands after the pooling, so the
coarsest map of the pyramid is not normalised.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="convnext",
    title="A ConvNet for the 2020s",
    year=2022,
    arxiv="2201.03545",
    reference="facebookresearch/ConvNeXt",
    licence="MIT",
    claim=(
        "87.8 % ImageNet top-1 (xlarge, 384 px, pretrained on ImageNet-22k), above Swin on COCO detection and "
        "ADE20K segmentation"
    ),
    note=(
        "The isotropic networks, which timm lacks, and the modernisation path from ResNet-50 come with the "
        "convolutional pages."
    ),
)

VARIANTS = {
    "tiny": {"timm": "convnext_tiny"},
    "atto": {"timm": "convnext_atto"},
    "femto": {"timm": "convnext_femto"},
    "pico": {"timm": "convnext_pico"},
    "nano": {"timm": "convnext_nano"},
    "small": {"timm": "convnext_small"},
    "base": {"timm": "convnext_base"},
    "large": {"timm": "convnext_large"},
    "xlarge": {"timm": "convnext_xlarge"},
}


def convnext(variant: str = "tiny", **options: Unpack[TimmOptions]) -> Timm:
    """Build a ConvNeXt; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
