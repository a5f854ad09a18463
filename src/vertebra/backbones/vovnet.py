"""VoVNet: modules that concatenate all their layers once, at the end.

A one-shot aggregation module runs five 3x3 convolutions of equal width in a row, concatenates its input and all five
outputs, and mixes them with a 1x1 convolution. Compared with dense connections this keeps memory access low and the
device busy at the same multiply-accumulates.

timm's networks follow the paper; the authors' released code adds an identity link to each module after the first of
a stage, without parameters. Max-poolings round up, so odd sides give maps one cell larger. timm has no pretrained
weights for these two.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="vovnet",
    title="An Energy and GPU-Computation Efficient Backbone Network for Real-Time Object Detection",
    year=2019,
    arxiv="1904.09730",
    reference="stigma0617/VoVNet.pytorch",
    licence="none stated",
    claim=(
        "Detectors on VoVNet run twice as fast as on DenseNet with 1.6 to 4.1 times less energy, and are better at "
        "small objects than on ResNet"
    ),
    note=(
        "VoVNet-27-slim and the identity links of the authors' code, which timm lacks, come with the convolutional "
        "pages."
    ),
)

VARIANTS = {
    "39": {"timm": "vovnet39a"},
    "57": {"timm": "vovnet57a"},
}


def vovnet(variant: str = "39", **options: Unpack[TimmOptions]) -> Timm:
    """Build a VoVNet; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
