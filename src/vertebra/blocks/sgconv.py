"""SGConv: a convolution as long as the sequence, whose kernel has few parameters and fades with distance.

Shapes: tokens (B, N, dim) in, the same out; `sgconv_2d` takes maps (B, C, H, W), row after row. The kernel of a channel
is put together from pieces of `piece` numbers: each next one is stretched to twice the length and falls by the factor
`decay`, so that parameters grow with the logarithm of the length (arXiv 2210.09298, section 3). It is divided by its
norm once, when the block is built; the norm then stays a buffer, and what training does to the scale is kept. Fourier
transforms apply it in N log N, in 32 bit whatever the type of the tokens. Used alone, through `vertebra.surgery.swap`,
and in `vertebra.backbones.sgconvnext`.

Departs from the authors' code in when the norm is taken: they take it in the first forward pass, from the same numbers.
So the forward pass here changes nothing and exports as it is. After kernels were filled by hand call `measure`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log, nan, pi
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from vertebra.blocks.large_kernel import fast_length
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError, near
from vertebra.paper import Paper

PAPER = Paper(
    id="sgconv",
    title="What Makes Convolutional Models Great on Long Sequence Modeling?",
    year=2022,
    arxiv="2210.09298",
    reference="ctlllll/SGConv",
    licence="none stated",
    claim=(
        "87.17 on Long Range Arena where S4 has 86.09, and faster; gains efficiency and accuracy inside language and "
        "vision models (SGConvNeXt 82.0 to 83.9 ImageNet top-1)"
    ),
    numbers="the lengths, pieces and parameters that the formulas give for lengths of 100, 1024 and 50,176",
    parity="golden outputs of the authors' stand-alone layer, at two lengths each",
    note=(
        "The authors train kernels at a rate of 1e-3 of their own; here they follow the plan's. Pathfinder, and memory "
        "at 50,176 tokens on a GPU, are not measured. SGConvNeXt is `sgconvnext`."
    ),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "causal": {"direction": "causal"},
    "sum": {"mode": "sum"},
    "nearest": {"stretch": "nearest"},
    "learnable": {"fade": "learnable"},
    "cos": {"start": "cos"},
}

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mode": ("cat", "sum"),
    "stretch": ("linear", "nearest"),
    "fade": ("scale", "learnable"),
    "start": ("normal", "cos"),
    "direction": ("bidirectional", "causal"),
}


class Choices(TypedDict, total=False):
    """How kernels are made and applied; a variant sets one of them.

    Attributes:
        mode: "cat" puts the pieces behind each other, "sum" starts all of them at 0 and adds them up.
        stretch: how a piece gets its length.
        fade: "scale" is a factor a scale, "learnable" a power of the distance for each channel.
        start: of the pieces: standard normal, or cosines.
        direction: "causal" sees a place and those before it; "bidirectional" has a kernel for each side.
    """

    mode: Literal["cat", "sum"]
    stretch: Literal["linear", "nearest"]
    fade: Literal["scale", "learnable"]
    start: Literal["normal", "cos"]
    direction: Literal["bidirectional", "causal"]


def sgconv(
    dim: int,
    variant: str = "bidirectional",
    *,
    length: int = 1024,
    piece: int = 16,
    decay: float | tuple[float, float] = 2.0,
    kernels: int = 1,
    dropout: float = 0.0,
    **choices: Unpack[Choices],
) -> "SGConv":
    """The layer for tokens of width `dim`: long convolution, GELU, linear layer.

    Args:
        dim: width of the tokens.
        variant: one of `VARIANTS`, which are choices.
        length: tokens that the kernel reaches over. Shorter sequences use its beginning; in longer ones nothing is
            seen from further away than the kernel's end, which is at most twice that far.
        piece: numbers a piece, d_k in the paper.
        decay: factor that the kernel loses from one scale to the next; 1 is none. Two numbers are the first and the
            last channel's, with even steps between. With `fade="learnable"` the range of the powers' start.
        kernels: of each channel; the linear layer joins what they give.
        dropout: probability, before the linear layer.
        choices: as in `Choices`; they win over the variant's.

    Raises:
        UsageError: an unknown variant or choice, or a number out of range.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"sgconv: dropout is {dropout}; it must be in [0, 1), as 0.1")
    conv = _conv("sgconv", dim, variant, length, piece, decay, kernels, choices)
    return SGConv(conv=conv, dim=dim, kernels=kernels, dropout=dropout)


def sgconv_2d(
    channels: int,
    variant: str = "bidirectional",
    *,
    length: int = 1024,
    piece: int = 16,
    decay: float | tuple[float, float] = 2.0,
    **choices: Unpack[Choices],
) -> "SGConv2d":
    """The convolution alone for maps of `channels`, in place of a depthwise one: row after row as one sequence.

    A kernel is learnt for one width of the map: in a wider one the pixel below is further along.

    Args:
        channels: of the maps.
        variant: one of `VARIANTS`.
        length: pixels of the map, height times width.
        piece: as in `sgconv`, and so are the others.
        decay: factor between scales.
        choices: as in `Choices`.

    Raises:
        UsageError: an unknown variant or choice, or a number out of range.
    """
    return SGConv2d(conv=_conv("sgconv_2d", channels, variant, length, piece, decay, 1, choices))


def _conv(
    name: str,
    dim: int,
    variant: str,
    length: int,
    piece: int,
    decay: float | tuple[float, float],
    kernels: int,
    choices: Mapping[str, Any],
) -> "LongConv":
    if variant not in VARIANTS:
        raise UsageError(f"{name} has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    chosen = {option: allowed[0] for option, allowed in _CHOICES.items()} | VARIANTS[variant] | dict(choices)
    for option, value in chosen.items():
        if option not in _CHOICES:
            raise UsageError(f"{name} has no option {option!r}{near(option, _CHOICES)}; it has {', '.join(_CHOICES)}")
        if value not in _CHOICES[option]:
            raise UsageError(f"{name}: {option} is {value!r}; it can be {' or '.join(_CHOICES[option])}")
    for option, value in {"dim": dim, "length": length, "piece": piece, "kernels": kernels}.items():
        if value < 1:
            raise UsageError(f"{name}: {option} is {value}; it must be at least 1")
    ends = decay if isinstance(decay, tuple) else (decay, decay)
    if len(ends) != 2 or min(ends) <= 0:
        raise UsageError(f"{name}: decay is {decay}; it must be above 0, one number or (first, last)")
    both = chosen.pop("direction") == "bidirectional"
    made = Pieces(dim=dim, kernels=kernels * (1 + both), length=length, piece=piece, decay=ends, **chosen)
    return LongConv(kernel=made, dim=dim, kernels=kernels)


def scales_of(length: int, piece: int) -> int:
    """Pieces that a kernel of `length` needs: 1 + ceil(log2(length / piece)), and 1 where one is long enough.

    Together they have piece * 2^(scales - 1) places.
    """
    return 1 + max(0, (-(-length // piece) - 1).bit_length())


class SGConv(nn.Module):
    """Long convolution, GELU, dropout and a linear layer over tokens; build it with `sgconv`."""

    def __init__(self, *, conv: nn.Module, dim: int, kernels: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.dropout = conv, nn.Dropout(dropout)
        self.linear = nn.Linear(kernels * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        return self.linear(self.dropout(F.gelu(self.conv(x.mT))).mT)


class SGConv2d(nn.Module):
    """A long convolution over the pixels of maps in the order of reading; build it with `sgconv_2d`."""

    def __init__(self, *, conv: "LongConv") -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        return self.conv(x.flatten(2)).unflatten(2, x.shape[2:])


class LongConv(nn.Module):
    """Every channel convolved with a kernel as long as the sequence, plus the channel times a learnt factor.

    Attributes:
        kernel: (length) -> kernels (directions * kernels, dim, length); the second direction looks ahead.
        skip: D in the paper, (kernels * dim,).
    """

    def __init__(self, *, kernel: nn.Module, dim: int, kernels: int = 1) -> None:
        super().__init__()
        self.kernel, self.kernels = kernel, kernels
        self.skip = nn.Parameter(torch.randn(kernels * dim))

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (B, dim, N) to (B, kernels * dim, N)."""
        u = exact(x).contiguous()[:, None]  # (B, 1, dim, N); transforms along other strides are slow
        kernel = self.kernel(x.shape[-1]).to(u.dtype)
        y = convolve(u, *kernel.split(self.kernels))  # one kernel, or forth and back
        y = torch.addcmul(y, u, self.skip.to(u.dtype).view(self.kernels, -1, 1))
        return y.flatten(1, 2).to(x.dtype)


def exact(x: Tensor) -> Tensor:
    """In 32 bit at least: a transform in 16 bit would drown the far end of a kernel."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve(x: Tensor, forth: Tensor, back: Tensor | None = None) -> Tensor:
    """Convolve sequences with kernels of their own length, by Fourier transforms.

    Place t gets the sum over s of forth[s] x[t - s], and of back[s] x[t + 1 + s]; x is zero outside.

    Args:
        x: (B, 1, dim, N) in 32 or 64 bit.
        forth: (kernels, dim, N), what comes from the place itself and those before it.
        back: (kernels, dim, N), what comes from the places after it.

    Returns:
        (B, kernels, dim, N); in eager mode gradients of gradients are refused.
    """
    length = x.shape[-1]
    # a length of many small factors is fast; while the length is a symbol there is none to look for
    whole = fast_length(2 * length) if isinstance(length, int) else 2 * length
    if back is not None:
        forth = torch.cat([forth, forth.new_zeros(*forth.shape[:-1], whole - 2 * length), back.flip(-1)], -1)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Transformed.apply(x, forth, whole)  # type: ignore[return-value]
    spectrum = torch.fft.rfft(x, whole) * torch.fft.rfft(forth, whole)
    return torch.fft.irfft(spectrum, whole)[..., :length]


class _Transformed(torch.autograd.Function):
    """The same with gradients by real transforms; torch's own take complex ones of twice the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, whole: int) -> Tensor:
        spectra = torch.fft.rfft(x, whole), torch.fft.rfft(kernel, whole)
        ctx.save_for_backward(*spectra)
        ctx.lengths = x.shape[-1], kernel.shape[-1], whole
        return torch.fft.irfft(spectra[0] * spectra[1], whole)[..., : x.shape[-1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, kernel = ctx.saved_tensors  # (B, 1, dim, F), (kernels, dim, F)
        length, reach, whole = ctx.lengths
        grad = torch.fft.rfft(grads[0].contiguous(), whole)  # (B, kernels, dim, F)
        to_x = to_kernel = None
        if ctx.needs_input_grad[0]:
            back = grad * kernel.conj_physical()
            back = back if back.shape[1] == 1 else back.sum(1, keepdim=True)
            to_x = torch.fft.irfft(back, whole)[..., :length]
        if ctx.needs_input_grad[1]:
            to_kernel = torch.fft.irfft(grad.mul_(x.conj_physical()).sum(0), whole)[..., :reach]
        return to_x, to_kernel, None


class Pieces(nn.Module):
    """Kernels made of pieces, one a scale.

    Attributes:
        pieces: (scales * kernels * dim * piece,), flat: tensors of rank 2 and more decay in training, and the paper
            has kernels decay by nothing.
        norm: (kernels, dim, 1), of the whole kernels when they were measured.
        power: (dim,), where `fade` is "learnable".
    """

    norm: Tensor

    def __init__(
        self,
        *,
        dim: int,
        kernels: int,
        length: int,
        piece: int,
        decay: tuple[float, float],
        mode: str,
        stretch: str,
        fade: str,
        start: str,
    ) -> None:
        super().__init__()
        self.shape = (scales_of(length, piece), kernels, dim, piece)
        self.mode, self.stretch, self.decay = mode, stretch, decay
        first = torch.randn(self.shape) if start == "normal" else _waves(self.shape)
        self.pieces = nn.Parameter(first.flatten())
        low, high = decay
        self.power = nn.Parameter(low + (high - low) * torch.rand(dim)) if fade == "learnable" else None
        self.register_buffer("norm", torch.ones(kernels, dim, 1))
        self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """Take the norm of the kernels as they are now."""
        self.norm.copy_(self.whole().norm(dim=-1, keepdim=True))

    def forward(self, length: int) -> Tensor:
        """Kernels (kernels, dim, length), cut off or followed by zeros."""
        whole = self.whole() / exact(self.norm)
        more = length - whole.shape[-1]
        return F.pad(whole, (0, more)) if more > 0 else whole[..., :length]

    def whole(self) -> Tensor:
        """Kernels before their norm, (kernels, dim, piece * 2^(scales - 1))."""
        pieces = exact(self.pieces).view(self.shape)
        scales, _, dim, piece = self.shape
        total = piece * 2 ** (scales - 1)
        factors = torch.linspace(*self.decay, dim, device=pieces.device, dtype=pieces.dtype)[:, None]
        factors = factors if self.power is None else torch.ones_like(factors)
        made = []
        for scale in range(scales):
            times = 2**scale if self.mode == "sum" else 2 ** max(0, scale - 1)
            stretched = F.interpolate(pieces[scale], size=piece * times, mode=self.stretch)
            made.append(stretched * factors ** (scales - 1 - scale))
        if self.mode == "sum":
            whole = torch.stack([F.pad(one, (0, total - one.shape[-1])) for one in made]).sum(0)
        else:
            whole = torch.cat(made, -1)
        if self.power is None:
            return whole
        places = torch.arange(1, total + 1, device=pieces.device, dtype=pieces.dtype)
        return whole * places ** -exact(self.power)[:, None]


def _waves(shape: tuple[int, ...]) -> Tensor:
    """Cosines of 0, 1, 2, ... periods, one a channel in random order."""
    _, _, dim, piece = shape
    periods = torch.randperm(dim)[:, None] * torch.linspace(0, 2 * pi, piece)
    return periods.cos().expand(shape).clone()


class _Free(nn.Module):
    """Kernels of one number a place, which start as long as those of `Pieces`; for the effect."""

    def __init__(self, *, dim: int, length: int) -> None:
        super().__init__()
        self.shape = (2, dim, length)
        self.places = nn.Parameter(F.normalize(torch.randn(self.shape), dim=-1).flatten())

    def forward(self, length: int) -> Tensor:
        return self.places.view(self.shape)[..., :length]


class _Diagonal(nn.Module):
    """Kernels of a diagonal state space, S4D-Lin of arXiv 2206.11893: sums of waves that fade; for the effect."""

    def __init__(self, *, dim: int, states: int = 16) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.empty(dim).uniform_(log(1e-3), log(1e-1)))
        self.fall = nn.Parameter(torch.full((dim * states,), log(0.5)))
        self.turn = nn.Parameter(pi * torch.arange(states).repeat(dim).float())
        self.mix = nn.Parameter(torch.randn(2, dim, states, 2) * 0.5**0.5)

    def forward(self, length: int) -> Tensor:
        mix = torch.view_as_complex(self.mix)  # (2, dim, states)
        poles = torch.complex(-self.fall.exp(), self.turn).view(mix.shape[1:])
        steps = poles * self.step.exp()[:, None]
        waves = (steps[..., None] * torch.arange(length)).exp()  # (dim, states, length)
        return 2 * torch.einsum("kds,dsn->kdn", mix * (steps.exp() - 1) / poles, waves).real


class _Pixels(Backbone):
    """Pixels of an image as one sequence, through blocks that keep it; for the effect."""

    def __init__(self, *, preprocess: Preprocess, width: int, depth: int, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(preprocess.channels, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mixer()) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.levels, self.width, self.preprocess = (Level(width, 1),), width, preprocess

    def forward(self, images: Tensor) -> Features:
        x = self.stem(images.flatten(2).mT)  # (B, H * W, width)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        return Features((x.mT.unflatten(2, images.shape[2:]),), x.mean(1), x)

    def trunk(self) -> list[nn.Module]:
        return [self.stem, *self.blocks, self.norm]


_ARMS = {
    "local": "convolution over 7 pixels of the sequence",
    "sgconv": "pieces of 2 numbers, decay 2",
    "flat": "pieces of 2 numbers, no decay",
    "free": "a number for each place",
    "s4d": "diagonal state space, 16 states",
    "net_7x7": "ConvNeXt, depthwise 7 x 7",
    "net_sgconv": "ConvNeXt, SGConv",
}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: width and depth of the sequence net, pixels, images, epochs."""

    width: int
    depth: int
    size: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(32, 4, 20, 2000, 8), "gpu": _Setting(128, 6, 32, 50_000, 60)}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """SGConv over sequences of pixels beside other kernels, and inside a small ConvNeXt."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="few parameters and a decay with distance are what makes a long convolution good",
        arms=_ARMS,
        baseline="local",
        metrics={"top1": "%", "nll": "", "kernel": "", "slope": "", "seconds": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"sequences of {setting.size**2} pixels, {setting.depth} blocks of width {setting.width}, {len(train)} "
            f"images, {setting.epochs} epochs: the paper has 16 times more images, sequences of 1,024 to 16,000 and "
            "hundreds of epochs; differences of a point or less need more seeds than three; `kernel` is parameters a "
            "channel and a block; layer scale starts at 1 in the small ConvNeXt; Pathfinder is not measured"
        ),
        data=words,
    )


def _mixer(arm: str, width: int, length: int) -> nn.Module:
    if arm == "local":
        return SGConv(conv=nn.Conv1d(width, width, 7, padding=3, groups=width), dim=width)
    if arm in ("sgconv", "flat"):
        return sgconv(width, length=length, piece=2, decay=2.0 if arm == "sgconv" else 1.0)
    kernel = _Free(dim=width, length=length) if arm == "free" else _Diagonal(dim=width)
    return SGConv(conv=LongConv(kernel=kernel, dim=width), dim=width)


def armed(arm: str, setting: _Setting) -> Backbone:
    """The network of an arm."""
    from vertebra.backbones import sgconvnext, timm

    if arm.startswith("net"):
        plain = sgconvnext.VARIANTS["nano"]
        given: Any = {"network": {**plain["network"], "ls_init_value": 1.0}, "image_size": setting.size}
        return timm.timm(plain["plain"], **given) if arm == "net_7x7" else sgconvnext.sgconvnext("nano", **given)
    half, side = (0.5,) * 3, setting.size
    preprocess = Preprocess((side, side), half, half, "bilinear")
    made = lambda: _mixer(arm, setting.width, side**2)  # noqa: E731
    return _Pixels(preprocess=preprocess, width=setting.width, depth=setting.depth, mixer=made)


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=32, lr=3e-3, views=Views(scale=(0.8, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    sequence = isinstance(backbone, _Pixels)
    return {
        "top1": scores["top1"],
        "nll": scores["nll"],
        "kernel": kernel_parameters(backbone) / setting.width if sequence else nan,
        "slope": slope(setting.width) if arm == "sgconv" else nan,
        "seconds": scores["seconds"],
    }


def kernel_parameters(backbone: Any) -> int:
    """Parameters of the first block's kernels."""
    conv = backbone.blocks[0][1].conv
    return sum(p.numel() for p in getattr(conv, "kernel", conv).parameters())


def slope(width: int, lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384)) -> float:
    """How the processor time of the block grows with the length: the power, fitted to the best of nine runs each."""
    taken = []
    with torch.inference_mode():
        for length in lengths:
            block, x = sgconv(width, length=length, piece=2).eval(), torch.randn(1, length, width)
            runs = []
            for _ in range(10):
                started = time.process_time()
                block(x)
                runs.append(time.process_time() - started)
            taken.append(min(runs[1:]))
    return float(np.polyfit(np.log(lengths), np.log(taken), 1)[0])


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    kernel = {arm: measured.mean(arm, "kernel") for arm in ("sgconv", "free")}
    fewer = kernel["free"] / kernel["sgconv"]
    slope = measured.mean("sgconv", "slope")
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())

    def ahead(name: str, arm: str, other: str, points: float) -> Check:
        gain = measured.gain(arm, other, "top1")
        seeds = ", ".join(f"{one:+.2f}" for one in gain)
        return Check(name, bool(gain.mean() >= points), f"{gain.mean():+.2f} points (seeds: {seeds})")

    return [
        ahead("SGConv is at least 2 points ahead of a kernel without decay", "sgconv", "flat", 2.0),
        ahead("SGConv is at least 5 points ahead of a local convolution", "sgconv", "local", 5.0),
        ahead("SGConv is at least as accurate as a free kernel", "sgconv", "free", 0.0),
        Check(
            "its kernels have at most a 20th of the free kernel's parameters",
            fewer >= 20,
            f"{kernel['sgconv']:.0f} and {kernel['free']:.0f} a channel, {fewer:.1f} times fewer; all arms: {words}",
        ),
        Check("time grows at most with the power 1.2 of the length", slope <= 1.2, f"{slope:.2f}"),
        ahead("in a small ConvNeXt SGConv is at most 1 point behind 7 x 7", "net_sgconv", "net_7x7", -1.0),
    ]
