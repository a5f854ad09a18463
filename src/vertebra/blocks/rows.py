"""Layers of transformers over tokens, or maps that lie as rows of cells (B, H, W, C), as fast as a CPU has them.

No page: a tool of the backbones and blocks that keep their maps so.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu


class Dense(nn.Linear):
    """A linear layer over the last dimension, by `dense`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(..., C) to (..., outputs)."""
        return dense(input, self.weight, self.bias)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer over the last dimension, up to twice as fast on CPUs.

    Args:
        x: (B, H, W, C), (B, N, C), or with any other dimensions in front.
        weight: (outputs, C).
        bias: (outputs,).

    Returns:
        (..., outputs).
    """
    plain = torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32
    if plain or x.shape[:-1].numel() < 64 or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(x, weight, bias)
    # oneDNN's product is the faster one in 32 bit. Dilation means nothing to a kernel of 1 x 1, but makes torch take
    # oneDNN where it runs in one thread.
    rows = x if x.ndim == 4 else x.reshape(1, *x.shape[-3:]) if x.ndim == 3 else x.reshape(1, 1, -1, x.shape[-1])
    maps = conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias, dilation=2)
    return maps.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, named as timm's `Mlp`.

    Attributes:
        fc1: dim to hidden.
        fc2: back.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = Dense(dim, hidden), nn.GELU(), Dense(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same."""
        return self.fc2(self.act(self.fc1(x)))


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
