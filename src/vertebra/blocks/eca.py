"""ECA: a gate for each channel, from a short convolution over its neighbours among the pooled channels.

Shapes: (B, C, H, W) in, the same out. A convolution of k weights, shared by all channels, runs along the channel axis
of the mean over space; nothing is reduced, so a block costs k parameters. Used alone, through
`vertebra.surgery.swap`, and in `vertebra.backbones.eca_net`. Departs from the paper in nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.contracts import Check, Effect, Measured
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="eca",
    title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    year=2019,
    arxiv="1910.03151",
    reference="BangguWu/ECANet",
    licence="MIT",
    claim=(
        "80 parameters and 0.00047 GFLOPs on top of ResNet-50's 24.37 M and 3.86 G (units of 2^20 and 2^30) gain more "
        "than 2 % ImageNet top-1; ahead of squeeze-and-excitation at lower cost"
    ),
    numbers="6 networks of eca_net",
    parity="timm's EcaModule; golden outputs of the authors' networks (eca_net)",
    note="The networks of the paper are `eca_net/resnet50` and its like.",
)


def eca(channels: int, *, kernel: int | None = None, gamma: float = 2.0, shift: float = 1.0) -> "ECA":
    """The block for maps of `channels`.

    Args:
        channels: of the maps.
        kernel: odd size of the convolution over channels; None takes the paper's rule, `kernel_of`.
        gamma: divisor of the rule.
        shift: b of the rule.

    Raises:
        UsageError: fewer than one channel, an even kernel, or a gamma that is not above 0.
    """
    if channels < 1:
        raise UsageError(f"eca: channels is {channels}; it must be at least 1")
    if gamma <= 0:
        raise UsageError(f"eca: gamma is {gamma}; it must be above 0")
    if kernel is not None and (kernel < 1 or kernel % 2 == 0):
        raise UsageError(f"eca: kernel is {kernel}; it must be odd and at least 1")
    return ECA(kernel=kernel or kernel_of(channels, gamma, shift))


def kernel_of(channels: int, gamma: float = 2.0, shift: float = 1.0) -> int:
    """Odd kernel size for a number of channels: 3 for 64, 5 for 128 to 1024, 7 for 2048 (eq. 12).

    (log2(channels) + shift) / gamma without its fraction, and one more where that is even.
    """
    found = int(abs(log2(channels) + shift) / gamma)
    return found if found % 2 else found + 1


class ECA(nn.Module):
    """Efficient channel attention; build it with `eca`.

    Attributes:
        conv: the convolution over channels, weight (1, 1, k).
    """

    def __init__(self, *, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps times their gates in 0..1."""
        pooled = x.mean((2, 3))[:, None]  # (B, 1, C)
        return x * self.conv(pooled).sigmoid().mT[..., None]  # (B, C, 1, 1)


class _Permuted(ECA):
    """ECA whose channels are put in a fixed random order first, so that neighbours mean nothing; for the effect."""

    order: Tensor

    def __init__(self, *, kernel: int, channels: int) -> None:
        super().__init__(kernel=kernel)
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.conv(x.mean((2, 3))[:, None, self.order]).sigmoid()[:, 0]  # (B, C)
        return x * gates[:, self.order.argsort(), None, None]


def _squeeze(channels: int) -> nn.Module:
    from timm.layers.squeeze_excite import SEModule

    return SEModule(channels, rd_channels=max(1, channels // 16))


_ARMS: Mapping[str, tuple[str, Callable[[int], nn.Module]]] = {
    "plain": ("no attention", lambda channels: nn.Identity()),
    "se": ("squeeze-and-excitation, ratio 16", _squeeze),
    "eca": ("kernel by the rule", eca),
    "eca_1": ("kernel 1: no channel sees another", lambda channels: eca(channels, kernel=1)),
    "permuted": ("channels in random order", lambda channels: _Permuted(kernel=kernel_of(channels), channels=channels)),
}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: blocks a stage, pixels, images, epochs."""

    blocks: int
    size: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(3, 16, 4000, 20), "gpu": _Setting(9, 32, 50_000, 60)}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """ECA beside no attention, squeeze-and-excitation, a kernel of 1, and neighbours that mean nothing."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="channel attention without reduction, over a few neighbours, gains accuracy for next to no parameters",
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="plain",
        metrics={"top1": "%", "nll": "", "added": "%"},
        measure=measure,
        checks=_checks if scale == "toy" else _checks_gpu,
        limits=(
            f"ResNet-{6 * setting.blocks + 2} at {setting.size} pixels and {len(train)} images: differences of a point "
            "or less need more seeds than three; the paper's gain is on ImageNet with ResNet-50"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import added, trained
    from vertebra.backbones.cifar_resnet import cifar_resnet
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    size, blocks = setting.size, setting.blocks
    backbone = cifar_resnet(blocks=blocks, image_size=size, attention=_ARMS[arm][1])
    views = Views(scale=(0.6, 1.0))
    plan = Plan(
        epochs=setting.epochs, batch=64, optimizer="sgd", lr=0.05, weight_decay=5e-4, clip=None, views=views, seed=seed
    )
    scores = trained(backbone, train, test, plan).scores
    plain = cifar_resnet(blocks=blocks, image_size=size)
    return {"top1": scores["top1"], "nll": scores["nll"], "added": added(backbone, plain)}


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    gains, added = measured.gain("eca", "plain", "top1"), measured.mean("eca", "added")
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    return [
        Check(
            "ECA is at least as accurate as no attention",
            mean["eca"] >= mean["plain"],
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); all arms: {words}",
        ),
        Check(
            "ECA is at most 0.3 points behind squeeze-and-excitation",
            mean["eca"] >= mean["se"] - 0.3,
            f"{mean['eca'] - mean['se']:+.2f} points",
        ),
        Check("ECA adds less than 0.1 % of parameters", added < 0.1, f"{added:.3f} %"),
    ]


def _checks_gpu(measured: Measured) -> Sequence[Check]:
    gain = measured.gain("eca", "plain", "top1").mean()
    return [*_checks(measured), Check("ECA gains at least 0.3 points", bool(gain >= 0.3), f"{gain:+.2f} points")]
