"""Depthwise convolutions whose gradients are fast: torch's numbers, in both layouts, at the kernels that take them."""

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks import depthwise as module
from vertebra.blocks.depthwise import convolve, depthwise


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    pad = dilation * (weight.shape[-1] - 1) // 2
    return nn.functional.conv2d(x, weight, bias, 1, pad, dilation, len(weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (7, 1), (9, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("size", [(4, 4), (16, 9), (40, 7)])
def test_gradients_are_torchs(size, kernel, dilation, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 6, *size).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(6, 1, kernel, kernel, requires_grad=True), torch.randn(6, requires_grad=True)
    grad = torch.randn(3, 6, *size)
    found, expected = convolve(x, weight, bias, dilation), torchs(x, weight, bias, dilation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mine, theirs = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_gradients_can_be_differentiated_again():
    x = torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 1, 5, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, weight: module._Convolved.apply(x, weight, 1), (x, weight))


def test_what_needs_no_gradient_gets_none():
    layer = depthwise(4, 7).requires_grad_(False)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None


def test_torchs_own_path_is_kept_where_it_is_the_faster_one(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("taken")

    monkeypatch.setattr(module._Convolved, "apply", refuse)
    layer, wide = depthwise(4, 5), torch.randn(1, 4, 56, 56).contiguous(memory_format=torch.channels_last)
    assert layer(wide).shape == wide.shape
    with pytest.raises(AssertionError, match="taken"):
        layer(torch.randn(1, 4, 14, 14))
    with torch.inference_mode():
        assert layer(torch.randn(1, 4, 14, 14)).shape == (1, 4, 14, 14)
