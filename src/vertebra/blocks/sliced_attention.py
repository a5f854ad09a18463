"""Sliced group attention: tokens attend within slices of their sequence, and within others when they come again.

    sliced_attention(192, groups=(8, 2))                     tokens (B, N, 192)
    block(x, loop=1)                                         the second application of the same weights

Shapes: tokens (B, N, C) in, the same out. N tokens are cut into G slices, in their order, and each slice attends within
itself: the N^2 of the products becomes N^2 / G (arXiv 2111.05297, section 3.3). A block that is applied several times
with the same weights (`vertebra.blocks.recursive`) is told the number of the application: each has a G of its own, and
from the second on tokens are put in a random order first and back in theirs afterwards, so that slices exchange.

The authors draw an order at every call, in evaluation too, and outputs vary. Here evaluation has one order, made from
`seed`, the application and N alone, the same on every device; training draws. `order="random"` is the authors' way.

Beyond the paper: any N. Where G does not divide it the first N mod G slices have one token more, so that nothing is
padded; with fewer tokens than slices each token is one.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vertebra.blocks.attention import Attention
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Order = Literal["fixed", "random"]


def sliced_attention(
    dim: int,
    *,
    heads: int | None = None,
    groups: Sequence[int] = (8, 2),
    order: Order = "fixed",
    seed: int = 0,
    bias: bool = True,
    drop: float = 0.0,
) -> "SlicedAttention":
    """The block for tokens (B, N, dim).

    Args:
        dim: width of a token.
        heads: of the attention; by default one for each 32 channels, at least one.
        groups: slices of the first application, of the second, and so on; the last number serves all that follow.
        order: of tokens in evaluation, from the second application on: one for all images, or drawn at every call.
        seed: of the fixed order; blocks of a network should have seeds of their own.
        bias: whether queries, keys and values have one.
        drop: probability that a weight of the attention is dropped in training, 0..1.

    Raises:
        UsageError: heads that do not divide dim, an unknown order, or a number out of range.
    """
    heads = max(1, dim // 32) if heads is None else heads
    if min(dim, heads, *groups) < 1 or not groups or seed < 0 or not 0 <= drop < 1:
        raise UsageError(
            f"sliced_attention: dim {dim}, heads {heads}, groups {groups}, seed {seed}, drop {drop}; dim, heads and"
            " groups are at least 1, seed at least 0, and drop is in [0, 1)"
        )
    if order not in get_args(Order):
        raise UsageError(f"sliced_attention: order is {order!r}; it can be {' or '.join(get_args(Order))}")
    if dim % heads:
        raise UsageError(f"sliced_attention: {heads} heads do not divide dim {dim}; take a divisor")
    return SlicedAttention(dim=dim, heads=heads, groups=groups, order=order, seed=seed, bias=bias, drop=drop)


class SlicedAttention(Attention):
    """Attention within slices of a sequence; build it with `sliced_attention`.

    Attributes:
        groups: slices, a number an application.
        order: of tokens in evaluation.
        seed: of the fixed order.
    """

    def __init__(
        self, *, dim: int, heads: int, groups: Sequence[int], order: Order, seed: int, bias: bool, drop: float
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=dim // heads, bias=bias, scale=None, drop=drop)
        self.groups, self.order, self.seed = tuple(groups), order, seed

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, dim) to the same.

        Args:
            x: the tokens.
            loop: number of the application, from 0.
        """
        groups = min(self.groups[min(loop, len(self.groups) - 1)], x.shape[1])
        if groups <= 1:
            return super().forward(x)
        if loop == 0:
            return self._sliced(x, groups)
        places = self._places(x.shape[1], loop, x.device)
        return self._sliced(x.index_select(1, places), groups).index_select(1, places.argsort())

    def _places(self, tokens: int, loop: int, device: torch.device) -> Tensor:
        if self.training or self.order == "random":
            return torch.randperm(tokens, device=device)
        return shuffled(tokens, self.seed, loop, device=device)

    def _sliced(self, x: Tensor, groups: int) -> Tensor:
        """Attention within slices, those with a token more first."""
        size, longer = divmod(x.shape[1], groups)
        if not longer:
            return self._within(x, size)
        parts = x.split((longer * (size + 1), (groups - longer) * size), 1)
        return torch.cat([self._within(parts[0], size + 1), self._within(parts[1], size)], 1)

    def _within(self, x: Tensor, size: int) -> Tensor:
        return super().forward(x.unflatten(1, (-1, size))).flatten(1, 2)  # by way of (B, G, size, dim)

    def extra_repr(self) -> str:
        """Slices of each application."""
        return f"groups={self.groups}, order={self.order!r}, seed={self.seed}"


_MASK = 2**32 - 1


def shuffled(tokens: int, seed: int, loop: int = 0, *, device: torch.device | None = None) -> Tensor:
    """An order of so many tokens, (tokens,) int64, that depends on nothing but the arguments.

    A hash that no two words of 32 bit share is sorted: no state of a random generator is read or changed, and devices
    and exported programs agree.
    """
    start = (seed * 0x9E3779B9 + loop * 0x85EBCA6B) & _MASK
    words = (torch.arange(tokens, device=device) + start) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = ((words ^ (words >> shift)) * factor) & _MASK
    return (words ^ (words >> 16)).argsort()
