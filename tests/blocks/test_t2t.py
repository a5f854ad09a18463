"""The T2T tokenizer: soft splits by the book, sizes, errors."""

import pytest
import torch
from torch import nn

from vertebra.blocks.t2t import split_norm_linear, t2t
from vertebra.contracts import Level
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images


@pytest.mark.parametrize(("split", "channels"), [((7, 4, 2), 3), ((3, 2, 1), 8), ((3, 1, 1), 4), ((4, 4, 0), 3)])
def test_a_fused_split_is_an_unfold_a_norm_and_a_linear_layer(split, channels):
    kernel, stride, padding = split
    norm, layer = nn.LayerNorm(channels * kernel**2), nn.Linear(channels * kernel**2, 10)
    fill(nn.ModuleList([norm, layer])).double()
    x = images((2, channels, 13, 18)).double().add(0.5).requires_grad_(True)
    squares = nn.functional.unfold(x, kernel, padding=padding, stride=stride).mT
    expected = layer(norm(squares))
    found = split_norm_linear(x, norm, layer, split)
    torch.testing.assert_close(found.flatten(2).mT, expected, rtol=1e-11, atol=1e-11)
    weights, of = images(tuple(expected.shape)).double(), [x, *norm.parameters(), *layer.parameters()]
    exact = torch.autograd.grad((expected * weights).sum(), of)
    ours = torch.autograd.grad((found.flatten(2).mT * weights).sum(), of)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_a_flat_image_has_no_variance_to_divide_by():
    norm, layer = nn.LayerNorm(147), nn.Linear(147, 8)
    fill(nn.ModuleList([norm, layer]))
    flat = torch.full((1, 3, 32, 32), 2.6)
    flat[:, :, :16] = -2.1
    squares = nn.functional.unfold(flat, 7, padding=2, stride=4).mT
    found = split_norm_linear(flat, norm, layer, (7, 4, 2)).flatten(2).mT
    assert difference(found, layer(norm(squares))) < 5e-3  # what is left of 2.6^2 in 32 bit, over the norm's epsilon
    flat[:] = 0
    constant = layer(norm.bias)
    torch.testing.assert_close(split_norm_linear(flat, norm, layer, (7, 4, 2))[0, :, 3, 3], constant)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 49), (224, 224)])
def test_the_grid_is_known_beforehand(size):
    with torch.device("meta"):
        tokenizer = t2t(3, 24)
        maps = tokenizer(torch.empty(1, 3, *size))
    assert tuple(maps[-1].shape[2:]) == tokenizer.grid(size)
    assert tokenizer.levels == (Level(64, 4), Level(64, 8), Level(24, 16))
    assert [level.channels for level in tokenizer.levels] == [m.shape[1] for m in maps]


def test_least_is_the_smallest_image_that_runs():
    tokenizer = t2t(3, 24, hidden=8)
    side = tokenizer.least
    assert tokenizer.grid((side, side)) == (1, 1) and tokenizer(images((1, 3, side, side)))[-1].shape == (1, 24, 1, 1)
    assert min(tokenizer.grid((side - 1, side - 1))) < 1


def test_maps_are_channels_last_and_layout_does_not_matter():
    tokenizer, x = fill(t2t(3, 24, hidden=8)).eval(), images((2, 3, 32, 40))
    plain, last = tokenizer(x), tokenizer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in plain)


def test_training_drops_only_within_performers():
    x = images((1, 3, 32, 32))
    for mix, differs in (("performer", True), ("transformer", False)):
        tokenizer = fill(t2t(3, 24, mix, hidden=8))
        torch.manual_seed(0)
        assert torch.equal(tokenizer.train()(x)[-1], tokenizer.eval()(x)[-1]) is not differs


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="'convolution' is no way to mix tokens"):
        t2t(3, 24, "convolution")
    with pytest.raises(UsageError, match="padding of at most half the kernel"):
        t2t(3, 24, splits=((3, 1, 2),))
    with pytest.raises(UsageError, match="splits is empty"):
        t2t(3, 24, splits=())
    with pytest.raises(UsageError, match="dim 0"):
        t2t(3, 0)
