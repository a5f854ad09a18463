"""Tokens-to-Token: an image becomes tokens step by step, each made of overlapping neighbours (arXiv 2101.11986).

    t2t(3, 384)                                              images (B, 3, H, W) to maps of 64, 64 and 384 channels

A soft split cuts a map into overlapping squares and makes a token of each, of all its numbers. A small transformer of
few channels then mixes the tokens, which lie as a map again and are split anew; after the last split a linear layer
follows. The transformer's shortcut is that of its values, since tokens are wider than what it gives.

No square is ever cut out: a linear layer on squares is a convolution, and the layer norm before it needs nothing but
the mean and the variance of each square, which are averages of the map and of its squares.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, linear

from vertebra.blocks.attention import attend
from vertebra.blocks.performer import performer
from vertebra.blocks.rows import Dense
from vertebra.contracts import Level
from vertebra.errors import UsageError

VARIANTS = {"performer": {"mix": "performer"}, "transformer": {"mix": "transformer"}}

Split = tuple[int, int, int]
"""Kernel, stride and padding of a soft split, in cells."""

SPLITS: tuple[Split, ...] = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


def t2t(
    channels: int,
    dim: int,
    variant: str = "performer",
    *,
    mix: Literal["performer", "transformer"] | None = None,
    splits: Sequence[Split] = SPLITS,
    hidden: int = 64,
) -> "T2T":
    """The tokenizer.

    Args:
        channels: of the images.
        dim: width of the tokens that come out.
        variant: one of `VARIANTS`; sets `mix`.
        mix: attention of the transformers between the splits: at linear cost, or a softmax.
        splits: kernel, stride and padding of each; there is a transformer behind all but the last.
        hidden: channels of the transformers.

    Raises:
        UsageError: an unknown variant, or a number out of range.
    """
    mix = mix or VARIANTS.get(variant, {}).get("mix")  # type: ignore[assignment]
    if mix not in ("performer", "transformer"):
        raise UsageError(f"t2t: {mix or variant!r} is no way to mix tokens; it is one of {', '.join(VARIANTS)}")
    if min(channels, dim, hidden) < 1:
        raise UsageError(f"t2t: channels is {channels}, dim {dim} and hidden {hidden}; they must be at least 1")
    for split in splits:
        if len(split) != 3 or split[0] < 1 or split[1] < 1 or not 0 <= split[2] <= split[0] // 2:
            raise UsageError(
                f"t2t: the split {tuple(split)} is no (kernel, stride, padding); write positive numbers with a padding "
                "of at most half the kernel, as (3, 2, 1)"
            )
    if not splits:
        raise UsageError("t2t: splits is empty; it needs at least one (kernel, stride, padding)")
    return T2T(channels=channels, dim=dim, mix=mix, splits=splits, hidden=hidden)


class T2T(nn.Module):
    """Soft splits with a transformer between each two; build it with `t2t`.

    Attributes:
        mixers: the splits but the last, each with its transformer.
        project: a square of the last split to a token.
        levels: of the maps that come out.
    """

    def __init__(self, *, channels: int, dim: int, mix: str, splits: Sequence[Split], hidden: int) -> None:
        super().__init__()
        self.splits = tuple(splits)
        self.mixers, levels, stride = nn.ModuleList(), [], 1
        for split in self.splits[:-1]:
            self.mixers.append(Restructure(channels, hidden, split, mix))
            channels, stride = hidden, stride * split[1]
            levels.append(Level(hidden, stride))
        self.project = nn.Linear(channels * self.splits[-1][0] ** 2, dim)
        self.levels = (*levels, Level(dim, stride * self.splits[-1][1]))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, channels, H, W) to maps, fine to coarse; the last one holds the tokens."""
        x, maps = images.contiguous(memory_format=torch.channels_last), []
        for mixer in self.mixers:
            x = mixer(x)
            maps.append(x)
        kernel, stride, padding = self.splits[-1]
        weight = self.project.weight.unflatten(1, (-1, kernel, kernel))
        return (*maps, conv2d(x, weight, self.project.bias, stride, padding))

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens that images of (height, width) pixels give; 0 or less where they are too small."""
        height, width = size
        for kernel, stride, padding in self.splits:
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        return height, width

    @property
    def least(self) -> int:
        """Smallest side of an image in pixels."""
        side = 1
        for kernel, stride, padding in reversed(self.splits):
            side = max(1, (side - 1) * stride + kernel - 2 * padding)
        return side


class Restructure(nn.Module):
    """A soft split and a transformer of one head and few channels.

    Attributes:
        norm1: of a square's numbers, channel by channel.
        attn: from a square to `hidden` channels.
        norm2: before the two linear layers.
        mlp: two linear layers of the same width.
    """

    def __init__(self, channels: int, hidden: int, split: Split, mix: str) -> None:
        super().__init__()
        self.split, inputs = split, channels * split[0] ** 2
        drop = 0.1 if mix == "performer" else 0.0
        self.norm1 = nn.LayerNorm(inputs)
        self.attn = (
            performer(inputs, heads=1, head_dim=hidden, outputs=hidden, scale=1.0)
            if mix == "performer"
            else _Softmax(inputs, hidden)
        )
        self.dropout = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(Dense(hidden, hidden), nn.GELU(), Dense(hidden, hidden), nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps (B, hidden, rows, columns), channels last in memory."""
        layer = self.attn.kqv if hasattr(self.attn, "kqv") else self.attn.qkv
        projected = split_norm_linear(x, self.norm1, layer, self.split)  # type: ignore[arg-type]
        y, v = self.attn.mixed(projected.flatten(2).mT)  # type: ignore[operator]  # (B, N, hidden)
        y = v + self.dropout(y)
        y = y + self.mlp(self.norm2(y))
        return y.mT.unflatten(2, projected.shape[2:])


class _Softmax(nn.Module):
    """Softmax attention of one head, from wide tokens to few channels.

    Attributes:
        qkv: queries, keys and values, without a bias.
        proj: of what attention gives.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.qkv, self.proj = Dense(inputs, 3 * hidden, bias=False), Dense(hidden, hidden)
        self.scale = inputs**-0.5  # of the tokens' width, not of the queries'

    def mixed(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3 * hidden) to what attention makes of it and to the values, (B, N, hidden) each."""
        q, k, v = qkv.chunk(3, -1)
        return self.proj(attend(q[:, None], k[:, None], v[:, None], scale=self.scale)), v


def split_norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear, split: Split) -> Tensor:
    """A soft split, a layer norm over each square and a linear layer, without a copy of any square.

    With u a square, g and b the norm's gain and shift: W (g (u - mean u) / sd u + b) + c. The rows of W g are centred,
    so that they see no mean; what is left is a convolution, divided by the deviation, and a constant.

    Args:
        x: maps (B, C, H, W).
        norm: over C * kernel^2 numbers, channel by channel.
        layer: from as many.
        split: kernel, stride and padding.

    Returns:
        (B, outputs, rows, columns).
    """
    kernel, stride, padding = split
    weight = layer.weight * norm.weight
    weight = (weight - weight.mean(1, keepdim=True)).unflatten(1, (-1, kernel, kernel))
    y = conv2d(x, weight, None, stride, padding)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # 16 bit cannot tell a variance from two large means
    moments = torch.cat([wide.mean(1, keepdim=True), wide.square().mean(1, keepdim=True)], 1)
    mean, square = avg_pool2d(moments, kernel, stride, padding).chunk(2, 1)  # padding counts, as in the square
    deviation = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt().to(y.dtype)
    constant = linear(norm.bias[None], layer.weight, layer.bias)[0]
    return torch.addcmul(constant[:, None, None], y, deviation)
