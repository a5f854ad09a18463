"""What every operation on a model has in common: what the model has, and what it costs and yields before and after.

No page: it changes nothing by itself.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vertebra.contracts import Backbone, Cost, TaskModel
from vertebra.errors import UsageError
from vertebra.parity import named
from vertebra.training.cost import count, evaluating

Images = tuple[int, int, int]
"""(channels, height, width)."""

_SHOWN = 12


@dataclass(frozen=True)
class State:
    """What a model costs and yields for one image.

    Attributes:
        cost: parameters, MACs, activations.
        shapes: output -> its shape.
    """

    cost: Cost
    shapes: dict[str, tuple[int, ...]]


def images_of(model: nn.Module, images: Images | None) -> Images:
    """The images that a model takes: those given, or its backbone's own.

    Raises:
        UsageError: none are given, and `model` is neither a backbone nor a task model.
    """
    if images is not None:
        return images
    backbone = model.backbone if isinstance(model, TaskModel) else model
    if not isinstance(backbone, Backbone):
        raise UsageError(f"a {type(model).__name__} does not say what images it takes; give images=(3, 224, 224)")
    return backbone.preprocess.channels, *backbone.preprocess.size


def measured(model: nn.Module, images: Images) -> State:
    """Run a model once on the meta device; every module keeps its mode."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(_: nn.Module, args: Any, outputs: Any) -> None:
        shapes.update({name: tuple(tensor.shape) for name, tensor in named(outputs).items()})

    hook = model.register_forward_hook(note)
    try:
        with evaluating(model):
            return State(count(model, size=images[1:], channels=images[0]), shapes)
    finally:
        hook.remove()


def kinds(model: nn.Module) -> Counter[str]:
    """Class names of the layers below a model -> how many there are."""
    return Counter(type(module).__name__ for name, module in model.named_modules() if name)


def listed(found: Counter[str]) -> str:
    """Kinds of layers in words, the most frequent first."""
    order = [name for name, _ in found.most_common() if name not in ("Identity", "Sequential", "ModuleList")]
    more = f" and {len(order) - _SHOWN} more" if len(order) > _SHOWN else ""
    return ", ".join(f"{name} ({found[name]})" for name in order[:_SHOWN]) + more


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def outermost(names: Iterable[str]) -> list[str]:
    """Those of the names that lie inside no other one of them, in their order."""
    chosen = dict.fromkeys(names)
    steps = {name: name.split(".") for name in chosen}
    return [name for name in chosen if not any(".".join(steps[name][:n]) in chosen for n in range(1, len(steps[name])))]
