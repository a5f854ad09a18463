"""Cells of a genotype: what NASNet and searches in its space are stacked from.

A genotype is plain data, a normal and a reduction cell of pairs of operations; `check_genotype` says what is wrong with
one, `SearchedCell` builds one of its cells at any width and stride.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.blocks.scheduled_drop_path import scheduled_drop_path
from vertebra.errors import UsageError, near

Pair = Sequence[Any]
"""(operation, state, operation, state), or with "add" or "concat" at the end; states are counted from 0 within a cell:
what the cell before gave, what the one before that gave, then the pairs' results."""


class Cell(TypedDict, total=False):
    """What a cell computes.

    Attributes:
        pairs: of operations, one after the other.
        output: states that are concatenated; those that no pair reads where it is left out.
    """

    pairs: Sequence[Pair]
    output: Sequence[int]


class Genotype(TypedDict):
    """The two cells that a search finds, as JSON-ready data."""

    normal: Cell
    reduction: Cell


NASNET_A: Genotype = {
    "normal": {
        "pairs": (
            ("sep_5x5", 0, "sep_3x3", 1),
            ("sep_5x5", 1, "sep_3x3", 1),
            ("avg_3x3", 0, "identity", 1),
            ("avg_3x3", 1, "avg_3x3", 1),
            ("sep_3x3", 0, "identity", 0),
        ),
        "output": (1, 2, 3, 4, 5, 6),
    },
    "reduction": {
        "pairs": (
            ("sep_5x5", 0, "sep_7x7", 1),
            ("max_3x3", 0, "sep_7x7", 1),
            ("avg_3x3", 0, "sep_5x5", 1),
            ("identity", 3, "avg_3x3", 2),
            ("sep_3x3", 2, "max_3x3", 0),
        ),
        "output": (3, 4, 5, 6),
    },
}
"""The published cells."""

OPERATIONS = (
    "identity",
    "conv_1x1",
    "conv_3x3",
    "conv_1x3_3x1",
    "conv_1x7_7x1",
    "dilated_3x3",
    "avg_3x3",
    "max_3x3",
    "max_5x5",
    "max_7x7",
    "sep_3x3",
    "sep_5x5",
    "sep_7x7",
)
"""What a pair can do with a state: the paper's search space."""

Padding = Literal["same", "symmetric"]


def check_genotype(genotype: Mapping[str, Any]) -> None:
    """Refuse a genotype that cannot be built.

    Raises:
        UsageError: says which pair of which cell is wrong, and what it can be.
    """
    for kind in ("normal", "reduction"):
        _check_cell(kind, genotype.get(kind))


def _check_cell(kind: str, cell: Cell | None) -> None:
    if not cell or not cell.get("pairs"):
        raise UsageError(f"nasnet: the genotype has no {kind} cell; it needs 'pairs' in 'normal' and 'reduction'")
    for number, pair in enumerate(cell["pairs"]):  # type: ignore[typeddict-item]
        where = f"nasnet: pair {number} of the {kind} cell is {tuple(pair)}"
        if len(pair) not in (4, 5) or (len(pair) == 5 and pair[4] not in ("add", "concat")):
            raise UsageError(f"{where}; it must be (operation, state, operation, state[, 'add' or 'concat'])")
        for operation, state in (pair[:2], pair[2:4]):
            if operation not in OPERATIONS:
                raise UsageError(f"{where}; there is no operation {operation!r}{near(operation, OPERATIONS)}")
            if not isinstance(state, int) or not 0 <= state < number + 2:
                raise UsageError(f"{where}; it can read the states 0 to {number + 1}")
    states = len(cell["pairs"]) + 2  # type: ignore[typeddict-item]
    output = _output(cell)
    if not output or any(not isinstance(state, int) or not 0 <= state < states for state in output):
        raise UsageError(f"nasnet: output of the {kind} cell is {output}; it must be some of 0 to {states - 1}")


def _output(cell: Cell) -> tuple[int, ...]:
    """States that a cell concatenates."""
    pairs = cell["pairs"]  # type: ignore[typeddict-item]
    read = {state for pair in pairs for state in (pair[1], pair[3])}
    return tuple(cell.get("output") or (state for state in range(len(pairs) + 2) if state not in read))


def initialise(network: nn.Module) -> None:
    """Variance 2 over the outputs of a weight, as the released code has it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)


class SearchedCell(nn.Module):
    """A cell of a genotype.

    Attributes:
        squeeze: what the cell before gave, to the cell's filters: state 0.
        fit: likewise, and halved where it has to be, what the one before that gave: state 1. None for the first cell,
            whose state 1 is the image's map as it is.
        left: first operation of each pair.
        right: second operation of each pair.
        leftover: convolutions for states of another shape than the last that are concatenated, by state.
        drop: drop path after every operation but the identity, or None.
        width: channels that come out.
    """

    def __init__(
        self,
        cell: Cell,
        inputs: tuple[int, int],
        before: tuple[int, int] | None,
        filters: int,
        *,
        stride: int,
        padding: Padding,
        eps: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pairs = tuple(tuple(pair) for pair in cell["pairs"])  # type: ignore[typeddict-item]
        self.output = _output(cell)
        self.squeeze = conv_norm(inputs[0], filters, eps)
        self.fit: nn.Module | None = None
        if before is not None:
            halved = before[1] != inputs[1]
            self.fit = Halving(before[0], filters, eps) if halved else conv_norm(before[0], filters, eps)
        widths = [filters, inputs[0] if before is None else filters]
        self.left, self.right = nn.ModuleList(), nn.ModuleList()
        for left, i, right, j, *combination in self.pairs:
            for operations, name, state in ((self.left, left, i), (self.right, right, j)):
                step = stride if state < 2 else 1
                operations.append(_operation(name, widths[state], filters, step, padding, eps))
            widths.append(filters * (2 if combination == ["concat"] else 1))
        self.leftover = nn.ModuleDict()
        for state in self.output:
            if state < 2 and stride == 2:
                self.leftover[str(state)] = Halving(widths[state], filters, eps)
            elif state < 2 and widths[state] != filters:
                self.leftover[str(state)] = conv_norm(widths[state], filters, eps)
        self.drop = scheduled_drop_path(drop=drop_path) if drop_path else None
        self.width = sum(filters if state < 2 else widths[state] for state in self.output)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Rectified maps (B, inputs, H, W) of the two cells before, to one (B, width, H / stride, W / stride)."""
        states = [self.squeeze(x), before if self.fit is None else self.fit(before)]
        seen: dict[tuple[str, int], Tensor] = {}  # poolings and rectified states that several operations share
        for number, (left, i, right, j, *combination) in enumerate(self.pairs):
            first = self._result(self.left[number], left, i, states, seen)
            second = self._result(self.right[number], right, j, states, seen)
            states.append(torch.cat((first, second), 1) if combination == ["concat"] else first + second)
        parts = [states[s] if str(s) not in self.leftover else self.leftover[str(s)](states[s]) for s in self.output]
        return torch.cat(parts, 1).relu_()

    def _result(
        self, operation: nn.Module, name: str, state: int, states: Sequence[Tensor], seen: dict[tuple[str, int], Tensor]
    ) -> Tensor:
        if isinstance(operation, Pool | nn.Identity):
            if (name, state) not in seen:
                seen[name, state] = operation(states[state])
            found = seen[name, state]
        elif name[:3] in ("avg", "max"):
            found = operation(states[state])
        else:
            if ("relu", state) not in seen:
                seen["relu", state] = states[state].relu()
            found = operation(seen["relu", state])
        return found if self.drop is None or name == "identity" else self.drop(found)


def conv_norm(inputs: int, outputs: int, eps: float, stride: int = 1) -> nn.Sequential:
    """A 1 x 1 convolution and its norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, eps))


def _operation(name: str, inputs: int, outputs: int, stride: int, padding: Padding, eps: float) -> nn.Module:
    """An operation on a state; all but poolings and a plain identity are given it rectified."""
    kind, sizes = name.partition("_")[0], [int(size) for size in re.findall(r"\d+", name)]
    if kind == "identity":
        return nn.Identity() if stride == 1 and inputs == outputs else conv_norm(inputs, outputs, eps, stride)
    if kind in ("avg", "max"):
        pool = Pool(kind, sizes[0], stride, padding)  # type: ignore[arg-type]
        return pool if inputs == outputs else nn.Sequential(pool, *conv_norm(inputs, outputs, eps))
    if kind == "sep":
        halves = ((inputs, stride), (outputs, 1))
        layers = [_separable(width, outputs, sizes[0], step, padding, eps) for width, step in halves]
        return nn.Sequential(*layers[0], nn.ReLU(inplace=True), *layers[1])
    if len(sizes) == 4:
        across = Conv(inputs, outputs, (sizes[0], sizes[1]), (1, stride), padding)
        along = Conv(outputs, outputs, (sizes[2], sizes[3]), (stride, 1), padding)
        return nn.Sequential(across, along, nn.BatchNorm2d(outputs, eps))
    conv = Conv(
        inputs, outputs, (sizes[0], sizes[0]), (stride, stride), padding, dilation=2 if kind == "dilated" else 1
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps))


def _separable(inputs: int, outputs: int, size: int, stride: int, padding: Padding, eps: float) -> nn.Sequential:
    """Depthwise convolution, 1 x 1 convolution, norm."""
    depthwise = Conv(inputs, inputs, (size, size), (stride, stride), padding, groups=inputs)
    return nn.Sequential(depthwise, *conv_norm(inputs, outputs, eps))


class Conv(nn.Conv2d):
    """A convolution without bias that rounds sides up; see `NasNetOptions.padding` for what "same" changes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: Padding,
        *,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        around = (dilation * (kernel[0] // 2), dilation * (kernel[1] // 2))
        super().__init__(inputs, outputs, kernel, stride, around, dilation, groups, bias=False)
        self.shifts = tuple(
            padding == "same" and step == 2 and size > 1 for step, size in zip(stride, kernel, strict=True)
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride))."""
        if not any(self.shifts):
            return super().forward(input)
        # windows on an even side start a pixel later; one more at the start is the same as one off the end
        down, across = (int(shift and side % 2 == 0) for shift, side in zip(self.shifts, input.shape[2:], strict=True))
        around = (int(self.padding[0]) + down, int(self.padding[1]) + across)
        x = F.conv2d(input, self.weight, None, self.stride, around, self.dilation, self.groups)
        return x[:, :, down:, across:]


class Pool(nn.Module):
    """Average or max pooling that rounds sides up; pixels beyond the border do not count."""

    def __init__(self, kind: Literal["avg", "max"], size: int, stride: int, padding: Padding) -> None:
        super().__init__()
        self.kind, self.size, self.stride = kind, size, stride
        self.shifts = padding == "same" and stride == 2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        height, width = x.shape[2:]
        around = [self.size // 2 - int(self.shifts and side % 2 == 0) for side in (height, width)]
        if self.kind == "max":
            return F.max_pool2d(x, self.size, self.stride, around, ceil_mode=self.shifts)
        return F.avg_pool2d(x, self.size, self.stride, around, ceil_mode=self.shifts, count_include_pad=False)

    def extra_repr(self) -> str:
        """What it is."""
        return f"{self.kind}, size={self.size}, stride={self.stride}"


class Halving(nn.Module):
    """Half a map that loses no pixel: every second one to half of the channels, those between to the others, a norm.

    Attributes:
        even: convolution of pixels 0, 2, 4 ...
        odd: of pixels 1, 3, 5 ..., with a zero past the border where there is none.
    """

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs - outputs // 2, 1, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, ceil(H / 2), ceil(W / 2))."""
        height, width = x.shape[2:]
        shifted = F.pad(x[:, :, 1::2, 1::2], (0, width % 2, 0, height % 2))
        return self.norm(torch.cat((self.even(x[:, :, ::2, ::2]), self.odd(shifted)), 1))
