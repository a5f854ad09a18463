"""CrossFormer: patches of several sizes in every token, and attention that takes turns near and far.

Shapes: images (B, 3, H, W) of any size to maps at strides 4, 8, 16 and 32; `tokens` and `pooled` are of the last map,
behind a norm. Images become tokens, and maps smaller ones, by a cross-scale embedding
(`vertebra.blocks.cross_scale_embedding`). Blocks attend within windows and among places an interval apart, in turn,
with a bias that is computed from offsets (`vertebra.blocks.cross_scale_attention`). CrossFormer++ (arXiv 2303.06908)
has other sizes of groups, and a convolution with a norm behind every third block, which keeps activations small.

Groups follow the size of each map, as in the authors' detectors. Departs from them where a side is no multiple of 32:
what is missing is padded with zeros at the bottom and on the right, where the authors' code leaves out what remains of
an image and does not run on odd maps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import gelu

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.cross_scale_attention import CrossScaleAttention, of_pairs
from vertebra.blocks.cross_scale_embedding import cross_scale_embedding
from vertebra.blocks.rows import Dense
from vertebra.blocks.windows import Sides
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="crossformer",
    title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    year=2022,
    arxiv="2108.00154",
    reference="cheerss/CrossFormer",
    licence="MIT",
    claim=(
        "81.5, 82.5, 83.4 and 84.0 % ImageNet top-1 at 2.9, 4.9, 9.2 and 16.1 G, with the largest gains on dense"
        " tasks: 44.4 AP with RetinaNet (small), 50.4 mIoU with UPerNet (large)"
    ),
    note=(
        "The variants `pp_*` are CrossFormer++ (arXiv 2303.06908). Dense tasks, ImageNet accuracy and the comparison"
        " with Swin at equal time on a GPU are not measured yet."
    ),
)

VARIANTS = {
    "t": {"dims": (64, 128, 256, 512), "depths": (1, 1, 8, 6), "heads": (2, 4, 8, 16)},
    "s": {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "b": {"dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "l": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    "pp_s": {
        "dims": (64, 128, 256, 512),
        "depths": (2, 2, 18, 2),
        "heads": (2, 4, 8, 16),
        "sides": (4, 4, 14, 7),
        "intervals": (4, 2, 1, 1),
        "cooling": 3,
    },
    "pp_b": {
        "dims": (96, 192, 384, 768),
        "depths": (2, 2, 18, 2),
        "heads": (3, 6, 12, 24),
        "sides": (4, 4, 14, 7),
        "intervals": (4, 2, 1, 1),
        "cooling": 3,
    },
    "pp_l": {
        "dims": (128, 256, 512, 1024),
        "depths": (2, 2, 18, 2),
        "heads": (4, 8, 16, 32),
        "sides": (4, 4, 14, 7),
        "intervals": (4, 2, 1, 1),
        "cooling": 3,
    },
    "pp_h": {
        "dims": (128, 256, 512, 1024),
        "depths": (6, 6, 18, 2),
        "heads": (4, 8, 16, 32),
        "sides": (4, 4, 14, 7),
        "intervals": (4, 2, 1, 1),
        "cooling": 3,
    },
    "nano": {
        "dims": (24, 48, 96, 192),
        "depths": (2, 2, 2, 1),
        "heads": (1, 2, 4, 8),
        "sides": (4, 4, 4, 4),
        "intervals": (4, 2, 1, 1),
        "kernels": (2, 4, 8, 16),
        "image_size": 32,
    },
}


class CrossFormerOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three. `dims` to `intervals` have a number for each stage.

    Attributes:
        dims: channels; multiples of heads and of 2^(n - 1) for n kernels.
        depths: blocks.
        heads: of the attention.
        sides: G, places of a group down and across.
        intervals: places from one member to the next in every second block; 1 makes it like the first.
        kernels: of the embedding of images, the first one is its stride.
        merges: kernels of the embedding between two stages, likewise.
        ratio: hidden channels of a feed-forward for each of its own.
        cooling: blocks of a stage from one convolution with a norm to the next, none behind its last; 0 has none.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    sides: Sequence[int]
    intervals: Sequence[int]
    kernels: Sequence[int]
    merges: Sequence[int]
    ratio: float
    cooling: int


def crossformer(variant: str = "t", **options: Unpack[CrossFormerOptions]) -> "CrossFormer":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `CrossFormerOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("crossformer", VARIANTS, variant, options, CrossFormer)


class CrossFormer(Backbone):
    """Stages of an embedding and blocks; build it with `crossformer`.

    Attributes:
        embeds: images to the first map, and each map to the next smaller one.
        stages: blocks of each stage.
        norm: of the last map.
    """

    pretrained_cfg: Mapping[str, Any] = {
        "first_conv": tuple(f"embeds.0.embed.convs.{number}" for number in range(4)),
        "classifier": "head",
    }

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        sides: Sequence[int] = (7, 7, 7, 7),
        intervals: Sequence[int] = (8, 4, 2, 1),
        kernels: Sequence[int] = (4, 8, 16, 32),
        merges: Sequence[int] = (2, 4),
        ratio: float = 4.0,
        cooling: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        each = {"dims": dims, "depths": depths, "heads": heads, "sides": sides, "intervals": intervals}
        _check(each, kernels, merges, ratio, cooling)
        super().__init__()
        self.embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            dim = dims[stage]
            first = not stage
            self.embeds.append(
                Embed(preprocess.channels, dim, kernels) if first else Merge(dims[stage - 1], dim, merges)
            )
            blocks = nn.ModuleList()
            for number, rate in enumerate(rates):
                interval = intervals[stage] if number % 2 else 1
                attn = CrossScaleAttention(dim=dim, heads=heads[stage], side=sides[stage], interval=interval)
                cools = cooling > 0 and (number + 1) % cooling == 0 and number + 1 < len(rates)
                blocks.append(
                    Block(dim, attn, hidden=int(dim * ratio), cool=Cooling(dim) if cools else None, drop=rate)
                )
            self.stages.append(blocks)
        self.norm = nn.LayerNorm(dims[-1])
        self.levels = tuple(Level(dim, kernels[0] * merges[0] ** stage) for stage, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess
        self.apply(_start)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = images, []
        for embed, blocks in zip(self.embeds, self.stages, strict=True):
            x = embed(x)  # (B, h, w, C)
            for block in blocks:  # type: ignore[union-attr]
                x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
        tokens = self.norm(x).flatten(1, 2)
        return Features(tuple(maps), tokens.mean(1), tokens)

    def trunk(self) -> list[nn.Module]:
        """The embeddings and the blocks, stage by stage, and the norm."""
        stages = zip(self.embeds, self.stages, strict=True)
        parts: list[nn.Module] = [part for embed, blocks in stages for part in (embed, *blocks)]  # type: ignore[misc]
        return [*parts, self.norm]


def _check(
    each: Mapping[str, Sequence[int]], kernels: Sequence[int], merges: Sequence[int], ratio: float, cooling: int
) -> None:
    for name, numbers in each.items():
        if len(numbers) != len(each["dims"]):
            raise UsageError(
                f"crossformer: {name} is {numbers} and dims is {each['dims']}; give one number a stage to each"
            )
    check_at_least("crossformer", 1, **each, kernels=kernels, merges=merges)
    check_at_least("crossformer", 0, cooling=cooling)
    if ratio <= 0:
        raise UsageError(f"crossformer: ratio is {ratio}; it must be above 0")
    for dim, heads in zip(each["dims"], each["heads"], strict=True):
        if dim % heads:
            raise UsageError(
                f"crossformer: {heads} heads do not divide dim {dim}; dims are multiples of heads, stage by stage"
            )


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Embed(nn.Module):
    """Images (B, C, H, W) to the first map, in rows (B, h, w, dim).

    Attributes:
        embed: patches of several sizes.
        norm: behind them.
    """

    def __init__(self, channels: int, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.embed = cross_scale_embedding(channels, dim, kernels=kernels, stride=kernels[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to rows (B, h, w, dim)."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.norm(self.embed(images).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """A map to a smaller one, in rows.

    Attributes:
        norm: before the embedding.
        embed: patches of several sizes.
    """

    def __init__(self, inputs: int, outputs: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.embed = cross_scale_embedding(inputs, outputs, kernels=kernels, stride=kernels[0])

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, inputs) to rows (B, H / stride, W / stride, outputs), sides rounded up."""
        return self.embed(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the attention is given.
        attn: within windows, or among places an interval apart.
        norm2: of what the feed-forward is given.
        mlp: the feed-forward.
        cool: behind all of it, without a shortcut; None has none.
    """

    def __init__(
        self, dim: int, attn: CrossScaleAttention, *, hidden: int, cool: nn.Module | None, drop: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden)
        self.cool = cool
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        x = x + self.drop(self.attn(self.norm1(x)))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x if self.cool is None else self.cool(x)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them.

    Attributes:
        widen: to the hidden channels.
        narrow: back.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.widen, self.narrow = Dense(dim, hidden), Dense(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        return self.narrow(gelu(self.widen(x)))


class Cooling(nn.Module):
    """A depthwise 3 x 3 convolution and a norm, which start activations anew (arXiv 2303.06908, ACL).

    Attributes:
        conv: the convolution.
        norm: behind it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def published(state: Mapping[str, Tensor], backbone: CrossFormer) -> dict[str, Tensor]:
    """The authors' released weights (cheerss/CrossFormer) under our names; their classifier is left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `crossformer`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules: list[tuple[str, str | None]] = [
        (r"^(module\.)?(backbone\.)?", ""),
        (r"^head\.", None),
        (r"\.(attn_mask|biases|relative_position_index)$", None),
        (r"^patch_embed\.projs\.", "embeds.0.embed.convs."),
        (r"^patch_embed\.norm\.", "embeds.0.norm."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.attn\.pos\.pos_proj\.", ".attn.bias.layers.0."),
        (r"\.attn\.(qkv|proj)\.", r".attn.attention.\1."),
        (r"\.mlp\.fc1\.", ".mlp.widen."),
        (r"\.mlp\.fc2\.", ".mlp.narrow."),
        (r"\.ex_conv\.", ".cool.conv."),
        (r"\.ex_ln\.", ".cool.norm."),
    ]
    for number in (1, 2, 3):  # each a norm, an activation and a linear layer
        for part in (0, 2):
            ours = 3 * number - 2 + part
            rules.append((rf"\.attn\.pos\.pos{number}\.{part}\.", f".attn.bias.layers.{ours}."))
    for stage in range(len(backbone.stages) - 1):  # theirs end a stage, ours start the next
        rules.append((rf"^layers\.{stage}\.downsample\.reductions\.", f"embeds.{stage + 1}.embed.convs."))
        rules.append((rf"^layers\.{stage}\.downsample\.norm\.", f"embeds.{stage + 1}.norm."))
    return convert(state, rules, backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: options of `crossformer`, images to train and to test on, epochs."""

    options: Mapping[str, Any]
    images: int
    held: int
    epochs: int


_SIZE = 32
_LARGER = (40, 48)
_SETTINGS = {
    "toy": _Setting({}, 4000, 2000, 3),
    "gpu": _Setting(
        {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "heads": (2, 4, 8, 16), "drop_path": 0.1},
        50_000,
        10_000,
        100,
    ),
}

_ARMS: Mapping[str, str] = {
    "crossformer": "patches of four sizes, attention near and far in turn, bias computed from offsets",
    "single": "images in patches of one size, as many channels",
    "plain": "patches of one size between the stages too",
    "near": "attention within windows alone",
    "far": "attention among places an interval apart alone",
    "table": "a learned table of offsets, zero beyond those of its groups",
    "absolute": "a learned table of places behind the embedding of images, resized, and no bias",
}
_RESIZED = ("crossformer", "table", "absolute")


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Without patches of several sizes, without attention near or far, and with other positions at larger sizes."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=setting.held)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    lost = {f"{groups}{size}": "" for groups in ("grown", "kept") for size in _LARGER}
    return Effect(
        claim=(
            "patches of several sizes are ahead of patches of one, attention near and far in turn is ahead of either"
            " alone, and a bias computed from offsets carries over to larger images"
        ),
        arms=_ARMS,
        baseline="crossformer",
        metrics={"top1": "%", "nll": "", "params": "M", "macs": "M", **lost},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of {_SIZE} pixels, {setting.epochs} epochs, {len(test)} to test on: differences of"
            " less than a point or two need more seeds. Near and far differ in the first two of four stages; the others"
            " have maps of one group. `grown` and `kept` are points lost from 32 to 40 and 48 pixels, the same images"
            " resized: with groups that grow with the map, so that there are offsets that training never met, and with"
            " groups of the size they had, where only the last map has some"
        ),
        data=words,
    )


class _Table(nn.Module):
    """Learned numbers of offsets in place of the computed ones."""

    def __init__(self, heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.zeros(heads, 2 * side - 1, 2 * side - 1))

    def forward(self, sides: Sides) -> Tensor:
        down, across = sides[0] - self.side, sides[1] - self.side  # zeros around the table, or its middle
        return of_pairs(nn.functional.pad(self.table, (across, across, down, down)), sides)


class _Places(nn.Module):
    """Learned absolute positions of a map, added to its rows."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, side, side), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1], x.shape[2]
        fits = self.table.shape[2:] == size
        table = self.table if fits else nn.functional.interpolate(self.table, size=size, mode="bicubic")
        return x + table.permute(0, 2, 3, 1)


def _armed(arm: str, setting: _Setting) -> CrossFormer:
    """The network of an arm."""
    options: dict[str, Any] = dict(setting.options)
    if arm in ("single", "plain"):
        options["kernels"] = VARIANTS["nano"]["kernels"][:1]
    if arm == "plain":
        options["merges"] = (2,)
    backbone = crossformer("nano", **options)
    stages: Any = backbone.stages
    for interval, blocks in zip(VARIANTS["nano"]["intervals"], stages, strict=True):
        for block in blocks:
            if arm in ("near", "far"):
                block.attn.interval = interval if arm == "far" else 1
            if arm == "table":
                block.attn.bias = _Table(block.attn.attention.heads, block.attn.side)
            if arm == "absolute":
                block.attn.bias = None
    if arm == "absolute":
        first = backbone.embeds[0]
        backbone.embeds[0] = nn.Sequential(
            first, _Places(backbone.levels[0].channels, _SIZE // backbone.levels[0].stride)
        )
    return backbone


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.data.loader import Batches
    from vertebra.training.cost import count
    from vertebra.training.loop import evaluate

    torch.manual_seed(seed)
    backbone = _armed(arm, setting)
    cost = count(backbone)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    done = trained(backbone, train, test, plan)
    top1 = done.scores["top1"]
    found = {"top1": top1, "nll": done.scores["nll"], "params": cost.params / 1e6, "macs": cost.macs / 1e6}
    for size in _LARGER:
        preprocess = replace(backbone.preprocess, size=(size, size))
        batches = Batches(test, preprocess, views=None, batch=256, seed=seed, workers=0)
        for groups in ("grown", "kept"):
            lost = float("nan")
            if arm in _RESIZED:
                with _resized(backbone, size / _SIZE if groups == "grown" else 1):
                    lost = top1 - evaluate(done.model, batches)["top1"]
            found[f"{groups}{size}"] = lost
    return found


@contextmanager
def _resized(backbone: CrossFormer, times: float) -> Iterator[None]:
    """Groups that have so many times the places down and across, for a while."""
    layers = [module for module in backbone.modules() if isinstance(module, CrossScaleAttention)]
    sides = [layer.side for layer in layers]
    for layer in layers:
        layer.side = round(times * layer.side)
    yield
    for layer, side in zip(layers, sides, strict=True):
        layer.side = side


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    lost = {
        arm: {
            groups: sum(measured.mean(arm, f"{groups}{size}") for size in _LARGER) / 2 for groups in ("grown", "kept")
        }
        for arm in _RESIZED
    }

    def ahead(others: Sequence[str]) -> Check:
        gains = {arm: measured.gain("crossformer", arm, "top1") for arm in others}
        seeds = {arm: ", ".join(f"{one:+.2f}" for one in gain) for arm, gain in gains.items()}
        return Check(
            f"at least 0.3 points ahead of {' and '.join(others)}",
            all(bool(gain.mean() >= 0.3) for gain in gains.values()),
            "; ".join(f"{arm} {gain.mean():+.2f} points (seeds: {seeds[arm]})" for arm, gain in gains.items()),
        )

    scores = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    grown = ", ".join(f"{arm} {each['grown']:+.2f}" for arm, each in lost.items())
    kept = ", ".join(f"{arm} {each['kept']:+.2f}" for arm, each in lost.items())
    near_far, sizes = ahead(("near", "far")), ahead(("single",))
    return [
        replace(near_far, found=f"{near_far.found}; all arms: {scores}"),
        replace(sizes, found=f"{sizes.found}; of plain {measured.gain('crossformer', 'plain', 'top1').mean():+.2f}"),
        Check(
            "a computed bias loses less at 40 and 48 pixels than a table of offsets",
            lost["crossformer"]["grown"] < lost["table"]["grown"],
            f"points lost, mean of both sizes: {grown}; with groups of the old size: {kept}",
        ),
        Check(
            "and less than a table of places",
            lost["crossformer"]["grown"] < lost["absolute"]["grown"],
            f"points lost: {grown}",
        ),
    ]
