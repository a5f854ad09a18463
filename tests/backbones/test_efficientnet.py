"""Compound scaling: the authors' rounding, timm's networks from the released factors, growth of other networks."""

import pytest
import torch
from timm.models._efficientnet_builder import round_channels

from vertebra.backbones.efficientnet import compound_scale, efficientnet, grown, round_filters, round_repeats
from vertebra.backbones.fast_scaling import anynet, described
from vertebra.blocks.scaling import complexity, design
from vertebra.errors import UsageError
from vertebra.training.cost import count

RELEASED = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 260),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456),
    "b6": (1.8, 2.6, 528),
    "b7": (2.0, 3.1, 600),
}
MOBILENET = design(
    block="mbconv",
    depths=(1, 2, 3, 4, 3, 3, 1),
    widths=(16, 24, 32, 64, 96, 160, 320),
    strides=(1, 2, 2, 2, 1, 2, 1),
    ratios=(1, 6, 6, 6, 6, 6, 6),
    head=1280,
    squeeze=0,
)


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 4.3])
def test_filters_round_as_timms_do(width):
    for filters in (8, 16, 24, 32, 40, 80, 112, 192, 320, 1280):
        assert round_filters(filters, width) == round_channels(filters, width)


def test_filters_and_repeats_by_hand():
    assert [round_filters(32, width) for width in (0.1, 0.5, 1.1, 1.2, 1.4, 1.6)] == [8, 16, 32, 40, 48, 48]
    assert round_filters(24, 0.5) == 16  # 12 is nearer to 8 by the halves rule's loss of more than a tenth
    assert [round_repeats(3, depth) for depth in (1.0, 1.1, 1.4, 1.8, 2.2, 3.1, 5.3)] == [3, 4, 5, 6, 7, 10, 16]


@pytest.mark.parametrize("variant", RELEASED)
def test_the_released_factors_make_the_released_networks(variant):
    width, depth, size = RELEASED[variant]
    made = grown(described("en_b0"), depth=depth, width=width, size=size)
    with torch.device("meta"):
        theirs = count(efficientnet(variant), size=(size, size))
    ours = complexity(made)
    assert ours.params == theirs.params
    assert ours.macs == pytest.approx(theirs.macs, rel=0.001)


@pytest.mark.parametrize(
    "base", [described("resnet50"), MOBILENET, described("regnety_400mf"), described("en_b0")], ids=lambda d: d.block
)
def test_macs_nearly_double_a_unit(base):
    for phi in (1, 2, 4):
        with torch.device("meta"):
            backbone = anynet(compound_scale(base, phi))
        assert 1.9 <= (count(backbone).macs / complexity(base).macs) ** (1 / phi) <= 2.3


def test_dense_convolutions_stay_dense_and_groups_widen():
    dense, grouped = (compound_scale(described(name), 3) for name in ("resnet50", "resnext50"))
    assert dense.groups == tuple(width // 4 for width in dense.widths)
    assert grouped.groups == (4, 8, 24, 40) and grouped.depths == dense.depths == (6, 7, 11, 6)
    assert dense.size == 340 and dense.stem_width == 88


def test_phi_of_zero_changes_nothing():
    for name in ("resnet50", "en_b0", "regnety_400mf"):
        assert compound_scale(described(name), 0) == described(name)


def test_refuses_factors_that_make_no_network():
    with pytest.raises(UsageError, match="above 0"):
        compound_scale(MOBILENET, 1, beta=0)
    with pytest.raises(UsageError, match="pixels"):
        compound_scale(MOBILENET, -40)
    with pytest.raises(UsageError, match="depth 0"):
        grown(MOBILENET, depth=0)
