"""SAM: values times gates that convolutions of several sizes agree on.

    s_h = conv_h(heads of W_s x)                   depthwise, a kernel a head: 3, 5, 7 and 9
    g = W_1 gelu(norm(W_0 [s_1 s_2 s_3 s_4]))      W_0: channel j of every head together, to twice as many
    y = W (g * W_v x)

Shapes: maps (B, C, H, W) in, the same out, of any size. As a layer of a transformer, `ScaleAwareModulation` takes rows
(B, H, W, C). Scale-aware modulation is of SMT (arXiv 2307.08579, section 3.1: multi-head mixed convolution, then
scale-aware aggregation). Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.smt`. Departs from the
authors' code in nothing.
"""

import copy
from collections.abc import Sequence
from math import prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from vertebra.blocks.depthwise import Depthwise
from vertebra.blocks.rows import Dense, activated
from vertebra.blocks.window_attention import OfMaps
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def scale_aware_modulation(channels: int, *, kernels: Sequence[int] = (3, 5, 7, 9), ratio: int = 2) -> OfMaps:
    """The block for maps (B, channels, H, W).

    Args:
        channels: of the map.
        kernels: as in `ScaleAwareModulation`.
        ratio: likewise.

    Raises:
        UsageError: heads that do not divide the channels, or a number out of range.
    """
    return OfMaps(ScaleAwareModulation(dim=channels, kernels=kernels, ratio=ratio))


class ScaleAwareModulation(nn.Module):
    """Modulation of rows (B, H, W, C); build it for maps with `scale_aware_modulation`.

    Args:
        dim: channels, a multiple of the number of kernels.
        kernels: odd sides of the depthwise convolutions, one a head.
        ratio: channels that the aggregation makes of each of its own.

    Attributes:
        v: what is modulated.
        s: what the heads are given, head by head.
        convs: a depthwise convolution a head.
        mix: the heads' channels of one number together, to `ratio` times as many.
        norm: behind it, before GELU.
        narrow: back to dim: the gates.
        proj: of the product.
    """

    def __init__(self, *, dim: int, kernels: Sequence[int] = (3, 5, 7, 9), ratio: int = 2) -> None:
        _check(dim, kernels, ratio)
        super().__init__()
        self.v, self.s = Dense(dim, dim), Dense(dim, dim)
        width = dim // len(kernels)
        self.convs = nn.ModuleList(Scale(width, width, side, padding=side // 2, groups=width) for side in kernels)
        self.mix = Mix(dim, ratio * dim, 1, groups=width)
        self.norm = nn.BatchNorm2d(ratio * dim)
        self.narrow = Dense(ratio * dim, dim)
        self.proj = Dense(dim, dim)
        self.apply(start)
        nn.init.normal_(self.narrow.weight, std=sqrt(2 / dim))  # the authors have a convolution there

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        x = x.contiguous()
        heads = self.s(x).permute(0, 3, 1, 2).chunk(len(self.convs), 1)
        mixed = self.norm(self.mix([conv(head) for conv, head in zip(self.convs, heads, strict=True)]))
        gates = self.narrow(activated(mixed.permute(0, 2, 3, 1)))
        return self.proj(gates * self.v(x))

    def fused(self) -> "ScaleAwareModulation":
        """The same with its norm in the weights of `mix`, for evaluation."""
        found, norm = copy.deepcopy(self), self.norm
        if type(norm) is not nn.BatchNorm2d or norm.running_var is None or norm.running_mean is None:
            return found
        assert self.mix.bias is not None
        gain = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
        bias = (self.mix.bias.double() - norm.running_mean.double()) * gain + norm.bias.double()
        with torch.no_grad():
            found.mix.weight.copy_(self.mix.weight.double() * gain[:, None, None, None])
            found.mix.bias.copy_(bias)  # type: ignore[union-attr]
        found.norm = nn.Identity()  # type: ignore[assignment]
        return found


def _check(dim: int, kernels: Sequence[int], ratio: int) -> None:
    if not kernels or any(side < 1 or side % 2 == 0 for side in kernels):
        raise UsageError(f"scale_aware_modulation: kernels is {kernels}; it needs odd sides, one a head, as (3, 5, 7)")
    if dim < 1 or dim % len(kernels):
        raise UsageError(f"scale_aware_modulation: {len(kernels)} kernels do not divide {dim} channels evenly")
    if ratio < 1:
        raise UsageError(f"scale_aware_modulation: ratio is {ratio}; it must be at least 1")


def start(module: nn.Module) -> None:
    """The authors' weights at the start: of linear layers around 0.02, of convolutions after what leaves them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan = module.out_channels * prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=sqrt(2 / fan))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Scale(Depthwise):
    """A depthwise convolution of a few channels, which large kernels too are faster on as they lie, but for training.

    The tool's copy to rows pays for its gradients, and for maps of more channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same size."""
        return super().forward(x) if torch.is_grad_enabled() else nn.Conv2d.forward(self, x)


_TILE = 8
"""Groups that become one on a CPU, at most."""


class Mix(nn.Conv2d):
    """A 1 x 1 convolution whose group j sees channel j of every head: weight (ratio * C, heads, 1, 1).

    Output channels of group j come one after the other. oneDNN is slow on groups of four channels: on a CPU a few
    groups become one, of weights that are zero between them, for a third of the time.
    """

    def forward(self, heads: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Maps of the heads, (B, C / heads, H, W) each, to maps (B, ratio * C, H, W)."""
        tile = self._tile(heads[0])
        rows = [head.permute(0, 2, 3, 1).unflatten(-1, (-1, tile)) for head in heads]  # (B, H, W, tiles, tile)
        x = torch.stack(rows, -2).flatten(-3).permute(0, 3, 1, 2)  # within a tile head by head
        if tile == 1:
            return conv2d(x, self.weight, self.bias, groups=self.groups)
        weight = self.weight.view(-1, tile, self.out_channels // self.groups, len(heads))
        apart = weight.permute(0, 2, 3, 1).diag_embed()  # (tiles, outputs, heads, tile, tile)
        spread = apart.permute(0, 3, 1, 2, 4).reshape(self.out_channels, -1, 1, 1)
        # dilation means nothing to 1 x 1, but makes torch take oneDNN where it runs in one thread
        return conv2d(x, spread, self.bias, dilation=2, groups=self.groups // tile)

    def _tile(self, x: Tensor) -> int:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
            return 1
        return next(tile for tile in range(min(_TILE, self.groups), 0, -1) if self.groups % tile == 0)
