"""Attention of many heads over tokens, or within groups of a map: all of it through torch's fused kernels.

    attention(192, heads=3)                                  tokens (B, N, 192)
    Attention(...)(groups, bias, mask)                       groups (B, G, n, C), each by itself

`softmax(q k^T * scale + bias) v` (arXiv 1706.03762), where the bias is a number for each head and pair of places
(relative positions, the logarithm of a decay) and the mask says who may attend to whom. Windows, shifted windows,
dilated groups, grids, rows and columns are one module of maps: `blocks/window_attention`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vertebra.blocks.positions import rotated
from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def attention(
    dim: int,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    bias: bool = True,
    scale: float | None = None,
    drop: float = 0.0,
) -> "Attention":
    """Self-attention of tokens (B, N, dim), or of groups of them (B, G, N, dim).

    Args:
        dim: width of a token.
        heads: of the attention; by default one for each 32 channels, at least one.
        head_dim: channels of a head; dim / heads by default.
        bias: whether queries, keys and values have one.
        scale: of the products; head_dim^-0.5 by default.
        drop: probability that a weight of the attention is dropped in training, 0..1.

    Raises:
        UsageError: heads that do not divide dim, where head_dim is not given.
    """
    heads = heads or max(1, dim // 32)
    if head_dim is None and dim % heads:
        raise UsageError(f"attention: {heads} heads do not divide dim {dim}; take a divisor, or give head_dim")
    return Attention(dim=dim, heads=heads, head_dim=head_dim or dim // heads, bias=bias, scale=scale, drop=drop)


class Attention(nn.Module):
    """Queries, keys and values by one linear layer, attention, another linear layer; build it with `attention`.

    Attributes:
        qkv: dim to 3 * heads * head_dim: all queries, head by head, then all keys, then all values.
        proj: heads * head_dim to dim.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, bias: bool, scale: float | None, drop: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.drop = heads, head_dim, drop
        self.scale = head_dim**-0.5 if scale is None else scale
        self.qkv = Dense(dim, 3 * heads * head_dim, bias=bias)
        self.proj = Dense(heads * head_dim, dim)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, angles: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, dim) or groups (B, G, N, dim) to the same.

        Args:
            x: each group attends within itself.
            bias: (heads, N, N), added to the products.
            mask: (N, N) or (G, N, N), True where a place (row) may attend to another (column).
            angles: (N, head_dim / 2), rotary positions of queries and keys.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).movedim(-2, -4).unbind(-2)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        y = attend(q, k, v, bias=bias, mask=mask, scale=self.scale, drop=self.drop if self.training else 0.0)
        return self.proj(y)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    drop: float = 0.0,
) -> Tensor:
    """Attention of every head, with the heads joined afterwards.

    Args:
        q: (B, heads, N, d), or (B, G, heads, N, d) of G groups.
        k: likewise, of M keys.
        v: likewise, (..., M, e).
        bias: added to the products, (heads, N, M), or (B, heads, N, M) without groups.
        mask: (N, M), or (G, N, M) with groups; True where a place may attend to another.
        scale: of the products; d^-0.5 by default.
        drop: probability that a weight is dropped, 0..1.

    Returns:
        (B, N, heads * e), or (B, G, N, heads * e).
    """
    shape, kind = q.shape[:-3], q.dtype
    together = bias if bias is None else bias.to(kind)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, float("-inf"))
        hidden = hidden.unsqueeze(-3)  # (1, N, M) or (G, 1, N, M)
        together = hidden if together is None else together + hidden
    if len(shape) == 2 and together is not None and together.ndim == 4:  # groups that differ: they count as heads
        together = together.expand(-1, q.shape[-3], -1, -1).flatten(0, 1)
        q, k, v = (part.flatten(1, 2) for part in (q, k, v))
    elif len(shape) == 2:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    if together is not None:  # in four dimensions: torch has no fused kernel on a CPU for three
        together = together.view(*(1,) * (4 - together.ndim), *together.shape)
    if together is not None and mask is None and not drop and _learnt(together):
        y = _by_products(q, k, v, together, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        y = scaled_dot_product_attention(q, k, v, attn_mask=together, dropout_p=drop, scale=scale)
    return y.view(*shape, -1, *y.shape[-2:]).transpose(-3, -2).flatten(-2)


def _learnt(bias: Tensor) -> bool:
    """Whether a bias wants a gradient on a CPU, which none of torch's fused kernels gives."""
    wanted = bias.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return wanted and bias.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale q k + bias) v of (B, heads, N, d), a fifth faster than torch's own way of writing it out."""
    batch, heads, n, _ = q.shape
    rows = bias.expand(batch, heads, n, k.shape[2]).flatten(0, 1)
    products = torch.baddbmm(rows, (q * scale).flatten(0, 1), k.flatten(0, 1).mT)
    return torch.bmm(products.softmax(-1), v.flatten(0, 1)).unflatten(0, (batch, heads))
