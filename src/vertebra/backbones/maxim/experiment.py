"""MAXIM's claims at a small scale: both axes beside one, gated skips beside plain ones, a U-Net of convolutions.

Every arm restores 32 x 32 crops of photographs from gaussian noise and, trained again, from synthetic rain. All have
about as many parameters. Larger images are mosaics of the same degraded crops: what they lose is measured crop by crop.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu

from vertebra.backbones.maxim import PAPER, Restorer, maxim, restorer
from vertebra.backbones.maxim.stage import SLOPE
from vertebra.contracts import Backbone, Batch, Check, Effect, Features, Level, Measured, Method, Preprocess, Progress
from vertebra.data.dataset import Dataset, Split

SIDE, SIGMA, EPSILON = 32, 25 / 255, 1e-3
MOSAICS = {"64x64": (2, 2), "96x160": (3, 5)}
RAIN_LENGTH, RAIN_SHARE, RAIN_LIGHT = 9, 0.01, 0.8

ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "conv_unet": ("residual 3 x 3 convolutions, plain skips", {}),
    "full": ("the paper's blocks and skips", {}),
    "block": ("both halves of the channels mixed within blocks", {"mixer": "block"}),
    "grid": ("both halves mixed over the grid", {"mixer": "grid"}),
    "conv_skips": ("skips by convolutions, without gates", {"skips": "conv"}),
}
Degrade = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Setting:
    """What a scale trains: the network, crops, images a step, steps against noise and against rain."""

    network: Mapping[str, Any]
    images: int
    held: int
    batch: int
    steps: Mapping[str, int]


_SMALL = {"scales": 1, "groups": 1, "bottlenecks": 1, "block": (4, 4), "grid": (4, 4)}
SETTINGS = {
    "toy": Setting({"stages": 1, "width": 8, **_SMALL}, 2000, 120, 16, {"noise": 300, "rain": 100}),
    "gpu": Setting({"stages": 2, "width": 16, **_SMALL, "groups": 2}, 40_000, 960, 64, {"noise": 20_000, "rain": 8000}),
}


def compared(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The effect of the page."""
    from vertebra.arms import parts

    setting = SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=setting.held)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return measured(arm, seed, setting, train, test)

    return Effect(
        claim="mixing along two axes restores better than along one, gates better than plain skips, and both better"
        " than convolutions of as many parameters; weights fit images of any size",
        arms={name: what for name, (what, _) in ARMS.items()},
        baseline="conv_unet",
        metrics={
            "noise": "dB",
            "rain": "dB",
            **{f"noise_{size}": "dB" for size in MOSAICS},
            "noise_input": "dB",
            "rain_input": "dB",
            "params": "k",
            "seconds": "s",
        },
        measure=measure,
        checks=_checks,
        limits=(
            f"width {setting.network['width']}, {setting.steps['noise']} steps of {setting.batch} crops of {SIDE}"
            f" pixels against noise of 25 / 255 and {setting.steps['rain']} against drawn rain, by the Charbonnier loss"
            " of the result alone: an early point of training, where the paper has hundreds of thousands of steps on"
            " crops of 256 pixels. Mosaics have seams, which photographs have not"
        ),
        data=words,
    )


def measured(arm: str, seed: int, setting: Setting, train: Split, test: Split) -> Mapping[str, float]:
    """One cell: an arm trained against noise, and anew against rain."""
    import copy
    import time

    from vertebra.config import Plan, Views
    from vertebra.data.loader import Batches
    from vertebra.training.loop import fit

    started, found = time.monotonic(), {}
    torch.manual_seed(seed)
    start = arm_of(arm, setting)
    for kind, degrade in DEGRADATIONS.items():
        network = copy.deepcopy(start)
        method = Restoring(network, degrade, seed)
        plan = Plan(
            epochs=1 + setting.steps[kind] * setting.batch // len(train),
            steps=setting.steps[kind],
            batch=min(setting.batch, len(train)),
            lr=2e-3,
            weight_decay=0.0,
            warmup_epochs=0.1,
            views=Views(scale=(1.0, 1.0)),
            seed=seed,
            workers=0,
        )
        preprocess = method.backbone.preprocess
        fit(method, Batches(train, preprocess, views=plan.views, batch=plan.batch, seed=seed, workers=0), plan)
        batches = Batches(test, preprocess, views=None, batch=256, seed=seed, workers=0)
        clean = torch.cat([batch.images for batch in batches.epoch(0)])
        found |= judged(network.eval(), clean, degrade(clean, torch.Generator().manual_seed(0)), kind)
    found["params"] = _size(start) / 1000
    return {**found, "seconds": time.monotonic() - started}


def judged(network: nn.Module, clean: Tensor, degraded: Tensor, kind: str) -> dict[str, float]:
    """Peak signal-to-noise ratios, means over crops: alone and, against noise, in mosaics."""
    found = {kind: _psnr(_run(network, degraded), clean), f"{kind}_input": _psnr(degraded, clean)}
    if kind == "noise":
        for size, (rows, columns) in MOSAICS.items():
            whole = len(clean) // (rows * columns) * rows * columns
            restored = cut(_run(network, mosaic(degraded[:whole], rows, columns)), rows, columns)
            alone = _psnr(_run(network, degraded[:whole]), clean[:whole])
            found[f"noise_{size}"] = found[kind] + _psnr(restored, clean[:whole]) - alone
    return found


def mosaic(crops: Tensor, rows: int, columns: int) -> Tensor:
    """Crops (N * rows * columns, C, h, w) side by side: (N, C, rows * h, columns * w)."""
    x = crops.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5)  # (N, C, rows, h, columns, w)
    return x.flatten(4, 5).flatten(2, 3)


def cut(images: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `mosaic`."""
    x = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _run(network: nn.Module, images: Tensor) -> Tensor:
    """Restored images, in 0..1."""
    with torch.inference_mode():
        return torch.cat([_last(network(part)) for part in images.split(32)]).clamp(0, 1)


def _last(found: Tensor | Sequence[Sequence[Tensor]]) -> Tensor:
    return found if isinstance(found, Tensor) else found[-1][-1]


def _psnr(images: Tensor, clean: Tensor) -> float:
    return float(-10 * (images - clean).square().mean((1, 2, 3)).clamp(min=1e-10).log10().mean())


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of 25 / 255."""
    return images + SIGMA * torch.randn(images.shape, generator=generator).to(images)


def rain(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bright streaks, each image's with a slope of its own."""
    count, _, height, width = images.shape
    drops = torch.rand(count, 1, height, width, generator=generator)
    drops = (drops < RAIN_SHARE) * torch.rand(count, 1, height, width, generator=generator)
    slopes = torch.rand(count, generator=generator) - 0.5
    steps = torch.arange(RAIN_LENGTH) - RAIN_LENGTH // 2
    kernels = torch.zeros(count, 1, RAIN_LENGTH, RAIN_LENGTH)
    columns = (RAIN_LENGTH // 2 + slopes[:, None] * steps).round().long()  # (B, length)
    kernels[torch.arange(count)[:, None], 0, torch.arange(RAIN_LENGTH), columns] = 1.0
    streaks = conv2d(drops.transpose(0, 1), kernels, padding=RAIN_LENGTH // 2, groups=count).transpose(0, 1)
    return (images + RAIN_LIGHT * streaks.to(images)).clamp(0, 1)


DEGRADATIONS: Mapping[str, Degrade] = {"noise": noise, "rain": rain}


class ConvUNet(Backbone):
    """The layout of a stage with residual 3 x 3 convolutions and plain skips.

    Attributes:
        downs: strided convolutions between `encoders`; `ups` and `merges` lead back through `decoders`.
    """

    def __init__(self, *, preprocess: Preprocess, width: int) -> None:
        super().__init__()
        dims, colours = [width, 2 * width, 4 * width], preprocess.channels
        self.stem = nn.Conv2d(colours, width, 3, 1, 1)
        self.encoders, self.decoders = (nn.ModuleList(map(_Residuals, dims)) for _ in range(2))
        wider = [*dims[1:], dims[-1]]
        self.downs = nn.ModuleList(nn.Conv2d(*pair, 4, 2, 1) for pair in zip(dims, wider, strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(*pair, 2, 2) for pair in zip(wider, dims, strict=True))
        self.merges = nn.ModuleList(nn.Conv2d(2 * dim, dim, 1) for dim in dims)
        self.bottleneck = _Residuals(dims[-1])
        self.levels, self.width, self.preprocess = (Level(width, 1),), dims[-1], preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W), sides multiples of 8, to the decoder's map."""
        x, skips = self.stem(images), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        deepest = x = self.bottleneck(x)
        for up, merge, decoder in reversed([*zip(self.ups, self.merges, self.decoders, strict=True)]):
            x = decoder(merge(torch.cat((up(x), skips.pop()), 1)))
        return Features((x,), deepest.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """All of it."""
        return [*self.children()]


class ConvRestorer(nn.Module):
    """That network and the convolution that makes an image of its map."""

    def __init__(self, backbone: ConvUNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.out = nn.Conv2d(backbone.levels[0].channels, backbone.preprocess.channels, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Degraded images to restored ones."""
        return images + self.out(self.backbone(images).pyramid[0])


class _Residuals(nn.Sequential):
    """Two residual pairs of convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__(*(_Residual(dim) for _ in range(2)))


class _Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1), nn.Conv2d(dim, dim, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(leaky_relu(self.conv1(x), SLOPE))


class Restoring(Method):
    """Restore what was degraded on the way, by the Charbonnier loss."""

    def __init__(self, network: Restorer | ConvRestorer, degrade: Degrade, seed: int) -> None:
        super().__init__()
        self.network, self.degrade, self.seed = network, degrade, seed

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # a module registered twice would be saved twice
        return self.network.backbone

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The loss of clean images and what the network makes of degraded ones."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + progress.step)
        restored = _last(self.network(self.degrade(batch.images, generator)))
        return {"charbonnier": ((restored - batch.images).square() + EPSILON**2).sqrt().mean()}


def arm_of(arm: str, setting: Setting) -> Restorer | ConvRestorer:
    """The network of an arm; those of other parts have the width that gives them as many parameters."""
    if arm in ("full", "block", "grid"):
        return _maxim(setting, **ARMS[arm][1])
    make = _unet if arm == "conv_unet" else _maxim

    def size(width: int) -> int:
        return _size(make(setting, **ARMS[arm][1], width=width))

    with torch.device("meta"):
        wanted, widths = _size(_maxim(setting)), range(2, 5 * int(setting.network["width"]))
        above = widths[bisect_left(widths, wanted, key=size)]
        width = min((above - 1, above), key=lambda width: abs(size(width) - wanted))
    return make(setting, **ARMS[arm][1], width=width)


def _maxim(setting: Setting, **options: Any) -> Restorer:
    return restorer(maxim("1s", image_size=SIDE, **{**setting.network, **options}))


def _unet(setting: Setting, *, width: int) -> ConvRestorer:
    with torch.device("meta"):
        preprocess = _maxim(setting).backbone.preprocess
    return ConvRestorer(ConvUNet(preprocess=preprocess, width=width))


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _checks(found: Measured) -> Sequence[Check]:
    noisy = {arm: found.mean(arm, "noise") for arm in found.values}
    sizes = {arm: found.mean(arm, "params") for arm in found.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in noisy.items())
    drops = {size: noisy["full"] - found.mean("full", f"noise_{size}") for size in MOSAICS}
    apart = {arm: 100 * (size / sizes["full"] - 1) for arm, size in sizes.items() if arm != "full"}

    def gain(arm: str) -> str:
        gains = found.gain("full", arm, "noise")
        return f"{gains.mean():+.2f} dB (seeds: {', '.join(f'{value:+.2f}' for value in gains)})"

    return [
        Check(
            "full is at least 0.05 dB ahead of blocks alone on noise",
            noisy["full"] >= noisy["block"] + 0.05,
            f"{gain('block')}; all arms: {words} dB",
        ),
        Check(
            "full is at least 0.1 dB ahead of the U-Net of convolutions on noise",
            noisy["full"] >= noisy["conv_unet"] + 0.1,
            gain("conv_unet"),
        ),
        Check(
            "at 64 x 64 and 96 x 160 full loses at most 0.3 dB",
            max(drops.values()) <= 0.3,
            ", ".join(f"{drop:+.2f} dB at {size}" for size, drop in drops.items()),
        ),
        Check(
            "the arms have as many parameters within 10 %",
            max(map(abs, apart.values())) <= 10,
            ", ".join(f"{arm} {share:+.1f} %" for arm, share in apart.items()),
        ),
    ]
