"""Image classification: one linear layer on the pooled features, for one label an image or many.

Shapes: pooled (B, width) in, logits (B, classes) out.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.contracts import Backbone, Outputs, Prediction, TaskModel
from vertebra.errors import UsageError

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

HEAD_STD = 0.02


def classify(
    backbone: Backbone,
    classes: Sequence[str],
    *,
    multi: bool = False,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | Tensor | None = None,
    dropout: float = 0.0,
) -> "Classify":
    """A classifier on `backbone`.

    Args:
        backbone: gives the pooled features.
        classes: names, in the order of the targets; at least two, or one with `multi`.
        multi: many labels an image, each independent.
        label_smoothing: mass moved from the right answer to all of them, 0..1.
        class_weights: (classes,) factors of the loss; give them mean 1 to keep its scale.
        dropout: share of the pooled features that is dropped in training.

    Raises:
        UsageError: too few classes, names that repeat, or weights of another length.
    """
    names = tuple(classes)
    if len(names) < (1 if multi else 2):
        raise UsageError(f"a classifier needs at least 2 classes, or 1 with many labels; got {list(names)}")
    if len(set(names)) < len(names):
        raise UsageError(f"class names repeat: {sorted({n for n in names if names.count(n) > 1})}")
    weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
    if weights is not None and weights.shape != (len(names),):
        raise UsageError(f"class_weights has shape {tuple(weights.shape)} for {len(names)} classes")
    return Classify(
        backbone, names, multi=multi, label_smoothing=label_smoothing, class_weights=weights, dropout=dropout
    )


class Classify(TaskModel):
    """A linear classifier on pooled features; build it with `classify`.

    Attributes:
        head: the linear layer.
        multi: whether an image may have many labels.
        class_weights: (classes,) factors of the loss, or None.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        classes: tuple[str, ...],
        *,
        multi: bool,
        label_smoothing: float,
        class_weights: Tensor | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = classes
        self.multi = multi
        self.label_smoothing = label_smoothing
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.width, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        """Images (B, channels, H, W) to `{"logits": (B, classes)}`."""
        return {"logits": self.head(self.dropout(self.backbone(images).pooled))}

    def losses(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy for one label, the classes' mean binary cross-entropy for many.

        The mean is over images, weighted or not: so the losses of parts of a batch add up to the batch's.

        Args:
            outputs: of `forward`.
            targets: (B,) int64, or (B, classes) float: shares of a mixed image, or 0 and 1 for many labels.
        """
        return {"classify": self.image_losses(outputs, targets).mean()}

    def image_losses(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """The loss of each image, (B,)."""
        logits, weights = outputs["logits"], self.class_weights
        if not self.multi:
            return F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=self.label_smoothing)
        softened = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, softened, weights, reduction="none").mean(1)

    def predict(self, outputs: Outputs, image_sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """All classes of each image, best first; the image sizes play no part."""
        scores, labels = self.probabilities(outputs).sort(dim=1, descending=True, stable=True)
        return [Prediction(label, score) for label, score in zip(labels.cpu(), scores.cpu(), strict=True)]

    def probabilities(self, outputs: Outputs) -> Tensor:
        """Probabilities (B, classes); they sum to 1 over the classes unless an image may have many labels."""
        logits = outputs["logits"].float()
        return logits.sigmoid() if self.multi else logits.softmax(1)

    def metrics(self) -> "MetricCollection":
        """`top1`, `top5` (of more than 5 classes), `balanced_acc`, `f1_macro`, `nll`, `ece`; or `map`, `f1_macro`."""
        from vertebra.tasks.scores import Scores  # torchmetrics costs seconds, which `predict` need not wait for

        return Scores(self.probabilities, len(self.classes), multi=self.multi)
