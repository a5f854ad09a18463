"""DPN: timm's outputs from timm's weights, and the two networks that it contains."""

import pytest
import torch
from timm import create_model
from torch import nn

from vertebra.backbones.dpn import DPN, dpn, published
from vertebra.blocks.dual_path import DualPath
from vertebra.contracts import Preprocess
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images

PREPROCESS = Preprocess((64, 64), (0.5,) * 3, (0.25,) * 3)
LAYOUTS = {
    "dpn68": {"residual": (64, 128, 256, 512), "growth": (16, 32, 32, 64), "inner": (128, 256, 512, 1024), "stem": 10},
    "dpn92": {
        "residual": (256, 512, 1024, 2048),
        "growth": (16, 32, 24, 128),
        "inner": (96, 192, 384, 768),
        "stem": 64,
    },
}


@pytest.mark.parametrize(("name", "params"), [("dpn68", 12_611_602), ("dpn92", 37_668_392)])
def test_the_layouts_are_timms(name, params):
    depths = {"dpn68": (3, 4, 12, 3), "dpn92": (3, 4, 20, 3)}[name]
    with torch.device("meta"):
        ours = DPN(preprocess=PREPROCESS, depths=depths, stem_side=7, **LAYOUTS[name])
        theirs = create_model(name)
    extra = 10 * 3 * (49 - 9) if name == "dpn68" else 0  # its stem is of 3 x 3
    assert sum(p.numel() for p in ours.parameters()) + 1000 * ours.width + 1000 - extra == params
    assert sum(p.numel() for p in theirs.parameters()) == params


def test_timms_weights_give_timms_outputs():
    theirs = fill(create_model("dpn92", k_sec=(1, 2, 1, 1), num_classes=0)).eval()
    ours = DPN(preprocess=PREPROCESS, depths=(1, 2, 1, 1), stem_side=7, **LAYOUTS["dpn92"]).eval()
    ours.load_state_dict(published(theirs.state_dict(), ours))
    for size in ((64, 64), (65, 47)):
        batch = images((2, 3, *size))
        with torch.inference_mode():
            assert difference(ours(batch).pyramid[-1], theirs.forward_features(batch)) < 1e-5


def test_without_growth_it_is_a_preactivation_residual_unit():
    unit, x = fill(DualPath(16, 8, 16, 0, groups=4)).eval(), images((2, 16, 6, 6))
    added, dense = unit((x, x[:, :0]))
    assert dense.shape[1] == 0
    torch.testing.assert_close(added, x + unit.expand(unit.middle(unit.reduce(x))))


def test_without_a_residual_path_it_is_a_dense_layer():
    unit, x = fill(DualPath(16, 8, 0, 4, groups=4)).eval(), images((2, 16, 6, 6))
    added, dense = unit((x[:, :0], x))
    assert added.shape[1] == 0 and dense.shape[1] == 20
    torch.testing.assert_close(dense[:, :16], x)
    torch.testing.assert_close(dense[:, 16:], unit.expand(unit.middle(unit.reduce(x))))


def test_the_dense_path_begins_with_twice_the_growth():
    backbone = dpn("nano")
    assert [level.channels for level in backbone.levels] == [32 + 4 * 8, 64 + 4 * 8, 128 + 4 * 16]
    assert all(m.eps == 1e-3 for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="timm's network and has no option growth; nano have"):
        dpn("68", growth=(1, 1, 1, 1))
    with pytest.raises(UsageError, match="multiple of groups"):
        dpn("nano", groups=7)
