"""The study of patch sizes: what is equal between its arms, the fit of the law, and what its checks ask."""

import json

import numpy as np
import pytest
import torch

from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import difference, images
from vertebra.studies import patchification as study
from vertebra.studies.patchification import (
    FAMILIES,
    METRICS,
    SETTINGS,
    Enlarged,
    Setting,
    costs,
    effect,
    law,
    network,
    patchification,
    segmented,
    sweep,
    waves,
)

TINY = Setting({32: (8, 4, 2), 16: (8, 4)}, 16, 1, 4, images=48, epochs=1, batch=16, scenes=16, rounds=1)


def test_the_law_is_the_line_through_logarithms():
    tokens = [4, 16, 64, 256]
    found = law(tokens, [3 * count**-0.25 for count in tokens])
    assert found.exponent == pytest.approx(-0.25) and found.r2 == pytest.approx(1) and found.points == 4
    assert found.interval == pytest.approx((-0.25, -0.25), abs=1e-6)
    # by hand: logarithms (0, 1, 2) and (0, 1, 1): slope 1/2, residual variance 1/6, slope's error sqrt(1/12)
    noisy = law(np.exp([0, 1, 2]).tolist(), np.exp([0, 1, 1]).tolist())
    assert noisy.exponent == pytest.approx(0.5) and noisy.r2 == pytest.approx(0.75)
    assert noisy.interval[1] - noisy.exponent == pytest.approx(12.706 / 12**0.5, rel=1e-4)


def test_the_law_needs_points():
    with pytest.raises(UsageError, match=r"3 numbers of tokens \(1 different\)"):
        law([4, 4, 4], [1.0, 1.1, 1.2])
    with pytest.raises(UsageError, match="smallest loss is 0"):
        law([4, 16, 64], [1.0, 0.0, 2.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_differ_in_their_patches_alone(family):
    trained = {
        patch: sum(p.numel() for p in network(family, patch, 16, TINY).parameters() if p.requires_grad)
        for patch in (8, 4, 1)
    }
    filters = 3 * TINY.dim  # numbers of the embedding a pixel of a patch
    assert trained[8] - trained[4] == filters * (64 - 16) and trained[4] - trained[1] == filters * (16 - 1)
    learned = network(family, 4, 16, TINY, "learned")
    assert sum(p.numel() for p in learned.parameters() if p.requires_grad) == trained[4] + 17 * TINY.dim


def test_a_place_has_the_same_waves_whatever_the_patch():
    fine, coarse = waves(16, 1, 32)[0, 1:].view(16, 16, 32), waves(16, 4, 32)[0, 1:].view(4, 4, 32)
    assert torch.equal(coarse, fine[::4, ::4])
    assert not waves(16, 4, 32)[0, 0].any()
    assert len({tuple(row) for row in fine.flatten(0, 1).tolist()}) == 256  # no two places alike
    assert torch.equal(fine[3, 5, :16], fine[3, 9, :16]) and torch.equal(fine[3, 5, 16:], fine[8, 5, 16:])


@pytest.mark.parametrize("address", ["adventurer/nano", "timm/vit_tiny_patch16_224"])
def test_costs_follow_the_tokens(address):
    rows = costs(address, (8, 4, 2), image_size=32)
    assert [row["tokens"] for row in rows] == [16, 64, 256]
    assert rows[0]["macs"] < rows[1]["macs"] < rows[2]["macs"]
    grown = (rows[2]["activations"] / rows[1]["activations"], rows[1]["activations"] / rows[0]["activations"])
    assert 3 < grown[1] < grown[0] < 4


def test_sweep_trains_each_patch_and_seed_on_any_network():
    def mine(patch: int, size: int):
        return network("adventurer", patch, size, TINY)

    rows = sweep(read("digits"), (8, 4), size=16, families=("vit", mine), seeds=(0, 1), setting=TINY)
    assert [(row.family, row.patch, row.seed, row.tokens) for row in rows[:4]] == [
        ("vit", 8, 0, 4),
        ("vit", 8, 1, 4),
        ("vit", 4, 0, 16),
        ("vit", 4, 1, 16),
    ]
    assert {row.family for row in rows[4:]} == {"mine"} and len(rows) == 8
    assert len({row.loss for row in rows}) == 8 and all(1 < row.loss < 5 for row in rows)
    again = sweep("digits", (4,), size=16, families=("vit",), seeds=(1,), setting=TINY)
    assert again[0]._replace(seconds=0) == rows[3]._replace(seconds=0)


def test_sweep_refuses_what_cannot_be_trained():
    with pytest.raises(UsageError, match=r"patches are \[64\]; they must lie in 1..32"):
        sweep(patches=(64,))
    with pytest.raises(UsageError, match="no family 'vlt'"):
        sweep(families=("vlt",))
    with pytest.raises(UsageError, match="at least one patch size"):
        sweep(patches=())
    with pytest.raises(UsageError, match="make no law"):
        patchification(patches={32: (8,)})
    with pytest.raises(UsageError, match="no head 'conv'"):
        segmented(8, "conv", 0, TINY)


def test_the_study_fits_a_law_for_each_family_and_size(monkeypatch):
    monkeypatch.setattr(study, "costs", lambda: [])
    report = patchification(data=read("digits"), patches={16: (8, 4, 2)}, families=("vit",), setting=TINY)()
    score = report.scores["exponent_vit_16"]
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]
    assert [row["patch"] for row in report.details["rows"]] == [8, 4, 2]
    assert json.loads(json.dumps(report.details))["laws"]["vit_16"]["points"] == 3


def test_enlarged_images_are_the_same_pixels_in_more_tokens():
    inner = network("vit", 8, 64, TINY).eval()
    model, x = Enlarged(inner, 2), images((2, 3, 32, 32))
    assert model.preprocess.size == (32, 32) and model.trunk() == inner.trunk()
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    with torch.inference_mode():
        assert difference(model(x).pooled, inner(large).pooled) == 0
        assert model(x).pyramid[0].shape[2:] == (8, 8)


def test_scenes_know_the_class_of_each_pixel():
    pixels, classes = study._scenes("train", 8)
    assert pixels.shape == (8, 3, 32, 32) and classes.shape == (8, 32, 32)
    assert classes.min() == 0 and set(classes.unique().tolist()) <= set(range(5)) and (classes > 0).any((1, 2)).all()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(study.SETTINGS, "toy", TINY)
    return effect("toy", read("digits"))


def test_arms_measure_what_they_say(tiny, tmp_path):
    found = {
        arm: tiny.measure(arm, 0, tmp_path)
        for arm in ("vit_32_p8", "vit_32_p4", "vit_enlarged_p8", "adventurer_16_p8", "dense_linear_p8")
    }
    assert all(set(row) == set(METRICS) for row in found.values())
    tokens = {arm: row["tokens"] for arm, row in found.items()}
    assert tokens == {
        "vit_32_p8": 16,
        "vit_32_p4": 64,
        "vit_enlarged_p8": 64,
        "adventurer_16_p8": 4,
        "dense_linear_p8": 16,
    }
    assert np.isnan(found["dense_linear_p8"]["loss"]) and 0 <= found["dense_linear_p8"]["miou"] <= 100
    assert np.isnan(found["vit_32_p8"]["miou"]) and found["vit_32_p8"]["loss"] > 0
    assert found["vit_32_p4"]["mmacs"] > 3 * found["vit_32_p8"]["mmacs"]
    assert tiny.measure("adventurer_16_p8", 0, tmp_path)["loss"] == found["adventurer_16_p8"]["loss"]


def test_toy_arms_cover_the_row():
    arms = study._arms(SETTINGS["toy"])
    for family in FAMILIES:
        assert {f"{family}_32_p{p}" for p in (8, 4, 2)} <= set(arms)
        assert {f"{family}_16_p{p}" for p in (8, 4, 2, 1)} <= set(arms)
    assert {f"dense_{head}_p{p}" for head in ("linear", "decoder") for p in (8, 2)} <= set(arms)


def test_checks_ask_what_the_row_asks(tiny):
    def measured(losses: tuple[float, ...], enlarged: float, gaps: tuple[float, float]) -> Measured:
        values = {}
        for arm in tiny.arms:
            what, side = arm.split("_")[1], int(arm.rpartition("p")[2])
            loss = enlarged if what == "enlarged" else losses[(8, 4, 2).index(side)]
            miou = 50 + (gaps[side == 2] if what == "decoder" else 0)
            row = {"loss": loss, "miou": miou, "tokens": (32 // side) ** 2}
            values[arm] = {name: np.array([value, value]) for name, value in row.items()}
        return Measured(values)

    good = tiny.checks(measured((2.0, 1.8, 1.7), 1.95, (5, 1)))
    assert [check.holds for check in good] == [True] * 5
    bad = tiny.checks(measured((2.0, 1.8, 1.85), 1.75, (1, 1)))
    assert [check.holds for check in bad] == [False] * 5
    assert "exponent" in good[0].found and "p2 1.700" in good[0].found and "p = 2: +1.0 points" in good[4].found
