"""Vision Mamba's mixer: every token reads a state that passes over the sequence from the front, and one from the back.

Shapes: tokens (B, N, dim) in, the same out, at a cost that is linear in N. Two directions share the linear layers
around them and have a short causal convolution, a selective scan and its projections of their own; what both read is
averaged and gated (arXiv 2401.09417, algorithm 1). The backward direction is computed in place, with nothing flipped:
its convolution looks ahead and its scan runs in reverse. Used in `vertebra.backbones.vim`, and through
`vertebra.surgery.swap` in place of a transformer's attention. The authors' older mixer, whose directions share all but
the decay, is not here.
"""

from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, silu, softplus

from vertebra.blocks.rows import Dense
from vertebra.blocks.selective_scan import first_biases, selective_scan
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, int]] = {"both": {"directions": 2}, "forward": {"directions": 1}}

Start = Literal["reference", "symmetric"]
"""How the backward direction begins: with steps of about 0.7, as the authors' code has it, or as the forward one."""


def bidirectional_ssm(
    dim: int,
    variant: str = "both",
    *,
    state: int = 16,
    expand: int = 2,
    kernel: int = 4,
    rank: int | None = None,
    start: Start = "reference",
) -> "BidirectionalSSM":
    """The mixer for tokens of `dim`.

    Args:
        dim: width of a token.
        variant: "both" directions, or "forward" alone: Mamba's mixer, in which no token sees a later one.
        state: numbers that a channel remembers, S.
        expand: inner channels over `dim`.
        kernel: tokens that the causal convolution sees, this one and those before it.
        rank: of the projection that gives the steps; dim / 16, rounded up, by default.
        start: how the backward direction is initialised. The authors' code resets its step biases to zero after it
            has set those of the forward direction; "symmetric" treats both alike.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"bidirectional_ssm has no variant {variant!r}{near(variant, VARIANTS)}; it has {known}")
    given = {"dim": dim, "state": state, "expand": expand, "kernel": kernel, "rank": 1 if rank is None else rank}
    for name, value in given.items():
        if value < 1:
            raise UsageError(f"bidirectional_ssm: {name} is {value}; it must be at least 1")
    if start not in get_args(Start):
        raise UsageError(f"bidirectional_ssm: start is {start!r}; it can be {' or '.join(get_args(Start))}")
    channels, rank = expand * dim, rank or ceil(dim / 16)
    directions = [
        Direction(channels=channels, state=state, kernel=kernel, rank=rank, reverse=bool(number))
        for number in range(VARIANTS[variant]["directions"])
    ]
    if start == "reference":
        for backward in directions[1:]:
            nn.init.zeros_(backward.step.bias)
    return BidirectionalSSM(dim=dim, channels=channels, directions=directions)


class BidirectionalSSM(nn.Module):
    """Linear layer, scans in one or both directions, gate, linear layer; build it with `bidirectional_ssm`.

    Attributes:
        inputs: dim to the inner channels and their gates.
        directions: forward, and backward where there is one.
        outputs: inner channels to dim.
    """

    def __init__(self, *, dim: int, channels: int, directions: "list[Direction]") -> None:
        super().__init__()
        self.inputs = Dense(dim, 2 * channels, bias=False)
        self.directions = nn.ModuleList(directions)
        self.outputs = Dense(channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        inner, gate = self.inputs(x).chunk(2, -1)  # (B, N, channels) each
        first, *rest = self.directions
        y = first(inner)
        for direction in rest:
            y = y + direction(inner)
        # the gate is the same for both directions, and the mean is taken where there is least to multiply
        return self.outputs(y * silu(gate)) / len(self.directions)


class Direction(nn.Module):
    """A causal convolution and a selective scan, over tokens (B, N, channels) in one direction.

    Attributes:
        conv: depthwise, weight (channels, 1, kernel); the last weight is the token's own.
        select: channels to what makes the steps, the drive and the readout of each token.
        step: `rank` numbers to a step for each channel, before the softplus.
        decay_log: (channels, S), logarithm of -A.
        skip: (channels,), D.
    """

    def __init__(self, *, channels: int, state: int, kernel: int, rank: int, reverse: bool = False) -> None:
        super().__init__()
        self.reverse, self.sizes = reverse, (rank, state, state)
        self.conv = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.select = Dense(channels, rank + 2 * state, bias=False)
        self.step = nn.Linear(rank, channels)  # torch's own weights are those of Mamba, uniform within rank^-1/2
        self.decay_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        with torch.no_grad():
            self.step.bias.copy_(first_biases(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, channels) to the same."""
        x = silu(self._convolved(x))
        step, drive, read = self.select(x).split(self.sizes, -1)
        exact = torch.promote_types(self.decay_log.dtype, torch.float32)
        decay = -self.decay_log.to(exact).exp()
        return selective_scan(x, softplus(self.step(step)), decay, drive, read, self.skip, reverse=self.reverse)

    def _convolved(self, x: Tensor) -> Tensor:
        """The convolution as one of maps (B, channels, 1, N) with channels last, which is how tokens lie in memory."""
        weight, reach = self.conv.weight[:, :, None], self.conv.kernel_size[0] - 1
        if self.reverse:
            weight = weight.flip(-1)
        y = conv2d(x.mT[:, :, None], weight, self.conv.bias, 1, (0, reach), 1, len(weight))  # N + reach places
        return y[:, :, 0].narrow(-1, reach if self.reverse else 0, x.shape[1]).mT
