"""A depthwise convolution of a large kernel and what runs beside it in training; one kernel in the end.

Shapes: (B, C, H, W) in, the same out. Policies, after RepLKNet (arXiv 2203.06717) and UniRepLKNet (2311.15599):
"none", the large kernel and its batch norm; "small", a small kernel with its own norm in parallel, without which very
large kernels miss what is near; "dilated", sparse kernels in parallel (`vertebra.blocks.dilated_reparam`). `fused()`
merges the branches into one convolution with a bias.

The convolution takes the way that is fastest: see `LargeDepthwise`. Multiply-accumulates say little about its time.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from vertebra.blocks.depthwise import Depthwise
from vertebra.blocks.dilated_reparam import TABLE, Branches, DilatedReparam, filled
from vertebra.errors import UsageError, near

VARIANTS = {"small": {"policy": "small"}, "none": {"policy": "none"}, "dilated": {"policy": "dilated"}}

Policy = Literal["none", "small", "dilated"]
Path = Literal["auto", "direct", "fft"]

SLOW_FROM = 15
"""Kernel size from which torch's convolutions on the CPU need other ways; measured with torch 2.15 and oneDNN 3.13."""
FFT_INFERENCE = 41, 100
"""Least kernel size and side of the map where the Fourier transform is faster without gradients on the CPU."""


def large_kernel(
    channels: int,
    variant: str = "small",
    *,
    kernel: int = 13,
    policy: Policy | None = None,
    small: int = 5,
    path: Path = "auto",
) -> "LargeKernel":
    """The block for maps of `channels`.

    Args:
        channels: of the maps.
        variant: one of `VARIANTS`.
        kernel: odd size of the large kernel.
        policy: what is trained in parallel; None takes the variant's.
        small: odd size of the small kernel, at most `kernel`; of the policy "small" alone.
        path: how the convolution is computed, as in `LargeDepthwise`.

    Raises:
        UsageError: an unknown variant, policy or path, or a size out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"large_kernel has no variant {variant!r}{near(variant, VARIANTS)}; it has {list(VARIANTS)}")
    chosen = policy or VARIANTS[variant]["policy"]
    if chosen not in VARIANTS:
        raise UsageError(f"large_kernel: policy is {chosen!r}; it can be none, small or dilated")
    if path not in ("auto", "direct", "fft"):
        raise UsageError(f"large_kernel: path is {path!r}; it can be auto, direct or fft")
    if channels < 1:
        raise UsageError(f"large_kernel: channels is {channels}; it must be at least 1")
    for name, value in {"kernel": kernel, **({"small": small} if chosen == "small" else {})}.items():
        if value < 1 or value % 2 == 0:
            raise UsageError(f"large_kernel: {name} is {value}; it must be odd and at least 1")
    if chosen == "small" and small > kernel:
        raise UsageError(f"large_kernel: small is {small}; it must fit into the large kernel of {kernel}")
    if chosen == "dilated" and kernel not in TABLE:
        raise UsageError(f"large_kernel: no dilated branches for kernel {kernel}; there are for {list(TABLE)}")
    branches: Mapping[str, Branches] = {"none": (), "small": ((small, 1),), "dilated": TABLE.get(kernel, ())}
    return LargeKernel(channels=channels, kernel=kernel, branches=branches[chosen], path=path)


class LargeKernel(nn.Module):
    """A large depthwise kernel and what is trained beside it, each with its norm; build it with `large_kernel`.

    Attributes:
        branches: the large convolution and the others (`DilatedReparam`, whose branches may be dense or none).
        path: how the convolution is computed.
    """

    def __init__(self, *, channels: int, kernel: int, branches: Branches, path: Path) -> None:
        super().__init__()
        self.branches = DilatedReparam(channels, kernel=kernel, branches=branches)
        self.branches.convs[0] = LargeDepthwise(channels, kernel, path=path)
        self.path: Path = path

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps of the same shape, branch by branch; `fused` is one convolution."""
        # merging the kernels at every pass would cost more than a small branch where the maps are small
        out: Tensor | None = None
        for conv, norm in zip(self.branches.convs, self.branches.norms, strict=True):
            out = norm(conv(x)) if out is None else out.add_(norm(conv(x)))  # no norm's gradient needs its output
        assert out is not None
        return out

    def fused(self) -> "LargeDepthwise":
        """One convolution with a bias, equal in evaluation mode."""
        weight, bias = self.branches.merged()
        conv = LargeDepthwise(len(weight), weight.shape[-1], bias=True, path=self.path)
        filled(conv, weight, bias)
        return conv


class LargeDepthwise(Depthwise):
    """A depthwise convolution that keeps the size, by the fastest of some equal ways.

    On the CPU oneDNN's kernels end at 13 x 13 for maps that lie channel by channel, and torch falls back on a loop that
    takes 25 times as long. Those for channels-last go on, but without gradients: there the Fourier transform takes a
    sixth of the time at 15 and a seventeenth at 31. So with `path` "auto" kernels above 13 learn by Fourier and run
    channels-last, and by Fourier again where kernel and map reach `FFT_INFERENCE`. Elsewhere than on the CPU in 32 or
    64 bit, and where the network is traced, "auto" is direct.

    Args:
        channels: of the maps.
        kernel: odd size.
        bias: whether there is one.
        path: "auto", "direct" or "fft"; the last two differ by rounding, 1e-6 of the output's size in 32 bit.
    """

    def __init__(self, channels: int, kernel: int, *, bias: bool = False, path: Path = "auto") -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)
        self.path: Path = path

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        if not learns(x, self.weight) or _transforms(x, self.weight, self.path):
            return convolved(x, self.weight, self.bias, path=self.path)
        near_by = not torch.compiler.is_compiling() and x.device.type == "cpu"
        return super().forward(x.contiguous() if near_by else x)


def learns(x: Tensor, weight: Tensor) -> bool:
    """Whether gradients will be wanted."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *, path: Path = "auto") -> Tensor:
    """A depthwise convolution of stride 1 that keeps the size: what `LargeDepthwise` computes, for any weight.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k) with k odd.
        bias: (C,) or None.
        path: as in `LargeDepthwise`.
    """
    if _transforms(x, weight, path):
        return depthwise_fft(x, weight, bias)
    if not torch.compiler.is_compiling() and x.device.type == "cpu":
        x, weight = _laid_out(x, weight)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def _transforms(x: Tensor, weight: Tensor, path: Path) -> bool:
    """Whether the convolution goes by Fourier."""
    if path != "auto":
        return path == "fft"
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    kernel, side = weight.shape[-1], min(x.shape[2:])
    least = (SLOW_FROM, 0) if learns(x, weight) else FFT_INFERENCE
    return kernel >= least[0] and side >= least[1]


def _laid_out(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and weight as torch's direct convolution on the CPU is fastest with them."""
    kernel = weight.shape[-1]
    if kernel >= SLOW_FROM:
        return x.contiguous(memory_format=torch.channels_last), weight
    if kernel == SLOW_FROM - 2 and not x.is_contiguous():
        return x, F.pad(weight, (1, 1, 1, 1))  # channels-last, 13 takes 2.5 times as long as 15
    return x, weight


def depthwise_fft(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A depthwise convolution of stride 1 that keeps the size, as a product of Fourier transforms.

    Its time hardly depends on the kernel: a product of transforms of (H + k // 2) x (W + k // 2) each. That is less
    than H + k - 1, since what wraps around falls outside of what is kept.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k) with k odd.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) of the type of `x`; computed in at least 32 bit.
    """
    exact = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    (height, width), reach = x.shape[2:], weight.shape[-1] // 2
    sides = fast_length(height + reach), fast_length(width + reach)
    # torch's convolution is a correlation: it meets the kernel turned around
    kernel = torch.fft.rfft2(weight[:, 0].flip(1, 2).to(exact), sides)  # (C, N, N / 2 + 1)
    out = torch.fft.irfft2(torch.fft.rfft2(x.to(exact), sides) * kernel, sides)
    out = out[:, :, reach : reach + height, reach : reach + width]
    return (out if bias is None else out + bias.to(exact)[:, None, None]).to(x.dtype)


def fast_length(least: int) -> int:
    """The smallest length from `least` on that has no prime factor above 5, which transforms are fast for."""
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
