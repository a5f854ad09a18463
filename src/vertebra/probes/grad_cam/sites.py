"""Where a network is looked into: the deepest place from which single cells still reach the score.

A class-discriminative map needs cells and a gradient at them. The final output of a network has one or the other: the
pooled vector has no cells, and of the tokens behind the last block of a transformer only the class token reaches the
head, so that the gradient of all others is zero. `site_of` runs one image, watches what the parts of
`Backbone.trunk()` give, and takes the deepest output whose cells matter: of a ResNet the last stage's map, of a
network that pools its tokens the final norm's, of a ViT with a class token what the last block attends to, which is
the output of its first norm. No layer is named by hand and no shape is declared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features
from vertebra.errors import UsageError, near

MOST_SPECIAL = 32
"""Tokens beside the cells' own: class, distillation and register tokens."""

Grid = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """One output of one module, and how it holds its cells.

    Attributes:
        layer: the module's name in the backbone, or in the model where it has none.
        call: which of its calls in a forward pass, from 0.
        layout: "map" is (B, C, h, w), "rows" is (B, h, w, C), "tokens" is (B, special + h * w, C).
        grid: (h, w).
        special: places of the tokens that stand for no cell.
    """

    layer: str
    call: int
    layout: Literal["map", "rows", "tokens"]
    grid: Grid
    special: tuple[int, ...] = ()

    def maps(self, output: Tensor) -> Tensor:
        """What the module gave, as (B, C, h, w)."""
        if self.layout == "map":
            return output
        if self.layout == "rows":
            return output.movedim(-1, 1)
        places = sorted({*range(output.shape[1])} - {*self.special})
        return output[:, places].transpose(1, 2).unflatten(2, self.grid)


class Seen(NamedTuple):
    """An output that was watched in a forward pass."""

    layer: str
    call: int
    output: Tensor
    look: int


def backbone_of(model: nn.Module) -> nn.Module:
    """The network whose layers are looked at: the backbone inside a task model, or the model itself."""
    inner = getattr(model, "backbone", None)
    return inner if isinstance(inner, Backbone) else model


def site_of(
    model: nn.Module,
    images: Tensor,
    *,
    score: Callable[[Any], Tensor] | None = None,
    layer: str | nn.Module | None = None,
) -> Site:
    """Find where to look, by one forward pass.

    Args:
        model: a backbone, a task model, or any network where `layer` is given; in evaluation mode.
        images: (B, channels, H, W); one is enough where there is no `score`.
        score: what the model gives to the scores (B,) that are explained; None takes all logits or pooled features.
        layer: a module or its name (as `named_modules` of the backbone has it) instead of the deepest place.

    Raises:
        UsageError: no such layer, a layer without cells, or a network that has no place to look at.
    """
    network = backbone_of(model)
    names = [_name_of(layer, network, model)] if layer is not None else _candidates(network)
    grids: list[Grid] = []

    def note(_: nn.Module, __: Any, features: Any) -> None:
        pyramid = getattr(features, "pyramid", ())
        grids.extend((int(level.shape[-2]), int(level.shape[-1])) for level in pyramid)

    looking = [part for part in (network, getattr(network, "inner", None)) if isinstance(part, nn.Module)]
    handles = [part.register_forward_hook(note) for part in looking]
    try:
        with torch.set_grad_enabled(layer is None), watched(model, names, norms=layer is None) as seen:
            outputs = model(images.detach().clone().requires_grad_(layer is None))
            total = torch.zeros(()) if layer is not None else (score or _everything)(outputs).sum()
    finally:
        for handle in handles:
            handle.remove()
    grids = sorted(set(grids)) or _guessed(images, seen)
    if layer is not None:
        return _given(names[0], seen, grids, network)
    return _deepest(seen, grids, total, network)


def _everything(outputs: Any) -> Tensor:
    """All that a model gives as one number, each value with a weight of its own: a norm's outputs sum to nothing."""
    values = outputs.pooled if isinstance(outputs, Features) else outputs
    values = values["logits"] if isinstance(values, Mapping) else values
    return values * torch.linspace(0.5, 1.5, values.shape[-1], dtype=values.dtype, device=values.device)


def _candidates(network: nn.Module) -> list[str]:
    """Modules whose outputs can be looked at: the trunk's parts, and what lies between them."""
    if not isinstance(network, Backbone):
        raise UsageError(
            f"{type(network).__name__} is no vertebra backbone, so its layers are unknown; say layer=, as "
            "layer='layer4' of a torchvision ResNet"
        )
    parts = set(network.trunk())

    def below(name: str, module: nn.Module) -> Iterator[str]:
        if module in parts or (module is not network and not _holds(module, parts)):
            yield name
            return
        for child, inner in module.named_children():
            yield from below(f"{name}.{child}" if name else child, inner)

    return list(below("", network))


def _holds(module: nn.Module, parts: set[nn.Module]) -> bool:
    return any(inner in parts for inner in module.modules())


def _name_of(layer: str | nn.Module, network: nn.Module, model: nn.Module) -> str:
    """The name of a layer that the caller gave.

    Raises:
        UsageError: there is no such layer.
    """
    for root in (network, model):
        names = {module: name for name, module in root.named_modules()}
        if isinstance(layer, nn.Module) and layer in names:
            return names[layer]
        if isinstance(layer, str) and layer in names.values():
            return layer
    if isinstance(layer, nn.Module):
        raise UsageError(f"layer {type(layer).__name__} is no module of {type(network).__name__}")
    known = [name for name, _ in network.named_modules() if name]
    raise UsageError(f"{type(network).__name__} has no layer {layer!r}{near(layer, known) or f'; as {known[-1]!r}'}")


def module_named(model: nn.Module, name: str) -> nn.Module:
    """The module of a site."""
    try:
        return backbone_of(model).get_submodule(name)
    except AttributeError:
        return model.get_submodule(name)


@contextmanager
def watched(model: nn.Module, names: Sequence[str], *, norms: bool) -> Iterator[list[Seen]]:
    """A list that fills, as the model runs, with outputs of the named modules in the order of their calls.

    Args:
        model: what runs.
        names: of modules.
        norms: whether a norm that sees a module's own input is watched too: what a pre-norm block attends to.
    """
    seen: list[Seen] = []
    calls: dict[str, int] = {}
    given: list[Any] = []
    inner, looks = getattr(backbone_of(model), "inner", None), [0]

    def look(_: nn.Module, __: tuple) -> None:
        looks[0] += 1

    def keep(name: str, output: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            seen.append(Seen(name, call, first, max(0, looks[0] - 1)))

    def enter(_: nn.Module, inputs: tuple) -> None:
        given[:] = inputs[:1]

    def norm(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        return lambda _, inputs, output: keep(name, output) if given and inputs and inputs[0] is given[0] else None

    handles = [inner.register_forward_pre_hook(look)] if isinstance(inner, Backbone) else []
    for name in names:
        module = module_named(model, name)
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: keep(name, output)))
        if norms:
            handles.append(module.register_forward_pre_hook(enter))
            handles += [
                inner.register_forward_hook(norm(f"{name}.{below}"))
                for below, inner in module.named_modules()
                if below and "norm" in type(inner).__name__.lower()
            ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _deepest(seen: Sequence[Seen], grids: Sequence[Grid], total: Tensor, network: nn.Module) -> Site:
    """The last output whose cells reach the score; where nothing reaches it (weights of zero), the last at all.

    Of a backbone that runs the one inside several times (on crops, on tiles), what the run on the whole image gives:
    the first, unless `whole_look` says which.
    """
    connected, whole = None, getattr(network, "whole_look", 0)
    for one in reversed(seen):
        if one.layer.startswith("inner.") and one.look != whole:
            continue
        site = layout_of(one, grids, network)
        if site is None or not one.output.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(total, one.output, retain_graph=True, allow_unused=True)
        if gradient is None:
            continue
        if site.maps(gradient).any():
            return site
        connected = connected or site
    if connected is None:
        raise UsageError(
            f"no part of {type(network).__name__} gives more than one cell that its score depends on; say layer="
        )
    return connected


def _given(name: str, seen: Sequence[Seen], grids: Sequence[Grid], network: nn.Module) -> Site:
    """The site at a layer that the caller named."""
    if not seen:
        raise UsageError(f"layer {name!r} is not called in the forward pass, or gives no tensor")
    site = layout_of(seen[-1], grids, network, least=1)
    if site is None:
        raise UsageError(
            f"layer {name!r} gives {tuple(seen[-1].output.shape)}, which has no cells; the network's maps have "
            f"{', '.join(f'{h}x{w}' for h, w in grids) or 'none'}"
        )
    return site


def layout_of(seen: Seen, grids: Sequence[Grid], network: nn.Module, least: int = 2) -> Site | None:
    """How an output holds its cells, told by the sizes of the pyramid's maps; None where it has fewer than `least`."""
    shape, site = tuple(seen.output.shape), Site(seen.layer, seen.call, "map", (1, 1))
    if len(shape) == 4:
        rows = shape[1:3] in grids and shape[2:] not in grids
        site = replace(site, layout="rows" if rows else "map", grid=shape[1:3] if rows else shape[2:])
    elif len(shape) == 3:
        fitting = [grid for grid in grids if 0 <= shape[1] - grid[0] * grid[1] <= MOST_SPECIAL]
        grid = max(fitting, key=lambda grid: grid[0] * grid[1], default=(0, 0))
        cells = grid[0] * grid[1]
        special = network.special_tokens(shape[1], cells) if isinstance(network, Backbone) else range(shape[1] - cells)
        site = replace(site, layout="tokens", grid=grid, special=tuple(special))
    else:
        return None
    return site if site.grid[0] * site.grid[1] >= least else None


def _guessed(images: Tensor, seen: Sequence[Seen]) -> list[Grid]:
    """Grids of tokens where no pyramid tells them: as high for their width as the images are."""
    height, width = images.shape[-2:]
    found = []
    for one in seen:
        if one.output.ndim == 3:
            rows = isqrt(one.output.shape[1] * height // width)
            found.append((rows, max(1, rows * width // height)))
    return found
