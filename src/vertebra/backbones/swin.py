"""Swin: attention inside windows that shift by half a window from one block to the next.

Four stages at strides 4, 8, 16 and 32. Even blocks attend within a regular grid of 7x7 (or 12x12) windows, odd
blocks within the grid moved by half a window, so that information crosses the borders at a cost linear in the
image. A learned table of relative positions biases every attention; 2x2 patches merge between stages.

Any image whose sides are multiples of 4 will do: maps are padded to whole windows. timm pads after it has shifted the
map where the authors' dense-prediction code pads before, so features differ from theirs where a map is no whole
number of windows. Built with `image_size=...`, stages whose map is smaller than a window take the map as their
window, unshifted, as the authors' classifiers do. timm's patch merging opens stages 2 to 4 where the authors' closes
stages 1 to 3: the same network under other parameter names.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="swin",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    year=2021,
    arxiv="2103.14030",
    reference="microsoft/Swin-Transformer",
    licence="MIT",
    claim=(
        "87.3 % ImageNet-1k top-1 (large, 384 px, pretrained on ImageNet-22k), 58.7 box AP and 51.1 mask AP on "
        "COCO, 53.5 mIoU on ADE20K"
    ),
    note="Swin-MLP, which timm lacks, comes with our own transformer pages.",
)

VARIANTS = {
    "tiny": {"timm": "swin_tiny_patch4_window7_224"},
    "small": {"timm": "swin_small_patch4_window7_224"},
    "base": {"timm": "swin_base_patch4_window7_224"},
    "base_384": {"timm": "swin_base_patch4_window12_384"},
    "large": {"timm": "swin_large_patch4_window7_224"},
    "large_384": {"timm": "swin_large_patch4_window12_384"},
}


def swin(variant: str = "tiny", **options: Unpack[TimmOptions]) -> Timm:
    """Build a Swin Transformer; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
