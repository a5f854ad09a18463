"""ViT-ResNAS: a vision transformer of three stages whose every layer has a width of its own, found by a search.

Shapes: images (B, 3, H, W) of any size to maps at strides 14, 28 and 56. A few convolutions cut the image into patches;
a class token and learned positions join them; stages of blocks follow, attention and a feed-forward each behind a norm,
with `vertebra.blocks.residual_spatial_reduction` between them. `tokens` starts with the class token, which is `pooled`;
both have a norm behind them, the maps have none.

The network is its definition: heads and hidden channels are lists of a number a block, stage by stage, and their
lengths are the depths. So a search can name any network of its space, and `supernet_tiny` is the largest of the paper's
smaller space. The published networks have a linear classifier on the class token and, for training alone, another on
every patch; neither is in the backbone.

Departs from the paper where it cannot run: images that do not fill their patches are padded with zeros at the bottom
and on the right, maps of odd sides are reduced to the larger half, and positions are resized to any grid.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.attention import attention
from vertebra.blocks.positions import fitted
from vertebra.blocks.residual_spatial_reduction import Shortcut, residual_spatial_reduction
from vertebra.blocks.rows import FeedForward
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="vit_resnas",
    title="Searching for Efficient Multi-Stage Vision Transformers",
    year=2021,
    arxiv="2109.00642",
    reference="yilunliao/vit-search",
    licence="CC BY-NC 4.0",
    claim=(
        "better trade-offs of accuracy against multiply-accumulates and throughput than DeiT and other vision"
        " transformers of its time; ImageNet top-1 80.8, 81.7 and 82.4 % at 1.8, 2.8 and 4.5 G"
    ),
    note=(
        "The searched networks and their reduction. The training of the super-network, its evolutionary search and"
        " training with the patch head are not here yet: the effect is that of the reduction's shortcut alone."
    ),
)

VARIANTS = {
    "tiny": {
        "dims": (176, 352, 704),
        "heads": ((3, 3, 3, 4, 4), (10, 8, 8, 8, 10, 10), (10, 10, 10, 8, 8)),
        "hidden": ((704, 576, 640, 576, 704), (1408, 1408, 1280, 1408, 1280, 1024), (2560, 1792, 2816, 2816, 2560)),
    },
    "small": {
        "dims": (220, 440, 880),
        "heads": ((5, 5, 7, 5, 5, 5), (10, 10, 10, 10, 12, 12), (16, 12, 16, 12, 14)),
        "hidden": (
            (880, 880, 800, 720, 720, 720),
            (1760, 1440, 1920, 1600, 1600, 1440),
            (3200, 3200, 2880, 2240, 2560),
        ),
    },
    "medium": {
        "dims": (240, 640, 880),
        "heads": ((7, 6, 7, 8, 7, 8, 6), (10, 14, 14, 16, 14, 16, 16), (16, 10, 16, 12, 16, 14)),
        "hidden": (
            (960, 960, 800, 960, 880, 880, 800),
            (1120, 1760, 1920, 1760, 1440, 1760, 1920),
            (3200, 3840, 3840, 3200, 3520, 3520),
        ),
    },
    "supernet_tiny": {
        "dims": (256, 512, 1024),
        "heads": ((6, 6, 6, 6, 6, 6), (12, 12, 12, 12, 12, 12), (12, 12, 12, 12, 12, 12)),
        "hidden": (
            (768, 768, 768, 768, 768, 768),
            (1536, 1536, 1536, 1536, 1536, 1536),
            (3072, 3072, 3072, 3072, 3072, 3072),
        ),
    },
    "nano": {
        "dims": (32, 64, 112),
        "heads": ((2, 3), (4, 3), (3, 4)),
        "hidden": ((96, 128), (192, 160), (320, 256)),
        "head_dims": (16, 16, 32),
        "patch": 2,
        "image_size": 32,
    },
}


class ViTResNASOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three.

    Attributes:
        dims: width of each stage; none is below the one before.
        heads: of each block's attention, a list a stage.
        hidden: channels of each block's feed-forward, likewise; as many.
        head_dims: channels of a head in each stage.
        patch: side in pixels of what a token of the first stage sees, even.
        stem: channels of the convolutions before the patches.
        shortcut: of the reductions between stages, "pooled", or "none" to leave it out.
    """

    dims: Sequence[int]
    heads: Sequence[Sequence[int]]
    hidden: Sequence[Sequence[int]]
    head_dims: Sequence[int]
    patch: int
    stem: int
    shortcut: Shortcut


def vit_resnas(variant: str = "tiny", **options: Unpack[ViTResNASOptions]) -> "ViTResNAS":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `ViTResNASOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("vit_resnas", VARIANTS, variant, options, ViTResNAS)


class ViTResNAS(Backbone):
    """Stem, stages of blocks and reductions between them; build it with `vit_resnas`.

    Attributes:
        stem: image to patches.
        class_token: (1, 1, dim).
        positions: (1, 1 + N, dim), the class token's first, for images of `preprocess.size`.
        stages: blocks of each stage.
        reductions: one less.
        norm: of the last stage's tokens.
        grid: rows and columns of patches that `positions` are for.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.down.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        heads: Sequence[Sequence[int]],
        hidden: Sequence[Sequence[int]],
        head_dims: Sequence[int] = (32, 48, 64),
        patch: int = 14,
        stem: int = 24,
        shortcut: Shortcut = "pooled",
        drop_path: float = 0.0,
    ) -> None:
        _check(dims, heads, hidden, head_dims, patch, stem)
        super().__init__()
        height, width = preprocess.size
        self.grid = -(-height // patch), -(-width // patch)
        self.stem = Stem(preprocess.channels, stem, dims[0], patch)
        self.class_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dims[0]), std=0.02))
        self.positions = nn.Parameter(trunc_normal_(torch.empty(1, 1 + prod(self.grid), dims[0]), std=0.02))
        self.stages, self.reductions, grid = nn.ModuleList(), nn.ModuleList(), self.grid
        for stage, rates in enumerate(drop_rates(drop_path, [len(each) for each in heads])):
            if stage:
                before, after = dims[stage - 1], dims[stage]
                reduction = residual_spatial_reduction(before, after, grid=grid, prefix=1, shortcut=shortcut)
                self.reductions.append(reduction)
                grid = -(-grid[0] // 2), -(-grid[1] // 2)
            make = partial(Block, dims[stage], head_dim=head_dims[stage])
            each = zip(heads[stage], hidden[stage], rates, strict=True)
            self.stages.append(nn.ModuleList(make(heads=n, hidden=m, drop_path=rate) for n, m, rate in each))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.levels = tuple(Level(dim, patch * 2**stage) for stage, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess
        for module in self.stages.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x = self.stem(images)
        grid = x.shape[2], x.shape[3]
        tokens = _joined(self.class_token.to(x.dtype).expand(len(x), -1, -1), x)
        tokens = tokens + fitted(self.positions, self.grid, grid, 1)
        maps: list[Tensor] = []
        for stage, blocks in enumerate(self.stages):
            if stage:
                x, first = self.reductions[stage - 1](maps[-1], tokens[:, :1])
                grid, tokens = (x.shape[2], x.shape[3]), _joined(first, x)
            for block in blocks:  # type: ignore[union-attr]
                tokens = block(tokens)
            maps.append(tokens[:, 1:].mT.unflatten(2, grid))
        tokens = self.norm(tokens)
        return Features(tuple(maps), tokens[:, 0], tokens)

    def trunk(self) -> list[nn.Module]:
        """The stem, blocks and reductions in their order, the norm; class token and positions are before the blocks."""
        parts: list[nn.Module] = [self.stem]
        for stage, blocks in enumerate(self.stages):
            parts += [self.reductions[stage - 1]] if stage else []
            parts += list(blocks)  # type: ignore[arg-type]
        return [*parts, self.norm]


def _joined(first: Tensor, x: Tensor) -> Tensor:
    """Class tokens (B, 1, dim) and maps (B, dim, H, W) as one sequence (B, 1 + N, dim)."""
    return torch.cat((first, x.flatten(2).mT), 1)


def _check(
    dims: Sequence[int],
    heads: Sequence[Sequence[int]],
    hidden: Sequence[Sequence[int]],
    head_dims: Sequence[int],
    patch: int,
    stem: int,
) -> None:
    check_at_least("vit_resnas", 1, dims=dims, head_dims=head_dims, stem=stem)
    if patch < 2 or patch % 2:
        raise UsageError(f"vit_resnas: patch is {patch}; it must be even, since the first convolution halves the image")
    if list(dims) != sorted(dims):
        raise UsageError(f"vit_resnas: dims is {dims}; no stage can be narrower than the one before")
    for name, each in {"heads": heads, "hidden": hidden, "head_dims": head_dims}.items():
        if len(each) != len(dims):
            raise UsageError(f"vit_resnas: {name} is {each} and dims is {dims}; give one entry a stage to each")
    for stage, (some, others) in enumerate(zip(heads, hidden, strict=True)):
        check_at_least("vit_resnas", 1, **{f"heads[{stage}]": some, f"hidden[{stage}]": others})
        if len(some) != len(others):
            raise UsageError(
                f"vit_resnas: stage {stage} has heads {some} and hidden {others}; give one number a block to each"
            )


class Stem(nn.Module):
    """Three small convolutions, the last two beside a shortcut, and a large one that cuts patches.

    Attributes:
        down: 3 x 3 of stride 2, norm, ReLU.
        refine: two of 3 x 3, each with norm and ReLU.
        proj: kernel and stride of half a patch.
    """

    def __init__(self, channels: int, width: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.down = _convolution(channels, width, 2)
        self.refine = nn.Sequential(_convolution(width, width, 1), _convolution(width, width, 1))
        self.proj = nn.Conv2d(width, dim, patch // 2, patch // 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to maps (B, dim, ceil(H / patch), ceil(W / patch))."""
        more = [-side % self.patch for side in images.shape[2:]]
        x = pad(images, (0, more[1], 0, more[0])) if any(more) else images
        if x.device.type == "cpu":  # so few channels take a third less time with the channels last
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.down(x)
        return self.proj(x + self.refine(x))


def _convolution(channels: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the attention is given.
        attn: attention of any number of heads: their channels together need not be `dim`.
        norm2: of what the feed-forward is given.
        mlp: two linear layers with GELU between them.
    """

    def __init__(self, dim: int, *, heads: int, head_dim: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads=heads, head_dim=head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, hidden)
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens of the same shape."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


_NAMES: Rules = (
    (r"^(cls_head|patch_head)\.", None),
    (r"^tokens$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.conv1\.", "stem.down."),
    (r"^patch_embed\.conv2\.", "stem.refine.0."),
    (r"^patch_embed\.conv3\.", "stem.refine.1."),
    (r"^patch_embed\.conv_proj\.", "stem.proj."),
    (r"^(stem\..*)\.conv\.", r"\1.0."),
    (r"^(stem\..*)\.bn\.", r"\1.1."),
    (r"\.pos_embed$", ".positions"),
    (r"\.patch_reduce\.", ".conv."),
    (r"\.token_transform\.", ".widen."),
)


def published(state: Mapping[str, Tensor], backbone: ViTResNAS) -> dict[str, Tensor]:
    """The authors' released weights (yilunliao/vit-search, CC BY-NC 4.0) under our names, without their classifiers.

    Blocks and reductions are one list there; a block that their search left out has no weights and only leaves a gap in
    its numbers. Positions of square grids are resized to those of `backbone`.

    Args:
        state: tensors of a checkpoint, as `torch.load(..., weights_only=True)["model"]` gives them.
        backbone: of `vit_resnas`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    numbers = sorted({int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    places = dict(zip(numbers, _places(backbone), strict=False))
    tables: dict[str, Any] = {"pos_embed": backbone, "positions": backbone}
    for number, reduction in enumerate(backbone.reductions):
        tables[f"reductions.{number}.positions"] = reduction
    for number, place in places.items():
        if place.startswith("reductions."):
            tables[f"blocks.{number}.pos_embed"] = backbone.get_submodule(place)
    for name, part in tables.items():
        if name in tensors:
            tensors[name] = _fitted(tensors[name], part, prefix=int(part is backbone))
    return convert(
        tensors, [*((rf"^blocks\.{number}\.", f"{place}.") for number, place in places.items()), *_NAMES], backbone
    )


def _places(backbone: ViTResNAS) -> list[str]:
    """Our names of blocks and reductions, in the order of the signal."""
    names: list[str] = []
    for stage, blocks in enumerate(backbone.stages):
        names += [f"reductions.{stage - 1}"] if stage else []
        names += [f"stages.{stage}.{block}" for block in range(len(blocks))]  # type: ignore[arg-type]
    return names


def _fitted(table: Tensor, part: Any, *, prefix: int) -> Tensor:
    """Positions of a square grid for that of a part; of any other grid as they are."""
    side = isqrt(table.shape[1] - prefix)
    square = side * side == table.shape[1] - prefix
    return fitted(table, (side, side), part.grid, prefix) if square and table.shape != part.positions.shape else table


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: widths, blocks a stage, patches and images in pixels, images, epochs."""

    dims: Sequence[int]
    depth: int
    patch: int
    size: int
    images: int
    epochs: int


_HEAD_DIMS, _HEADS_A_STAGE, _RATIO = (16, 16, 32), (2, 4, 4), 3
_SETTINGS = {
    "toy": _Setting((32, 64, 128), 6, 2, 24, 1500, 12),
    "gpu": _Setting((64, 128, 256), 6, 2, 32, 50_000, 60),
}

_ARMS: Mapping[str, str] = {
    "none": "reductions by norm, convolution and linear layer alone",
    "pooled": "residual spatial reduction: the pooled map and the class token beside them",
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Reductions with their shortcut beside the same without."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="a deep transformer of stages is more accurate where what reduces its maps is residual as its blocks are",
        arms=_ARMS,
        baseline="none",
        metrics={"top1": "%", "nll": "", "loss": "", "params": "M"},
        measure=measure,
        checks=_checks,
        limits=(
            f"{3 * setting.depth} blocks, {len(train)} images of {setting.size} pixels and {setting.epochs} epochs: the"
            " start of a training, where shortcuts help most; differences below a point need more seeds than three."
            " The search and the order of networks that share weights are not measured here"
        ),
        data=words,
    )


def _arm(arm: str, setting: _Setting) -> ViTResNAS:
    heads = tuple((heads,) * setting.depth for heads in _HEADS_A_STAGE)
    hidden = tuple((_RATIO * dim,) * setting.depth for dim in setting.dims)
    return vit_resnas(
        "nano",
        dims=setting.dims,
        heads=heads,
        hidden=hidden,
        head_dims=_HEAD_DIMS,
        patch=setting.patch,
        image_size=setting.size,
        shortcut=arm,  # type: ignore[arg-type]
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=1e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    params = sum(p.numel() for p in backbone.parameters()) / 1e6
    return {**{name: scores[name] for name in ("top1", "nll", "loss")}, "params": params}


def _checks(measured: Measured) -> Sequence[Check]:
    gains = measured.gain("pooled", "none", "top1")
    words = ", ".join(f"{arm} {measured.mean(arm, 'top1'):.2f}" for arm in _ARMS)
    return [
        Check(
            "the shortcut gains at least 1 point",
            bool(gains.mean() >= 1),
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); {words}",
        )
    ]
