"""MaSA: attention that fades with the Manhattan distance between two places of a map; whole or by rows and columns.

    whole        softmax(q k^T d^-0.5 + (|dy| + |dx|) log r) v     over all places: H W products a place
    decomposed   the same within rows, with |dx| alone; then within columns, with |dy|, of what the rows gave and by
                 the same q and k                                  H + W products a place

Shapes: maps (B, C, H, W) in, the same out, of any size. As a layer of a transformer, `ManhattanAttention` takes rows
(B, H, W, C). A head keeps r = 1 - 1 / reach from one place to the next. Queries and keys are turned by their place in
the order of rows (rotary positions), and a depthwise convolution of the values (LePE) is added before the last layer.
Manhattan self-attention is of RMT (arXiv 2309.11523). The paper writes the decays as a factor of the softmax; the
released networks add their logarithm before it, and so does this block. Used alone, through `vertebra.surgery.swap`,
and in `vertebra.backbones.rmt`.
"""

from math import log2
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vertebra.blocks.attention import attend
from vertebra.blocks.depthwise import depthwise
from vertebra.blocks.positions import rotated
from vertebra.blocks.retention import distance_decays
from vertebra.blocks.rows import Dense
from vertebra.blocks.window_attention import OfMaps
from vertebra.blocks.windows import Sides
from vertebra.errors import UsageError, near

VARIANTS = {"whole": {"form": "whole"}, "decomposed": {"form": "decomposed"}}

Form = Literal["whole", "decomposed"]


def manhattan_attention(
    channels: int,
    variant: str = "whole",
    *,
    heads: int | None = None,
    form: Form | None = None,
    reach: float = 4.0,
    spread: float = 4.0,
    local: int = 5,
) -> OfMaps:
    """The block for maps (B, channels, H, W).

    Args:
        channels: of the map.
        variant: one of `VARIANTS`; sets the form.
        heads: as in `ManhattanAttention`; by default the largest divisor that leaves a head at least 32 channels.
        form: in place of the variant's.
        reach: as in `ManhattanAttention`.
        spread: likewise.
        local: likewise.

    Raises:
        UsageError: an unknown variant or form, heads that leave a head no even number of channels, or a number out of
            range.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"manhattan_attention has no variant {variant!r}{near(variant, VARIANTS)}; it has {known}")
    if channels < 1:
        raise UsageError(f"manhattan_attention: channels is {channels}; it must be at least 1")
    if heads is None:
        heads = next(count for count in range(max(1, channels // 32), 0, -1) if channels % count == 0)
    chosen: Form = form or VARIANTS[variant]["form"]  # type: ignore[assignment]
    return OfMaps(ManhattanAttention(dim=channels, heads=heads, form=chosen, reach=reach, spread=spread, local=local))


class Kind(NamedTuple):
    """What a prior depends on, beside the size of the map.

    Attributes:
        heads: of the attention.
        head_dim: channels of a head.
        form: whole or decomposed.
        reach: places after which the first head fades.
        spread: how many times the last head's reach is doubled.
    """

    heads: int
    head_dim: int
    form: Form
    reach: float
    spread: float


class Prior(NamedTuple):
    """What the size of a map decides; attentions of one kind share it.

    Attributes:
        kind: of the attention that it is for.
        size: height and width of the map.
        angles: (H * W, 1, head_dim / 2), what queries and keys are turned by.
        decays: added to the products: (1, heads, N, N) of the whole map, or (1, heads, W, W) of rows and
            (1, heads, H, H) of columns. Without the 1, torch does not take its fused kernel on a CPU.
    """

    kind: Kind
    size: Sides
    angles: Tensor
    decays: tuple[Tensor, ...]


class ManhattanAttention(nn.Module):
    """Attention of rows (B, H, W, C) that fades with distance; build it for maps with `manhattan_attention`.

    Args:
        dim: channels.
        heads: a divisor of dim that leaves a head an even number of channels.
        form: "whole" or "decomposed".
        reach: places, above 1: the first head keeps 1 - 1 / reach from one to the next. Infinity fades nothing.
        spread: the reach of head n is 2 ** (spread * n / heads) times that of the first; at least 0.
        local: odd side of the depthwise convolution of the values; 0 has none.

    Attributes:
        qk: dim to 2 dim: all queries, head by head, then all keys.
        v: dim to dim.
        local: the convolution of the values (LePE), or None.
        proj: dim to dim.
        kind: what a prior for this attention depends on.
    """

    def __init__(self, *, dim: int, heads: int, form: Form, reach: float, spread: float, local: int) -> None:
        _check(dim, heads, form, reach, spread, local)
        super().__init__()
        self.kind = Kind(heads, dim // heads, form, reach, spread)
        self.qk = Dense(dim, 2 * dim)
        self.v = Dense(dim, dim)  # by itself: a convolution takes it as it lies in memory
        self.local = depthwise(dim, local, bias=True) if local else None
        self.proj = Dense(dim, dim)

    def forward(self, x: Tensor, prior: Prior | None = None) -> Tensor:
        """Rows (B, H, W, C) to the same.

        Args:
            x: a map of any size.
            prior: of `prior`, where attentions of one kind share it; made here where there is none that fits.
        """
        size = x.shape[1], x.shape[2]
        if prior is None or prior.kind != self.kind or prior.size != size:
            prior = self.prior(x)
        x = x.contiguous()
        v = self.v(x)
        parts = self.qk(x).unflatten(-1, (-1, self.kind.head_dim)).flatten(1, 2)  # (B, N, 2 heads, d)
        parts = rotated(parts, prior.angles)
        q, k, values = *parts.chunk(2, 2), v.reshape(len(v), -1, *self.kind[:2])  # (B, N, heads, d)
        y = (whole if self.kind.form == "whole" else decomposed)(q, k, values, prior)
        if self.local is not None:
            y = self.local(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + y
        return self.proj(y)

    def prior(self, like: Tensor) -> Prior:
        """Angles and decays for rows (B, H, W, C) such as `like`, in its floating type."""
        heads, head_dim, form, reach, spread = self.kind
        size = like.shape[1], like.shape[2]
        angles = raster_angles(size, head_dim, like)
        logs = log_decays(heads, reach, spread, like)
        down, across = (distance_decays(logs, side)[None] for side in size)
        decays = (across, down)
        if form == "whole":
            both = down[..., :, None, :, None] + across[..., None, :, None, :]  # (1, heads, H, W, H, W)
            decays = (both.flatten(4).flatten(2, 3),)
        return Prior(self.kind, size, angles, tuple(decay.to(like.dtype) for decay in decays))


def _check(dim: int, heads: int, form: str, reach: float, spread: float, local: int) -> None:
    if form not in get_args(Form):
        raise UsageError(f"manhattan_attention: form is {form!r}; it can be {' or '.join(get_args(Form))}")
    if heads < 1 or dim % heads or dim // heads % 2:
        raise UsageError(
            f"manhattan_attention: heads is {heads} with {dim} channels; it must leave each head an even number of them"
        )
    if not reach > 1 or not spread >= 0:
        raise UsageError(
            f"manhattan_attention: reach is {reach} and spread is {spread}; reach must be above 1, spread at least 0"
        )
    if local < 0 or (local and local % 2 == 0):
        raise UsageError(f"manhattan_attention: local is {local}; it must be odd, or 0 for no convolution")


def log_decays(heads: int, reach: float, spread: float, like: Tensor) -> Tensor:
    """Logarithms of what a head keeps from one place to the next, (heads,), in 64 bit where `like` has, 32 otherwise.

    The reach of head n, 1 / (1 - what it keeps), is reach * 2^(spread n / heads) places: the last head of several does
    not get to 2^spread.
    """
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    doubled = torch.arange(heads, dtype=kind, device=like.device) * (spread / heads)
    return torch.log1p(-torch.exp2(-(doubled + log2(reach))))


def raster_angles(size: Sides, head_dim: int, like: Tensor) -> Tensor:
    """Angles of the places of a map, (H * W, 1, head_dim / 2), in radians; 64 bit where `like` has, 32 otherwise.

    A place has one number, in the order of rows, whatever the form: the next row is W places away.
    """
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    periods = 10000 ** torch.linspace(0, 1, head_dim // 2, dtype=kind, device=like.device)
    places = torch.arange(size[0] * size[1], dtype=kind, device=like.device)
    return places[:, None, None] * (1 / periods)


def whole(q: Tensor, k: Tensor, v: Tensor, prior: Prior) -> Tensor:
    """Attention over the whole map: q, k and v (B, N, heads, d) to rows (B, H, W, heads * d)."""
    y = attend(*(part.transpose(1, 2) for part in (q, k, v)), bias=prior.decays[0])  # (B, N, C)
    return y.unflatten(1, prior.size)


def decomposed(q: Tensor, k: Tensor, v: Tensor, prior: Prior) -> Tensor:
    """Attention within rows, then of the result within columns: q, k and v (B, N, heads, d) to rows (B, H, W, C)."""
    across, down = prior.decays
    parts = [part.unflatten(1, prior.size) for part in (q, k, v)]  # (B, H, W, heads, d)
    y = attend(*(_lines(part) for part in parts), bias=across).view(parts[2].shape)
    y = attend(*(_lines(part.transpose(1, 2)) for part in (*parts[:2], y)), bias=down)  # (B * W, H, C)
    return y.unflatten(0, (-1, prior.size[1])).transpose(1, 2)


def _lines(x: Tensor) -> Tensor:
    """(B, lines, places, heads, d) to a batch of lines, (B * lines, heads, places, d)."""
    return x.flatten(0, 1).transpose(1, 2)
