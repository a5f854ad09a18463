"""The selective scan as Triton kernels, for CUDA: `selective_scan` imports this there alone.

A program has a sample and a run of channels and walks over the tokens with their states in registers; sums are in 32
bit (64 for 64-bit arguments). The states before every 32nd token are kept; the gradients' kernel walks over runs of 32
from the last to the first and computes the states of each once more. What is summed over channels or samples leaves a
part a program, which torch sums in a fixed order, so gradients are the same in every run. Under `TRITON_INTERPRET=1`
the kernels run on the CPU, where tests hold them to the sequential form.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

_BLOCK, _KEPT = 32, 32
"""Channels of a program; tokens from one kept state to the next."""


def scan_cuda(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, reverse: bool) -> Tensor:
    """As `selective_scan` without `skip`, for tensors of one number format, 32 or 64 bit."""
    out: Any = _Scan.apply(x, step, decay, drive, read, reverse)
    return out


class _Scan(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, reverse: bool) -> Tensor:
        x, step, decay, drive, read = (tensor.contiguous() for tensor in (x, step, decay, drive, read))
        (batch, tokens, _), wanted = x.shape, any(ctx.needs_input_grad)
        out = torch.empty_like(x)
        borders = x.new_empty(triton.cdiv(tokens, _KEPT) if wanted else 0, batch, *decay.shape)
        _launch(_forward, reverse, x, decay, step, drive, read, out, borders, KEEP=wanted)
        ctx.save_for_backward(x, step, decay, drive, read, borders)
        ctx.reverse = reverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, decay, drive, read, borders = ctx.saved_tensors
        programs = triton.cdiv(x.shape[2], _BLOCK)
        grad_x, grad_step, grad_decay = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), *decay.shape)
        grad_drive, grad_read = x.new_empty(2, programs, *drive.shape)
        room = x.new_empty(len(x), _KEPT, *decay.shape)
        given = (step, drive, read, grads[0].contiguous(), borders, room)
        _launch(_backward, ctx.reverse, x, decay, *given, grad_x, grad_step, grad_decay, grad_drive, grad_read)
        return grad_x, grad_step, grad_decay.sum(0), grad_drive.sum(0), grad_read.sum(0), None


def _launch(kernel: Any, reverse: bool, x: Tensor, decay: Tensor, *others: Tensor, **options: bool) -> None:
    """Run a kernel over all samples and runs of channels of contiguous tensors."""
    batch, tokens, channels = x.shape
    states = decay.shape[1]
    sizes = {"KEPT": _KEPT, "STATES": triton.next_power_of_2(states), "BLOCK": _BLOCK, "num_warps": 1}
    kinds = {"REVERSE": reverse, "WIDE": x.dtype == torch.float64, **options}
    kernel[triton.cdiv(channels, _BLOCK), batch](x, decay, *others, batch, tokens, channels, states, **kinds, **sizes)


@triton.jit
def _places(channels, states, STATES: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Channels and states of a program, which of them there are, and where a (C, S) matrix has them."""
    lane, number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    real, some = lane < channels, number < states
    return lane, number, real, some, lane[:, None] * states + number[None, :], real[:, None] & some[None, :]


@triton.jit
def _forward(
    x, decay, step, drive, read, out, borders, batch, tokens, channels, states,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, KEEP: tl.constexpr,  # noqa: N803
    KEPT: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    lane, number, real, some, spot, both = _places(channels, states, STATES, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    rate = tl.load(decay + spot, mask=both, other=0.0)
    state = tl.zeros((BLOCK, STATES), tl.float64 if WIDE else tl.float32)
    for count in range(tokens):
        if KEEP:  # noqa: SIM102 - a constant: the kernel without it has no branch
            if count % KEPT == 0:  # type: ignore[operator]
                tl.store(borders + (count // KEPT * batch + sample) * channels * states + spot, state, mask=both)
        token = sample * tokens + (tokens - 1 - count if REVERSE else count)
        now = tl.load(step + token * channels + lane, mask=real, other=0.0)
        value = now * tl.load(x + token * channels + lane, mask=real, other=0.0)
        push = tl.load(drive + token * states + number, mask=some, other=0.0)
        look = tl.load(read + token * states + number, mask=some, other=0.0)
        state = tl.exp(now[:, None] * rate) * state + value[:, None] * push[None, :]
        tl.store(out + token * channels + lane, tl.sum(state * look[None, :], 1), mask=real)


@triton.jit
def _backward(
    x, decay, step, drive, read, grad, borders, room, grad_x, grad_step, grad_decay, grad_drive, grad_read,
    batch, tokens, channels, states,
    REVERSE: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
    KEPT: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Tokens past the end have a step of 0: they keep the state and its gradient as they are."""
    lane, number, real, some, spot, both = _places(channels, states, STATES, BLOCK)
    sample, matrix = tl.program_id(1).to(tl.int64), channels * states
    rate = tl.load(decay + spot, mask=both, other=0.0)
    kind = tl.float64 if WIDE else tl.float32
    back, grad_rate = tl.zeros((BLOCK, STATES), kind), tl.zeros((BLOCK, STATES), kind)
    part = tl.program_id(0).to(tl.int64) * batch * tokens * states
    room += sample * KEPT * matrix
    runs = (tokens + KEPT - 1) // KEPT
    for passed in range(runs):
        run = runs - 1 - passed
        state = tl.load(borders + (run * batch + sample) * matrix + spot, mask=both, other=0.0)
        for place in range(KEPT):
            count = run * KEPT + place
            token = sample * tokens + (tokens - 1 - count if REVERSE else count)
            inside, known = real & (lane * 0 + count < tokens), some & (number * 0 + count < tokens)
            now = tl.load(step + token * channels + lane, mask=inside, other=0.0)
            value = now * tl.load(x + token * channels + lane, mask=inside, other=0.0)
            push = tl.load(drive + token * states + number, mask=known, other=0.0)
            tl.store(room + place * matrix + spot, state, mask=both)
            state = tl.exp(now[:, None] * rate) * state + value[:, None] * push[None, :]
        tl.debug_barrier()
        for undone in range(KEPT):
            place = KEPT - 1 - undone
            count = run * KEPT + place
            token = sample * tokens + (tokens - 1 - count if REVERSE else count)
            inside, known = real & (lane * 0 + count < tokens), some & (number * 0 + count < tokens)
            now = tl.load(step + token * channels + lane, mask=inside, other=0.0)
            there = tl.load(x + token * channels + lane, mask=inside, other=0.0)
            slope = tl.load(grad + token * channels + lane, mask=inside, other=0.0)
            push = tl.load(drive + token * states + number, mask=known, other=0.0)
            look = tl.load(read + token * states + number, mask=known, other=0.0)
            before = tl.load(room + place * matrix + spot, mask=both, other=0.0)
            value, kept = now * there, tl.exp(now[:, None] * rate)
            state = kept * before + value[:, None] * push[None, :]
            pulled = back + slope[:, None] * look[None, :]
            back = kept * pulled
            inner, power = tl.sum(pulled * push[None, :], 1), back * before  # of step x, and of step A
            grad_rate += power * now[:, None]
            tl.store(grad_x + token * channels + lane, inner * now, mask=inside)
            faster = tl.sum(power * rate, 1) + inner * there
            tl.store(grad_step + token * channels + lane, faster, mask=inside)
            summed = part + token * states + number
            tl.store(grad_drive + summed, tl.sum(pulled * value[:, None], 0), mask=known)
            tl.store(grad_read + summed, tl.sum(state * slope[:, None], 0), mask=known)
        tl.debug_barrier()
    tl.store(grad_decay + sample * matrix + spot, grad_rate, mask=both)
