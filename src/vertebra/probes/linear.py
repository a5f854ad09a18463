"""A linear classifier on frozen features: multinomial logistic regression, strength chosen on validation data.

The classifier is fitted on the training images alone; validation images choose its strength by their loss and
then serve the calibration probe's temperature; test images only score it. With many labels an image it is
one-vs-rest, and the score is the mean average precision over classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report, Score, Work
from vertebra.probes.evidence import Evidence
from vertebra.probes.logistic import losses
from vertebra.probes.metrics import balanced_accuracy, f1_macro, macro_average_precision, mean, share

VARIANTS: dict[str, dict[str, object]] = {}
WORST = 24
"""Mistakes that a report keeps."""


def linear() -> "Linear":
    """The probe."""
    return Linear()


class Linear(Probe):
    """Accuracy of the shared linear classifier, and of the contender's own head where it has one."""

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        return Work(seconds=0.5 + 5e-5 * images["train"] * classes)

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        classifier, features, targets = data.classifier, data.features("test"), data.targets("test")
        logits = classifier(features)
        details: dict[str, Any] = {
            "strength": classifier.strength,
            "path": [{"strength": step.strength, "val_nll": round(step.nll, 4)} for step in classifier.path],
        }
        if data.multi:
            score, by_class = macro_average_precision(logits, targets)
            details["per_class"] = per_class(100 * by_class, targets.sum(0), data.classes)
            return Report({"linear_map": score, "nll": mean(losses(logits, targets))}, details)
        scores = {"linear_top1": share(logits.argmax(1) == targets), **class_scores(logits, targets)}
        if len(data.classes) > 5:
            scores["linear_top5"] = share((logits.topk(5).indices == targets[:, None]).any(1))
        if data.head is not None:
            own = data.head(features.to(data.device)).float().cpu()
            scores["head_top1"] = share(own.argmax(1) == targets)
            details["head"] = mistakes(own, data)
        return Report(scores, {**details, **mistakes(logits, data)})


def class_scores(logits: Tensor, targets: Tensor) -> dict[str, Score]:
    """What is reported beside top-1."""
    predicted, classes = logits.argmax(1), logits.shape[1]
    return {
        "balanced_acc": balanced_accuracy(targets, predicted, classes),
        "f1_macro": f1_macro(targets, predicted, classes),
        "nll": mean(losses(logits, targets)),
    }


def mistakes(logits: Tensor, data: Evidence) -> dict[str, Any]:
    """Accuracy of each class, the commonest confusions and the most confident errors on the test images, JSON-ready."""
    targets, names, classes = data.targets("test"), data.names("test"), data.classes
    confidence, predicted = logits.softmax(1).max(1)
    counts = torch.bincount(targets, minlength=len(classes))
    right = torch.bincount(targets[predicted == targets], minlength=len(classes))
    wrong = torch.nonzero(predicted != targets).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:WORST].tolist()
    return {
        "per_class": per_class(100 * right / counts, counts, classes),
        "confusions": _confusions(targets[wrong], predicted[wrong], classes),
        "mistakes": [
            {
                "index": i,
                "name": str(names[i]),
                "truth": classes[int(targets[i])],
                "predicted": classes[int(predicted[i])],
                "confidence": round(confidence[i].item(), 4),
            }
            for i in worst
        ],
    }


def per_class(values: Tensor, counts: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """One entry a class: its name, its score in percent (None without test images) and its number of test images."""
    return [
        {"class": name, "value": round(value, 2) if n else None, "n": int(n)}
        for name, value, n in zip(classes, values.tolist(), counts.tolist(), strict=True)
    ]


def _confusions(truth: Tensor, predicted: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Pairs of classes that are taken for one another, the commonest first."""
    pairs, counts = torch.unique(truth * len(classes) + predicted, return_counts=True)
    common = counts.argsort(descending=True, stable=True)[:WORST].tolist()
    return [
        {
            "truth": classes[int(pairs[i]) // len(classes)],
            "predicted": classes[int(pairs[i]) % len(classes)],
            "n": int(counts[i]),
        }
        for i in common
    ]
