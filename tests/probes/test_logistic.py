import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vertebra.probes.evidence import Evidence
from vertebra.probes.logistic import PATIENCE, fit


@pytest.fixture
def sides(evidence: Evidence):
    return {name: (evidence.features(name), evidence.targets(name)) for name in ("train", "val", "test")}


@pytest.mark.parametrize("strength", [1.0, 0.1, 0.01])
def test_equals_scikit_learn_at_the_same_strength(sides, strength: float) -> None:
    (train, labels), (test, truth) = sides["train"], sides["test"]
    ours = fit(sides["train"], sides["val"], 10, strengths=(strength,))(test)
    scaler = StandardScaler().fit(train.numpy())
    theirs = LogisticRegression(C=1 / (strength * len(train)), max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(train.numpy()), labels.numpy())
    probabilities = theirs.predict_proba(scaler.transform(test.numpy()))
    np.testing.assert_allclose(ours.softmax(1).numpy(), probabilities, atol=0.02)
    accuracy = theirs.score(scaler.transform(test.numpy()), truth.numpy())
    assert abs((ours.argmax(1) == truth).double().mean().item() - accuracy) <= 0.005


def test_many_labels_equal_one_binary_regression_a_class(sides) -> None:
    train, test = sides["train"][0], sides["test"][0]
    wanted = {name: torch.stack([side[1] % 2 == 0, side[1] > 4], dim=1).float() for name, side in sides.items()}
    ours = fit((train, wanted["train"]), (sides["val"][0], wanted["val"]), 2, strengths=(0.1,))(test).sigmoid()
    scaler = StandardScaler().fit(train.numpy())
    for column in range(2):
        theirs = LogisticRegression(C=1 / (0.1 * len(train)), max_iter=5000, tol=1e-8)
        theirs.fit(scaler.transform(train.numpy()), wanted["train"][:, column].numpy())
        probabilities = theirs.predict_proba(scaler.transform(test.numpy()))[:, 1]
        np.testing.assert_allclose(ours[:, column].numpy(), probabilities, atol=0.02)


def test_strength_is_the_one_of_the_lowest_validation_loss(sides) -> None:
    classifier = fit(sides["train"], sides["val"], 10)
    nll = [step.nll for step in classifier.path]
    best = int(np.argmin(nll))
    assert classifier.strength == classifier.path[best].strength
    assert len(nll) - 1 - best in (0, PATIENCE) and nll[0] > nll[best] + 0.5
    logits = classifier(sides["val"][0])
    assert torch.nn.functional.cross_entropy(logits, sides["val"][1]).item() == pytest.approx(nll[best], abs=1e-6)


def test_fit_depends_on_nothing_random(sides) -> None:
    first, second = (fit(sides["train"], sides["val"], 10) for _ in range(2))
    torch.testing.assert_close(first.linear.weight, second.linear.weight, rtol=0, atol=0)


def test_constant_features_and_missing_classes_do_no_harm() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=generator)
    features[:, 2] = 7.0
    labels = (features[:, 0] > 0).long()  # of three classes the last never occurs
    classifier = fit((features[:40], labels[:40]), (features[40:], labels[40:]), 3)
    logits = classifier(features[40:])
    assert torch.isfinite(logits).all()
    assert (logits.argmax(1) == labels[40:]).double().mean() > 0.85
    assert classifier.linear.weight[:, 2].abs().max() == 0


def test_features_that_say_nothing_give_the_class_shares() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    classifier = fit((torch.zeros(4, 3), labels), (torch.zeros(4, 3), labels), 2)
    torch.testing.assert_close(
        classifier(torch.zeros(1, 3)).softmax(1), torch.tensor([[0.75, 0.25]]), atol=1e-3, rtol=0
    )
