"""How far a classifier's confidence can be trusted: expected calibration error, likelihood and Brier score.

Of the shared linear classifier on frozen features, as fitted and after one temperature chosen on validation data
(Guo et al., arXiv 1706.04599). The error has 15 bins of equal width over the confidence of the predicted class.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from scipy import optimize
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report, Score
from vertebra.probes import NotApplicable
from vertebra.probes.evidence import Evidence
from vertebra.probes.logistic import losses
from vertebra.probes.metrics import mean, resampled

VARIANTS: dict[str, dict[str, object]] = {}
BINS = 15


def calibration() -> "Calibration":
    """The probe."""
    return Calibration()


class Calibration(Probe):
    """Confidence against accuracy of the shared linear classifier."""

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        if data.multi:
            raise NotApplicable("calibration: the confidence of one predicted class needs one label an image")
        targets = data.targets("test")
        logits = data.classifier(data.features("test"))
        warmth = temperature(data.classifier(data.features("val")), data.targets("val"))
        scaled = logits / warmth
        scores = {
            "ece": ece(logits, targets),
            "nll": mean(losses(logits, targets)),
            "brier": mean(brier(logits, targets)),
            "ece_scaled": ece(scaled, targets),
            "nll_scaled": mean(losses(scaled, targets)),
        }
        details = {
            "temperature": warmth,
            "reliability": reliability(logits, targets),
            "reliability_scaled": reliability(scaled, targets),
        }
        return Report(scores, details)


def temperature(logits: Tensor, targets: Tensor) -> float:
    """The number to divide logits by so that their likelihood is highest, within 0.05..20."""

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits * 2.0**-log_temperature, targets).item()

    found: Any = optimize.minimize_scalar(nll, bounds=(-4.3, 4.3), method="bounded")
    return float(2.0**found.x)


def _binned(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence (n,), whether right (n,), and bin 0..14 (n,) of each image."""
    confidence, predicted = logits.softmax(1).max(1)
    edges = torch.linspace(0, 1, BINS + 1)[1:-1]
    return confidence.double(), (predicted == targets).double(), torch.bucketize(confidence, edges, right=True)


def ece(logits: Tensor, targets: Tensor) -> Score:
    """Expected calibration error in percent: |accuracy - confidence| of each bin, weighted by its images.

    The interval is a percentile bootstrap; resampling adds noise to each bin, so that it lies a little high.
    """
    confidence, right, bins = _binned(logits, targets)
    gaps = F.one_hot(bins, BINS).double() * (right - confidence)[:, None]  # (n, bins)
    return resampled(lambda counts: 100 * (counts @ gaps).abs().sum(1) / len(targets), len(targets), "lower")


def brier(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared distance between the probabilities and the truth, 0..2, of each image (n,)."""
    return (logits.softmax(1) - F.one_hot(targets, logits.shape[1])).square().sum(1)


def reliability(logits: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    """One entry a bin that has images: their mean confidence and accuracy in percent, and how many they are."""
    confidence, right, bins = _binned(logits, targets)
    entries = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            entries.append(
                {
                    "confidence": round(100 * confidence[inside].mean().item(), 2),
                    "accuracy": round(100 * right[inside].mean().item(), 2),
                    "n": int(inside.sum()),
                }
            )
    return entries
