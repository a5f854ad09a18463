"""DSM: four stages whose maps are mixed in cosine frequencies, with weights of frequencies that the map asks for.

Shapes: images (B, 3, H, W) to maps at strides 4, 8, 16, 32, sides rounded up. A block is a spectrum mixer
(`vertebra.blocks.spectrum_mixer`), then two linear layers, each behind a norm, times a learnt factor a channel, beside
a shortcut. The paper (arXiv 2309.06721) shows neither code nor, in what is public, the numbers of its networks: widths,
depths and names of the variants are ours, as is all of the design that its abstract does not say. Filters are held for
the grids of 224 pixels and interpolated at other sizes. Maps are kept in channels-last memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.rows import Dense
from vertebra.blocks.spectrum_mixer import DSMixer, Weighting, spectrum_mixer
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="dsm",
    title="Dynamic Spectrum Mixer for Visual Recognition",
    year=2023,
    arxiv="2309.06721",
    claim="83.8 % on ImageNet and 49.9 mIoU on ADE20K, ahead of earlier transformers and MLP-like networks",
    numbers="of our design, by a formula: the paper's tables are not public",
    parity="the transform to scipy; there is no code of the authors",
    note=(
        "Sizes are ours, not the paper's, and no weights exist. The bands, what they are weighted by and their number"
        " are our reading of the abstract. Segmentation beside the static filter is not measured here yet."
    ),
)

VARIANTS = {
    "tiny": {"dims": (64, 128, 320, 512), "depths": (3, 3, 10, 3)},
    "small": {"dims": (64, 128, 320, 512), "depths": (3, 4, 24, 4)},
    "base": {"dims": (96, 192, 480, 768), "depths": (3, 4, 24, 4)},
    "nano": {
        "dims": (16, 32, 64, 128),
        "depths": (1, 1, 2, 1),
        "groups": 4,
        "patch": 2,
        "grids": (16, 8, 4, 2),
        "image_size": 32,
    },
}


class DsmOptions(BackboneOptions, total=False):
    """Options; a variant sets some. Four numbers are one a stage.

    Attributes:
        dims: channels; multiples of `groups`.
        depths: blocks.
        grids: side of the maps that filters are held for.
        ratios: hidden channels of the linear layers as a multiple of the stage's channels.
        weighting: what a map weights: its "bands", several "filters", or nothing ("static").
        bands: of frequencies.
        groups: of channels, with weights of their own.
        local: whether a 3 x 3 depthwise convolution stands beside the transform.
        patch: stride of the first convolution, in pixels.
        layer_scale: where the factors of the branches start.
        mixer: (channels, stage from 0) -> a module that keeps the shape, in the spectrum mixer's place.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    grids: Sequence[int]
    ratios: Sequence[float]
    weighting: Weighting
    bands: int
    groups: int
    local: bool
    patch: int
    layer_scale: float
    mixer: Callable[[int, int], nn.Module] | None


def dsm(variant: str = "tiny", **options: Unpack[DsmOptions]) -> "Dsm":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `DsmOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("dsm", VARIANTS, variant, options, Dsm)


class Dsm(Backbone):
    """Four stages of blocks; build it with `dsm`.

    Attributes:
        embeds: a convolution and a norm before each stage.
        stages: blocks.
        norm: of the last map, before it is pooled.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embeds.0.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        grids: Sequence[int] = (56, 28, 14, 7),
        ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        weighting: Weighting = "bands",
        bands: int = 8,
        groups: int = 8,
        local: bool = False,
        patch: int = 4,
        layer_scale: float = 1.0,
        drop_path: float = 0.0,
        mixer: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        check_at_least("dsm", 1, dims=dims, depths=depths, grids=grids, patch=patch)
        for name, values in {"dims": dims, "depths": depths, "grids": grids, "ratios": ratios}.items():
            if len(values) != 4:
                raise UsageError(f"dsm: {name} is {tuple(values)}; it needs four, one a stage")
        super().__init__()

        def spectrum(channels: int, stage: int) -> nn.Module:
            grid = grids[stage]
            return spectrum_mixer(channels, weighting, grid=grid, bands=bands, groups=groups, local=local)

        make, before = mixer or spectrum, (preprocess.channels, *dims)
        self.embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage, (channels, rates) in enumerate(zip(dims, drop_rates(drop_path, depths), strict=True)):
            stride = 2 if stage else patch
            self.embeds.append(nn.Sequential(_strided(before[stage], channels, stride), MapNorm(channels)))
            hidden = round(ratios[stage] * channels)
            blocks = (Block(channels, make(channels, stage), hidden, layer_scale, rate) for rate in rates)
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.levels = tuple(Level(channels, patch * 2**stage) for stage, channels in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess
        self.apply(_start)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = images.contiguous(memory_format=torch.channels_last), []
        for embed, stage in zip(self.embeds, self.stages, strict=True):
            x = stage(embed(x))
            maps.append(x)
        return Features(tuple(maps), self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))

    def trunk(self) -> list[nn.Module]:
        """Each stage's embedding and blocks, then the norm."""
        parts: list[nn.Module] = []
        for embed, stage in zip(self.embeds, self.stages, strict=True):
            parts += [embed, *stage]  # type: ignore[misc]
        return [*parts, self.norm]


def _strided(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """A convolution whose windows overlap; sides are rounded up: 7 x 7 at a stride of 4, 3 x 3 at 2."""
    return nn.Conv2d(inputs, outputs, 2 * stride - 1, stride, stride - 1)


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, DSMixer):  # comes after its own layers
        module.reset_weights()


class MapNorm(nn.LayerNorm):
    """A layer norm over the channels of maps; what comes out lies in channels-last memory."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps (B, C, H, W) to maps."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A mixer over space and two linear layers over channels, each a branch beside a shortcut."""

    def __init__(self, channels: int, mixer: nn.Module, hidden: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = MapNorm(channels), mixer, MapNorm(channels)
        self.mlp = nn.Sequential(Dense(channels, hidden), nn.GELU(), Dense(hidden, channels))
        self.scale1 = nn.Parameter(torch.full((channels,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((channels,), layer_scale))
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        x = self._added(x, self.mixer(self.norm1(x)).permute(0, 2, 3, 1), self.scale1)
        return self._added(x, self.mlp(self.norm2(x).permute(0, 2, 3, 1)), self.scale2)

    def _added(self, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        """Maps plus a branch (B, H, W, C) times its factors."""
        plain = x.permute(0, 2, 3, 1)
        if self.training and self.drop.drop_prob:
            return (plain + self.drop(branch * scale)).permute(0, 3, 1, 2)
        return torch.addcmul(plain, branch, scale.to(branch.dtype)).permute(0, 3, 1, 2)


class SpatialMLP(nn.Module):
    """Two linear layers over the places of a map of one size, the same for every channel (MLP-Mixer); for the effect.

    Attributes:
        hidden: places between the two layers.
    """

    def __init__(self, places: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(places, hidden), nn.GELU(), nn.Linear(hidden, places))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps, in channels-last memory."""
        mixed = self.mlp(x.flatten(2)).unflatten(2, x.shape[2:])
        return mixed.contiguous(memory_format=torch.channels_last)


_ARMS: Mapping[str, str] = {
    "dynamic": "bands of cosine frequencies weighted as the map asks",
    "static": "a learnt filter of cosine frequencies, as GFNet has of Fourier's",
    "spatial": "linear layers over the places of the map, as MLP-Mixer",
    "filters": "two filters mixed as the map asks, the design's other mode",
}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: channels and blocks a stage, groups, pixels, images, epochs."""

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    groups: int
    size: int
    images: int
    epochs: int


_SETTINGS = {
    "toy": _Setting((24, 48, 96, 192), (1, 1, 2, 1), 4, 32, 4000, 8),
    "gpu": _Setting((32, 64, 160, 256), (2, 2, 4, 2), 8, 64, 50_000, 60),
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Dynamic weights of the spectrum beside a static filter and linear layers over places, at equal parameters."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="weights of frequencies that depend on the image gain accuracy, and differ where images do",
        arms=_ARMS,
        baseline="static",
        metrics={"top1": "%", "nll": "", "more": "%", "log10_p": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"widths {setting.dims}, {sum(setting.depths)} blocks, {setting.size} pixels, {len(train)} images,"
            f" {setting.epochs} epochs: differences of a point or less need more seeds than three. Arms have the"
            " parameters of `dynamic`, stage by stage, by wider or narrower linear layers. log10_p is of the smallest"
            " p-value of a rank test (Mann-Whitney) between the weights of smooth and of textured test images, over all"
            " blocks and bands, times the number of tests. The static filter is of cosines, so that one thing differs."
            " Segmentation is not measured"
        ),
        data=words,
    )


def armed(arm: str, setting: _Setting) -> Dsm:
    """The network of an arm; linear layers over channels are as wide as gives the parameters of "dynamic"."""
    grids = [setting.size // 2 // 2**stage for stage in range(4)]

    def mixer(arm: str, stage: int) -> nn.Module:
        channels, grid = setting.dims[stage], grids[stage]
        if arm == "spatial":
            places, room = grid**2, _params(lambda: mixer("dynamic", stage))
            return SpatialMLP(places, max(1, min(4 * places, (room - places) // (2 * places + 1))))
        variant = "bands" if arm == "dynamic" else arm
        return spectrum_mixer(channels, variant, grid=grid, groups=setting.groups, filters=2)

    ratios = []
    for stage, channels in enumerate(setting.dims):
        given, taken = (_params(lambda which=which, stage=stage: mixer(which, stage)) for which in ("dynamic", arm))
        ratios.append(4 + (given - taken) / (2 * channels + 1) / channels)  # hidden channels cost 2 C + 1 each
    return dsm(
        dims=setting.dims,
        depths=setting.depths,
        ratios=ratios,
        patch=2,
        image_size=setting.size,
        mixer=lambda channels, stage: mixer(arm, stage),
    )


def _params(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import added, trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    with torch.device("meta"):
        more = added(backbone, armed("static", setting))
    log10_p = _adapts(backbone, test) if arm in ("dynamic", "filters") else float("nan")
    return {"top1": scores["top1"], "nll": scores["nll"], "more": more, "log10_p": log10_p}


def _adapts(backbone: Dsm, test: Split) -> float:
    """log10 of the p-value that smooth and textured images get the same weights, over all blocks and bands."""
    from scipy.stats import mannwhitneyu

    weights, texture = band_weights(backbone, test)
    textured, varied = texture > np.median(texture), weights[:, np.ptp(weights, axis=0) > 0]
    if not varied.size:
        return 0.0
    found = mannwhitneyu(varied[textured], varied[~textured], axis=0)
    p = float(found.pvalue.min()) * weights.shape[1]  # Bonferroni
    return float(np.log10(np.clip(p, 1e-300, 1.0)))


def band_weights(backbone: Dsm, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Weights that each image gets, and how textured it is.

    Returns:
        (n, blocks * bands) weights, means over groups; and (n,) mean squares of the steps from a pixel to the next
        ones, after normalisation.
    """
    from vertebra.data.loader import Batches

    mixers = [module for module in backbone.modules() if isinstance(module, DSMixer)]
    batches = Batches(split, backbone.preprocess, views=None, batch=256, seed=0, workers=0)
    device = next(backbone.parameters()).device
    rows: list[Tensor] = []
    texture: list[Tensor] = []
    for batch in batches.epoch(0, 0):
        images = batch.images.to(device)
        found: list[Tensor] = []
        hooks = [
            mixer.select.register_forward_hook(_keeper(mixer, found)) for mixer in mixers if mixer.select is not None
        ]
        with torch.inference_mode():
            backbone.eval()(images)
        for hook in hooks:
            hook.remove()
        rows.append(torch.cat(found, 1).cpu())
        texture.append(sum(images.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3)).cpu())  # type: ignore[union-attr]
    return torch.cat(rows).double().numpy(), torch.cat(texture).double().numpy()


def _keeper(mixer: DSMixer, found: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, asked: Tensor) -> None:
        found.append(mixer.weights_from(asked).mean(2))  # (B, bands or filters)

    return keep


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    checks = []
    for better, worse in (("dynamic", "static"), ("static", "spatial")):
        gains = measured.gain(better, worse, "top1")
        seeds = ", ".join(f"{gain:+.2f}" for gain in gains)
        found = f"{gains.mean():+.2f} points (seeds: {seeds}); all arms: {words}"
        checks.append(Check(f"{better} is more accurate than {worse}", mean[better] > mean[worse], found))
    p = measured.values["dynamic"]["log10_p"]
    more = {arm: measured.mean(arm, "more") for arm in measured.values}
    return [
        *checks,
        Check(
            "band weights of smooth and textured images differ, p < 0.01 in every seed",
            bool((p < -2).all()),
            f"log10 p: {', '.join(f'{value:.1f}' for value in p)}",
        ),
        Check(
            "all arms have as many parameters within 3 %",
            max(more.values()) - min(more.values()) <= 3,
            ", ".join(f"{arm} {value:+.2f} %" for arm, value in more.items()),
        ),
    ]
