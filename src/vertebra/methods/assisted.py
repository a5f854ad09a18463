"""Assistant supervision: every member of a composite backbone is judged by the same head, the last one in full.

The loss is that of the lead and, weighted, those of the assistants (CBNetV2, arXiv 2107.00420, section 3.4). The task
model is any that calls its backbone once: it runs once a member, each time on that member's features, so that its head,
and a neck before it, are shared by all. What is saved and evaluated is the task model with the lead alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from vertebra.blocks.mixture_of_experts import Router
from vertebra.contracts import Batch, Features, Progress, TaskModel
from vertebra.errors import UsageError
from vertebra.methods.mthl import mthl
from vertebra.methods.supervised import Supervised


@runtime_checkable
class Composite(Protocol):
    """What a backbone of several members offers, such as `vertebra.backbones.cbnet`."""

    members: int

    def each(self, images: Tensor) -> tuple[Features, ...]:
        """The features of every member, the lead's last."""
        ...

    def showing(self, features: Features) -> AbstractContextManager[None]:
        """For a while, these features whatever the images."""
        ...


def supervised(task_model: TaskModel) -> Supervised:
    """The method for labelled images: what the backbone needs beside the task's losses comes with it.

    A composite has assistants to supervise, and experts have to be kept in use.
    """
    if isinstance(task_model.backbone, Composite):
        return Assisted(task_model)
    if any(isinstance(part, Router) for part in task_model.backbone.modules()):
        return mthl(task_model)
    return Supervised(task_model)


class Assisted(Supervised):
    """Train a task model on a composite backbone; assistants' losses are named `assist1_...`, `assist2_...`.

    Attributes:
        weights: of the assistants' losses, first to last.
    """

    def __init__(self, task_model: TaskModel, *, weights: Sequence[float] | None = None) -> None:
        """Wrap a task model.

        Args:
            task_model: on a composite backbone.
            weights: of the assistants' losses, first to last; None takes the authors': 0.5 for the first, 1 for others.

        Raises:
            UsageError: a backbone of one member, another number of weights than it has assistants, or one below 0.
        """
        super().__init__(task_model)
        backbone = task_model.backbone
        if not isinstance(backbone, Composite):
            raise UsageError(
                f"assistant supervision needs a backbone of several members, as cbnet; a {type(backbone).__name__}"
                " has one"
            )
        assistants = backbone.members - 1
        self.weights = tuple(weights) if weights is not None else (0.5,) + (1.0,) * (assistants - 1)
        if len(self.weights) != assistants or min(self.weights) < 0:
            raise UsageError(f"weights is {list(self.weights)}; it needs {assistants} numbers, none below 0")

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The lead's losses and the assistants', weighted; `progress` plays no part."""
        *assistants, lead = self._composite.each(batch.images)
        losses = self._losses(batch, lead)
        for number, (features, weight) in enumerate(zip(assistants, self.weights, strict=True), start=1):
            found = self._losses(batch, features)
            losses |= {f"assist{number}_{name}": weight * loss for name, loss in found.items()}
        return losses

    @property
    def _composite(self) -> Composite:
        backbone = self.task_model.backbone
        assert isinstance(backbone, Composite)
        return backbone

    def _losses(self, batch: Batch, features: Features) -> dict[str, Tensor]:
        with self._composite.showing(features):
            return self.task_model.losses(self.task_model(batch.images), batch.targets)
