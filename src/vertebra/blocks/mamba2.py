"""Mamba-2's mixer: a causal scan over tokens whose step, input and readout depend on the token, and a gate.

Shapes: tokens (B, N, dim) in, the same out; a token sees itself and those before it. One projection makes the gate,
the signal, what drives and reads the states, and the step of each head; a causal depthwise convolution of four tokens
and the scan of `vertebra.blocks.state_space_duality` follow, then a norm after the gate (arXiv 2405.21060, section 7).
Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.adventurer`. Departs from the paper in nothing;
states do not outlive a call, since images are not generated token by token here.
"""

from math import gcd

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.blocks.rows import Dense
from vertebra.blocks.selective_scan import first_biases
from vertebra.blocks.state_space_duality import Form, dual_scan
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

EPS = 1e-5
DECAYS = (1.0, 16.0)
"""What A is drawn from at the start, uniformly."""


def mamba2(
    dim: int,
    *,
    expand: int = 2,
    state: int = 64,
    head_dim: int | None = None,
    groups: int = 1,
    kernel: int = 4,
    form: Form = "chunked",
) -> "Mamba2":
    """The mixer for tokens of `dim` channels.

    Args:
        dim: of the tokens.
        expand: channels inside, as a multiple of `dim`.
        state: S, numbers a channel remembers.
        head_dim: channels that share a step and a decay; None takes 64, or the largest divisor of it that divides the
            channels inside.
        groups: of heads that share what drives and reads their states.
        kernel: tokens of the causal convolution.
        form: how the scan is computed.

    Raises:
        UsageError: an option below 1, or heads that do not divide as asked.
    """
    given = {"dim": dim, "expand": expand, "state": state, "head_dim": head_dim, "groups": groups, "kernel": kernel}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"mamba2: {name} is {value}; it must be at least 1")
    inner = expand * dim
    head_dim = head_dim or gcd(inner, 64)
    if inner % head_dim or inner // head_dim % groups:
        raise UsageError(
            f"mamba2: {inner} channels inside do not divide into heads of {head_dim} in {groups} groups; head_dim="
            f"{gcd(inner, 64)} and groups=1 work"
        )
    return Mamba2(dim, inner=inner, state=state, head_dim=head_dim, groups=groups, kernel=kernel, form=form)


class Mamba2(nn.Module):
    """The mixer; build it with `mamba2`.

    Attributes:
        project: tokens to gate, signal, drive, read and step, in this order.
        conv: causal and depthwise, over signal, drive and read.
        step_bias: (heads,), added before the softplus.
        decay_log: (heads,), logarithm of -A.
        skip: (heads,), D.
        norm: after the gate.
        out: back to `dim`.
    """

    def __init__(
        self, dim: int, *, inner: int, state: int, head_dim: int, groups: int, kernel: int, form: Form
    ) -> None:
        super().__init__()
        heads, mixed = inner // head_dim, inner + 2 * groups * state
        self.sizes, self.parts = (inner, mixed, heads), (inner, groups * state, groups * state)
        self.head_dim, self.groups = head_dim, groups
        self.form: Form = form
        self.project = Dense(dim, inner + mixed + heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, kernel, padding=kernel - 1, groups=mixed)
        self.step_bias = nn.Parameter(first_biases(heads))
        self.decay_log = nn.Parameter(torch.empty(heads).uniform_(*DECAYS).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, EPS)
        self.out = Dense(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        gate, mixed, step = self.project(x).split(self.sizes, -1)
        signal, drive, read = F.silu(self._convolved(mixed)).split(self.parts, -1)
        y = dual_scan(
            signal.unflatten(-1, (-1, self.head_dim)),
            F.softplus(step + self.step_bias),
            -self.decay_log.float().exp(),
            drive.unflatten(-1, (self.groups, -1)),
            read.unflatten(-1, (self.groups, -1)),
            self.skip,
            form=self.form,
        )
        return self.out(self.norm(y.flatten(2) * F.silu(gate)))

    def _convolved(self, x: Tensor) -> Tensor:
        """(B, N, C) with each token from itself and those before it."""
        rows = F.conv2d(  # of one row with channels last: torch has a fast kernel for it on the CPU, and copies nothing
            x.mT[:, :, None],
            self.conv.weight[:, :, None],
            self.conv.bias,
            padding=(0, self.conv.kernel_size[0] - 1),
            groups=x.shape[2],
        )
        return rows[:, :, 0, : x.shape[1]].mT
