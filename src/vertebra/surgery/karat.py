"""Kolmogorov-Arnold attention in any network with attention that it knows: ViT, DeiT, ConViT, Swin and our own.

    karat(backbone, "blockwise")                            # each head of each block has functions of its own
    karat(backbone, "universal", grid=1)                    # the functions of the first block serve all blocks

Queries, keys, values, projections and norms stay, with their weights; the softmax goes. The number of tokens is that of
the backbone's own image size; other sizes interpolate. The operator is `vertebra.blocks.karat`.
"""

from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from vertebra.blocks.karat import VARIANTS as OPERATORS
from vertebra.blocks.karat import KArAttention, RowOperator, heads_of, is_attention
from vertebra.blocks.karat import karat as block
from vertebra.contracts import Operated
from vertebra.errors import UsageError, near
from vertebra.surgery.operation import Images, images_of, kinds, listed, measured
from vertebra.surgery.swap import swap

VARIANTS: dict[str, dict[str, object]] = {}

Mode = Literal["blockwise", "universal"]


def karat(
    model: nn.Module,
    mode: Mode,
    *,
    operator: str = "g3",
    what: str = "*",
    inplace: bool = False,
    images: Images | None = None,
    **options: Any,
) -> Operated:
    """Put a learned operator in place of the softmax of every attention.

    Args:
        model: any network.
        mode: "blockwise" for operators of each block's own; "universal" for one that blocks with as many heads and
            tokens share, held by the first of them.
        operator: one of the variants of `vertebra.blocks.karat`: a basis.
        what: pattern of the dotted names of layers to change.
        inplace: change `model` itself; otherwise a copy.
        images: (channels, height, width) for a model that does not say what it takes.
        options: `r`, `base`, `basis`, `grid` and `prefix` of the block.

    Returns:
        The model, the names of the changed layers, the cost before and after.

    Raises:
        UsageError: no attention that can be taken over, or an option out of range.
    """
    if mode not in ("blockwise", "universal"):
        raise UsageError(f"karat: mode is {mode!r}; it can be blockwise or universal")
    if operator not in OPERATORS:
        raise UsageError(
            f"karat has no operator {operator!r}{near(operator, OPERATORS)}; it has {', '.join(OPERATORS)}"
        )
    foreign = sorted(options.keys() - {"r", "base", "basis", "grid", "prefix"})
    if foreign:
        raise UsageError(f"karat has no option {', '.join(foreign)}; it has r, base, basis, grid, prefix")
    images = images_of(model, images)
    tokens = _tokens(model, what, images)
    made: dict[tuple[int, int], RowOperator] = {}

    def make(layer: nn.Module, name: str) -> KArAttention:
        shape = heads_of(layer), tokens[name]
        known = made.get(shape) if mode == "universal" else None
        new = block(layer, operator, tokens=tokens[name], operator=known, shared=known is not None, **options)
        made[shape] = new.operator
        return new

    return swap(model, lambda name, layer: name in tokens, make, inplace=inplace, images=images)


def _tokens(model: nn.Module, what: str, images: Images) -> dict[str, int]:
    """Name of an attention -> tokens that it is given."""
    everything = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m for name, m in everything.items() if fnmatchcase(name, what) and is_attention(m)}
    inside = {name for name, m in everything.items() if isinstance(m, KArAttention)}
    layers = {name: m for name, m in layers.items() if name.rpartition(".")[0] not in inside}
    if not layers:
        raise UsageError(
            f"karat: no attention of the {type(model).__name__} named {what!r} can be taken over; it has "
            f"{listed(kinds(model))}"
        )
    found: dict[nn.Module, int] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found[layer] = output.shape[-2]

    hooks = [layer.register_forward_hook(note) for layer in set(layers.values())]
    try:
        measured(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[layer] for name, layer in layers.items() if layer in found}
