"""Experts out and in: cut what a task does not use out of a mixture of experts, or add experts for a new task.

    usage = measured_usage(backbone, {0: photos, 1: scans})            # P(expert | task) of every layer
    small = prune_experts(backbone, tasks=[1], usage=usage).model      # a network for task 1 alone
    grown = add_experts(backbone, experts=4).model                     # knows a task more, and only that trains

No page: two operations on any model with layers of `vertebra.blocks.mixture_of_experts` and `expert_attention`, after
Mod-Squad (arXiv 2212.08066). Nothing is trained again. A gate keeps its columns of pruned experts, `dim` numbers each:
they count in its softmax, so that what no token chose can go without changing any output.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vertebra.blocks.mixture_of_experts import Mixture, PerTask, doing, per_task, watched
from vertebra.contracts import Operated
from vertebra.errors import UsageError
from vertebra.surgery.operation import Images, images_of, kinds, listed, measured
from vertebra.training.cost import evaluating

Usage = Mapping[str, Tensor]
"""Name of a layer -> (tasks, experts), shares that sum to 1; zero for a task that was not looked at."""


def recorded_usage(model: nn.Module) -> dict[str, Tensor]:
    """P(expert | task) as the routers remember it from training."""
    return {name: layer.router.usage.clone() for name, layer in _layers("recorded_usage", model).items()}


@torch.no_grad()
def measured_usage(model: nn.Module, batches: Mapping[int, Iterable[Tensor]]) -> dict[str, Tensor]:
    """P(expert | task) on images, in evaluation mode: the share of the places that a task gives each expert.

    Args:
        model: with experts inside; it stays as it is.
        batches: task -> batches of images (B, channels, H, W), not all of them the same size.

    Returns:
        Name of a layer -> (tasks, experts).

    Raises:
        UsageError: a model without experts, a task that it does not know, or one without images.
    """
    layers = _layers("measured_usage", model)
    usage = {name: torch.zeros_like(layer.router.usage) for name, layer in layers.items()}
    with evaluating(model):
        for task, images in batches.items():
            tokens = dict.fromkeys(layers, 0)
            with doing(model, task):
                for batch in images:
                    with watched(model) as seen:
                        model(batch)
                    for name in layers:
                        for routing in seen[_router(name)]:
                            usage[name][task] += routing.load * len(routing.logits)
                            tokens[name] += len(routing.logits)
            if not all(tokens.values()):
                raise UsageError(f"measured_usage: task {task} has no images, or a layer was given none of them")
            for name, count in tokens.items():
                usage[name][task] /= count
    return usage


def prune_experts(
    model: nn.Module,
    *,
    tasks: Sequence[int] = (0,),
    threshold: float = 0.01,
    usage: Usage | None = None,
    images: Images | None = None,
) -> Operated:
    """A smaller model for some of the tasks: without the experts that none of them uses, and without other gates.

    Args:
        model: with experts inside; it stays as it is.
        tasks: to keep, in the order in which the new model counts them.
        threshold: an expert stays whose usage by one of the tasks is above this share, 0..1; each task keeps its k
            most used ones in any case.
        usage: of `measured_usage`; None takes what the routers remember from training.
        images: (channels, height, width) for a model that does not say what it takes.

    Returns:
        The model, the names of the layers that lost experts, and of whatever lost tasks, the cost before and after.

    Raises:
        UsageError: a model without experts, an unknown task or one that no usage is known of, or nothing to remove.
    """
    layers, chosen = _layers("prune_experts", model), list(tasks)
    known = min(layer.router.tasks for layer in layers.values())
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= task < known for task in chosen):
        raise UsageError(
            f"prune_experts: tasks is {chosen}; the model knows {known}, counted from 0, each at most once"
        )
    if not 0 <= threshold < 1:
        raise UsageError(f"prune_experts: threshold is {threshold}; it must be in [0, 1), as 0.01")
    shares = recorded_usage(model) if usage is None else dict(usage)
    _check_usage(shares, layers, chosen)
    images = images_of(model, images)
    before, changed = measured(model, images), copy.deepcopy(model)
    names = []
    for name, layer in layers.items():
        mixture = changed.get_submodule(name)
        assert isinstance(mixture, Mixture)
        stay = _stay(shares[name][chosen], layer.router.reach()[chosen], threshold, layer.router.k)
        if len(stay) < layer.router.experts:
            mixture.keep(stay)
            names.append(name)
    if not names and chosen == list(range(known)):
        raise UsageError(
            f"prune_experts: every expert has a usage above {threshold} in tasks {chosen}; raise threshold, or keep"
            " fewer tasks"
        )
    if chosen != list(range(known)):
        for part in per_task(changed):
            part.keep_tasks(chosen)
        names += [name for name, part in changed.named_modules() if isinstance(part, PerTask)]
    return Operated(changed, tuple(names), before.cost, measured(changed, images).cost)


def add_experts(
    model: nn.Module, *, experts: int = 4, tasks: int = 1, inplace: bool = False, images: Images | None = None
) -> Operated:
    """A model that knows new tasks: new gates, new experts that only these gates know, and all else frozen.

    The gate of an old task never sees a new expert, so that old tasks give the same bits as before, however long the
    new ones are trained. Freeze the heads of old tasks as well, or leave them out of the optimiser: in a task model
    everything outside of the layers of experts is frozen here too, also its head.

    Args:
        model: with experts inside.
        experts: to be added to each layer; 0 adds gates alone.
        tasks: to be added.
        inplace: change `model` itself; otherwise a copy.
        images: (channels, height, width) for a model that does not say what it takes.

    Returns:
        The model, the names of what is new, which are the only parts that train, the cost before and after (of the
        task at work).

    Raises:
        UsageError: a model without experts, fewer than 0 experts or fewer than 1 task.
    """
    _layers("add_experts", model)
    if experts < 0 or tasks < 1:
        raise UsageError(f"add_experts: experts is {experts} and tasks {tasks}; add 0 experts or more, and a task")
    images = images_of(model, images)
    before, model = measured(model, images), model if inplace else copy.deepcopy(model)
    model.requires_grad_(False)
    new: set[nn.Module | nn.Parameter] = set()
    if experts:
        new.update(layer.add(experts) for layer in _layers("add_experts", model).values())
    for part in per_task(model):
        new.update(part.add_tasks(tasks))
    for part in new:
        part.requires_grad_(True)
    found = [*model.named_modules(), *model.named_parameters()]
    return Operated(
        model, tuple(name for name, part in found if part in new), before.cost, measured(model, images).cost
    )


def _layers(what: str, model: nn.Module) -> dict[str, Mixture]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}
    if not found:
        raise UsageError(f"{what}: the {type(model).__name__} has no layer of experts; it has {listed(kinds(model))}")
    return found


def _router(name: str) -> str:
    return f"{name}.router" if name else "router"


def _check_usage(usage: Usage, layers: Mapping[str, Mixture], tasks: Sequence[int]) -> None:
    for name, layer in layers.items():
        shape = (layer.router.tasks, layer.router.experts)
        if name not in usage or tuple(usage[name].shape) != shape:
            raise UsageError(f"prune_experts: usage needs {name!r} of shape {shape}; measured_usage gives it")
        unknown = [task for task in tasks if not usage[name][task].sum() > 0]
        if unknown:
            raise UsageError(
                f"prune_experts: nothing is known of what task {unknown[0]} uses in {name!r}: the model was not trained"
                " on it; give usage=measured_usage(...)"
            )


def _stay(usage: Tensor, reach: Tensor, threshold: float, k: int) -> list[int]:
    """Experts that stay, of usage (tasks, experts) and what each task's gate can choose, (tasks, experts)."""
    stay = (usage > threshold).any(0)
    stay[usage.masked_fill(~reach, -1.0).topk(k, 1).indices.flatten()] = True
    return stay.nonzero().flatten().tolist()
