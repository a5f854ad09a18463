"""HorNet: the skeleton of ConvNeXt with recursive gated convolutions, of a higher order in every stage.

Shapes: images (B, 3, H, W) to maps of width, 2, 4 and 8 times the width at strides 4, 8, 16, 32; sides are rounded down
as strided convolutions do. A block is gnConv (`vertebra.blocks.gnconv`), then two linear layers, each behind a norm,
times a learnt factor a channel, beside a shortcut. Variants with "gf" mix the last two stages with global filters,
held for their image size and interpolated at others. Maps are kept in channels-last memory. Departs from the paper in
nothing; see arXiv 2207.14284.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.gnconv import gnconv
from vertebra.blocks.rows import Dense
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="hornet",
    title="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
    year=2022,
    arxiv="2207.14284",
    reference="raoyongming/HorNet",
    licence="MIT",
    claim=(
        "at equal size ahead of Swin and ConvNeXt on ImageNet (HorNet-T 7x7 82.8, GF 83.0), COCO and ADE20K; gated "
        "convolutions of a higher order help decoders too"
    ),
    parity="golden outputs of the authors' networks, also where filters are interpolated",
    note="The decoders with gnConv (HorFPN, HorUPerNet) are necks and are not here yet: their test needs a detector.",
)

VARIANTS = {
    "tiny_7x7": {"width": 64},
    "tiny_gf": {"width": 64, "grids": (None, None, 14, 7)},
    "small_7x7": {"width": 96},
    "small_gf": {"width": 96, "grids": (None, None, 14, 7)},
    "base_7x7": {"width": 128},
    "base_gf": {"width": 128, "grids": (None, None, 14, 7)},
    "base_gf_384": {"width": 128, "grids": (None, None, 24, 12), "image_size": 384},
    "large_7x7": {"width": 192},
    "large_gf": {"width": 192, "grids": (None, None, 14, 7)},
    "large_gf_384": {"width": 192, "grids": (None, None, 24, 12), "image_size": 384},
    "nano": {"width": 24, "depths": (1, 1, 3, 1), "patch": 2, "grids": (None, None, 4, 2), "image_size": 32},
}


class HorNetOptions(BackboneOptions, total=False):
    """Options; four numbers are one a stage.

    Attributes:
        width: channels of the first stage; each stage doubles them.
        depths: blocks.
        orders: of the gated convolutions.
        grids: side of the maps that a stage's global filters are held for; None mixes by a convolution of 7 x 7.
        ratios: hidden channels of the linear layers as a multiple of the stage's channels.
        patch: stride of the first convolution, in pixels.
        layer_scale: where the factors of the branches start.
        mixer: (channels, stage from 0) -> a module that keeps the shape, in place of gnConv.
    """

    width: int
    depths: Sequence[int]
    orders: Sequence[int]
    grids: Sequence[int | None]
    ratios: Sequence[float]
    patch: int
    layer_scale: float
    mixer: Callable[[int, int], nn.Module] | None


def hornet(variant: str = "tiny_7x7", **options: Unpack[HorNetOptions]) -> "HorNet":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `HorNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, an option out of range, or a width that cannot be halved as often as the
            orders need.
    """
    return build("hornet", VARIANTS, variant, options, _made)


def _made(*, preprocess: Preprocess, **options: Any) -> "HorNet":
    if min(preprocess.size) >= 384:  # as the authors test there: both sides resized, nothing cut off
        preprocess = replace(preprocess, crop=1.0, fit="squash")
    return HorNet(preprocess=preprocess, **options)


class HorNet(Backbone):
    """Four stages of blocks; build it with `hornet`.

    Attributes:
        stem: image to the first map.
        downs: norm and convolution of stride 2 between the stages.
        stages: blocks.
        norm: of the pooled vector.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        width: int,
        depths: Sequence[int] = (2, 3, 18, 2),
        orders: Sequence[int] = (2, 3, 4, 5),
        grids: Sequence[int | None] = (None, None, None, None),
        ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        patch: int = 4,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        mixer: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        check_at_least("hornet", 1, width=width, depths=depths, orders=orders, patch=patch)
        for name, values in {"depths": depths, "orders": orders, "grids": grids, "ratios": ratios}.items():
            if len(values) != 4:
                raise UsageError(f"hornet: {name} is {tuple(values)}; it needs four, one a stage")
        super().__init__()
        widths = [width * 2**stage for stage in range(4)]
        self.stem = nn.Sequential(nn.Conv2d(preprocess.channels, width, patch, patch), MapNorm(width))
        self.downs = nn.ModuleList(
            nn.Sequential(MapNorm(before), nn.Conv2d(before, 2 * before, 2, 2)) for before in widths[:3]
        )
        make = mixer or (lambda channels, stage: gnconv(channels, order=orders[stage], grid=grids[stage]))
        self.stages = nn.ModuleList()
        for stage, (channels, rates) in enumerate(zip(widths, drop_rates(drop_path, depths), strict=True)):
            hidden = round(ratios[stage] * channels)
            blocks = (Block(channels, make(channels, stage), hidden, layer_scale, rate) for rate in rates)
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.levels = tuple(Level(channels, patch * 2**stage) for stage, channels in enumerate(widths))
        self.width = widths[-1]
        self.preprocess = preprocess
        self.apply(_start)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images, least=self.levels[-1].stride)
        x, maps = self.stem(images.contiguous(memory_format=torch.channels_last)), []
        for stage, down in zip(self.stages, (*self.downs, nn.Identity()), strict=True):
            x = stage(x)
            maps.append(x)
            x = down(x)
        return Features(tuple(maps), self.norm(x.mean((2, 3))))

    def trunk(self) -> list[nn.Module]:
        """The stem, the blocks with what lies between the stages, the norm."""
        parts: list[nn.Module] = [self.stem, *self.stages[0]]  # type: ignore[misc]
        for down, stage in zip(self.downs, list(self.stages)[1:], strict=True):
            parts += [down, *stage]  # type: ignore[misc]
        return [*parts, self.norm]


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
        self.norm1, self.mixer = MapNorm(channels), mixer
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(Dense(channels, hidden), nn.GELU(), Dense(hidden, channels))
        self.gamma1 = nn.Parameter(torch.full((channels,), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((channels,), layer_scale))
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        x = self._added(x, self.mixer(self.norm1(x)).permute(0, 2, 3, 1), self.gamma1)
        return self._added(x, self.mlp(self.norm2(x.permute(0, 2, 3, 1))), self.gamma2)

    def _added(self, x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
        """Maps plus a branch (B, H, W, C) times its factors."""
        plain = x.permute(0, 2, 3, 1)
        if self.training and self.drop.drop_prob:
            return (plain + self.drop(branch * gamma)).permute(0, 3, 1, 2)
        return torch.addcmul(plain, branch, gamma.to(branch.dtype)).permute(0, 3, 1, 2)


def published(state: Mapping[str, Tensor], backbone: HorNet) -> dict[str, Tensor]:
    """The authors' released weights (raoyongming/HorNet, MIT) under our names; their classifier is left out.

    Args:
        state: tensors of a released checkpoint, as its entry "model" holds them.
        backbone: of `hornet`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, RULES, backbone)


RULES: Sequence[tuple[str, Any]] = [
    (r"^head\.", None),
    (r"^downsample_layers\.0\.", "stem."),
    *((rf"^downsample_layers\.{number + 1}\.", f"downs.{number}.") for number in range(3)),
    (r"\.gnconv\.", ".mixer."),
    (r"\.pws\.", ".steps."),
    (r"\.dwconv\.", ".mixer."),
    (r"\.dw\.", ".local."),
    (r"\.complex_weight$", ".spectrum"),
    (r"\.pre_norm\.", ".before."),
    (r"\.post_norm\.", ".after."),
    (r"\.pwconv1\.", ".mlp.0."),
    (r"\.pwconv2\.", ".mlp.2."),
]


def _window(channels: int) -> nn.Module:
    return WindowMixer(channels)


_ARMS: Mapping[str, tuple[str, Sequence[int], Callable[[int], nn.Module] | None]] = {
    "rising": ("gnConv of order 2, 3, 4, 5", (2, 3, 4, 5), None),
    "order_1": ("gnConv of order 1: a plain gated convolution", (1,) * 4, None),
    "order_2": ("gnConv of order 2", (2,) * 4, None),
    "order_3": ("gnConv of order 3", (3,) * 4, None),
    "order_4": ("gnConv of order 4", (4,) * 4, None),
    "dw7": ("depthwise convolution of 7 x 7, as in ConvNeXt", (1,) * 4, lambda c: nn.Conv2d(c, c, 7, 1, 3, groups=c)),
    "window": ("attention in windows of 4 x 4, as in Swin", (1,) * 4, _window),
}


class WindowMixer(nn.Module):
    """Multi-head attention in windows of 4 x 4 with learnt biases (timm's), for the effect; maps are padded."""

    def __init__(self, channels: int, *, window: int = 4) -> None:
        from timm.models.swin_transformer import WindowAttention

        super().__init__()
        self.window = window
        self.attention = WindowAttention(channels, num_heads=max(1, channels // 16), window_size=window)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        (batch, channels, height, width), side = x.shape, self.window
        x = nn.functional.pad(x, (0, -width % side, 0, -height % side))
        rows, columns = x.shape[2] // side, x.shape[3] // side
        x = x.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        x = self.attention(x.reshape(-1, side * side, channels))  # (B * windows, side * side, C)
        x = x.reshape(batch, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, channels, rows * side, columns * side)[:, :, :height, :width]


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: channels of the first stage, blocks, pixels, images, epochs."""

    width: int
    depths: tuple[int, int, int, int]
    size: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(16, (1, 1, 3, 1), 32, 4000, 7), "gpu": _Setting(64, (2, 2, 6, 2), 64, 50_000, 60)}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Gated convolutions of several orders beside a depthwise convolution and window attention, at equal parameters."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="spatial interactions of a higher order gain accuracy at equal parameters",
        arms={name: what for name, (what, _, _) in _ARMS.items()},
        baseline="order_1",
        metrics={"top1": "%", "nll": "", "more": "%"},
        measure=measure,
        checks=_checks,
        limits=(
            f"width {setting.width}, {sum(setting.depths)} blocks, {setting.size} pixels, {len(train)} images: "
            "differences of a point or less need more seeds than three; layer scale starts at 1 in every arm, since at "
            "1e-6 a short training hardly meets the mixers; the mixer alone differs, so that the arms dw7 and window "
            "keep HorNet's two branches a block; decoders (HorFPN) are not measured"
        ),
        data=words,
    )


def armed(arm: str, setting: _Setting) -> HorNet:
    """The network of an arm; linear layers are widened or narrowed to the parameters of "rising", stage by stage."""
    _, orders, own = _ARMS[arm]

    def mixer(channels: int, stage: int) -> nn.Module:
        return own(channels) if own else gnconv(channels, order=orders[stage])

    ratios = []
    for stage in range(4):
        channels = setting.width * 2**stage
        with torch.device("meta"):
            made = gnconv(channels, order=_ARMS["rising"][1][stage]), mixer(channels, stage)
        given, taken = (sum(p.numel() for p in module.parameters()) for module in made)
        ratios.append(4 + (given - taken) / (2 * channels + 1) / channels)  # hidden channels cost 2 C + 1 each
    return hornet(
        width=setting.width,
        depths=setting.depths,
        ratios=ratios,
        patch=2,
        layer_scale=1.0,
        mixer=mixer,
        image_size=setting.size,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import added, trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    return {"top1": scores["top1"], "nll": scores["nll"], "more": added(backbone, armed("rising", setting))}


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    gains = measured.gain("rising", "order_1", "top1")
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    steps = [mean[f"order_{order + 1}"] - mean[f"order_{order}"] for order in (1, 2, 3)]
    more = [measured.mean(arm, "more") for arm in measured.values]
    return [
        Check(
            "rising orders gain at least 0.5 points over order 1",
            bool(gains.mean() >= 0.5),
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); all arms: {words}",
        ),
        Check(
            "rising orders are at most 0.3 points behind a depthwise convolution",
            mean["rising"] >= mean["dw7"] - 0.3,
            f"{mean['rising'] - mean['dw7']:+.2f} points",
        ),
        Check(
            "from order 1 to 4 accuracy never falls by more than 0.5 points",
            min(steps) >= -0.5,
            f"steps of {', '.join(f'{step:+.2f}' for step in steps)} points",
        ),
        Check(
            "parameters are equal within 3 %",
            max(map(abs, more)) <= 3,
            f"{min(more):+.2f} to {max(more):+.2f} %",
        ),
    ]
