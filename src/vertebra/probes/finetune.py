"""Accuracy after the whole backbone was trained on the training images, by the recipe `finetune`.

One learning rate is a trap: what suits one family of networks ruins another. Each contender gets the same few rates,
validation data choose among them, and the report lists them all. A copy is trained; the backbone that is probed
stays as it is.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vertebra.config import Plan
from vertebra.contracts import Backbone, Probe, Report, Work
from vertebra.data.loader import Batches
from vertebra.errors import UsageError
from vertebra.methods.supervised import Supervised
from vertebra.probes.evidence import Evidence
from vertebra.probes.linear import class_scores, mistakes, per_class
from vertebra.probes.logistic import losses
from vertebra.probes.metrics import macro_average_precision, mean, share
from vertebra.recipes.finetune import finetune as recipe
from vertebra.spec import Spec
from vertebra.tasks.classify import classify
from vertebra.training.loop import fit

VARIANTS: dict[str, dict[str, object]] = {}


def finetune(*, epochs: int = 10, rates: Sequence[float] = (0.3, 1.0, 3.0)) -> "Finetune":
    """The probe.

    Args:
        epochs: passes over the training images.
        rates: learning rates to try, as factors of the recipe's.

    Raises:
        UsageError: a value out of range, or no rates.
    """
    return Finetune(epochs=epochs, rates=rates)


class Trained(NamedTuple):
    """What one learning rate came to.

    Attributes:
        rate: learning rate.
        val_nll: mean loss on the validation images.
        logits: of the test images, (n, classes).
    """

    rate: float
    val_nll: float
    logits: Tensor


class Finetune(Probe):
    """Top-1 accuracy on the test images after full fine-tuning; mean average precision with many labels an image."""

    seeded = True

    def __init__(self, *, epochs: int, rates: Sequence[float]) -> None:
        if epochs < 1:
            raise UsageError(f"finetune: epochs is {epochs}; it must be at least 1")
        if not rates or min(rates) <= 0:
            raise UsageError(f"finetune: rates is {rates!r}; it must list factors above 0, as 0.3,1,3")
        self.epochs, self.rates = epochs, tuple(rates)

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        rates = len(self.rates)
        judged = rates * images["val"] + images["test"]
        return Work(forward=judged, trained=rates * self.epochs * images["train"], seconds=2.0)

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        plan = self._plan(data)
        tried = [trained(model, data, replace(plan, lr=plan.lr * factor)) for factor in self.rates]
        best = min(tried, key=lambda one: one.val_nll)
        targets = data.targets("test")
        details: dict[str, Any] = {
            "epochs": self.epochs,
            "rate": best.rate,
            "sweep": [{"rate": one.rate, "val_nll": round(one.val_nll, 4)} for one in tried],
        }
        if data.multi:
            score, by_class = macro_average_precision(best.logits, targets)
            details["per_class"] = per_class(100 * by_class, targets.sum(0), data.classes)
            return Report({"finetune_map": score, "nll": mean(losses(best.logits, targets))}, details)
        scores = {"finetune_top1": share(best.logits.argmax(1) == targets), **class_scores(best.logits, targets)}
        return Report(scores, {**details, **mistakes(best.logits, data)})

    def _plan(self, data: Evidence) -> Plan:
        """The recipe's plan for as many epochs as this probe has; it depends on the number of images alone."""
        plan = recipe("", Spec("live:backbone"), len(data.split("train"))).plan
        warmup = plan.warmup_epochs * self.epochs / plan.epochs
        return replace(plan, epochs=self.epochs, warmup_epochs=warmup, seed=data.seed, workers=0)


def trained(model: Backbone, data: Evidence, plan: Plan) -> Trained:
    """Train a copy by `plan` and look at it with the validation and the test images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)  # of the classifier's first weights
        classifier = classify(copy.deepcopy(model), data.classes, multi=data.multi, label_smoothing=0.1)
    split, views = data.split("train"), plan.views
    batches = Batches(split, model.preprocess, views=views, batch=plan.batch, seed=plan.seed, workers=0)
    fit(Supervised(classifier), batches, plan, device=str(data.device))
    logits = {name: _logits(classifier, data, name) for name in ("val", "test")}
    return Trained(plan.lr, losses(logits["val"], data.targets("val")).mean().item(), logits["test"])


def _logits(classifier: nn.Module, data: Evidence, name: str) -> Tensor:
    return data.through(lambda batch: classifier(batch)["logits"], data.images(name), len(data.classes))
