import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score

from vertebra.probes.metrics import (
    average_precision,
    balanced_accuracy,
    f1_macro,
    macro_average_precision,
    resampled,
    share,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_share_is_the_mean_of_its_samples_in_percent() -> None:
    score = share(torch.tensor([True, False, True, True]))
    assert score.value == 75 and score.n == 4 and score.unit == "%"
    assert score.samples.tolist() == [100, 0, 100, 100]


def test_average_precision_is_scikit_learns_also_with_ties(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(40, 60)).round(1)  # rounded: many ties
    relevant = rng.random((40, 60)) < 0.2
    relevant[:, 0] = True
    ours = average_precision(torch.from_numpy(scores), torch.from_numpy(relevant)).numpy()
    theirs = [average_precision_score(truth, row) for truth, row in zip(relevant, scores, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_macro_average_precision_is_scikit_learns(rng: np.random.Generator) -> None:
    scores, targets = rng.normal(size=(80, 5)).round(1), (rng.random((80, 5)) < 0.3).astype(np.float32)
    score, by_class = macro_average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    assert score.value == pytest.approx(100 * average_precision_score(targets, scores, average="macro"), abs=1e-9)
    np.testing.assert_allclose(by_class.numpy(), average_precision_score(targets, scores, average=None), atol=1e-12)
    assert score.interval[0] < score.value < score.interval[1]


def test_class_without_images_does_not_count(rng: np.random.Generator) -> None:
    scores, targets = torch.from_numpy(rng.normal(size=(30, 3))), torch.from_numpy(rng.integers(0, 2, (30, 3)))
    targets[:, 1] = 0
    score, by_class = macro_average_precision(scores, targets)
    assert by_class[1].isnan() and score.value == pytest.approx(100 * by_class[[0, 2]].mean().item())


def test_class_scores_are_scikit_learns(rng: np.random.Generator) -> None:
    targets, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    ours = torch.from_numpy(targets), torch.from_numpy(predicted), 6  # two classes never occur
    assert balanced_accuracy(*ours).value == pytest.approx(100 * balanced_accuracy_score(targets, predicted))
    assert f1_macro(*ours).value == pytest.approx(100 * f1_score(targets, predicted, average="macro"))


def test_bootstrap_of_a_mean_is_as_wide_as_theory(rng: np.random.Generator) -> None:
    values = torch.from_numpy(rng.normal(size=400))
    score = resampled(lambda counts: counts @ values / 400, 400)
    width = score.interval[1] - score.interval[0]
    assert score.value == pytest.approx(values.mean().item())
    assert width == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.15)
