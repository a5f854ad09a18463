"""Accuracy from a handful of labelled images a class, averaged over many draws of them.

The classifier is ridge regression on one-hot targets in closed form, as ViT and big_vision report few-shot results
(arXiv 2010.11929, section 4.1), on features that are centred and brought to length one as in SimpleShot (arXiv
1911.04623). Each shot then has length one, and a penalty of 1, as large as the diagonal of their Gram matrix, serves
from one shot on: nothing is tuned, because a few-shot user has no validation data to tune on (Perez et al., arXiv
2105.11447).
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report, Score
from vertebra.errors import UsageError
from vertebra.probes import NotApplicable
from vertebra.probes.evidence import Evidence
from vertebra.probes.metrics import share

VARIANTS: dict[str, dict[str, object]] = {}
PENALTY = 1.0
ELEMENTS_AT_ONCE = 2**25
"""Numbers in the shots of the draws that are solved at once: 128 MiB."""


def few_shot(*, shots: Sequence[int] = (10, 5, 1), repeats: int = 10) -> "FewShot":
    """The probe.

    Args:
        shots: images a class; the first ranks.
        repeats: draws of them.

    Raises:
        UsageError: a value below 1, or no shots.
    """
    return FewShot(shots=shots, repeats=repeats)


class FewShot(Probe):
    """Top-1 accuracy with n images a class.

    A class with fewer images gives all it has; the report says which.
    """

    seeded = True

    def __init__(self, *, shots: Sequence[int], repeats: int) -> None:
        if not shots or min(shots) < 1:
            raise UsageError(f"few_shot: shots is {shots!r}; it must list numbers of at least 1, as 10,5,1")
        if repeats < 1:
            raise UsageError(f"few_shot: repeats is {repeats}; it must be at least 1")
        self.shots, self.repeats = tuple(shots), repeats

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        if data.multi:
            raise NotApplicable("few_shot: drawing n images a class needs one label an image")
        labels, classes = data.targets("train"), len(data.classes)
        counts = torch.bincount(labels, minlength=classes)
        order = draws(labels, max(self.shots), self.repeats, data.seed)  # nested: the first shots are among the next
        scores, short = {}, {}
        for shots in self.shots:
            rows = torch.cat([members[:, :shots] for members in order], dim=1)
            predicted = predictions(data.features("train"), labels, rows, data.features("test"), classes)
            scores[f"fewshot_{shots}"] = averaged(predicted == data.targets("test"))
            short[str(shots)] = [data.classes[i] for i in torch.nonzero(counts < shots).flatten().tolist()]
        details: dict[str, Any] = {"repeats": self.repeats, "penalty": PENALTY, "classes_with_fewer": short}
        return Report(scores, details)


def draws(labels: Tensor, shots: int, repeats: int, seed: int) -> list[Tensor]:
    """Positions of the images drawn for each class, (repeats, at most `shots`) each."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        drawn.append(torch.from_numpy(rng.permuted(np.tile(members, (repeats, 1)), axis=1)[:, :shots].copy()))
    return drawn


def predictions(features: Tensor, labels: Tensor, rows: Tensor, queries: Tensor, classes: int) -> Tensor:
    """What a ridge classifier from each draw says of the queries, (repeats, queries) int64.

    Args:
        features: (n, width) labelled.
        labels: (n,) int64.
        rows: (repeats, shots) positions of the shots.
        queries: (m, width).
        classes: classes.
    """
    at_once = max(1, ELEMENTS_AT_ONCE // (rows.shape[1] * features.shape[1]))
    predicted = []
    for part in rows.split(at_once):
        shots, wanted = features[part], F.one_hot(labels[part], classes).to(features)
        mean = shots.mean(1, keepdim=True)  # (repeats, 1, width)
        weight = ridge(F.normalize(shots - mean, dim=2), wanted - wanted.mean(1, keepdim=True))
        # a query's own length scales all its scores alike, so that it need not be brought to one
        predicted.append((queries @ weight - mean @ weight).argmax(2))
    return torch.cat(predicted)


def ridge(features: Tensor, wanted: Tensor) -> Tensor:
    """Weights (draws, width, classes) of ridge regression, solved on the smaller side.

    Args:
        features: (draws, n, width).
        wanted: (draws, n, classes).
    """
    n, width = features.shape[1:]
    across = features.mT
    gram = features @ across if n <= width else across @ features
    gram.diagonal(dim1=1, dim2=2).add_(PENALTY)
    factor = torch.linalg.cholesky(gram)
    if n <= width:
        return across @ torch.cholesky_solve(wanted, factor)
    return torch.cholesky_solve(across @ wanted, factor)


def averaged(right: Tensor) -> Score:
    """Mean over draws and images; the interval counts both, since the draws vary more than the images.

    Args:
        right: (repeats, n) bool.
    """
    repeats, n = right.shape
    shares = right.double()
    score = share(shares.mean(0))
    spread = shares.mean(0).var() / n + (shares.mean(1).var() / repeats if repeats > 1 else 0)
    half = 100 * 1.96 * sqrt(float(spread))
    return Score(
        score.value, n, samples=score.samples, interval=(max(0.0, score.value - half), min(100.0, score.value + half))
    )
