import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from vertebra.probes import NotApplicable
from vertebra.probes.calibration import brier, calibration, ece, reliability, temperature
from vertebra.probes.evidence import Evidence


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a classifier that is right about its own confidence, and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_ece_is_torchmetrics(drawn, sharpness: float) -> None:
    logits, targets = sharpness * drawn[0], drawn[1]
    theirs = multiclass_calibration_error(logits.softmax(1), targets, num_classes=5, n_bins=15, norm="l1").item()
    assert ece(logits, targets).value == pytest.approx(100 * theirs, abs=1e-3)  # theirs is float32


def test_brier_is_the_sum_of_scikit_learns_binary_ones(drawn) -> None:
    logits, targets = drawn
    probabilities = logits.double().softmax(1).numpy()
    theirs = sum(brier_score_loss(targets.numpy() == label, probabilities[:, label]) for label in range(5))
    assert brier(logits, targets).mean().item() == pytest.approx(theirs, abs=1e-5)


def test_temperature_is_found_and_mends_the_error(drawn) -> None:
    logits, targets = drawn
    assert temperature(logits, targets) == pytest.approx(1, abs=0.05)
    assert temperature(3 * logits, targets) == pytest.approx(3, abs=0.15)
    sharp, mended = ece(3 * logits, targets), ece(3 * logits / temperature(3 * logits, targets), targets)
    assert mended.value < 3 < 10 < sharp.value


def test_reliability_adds_up_to_the_error(drawn) -> None:
    logits, targets = 3 * drawn[0], drawn[1]
    bins = reliability(logits, targets)
    assert sum(entry["n"] for entry in bins) == len(targets)
    gap = sum(entry["n"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins) / len(targets)
    assert gap == pytest.approx(ece(logits, targets).value, abs=0.01)


def test_report_of_the_shared_classifier(evidence: Evidence) -> None:
    report = calibration()(evidence.backbone, evidence)
    assert next(iter(report.scores)) == "ece"
    logits = evidence.classifier(evidence.features("test"))
    nll = torch.nn.functional.cross_entropy(logits, evidence.targets("test")).item()
    assert report.scores["nll"].value == pytest.approx(nll, abs=1e-6)
    assert np.isfinite(report.details["temperature"])


def test_many_labels_do_not_apply(tiny, multi_splits) -> None:
    with pytest.raises(NotApplicable, match="one label an image"):
        calibration()(tiny, Evidence(tiny, multi_splits, multi=True))
