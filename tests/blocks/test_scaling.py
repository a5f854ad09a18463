"""Scaling rules: pycls's own configurations and complexities, the laws of growth, the simulated device, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from vertebra.backbones.fast_scaling import described
from vertebra.blocks.scaling import FAST, complexity, design, factors, law, layers, regnet, roofline, scaled, shares
from vertebra.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / "fast_scaling.json"
SCALED = json.loads(GOLDEN.read_text(encoding="utf-8"))["scaled"]
SCALES = (1, 2, 4, 8, 16, 32)


def base(name):
    if name == "regnety_4gf":
        return regnet(22, 96, 31.41, 2.24, group=64)
    return described(name)


@pytest.mark.parametrize("case", SCALED)
def test_scales_as_the_authors_code_does(case):
    name, strategy, scale = case.split()
    made, expected = scaled(base(name), float(scale), strategy), SCALED[case]
    assert (list(made.depths), list(made.widths)) == (expected["depths"], expected["widths"])
    assert made.size == expected["image_size"]
    if "groups" in expected:
        assert list(made.groups) == expected["groups"]
    else:
        assert (made.stem_width, made.head) == (expected["stem_width"], expected["head"])


@pytest.mark.parametrize("case", SCALED)
def test_costs_what_the_authors_code_counts(case):
    name, strategy, scale = case.split()
    made, expected = scaled(base(name), float(scale), strategy), SCALED[case]
    cost = complexity(made, classes=1000)
    biases = sum(layer.outputs for layer in layers(made) if not layer.normed) + 1000
    pooled = 64 * (-(-made.size // 4)) ** 2 if made.stem == "resnet" else 0  # they count the stem's pooling
    assert cost.params == expected["params"]
    assert cost.macs + biases == expected["macs_and_biases"]
    assert cost.activations + pooled == expected["activations_and_pooling"]


@pytest.mark.parametrize(
    ("numbers", "options", "name"),
    [
        ((16, 48, 27.89, 2.09), {"group": 8}, "regnety_400mf"),
        (
            (21, 16, 10.7, 2.51),
            {"group": 4, "ratio": 4, "block": "linear", "head": 1024, "activation": "silu"},
            "regnetz_500mf",
        ),
    ],
)
def test_regnets_become_the_stages_of_the_variants(numbers, options, name):
    assert regnet(*numbers, **options) == described(name)


@pytest.mark.parametrize(
    ("strategy", "exponent"), [("w", 0.5), (FAST, 0.6), ("dwr", 5 / 6), ("d", 1.0), ("r", 1.0), ("dr", 1.0), ("g", 0.0)]
)
def test_law_of_activations(strategy, exponent):
    assert law(strategy).activations == pytest.approx(exponent)
    assert law(strategy).macs == pytest.approx(0.0 if strategy == "g" else 1.0)


def fitted(name, strategy, what):
    costs = [complexity(scaled(described(name), scale, strategy)) for scale in SCALES]
    return np.polyfit(np.log(SCALES), np.log([getattr(cost, what) for cost in costs]), 1)[0]


@pytest.mark.parametrize("strategy", ["w", FAST, "dwr", "d", "r"])
def test_rounded_networks_grow_by_the_law(strategy):
    assert fitted("en_b0", strategy, "activations") == pytest.approx(law(strategy).activations, abs=0.08)
    assert fitted("en_b0", strategy, "macs") == pytest.approx(1, abs=0.05)
    assert fitted("en_b0", strategy, "params") == pytest.approx(law(strategy).params, abs=0.1)


@pytest.mark.parametrize("name", ["regnety_400mf", "regnetz_500mf", "resnet50"])
def test_the_order_of_strategies_holds_in_every_family(name):
    found = [fitted(name, strategy, "activations") for strategy in ("wg", FAST, "dwgr", "d", "r")]
    assert found == sorted(found) and found[1] < 0.6 < 0.7 < found[2]


def test_groups_that_stay_narrow_cost_less_than_was_asked():
    narrow, wide = (complexity(scaled(described("regnety_400mf"), 16, strategy)).macs for strategy in ("w", "wg"))
    assert narrow < 0.95 * wide


def test_shares_and_factors():
    assert shares(FAST) == {"d": 0.1, "w": 0.8, "g": 0.8, "r": 0.1}
    assert shares("d1_w2") == shares("d1_w2_g0_r0") == {"d": 1 / 3, "w": 2 / 3, "g": 0, "r": 0}
    assert factors("dw", 16) == (4, 2, 1, 1)
    assert factors("g", 16) == (1, 1, 16, 1)
    assert factors("r", 0.25).side == 0.5


def test_a_smaller_network_keeps_a_block_and_eight_channels():
    made = scaled(described("en_b0"), 1 / 256, "dw")
    assert set(made.depths) == {1} and min(made.widths) == 8


def test_roofline_follows_what_the_device_is_short_of():
    made = described("regnety_400mf")
    cost = complexity(made)
    computing = roofline(made, macs_a_second=1e9, bytes_a_second=1e30)
    assert computing == pytest.approx(cost.macs / 1e9)
    moving = roofline(made, macs_a_second=1e30, bytes_a_second=1e9, batch=10**12)
    maps = sum(layer.inputs * layer.before[0] * layer.before[1] for layer in layers(made)) + cost.activations
    assert moving == pytest.approx(4 * maps / 1e9)
    half = roofline(made, macs_a_second=1e30, bytes_a_second=1e9, item_bytes=2, batch=10**12)
    assert half == pytest.approx(moving / 2)


@pytest.mark.parametrize("strategy", ["", "x", "dd", "d1w2", "d1_d2", "w-1", "d_w"])
def test_refuses_other_strategies(strategy):
    with pytest.raises(UsageError, match="dwgr"):
        shares(strategy)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_refuses_other_scales(scale):
    with pytest.raises(UsageError, match="above 0"):
        factors("d", scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 2, 3)}, "3 stages"),
        ({"depths": (0, 1)}, "at least 1"),
        ({"groups": 3}, "do not divide"),
        ({"ratios": 1.5}, "whole numbers"),
        ({"kernels": 4}, "odd"),
        ({"kernels": 5}, "3 only"),
        ({"block": "basic"}, "bottleneck"),
        ({"block": "mbconv", "widths": (8, 12)}, "multiples of 8"),
        ({"squeeze": -0.1}, "at least 0"),
        ({"width": 8}, "widths"),
    ],
)
def test_refuses_numbers_that_make_no_network(change, message):
    with pytest.raises(UsageError, match=message):
        design(**{"depths": (1, 1), "widths": (8, 16), "groups": 8, **change})


def test_refuses_to_scale_the_image_away():
    with pytest.raises(UsageError, match="no pixel"):
        scaled(described("nano"), 1e-4, "r")
    with pytest.raises(UsageError, match="above 0"):
        roofline(described("nano"), macs_a_second=0, bytes_a_second=1)
    with pytest.raises(UsageError, match="multiple of 8"):
        regnet(10, 12, 5.0, 2.0, group=4)
