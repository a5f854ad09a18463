"""TiC after the abstract: a convolutional pyramid whose layers are MSA-Conv, attention inside of a convolution.

Shapes: images (B, 3, H, W) of any size to maps at strides 4, 8, 16, 32; sides are rounded up. A block is MSA-Conv
(`vertebra.blocks.msa_conv`) and two linear layers, each behind a norm and beside a shortcut; MSA-Conv of stride 2 lies
between the stages. No part knows positions or sizes. Only the operator of TiC (arXiv 2310.04134) is published: the
network, its sizes, and the two mechanisms that widen the field are made here after the paper's abstract.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.msa_conv import Pooling, Shift, msa_conv
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess, TaskModel
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="tic",
    title="TiC: Exploring Vision Transformer in Convolution (MSA-Conv)",
    year=2023,
    arxiv="2310.04134",
    reference="zs670980918/MSA-Conv",
    licence="none stated",
    claim=(
        "self-attention inside a convolution takes images of any size without retraining, costs less than global "
        "attention, and with the shift and the pooling is comparable to the state of the art on ImageNet; no figure"
    ),
    numbers="parameters and MACs by the operator's formula: the network was never released",
    parity="golden outputs and gradients of the authors' operator (`vertebra.blocks.msa_conv`)",
    note=(
        "The network is after the abstract, no reproduction: its sizes, heads, the cyclic shift and the pooling are "
        "ours. The run of 100 classes at 64 pixels beside an equal Swin needs a GPU and was not made."
    ),
)

VARIANTS = {
    "tiny": {"dims": (64, 128, 256, 512), "depths": (2, 2, 4, 2)},
    "nano": {"dims": (32, 64, 128), "depths": (2, 2, 2), "patch": 2, "image_size": 32},
}

Layer = Callable[[int, int, int, int], nn.Module]
"""(channels, outputs, stride, number of the layer) -> a module of maps."""


class TicOptions(BackboneOptions, total=False):
    """Options.

    Attributes:
        dims: channels, one a stage.
        depths: blocks, one a stage.
        patch: stride of the stem, 2 or 4.
        kernel: odd side of windows and convolutions, in cells.
        ratio: hidden channels of the linear layers as a multiple of the stage's.
        dropout: of attention weights, 0..1.
        shift: of groups of keys and values, as for `msa_conv`.
        pooling: likewise; "average" is the default.
        layer: in place of MSA-Conv.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    patch: Literal[2, 4]
    kernel: int
    ratio: float
    dropout: float
    shift: Shift
    pooling: Pooling
    layer: Layer | None


def tic(variant: str = "tiny", **options: Unpack[TicOptions]) -> "TiC":
    """Build a variant; both mechanisms are on.

    Args:
        variant: one of `VARIANTS`.
        options: as in `TicOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("tic", VARIANTS, variant, options, TiC)


class TiC(Backbone):
    """Stages of blocks; build it with `tic`.

    Attributes:
        stem: image to the first map.
        downs: norm and MSA-Conv of stride 2, between the stages.
        stages: blocks.
        norm: of the last map, before it is pooled.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        patch: Literal[2, 4] = 4,
        kernel: int = 3,
        ratio: float = 4.0,
        dropout: float = 0.1,
        shift: Shift = "back",
        pooling: Pooling = "average",
        drop_path: float = 0.0,
        layer: Layer | None = None,
    ) -> None:
        check_at_least("tic", 1, dims=dims, depths=depths)
        if len(dims) != len(depths):
            raise UsageError(
                f"tic: dims is {tuple(dims)} and depths {tuple(depths)}; they need one number a stage each"
            )
        if patch not in (2, 4) or ratio <= 0:
            raise UsageError(f"tic: patch is {patch} and ratio {ratio}; patch must be 2 or 4, and ratio above 0")

        def attention(channels: int, outputs: int, stride: int, number: int) -> nn.Module:
            return msa_conv(
                channels,
                outputs=outputs,
                kernel=kernel,
                stride=stride,
                heads=max(1, channels // 32),
                dropout=dropout,
                shift=shift,
                pooling=pooling,
            )

        super().__init__()
        make, rates, number = layer or attention, drop_rates(drop_path, depths), 0
        self.stem = _stem(preprocess.channels, dims[0], patch)
        self.downs, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage:
                before = dims[stage - 1]
                self.downs.append(nn.Sequential(nn.BatchNorm2d(before), make(before, dim, 2, number)))
            places = range(number, number + depth)
            number += depth
            self.stages.append(
                nn.Sequential(
                    *(Block(make(dim, dim, 1, place), dim, ratio, rates[stage][place - places[0]]) for place in places)
                )
            )
        self.norm = nn.BatchNorm2d(dims[-1])
        self.levels = tuple(Level(dim, patch * 2**stage) for stage, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage, blocks in enumerate(self.stages):
            x = blocks(self.downs[stage - 1](x) if stage else x)
            maps.append(x)
        return Features(tuple(maps), self.norm(x).mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, each stage with what leads to it, and the norm."""
        stages: list[nn.Module] = [self.stem, *self.stages[0]]  # type: ignore[misc]
        for down, blocks in zip(self.downs, list(self.stages)[1:], strict=True):
            stages += [down, *blocks]  # type: ignore[misc]
        return [*stages, self.norm]


class Block(nn.Module):
    """A layer that mixes places and two linear layers, each behind a norm and beside a shortcut.

    Attributes:
        mix: MSA-Conv, or another layer that keeps the shape.
        mlp: of each place by itself.
    """

    def __init__(self, layer: nn.Module, channels: int, ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden = round(ratio * channels)
        self.mix = nn.Sequential(nn.BatchNorm2d(channels), layer)
        self.mlp = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        x = x + self.drop_path(self.mix(x))
        return x + self.drop_path(self.mlp(x))


def _stem(channels: int, dim: int, patch: int) -> nn.Sequential:
    """Convolutions of 3 x 3 and stride 2, with half the channels first where there are two."""
    widths = (channels, dim) if patch == 2 else (channels, max(1, dim // 2), dim)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Windowed(nn.Module):
    """Attention within windows of 4 x 4 cells, every second layer with shifted ones, as Swin has it; for the effect."""

    def __init__(self, channels: int, number: int) -> None:
        from vertebra.blocks.window_attention import window_attention

        super().__init__()
        self.attention = window_attention(channels, side=4, shift=2 * (number % 2), heads=max(1, channels // 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class _Global(nn.Module):
    """Attention of every cell to every other, with a learned table of positions that is interpolated; for the effect.

    Attributes:
        table: (1, C, side, side).
    """

    def __init__(self, channels: int, side: int) -> None:
        from vertebra.blocks.attention import attention

        super().__init__()
        self.attention = attention(channels, heads=max(1, channels // 32))
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, side, side), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        places = self.table
        if places.shape[2:] != x.shape[2:]:
            places = interpolate(places, x.shape[2:], mode="bicubic", align_corners=False)
        tokens = (x + places).flatten(2).mT  # (B, H * W, C)
        return self.attention(tokens).mT.unflatten(2, x.shape[2:])


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: the net, images, epochs."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    images: int
    epochs: int


_SETTINGS = {
    "toy": _Setting((16, 32, 64), (1, 2, 1), 2000, 12),
    "gpu": _Setting((32, 64, 128), (2, 2, 2), 50_000, 60),
}

_ARMS: Mapping[str, str] = {
    "conv": "3 x 3 convolution in place of MSA-Conv",
    "window": "attention in shifted windows of 4 x 4",
    "global": "attention to all, with positions",
    "msa": "MSA-Conv, neither mechanism",
    "shift": "MSA-Conv with the cyclic shift",
    "pool": "MSA-Conv with the pooling",
    "both": "MSA-Conv with both",
}

_SIZES = {"24": (24, 24), "40": (40, 40), "48": (48, 48), "64": (64, 64), "32x64": (32, 64)}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """MSA-Conv and its two mechanisms beside convolution, shifted windows and global attention."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)
    sizes = {f"at_{name}": "%" for name in _SIZES}

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "attention inside a convolution is as good as either, takes any size without new weights, costs in "
            "proportion to the pixels, and gains from a cyclic shift and from pooling, which widen its field"
        ),
        arms=_ARMS,
        baseline="msa",
        metrics={"top1": "%", "nll": "", **sizes, "outside": "%", "growth": "", "params": "M", "seconds": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of 32 pixels, {setting.epochs} epochs, {sum(setting.depths)} blocks from stride 2: "
            "differences of a point or less need more seeds than three, and gains of 0.2 points cannot be told from "
            "none; other sizes are the same images, cropped or mirrored at the edge; growth is of a lone layer of 32 "
            "channels on one thread"
        ),
        data=words,
    )


def _layer(arm: str, channels: int, outputs: int, stride: int, number: int, *, side: int) -> nn.Module:
    """A layer of an arm; `side` is that of the map in cells, which positions are learnt for."""
    if arm in ("conv", "window", "global") and (arm == "conv" or stride > 1):
        return nn.Sequential(nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.ReLU())
    if arm == "window":
        return _Windowed(channels, number)
    if arm == "global":
        return _Global(channels, side)
    shift: Shift = "back" if arm in ("shift", "both") else "none"
    pooling: Pooling = "average" if arm in ("pool", "both") else "none"
    heads = max(1, channels // 32)
    return msa_conv(channels, outputs=outputs, stride=stride, heads=heads, shift=shift, pooling=pooling)


def _arm(arm: str, setting: _Setting) -> TiC:
    sides = {dim: 16 // 2**stage for stage, dim in enumerate(setting.dims)}
    return tic(
        "nano",
        dims=setting.dims,
        depths=setting.depths,
        layer=lambda c, o, s, n: _layer(arm, c, o, s, n, side=sides[c]),
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, weight_decay=0.025, views=Views(scale=(0.6, 1.0)), seed=seed)
    found = trained(backbone, train, test, plan)
    sizes = {f"at_{name}": _top1(found.model, test, size) for name, size in _SIZES.items()}
    params = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    scores = {name: found.scores[name] for name in ("top1", "nll", "seconds")}
    return {**scores, **sizes, "outside": _outside(arm), "growth": _growth(arm), "params": params}


def _top1(model: TaskModel, test: Split, size: tuple[int, int]) -> float:
    """Percent right on the same images at another size: what lies within is cropped, what lies beyond is mirrored."""
    from vertebra.data.loader import Batches

    right = 0
    batches = Batches(test, model.backbone.preprocess, views=None, batch=256, seed=0, workers=0)
    for batch in batches.epoch(0):
        images = batch.images
        more = [wanted - side for wanted, side in zip(size, images.shape[2:], strict=True)]
        margins = (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2)
        images = pad(images, margins, mode="reflect" if min(margins) >= 0 else "constant")
        with torch.inference_mode():
            right += int((model(images)["logits"].argmax(1) == batch.targets).sum())
    return 100 * right / len(test)


def _outside(arm: str, side: int = 33) -> float:
    """Percent of what the centre cell of two layers listens to that lies outside of the bare field, 9 cells wide."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(_layer(arm, 32, 32, 1, number, side=side) for number in range(2))).eval()
    x = torch.randn(8, 32, side, side, requires_grad=True)
    (heard,) = torch.autograd.grad(layers(x)[:, :, side // 2, side // 2].sum(), x)
    heard = heard.double().abs().sum((0, 1))
    total, inner = heard.sum(), slice(side // 2 - 4, side // 2 + 5)
    heard[inner, inner] = 0
    return float(100 * heard.sum() / total)


def _growth(arm: str) -> float:
    """Processor time of a layer on four times the cells, 64 x 64 over 32 x 32; the least of a few tries each."""
    layer = _layer(arm, 32, 32, 1, 0, side=32).eval()
    least = []
    for side in (32, 64):
        x, tries = torch.randn(4, 32, side, side), []
        for _ in range(5):
            started = time.process_time()
            with torch.inference_mode():
                layer(x)
            tries.append(time.process_time() - started)
        least.append(min(tries))
    return least[1] / least[0]


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in _ARMS}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    checks = [
        Check(
            f"MSA-Conv is at most 0.5 points behind {what}",
            mean["msa"] >= mean[arm] - 0.5,
            f"{mean['msa'] - mean[arm]:+.2f} points; all arms: {words}",
        )
        for arm, what in (("conv", "convolution"), ("window", "shifted windows"))
    ]
    for arm, what in (("shift", "the cyclic shift"), ("pool", "the pooling")):
        gains = measured.gain(arm, "msa", "top1")
        seeds = ", ".join(f"{gain:+.2f}" for gain in gains)
        checks.append(
            Check(
                f"{what} gains at least 0.2 points", bool(gains.mean() >= 0.2), f"{gains.mean():+.2f} (seeds: {seeds})"
            )
        )
    rest = max(mean[arm] for arm in ("msa", "shift", "pool"))
    checks.append(
        Check("both together are the best", mean["both"] >= rest, f"{mean['both'] - rest:+.2f} points from the next")
    )
    return [*checks, *_size_checks(measured), *_field_checks(measured), _growth_check(measured)]


def _size_checks(measured: Measured) -> list[Check]:
    drops = {
        arm: [measured.mean(arm, "top1") - measured.mean(arm, f"at_{name}") for name in ("40", "48")]
        for arm in ("both", "global")
    }
    both, other = (sum(drops[arm]) / 2 for arm in ("both", "global"))
    found = f"{both:.2f} points, global attention {other:.2f}, over 40 and 48 pixels"
    return [Check("other sizes cost less than they cost global attention", both < other, found)]


def _field_checks(measured: Measured) -> list[Check]:
    out = {arm: measured.mean(arm, "outside") for arm in ("msa", "shift", "pool")}
    bare = Check("the bare field ends where it must", out["msa"] == 0, f"{out['msa']:.3g} % lies outside")
    wide = "shift and pooling reach beyond the bare field, with at least 1 % of what is heard"
    return [bare, Check(wide, min(out["shift"], out["pool"]) >= 1, f"{out['shift']:.1f} and {out['pool']:.1f} %")]


def _growth_check(measured: Measured) -> Check:
    ours, other = measured.mean("msa", "growth"), measured.mean("global", "growth")
    return Check(
        "time grows with the cells: 3.5 to 4.8 times for four times as many, 12 or more for global attention",
        3.5 <= ours <= 4.8 and other >= 12,
        f"{ours:.1f} and {other:.1f}; with both mechanisms {measured.mean('both', 'growth'):.1f}",
    )
