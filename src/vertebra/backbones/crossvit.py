"""CrossViT: a branch of fine and a branch of coarse patches that exchange their class tokens.

The fine branch cuts the image into patches of 12 pixels, the coarse branch a slightly smaller copy of it into patches
of 16. After each group of blocks the class token of one branch attends once to the patches of the other, which costs
linear time. The `dagger` networks embed patches by three convolutions.

The pyramid has two maps, of strides 12 (fine branch) and 16 (coarse branch); `pooled` joins both class tokens. There
is no single sequence, so `tokens` is None. The network resizes any image to its own two sizes (240 and 224, or 408
and 384), bicubically: other sizes are accepted but cost the same.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="crossvit",
    title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    year=2021,
    arxiv="2103.14899",
    reference="IBM/CrossViT",
    licence="Apache-2.0",
    claim="2 points above DeiT on ImageNet-1k at a small to moderate increase in compute, with fusion of linear cost",
)

VARIANTS = {
    "tiny": {"timm": "crossvit_tiny_240"},
    "small": {"timm": "crossvit_small_240"},
    "base": {"timm": "crossvit_base_240"},
    "9": {"timm": "crossvit_9_240"},
    "15": {"timm": "crossvit_15_240"},
    "18": {"timm": "crossvit_18_240"},
    "9_dagger": {"timm": "crossvit_9_dagger_240"},
    "15_dagger": {"timm": "crossvit_15_dagger_240"},
    "18_dagger": {"timm": "crossvit_18_dagger_240"},
    "15_dagger_408": {"timm": "crossvit_15_dagger_408"},
    "18_dagger_408": {"timm": "crossvit_18_dagger_408"},
}


def crossvit(variant: str = "tiny", **options: Unpack[TimmOptions]) -> Timm:
    """Build a CrossViT; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
