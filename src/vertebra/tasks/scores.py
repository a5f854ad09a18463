"""Classification metrics, as torchmetrics adds them up over batches and ranks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from vertebra.contracts import Outputs

ECE_BINS = 15


class Scores(MetricCollection):
    """Classification metrics of a task model's outputs: shares in percent, `nll` in nats.

    Args:
        probabilities: outputs to probabilities (B, classes).
        count: classes.
        multi: many labels an image.
    """

    def __init__(self, probabilities: Callable[[Outputs], Tensor], count: int, *, multi: bool) -> None:
        metrics: dict[str, Metric | MetricCollection]
        if multi:
            metrics = {
                "map": MultilabelAveragePrecision(count, average="macro", validate_args=False),
                "f1_macro": MultilabelF1Score(count, average="macro", validate_args=False),
            }
        else:
            metrics = {
                "top1": MulticlassAccuracy(count, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(count, average="micro", top_k=min(5, count), validate_args=False),
                "balanced_acc": BalancedAccuracy(count),
                "f1_macro": MulticlassF1Score(count, average="macro", validate_args=False),
                "nll": NegativeLogLikelihood(),
                "ece": MulticlassCalibrationError(count, n_bins=ECE_BINS, norm="l1", validate_args=False),
            }
            if count <= 5:
                del metrics["top5"]
        super().__init__(metrics, compute_groups=False)  # groups are found by equal states, and top1 may equal top5
        self._probabilities, self._names = probabilities, tuple(metrics)

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Add a batch: what the task model's forward gave, and its targets."""
        super().update(self._probabilities(outputs), targets.long())

    def compute(self) -> dict[str, Tensor]:
        """Name -> value, the one that ranks first."""
        values = super().compute()
        return {name: values[name] if name == "nll" else 100 * values[name] for name in self._names}


class BalancedAccuracy(Metric):
    """Mean recall over the classes that have images, as scikit-learn's `balanced_accuracy_score`."""

    full_state_update = False
    hits: Tensor
    images: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros(count, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(count, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (B, classes) and targets (B,)."""
        right = targets[probabilities.argmax(1) == targets]
        self.hits += torch.bincount(right, minlength=len(self.hits))
        self.images += torch.bincount(targets, minlength=len(self.images))

    def compute(self) -> Tensor:
        """A share, 0..1."""
        seen = self.images > 0
        return (self.hits[seen] / self.images[seen]).mean()


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the right class, in nats."""

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (B, classes) and targets (B,)."""
        right = probabilities.gather(1, targets[:, None]).clamp_min(torch.finfo(probabilities.dtype).tiny)
        self.total -= right.log().sum(dtype=torch.float64)
        self.images += len(targets)

    def compute(self) -> Tensor:
        """Nats an image."""
        return (self.total / self.images).float()
