"""Fast and accurate model scaling: grow the width most, because run time follows activations.

Scaling compute by s through depth or resolution multiplies the activations by s, through width only by its square
root. Fast compound scaling puts most of the growth into width, at equal accuracy. RegNetZ is the paper's own family:
inverted bottlenecks of ratio 4 with squeeze-and-excitation, SiLU, and no activation after a block. `500mf` and `4gf`
name its compute; `4gf_head` adds a final 1x1 convolution.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="fast_scaling",
    title="Fast and Accurate Model Scaling",
    year=2021,
    arxiv="2103.06877",
    reference="facebookresearch/pycls",
    licence="MIT",
    claim=(
        "Activations grow by about the square root of the compute at the accuracy of compound scaling, with "
        "matching speed-ups on memory-limited devices"
    ),
    note="timm has the RegNetZ networks only; the scaling rules themselves come with the scaling pages.",
)

VARIANTS = {
    "500mf": {"timm": "regnetz_005"},
    "4gf": {"timm": "regnetz_040"},
    "4gf_head": {"timm": "regnetz_040_h"},
}


def fast_scaling(variant: str = "500mf", **options: Unpack[TimmOptions]) -> Timm:
    """Build a RegNetZ; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
