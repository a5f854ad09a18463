"""TiC after the abstract: structure, any size, the training mode, errors, and the effect."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vertebra.backbones import tic as page
from vertebra.backbones.tic import effect, tic
from vertebra.blocks.msa_conv import MSAConv
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.training.cost import count


def test_layers_are_msa_conv_with_both_mechanisms():
    with torch.device("meta"):
        layers = [m for m in tic("tiny").modules() if isinstance(m, MSAConv)]
    assert len(layers) == 2 + 2 + 4 + 2 + 3
    assert {layer.attention.shift for layer in layers} == {"back"}
    assert {layer.attention.pooling for layer in layers} == {"average"}
    assert [layer.conv.stride[0] for layer in layers].count(2) == 3
    assert [layer.attention.heads for layer in layers][-1] == 16


@pytest.mark.parametrize("size", [(24, 24), (33, 64), (7, 5), (1, 1)])
def test_weights_fit_every_size(size):
    backbone = fill(tic("nano")).eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, *size)))
    for level, found in zip(backbone.levels, features.pyramid, strict=True):
        assert found.shape[2:] == tuple(-(-side // level.stride) for side in size)
    assert features.pooled.isfinite().all()


def test_a_map_does_not_know_its_size():
    """Far from the border, cells of the first map are the same in a larger image: no part counts places."""
    backbone = fill(tic("nano", shift="none", pooling="none", depths=(1, 1, 1))).eval()
    large = images((1, 3, 64, 64))
    with torch.inference_mode():
        whole, part = backbone(large).pyramid[0], backbone(large[:, :, :32, :32]).pyramid[0]
    torch.testing.assert_close(whole[:, :, :13, :13], part[:, :, :13, :13])


def test_cost_grows_with_the_pixels():
    backbone = tic("nano")
    small, large = (count(backbone, size=(side, side)).macs for side in (96, 192))
    assert large / small == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dims": (16, 32)}, "one number a stage"),
        ({"depths": (1, 0, 1)}, "depths is"),
        ({"patch": 3}, "patch is 3"),
        ({"dims": (20, 32, 64)}, "directions is 8 with 20 channels"),
        ({"kernel": 2}, "kernel is 2"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        tic("nano", **options)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting((8, 16), (1, 2), 48, 1))
    monkeypatch.setattr(page, "_growth", lambda arm: 4.0)
    return effect("toy", read("digits"))


def test_effect_compares_arms_that_differ_in_the_layer(small, tmp_path):
    assert set(small.arms) == {"conv", "window", "global", "msa", "shift", "pool", "both"}
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("window", "global", "msa", "both")}
    assert found["msa"]["params"] == found["both"]["params"] != found["global"]["params"]
    assert found["msa"]["outside"] == 0 and min(found[arm]["outside"] for arm in ("global", "both")) > 0
    assert found["msa"]["nll"] != found["both"]["nll"]
    assert set(found["msa"]) == set(small.metrics)


def test_fields_of_the_arms():
    out = {arm: page._outside(arm) for arm in ("conv", "msa", "shift", "pool")}
    assert out["conv"] == out["msa"] == 0 and min(out["shift"], out["pool"]) > 0


def test_growth_is_the_ratio_of_the_least_times(monkeypatch):
    took = [3.0, 2.0, 2.5, 2.0, 9.0, 8.0, 8.5, 7.0, 9.0, 20.0]  # five tries of the small map, five of the large one
    clock = iter(value for seconds in took for value in (100.0, 100.0 + seconds))
    monkeypatch.setattr(page, "time", SimpleNamespace(process_time=lambda: next(clock)))
    assert page._growth("conv") == 3.5


def measured(**changes: float) -> Measured:
    base = {"top1": 60.0, "outside": 0.0, "growth": 4.0, "at_40": 55.0, "at_48": 50.0}
    arms = {arm: dict(base) for arm in page._ARMS}
    arms["shift"] |= {"top1": 60.5, "outside": 20.0}
    arms["pool"] |= {"top1": 60.5, "outside": 20.0}
    arms["both"] |= {"top1": 61.0}
    arms["global"] |= {"growth": 14.0, "at_40": 50.0}
    for name, value in changes.items():
        arm, _, metric = name.partition("__")
        arms[arm][metric] = value
    return Measured({arm: {m: np.array([v, v]) for m, v in values.items()} for arm, values in arms.items()})


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, []),
        ({"conv__top1": 60.6}, [0]),
        ({"window__top1": 61.0}, [1]),
        ({"shift__top1": 60.1}, [2]),
        ({"pool__top1": 59.0}, [3]),
        ({"both__top1": 60.4}, [4]),
        ({"both__at_40": 40.0}, [5]),
        ({"msa__outside": 0.1}, [6]),
        ({"shift__outside": 0.5}, [7]),
        ({"msa__growth": 5.0}, [8]),
        ({"global__growth": 9.0}, [8]),
    ],
)
def test_effect_checks_what_the_row_asks(small, change, failing):
    checks = small.checks(measured(**change))
    assert [number for number, check in enumerate(checks) if not check.holds] == failing
