"""One-shot aggregation: layers in a row, all of whose outputs are concatenated once, at the end.

Shapes: (B, C, H, W) in, (B, outputs, H, W) out. Layers of one width run one after the other; a 1 x 1 convolution mixes
the input and all their outputs. The module of VoVNet (arXiv 1904.09730) and, with effective squeeze-and-excitation and
a shortcut, of VoVNetV2 (arXiv 1911.06667).
"""

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.errors import UsageError

VARIANTS = {
    "v1": {"attention": False, "shortcut": False},
    "v2": {"attention": True, "shortcut": True},
}


def osa(
    channels: int,
    variant: str = "v1",
    *,
    outputs: int | None = None,
    inner: int | None = None,
    layers: int = 5,
    depthwise: bool = False,
    attention: bool | None = None,
    shortcut: bool | None = None,
) -> "OSA":
    """The module for maps of `channels`.

    Args:
        channels: of the input.
        variant: "v1" as in VoVNet, "v2" with attention and shortcut.
        outputs: channels that come out; as many as go in by default.
        inner: width of the layers; half of `channels` by default.
        layers: of 3 x 3 convolutions.
        depthwise: depthwise convolutions and 1 x 1 ones in place of dense ones.
        attention: effective squeeze-and-excitation behind the mixing, in place of the variant's.
        shortcut: adds the input, in place of the variant's; channels must agree.

    Raises:
        UsageError: an unknown variant, an option below 1, or a shortcut between different widths.
    """
    if variant not in VARIANTS:
        raise UsageError(f"osa has no variant {variant!r}; it has {', '.join(VARIANTS)}")
    outputs, inner = outputs or channels, inner or max(1, channels // 2)
    for name, value in {"channels": channels, "outputs": outputs, "inner": inner, "layers": layers}.items():
        if value < 1:
            raise UsageError(f"osa: {name} is {value}; it must be at least 1")
    chosen = VARIANTS[variant]
    shortcut = chosen["shortcut"] if shortcut is None else shortcut
    if shortcut and outputs != channels:
        raise UsageError(f"osa: a shortcut needs as many outputs as channels; they are {outputs} and {channels}")
    attention = chosen["attention"] if attention is None else attention
    return OSA(channels, outputs, inner, layers, depthwise=depthwise, attention=attention, shortcut=shortcut)


class OSA(nn.Module):
    """One-shot aggregation; build it with `osa`.

    Attributes:
        reduce: 1 x 1 convolution to the width of depthwise layers, where the input has another.
        layers: one after the other.
        mix: 1 x 1 convolution of the input and all layers' outputs.
        attention: weighs the mixed channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        inner: int,
        layers: int,
        *,
        depthwise: bool = False,
        attention: bool = False,
        shortcut: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        reduced = depthwise and inputs != inner
        self.reduce = conv_norm(inputs, inner, 1) if reduced else nn.Identity()
        width = inner if reduced else inputs
        make = separable_norm if depthwise else conv_norm
        self.layers = nn.ModuleList(make(inner if number else width, inner, 3) for number in range(layers))
        self.mix = conv_norm(inputs + layers * inner, outputs, 1)
        self.attention = EffectiveSqueeze(outputs) if attention else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """One map to the next."""
        seen, y = [x], self.reduce(x)
        for layer in self.layers:
            y = layer(y)
            seen.append(y)
        y = self.drop_path(self.attention(self.mix(torch.cat(seen, 1))))
        return x + y if self.shortcut else y


class EffectiveSqueeze(nn.Module):
    """Channels times a hard sigmoid of one full linear map of their means, without reduction: eSE (1911.06667, eq. 2).

    Attributes:
        linear: 1 x 1 convolution with bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x * nn.functional.hardsigmoid(self.linear(x.mean((2, 3), keepdim=True)))


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def separable_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Depthwise convolution, 1 x 1 convolution, batch norm, ReLU."""
    along = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
    nn.init.kaiming_normal_(along.weight, mode="fan_out")
    return nn.Sequential(along, *conv_norm(inputs, outputs, 1))
