"""Swin's effect: arms that differ in one thing, and checks that can fail."""

import numpy as np
import pytest
import torch

from vertebra.backbones import swin as page
from vertebra.backbones.swin import armed, effect
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.parity import fill, images

SMALL = page._Setting(16, (2, 2), 40, 1, (16, 32, 48))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", SMALL)
    return effect("toy", read("digits"))


def field(arm: str) -> set[tuple[int, int]]:
    """Cells of 2 pixels that the first cell of the first map listens to after two blocks."""
    backbone = fill(armed(arm, SMALL, 32)).eval()
    x = images((1, 3, 32, 32)).requires_grad_(True)
    backbone(x).pyramid[0][0, :, 5, 5].sum().backward()
    return {(row // 2, column // 2) for row, column in x.grad[0].abs().sum(0).nonzero().tolist()}


def test_arms_see_what_their_windows_say():
    window = {(row, column) for row in range(4, 8) for column in range(4, 8)}
    assert field("still") == window
    assert window < field("shifted") < field("global")
    assert len(field("global")) == 256


def test_arms_differ_in_one_thing():
    whole = {arm: dict(armed(arm, SMALL, 32).named_parameters()) for arm in page._ARMS}
    shapes = {arm: {name: tuple(p.shape) for name, p in found.items()} for arm, found in whole.items()}
    assert shapes["shifted"] == shapes["still"] == shapes["unbiased"]
    tables = {name for name in shapes["global"] if shapes["global"][name] != shapes["still"][name]}
    assert tables and all(name.endswith("relative_position_bias_table") for name in tables)
    frozen = {name for name, p in whole["unbiased"].items() if not p.requires_grad}
    assert len(frozen) == 4 and not any(whole["unbiased"][name].any() for name in frozen)


def test_effect_measures_every_arm(small, tmp_path):
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("shifted", "still")}
    assert all(set(row) == set(small.metrics) for row in found.values())
    assert found["shifted"]["params"] == found["still"]["params"]
    assert 0.5 < found["shifted"]["memory"] < 1.2
    assert found["still"]["time"] != found["still"]["time"]


def test_checks_can_fail(small):
    def holds(shift: float, bias: float, power: float, attention: float) -> list[bool]:
        nothing = {"time": 0.0, "memory": 0.0, "attention": 0.0}
        rows = {
            "shifted": {"top1": 50 + shift, "time": power, "memory": 1.0, "attention": 1.0},
            "still": {"top1": 50.0, **nothing},
            "global": {"top1": 50.0, "time": 2.0, "memory": 2.0, "attention": attention},
            "unbiased": {"top1": 50 + shift - bias, **nothing},
        }
        values = {arm: {name: np.array([value]) for name, value in row.items()} for arm, row in rows.items()}
        return [check.holds for check in small.checks(Measured(values))]

    assert holds(1.5, 0.5, 1.1, 1.9) == [True] * 4
    assert holds(0.5, -0.5, 1.3, 1.6) == [False] * 4


def test_windows_that_stay_compute_without_a_mask():
    with torch.inference_mode():
        assert fill(armed("still", SMALL, 32)).eval()(images((2, 3, 32, 32))).pooled.isfinite().all()
