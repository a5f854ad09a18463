"""LoRA: a frozen backbone whose layers each get an update of low rank, which can be merged into them.

The weight W of a layer becomes W + (alpha / rank) B A with A of `rank` rows and B of `rank` columns. A is random and B
is zero, so training starts from the backbone as it is; A and B alone train. `Lora.merge` adds the products to the
weights and gives a plain backbone that costs what it did before.

Which layers: those that the forward pass calls and that are what they seem. A network that reads a layer's weight
without calling it (the qkv of BEiT and Swin V2) or changes it on the way (weight standardisation) has that layer left
out, and so are grouped and dilated convolutions and layers that the update would not make smaller. The backbone stays
in evaluation mode: batch norms keep their statistics, and no path or unit is dropped but by `dropout` before A.

The layers are peft's.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal

from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.training.cost import count

PAPER = Paper(
    id="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    year=2021,
    arxiv="2106.09685",
    reference="microsoft/LoRA",
    licence="MIT",
    claim=(
        "on a par with full fine-tuning of RoBERTa, DeBERTa, GPT-2 and GPT-3 with up to 10,000 times fewer trainable "
        "parameters"
    ),
    parity="peft, through which it runs",
    note=(
        "The paper adapts the query and value of attention; here all linear layers are, or the convolutions of a "
        "network that is mostly of those; targets=['qkv'] comes nearest to the paper."
    ),
)

RULES = ("auto", "linear", "conv", "attention")


def lora(
    backbone: Backbone,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Literal["auto", "linear", "conv", "attention"] | Sequence[str] = "auto",
) -> "Lora":
    """Put updates of low rank on a backbone, in place.

    Args:
        backbone: is frozen and keeps its weights.
        rank: of the updates.
        alpha: scale of the updates times `rank`; None takes twice the rank.
        dropout: share of a layer's inputs that its update does not see in training, 0..1.
        targets: "linear" and "conv" take the layers of that kind, "auto" the kind that holds more weights, "attention"
            the linear layers of attention; names such as ["qkv", "fc1"] take the layers that end in them.

    Raises:
        UsageError: peft is not installed, an option is out of range, or no layer is left to adapt.
    """
    if find_spec("peft") is None:
        raise UsageError("lora needs peft, which is not installed; pip install 'vertebra[lora]'")
    if rank < 1:
        raise UsageError(f"lora: rank is {rank}; it must be at least 1")
    if not 0 <= dropout < 1:
        raise UsageError(f"lora: dropout is {dropout}; it must be in [0, 1), as 0.1")
    names = layers(backbone, rank, targets)
    return Lora(backbone, names, rank=rank, alpha=2 * rank if alpha is None else alpha, dropout=dropout)


class Lora(Backbone):
    """A frozen backbone with updates of low rank; build it with `lora`.

    Attributes:
        inner: the backbone, whose layers at `names` are peft's.
        names: of the layers that are adapted, in the backbone.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str], *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        exactly = "|".join(map(re.escape, names))  # peft takes a list for endings
        # peft takes a float too, whatever its annotation says: scale is alpha / rank
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=exactly)  # type: ignore[arg-type]
        backbone.requires_grad_(False).eval()
        inject_adapter_in_model(config, backbone)
        self.inner = backbone
        self.names = tuple(names)
        self.levels, self.width, self.preprocess = backbone.levels, backbone.width, backbone.preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        return self.inner(images)

    def trunk(self) -> Sequence[nn.Module]:
        """The backbone's parts, with the updates in them."""
        return self.inner.trunk()

    def train(self, mode: bool = True) -> "Lora":
        """Training mode for the updates alone: their dropout."""
        super().train(mode)
        self.inner.eval()
        for name in self.names:
            _layer(self.inner, name).lora_dropout.train(mode)
        return self

    def merge(self) -> Backbone:
        """A plain backbone with the updates in its weights, free to train; this one stays as it is."""
        plain = copy.deepcopy(self.inner)
        for name in self.names:
            layer = _layer(plain, name)
            layer.merge()
            plain.set_submodule(name, layer.get_base_layer())
        plain.preprocess = self.preprocess
        return plain.requires_grad_(True).train(self.training)


def _layer(network: nn.Module, name: str) -> Any:
    return network.get_submodule(name)


def layers(backbone: Backbone, rank: int, targets: str | Sequence[str] = "auto") -> list[str]:
    """Names of the layers that `targets` means.

    Raises:
        UsageError: an unknown rule, or no layer that can be adapted.
    """
    able = {
        name: layer for name, layer in _called(backbone) if _plain(layer) and _added(layer, rank) < layer.weight.numel()
    }
    linear = [name for name, layer in able.items() if isinstance(layer, nn.Linear)]
    conv = [name for name in able if name not in set(linear)]
    if isinstance(targets, str):
        if targets not in RULES:
            raise UsageError(
                f"lora: targets is {targets!r}{near(targets, RULES)}; {', '.join(RULES)}, or a list of names"
            )
        weights = {
            rule: sum(able[name].weight.numel() for name in names) for rule, names in (("l", linear), ("c", conv))
        }
        chosen = {
            "auto": linear if weights["l"] >= weights["c"] else conv,
            "linear": linear,
            "conv": conv,
            "attention": [name for name in linear if "attn" in name or "attention" in name],
        }[targets]
    else:
        chosen = [name for name in able if any(name == end or name.endswith(f".{end}") for end in targets)]
    if not chosen:
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in able}))
        raise UsageError(
            f"lora: {getattr(backbone, 'name', type(backbone).__name__)} has no layer to adapt with targets={targets!r}"
            f" and rank {rank}; {f'there are {endings}' if able else 'none of its layers is plain'}"
        )
    return chosen


def _called(backbone: Backbone) -> Iterator[tuple[str, Any]]:
    """Linear layers and convolutions that a forward pass calls, found where shapes alone are computed."""
    seen: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: seen.add(module))
        for module in backbone.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        count(backbone)
    finally:
        for hook in hooks:
            hook.remove()
    return ((name, module) for name, module in backbone.named_modules() if module in seen)


def _plain(layer: Any) -> bool:
    """Whether a layer is a product with its own weight and nothing else, so that an update of it can be merged."""
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    own = type(layer)._conv_forward is nn.Conv2d._conv_forward and type(layer).forward is nn.Conv2d.forward
    simple = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return simple and (own or type(layer) is Conv2dSame)


def _added(layer: Any, rank: int) -> int:
    """Parameters of an update."""
    outputs, inputs, *kernel = layer.weight.shape
    return rank * (inputs * (kernel[0] * kernel[1] if kernel else 1) + outputs)
