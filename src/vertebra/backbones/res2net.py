"""Res2Net: a bottleneck whose 3 x 3 convolution is a chain over groups of channels.

The channels of a block are cut into s groups; each group's 3 x 3 convolution also sees the output of the group before
it (`vertebra.blocks.hierarchical_conv`), so that one block holds receptive fields of many sizes. The first block of a
stage has no chain, and its last group is average-pooled. `50_26w_4s` reads: 50 layers, width 26, 4 scales. `next` has
grouped convolutions (c of them), `dla60` puts the block into DLA, and the `v1b` networks have a deep stem and
average-pooled shortcuts.

Networks of the authors' ImageNet releases are timm's. Those written here (`Res2Net`) are the networks for CIFAR, small
ones, and Paddle's `200_vd`, whose released weights are of another edition of the block: there the first block of the
network has its chain too, and pooled groups do not count the zeros around the map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np
import torch
from timm.layers.drop import DropPath
from timm.layers.squeeze_excite import SEModule
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images, drop_rates
from vertebra.backbones.timm import Timm, TimmOptions, build_either
from vertebra.blocks.hierarchical_conv import Form, hierarchical_conv
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

if TYPE_CHECKING:
    from vertebra.data.dataset import Dataset, Split

PAPER = Paper(
    id="res2net",
    title="Res2Net: A New Multi-scale Backbone Architecture",
    year=2019,
    arxiv="1904.01169",
    reference="Res2Net/Res2Net-PretrainedModels",
    licence="none stated",
    claim=(
        "ImageNet top-1 error 22.01 % for Res2Net-50 against 23.85 % for ResNet-50 at equal complexity; gains for "
        "ResNeXt and DLA alike"
    ),
    note=(
        "timm's DLA networks have 1.4 to 1.8 % fewer parameters than the authors' README states, and the networks for "
        "CIFAR-100 0.2 to 6 % fewer than the paper's table, whose code is not public; its ResNeXt-29 of 34.4 M is met. "
        "The comparison at its size on CIFAR-100, and detection, are left to a machine with a GPU."
    ),
)

VARIANTS = {
    "50_26w_4s": {"timm": "res2net50_26w_4s"},
    "50_48w_2s": {"timm": "res2net50_48w_2s"},
    "50_14w_8s": {"timm": "res2net50_14w_8s"},
    "50_26w_6s": {"timm": "res2net50_26w_6s"},
    "50_26w_8s": {"timm": "res2net50_26w_8s"},
    "101_26w_4s": {"timm": "res2net101_26w_4s"},
    "next50": {"timm": "res2next50"},
    "dla60": {"timm": "dla60_res2net"},
    "next_dla60": {"timm": "dla60_res2next"},
    "50_v1b": {"timm": "res2net50d"},
    "101_v1b": {"timm": "res2net101d"},
    "200_vd": {"depths": (3, 12, 48, 3), "stem": "deep", "shortcut": "pool", "edition": "paddle"},
    "next29_6c_24w_4s": {
        "depths": (3, 3, 3),
        "dims": (256, 512, 1024),
        "width": 24,
        "cardinality": 6,
        "stem": "small",
        "image_size": 32,
    },
    "next29_8c_25w_4s": {
        "depths": (3, 3, 3),
        "dims": (256, 512, 1024),
        "width": 25,
        "cardinality": 8,
        "stem": "small",
        "image_size": 32,
    },
    "next29_6c_24w_6s": {
        "depths": (3, 3, 3),
        "dims": (256, 512, 1024),
        "width": 24,
        "scales": 6,
        "cardinality": 6,
        "stem": "small",
        "image_size": 32,
    },
    "next29_6c_24w_4s_se": {
        "depths": (3, 3, 3),
        "dims": (256, 512, 1024),
        "width": 24,
        "cardinality": 6,
        "stem": "small",
        "attention": "se",
        "image_size": 32,
    },
    "next29_8c_25w_4s_se": {
        "depths": (3, 3, 3),
        "dims": (256, 512, 1024),
        "width": 25,
        "cardinality": 8,
        "stem": "small",
        "attention": "se",
        "image_size": 32,
    },
    "next29_6c_24w_6s_se": {
        "depths": (3, 3, 3),
        "dims": (256, 512, 1024),
        "width": 24,
        "scales": 6,
        "cardinality": 6,
        "stem": "small",
        "attention": "se",
        "image_size": 32,
    },
    "nano": {"depths": (2, 2, 2), "dims": (64, 128, 256), "stem": "small", "image_size": 32},
}

_EXPANSION = 4


class Res2NetOptions(TimmOptions, total=False):
    """Options; those below are of the networks written here, and `network` of timm's. A variant sets some.

    Attributes:
        depths: blocks a stage.
        dims: channels that a stage gives, multiples of 4.
        width: channels of one group of one scale, for a stage of 256 channels; in proportion for others, rounded down.
        scales: groups of channels that a block's convolution is split into; 1 is the plain bottleneck.
        cardinality: groups within each convolution; multiplies the width.
        stem: "plain" 7 x 7 and "deep" three 3 x 3 convolutions to stride 4 with a max-pooling, "small" one 3 x 3 of
            stride 1.
        shortcut: how a shortcut halves the map: "conv" with a strided 1 x 1 convolution, "pool" with an average first.
        form: of the blocks that do not begin a stage, as in `hierarchical_conv`.
        edition: "authors", or "paddle" with a chain in the first block, and pooled groups that leave padding out.
        attention: "se" for squeeze-and-excitation of ratio 16 at the end of every branch.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    width: int
    scales: int
    cardinality: int
    stem: Literal["plain", "deep", "small"]
    shortcut: Literal["conv", "pool"]
    form: Form
    edition: Literal["authors", "paddle"]
    attention: Literal["none", "se"]


def res2net(variant: str = "50_26w_4s", **options: Unpack[Res2NetOptions]) -> "Timm | Res2Net":
    """Build a Res2Net.

    Args:
        variant: one of `VARIANTS`.
        options: as in `Res2NetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range or of another kind of network.
        VertebraError: weights that are not here or do not fit.
    """
    return build_either(PAPER.id, VARIANTS, variant, options, Res2Net, interpolation="bilinear")


class Res2Net(Backbone):
    """Stem and stages of bottlenecks; build it with `res2net`.

    Attributes:
        stem: image to the first map.
        stages: of `Bottleneck`s.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "fc"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depths: Sequence[int],
        dims: Sequence[int] = (256, 512, 1024, 2048),
        width: int = 26,
        scales: int = 4,
        cardinality: int = 1,
        stem: Literal["plain", "deep", "small"] = "plain",
        shortcut: Literal["conv", "pool"] = "conv",
        form: Form = "chain",
        edition: Literal["authors", "paddle"] = "authors",
        attention: Literal["none", "se"] = "none",
        drop_path: float = 0.0,
    ) -> None:
        _check(depths, dims, width, scales, cardinality)
        _check_words(stem=stem, shortcut=shortcut, form=form, edition=edition, attention=attention)
        super().__init__()
        self.preprocess = preprocess
        before, first = dims[0] // _EXPANSION, 1 if stem == "small" else 4
        self.stem = nn.Sequential(*_stem(stem, preprocess.channels, before))
        self.stages, rates = nn.ModuleList(), drop_rates(drop_path, depths)
        for number, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            wide, blocks = dim * width // (64 * _EXPANSION) * cardinality, []
            for block in range(depth):
                begins = block == 0 and not (edition == "paddle" and number == 0)
                conv = hierarchical_conv(
                    wide * scales,
                    "stage" if begins else form,
                    scales=scales,
                    stride=2 if block == 0 and number else 1,
                    groups=cardinality,
                    padding="counted" if edition == "authors" else "left_out",
                )
                path = None if block else _shortcut(shortcut, before, dim, 2 if number else 1)
                end = SEModule(dim, rd_channels=max(1, dim // 16)) if attention == "se" else nn.Identity()
                blocks.append(Bottleneck(before, wide * scales, dim, conv, path, end, rates[number][block]))
                before = dim
            self.stages.append(nn.Sequential(*blocks))
        self.levels = tuple(Level(dim, first * 2**number) for number, dim in enumerate(dims))
        self.width = dims[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem and the blocks."""
        return [self.stem, *(block for stage in self.stages for block in stage)]  # type: ignore[attr-defined]


class Bottleneck(nn.Module):
    """A 1 x 1 convolution, the hierarchical one, and a 1 x 1 convolution beside a shortcut.

    Attributes:
        conv1: to the groups, with the norm `bn1`.
        chain: of the groups.
        conv3: to the outputs, with the norm `bn3`.
        attention: at the end of the branch.
        shortcut: of a block that begins a stage, else the identity.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        chain: nn.Module,
        shortcut: nn.Module | None = None,
        attention: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.chain = chain
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.attention = attention or nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.chain(nn.functional.relu(self.bn1(self.conv1(x)), inplace=True))
        y = self.drop_path(self.attention(self.bn3(self.conv3(y))))
        return nn.functional.relu(y + self.shortcut(x), inplace=True)


def _stem(kind: str, channels: int, width: int) -> list[nn.Module]:
    """Image to `width` channels."""
    if kind == "deep":
        half = max(1, width // 2)
        places = [(channels, half, 3, 2), (half, half, 3, 1), (half, width, 3, 1)]
    else:
        places = [(channels, width, 3, 1) if kind == "small" else (channels, width, 7, 2)]
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in places:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return layers if kind == "small" else [*layers, nn.MaxPool2d(3, 2, 1)]


def _shortcut(kind: str, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(outputs)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm)
    pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), norm)


def _check(depths: Sequence[int], dims: Sequence[int], width: int, scales: int, cardinality: int) -> None:
    """Refuse numbers that make no network."""
    check_at_least("res2net", 1, depths=depths, width=width, scales=scales, cardinality=cardinality)
    check_at_least("res2net", _EXPANSION, dims=dims)
    if len(depths) != len(dims) or any(dim % _EXPANSION for dim in dims):
        raise UsageError(
            f"res2net: depths {depths} and dims {dims} need a number for each stage, and dims multiples of {_EXPANSION}"
        )
    if min(dims) * width < 64 * _EXPANSION:
        raise UsageError(
            f"res2net: width {width} leaves no channel in a stage of {min(dims)}; take at least"
            f" {-(-64 * _EXPANSION // min(dims))}"
        )


_WORDS = {
    "stem": ("plain", "deep", "small"),
    "shortcut": ("conv", "pool"),
    "form": ("chain", "parallel"),
    "edition": ("authors", "paddle"),
    "attention": ("none", "se"),
}


def _check_words(**options: str) -> None:
    for name, value in options.items():
        if value not in _WORDS[name]:
            raise UsageError(f"res2net: {name} is {value!r}; it can be {' or '.join(_WORDS[name])}")


def published(state: Mapping[str, Tensor], backbone: Res2Net) -> dict[str, Tensor]:
    """Released weights under our names; their classifier is left out.

    Args:
        state: tensors of the authors' or timm's checkpoints of residual networks, or of Paddle's `res2net_vd`, read
            into torch (its linear layer is transposed there, and not needed here).
        backbone: of `res2net`, the same network; Paddle's need `edition="paddle"`.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    given = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    rules = _paddle() if "conv1_1._conv.weight" in given else _authors(given)
    colours = backbone.preprocess.channels
    for first in ("conv1.weight", "conv1.0.weight", "conv1_1._conv.weight"):
        if first in given and given[first].shape[1] != colours:
            given[first] = adapt_input_conv(colours, given[first])
    return convert(given, rules, backbone)


def _authors(state: Mapping[str, Tensor]) -> Rules:
    """Rules for the authors' and timm's names; the first norm stands beside a deep stem."""
    deep = any(name.startswith("conv1.0.") for name in state)
    return [
        (r"^fc\.", None),
        (r"^bn1\.", "stem.7." if deep else "stem.1."),
        (r"^conv1\.(?=\d)" if deep else r"^conv1\.", "stem." if deep else "stem.0."),
        *((rf"^layer{number + 1}\.", f"stages.{number}.") for number in range(4)),
        (r"\.(convs|bns)\.", r".chain.\1."),
        (r"\.downsample\.", ".shortcut."),
        (r"\.se\.", ".attention."),
    ]


def _paddle() -> Rules:
    """Rules for Paddle's names: a convolution and its norm are one layer there."""
    stem = [(rf"^conv1_{n}\._{what}\.", f"stem.{3 * n - 3 + at}.") for n in (1, 2, 3) for at, what in _PAIR]
    groups = [
        (rf"\.res\w+_branch2b_{n}\._{what}\.", f".chain.{('convs', 'bns')[at]}.{n - 1}.")
        for n in range(1, 9)
        for at, what in _PAIR
    ]
    ends = [(rf"\.conv{n}\._{what}\.", f".{('conv', 'bn')[at]}{1 + n}.") for n in (0, 2) for at, what in _PAIR]
    shortcut = [(rf"\.short\._{what}\.", f".shortcut.{1 + at}.") for at, what in _PAIR]
    statistics = [(r"\._mean$", ".running_mean"), (r"\._variance$", ".running_var")]
    return [(r"^out\.", None), (r"^bb_(\d+)_(\d+)\.", r"stages.\1.\2."), *stem, *groups, *ends, *shortcut, *statistics]


_PAIR = ((0, "conv"), (1, "batch_norm"))


@dataclass(frozen=True)
class _Setting:
    """What a scale trains: blocks and channels a stage, scales -> width, pixels, images to train and test, epochs."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    widths: Mapping[int, int]
    size: int
    images: int
    held: int
    epochs: int


_SETTINGS = {
    "toy": _Setting((2, 3, 3), (64, 128, 256), {1: 64, 2: 48, 4: 26, 8: 15}, 16, 2000, 4000, 12),
    "gpu": _Setting((3, 3, 3), (128, 256, 512), {1: 64, 2: 48, 4: 25, 8: 14}, 32, 50_000, 10_000, 60),
}

_ARMS: Mapping[str, tuple[str, int, Form]] = {
    "resnet": ("bottleneck with one convolution", 1, "chain"),
    "s2": ("2 scales", 2, "chain"),
    "s4": ("4 scales", 4, "chain"),
    "s8": ("8 scales", 8, "chain"),
    "parallel": ("4 scales without the additions", 4, "parallel"),
}

_FIELD = 64
"""Side in pixels of the images that the receptive field is measured on: it fits in."""


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> Effect:
    """A bottleneck beside 2, 4 and 8 scales, and 4 scales that do not see each other, at equal multiply-accumulates."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=setting.held)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="groups of channels in a chain see further and are more accurate than one convolution of equal cost",
        arms={name: what for name, (what, *_) in _ARMS.items()},
        baseline="resnet",
        metrics={"top1": "%", "nll": "", "radius": "", "half": "%", "macs": "M"},
        measure=measure,
        checks=_checks,
        limits=(
            f"a network of {3 * sum(setting.depths) + 2} layers at {setting.size} pixels and {len(train)} images, whose"
            " first block of each stage has no chain; differences of a point or less need more seeds than three; the"
            f" receptive field is that of the last map's centre in test images brought to {_FIELD} pixels"
        ),
        data=words,
    )


def _network(arm: str, setting: _Setting) -> Res2Net:
    _, scales, form = _ARMS[arm]
    made = res2net(
        "nano",
        depths=setting.depths,
        dims=setting.dims,
        image_size=setting.size,
        scales=scales,
        width=setting.widths[scales],
        form=form,
    )
    assert isinstance(made, Res2Net)
    return made


def _measure(arm: str, seed: int, setting: _Setting, train: "Split", test: "Split") -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.training.cost import count

    torch.manual_seed(seed)
    backbone = _network(arm, setting)
    views = Views(scale=(0.6, 1.0))
    plan = Plan(
        epochs=setting.epochs, batch=64, optimizer="sgd", lr=0.05, weight_decay=5e-4, clip=None, views=views, seed=seed
    )
    scores = trained(backbone, train, test, plan).scores
    macs = count(backbone, size=(setting.size, setting.size)).macs / 1e6
    return {"top1": scores["top1"], "nll": scores["nll"], **_field(backbone.eval(), test), "macs": macs}


def _field(backbone: Res2Net, test: "Split") -> dict[str, float]:
    """Receptive field of the last map's centre: root mean square distance in pixels, and the square of half of it."""
    from vertebra.data.loader import Batches
    from vertebra.probes.receptive_field import contributions, share_radius

    preprocess = replace(backbone.preprocess, size=(_FIELD, _FIELD))
    few = test.select(np.linspace(0, len(test) - 1, min(64, len(test))).round().astype(int))
    images = next(Batches(few, preprocess, views=None, batch=len(few), seed=0, workers=0).epoch(0)).images
    found = contributions(backbone, images.to(next(backbone.parameters())))
    far = (torch.arange(_FIELD, device=found.device) - _FIELD // 2).square()
    radius = ((found * (far[:, None] + far)).sum() / found.sum()).sqrt().item()
    return {"radius": radius, "half": 100 * share_radius(found, 0.5)}


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    radii = {arm: measured.mean(arm, "radius") for arm in measured.values}
    macs = [measured.mean(arm, "macs") / measured.mean("resnet", "macs") for arm in measured.values]
    gain, chain = measured.gain("s4", "resnet", "top1"), measured.gain("s4", "parallel", "top1")
    wider = radii["s4"] / radii["resnet"]
    return [
        Check(
            "4 scales gain at least 0.5 points on the bottleneck",
            bool(gain.mean() >= 0.5),
            f"{_signed(gain)}; all arms: {', '.join(f'{arm} {value:.2f}' for arm, value in mean.items())}",
        ),
        Check("the additions gain at least 0.3 points", bool(chain.mean() >= 0.3), _signed(chain)),
        Check(
            "the receptive field of 4 scales is at least 1.15 times the bottleneck's",
            wider >= 1.15,
            f"{wider:.2f} times; radius in pixels: {', '.join(f'{arm} {value:.1f}' for arm, value in radii.items())}",
        ),
        Check(
            "multiply-accumulates are the bottleneck's within 3 %",
            all(abs(share - 1) <= 0.03 for share in macs),
            f"{min(macs):.3f} to {max(macs):.3f} times",
        ),
    ]


def _signed(gains: np.ndarray) -> str:
    return f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)})"
