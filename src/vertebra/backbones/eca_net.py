"""ECA-Net: plain ResNets and MobileNetV2 with efficient channel attention at the end of every residual branch.

The attention (`vertebra.blocks.eca`, arXiv 1910.03151) follows the last norm of a branch, before the addition. Kernels
are those of the released weights, one a stage, which differ from the paper's rule. timm's `ecaresnet*` are
other networks: tiered stems and pooled shortcuts.
"""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.blocks.eca import eca
from vertebra.errors import UsageError
from vertebra.parity import Rules, convert
from vertebra.surgery.swap import swap

VARIANTS = {
    "resnet50": {"timm": "resnet50", "kernels": (3, 5, 5, 7)},
    "resnet18": {"timm": "resnet18", "kernels": (3, 5, 7, 7)},
    "resnet34": {"timm": "resnet34", "kernels": (3, 3, 5, 7)},
    "resnet101": {"timm": "resnet101", "kernels": (3, 3, 5, 7)},
    "resnet152": {"timm": "resnet152", "kernels": (3, 3, 5, 7)},
    "mobilenetv2": {"timm": "mobilenetv2_100", "kernels": (1, 1, 1, 1, 3, 3, 3)},
}

_MOBILE_DEPTHS = (1, 2, 3, 4, 3, 3, 1)


class EcaNetOptions(TimmOptions, total=False):
    """Options of ECA-Net.

    Attributes:
        kernels: odd kernel sizes, one a stage; None takes the paper's rule at every place.
    """

    kernels: tuple[int, ...] | None


def eca_net(variant: str = "resnet50", **options: Unpack[EcaNetOptions]) -> Timm:
    """Build a network with channel attention; weights are the plain network's, and the attention starts at random.

    Args:
        variant: which network.
        options: as in `EcaNetOptions`.

    Raises:
        UsageError: another number of kernels than the network has stages.
    """
    plain = {name: {"timm": entry["timm"]} for name, entry in VARIANTS.items()}
    chosen: Mapping[str, Any] = {**VARIANTS.get(variant, {}), **options}
    kernels = chosen.get("kernels")
    backbone = build_variant("eca_net", plain, variant, {k: v for k, v in options.items() if k != "kernels"})
    if kernels is not None and len(kernels) != len(VARIANTS[variant]["kernels"]):
        raise UsageError(
            f"eca_net/{variant}: kernels is {kernels}; it needs {len(VARIANTS[variant]['kernels'])} numbers"
        )
    places = dict(_last_norms(backbone))

    def attention(name: str, channels: int) -> nn.Module:
        return eca(channels, kernel=None if kernels is None else kernels[places[name]])

    swap(backbone, lambda name, _: name in places, attention, place="after", inplace=True)
    return backbone


def _last_norms(backbone: Timm) -> list[tuple[str, int]]:
    """Name of the last norm of each residual branch, and its stage from 0."""
    network: Any = backbone.network
    stages = network.blocks if hasattr(network, "blocks") else [getattr(network, f"layer{n}") for n in (1, 2, 3, 4)]
    names = {module: name for name, module in backbone.named_modules()}
    return [
        (f"{names[block]}.{'bn3' if hasattr(block, 'bn3') else 'bn2'}", number)
        for number, stage in enumerate(stages)
        for block in stage
    ]


def published(state: Mapping[str, Tensor], backbone: Timm) -> dict[str, Tensor]:
    """The authors' released weights (BangguWu/ECANet, MIT) under our names; their classifier is left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `eca_net`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    last = "bn3" if "network.layer1.0.bn3.0.weight" in backbone.state_dict() else "bn2"
    rules = _mobile_rules() if hasattr(backbone.network, "blocks") else _resnet_rules(last)
    return convert(state, [(r"^module\.", ""), (r"^(fc|classifier)\.", None), *rules, (r"^", "network.")], backbone)


def _resnet_rules(last: str) -> Rules:
    """The last norm of a branch now lies in a sequence, with the attention behind it."""
    return [(rf"(layer\d\.\d+\.{last})\.", r"\1.0."), (r"(layer\d\.\d+)\.eca\.", rf"\1.{last}.1.")]


def _mobile_rules() -> Rules:
    rules = [(r"^features\.0\.0", "conv_stem"), (r"^features\.0\.1", "bn1")]
    rules += [(r"^features\.18\.0", "conv_head"), (r"^features\.18\.1", "bn2")]
    wide = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3.0", "bn3.1")
    first = ("conv_dw", "bn1", "conv_pw", "bn2.0", "bn2.1")  # a block that does not expand
    places = [(stage, block) for stage, depth in enumerate(_MOBILE_DEPTHS) for block in range(depth)]
    for number, (stage, block) in enumerate(places, start=1):
        parts = wide if number > 1 else first
        for part, ours in enumerate(parts):
            pairs = len(parts) - 3  # convolutions and norms that the authors keep in sequences of their own
            theirs = f"{part // 2}.{part % 2}" if part < pairs else f"{part - pairs // 2}"
            rules.append((rf"^features\.{number}\.conv\.{theirs}\.(?=[a-z])", f"blocks.{stage}.{block}.{ours}."))
    return rules
