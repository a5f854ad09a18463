"""The selective scan of Mamba (S6): a linear recurrence whose step, input and readout depend on the token.

    h_n = exp(step_n A) h_(n-1) + step_n B_n x_n,    y_n = <C_n, h_n> + D x_n,    h_0 = 0

Shapes: channels last, as projections give them: x (B, N, C) in, the same out, S states a channel. No page: a tool of
`vim` and `vcmamba`. Algorithm 2 of arXiv 2312.00752. Decays are exponentials of what is never positive, and products
of such, so a large step forgets and nothing overflows.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from math import log, prod
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from vertebra.errors import UsageError

Form: TypeAlias = Literal["auto", "sequential", "chunked", "associative", "triton"]

_TRITON = find_spec("triton") is not None
_KEPT = 32
"""Tokens from one state that is kept for the gradients to the next; those between are computed again."""
_ROOM = 192 * 1024
"""Numbers of a working tensor of a tile; two of them stay in the cache of a core."""
_LANES = 48 * 1024
"""Most numbers in the states of one token, over the samples of a tile; a quarter of it where gradients are wanted."""


def first_biases(count: int, *, shortest: float = 1e-3, longest: float = 0.1) -> Tensor:
    """Biases of steps as Mamba starts them, (count,): their softplus is log-uniform between two steps."""
    steps = torch.empty(count).uniform_(log(shortest), log(longest)).exp()
    return steps + (-(-steps).expm1()).log()


def selective_scan(
    x: Tensor,
    step: Tensor,
    decay: Tensor,
    drive: Tensor,
    read: Tensor,
    skip: Tensor | None = None,
    *,
    reverse: bool = False,
    form: Form = "auto",
) -> Tensor:
    """Scan tokens, each channel with S states of its own.

    Args:
        x: what is scanned, (B, N, C).
        step: (B, N, C), positive: after its bias and softplus.
        decay: A, (C, S), negative: after -exp.
        drive: B, (B, N, S).
        read: C, (B, N, S).
        skip: D, (C,).
        reverse: from the last token to the first; equals the scan of flipped tokens, flipped back, without the flips.
        form: how it is computed; all agree. `sequential` is the equation, token by token. `chunked` works on tiles
            that stay in the cache and, for the gradients, keeps the states of every 32nd token alone: memory grows
            with N C, not with N C S. `associative` takes log2 N rounds of plain operations. `triton` is one kernel for
            CUDA. `auto` takes `associative` under `torch.compile` and `torch.export`, on CUDA `triton` where there is
            Triton, and `chunked` elsewhere. On the meta device all are three products of N S C multiply-accumulates,
            for `vertebra.training.cost.count`: the decay, the input and the readout.

    Returns:
        (B, N, C) in the number format of `x`; states are of 32 bit or more. Derivatives of `chunked` and `triton` are
        of first order.

    Raises:
        UsageError: shapes that do not fit, an unknown form, or `triton` without CUDA or without Triton.
    """
    _check(x, step, decay, drive, read)
    scan = _form(form, x)
    kind = torch.promote_types(x.dtype, torch.float32)
    y = scan(*(tensor.to(kind) for tensor in (x, step, decay, drive, read)), reverse)
    if skip is not None:
        y = torch.addcmul(y, skip.to(kind), x.to(kind))
    return y.to(x.dtype)


def _check(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor) -> None:
    batch, tokens, channels = x.shape
    states = decay.shape[-1]
    wanted = {"step": (batch, tokens, channels), "decay": (channels, states)}
    wanted |= {"drive": (batch, tokens, states), "read": (batch, tokens, states)}
    for (name, shape), tensor in zip(wanted.items(), (step, decay, drive, read), strict=True):
        if tuple(tensor.shape) != shape:
            raise UsageError(f"selective_scan: {name} has shape {tuple(tensor.shape)}; x and decay ask for {shape}")
    if not tokens:
        raise UsageError("selective_scan: x has no tokens; it needs at least 1")


def _form(form: Form, x: Tensor) -> Callable[..., Tensor]:
    if form not in get_args(Form):
        raise UsageError(f"selective_scan: form is {form!r}; it must be one of {', '.join(get_args(Form))}")
    if form == "triton" and not (x.is_cuda and _TRITON):
        raise UsageError(f"selective_scan: form 'triton' needs CUDA and Triton, x is on {x.device}; 'auto' works")
    if x.is_meta:
        return _counted
    if form == "auto" and torch.compiler.is_compiling():
        form = "associative"
    if form == "triton" or (form == "auto" and x.is_cuda and _TRITON):
        from vertebra.blocks.selective_scan_triton import scan_cuda

        return scan_cuda
    return {"sequential": _sequential, "associative": _associative}.get(form, _chunked)


def _sequential(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, reverse: bool) -> Tensor:
    state = x.new_zeros(len(x), *decay.shape)  # (B, C, S)
    out: list[Tensor] = [state] * x.shape[1]
    for token in _order(x.shape[1], reverse):
        now = step[:, token, :, None]
        state = (now * decay).exp() * state + now * drive[:, token, None] * x[:, token, :, None]
        out[token] = (state * read[:, token, None]).sum(2)
    return torch.stack(out, 1)


def _order(tokens: int, reverse: bool) -> range:
    return range(tokens - 1, -1, -1) if reverse else range(tokens)


def _associative(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, reverse: bool) -> Tensor:
    if reverse:
        x, step, drive, read = (tensor.flip(1) for tensor in (x, step, drive, read))
    kept = (step[:, :, None] * decay.t()).exp()  # (B, N, S, C)
    states = _prefixes(kept, drive[..., None] * (step * x)[:, :, None])
    y = (states * read[..., None]).sum(2)
    return y.flip(1) if reverse else y


def _prefixes(kept: Tensor, given: Tensor) -> Tensor:
    """All h_n = kept_n h_(n-1) + given_n along dimension 1: pairs are joined, scanned, and filled in between."""
    tokens = kept.shape[1]
    if tokens == 1:
        return torch.addcmul(given, kept, torch.zeros_like(given))  # the state before the first; gradients are defined
    paired = tokens - tokens % 2
    first, second = slice(0, paired, 2), slice(1, paired, 2)
    joined = torch.addcmul(given[:, second], kept[:, second], given[:, first])
    ends = _prefixes(kept[:, second] * kept[:, first], joined)  # h of tokens 1, 3, 5, ...
    between = torch.addcmul(given[:, 2::2], kept[:, 2::2], ends[:, : (tokens - 1) // 2])
    between = torch.cat((given[:, :1], between), 1)  # h of tokens 0, 2, 4, ...
    both = torch.stack((between[:, : paired // 2], ends), 2).flatten(1, 2)
    return both if tokens == paired else torch.cat((both, between[:, -1:]), 1)


def _counted(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, reverse: bool) -> Tensor:
    """Nothing computed: three matrix products of as many multiply-accumulates as the scan has."""
    states = drive[..., None] @ (step * x)[:, :, None]  # (B, N, S, C)
    return (read[:, :, None] @ states + drive[:, :, None] @ states).squeeze(2)


def _chunked(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, reverse: bool) -> Tensor:
    given = _Given(step * x, step, decay, drive, read)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        out: Any = _Scan.apply(*given, reverse)
        return out
    return _values(given, reverse)


class _Given(NamedTuple):
    """What a scan in tiles is given: step x, (B, N, C), and the rest as `selective_scan` has it."""

    input: Tensor
    step: Tensor
    decay: Tensor
    drive: Tensor
    read: Tensor


class _Scan(Function):
    """The scan in tiles and its gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        given, ctx.reverse = _Given(*arguments[:-1]), arguments[-1]
        batch, tokens, channels = given.input.shape
        borders = given.input.new_empty(-(-tokens // _KEPT), batch, given.decay.shape[1], channels)
        ctx.save_for_backward(*given, borders)
        return _values(given, ctx.reverse, borders)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, borders = ctx.saved_tensors
        return *_gradients(grads[0], _Given(*given), borders, ctx.reverse), None


class _Tile(NamedTuple):
    """Some tokens of some samples.

    Attributes:
        rows: the samples.
        columns: the tokens.
        fresh: whether no tile of these samples came before it.
    """

    rows: slice
    columns: slice
    fresh: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Of a tensor (B, N, K), as (tokens, samples, K)."""
        return tensor[self.rows, self.columns].transpose(0, 1)

    def cut(self, room: Tensor, states: Tensor, more: int = 0) -> Tensor:
        """Of working memory, as (tokens + more, samples, S, C)."""
        shape = self.columns.stop - self.columns.start + more, self.rows.stop - self.rows.start, *states.shape
        return room[: prod(shape)].view(shape)


def _tiles(batch: int, tokens: int, samples: int, length: int, reverse: bool) -> Iterator[_Tile]:
    starts = range(0, tokens, length)
    for row in range(0, batch, samples):
        for number, start in enumerate(reversed(starts) if reverse else starts):
            rows, columns = slice(row, min(row + samples, batch)), slice(start, min(start + length, tokens))
            yield _Tile(rows, columns, number == 0)


def _values(given: _Given, reverse: bool, borders: Tensor | None = None) -> Tensor:
    """The scan; into `borders`, (tiles, B, S, C), go the states before each run of `_KEPT` tokens."""
    (batch, tokens, _), size = given.input.shape, given.decay.numel()
    if borders is None:
        samples = max(1, min(batch, _LANES // size))
        length = min(32, 1 << max(1, _ROOM // (samples * size)).bit_length() - 1)
    else:
        samples, length = _samples(batch, size), _KEPT
    rate, out = _rate(given.decay), torch.empty_like(given.input)
    room, other = out.new_empty(2, length * samples * size)
    last = rate
    for tile in _tiles(batch, tokens, samples, length, reverse):
        kept, states = tile.cut(room, rate), tile.cut(other, rate)
        last = torch.zeros_like(states[0]) if tile.fresh else last
        if borders is not None:
            borders[tile.columns.start // length, tile.rows] = last
        last = _run(tile, given, rate, kept, states, last, reverse).clone()  # the next tile overwrites it
        tile.of(out).copy_(_product(tile.of(given.read), states))
    return out


def _gradients(grad: Tensor, given: _Given, borders: Tensor, reverse: bool) -> list[Tensor]:
    """Of what was given, from that of the output: tiles from the last to the first, their states computed again."""
    (batch, tokens, _), size = given.input.shape, given.decay.numel()
    samples, rate, decay = _samples(batch, size), _rate(given.decay), given.decay.t().contiguous()
    found = _Given(*map(torch.empty_like, given))
    grad_decay, back = torch.zeros_like(decay), decay
    rooms = [rate.new_empty(length * samples * size) for length in (_KEPT, _KEPT + 1, _KEPT)]
    for tile in _tiles(batch, tokens, samples, _KEPT, not reverse):
        kept, line, pulled = (tile.cut(room, rate, more) for room, more in zip(rooms, (0, 1, 0), strict=True))
        states, before = (line[:-1], line[1:]) if reverse else (line[1:], line[:-1])
        first = before[-1 if reverse else 0].copy_(borders[tile.columns.start // _KEPT, tile.rows])
        _run(tile, given, rate, kept, states, first, reverse)
        back = torch.zeros_like(first) if tile.fresh else back
        back = _pull(tile, grad, given.read, kept, pulled, back, reverse)
        tile.of(found.read).copy_(_product(tile.of(grad), states.mT))
        tile.of(found.drive).copy_(_product(tile.of(given.input), pulled.mT))
        tile.of(found.input).copy_(_product(tile.of(given.drive), pulled))
        kept.mul_(before).mul_(pulled)  # the gradient of step_n A
        tile.of(found.step).copy_(torch.mul(kept, decay, out=pulled).sum(2))
        grad_decay += kept.mul_(tile.of(given.step).unsqueeze(2)).sum((0, 1))
    return list(found._replace(decay=grad_decay.t()))


def _samples(batch: int, size: int) -> int:
    """Samples of a tile where gradients are wanted."""
    return max(1, min(batch, _LANES // (4 * size)))


def _rate(decay: Tensor) -> Tensor:
    """Of decay to the base of 2, (S, C): torch's exp2 takes a quarter of the time of its exp on a CPU."""
    return (decay.t() / log(2)).contiguous()


def _run(tile: _Tile, given: _Given, rate: Tensor, kept: Tensor, states: Tensor, last: Tensor, reverse: bool) -> Tensor:
    """Write what each token keeps and its states, (tokens, samples, S, C); the last state comes back."""
    torch.mul(tile.of(given.step).unsqueeze(2), rate, out=kept).exp2_()
    torch.mul(tile.of(given.drive).unsqueeze(3), tile.of(given.input).unsqueeze(2), out=states)
    shares, lines = kept.unbind(), states.unbind()
    for token in _order(len(lines), reverse):
        last = lines[token].addcmul_(shares[token], last)
    return last


def _pull(tile: _Tile, grad: Tensor, read: Tensor, kept: Tensor, pulled: Tensor, back: Tensor, reverse: bool) -> Tensor:
    """Write the gradients of the states; the one of the state before the tile comes back."""
    torch.mul(tile.of(read).unsqueeze(3), tile.of(grad).unsqueeze(2), out=pulled)
    shares, lines = kept.unbind(), pulled.unbind()
    order = _order(len(lines), not reverse)
    lines[order[0]].add_(back)
    for later, token in pairwise(order):
        lines[token].addcmul_(shares[later], lines[later])
    return shares[order[-1]] * lines[order[-1]]


def _product(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Vectors (tokens, samples, K) times matrices (tokens, samples, K, M), a vector a matrix."""
    tokens, samples, width, columns = matrices.shape
    out = matrices.new_empty(tokens * samples, 1, columns)
    flat = vectors.reshape(tokens * samples, 1, width), matrices.reshape(tokens * samples, width, columns)
    return torch.bmm(*flat, out=out).view(tokens, samples, columns)  # `out` keeps mixed precision away
