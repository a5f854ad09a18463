"""Training of mixtures of experts: a task model's own losses, and those that keep its experts in use.

    method = mthl(classify(moe_vit("nano"), classes))        # a Method for `fit`, or for anyone's loop

"switch" spreads each batch over all experts (arXiv 2101.03961, eq. 4), with a loss that keeps the gates' logits small
(arXiv 2202.08906, eq. 5). "information" wants task and expert to know much of each other: a task may use few experts,
while all are used by some task (arXiv 2212.08066, minus their mutual information). A batch holds one task, of which
alone nothing can be known; so the probabilities of other tasks are those that the routers remember, without a gradient.
The shares of tasks count as equal, since how often one is trained is a choice and no property of it. Where the gates of
all tasks are equal its gradient is zero, as they are in the beginning: their noise and the tasks' own losses part them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vertebra.blocks.mixture_of_experts import Router, Routing, per_task, watched
from vertebra.contracts import Batch, Progress, TaskModel
from vertebra.errors import UsageError
from vertebra.methods.supervised import Supervised
from vertebra.paper import Paper

PAPER = Paper(
    id="mthl",
    title="An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training",
    year=2023,
    reference="",
    licence="no code; that of the predecessor (UMass-Foundation-Model/Mod-Squad) is CC BY-NC 4.0 and was not used",
    claim=(
        "one network for classification, detection and segmentation, trained on three data sets of one task each, "
        "comparable with the best of each; it decomposes into modules, fine-tunes efficiently in three ways and learns "
        "new tasks without forgetting"
    ),
    numbers="moe_vit: the predecessor's small network",
    parity="one expert is a plain block exactly; top-k sums an explicit loop; mutual information a sum in numpy",
    note=(
        "The network (`moe_vit`), its losses of balance and its surgery (`vertebra.surgery.experts`) are here. The"
        " predecessor's 67.4 M come out with experts in the MLP of each block and the gates of 13 tasks; experts in"
        " every other block would be 45.5 M. Training on data sets of several kinds, with heads for boxes and masks, is"
        " not here yet, and so nothing of the claim is measured."
    ),
)

Balance = Literal["switch", "information"]

_SWITCH, _Z, _INFORMATION = 0.01, 0.001, 0.005
_TINY = 1e-12


def mthl(
    task_model: TaskModel, *, balance: Balance | None = None, weight: float | None = None, z_weight: float = _Z
) -> "Balanced":
    """The method for a task model on a backbone with experts.

    Args:
        task_model: what is trained, on the task that its backbone is set to (`doing`).
        balance: how experts are kept in use; by default "information" for several tasks, "switch" for one.
        weight: of the loss of balance, summed over layers; 0.01 of "switch", 0.005 of "information" by default (the
            predecessor tried 0.0005 to 0.03).
        z_weight: of the loss of large logits, with "switch".

    Raises:
        UsageError: a backbone without experts, an unknown balance, "information" for one task, or a weight below 0.
    """
    parts = per_task(task_model.backbone)
    several = min(part.tasks for part in parts) > 1
    balance = balance or ("information" if several else "switch")
    if balance not in get_args(Balance):
        raise UsageError(f"mthl: balance is {balance!r}; it can be {' or '.join(get_args(Balance))}")
    if balance == "information" and not several:
        raise UsageError("mthl: of one task there is no mutual information; take balance='switch', or tasks=2 and more")
    weight = (_SWITCH if balance == "switch" else _INFORMATION) if weight is None else weight
    if min(weight, z_weight) < 0:
        raise UsageError(f"mthl: weight is {weight} and z_weight {z_weight}; neither can be below 0")
    return Balanced(task_model, balance=balance, weight=weight, z_weight=z_weight)


class Balanced(Supervised):
    """A task model's losses and those of its routers; build it with `mthl`.

    Attributes:
        balance: how experts are kept in use.
        weight: of that loss.
        z_weight: of the loss of large logits.
    """

    def __init__(self, task_model: TaskModel, *, balance: Balance, weight: float, z_weight: float) -> None:
        super().__init__(task_model)
        self.balance, self.weight, self.z_weight = balance, weight, z_weight

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The task model's losses, and `switch` and `router_z`, or `information`; `progress` plays no part."""
        with watched(self.task_model) as seen:
            losses = super().forward(batch, progress)
        if self.balance == "switch":
            routings = [routing for several in seen.values() for routing in several]
            found = {
                "switch": self.weight * total(map(switch_loss, routings)),
                "router_z": self.z_weight * total(map(router_z_loss, routings)),
            }
        else:
            found = {"information": -self.weight * total(informations(self.task_model, seen))}
        return losses | found


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(losses)).sum()


def switch_loss(routing: Routing) -> Tensor:
    """Experts * sum of load * probability (arXiv 2101.03961, eq. 4): 1 where both are even, more where they agree."""
    return len(routing.load) * (routing.load * routing.probability).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean square of the logarithm of the softmax's denominator (arXiv 2202.08906, eq. 5)."""
    return routing.logits.logsumexp(-1).square().mean()


def mutual_information(joint: Tensor) -> Tensor:
    """How much task and expert know of each other, in nats: 0 and more.

    Args:
        joint: P(task, expert), (tasks, experts), which sums to 1; zeros count nothing.
    """
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint.clamp(min=_TINY).log() - apart.clamp(min=_TINY).log())).sum()


def joint(router: Router, routings: Sequence[Routing]) -> Tensor:
    """P(task, expert) of a router, (tasks, experts): of now where a task was seen now, else as it is remembered.

    All tasks that are known have equal shares; the others have none. The gradient is of those that were seen.
    """
    rows, known = list(router.probability.unbind()), router.batches > 0
    for task in {routing.task for routing in routings}:
        rows[task] = torch.stack([routing.probability for routing in routings if routing.task == task]).mean(0)
        known = known | (torch.arange(len(rows), device=known.device) == task)
    return torch.stack(rows) * (known / known.sum())[:, None]


def informations(model: nn.Module, seen: Mapping[str, Sequence[Routing]]) -> list[Tensor]:
    """The mutual information of each router of a model in what `watched` saw."""
    found = []
    for name, routings in seen.items():
        router = model.get_submodule(name)
        assert isinstance(router, Router)
        if routings:
            found.append(mutual_information(joint(router, routings)))
    return found
