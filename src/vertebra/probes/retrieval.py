"""Image retrieval without training: cosine similarity of the pooled features, as in Battle of the Backbones.

Each test image asks for the other test images of its class (the image itself is left out), the protocol of CUB-200
and its kin; `gallery="train"` searches the training images instead. An image that nothing answers to, because it
is alone in its class, is no query. With many labels an image those that share at least one are right answers.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report
from vertebra.errors import UsageError
from vertebra.probes import NotApplicable
from vertebra.probes.evidence import Evidence
from vertebra.probes.metrics import ranked_precision, run_ends, share

VARIANTS: dict[str, dict[str, object]] = {}
DEPTHS = (1, 5, 10)
"""Ranks at which recall is reported."""


def retrieval(*, gallery: Literal["test", "train"] = "test") -> "Retrieval":
    """The probe.

    Args:
        gallery: the split that is searched.

    Raises:
        UsageError: another split.
    """
    return Retrieval(gallery=gallery)


class Retrieval(Probe):
    """Mean average precision, recall at few ranks, and MAP@R (Musgrave et al., arXiv 2003.08505)."""

    def __init__(self, *, gallery: Literal["test", "train"]) -> None:
        if gallery not in ("test", "train"):
            raise UsageError(f"retrieval: gallery is {gallery!r}; it must be test or train")
        self.gallery: Literal["test", "train"] = gallery

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        found = search(
            data.features("test"),
            _labels(data, "test"),
            data.features(self.gallery),
            _labels(data, self.gallery),
            itself=self.gallery == "test",
        )
        if not len(found.precision):
            raise NotApplicable("retrieval: no test image has another of its class to find")
        scores = {"map": share(found.precision)}
        scores |= {f"recall@{depth}": share(found.first <= depth) for depth in DEPTHS}
        scores["map@r"] = share(found.precision_at_r)
        details = {"gallery": self.gallery, "queries": len(found.precision), "images": len(data.targets("test"))}
        return Report(scores, details)


class Found(NamedTuple):
    """What a search came to, for each query that has an answer.

    Attributes:
        precision: average precision, 0..1.
        first: rank of the first right answer, from 1.
        precision_at_r: average precision over the first R ranks, R being the number of right answers, 0..1.
    """

    precision: Tensor
    first: Tensor
    precision_at_r: Tensor


def search(
    queries: Tensor, wanted: Tensor, gallery: Tensor, labels: Tensor, *, itself: bool, chunk: int = 256
) -> Found:
    """Rank the gallery for each query.

    Args:
        queries: (m, width) features.
        wanted: (m, classes) 0 or 1.
        gallery: (n, width) features.
        labels: (n, classes) 0 or 1.
        itself: whether query i is image i of the gallery, which then is no answer.
        chunk: queries at once.
    """
    gallery, queries = F.normalize(gallery, dim=1), F.normalize(queries, dim=1)
    parts = []
    for start in range(0, len(queries), chunk):
        rows = torch.arange(start, min(start + chunk, len(queries)))
        similarity = queries[rows] @ gallery.T
        relevant = wanted[rows] @ labels.T > 0
        if itself:
            similarity[torch.arange(len(rows)), rows] = -torch.inf  # last, and
            relevant[torch.arange(len(rows)), rows] = False  # no answer
        answered = relevant.any(1)
        parts.append(_ranked(similarity[answered], relevant[answered]))
    return Found(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _ranked(similarity: Tensor, relevant: Tensor) -> Found:
    ordered, order = similarity.sort(dim=1, descending=True)
    hits = relevant.gather(1, order)
    ranks = torch.arange(1, hits.shape[1] + 1)
    answers = hits.sum(1, keepdim=True)
    precision = hits.cumsum(1) / ranks.double() * hits * (ranks <= answers)
    return Found(
        ranked_precision(hits, run_ends(ordered)), hits.int().argmax(1) + 1, precision.sum(1) / answers.squeeze(1)
    )


def _labels(data: Evidence, name: str) -> Tensor:
    """(n, classes) 0 or 1."""
    targets = data.targets(name)
    return targets if data.multi else F.one_hot(targets, len(data.classes)).float()
