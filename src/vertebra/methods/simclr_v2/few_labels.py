"""The effect of pretraining where labels are few, and of the layer from which fine-tuning goes on."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Check, Effect, Measured
from vertebra.data import read
from vertebra.data.dataset import Dataset, Split
from vertebra.data.loader import Batches
from vertebra.errors import DataError
from vertebra.methods.simclr_v2 import SimCLRv2, simclr_v2, with_head
from vertebra.methods.supervised import Supervised
from vertebra.spec import Spec
from vertebra.tasks.classify import classify
from vertebra.training.loop import evaluate, fit
from vertebra.training.running import material

ARMS = {
    "scratch": "random weights, the labelled images alone",
    "selector_0": "pretrained; fine-tuned from the encoder's output",
    "selector_1": "pretrained; fine-tuned from the first hidden layer of the head",
}
METRICS = {"top1_few": "%", "top1_more": "%"}


@dataclass(frozen=True)
class Setting:
    """What an experiment costs.

    Attributes:
        backbone: the encoder.
        images: for pretraining, at most.
        seen: images in pretraining, over all epochs; each makes two views.
        batch: of pretraining.
        lr: of pretraining.
        labels: a class, few and more.
        steps: of each fine-tuning, and of each training from scratch.
        test: images, at most.
    """

    backbone: Spec
    images: int
    seen: int
    batch: int
    lr: float
    labels: tuple[int, int]
    steps: int
    test: int


WEIGHTS = "pretrained.safetensors"

DIGIT_LABELS = (2, 10)
"""Digits are easy: with 50 labels a class nothing is left to gain."""

TOY = Setting(
    backbone=Spec("timm/resnet10t", {"image_size": 32, "network": {"channels": [24, 48, 96, 192], "stem_width": 12}}),
    images=3000,
    seen=90_000,
    batch=128,
    lr=0.85,
    labels=(10, 50),
    steps=300,
    test=2000,
)
GPU = Setting(
    backbone=Spec("sk_resnet/50_1x_sk", {"depths": [2, 2, 2, 2], "dim": 32, "stem": "small"}),
    images=50_000,
    seen=10_000_000,
    batch=1024,
    lr=2.4,
    labels=(10, 50),
    steps=1500,
    test=10_000,
)


def experiment(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The effect at a scale; a split called test is the judge where there is one, else what `material` holds out.

    Raises:
        DataError: the data has not one label an image.
    """
    setting = GPU if scale == "gpu" else TOY
    dataset, mirrored = data or read("digits"), data is not None  # a digit in the mirror is another shape
    if data is None:
        setting = replace(setting, labels=DIGIT_LABELS)
    parts = material(dataset)
    if parts.multi:
        raise DataError(f"{dataset.path} has many labels an image; few labels are drawn a class, of one an image")
    train, test = _some(parts.train, setting.images), _some(dataset.splits.get("test", parts.val), setting.test)
    few, more = setting.labels

    def prepare(seed: int, folder: Path) -> None:
        method = _pretrained(seed, setting, train, mirrored)
        save_file({name: tensor.contiguous() for name, tensor in method.state_dict().items()}, folder / WEIGHTS)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        start = _starting_point(arm, seed, setting, folder.parent / f"prepared-{seed}" / WEIGHTS)
        found = {}
        for name, count in (("top1_few", few), ("top1_more", more)):
            labelled = _labelled(train, count, seed)
            plan = _tuning(len(labelled), seed, setting, mirrored)
            found[name] = _tuned(copy.deepcopy(start), labelled, test, plan)
        return found

    epochs = max(1, setting.seen // len(train))
    return Effect(
        claim="pretraining without labels helps where they are few, best fine-tuned from the middle of the head",
        arms=ARMS,
        baseline="scratch",
        metrics=METRICS,
        measure=measure,
        prepare=prepare,
        checks=_checks,
        limits=(
            f"one narrow network, {epochs} epochs of pretraining where the paper has 800, {few} and {more} labels a "
            "class; the paper's gain of the middle layer is that of large networks. Every arm is fine-tuned by AdamW. "
            "The paper's LARS at 0.16, tried on one seed of CIFAR-10, put selector 1 above selector 0 with 50 labels, "
            "and both below scratch. Wider networks and distillation, the other two findings, are not measured."
        ),
        data=(
            f"{data.path if data else 'digits'}: {len(train)} images without labels, {few} and {more} labels a class,"
            f" top-1 on {len(test)} others"
        ),
    )


def _checks(measured: Measured) -> list[Check]:
    checks = []
    for metric, words in (("top1_few", "few labels"), ("top1_more", "more labels")):
        gain = measured.gain("selector_1", "scratch", metric)
        checks.append(
            Check(f"{words}: pretrained (selector 1) at least scratch", bool(gain.mean() >= 0), _points(gain))
        )
    gain = measured.gain("selector_1", "selector_0", "top1_few")
    checks.append(Check("few labels: selector 1 at least selector 0", bool(gain.mean() >= 0), _points(gain)))
    return checks


def _points(gain: np.ndarray) -> str:
    return f"{gain.mean():+.2f} points (each seed {', '.join(f'{value:+.2f}' for value in gain)})"


def _some(split: Split, most: int) -> Split:
    """At most so many images of a split, the same ones each time."""
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:most]))


def _labelled(split: Split, count: int, seed: int) -> Split:
    """`count` images of each class, or all where there are fewer; another draw with another seed."""
    assert split.targets is not None
    random = np.random.default_rng((seed, count))
    drawn = [random.permutation(np.flatnonzero(split.targets == label))[:count] for label in range(len(split.classes))]
    return split.select(np.concatenate(drawn))


def _pretrained(seed: int, setting: Setting, train: Split, mirrored: bool) -> SimCLRv2:
    """The method after pretraining on all images."""
    torch.manual_seed(seed)
    method = simclr_v2(setting.backbone.build())
    preprocess = method.backbone.preprocess
    views = Views(
        scale=(0.2, 1.0), flip=0.5 * mirrored, jitter=0.4, hue=0.1, jitter_chance=0.8, grey=0.2
    )  # SimCLR's for 32 pixels, at half of the colours' strength
    plan = Plan(
        epochs=max(1, setting.seen // len(train)),
        batch=min(setting.batch, len(train)),
        optimizer="lars",
        lr=setting.lr,
        weight_decay=1e-4,
        warmup_epochs=2.0,
        clip=None,
        views=views,
        more_views=(views,),
        precision="auto" if torch.cuda.is_available() else "32-true",
        seed=seed,
    )
    feed = {"views": views, "more_views": plan.more_views, "batch": plan.batch, "seed": seed, "workers": 0}
    fit(method, Batches(train, preprocess, **feed), plan)
    return method


def _starting_point(arm: str, seed: int, setting: Setting, weights: Path) -> Backbone:
    """The backbone that an arm fine-tunes; the pretrained arms of a seed have the same weights."""
    torch.manual_seed(seed)
    method = simclr_v2(setting.backbone.build())
    if arm == "scratch":
        return method.backbone
    method.load_state_dict(load_file(weights))
    return with_head(method.backbone, method.head, layers=int(arm == "selector_1"))


def _tuning(images: int, seed: int, setting: Setting, mirrored: bool) -> Plan:
    """The same for every arm: AdamW, crops and flips."""
    return Plan(
        epochs=setting.steps,
        steps=setting.steps,
        batch=min(64, images),
        lr=1e-3,
        views=Views(scale=(0.5, 1.0), flip=0.5 * mirrored),
        seed=seed,
    )


def _tuned(backbone: Backbone, labelled: Split, test: Split, plan: Plan) -> float:
    """Top-1 after training on the labelled images, from a linear classifier at zero as the paper has it."""
    model = classify(backbone, labelled.classes)
    nn.init.zeros_(model.head.weight)
    batches = Batches(labelled, backbone.preprocess, views=plan.views, batch=plan.batch, seed=plan.seed, workers=0)
    fit(Supervised(model), batches, plan)
    judged = Batches(test, backbone.preprocess, views=None, batch=256, seed=0, workers=0)
    return evaluate(model, judged)["top1"]
