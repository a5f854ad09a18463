"""PVT: a pyramid of transformers, whose attention asks at full resolution and answers at a reduced one.

Shapes: images (B, 3, H, W) of any size to maps at strides 4, 8, 16 and 32. A stage cuts its input into patches, adds
learned positions, and runs blocks of spatial-reduction attention (`vertebra.blocks.spatial_reduction_attention`) and a
feed-forward, each behind a norm.

`pooling` says what a classifier reads: "token" (the class token of the last stage, as in the paper's classifiers) or
"mean" (no class token, as in the authors' detectors: then the four maps are theirs). Maps have no norm behind them;
`pooled` and `tokens` have one. One stage is a plain ViT.

Departs from the paper at sizes that are no multiple of 32: patches and reductions that do not fit are padded with zeros
at the bottom and on the right, where the authors' code leaves out what remains, up to 31 pixels. Positions are resized
wherever the grid differs from the one that they were learnt on; the authors' code takes any grid with as many cells as
the first stage's for that one, and cannot run at twice the size that it was built for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.positions import fitted
from vertebra.blocks.rows import Dense
from vertebra.blocks.spatial_reduction_attention import spatial_reduction_attention
from vertebra.blocks.windows import Sides
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.growth import peak, seconds
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="pvt",
    title="Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
    year=2021,
    arxiv="2102.12122",
    reference="whai362/PVT",
    licence="Apache-2.0",
    claim=(
        "RetinaNet with PVT-Small 40.4 AP on COCO against 36.3 with ResNet-50 at comparable parameters; ImageNet top-1"
        " 75.1, 79.8, 81.2 and 81.7 %"
    ),
    note=(
        "The claim is of detection, and its effect waits for a detector: until then the pyramid is compared with one"
        " column and with a ResNet by classification, and its attention with full attention by time and memory. PVTv2"
        " is another network, timm's (`timm/pvt_v2_b0` to `b5`)."
    ),
)

VARIANTS = {
    "small": {"depths": (3, 4, 6, 3)},
    "tiny": {"depths": (2, 2, 2, 2)},
    "medium": {"depths": (3, 4, 18, 3)},
    "large": {"depths": (3, 8, 27, 3)},
    "nano": {"depths": (2, 2, 2, 2), "dims": (16, 32, 80, 128), "patches": (2, 2, 2, 2), "image_size": 32},
}

Pooling = Literal["token", "mean"]


class PVTOptions(BackboneOptions, total=False):
    """Options; a variant sets depths. All sequences have a number for each stage.

    Attributes:
        dims: widths; multiples of heads.
        depths: blocks.
        heads: of the attention.
        ratios: hidden channels of the feed-forward for each of its own.
        reductions: R, how many times smaller the map of keys and values is on each side.
        patches: sides of the patches that a stage's input is cut into.
        pooling: what a classifier reads, the class "token" or the "mean" of the last map's tokens.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    ratios: Sequence[float]
    reductions: Sequence[int]
    patches: Sequence[int]
    pooling: Pooling


def pvt(variant: str = "small", **options: Unpack[PVTOptions]) -> "PVT":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `PVTOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("pvt", VARIANTS, variant, options, PVT)


class PVT(Backbone):
    """Stages of patches and blocks; build it with `pvt`.

    Attributes:
        embeds: what cuts each stage's input into patches, with its positions.
        stages: blocks of each stage.
        norm: of the last stage's tokens.
        prefix: tokens in front of the last map's: the class token, or none.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embeds.0.conv", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depths: Sequence[int],
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        patches: Sequence[int] = (4, 2, 2, 2),
        pooling: Pooling = "token",
        drop_path: float = 0.0,
    ) -> None:
        each = {"depths": depths, "dims": dims, "heads": heads, "reductions": reductions, "patches": patches}
        _check(pooling, ratios, each)
        super().__init__()
        last = len(dims) - 1
        self.prefix = int(pooling == "token")
        self.embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        channels, grid = preprocess.channels, preprocess.size
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            patch, dim, prefix = patches[stage], dims[stage], self.prefix if stage == last else 0
            grid = -(-grid[0] // patch), -(-grid[1] // patch)
            self.embeds.append(Embed(channels, dim, patch=patch, grid=grid, prefix=prefix))
            asked = {"heads": heads[stage], "reduction": reductions[stage], "prefix": prefix, "ratio": ratios[stage]}
            self.stages.append(nn.ModuleList(Block(dim, **asked, drop_path=rate) for rate in rates))
            channels = dim
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.levels = tuple(Level(dim, prod(patches[: stage + 1])) for stage, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess
        self.apply(_start)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        maps = [images]
        tokens = images
        for embed, blocks in zip(self.embeds, self.stages, strict=True):
            tokens, grid = embed(maps[-1])
            for block in blocks:  # type: ignore[union-attr]
                tokens = block(tokens, grid)
            cells = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
            maps.append(cells.mT.unflatten(2, grid))
        tokens = self.norm(tokens)
        return Features(tuple(maps[1:]), tokens[:, 0] if self.prefix else tokens.mean(1), tokens)

    def trunk(self) -> list[nn.Module]:
        """The patches and the blocks, stage by stage, and the norm."""
        stages = zip(self.embeds, self.stages, strict=True)
        parts: list[nn.Module] = [part for embed, blocks in stages for part in (embed, *blocks)]  # type: ignore[misc]
        return [*parts, self.norm]


def _check(pooling: str, ratios: Sequence[float], each: Mapping[str, Sequence[int]]) -> None:
    if pooling not in get_args(Pooling):
        raise UsageError(f"pvt: pooling is {pooling!r}; it can be {' or '.join(get_args(Pooling))}")
    stages = len(each["depths"])
    for name, numbers in {**each, "ratios": ratios}.items():
        if len(numbers) != stages:
            raise UsageError(
                f"pvt: {name} is {numbers} and depths is {each['depths']}; give one number a stage to each"
            )
    check_at_least("pvt", 1, **each)
    if min(ratios) <= 0:
        raise UsageError(f"pvt: ratios is {ratios}; each must be above 0")
    for dim, heads in zip(each["dims"], each["heads"], strict=True):
        if dim % heads:
            raise UsageError(f"pvt: {heads} heads do not divide dim {dim}; dims are multiples of heads, stage by stage")


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Embed(nn.Module):
    """Patches of a map as tokens, with what tells their places.

    Attributes:
        conv: of kernel and stride p.
        norm: of each patch.
        positions: (1, prefix + N, dim), learnt on `grid`.
        class_token: (1, 1, dim); None where there is none.
    """

    def __init__(self, channels: int, dim: int, *, patch: int, grid: Sides, prefix: int) -> None:
        super().__init__()
        self.patch, self.grid, self.prefix = patch, grid, prefix
        self.conv = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the norms of the blocks
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prefix + prod(grid), dim), std=0.02))
        token = nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02) if prefix else None
        self.class_token = None if token is None else nn.Parameter(token)

    def forward(self, maps: Tensor) -> tuple[Tensor, Sides]:
        """Maps (B, channels, H, W) to tokens (B, prefix + N, dim) and the sides of their grid."""
        more = [-side % self.patch for side in maps.shape[2:]]
        x = self.conv(pad(maps, (0, more[1], 0, more[0])) if any(more) else maps)
        grid = x.shape[2], x.shape[3]
        x = self.norm(x.flatten(2).mT)
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), -1, -1), x), 1)
        return x + fitted(self.positions, self.grid, grid, self.prefix, mode="bilinear"), grid


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the attention is given.
        attn: spatial-reduction attention.
        norm2: of what the feed-forward is given.
        mlp: the feed-forward.
    """

    def __init__(self, dim: int, *, heads: int, reduction: int, prefix: int, ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = spatial_reduction_attention(dim, heads=heads, reduction=reduction, prefix=prefix)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * ratio))
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Sides) -> Tensor:
        """Tokens (B, prefix + H * W, dim) of a grid (H, W) to tokens of the same shape."""
        x = x + self.drop(self.attn(self.norm1(x), grid))
        return x + self.drop(self.mlp(self.norm2(x)))


_PIECE = 2**20
"""Hidden numbers (4 MB) that a feed-forward makes at a time on a CPU, where they would be many: memory that is used
again at once makes up to twice the speed of new memory that has to be fetched."""


class FeedForward(nn.Module):
    """Two linear layers with GELU between them.

    Attributes:
        widen: to the hidden channels.
        narrow: back.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.widen, self.act, self.narrow = Dense(dim, hidden), nn.GELU(), Dense(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens of the same shape."""
        many = x.shape[0] * x.shape[1] * self.hidden >= 4 * _PIECE
        if not many or x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._whole(x)
        pieces = x.flatten(0, 1).split(max(1, _PIECE // self.hidden))
        return torch.cat([self._whole(piece) for piece in pieces]).view_as(x)

    def _whole(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.widen(x)))


def published(state: Mapping[str, Tensor], backbone: PVT) -> dict[str, Tensor]:
    """Released classifiers under our names, the authors' (whai362/PVT) or those of transformers' `PvtModel`.

    Positions are resized to the grids of `backbone`, and the classifier is left out; a backbone that pools the mean
    leaves out the class token too.

    Args:
        state: tensors of a checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `pvt`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    tensors = dict(state)
    for name, tensor in state.items():
        if found := _POSITIONS.search(name):
            stage = int(found[1]) - 1 if found[1] else int(found[2])
            if stage < len(backbone.embeds):
                tensors[name] = _placed(tensor, backbone.embeds[stage])  # type: ignore[arg-type]
        if ".self.key." in name and (values := name.replace(".key.", ".value.")) in state:
            tensors[name.replace(".key.", ".kv.")] = torch.cat((tensors.pop(name), tensors.pop(values)))
    return convert(tensors, _rules(backbone), backbone)


def _placed(table: Tensor, embed: Embed) -> Tensor:
    """Positions of a square grid, with or without the class token's, for an embedding; of any other as they are."""
    if table.shape == embed.positions.shape:
        return table
    token = int(isqrt(table.shape[1]) ** 2 != table.shape[1])
    side = isqrt(table.shape[1] - token)
    if side * side != table.shape[1] - token:
        return table
    prefix = min(token, embed.prefix)
    return fitted(table[:, token - prefix :], (side, side), embed.grid, prefix, mode="bilinear")


_POSITIONS = re.compile(r"pos_embed(\d+)$|(?:patch_embeddings|embeds)\.(\d+)\.position(?:_embedding)?s$")

_NAMES: Rules = (
    (r"^pvt\.encoder\.patch_embeddings\.", "embeds."),
    (r"^pvt\.encoder\.block\.", "stages."),
    (r"^pvt\.encoder\.layer_norm\.", "norm."),
    (r"\.position_embeddings$", ".positions"),
    (r"\.cls_token$", ".class_token"),
    (r"\.projection\.", ".conv."),
    (r"\.layer_norm_([12])\.", r".norm\1."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.attn\.sr\.", ".attn.reduce."),
    (r"\.mlp\.(?:fc|dense)1\.", ".mlp.widen."),
    (r"\.mlp\.(?:fc|dense)2\.", ".mlp.narrow."),
)
"""transformers' names, and where both have a place in common the authors' too."""


def _rules(backbone: PVT) -> Rules:
    rules: list[tuple[str, str | None]] = [(r"^module\.", ""), (r"^(head|classifier)\.", None)]
    if not backbone.prefix:
        rules.append((r"(^|\.)(cls|class)_token$", None))
    last = len(backbone.stages) - 1
    for stage in range(last + 1):  # the authors count from 1
        rules += [
            (rf"^patch_embed{stage + 1}\.proj\.", f"embeds.{stage}.conv."),
            (rf"^patch_embed{stage + 1}\.norm\.", f"embeds.{stage}.norm."),
            (rf"^pos_embed{stage + 1}$", f"embeds.{stage}.positions"),
            (rf"^block{stage + 1}\.", f"stages.{stage}."),
        ]
    return [*rules, (r"^cls_token$", f"embeds.{last}.class_token"), *_NAMES]


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains.

    Attributes:
        pvt: options of the pyramid.
        vit: of one stage, with as many parameters.
        resnet: blocks a stage and width of a residual network, likewise; its stem has stride 2.
        size: of the images in pixels.
        images: training images at most.
        epochs: of each arm.
    """

    pvt: Mapping[str, Any]
    vit: Mapping[str, Any]
    resnet: Mapping[str, int]
    size: int
    images: int
    epochs: int


_COLUMN = {"ratios": (4,), "reductions": (1,), "patches": (8,)}
_SETTINGS = {
    "toy": _Setting(
        {}, {"depths": (5,), "dims": (112,), "heads": (7,), **_COLUMN}, {"blocks": 2, "width": 34}, 32, 2000, 12
    ),
    "gpu": _Setting(
        {"dims": (32, 64, 160, 256), "heads": (1, 2, 5, 8)},
        {"depths": (7,), "dims": (192,), "heads": (6,), **_COLUMN},
        {"blocks": 3, "width": 55},
        64,
        50_000,
        100,
    ),
}

_ARMS: Mapping[str, str] = {
    "pvt": "four stages with spatial-reduction attention",
    "full": "the same with attention to every token, and so without the convolutions that reduce",
    "vit": "one stage of patches of 8 x 8 pixels, as the third one of the pyramid sees; as many parameters",
    "resnet": "residual network of three stages from stride 2, as many parameters",
}
_SIDE, _DIM, _REDUCTION = 64, 64, 8
"""Tokens a side, width and reduction of the attention that is measured, one head as in the paper's first stage."""
_SHARES = ("faster", "leaner", "faster_plain", "leaner_fused")


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The pyramid beside one column and a residual network, and its attention beside full attention."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "attention to a reduced map makes a pyramid of fine maps affordable, and the pyramid is better than one"
            " column of coarse tokens and than a residual network"
        ),
        arms=_ARMS,
        baseline="vit",
        metrics={"top1": "%", "nll": "", "params": "M", "macs": "M", "seconds": "", **dict.fromkeys(_SHARES, "")},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of {setting.size} pixels and {setting.epochs} epochs: differences of a point or two"
            " need more seeds than three, and few images favour convolutions. The paper's claim is of detection, with a"
            " margin in AP; there is no detector here yet, so that the margin is asked of top-1, which gains less from"
            f" fine maps. Time and memory are those of a lone layer of {_DIM} channels on {_SIDE} x {_SIDE} tokens and"
            " one thread, in full attention's as multiples of ours: memory is that of live tensors with the weights of"
            " the attention written out, as the authors have it; the fused kernels never write them (leaner_fused)"
        ),
        data=words,
    )


def _arm(arm: str, setting: _Setting) -> Backbone:
    from vertebra.backbones.cifar_resnet import cifar_resnet

    if arm == "resnet":
        backbone = cifar_resnet(image_size=setting.size, **setting.resnet)  # type: ignore[misc]
        first: Any = backbone.stem[0]
        first.stride = (2, 2)  # its maps are as fine as the first ones of the pyramid
        return backbone
    changes = {"pvt": setting.pvt, "full": {**setting.pvt, "reductions": (1, 1, 1, 1)}, "vit": setting.vit}[arm]
    return pvt("nano", image_size=setting.size, **changes)


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.training.cost import count

    torch.manual_seed(seed)
    shares: dict[str, float] = _shares() if arm == "pvt" else dict.fromkeys(_SHARES, float("nan"))
    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    cost = count(backbone)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    found = {name: scores[name] for name in ("top1", "nll", "seconds")}
    return found | {"params": cost.params / 1e6, "macs": cost.macs / 1e6} | shares


def _shares() -> dict[str, float]:
    """Time and memory of full attention as multiples of ours, in the fused kernels and with the weights written out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layers = [spatial_reduction_attention(_DIM, heads=1, reduction=each).eval() for each in (1, _REDUCTION)]
    x = torch.randn(1, _SIDE**2, _DIM)
    with sdpa_kernel(SDPBackend.MATH):
        plain = _spent(layers, x)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        fused = _spent(layers, x)
    found = {"faster": fused[0], "leaner": plain[1], "faster_plain": plain[0], "leaner_fused": fused[1]}
    return {name: full / ours for name, (full, ours) in found.items()}


def _spent(layers: Sequence[nn.Module], x: Tensor) -> tuple[list[float], list[float]]:
    """Seconds, and bytes at the peak: a number a layer."""
    runs = [partial(layer, x) for layer in layers]
    known = (x, *(tensor for layer in layers for tensor in layer.parameters()))
    return seconds(runs, turns=5), [peak(run, known) for run in runs]


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in _ARMS}
    share = {name: measured.mean("pvt", name) for name in _SHARES}
    macs = {arm: measured.mean(arm, "macs") for arm in _ARMS}
    gains, words = measured.gain("pvt", "vit", "top1"), ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    return [
        Check(
            f"attention takes at least 16 times less time than full attention at {_SIDE} x {_SIDE} tokens",
            share["faster"] >= 16,
            f"{share['faster']:.1f} times; with the weights written out {share['faster_plain']:.1f}",
        ),
        Check(
            f"attention takes at least 16 times less memory than full attention at {_SIDE} x {_SIDE} tokens",
            share["leaner"] >= 16,
            f"{share['leaner']:.1f} times with the weights written out; in fused kernels {share['leaner_fused']:.1f}",
        ),
        Check(
            "the pyramid is at least 3 points ahead of one column",
            bool(gains.mean() >= 3),
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); all arms: {words}",
        ),
        Check(
            "the pyramid is at least as accurate as the residual network",
            mean["pvt"] >= mean["resnet"],
            f"{mean['pvt'] - mean['resnet']:+.2f} points, at {macs['pvt']:.0f} M multiply-accumulates against"
            f" {macs['resnet']:.0f}",
        ),
    ]
