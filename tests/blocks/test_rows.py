"""Layers over rows: linear layers by a convolution, a shortcut within a kernel, an activation in place."""

from typing import Any

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import nn
from torch.nn.functional import gelu

from vertebra.blocks.rows import Dense, FeedForward, Local, activated
from vertebra.parity import fill, images


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 8, 24), (1, 3, 5, 24), (2, 50, 24), (100, 24), (2, 3, 4, 5, 24), (24,)])
def test_linear_layers_are_linear_layers(shape, bias):
    """By a convolution, or by torch's own where there are too few cells for one."""
    layer, x = fill(Dense(24, 40, bias=bias)), images(shape).requires_grad_()
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    wanted = (x, *layer.parameters())
    grads = [torch.autograd.grad((out**2).sum(), wanted) for out in (layer(x), expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_a_feed_forward_is_timms():
    mine, theirs = fill(FeedForward(12, 30)), fill(Mlp(12, 30))
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(mine(images((2, 40, 12))), theirs(images((2, 40, 12))))


def test_a_shortcut_within_the_kernel():
    local: Any = fill(Local(16))
    x = images((2, 7, 9, 16))
    apart = x + torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2), local.weight, local.bias, padding=1, groups=16
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(local(x), apart, rtol=1e-5, atol=1e-5)
    assert set(local.state_dict()) == {"weight", "bias"}
    rough: Any = Local(16).bfloat16()
    with torch.no_grad():
        rough.weight.fill_(1e-3)
        rough.bias.zero_()
        x = torch.ones(1, 5, 5, 16, dtype=torch.bfloat16) * 0
        x[:, 2, 2] = 1
        found = rough(x)
        assert found[0, 2, 2, 0] == torch.tensor(1 + 1e-3).bfloat16() and found[0, 1, 2, 0].item() > 9e-4
        torch.manual_seed(0)
        x = torch.randn(1, 5, 5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            near = Local(16)(x)
    assert near.dtype == torch.float32  # the shortcut keeps its digits


def test_activation_is_in_place_only_where_nothing_is_lost():
    x = images((2, 3, 4, 5))
    given = x.clone().requires_grad_(True)
    expected = gelu(x)
    assert torch.equal(activated(given), expected) and torch.equal(given, x)
    with torch.inference_mode():
        assert torch.equal(activated(x), expected) and torch.equal(x, expected)
