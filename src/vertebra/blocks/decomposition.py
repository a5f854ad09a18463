"""Tensors as sums of a few outer products (canonical polyadic decomposition), many small ones at a time.

No page: `vertebra.blocks.one_way` computes with factors, and takes them from trained layers, by these.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation has
from torch import Tensor


def product(factors: Sequence[Tensor]) -> Tensor:
    """Sum over terms of the outer products of factors (sets, rank, side): (sets, *sides)."""
    sides = [factor.shape[-1] for factor in factors]
    if len(factors) == 1:
        return factors[0].sum(1)
    first, *others = factors
    for factor in others[:-1]:
        first = (first[..., None] * factor[..., None, :]).flatten(2)  # (sets, rank, product of the sides)
    return (first.mT @ others[-1]).unflatten(1, sides[:-1])


def decomposed(tensors: Tensor, rank: int, *, sweeps: int = 40) -> list[Tensor]:
    """Factors (sets, rank, side) whose products come near to tensors (sets, *sides), in 64 bit.

    Matrices are cut by singular values, which is the best there is. Tensors of more sides begin with nested singular
    values, of which the largest terms stay, and are improved by alternating least squares, which finds a local optimum;
    a set that the fit made no better keeps its beginning.
    """
    tensors = tensors.double()
    terms = _nested(tensors)
    sizes = torch.stack([term.norm(dim=-1) for term in terms]).prod(0)  # (sets, terms)
    best = sizes.topk(min(rank, sizes.shape[1]), dim=1).indices
    start = [term.gather(1, best[..., None].expand(-1, -1, term.shape[-1])) for term in terms]
    start = [F.pad(factor, (0, 0, 0, rank - factor.shape[1])) for factor in start]
    if len(start) < 3:
        return _balanced(start)
    fitted = _alternated(tensors, start, sweeps)
    lost = [(product(factors) - tensors).flatten(1).norm(dim=1) for factors in (start, fitted)]
    better = (lost[1] < lost[0])[:, None, None]
    return _balanced([torch.where(better, new, old) for new, old in zip(fitted, start, strict=True)])


def _nested(tensors: Tensor) -> list[Tensor]:
    """An exact decomposition: singular values of the first side against the others, and so on within the others."""
    if tensors.ndim == 2:
        return [tensors[:, None]]
    left, values, right = torch.linalg.svd(tensors.flatten(2), full_matrices=False)
    first = (left * values[:, None]).mT  # (sets, terms, side)
    if tensors.ndim == 3:
        return [first, right]
    inner = _nested(right.reshape(-1, *tensors.shape[2:]))
    more = inner[0].shape[1]
    return [first.repeat_interleave(more, 1), *(part.reshape(len(tensors), -1, part.shape[-1]) for part in inner)]


def _alternated(tensors: Tensor, factors: Sequence[Tensor], sweeps: int) -> list[Tensor]:
    """Alternating least squares: each factor in turn is the best for the others."""
    found = list(factors)
    letters = "abcdefgh"[: len(found)]
    ridge = 1e-12 * torch.eye(found[0].shape[1], dtype=tensors.dtype, device=tensors.device)
    for _ in range(sweeps):
        found = _balanced(found)
        for at, letter in enumerate(letters):
            others = [(one, factor) for one, factor in zip(letters, found, strict=True) if one != letter]
            grams = torch.stack([factor @ factor.mT for _, factor in others]).prod(0)
            grams = grams + ridge * grams.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]
            inputs = ",".join([f"z{letters}", *(f"zr{one}" for one, _ in others)])
            found[at] = torch.linalg.solve(
                grams, torch.einsum(f"{inputs}->zr{letter}", tensors, *(f for _, f in others))
            )
    return found


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same terms, each with its size spread over its factors evenly, so that none learns slower than another."""
    norms = torch.stack([factor.norm(dim=-1, keepdim=True) for factor in factors])
    shared = norms.prod(0) ** (1 / len(factors))
    return [factor / norm.clamp_min(1e-300) * shared for factor, norm in zip(factors, norms, strict=True)]
