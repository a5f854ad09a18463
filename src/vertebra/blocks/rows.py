"""Layers of transformers over maps that lie as rows of cells, (B, H, W, C), as fast as a CPU has them.

No page: a tool of the backbones and blocks that keep their maps so.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu


class Dense(nn.Linear):
    """A linear layer over the channels of maps (B, H, W, C), by `dense`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps (B, H, W, C) to maps of other channels."""
        return dense(input, self.weight, self.bias)


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer over the channels of maps, up to twice as fast on CPUs.

    Args:
        x: (B, H, W, C).
        weight: (outputs, C).
        bias: (outputs,).

    Returns:
        (B, H, W, outputs).
    """
    plain = torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32
    if plain or x.shape[:3].numel() < 64 or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(x, weight, bias)
    # oneDNN's product is the faster one in 32 bit. Dilation means nothing to a kernel of 1 x 1, but makes torch take
    # oneDNN where it runs in one thread.
    maps, kernels = x.permute(0, 3, 1, 2), weight[:, :, None, None]
    return nn.functional.conv2d(maps, kernels, bias, dilation=2).permute(0, 2, 3, 1)


class Local(nn.Conv2d):
    """A 3 x 3 depthwise convolution of rows (B, H, W, C) beside its shortcut: x + conv(x) by one convolution.

    The shortcut is one more in the centre of the kernel. In 16 bit a sum with 1 would round the weight away, so that
    there the two are added as they are written.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Rows to rows of the same shape."""
        maps = x.permute(0, 3, 1, 2)
        exact = x.dtype in (torch.float32, torch.float64)
        if exact and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            shortcut = nn.functional.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
            y = conv2d(maps, self.weight + shortcut, self.bias, 1, 1, 1, self.groups)
        else:
            y = maps + super().forward(maps)
        return y.permute(0, 2, 3, 1)


def activated(x: Tensor) -> Tensor:
    """GELU of a tensor that nobody else reads: in place where no gradient will ask for what was there."""
    return gelu(x) if kept() else torch.ops.aten.gelu_(x)


def kept() -> bool:
    """Whether tensors of ours must stay as they are: a gradient may need them, or a graph is being made."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
