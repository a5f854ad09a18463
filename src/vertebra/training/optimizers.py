"""Which parameters train, at which share of the rate, with which weight decay, under which optimiser."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers  # pyright: ignore
from torch import nn
from torch.optim import Optimizer

from vertebra.config import Plan
from vertebra.contracts import Backbone, Method
from vertebra.errors import UsageError, near

FUSED_DEVICES = ("cpu", "cuda", "mps")
LAYER_ADAPTIVE = frozenset({"lars", "larc", "nlars", "nlarc"})
"""Optimisers whose rate follows the norms of each weight; timm leaves that to weights that decay."""


def optimizer_for(method: Method, plan: Plan) -> Optimizer:
    """The plan's optimiser over the parameters of `method` that require a gradient.

    Weights of rank 2 and more decay; biases, norms and scales do not. With `layer_decay` a part's rate is
    the head's times `layer_decay` for each part between it and the head. LARS (arXiv 1708.03888) adapts the rate of
    what may decay, whether or not the plan has it decay, and leaves the rest to plain momentum.

    Raises:
        UsageError: an unknown optimiser, one that refuses the plan's options, or nothing left to train.
    """
    check_optimizer(plan.optimizer)
    groups = parameter_groups(method, plan)
    if not groups:
        raise UsageError(f"plan.freeze is {plan.freeze} and leaves no parameter to train; freeze fewer parts")
    if plan.optimizer.lower() in LAYER_ADAPTIVE:
        for group in groups:
            group["always_adapt"] = group["params"][0].ndim >= 2
    # timm filters and decays by name and by its own modules; our groups are complete, so it is told to do neither
    return create_optimizer_v2(
        groups,
        opt=plan.optimizer,
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        momentum=plan.momentum,
        filter_bias_and_bn=False,
        **_fused(plan, groups),
    )


def check_optimizer(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        UsageError: the message names the nearest ones.
    """
    known = [str(known) for known in list_optimizers()]
    if name.lower() not in known:
        raise UsageError(f"timm has no optimiser called {name!r}{near(name, known)}")


def parameter_groups(method: Method, plan: Plan) -> list[dict[str, Any]]:
    """Parameters that train, grouped by rate and weight decay, in the order of the network.

    Returns:
        Groups for an optimiser; `lr_scale` is the group's share of the rate of the day.
    """
    positions = part_of(method.backbone)
    last = len(method.backbone.trunk()) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in method.parameters():
        if not parameter.requires_grad:
            continue
        position = positions.get(parameter, last) if plan.layer_decay != 1 else last
        decays = parameter.ndim >= 2
        scale = plan.layer_decay ** (last - position)
        fresh = {"params": [], "lr_scale": scale, "weight_decay": plan.weight_decay if decays else 0.0}
        groups.setdefault((position, decays), fresh)["params"].append(parameter)
    return list(groups.values())


def part_of(backbone: Backbone) -> dict[nn.Parameter, int]:
    """Position of each parameter of a backbone: 1 for the trunk's first part, 0 for what is in none."""
    found = dict.fromkeys(backbone.parameters(), 0)
    for position, part in enumerate(backbone.trunk(), start=1):
        found.update(dict.fromkeys(part.parameters(), position))
    return found


def freeze(backbone: Backbone, parts: int) -> tuple[nn.Module, ...]:
    """Stop the first parts of the trunk from training, or with -1 the whole backbone.

    What is in no part (a position table, say) stands before the first part and freezes with it.

    Returns:
        The frozen modules; the loop keeps them in evaluation mode, so that their statistics stay too.

    Raises:
        UsageError: the trunk has fewer parts.
    """
    trunk = backbone.trunk()
    if not -1 <= parts <= len(trunk):
        raise UsageError(f"plan.freeze is {parts}; this backbone has {len(trunk)} parts (-1 freezes all of it)")
    if parts == 0:
        return ()
    for parameter, position in part_of(backbone).items():
        if parts == -1 or position <= parts:
            parameter.requires_grad_(False)
    return (backbone,) if parts == -1 else tuple(trunk[:parts])


def _fused(plan: Plan, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The one-kernel form of an optimiser of torch, where it has one; a gradient scaler clips outside of it."""
    device = next(_parameters(groups)).device.type
    kind = get_optimizer_class(plan.optimizer, bind_defaults=False)
    able = inspect.isclass(kind) and kind.__module__.startswith("torch.optim")
    if not able or "fused" not in inspect.signature(kind).parameters or device not in FUSED_DEVICES:
        return {}
    floating = all(torch.is_floating_point(parameter) for parameter in _parameters(groups))
    return {"fused": True} if floating and plan.precision != "16-mixed" else {}


def _parameters(groups: list[dict[str, Any]]) -> Iterator[nn.Parameter]:
    return (parameter for group in groups for parameter in group["params"])
