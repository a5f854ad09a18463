"""OverLoCK: a coarse overview of the image first, then a closer look whose kernels and features it guides.

Shapes: images (B, 3, H, W) to maps at strides 4, 8, 16, 32. A base network of three stages feeds both the overview, a
fourth stage, and the focus: blocks that go over the third stage again. Each of them sees the map and the overview as
one map (C + C_4 / 4 channels), adds the first overview anew, and mixes the map with kernels that the overview decides
(`vertebra.blocks.contmix`). The last two levels are of the focus and keep the overview's channels, as the authors'
detectors take them. `pooled` follows the head's 1 x 1 convolution, norm and activation; `OverviewSupervised` trains
with a loss of the overview beside the classifier's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.contmix import Mixing
from vertebra.blocks.dilated_reparam import DilatedReparam, dilated_reparam
from vertebra.contracts import (
    Backbone,
    Batch,
    Check,
    Effect,
    Features,
    Level,
    Measured,
    Method,
    Preprocess,
    Progress,
)
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert
from vertebra.tasks.classify import Classify, classify

PAPER = Paper(
    id="overlock",
    title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    year=2025,
    arxiv="2502.20087",
    reference="LMMMEng/OverLoCK",
    licence="Apache-2.0",
    claim=(
        "OverLoCK-T has 84.2 % ImageNet top-1, above ConvNeXt-B with about a third of its compute and parameters; +1 "
        "box AP for S over MogaNet-B, +1.7 mIoU for T over UniRepLKNet-T"
    ),
    note=(
        "Published parameters are those of the re-parameterised networks, `surgery.fuse`. Released weights of the "
        "training form are read. There is no Triton kernel for CUDA: the mixing is matrix products of torch there too."
    ),
)

VARIANTS = {
    "xt": {"dims": (56, 112, 256, 336), "depths": (2, 2, 3, 2), "focus": (6, 2), "heads": (4, 6)},
    "t": {"dims": (64, 128, 256, 512), "depths": (4, 4, 6, 2), "focus": (12, 2), "heads": (4, 8)},
    "s": {"dims": (64, 128, 320, 512), "depths": (6, 6, 8, 3), "focus": (16, 3), "heads": (8, 16)},
    "b": {"dims": (80, 160, 384, 576), "depths": (8, 8, 10, 4), "focus": (20, 4), "heads": (6, 9)},
    "nano": {
        "dims": (16, 32, 64, 128),
        "depths": (1, 1, 1, 1),
        "focus": (1, 1),
        "heads": (2, 2),
        "kernels": (7, 7, 7, 5),
        "stem_stride": 2,
        "width": 256,
        "image_size": 32,
    },
}

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""(kernel, dilation) of the convolutions beside a large one, by its size: more than UniRepLKNet has released."""


class OverlockOptions(BackboneOptions, total=False):
    """Options; a variant sets the first four.

    Attributes:
        dims: channels of the four stages.
        depths: blocks of each stage; the last one is the overview.
        focus: blocks that go over the third stage again, and those behind them at half the size.
        heads: of the kernels of either; `dims` of the last two stages are multiples of 4 * heads.
        kernels: odd sizes of the large kernels, a stage each: any of `BRANCHES`.
        small: odd size of the small dynamic kernel, at most the last two of `kernels`.
        ratio: hidden over outer channels of the stages' blocks.
        focus_ratio: hidden channels of the focus's blocks over those of the map.
        stem_stride: 4, or 2 or 1 for small images.
        width: channels of `pooled`.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    focus: Sequence[int]
    heads: Sequence[int]
    kernels: Sequence[int]
    small: int
    ratio: float
    focus_ratio: float
    stem_stride: Literal[1, 2, 4]
    width: int


def overlock(variant: str = "xt", **options: Unpack[OverlockOptions]) -> "OverLoCK":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `OverlockOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    crop = {"xt": 0.925, "b": 0.975, "nano": 1.0}.get(variant, 0.95)
    return build("overlock", VARIANTS, variant, options, OverLoCK, crop=crop)


class OverLoCK(Backbone):
    """Base, overview and focus; build it with `overlock`.

    Attributes:
        stages: three of the base and the overview, each behind its stem or downsampling.
        squeeze: the overview to a quarter of its channels.
        focus: blocks that go over the third stage's map again.
        last: those behind them, at half the size.
        head: to the channels of `pooled`.
    """

    pretrained_cfg: Mapping[str, Any] = {"first_conv": "stages.0.0.0", "classifier": "head.4"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        focus: Sequence[int],
        heads: Sequence[int],
        kernels: Sequence[int] = (17, 15, 13, 7),
        small: int = 5,
        ratio: float = 4,
        focus_ratio: float = 3,
        stem_stride: int = 4,
        width: int = 1024,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check(dims, depths, focus, heads, kernels, stem_stride)
        check_at_least("overlock", 1, ratio=ratio, focus_ratio=focus_ratio, width=width)
        context, last = dims[3] // 4, dims[3] + dims[3] // 4
        rates = drop_rates(drop_path, (*depths, *focus))
        self.stages = nn.ModuleList()
        for number, (dim, kernel) in enumerate(zip(dims, kernels, strict=True)):
            first = downsample(dims[number - 1], dim) if number else stem(preprocess.channels, dim, stem_stride)
            blocks = (StaticBlock(dim, kernel, ratio, number > 1, rate) for rate in rates[number])
            self.stages.append(nn.Sequential(first, *blocks))
        self.squeeze = nn.Conv2d(dims[3], context, 1)
        self.down_map, self.down_context = downsample(dims[2], dims[3]), downsample(context, context)
        looks = [nn.ModuleList(), nn.ModuleList()]
        for number, blocks in enumerate(looks):
            dim, kernel = dims[2 + number], kernels[2 + number]
            for block, rate in enumerate(rates[4 + number]):
                blend = number + block > 0
                blocks.append(FocusBlock(dim, context, kernel, small, heads[number], focus_ratio, blend, rate))
        self.focus, self.last = looks
        self.head = nn.Sequential(nn.Conv2d(last, width, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU(inplace=True))
        channels = (dims[0], dims[1], dims[2] + context, last)
        self.levels = tuple(Level(c, stem_stride * 2**n) for n, c in enumerate(channels))
        self.width, self.preprocess = width, preprocess
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        return self.look(images)[0]

    def look(self, images: Tensor) -> tuple[Features, Tensor]:
        """Images (B, 3, H, W) to features, and the overview (B, C_4, H / 32, W / 32) for a loss of its own."""
        check_images(self, images)
        # depthwise convolutions of large kernels are several times as fast on the CPU with channels last
        x = images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        overview = maps.pop()
        context = self.squeeze(overview)
        size = (maps[2].shape[2], maps[2].shape[3])
        wide = nn.functional.interpolate(context, size, mode="bilinear", align_corners=False)
        x = torch.cat((maps.pop(), wide), 1)
        for block in self.focus:
            x = block(x, wide)
        maps.append(x)
        own = x.shape[1] - context.shape[1]
        x = torch.cat((self.down_map(x[:, :own]), self.down_context(x[:, own:])), 1)
        for block in self.last:
            x = block(x, context)
        return Features((*maps, x), self.head(x).mean((2, 3))), overview

    def trunk(self) -> list[nn.Module]:
        """Blocks, stems and downsamplings in the order of the signal, and the head."""
        base = [part for stage in self.stages for part in stage]  # type: ignore[union-attr]
        return [*base, self.squeeze, *self.focus, self.down_map, self.down_context, *self.last, self.head]


def stem(channels: int, dim: int, stride: int) -> nn.Sequential:
    """Four convolutions, of which the first and the third may halve the image."""
    half = dim // 2
    first, third = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
    plan = ((channels, half, first), (half, half, 1), (half, dim, third), (dim, dim, 1))
    layers: list[nn.Module] = []
    for inputs, outputs, step in plan:
        layers += [nn.Conv2d(inputs, outputs, 3, step, 1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def downsample(inputs: int, outputs: int) -> nn.Sequential:
    """To half the size."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs))


class StaticBlock(nn.Module):
    """A large depthwise convolution and an MLP in one branch; the scale of later stages is on the shortcut.

    `large_norm` stands behind the norms of the large convolution's own branches, as the reference has it.
    """

    def __init__(self, dim: int, kernel: int, ratio: float, scaled: bool, drop: float) -> None:
        super().__init__()
        self.local = ResidualDepthwise(dim)
        self.norm = LayerNorm2d(dim)
        self.large = dilated_reparam(dim, kernel=kernel, branches=BRANCHES[kernel])
        self.large_norm = nn.BatchNorm2d(dim)
        self.gate = _gate(dim)
        self.mlp = _mlp(dim, int(dim * ratio))
        self.keep = Scale(dim) if scaled else nn.Identity()
        self.drop = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        x = self.local(x)
        branch = self.mlp(self.gate(self.large_norm(self.large(self.norm(x)))))
        return self.drop(branch).add_(self.keep(x))


class FocusBlock(nn.Module):
    """A map and its context as one map: kernels from both mix the map, and both are updated.

    Attributes:
        blend: whether the overview is added to the context anew; the very first block gets it fresh.
    """

    def __init__(
        self, dim: int, context: int, kernel: int, small: int, heads: int, ratio: float, blend: bool, drop: float
    ) -> None:
        super().__init__()
        whole = dim + context
        self.sides, self.blend = (dim, context), blend
        if blend:
            self.own, self.anew = Scale(context), Scale(context)
        self.local, self.local2 = ResidualDepthwise(whole), ResidualDepthwise(whole)
        self.norm, self.norm2 = LayerNorm2d(whole), LayerNorm2d(whole)
        self.fusion = nn.Sequential(
            nn.Conv2d(whole, whole, 3, 1, 1, groups=whole),
            nn.BatchNorm2d(whole),
            nn.GELU(),
            nn.Conv2d(whole, dim, 1),
            ResponseNorm(dim),
        )
        self.mix = Mixing(dim, context, kernel=kernel, small=small, heads=heads)
        self.large = dilated_reparam(dim, kernel=kernel, branches=BRANCHES[kernel])
        self.large_norm = nn.BatchNorm2d(dim)
        self.squeeze = _gate(dim)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.SiLU(inplace=True))
        self.project = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, whole, 1))
        self.mlp = _mlp(whole, int(dim * ratio))
        self.keep, self.keep2 = Scale(whole), Scale(whole)
        self.drop = DropPath(drop)

    def forward(self, x: Tensor, overview: Tensor) -> Tensor:
        """Maps (B, dim + context, H, W) and the overview (B, context, H, W) to maps like the first."""
        if self.blend:
            own, context = x.split(self.sides, 1)
            x = torch.cat((own, self.own(context).add_(self.anew(overview))), 1)
        x = self.local(x)
        normed = self.norm(x)
        fused = self.fusion(normed)
        queries, context = normed.split(self.sides, 1)
        mixed = self.mix(fused, queries, context).add_(self.large_norm(self.large(fused)))
        branch = self.project(self.gate(fused) * self.squeeze(mixed))
        x = self.local2(self.drop(branch).add_(self.keep(x)))
        return self.drop(self.mlp(self.norm2(x))).add_(self.keep2(x))


def _gate(dim: int) -> SEModule:
    return SEModule(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU)


def _mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, hidden, 1), nn.GELU(), ResidualDepthwise(hidden), ResponseNorm(hidden), nn.Conv2d(hidden, dim, 1)
    )


class ResidualDepthwise(nn.Conv2d):
    """A depthwise 3 x 3 convolution beside a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Maps to maps."""
        return super().forward(input).add_(input)

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """One convolution that holds the shortcut in the middle of its kernels."""
        assert self.bias is not None
        conv = nn.Conv2d(self.in_channels, self.in_channels, 3, 1, 1, groups=self.in_channels)
        conv = conv.to(self.weight.device, self.weight.dtype)
        conv.weight.copy_(self.weight)
        conv.weight[..., 1, 1] += 1
        conv.bias.copy_(self.bias)  # type: ignore[union-attr]
        return conv


class Scale(nn.Module):
    """A gain and a bias a channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        return torch.addcmul(self.bias[:, None, None], x, self.gain[:, None, None])


class ResponseNorm(nn.Module):
    """Global response normalisation (arXiv 2301.00808): channels compete by their norms over space.

    timm's takes a norm that is slow with channels last, and two more passes.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.zeros(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        norm = x.square().sum((2, 3), keepdim=True).clamp(min=1e-24).sqrt()  # a root has no slope at 0
        return torch.addcmul(self.bias, x, 1 + self.gain * norm / (norm.mean(1, keepdim=True) + 1e-6))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(
    dims: Sequence[int],
    depths: Sequence[int],
    focus: Sequence[int],
    heads: Sequence[int],
    kernels: Sequence[int],
    stem_stride: int,
) -> None:
    given = {
        "dims": (dims, 4),
        "depths": (depths, 4),
        "kernels": (kernels, 4),
        "focus": (focus, 2),
        "heads": (heads, 2),
    }
    for name, (values, count) in given.items():
        if len(values) != count:
            raise UsageError(f"overlock: {name} is {tuple(values)}; it needs {count} numbers")
        check_at_least("overlock", 4 if name == "dims" else 1, **{name: tuple(values)})
    for kernel in kernels:
        if kernel not in BRANCHES:
            raise UsageError(f"overlock: kernels is {tuple(kernels)}; each is one of {', '.join(map(str, BRANCHES))}")
    if stem_stride not in (1, 2, 4):
        raise UsageError(f"overlock: stem_stride is {stem_stride}; it can be 4, 2 or 1")


def published(state: Mapping[str, Tensor], backbone: OverLoCK) -> dict[str, Tensor]:
    """The authors' released weights (Apache-2.0) under our names; both classifiers are left out.

    Args:
        state: tensors of a released checkpoint of the training form, without "reparam" in its name.
        backbone: of `overlock`, the same variant.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, rules(backbone), backbone)


def rules(backbone: OverLoCK) -> list[tuple[str, str | None]]:
    """The authors' names to ours; see `vertebra.parity.convert`."""
    found: list[tuple[str, str | None]] = [(r"^(module|backbone)\.", ""), (r"^(head\.4|aux_head)\.", None)]
    found += [(rf"^patch_embed{n}\.", f"stages.{n - 1}.0.") for n in (1, 2, 3, 4)]
    for n, stage in enumerate(backbone.stages, start=1):
        # from the last block on, so that a new name is not an old one of a later rule
        found += [(rf"^blocks{n}\.{k - 1}\.", f"stages.{n - 1}.{k}.") for k in range(len(stage) - 1, 0, -1)]  # type: ignore[arg-type]
    found += [(r"^sub_blocks3\.", "focus."), (r"^sub_blocks4\.", "last."), (r"^high_level_proj\.", "squeeze.")]
    found += [(r"^patch_embedx\.x_proj\.", "down_map."), (r"^patch_embedx\.h_proj\.", "down_context.")]
    for number, part in enumerate(("norm", "large", "large_norm", "gate"), start=0):
        found.append((rf"^(stages\.\d\.\d+)\.proj\.{number}\.", rf"\1.{part}."))
    for number in (4, 6, 7, 8):
        found.append((rf"^(stages\.\d\.\d+)\.proj\.{number}\.", rf"\1.mlp.{number - 4}."))
    found += [(r"^(stages\.\d\.\d+)\.dwconv\.", r"\1.local."), (r"^(stages\.\d\.\d+)\.ls\.", r"\1.keep.")]
    focus = {
        "x_scale": "own", "h_scale": "anew", "dwconv1": "local", "norm1": "norm", "weight_query": "mix.query",
        "weight_key": "mix.key", "weight_proj": "mix.logits", "dyconv_proj": "mix.project", "lepe.0": "large",
        "lepe.1": "large_norm", "se_layer": "squeeze", "proj": "project", "dwconv2": "local2", "ls1": "keep",
        "ls2": "keep2",
    }  # fmt: skip
    found += [(rf"^((?:focus|last)\.\d+)\.{theirs}\.", rf"\1.{ours}.") for theirs, ours in focus.items()]
    found += [(r"\.rpb1$", ".mix.near"), (r"\.rpb2$", ".mix.far")]
    found += [(r"\.(gate|squeeze)\.proj\.1\.", r".\1.fc1."), (r"\.(gate|squeeze)\.proj\.3\.", r".\1.fc2.")]
    found += [
        (r"\.gamma$", ".gain"),
        (r"\.beta$", ".bias"),
        (r"\.(keep2?|own|anew)\.weight$", r".\1.gain"),
        (r"lk_origin\.", "convs.0."),
        (r"origin_bn\.", "norms.0."),
    ]
    for name, module in backbone.named_modules():
        for place, conv in enumerate(module.convs if isinstance(module, DilatedReparam) else ()):
            one = f"k{conv.kernel_size[0]}_{conv.dilation[0]}"  # type: ignore[index]
            theirs = name.replace(".", r"\.")
            found += [(rf"^{theirs}\.dil_conv_{one}\.", f"{name}.convs.{place}.")] if place else []
            found += [(rf"^{theirs}\.dil_bn_{one}\.", f"{name}.norms.{place}.")] if place else []
    return found


class OverviewSupervised(Method):
    """Train a classifier with a second loss, of a linear classifier on the pooled overview.

    The second classifier is thrown away after training, so that it is no part of the task model.

    Attributes:
        task_model: what is trained, on an OverLoCK.
        overview: norm and linear layer of the second classifier.
        weight: of its loss, 0.4 as published.
    """

    def __init__(self, task_model: Classify, *, weight: float = 0.4) -> None:
        super().__init__()
        if not isinstance(task_model.backbone, OverLoCK):
            raise UsageError(f"OverviewSupervised takes a classifier on an OverLoCK, not {type(task_model.backbone)}")
        self.task_model, self.weight = task_model, weight
        channels = 4 * task_model.backbone.squeeze.out_channels
        self.overview = nn.ModuleList((nn.BatchNorm2d(channels), nn.Linear(channels, len(task_model.classes))))

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # a module registered twice would be saved twice
        return self.task_model.backbone

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The losses of both classifiers, `classify` and `overview`; `progress` plays no part."""
        model: Any = self.task_model
        features, overview = model.backbone.look(batch.images)
        norm, linear = self.overview
        losses = model.losses({"logits": model.head(model.dropout(features.pooled))}, batch.targets)
        second = model.losses({"logits": linear(norm(overview).mean((2, 3)))}, batch.targets)
        return {**losses, "overview": self.weight * second["classify"]}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: pixels, images, epochs, the network's options.

    `static_ratio` is the `focus_ratio` at which the static arm has the MACs of the others.
    """

    images: int
    epochs: int
    options: OverlockOptions
    static_ratio: float


_NARROW: OverlockOptions = {"image_size": 32, "focus": (2, 1), "kernels": (7, 7, 7, 5)}
_WIDE: OverlockOptions = {**_NARROW, "image_size": 64, "depths": (2, 2, 3, 2)}
_SETTINGS = {"toy": _Setting(2000, 8, _NARROW, 5.65), "gpu": _Setting(50_000, 60, _WIDE, 3.66)}
_ARMS = {
    "full": "overview and kernels that it decides",
    "no_overview": "the overview is set to zero, its parameters are kept",
    "static": "one depthwise kernel for all places, wider MLPs for equal MACs",
}


class _Static(nn.Module):
    """Depthwise convolutions of the same sizes in the place of `Mixing`."""

    def __init__(self, mix: Mixing) -> None:
        super().__init__()
        half = mix.dim // 2
        sides = (mix.small, mix.kernel)
        self.convs = nn.ModuleList(nn.Conv2d(half, half, side, padding=side // 2, groups=half) for side in sides)
        self.project = mix.project

    def forward(self, values: Tensor, queries: Tensor, context: Tensor) -> Tensor:
        parts = zip(self.convs, values.chunk(2, 1), strict=True)
        return self.project(torch.cat([conv(value) for conv, value in parts], 1))


class _Zero(nn.Module):
    """A module whose output counts for nothing."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner, self.out_channels = inner, inner.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.inner(x)


def _arm(arm: str, setting: _Setting) -> OverLoCK:
    options = setting.options
    if arm == "static":
        options = OverlockOptions(**{**options, "focus_ratio": setting.static_ratio})
    backbone = overlock("nano", **options)
    if arm == "no_overview":
        backbone.squeeze = _Zero(backbone.squeeze)  # type: ignore[assignment]
    elif arm == "static":
        for block in (*backbone.focus, *backbone.last):
            block.mix = _Static(block.mix)  # type: ignore[arg-type]
    return backbone


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The whole beside one without its overview and one whose kernels are the same everywhere."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="an overview first, and kernels that it decides, make a network of convolutions more accurate",
        arms=_ARMS,
        baseline="static",
        metrics={"top1": "%", "nll": "", "kernels": "%", "field": "%", "macs": "M"},
        measure=measure,
        checks=_checks,
        limits=(
            f"about 0.9 M parameters, {len(train)} images and {setting.epochs} epochs: the map that is mixed has 4 to 8"
            " cells a side, so that a kernel of 7 sees most of it anyway; three seeds tell differences of a few points"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import fitted
    from vertebra.config import Plan, Views
    from vertebra.data.loader import Batches
    from vertebra.training.cost import count

    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    macs = count(backbone).macs / 1e6
    model = classify(backbone, train.classes)
    views = Views(scale=(0.6, 1.0))
    plan = Plan(epochs=setting.epochs, batch=50, optimizer="adamw", lr=2e-3, weight_decay=0.05, views=views, seed=seed)
    scores = fitted(model, OverviewSupervised(model), train, test, plan).scores
    batches = Batches(test, backbone.preprocess, views=None, batch=64, seed=0, workers=0)
    images = next(batches.epoch(0)).images
    kernels, field = surroundings(backbone, images)
    return {"top1": scores["top1"], "nll": scores["nll"], "kernels": kernels, "field": field, "macs": macs}


def surroundings(backbone: OverLoCK, images: Tensor) -> tuple[float, float]:
    """How much the middle of an image is looked at in another way when only its surroundings change.

    The middle quarter of each image is put into another image. Both numbers are shares of a sum of 1 that moves, in
    percent: of the kernel of the middle cell in the last block at stride 4 times the stem's (0 where kernels
    are fixed), and of the gradients of that cell's output over the pixels of the middle quarter.

    Args:
        backbone: is left in evaluation mode.
        images: (B, channels, H, W), at least two.
    """
    backbone.eval().requires_grad_(False)
    height, width = images.shape[2:]
    rows, columns = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    moved = images.roll(1, 0)
    moved[..., rows, columns] = images[..., rows, columns]
    seen = [_looked(backbone, batch, rows, columns) for batch in (images, moved)]
    kernels, field = (
        50 * (one - other).abs().sum(-1).mean().item() for one, other in zip(*seen, strict=True)
    )  # half of the absolute difference of two distributions moves
    return kernels, field


def _looked(backbone: OverLoCK, images: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """The middle cell's kernels and its gradients over the middle pixels, each (B, ..., n) of sum 1."""
    images = images.clone().requires_grad_()
    caught: list[tuple[Tensor, ...]] = []
    mix: Any = backbone.focus[-1].mix
    with mix.register_forward_pre_hook(lambda _, given: caught.append(given)):
        cells = backbone(images).pyramid[2]
    middle = cells.shape[2] // 2, cells.shape[3] // 2
    gradient = torch.autograd.grad(cells[:, :, middle[0], middle[1]].sum(), images)[0]
    field = gradient[..., rows, columns].abs().sum(1).flatten(1)
    if isinstance(mix, _Static):
        kernels = torch.ones(len(images), 1)
    else:
        windows, weights = mix.kernels(*caught[0][1:])[1]
        found = windows.join(weights)  # (B, groups, H, W, k * k)
        kernels = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
    return kernels.detach(), field / field.sum(1, keepdim=True)


def _checks(measured: Measured) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in measured.values}
    kernels, field = measured.mean("full", "kernels"), {a: measured.mean(a, "field") for a in measured.values}
    found = []
    for arm, what in (("no_overview", "no overview"), ("static", "static kernels")):
        gains = measured.gain("full", arm, "top1")
        seeds = ", ".join(f"{gain:+.2f}" for gain in gains)
        words = f"{top1['full']:.2f} and {top1[arm]:.2f} %, {gains.mean():+.2f} points (seeds: {seeds})"
        found.append(Check(f"the whole is more accurate than with {what}", bool(gains.mean() > 0), words))
    moved = f"{kernels:.1f} % of a kernel's weight moves"
    found.append(Check("kernels change with the surroundings by more than 1 %", kernels > 1, moved))
    shares = ", ".join(f"{arm} {share:.1f} %" for arm, share in field.items())
    name = "the receptive field changes more with the surroundings than under static kernels"
    return [*found, Check(name, field["full"] > field["static"], shares)]
