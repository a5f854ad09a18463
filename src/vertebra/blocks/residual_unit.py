"""Residual units: where norm and activation stand, and what the shortcut does, as choices.

Shapes: (B, inputs, H, W) to (B, outputs, H / stride, W / stride). "full" is the unit of Identity Mappings in Deep
Residual Networks (arXiv 1603.05027): norm and activation before each convolution, nothing behind the addition,
so that a map is the plain sum of the first one and of what all units put out. The others are the paper's ablations
(figures 2 and 4).
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError, near

VARIANTS = {
    "full": {"order": "full"},
    "original": {"order": "original"},
    "norm_behind": {"order": "norm_behind"},
    "activation_before": {"order": "activation_before"},
    "activation_only": {"order": "activation_only"},
}

Order = Literal["full", "original", "norm_behind", "activation_before", "activation_only"]
Shortcut = Literal["identity", "half", "half_both", "gate", "shortcut_gate", "conv", "dropout"]


def residual_unit(
    channels: int,
    variant: str = "full",
    *,
    outputs: int | None = None,
    stride: int = 1,
    shortcut: Shortcut = "identity",
    bottleneck: bool = True,
    stride_in: Literal["1x1", "3x3"] = "1x1",
) -> "ResidualUnit":
    """The unit for maps of `channels`.

    Args:
        channels: of the input.
        variant: order of norm, activation and convolution. "full": norm and activation before each convolution;
            "original": behind each, the last activation behind the addition; "norm_behind": the last norm too;
            "activation_before": the last activation before the addition; "activation_only": activation before, norm
            behind each convolution.
        outputs: channels that come out; as many as go in by default.
        stride: 1 or 2.
        shortcut: where shapes agree: "identity"; "half" of it, "half_both" of it and of the branch; "gate", a 1 x 1
            convolution's sigmoid that shares between both, "shortcut_gate" for the shortcut alone; "conv", a 1 x 1
            convolution; "dropout" of a half.
        bottleneck: 1 x 1, 3 x 3, 1 x 1 convolutions of a quarter of the outputs in between; else two of 3 x 3.
        stride_in: which convolution of a bottleneck strides; the first one is the authors', the other timm's.

    Raises:
        UsageError: an unknown choice, or channels that cannot be quartered.
    """
    if variant not in VARIANTS:
        raise UsageError(f"residual_unit has no variant {variant!r}{near(variant, VARIANTS)}; it has {list(VARIANTS)}")
    outputs = outputs or channels
    for name, value, known in (("shortcut", shortcut, get_args(Shortcut)), ("stride_in", stride_in, ("1x1", "3x3"))):
        if value not in known:
            raise UsageError(f"residual_unit: {name} is {value!r}{near(value, known)}; it can be {', '.join(known)}")
    if channels < 1 or stride not in (1, 2) or (bottleneck and outputs % 4):
        raise UsageError(
            f"residual_unit: channels is {channels}, outputs {outputs}, stride {stride}; channels must be at least 1,"
            " the stride 1 or 2, and the outputs of a bottleneck a multiple of 4"
        )
    return ResidualUnit(
        channels,
        outputs,
        stride,
        order=variant,  # type: ignore[arg-type] # one of them
        shortcut=shortcut,
        bottleneck=bottleneck,
        stride_in=stride_in,
    )


class ResidualUnit(nn.Module):
    """Branch and shortcut; build it with `residual_unit`.

    Attributes:
        common: norm and activation that both ways share, in a "full" unit that changes the shape.
        branch: what is added.
        shortcut: of a unit that keeps the shape, by kind; of one that changes it, a 1 x 1 convolution.
        behind: what follows the addition.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        order: Order = "full",
        shortcut: Shortcut = "identity",
        bottleneck: bool = True,
        stride_in: Literal["1x1", "3x3"] = "1x1",
        activated: bool = False,
    ) -> None:
        super().__init__()
        changes = stride > 1 or inputs != outputs
        layers = _layers(inputs, outputs, stride, bottleneck, stride_in)
        parts = _ordered(layers, order)
        self.common = nn.Sequential()
        if order == "full" and (changes or activated):
            self.common = nn.Sequential() if activated else nn.Sequential(*parts[:2])
            parts = parts[2:]
        self.branch = nn.Sequential(*parts)
        self.shortcut = _shortcut(inputs, outputs, stride, order, shortcut if not changes else None)
        self.behind = nn.Sequential(
            *{"original": [nn.ReLU()], "norm_behind": [nn.BatchNorm2d(outputs), nn.ReLU()]}.get(order, [])
        )

    def forward(self, x: Tensor) -> Tensor:
        """One map to the next."""
        x = self.common(x)
        return self.behind(self.shortcut(x, self.branch(x)))


class Added(nn.Module):
    """shortcut(x) + branch, each times a constant."""

    def __init__(self, way: nn.Module, scale: float = 1.0, branch_scale: float = 1.0) -> None:
        super().__init__()
        self.way, self.scale, self.branch_scale = way, scale, branch_scale

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Two maps to their weighed sum."""
        x = self.way(x)
        x = x if self.scale == 1 else x * self.scale
        return x + (branch if self.branch_scale == 1 else branch * self.branch_scale)


class Gated(nn.Module):
    """(1 - g) x + g F, or (1 - g) x + F for the shortcut alone; g is the sigmoid of a 1 x 1 convolution of x."""

    def __init__(self, channels: int, *, exclusive: bool) -> None:
        super().__init__()
        self.gate, self.exclusive = nn.Conv2d(channels, channels, 1), exclusive
        nn.init.constant_(self.gate.bias, -6.0)  # type: ignore[arg-type] # nearly the plain shortcut at the start

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Two maps to their sum."""
        gate = torch.sigmoid(self.gate(x))
        return (1 - gate) * x + (gate * branch if self.exclusive else branch)


def _shortcut(inputs: int, outputs: int, stride: int, order: Order, kind: Shortcut | None) -> nn.Module:
    if kind is None:  # the shape changes; behind a shared norm no other one is needed
        conv = _conv(inputs, outputs, 1, stride)
        return Added(conv if order == "full" else nn.Sequential(conv, nn.BatchNorm2d(outputs)))
    if kind in ("gate", "shortcut_gate"):
        return Gated(inputs, exclusive=kind == "gate")
    ways = {"conv": lambda: _conv(inputs, outputs, 1), "dropout": lambda: nn.Dropout(0.5)}
    return Added(ways.get(kind, nn.Identity)(), *{"half": (0.5, 1.0), "half_both": (0.5, 0.5)}.get(kind, (1.0, 1.0)))


def _layers(inputs: int, outputs: int, stride: int, bottleneck: bool, stride_in: str) -> list[nn.Conv2d]:
    if not bottleneck:
        return [_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3)]
    inner, first = outputs // 4, stride if stride_in == "1x1" else 1
    return [_conv(inputs, inner, 1, first), _conv(inner, inner, 3, stride // first), _conv(inner, outputs, 1)]


def _ordered(layers: list[nn.Conv2d], order: Order) -> list[nn.Module]:
    """Convolutions with their norms and activations."""
    parts: list[nn.Module] = []
    for number, conv in enumerate(layers):
        last = number == len(layers) - 1
        if order == "full":
            parts += [nn.BatchNorm2d(conv.in_channels), nn.ReLU(inplace=True), conv]
        elif order == "activation_only":
            parts += [nn.ReLU(), conv, nn.BatchNorm2d(conv.out_channels)]
        else:
            norm = [] if last and order == "norm_behind" else [nn.BatchNorm2d(conv.out_channels)]
            parts += [conv, *norm, *([] if last and order != "activation_before" else [nn.ReLU()])]
    return parts


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv
