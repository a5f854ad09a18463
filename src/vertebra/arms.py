"""What most effects share: part of a classification data set, one training for each arm, its scores.

No page: an `effect` (see `vertebra.contracts.Effect`) calls `parts` once and `trained` for each arm and seed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vertebra.config import Plan
from vertebra.contracts import Backbone, Method, TaskModel
from vertebra.data.dataset import Dataset, Split, stratified
from vertebra.data.loader import Batches
from vertebra.errors import DataError
from vertebra.methods.supervised import Supervised
from vertebra.tasks.classify import classify
from vertebra.training.loop import History, evaluate, fit


@dataclass(frozen=True)
class Trained:
    """A classifier after its training.

    Attributes:
        model: in evaluation mode.
        scores: metric -> value on the test images, `top1` in percent first; and `seconds` of training, `loss` of the
            last epoch.
        history: epoch by epoch, and the loss of every step.
    """

    model: TaskModel
    scores: Mapping[str, float]
    history: History


def parts(page: str, data: Dataset | None, images: int, *, held: int | None = None) -> tuple[Split, Split, str]:
    """Training and test images with the classes of the whole in their shares, the same for every arm and seed.

    Args:
        page: its name, for messages.
        data: any data of one class an image; None takes the built-in digits.
        images: training images at most.
        held: test images at most; half of `images` by default. They are those of "test", or else of "val".

    Returns:
        Training split, test split, and both in words.

    Raises:
        DataError: targets of another kind, or no images to test on.
    """
    if data is None:
        from vertebra.data import read

        data = read("digits")
    if data.label != "single":
        raise DataError(f"{page}: {data.path} has {data.label}-label targets; the effect needs one class an image")
    judged = next((name for name in ("test", "val") if name in data.splits), None)
    if judged is None:
        raise DataError(f"{page}: {data.path} has no test images; the effect needs a split test or val")
    train, test = _few(data.split("train"), images), _few(data.split(judged), held or images // 2)
    return train, test, f"{Path(data.path).name}: {len(train)} training and {len(test)} test images"


def _few(split: Split, images: int) -> Split:
    if len(split) <= images or split.targets is None:
        return split
    return split.select(stratified(split.targets, (images / len(split),), seed=0)[0])


def trained(backbone: Backbone, train: Split, test: Split, plan: Plan, *, label_smoothing: float = 0.0) -> Trained:
    """Train a classifier on `backbone` from the weights that it has, and test it.

    Seed torch before building the backbone; the plan's seed decides order and views. Images are scaled to
    `backbone.preprocess.size`. Workers are off: arms of an effect run side by side in processes of their own.

    Args:
        backbone: is trained in place.
        train: images of one class each.
        test: likewise, of the same classes.
        plan: epochs, rates and views.
        label_smoothing: mass moved from the right answer to all, 0..1.
    """
    model = classify(backbone, train.classes, label_smoothing=label_smoothing)
    return fitted(model, Supervised(model), train, test, plan)


def fitted(model: TaskModel, method: Method, train: Split, test: Split, plan: Plan) -> Trained:
    """Train by any method, and test `model`: as `trained`, for objectives of an arm's own."""
    plan = replace(plan, workers=0)
    preprocess = model.backbone.preprocess
    batches = Batches(train, preprocess, views=plan.views, batch=plan.batch, seed=plan.seed, workers=0)
    started = time.monotonic()
    history = fit(method, batches, plan)
    seconds = time.monotonic() - started
    scores = evaluate(model, Batches(test, preprocess, views=None, batch=256, seed=plan.seed, workers=0))
    return Trained(model, {**scores, "seconds": seconds, "loss": history.rows[-1]["loss"]}, history)


def added(backbone: torch.nn.Module, plain: torch.nn.Module) -> float:
    """Parameters that a network has more than another, in percent of the other's."""
    sizes = [sum(tensor.numel() for tensor in network.parameters()) for network in (backbone, plain)]
    return 100 * (sizes[0] / sizes[1] - 1)
