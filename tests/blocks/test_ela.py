"""ELA: the four versions' parameters, parity with the authors' modules and timm's, and what a gate is."""

from pathlib import Path

import pytest
import torch
from timm.layers.coord_attn import EfficientLocalAttn

from vertebra.blocks.ela import VARIANTS, _canvases, effect, ela
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import check_golden, compare, fill, fill_as, images, stored
from vertebra.spec import Spec
from vertebra.surgery.swap import swap
from vertebra.training.cost import count


@pytest.mark.parametrize(("variant", "weights"), [("t", 64 * 5), ("b", 64 * 7), ("s", 64 * 8 * 5), ("l", 64 * 8 * 7)])
def test_parameters_and_macs_of_the_four_versions(variant, weights):
    block = ela(64, variant)
    assert sum(p.numel() for p in block.parameters()) == weights + 2 * 64
    assert count(block, size=(9, 6), channels=64).macs == (9 + 6) * weights


GOLDEN = Path(__file__).parents[1] / "golden" / "ela.json"


@pytest.mark.parametrize(("name", "given"), [("ELA72", {"variant": "l"}), ("ELA73", {"variant": "t", "per_group": 64})])
def test_parity_with_the_authors_modules(name, given):
    known = stored(GOLDEN, name)
    with torch.inference_mode():
        check_golden(fill(ela(64, **given)).eval()(images(known.shape)), known.golden, 1e-6)


def test_parity_with_timms_module():
    ours, theirs = ela(64, "b", shared=False, norm_groups=1, activation="silu"), EfficientLocalAttn(64)
    rules = [("conv_h", "conv"), ("norm_h", "norm"), ("conv_w", "conv_across"), ("norm_w", "norm_across")]
    fill(ours)
    fill_as(theirs, rules)
    theirs.conv_h.weight.data = ours.conv.weight.data[..., None].clone()  # the shapes differ by a dimension of 1
    assert ours.conv_across is not None
    theirs.conv_w.weight.data = ours.conv_across.weight.data[:, :, None].clone()
    assert max(compare(ours, theirs, images((2, 64, 7, 9))).values()) < 1e-6


def test_a_place_is_weighed_by_its_row_and_column():
    block, x = ela(16).eval(), images((2, 16, 5, 7))
    fill(block)
    rows, columns = block.gates(x)
    assert rows.shape == (2, 16, 5, 1) and columns.shape == (2, 16, 1, 7)
    torch.testing.assert_close(block(x)[1, 3, 4, 6], x[1, 3, 4, 6] * rows[1, 3, 4, 0] * columns[1, 3, 0, 6])
    torch.testing.assert_close(block(x.mT), block(x).mT)  # both strips share their weights


def test_narrow_layers_take_the_groups_that_divide_them():
    assert ela(24, "t").norm.num_groups == 8
    assert ela(12, "l").conv.groups == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 4}, "kernel is 4; it must be odd"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"variant": "x"}, "l, s"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ela(16, **options)


def test_in_a_network_behind_the_depthwise_convolutions():
    backbone = Spec("timm/mobilenetv2_050", {"image_size": 32}).build()
    operated = swap(backbone, "*.blocks.[1-6].*.bn2", "ela/t", place="after")
    assert len(operated.changed) == 16
    assert 1.0 < operated.after.params / operated.before.params < 1.06


def test_boxes_hold_the_digit():
    split, boxes = _canvases(read("digits").split("val"), 0)
    assert boxes.sum((1, 2)).unique().tolist() == [256]
    assert len(split) == len(boxes) and split.image(0).size == (32, 32)


def test_checks_read_the_measurements():
    found = effect("toy", read("digits"))
    assert set(found.arms) >= {"plain", "ca", "ela_l"} and found.baseline == "plain"
    equal = {arm: {name: torch.full((3,), 50.0).numpy() for name in found.metrics} for arm in found.arms}

    def holds(change: float) -> list[bool]:
        mine = {name: values + change for name, values in equal["ela_l"].items()}
        return [check.holds for check in found.checks(Measured({**equal, "ela_l": mine}))]

    assert holds(1.0) == [True] * 4
    assert holds(-1.0)[:2] == [False] * 2


def test_the_default_is_the_first_variant():
    assert next(iter(VARIANTS)) == "l"
