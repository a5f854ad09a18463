"""Supervised training: the task model's own losses on labelled images."""

from typing import Any

from torch import Tensor

from vertebra.contracts import Backbone, Batch, Method, Progress, TaskModel


class Supervised(Method):
    """Train a task model on labelled images.

    Attributes:
        task_model: what is trained.
        backbone: the backbone inside it.
    """

    def __init__(self, task_model: TaskModel) -> None:
        super().__init__()
        self.task_model = task_model

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # a module registered twice would be saved twice
        return self.task_model.backbone

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The task model's losses; `progress` plays no part."""
        return self.task_model.losses(self.task_model(batch.images), batch.targets)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The task model's: a checkpoint holds `backbone.` and `head.`, and knows nothing of this wrapper."""
        return self.task_model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """The task model's."""
        return self.task_model.load_state_dict(*args, **options)
