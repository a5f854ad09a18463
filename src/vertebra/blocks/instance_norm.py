"""Instance norm: each channel of each image to its own mean and deviation.

Shapes: (B, C, H, W) in, the same out. No page: a tool of the blocks that mix it with batch norm (`ibn`, `omni_scale`).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm

from vertebra.errors import UsageError

_ROWS_PAY = 1024
"""Cells of a map from which a group norm is fast with channels last too."""


class InstanceNorm(nn.GroupNorm):
    """Instance norm with a gain and a shift, by the kernels that are fastest for each layout in memory.

    torch's own copies maps whose channels lie last, and is several times slower on a CPU than a group norm of one
    channel a group, which computes the same and has no running statistics that could be switched on by mistake. That
    one is slow for small maps whose channels lie last, and in 16 bit for all of those.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the class above
        """Maps (B, C, H, W) to maps, each of mean 0 and variance 1 before its gain and shift.

        Raises:
            UsageError: maps of one cell, which have no deviation.
        """
        if torch.compiler.is_compiling():
            return super().forward(input)
        cells = input.shape[2:].numel()
        if cells == 1:
            raise UsageError(
                f"instance norm has nothing to normalise in a map of 1x1 cells, got {tuple(input.shape)}; give larger"
                " images of at least twice the stride, or leave batch norm in the last stages"
            )
        weight: Tensor | None = self.weight  # a search may have taken them away
        if input.device.type == "cpu" and input.element_size() == 2 and not input.is_contiguous():
            return instance_norm(input, weight=weight, bias=self.bias, eps=self.eps)
        rows = input.is_contiguous() or cells >= _ROWS_PAY
        if rows or input.device.type != "cpu" or weight is None:
            return super().forward(input)
        centred = input - input.mean((2, 3), keepdim=True)
        gain = (centred.square().mean((2, 3), keepdim=True) + self.eps).rsqrt() * weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], centred, gain)
