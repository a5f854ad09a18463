"""The experiment of simclr_v2 at a tiny size: deterministic, arms that start as they say, checks that read signs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vertebra.contracts import Measured
from vertebra.data import digits
from vertebra.methods.simclr_v2 import WithHead, few_labels
from vertebra.spec import Spec

TINY = replace(
    few_labels.TOY,
    backbone=Spec("timm/test_resnet", {"image_size": 32}),
    images=64,
    seen=64,
    batch=32,
    labels=(1, 2),
    steps=2,
    test=32,
)


def test_arms_are_measured_and_again_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(few_labels, "TOY", TINY)
    monkeypatch.setattr(few_labels, "DIGIT_LABELS", TINY.labels)
    effect = few_labels.experiment("toy", None)
    assert effect.baseline in effect.arms and "64 images without labels, 1 and 2 labels a class" in effect.data
    for number in range(2):
        (tmp_path / str(number) / "prepared-0").mkdir(parents=True)
        effect.prepare(0, tmp_path / str(number) / "prepared-0")
    found = [dict(effect.measure("selector_1", 0, tmp_path / str(number) / "selector_1-0")) for number in range(2)]
    assert found[0] == found[1] and found[0].keys() == effect.metrics.keys()
    assert all(0 <= value <= 100 for value in found[0].values())


def test_arms_of_a_seed_start_from_the_same_pretrained_weights(tmp_path: Path) -> None:
    train = few_labels._some(digits().split("train"), 64)
    method = few_labels._pretrained(0, TINY, train, mirrored=False)
    save_file({name: value.contiguous() for name, value in method.state_dict().items()}, tmp_path / "weights")
    starts = {arm: few_labels._starting_point(arm, 0, TINY, tmp_path / "weights") for arm in few_labels.ARMS}
    kept = starts["selector_1"]
    assert isinstance(kept, WithHead) and kept.width == starts["selector_0"].width == 96
    pretrained, scratch = starts["selector_0"].state_dict(), starts["scratch"].state_dict()
    assert all(torch.equal(tensor, kept.encoder.state_dict()[name]) for name, tensor in pretrained.items())
    torch.manual_seed(0)
    fresh = TINY.backbone.build().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in scratch.items())
    assert not all(torch.equal(tensor, fresh[name]) for name, tensor in pretrained.items())


def test_each_seed_draws_as_many_labels_of_each_class() -> None:
    train = digits().split("train")
    draws = [few_labels._labelled(train, 5, seed) for seed in (0, 0, 1)]
    assert all(draw.counts.tolist() == [5] * 10 for draw in draws)
    names = [set(draw.names) for draw in draws]
    assert names[0] == names[1] and len(names[0] & names[2]) < 15


def test_checks_read_the_signs_of_the_mean_gains() -> None:
    values = {
        "scratch": {"top1_few": np.array([30.0, 31.0]), "top1_more": np.array([40.0, 40.0])},
        "selector_0": {"top1_few": np.array([35.0, 36.0]), "top1_more": np.array([45.0, 45.0])},
        "selector_1": {"top1_few": np.array([34.0, 36.0]), "top1_more": np.array([46.0, 44.0])},
    }
    checks = few_labels._checks(Measured(values))
    assert [check.holds for check in checks] == [True, True, False]
    assert checks[2].found == "-0.50 points (each seed -1.00, +0.00)"
