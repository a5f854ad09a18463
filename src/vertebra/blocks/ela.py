"""ELA: gates for rows and for columns, from a short convolution along each of the two pooled strips.

Shapes: (B, C, H, W) in, the same out. The mean over the columns is a line of C channels and H places, the mean over
the rows one of W places; one convolution and one group norm, shared by both, make a gate of each: a place is weighed
by its row's gate times its column's. No channel is reduced. Used alone and through `vertebra.surgery.swap`: at the end
of a residual branch, or behind the depthwise convolution of an inverted residual. Departs from the paper in nothing;
`shared=False, activation="silu", norm_groups=1` with a channel a group is what timm calls `ela`.
"""

from collections.abc import Callable, Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vertebra.contracts import Check, Effect, Measured
from vertebra.errors import UsageError
from vertebra.paper import Paper

if TYPE_CHECKING:
    from vertebra.data.dataset import Dataset, Split

PAPER = Paper(
    id="ela",
    title="ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
    year=2024,
    arxiv="2403.01123",
    reference="Xuwei86/ELA_Code",
    licence="Apache-2.0",
    claim=(
        "ahead of squeeze-and-excitation, CBAM, coordinate and ECA attention on ImageNet, COCO and VOC at comparable "
        "cost, without reducing channels and without batch norm"
    ),
    numbers="parameters of the four versions at 64 channels",
    parity="the authors' ELA72 and ELA73; timm's EfficientLocalAttn with three options",
    note="The authors' code names its versions by numbers: L is its ELA72; its ELA73 has one group.",
)

VARIANTS = {
    "l": {"kernel": 7, "per_group": 8, "norm_groups": 16},
    "s": {"kernel": 5, "per_group": 8, "norm_groups": 16},
    "b": {"kernel": 7, "per_group": 1, "norm_groups": 16},
    "t": {"kernel": 5, "per_group": 1, "norm_groups": 32},
}


def ela(
    channels: int,
    variant: str = "l",
    *,
    kernel: int | None = None,
    per_group: int | None = None,
    norm_groups: int | None = None,
    shared: bool = True,
    activation: Literal["none", "silu"] = "none",
) -> "ELA":
    """The block for maps of `channels`.

    Args:
        channels: of the maps.
        variant: one of `VARIANTS`; the options below win over it.
        kernel: odd size of the convolution along a strip.
        per_group: channels that a group of the convolution mixes; the largest common divisor with `channels` is taken.
        norm_groups: of the group norm; the largest common divisor with `channels` is taken.
        shared: one convolution and norm for both strips; otherwise two of each.
        activation: between norm and gate.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"ela has no variant {variant!r}; it has {', '.join(VARIANTS)}")
    given = {"kernel": kernel, "per_group": per_group, "norm_groups": norm_groups}
    chosen = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
    for name, value in {"channels": channels, **chosen}.items():
        if value < 1:
            raise UsageError(f"ela: {name} is {value}; it must be at least 1")
    if chosen["kernel"] % 2 == 0:
        raise UsageError(f"ela: kernel is {chosen['kernel']}; it must be odd")
    if activation not in ("none", "silu"):
        raise UsageError(f"ela: activation is {activation!r}; it must be none or silu")
    return ELA(channels, shared=shared, activation=activation, **chosen)


class ELA(nn.Module):
    """Efficient local attention; build it with `ela`.

    Attributes:
        conv: along the strips, weight (C, channels a group, k).
        norm: group norm behind it.
        conv_across: for the columns' strip where it is not shared, else None.
        norm_across: likewise.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int,
        per_group: int,
        norm_groups: int,
        shared: bool,
        activation: Literal["none", "silu"],
    ) -> None:
        super().__init__()
        groups = channels // gcd(channels, per_group)

        def along() -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)

        def norm() -> nn.GroupNorm:
            return nn.GroupNorm(gcd(channels, norm_groups), channels)

        self.conv, self.norm = along(), norm()
        self.conv_across, self.norm_across = (None, None) if shared else (along(), norm())
        self.activation = nn.SiLU() if activation == "silu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps times the gates of their rows and columns."""
        rows, columns = self.gates(x)
        return x * rows * columns

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates in 0..1 of the rows (B, C, H, 1) and of the columns (B, C, 1, W)."""
        rows = self._gate(x.mean(3), self.conv, self.norm)
        columns = self._gate(x.mean(2), self.conv_across or self.conv, self.norm_across or self.norm)
        return rows[..., None], columns[:, :, None]

    def _gate(self, strip: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        return self.activation(norm(conv(strip))).sigmoid()


def _timms(channels: int) -> ELA:
    return ela(channels, "b", norm_groups=1, shared=False, activation="silu")


def _squeeze(channels: int) -> nn.Module:
    from timm.layers.squeeze_excite import SEModule

    return SEModule(channels, rd_channels=max(1, channels // 16))


def _coordinate(channels: int) -> nn.Module:
    from timm.layers.coord_attn import CoordAttn

    return CoordAttn(channels)


def _eca(channels: int) -> nn.Module:
    from vertebra.blocks.eca import eca

    return eca(channels)


_ARMS: Mapping[str, tuple[str, Callable[[int], nn.Module]]] = {
    "plain": ("no attention", lambda channels: nn.Identity()),
    "se": ("squeeze-and-excitation, ratio 16", _squeeze),
    "ca": ("coordinate attention", _coordinate),
    "eca": ("efficient channel attention", _eca),
    "ela_t": ("kernel 5, a channel a group", lambda channels: ela(channels, "t")),
    "ela_b": ("kernel 7, a channel a group", lambda channels: ela(channels, "b")),
    "ela_s": ("kernel 5, 8 channels a group", lambda channels: ela(channels, "s")),
    "ela_l": ("kernel 7, 8 channels a group", lambda channels: ela(channels, "l")),
    "timm": ("two convolutions and norms, SiLU before the gate", _timms),
}
_SETTINGS = {"toy": (3, 16, 2000, 10), "gpu": (3, 32, 50_000, 60)}
"""Blocks a stage, pixels, images, epochs."""


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> Effect:
    """ELA's four versions beside no attention, SE, coordinate attention, ECA and timm's module.

    Two arms are trained in small batches too, where the batch norm of coordinate attention is the suspect; and one
    is asked whether its gates find the object of an image whose class alone it was taught.
    """
    from vertebra.arms import parts

    _, size, images, epochs = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        found = {"top1": _top1(arm, seed, scale, train, test, batch=64)}
        if arm in ("ca", "ela_l"):
            found["top1_batch_8"] = _top1(arm, seed, scale, train, test, batch=8)
        if arm == "ela_l":
            found["inside"] = _inside(seed)
        return {name: found.get(name, float("nan")) for name in ("top1", "top1_batch_8", "inside")}

    return Effect(
        claim="gates for rows and columns, without reduction, gain over no attention and find the object",
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="plain",
        metrics={"top1": "%", "top1_batch_8": "%", "inside": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"ResNet-20 at {size} pixels, {len(train)} images, {epochs} epochs: three seeds tell differences of some "
            "two points; the paper's gains are below that, and of MobileNetV2 and larger ResNets on ImageNet"
        ),
        data=f"{words}; for `inside`, digits on noise",
    )


def _top1(arm: str, seed: int, scale: str, train: "Split", test: "Split", *, batch: int) -> float:
    from vertebra.arms import trained
    from vertebra.backbones.cifar_resnet import cifar_resnet
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    blocks, size, _, epochs = _SETTINGS[scale]
    backbone = cifar_resnet(blocks=blocks, image_size=size, attention=_ARMS[arm][1])
    rate = 0.05 * batch / 64
    plan = Plan(
        epochs=epochs,
        batch=batch,
        optimizer="sgd",
        lr=rate,
        weight_decay=5e-4,
        clip=None,
        views=Views(scale=(0.6, 1.0)),
        seed=seed,
    )
    return trained(backbone, train, test, plan).scores["top1"]


def _inside(seed: int) -> float:
    """Mean of the gates' product inside the box of a digit over that outside, after training on classes alone."""
    from vertebra.arms import trained
    from vertebra.backbones.cifar_resnet import cifar_resnet
    from vertebra.config import Plan, Views
    from vertebra.data import read
    from vertebra.data.loader import Batches

    torch.manual_seed(seed)
    digits = read("digits")
    backbone = cifar_resnet(blocks=1, image_size=32, attention=ela)
    train, _ = _canvases(digits.split("train"), 0)
    test, boxes = _canvases(digits.split("test"), 1)
    plan = Plan(epochs=12, batch=32, lr=3e-3, views=Views(flip=False, scale=(1.0, 1.0)), seed=seed)
    model = trained(backbone, train, test, plan).model
    last = [module for module in model.modules() if isinstance(module, ELA)][-1]
    seen: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Tensor], __: Tensor) -> None:
        rows, columns = last.gates(given[0])
        seen.append((rows * columns).mean(1, keepdim=True))

    with torch.inference_mode(), last.register_forward_hook(note):
        for batch in Batches(test, backbone.preprocess, views=None, batch=256, seed=0, workers=0).epoch(0, 0):
            model(batch.images)
    maps = nn.functional.interpolate(torch.cat(seen), (32, 32))[:, 0]
    return float(maps[boxes].mean() / maps[~boxes].mean())


def _canvases(split: "Split", seed: int) -> tuple["Split", Tensor]:
    """Each digit at 16 pixels somewhere on 32 x 32 pixels of noise; and (n, 32, 32), true within its box."""
    from dataclasses import replace

    import numpy as np

    from vertebra.data.digits import Arrays

    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 160, (len(split), 32, 32), dtype=np.uint8)
    boxes = torch.zeros(len(split), 32, 32, dtype=torch.bool)
    for index, (top, left) in enumerate(rng.integers(0, 17, (len(split), 2))):
        place = (slice(top, top + 16), slice(left, left + 16))
        pixels[index][place] = np.maximum(pixels[index][place], np.asarray(split.image(index).resize((16, 16))))
        boxes[index][place] = True
    return replace(split, store=Arrays(pixels), rows=np.arange(len(split))), boxes


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    drops = {arm: mean[arm] - measured.mean(arm, "top1_batch_8") for arm in ("ca", "ela_l")}
    inside, words = measured.mean("ela_l", "inside"), ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    return [
        Check(
            "ELA-L gains at least 0.3 points over no attention",
            mean["ela_l"] >= mean["plain"] + 0.3,
            f"{mean['ela_l'] - mean['plain']:+.2f} points; all arms: {words}",
        ),
        Check(
            "ELA-L is at most 0.1 points behind coordinate attention",
            mean["ela_l"] >= mean["ca"] - 0.1,
            f"{mean['ela_l'] - mean['ca']:+.2f} points",
        ),
        Check(
            "ELA-L loses no more than coordinate attention from batches of 64 to batches of 8",
            drops["ela_l"] <= drops["ca"],
            f"{drops['ela_l']:+.2f} against {drops['ca']:+.2f} points",
        ),
        Check("gates are at least 1.2 times as open inside the box", inside >= 1.2, f"{inside:.2f} times"),
    ]
