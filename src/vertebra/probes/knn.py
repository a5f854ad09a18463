"""Weighted k-nearest neighbours on frozen features, as DINO reports it (arXiv 2104.14294).

Cosine similarity; a neighbour votes with exp(similarity / temperature). Nothing is trained or chosen. With many
labels an image the votes rank the images of each class, and the score is their mean average precision.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report
from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence
from vertebra.probes.metrics import macro_average_precision, share

VARIANTS: dict[str, dict[str, object]] = {}


def knn(*, k: int = 20, temperature: float = 0.07) -> "KNN":
    """The probe.

    Args:
        k: neighbours; all training images where there are fewer.
        temperature: above 0; the higher, the more equal the votes.

    Raises:
        UsageError: a value out of range.
    """
    return KNN(k=k, temperature=temperature)


class KNN(Probe):
    """Weighted vote of the nearest training images."""

    def __init__(self, *, k: int, temperature: float) -> None:
        if k < 1:
            raise UsageError(f"knn: k is {k}; it must be at least 1")
        if temperature <= 0:
            raise UsageError(f"knn: temperature is {temperature}; it must be above 0")
        self.k, self.temperature = k, temperature

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        targets = data.targets("train")
        labels = targets if data.multi else F.one_hot(targets, len(data.classes)).float()
        scores = votes(data.features("train"), labels, data.features("test"), self.k, self.temperature)
        details = {"k": min(self.k, len(labels)), "temperature": self.temperature}
        truth = data.targets("test")
        if data.multi:
            score, _ = macro_average_precision(scores, truth)
            return Report({"knn_map": score}, details)
        return Report({"knn_top1": share(scores.argmax(1) == truth)}, details)


def votes(gallery: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, chunk: int = 1024) -> Tensor:
    """Votes for each class, (queries, classes).

    Args:
        gallery: (n, width) features with a label.
        labels: (n, classes) 0 or 1.
        queries: (m, width).
        k: neighbours that vote.
        temperature: of the votes.
        chunk: queries at once.
    """
    gallery = F.normalize(gallery, dim=1)
    rows = []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ gallery.T).topk(min(k, len(gallery)), dim=1)
        weights = (
            (similarity - 1) / temperature
        ).exp()  # exp(similarity / temperature) up to a factor, without overflow
        rows.append(torch.einsum("qk,qkc->qc", weights, labels[nearest]))
    return torch.cat(rows)
