"""Cross-scale embedding: patches of several sizes around each place, side by side in its channels.

Shapes: maps (B, channels, H, W) to (B, outputs, H / stride, W / stride), of any size: sides that are no multiple of the
stride are padded with zeros at the bottom and on the right. Convolutions of one stride and several kernels, centred on
the same places, each give a part of the outputs: of n kernels the first a half, the next a quarter, and so on, and the
last one as much as the one before it, so that large kernels, which cost most, have few channels. CEL is of CrossFormer
(arXiv 2108.00154, section 3.1). Used alone, through `vertebra.surgery.swap` in place of a patch embedding, and in
`vertebra.backbones.crossformer`. Its norm belongs to the network: behind it on images, before it on maps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_unshuffle

from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, Any]] = {
    "patches": {"kernels": (4, 8, 16, 32), "stride": 4},
    "merging": {"kernels": (2, 4), "stride": 2},
}


def cross_scale_embedding(
    channels: int,
    outputs: int,
    variant: str = "patches",
    *,
    kernels: Sequence[int] | None = None,
    stride: int | None = None,
) -> "CrossScaleEmbedding":
    """The block for maps (B, channels, H, W).

    Args:
        channels: of the maps.
        outputs: channels afterwards, a multiple of 2^(n - 1) for n kernels.
        variant: one of `VARIANTS`: that of images, or that between two stages.
        kernels: in place of the variant's; each has the stride and an even number of cells more.
        stride: in place of the variant's.

    Raises:
        UsageError: an unknown variant, or numbers that do not fit each other.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"cross_scale_embedding has no variant {variant!r}{near(variant, VARIANTS)}; it has {known}")
    chosen = VARIANTS[variant]
    step: int = chosen["stride"] if stride is None else stride
    sides = tuple(chosen["kernels"] if kernels is None else kernels)
    if channels < 1 or step < 1:
        raise UsageError(f"cross_scale_embedding: channels is {channels}, stride is {step}; both are at least 1")
    if not sides or any(side < step or (side - step) % 2 for side in sides):
        raise UsageError(
            f"cross_scale_embedding: kernels is {sides} with stride {step}; a kernel has the stride and an even"
            f" number of cells more, as {step}, {step + 2} or {step + 4}"
        )
    share = 2 ** (len(sides) - 1)
    if outputs < 1 or outputs % share:
        raise UsageError(
            f"cross_scale_embedding: outputs is {outputs}; with {len(sides)} kernels it must be a multiple of {share}"
        )
    return CrossScaleEmbedding(channels=channels, outputs=outputs, kernels=sides, stride=step)


class CrossScaleEmbedding(nn.Module):
    """Convolutions of several kernels and one stride, side by side; build it with `cross_scale_embedding`.

    Attributes:
        convs: one a kernel, in the order of their channels.
        stride: of all of them.
    """

    def __init__(self, *, channels: int, outputs: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        self.stride = stride
        parts = [outputs // 2 ** (number + 1) for number in range(len(kernels) - 1)]
        parts.append(outputs - sum(parts))
        self.convs = nn.ModuleList(
            Patches(channels, part, kernel, stride, (kernel - stride) // 2)
            for kernel, part in zip(kernels, parts, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to maps (B, outputs, H / stride, W / stride), sides rounded up."""
        down, across = (-side % self.stride for side in x.shape[2:])
        x = pad(x, (0, across, 0, down)) if down or across else x
        return torch.cat([conv(x) for conv in self.convs], 1)


class Patches(nn.Conv2d):
    """`nn.Conv2d` whose gradients are fast where the kernel is many strides long."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps (B, channels, H, W) to maps (B, outputs, H / stride, W / stride)."""
        if not self._slow(input):
            return super().forward(input)
        # On a CPU torch computes the kernel's gradient of a large stride 4 to 5 times slower than that of a stride of
        # 1: so a square of stride x stride cells becomes one cell of stride^2 as many channels.
        stride, before = self.stride[0], int(self.padding[0])
        cells = pixel_unshuffle(pad(input, (before,) * 4), stride)
        kernels = self.weight.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # (outputs, channels, m, s, m, s)
        return conv2d(cells, kernels.permute(0, 1, 3, 5, 2, 4).flatten(1, 3), self.bias)

    def _slow(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        kernel, stride = self.kernel_size[0], self.stride[0]
        long = kernel >= 4 * stride and kernel % stride == 0
        return long and torch.is_grad_enabled() and self.weight.requires_grad
