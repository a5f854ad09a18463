"""MaxViT: convolution, attention within windows and attention across them, in every block.

A block is an inverted bottleneck with squeeze-and-excitation, then attention among the cells of each window, then
attention among the cells that share a place in all windows (a dilated grid), so each block sees the whole image at
linear cost. Both attentions have their own learned table of relative positions.

Windows are size/32 cells wide and nothing is padded: build the network for the size that it will see with
`image_size=...`, in multiples of 32. timm follows the authors' TensorFlow code ("same" padding, BatchNorm eps 1e-3),
with their weights. `pooled` comes after the head's linear layer and tanh; xlarge was published for ImageNet-21k.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="maxvit",
    title="MaxViT: Multi-Axis Vision Transformer",
    year=2022,
    arxiv="2204.01697",
    reference="google-research/maxvit",
    licence="Apache-2.0",
    claim=(
        "86.5 % ImageNet-1k top-1 without other data, 88.7 % with ImageNet-21k; strong detection, aesthetics and "
        "generation results"
    ),
)

VARIANTS = {
    "tiny": {"timm": "maxvit_tiny_tf_224"},
    "tiny_384": {"timm": "maxvit_tiny_tf_384"},
    "tiny_512": {"timm": "maxvit_tiny_tf_512"},
    "small": {"timm": "maxvit_small_tf_224"},
    "base": {"timm": "maxvit_base_tf_224"},
    "large": {"timm": "maxvit_large_tf_224"},
    "xlarge": {"timm": "maxvit_xlarge_tf_224"},
}


def maxvit(variant: str = "tiny", **options: Unpack[TimmOptions]) -> Timm:
    """Build a MaxViT; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
