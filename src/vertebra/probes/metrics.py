"""Scores out of per-image values, and the numbers that several probes report."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from vertebra.contracts import Score

Better = Literal["higher", "lower"]
RESAMPLES = 500


def share(samples: Tensor | np.ndarray, better: Better = "higher") -> Score:
    """Per-image values 0..1 as a score in percent; its samples are in percent too, so that their mean is the value."""
    percent = np.asarray(samples, dtype=np.float64) * 100
    return Score(float(percent.mean()), len(percent), better, "%", percent)


def mean(samples: Tensor | np.ndarray, better: Better = "lower") -> Score:
    """Per-image values without a unit as a score."""
    values = np.asarray(samples, dtype=np.float64)
    return Score(float(values.mean()), len(values), better, "", values)


def resampled(
    statistic: Callable[[Tensor], Tensor], n: int, better: Better = "higher", unit: str = "%", seed: int = 0
) -> Score:
    """A score that is no mean of images, with a percentile bootstrap interval.

    Args:
        statistic: how often each image counts, (draws, n) float64, to values (draws,).
        n: images.
        better: which way is good.
        unit: of the values.
        seed: of the draws; the same for all contenders.
    """
    rng = np.random.default_rng(seed)
    counts = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)).double()
    value = statistic(torch.ones(1, n, dtype=torch.float64)).item()
    low, high = np.nanquantile(statistic(counts).numpy(), (0.025, 0.975))
    return Score(value, n, better, unit, interval=(float(low), float(high)))


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Average precision of each row as scikit-learn has it.

    Args:
        scores: (rows, n), higher is better.
        relevant: (rows, n) bool.

    Returns:
        (rows,) float64 in 0..1; nan where a row has nothing relevant.
    """
    ordered, order = scores.sort(dim=1, descending=True)
    return ranked_precision(relevant.gather(1, order), run_ends(ordered))


def run_ends(ordered: Tensor) -> Tensor:
    """Rank, from 1, of the last entry of the run of equal values that each entry of falling rows (rows, n) is in."""
    rising = (-ordered).contiguous()
    return torch.searchsorted(rising, rising, right=True)


def ranked_precision(hits: Tensor, ends: Tensor) -> Tensor:
    """Average precision (rows,) of rows in order; entries of equal score share the precision at the end of their run.

    Args:
        hits: (rows, n) whether the entry of each rank is relevant.
        ends: (rows, n) of `run_ends`.
    """
    found = hits.cumsum(1).gather(1, ends - 1)
    return (found / ends.double() * hits).sum(1) / hits.sum(1)


def macro_average_precision(scores: Tensor, targets: Tensor) -> tuple[Score, Tensor]:
    """Mean over classes of the average precision, in percent, for many labels an image.

    Args:
        scores: (n, classes).
        targets: (n, classes) 0 or 1.

    Returns:
        The score, with a bootstrap interval over images, and each class's average precision (classes,), nan where
        a class has no image.
    """
    ordered, order = scores.T.sort(dim=1, descending=True)  # (classes, n)
    hits, last = targets.T.double().gather(1, order), run_ends(ordered) - 1

    def weighted(counts: Tensor) -> Tensor:
        weights = counts[order]  # (classes, n): how often the image of each rank counts
        right = weights * hits
        precision = right.cumsum(1).gather(1, last) / weights.cumsum(1).gather(1, last).clamp(min=1)
        return 100 * ((precision * right).sum(1) / right.sum(1)).nanmean()

    score = resampled(lambda counts: torch.stack([weighted(row) for row in counts]), len(scores))
    return score, ranked_precision(hits > 0, last + 1)


def balanced_accuracy(targets: Tensor, predicted: Tensor, classes: int) -> Score:
    """Mean over classes of the share of their images that is right, in percent."""
    members = F.one_hot(targets, classes).double()
    right = members * (targets == predicted).double()[:, None]

    def value(counts: Tensor) -> Tensor:
        return 100 * (counts @ right / (counts @ members)).nanmean(1)  # a class without images does not count

    return resampled(value, len(targets))


def f1_macro(targets: Tensor, predicted: Tensor, classes: int) -> Score:
    """Mean over classes of F1, in percent; classes that occur in neither targets nor predictions do not count."""
    members = F.one_hot(targets, classes).double()
    claims = F.one_hot(predicted, classes).double()

    def value(counts: Tensor) -> Tensor:
        return 100 * (2 * (counts @ (members * claims)) / (counts @ (members + claims))).nanmean(1)

    return resampled(value, len(targets))
