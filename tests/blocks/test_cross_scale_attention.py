"""Long short distance attention: against loops, who sees whom, any size, and the bias of offsets."""

from typing import Any

import pytest
import torch

from vertebra.blocks.cross_scale_attention import (
    CrossScaleAttention,
    DynamicPositionBias,
    cross_scale_attention,
    of_pairs,
)
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

DIM, HEADS, SIDE = 16, 2, 3


def layer(interval: int, side: int = SIDE) -> Any:
    return fill(CrossScaleAttention(dim=DIM, heads=HEADS, side=side, interval=interval)).double()


def group_of(place: int, interval: int, side: int, length: int) -> list[int]:
    """Real places along one axis that a place attends to."""
    span, phase = side * interval, place % interval
    start = place // span * span
    return [other for other in range(start + phase, start + span, interval) if other < length]


def by_loops(block: Any, x: torch.Tensor, one: bool) -> torch.Tensor:
    """Each place by itself, (H, W, dim); the bias is that of the step from a place to another in members of a group."""
    height, width, d = *x.shape[:2], DIM // HEADS
    q, k, v = block.attention.qkv(x[None])[0].view(height, width, 3, HEADS, d).unbind(2)
    out = torch.zeros(height, width, HEADS, d).double()
    step = 1 if one else block.interval
    for y in range(height):
        for z in range(width):
            rows = range(height) if one else group_of(y, step, block.side, height)
            columns = range(width) if one else group_of(z, step, block.side, width)
            places = [(i, j) for i in rows for j in columns]
            steps = torch.tensor([[(y - i) / step, (z - j) / step] for i, j in places]).double()
            bias = block.bias.layers(steps)
            for head in range(HEADS):
                logits = torch.stack([q[y, z, head] @ k[i, j, head] for i, j in places]) * d**-0.5 + bias[:, head]
                weights = logits.softmax(0)
                values = torch.stack([v[i, j, head] for i, j in places])
                out[y, z, head] = weights @ values
    return block.attention.proj(out.flatten(2)[None])[0]


@pytest.mark.parametrize(
    ("interval", "size", "one"),
    [
        (1, (6, 9), False),
        (1, (5, 7), False),  # padded
        (2, (6, 12), False),
        (2, (7, 8), False),  # more places than a group and its interval reach over, padded
        (2, (4, 5), False),  # fewer
        (3, (4, 10), False),
        (2, (3, 5), True),  # one group
        (1, (2, 2), True),
    ],
)
def test_against_loops(interval, size, one):
    block, x = layer(interval), images((2, *size, DIM)).double()
    with torch.no_grad():
        for each, found in zip(x, block(x), strict=True):
            torch.testing.assert_close(found, by_loops(block, each, one), rtol=1e-10, atol=1e-10)


def heard(block: torch.nn.Module, size: tuple[int, int], place: tuple[int, int]) -> list[list[int]]:
    """Places that the output of one listens to."""
    x = images((1, *size, DIM)).double().requires_grad_()
    block(x)[0, place[0], place[1]].sum().backward()
    assert x.grad is not None
    return (x.grad.abs().sum((0, 3)) > 0).nonzero().tolist()


def test_near_hears_its_window_and_far_an_interval_apart():
    assert heard(layer(1, 4), (16, 16), (5, 10)) == [[i, j] for i in range(4, 8) for j in range(8, 12)]
    assert heard(layer(4, 4), (16, 16), (5, 10)) == [[i, j] for i in range(1, 16, 4) for j in range(2, 16, 4)]
    # two groups of an axis: the first reaches over 4 * 2 places
    assert heard(layer(2, 4), (16, 8), (9, 1)) == [[i, j] for i in range(9, 16, 2) for j in range(1, 8, 2)]


def test_one_after_the_other_hears_the_whole_map():
    both = torch.nn.Sequential(layer(1, 4), layer(4, 4))
    assert len(heard(both, (16, 16), (5, 10))) == 256


def test_groups_follow_the_map():
    near, far = (CrossScaleAttention(dim=32, side=7, interval=interval) for interval in (1, 8))
    assert near.groups((56, 56)) == ((7, 7), (1, 1)) and far.groups((56, 56)) == ((7, 7), (8, 8))
    assert near.groups((8, 60)) == ((7, 7), (1, 1)) and far.groups((8, 60)) == ((1, 7), (8, 8))
    assert far.groups((16, 20)) == ((2, 3), (8, 8))
    assert near.groups((7, 30)) == far.groups((7, 30)) == ((7, 30), (1, 1))


def test_places_that_are_padded_are_not_heard():
    """A map in a larger one of other numbers: the same as padded, where the groups are the same."""
    block, x = layer(1, 4), images((1, 6, 5, DIM)).double()
    with torch.no_grad():
        found = block(x)
        torch.testing.assert_close(found[:, :4, :4], block(x[:, :4, :4]))
        last = by_loops(block, x[0], one=False)[5, 4]
    torch.testing.assert_close(found[0, 5, 4], last)


def test_bias_is_a_function_of_the_offset():
    bias: Any = fill(DynamicPositionBias(heads=3, hidden=4)).double()
    found = bias((3, 4)).view(3, 3, 4, 3, 4)
    for y, z, i, j in ((0, 0, 0, 0), (2, 3, 0, 0), (0, 1, 2, 0), (1, 3, 2, 2)):
        expected = bias.layers(torch.tensor([y - i, z - j]).double())
        torch.testing.assert_close(found[:, y, z, i, j], expected)
    larger = bias((5, 5)).view(3, 5, 5, 5, 5)  # what is in both is the same: no table has to be resized
    torch.testing.assert_close(larger[:, :3, :4, :3, :4], found)
    assert not torch.allclose(found, found.transpose(1, 3).transpose(2, 4))


def test_width_of_the_bias_is_a_sixteenth():
    made: list[Any] = [CrossScaleAttention(dim=dim, side=7) for dim in (32, 64, 96, 512)]
    assert [block.bias.layers[0].out_features for block in made] == [4, 4, 6, 32]


def test_numbers_of_offsets_for_all_pairs():
    table = torch.arange(15.0).view(1, 3, 5)  # offsets -1..1 and -2..2
    found = of_pairs(table, (2, 3))
    assert found.shape == (1, 6, 6)
    assert found[0, 0].tolist() == [7, 6, 5, 2, 1, 0]  # the first place, and places right of and below it
    assert found[0, 5].tolist() == [14, 13, 12, 9, 8, 7]


def test_another_bias_or_none_can_take_its_place():
    block, x = layer(1, 4), images((1, 8, 8, DIM)).double()
    with torch.no_grad():
        expected = block(x)
        block.bias = None
        plain = block(x)
    assert not torch.allclose(plain, expected)
    assert len(heard(block, (8, 8), (0, 0))) == 16


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (11, 15)])
@pytest.mark.parametrize("variant", ["short", "long"])
def test_any_size_and_both_gradients(variant, size):
    block = fill(cross_scale_attention(16, variant, heads=2, side=4))
    x = images((2, 16, *size)).requires_grad_()
    out = block(x)
    assert out.shape == x.shape and out.isfinite().all()
    out.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


def test_swap_puts_it_in_the_place_of_a_convolution():
    backbone = Spec("timm/convnext_atto", {"image_size": 64}).build()
    operated = swap(backbone, "*stages.3.*conv_dw", "cross_scale_attention/long", heads=10, side=1)
    assert len(operated.changed) == 2
    found = [m for m in operated.model.modules() if isinstance(m, CrossScaleAttention)]
    assert [(block.side, block.interval, block.attention.heads) for block in found] == [(1, 2, 10)] * 2
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 64, 64))).pooled.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "near"}, "no variant 'near'"),
        ({"side": 0}, "side 0"),
        ({"interval": 0}, "interval 0"),
        ({"hidden": 0}, "hidden 0"),
        ({"heads": 0}, "heads 0"),
        ({"heads": 3}, "3 heads do not divide dim 16"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        cross_scale_attention(16, **options)
