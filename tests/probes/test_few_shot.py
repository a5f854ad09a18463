import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from sklearn.linear_model import Ridge

from vertebra.errors import UsageError
from vertebra.probes import NotApplicable
from vertebra.probes.evidence import Evidence
from vertebra.probes.few_shot import draws, few_shot, predictions, ridge


def test_ridge_is_scikit_learns_on_either_side() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, width in ((6, 15), (15, 6)):
        features = torch.randn(2, n, width, generator=generator)
        wanted = torch.randn(2, n, 3, generator=generator)
        for one, target, weight in zip(features, wanted, ridge(features, wanted), strict=True):
            theirs = Ridge(alpha=1.0, fit_intercept=False, solver="cholesky").fit(one.numpy(), target.numpy())
            np.testing.assert_allclose(weight.T.numpy(), theirs.coef_, atol=1e-5)


def test_draws_solved_together_equal_draws_solved_alone(evidence: Evidence) -> None:
    features, labels, queries = evidence.features("train"), evidence.targets("train"), evidence.features("test")
    rows = torch.cat(draws(labels, 3, 4, seed=1), dim=1)
    together = predictions(features, labels, rows, queries, 10)
    for row, predicted in zip(rows, together, strict=True):
        mean = features[row].mean(0)
        wanted = F.one_hot(labels[row], 10).double()
        theirs = Ridge(alpha=1.0, fit_intercept=False).fit(
            F.normalize(features[row] - mean).double().numpy(), (wanted - wanted.mean(0)).numpy()
        )
        scores = theirs.predict(F.normalize(queries - mean).double().numpy())
        assert (predicted.numpy() == scores.argmax(1)).mean() > 0.99


def test_draws_are_distinct_images_of_their_class_and_nested() -> None:
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 9)
    drawn = draws(labels, 4, 50, seed=0)
    assert [part.shape[1] for part in drawn] == [4, 2, 4]  # the second class gives all it has
    for label, part in enumerate(drawn):
        assert (labels[part] == label).all()
        assert all(len(set(row)) == len(row) for row in part.tolist())
    assert {tuple(sorted(row)) for row in drawn[0].tolist()} == {
        (0, 1, 2, 3),
        (0, 1, 2, 4),
        (0, 1, 3, 4),
        (0, 2, 3, 4),
        (1, 2, 3, 4),
    }
    assert torch.equal(draws(labels, 4, 50, seed=0)[2], drawn[2])
    assert not torch.equal(draws(labels, 4, 50, seed=1)[2], drawn[2])


def test_more_shots_score_higher_and_the_interval_knows_the_draws(evidence: Evidence) -> None:
    report = few_shot()(evidence.backbone, evidence)
    values = {name: score.value for name, score in report.scores.items()}
    assert values["fewshot_10"] > values["fewshot_5"] > values["fewshot_1"] > 30
    one = report.scores["fewshot_1"]
    images_alone = 1.96 * one.samples.std(ddof=1) / np.sqrt(one.n)
    assert one.value - one.interval[0] > images_alone


def test_classes_with_too_few_images_are_named(tiny, splits) -> None:
    train = splits["train"]
    fours = np.flatnonzero(train.targets == 4)[3:]
    evidence = Evidence(tiny, {**splits, "train": train.select(np.setdiff1d(np.arange(400), fours))})
    report = few_shot(shots=(5, 1), repeats=2)(tiny, evidence)
    assert report.details["classes_with_fewer"] == {"5": ["4"], "1": []}


def test_many_labels_and_bad_values_are_refused(tiny, multi_splits) -> None:
    with pytest.raises(NotApplicable, match="one label an image"):
        few_shot()(tiny, Evidence(tiny, multi_splits, multi=True))
    with pytest.raises(UsageError, match="shots"):
        few_shot(shots=())
    with pytest.raises(UsageError, match="repeats is 0"):
        few_shot(repeats=0)
