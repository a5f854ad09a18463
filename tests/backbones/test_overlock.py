"""OverLoCK: published counts of the fused form, parity with the authors' networks, their names, the effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vertebra.backbones import overlock as page
from vertebra.backbones.overlock import OverLoCK, OverviewSupervised, effect, overlock, published, surroundings
from vertebra.contracts import Batch, Measured, Progress
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.operation import put
from vertebra.tasks.classify import classify
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "overlock.json"
FUSED = {"xt": 16.453712, "t": 33.46704, "s": 56.156452, "b": 94.942528}  # the authors' networks, deploy=True
TINY = {
    "dims": (8, 16, 32, 64),
    "depths": (1, 2, 1, 1),
    "focus": (2, 1),
    "heads": (2, 2),
    "kernels": (9, 7, 7, 5),
    "width": 64,
    "stem_stride": 4,
}


def tiny(**options) -> OverLoCK:
    return overlock("nano", **{**TINY, **options})


@pytest.mark.parametrize("variant", FUSED)
def test_parameters_of_the_fused_form_are_the_published_ones(variant):
    with torch.device("meta"):
        backbone = overlock(variant).eval()
        for name in [name for name, module in backbone.named_modules() if type(module).__name__ == "DilatedReparam"]:
            put(backbone, name, backbone.get_submodule(name).fused())
    assert sum(p.numel() for p in backbone.parameters()) + 1025 * 1000 == round(FUSED[variant] * 1e6)


@pytest.mark.parametrize("name", ["tiny", "tiny_odd", "tiny_training", "xt"])
def test_parity_with_the_authors_networks(name):
    reference = stored(GOLDEN, name)
    backbone = fill(tiny() if name.startswith("tiny") else overlock("xt")).train(name.endswith("training"))
    with torch.no_grad():
        features, overview = backbone.look(images(reference.shape))
    found = {**named(features), "overview": overview}
    assert max(check_golden(found, reference.golden, 2e-5).values()) < 2e-5


def authors_state() -> dict[str, Tensor]:
    """Random tensors under the authors' names, of their shapes."""
    shapes = [entry.split(":") for entry in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["tiny"].split()]
    torch.manual_seed(0)
    return {name: torch.rand([int(side) for side in shape.split("x") if side]) for name, shape in shapes}


def test_released_names_become_ours():
    backbone, state = tiny(), authors_state()
    found = published(state, backbone)
    backbone.load_state_dict(found)
    pairs = {
        "blocks2.1.proj.1.dil_conv_k3_3.weight": "stages.1.2.large.convs.4.weight",
        "blocks1.0.proj.1.dil_bn_k7_1.bias": "stages.0.1.large.norms.2.bias",
        "sub_blocks3.1.weight_key.1.weight": "focus.1.mix.key.1.weight",
        "sub_blocks4.0.rpb2": "last.0.mix.far",
        "sub_blocks4.0.h_scale.bias": "last.0.anew.bias",
        "patch_embedx.h_proj.0.weight": "down_context.0.weight",
        "head.1.running_mean": "head.1.running_mean",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    assert torch.equal(found["stages.2.1.keep.gain"], state["blocks3.0.ls.weight"].flatten())
    del state["sub_blocks3.0.rpb1"]
    with pytest.raises(ParityError, match=r"missing from it: focus\.0\.mix\.near"):
        published(state, backbone)


def test_a_released_file_loads(tmp_path):
    file = tmp_path / "released.pth"
    torch.save(authors_state(), file)
    backbone = tiny(weights=str(file), allow_pickle=True)
    assert torch.equal(backbone.squeeze.weight, authors_state()["high_level_proj.weight"])


def test_fused_form_computes_the_same():
    backbone = fill(tiny()).eval()
    operated = fuse(backbone)
    kinds = {type(module).__name__ for module in operated.model.modules()}
    assert not kinds & {"DilatedReparam", "ResidualDepthwise"}
    x = images((2, 3, 97, 65)).double()
    with torch.inference_mode():
        torch.testing.assert_close(operated.model.double()(x).pooled, backbone.double()(x).pooled, rtol=1e-4, atol=0.1)
    first = next(m for m in backbone.modules() if type(m).__name__ == "ResidualDepthwise")
    y = images((1, first.in_channels, 9, 7)).double()
    with torch.inference_mode():
        torch.testing.assert_close(first.fused()(y), first(y), rtol=1e-12, atol=1e-12)


def test_levels_are_those_of_the_authors_detectors():
    with torch.device("meta"):
        backbone = overlock("xt")
    assert [(level.channels, level.stride) for level in backbone.levels] == [(56, 4), (112, 8), (340, 16), (420, 32)]
    assert backbone.width == 1024
    parts = backbone.trunk()
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(p.numel() for p in backbone.parameters())


def test_the_overview_has_a_loss_of_its_own():
    torch.manual_seed(0)
    model = classify(tiny(), ["one", "other"])
    method = OverviewSupervised(model).train()
    losses = method(Batch(images((4, 3, 64, 64)), torch.tensor([0, 1, 0, 1]), torch.arange(4)), Progress(0, 1, 0, 1))
    assert set(losses) == {"classify", "overview"} and 0.1 < losses["overview"] < 0.6
    losses["overview"].backward()
    assert model.backbone.stages[3][1].mlp[0].weight.grad.any() and model.head.weight.grad is None
    assert not {name for name in model.state_dict() if "overview" in name}
    with pytest.raises(UsageError, match="takes a classifier on an OverLoCK"):
        OverviewSupervised(classify(Spec("cifar_resnet/nano").build(), ["one", "other"]))


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="has no variant 'xxt'"):
        overlock("xxt")
    with pytest.raises(UsageError, match=r"kernels is \(17, 15, 13, 8\); each is one of 5, 7"):
        overlock("xt", kernels=(17, 15, 13, 8))
    with pytest.raises(UsageError, match=r"depths is \(1, 2\); it needs 4 numbers"):
        overlock("xt", depths=(1, 2))
    with pytest.raises(UsageError, match="stem_stride is 3"):
        overlock("xt", stem_stride=3)
    with pytest.raises(UsageError, match="it must be a multiple of 20"):
        overlock("xt", heads=(5, 6))


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_have_equal_macs(scale):
    with torch.device("meta"):
        macs = {arm: count(page._arm(arm, page._SETTINGS[scale])).macs for arm in page._ARMS}
        params = {arm: sum(p.numel() for p in page._arm(arm, page._SETTINGS[scale]).parameters()) for arm in page._ARMS}
    assert macs["no_overview"] == macs["full"] and macs["static"] == pytest.approx(macs["full"], rel=0.01)
    assert params["no_overview"] == params["full"]


def test_arms_differ_in_what_they_say():
    x = images((2, 3, 32, 32))
    setting = page._Setting(8, 1, {**page._NARROW, "dims": (8, 8, 16, 16), "width": 16}, 3.0)
    found = {arm: surroundings(fill(page._arm(arm, setting)), x) for arm in page._ARMS}
    assert found["static"][0] == 0 < found["no_overview"][0] and found["full"][0] > 0
    assert all(0 < field < 100 for _, field in found.values())
    blind = fill(page._arm("no_overview", setting)).eval()
    with torch.inference_mode():
        assert not blind.squeeze(images((1, 16, 2, 2))).any()


def test_effect_measures_three_arms(tmp_path, monkeypatch):
    narrow = {"image_size": 16, "dims": (8, 8, 16, 16), "width": 16, "kernels": (5, 5, 5, 5)}
    setting = page._Setting(48, 1, narrow, 3.0)
    monkeypatch.setitem(page._SETTINGS, "toy", setting)
    small = effect("toy", read("digits"))
    found = small.measure("full", 0, tmp_path)
    assert set(found) == set(small.metrics) and 0 <= found["top1"] <= 100 and found["kernels"] > 0
    assert small.baseline in small.arms and set(small.arms) == {"full", "no_overview", "static"}


def test_effect_checks_what_the_row_asks():
    toy = effect("toy", read("digits"))

    def measured(top1: float, kernels: float, field: float) -> Measured:
        values = {
            arm: {"top1": np.array([60.0, 61.0]), "kernels": np.zeros(2), "field": np.full(2, 20.0)} for arm in toy.arms
        }
        values["full"] = {"top1": np.array([top1] * 2), "kernels": np.full(2, kernels), "field": np.full(2, field)}
        return Measured(values)

    assert [check.holds for check in toy.checks(measured(62, 5, 25))] == [True] * 4
    assert [check.holds for check in toy.checks(measured(60, 0.5, 19))] == [False] * 4
