"""NF-ResNet: residual networks without normalisation, their variance kept by arithmetic.

A block computes x + alpha * f(x / beta), where f keeps the variance and beta is the variance that x is known to
have. Convolutions standardise their weights (scaled weight standardisation) and activations are scaled to unit
variance, so no statistics of the batch are needed: an image's features do not depend on its neighbours.

timm departs from the authors' Haiku code: average-pooled shortcuts, a zero gain in each block's last convolution in
place of a scalar, activation scales folded into the convolutions, and widths of the RegNets rounded to multiples of
8 (2 to 4 % more parameters).
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="nf_resnet",
    title="Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    year=2021,
    arxiv="2101.08692",
    reference="deepmind/deepmind-research",
    licence="Apache-2.0",
    claim=(
        "ResNets and RegNets without activation normalisation match those with BatchNorm and rival EfficientNets at "
        "equal compute, whatever the batch size"
    ),
    note=(
        "The authors' exact layout, NF-ResNet-200 and -288 and the signal propagation plot come with the "
        "convolutional pages."
    ),
)

VARIANTS = {
    "resnet50": {"timm": "nf_resnet50"},
    "resnet101": {"timm": "nf_resnet101"},
    "regnet_b0": {"timm": "nf_regnet_b0"},
    "regnet_b1": {"timm": "nf_regnet_b1"},
    "regnet_b2": {"timm": "nf_regnet_b2"},
    "regnet_b3": {"timm": "nf_regnet_b3"},
    "regnet_b4": {"timm": "nf_regnet_b4"},
    "regnet_b5": {"timm": "nf_regnet_b5"},
}


def nf_resnet(variant: str = "resnet50", **options: Unpack[TimmOptions]) -> Timm:
    """Build a network without normalisation; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
