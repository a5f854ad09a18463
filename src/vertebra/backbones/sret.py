"""SReT: a pyramid of transformers whose blocks are each applied twice, within slices of the tokens.

Shapes: images (B, 3, H, W) of any size to maps at strides 8, 16 and 32. Three convolutions make a map, learned
positions are added, and each stage applies every one of its blocks `loops` times in a row (`vertebra.blocks.recursive`)
with a projection of its own behind each application; attention is that of slices (`vertebra.blocks.sliced_attention`).
Between stages a depthwise convolution of stride 2 doubles the channels. Every sum x <- c x + d f(x), of a branch or a
projection, has two learned scalars.

`pooled` is the mean of the last tokens behind a norm; `tokens` are the last map's, without it. `depths` counts blocks
that have weights: the paper's depths are `depths` times `loops`.

Departs from the authors' code in evaluation: the order in which tokens are sliced at the second application is one and
the same for all images, where theirs is drawn at every call; `order="random"` is theirs. Beyond it: any size, with the
positions resized (bicubic) and slices that differ by one token; any number of loops; drop rates rise from block to
block in equal steps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.recursive import Kind, Scalars, Sum, recursive
from vertebra.blocks.rows import Dense
from vertebra.blocks.sliced_attention import Order, sliced_attention
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import DivergedError, ParityError, UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="sret",
    title="Sliced Recursive Transformer",
    year=2021,
    arxiv="2111.05297",
    reference="szq0214/SReT",
    licence="MIT",
    claim=(
        "about 2 points on ImageNet from applying blocks twice, at no cost in parameters; slices save 10 to 30 % of the"
        " compute at minimal loss; networks of 100 to 1000 shared layers remain trainable"
    ),
    note=(
        "Numbers, parity and effect are those of a fixed order in evaluation. The paper's 100 shared layers against 20"
        " on CIFAR-100 need a GPU and were not run; the soft-label distillation is a method and is not here."
    ),
)

VARIANTS = {
    "t": {"ratio": 3.6, "groups": ((8, 2), (4, 1), (1, 1))},
    "t_wo_slice": {"ratio": 3.6},
    "t_wo_slice_384": {"ratio": 3.6, "image_size": 384},
    "lt": {"ratio": 4.0, "groups": ((8, 2), (4, 1), (1, 1))},
    "lt_16_14": {"ratio": 4.0, "groups": ((16, 1), (14, 1), (1, 1))},
    "lt_wo_slice": {"ratio": 4.0},
    "s": {
        "dims": (126, 252, 504),
        "heads": (3, 6, 12),
        "ratio": 3.0,
        "projection_ratio": 2.0,
        "groups": ((8, 2), (4, 1), (1, 1)),
    },
    "s_wo_slice": {"dims": (126, 252, 504), "heads": (3, 6, 12), "ratio": 3.0, "projection_ratio": 2.0},
    "s_wo_slice_384": {
        "dims": (126, 252, 504),
        "heads": (3, 6, 12),
        "ratio": 3.0,
        "projection_ratio": 2.0,
        "image_size": 384,
    },
    "s_wo_slice_512": {
        "dims": (126, 252, 504),
        "heads": (3, 6, 12),
        "ratio": 3.0,
        "projection_ratio": 2.0,
        "image_size": 512,
    },
    "nano": {
        "dims": (48, 96, 192),
        "heads": (2, 4, 8),
        "depths": (2, 2, 1),
        "ratio": 3.0,
        "groups": ((8, 2), (4, 1), (1, 1)),
        "strides": (2, 1, 1),
        "image_size": 32,
    },
}


class SReTOptions(BackboneOptions, total=False):
    """Options; a variant sets the ratio, and what is not T's. Sequences have a number for each stage.

    Attributes:
        dims: widths; multiples of heads, and each a multiple of the one before it.
        heads: of the attention.
        depths: blocks with weights of their own.
        loops: applications of each block.
        ratio: hidden channels of a block's MLP, as a multiple of its width.
        projection: what follows each application; "none" repeats the block and no more.
        projection_ratio: hidden channels of a projection, as a multiple of its width.
        scalars: whether sums have learned scalars.
        groups: for each stage, slices of the first application of a block, of the second, and so on; the last number
            serves all that follow.
        order: of tokens in evaluation, from the second application on, as in `sliced_attention`.
        strides: of the three convolutions of the stem.
    """

    dims: Sequence[int]
    heads: Sequence[int]
    depths: Sequence[int]
    loops: int
    ratio: float
    projection: Kind
    projection_ratio: float
    scalars: Scalars
    groups: Sequence[Sequence[int]]
    order: Order
    strides: Sequence[int]


def sret(variant: str = "t", **options: Unpack[SReTOptions]) -> "SReT":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `SReTOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("sret", VARIANTS, variant, options, SReT)


class SReT(Backbone):
    """A stem, positions and stages of repeated blocks; build it with `sret`.

    Attributes:
        stem: three convolutions of 3 x 3, each with a norm and a ReLU.
        positions: (1, dims[0], H, W), for the grid of `preprocess.size`.
        stages: of each, its blocks in `Recursive`s.
        pools: between stages.
        norm: of the pooled vector.
        loops: applications of each block.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int] = (64, 128, 256),
        heads: Sequence[int] = (2, 4, 8),
        depths: Sequence[int] = (2, 5, 3),
        loops: int = 2,
        ratio: float,
        projection: Kind = "mlp",
        projection_ratio: float = 1.0,
        scalars: Scalars = "learned",
        groups: Sequence[Sequence[int]] | None = None,
        order: Order = "fixed",
        strides: Sequence[int] = (2, 2, 2),
        drop_path: float = 0.0,
    ) -> None:
        groups = tuple((1,) for _ in dims) if groups is None else groups
        _check(dims, heads, depths, groups, loops, ratio, strides, scalars)
        super().__init__()
        self.loops = loops
        self.stem = _stem(preprocess.channels, dims[0], strides)
        self.grid = _grid(preprocess.size, strides)
        self.positions = nn.Parameter(trunc_normal_(torch.empty(1, dims[0], *self.grid), std=0.02))
        self.stages, self.pools, seed = nn.ModuleList(), nn.ModuleList(), 0
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            dim, blocks = dims[stage], nn.ModuleList()
            for rate in rates:
                attn = sliced_attention(dim, heads=heads[stage], groups=groups[stage], order=order, seed=seed)
                block = Block(dim, attn, hidden=int(dim * ratio), scalars=scalars, drop_path=rate)
                again: Any = {"projection": projection, "ratio": projection_ratio, "scalars": scalars}
                blocks.append(recursive(block, dim, loops=loops, **again))
                seed += 1
            self.stages.append(blocks)
            if stage:
                before = dims[stage - 1]
                self.pools.append(nn.Conv2d(before, dim, 3, 2, 1, groups=before))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.levels = tuple(Level(dim, prod(strides) * 2**stage) for stage, dim in enumerate(dims))
        self.width, self.preprocess = dims[-1], preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x = self.stem(images)
        x, maps = x + placed(self.positions, (x.shape[2], x.shape[3])), []
        tokens = x
        for stage, blocks in enumerate(self.stages):
            x = self.pools[stage - 1](x) if stage else x
            tokens = x.flatten(2).mT  # (B, H * W, C)
            for block in blocks:  # type: ignore[union-attr]
                tokens = block(tokens)
            x = tokens.mT.unflatten(2, x.shape[2:])
            maps.append(x)
        return Features(tuple(maps), self.norm(tokens.mean(1)), tokens)

    def trunk(self) -> list[nn.Module]:
        """The stem, then pools and blocks stage by stage, and the norm; the positions are in none of them."""
        parts: list[nn.Module] = [self.stem]
        for stage, blocks in enumerate(self.stages):
            parts += [self.pools[stage - 1]] if stage else []
            parts += blocks  # type: ignore[arg-type]
        return [*parts, self.norm]


def _check(
    dims: Sequence[int],
    heads: Sequence[int],
    depths: Sequence[int],
    groups: Sequence[Sequence[int]],
    loops: int,
    ratio: float,
    strides: Sequence[int],
    scalars: str,
) -> None:
    if not len(dims) == len(heads) == len(depths) == len(groups):
        raise UsageError(
            f"sret: dims is {dims}, heads {heads}, depths {depths} and groups {groups}; give one entry a stage to each"
        )
    check_at_least("sret", 1, dims=dims, heads=heads, depths=depths, loops=loops, strides=strides)
    if len(strides) != 3:
        raise UsageError(f"sret: strides is {strides}; the stem has three convolutions, as (2, 2, 2)")
    if scalars not in get_args(Scalars):
        raise UsageError(f"sret: scalars is {scalars!r}; it can be {' or '.join(get_args(Scalars))}")
    if dims[0] < 2 or dims[0] * ratio < 1:
        raise UsageError(f"sret: dims is {dims} and ratio {ratio}; the first dim is at least 2, dims times ratio 1")
    for number, dim in enumerate(dims):
        if dim % heads[number] or (number and dim % dims[number - 1]):
            raise UsageError(
                f"sret: dims is {dims} and heads {heads}; each dim is a multiple of its heads and of the dim before it"
            )


def _stem(channels: int, dim: int, strides: Sequence[int]) -> nn.Sequential:
    """Three convolutions of 3 x 3 with biases, norms and ReLUs."""
    layers: list[nn.Module] = []
    for before, after, stride in zip((channels, dim // 2, dim), (dim // 2, dim, dim), strides, strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _grid(size: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Cells of the stem's map for images of a size."""
    height, width = size
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    return height, width


def placed(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, dim, H, W), resized where a map has another grid (bicubic)."""
    if tuple(positions.shape[2:]) == grid:
        return positions
    return interpolate(positions.float(), grid, mode="bicubic", align_corners=False).to(positions.dtype)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the attention is given.
        attn: within slices.
        sum1: of the shortcut and the attention.
        norm2: of what the MLP is given.
        mlp: two linear layers with GELU between them.
        sum2: of the shortcut and the MLP.
    """

    def __init__(self, dim: int, attn: nn.Module, *, hidden: int, scalars: Scalars, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = nn.Sequential(Dense(dim, hidden), nn.GELU(), Dense(hidden, dim))
        self.sum1, self.sum2 = Sum(scalars), Sum(scalars)
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        """Tokens (B, N, dim) to the same; `loop` is the number of the application."""
        x = self.sum1(x, self.drop(self.attn(self.norm1(x), loop)))
        return self.sum2(x, self.drop(self.mlp(self.norm2(x))))


def published(state: Mapping[str, Tensor], backbone: SReT) -> dict[str, Tensor]:
    """The authors' released weights (szq0214/SReT) under our names; their classifier is left out.

    A block is there once for each of its applications, always with the same weights. Positions are resized to the grid
    of `backbone`.

    Args:
        state: tensors of a checkpoint, as `torch.load(..., weights_only=True)` gives them under "model".
        backbone: of `sret`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = _renamed(name.removeprefix("module."), backbone.loops)
        if ours in found and not torch.equal(found[ours], tensor):
            raise ParityError(f"{name} differs from the other applications of its block: their weights are one")
        found[ours] = tensor
    table = found.get("positions")
    if table is not None and table.ndim == 4:
        found["positions"] = placed(table, backbone.grid)
    return convert(found, [(r"^head\.", None)], backbone)


def _renamed(name: str, loops: int) -> str:
    """Our name; those of all applications of a block become one."""
    for theirs, ours in _NAMES.items():
        name = re.sub(theirs, ours, name)
    found = re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.(.*)", name)
    if not found:
        return name
    stage, number, rest = found[1], int(found[2]), found[3]
    block, loop = divmod(number // 2, loops)
    if number % 2 == 0:
        return f"stages.{stage}.{block}.layer.{rest}"
    rest = rest.replace("norm1.", "norm.").replace("sum1.", "sum.")
    return f"stages.{stage}.{block}.projections.{loop}.{rest}"


_NAMES = {
    r"^patch_embed\.conv1\.": "stem.0.",
    r"^patch_embed\.bn1\.": "stem.1.",
    r"^patch_embed\.conv2\.": "stem.3.",
    r"^patch_embed\.bn2\.": "stem.4.",
    r"^patch_embed\.conv3\.": "stem.6.",
    r"^patch_embed\.bn3\.": "stem.7.",
    r"^pos_embed$": "positions",
    r"^pools\.(\d+)\.conv\.": r"pools.\1.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    r"\.coefficient1\.bias$": ".sum1.shortcut",
    r"\.coefficient2\.bias$": ".sum1.branch",
    r"\.coefficient3\.bias$": ".sum2.shortcut",
    r"\.coefficient4\.bias$": ".sum2.branch",
}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains.

    Attributes:
        network: options of the smallest variant.
        images: training images at most; tested on half as many.
        epochs: of each arm but the deep one.
        deep: epochs of the deep one.
    """

    network: Mapping[str, Any]
    images: int
    epochs: int
    deep: int


_SETTINGS = {
    "toy": _Setting({"dims": (16, 32, 64), "heads": (1, 2, 4), "image_size": 16}, 2000, 12, 4),
    "gpu": _Setting({}, 50_000, 60, 60),
}

_WHOLE = {"groups": ((1,), (1,), (1,))}
_ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "half": (
        "each block once, with MLPs as much wider as gives equal parameters",
        {**_WHOLE, "loops": 1, "ratio": 4.0},
    ),
    "recursive": ("each block twice, with projections and scalars; attention to all tokens", _WHOLE),
    "sliced": ("the same in slices: 8 and 2 in the first stage, 4 and 1 in the second", {}),
    "naive": ("each block twice, and nothing between", {**_WHOLE, "projection": "none", "scalars": "none"}),
    "unshared": (
        "as deep as recursive, with weights for each application",
        {**_WHOLE, "loops": 1, "depths": (4, 4, 2)},
    ),
    "deep": ("four blocks, each twelve times", {**_WHOLE, "loops": 12, "depths": (1, 2, 1)}),
}
_METRICS = {
    "top1": "%", "nll": "", "params": "M", "macs": "M", "first": "", "last": "", "diverged": "", "seconds": "",
}  # fmt: skip


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Blocks applied twice beside once, beside unshared ones and beside slices, and four blocks twelve times."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)
    chance = 100 / len(train.classes)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    def checks(measured: Measured) -> Sequence[Check]:
        return _checks(measured, chance)

    size = _arm("sliced", setting).preprocess.size[0]
    return Effect(
        claim=(
            "a block applied twice with the same weights is better than one applied once at equal parameters; slices"
            " save compute and next to no accuracy; four blocks of 48 applications can be trained"
        ),
        arms={arm: what for arm, (what, _) in _ARMS.items()},
        baseline="half",
        metrics=_METRICS,
        measure=measure,
        checks=checks,
        limits=(
            f"{len(train)} images of {size} pixels, {setting.epochs} epochs ({setting.deep} of the deep network, which"
            " is asked to learn and for no accuracy): differences of a point or two need more seeds than three. A"
            " short training favours few layers, and attention has few tokens, so that slices save less than at 224"
            " pixels. Slices are evaluated in one fixed order"
        ),
        data=words,
    )


def _arm(arm: str, setting: _Setting) -> SReT:
    return sret("nano", **{**setting.network, **_ARMS[arm][1]})  # type: ignore[misc]


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.training.cost import count

    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    cost = count(backbone)
    epochs = setting.deep if arm == "deep" else setting.epochs
    plan = Plan(epochs=epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    found = {**dict.fromkeys(_METRICS, float("nan")), "params": cost.params / 1e6, "macs": cost.macs / 1e6}
    try:
        result = trained(backbone, train, test, plan)
    except DivergedError:
        return {**found, "diverged": 1.0}
    rows = result.history.rows
    found |= {name: result.scores[name] for name in ("top1", "nll", "seconds")}
    return {**found, "diverged": 0.0, "first": rows[0]["loss"], "last": rows[-1]["loss"]}


def _checks(measured: Measured, chance: float) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in _ARMS}
    gains, slices = measured.gain("recursive", "half", "top1"), measured.gain("sliced", "recursive", "top1")
    share = 100 * measured.mean("sliced", "macs") / measured.mean("recursive", "macs")
    first, last = measured.values["deep"]["first"], measured.values["deep"]["last"]
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    params = measured.mean("recursive", "params"), measured.mean("unshared", "params")
    return [
        Check(
            "applied twice, blocks gain at least 1 point over once at equal parameters",
            bool(gains.mean() >= 1),
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); all arms: {words};"
            f" {params[0]:.3f} M parameters, {params[1]:.3f} unshared",
        ),
        Check(
            "slices lose at most 0.7 points",
            bool(slices.mean() >= -0.7),
            f"{slices.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in slices)})",
        ),
        Check("slices take at most 90 % of the multiply-accumulates", share <= 90, f"{share:.1f} %"),
        Check(
            "four blocks of 48 applications train: in every seed the loss stays finite and falls, and top-1 is above"
            " twice chance",
            not measured.values["deep"]["diverged"].any() and bool((last < first).all()) and mean["deep"] > 2 * chance,
            f"loss {first.mean():.3f} in the first epoch, {last.mean():.3f} in the last; top-1 {mean['deep']:.2f} %,"
            f" chance {chance:.1f}",
        ),
    ]
