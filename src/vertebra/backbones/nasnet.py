"""NASNet-A: a cell found by search on CIFAR-10, stacked for ImageNet.

A normal cell and a reduction cell of five pairs of operations each (separable convolutions, poolings, identity) were
found by a controller that samples cells and learns from their accuracy. Each cell reads the two cells before it.
`large` is NASNet-A (6 @ 4032). Maps round down at unpadded convolutions of the stem.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="nasnet",
    title="Learning Transferable Architectures for Scalable Image Recognition",
    year=2017,
    arxiv="1707.07012",
    reference="tensorflow/models",
    licence="Apache-2.0",
    claim=(
        "82.7 % ImageNet top-1, 1.2 points above the best network designed by hand at 28 % less compute; 43.1 mAP "
        "with Faster R-CNN on COCO"
    ),
    note=(
        "The mobile and CIFAR networks and the auxiliary head, which timm lacks, come with the convolutional pages; "
        "the search itself and ScheduledDropPath with the search pages."
    ),
)

VARIANTS = {
    "large": {"timm": "nasnetalarge"},
}


def nasnet(variant: str = "large", **options: Unpack[TimmOptions]) -> Timm:
    """Build a NASNet-A; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
