"""LS convolution: the aggregation by hand, by gradcheck and by its Triton kernels; behaviour of the block."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.ls_conv import aggregate, ls_conv, plain_aggregate
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

SHAPES = [(2, 16, 2, 5, 7), (1, 8, 8, 6, 4), (1, 8, 1, 1, 1), (2, 24, 3, 4, 1), (2, 8, 1, 1, 5)]
"""Batch, channels, kernels, height, width."""


def given(shape: tuple[int, ...], last: bool, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Maps and weights (B, K * 9, H, W) in one layout; both want gradients."""
    batch, channels, kernels, height, width = shape
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    made = (torch.randn(batch, depth, height, width, dtype=kind) for depth in (channels, 9 * kernels))
    x, weights = (tensor.contiguous(memory_format=layout).requires_grad_() for tensor in made)
    return x, weights


def by_hand(x: Tensor, weights: Tensor) -> Tensor:
    """The definition, number by number."""
    out = torch.zeros_like(x)
    batch, channels, height, width = x.shape
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, (batch, channels, height, width))).tolist():
        for tap in range(9):
            y, z = i + tap // 3 - 1, j + tap % 3 - 1
            if 0 <= y < height and 0 <= z < width:
                out[n, c, i, j] += x[n, c, y, z] * weights[n, c % weights.shape[1], tap, i, j]
    return out


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_aggregation_and_its_gradients(shape, last):
    x, weights = given(shape, last)
    taps = (shape[2], 9)
    with torch.no_grad():
        expected = by_hand(x, weights.unflatten(1, taps))
    torch.testing.assert_close(aggregate(x, weights.unflatten(1, taps)), expected)
    torch.testing.assert_close(plain_aggregate(x, weights.unflatten(1, taps)), expected)
    assert aggregate(x, weights.unflatten(1, taps)).is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    assert torch.autograd.gradcheck(lambda *both: aggregate(both[0], both[1].unflatten(1, taps)), (x, weights))


def test_channels_take_the_kernels_in_turn():
    """Channel c has kernel c mod K: with K = 2, a shift in kernel 1 alone moves channels 1 and 3."""
    x = images((1, 4, 3, 3))
    weights = torch.zeros(1, 2, 9, 3, 3)
    weights[:, 0, 4] = 1  # stays
    weights[:, 1, 3] = 1  # takes what is on the left
    moved = nn.functional.pad(x, (1, 0))[..., :3]
    found = aggregate(x, weights)
    assert torch.equal(found[:, ::2], x[:, ::2]) and torch.equal(found[:, 1::2], moved[:, 1::2])


def test_number_formats():
    x, weights = given((2, 32, 4, 6, 5), False, torch.float32)
    weights = weights.unflatten(1, (4, 9))
    expected = aggregate(x, weights)
    found = aggregate(x.bfloat16(), weights)  # as under autocast
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    assert aggregate(x.to("meta"), weights.to("meta")).shape == x.shape
    compiled = torch.compile(aggregate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.detach(), weights.detach()), expected)


KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_ls_conv import given
from vertebra.blocks.ls_conv import plain_aggregate
from vertebra.blocks.ls_conv_triton import aggregate_cuda

for shape in [(2, 16, 8, 7, 5), (1, 6, 2, 4, 1)]:  # the first takes two programs an image
    for last in (False, True):
        x, weights = given(shape, last)
        taps = weights.unflatten(1, (shape[2], 9))
        found, expected = aggregate_cuda(x, taps), plain_aggregate(x, taps)
        grad = torch.randn_like(expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        pairs = (torch.autograd.grad(out, (x, weights), grad) for out in (found, expected))
        torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-12)
        x, taps = x.detach().bfloat16(), taps.detach().bfloat16()
        exact = plain_aggregate(x.float(), taps.float()).bfloat16()  # sums are in 32 bit, rounded once
        torch.testing.assert_close(aggregate_cuda(x, taps), exact, rtol=1e-2, atol=1e-5)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no build for this platform")
def test_triton_kernels_under_its_interpreter():
    """Forward and both gradients; in a process of its own, since the switch is read when kernels are made."""
    command = [sys.executable, "-c", KERNELS, str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]


def test_the_block_is_perception_aggregation_norm_and_shortcut():
    block, x = fill(ls_conv(32)).eval(), images((2, 32, 9, 8))
    look: nn.Module = block.perception
    with torch.inference_mode():
        half = look.look(look.narrow(x).relu())
        weights = look.weigh(look.mix(half).relu()).view(2, 4, 9, 9, 8)  # 4 kernels of 9 taps
        centred = weights - weights.mean((2, 3, 4), keepdim=True)
        normed = centred / (weights.var((2, 3, 4), keepdim=True, unbiased=False) + 1e-5).sqrt()
        taps = normed * look.norm.weight.view(1, 4, 9, 1, 1) + look.norm.bias.view(1, 4, 9, 1, 1)
        expected = block.norm(by_hand(x, taps)) + x
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_perception_reaches_three_pixels_and_aggregation_one_more():
    """With norms out of the way, which look at the whole map."""
    block = fill(ls_conv(32)).eval()
    block.perception.norm = nn.Identity()
    x = images((1, 32, 13, 13)).requires_grad_()
    block(x)[..., 6, 6].sum().backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    assert rows == list(range(3, 10))  # the weights see 7 x 7, the sum 3 x 3


def test_swap_puts_it_in_the_place_of_convolutions():
    backbone = Spec("timm/resnet18", {"image_size": 64}).build()
    operated = swap(backbone, "*.layer[34].*.conv2", "ls_conv")
    assert len(operated.changed) == 4 and type(operated.model.network.layer4[1].conv2).__name__ == "LSConv"
    assert operated.after.params < operated.before.params and operated.after.macs < operated.before.macs


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="kernel is 4; it must be odd"):
        ls_conv(16, kernel=4)
    with pytest.raises(UsageError, match="channels is 20; it must be even and a multiple of share, which is 8"):
        ls_conv(20)
