"""WaveMix block: pixels are mixed by a wavelet transform, channels by 1 x 1 convolutions, and back up again.

Shapes: maps (B, C, H, W) in, the same out; C is a multiple of 4. A quarter of the channels goes through Haar's
transform, whose four bands are C channels at half the size; two 1 x 1 convolutions and a transposed one follow, and a
batch norm. With more levels the low band is transformed again, and what a level makes joins the bands of the next finer
one. The residual is added outside. An odd side is continued by zeros and cut off again; the paper's code refuses it.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vertebra.blocks.wavelet import haar
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Upsample = Literal["transposed", "nearest", "shuffle"]
"""How a level gets back to twice the size: a transposed convolution, copies, or pixel shuffle and a convolution."""


def wave_mix(
    channels: int,
    *,
    level: int = 1,
    ratio: int = 2,
    dropout: float = 0.5,
    upsample: Upsample = "transposed",
    bands: Callable[[int], nn.Module] | None = None,
) -> "WaveMixBlock":
    """The block for maps of `channels` (arXiv 2205.14375, section 3).

    Args:
        channels: a multiple of 4.
        level: how often the low band is transformed; 1 is WaveMix-Lite.
        ratio: width of the hidden channels over `channels`.
        dropout: probability that a hidden value is dropped in training, 0..1.
        upsample: "transposed" is the paper's, "nearest" that of its smallest networks, "shuffle" that of its
            third version.
        bands: what takes Haar's place: channels -> a module that turns maps into four of half the size, rounded up.

    Raises:
        UsageError: an option out of range.
    """
    if channels < 4 or channels % 4:
        raise UsageError(f"wave_mix: channels is {channels}; it must be a multiple of 4, one quarter for each band")
    if min(level, ratio) < 1:
        raise UsageError(f"wave_mix: level is {level} and ratio {ratio}; both must be at least 1")
    if not 0 <= dropout < 1:
        raise UsageError(f"wave_mix: dropout is {dropout}; it must be in [0, 1), as 0.5")
    if upsample not in get_args(Upsample):
        raise UsageError(f"wave_mix: upsample is {upsample!r}; it can be {', '.join(get_args(Upsample))}")
    made = [(bands or _haar)(channels // 4) for _ in range(level)]
    return WaveMixBlock(channels=channels, bands=made, ratio=ratio, dropout=dropout, upsample=upsample)


class WaveMixBlock(nn.Module):
    """Wavelet mixing of some levels; build it with `wave_mix`.

    Attributes:
        reduce: channels to a quarter of them.
        bands: maps to four bands, one module a level, fine to coarse.
        levels: what makes maps of twice the size of a level's bands, fine to coarse.
    """

    def __init__(
        self, *, channels: int, bands: list[nn.Module], ratio: int, dropout: float, upsample: Upsample
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.bands = nn.ModuleList(bands)
        self.levels = nn.ModuleList()
        for number in range(1, len(bands) + 1):
            inputs = channels + (channels // 2 if number < len(bands) else 0)  # the coarser level's maps join
            outputs = channels if number == 1 else channels // 2
            hidden = ratio * channels
            self.levels.append(_level(inputs, hidden, channels, outputs, dropout, upsample))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        low, sizes, scales = self.reduce(x), [], []
        for split in self.bands:
            sizes.append(low.shape[2:])
            scales.append(split(low))
            low = scales[-1][0]
        made: list[Tensor] = []
        for level, bands, (height, width) in zip(reversed(self.levels), reversed(scales), reversed(sizes), strict=True):
            made = [level(torch.cat((*bands, *made), 1))[:, :, :height, :width]]
        return made[0]


class Haar(nn.Module):
    """Haar's four bands of maps."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, C, H, W) to four of (B, C, h, w), as `vertebra.blocks.wavelet.haar`."""
        return haar(x)


def _haar(channels: int) -> nn.Module:
    return Haar()


def _level(inputs: int, hidden: int, channels: int, outputs: int, dropout: float, upsample: Upsample) -> nn.Module:
    """Bands (B, inputs, h, w) to maps (B, outputs, 2 h, 2 w)."""
    start = (nn.Conv2d(inputs, hidden, 1), nn.GELU(), nn.Dropout(dropout))
    if upsample == "shuffle":
        project = nn.Conv2d(hidden // 4, outputs, 3, padding=1)
        return nn.Sequential(*start, nn.PixelShuffle(2), project, nn.BatchNorm2d(outputs))
    if upsample == "nearest":  # a norm does the same before copying as after it, at a quarter of the cost
        project, norm = nn.Conv2d(hidden, outputs, 1), nn.BatchNorm2d(outputs)
        return nn.Sequential(*start, project, norm, nn.Upsample(scale_factor=2))
    project, up = nn.Conv2d(hidden, channels, 1), nn.ConvTranspose2d(channels, outputs, 4, 2, 1)
    return nn.Sequential(*start, project, up, nn.BatchNorm2d(outputs))
