"""LSNet: the authors' outputs, names and start; fused form; maps of other sizes; its effect."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.lsnet import RepDepthwise, effect, lsnet, published
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.surgery.fuse import fuse

GOLDEN = Path(__file__).parents[1] / "golden" / "lsnet.json"
TINY = {"dims": (16, 32, 48, 64), "depths": (2, 2, 2, 4), "halvings": 3, "image_size": 128}


@pytest.mark.parametrize(("name", "mode"), [("t", False), ("tiny", False), ("tiny training", True)])
def test_computes_what_the_authors_do(name, mode):
    """Evaluation at the native size and a smaller odd one, and training with its batch statistics."""
    reference = stored(GOLDEN, name)
    backbone = lsnet("t") if name == "t" else lsnet("nano", **TINY)
    with torch.inference_mode():
        found = fill(backbone).train(mode)(images(reference.shape))
    assert max(check_golden(named(found), reference.golden).values()) < 1e-4


def released(variant: str) -> dict[str, torch.Tensor]:
    """The authors' names and shapes, with a number of its own in each tensor."""
    listed = (line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"][variant].split())
    shapes = {name: [int(side) for side in sides.split("x")] for name, sides in listed}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_released_names_become_ours():
    backbone, state = lsnet("t"), released("t")
    found = published(state, backbone)
    backbone.load_state_dict(found)
    assert torch.equal(backbone.norm.bias, state["head.bn.bias"])
    assert torch.equal(backbone.stages[3][3].mixer.bias, state["blocks4.3.mixer.m.attention_biases"])
    assert torch.equal(
        backbone.stages[1][3].mixer.perception.look.conv.weight, state["blocks2.3.mixer.lkp.cv2.c.weight"]
    )
    assert torch.equal(found["stages.2.0.conv.weight"], state["blocks3.0.c.weight"])
    distilled = {**state, "head_dist.l.weight": torch.zeros(1000, 384), "head_dist.bn.weight": torch.zeros(384)}
    assert published(distilled, backbone).keys() == found.keys()
    with pytest.raises(ParityError, match=r"left over in the checkpoint: blocks"):
        published(state, lsnet("nano"))


def test_starts_as_the_authors_do():
    """Residual branches of feed-forward and attention start at zero, the biases of attention too."""
    backbone = lsnet("nano")
    names = [name for name, p in backbone.named_parameters() if p.ndim == 1 and "weight" in name and not p.any()]
    assert len([name for name in names if "ffn.narrow.norm" in name]) == 6
    assert [name for name in names if "ffn" not in name] == ["stages.3.3.mixer.proj.norm.weight"]
    assert not backbone.stages[3][3].mixer.bias.any()


def test_blocks_alternate():
    kinds = [[type(block.mixer).__name__ for block in stage if hasattr(block, "mixer")] for stage in lsnet("t").stages]
    assert kinds == [[], ["RepDepthwise", "LSConv"], ["RepDepthwise", "LSConv"] * 4, ["RepDepthwise", "Attention"] * 5]


def test_depthwise_branches_become_one_convolution():
    block = fill(RepDepthwise(24)).double().eval()
    x = images((2, 24, 9, 7)).double()
    fused = block.fused()
    assert [type(module) for module in fused.modules()] == [nn.Conv2d]
    with torch.inference_mode():
        assert difference(fused(x), block(x)) < 1e-13


def test_a_fused_network_keeps_its_outputs():
    backbone = fill(lsnet("nano")).eval()
    fused = fuse(backbone).model
    left = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ["stages.1.3.mixer.norm", "stages.2.3.mixer.norm"]  # those behind an aggregation, no convolution
    x = images((2, 3, 49, 64)).double()
    with torch.inference_mode():
        expected, found = named(copy.deepcopy(backbone).double()(x)), named(fuse(backbone.double()).model(x))
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-11


def test_biases_follow_the_distance_at_any_size():
    attention = fill(lsnet("nano", image_size=64)).stages[3][3].mixer  # maps of 4 x 4
    table = attention.bias.detach().unflatten(1, (4, 4))
    near = attention._biases(4, 4)
    assert torch.equal(near[:, 1, 14], table[:, 3, 1])  # (0, 1) and (3, 2)
    wide = attention._biases(7, 4)
    assert wide.shape == (4, 28, 28)
    torch.testing.assert_close(wide[:, 0, 27], table[:, 3, 3])  # corners keep theirs
    torch.testing.assert_close(wide[:, 0, 4], table[:, :2, 0].mean(1))  # half a row of old
    attention.bias.data.add_(1)
    torch.testing.assert_close(attention._biases(4, 4), near + 1)  # nothing is remembered


def test_wrong_options_are_refused():
    for options, message in [
        ({"dims": (32, 64, 96)}, "each needs four numbers"),
        ({"dims": (32, 64, 96, 100)}, "multiples of 8"),
        ({"heads": 3}, r"of heads \(3\) too"),
        ({"halvings": 7}, "cannot be halved so often"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"depths": (0, 2, -1, 2)}, "depths is"),
    ]:
        with pytest.raises(UsageError, match=message):
            lsnet("nano", **options)


@pytest.fixture(scope="module")
def toy():
    return effect("toy", read("digits"))


def test_arms_have_equal_parameters_and_other_mixers():
    from vertebra.backbones import lsnet as page

    for setting in page._SETTINGS.values():
        with torch.device("meta"):
            arms = {arm: page._arm(arm, setting) for arm in page._ARMS}
        sizes = {arm: sum(p.numel() for p in backbone.parameters()) for arm, backbone in arms.items()}
        assert all(size / sizes["ls"] == pytest.approx(1, abs=0.03) for size in sizes.values()), sizes
        mixers = {arm: type(backbone.stages[0][1].mixer).__name__ for arm, backbone in arms.items()}
        assert mixers == {
            "dw3": "_Static", "dw7": "_Static", "involution": "_Involution", "ls": "LSConv", "ls_1": "LSConv",
        }  # fmt: skip


def test_effect_measures_its_arms(tmp_path, monkeypatch):
    from vertebra.backbones import lsnet as page

    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting((16, 16, 16, 16), (2, 2, 2, 2), 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("dw3", "involution", "ls")}
    assert found["ls"]["nll"] != found["involution"]["nll"] != found["dw3"]["nll"]
    assert set(found["ls"]) == set(small.metrics) and small.baseline == "dw3"


def test_effect_checks_what_the_row_asks(toy):
    def measured(**top1: float) -> Measured:
        return Measured({arm: {"top1": np.array([top1.get(arm, 60.0)] * 2)} for arm in toy.arms})

    assert [check.holds for check in toy.checks(measured(ls=60.4))] == [True, True, True]
    assert [check.holds for check in toy.checks(measured(ls=60.2, dw7=60.3, ls_1=60.3))] == [False, False, False]
