"""What trains a network faster on this machine, decided by what is known of both: the same answer at every start."""

import time
from functools import cache
from pathlib import Path
from statistics import geometric_mean, median
from typing import Literal

import torch
from torch import nn

from vertebra.errors import UsageError

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"]

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""x86 and Arm processors that multiply in bf16; elsewhere it is emulated, and slower than 32 bit."""


def resolve(precision: Precision, device: torch.device, network: nn.Module) -> Precision:
    """Fabric's name of the precision to train `network` at; "auto" takes bf16 where it pays.

    That is on GPUs that have it, and on processors with bf16 instructions unless the network has depthwise
    convolutions, which have no bf16 kernel there. Training steps in bf16 over 32 bit, one core with AVX512_BF16:
    ResNet-18 1.6, ViT-tiny 1.45, Swin-tiny 1.7, Mixer 1.9; MobileNetV3 0.6, EfficientNet-B0 0.6.

    Raises:
        UsageError: fp16 on a processor.
    """
    if precision == "16-mixed" and device.type == "cpu":
        raise UsageError("plan.precision is 16-mixed, which needs a GPU; on a processor choose bf16-mixed or 32-true")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    pays = device.type == "cpu" and cpu_has_bf16() and not _depthwise(network)
    return "bf16-mixed" if pays else "32-true"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 by itself, as Linux tells; False where it cannot be asked."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and bool(BF16_FLAGS & set(cpuinfo.read_text(encoding="utf-8").split()))


def _depthwise(network: nn.Module) -> bool:
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return any(1 < conv.groups == conv.in_channels for conv in convolutions)


def prefers_channels_last(network: nn.Module) -> bool:
    """Whether images and weights should lie channels-last: where convolutions are at least as many as linear layers.

    Training steps over contiguous ones, one core: ResNet-18 1.35, MobileNetV3 1.4, EfficientNet-B0 1.15; ConvNeXt
    and ViT gain nothing.
    """
    modules = list(network.modules())
    return sum(isinstance(m, nn.Conv2d) for m in modules) >= max(1, sum(isinstance(m, nn.Linear) for m in modules))


@cache
def bf16_gain() -> float:
    """How many times faster bf16 is on this processor: forward and backward of a matrix product and a convolution."""
    layers = (nn.Linear(512, 512), torch.randn(256, 512)), (nn.Conv2d(64, 64, 3, padding=1), torch.randn(8, 64, 28, 28))
    return geometric_mean(_gain(layer, inputs) for layer, inputs in layers)


def _gain(layer: nn.Module, inputs: torch.Tensor, repeats: int = 5) -> float:
    """Time in 32 bit over time in bf16, interleaved, medians."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        for low in (False, True):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                layer(inputs).sum().backward()
            seconds[low].append(time.perf_counter() - start)
    return median(seconds[False][1:]) / median(seconds[True][1:])  # the first of each warms up
