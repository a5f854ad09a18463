"""Four selective scans of a map along snakes: by rows and by columns, from either end, told which way they move.

Shapes: maps (B, C, H, W) in, the same out, at a cost that is linear in H W. A snake goes along a row, steps down and
comes back along the next, so that two cells in sequence are always neighbours; a learned number for each state and move
(start, right, left, up, down) is added to what a cell writes. The four scans share all other parameters and run as one
batch; what a cell reads in them is summed. The scan of PlainMamba (arXiv 2403.17695), used in
`vertebra.backbones.vcmamba`, and through `vertebra.surgery.swap` in place of any layer that keeps a map's shape.

The authors' code (ChenhongyiYang/PlainMamba, Apache-2.0, and VCMamba after it) permutes what is scanned alone: steps,
drives and readouts stay in the order of the rows for all four scans, so that in three of them and in every second row
of the first a cell is scanned by another cell's; and the bias of the steps is added twice. "reference" does the same,
as released weights need; in "corrected" all travel with their cell and the bias is added once.
"""

from math import ceil
from typing import Literal, get_args

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad, softplus

from vertebra.blocks.rows import Dense
from vertebra.blocks.selective_scan import first_biases, selective_scan
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, bool]] = {"reference": {"corrected": False}, "corrected": {"corrected": True}}

Start = Literal["mamba", "plain"]
"""How steps begin: log-uniform in 0.001..0.1, or all at about 0.7, which leaves a cell soon forgotten."""

_SCANS, _MOVES = 4, 5
_START, _RIGHT, _LEFT, _UP, _DOWN = range(_MOVES)


def snake_scan(
    channels: int, variant: str = "reference", *, state: int = 16, rank: int | None = None, start: Start = "mamba"
) -> "SnakeScan":
    """The scans for maps of `channels`.

    Args:
        channels: of the map; each is scanned with a state of its own.
        variant: "reference" as the authors' code computes, or "corrected".
        state: numbers that a channel remembers, S.
        rank: of the projection that gives the steps; channels / 32, rounded up, by default.
        start: how steps are initialised. "mamba" is what the authors' layer asks for. VCMamba's code overwrites it with
            "plain": weights of both linear layers of deviation 0.02, and no bias.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"snake_scan has no variant {variant!r}{near(variant, VARIANTS)}; it has {known}")
    for name, value in {"channels": channels, "state": state, "rank": 1 if rank is None else rank}.items():
        if value < 1:
            raise UsageError(f"snake_scan: {name} is {value}; it must be at least 1")
    if start not in get_args(Start):
        raise UsageError(f"snake_scan: start is {start!r}; it can be {' or '.join(get_args(Start))}")
    rank = rank or ceil(channels / 32)
    return SnakeScan(channels=channels, state=state, rank=rank, start=start, **VARIANTS[variant])


class SnakeScan(nn.Module):
    """What each cell asks of a scan, and four scans of the map; build it with `snake_scan`.

    Attributes:
        select: channels to what makes the steps, the drive and the readout of each cell.
        step: `rank` numbers to a step for each channel, before the softplus.
        decay_log: (channels, S), logarithm of -A.
        skip: (channels,), D.
        moves: (5, S), what is added to the drive of a cell by the move that led there: none (the scan starts), right,
            left, up, down.
    """

    def __init__(self, *, channels: int, state: int, rank: int, start: Start, corrected: bool) -> None:
        super().__init__()
        self.corrected, self.sizes = corrected, (rank, state, state)
        self.select = Dense(channels, rank + 2 * state, bias=False)
        self.step = nn.Linear(rank, channels)  # torch's own weights are those of Mamba, uniform within rank^-1/2
        self.decay_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        self.moves = nn.Parameter(trunc_normal_(torch.empty(_MOVES, state), std=0.02))
        with torch.no_grad():
            if start == "mamba":
                self.step.bias.copy_(first_biases(channels))
            else:
                for layer in (self.select, self.step):
                    trunc_normal_(layer.weight, std=0.02)
                self.step.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to the same."""
        height, width = x.shape[2:]
        order, moves = snakes(height, width, device=x.device)
        x = x.flatten(2).mT  # (B, N, channels)
        step, drive, read = self.select(x).split(self.sizes, -1)
        bias = self.step.bias if self.corrected else 2 * self.step.bias
        step = softplus(linear(step, self.step.weight, bias))
        given = [self._lined(tensor, order) for tensor in (step, drive, read)]
        given[1] = (given[1].unflatten(0, (-1, _SCANS)) + embedding(moves, self.moves)).flatten(0, 1)
        exact = torch.promote_types(self.decay_log.dtype, torch.float32)
        y = selective_scan(_along(x, order), given[0], -self.decay_log.to(exact).exp(), *given[1:])
        y = _back(y, order) + _SCANS * self.skip * x
        return y.to(x.dtype).mT.unflatten(2, (height, width))

    def _lined(self, tensor: Tensor, order: Tensor) -> Tensor:
        """Of cells (B, N, K), what each of the scans is given, (4 B, N, K)."""
        return _along(tensor, order) if self.corrected else tensor.repeat_interleave(_SCANS, 0)


def snakes(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The four ways through a map of N cells, which are numbered by rows.

    Args:
        height: rows of the map.
        width: its columns.
        device: of what comes back.

    Returns:
        Cells in the order of each scan, and the move that leads to each, (4, N) both: by rows from the first cell, the
        same backwards, by columns from the first cell, the same backwards. Moves are 0 at the start, then 1 right,
        2 left, 3 up, 4 down.
    """
    cells = torch.arange(height * width, device=device).view(height, width)
    forward = torch.stack((_snake(cells), _snake(cells.mT)))
    order = torch.stack((forward, forward.flip(1)), 1).flatten(0, 1)
    down, right = order.div(width, rounding_mode="floor").diff(), order.remainder(width).diff()
    moves = torch.where(down < 0, _UP, _DOWN).masked_fill(right > 0, _RIGHT).masked_fill(right < 0, _LEFT)
    return order, pad(moves, (1, 0), value=_START)


def _snake(cells: Tensor) -> Tensor:
    """Rows one after the other, (H W,), every second one backwards."""
    backwards = torch.arange(len(cells), device=cells.device) % 2 == 1
    return torch.where(backwards[:, None], cells.flip(1), cells).flatten()


def _along(cells: Tensor, order: Tensor) -> Tensor:
    """Cells (B, N, K) in the order of each scan, (4 B, N, K)."""
    return cells.index_select(1, order.flatten()).unflatten(1, order.shape).flatten(0, 1)


def _back(lines: Tensor, order: Tensor) -> Tensor:
    """Sum of the four scans (4 B, N, K) for each cell, (B, N, K)."""
    scans, cells = order.shape
    places = order.argsort(1) + cells * torch.arange(scans, device=order.device)[:, None]
    lines = lines.unflatten(0, (-1, scans)).flatten(1, 2)  # (B, 4 N, K)
    return lines.index_select(1, places.flatten()).unflatten(1, order.shape).sum(1)
