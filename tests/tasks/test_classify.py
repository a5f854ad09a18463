import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.tasks.classify import Classify, classify


class Flat(Backbone):
    """Gives the pixels themselves as pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.levels, self.width = (Level(3, 1),), 12
        self.preprocess = Preprocess((2, 2), (0.0,) * 3, (1.0,) * 3)

    def forward(self, images: Tensor) -> Features:
        return Features((images,), images.flatten(1))

    def trunk(self) -> list[nn.Module]:
        return []


def _names(count: int) -> list[str]:
    return [f"class-{i}" for i in range(count)]


def _random(classes: int, images: int = 200) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, classes - 1, (images,), generator=generator)  # the last class has no image
    logits = torch.randn(images, classes, generator=generator) + 1.5 * torch.eye(classes)[targets]
    return {"logits": logits}, targets


def test_metrics_are_scikit_learns_in_percent() -> None:
    model = classify(Flat(), _names(8))
    outputs, targets = _random(8)
    metrics = model.metrics()
    for part in range(0, 200, 64):
        metrics.update({"logits": outputs["logits"][part : part + 64]}, targets[part : part + 64])
    found = {name: float(value) for name, value in metrics.compute().items()}
    probabilities, predicted = outputs["logits"].double().softmax(1).numpy(), outputs["logits"].argmax(1).numpy()
    expected = {
        "top1": 100 * (predicted == targets.numpy()).mean(),
        "top5": 100 * top_k_accuracy_score(targets, probabilities, k=5, labels=range(8)),
        "balanced_acc": 100 * np.mean([(predicted[targets == c] == c).mean() for c in range(7)]),
        "f1_macro": 100 * f1_score(targets, predicted, average="macro"),
        "nll": log_loss(targets, probabilities, labels=range(8)),
    }
    assert list(found) == ["top1", "top5", "balanced_acc", "f1_macro", "nll", "ece"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_balanced_accuracy_is_scikit_learns_where_every_class_is_seen() -> None:
    outputs, targets = _random(4)
    model = classify(Flat(), _names(3))
    metrics = model.metrics()
    metrics.update({"logits": outputs["logits"][:, :3]}, targets)
    expected = 100 * balanced_accuracy_score(targets, outputs["logits"][:, :3].argmax(1))
    assert float(metrics.compute()["balanced_acc"]) == pytest.approx(expected, rel=1e-5)
    assert "top5" not in metrics.compute()


def test_calibration_error_of_a_known_case() -> None:
    model = classify(Flat(), _names(2))
    metrics = model.metrics()
    logit = float(np.log(0.8 / 0.2))  # always 80 % sure, right in 5 of 10
    metrics.update({"logits": torch.tensor([[logit, 0.0]] * 10)}, torch.tensor([0, 1] * 5))
    assert float(metrics.compute()["ece"]) == pytest.approx(30, abs=1e-3)


def test_many_label_metrics_are_scikit_learns() -> None:
    model = classify(Flat(), _names(4), multi=True)
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(80, 4, generator=generator) < 0.4).float()
    logits = torch.randn(80, 4, generator=generator) + targets
    metrics = model.metrics()
    metrics.update({"logits": logits[:50]}, targets[:50])
    metrics.update({"logits": logits[50:]}, targets[50:])
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == pytest.approx(
        {
            "map": 100 * average_precision_score(targets, logits.sigmoid(), average="macro"),
            "f1_macro": 100 * f1_score(targets, logits > 0, average="macro"),
        },
        rel=1e-5,
    )


def test_losses_follow_their_equations() -> None:
    outputs, targets = _random(3, images=9)
    logits, weights = outputs["logits"], torch.tensor([0.5, 1.0, 1.5])
    model = classify(Flat(), _names(3), label_smoothing=0.3, class_weights=weights)
    smooth = torch.eye(3)[targets] * 0.7 + 0.1
    expected = -(smooth * weights * logits.log_softmax(1)).sum(1).mean()  # over images, not over weights
    torch.testing.assert_close(model.losses(outputs, targets)["classify"], expected)
    torch.testing.assert_close(
        classify(Flat(), _names(3)).losses(outputs, targets)["classify"], cross_entropy(logits, targets)
    )


def test_soft_targets_mix_the_losses_of_both_labels() -> None:
    outputs, targets = _random(3, images=6)
    model = classify(Flat(), _names(3))
    soft = 0.25 * torch.eye(3)[targets] + 0.75 * torch.eye(3)[targets.flip(0)]
    parts = [model.losses(outputs, labels)["classify"] for labels in (targets, targets.flip(0))]
    torch.testing.assert_close(model.losses(outputs, soft)["classify"], 0.25 * parts[0] + 0.75 * parts[1])


def test_many_label_loss_with_smoothing() -> None:
    model = classify(Flat(), _names(2), multi=True, label_smoothing=0.2)
    logits, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    p = logits.sigmoid()
    softened = torch.tensor([[0.9, 0.1]])
    expected = -(softened * p.log() + (1 - softened) * (1 - p).log()).mean()
    torch.testing.assert_close(model.losses({"logits": logits}, targets)["classify"], expected)


@pytest.mark.parametrize("multi", [False, True])
def test_predictions_are_sorted_probabilities(multi: bool) -> None:
    model: Classify = classify(Flat(), _names(3), multi=multi)
    found = model.predict({"logits": torch.tensor([[0.0, 2.0, 1.0]])}, [(2, 2)])[0]
    assert found.labels.tolist() == [1, 2, 0]
    logits = torch.tensor([2.0, 1.0, 0.0])
    torch.testing.assert_close(found.scores, logits.sigmoid() if multi else logits.softmax(0))


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["a"], {}, "at least 2 classes"),
        (["a", "b", "a"], {}, r"repeat: \['a'\]"),
        (["a", "b"], {"class_weights": [1.0]}, r"shape \(1,\) for 2 classes"),
    ],
)
def test_impossible_classifiers_are_refused(names: list[str], options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        classify(Flat(), names, **options)


def test_the_head_starts_undecided() -> None:
    torch.manual_seed(0)
    model = classify(Flat(), _names(5)).eval()
    scores = model.probabilities(model(torch.randn(4, 3, 2, 2)))
    assert (scores - 0.2).abs().max() < 0.05
