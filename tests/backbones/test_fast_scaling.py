"""Scaled networks: counts equal to the closed form, pycls's outputs and names, options, the parts of the effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vertebra.backbones import fast_scaling as page
from vertebra.backbones.fast_scaling import VARIANTS, anynet, described, effect, fast_scaling, published
from vertebra.blocks.scaling import complexity, design, scaled
from vertebra.contracts import Level, Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored
from vertebra.spec import Spec
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "fast_scaling.json"
WHOLE = json.loads(GOLDEN.read_text(encoding="utf-8"))
OURS = [name for name, entry in VARIANTS.items() if "timm" not in entry]
MOBILE = {
    "depths": (1, 2, 1, 2),
    "widths": (8, 16, 24, 40),
    "strides": (1, 2, 2, 1),
    "ratios": (1, 6, 4, 6),
    "kernels": (3, 5, 3, 5),
    "stem_width": 16,
    "head": 64,
    "base_size": 64,
}
RESIDUAL = {
    "depths": (1, 2, 2),
    "widths": (32, 64, 96),
    "strides": (1, 2, 2),
    "ratios": 0.5,
    "groups": (4, 8, 16),
    "stem_width": 16,
    "base_size": 64,
}


def network(name: str) -> Any:
    if name.startswith("small mbconv"):
        return fast_scaling("en_b0", scale=4, **MOBILE)
    if name.startswith("small resnet"):
        return fast_scaling("resnet50", scale=6, strategy="dwgr", **RESIDUAL)
    return fast_scaling(name)


@pytest.mark.parametrize("variant", OURS)
def test_counts_equal_the_closed_form(variant):
    with torch.device("meta"):
        backbone = network(variant)
    for size in (None, (97, 131)):
        assert count(backbone, size=size) == complexity(backbone.design, size=size)
    with torch.device("meta"):
        assert count(fast_scaling(variant, channels=1)).params == complexity(backbone.design, channels=1).params


@pytest.mark.parametrize(("stem", "block"), [("small", "linear"), ("resnet", "bottleneck"), ("small", "mbconv")])
def test_counts_equal_the_closed_form_for_other_designs(stem, block):
    made = design(depths=(2, 1), widths=(16, 24), groups=8, ratios=(1, 2), stem=stem, block=block, squeeze=0, size=33)
    with torch.device("meta"):
        assert count(anynet(made)) == complexity(made)


@pytest.mark.parametrize("case", WHOLE["parity"])
def test_computes_what_the_authors_networks_do(case):
    reference = stored(GOLDEN, case)
    name = case.rpartition(" at ")[0]
    backbone = fill(network(name)).train("training" in name)
    with torch.no_grad():
        found = named(backbone(images(reference.shape)))
    assert max(check_golden(found, reference.golden, 1e-4).values()) < 1e-4


@pytest.mark.parametrize("case", WHOLE["keys"])
def test_takes_the_authors_names(case):
    backbone = network(case)
    torch.manual_seed(0)
    state = {name: torch.rand(shape) for name, shape in WHOLE["keys"][case].items()}
    backbone.load_state_dict(published(state, backbone))
    spatial = "s2.b1.dwise.weight" if "mbconv" in case else "s2.b1.f.b.weight"
    block = backbone.stages["s2"].b1
    found = block.conv_dw if "mbconv" in case else block.conv2.conv
    assert torch.equal(found.weight, state[spatial])
    assert torch.equal(backbone.stem.bn.running_var, state["stem.bn.running_var"])
    del state["stem.conv.weight"]
    with pytest.raises(ParityError, match="stem"):
        published(state, backbone)


def test_maps_are_the_deepest_of_each_stride():
    backbone = network("small mbconv").eval()
    assert backbone.levels == (Level(16, 2), Level(24, 4), Level(72, 8))
    assert backbone.width == backbone.design.head == 112
    with torch.inference_mode():
        maps = backbone(images((2, 3, 49, 71))).pyramid
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 25, 36), (24, 13, 18), (72, 7, 9)]


def test_options_win_and_image_size_is_what_comes_out():
    with torch.device("meta"):
        backbone = Spec(
            "fast_scaling/regnety_400mf_4x", {"scale": 16, "image_size": 160, "depths": [1, 1, 2, 2]}
        ).build()
    assert backbone.design == scaled(described("regnety_400mf", depths=(1, 1, 2, 2)), 16)
    assert backbone.design.size == 256 and backbone.preprocess.size == (160, 160)
    assert described("resnext50_4x") == scaled(described("resnext50"), 4)
    assert described("resnext50").depths == described("resnet50").depths


def test_drop_path_rises_over_the_blocks():
    backbone = fast_scaling("en_b0", scale=4, drop_path=0.2, **MOBILE)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in backbone.trunk()[1:-1]]
    assert rates == pytest.approx(np.linspace(0, 0.2, len(rates)))


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("500mf", {"scale": 4}, "is not scaled"),
        ("en_b0", {"network": {"act_layer": "relu"}}, "not timm's"),
        ("en_b1", {}, "no variant"),
        ("en_b0", {"scale": 0}, "above 0"),
        ("en_b0", {"strategy": "z", "scale": 2}, "strategy"),
        ("nano", {"groups": 5}, "do not divide"),
        ("nano", {"drop_path": 1.0}, "drop_path"),
    ],
)
def test_refusals_say_what_works(variant, options, message):
    with pytest.raises(UsageError, match=message):
        fast_scaling(variant, **options)


def test_timm_has_the_base_network_too():
    with torch.device("meta"):
        theirs, ours = count(fast_scaling("500mf")), count(fast_scaling("regnetz_500mf"))
    assert theirs == ours


def test_arms_of_the_effect_have_nearly_the_same_macs():
    base = page._SETTINGS["toy"].base
    costs = {arm: complexity(scaled(base, 4, strategy)) for arm, (_, strategy) in page._ARMS.items() if arm != "base"}
    macs = np.array([cost.macs for cost in costs.values()])
    assert max(abs(macs / macs.mean() - 1)) < 0.07
    assert costs["w"].activations < costs["dWr"].activations < 0.8 * costs["dwr"].activations


def test_checks_of_the_effect_see_both_sides():
    arms, scales = list(page._ARMS), page._SCALES
    base = page._SETTINGS["toy"].base

    def measured(time_of, gap):
        values = {}
        for arm in arms:
            top1 = np.array([50.0, 51.0, 52.0]) - gap * (arm == "dwr")
            grown = {} if arm == "base" else {f: complexity(scaled(base, f, page._ARMS[arm][1])) for f in scales}
            times = {f"ms_{f}x": np.full(3, float(time_of(cost))) for f, cost in grown.items()}
            values[arm] = {"top1": top1, **times}
        return page._checks(Measured(values), base=base)

    assert [check.holds for check in measured(lambda cost: cost.activations, 1.0)] == [True, True, True]
    assert [check.holds for check in measured(lambda cost: cost.macs, 3.0)] == [False, False, True]


def test_the_effect_measures_an_arm(tmp_path, monkeypatch):
    tiny = design(depths=(1, 1), widths=(8, 16), groups=8, stem_width=8, size=16)
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(tiny, 64, 1, 4))
    experiment = effect("toy", read("digits"))
    found = experiment.measure("w", 0, tmp_path)
    assert set(found) == set(experiment.metrics) and 0 <= found["top1"] <= 100
    assert found["macs"] == complexity(scaled(tiny, 4, "wg")).macs / 1e6 and found["ms_8x"] > 0
    assert np.isnan(experiment.measure("base", 0, tmp_path)["ms_2x"])
