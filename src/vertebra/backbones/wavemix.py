"""WaveMix: one width and one resolution, where a wavelet transform mixes pixels and 1 x 1 convolutions mix channels.

Shapes: images (B, 3, H, W) to one map (B, dim, H / s, W / s), s 4 for the networks of ImageNet and 1 for those of
small images. A block (`vertebra.blocks.wave_mix`) adds to the map what it makes of its Haar bands. Departs from the
paper in nothing on sizes that halve as often as a block has levels; others, which the authors' code refuses, are
continued by zeros.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.wave_mix import Upsample, wave_mix
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="wavemix",
    title="WaveMix: A Resource-efficient Neural Network for Image Analysis",
    year=2022,
    arxiv="2205.14375",
    reference="pranavphoenix/WaveMix",
    licence="MIT",
    claim=(
        "ImageNet 75.06 % with 28 M and 71.18 % with 12 M parameters; CIFAR-10 90 % with 520,106 and Fashion-MNIST 90 %"
        " with 7,156; Cityscapes 83.04 mIoU; less GPU memory than convolutional networks and transformers of its size"
    ),
    note=(
        "Classification networks; the decoders for segmentation and super-resolution (transposed convolutions) are left"
        " to tasks. Haar at one level before a 1 x 1 convolution is the same family of functions as"
        " space-to-depth: the transform only turns the convolution's weights."
    ),
)

VARIANTS = {
    "192_16_level3": {"dim": 192, "depth": 16, "level": 3, "patch": 4, "image_size": 256},
    "192_16_level1": {"dim": 192, "depth": 16, "level": 1, "patch": 4, "image_size": 256},
    "192_16_level2": {"dim": 192, "depth": 16, "level": 2, "patch": 4, "image_size": 256},
    "192_16_level4": {"dim": 192, "depth": 16, "level": 4, "patch": 4, "image_size": 256},
    "256_16_level3": {"dim": 256, "depth": 16, "level": 3, "patch": 4, "image_size": 256},
    "256_16_level4": {"dim": 256, "depth": 16, "level": 4, "stride": 2, "image_size": 256},
    "256_12_level2": {"dim": 256, "depth": 12, "level": 2, "patch": 8, "image_size": 256},
    "v3_144_16": {"dim": 144, "depth": 16, "ratio": 4, "upsample": "shuffle", "patch": 4},
    "lite_144_7": {"dim": 144, "depth": 7, "image_size": 32},
    "lite_320_8": {"dim": 320, "depth": 8, "image_size": 32},
    "lite_256_8": {"dim": 256, "depth": 8, "image_size": 32},
    "lite_256_10": {"dim": 256, "depth": 10, "image_size": 32},
    "lite_256_12": {"dim": 256, "depth": 12, "image_size": 64},
    "lite_64_6": {"dim": 64, "depth": 6, "image_size": 32},
    "lite_32_7": {"dim": 32, "depth": 7, "upsample": "nearest", "image_size": 32},
    "lite_8_5": {"dim": 8, "depth": 5, "channels": 1, "image_size": 28},
    "lite_8_10": {"dim": 8, "depth": 10, "upsample": "nearest", "channels": 1, "image_size": 28},
    "nano": {"dim": 32, "depth": 3, "level": 2, "patch": 2, "image_size": 32},
}


class WaveMixOptions(BackboneOptions, total=False):
    """Options of WaveMix; a variant sets some.

    Attributes:
        dim: channels, a multiple of 4.
        depth: blocks.
        level: levels of a block's transform.
        ratio: hidden channels of a block over `dim`.
        dropout: of the hidden channels, 0..1.
        patch: side in pixels of the patches of the patchifying stem; None takes two strided convolutions.
        stride: of each convolution of the strided stem.
        upsample: how a block gets back to its size, as in `vertebra.blocks.wave_mix`.
        bands: what takes the place of Haar's transform, as in `vertebra.blocks.wave_mix`.
    """

    dim: int
    depth: int
    level: int
    ratio: int
    dropout: float
    patch: int | None
    stride: int
    upsample: Upsample
    bands: Callable[[int], nn.Module] | None


def wavemix(variant: str = "192_16_level3", **options: Unpack[WaveMixOptions]) -> "WaveMix":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`: width and blocks, and the levels of their transform, 1 in the "lite" ones.
        options: as in `WaveMixOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    size: Any = VARIANTS.get(variant, {}).get("image_size", 224)
    return build("wavemix", VARIANTS, variant, options, WaveMix, crop=0.875 if size > 64 else 1.0)


class WaveMix(Backbone):
    """Stem and blocks at one resolution; build it with `wavemix`.

    Attributes:
        stem: images to the map.
        blocks: with their residuals.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "pool.2"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int,
        level: int = 1,
        patch: int | None = None,
        stride: int = 1,
        drop_path: float = 0.0,
        **block: Any,
    ) -> None:
        check_at_least("wavemix", 1, depth=depth, stride=stride, patch=patch or 1)
        super().__init__()
        blocks = [wave_mix(dim, level=level, **block) for _ in range(depth)]
        (rates,) = drop_rates(drop_path, (depth,))
        self.stem = _patchify(preprocess.channels, dim, patch) if patch else _strided(preprocess.channels, dim, stride)
        self.blocks = nn.ModuleList(Residual(mix, rate) for mix, rate in zip(blocks, rates, strict=True))
        self.least = patch or 1
        self.levels = (Level(dim, patch or stride**2),)
        self.width = dim
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images, least=self.least)
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # 1 x 1 convolutions are faster so
        for block in self.blocks:
            x = block(x)
        return Features((x,), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem and the blocks."""
        return [self.stem, *self.blocks]


class Residual(nn.Module):
    """A block beside the map that it is given."""

    def __init__(self, mix: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.mix = mix
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        return x + self.drop_path(self.mix(x))


def _patchify(channels: int, dim: int, patch: int) -> nn.Sequential:
    """Two convolutions without anything between, then patches."""
    return nn.Sequential(
        nn.Conv2d(channels, dim // 4, 3, 1, 1),
        nn.Conv2d(dim // 4, dim // 2, 3, 1, 1),
        nn.Conv2d(dim // 2, dim, patch, patch),
        nn.GELU(),
        nn.BatchNorm2d(dim),
    )


def _strided(channels: int, dim: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, dim // 2, 3, stride, 1), nn.Conv2d(dim // 2, dim, 3, stride, 1))


def published(state: Mapping[str, Tensor], backbone: WaveMix) -> dict[str, Tensor]:
    """The authors' released weights (pranavphoenix/WaveMix, MIT) under our names; the head is left out.

    Their blocks take the three details of one channel side by side, ours one band after the other: the inputs of the
    first convolution of a level are put in our order.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `wavemix`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    bands = backbone.width // 4
    first = re.compile(r"\.feedforward\d?\.0\.weight$")
    ordered = {name: _by_band(value, bands) if first.search(name) else value for name, value in state.items()}
    rules = [(r"^module\.", ""), (r"^pool\.", None), (r"^conv\.", "stem."), (r"^layers\.(\d+)\.", r"blocks.\1.mix.")]
    rules += [(r"\.reduction\.", ".reduce."), (r"\.feedforward\.", ".feedforward1.")]
    rules += [(rf"\.feedforward{level + 1}\.", f".levels.{level}.") for level in range(4)]
    return convert(ordered, rules, backbone)


def _by_band(weight: Tensor, channels: int) -> Tensor:
    """(outputs, low, details channel by channel, more) to (outputs, low, details band by band, more)."""
    low, details, more = weight.split([channels, 3 * channels, weight.shape[1] - 4 * channels], 1)
    return torch.cat((low, details.unflatten(1, (channels, 3)).transpose(1, 2).flatten(1, 2), more), 1)


class _Learned(nn.Module):
    """An average and three learned bands in Haar's place; for the effect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3 * channels, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return nn.functional.avg_pool2d(x, 2), *self.conv(x).chunk(3, 1)


class _SpaceToDepth(nn.Module):
    """Every second pixel in Haar's place; for the effect."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[:, :, top::2, left::2] for top in (0, 1) for left in (0, 1))


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: width, blocks, pixels, images, epochs."""

    dim: int
    depth: int
    size: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(32, 4, 16, 4000, 12), "gpu": _Setting(64, 6, 32, 50_000, 120)}

_ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "space_to_depth": ("every second pixel in place of Haar's bands", {"bands": _SpaceToDepth}),
    "haar": ("the paper's block, one level", {}),
    "learned": ("an average and three learned bands", {"bands": _Learned}),
    "resnet": ("ResNet-20 of about as many parameters", {}),
    "level_2": ("two levels of Haar, with more parameters", {"level": 2}),
}

_ARMS_GPU = _ARMS | {"lite_32_7": ("the paper's 37,058 parameters", {"dim": 32, "depth": 7, "upsample": "nearest"})}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Haar's bands beside learned ones, every second pixel, and a ResNet, at equal parameters."""
    from vertebra.arms import parts

    setting, arms = _SETTINGS[scale], _ARMS if scale == "toy" else _ARMS_GPU
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="a wavelet transform that has no parameters mixes pixels as well as what learns to, or better",
        arms={name: what for name, (what, _) in arms.items()},
        baseline="space_to_depth",
        metrics={"top1": "%", "nll": "", "params": "k", "seconds": "s"},
        measure=measure,
        checks=_checks if scale == "toy" else _checks_gpu,
        limits=(
            f"width {setting.dim}, {setting.depth} blocks, {setting.size} pixels, {len(train)} images, {setting.epochs}"
            " epochs: three seeds tell differences of some two points. At one level the 1 x 1 convolution behind Haar "
            "and behind space-to-depth makes the same functions, so that only the start and the optimiser tell them "
            "apart. Two levels are compared at these pixels, not at 64"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    views = Views(scale=(0.6, 1.0))
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, weight_decay=0.01, views=views, seed=seed)
    scores = trained(backbone, train, test, plan).scores
    params = sum(p.numel() for p in backbone.parameters()) / 1000
    return {"top1": scores["top1"], "nll": scores["nll"], "params": params, "seconds": scores["seconds"]}


def _arm(arm: str, setting: _Setting) -> Backbone:
    if arm != "resnet":
        options: Any = {"dim": setting.dim, "depth": setting.depth, **_ARMS_GPU[arm][1]}
        return wavemix("lite_64_6", image_size=setting.size, **options)
    from vertebra.backbones.cifar_resnet import cifar_resnet

    def params(backbone: Backbone) -> int:
        return sum(p.numel() for p in backbone.parameters())

    with torch.device("meta"):  # parameters grow as the square of the width
        width = round(16 * (params(_arm("haar", setting)) / params(cifar_resnet("20", width=16))) ** 0.5)
    return cifar_resnet("20", width=width, image_size=setting.size)


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    params = {arm: measured.mean(arm, "params") for arm in measured.values}
    gains, words = measured.gain("haar", "space_to_depth", "top1"), ", ".join(f"{a} {v:.2f}" for a, v in mean.items())
    shares = {arm: params[arm] / params["haar"] - 1 for arm in ("space_to_depth", "learned", "resnet")}
    return [
        Check(
            "Haar is at least as accurate as space-to-depth",
            mean["haar"] >= mean["space_to_depth"],
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); all arms: {words}",
        ),
        Check(
            "Haar is at most 0.3 points behind learned bands",
            mean["haar"] >= mean["learned"] - 0.3,
            f"{mean['haar'] - mean['learned']:+.2f} points",
        ),
        Check(
            "the controls have as many parameters within 5 %",
            max(abs(share) for share in shares.values()) <= 0.05,
            ", ".join(f"{arm} {100 * share:+.1f} %" for arm, share in shares.items()),
        ),
    ]


def _checks_gpu(measured: Measured) -> Sequence[Check]:
    large, small = measured.mean("haar", "top1"), measured.mean("lite_32_7", "top1")
    return [
        *_checks(measured),
        Check("Lite-64/6 has at least 89.5 %", large >= 89.5, f"{large:.2f} %"),
        Check("Lite-32/7 has at least 79.5 %", small >= 79.5, f"{small:.2f} %"),
    ]
