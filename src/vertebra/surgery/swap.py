"""Swap: other layers in place of some, in any network, in one line.

    swap(backbone, "SqueezeExcite", "eca")                  # a block of ours in place of a kind of layer
    swap(backbone, nn.ReLU, nn.GELU)
    swap(backbone, "*.layer4.*.bn?", nn.GroupNorm, num_groups=8)
    swap(backbone, "*.bn3", "eca", place="after")           # keeps the layer and adds the block behind it

Levels and output shapes stay what they were; where they would not, nothing is changed and the error says so.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vertebra.contracts import Operated
from vertebra.errors import UsageError, near
from vertebra.spec import Spec
from vertebra.surgery.operation import Images, State, images_of, kinds, listed, measured, outermost, put

VARIANTS: dict[str, dict[str, object]] = {}

Place = Literal["instead", "before", "after"]
What: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Block: TypeAlias = str | Callable[..., nn.Module]

_WIDTHS = ("num_features", "num_channels", "normalized_shape")
"""Where layers say their channels, whatever the order of their dimensions."""


def swap(
    model: nn.Module,
    what: What,
    block: Block,
    *,
    place: Place = "instead",
    inplace: bool = False,
    images: Images | None = None,
    **options: Any,
) -> Operated:
    """Replace layers by blocks, or add blocks beside them.

    A new block gets device, floating type and mode of the layer; where it takes the place of a layer whose
    parameters are all frozen it is frozen too. Layers that the forward pass never meets stay, and so do layers inside
    of a replaced one.

    Args:
        model: any network.
        what: which layers: a class; the name of one ("BatchNorm2d" finds its subclasses too); a pattern of dotted
            names ("*.se"); or (name, layer) -> bool.
        block: the address of a block page ("eca"), or a class or function that returns a module. What it
            requires is given by name: `layer` is the old layer, `name` its dotted name, and any other is the number
            of channels there: dimension 1 of (B, C, H, W), the last one of (B, N, C) and (B, C).
        place: "instead" of the layer, or a sequence of both with the block "before" or "after" it.
        inplace: change `model` itself; otherwise a copy.
        images: (channels, height, width) for a model that does not say what it takes.
        options: further keywords of the block.

    Returns:
        The model, the names of the changed layers, the cost before and after.

    Raises:
        UsageError: nothing matches (the message lists near names and the kinds of layers there are), a block that
            needs more than it is given, or one that does not fit its place: the model is then as it was.
    """
    if place not in ("instead", "before", "after"):
        raise UsageError(f"swap: place is {place!r}; it can be instead, before or after")
    model = model if inplace else copy.deepcopy(model)
    images = images_of(model, images)
    layers = _found(model, what)
    before, shapes = _before(model, images, layers, place)
    make = _maker(block, options)
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if layer in shapes and layer not in made:
            made[layer] = _placed(make(name, layer, _width(layer, shapes[layer])), layer, model, place)
    changed = tuple(name for name, layer in layers.items() if layer in made)
    if not changed:
        raise UsageError(f"swap: {_words(what)} names {', '.join(layers)}, which the forward pass never meets")
    for name in changed:
        put(model, name, made[layers[name]])
    try:
        after = _after(model, images, before, block)
    except UsageError:
        for name in changed:
            put(model, name, layers[name])
        raise
    return Operated(model, changed, before.cost, after.cost)


def _found(model: nn.Module, what: What) -> dict[str, nn.Module]:
    """Name -> layer, outermost matches only; a layer in two places is there under both names."""
    everything = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if name}
    found = outermost(name for name, layer in everything.items() if _matches(what, name, layer))
    if not found:
        hint = near(what, [*kinds(model), *everything]) if isinstance(what, str) else ""
        raise UsageError(
            f"swap: no layer of the {type(model).__name__} is {_words(what)}{hint}; it has {listed(kinds(model))}"
        )
    return {name: everything[name] for name in found}


def _matches(what: What, name: str, layer: nn.Module) -> bool:
    if isinstance(what, str):
        return what in (base.__name__ for base in type(layer).__mro__) or fnmatchcase(name, what)
    if isinstance(what, type):
        return isinstance(layer, what)
    return bool(what(name, layer))


def _words(what: What | Block) -> str:
    return repr(what) if isinstance(what, str) else f"{getattr(what, '__qualname__', what)}"


def _before(
    model: nn.Module, images: Images, layers: Mapping[str, nn.Module], place: Place
) -> tuple[State, dict[nn.Module, tuple[int, ...]]]:
    """Cost and outputs of the model, and the shapes of what the new blocks will be given."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        value = output if place == "after" else next(iter(args), None)
        shapes[layer] = tuple(value.shape) if isinstance(value, Tensor) else ()

    with ExitStack() as hooks:
        for layer in set(layers.values()):
            hooks.callback(layer.register_forward_hook(note).remove)
        return measured(model, images), shapes


def _after(model: nn.Module, images: Images, before: State, block: Block) -> State:
    """Cost and outputs of the changed model, whose shapes must not have changed."""
    try:
        after = measured(model, images)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"swap: the model cannot run with {_words(block)} in these places: {reason}") from error
    for name, shape in before.shapes.items():
        if after.shapes.get(name) != shape:
            raise UsageError(
                f"swap: with {_words(block)} the output {name} would have shape {after.shapes.get(name)} in place of"
                f" {shape}; a block must keep the shape that the layer gave"
            )
    return after


def _width(layer: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Channels at a layer; None where it is given no tensor."""
    if not shape:
        return None
    for attribute in _WIDTHS:
        stated = getattr(layer, attribute, None)
        stated = stated[-1] if isinstance(stated, tuple | torch.Size) and stated else stated
        if isinstance(stated, int) and stated in shape[1:]:
            return stated
    return shape[1] if len(shape) in (4, 5) else shape[-1]


def _maker(block: Block, options: Mapping[str, Any]) -> Callable[[str, nn.Module, int | None], nn.Module]:
    """(name, layer, channels) -> new block."""
    call, given = Spec(block, dict(options), kind="blocks").resolve() if isinstance(block, str) else (block, options)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(call).parameters.values()
    needs = [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in given]
    widths = [name for name in needs if name not in ("layer", "name")]
    if len(widths) > 1:
        raise UsageError(
            f"swap: {_words(block)} requires {' and '.join(widths)}, and only one of them can be the channels; give the"
            f" others as options, as swap(..., {widths[0]}=...)"
        )

    def make(name: str, layer: nn.Module, channels: int | None) -> nn.Module:
        known: dict[str, Any] = {"layer": layer, "name": name} | dict.fromkeys(widths, channels)
        if widths and channels is None:
            raise UsageError(f"swap: {name} is given no tensor, so that {_words(block)} has no channels; require layer")
        made = call(**{key: known[key] for key in needs}, **given)
        if not isinstance(made, nn.Module):
            raise UsageError(f"swap: {_words(block)} returned a {type(made).__name__} for {name}, not a module")
        return made

    return make


def _only(known: frozenset[str], new: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leave out what a network tells its own kind of layer by name (timm: no mask), where it is nothing."""
    lost = [name for name, value in kwargs.items() if name not in known and value is not None and value is not False]
    if lost:
        raise UsageError(f"swap: {type(new).__name__} is called with {', '.join(lost)}, which it does not take")
    return args, {name: value for name, value in kwargs.items() if name in known}


def _placed(new: nn.Module, layer: nn.Module, model: nn.Module, place: Place) -> nn.Module:
    """The new block as the layer was (device, floating type, mode, frozen), in the order asked."""
    tensors = [*layer.parameters(), *layer.buffers(), *model.parameters(), *model.buffers()]
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(()))
    new.to(device=like.device, dtype=like.dtype).train(layer.training)
    known = inspect.signature(new.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        new.register_forward_pre_hook(partial(_only, frozenset(known)), with_kwargs=True)
    if place == "instead":
        own = list(layer.parameters())
        return new.requires_grad_(False) if own and not any(tensor.requires_grad for tensor in own) else new
    both = nn.Sequential(new, layer) if place == "before" else nn.Sequential(layer, new)
    both.training = layer.training
    return both
