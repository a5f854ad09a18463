"""Performer: attention of linear cost, whose weights are products of positive random features.

    performer(192)                                           tokens (B, N, 192)
    swap(backbone, "Attention", "performer")                 in a vision transformer
    Performer(...).mixed(kqv)                                behind a projection of one's own, as T2T-ViT has it

With features f(x) = exp(W x - |x|^2 / 2) / sqrt(m) the weight exp(q . k) of a key is near f(q) . f(k) (arXiv
2009.14794, lemma 1), so that sums over keys are taken once for all queries: y = f(q) (f(K)^T V) / (f(q) . sum f(k)).
The m rows of W are orthogonal and fixed. As T2T-ViT has them (arXiv 2101.11986) they are as long as sqrt(m): with fewer
features than channels they are shorter than the sqrt(d) of the lemma, and the attention is softer than a softmax.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

_LEAST = 1e-8
"""Added to the sum of weights, as the reference has it: a query that is far from every key attends to nothing."""


def performer(
    dim: int,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    features: int | None = None,
    outputs: int | None = None,
    scale: float | None = None,
) -> "Performer":
    """Self-attention of tokens (B, N, dim) at linear cost.

    Args:
        dim: width of a token.
        heads: of the attention; by default one for each 64 channels, at least one.
        head_dim: channels of a head; dim / heads by default.
        features: m, of a head; half of head_dim by default, as in T2T-ViT.
        outputs: width of what comes out; dim by default.
        scale: of the products of queries and keys; head_dim^-0.5 by default.

    Raises:
        UsageError: heads that do not divide dim, where head_dim is not given; a number below 1.
    """
    heads = max(1, dim // 64) if heads is None else heads
    if heads < 1 or (head_dim is None and dim % heads):
        raise UsageError(f"performer: {heads} heads do not divide dim {dim}; take a divisor, or give head_dim")
    head_dim = dim // heads if head_dim is None else head_dim
    features = max(1, head_dim // 2) if features is None else features
    outputs = dim if outputs is None else outputs
    for name, value in {"dim": dim, "head_dim": head_dim, "features": features, "outputs": outputs}.items():
        if value < 1:
            raise UsageError(f"performer: {name} is {value}; it must be at least 1")
    if scale is not None and scale <= 0:
        raise UsageError(f"performer: scale is {scale}; it must be above 0")
    factor = head_dim**-0.5 if scale is None else scale
    return Performer(dim=dim, heads=heads, head_dim=head_dim, features=features, outputs=outputs, scale=factor)


class Performer(nn.Module):
    """Keys, queries and values by one linear layer, attention by features, another linear layer.

    Attributes:
        kqv: dim to 3 * heads * head_dim: all keys, head by head, then all queries, then all values.
        proj: heads * head_dim to outputs.
        directions: W, (m, head_dim), of all heads; no training changes it.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, features: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, scale
        self.kqv = Dense(dim, 3 * heads * head_dim)
        self.proj = Dense(heads * head_dim, outputs)
        drawn = nn.init.orthogonal_(torch.empty(features, head_dim)) * sqrt(features)
        self.directions = nn.Parameter(drawn, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to (B, N, outputs)."""
        return self.mixed(self.kqv(x))[0]

    def mixed(self, kqv: Tensor) -> tuple[Tensor, Tensor]:
        """What attention makes of projected tokens.

        Args:
            kqv: (B, N, 3 * heads * head_dim), in the order of the layer `kqv`.

        Returns:
            (B, N, outputs), and the values (B, N, heads * head_dim).
        """
        heads = kqv.unflatten(-1, (3 * self.heads, self.head_dim)).transpose(1, 2)  # (B, 3 * heads, N, d)
        k, q, v = heads.chunk(3, 1)
        found = performer_attend(q, k, v, self.directions.detach(), scale=self.scale)
        return self.proj(found.transpose(1, 2).flatten(2)), kqv[..., -self.heads * self.head_dim :]


def performer_attend(q: Tensor, k: Tensor, v: Tensor, directions: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention by positive random features; computed in 32 bit at least, since an exponential is no matter for 16.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, M, d).
        v: (B, heads, M, e).
        directions: W, (m, d).
        scale: of the products; d^-0.5 by default.

    Returns:
        (B, heads, N, e), like v.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(v.dtype, torch.float32)
    device = v.device.type if torch.amp.is_autocast_available(v.device.type) else "cpu"  # the meta device has none
    with torch.autocast(device, enabled=False):
        query, key = (positive_features(part.to(exact), directions.to(exact), factor) for part in (q, k))
        summed = key.mT @ v.to(exact)  # (B, heads, m, e)
        total = query @ key.sum(-2).unsqueeze(-1)  # (B, heads, N, 1)
        return ((query @ summed) / (total + _LEAST)).to(v.dtype)


def positive_features(x: Tensor, directions: Tensor, scale: float = 1.0) -> Tensor:
    """exp(W x - |x|^2 / 2) / sqrt(m) of x times the root of `scale`, (..., d) to (..., m)."""
    projected = nn.functional.linear(x, directions * sqrt(scale))
    half = x.square().sum(-1, keepdim=True) * (scale / 2)
    return (projected - half).exp() / sqrt(len(directions))
