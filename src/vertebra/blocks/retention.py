"""Retention: what a token keeps of those before it fades at a fixed rate a head; three forms, one result.

    parallel     o = (q k^T * D) v,  D_nm = gamma^(n - m) for n >= m, else 0                quadratic in the tokens
    recurrent    S_n = gamma S_(n-1) + k_n^T v_n,  o_n = q_n S_n                            one d x d state a head
    chunkwise    the first within chunks, the second from chunk to chunk                    linear, in matrix products

Shapes: tokens (B, N, dim) in, the same out. Retention is of RetNet (arXiv 2307.08621, eq. 5 to 7); this block is the
plain one of ViR (arXiv 2310.19731): no gate, no group norm, no rotation. Powers of a rate are exponentials of multiples
of its logarithm, in 32 bit or more whatever the tokens have, so that long distances fade to 0 and short ones keep
their digits. `causal_decays` and `distance_decays` are for other pages too.
"""

from math import log
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError

Form = Literal["auto", "parallel", "recurrent", "chunkwise"]
Compat = Literal["paper", "released"]

VARIANTS: dict[str, dict[str, object]] = {}

CHUNK = 64
"""Tokens a chunk at most."""

PARALLEL = 320
"""Tokens up to which "auto" takes the parallel form."""


def retention(
    dim: int,
    *,
    heads: int | None = None,
    form: Form = "auto",
    chunk: int = CHUNK,
    late: int = 0,
    compat: Compat = "paper",
) -> "Retention":
    """The block for tokens (B, N, dim).

    Args:
        dim: width of a token.
        heads: a divisor of dim; by default the largest that leaves a head at least 64 channels.
        form: which of the three; "auto" is parallel up to `PARALLEL` tokens and chunkwise beyond, whichever is faster
            on a CPU. It may be changed later: it is an attribute, and no weight depends on it.
        chunk: tokens a chunk at most, in the chunkwise form; the tokens are shared out evenly.
        late: tokens at the front (a class token, registers) that are scanned last, so that they read all others.
        compat: "released" takes a softmax of the products times decays, as the released code of ViR does. That is not
            causal, since what is to come has a product of 0 there, and has the parallel form alone.

    Raises:
        UsageError: heads that do not divide dim, an unknown form, or an option out of range.
    """
    if dim < 1:
        raise UsageError(f"retention: dim is {dim}; it must be at least 1")
    if heads is None:
        heads = next(count for count in range(max(1, dim // 64), 0, -1) if dim % count == 0)
    if heads < 1 or dim % heads:
        raise UsageError(f"retention: {heads} heads do not divide dim {dim}; take a divisor")
    if late < 0:
        raise UsageError(f"retention: late is {late}; it must be at least 0")
    if chunk < 1:
        raise UsageError(f"retention: chunk is {chunk}; it must be at least 1")
    check_form(form, compat)
    return Retention(dim=dim, heads=heads, form=form, chunk=chunk, late=late, compat=compat)


def check_form(form: str, compat: str) -> None:
    """Refuse forms that there are not.

    Raises:
        UsageError: an unknown form or compat, or a form that the softmax does not have.
    """
    if compat not in get_args(Compat):
        raise UsageError(f"retention: compat is {compat!r}; it can be {' or '.join(get_args(Compat))}")
    if form not in get_args(Form):
        raise UsageError(f"retention: form is {form!r}; it can be {', '.join(get_args(Form))}")
    if compat == "released" and form not in ("auto", "parallel"):
        raise UsageError(
            f"retention: the softmax of compat='released' has the parallel form alone, and form is {form!r}; take"
            " compat='paper', whose forms agree"
        )


class Retention(nn.Module):
    """Queries, keys and values by one linear layer, retention of each head, another linear layer; see `retention`.

    Attributes:
        qkv: dim to 3 dim: all queries, head by head, then all keys, then all values.
        proj: of what the heads give.
        chunk: tokens a chunk at most.
    """

    def __init__(self, *, dim: int, heads: int, form: Form, chunk: int, late: int, compat: Compat) -> None:
        super().__init__()
        self.heads, self.chunk, self.late, self.compat = heads, chunk, late, compat
        self.form = form
        self.qkv = Dense(dim, 3 * dim)
        self.proj = Dense(dim, dim)

    @property
    def form(self) -> Form:
        """Which form the forward pass takes; one that there is not is refused when it is set."""
        return self._form

    @form.setter
    def form(self, form: Form) -> None:
        check_form(form, self.compat)
        self._form: Form = form

    def taken(self, tokens: int) -> Form:
        """The form for a number of tokens: what "auto" stands for."""
        if self.form != "auto":
            return self.form
        return "parallel" if tokens <= PARALLEL or self.compat == "released" else "chunkwise"

    def forward(self, x: Tensor, decays: Tensor | None = None) -> Tensor:
        """Tokens (B, N, dim) to tokens of the same shape.

        Args:
            x: in the order of the scan, but for the `late` ones.
            decays: `causal_decays` for these tokens, where many blocks share them; made here otherwise. The parallel
                form alone looks at them.
        """
        q, k, v = self._parts(x)
        form = self.taken(x.shape[1])
        if form == "parallel":
            decays = causal_decays(log_rates(self.heads, q), x.shape[1]) if decays is None else decays
            y = parallel(q, k, v, decays, softmax=self.compat == "released")
        elif form == "recurrent":
            y, _ = recurrent(q, k, v, log_rates(self.heads, q))
        else:
            y, _ = chunkwise(q, k, v, log_rates(self.heads, q), self.chunk)
        return self.proj(self._joined(y))

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens of a sequence, in the order of the scan, whatever `late` says.

        Memory does not depend on how many came before. One token is a step of the recurrent form; more are chunkwise.

        Args:
            x: (B, n, dim).
            state: what an earlier step gave; None at the start.

        Returns:
            Tokens (B, n, dim), and the state (B, heads, d, d).
        """
        if self.compat == "released":
            raise UsageError("retention: compat='released' reads what is to come and takes no steps")
        q, k, v = self._heads(self.qkv(x)).contiguous()
        logs = log_rates(self.heads, q)
        if x.shape[1] == 1 or self.form == "recurrent":
            y, state = recurrent(q, k, v, logs, state)
        else:
            y, state = chunkwise(q, k, v, logs, self.chunk, state)
        return self.proj(y.transpose(1, 2).flatten(2)), state

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, 3 dim) to (3, B, heads, N, d)."""
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in the order of the scan, (B, heads, N, d) each; one copy does both."""
        found = self._heads(self.qkv(x))
        late = self.late
        found = torch.cat((found[..., late:, :], found[..., :late, :]), -2) if late else found.contiguous()
        q, k, v = found.unbind()
        return q, k, v

    def _joined(self, y: Tensor) -> Tensor:
        """(B, heads, N, d) to (B, N, dim), the late tokens in front again."""
        y, late = y.transpose(1, 2), self.late
        return (torch.cat((y[:, -late:], y[:, :-late]), 1) if late else y).flatten(2)


def log_rates(heads: int, like: Tensor, *, shortest: float = 32, longest: float = 512) -> Tensor:
    """Logarithms of what is kept from one token to the next, (heads,): those of 1 - 1/32 to 1 - 1/512.

    1 / (1 - rate) is the reach in tokens; the heads' reaches are spread evenly in their logarithm.

    Args:
        heads: how many; a single one has the shortest reach.
        like: says the device; the result has 64 bit where it has, 32 bit otherwise.
        shortest: reach of the first head.
        longest: of the last one.
    """
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    losses = torch.linspace(-log(shortest), -log(longest), heads, dtype=kind, device=like.device).exp()
    return torch.log1p(-losses)


def causal_decays(logs: Tensor, tokens: int) -> Tensor:
    """D_nm = exp(logs (n - m)) for n >= m and 0 elsewhere, (heads, tokens, tokens)."""
    place = torch.arange(tokens, dtype=logs.dtype, device=logs.device)
    away = (place[:, None] - place).clamp_(min=0)
    return (logs[:, None, None] * away).exp_().tril_()


def distance_decays(logs: Tensor, places: int) -> Tensor:
    """|i - j| logs along one axis, (heads, places, places): a bias of attention, and its exponential a factor."""
    place = torch.arange(places, dtype=logs.dtype, device=logs.device)
    return logs[:, None, None] * (place[:, None] - place).abs_()


def parallel(q: Tensor, k: Tensor, v: Tensor, decays: Tensor, *, softmax: bool = False) -> Tensor:
    """Retention as attention without a softmax.

    Args:
        q: (B, heads, N, d), not yet scaled by d^-0.5.
        k: likewise.
        v: likewise.
        decays: (heads, N, N).
        softmax: of the products times decays, as the released code of ViR.

    Returns:
        (B, heads, N, d).
    """
    products = (q * q.shape[-1] ** -0.5) @ k.mT
    products = products.mul_(decays.to(q.dtype))  # the product's gradient does not need it
    return (products.softmax(-1) if softmax else products) @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Retention token by token.

    Args:
        q: (B, heads, N, d), not yet scaled by d^-0.5.
        k: likewise.
        v: likewise.
        logs: (heads,), of `log_rates`.
        state: S before the first token, (B, heads, d, d); zeros by default.

    Returns:
        (B, heads, N, d), and S after the last token, in 32 bit or more.
    """
    kept, found = logs.exp()[:, None, None], []
    state = _empty(k, v, logs) if state is None else state
    q = q * q.shape[-1] ** -0.5
    for n in range(q.shape[2]):
        now = slice(n, n + 1)
        state = torch.addcmul(kept * state, k[:, :, now].mT.to(kept), v[:, :, now].to(kept))
        found.append(q[:, :, now] @ state.to(q.dtype))
    return found[0] if len(found) == 1 else torch.cat(found, 2), state


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, chunk: int = CHUNK, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Retention by chunks: all of them at once, but for their states, which are carried from one to the next.

    Args:
        q: (B, heads, N, d), not yet scaled by d^-0.5.
        k: likewise.
        v: likewise.
        logs: (heads,), of `log_rates`.
        chunk: tokens a chunk at most; they get as even a share as they can.
        state: S before the first token, (B, heads, d, d); zeros by default.

    Returns:
        (B, heads, N, d), and S after the last token, in 32 bit or more.
    """
    tokens, kind = q.shape[2], q.dtype
    chunks = -(-tokens // chunk)
    length = -(-tokens // chunks)
    more = chunks * length - tokens
    # zeros in front leave nothing in the state; a state that is given must outlast them
    q, k, v = (pad(part, (0, 0, more, 0)).unflatten(2, (chunks, length)) for part in (q, k, v))  # (B, h, M, c, d)
    place = torch.arange(length, dtype=logs.dtype, device=logs.device)[:, None]
    decays = causal_decays(logs, length)[:, None].to(kind)  # (h, 1, c, c)
    since = (logs[:, None, None, None] * (place + 1)).exp().to(kind)  # (h, 1, c, 1)
    until = (logs[:, None, None, None] * (length - 1 - place)).exp().to(kind)
    q = q * q.shape[-1] ** -0.5
    y = (q @ k.mT).mul_(decays) @ v
    left = (k * until).mT @ v  # (B, h, M, d, d)
    if state is None and chunks == 1:
        return y[:, :, 0], left[:, :, 0].to(logs.dtype)
    state = _empty(k, v, logs) if state is None else state * (-more * logs).exp()[:, None, None]
    kept, before = (length * logs).exp()[:, None, None], []
    for m in range(chunks):
        before.append(state)
        state = torch.addcmul(left[:, :, m].to(logs.dtype), kept, state)
    y = y + (q * since) @ torch.stack(before, 2).to(kind)
    return y.flatten(2, 3)[:, :, more:], state


def _empty(k: Tensor, v: Tensor, logs: Tensor) -> Tensor:
    return torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=logs.dtype, device=k.device)
