"""The operator of Kolmogorov-Arnold attention, its families of functions, and their gradient without the memory.

basis        of t = (x - tau) / s, with a weight, but for the first two, which are of x
fourier      sum over m = 1..grid of a_m cos(m x) + b_m sin(m x)
rational     P(x) / (1 + |Q(x)|), degrees 5 and 4, Q without a constant
mexican_hat  2 / (sqrt(3) pi^(1/4)) (1 - t^2) exp(-t^2 / 2)
morlet       cos(5 t) exp(-t^2 / 2)
dog          -t exp(-t^2 / 2)
meyer        sin(pi |t|) times Meyer's window, which falls from 1 at |t| = 1/2 to 0 at 1
shannon      sinc(t / 2) cos(3 pi t / 2), with sinc(u) = sin(pi u) / (pi u)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, pi, sqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu
from torch.utils.checkpoint import checkpoint

from vertebra.errors import UsageError, near

Base = Literal["zero", "silu", "identity"]
BasisName = Literal["fourier", "rational", "mexican_hat", "morlet", "dog", "meyer", "shannon"]

DEGREES = (5, 4)
"""Of the rational functions' P and Q."""
PIECE = 1 << 16
"""Scores that the Fourier functions are evaluated for at once on a CPU; a GPU takes 64 times as many."""


class RowOperator(nn.Module):
    """Rows of scores to rows of attention, each head with functions of its own (arXiv 2503.10632).

    Attributes:
        coefficients: (heads, r, terms, tokens) of the basis: cosines and then sines; P and then Q, rising powers;
            weight, tau, s.
        base_weight: (heads, r, tokens) of b; kept as it is where b is zero, so that the count is the paper's.
        basis_weight: (heads, r, tokens) of the basis.
        mixing: (heads, r, tokens), the transpose of W times sqrt(tokens).

    Args:
        heads: of the attention.
        tokens: keys, N.
        r: numbers between.
        basis: of the functions.
        grid: harmonics of the Fourier basis.
        base: b of the functions.
        prefix: tokens in front of those of the grid; by default the fewest that leave a square.

    Raises:
        UsageError: an option out of range.
    """

    def __init__(
        self,
        *,
        heads: int,
        tokens: int,
        r: int = 12,
        basis: BasisName = "fourier",
        grid: int | None = None,
        base: Base = "zero",
        prefix: int | None = None,
    ) -> None:
        super().__init__()
        grid = _checked(heads, tokens, r, basis, grid, base)
        self.heads, self.tokens, self.r, self.base, self.basis = heads, tokens, r, base, basis
        self.prefix = tokens - isqrt(tokens) ** 2 if prefix is None else prefix
        if not 0 <= self.prefix < tokens:
            raise UsageError(f"karat: prefix is {prefix}; it must be at least 0 and below the {tokens} tokens")
        functions = (heads, r, tokens)
        self.coefficients = nn.Parameter(BASES[basis].start((heads, r, tokens), grid))
        self.base_weight = nn.Parameter(torch.randn(functions), requires_grad=base != "zero")
        self.basis_weight = nn.Parameter(torch.ones(functions))
        self.mixing = nn.Parameter(torch.randn(functions) / sqrt(tokens * r))

    def forward(self, scores: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores (B, heads, M, N) to attention of the same shape.

        Args:
            scores: M rows an image.
            keep: (B, heads or 1, M, N), True where a key is seen; another one neither enters nor is attended to.
        """
        rows = scores.transpose(0, 1)
        seen = None if keep is None else keep.to(scores.dtype).transpose(0, 1).flatten(1, 2)
        y = self.reduced(rows.flatten(1, 2), seen).unflatten(1, rows.shape[1:3])  # (heads, B, M, r)
        out = (y @ self.mixed(scores)[:, None]).transpose(0, 1)
        return out if keep is None else out * keep

    def reduced(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        """Numbers y of rows (heads, M, N): (heads, M, r).

        Args:
            rows: of the scores.
            keep: (heads or 1, M, N) as floats, as in `forward`.
        """
        coefs, base_weight, basis_weight = self._functions(rows)
        if keep is not None:
            rows = rows.masked_fill(keep == 0, 0.0)  # a mask may be minus infinity
        if self.basis == "fourier":
            weights = (coefs * basis_weight[:, :, None]).permute(0, 2, 3, 1).flatten(1, 2)  # (heads, 2 G N, r)
            y = fourier(rows, weights, keep)
        else:
            value = BASES[self.basis].value
            y = torch.stack(
                [_lean(_summed, value, rows, coefs[:, p], basis_weight[:, p], keep) for p in range(self.r)], -1
            )
        if self.base == "zero":
            return y
        return y + _lean(_based, self.base, rows, base_weight, keep)

    def mixed(self, like: Tensor) -> Tensor:
        """W^T (heads, r, N) for scores `like`, in their number format."""
        return self._fitted(self.mixing, like.shape[-1]).to(like.dtype) * (sqrt(self.tokens) / like.shape[-1])

    def _functions(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients and weights for the number of keys of `rows`; the sum over keys keeps its size."""
        keys, kind = rows.shape[-1], rows.dtype
        coefs, *weights = (
            self._fitted(table, keys).to(kind) for table in (self.coefficients, self.base_weight, self.basis_weight)
        )
        return coefs, weights[0] * (self.tokens / keys), weights[1] * (self.tokens / keys)

    def _fitted(self, table: Tensor, keys: int) -> Tensor:
        """A table (..., tokens) for another number of keys: the prefix as it is, the rest interpolated."""
        if keys == self.tokens:
            return table
        if keys <= self.prefix:
            raise UsageError(f"karat: the operator has {self.prefix} prefix tokens and got {keys} in all")
        first, grid = table.split((self.prefix, self.tokens - self.prefix), -1)
        flat = grid.flatten(0, -2)[None]  # (1, tables, places)
        old, new = isqrt(flat.shape[-1]), isqrt(keys - self.prefix)
        if old**2 == flat.shape[-1] and new**2 == keys - self.prefix:
            fitted = interpolate(flat.unflatten(-1, (old, old)), size=(new, new), mode="bilinear").flatten(2)
        else:
            fitted = interpolate(flat, size=keys - self.prefix, mode="linear")
        return torch.cat([first, fitted.view(*grid.shape[:-1], -1)], -1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, tokens={self.tokens}, r={self.r}, basis={self.basis}, base={self.base}"


def _checked(heads: int, tokens: int, r: int, basis: str, grid: int | None, base: str) -> int:
    """The grid, 3 by default, of options in range."""
    for name, value in (("heads", heads), ("tokens", tokens), ("r", r), ("grid", 3 if grid is None else grid)):
        if value < 1:
            raise UsageError(f"karat: {name} is {value}; it must be at least 1")
    if basis not in BASES:
        raise UsageError(f"karat: basis is {basis!r}{near(basis, BASES)}; it can be {', '.join(BASES)}")
    if grid is not None and basis != "fourier":
        raise UsageError(f"karat: grid is {grid}, but only the Fourier basis has one, and basis is {basis}")
    if base not in get_args(Base):
        raise UsageError(f"karat: base is {base!r}; it can be {', '.join(get_args(Base))}")
    return 3 if grid is None else grid


def fourier(rows: Tensor, weights: Tensor, keep: Tensor | None = None) -> Tensor:
    """Sums of waves of all keys: cos(m x_q) and sin(m x_q), m = 1..G, times weights.

    Only `rows` is kept for the gradient, and waves are made of a few rows at a time, from one cosine and one sine a
    score: cos(m x) = 2 cos(x) cos((m - 1) x) - cos((m - 2) x). Where the graph is compiled or exported the plain form,
    `waves` times weights, is left to the compiler.

    Args:
        rows: (heads, M, N).
        weights: (heads, 2 G N, r): G N of the cosines, harmonic by harmonic, and then those of the sines.
        keep: (heads or 1, M, N) as floats: factors of the waves.

    Returns:
        (heads, M, r).
    """
    if torch.compiler.is_compiling():
        return waves(rows, weights.shape[1] // (2 * rows.shape[2]), keep).flatten(2) @ weights
    return _Fourier.apply(rows, weights, keep)  # type: ignore[return-value]


def waves(rows: Tensor, grid: int, keep: Tensor | None = None) -> Tensor:
    """cos(m x), m = 1..grid, and then sin(m x), of rows (heads, M, N): (heads, M, 2 grid, N)."""
    angles = rows[:, :, None] * torch.arange(1, grid + 1, device=rows.device, dtype=rows.dtype)[:, None]
    found = torch.cat([angles.cos(), angles.sin()], 2)
    return found if keep is None else found * keep[:, :, None]


def _recurrent_waves(rows: Tensor, grid: int, keep: Tensor | None) -> Tensor:
    """As `waves`, in place and by recurrence; no gradient passes."""
    found = rows.new_empty(*rows.shape[:2], 2 * grid, rows.shape[2])
    twice = 2 * rows.cos()
    for first, start in ((0, twice / 2), (grid, rows.sin())):
        found[:, :, first] = start if keep is None else start * keep
        for m in range(first + 1, first + grid):
            torch.mul(twice, found[:, :, m - 1], out=found[:, :, m])
            if m > first + 1:
                found[:, :, m] -= found[:, :, m - 2]
            elif first == 0:
                found[:, :, m] -= 1 if keep is None else keep  # cos(0 x); sin(0 x) is 0
    return found


class _Fourier(torch.autograd.Function):
    """`fourier` with a gradient that makes the waves again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weights, keep)
        grid = weights.shape[1] // (2 * rows.shape[2])
        found = [_recurrent_waves(x, grid, seen).flatten(2) @ weights for x, seen in _pieces(rows, keep)]
        return torch.cat(found, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights, keep = ctx.saved_tensors
        grad = grads[0].to(rows.dtype)
        grid = weights.shape[1] // (2 * rows.shape[2])
        orders = torch.arange(1, grid + 1, device=rows.device, dtype=rows.dtype)[:, None]
        rows_grad, weights_grad = torch.empty_like(rows), torch.zeros_like(weights)
        done = 0
        for x, seen in _pieces(rows, keep):
            part = slice(done, done := done + x.shape[1])
            found = _recurrent_waves(x, grid, seen)
            weights_grad.baddbmm_(found.flatten(2).mT, grad[:, part])
            back = (grad[:, part] @ weights.mT).view_as(found)
            turned = (
                back[:, :, grid:].mul_(found[:, :, :grid]).addcmul_(back[:, :, :grid], found[:, :, grid:], value=-1)
            )
            torch.sum(turned.mul_(orders), 2, out=rows_grad[:, part])
        return rows_grad, weights_grad, None


def _pieces(rows: Tensor, keep: Tensor | None) -> Sequence[tuple[Tensor, Tensor | None]]:
    """A few rows at a time, with what of them is seen."""
    elements = PIECE if rows.device.type == "cpu" else 64 * PIECE
    few = max(1, elements // (rows.shape[0] * rows.shape[2]))
    pieces = rows.split(few, 1)
    return list(zip(pieces, (None,) * len(pieces) if keep is None else keep.split(few, 1), strict=True))


def _lean(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The function's value; in training what it computes on the way is computed again for the gradient."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    found: Any = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return found


def _summed(
    value: Callable[[Tensor, Tensor], Tensor], rows: Tensor, coefs: Tensor, weight: Tensor, keep: Tensor | None
) -> Tensor:
    """One function a key, summed over the keys: rows (heads, M, N) to (heads, M)."""
    found = value(rows, coefs[:, :, None])
    found = found if keep is None else found * keep
    return (found @ weight[..., None])[..., 0]


def _based(base: Base, rows: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """Of rows (heads, M, N), b weighted and summed over the keys: (heads, M, r)."""
    found = silu(rows) if base == "silu" else rows
    return (found if keep is None else found * keep) @ weight.mT


@dataclass(frozen=True)
class Basis:
    """A family of functions of one variable.

    Attributes:
        start: (heads, r, tokens), grid -> first coefficients (heads, r, terms, tokens).
        value: rows (heads, M, N), coefficients (heads, terms, 1, N) -> (heads, M, N).
    """

    start: Callable[[tuple[int, int, int], int], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]


def _drawn(terms: Callable[[int], int]) -> Callable[[tuple[int, int, int], int], Tensor]:
    """Standard normal coefficients."""
    return lambda shape, grid: torch.randn(*shape[:2], terms(grid), shape[2])


def _wavelet(mother: Callable[[Tensor], Tensor]) -> Basis:
    """A wavelet with a weight, drawn from the standard normal, a place and a width, at first 0 and 1."""

    def start(shape: tuple[int, int, int], grid: int) -> Tensor:
        weight = torch.randn(shape)
        return torch.stack([weight, torch.zeros_like(weight), torch.ones_like(weight)], 2)

    def value(rows: Tensor, coefs: Tensor) -> Tensor:
        weight, place, width = coefs.unbind(1)
        return weight * mother((rows - place) / width)

    return Basis(start, value)


def _fourier(rows: Tensor, coefs: Tensor) -> Tensor:
    """Slower than `fourier`, since every function makes its own waves."""
    found = waves(rows, coefs.shape[1] // 2)  # (heads, M, 2 G, N)
    return (found * coefs.transpose(1, 2)).sum(2)


def _rational(rows: Tensor, coefs: Tensor) -> Tensor:
    above, below = coefs.split((DEGREES[0] + 1, DEGREES[1]), 1)
    return _powers(rows, above) / (1 + (rows * _powers(rows, below)).abs())


def _powers(x: Tensor, coefs: Tensor) -> Tensor:
    """The sum of coefs[k] x^k, by Horner's rule."""
    found = coefs[:, -1]
    for k in range(coefs.shape[1] - 2, -1, -1):
        found = found * x + coefs[:, k]
    return found


def _bell(t: Tensor) -> Tensor:
    return (-0.5 * t.square()).exp()


def _meyer(t: Tensor) -> Tensor:
    far = t.abs()
    ramp = (2 * far - 1).clamp(0, 1)  # 0 up to 1/2, 1 from 1 on
    smooth = ramp**4 * (35 - 84 * ramp + 70 * ramp**2 - 20 * ramp**3)
    return (pi * far).sin() * (pi / 2 * smooth).cos()


BASES: Mapping[str, Basis] = {
    "fourier": Basis(_drawn(lambda grid: 2 * grid), _fourier),
    "rational": Basis(_drawn(lambda _: sum(DEGREES) + 1), _rational),
    "mexican_hat": _wavelet(lambda t: 2 / (sqrt(3) * pi**0.25) * (1 - t.square()) * _bell(t)),
    "morlet": _wavelet(lambda t: (5 * t).cos() * _bell(t)),
    "dog": _wavelet(lambda t: -t * _bell(t)),
    "meyer": _wavelet(_meyer),
    "shannon": _wavelet(lambda t: torch.sinc(t / 2) * (1.5 * pi * t).cos()),
}
