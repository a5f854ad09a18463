"""The effect of CBNet: from the same pretrained weights, one network, one twice as deep, and two linked copies.

The paper compares detectors. This is the same comparison on classification: pretrained on one half of the training
images, trained on the other half for equally long, in every arm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from vertebra.arms import Trained, fitted, parts
from vertebra.backbones.cbnet import cbnet
from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Check, Effect, Measured
from vertebra.data.dataset import Dataset, Split, stratified
from vertebra.errors import DataError
from vertebra.methods.assisted import Assisted
from vertebra.methods.supervised import Supervised
from vertebra.tasks.classify import classify


@dataclass(frozen=True)
class _Setting:
    """What a scale trains: blocks a stage of the single network, pixels, images of both halves, epochs of each."""

    blocks: int
    size: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(1, 16, 4000, 15), "gpu": _Setting(3, 32, 50_000, 40)}

_ARMS = {
    "single": "one network",
    "deeper": "one of twice the depth, pretrained for as long",
    "dual": "two linked copies, the lead's loss alone",
    "assisted": "two linked copies, and half of the assistant's loss",
}
_COMPOSITIONS = {
    "same": "as assisted, links of the same level alone",
    "higher": "as assisted, links of the next deeper level alone",
    "full": "as assisted, links of all levels",
}


def experiment(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """See `vertebra.backbones.cbnet.effect`."""
    setting = _SETTINGS[scale]
    train, test, words = parts("cbnet", data, setting.images)
    if train.targets is None:
        raise DataError("cbnet: the training images have no targets; the effect needs one class an image")
    halves = [train.select(rows) for rows in stratified(train.targets, (0.5, 0.5), seed=0)]

    def prepare(seed: int, folder: Path) -> None:
        for blocks in (setting.blocks, 2 * setting.blocks):
            torch.manual_seed(seed)
            backbone = _single(setting, blocks)
            _train(backbone, setting, seed, halves[0], test, assisted=False)
            state = {
                name: tensor.contiguous() for name, tensor in backbone.state_dict().items()
            }  # trained channels last
            save_file(state, folder / f"{blocks}.safetensors")

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        torch.manual_seed(seed)
        backbone = _backbone(arm, setting, folder.parent / f"prepared-{seed}")
        assisted = arm not in ("single", "deeper", "dual")
        scores = _train(backbone, setting, seed, halves[1], test, assisted=assisted).scores
        params = sum(p.numel() for p in backbone.parameters()) / 1e6
        return {"top1": scores["top1"], "nll": scores["nll"], "params": params, "seconds": scores["seconds"]}

    return Effect(
        claim="linked copies of a pretrained network beat one, and a deeper one; the assistant's loss adds to it",
        arms=_ARMS if scale == "toy" else {**_ARMS, **_COMPOSITIONS},
        baseline="single",
        metrics={"top1": "%", "nll": "", "params": "M", "seconds": ""},
        measure=measure,
        prepare=prepare,
        checks=_checks,
        limits=(
            "classification in place of the paper's detection: no detector is here yet, so nothing is said of boxes;"
            f" ResNet-{6 * setting.blocks + 2} at {setting.size} pixels, pretrained on {len(halves[0])} images and"
            f" trained on {len(halves[1])} others: differences below a point need more seeds than three"
        ),
        data=words,
    )


def _single(setting: _Setting, blocks: int) -> Backbone:
    return cifar_resnet(blocks=blocks, image_size=setting.size)


def _backbone(arm: str, setting: _Setting, prepared: Path) -> Backbone:
    """The arm's network with the pretrained weights of its seed."""
    blocks = setting.blocks * (2 if arm == "deeper" else 1)
    file = prepared / f"{blocks}.safetensors"
    if arm in ("single", "deeper"):
        backbone = _single(setting, blocks)
        backbone.load_state_dict(load_file(file))
        return backbone
    chosen: dict[str, Any] = {"links": arm} if arm in _COMPOSITIONS else {}
    return cbnet(
        member="cifar_resnet/20",
        image_size=setting.size,
        weights=str(file),
        network={"blocks": blocks},
        **chosen,
    )


def _train(backbone: Backbone, setting: _Setting, seed: int, train: Split, test: Split, *, assisted: bool) -> Trained:
    model = classify(backbone, train.classes)
    plan = Plan(
        epochs=setting.epochs,
        batch=64,
        optimizer="sgd",
        lr=0.05,
        weight_decay=5e-4,
        clip=None,
        views=Views(scale=(0.6, 1.0)),
        seed=seed,
    )
    return fitted(model, Assisted(model) if assisted else Supervised(model), train, test, plan)


def _checks(measured: Measured) -> Sequence[Check]:
    """The thresholds of the paper's row: a point over the single network, no less than the other arms."""
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    found = [_gain(measured, "assisted", "single", 1.0, "Linked copies with assistance gain at least a point over one")]
    found.append(_gain(measured, "assisted", "deeper", 0.0, "They are no worse than one network of twice the depth"))
    found.append(_gain(measured, "assisted", "dual", 0.0, "They are no worse than without the assistant's loss"))
    return [Check(found[0].name, found[0].holds, f"{found[0].found}; all arms: {words}"), *found[1:]]


def _gain(measured: Measured, arm: str, other: str, least: float, name: str) -> Check:
    gains = measured.gain(arm, other, "top1")
    seeds = ", ".join(f"{gain:+.2f}" for gain in gains)
    return Check(name, bool(gains.mean() >= least), f"{gains.mean():+.2f} points (seeds: {seeds})")
