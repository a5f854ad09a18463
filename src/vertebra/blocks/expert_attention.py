"""Attention whose query heads are experts: a gate gives each token k of them; keys and values are one head, shared.

    expert_attention(384, experts=15, k=6, head_dim=128)     tokens (B, N, 384), in place of an attention
    multi_query_attention(384, heads=6, head_dim=128)        the same without a gate

Shapes: (B, N, dim) in, the same out. An expert is a projection of the token to one query and a projection of what this
query found back to `dim`; the k results are summed, times the gate's probabilities. Keys and values are of one head, of
all tokens, and no expert's own. Gates, tasks, noise and the two forms of the sum are those of
`vertebra.blocks.mixture_of_experts`; written from the description of Mod-Squad (arXiv 2212.08066).
"""

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from vertebra.blocks.attention import attend
from vertebra.blocks.mixture_of_experts import Mixture, Noise, Plan, check
from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def expert_attention(
    dim: int,
    *,
    experts: int = 15,
    k: int = 6,
    head_dim: int | None = None,
    tasks: int = 1,
    noise: Noise = "learned",
) -> "ExpertAttention":
    """The block for tokens of width `dim`.

    Args:
        dim: width of a token.
        experts: query heads that there are.
        k: query heads of a token, at most `experts`.
        head_dim: channels of a head; 2 * dim / k by default.
        tasks: how many gates there are; `vertebra.blocks.mixture_of_experts.doing` says which one is at work.
        noise: whether the gates' logits are noisy in training.

    Raises:
        UsageError: a number below 1, more experts a token than there are, or another kind of noise.
    """
    width = max(1, 2 * dim // max(1, k)) if head_dim is None else head_dim
    check("expert_attention", experts=experts, k=k, tasks=tasks, noise=noise, dim=dim, head_dim=width)
    return ExpertAttention(dim=dim, width=width, experts=experts, k=k, tasks=tasks, noise=noise)


def multi_query_attention(dim: int, *, heads: int, head_dim: int | None = None) -> "MultiQueryAttention":
    """Attention of several query heads and one head of keys and values, for tokens (B, N, dim).

    Args:
        dim: width of a token.
        heads: of the queries.
        head_dim: channels of a head; 2 * dim / heads by default.

    Raises:
        UsageError: a number below 1.
    """
    width = max(1, 2 * dim // max(1, heads)) if head_dim is None else head_dim
    if min(dim, heads, width) < 1:
        raise UsageError(
            f"multi_query_attention: dim is {dim}, heads {heads} and head_dim {width}; they must be at least 1"
        )
    return MultiQueryAttention(dim=dim, heads=heads, head_dim=width)


class MultiQueryAttention(nn.Module):
    """Every token has all queries; build it with `multi_query_attention`.

    Attributes:
        queries: dim to heads * head_dim.
        shared: dim to one key and one value.
        outputs: heads * head_dim to dim.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.queries = Dense(dim, heads * head_dim)
        self.shared = Dense(dim, 2 * head_dim)
        self.outputs = Dense(heads * head_dim, dim)
        for layer in (self.queries, self.shared, self.outputs):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        queries = self.queries(x).unflatten(2, (self.heads, self.head_dim))
        return self.outputs(found(queries, self.shared(x)).flatten(2))


class ExpertAttention(Mixture):
    """Query heads as experts; build it with `expert_attention`.

    Attributes:
        shared: dim to one key and one value.
    """

    def __init__(self, *, dim: int, width: int, experts: int, k: int, tasks: int, noise: Noise) -> None:
        super().__init__(dim=dim, width=width, experts=experts, k=k, tasks=tasks, noise=noise)
        self.shared = Dense(dim, 2 * width)
        trunc_normal_(self.shared.weight, std=0.02)
        nn.init.zeros_(self.shared.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat)
        if self.dense:
            return self._dense(x, weights, chosen)
        plan = Plan(chosen, self.router.experts)
        queries = plan.restored(plan.each(plan.tokens(flat), self.first()))  # (B * N * k, width)
        values = found(queries.view(*x.shape[:2], -1, self.width), self.shared(x)).flatten(0, 2)
        return plan.summed(plan.each(plan.places(values), self.second()), weights).view(x.shape)

    def _dense(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """All queries and all output projections of every token; attention of the chosen ones alone."""
        flat, width = x.flatten(0, 1), self.width
        queries = torch.cat([group.inputs(flat) for group in self.members], 1).unflatten(1, (-1, width))
        places = chosen[..., None].expand(-1, -1, width)  # (T, k, width)
        own = queries.gather(1, places).view(*x.shape[:2], -1, width)
        values = found(own, self.shared(x)).flatten(0, 1) * weights[..., None].to(queries.dtype)
        whole = torch.zeros_like(queries).scatter(1, places, values.to(queries.dtype))
        parts = whole.split([group.count for group in self.members], 1)
        y = torch.zeros_like(flat)
        for group, gated, gates in zip(self.members, parts, self.gates(weights, chosen), strict=True):
            y = y + group.joined(gated, gates)
        return y.view(x.shape)


def found(queries: Tensor, shared: Tensor) -> Tensor:
    """What queries (B, N, k, d) find among keys and values (B, N, 2 d) of one head, (B, N, k, d).

    All queries of an image are the rows of one product: nothing is repeated or turned.
    """
    keys, values = shared.unsqueeze(1).chunk(2, -1)  # (B, 1, N, d)
    rows = queries.flatten(1, 2).unsqueeze(1)  # (B, 1, N * k, d)
    return attend(rows, keys, values).view(queries.shape)
