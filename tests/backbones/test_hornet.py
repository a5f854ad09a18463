"""HorNet: the authors' numbers of parameters, golden outputs, released names, and the arms of its effect."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones import hornet as page
from vertebra.backbones.hornet import WindowMixer, armed, effect, hornet, published
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "hornet.json"
SMALL = {"width": 16, "depths": (1, 1, 2, 1), "image_size": 64}


@pytest.mark.parametrize(
    ("variant", "params"),
    [
        ("tiny_7x7", 22_409_512),
        ("tiny_gf", 22_991_848),
        ("small_7x7", 49_528_264),
        ("small_gf", 50_401_768),
        ("base_7x7", 87_256_680),
        ("base_gf", 88_421_352),
        ("large_7x7", 194_542_504),
        ("large_gf", 196_289_512),
        ("large_gf_384", 201_806_824),
    ],
)
def test_parameters_are_exactly_the_authors(variant, params):
    with torch.device("meta"):
        backbone = hornet(variant)
    assert sum(p.numel() for p in backbone.parameters()) + backbone.width * 1000 + 1000 == params


def network(name: str) -> page.HorNet:
    if not name.startswith("small_"):
        return hornet(name)
    return hornet(f"tiny_{name[6:]}", **SMALL, grids=(None, None, 4, 2) if name == "small_gf" else (None,) * 4)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text(encoding="utf-8"))["parity"])
def test_computes_what_the_authors_networks_do(case):
    reference = stored(GOLDEN, case)
    with torch.inference_mode():
        found = named(fill(network(case.partition(" ")[0])).eval()(images(reference.shape)))
    assert max(check_golden(found, reference.golden, 1e-4).values()) < 1e-4


def test_parity_sees_the_order_the_scale_and_the_filter():
    reference = stored(GOLDEN, "small_7x7 at 49x71")
    backbone = fill(hornet("tiny_7x7", **SMALL, orders=(2, 3, 4, 5))).eval()
    for block in (stage[0] for stage in backbone.stages):
        block.mixer.mixer.scale = 1.0
    with torch.inference_mode(), pytest.raises(ParityError):
        check_golden(named(backbone(images(reference.shape))), reference.golden)


@cache
def released() -> dict[str, Tensor]:
    """Tensors with the names and shapes of the authors' tiny_gf."""
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
    shapes = dict(keys["shapes"])
    for name, shape in keys["shapes"].items():
        words = name.split(".")
        if words[0] == "stages":
            for block in range(1, keys["depths"][int(words[1])]):
                shapes[".".join((*words[:2], str(block), *words[3:]))] = shape
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_released_names_become_ours():
    backbone = hornet("tiny_gf")
    found = published(released(), backbone)
    backbone.load_state_dict(found)
    for theirs, ours in {
        "downsample_layers.0.1.weight": "stem.1.weight",
        "downsample_layers.3.1.bias": "downs.2.1.bias",
        "stages.0.1.gnconv.dwconv.weight": "stages.0.1.mixer.mixer.weight",
        "stages.2.17.gnconv.dwconv.complex_weight": "stages.2.17.mixer.mixer.spectrum",
        "stages.2.17.gnconv.dwconv.dw.weight": "stages.2.17.mixer.mixer.local.weight",
        "stages.3.0.gnconv.dwconv.post_norm.bias": "stages.3.0.mixer.mixer.after.bias",
        "stages.3.1.gnconv.pws.3.weight": "stages.3.1.mixer.steps.3.weight",
        "stages.1.2.pwconv2.weight": "stages.1.2.mlp.2.weight",
        "stages.1.2.gamma2": "stages.1.2.gamma2",
        "norm.weight": "norm.weight",
    }.items():
        assert torch.equal(found[ours].flatten(), released()[theirs].flatten()), theirs
    with pytest.raises(ParityError, match=r"left over .*spectrum|left over .*complex_weight"):
        published(released(), hornet("tiny_7x7"))


def test_images_of_384_pixels_are_squashed_as_the_authors_do():
    with torch.device("meta"):
        large, tiny = hornet("base_gf_384").preprocess, hornet("tiny_gf").preprocess
    assert (large.size, large.fit, large.crop) == ((384, 384), "squash", 1.0)
    assert (tiny.size, tiny.fit, tiny.crop) == ((224, 224), "crop", 0.875)


def test_drop_path_rises_and_drops_branches():
    backbone = hornet("nano", drop_path=0.5)
    rates = [block.drop.drop_prob for stage in backbone.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    x = images((4, 3, 32, 32))
    torch.manual_seed(0)
    first = fill(backbone).train()(x).pooled
    assert not torch.equal(first, backbone(x).pooled)
    assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_mixed_precision_trains():
    backbone = fill(hornet("nano")).train()
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images((4, 3, 32, 32)))
    features.pooled.float().square().mean().backward()
    exact = backbone(images((4, 3, 32, 32))).pooled
    assert nn.functional.cosine_similarity(features.pooled.float(), exact).min() > 0.99
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_wrong_options_are_refused():
    for options, words in (
        ({"width": 9}, "channels is 9; order 2 needs a multiple of 2"),
        ({"depths": (1, 1)}, r"depths is \(1, 1\); it needs four"),
        ({"orders": (0, 1, 1, 1)}, "must be at least 1"),
        ({"patch": 0}, "patch is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            hornet("nano", **options)
    with pytest.raises(UsageError, match="at least 16x16 pixels and got 15x40"):
        hornet("nano")(images((1, 3, 15, 40)))


def test_window_attention_stays_in_its_window():
    torch.manual_seed(0)
    mixer, x = WindowMixer(16).eval(), images((1, 16, 6, 9))
    moved = x.clone()
    moved[:, :, 0, 0] += 1
    with torch.inference_mode():
        changed = (mixer(moved) - mixer(x)).abs().amax((0, 1)) > 1e-7
    assert changed[:4, :4].all() and changed.sum() == 16


@pytest.fixture(scope="module")
def toy():
    return effect("toy", read("digits"))


def test_arms_have_the_same_parameters():
    with torch.device("meta"):
        sizes = {
            arm: sum(p.numel() for p in armed(arm, setting).parameters())
            for setting in page._SETTINGS.values()
            for arm in page._ARMS
        }
        plain = sum(p.numel() for p in hornet(width=64, depths=(2, 2, 6, 2), patch=2).parameters())
    assert max(sizes.values()) / min(sizes.values()) < 1.005
    assert sizes["rising"] == plain


def test_effect_measures_every_arm(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(16, (1, 1, 1, 1), 16, 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert len({values["nll"] for values in found.values()}) == len(found) == 7
    assert all(abs(values["more"]) < 3 for values in found.values()) and small.baseline in found
    assert small.measure("rising", 0, tmp_path) == found["rising"]


def test_effect_checks_what_the_row_asks(toy):
    def holds(**changed: float) -> list[bool]:
        top1 = dict.fromkeys(toy.arms, 60.0) | {"rising": 61.0} | changed
        values = {arm: {"top1": np.array([v, v + 1]), "more": np.array([0.1, 0.1])} for arm, v in top1.items()}
        return [check.holds for check in toy.checks(Measured(values))]

    assert holds() == [True, True, True, True]
    assert holds(order_1=60.6) == [False, True, False, True]
    assert holds(dw7=61.4) == [True, False, True, True]
    assert holds(order_3=59.4) == [True, True, False, True]
