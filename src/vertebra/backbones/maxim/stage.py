"""What a stage of MAXIM is made of: groups of blocks at three resolutions, gated skips, supervised attention.

Shapes: maps are (B, H, W, C) throughout, in contiguous memory. Level 0 has the image's resolution and `width` channels,
each next one half the resolution and twice the channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, leaky_relu, linear

from vertebra.blocks.cross_gating import CrossGating, convolution, dense, enlarging
from vertebra.blocks.multi_axis_mlp import EPS, VARIANTS, Axis, MultiAxisMlp, tanh_gelu
from vertebra.blocks.multi_axis_mlp import dense as small_dense

DEPTH, FINE = 3, 2
"""Levels of a stage; how many of them have the larger blocks and grids."""
REDUCTION, SLOPE = 4, 0.2


class Sides(TypedDict):
    """Side in places of a window, and cells of the grid down and across."""

    block: int
    grid: int


@dataclass(frozen=True)
class Design:
    """What all stages share; the attributes are the options of `vertebra.backbones.maxim`, and `channels` of images."""

    channels: int
    width: int
    scales: int
    groups: int
    bottlenecks: int
    block: Sequence[int]
    grid: Sequence[int]
    mixer: Literal["multi_axis", "block", "grid"]
    skips: Literal["gated", "conv"]

    @property
    def dims(self) -> list[int]:
        """Channels of each level."""
        return [self.width << level for level in range(DEPTH)]

    @property
    def axes(self) -> Sequence[Axis]:
        """Along which each half of the channels is mixed."""
        return VARIANTS[self.mixer]["axes"]

    def sides(self, level: int) -> "Sides":
        """Block and grid of a level; `DEPTH` is the bottleneck."""
        place = 0 if level < FINE else 1
        return {"block": self.block[place], "grid": self.grid[place]}


class Carried(NamedTuple):
    """What a stage gives, by level where there are several.

    Attributes:
        encoded: maps before each downsampling.
        decoded: maps of the decoder.
        deepest: of the bottleneck, at half the resolution of the last level.
        attended: features of the supervised attention, a scale; none in the last stage.
        images: what that attention restored, a scale.
    """

    encoded: Sequence[Tensor]
    decoded: Sequence[Tensor]
    deepest: Tensor
    attended: Sequence[Tensor]
    images: Sequence[Tensor]


class Stage(nn.Module):
    """A U-Net of three levels whose skips are cross-gated.

    Attributes:
        entries: images to maps, a scale.
        encoders: a level each; `gates` and `decoders` likewise.
        bottleneck: groups in a row.
        attentions: a scale each; none in the last stage.
    """

    def __init__(self, design: Design, rates: Iterator[float], *, first: bool, last: bool) -> None:
        super().__init__()
        dims, scales = design.dims, range(design.scales)
        self.entries = nn.ModuleList(Entry(design, level, fused=not first) for level in scales)
        self.encoders = nn.ModuleList(Encoder(design, level, rates, fused=not first) for level in range(DEPTH))
        self.bottleneck = nn.ModuleList(_bottleneck(design, rates) for _ in range(design.bottlenecks))
        self.gates = nn.ModuleList(_skip(design, level) for level in range(DEPTH))
        upwards = [Decoder(design, level, rates) for level in reversed(range(DEPTH))]
        self.decoders = nn.ModuleList(reversed(upwards))
        attended = () if last else (dims[level] for level in scales)
        self.attentions = nn.ModuleList(SupervisedAttention(dim, design.channels) for dim in attended)

    def forward(self, images: Sequence[Tensor], before: Carried | None) -> Carried:
        """Images at each scale, and what the stage before gave, to what this one gives."""
        signals = [None] * len(images) if before is None else before.attended
        inputs = [entry(x, signal) for entry, x, signal in zip(self.entries, images, signals, strict=True)]
        x, encoded, skips, decoded = inputs[0], [], [], []
        for level, encoder in enumerate(self.encoders):
            signal = None if before is None else before.encoded[level] + before.decoded[level]
            x, bridge = encoder(x, inputs[level] if level < len(inputs) else None, signal)
            encoded.append(bridge)
        for group in self.bottleneck:
            x = group(x)
        deepest = signal = x
        for gate in reversed(self.gates):
            skip, signal = gate(encoded, signal)
            skips.append(skip)  # coarse to fine, as decoders concatenate them
        for decoder in reversed(self.decoders):
            x = decoder(x, skips)
            decoded.insert(0, x)
        found = [attend(x, image) for attend, x, image in zip(self.attentions, decoded, images, strict=False)]
        return Carried(encoded, decoded, deepest, [pair[0] for pair in found], [pair[1] for pair in found])

    def parts(self) -> list[nn.Module]:
        """In the order of the signal."""
        inwards = [*self.entries, *self.encoders, *self.bottleneck]
        return [*inwards, *reversed(self.gates), *reversed(self.decoders), *self.attentions]


class Entry(nn.Module):
    """An image to a map; in later stages gated with the attended features of the stage before."""

    def __init__(self, design: Design, level: int, *, fused: bool) -> None:
        super().__init__()
        self.conv = convolution(design.channels, design.dims[level], 3)
        self.fuse = _fuse(design, level) if fused else None

    def forward(self, image: Tensor, signal: Tensor | None) -> Tensor:
        """An image (B, H, W, channels) to a map."""
        x = self.conv(image)
        return x if self.fuse is None else self.fuse(x, signal)[0]


class Encoder(nn.Module):
    """A group of blocks and a strided convolution; in later stages gated with maps of the stage before."""

    def __init__(self, design: Design, level: int, rates: Iterator[float], *, fused: bool) -> None:
        super().__init__()
        dim = design.dims[level]
        inputs = (design.dims[level - 1] if level else dim) + (dim if level < design.scales else 0)
        self.group = Group(dense(inputs, dim), dim, design, level, rates)
        self.fuse = _fuse(design, level) if fused else None
        self.down = convolution(dim, dim, 4, 2)

    def forward(self, x: Tensor, image: Tensor | None, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        """A map, that of the scaled image, and a signal, to the next level's map and this one's."""
        x = self.group(x if image is None else torch.cat((x, image), -1))
        x = x if self.fuse is None else self.fuse(x, signal)[0]
        return self.down(x), x


class Decoder(nn.Module):
    """Up, skips of all levels, a group of blocks."""

    def __init__(self, design: Design, level: int, rates: Iterator[float]) -> None:
        super().__init__()
        dims = design.dims
        dim = dims[level]
        self.up = enlarging(dims[min(level + 1, DEPTH - 1)], dim)
        self.group = Group(Fusion(dims[::-1], dim, own=0, direct=dim), dim, design, level, rates)

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """The map of the level below and skips, coarse to fine, to this level's map."""
        return self.group((self.up(x), *skips))


class Group(nn.Module):
    """A projection, then pairs of a multi-axis MLP and a channel attention block, with a skip over them all."""

    def __init__(
        self, project: nn.Module, dim: int, design: Design, level: int, rates: Iterator[float], *, deep: bool = False
    ) -> None:
        super().__init__()
        self.project, attend = project, DenseAttention if deep else ConvAttention
        blocks: list[nn.Module] = []
        for _ in range(design.groups):
            blocks.append(MultiAxisMlp(dim, design.axes, **design.sides(level), drop_path=next(rates)))
            blocks.append(attend(dim, next(rates)))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Whatever the projection takes, to maps (B, H, W, dim)."""
        x = self.project(x)
        return self.blocks(x) + x


class ConvAttention(nn.Module):
    """Two 3 x 3 convolutions and channel attention, with their residual (RCAB)."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.conv1, self.conv2 = convolution(dim, dim, 3), convolution(dim, dim, 3)
        self.attention = ChannelAttention(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        y = self.conv2(leaky_relu(self.conv1(self.norm(x)), SLOPE, inplace=True))
        return torch.addcmul(x, y, self.drop_path(self.attention(y)))


class DenseAttention(nn.Module):
    """An MLP over channels and channel attention, with their residual (RDCAB)."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.inner, self.outer = small_dense(dim, dim), small_dense(dim, dim)
        self.attention = ChannelAttention(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to the same."""
        y = self.outer(tanh_gelu(self.inner(self.norm(x))))
        return torch.addcmul(x, y, self.drop_path(self.attention(y)))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation: a factor 0..1 for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(1, dim // REDUCTION)
        self.squeeze, self.excite = dense(dim, hidden), dense(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to factors (B, 1, 1, C)."""
        return self.excite(self.squeeze(x.mean((1, 2), keepdim=True)).relu()).sigmoid()


class SupervisedAttention(nn.Module):
    """A map restores an image, and the image says which of its features the next stage gets."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.features, self.gate = convolution(dim, dim, 3), convolution(channels, dim, 3)
        self.image = convolution(dim, channels, 3)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """A map (B, H, W, dim) and the scaled image, to features like the map and the restored image."""
        restored = self.image(x) + image
        return torch.addcmul(x, self.features(x), self.gate(restored).sigmoid()), restored


class ConvSkip(nn.Module):
    """A skip without gates: maps of all levels brought to one, and a 3 x 3 convolution."""

    def __init__(self, fusion: "Fusion", dim: int) -> None:
        super().__init__()
        self.fusion, self.conv = fusion, convolution(dim, dim, 3)

    def forward(self, maps: Sequence[Tensor], signal: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of all levels to one; the signal stays as it is."""
        return self.conv(self.fusion(maps)), signal


class Fusion(nn.Module):
    """Maps of all levels, each resized and projected to `dim` channels, side by side, projected once more.

    The two projections are one linear map, and a linear map of channels and a resizing can change places: each map is
    projected once, at the smaller of its two sizes, by the product of its weights, and nothing is concatenated.

    Attributes:
        projections: of each map but the first, if that is `direct`.
        mix: the last projection, of the concatenated maps.
        own: number of the map that has the right size.
    """

    def __init__(self, dims: Sequence[int], dim: int, *, own: int, direct: int = 0) -> None:
        super().__init__()
        self.projections = nn.ModuleList(dense(inputs, dim) for inputs in dims)
        self.sizes = [direct] * bool(direct) + [dim] * len(dims)
        self.mix = dense(sum(self.sizes), dim)
        self.own = own

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, H_i, W_i, C_i) to one (B, H, W, dim)."""
        weights, bias = self.merged()
        height, width = maps[self.own].shape[1:3]
        out = linear(maps[self.own], weights[self.own], bias)
        for number, (x, weight) in enumerate(zip(maps, weights, strict=True)):
            if number != self.own:
                times = x.shape[1] // height
                x = linear(x if times <= 1 else shrunk(x, times), weight)
                out = out + (x if times >= 1 else enlarged(x, (height, width)))
        return out

    def merged(self) -> tuple[list[Tensor], Tensor]:
        """Weights of each map, (dim, C_i), and the bias, (dim,)."""
        parts, bias = list(self.mix.weight.split(self.sizes, 1)), self.mix.bias
        direct = len(parts) - len(self.projections)
        weights = parts[:direct]
        for part, projection in zip(parts[direct:], self.projections, strict=True):
            assert isinstance(projection, nn.Linear)
            weights.append(part @ projection.weight)
            bias = bias + part @ projection.bias
        return weights, bias


def shrunk(x: Tensor, times: int) -> Tensor:
    """Maps (B, H, W, C) at 1 / `times` of their size, an even divisor: bilinear, with a filter that does not alias.

    The filter is a triangle of 2 * times places; what lies outside of the map has no weight.
    """
    distance = (torch.arange(2 * times, device=x.device) + 0.5 - times).abs()
    taps = ((1 - distance / times) / times).to(x.dtype)
    x = x.permute(0, 3, 1, 2)
    for axis in (2, 3):
        shape = [1, 1, 1, 1]
        shape[axis] = 2 * times
        stride, half = [1, 1], [0, 0]
        stride[axis - 2], half[axis - 2] = times, times // 2
        kernel = taps.view(shape)
        line = [1, 1, 1, 1]
        line[axis] = x.shape[axis]
        inside = conv2d(torch.ones(line, dtype=x.dtype, device=x.device), kernel, None, stride, half)
        kernel = kernel.expand(x.shape[1], -1, -1, -1)
        x = conv2d(x, kernel, None, stride, half, groups=x.shape[1]) / inside
    return x.permute(0, 2, 3, 1).contiguous()


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w, C) at a larger `size`, bilinear."""
    x = interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1).contiguous()


def _fuse(design: Design, level: int) -> CrossGating:
    """Two maps of a level, gating each other."""
    dim = design.dims[level]
    return CrossGating(dense(dim, dim), dim, dim, design.axes, **design.sides(level))


def _skip(design: Design, level: int) -> nn.Module:
    """The skip of a level: maps of all levels, gated by the signal from below."""
    dims = design.dims
    fusion = Fusion(dims, dims[level], own=level)
    if design.skips == "conv":
        return ConvSkip(fusion, dims[level])
    signal = dims[min(level + 1, DEPTH - 1)]
    return CrossGating(fusion, signal, dims[level], design.axes, **design.sides(level), upsample=True)


def _bottleneck(design: Design, rates: Iterator[float]) -> Group:
    dim = design.dims[-1]
    return Group(dense(dim, dim), dim, design, DEPTH, rates, deep=True)
