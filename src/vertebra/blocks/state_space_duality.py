"""The scan of Mamba-2 (state space duality): a linear recurrence whose decay is one number a head and token.

    h_n = exp(step_n A) h_(n-1) + step_n B_n x_n^T,    y_n = h_n^T C_n + D x_n,    h_0 = 0

Shapes: x (B, N, H, P) of H heads in, the same out. No page: a tool of `mamba2`. Token by token it is a loop over N; in
chunks it is the same sum as matrix products (arXiv 2405.21060, section 6): within a chunk every token reads those
before it as in attention, under a mask of decays, and what a chunk leaves behind is carried to the next ones. Decays
enter as exponentials of sums that are at most 0, so that nothing overflows.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vertebra.errors import UsageError

Form = Literal["chunked", "sequential"]

LENGTH, GROUP, GRAIN = 64, 16, 64
"""Tokens a chunk at most and chunks carried by one product, measured on a CPU; the grain of exact sums."""


def dual_scan(
    x: Tensor,
    step: Tensor,
    decay: Tensor,
    drive: Tensor,
    read: Tensor,
    skip: Tensor | None = None,
    *,
    form: Form = "chunked",
    length: int = LENGTH,
) -> Tensor:
    """Scan each head with a state of S x P numbers.

    Args:
        x: what is scanned, (B, N, H, P).
        step: (B, N, H), positive: after its bias and softplus.
        decay: A, (H,), negative: after -exp(log).
        drive: B, (B, N, G, S); the heads are divided among the G groups in their order.
        read: C, (B, N, G, S).
        skip: D, (H,).
        form: matrix products by chunks, or a loop over the tokens; both agree.
        length: tokens a chunk at most.

    Returns:
        (B, N, H, P) in the number format of `x`; sums are of 32 bit or more. In 32 bit the forms agree within 1e-6 of
        the largest value, and so do their gradients, but that of A within 1e-4 where steps differ a thousandfold.

    Raises:
        UsageError: an unknown form, chunks below one token, or groups that do not divide the heads.
    """
    heads, groups = x.shape[2], drive.shape[2]
    if form not in ("chunked", "sequential"):
        raise UsageError(f"dual_scan: form is {form!r}; it can be chunked or sequential")
    if length < 1:
        raise UsageError(f"dual_scan: length is {length}; it must be at least 1")
    if heads % groups:
        raise UsageError(f"dual_scan: {groups} groups do not divide {heads} heads")
    kind = torch.promote_types(x.dtype, torch.float32)
    wide, step, drive, read = (values.to(kind) for values in (x, step, drive, read))
    if groups > 1:  # one group is shared by all heads as it is
        drive, read = (values.repeat_interleave(heads // groups, 2) for values in (drive, read))
    log = step * decay.to(kind)
    own = 0 if skip is None else skip.to(kind)  # what a token gives to itself
    if form == "chunked":
        own = own + step * (read * drive).sum(-1)
        y = _chunked(wide, step, log, drive, read, length)
    else:
        y = _sequential(wide * step[..., None], log, drive, read)
    if isinstance(own, Tensor):
        y = torch.addcmul(y, wide, own[..., None])
    return y.to(x.dtype)


def _sequential(x: Tensor, log: Tensor, drive: Tensor, read: Tensor) -> Tensor:
    """The recurrence as it is written."""
    state = x.new_zeros(x.shape[0], x.shape[2], drive.shape[3], x.shape[3])  # (B, H, S, P)
    kept, out = log.exp(), []
    for n in range(x.shape[1]):
        state = state * kept[:, n, :, None, None] + drive[:, n, :, :, None] * x[:, n, :, None]
        out.append((read[:, n, :, :, None] * state).sum(2))
    return torch.stack(out, 1)


def _chunked(x: Tensor, step: Tensor, log: Tensor, drive: Tensor, read: Tensor, length: int) -> Tensor:
    """The same sums as products of matrices, all chunks at once, without what a token gives to itself.

    That needs no decay, and would drown the gradient of decays in differences of equal numbers.
    """
    tokens = x.shape[1]
    chunks = -(-tokens // length)
    length = -(-tokens // chunks)  # as even as can be, so that little is padded
    x, drive, read = (_pieces(values, chunks, length) for values in (x, drive, read))  # (B, H or 1, chunks, length, _)
    step, log = (_pieces(values[..., None], chunks, length)[..., 0] for values in (step, log))
    coarse, fine = _past(log)
    x = x * (step * (-fine).exp())[..., None]
    y = ((read @ drive.mT).tril(-1) * _decays(coarse)) @ x
    if chunks > 1:
        kept = (coarse[..., -1:] - coarse + fine[..., -1:]).exp()  # from each token to the end of its chunk
        left = (kept[..., None, :] * drive.mT) @ x  # (B, H, chunks, S, P)
        before = _carried(left, coarse[..., -1] + fine[..., -1])
        y = y + (coarse.exp()[..., None] * read) @ before
    return (y * fine.exp()[..., None]).flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _pieces(values: Tensor, chunks: int, length: int) -> Tensor:
    """(B, N, H, C) to (B, H, chunks, length, C), with zeros behind the last token: they leave states as they are."""
    values, more = values.transpose(1, 2), chunks * length - values.shape[1]
    return (pad(values, (0, 0, 0, more)) if more else values).unflatten(2, (chunks, length))


def _past(log: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (..., L) of logarithms up to each place, in two parts.

    A long sum in 32 bit rounds by more than the difference of two neighbours can bear. The coarse part sums multiples
    of 1 / GRAIN, which is exact; it needs no gradient, since a rounded number does not move. The fine part is small
    enough (below L / 2 GRAIN) for its exponential to be a factor of its own. What a token leaves of less than a
    rounding error has no gradient either: it would be noise, times the large step.
    """
    still = log.detach()
    rounded = (still * GRAIN).round() / GRAIN
    felt = torch.where(still > math.log(torch.finfo(log.dtype).eps), log, still)
    return rounded.cumsum(-1), (felt - rounded).cumsum(-1)


def _decays(coarse: Tensor) -> Tensor:
    """What is left at a row's place of what came in at a column's, (..., L) to (..., L, L); 1 above the diagonal."""
    return (coarse[..., :, None] - coarse[..., None, :]).clamp_(max=0).exp_()


def _carried(left: Tensor, log: Tensor) -> Tensor:
    """States at the start of each chunk, (B, H, K, S, P).

    Args:
        left: what each chunk leaves behind on its own, (B, H, K, S, P).
        log: logarithm of what is kept through each chunk, (B, H, K).
    """
    chunks, shape = log.shape[2], left.shape[3:]
    groups = -(-chunks // GROUP)
    inside = -(-chunks // groups)
    more = groups * inside - chunks
    left = pad(left.flatten(3), (0, 0, 0, more)).unflatten(2, (groups, inside))  # (B, H, groups, inside, S P)
    coarse, fine = _past(pad(log, (0, more)).unflatten(2, (groups, inside)))
    through = _decays(coarse).tril(-1) * (fine[..., :, None] - fine[..., None, :]).exp()
    after = left + through @ left  # of each chunk, without what came into its group
    ends, before = after[:, :, :, -1], pad(after[:, :, :, :-1], (0, 0, 1, 0))
    if groups > 1:  # groups of chunks, by the same sums
        past = coarse + fine
        start = _carried(ends.unflatten(3, shape), past[..., -1]).flatten(3)
        before = before + pad(past[..., :-1], (1, 0)).exp()[..., None] * start[..., None, :]
    return before.flatten(2, 3)[:, :, :chunks].unflatten(3, shape)
