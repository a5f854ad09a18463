"""VCMamba: convolutional stages, and at the end a few blocks that scan the map along snakes in four directions.

Shapes: images (B, 3, H, W) of any size to maps at strides 4, 8, 16 and 32. A block of the first stages is a
feed-forward with a 3 x 3 depthwise convolution between its two 1 x 1 convolutions, and nothing else. The last
blocks have a mixer before it (`vertebra.blocks.snake_scan`), behind a learned position for each cell of the map, which
is resized where the map has another grid. `tokens` are the cells of the last map behind the last norm, `pooled` their
mean. `surgery.fuse` folds every norm that follows a convolution. Departs from the authors' code in nothing by default,
also where it departs from the paper's intent: `scan="corrected"` and `start="mamba"` undo that. Its second classifier,
for distillation, is left to the task.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.depthwise import depthwise
from vertebra.blocks.snake_scan import SnakeScan, Start, snake_scan
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.growth import exponent, seconds
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="vcmamba",
    title="VCMamba: Bridging Convolutions with Multi-Directional Mamba for Efficient Visual Representation",
    year=2025,
    arxiv="2509.04669",
    reference="Wertyuui345/VCMamba",
    licence="none",
    claim=(
        "82.6 % ImageNet top-1, 0.3 points over PlainMamba-L3 with 37 % fewer parameters; 47.1 mIoU on ADE20K, 2.0 "
        "over EfficientFormer-L7 with 62 % fewer"
    ),
    parity="golden outputs of the authors' network, its scan by a plain loop",
    note="The comparison at 128 pixels needs a GPU, the figure on ADE20K a segmenter.",
)

VARIANTS = {
    "s": {"dims": (32, 64, 144, 288), "depths": (4, 4, 12, 8)},
    "m": {"dims": (48, 96, 224, 448), "depths": (4, 4, 12, 6)},
    "b": {"dims": (64, 128, 320, 512), "depths": (4, 4, 12, 6)},
    "nano": {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 4), "mamba": 2, "halvings": 1, "image_size": 32},
}

_HALVINGS = 3
"""Of the map, behind the stem."""


class VCMambaOptions(BackboneOptions, total=False):
    """Options; a variant sets the first two.

    Attributes:
        dims: channels of the four stages; the first even.
        depths: blocks of the four stages.
        mamba: blocks of the last stage that have a mixer, its last ones.
        halvings: of the stem's two convolutions, those of stride 2; 1 or 0 suit small images.
        ratio: hidden channels of a feed-forward for each of its own.
        state: numbers that a channel of a mixer remembers.
        scan: "reference" as the authors' code computes it, or "corrected", see `vertebra.blocks.snake_scan`.
        start: how the steps of a scan are initialised: "plain" as they are in the authors' network, or "mamba" as their
            layer asks for before the network overwrites it.
        layer_scale: what the branches of convolutional blocks are multiplied by at the start.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    mamba: int
    halvings: int
    ratio: float
    state: int
    scan: Literal["reference", "corrected"]
    start: Start
    layer_scale: float


def vcmamba(variant: str = "s", **options: Unpack[VCMambaOptions]) -> "VCMamba":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `VCMambaOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("vcmamba", VARIANTS, variant, options, VCMamba)


class VCMamba(Backbone):
    """Stem, four stages, norm; build it with `vcmamba`.

    Attributes:
        stem: image to the first map.
        stages: of blocks, each but the first with its downsampling in front; `Positions` before the first mixer.
        norm: of the last cells.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0.conv", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        mamba: int = 4,
        halvings: int = 2,
        ratio: float = 4.0,
        state: int = 16,
        scan: Literal["reference", "corrected"] = "reference",
        start: Start = "plain",
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        _check(dims, depths, mamba, halvings, ratio)
        check_at_least("vcmamba", 0, layer_scale=layer_scale)
        super().__init__()
        stride = 2**halvings
        self.stem = _stem(preprocess.channels, dims[0], halvings)
        self.stages = nn.ModuleList()
        for stage, (dim, rates) in enumerate(zip(dims, drop_rates(drop_path, depths), strict=True)):
            hidden, convolutional = max(1, int(dim * ratio)), len(rates) - (mamba if stage == len(dims) - 1 else 0)
            blocks: list[nn.Module] = [conv_norm(dims[stage - 1], dim, 3, 2)] if stage else []
            blocks += [ConvBlock(dim, hidden, layer_scale, rate) for rate in rates[:convolutional]]
            if rates[convolutional:]:
                blocks.append(Positions(dim, _grid(preprocess.size, stride)))
            for rate in rates[convolutional:]:
                inner = snake_scan(2 * dim, scan, state=state, rank=ceil(dim / 16), start=start)
                blocks.append(MambaBlock(dim, hidden, inner, rate))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.levels = tuple(Level(dim, stride * 2**stage) for stage, dim in enumerate(dims))
        self.width, self.preprocess = dims[-1], preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images)
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        tokens = self.norm(x.flatten(2).mT)  # (B, N, width)
        return Features(tuple(maps), tokens.mean(1), tokens)

    def trunk(self) -> list[nn.Module]:
        """The stem, downsamplings, blocks and positions in order, and the last norm."""
        return [self.stem, *(block for stage in self.stages for block in stage), self.norm]  # type: ignore[union-attr]


def _check(dims: Sequence[int], depths: Sequence[int], mamba: int, halvings: int, ratio: float) -> None:
    if len(dims) != 4 or len(depths) != 4:
        raise UsageError(f"vcmamba: dims is {dims} and depths is {depths}; each needs four numbers, one a stage")
    check_at_least("vcmamba", 1, dims=dims)
    check_at_least("vcmamba", 0, depths=depths)
    if dims[0] % 2:
        raise UsageError(f"vcmamba: dims is {dims}; the first must be even, the stem has half of it inside")
    if not 0 <= mamba <= depths[-1]:
        raise UsageError(f"vcmamba: mamba is {mamba}; the last stage has {depths[-1]} blocks, so it can be 0 to that")
    if not 0 <= halvings <= 2:
        raise UsageError(f"vcmamba: halvings is {halvings}; the stem has two convolutions, so it can be 0, 1 or 2")
    if ratio <= 0:
        raise UsageError(f"vcmamba: ratio is {ratio}; it must be above 0")


def _stem(colours: int, dim: int, halvings: int) -> nn.Sequential:
    first, second = conv_norm(colours, dim // 2, 3, 1 + (halvings > 0)), conv_norm(dim // 2, dim, 3, 1 + (halvings > 1))
    for convolution in (first.conv, second.conv):
        lecun_normal_(convolution.weight)  # type: ignore[arg-type]
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))


def _grid(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of the last map."""
    rows, columns = (ceil(side / (stride * 2**_HALVINGS)) for side in size)
    return rows, columns


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), with its bias, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    return nn.Sequential(OrderedDict[str, nn.Module](conv=conv, norm=nn.BatchNorm2d(outputs)))


class FeedForward(nn.Sequential):
    """1 x 1 convolution to `hidden`, 3 x 3 depthwise, 1 x 1 back to `dim`, each with its norm; GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        widen, local = conv_norm(dim, hidden), conv_norm(hidden, hidden, 3, groups=hidden)
        narrow = conv_norm(hidden, dim)
        for pointwise in (widen.conv, narrow.conv):
            trunc_normal_(pointwise.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(pointwise.bias)  # type: ignore[arg-type]
        parts = {"widen": widen, "act": nn.GELU(), "local": local, "local_act": nn.GELU(), "narrow": narrow}
        super().__init__(OrderedDict[str, nn.Module](parts))


class ConvBlock(nn.Module):
    """x + drop(scale * mlp(x)).

    Attributes:
        mlp: the branch.
        scale: (dim, 1, 1).
    """

    def __init__(self, dim: int, hidden: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.mlp = FeedForward(dim, hidden)
        self.scale = nn.Parameter(torch.full((dim, 1, 1), layer_scale))
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        y = self.mlp(x)
        return torch.addcmul(x, y, self.scale) if isinstance(self.drop, nn.Identity) else x + self.drop(self.scale * y)


class MambaBlock(nn.Module):
    """x + drop(mixer(norm(x))), then the same with the feed-forward.

    Attributes:
        norm: batch norm before the mixer.
        mixer: with the scans.
        mlp_norm: batch norm before the feed-forward.
        mlp: the feed-forward.
    """

    def __init__(self, dim: int, hidden: int, scan: SnakeScan, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(dim), Mixer(dim, scan)
        self.mlp_norm, self.mlp = nn.BatchNorm2d(dim), FeedForward(dim, hidden)
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        x = x + self.drop(self.mixer(self.norm(x)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class Mixer(nn.Module):
    """What PlainMamba mixes cells by, without its gate.

    Attributes:
        inputs: 1 x 1 convolution to 2 dim channels, and its norm.
        local: 7 x 7 depthwise, before a SiLU.
        scan: four scans of the map, summed.
        norm: of each cell, before a ReLU.
        outputs: 1 x 1 convolution back to dim, and its norm.
    """

    def __init__(self, dim: int, scan: SnakeScan) -> None:
        super().__init__()
        self.inputs = conv_norm(dim, 2 * dim)
        self.local = depthwise(2 * dim, 7, bias=True)
        self.scan = scan
        self.norm = LayerNorm2d(2 * dim, eps=1e-5)
        self.outputs = conv_norm(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        return self.outputs(self.norm(self.scan(silu(self.local(self.inputs(x))))).relu_())


class Positions(nn.Module):
    """A learned number for each channel and cell, added to a map; bicubic from its own grid where the map has another.

    Attributes:
        table: (1, dim, rows, columns).
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(trunc_normal_(torch.empty(1, dim, *grid), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to maps."""
        same = x.shape[2:] == self.table.shape[2:]
        return x + (self.table if same else resized(self.table, (x.shape[2], x.shape[3])))


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table (1, dim, rows, columns) on another grid, as timm resizes positions."""
    return interpolate(table.float(), size=grid, mode="bicubic", antialias=True).to(table.dtype)


_NAMES = (
    (r"^(dist_)?head\.", None),
    (r"^patch_embed\.0\.", "stem.0.conv."),
    (r"^patch_embed\.1\.", "stem.0.norm."),
    (r"^patch_embed\.3\.", "stem.2.conv."),
    (r"^patch_embed\.4\.", "stem.2.norm."),
    (r"\.layer_scale_2$", ".scale"),
    (r"\.mlp\.fc1\.", ".mlp.widen.conv."),
    (r"\.mlp\.norm1\.", ".mlp.widen.norm."),
    (r"\.mlp\.mid\.", ".mlp.local.conv."),
    (r"\.mlp\.mid_norm\.", ".mlp.local.norm."),
    (r"\.mlp\.fc2\.", ".mlp.narrow.conv."),
    (r"\.mlp\.norm2\.", ".mlp.narrow.norm."),
    (r"\.norm2\.", ".mlp_norm."),
    (r"\.mamba\.in_conv\.0\.", ".mixer.inputs.conv."),
    (r"\.mamba\.in_conv\.1\.", ".mixer.inputs.norm."),
    (r"\.mamba\.conv2d\.", ".mixer.local."),
    (r"\.mamba\.x_proj\.", ".mixer.scan.select."),
    (r"\.mamba\.dt_proj\.", ".mixer.scan.step."),
    (r"\.mamba\.A_log$", ".mixer.scan.decay_log"),
    (r"\.mamba\.D$", ".mixer.scan.skip"),
    (r"\.mamba\.direction_Bs$", ".mixer.scan.moves"),
    (r"\.mamba\.norm\.", ".mixer.norm."),
    (r"\.mamba\.out_conv\.1\.", ".mixer.outputs.conv."),
    (r"\.mamba\.out_conv\.2\.", ".mixer.outputs.norm."),
)


def _rules(backbone: VCMamba) -> list[tuple[str, str | None]]:
    """Rules from the names of the authors' network to ours, which count other modules too."""
    rules: list[tuple[str, str | None]] = [*_NAMES]
    for stage, blocks in enumerate(backbone.stages):
        rules += [(rf"^network\.{2 * stage - 1}\.proj\.", f"stages.{stage}.0.conv.")]
        rules += [(rf"^network\.{2 * stage - 1}\.norm\.", f"stages.{stage}.0.norm.")]
        for place, block in enumerate(blocks):  # type: ignore[arg-type]
            if isinstance(block, Positions):
                rules.append((r"^pos_embed$", f"stages.{stage}.{place}.table"))
        places = [place for place, block in enumerate(blocks) if isinstance(block, ConvBlock | MambaBlock)]  # type: ignore[arg-type]
        for number, place in enumerate(places):
            rules.append((rf"^network\.{2 * stage}\.{number}\.", f"stages.{stage}.{place}."))
    return rules


def published(state: Mapping[str, Tensor], backbone: VCMamba) -> dict[str, Tensor]:
    """The authors' released weights (SLDGroup/VCMamba) under our names; their two classifiers are left out.

    Args:
        state: tensors of a checkpoint, as `torch.load(..., weights_only=True)["model"]` gives them.
        backbone: of `vcmamba`, the same network; for images of another size the positions are resized.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    state = dict(state)
    grid = _grid(backbone.preprocess.size, backbone.levels[0].stride)
    if "pos_embed" in state and state["pos_embed"].shape[2:] != grid:
        state["pos_embed"] = resized(state["pos_embed"], grid)
    return convert(state, _rules(backbone), backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: channels and blocks of the stages, halvings of the stem, pixels, images."""

    dims: Sequence[int]
    depths: Sequence[int]
    halvings: int
    size: int
    images: int
    epochs: int


_SETTINGS = {
    "toy": _Setting((8, 16, 32, 64), (1, 1, 1, 4), 0, 32, 2000, 8),
    "gpu": _Setting((32, 64, 144, 288), (4, 4, 12, 8), 1, 128, 50_000, 100),
}
_MAMBA, _HELD = 4, 1500
_SIDES = (16, 24, 32, 48, 64)
"""Of the maps that growth is measured on, in cells."""

_ARMS = {
    "conv": "as many convolutional blocks as have the parameters of the four Mamba blocks, in their place",
    "mamba": "four Mamba blocks, as the authors' code computes and initialises them",
    "corrected": "steps, drives and readouts travel with their cells, and steps start as Mamba's do",
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Mamba blocks at the end beside convolutional ones of equal parameters, and growth beside attention's."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=_HELD)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "four Mamba blocks at the end of a convolutional network are worth more than convolutional blocks of equal "
            "parameters, and their time grows linearly with the cells of the map"
        ),
        arms=_ARMS,
        baseline="conv",
        metrics={"top1": "%", "params": "M", "growth": "", "attention_growth": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"channels {setting.dims}, blocks {setting.depths}, {len(train)} images of {setting.size} pixels: "
            "differences below a point need more seeds. Branches of convolutional blocks start at full scale in all "
            "arms, since 0.00001 of it is for 300 epochs and Mamba blocks have no such factor. Growth is the exponent "
            f"of a power law through maps of {_SIDES[0]} to {_SIDES[-1]} cells a side, of the time of one mixer and of "
            "one attention of its width, one image, on this machine"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    growth = _growth(setting.dims[-1]) if arm == "mamba" else (float("nan"),) * 2
    torch.manual_seed(seed)
    backbone = _armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    top1 = trained(backbone, train, test, plan).scores["top1"]
    found = {"top1": top1, "params": sum(p.numel() for p in backbone.parameters()) / 1e6}
    return found | {"growth": growth[0], "attention_growth": growth[1]}


def _armed(arm: str, setting: _Setting) -> VCMamba:
    """The network of an arm."""
    options: dict[str, Any] = {"dims": setting.dims, "halvings": setting.halvings, "image_size": setting.size}
    options |= {"depths": setting.depths, "mamba": _MAMBA, "layer_scale": 1.0}
    if arm == "corrected":
        options |= {"scan": "corrected", "start": "mamba"}
    backbone: Any = vcmamba("nano", **options)
    if arm in ("mamba", "corrected"):
        return backbone
    dim, size = setting.dims[-1], _MAMBA * _size(backbone.stages[-1][-1])
    more = round(size / _size(ConvBlock(dim, 4 * dim, 1.0, 0.0)))
    depths = (*setting.depths[:-1], setting.depths[-1] - _MAMBA + more)
    backbone = vcmamba("nano", **options | {"depths": depths, "mamba": 0})
    each = _size(ConvBlock(dim, 2, 1.0, 0.0)) - _size(ConvBlock(dim, 1, 1.0, 0.0))  # parameters of a hidden channel
    hidden = 4 * dim + round((size / more - _size(ConvBlock(dim, 4 * dim, 1.0, 0.0))) / each)
    for place in range(-more, 0):
        backbone.stages[-1][place] = ConvBlock(dim, hidden, 1.0, 0.0)
    return backbone


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _growth(dim: int) -> tuple[float, float]:
    """Exponents of the seconds of a mixer and of an attention of its width, in the cells of the map."""
    from vertebra.blocks.attention import attention

    mixer, other = Mixer(dim, snake_scan(2 * dim, rank=ceil(dim / 16))).eval(), attention(dim).eval()
    maps = [torch.randn(1, dim, side, side).to(memory_format=torch.channels_last) for side in _SIDES]
    cells = [side**2 for side in _SIDES]
    ours = seconds([partial(mixer, x) for x in maps])
    return exponent(cells, ours), exponent(cells, seconds([partial(other, x.flatten(2).mT) for x in maps]))


def _checks(measured: Measured) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in measured.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in top1.items())
    growth = measured.mean("mamba", "growth"), measured.mean("mamba", "attention_growth")
    return [
        Check(
            "four Mamba blocks are ahead of convolutional ones of equal parameters",
            top1["mamba"] > top1["conv"],
            f"{_spread(measured.gain('mamba', 'conv', 'top1'))}; all arms: {words}",
        ),
        Check(
            "time grows with an exponent of at most 1.15 in the cells, that of attention with at least 1.5",
            growth[0] <= 1.15 and growth[1] >= 1.5,
            f"{growth[0]:.2f} against {growth[1]:.2f}",
        ),
    ]


def _spread(gains: np.ndarray) -> str:
    """A gain with its spread over the seeds, and whether chance explains it."""
    from scipy.stats import ttest_1samp

    found = f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}"
    if len(gains) < 2 or not gains.std():
        return f"{found}: too few to tell chance)"
    p = float(ttest_1samp(gains, 0)[1])  # type: ignore[arg-type]
    return f"{found}; paired t-test p = {p:.2g}, {'significant' if p < 0.05 else 'not significant'} at 0.05)"
