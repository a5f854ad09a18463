"""VoVNetV2: one-shot aggregation with shortcuts and an attention that reduces no channels.

Each module after the first of a stage adds its input, and effective squeeze-and-excitation weighs what the modules
mix (`vertebra.blocks.osa`). The authors' code has the attention in every module, timm's `ese_vovnet*` in the last
one of each stage alone: `ese="last"`, which timm's weights need.

Shapes: images (B, channels, H, W), four levels of strides 4 to 32, pooled (B, 512 or 1024).
"""

from typing import Any, Literal, Unpack

from vertebra.backbones.building import build
from vertebra.backbones.vovnet import VoVNet, VoVNetOptions
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="vovnet_v2",
    title="CenterMask: Real-Time Anchor-Free Instance Segmentation",
    year=2019,
    arxiv="1911.06667",
    reference="youngwanLEE/vovnet-detectron2",
    licence="CC BY-NC 4.0",
    claim=(
        "shortcuts let deep VoVNets be optimised, and attention without reduction keeps what reduction loses: V2-39, "
        "-57 and -99 are ahead of ResNet-50, -101 and ResNeXt-101 in Faster and Mask R-CNN at lower latency"
    ),
    builds_on=("vovnet",),
    note="CenterMask itself comes with the detectors.",
)

VARIANTS = {
    "39": {"depths": (1, 1, 2, 2)},
    "57": {"depths": (1, 1, 4, 3)},
    "99": {"depths": (1, 3, 9, 3)},
    "19": {"depths": (1, 1, 1, 1), "layers": 3},
    "19_dw": {"depths": (1, 1, 1, 1), "layers": 3, "stem": (64, 64, 64), "depthwise": True},
    "19_slim": {
        "depths": (1, 1, 1, 1),
        "layers": 3,
        "inner": (64, 80, 96, 112),
        "dims": (112, 256, 384, 512),
    },
    "19_slim_dw": {
        "depths": (1, 1, 1, 1),
        "layers": 3,
        "stem": (64, 64, 64),
        "depthwise": True,
        "inner": (64, 80, 96, 112),
        "dims": (112, 256, 384, 512),
    },
    "nano": {
        "depths": (1, 1, 2, 1),
        "layers": 3,
        "stem": (16, 16, 32),
        "stem_strides": (1, 1, 1),
        "inner": (16, 20, 24, 28),
        "dims": (32, 64, 96, 128),
        "image_size": 32,
    },
}


class VoVNetV2Options(VoVNetOptions, total=False):
    """Options; a variant sets some.

    Attributes:
        ese: modules that have the attention: "every" one, or the "last" of each stage.
        depthwise: depthwise convolutions and 1 x 1 ones in place of dense ones.
    """

    ese: Literal["every", "last"]
    depthwise: bool


def vovnet_v2(variant: str = "39", **options: Unpack[VoVNetV2Options]) -> VoVNet:
    """Build a VoVNetV2.

    Args:
        variant: one of `VARIANTS`.
        options: as in `VoVNetV2Options`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("vovnet_v2", VARIANTS, variant, options, _make)


def _make(*, ese: Literal["every", "last"] = "every", identity: bool = True, **options: Any) -> VoVNet:
    if ese not in ("every", "last"):
        raise UsageError(f"vovnet_v2: ese is {ese!r}; it can be every or last")
    return VoVNet(attention=ese, identity=identity, **options)
