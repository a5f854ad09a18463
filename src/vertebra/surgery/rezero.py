"""ReZero on any residual network: a scalar that starts at zero at the end of every residual branch.

    rezero(backbone)                                        # x + alpha * branch(x), alpha = 0 at the start
    rezero(backbone, norms="remove", activation="inside")   # without norms, and no activation behind the sum

Branches are found by watching a forward pass (`vertebra.surgery.branches`), in ResNets and transformers alike. The gate
itself and transformer layers with one are `vertebra.blocks.rezero`.
"""

import copy
from typing import Any, Literal

from torch import nn

from vertebra.blocks.rezero import Gate
from vertebra.contracts import Operated
from vertebra.errors import UsageError
from vertebra.surgery.branches import Branch, branches
from vertebra.surgery.operation import Images, images_of, kinds, listed, measured, put

VARIANTS: dict[str, dict[str, object]] = {}

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish)


def rezero(
    model: nn.Module,
    *,
    start: float = 0.0,
    norms: Literal["keep", "remove"] = "keep",
    activation: Literal["behind", "inside"] = "behind",
    inplace: bool = False,
    images: Images | None = None,
) -> Operated:
    """Gate every residual branch by a scalar of its own.

    With `start=0` each block begins as its shortcut. The scalars are `gate.alpha`; give them no weight decay and, with
    high peak rates, a tenth of the rate, as the paper does.

    Args:
        model: any network.
        start: first value of the scalars; 0 in the paper.
        norms: whether the norms of the branches stay; the paper keeps them in ResNets and removes them in transformers.
        activation: "inside" moves an activation behind the sum to the end of the branch, before the gate, as the
            paper's ResNets have it.
        inplace: change `model` itself; otherwise a copy.
        images: (channels, height, width) for a model that does not say what it takes.

    Returns:
        The model, the names of the branches' last modules, which are sequences now that end in the gate, the cost
        before and after.

    Raises:
        UsageError: no residual branch is found, or none with an activation behind the sum where it is to be moved.
    """
    if norms not in ("keep", "remove"):
        raise UsageError(f"rezero: norms is {norms!r}; it can be keep or remove")
    if activation not in ("behind", "inside"):
        raise UsageError(f"rezero: activation is {activation!r}; it can be behind or inside")
    model = model if inplace else copy.deepcopy(model)
    images = images_of(model, images)
    found = branches(model, images)
    if not found:
        raise UsageError(
            f"rezero: the {type(model).__name__} has no residual branch: no sum of a map and of what layers made of it;"
            f" it has {listed(kinds(model))}"
        )
    before = measured(model, images)
    modules = dict(model.named_modules())
    moved = {branch.end: _moved(branch, modules) for branch in found} if activation == "inside" else {}
    if activation == "inside" and not any(moved.values()):
        raise UsageError(
            f"rezero: no activation of the {type(model).__name__} is given the sum of branch and shortcut, so that none"
            " can move inside; leave activation='behind'"
        )
    for branch in found:
        if norms == "remove":
            for name in branch.inside:
                if _is_norm(modules[name]) and name != branch.end:
                    put(model, name, _without(modules[name]))
        _gate(model, branch, modules, moved.get(branch.end), start, norms)
    return Operated(model, tuple(branch.end for branch in found), before.cost, measured(model, images).cost)


def _moved(branch: Branch, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The activation behind a sum, to be moved."""
    behind = modules[branch.activation] if branch.activation else None
    return behind if isinstance(behind, _ACTIVATIONS) else None


def _gate(
    model: nn.Module, branch: Branch, modules: dict[str, nn.Module], moved: nn.Module | None, start: float, norms: str
) -> None:
    """Put the gate behind a branch."""
    end = modules[branch.end]
    parts: list[nn.Module] = [_without(end) if norms == "remove" and _is_norm(end) else end]
    if moved is not None and branch.activation:
        parts.append(moved)
        put(model, branch.activation, nn.Identity())
    like = next(iter([*end.parameters(), *model.parameters()]))
    gate = Gate(start).to(like.device, like.dtype).train(end.training)
    put(model, branch.end, nn.Sequential(*parts, gate).train(end.training))


def _is_norm(module: nn.Module) -> bool:
    return (hasattr(module, "eps") and (hasattr(module, "num_features") or hasattr(module, "normalized_shape"))) or (
        isinstance(module, nn.GroupNorm)
    )


def _without(norm: nn.Module) -> nn.Module:
    """What a norm does beside normalising: timm's carry an activation."""
    carried: Any = getattr(norm, "act", None)
    return carried if isinstance(carried, nn.Module) else nn.Identity()
