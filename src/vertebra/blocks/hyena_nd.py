"""Hyena N-D: gates and a convolution as large as the map, in place of attention, in any number of dimensions.

Shapes: tokens (B, N, dim) of a grid, or maps (B, *sides, dim), in; the same out. A linear layer and a short convolution
make gates and a value; the value is gated, convolved with a kernel that a small network draws from the places of the
grid, and gated again (arXiv 2309.13600, section 3). A kernel looks to one corner of the map; `directions` says how the
others are seen. Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.hyena_vit`:

    swap(vit, "Attention", "hyena_nd", prefix=1)              timm's ViT and DeiT, 14 x 14 tokens behind a class token
    swap(swin, "WindowAttention", "hyena_nd", grid=7)         timm's Swin: inside each window

Tokens before the grid's, such as a class token, take no part in the convolution and are given the mean of what the
places get, so that a classifier that reads them sees the image. Windows that Swin shifts are convolved as they come:
the mask of pairs has no meaning here.

Departs from the authors' code where that changes no number: "seq" turns the kernel in place of the map, "4dir" of order
2 convolves once with a kernel of all sides, and the factor D is a part of the kernel. Beyond it: any grid and number of
axes. On a grid that it was not built for a kernel is stretched and keeps its sum.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import log, nan, pi, prod
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from vertebra.blocks.long_convolution import convolve, exact
from vertebra.blocks.rows import Dense
from vertebra.contracts import Backbone, Check, Effect, Measured
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError, near
from vertebra.growth import exponent
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="hyena_nd",
    title="Multi-Dimensional Hyena for Spatial Inductive Bias",
    year=2023,
    arxiv="2309.13600",
    reference="Itamarzimm/HyenaND",
    licence="Apache-2.0",
    claim=(
        "a convolution as large as the map in place of attention improves ViT, DeiT and Swin on small data, and Hyena "
        "in the first blocks with attention in the last is best"
    ),
    numbers="parameters of the operator in each of its modes, as counted in the authors' code; those of hyena_vit",
    parity="golden outputs of the authors' operator: five directions, both filters, every window, order 3",
    note=(
        "In Swin the attention inside windows is replaced. The authors' rate and decay of their own for kernels reach "
        "no optimiser in their code, and none here. CelebA and ImageNet are not measured. The networks are `hyena_vit`."
    ),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "4dir": {},
    "standard": {"directions": "standard"},
    "seq": {"directions": "seq"},
    "4dirp": {"directions": "4dirp"},
    "parallel": {"directions": "parallel"},
    "product": {"kernel": "product"},
    "learnt": {"window": "learnt"},
    "symmetric": {"window": "symmetric"},
    "none": {"window": "none"},
    "order_3": {"order": 3},
}

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "directions": ("4dir", "standard", "seq", "4dirp", "parallel"),
    "kernel": ("joint", "product"),
    "window": ("fixed", "learnt", "symmetric", "none"),
}
_SLOWEST, _FASTEST = log(0.01) / 1.5, log(0.01) / 0.3
"""Rates of the windows of the first and the last channel: where they have fallen to 1 %, in lengths of the map."""


class HyenaOptions(TypedDict, total=False):
    """Options of the operator; a variant sets one of them.

    Attributes:
        order: how often the value is gated; it is convolved once less.
        directions: what a cell sees: "standard" the corner above and left of it, "seq" the opposite one (alternate the
            two from block to block), "4dir" all corners, mixed by one number each, "4dirp" all corners, mixed by a
            linear layer, "parallel" four times the first corner with short convolutions of their own.
        kernel: how places become kernels: "joint" by one network for all coordinates together, "product" by one
            network for each axis, whose kernels are multiplied.
        window: what kernels are multiplied with: exp(-rate t) along each axis with rates that are "fixed" or "learnt",
            "symmetric" for one learnt rate for all axes, or "none". Learnt ones have a learnt shift too.
        power: of the window; 0.5 is the authors' square root.
        kernel_width: of the networks that draw the kernels.
        bands: waves that tell a place, beside its coordinate.
    """

    order: int
    directions: Literal["4dir", "standard", "seq", "4dirp", "parallel"]
    kernel: Literal["joint", "product"]
    window: Literal["fixed", "learnt", "symmetric", "none"]
    power: float
    kernel_width: int
    bands: int


def hyena_nd(
    dim: int,
    variant: str = "4dir",
    *,
    grid: int | Sequence[int] = 14,
    axes: int = 2,
    prefix: int = 0,
    **options: Unpack[HyenaOptions],
) -> "HyenaND":
    """The operator for tokens or maps of width `dim`.

    Args:
        dim: width of a token.
        variant: one of `VARIANTS`, which are options.
        grid: sides of the map that kernels are drawn for; one number for all.
        axes: dimensions of the map.
        prefix: tokens that come before those of the grid.
        options: as in `HyenaOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant or choice, or a number out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"hyena_nd has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    numbers: dict[str, Any] = {"order": 2, "power": 1.0, "kernel_width": 64, "bands": 1}
    first: dict[str, Any] = {option: allowed[0] for option, allowed in _CHOICES.items()}
    chosen = {**first, **numbers, **VARIANTS[variant], **options}
    sides = (grid,) * axes if isinstance(grid, int) else tuple(grid)
    _check(chosen, dim=dim, axes=axes, grid=sides, prefix=prefix)
    return HyenaND(dim=dim, grid=sides, prefix=prefix, **chosen)


def _check(chosen: Mapping[str, Any], *, dim: int, axes: int, grid: Sequence[int], prefix: int) -> None:
    known = HyenaOptions.__annotations__
    for option, value in chosen.items():
        if option not in known:
            raise UsageError(f"hyena_nd has no option {option!r}{near(option, known)}; it has {', '.join(known)}")
        if option in _CHOICES and value not in _CHOICES[option]:
            raise UsageError(f"hyena_nd: {option} is {value!r}; it can be {' or '.join(_CHOICES[option])}")
    if chosen["kernel"] == "product" and (chosen["window"] == "symmetric" or chosen["power"] != 1):
        raise UsageError("hyena_nd: a symmetric window, or a power of it, goes with kernel='joint'")
    if chosen["power"] <= 0:
        raise UsageError(f"hyena_nd: power is {chosen['power']}; it must be above 0")
    if axes not in (1, 2, 3):
        raise UsageError(f"hyena_nd: axes is {axes}; it can be 1, 2 or 3")
    if len(grid) != axes or min(grid) < 1:
        raise UsageError(f"hyena_nd: grid is {tuple(grid)}; it needs {axes} sides (axes) of at least 1")
    bounds = {"dim": (dim, 1), "prefix": (prefix, 0), "order": (chosen["order"], 2)}
    bounds |= {option: (chosen[option], 1) for option in ("kernel_width", "bands")}
    for option, (value, least) in bounds.items():
        if value < least:
            raise UsageError(f"hyena_nd: {option} is {value}; it must be at least {least}")


class HyenaND(nn.Module):
    """Gates and long convolutions over a grid; build it with `hyena_nd`.

    Attributes:
        in_proj: tokens to gates and value, (order + 1) * dim.
        short_filter: 3 cells along each axis, for each channel.
        kernel: sides -> kernels ((order - 1) * dim, *sides).
        skip: D, what a cell itself adds to its sum, ((order - 1) * dim,).
        mix: of the directions, where there are several.
        out_proj: to tokens.
    """

    def __init__(
        self, *, dim: int, grid: tuple[int, ...], prefix: int, order: int, directions: str, **kernels: Any
    ) -> None:
        super().__init__()
        self.dim, self.grid, self.prefix, self.order, self.directions = dim, grid, prefix, order, directions
        axes, inner = len(grid), (order + 1) * dim
        self.flips = _flips(axes)
        copies, corners = 4 if directions == "parallel" else 1, len(self.flips)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.in_proj = Dense(dim, inner)
        self.short_filter = convolution(inner, copies * inner, 3, padding=1, groups=inner)
        self.kernel = Kernels(channels=(order - 1) * dim, grid=grid, **kernels)
        self.skip = nn.Parameter(torch.randn((order - 1) * dim))
        mixes = {"4dir": lambda: nn.Linear(corners, 1), "4dirp": lambda: nn.Linear(corners * dim, dim)}
        self.mix = mixes[directions]() if directions in mixes else None
        self.out_proj = Dense(copies * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, prefix + N, dim), by rows of the grid, or maps (B, *sides, dim), to the same.

        Args:
            x: N is that of the grid, or of a square (cube) of another size.
            mask: what a Swin block gives its attention; not looked at.

        Raises:
            UsageError: tokens that fill no such grid.
        """
        if x.ndim == len(self.grid) + 2 and not (x.ndim == 3 and self.prefix):
            return self.operate(x)
        if x.ndim != 3:
            raise UsageError(
                f"hyena_nd takes tokens (B, N, {self.dim}) or maps with {len(self.grid)} sides (axes) between, and got"
                f" {tuple(x.shape)}"
            )
        before, x = x[:, : self.prefix], x[:, self.prefix :]
        y = self.operate(x.unflatten(1, self.sides_of(x.shape[1]))).flatten(1, -2)
        return torch.cat([y.mean(1, keepdim=True).expand_as(before), y], 1) if self.prefix else y

    def sides_of(self, tokens: int) -> tuple[int, ...]:
        """Sides of a grid of so many tokens.

        Raises:
            UsageError: they are neither those of `grid` nor of a square.
        """
        axes = len(self.grid)
        if tokens == prod(self.grid):
            return self.grid
        side = round(tokens ** (1 / axes))
        if side**axes == tokens:
            return (side,) * axes
        raise UsageError(
            f"hyena_nd: {tokens} tokens fill neither the grid {self.grid} nor one of equal sides; give grid=(H, W), or"
            " prefix=1 for a class token before them"
        )

    def operate(self, x: Tensor) -> Tensor:
        """Maps (B, *sides, dim) to maps."""
        sides, axes = x.shape[1:-1], len(self.grid)
        u = self.short_filter(self.in_proj(x).movedim(-1, 1))
        u = u.unflatten(1, (-1, (self.order + 1) * self.dim))  # (B, copies, inner, *sides)
        first, *gates, v = u.split(self.dim, 2)
        kernels = self.kernel(sides) + F.pad(exact(self.skip).view(-1, *(1,) * axes), _behind(sides))
        for number, kernel in enumerate(kernels.split(self.dim)):
            turned, ahead = self._directed(kernel, number)
            v = exact(v * gates[-1 - number]).contiguous()
            v = convolve(v, turned.to(v.dtype), axes=axes, ahead=ahead).to(x.dtype)
        return self.out_proj(self._mixed(v * first).movedim(1, -1))

    def _directed(self, kernel: Tensor, number: int) -> tuple[Tensor, tuple[int, ...]]:
        """Kernels (directions, dim, *taps) of a convolution, the first of which has the number 0, and taps ahead."""
        axes, sides = len(self.grid), kernel.shape[1:]
        ahead = tuple(side - 1 for side in sides)
        if self.directions == "seq" and number == 0:
            return kernel.flip(tuple(range(-axes, 0)))[None], ahead
        if self.mix is None:
            return kernel[None], (0,) * axes
        whole = F.pad(kernel, [pad for side in reversed(sides) for pad in (side - 1, 0)])
        corners = torch.stack([whole.flip(flip) for flip in self.flips])
        if self._at_once:
            corners = torch.einsum("d,d...->...", exact(self.mix.weight[0]).to(corners.dtype), corners)[None]
        return corners, ahead

    @property
    def _at_once(self) -> bool:
        """Whether directions are mixed in the kernel: with one convolution and one number for each it is the same."""
        return self.directions == "4dir" and self.order == 2

    def _mixed(self, y: Tensor) -> Tensor:
        """(B, directions or copies, dim, *sides) to (B, width of `out_proj`, *sides)."""
        if self.mix is None:
            return y.flatten(1, 2)
        if self._at_once:
            return y[:, 0] + self.mix.bias
        if self.directions == "4dir":
            return self.mix(y.movedim(1, -1))[..., 0]
        weight = self.mix.weight.unflatten(1, (self.dim, -1)).mT.flatten(1)  # its inputs are channel after channel
        return F.linear(y.flatten(1, 2).movedim(1, -1), weight, self.mix.bias).movedim(-1, 1)


def _flips(axes: int) -> list[tuple[int, ...]]:
    """Axes to turn for each corner, in the authors' order: none, all, then the others."""
    every = [tuple(axis - axes for axis in range(axes) if turn[axis]) for turn in product((0, 1), repeat=axes)]
    return [every[0], every[-1], *every[1:-1]]


def _behind(sides: Sequence[int]) -> list[int]:
    """Padding that makes one cell a map of `sides`, with the cell in its first corner."""
    return [pad for side in reversed(sides) for pad in (0, side - 1)]


class Kernels(nn.Module):
    """Kernels drawn from the places of a grid, times windows.

    Attributes:
        places: what tells a place along an axis: coordinate, cosines and sines, (1, longest side, 1 + 2 bands).
        frequency: of the sines, shared by all layers of all nets, (1, width).
        nets: from places to channels, one for all axes or one for each.
        windows: likewise; none where kernels have no window.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, ...],
        kernel: str,
        window: str,
        power: float,
        kernel_width: int,
        bands: int,
    ) -> None:
        super().__init__()
        self.grid, parts = grid, 1 if kernel == "joint" else len(grid)
        together = len(grid) // parts
        self.places = nn.Parameter(_places(max(grid), bands)[None])
        self.frequency = nn.Parameter(torch.ones(1, kernel_width))
        self.nets = nn.ModuleList(SineNet(together * (2 * bands + 1), kernel_width, channels) for _ in range(parts))
        windows = [Window(channels, window, together, power) for _ in range(parts if window != "none" else 0)]
        self.windows = nn.ModuleList(windows)

    def forward(self, sides: Sequence[int]) -> Tensor:
        """Kernels (channels, *sides), in 32 bit at least."""
        axes, parts = len(sides), len(self.nets)
        places = [_along(axis, axes, self._stretched(side)) for axis, side in enumerate(sides)]
        frequency = exact(self.frequency)
        steps = [self._steps(axis, axes, side) for axis, side in enumerate(sides)]
        whole: Any = 1
        for number, net in enumerate(self.nets):
            of = slice(None) if parts == 1 else slice(number, number + 1)
            whole = whole * net(places[of], frequency)
            if self.windows:
                whole = whole * self.windows[number](steps[of], self.grid[of])
        # the authors' transforms divide by the padded side, 2 L, once too often for two axes, as in 1-D by nothing
        size = 2 * prod(self.grid) ** (1 / axes)
        return whole.movedim(-1, 0) * (size ** (1 - axes) * prod(self.grid) / prod(sides))

    def _stretched(self, side: int) -> Tensor:
        """(side, 1 + 2 bands)."""
        places = exact(self.places)
        if side != places.shape[1]:
            places = F.interpolate(places.mT, size=side, mode="linear", align_corners=True).mT
        return places[0]

    def _steps(self, axis: int, axes: int, side: int) -> Tensor:
        kind = exact(self.places).dtype
        return _along(axis, axes, torch.linspace(0, 1, side, dtype=kind, device=self.places.device)[:, None])


def _along(axis: int, axes: int, line: Tensor) -> Tensor:
    """(n, features) to a map of `axes` sides that has n cells along one axis, (1, ..., n, ..., 1, features)."""
    return line.view(*(1,) * axis, -1, *(1,) * (axes - 1 - axis), line.shape[-1])


def _places(length: int, bands: int) -> Tensor:
    """(length, 1 + 2 bands): the coordinate in 0..1, cosines and falling sines; the first wave is hardly one."""
    turns = 2 * pi * torch.arange(length)[:, None] / length * torch.linspace(1e-4, bands - 1, bands)
    return torch.cat([torch.linspace(0, 1, length)[:, None], turns.cos(), -turns.sin()], 1)


class SineNet(nn.Module):
    """Linear layers with sines between.

    Attributes:
        linears: inputs -> width -> width -> width -> channels.
    """

    def __init__(self, inputs: int, width: int, channels: int) -> None:
        super().__init__()
        inner = [nn.Linear(inputs, width), *(nn.Linear(width, width) for _ in range(2))]
        self.linears = nn.ModuleList([*inner, nn.Linear(width, channels, bias=False)])

    def forward(self, places: Sequence[Tensor], frequency: Tensor) -> Tensor:
        """Places of each axis, that broadcast to a map, to (*sides, channels); in the places' type."""
        layers: Any = self.linears
        first, *inner, last = layers
        weights = exact(first.weight).chunk(len(places), 1)  # the places of all axes side by side are its inputs
        x: Any = exact(first.bias)
        for place, weight in zip(places, weights, strict=True):
            x = x + F.linear(place, weight)
        for linear in inner:
            x = F.linear((frequency * x).sin(), exact(linear.weight), exact(linear.bias))
        return F.linear((frequency * x).sin(), exact(last.weight))


class Window(nn.Module):
    """exp(-rate t) along each axis, with t in 0..1, times each other; learnt ones have a shift that is added.

    Attributes:
        rates: one an axis, or one for all; (1, 1, channels). None where they are fixed.
        shift: (1, 1, channels).
    """

    def __init__(self, channels: int, kind: str, axes: int, power: float) -> None:
        super().__init__()
        self.channels, self.kind, self.power = channels, kind, power
        if kind != "fixed":
            start = torch.linspace(_SLOWEST, _FASTEST, channels).view(1, 1, -1)
            count = 1 if kind == "symmetric" else axes
            self.rates = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(count))
            self.shift = nn.Parameter(torch.rand_like(start))

    def forward(self, steps: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
        """Coordinates in 0..1 of each axis, that broadcast to a map, to (*sides, channels)."""
        if self.kind == "fixed":
            fixed = torch.linspace(_SLOWEST, _FASTEST, self.channels, dtype=steps[0].dtype, device=steps[0].device)
            return (-self.power * fixed.abs() * sum(steps)).exp()
        rates = [exact(rate).flatten() for rate in self.rates]
        if self.kind == "symmetric":  # counts cells, where the others take the whole map as 1
            steps, rates = [step * (side - 1) for step, side in zip(steps, grid, strict=True)], rates * len(steps)
        falls: Any = sum(step * rate.abs() for step, rate in zip(steps, rates, strict=True))
        return (-self.power * falls).exp() + exact(self.shift).flatten()


def names(window: str) -> Rules:
    """The authors' names -> ours, for an operator with such a window."""
    fixed: Rules = [(r"modulation\.[XY]?deltas$", None)] if window in ("fixed", "none") else []
    return [
        *fixed,
        (r"filter_fn\.bias$", "skip"),
        (r"filter_fn\.pos_emb\.t$", None),
        (r"filter_fn\.pos_emb\.z$", "kernel.places"),
        (r"implicit_filter\.[35]\.freq$|Ximplicit_filter\.1\.freq$", None),  # the same one again
        (r"filter_fn\.Y?implicit_filter\.1\.freq$", "kernel.frequency"),
        *((rf"implicit_filter\.{2 * layer}\.", f"implicit_filter.linears.{layer}.") for layer in range(4)),
        (r"filter_fn\.X?implicit_filter\.", "kernel.nets.0."),
        (r"filter_fn\.Yimplicit_filter\.", "kernel.nets.1."),
        (r"filter_fn\.modulation\.Ydeltas$", "kernel.windows.0.rates.1"),
        (r"filter_fn\.X?modulation\.X?deltas$", "kernel.windows.0.rates.0"),
        (r"filter_fn\.Ymodulation\.deltas$", "kernel.windows.1.rates.0"),
        (r"filter_fn\.X?modulation\.shift$", "kernel.windows.0.shift"),
        (r"filter_fn\.Ymodulation\.shift$", "kernel.windows.1.shift"),
        (r"linear_mix\.", "mix."),
    ]


def published(state: Mapping[str, Tensor], block: HyenaND) -> dict[str, Tensor]:
    """Weights of the authors' operator (Itamarzimm/HyenaND, Apache-2.0) under our names.

    Args:
        state: of their `HyenaOperator2d`.
        block: of the same options.

    Raises:
        ParityError: they are of another operator; the message lists what is left over on both sides.
    """
    windows = block.kernel.windows
    return convert(state, names(windows[0].kind if windows else "none"), block)  # type: ignore[arg-type]


_ARMS = {
    "attention": "attention in every block",
    "hyena": "Hyena 2-D, to opposite corners in turn",
    "hyena_1d": "Hyena over the tokens row after row, both ways in turn",
    "hybrid": "Hyena 2-D in the first blocks, attention in the last",
    "reverse": "attention in the first blocks, Hyena 2-D in the last",
}
_NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"mixers": "attention"},
    "hyena": {},
    "hyena_1d": {"axes": 1},
    "hybrid": {"mixers": "hyena_attention"},
    "reverse": {"mixers": "attention_hyena"},
}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: width and depth, kernel width, images, epochs; and maps that are timed."""

    dim: int
    depth: int
    kernel_width: int
    images: int
    epochs: int
    sides: tuple[int, ...]


_SETTINGS = {
    "toy": _Setting(48, 4, 16, 2000, 12, (16, 32, 64)),
    "gpu": _Setting(192, 6, 64, 50_000, 100, (16, 32, 64)),
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Hyena beside attention, over rows as one sequence, and both in one network, in a plain transformer."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="a convolution over the map instead of attention is better on few images; best is Hyena, then attention",
        arms=_ARMS,
        baseline="attention",
        metrics={
            "top1": "%",
            "nll": "",
            "field": "%",
            "slope": "",
            "ms": "ms",
            "training": "MB",
            "written": "MB",
            "seconds": "",
        },
        measure=measure,
        checks=_checks,
        limits=(
            f"{setting.depth} blocks of width {setting.dim} on patches of 4 pixels, {len(train)} images, "
            f"{setting.epochs} epochs: the row asks for 6 blocks of width 192 and 10,000 images, the paper has 300 "
            "epochs; a point or less needs more seeds than three. `field` is the side of the square that holds 99 % of "
            "what the centre listens to before training (half of it is its own patch, which shortcuts bring, in every "
            "arm); `slope` the power of processor time over cells; `ms`, "
            f"`training` and `written` are one operator of width {setting.dim} on {setting.sides[-1]} x "
            f"{setting.sides[-1]} tokens: processor time, what training holds, and the same of attention that writes "
            "its products out, as the authors' does"
        ),
        data=words,
    )


def armed(arm: str, setting: _Setting) -> Backbone:
    """The network of an arm, for images of 32 pixels."""
    from vertebra.backbones.hyena_vit import hyena_vit

    size: Any = {"dim": setting.dim, "depth": setting.depth, "kernel_width": setting.kernel_width, "heads": 3}
    return hyena_vit("nano", **size, **_NETWORKS[arm])


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.probes.receptive_field import contributions, share_radius

    torch.manual_seed(seed)
    backbone = armed(arm, setting)
    noise = torch.randn(50, backbone.preprocess.channels, *backbone.preprocess.size)
    field = 100 * share_radius(contributions(backbone.eval(), noise), 0.99)
    plan = Plan(epochs=setting.epochs, batch=50, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    cost = {} if arm not in ("attention", "hyena") else costs(arm, setting)
    return {
        "top1": scores["top1"],
        "nll": scores["nll"],
        "field": field,
        **{name: cost.get(name, nan) for name in ("slope", "ms", "training", "written")},
        "seconds": scores["seconds"],
    }


def costs(arm: Literal["attention", "hyena"], setting: _Setting) -> dict[str, float]:
    """What one operator costs: growth of its processor time; on the largest map that time, and training's memory."""
    from vertebra.blocks.attention import attention

    taken = []
    for side in setting.sides:
        attends = arm == "attention"
        block = attention(setting.dim, heads=3) if attends else hyena_nd(setting.dim, "standard", grid=side)
        x = torch.randn(1, side**2, setting.dim)
        taken.append(_milliseconds(block.eval(), x))
    cells = [side**2 for side in setting.sides]
    found = {"slope": exponent(cells, taken), "ms": taken[-1]}
    found["training"] = _megabytes(block.train(), x)
    if arm == "attention":
        found["written"] = _megabytes(_Written(block), x)
    return found


def _milliseconds(block: nn.Module, x: Tensor) -> float:
    """Processor time of a forward pass, the best of five."""
    runs = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.process_time()
            block(x)
            runs.append(time.process_time() - started)
    return 1000 * min(runs[1:])


def _megabytes(block: nn.Module, x: Tensor) -> float:
    """Most that tensors take at once in a forward and a backward pass."""
    from vertebra.probes.memory import Alive

    with Alive((*block.parameters(), x)) as alive:
        block(x).square().mean().backward()
    return alive.most / 1e6


class _Written(nn.Module):
    """Attention whose products and weights are written out, as in the authors' code; for the effect."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.plain.qkv(x).unflatten(-1, (3, self.plain.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.mT) * self.plain.scale).softmax(-1)
        return self.plain.proj((weights @ v).transpose(1, 2).flatten(2))


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    figure = {
        name: {arm: measured.mean(arm, name) for arm in ("hyena", "attention")}
        for name in ("field", "slope", "ms", "training")
    }
    written = measured.mean("attention", "written")

    def ahead(name: str, arm: str, other: str, points: float) -> Check:
        gain = measured.gain(arm, other, "top1")
        seeds = ", ".join(f"{one:+.2f}" for one in gain)
        return Check(name, bool(gain.mean() >= points), f"{gain.mean():+.2f} points (seeds: {seeds}); {words}")

    def less(name: str, metric: str, unit: str, most: float, more: str = "") -> Check:
        found = figure[metric]
        text = f"{found['hyena']:.4g} and {found['attention']:.4g}{unit}{more}"
        return Check(name, found["hyena"] < most, text)

    return [
        ahead("Hyena 2-D is at least 2 points ahead of attention", "hyena", "attention", 2.0),
        ahead("Hyena 2-D is ahead of Hyena over rows", "hyena", "hyena_1d", 0.01),
        ahead("Hyena first and attention last is at least as good as Hyena", "hybrid", "hyena", 0.0),
        ahead("and as attention", "hybrid", "attention", 0.0),
        less("before training it listens closer around than attention", "field", " %", figure["field"]["attention"]),
        less("time grows as N log N: at most with the power 1.2 of the cells", "slope", "", 1.2),
        less("on the largest map it is faster than attention", "ms", " ms", figure["ms"]["attention"]),
        less(
            "and takes less memory in training than attention that is written out",
            "training",
            " MB fused",
            written,
            f", {written:.4g} MB written out",
        ),
    ]
