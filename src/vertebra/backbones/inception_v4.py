"""Inception-v4 and Inception-ResNet-v2: parallel convolutions of several shapes, with and without residuals.

Each module runs branches of different receptive fields side by side (1x1, 3x3, and 7x7 split into 1x7 and 7x1) and
concatenates them. Inception-ResNet adds the scaled result to its input instead; the scale of 0.1 to 0.2 keeps very
wide networks alive. Convolutions of the stem are unpadded, so maps are a little smaller than the stride says; sides
from 75 pixels up will do.

timm carries the networks as TF-slim distributes them, with weights. Slim's Inception-ResNet-v2 has a stem of the
Inception-v3 kind and 10, 20 and 10 modules, unlike the paper's figure.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="inception_v4",
    title="Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    year=2016,
    arxiv="1602.07261",
    reference="tensorflow/models",
    licence="Apache-2.0",
    claim=(
        "Residual connections speed up the training of Inception networks markedly; 3.08 % top-5 error on the "
        "ILSVRC test set for an ensemble of four"
    ),
    note="Inception-ResNet-v1 and the paper's own layouts, which timm lacks, come with the convolutional pages.",
)

VARIANTS = {
    "v4": {"timm": "inception_v4"},
    "resnet_v2": {"timm": "inception_resnet_v2"},
}


def inception_v4(variant: str = "v4", **options: Unpack[TimmOptions]) -> Timm:
    """Build an Inception network; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
