"""Depthwise convolutions of large kernels that are as fast to train as to run, on a CPU.

Shapes: (B, C, H, W) in, the same out, and the numbers of `nn.Conv2d`. No page: a tool of the blocks with large kernels.

torch computes the gradients of a large or dilated depthwise convolution on a CPU without a fast kernel, at 10 to 100
times the cost of the forward pass. Both are depthwise convolutions themselves: the input's gradient is the output's
under the turned kernel, and the kernel's is every map of the input under the output's gradient as its kernel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


def span(kernel: int, dilation: int = 1) -> int:
    """Cells that a dilated kernel reaches over."""
    return (kernel - 1) * dilation + 1


def depthwise(channels: int, kernel: int, *, dilation: int = 1, bias: bool = False) -> "Depthwise":
    """A depthwise convolution that keeps the size of the map.

    Args:
        channels: of the map.
        kernel: odd side in weights.
        dilation: cells from one weight to the next.
        bias: whether it adds one.
    """
    pad = span(kernel, dilation) // 2
    return Depthwise(channels, channels, kernel, 1, pad, dilation, channels, bias)


class Depthwise(nn.Conv2d):
    """`nn.Conv2d` of one channel a group whose gradients are fast; build it with `depthwise`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same size."""
        return convolve(x, self.weight, self.bias, self.dilation[0])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """A depthwise convolution that keeps the size of the map.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd.
        bias: (C,).
        dilation: cells from one weight to the next.
    """
    if x.device.type == "cpu" and weight.shape[-1] > 7:
        x = x.contiguous()  # by rows, large kernels are faster than with channels last by more than the copy
    if not _slow(x, weight):
        return conv2d(x, weight, bias, 1, _pad(weight, dilation), dilation, len(weight))
    out = _Convolved.apply(x, weight, dilation)
    return out if bias is None else out + bias[:, None, None]


def _slow(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own gradients would be slow: none of its kernels on the CPU is for this convolution."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != x.dtype:
        return False
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not wanted or weight.shape[-1] <= 3 or torch.is_autocast_enabled("cpu"):
        return False
    return x.is_contiguous() or 5 * weight.shape[-1] >= max(x.shape[2:])  # measured: with channels last on large maps


class _Convolved(torch.autograd.Function):
    """A depthwise convolution that keeps the size, and its two gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        return conv2d(x, weight, None, 1, _pad(weight, dilation), dilation, len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), dilation, grad = ctx.saved_tensors, ctx.dilation, grads[0].contiguous()
        pad, (batch, channels, height, width) = _pad(weight, dilation), x.shape
        down = across = None
        if ctx.needs_input_grad[0]:
            down = conv2d(grad, weight.flip((-2, -1)), None, 1, pad, dilation, channels)
        if ctx.needs_input_grad[1]:
            maps, kernels = x.reshape(1, -1, height, width), grad.reshape(-1, 1, height, width)
            found = conv2d(maps, kernels, None, dilation, pad, 1, batch * channels)
            across = found.reshape(batch, *weight.shape).sum(0)  # (C, 1, k, k)
        return down, across, None


def _pad(weight: Tensor, dilation: int) -> int:
    return span(weight.shape[-1], dilation) // 2
