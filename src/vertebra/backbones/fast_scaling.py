"""Fast and accurate model scaling: grow the width most, because run time follows activations.

    fast_scaling("en_b0", scale=4)                              # fast compound scaling
    fast_scaling("regnety_400mf", scale=16, strategy="dwr")     # uniform compound scaling

Scaling MACs by s through depth or resolution multiplies the activations by s, through width only by its square
root. Fast compound scaling puts eight tenths of the growth into width, at the accuracy of compound scaling. Strategies,
rounding and complexity are in `vertebra.blocks.scaling`; here they become networks of timm's blocks. Groups are widened
only by a strategy that says so ("wg", not "w").

RegNetZ is the paper's own family: inverted bottlenecks of ratio 4 with squeeze-and-excitation, SiLU, and no activation
after a block. `500mf`, `4gf` and `4gf_head` are timm's, with their weights; `regnetz_500mf` is ours, which scales.
Maps: the deepest of each stride; `pooled` comes after the last 1x1 convolution where there is one.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import torch
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.create_act import get_act_layer
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models.regnet import RegStage
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_images, drop_rates
from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.blocks.scaling import FAST, STEMS, Design, Stage, complexity, design, roofline, scaled
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="fast_scaling",
    title="Fast and Accurate Model Scaling",
    year=2021,
    arxiv="2103.06877",
    reference="facebookresearch/pycls",
    licence="MIT",
    claim=(
        "Activations grow by about the square root of the compute at the accuracy of compound scaling, with "
        "matching speed-ups on memory-limited devices"
    ),
    note=(
        "The paper's RegNetY-500MF is in no public code; pycls's RegNetY-400MF is the base instead. The latency on a "
        "GPU at equal MACs is not measured yet."
    ),
)

VARIANTS = {
    "500mf": {"timm": "regnetz_005"},
    "4gf": {"timm": "regnetz_040"},
    "4gf_head": {"timm": "regnetz_040_h"},
    "en_b0": {
        "block": "mbconv",
        "depths": (1, 2, 2, 3, 3, 4, 1),
        "widths": (16, 24, 40, 80, 112, 192, 320),
        "strides": (1, 2, 2, 2, 1, 2, 1),
        "ratios": (1, 6, 6, 6, 6, 6, 6),
        "kernels": (3, 3, 5, 3, 5, 5, 3),
        "head": 1280,
        "activation": "silu",
    },
    "en_b0_4x": {"base": "en_b0", "scale": 4},
    "en_b0_16x": {"base": "en_b0", "scale": 16},
    "en_b0_16x_dwr": {"base": "en_b0", "scale": 16, "strategy": "dwr"},
    "en_b0_16x_w": {"base": "en_b0", "scale": 16, "strategy": "w"},
    "regnety_400mf": {"depths": (1, 3, 6, 6), "widths": (48, 104, 208, 440), "groups": 8},
    "regnety_400mf_4x": {"base": "regnety_400mf", "scale": 4},
    "regnety_400mf_16x": {"base": "regnety_400mf", "scale": 16},
    "regnetz_500mf": {
        "block": "linear",
        "depths": (1, 4, 9, 7),
        "widths": (16, 40, 104, 256),
        "ratios": 4,
        "groups": 4,
        "head": 1024,
        "activation": "silu",
    },
    "regnetz_500mf_4x": {"base": "regnetz_500mf", "scale": 4},
    "regnetz_500mf_16x": {"base": "regnetz_500mf", "scale": 16},
    "resnet50": {
        "depths": (3, 4, 6, 3),
        "widths": (256, 512, 1024, 2048),
        "strides": (1, 2, 2, 2),
        "ratios": 0.25,
        "groups": (64, 128, 256, 512),
        "stem": "resnet",
        "stem_width": 64,
        "squeeze": 0,
    },
    "resnet50_4x": {"base": "resnet50", "scale": 4},
    "resnext50": {"base": "resnet50", "ratios": 0.5, "groups": (4, 8, 16, 32)},
    "resnext50_4x": {"base": "resnext50", "scale": 4},
    "nano": {
        "depths": (1, 1, 2),
        "widths": (32, 64, 128),
        "strides": (1, 2, 2),
        "groups": 8,
        "stem_width": 24,
        "base_size": 32,
    },
}


class FastScalingOptions(TimmOptions, total=False):
    """Options; timm's variants take those of `TimmOptions`, ours all others than `network`.

    Attributes:
        scale: factor of the MACs; 1 takes the network as it is.
        strategy: how they are spread, as in `vertebra.blocks.scaling.shares`.
        base_size: side of the image in pixels before scaling; `image_size` is what comes out, and wins.
        depths: blocks a stage; this and the following describe the network before scaling, as in
            `vertebra.blocks.scaling.design`, one number for all stages or one each.
        widths: channels a stage.
        strides: of the first block of each stage.
        ratios: inner width of a block as a share of its width.
        groups: channels of a group.
        kernels: of the spatial convolutions.
        block: "bottleneck", "linear" or "mbconv".
        stem: "small", "simple" or "resnet".
        stem_width: channels of the stem.
        head: channels of a last 1x1 convolution; 0 has none.
        squeeze: share of squeeze-and-excitation; 0 has none.
        activation: "relu" or "silu".
    """

    scale: float
    strategy: str
    base_size: int
    depths: Sequence[int]
    widths: Sequence[int]
    strides: int | Sequence[int]
    ratios: float | Sequence[float]
    groups: int | Sequence[int]
    kernels: int | Sequence[int]
    block: Literal["bottleneck", "linear", "mbconv"]
    stem: Literal["small", "simple", "resnet"]
    stem_width: int
    head: int
    squeeze: float
    activation: Literal["relu", "silu"]


def fast_scaling(variant: str = "500mf", **options: Unpack[FastScalingOptions]) -> "Timm | AnyNet":
    """Build a network, scaled or not.

    Args:
        variant: one of `VARIANTS`; those of ours are bases, and bases at a scale.
        options: as in `FastScalingOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, options that it does not take, or numbers that make no network.
    """
    shared = {name: value for name, value in options.items() if name in BackboneOptions.__annotations__}
    if "timm" in VARIANTS.get(variant, {}):
        _refuse(variant, options.keys() - TimmOptions.__annotations__.keys(), "is timm's network, which is not scaled")
        return build_variant(PAPER.id, VARIANTS, variant, options)
    _refuse(variant, options.keys() & {"network"}, "is ours, not timm's")
    return anynet(described(variant, **{k: v for k, v in options.items() if k not in shared}), **shared)  # type: ignore[arg-type]


def _refuse(variant: str, names: set[str], why: str) -> None:
    if names:
        raise UsageError(f"{PAPER.id}/{variant} {why}; leave {', '.join(sorted(names))} out, or take another variant")


def described(variant: str, **options: Any) -> Design:
    """The numbers of one of our variants, scaled as it and the options say.

    Args:
        variant: one that is not timm's.
        options: those of `FastScalingOptions` that describe and scale.

    Raises:
        UsageError: an unknown variant, or numbers that make no network.
    """
    ours = [name for name, entry in VARIANTS.items() if "timm" not in entry]
    if variant not in ours:
        raise UsageError(
            f"{PAPER.id} has no variant {variant!r} that scales{near(variant, ours)}; it has {', '.join(ours)}"
        )
    chosen: dict[str, Any] = {"base": variant}
    while "base" in chosen:
        chosen = {**VARIANTS[chosen.pop("base")], **chosen}
    chosen.update(options)
    scale, strategy, size = chosen.pop("scale", 1.0), chosen.pop("strategy", FAST), chosen.pop("base_size", 224)
    base = design(**chosen, size=size)
    return base if scale == 1 else scaled(base, scale, strategy)


def anynet(made: Design, **options: Unpack[BackboneOptions]) -> "AnyNet":
    """Build the network of any design: `anynet(compound_scale(tiny, 2), drop_path=0.1)`.

    Args:
        made: of `vertebra.blocks.scaling.design`.
        options: as in `BackboneOptions`; the design's size is the default of `image_size`.

    Raises:
        UsageError: an option out of range.
    """
    return build(PAPER.id, {"": {"image_size": made.size}}, "", options, partial(AnyNet, made=made))


class AnyNet(Backbone):
    """A stem, stages of one kind of block, and perhaps a last 1 x 1 convolution; build it with `fast_scaling`.

    Attributes:
        design: its numbers; the size is that before `image_size` changed it.
        stem: image to the first map.
        pool: behind the stem.
        stages: s1, s2 and so on, of blocks b1, b2 and so on.
        head: the last convolution.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.conv", "classifier": "head.fc"}

    def __init__(self, *, preprocess: Preprocess, made: Design, drop_path: float = 0.0) -> None:
        super().__init__()
        self.design, self.preprocess = made, preprocess
        act = get_act_layer(made.activation)
        kernel, stride, pooled = STEMS[made.stem]
        self.stem = ConvNormAct(preprocess.channels, made.stem_width, kernel, stride=stride, act_layer=act)
        self.pool = nn.MaxPool2d(3, 2, 1) if pooled > 1 else nn.Identity()
        self.stages, inputs, stride, reached = nn.ModuleDict(), made.stem_width, stride * pooled, []
        kind = _mobile if made.block == "mbconv" else _residual
        for number, (stage, rates) in enumerate(zip(made.stages, drop_rates(drop_path, made.depths), strict=True)):
            self.stages[f"s{number + 1}"] = kind(made, stage, inputs, rates)
            inputs, stride = stage.width, stride * stage.stride
            reached.append(Level(inputs, stride))
        deepest = {level.stride: number for number, level in enumerate(reached)}
        self.kept = tuple(deepest.values())
        self.levels = tuple(reached[number] for number in self.kept)
        self.head = ConvNormAct(inputs, made.head, 1, act_layer=act) if made.head else nn.Identity()
        self.width = made.head or inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                outputs = module.kernel_size[0] ** 2 * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / outputs) ** 0.5)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) of any size to features."""
        check_images(self, images)
        x, maps = self.pool(self.stem(images)), []
        for stage in self.stages.values():
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps[number] for number in self.kept), self.head(x).mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, the blocks, and the last convolution where there is one."""
        blocks = [block for stage in self.stages.values() for block in stage.children()]
        return [self.stem, *blocks, *([self.head] if self.design.head else [])]


def _residual(made: Design, stage: Stage, inputs: int, rates: Sequence[float]) -> nn.Module:
    """Bottlenecks as RegNets have them; a linear one has no projected shortcut and no last activation."""
    linear = made.block == "linear"
    options: dict[str, Any] = {"downsample": None if linear else "conv1x1", "linear_out": linear}
    options |= {"bottle_ratio": stage.ratio, "group_size": stage.group, "se_ratio": made.squeeze}
    options |= {"act_layer": get_act_layer(made.activation), "norm_layer": nn.BatchNorm2d}
    return RegStage(stage.depth, inputs, stage.width, stage.stride, 1, list(rates), **options)


def _mobile(made: Design, stage: Stage, inputs: int, rates: Sequence[float]) -> nn.Module:
    """Inverted bottlenecks with depthwise convolutions; a ratio of 1 expands nothing."""
    kind = InvertedResidual if stage.ratio != 1 else DepthwiseSeparableConv
    shared: dict[str, Any] = {"dw_kernel_size": stage.kernel, "act_layer": get_act_layer(made.activation)}
    if stage.ratio != 1:
        shared["exp_ratio"] = stage.ratio
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for number, rate in enumerate(rates, start=1):
        squeezed = int(inputs * made.squeeze)  # of the block's input, not of its inner width
        own: dict[str, Any] = {"se_layer": partial(SqueezeExcite, rd_channels=squeezed) if squeezed else None}
        stride = stage.stride if number == 1 else 1
        blocks[f"b{number}"] = kind(inputs, stage.width, stride=stride, drop_path_rate=rate, **shared, **own)
        inputs = stage.width
    return nn.Sequential(blocks)


def published(state: Mapping[str, Tensor], backbone: AnyNet) -> dict[str, Tensor]:
    """Weights of pycls (facebookresearch/pycls, MIT) under our names; their classifier is left out.

    Args:
        state: tensors of a checkpoint of pycls.
        backbone: of `fast_scaling`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules = _mobile_rules(backbone.design) if backbone.design.block == "mbconv" else _residual_rules()
    shared = [(r"^head\.fc\.", None), (r"^head\.conv_bn\.", "head.bn."), (r"^(s\d+\.b\d+)\.", r"stages.\1.")]
    return convert(state, [*shared, *rules], backbone)


def _residual_rules() -> Rules:
    block = r"^(stages\.s\d+\.b\d+)\."
    rules: list[tuple[str, str | None]] = [
        (rf"{block}proj\.", r"\1.downsample.conv."),
        (rf"{block}bn\.", r"\1.downsample.bn."),
    ]
    for theirs, ours in (("a", "conv1"), ("b", "conv2"), ("c", "conv3")):
        rules += [(rf"{block}f\.{theirs}\.", rf"\1.{ours}.conv."), (rf"{block}f\.{theirs}_bn\.", rf"\1.{ours}.bn.")]
    return [*rules, (rf"{block}f\.se\.f_ex\.0\.", r"\1.se.fc1."), (rf"{block}f\.se\.f_ex\.2\.", r"\1.se.fc2.")]


def _mobile_rules(made: Design) -> Rules:
    """A block that expands nothing numbers its norms from its depthwise convolution on."""
    rules: list[tuple[str, str | None]] = []
    for number, stage in enumerate(made.stages, start=1):
        names = {"exp": "conv_pw", "exp_bn": "bn1", "dwise": "conv_dw", "dwise_bn": "bn2"}
        names |= {"lin_proj": "conv_pwl", "lin_proj_bn": "bn3"}
        if stage.ratio == 1:
            names = {"dwise": "conv_dw", "dwise_bn": "bn1", "lin_proj": "conv_pw", "lin_proj_bn": "bn2"}
        block = rf"^(stages\.s{number}\.b\d+)\."
        rules += [(rf"{block}{theirs}\.", rf"\1.{ours}.") for theirs, ours in names.items()]
    return [*rules, (r"\.se\.f_ex\.0\.", ".se.conv_reduce."), (r"\.se\.f_ex\.2\.", ".se.conv_expand.")]


_ARMS = {
    "base": ("the small RegNet, unscaled", FAST),
    "d": ("depth", "d"),
    "w": ("width and groups", "wg"),
    "r": ("resolution", "r"),
    "dwr": ("uniform compound", "dwgr"),
    "dWr": ("fast compound: eight tenths into width", FAST),
}
_SCALES = (2, 4, 8)
_DEVICES = {"16": partial(roofline, macs_a_second=62e12, bytes_a_second=9e11, item_bytes=2)}
_DEVICES["32"] = partial(roofline, macs_a_second=7e12, bytes_a_second=9e11)
"""A data-centre GPU of 2018: in 16 bit it does 140 MACs for each number that it moves, in 32 bit only 31."""


class _Setting(NamedTuple):
    """What a scale of the effect trains: the base, images, epochs, the factor of the MACs."""

    base: Design
    images: int
    epochs: int
    scale: int


_TOY = design(depths=(1, 3, 3), widths=(16, 40, 80), strides=(1, 2, 2), groups=8, stem_width=16, size=32)
"""Small widths round coarsely: these are some whose strategies come within 5 % of the same MACs."""
_SETTINGS = {
    "toy": _Setting(_TOY, 3000, 6, 4),
    "gpu": _Setting(
        design(
            depths=(1, 3, 3), widths=(32, 80, 160), strides=(1, 2, 2), groups=8, stem="small", stem_width=32, size=32
        ),
        50_000,
        60,
        4,
    ),
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """A small RegNet scaled by five strategies to the same MACs: accuracy, and what run time follows."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=4000)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    side, macs = setting.base.size, complexity(setting.base).macs / 1e6
    return Effect(
        claim="width-heavy scaling is as accurate as compound scaling, with fewer activations, which run time follows",
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="base",
        metrics={"top1": "%", "macs": "M", "activations": "M", "ms": "ms", **{f"ms_{s}x": "ms" for s in _SCALES}},
        measure=measure,
        checks=partial(_checks, base=setting.base),
        limits=(
            f"a RegNet of {macs:.1f} M MACs at {side} pixels, scaled by {setting.scale}; larger images are enlarged"
            f" where they have no more pixels; {len(train)} images and {setting.epochs} epochs leave large"
            " networks short of training, and seeds differ by a point. Times are of evaluation in batches of 32 on one"
            " thread of this processor. The simulated device computes in 16 bit: in 32 bit, where wide networks are"
            " bound by compute, the sign is the other one, and that was seen before 16 bit was chosen"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    strategy, base = _ARMS[arm][1], setting.base
    made = base if arm == "base" else scaled(base, setting.scale, strategy)
    backbone, cost = anynet(made), complexity(made)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    top1 = trained(backbone, train, test, plan).scores["top1"]
    found = {"top1": top1, "macs": cost.macs / 1e6, "activations": cost.activations / 1e6, "ms": _milliseconds(made)}
    grown = [float("nan") if arm == "base" else _milliseconds(scaled(base, factor, strategy)) for factor in _SCALES]
    return {**found, **{f"ms_{factor}x": value for factor, value in zip(_SCALES, grown, strict=True)}}


def _milliseconds(made: Design, *, images: int = 32, repeats: int = 9) -> float:
    """Shortest time an image takes; other processes can only add to it."""
    network, batch = anynet(made).eval(), torch.randn(images, 3, made.size, made.size)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            network(batch)
            seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds) / images


def _checks(measured: Measured, *, base: Design) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in measured.values}
    spread = max(top1[arm] for arm in ("w", "dwr", "dWr")) - min(top1[arm] for arm in ("w", "dwr", "dWr"))
    grown = [(arm, factor) for arm in _ARMS if arm != "base" for factor in _SCALES]
    designs = [scaled(base, factor, _ARMS[arm][1]) for arm, factor in grown]
    time_real = [float(measured.values[arm][f"ms_{factor}x"].min()) for arm, factor in grown]
    real = _followed(designs, time_real)
    short, ample = (_followed(designs, [_DEVICES[bits](made) for made in designs]) for bits in ("16", "32"))
    return [
        Check(
            "w, dwr and dWr are at most 2 points of accuracy apart",
            spread <= 2,
            f"{spread:.2f} points; {', '.join(f'{arm} {value:.2f}' for arm, value in top1.items())}",
        ),
        Check("run time follows activations more than MACs", real[0] > real[1], _in_words(real, designs)),
        Check(
            "so it does on a simulated GPU in 16 bit, which is short of bandwidth",
            short[0] > short[1],
            f"{_in_words(short, designs)}; in 32 bit, where it is not: {ample[0]:.3f} and {ample[1]:.3f}",
        ),
    ]


def _followed(designs: Sequence[Design], seconds: Sequence[float]) -> tuple[float, float]:
    """Pearson's r of time with activations, and with MACs."""
    costs = [complexity(made) for made in designs]
    activations, macs = ([getattr(cost, name) for cost in costs] for name in ("activations", "macs"))
    return float(np.corrcoef(activations, seconds)[0, 1]), float(np.corrcoef(macs, seconds)[0, 1])


def _in_words(found: tuple[float, float], designs: Sequence[Design]) -> str:
    return f"Pearson's r {found[0]:.3f} with activations, {found[1]:.3f} with MACs, over {len(designs)} networks"
