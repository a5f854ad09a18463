"""Omni-scale block: streams of one to four light 3 x 3 convolutions, weighed by one shared gate, in a residual.

Shapes: (B, C, H, W) in, (B, outputs, H, W) out. Stream t stacks t light convolutions and sees 2t + 1 pixels; the
unified aggregation gate, one small network for all streams, gives each channel of each its weight, which depends on the
image. Instance norms take an image's style away: inside of the residual, outside of it (after the addition), or both.
Used alone, through `vertebra.surgery.swap`, in `vertebra.backbones.osnet`, and as the four candidates of
`vertebra.search.osnet_ain` (OSNet, arXiv 1905.00953, section 3; its instance norms: arXiv 1910.06827, figure 3).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.errors import UsageError, near

VARIANTS = {
    "plain": {"inside": False, "outside": False},
    "inside": {"inside": True, "outside": False},
    "outside": {"inside": False, "outside": True},
    "both": {"inside": True, "outside": True},
}

Gate = Literal["channel", "stream", "none"]

_SPLIT, _SQUEEZE = 4, 16


def omni_scale(
    channels: int,
    variant: str = "plain",
    *,
    outputs: int | None = None,
    middle: int | None = None,
    streams: int = 4,
    gate: Gate = "channel",
) -> "OmniScale":
    """The block for maps of `channels`.

    Args:
        channels: of the maps.
        variant: where the instance norms are, one of `VARIANTS`. One inside takes the place of the last batch norm.
        outputs: channels that come out; as many as go in by default.
        middle: channels of the streams; a quarter of the outputs by default.
        streams: how many; the paper has 4.
        gate: "channel", the paper's; or what it is compared with: one weight a "stream", or "none", where the streams
            lie side by side and the last convolution mixes them.

    Raises:
        UsageError: an unknown variant or gate, or a number below 1.
    """
    outputs = channels if outputs is None else outputs
    middle = max(1, outputs // _SPLIT) if middle is None else middle
    for name, value in {"channels": channels, "outputs": outputs, "middle": middle, "streams": streams}.items():
        if value < 1:
            raise UsageError(f"omni_scale: {name} is {value}; it must be at least 1")
    if variant not in VARIANTS:
        raise UsageError(
            f"omni_scale has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    if gate not in ("channel", "stream", "none"):
        raise UsageError(f"omni_scale: gate is {gate!r}; it can be channel, stream or none")
    return OmniScale(channels, outputs, middle=middle, streams=streams, gate=gate, **VARIANTS[variant])


class OmniScale(nn.Module):
    """The block; build it with `omni_scale`.

    Attributes:
        reduce: maps to `middle` channels.
        streams: stream t of t + 1 light convolutions.
        gate: weighs the streams and brings them together.
        expand: back to the outputs.
        shortcut: a linear convolution where the channels change.
        norm: the instance norm outside of the residual.
    """

    def __init__(
        self, channels: int, outputs: int, *, middle: int, streams: int, gate: Gate, inside: bool, outside: bool
    ) -> None:
        super().__init__()
        self.reduce = conv_norm(channels, middle)
        self.streams = nn.ModuleList(
            nn.Sequential(*(light_conv(middle) for _ in range(depth))) for depth in range(1, streams + 1)
        )
        self.gate = _Beside() if gate == "none" else SharedGate(middle, gates=middle if gate == "channel" else 1)
        mixed = middle * streams if gate == "none" else middle
        last = InstanceNorm(outputs) if inside else nn.BatchNorm2d(outputs)
        self.expand = nn.Sequential(nn.Conv2d(mixed, outputs, 1, bias=False), last)
        self.shortcut: nn.Module = nn.Identity()
        if channels != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.norm = InstanceNorm(outputs) if outside else nn.Identity()
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, outputs, H, W)."""
        reduced = self.reduce(x)
        mixed = self.gate([stream(reduced) for stream in self.streams])
        return self.norm(self.expand(mixed) + self.shortcut(x)).relu_()


class SharedGate(nn.Module):
    """The unified aggregation gate: one network, given each stream's mean over space, weighs them all (eq. 4).

    Attributes:
        squeeze: means to fewer channels.
        excite: back to a weight a channel, or one a stream.
    """

    def __init__(self, channels: int, *, gates: int) -> None:
        super().__init__()
        few = max(1, channels // _SQUEEZE)
        self.squeeze, self.excite = nn.Linear(channels, few), nn.Linear(few, gates)

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """Streams (B, C, H, W) to the sum of all, each times its weights in 0..1."""
        means = torch.stack([stream.mean((2, 3)) for stream in streams])  # (streams, B, C)
        gates = self.excite(self.squeeze(means).relu()).sigmoid()[..., None, None]
        mixed = streams[0] * gates[0]
        for stream, gate in zip(streams[1:], gates[1:], strict=True):
            mixed.addcmul_(stream, gate)
        return mixed


class _Beside(nn.Module):
    """No gate: the streams' channels side by side."""

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(streams), 1)


def light_conv(channels: int) -> nn.Sequential:
    """A light 3 x 3 convolution: pointwise without norm or activation first, then depthwise (figure 3)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    """A pointwise convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def start(module: nn.Module) -> None:
    """Initialise what a network of these blocks has: Kaiming by outputs, and N(0, 0.01) where it embeds."""
    gates = {layer for part in module.modules() if isinstance(part, SharedGate) for layer in part.children()}
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) or layer in gates:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
