"""SGConvNeXt: ConvNeXt with convolutions as long as the whole map in place of its 7 x 7 ones.

Shapes: images (B, 3, H, W) to maps at strides 4, 8, 16, 32. The long convolution (`vertebra.blocks.sgconv`, arXiv
2210.09298) runs over the pixels row after row, in both directions; all else is timm's ConvNeXt. Kernels are as long as
a stage's map has pixels at `image_size`, and a larger map is seen up to that distance alone. The authors released no
code of this network: how many numbers a piece has is our choice, such that it has the size of ConvNeXt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from vertebra.backbones import building
from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.blocks.sgconv import sgconv_2d
from vertebra.surgery.swap import swap

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"plain": "convnext_tiny"},
    "small": {"plain": "convnext_small"},
    "base": {"plain": "convnext_base"},
    "nano": {
        "plain": "convnext_tiny",
        "network": {"depths": (1, 1, 3, 1), "dims": (16, 32, 64, 128), "patch_size": 1},
        "image_size": 32,
    },
}


class SGConvNeXtOptions(TimmOptions, total=False):
    """Options of SGConvNeXt.

    `weights` of a name or tag are the plain ConvNeXt's, and the long convolutions start at random; those of a file or
    folder are the whole network's.

    Attributes:
        piece: numbers a piece of the kernels, or as many as a smaller map has pixels.
        decay: factor that a kernel loses from one scale to the next.
    """

    piece: int
    decay: float


def sgconvnext(variant: str = "tiny", **options: Unpack[SGConvNeXtOptions]) -> Timm:
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `SGConvNeXtOptions`.

    Raises:
        UsageError: an unknown variant, or an option out of range.
        VertebraError: weights that do not fit.
    """
    given: dict[str, Any] = dict(options)
    piece, decay = given.pop("piece", 8), given.pop("decay", 2.0)
    building.check_at_least("sgconvnext", 1, piece=piece)
    own = given.pop("weights") if Path(given.get("weights") or "").is_file() else None
    plain = {name: {"timm": entry["plain"], **_rest(entry)} for name, entry in VARIANTS.items()}
    backbone = build_variant("sgconvnext", plain, variant, given)
    stages = {f".{number}.": level.stride for number, level in enumerate(backbone.levels)}

    def long(name: str, channels: int) -> nn.Module:
        stride = next(stride for mark, stride in stages.items() if f"stages{mark}" in name)
        pixels = max(1, backbone.preprocess.size[0] // stride) * max(1, backbone.preprocess.size[1] // stride)
        return sgconv_2d(channels, length=pixels, piece=min(piece, pixels), decay=decay)

    swap(backbone, "*.conv_dw", long, inplace=True)
    return _loaded(backbone, f"sgconvnext/{variant}", own, given.get("allow_pickle", False)) if own else backbone


def _rest(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "plain"}


def _loaded(backbone: Any, address: str, weights: str, allow_pickle: bool) -> Timm:
    """Weights of the whole network."""
    backbone.pretrained_cfg = {"first_conv": "network.stem.0", "classifier": "head"}
    backbone.weights_info = building.load(backbone, address, weights, allow_pickle)
    return backbone
