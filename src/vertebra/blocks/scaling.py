"""Scaling rules: descriptions of convolutional networks, grown along depth, width, group width and resolution.

    tiny = design(depths=(1, 3, 6, 6), widths=(48, 104, 208, 440), groups=8)
    big = scaled(tiny, 4, "d1_w8_g8_r1")        # four times the MACs, most of it in width
    complexity(big).activations

A strategy gives each axis a weight; the weights of d, w and r are shares of the growth of MACs. With shares e and a
scale s, depth grows by s^e_d, width by s^(e_w / 2) and the side of the image by s^(e_r / 2), so that MACs grow by s and
activations by s^(e_d + e_w / 2 + e_r) (arXiv 2103.06877). Groups of a convolution must widen with it: MACs of
groups of one width grow with the width, not with its square. No page: `fast_scaling` and `efficientnet` use it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite, lcm, log
from typing import Any, Literal, NamedTuple

from vertebra.contracts import Cost
from vertebra.errors import UsageError, near

FAST = "d1_w8_g8_r1"
"""Fast compound scaling: eight tenths of the growth into width, a tenth each into depth and resolution."""

STEMS = {"small": (3, 1, 1), "simple": (3, 2, 1), "resnet": (7, 2, 2)}
"""Stem -> kernel, stride, and the stride of the pooling behind it."""

BLOCKS = ("bottleneck", "linear", "mbconv")


class Stage(NamedTuple):
    """One stage of a design: its blocks, channels, the first block's stride, and what the blocks are made of."""

    depth: int
    width: int
    stride: int
    ratio: float
    group: int
    kernel: int


@dataclass(frozen=True, kw_only=True)
class Design:
    """A network of stages as numbers; make it with `design`, which checks them.

    Attributes:
        depths: blocks a stage.
        widths: channels a stage.
        strides: of the first block of each stage.
        ratios: inner width of a block as a share of its output's ("mbconv": of its input's) width.
        groups: channels of a group in the spatial convolution; "mbconv" is depthwise and ignores them.
        kernels: odd sizes of the spatial convolution; those of the other blocks are 3.
        block: "bottleneck" as in ResNet and RegNet, "linear" (no projected shortcut, no last activation: RegNetZ), or
            "mbconv" as in EfficientNet.
        stem: one of `STEMS`.
        stem_width: channels of the stem.
        head: channels of a last 1 x 1 convolution; 0 has none.
        squeeze: width of squeeze-and-excitation as a share of the block's input width; 0 has none.
        activation: "relu" or "silu".
        size: side of the image in pixels.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    ratios: tuple[float, ...]
    groups: tuple[int, ...]
    kernels: tuple[int, ...]
    block: Literal["bottleneck", "linear", "mbconv"] = "bottleneck"
    stem: Literal["small", "simple", "resnet"] = "simple"
    stem_width: int = 32
    head: int = 0
    squeeze: float = 0.25
    activation: Literal["relu", "silu"] = "relu"
    size: int = 224

    @property
    def stages(self) -> list[Stage]:
        """The stages, fine to coarse."""
        columns = (self.depths, self.widths, self.strides, self.ratios, self.groups, self.kernels)
        return [Stage(*numbers) for numbers in zip(*columns, strict=True)]


def design(
    *,
    depths: Sequence[int],
    widths: Sequence[int],
    strides: int | Sequence[int] = 2,
    ratios: float | Sequence[float] = 1.0,
    groups: int | Sequence[int] = 1,
    kernels: int | Sequence[int] = 3,
    **others: Any,
) -> Design:
    """A checked description of a network; one number stands for all stages.

    Args:
        depths: as in `Design`; so are the others.
        widths: multiples of 8 where blocks are "mbconv".
        strides: at least 1.
        ratios: below 1, or whole numbers.
        groups: divisors of the inner widths.
        kernels: odd.
        others: further fields of `Design`.

    Raises:
        UsageError: numbers that make no network; the message says which would.
    """
    stages = len(depths)
    columns = {"strides": strides, "ratios": ratios, "groups": groups, "kernels": kernels}
    spread = {name: tuple(v) if isinstance(v, Sequence) else (v,) * stages for name, v in columns.items()}
    known = [field.name for field in fields(Design)]
    for name in others:
        if name not in known:
            raise UsageError(f"a design has no {name!r}{near(name, known)}; it has {', '.join(known)}")
    made = Design(depths=tuple(depths), widths=tuple(widths), **spread, **others)  # type: ignore[arg-type]
    _check(made)
    return made


def _check(made: Design) -> None:
    for name in ("widths", "strides", "ratios", "groups", "kernels"):
        if len(getattr(made, name)) != len(made.depths):
            raise UsageError(f"a design of {len(made.depths)} stages needs as many {name}, not {getattr(made, name)}")
    for name in ("depths", "widths", "strides", "groups", "kernels"):
        if min(getattr(made, name), default=0) < 1:
            raise UsageError(f"a design's {name} are {getattr(made, name)}; they must be at least 1")
    choices = {"block": BLOCKS, "stem": tuple(STEMS), "activation": ("relu", "silu")}
    for name, known in choices.items():
        if getattr(made, name) not in known:
            raise UsageError(f"a design's {name} is {getattr(made, name)!r}; it must be one of {', '.join(known)}")
    for name, least in (("stem_width", 1), ("size", 1), ("head", 0), ("squeeze", 0)):
        if getattr(made, name) < least:
            raise UsageError(f"a design's {name} is {getattr(made, name)}; it must be at least {least}")
    if any(kernel % 2 == 0 for kernel in made.kernels):
        raise UsageError(f"a design's kernels are {made.kernels}; they must be odd")
    if any(ratio <= 0 or (ratio > 1 and ratio % 1) for ratio in made.ratios):
        raise UsageError(f"a design's ratios are {made.ratios}; they must be whole numbers, or between 0 and 1")
    if made.block == "mbconv":
        widths = (made.stem_width, *made.widths)
        if any(width % 8 for width in widths):
            raise UsageError(f"a design's stem and widths are {widths}; with mbconv they must be multiples of 8")
        return
    if set(made.kernels) != {3}:
        raise UsageError(f"a design's kernels are {made.kernels}; {made.block} blocks have 3 only")
    for stage in made.stages:
        if _inner(stage) < 1 or _inner(stage) % stage.group:
            raise UsageError(
                f"a design's stage of width {stage.width} and ratio {stage.ratio} has {_inner(stage)} inner channels,"
                f" which groups of {stage.group} do not divide"
            )


def regnet(depth: int, w0: int, wa: float, wm: float, *, group: int, ratio: float = 1.0, **others: Any) -> Design:
    """The stages of a RegNet: widths w0 + wa * block, moved to powers of wm and to multiples of 8 (arXiv 2003.13678).

    Args:
        depth: blocks of all stages.
        w0: width of the first block, a multiple of 8.
        wa: growth of the width a block, at least 0.
        wm: ratio of the widths of two stages, above 1.
        group: channels of a group.
        ratio: as in `Design`.
        others: further fields of `Design`.

    Raises:
        UsageError: numbers out of range.
    """
    if depth < 1 or w0 < 1 or w0 % 8 or wa < 0 or wm <= 1:
        raise UsageError(
            f"regnet: depth {depth}, w0 {w0}, wa {wa} and wm {wm} make no widths; depth must be at least 1, w0 a"
            " multiple of 8, wa at least 0 and wm above 1"
        )
    powers = (round(log((w0 + wa * block) / w0) / log(wm)) for block in range(depth))
    widths = [round(w0 * wm**power / 8) * 8 for power in powers]
    different = sorted(set(widths))
    depths = tuple(widths.count(width) for width in different)
    ratios = (ratio,) * len(depths)
    fitting, groups = compatible(different, ratios, (group,) * len(depths))
    return design(depths=depths, widths=fitting, ratios=ratios, groups=groups, **others)


class Factors(NamedTuple):
    """What depth, width, group width and the side of the image are multiplied by."""

    depth: float
    width: float
    group: float
    side: float


def shares(strategy: str) -> dict[str, float]:
    """The weights of d, w, g and r, such that those of d, w and r sum to 1 (or all are 0: groups alone).

    Args:
        strategy: letters of d, w, g, r alone (each weighs 1), or each with its weight, as "d1_w8_g8_r1".

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch(r"[dwgr]+", strategy):
        found = [(axis, 1.0) for axis in strategy]
    elif re.fullmatch(r"[dwgr]\d+(\.\d+)?(_[dwgr]\d+(\.\d+)?)*", strategy):
        found = [(part[0], float(part[1:])) for part in strategy.split("_")]
    else:
        found = []
    weights = {"d": 0.0, "w": 0.0, "g": 0.0, "r": 0.0, **dict(found)}
    if not found or len(dict(found)) < len(found):
        raise UsageError(f"strategy {strategy!r} is not understood; write axes of d, w, g and r, as dwgr or {FAST}")
    total = weights["d"] + weights["w"] + weights["r"] or weights["g"] / 2 or 1.0
    return {axis: weight / total for axis, weight in weights.items()}


def factors(strategy: str, scale: float) -> Factors:
    """Multipliers of the axes for `scale` times the MACs.

    Raises:
        UsageError: a strategy that is not understood, or a scale that is not above 0.
    """
    if not (isfinite(scale) and scale > 0):
        raise UsageError(f"scale is {scale}; it must be above 0, as 4 for four times the MACs")
    share = shares(strategy)
    return Factors(scale ** share["d"], *(scale ** (share[axis] / 2) for axis in "wgr"))


class Growth(NamedTuple):
    """Exponents of a law: a network of `scale` times the MACs has scale^exponent times these."""

    macs: float
    params: float
    activations: float


def law(strategy: str) -> Growth:
    """How a dense stage of depth d, width w and side r grows: MACs d w^2 r^2, parameters d w^2, activations d w r^2."""
    share = shares(strategy)
    return Growth(
        share["d"] + share["w"] + share["r"],
        share["d"] + share["w"],
        share["d"] + share["w"] / 2 + share["r"],
    )


def scaled(base: Design, scale: float, strategy: str = FAST) -> Design:
    """A design of about `scale` times the MACs, rounded as the paper's code does it.

    Depths are rounded, widths go to multiples of 8, groups of more than 5 to multiples of 8, the side of the image to
    multiples of 4; then widths and groups are made to fit. Halves round to the even neighbour. Stem and head widen in
    designs of "mbconv" alone. Rounding moves the cost: compare `complexity` of both.

    Args:
        base: what to grow.
        scale: factor of the MACs, above 0.
        strategy: as in `shares`.

    Raises:
        UsageError: a strategy or scale that does not work, or a network that would be too small.
    """
    depth, width, group, side = factors(strategy, scale)
    depths = tuple(max(1, round(number * depth)) for number in base.depths)
    widths = tuple(_to_eight(number * width) for number in base.widths)
    size = round(base.size * side / 4) * 4
    if size < 1:
        raise UsageError(f"scale {scale} by {strategy!r} leaves no pixel of {base.size}; take a larger scale")
    if base.block == "mbconv":
        stem, head = _to_eight(base.stem_width * width), _to_eight(base.head * width) if base.head else 0
        return replace(base, depths=depths, widths=widths, stem_width=stem, head=head, size=size)
    fitting, groups = compatible(widths, base.ratios, [round_group(number * group) for number in base.groups])
    return replace(base, depths=depths, widths=fitting, groups=groups, size=size)


def _to_eight(width: float) -> int:
    return max(1, round(width / 8)) * 8


def round_group(width: float) -> int:
    """A width of groups: 1, 2, 4, or a multiple of 8."""
    whole = max(1, round(width))
    return whole if whole <= 2 else 4 if whole <= 5 else round(whole / 8) * 8


def compatible(
    widths: Sequence[int], ratios: Sequence[float], groups: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The nearest widths whose inner channels the groups divide, and the groups, none wider than what it divides."""
    inner = [int(max(1, width * ratio)) for width, ratio in zip(widths, ratios, strict=True)]
    small = tuple(min(group, channels) for group, channels in zip(groups, inner, strict=True))
    units = [lcm(group, int(ratio)) if ratio > 1 else group for group, ratio in zip(small, ratios, strict=True)]
    fitting = [max(unit, round(channels / unit) * unit) for channels, unit in zip(inner, units, strict=True)]
    return tuple(int(channels / ratio) for channels, ratio in zip(fitting, ratios, strict=True)), small


class Layer(NamedTuple):
    """A convolution as numbers.

    Attributes:
        inputs: channels in.
        outputs: channels out.
        kernel: its side.
        groups: number of groups.
        before: (height, width) of the map in.
        after: (height, width) of the map out.
        normed: whether a norm follows, with two parameters a channel; otherwise the layer has a bias.
    """

    inputs: int
    outputs: int
    kernel: int
    groups: int
    before: tuple[int, int]
    after: tuple[int, int]
    normed: bool

    @property
    def weights(self) -> int:
        """Weights without bias and norm."""
        return self.outputs * (self.inputs // self.groups) * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.weights * self.after[0] * self.after[1]

    @property
    def activations(self) -> int:
        """Elements of the output."""
        return self.outputs * self.after[0] * self.after[1]

    def moved(self, batch: int) -> float:
        """Numbers read and written for one image of a batch."""
        return self.inputs * self.before[0] * self.before[1] + self.activations + self.weights / batch


def layers(made: Design, *, size: tuple[int, int] | None = None, channels: int = 3) -> Iterator[Layer]:
    """Every convolution of the network in the order of the signal.

    Args:
        made: the network.
        size: (height, width) of the image in pixels; None takes the design's.
        channels: of the image.
    """
    before = size or (made.size, made.size)
    kernel, stride, pooled = STEMS[made.stem]
    grid = _strided(before, stride)
    yield Layer(channels, made.stem_width, kernel, 1, before, grid, True)
    grid, inputs = _strided(grid, pooled), made.stem_width
    for stage in made.stages:
        for number in range(stage.depth):
            stride = 1 if number else stage.stride
            yield from _block(made, stage, inputs, grid, stride)
            grid, inputs = _strided(grid, stride), stage.width
    if made.head:
        yield Layer(inputs, made.head, 1, 1, grid, grid, True)


def _block(made: Design, stage: Stage, inputs: int, grid: tuple[int, int], stride: int) -> Iterator[Layer]:
    mobile, after = made.block == "mbconv", _strided(grid, stride)
    inner = int(inputs * stage.ratio) if mobile else _inner(stage)
    squeezed = int(inputs * made.squeeze) if mobile else round(inputs * made.squeeze)
    if not mobile or inner != inputs:
        yield Layer(inputs, inner, 1, 1, grid, grid, True)
    yield Layer(inner, inner, stage.kernel, inner if mobile else inner // stage.group, grid, after, True)
    if squeezed:
        yield Layer(inner, squeezed, 1, 1, (1, 1), (1, 1), False)
        yield Layer(squeezed, inner, 1, 1, (1, 1), (1, 1), False)
    yield Layer(inner, stage.width, 1, 1, after, after, True)
    if made.block == "bottleneck" and (stride > 1 or inputs != stage.width):
        yield Layer(inputs, stage.width, 1, 1, grid, after, True)


def _inner(stage: Stage) -> int:
    return round(stage.width * stage.ratio)


def _strided(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    return (grid[0] - 1) // stride + 1, (grid[1] - 1) // stride + 1


def complexity(made: Design, *, size: tuple[int, int] | None = None, channels: int = 3, classes: int = 0) -> Cost:
    """What the network costs, from its numbers alone; equal to what `vertebra.training.cost.count` finds.

    Args:
        made: the network.
        size: (height, width) of the image in pixels; None takes the design's.
        channels: of the image.
        classes: of a linear classifier behind the pooling; 0 has none.
    """
    every = list(layers(made, size=size, channels=channels))
    width = made.head or made.widths[-1]
    params = sum(layer.weights + layer.outputs * (1 + layer.normed) for layer in every) + classes * (width + 1)
    macs = sum(layer.macs for layer in every) + classes * width
    activations = sum(layer.activations for layer in every) + classes
    return Cost(params, macs, activations, size or (made.size, made.size))


def roofline(
    made: Design, *, macs_a_second: float, bytes_a_second: float, item_bytes: int = 4, batch: int = 64
) -> float:
    """Seconds an image on a device that computes and moves data at the same time, layer after layer.

    A layer takes as long as the slower of the two. Maps move once an image, weights once a batch.

    Args:
        made: the network.
        macs_a_second: of the device.
        bytes_a_second: of its memory.
        item_bytes: bytes a number.
        batch: images a batch.

    Raises:
        UsageError: a rate or a number that is not above 0.
    """
    if min(macs_a_second, bytes_a_second, item_bytes, batch) <= 0:
        raise UsageError(
            f"roofline: {macs_a_second} MACs and {bytes_a_second} bytes a second, {item_bytes} bytes a number and"
            f" batches of {batch} must all be above 0"
        )
    seconds_a_number = item_bytes / bytes_a_second
    return sum(max(layer.macs / macs_a_second, layer.moved(batch) * seconds_a_number) for layer in layers(made))
