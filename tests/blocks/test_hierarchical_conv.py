"""The hierarchical convolution: equation 1 by hand, receptive fields of the groups, strides, `swap` and fusing."""

import pytest
import torch
from torch import nn

from vertebra.blocks.hierarchical_conv import HierarchicalConv, from_conv, hierarchical_conv
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap


@pytest.mark.parametrize("mode", [True, False])
def test_the_chain_is_equation_1(mode):
    block, x = fill(hierarchical_conv(12)).train(mode), images((2, 12, 6, 5))
    again = fill(hierarchical_conv(12)).train(mode)
    outs, y = [], torch.zeros(())
    for number in range(3):
        y = torch.relu(again.bns[number](again.convs[number](x[:, 3 * number : 3 * number + 3] + y)))
        outs.append(y)
    torch.testing.assert_close(block(x), torch.cat((*outs, x[:, 9:]), 1))


def test_parallel_groups_do_not_see_each_other():
    block, x = fill(hierarchical_conv(12, "parallel")).eval(), images((2, 12, 6, 5))
    changed = x.clone()
    changed[:, :3] += 1
    moved = (block(changed) != block(x)).flatten(2).any(2).any(0)
    assert moved[:3].all() and not moved[3:].any()
    chain = fill(hierarchical_conv(12)).eval()
    moved = (chain(changed) != chain(x)).flatten(2).any(2).any(0)
    assert moved[:9].all() and not moved[9:].any()


def test_each_group_sees_two_pixels_more():
    block = fill(hierarchical_conv(8)).eval().double()
    with torch.no_grad():  # every path stays open
        for conv in block.convs:
            conv.weight.abs_()
    x = images((1, 8, 17, 17)).double().abs().requires_grad_()
    sides = []
    for group in range(4):
        (grad,) = torch.autograd.grad(block(x)[0, 2 * group : 2 * group + 2, 8, 8].sum(), x)
        sides.append(int(grad[0].abs().sum((0, 1)).gt(0).sum()))
    assert sides == [3, 5, 7, 1]


@pytest.mark.parametrize(("stride", "shape"), [(1, (2, 8, 7, 6)), (2, (2, 8, 4, 3))])
def test_a_stage_begins_with_a_pooled_group(stride, shape):
    x = images((2, 8, 7, 6))
    counted = fill(hierarchical_conv(8, "stage", stride=stride)).eval()(x)
    left_out = fill(hierarchical_conv(8, "stage", stride=stride, padding="left_out")).eval()(x)
    assert counted.shape == shape and torch.equal(counted[:, :6], left_out[:, :6])
    torch.testing.assert_close(counted[0, 6, 0, 0], x[0, 6, :2, :2].sum() / 9)
    torch.testing.assert_close(left_out[0, 6, 0, 0], x[0, 6, :2, :2].mean())
    torch.testing.assert_close(counted[0, 6, 1, 1], x[0, 6, stride - 1 : stride + 2, stride - 1 : stride + 2].mean())


def test_one_scale_is_a_plain_convolution():
    block, x = fill(hierarchical_conv(6, scales=1, stride=2, groups=2)).eval(), images((2, 6, 7, 7))
    torch.testing.assert_close(block(x), torch.relu(block.bns[0](block.convs[0](x))))
    assert block.convs[0].weight.shape == (6, 3, 3, 3) and block(x).shape == (2, 6, 4, 4)


def test_swap_puts_it_in_the_place_of_a_bottlenecks_convolutions():
    backbone = Spec("timm/resnet50", {"image_size": 64}).build()
    operated = swap(backbone, "*.layer?.*.conv2", from_conv)
    blocks = [m for m in operated.model.modules() if isinstance(m, HierarchicalConv)]
    assert len(operated.changed) == len(blocks) == 16
    assert [block.chained for block in blocks].count(False) == 3  # stages 2, 3 and 4 begin with a stride
    old, new = 9 * 64 * 64, 3 * (9 * 16 * 16 + 2 * 16)
    assert sum(p.numel() for p in blocks[0].parameters()) == new
    stages = [(3, 1), (4, 4), (6, 16), (3, 64)]
    norms = sum(depth * 3 * 2 * 16 * 2**at for at, (depth, _) in enumerate(stages))
    less = sum(depth * size * (old - 3 * 9 * 16 * 16) for depth, size in stages)
    assert operated.before.params - operated.after.params == less - norms


def test_swap_by_name_takes_places_that_keep_the_size():
    backbone = Spec("timm/test_resnet", {"image_size": 64}).build()
    operated = swap(backbone, "*.layer2.0.conv1", "hierarchical_conv", scales=2, place="before")
    assert operated.changed == ("network.layer2.0.conv1",)
    with pytest.raises(UsageError, match=r"would have shape|cannot run"):
        swap(backbone, "*.layer2.0.conv1", "hierarchical_conv", scales=2)


def test_dilation_and_cardinality_stay():
    block = from_conv(nn.Conv2d(32, 32, 3, 1, 2, 2, groups=16))
    assert (block.convs[0].dilation, block.convs[0].groups, block.convs[0].weight.shape[1]) == ((2, 2), 4, 2)
    assert block(images((2, 32, 9, 8))).shape == (2, 32, 9, 8)
    depthwise = from_conv(nn.Conv2d(32, 32, 3, 2, 1, groups=32))
    assert depthwise.convs[0].groups == 8 and not depthwise.chained
    assert depthwise(images((2, 32, 9, 8))).shape == (2, 32, 5, 4)


@pytest.mark.parametrize("variant", ["chain", "parallel", "stage"])
def test_norms_fold_away(variant):
    block = fill(hierarchical_conv(16, variant)).eval()
    operated = fuse(block, images=(16, 9, 8))
    assert len(operated.changed) == 3 and not any(isinstance(m, nn.BatchNorm2d) for m in operated.model.modules())


def test_wrong_options_are_refused():
    for call, says in (
        (lambda: hierarchical_conv(8, "chains"), "no variant 'chains'"),  # type: ignore[arg-type]
        (lambda: hierarchical_conv(8, scales=0), "scales is 0"),
        (lambda: hierarchical_conv(10), "10 channels cannot be split"),
        (lambda: hierarchical_conv(8, groups=3), "take a multiple of 12"),
        (lambda: hierarchical_conv(8, stride=2), "take the variant 'stage'"),
        (lambda: hierarchical_conv(8, padding="none"), "padding is 'none'"),  # type: ignore[arg-type]
        (lambda: from_conv(nn.Conv2d(8, 16, 3, 1, 1)), "as many channels out as in"),
        (lambda: from_conv(nn.Conv2d(8, 8, 1)), "3 x 3"),
        (lambda: from_conv(nn.Conv2d(8, 8, 3)), "padded by their dilation"),
        (lambda: from_conv(nn.Conv2d(12, 12, 3, 1, 1, groups=6)), "6 groups are no multiple"),
    ):
        with pytest.raises(UsageError, match=says):
            call()
