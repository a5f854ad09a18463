"""Res2Net: the authors', timm's and Paddle's outputs and names, the networks for CIFAR, and the effect's networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers.squeeze_excite import SEModule
from timm.models.res2net import Bottle2neck
from timm.models.resnet import ResNet

from vertebra.backbones import res2net as page
from vertebra.backbones.res2net import Res2Net, effect, published, res2net
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "res2net.json"
WHOLE = {"dims": (256, 512, 1024, 2048), "stem": "plain"}


@pytest.mark.parametrize(
    ("name", "options", "mode"),
    [
        ("26w_4s", {"depths": (2, 2, 1, 1)}, False),
        ("14w_8s training", {"depths": (1, 2, 1, 1), "width": 14, "scales": 8}, True),
        ("v1b", {"depths": (2, 2, 1, 1), "stem": "deep", "shortcut": "pool"}, False),
        ("next", {"depths": (2, 2, 1, 1), "width": 4, "cardinality": 8}, False),
    ],
)
def test_computes_what_the_authors_do(name, options, mode):
    reference = stored(GOLDEN, name)
    backbone = fill(res2net("nano", **{**WHOLE, **options})).train(mode)
    with torch.inference_mode():
        assert max(check_golden(named(backbone(images(reference.shape))), reference.golden, 1e-5).values()) < 1e-5


TIMM = {
    "4 scales": ({}, {"block_args": {"scale": 4}}),
    "one scale": ({"scales": 1}, {"block_args": {"scale": 1}}),
    "d, se": (
        {"stem": "deep", "shortcut": "pool", "attention": "se"},
        {"stem_type": "deep", "stem_width": 32, "avg_down": True, "block_args": {"scale": 4, "attn_layer": SEModule}},
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_weights_give_timms_outputs(name):
    options, theirs = TIMM[name]
    ours = res2net("nano", **{**WHOLE, "depths": (1, 2, 1, 1), **options})
    network = fill(ResNet(Bottle2neck, layers=(1, 2, 1, 1), base_width=26, **theirs))
    ours.load_state_dict(published(network.state_dict(), ours))
    batch = images((3, 3, 65, 47))
    for mode in (True, False):
        with torch.inference_mode():
            expected = network.train(mode).forward_features(batch)
            assert difference(ours.train(mode)(batch).pyramid[-1], expected) < 1e-5


def test_the_authors_names_become_ours_for_any_channels():
    listed = (line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["v1b"].split())
    shapes = {name: [int(side) for side in sides.split("x")] for name, sides in listed}
    state = {f"module.{name}": torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    options = {**WHOLE, "depths": (2, 2, 1, 1), "stem": "deep", "shortcut": "pool"}
    backbone = res2net("nano", **options)
    found = published(state, backbone)
    assert found.keys() == backbone.state_dict().keys()
    for ours, theirs in (
        ("stem.6.weight", "conv1.6.weight"),
        ("stem.7.bias", "bn1.bias"),
        ("stages.1.0.chain.bns.2.running_var", "layer2.0.bns.2.running_var"),
        ("stages.3.0.shortcut.1.weight", "layer4.0.downsample.1.weight"),
    ):
        assert torch.equal(found[ours], state[f"module.{theirs}"])
    grey = res2net("nano", **options, channels=1)
    assert published(state, grey)["stem.0.weight"].shape == (32, 1, 3, 3)
    with pytest.raises(ParityError, match=r"left over in the checkpoint"):
        published(state, res2net("nano", **{**options, "scales": 3}))


def paddle(depths: tuple[int, ...], scales: int = 4) -> dict[str, torch.Tensor]:
    """Names of PaddleClas's `res2net_vd` for filled weights; the third stage of a deep network counts its blocks."""
    names = {f"conv1_{n + 1}": f"stem.{3 * n}|stem.{3 * n + 1}" for n in range(3)}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            theirs, ours = f"bb_{stage}_{block}", f"stages.{stage}.{block}"
            place = chr(97 + block) if stage != 2 or depth < 7 or not block else f"b{block}"
            names |= {f"{theirs}.conv0": f"{ours}.conv1|{ours}.bn1", f"{theirs}.conv2": f"{ours}.conv3|{ours}.bn3"}
            for n in range(scales - 1):
                key = f"{theirs}.res{stage + 2}{place}_branch2b_{n + 1}"
                names[key] = f"{ours}.chain.convs.{n}|{ours}.chain.bns.{n}"
            if not block:
                names[f"{theirs}.short"] = f"{ours}.shortcut.1|{ours}.shortcut.2"
    leaves = {"weight": "weight", "bias": "bias", "running_mean": "_mean", "running_var": "_variance"}
    backbone = fill(res2net("200_vd", depths=depths))
    found = {}
    for key, pair in names.items():
        conv, norm = (backbone.get_submodule(name) for name in pair.split("|"))
        found[f"{key}._conv.weight"] = conv.weight.detach()
        found |= {f"{key}._batch_norm.{leaf}": getattr(norm, ours).detach() for ours, leaf in leaves.items()}
    return {**found, "out.weight": torch.zeros(2048, 1000), "out.bias": torch.zeros(1000)}


@pytest.mark.parametrize("depths", [(1, 2, 7, 1), (2, 1, 1, 1)])
def test_paddles_names_become_ours(depths):
    backbone, filled = res2net("200_vd", depths=depths), fill(res2net("200_vd", depths=depths)).state_dict()
    released = paddle(depths)
    if depths == (1, 2, 7, 1):  # the reference's own list
        listed = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["200_vd short"].split()
        assert {f"{name}:{'x'.join(map(str, tensor.shape))}" for name, tensor in released.items()} == set(listed)
    found = published(released, backbone)
    assert found.keys() == filled.keys() and all(torch.equal(found[name], filled[name]) for name in filled)


def test_computes_what_paddle_does():
    reference = stored(GOLDEN, "200_vd short")
    backbone = fill(res2net("200_vd", depths=(1, 2, 7, 1))).eval()
    with torch.inference_mode():
        assert max(check_golden(named(backbone(images(reference.shape))), reference.golden, 1e-5).values()) < 1e-5


def test_editions_differ_in_the_first_block_and_in_padding():
    batch = images((2, 3, 65, 47))
    one, other = (fill(res2net("nano", edition=edition)).eval() for edition in ("authors", "paddle"))
    assert isinstance(one, Res2Net) and isinstance(other, Res2Net)
    with torch.inference_mode():
        found = [backbone(batch).pyramid[0] for backbone in (one, other)]
    assert difference(*found) > 0.01
    assert [type(backbone.stages[0][0].chain.pool).__name__ for backbone in (one, other)] == ["AvgPool2d", "Identity"]
    assert [backbone.stages[1][0].chain.pool.count_include_pad for backbone in (one, other)] == [True, False]


def test_the_networks_for_cifar_stand_on_resnext_29():
    """The paper's baseline of 34.4 M with 10 classes, 35.1 M with squeeze-and-excitation."""
    with torch.device("meta"):
        plain, se = (res2net(f"next29_6c_24w_4s{suffix}", scales=1, width=64, cardinality=8) for suffix in ("", "_se"))
        cost = count(res2net("next29_6c_24w_4s"), size=(32, 32))
    sizes = [(sum(p.numel() for p in network.parameters()) + 10 * 1025) / 1e6 for network in (plain, se)]
    assert sizes == pytest.approx([34.4, 35.1], rel=0.005)
    assert cost.macs / 1e9 == pytest.approx(3.852, abs=0.001)


def test_drop_path_rises_and_acts_in_training_alone():
    backbone = fill(res2net("nano", drop_path=0.5))
    assert isinstance(backbone, Res2Net)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in backbone.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    batch = images((2, 3, 32, 32))
    with torch.inference_mode():
        torch.testing.assert_close(backbone.eval()(batch).pooled, fill(res2net("nano")).eval()(batch).pooled)


def test_wrong_options_are_refused():
    for variant, options, says in (
        ("50_26w_4s", {"scales": 2}, "is timm's network and has no option scales"),
        ("nano", {"network": {"pad_type": "same"}}, "none of timm's networks"),
        ("nano", {"depths": (1, 1)}, "a number for each stage"),
        ("nano", {"dims": (66, 128, 256)}, "multiples of 4"),
        ("nano", {"width": 3}, "take at least 4"),
        ("nano", {"scales": 0}, "scales is 0"),
        ("nano", {"stem": "wide"}, "stem is 'wide'; it can be plain or deep or small"),
        ("nano", {"form": "stage"}, "form is 'stage'"),
        ("nano", {"weights": "pretrained"}, "no weights that are fetched"),
        ("nanno", {}, "no variant 'nanno'"),
    ):
        with pytest.raises(UsageError, match=says):
            res2net(variant, **options)


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_the_effects_networks_cost_the_same(scale):
    setting = page._SETTINGS[scale]
    with torch.device("meta"):
        found = {arm: count(page._network(arm, setting), size=(setting.size,) * 2).macs for arm in page._ARMS}
    assert all(abs(macs / found["resnet"] - 1) < 0.03 for macs in found.values())
    assert found["s4"] == found["parallel"]


def test_a_chain_sees_further(monkeypatch):
    setting, test = (
        page._Setting((2, 2), (32, 64), {1: 64, 4: 26}, 16, 0, 0, 0),
        read("digits").split("test").select(range(8)),
    )
    monkeypatch.setattr(page, "_FIELD", 32)
    torch.manual_seed(0)
    found = {arm: page._field(page._network(arm, setting).eval(), test) for arm in ("resnet", "s4", "parallel")}
    assert 1 < found["parallel"]["radius"] < found["s4"]["radius"]
    assert found["resnet"]["radius"] < found["s4"]["radius"] < 16
    assert 0 < found["s4"]["half"] < 100


def test_the_effect_trains_every_arm(tmp_path, monkeypatch):
    monkeypatch.setitem(
        page._SETTINGS, "toy", page._Setting((1, 2), (32, 64), {1: 64, 2: 48, 4: 32, 8: 16}, 8, 64, 64, 1)
    )
    monkeypatch.setattr(page, "_FIELD", 8)
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert list(found) == ["resnet", "s2", "s4", "s8", "parallel"] and small.baseline == "resnet"
    assert all(set(values) == set(small.metrics) for values in found.values())
    assert found["s4"]["nll"] != found["parallel"]["nll"] and found["s4"]["macs"] == found["parallel"]["macs"]
    assert small.measure("s4", 0, tmp_path) == found["s4"]


def test_checks_read_the_measurements():
    found = effect("toy", read("digits"))

    def checks(s4: float, parallel: float, radius: float, macs: float) -> list[bool]:
        values = {
            arm: {"top1": np.full(2, 60.0), "radius": np.full(2, 8.0), "macs": np.full(2, 10.0)} for arm in found.arms
        }
        values["s4"] = {"top1": np.full(2, s4), "radius": np.full(2, radius), "macs": np.full(2, macs)}
        values["parallel"]["top1"] = np.full(2, parallel)
        return [check.holds for check in found.checks(Measured(values))]

    assert checks(60.6, 60.2, 9.3, 10.2) == [True, True, True, True]
    assert checks(60.4, 60.2, 9.1, 9.6) == [False, False, False, False]
