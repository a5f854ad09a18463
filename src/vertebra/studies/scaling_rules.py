"""Scaling rules for any backbone that declares its stages: what a strategy asks for, what it builds, what that costs.

    grown = scale_backbone("timm/vit_tiny_patch16_224", 4, "d1_w8_r1")
    grown.after.macs / grown.before.macs

Depths and widths are read from a page's variant, or off one of timm's networks; heads of attention keep their width, so
that there are more of them. The law of `vertebra.blocks.scaling` is that of convolutions and linear layers: products
between tokens grow with the square of their number, and are counted apart. Designs of `fast_scaling` have
the paper's own scaler, with groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vertebra.backbones.timm import Timm
from vertebra.backbones.twin import accepted
from vertebra.blocks.scaling import FAST, factors, shares
from vertebra.contracts import Backbone, Cost
from vertebra.errors import UsageError
from vertebra.paper import find_page
from vertebra.spec import Spec
from vertebra.training.cost import count, evaluating

DEPTHS, WIDTHS, HEADS = (
    ("depths", "depth", "blocks"),
    ("dims", "dim", "widths", "width", "embed_dim"),
    ("heads", "num_heads"),
)
"""Names under which pages and timm declare blocks a stage, channels a stage, and heads of attention."""

_LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)


@dataclass(frozen=True)
class Grown:
    """A backbone after scaling.

    Attributes:
        spec: builds it again.
        backbone: with random weights.
        changed: option -> value before and after.
        before: cost of the network as it was, at its own size.
        after: cost of the new one, at its size.
        outside: MACs before and after that are outside the law, the products between tokens.
    """

    spec: Spec
    backbone: Backbone
    changed: Mapping[str, tuple[Any, Any]]
    before: Cost
    after: Cost
    outside: tuple[int, int]


def scale_backbone(address: str, scale: float, strategy: str = FAST, *, multiple: int = 4, **options: Any) -> Grown:
    """Build a backbone of about `scale` times the MACs, with random weights.

    Depths are rounded, widths go to multiples of 8 (and of the heads), the image's side to a multiple of `multiple`.
    Groups stay as they are: convolutions of a fixed number of groups, and depthwise ones, widen by themselves.

    Args:
        address: of a page's variant or of timm's network.
        scale: factor of the MACs, above 0.
        strategy: as in `vertebra.blocks.scaling.shares`.
        multiple: of the image's side in pixels.
        options: of the backbone; where a page keeps depths or widths to itself, they are given here.

    Raises:
        UsageError: nothing is declared along an axis that the strategy scales, or the numbers make no network.
    """
    factor, share = factors(strategy, scale), shares(strategy)
    with torch.device("meta"):
        small = Spec(address, options).build()
    if hasattr(small, "design"):
        raise UsageError(f"{address} has the paper's scaler: give it scale={scale:g} and strategy={strategy!r} instead")
    declared = _of_timm(small) if isinstance(small, Timm) else _of_page(address, options)
    wanted = _scaled(address, declared, factor.depth, factor.width, share)
    stated = {**options}
    if isinstance(small, Timm):
        stated["network"] = {**(options.get("network") or {}), **wanted}
        _check_read(address, small, declared, options)
    else:
        stated |= wanted
    changed = {name: (declared[name], value) for name, value in wanted.items()}
    if share["r"]:
        size = small.preprocess.size
        sides = tuple(max(1, round(side * factor.side / multiple)) * multiple for side in size)
        stated["image_size"], changed["image_size"] = sides, (size, sides)
    spec = Spec(address, stated)
    backbone = spec.build()
    return Grown(spec, backbone, changed, count(small), count(backbone), (outside_law(small), outside_law(backbone)))


def _of_page(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    name, _, variant = address.partition("/")
    variants = find_page(name, "backbones").variants
    chosen = {**(variants.get(variant) or next(iter(variants.values()), {})), **options}
    found = {key: chosen[key] for key in (*DEPTHS, *WIDTHS, *HEADS) if key in chosen}
    return {key: tuple(value) if isinstance(value, Sequence) else value for key, value in found.items()}


def _of_timm(backbone: Timm) -> dict[str, Any]:
    """What timm's constructor was told, read off the network it made."""
    known, network = accepted(backbone.name), backbone.network
    stages: Any = getattr(network, "stages", None) or getattr(network, "layers", None) or ()
    blocks = [list(getattr(stage, "blocks", ())) for stage in stages]
    flat: Any = getattr(network, "blocks", None)
    found: dict[str, Any] = {}
    if "depths" in known and all(blocks):
        found["depths"] = tuple(map(len, blocks))
    if "depth" in known and flat is not None:
        found["depth"] = len(flat)
    if "dims" in known and len(network.feature_info) == len(blocks):  # type: ignore[arg-type]
        found["dims"] = tuple(info["num_chs"] for info in network.feature_info)  # type: ignore[union-attr]
    if "embed_dim" in known:
        found["embed_dim"] = network.embed_dim
    if "num_heads" in known and flat is not None and hasattr(flat[0], "attn"):
        found["num_heads"] = flat[0].attn.num_heads
    if "num_heads" in known and blocks and hasattr(blocks[0][0], "attn"):
        found["num_heads"] = tuple(stage[0].attn.num_heads for stage in blocks)
    return found


def _check_read(address: str, small: Timm, declared: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a network that its numbers do not build again: something else than they decides."""
    with torch.device("meta"):
        again = Spec(address, {**options, "network": {**(options.get("network") or {}), **declared}}).build()
    if count(again) != count(small):
        raise UsageError(f"{address} does not declare its stages: {dict(declared)} is not all that makes it")


def _scaled(
    address: str, declared: Mapping[str, Any], depth: float, width: float, share: Mapping[str, float]
) -> dict[str, Any]:
    depths, widths = ({key: declared[key] for key in names if key in declared} for names in (DEPTHS, WIDTHS))
    for axis, found, names in (("d", depths, DEPTHS), ("w", widths, WIDTHS)):
        if share[axis] and not found:
            raise UsageError(
                f"{address} declares none of {', '.join(names)}, which {axis} scales; give it as an option, or"
                " leave the axis out of the strategy"
            )
    if any(min(value if isinstance(value, tuple) else (value,)) < 8 for value in widths.values()) and share["w"]:
        raise UsageError(f"{address} declares {widths}, which are no channels; leave w out of the strategy")
    wanted: dict[str, Any] = {}
    if share["d"]:
        wanted = {
            key: _each(value, lambda number: number and max(1, round(number * depth))) for key, value in depths.items()
        }
    if share["w"]:
        heads = {key: _heads(declared[key], width) for key in HEADS if key in declared}
        wanted |= heads
        unit = 8 * _first(next(iter(heads.values()), 1))
        wanted |= {
            key: _each(value, lambda number: max(1, round(number * width / unit)) * unit)
            for key, value in widths.items()
        }
    return wanted


def _heads(heads: Any, width: float) -> Any:
    """As many heads as keep their width; stages keep the ratio of their heads."""
    first = max(1, round(_first(heads) * width))
    return _each(heads, lambda number: max(1, round(first * number / _first(heads))))


def _each(value: Any, change: Callable[[int], int]) -> Any:
    return tuple(change(number) for number in value) if isinstance(value, tuple) else change(value)


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else value


def outside_law(backbone: Backbone) -> int:
    """MACs of one image that are no convolution's and no linear layer's: those of products between tokens."""
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    preprocess, counter = backbone.preprocess, FlopCounterMode(display=False)
    image = torch.empty(1, preprocess.channels, *preprocess.size, device="meta")
    with evaluating(backbone), torch.no_grad(), torch.device("meta"), counter:
        functional_call(backbone, shapes, (image,))
    flops = counter.get_flop_counts()["Global"]
    return sum(number for operation, number in flops.items() if operation not in _LAYERS) // 2
