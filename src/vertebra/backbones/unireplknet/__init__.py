"""UniRepLKNet: a few large kernels for reach, small ones and channel mixing for depth, for any data laid out as a map.

Shapes: images (B, 3, H, W) of any size to four maps at strides 4, 8, 16, 32. A block mixes space with one depthwise
convolution (`vertebra.blocks.dilated_reparam` for large kernels), weighs the channels (squeeze-and-excitation) and
mixes them with two linear layers. `vertebra.surgery.fuse` gives the network that is deployed; `deploy=True` builds it.
Sound, series, points and clips become maps in `vertebra.blocks.modality_maps` and go through the same network, with
`channels=`. Departs from the paper in nothing; `nano` is ours.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.depthwise import depthwise
from vertebra.blocks.dilated_reparam import TABLE, DilatedReparam, dilated_reparam, filled, folded
from vertebra.blocks.rows import activated, kept
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

if TYPE_CHECKING:
    from vertebra.data.dataset import Dataset

PAPER = Paper(
    id="unireplknet",
    title=(
        "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image"
        " Recognition"
    ),
    year=2023,
    arxiv="2311.15599",
    reference="AILab-CVC/UniRepLKNet",
    licence="Apache-2.0",
    claim=(
        "88.0 % ImageNet top-1, 55.6 % ADE20K mIoU, 56.4 % COCO box AP; state of the art on global temperature and wind"
        " forecasts and on audio with the same architecture"
    ),
    note=(
        "Published parameters are those of the deployed network (`deploy=True`). Detection and segmentation, the "
        "authors' weather and point cloud tasks, and a comparison on a GPU are not reproduced."
    ),
)

VARIANTS = {
    "t": {"dims": (80, 160, 320, 640), "depths": (3, 3, 18, 3), "kernels": (3, 13, (13, 3), 13)},
    "a": {"dims": (40, 80, 160, 320), "depths": (2, 2, 6, 2), "kernels": (3, 13, 13, 13)},
    "f": {"dims": (48, 96, 192, 384), "depths": (2, 2, 6, 2), "kernels": (3, 13, 13, 13)},
    "p": {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "kernels": (3, 13, 13, 13)},
    "n": {"dims": (80, 160, 320, 640), "depths": (2, 2, 8, 2), "kernels": (3, 13, 13, 13)},
    "s": {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3), "kernels": (3, 13, (13, 3, 3), 13)},
    "b": {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3), "kernels": (3, 13, (13, 3, 3), 13)},
    "l": {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3), "kernels": (3, 13, (13, 3, 3), 13)},
    "xl": {"dims": (256, 512, 1024, 2048), "depths": (3, 3, 27, 3), "kernels": (3, 13, (13, 3, 3), 13)},
    "nano": {
        "dims": (16, 32, 64, 128),
        "depths": (1, 1, 2, 1),
        "kernels": (3, 7, (7, 3), 5),
        "stem_stride": 2,
        "layer_scale": 0.1,
        "image_size": 32,
    },
}

RATIO, SQUEEZE, EPS = 4, 4, 1e-6


class UniRepLKNetOptions(BackboneOptions, total=False):
    """Options; a variant sets dims, depths and kernels.

    Attributes:
        dims: channels of the four stages, multiples of 4.
        depths: blocks a stage.
        kernels: odd kernel size of each stage's blocks, or a pattern of sizes that is repeated over them.
        branches: what is trained beside kernels of 7 and more: "dilated" (the paper's), "small" (one of 3 x 3,
            RepLKNet's) or "none".
        stem_stride: cells of the image that the first map has one of: 4 (the paper's), 2 or 1.
        layer_scale: what each residual branch is multiplied by at the start.
        deploy: whether the network is built as it is deployed, branches merged, for weights in that form.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int | tuple[int, ...], ...]
    branches: Literal["dilated", "small", "none"]
    stem_stride: Literal[4, 2, 1]
    layer_scale: float
    deploy: bool


def unireplknet(variant: str = "t", **options: Unpack[UniRepLKNetOptions]) -> "UniRepLKNet":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `UniRepLKNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("unireplknet", VARIANTS, variant, options, UniRepLKNet)


class UniRepLKNet(Backbone):
    """Four stages of large-kernel blocks; build it with `unireplknet`.

    Attributes:
        downs: what makes each stage's map from the one before, the first from the image.
        stages: the blocks of each stage.
        norm: of the pooled vector.
    """

    pretrained_cfg: ClassVar[Mapping[str, str]] = {"first_conv": "downs.0.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[int | Sequence[int]],
        branches: Literal["dilated", "small", "none"] = "dilated",
        stem_stride: Literal[4, 2, 1] = 4,
        layer_scale: float = 1e-6,
        deploy: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = _kernels(dims, depths, kernels, branches)
        check_at_least("unireplknet", 4, dims=dims)
        check_at_least("unireplknet", 1, depths=depths)
        if stem_stride not in (4, 2, 1):
            raise UsageError(f"unireplknet: stem_stride is {stem_stride}; it can be 4, 2 or 1")
        self.downs = nn.ModuleList([_stem(preprocess.channels, dims[0], stem_stride)])
        self.downs.extend(_down(*pair) for pair in pairwise(dims))
        self.stages = nn.ModuleList()
        for dim, stage, rates in zip(dims, sizes, drop_rates(drop_path, depths), strict=True):
            blocks = (
                Block(dim, _spatial(dim, size, branches), layer_scale=layer_scale, drop_path=rate)
                for size, rate in zip(stage, rates, strict=True)
            )
            self.stages.append(nn.Sequential(*(block.fused() if deploy else block for block in blocks)))
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.levels = tuple(Level(dim, stem_stride << number) for number, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = images.contiguous(memory_format=torch.channels_last), []  # the linear layers want channels last
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return Features(tuple(maps), self.norm(x.mean((2, 3))))

    def trunk(self) -> list[nn.Module]:
        """The reductions and the blocks, as the signal meets them, and the norm."""
        parts = [part for down, stage in zip(self.downs, self.stages, strict=True) for part in (down, *stage)]  # type: ignore[misc]
        return [*parts, self.norm]


def _kernels(
    dims: Sequence[int], depths: Sequence[int], kernels: Sequence[int | Sequence[int]], branches: str
) -> list[list[int]]:
    """Kernel size of every block, a list a stage."""
    if not len(dims) == len(depths) == len(kernels):
        raise UsageError(
            f"unireplknet: dims {tuple(dims)}, depths {tuple(depths)} and kernels {tuple(kernels)} are for different"
            " numbers of stages; give each an entry a stage"
        )
    if branches not in ("dilated", "small", "none"):
        raise UsageError(f"unireplknet: branches is {branches!r}; it can be dilated, small or none")
    found = []
    for depth, pattern in zip(depths, kernels, strict=True):
        sizes = (pattern,) if isinstance(pattern, int) else tuple(pattern)
        if not sizes or min(sizes) < 1 or any(size % 2 == 0 for size in sizes):
            raise UsageError(f"unireplknet: kernels has {pattern!r}; sizes are odd and at least 1, as 13 or (13, 3)")
        unknown = [size for size in sizes if size >= LARGE and size not in TABLE]
        if unknown and branches == "dilated":
            raise UsageError(
                f"unireplknet: there are no dilated branches for kernel {unknown[0]}, only for"
                f" {', '.join(str(size) for size in TABLE if size >= LARGE)}; give branches='small' or 'none'"
            )
        found.append([sizes[block % len(sizes)] for block in range(depth)])
    return found


LARGE = 7
"""Smallest kernel that has branches beside it."""


def _spatial(dim: int, kernel: int, branches: str) -> nn.Module:
    """The depthwise convolution of a block."""
    if kernel < LARGE or branches == "none":
        return depthwise(dim, kernel)
    return dilated_reparam(dim, kernel=kernel, branches=((3, 1),) if branches == "small" else None)


def _stem(channels: int, dim: int, stride: int) -> nn.Sequential:
    """Two convolutions, of half the channels and of all."""
    first, second = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]
    half = dim // 2
    convs = nn.Conv2d(channels, half, 3, first, 1), nn.Conv2d(half, dim, 3, second, 1)
    return nn.Sequential(convs[0], LayerNorm2d(half, eps=EPS), nn.GELU(), convs[1], LayerNorm2d(dim, eps=EPS))


def _down(inputs: int, outputs: int) -> nn.Sequential:
    """Half the size; the norm follows the convolution, where ConvNeXt's is before it."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), LayerNorm2d(outputs, eps=EPS))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Space, then channels, beside a shortcut.

    Attributes:
        spatial: keeps (B, C, H, W); a depthwise convolution or a `DilatedReparam`.
        norm: behind it.
        squeeze: gates of the channels.
        widen: dim to 4 dim.
        response: weighs the wide channels by how they compare over the map.
        narrow: 4 dim to dim.
        narrow_norm: behind it.
        scale: (C,) factors of the branch.
    """

    def __init__(self, dim: int, spatial: nn.Module, *, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.spatial, self.norm = spatial, nn.BatchNorm2d(dim)
        self.squeeze = Squeeze(dim)
        self.widen = nn.Linear(dim, RATIO * dim)
        self.response = Response(RATIO * dim)
        self.narrow, self.narrow_norm = nn.Linear(RATIO * dim, dim, bias=False), nn.BatchNorm2d(dim)
        self.scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        y = self.squeeze(self.norm(self.spatial(x)))
        y = self.narrow(self.response(activated(self.widen(_last(y)))))  # (B, H, W, C)
        y = self.narrow_norm(y.permute(0, 3, 1, 2))
        if isinstance(self.drop, nn.Identity):
            return torch.addcmul(x, y, self.scale[:, None, None])
        return x + self.drop(y * self.scale[:, None, None])

    @torch.no_grad()
    def fused(self) -> "Deployed":
        """The same map in evaluation: norms, the shift of the response and the scale are in the weights before them."""
        make: Any = getattr(self.spatial, "fused", None)
        spatial: Any = make() if callable(make) else self.spatial
        if isinstance(spatial, nn.Conv2d):
            bias = depthwise(spatial.out_channels, spatial.kernel_size[0], dilation=spatial.dilation[0], bias=True)
            spatial = filled(bias, *folded(spatial.weight, self.norm, spatial.bias))
        else:  # another mixer was put here
            spatial = nn.Sequential(spatial, self.norm)
        assert self.response.bias is not None
        through = self.narrow.weight @ self.response.bias  # the response's bias, seen behind the linear layer
        weight, bias = folded(self.narrow.weight, self.narrow_norm, through)
        narrow = filled(nn.Linear(weight.shape[1], weight.shape[0]), weight * self.scale[:, None], bias * self.scale)
        return Deployed(spatial, self.squeeze, self.widen, self.response.unbiased(), narrow, self.drop)


class Deployed(nn.Module):
    """A block as it is deployed: one convolution, gates, two linear layers; `Block.fused` makes it.

    Attributes:
        spatial: depthwise, with a bias.
        squeeze: as in `Block`.
        widen: as in `Block`.
        response: without its shift.
        narrow: with a bias.
    """

    def __init__(
        self,
        spatial: nn.Module,
        squeeze: "Squeeze",
        widen: nn.Linear,
        response: "Response",
        narrow: nn.Linear,
        drop: nn.Module,
    ) -> None:
        super().__init__()
        self.spatial, self.squeeze, self.widen, self.response, self.narrow = spatial, squeeze, widen, response, narrow
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        y = self.squeeze(self.spatial(x))
        y = self.narrow(self.response(activated(self.widen(_last(y)))))  # (B, H, W, C)
        return x + self.drop(y.permute(0, 3, 1, 2))


def published(state: Mapping[str, Tensor], backbone: UniRepLKNet) -> dict[str, Tensor]:
    """The authors' released weights (AILab-CVC/UniRepLKNet, Apache-2.0) under our names, without their classifier.

    Args:
        state: tensors of a checkpoint as it is trained, or as it is deployed for a backbone with `deploy=True`.
        backbone: the same network.

    Raises:
        ParityError: they are of another network, or of the other form; lists what is left over on both sides.
    """
    flat = {name: tensor.flatten() if ".act.1." in name else tensor for name, tensor in state.items()}
    first, channels = "downsample_layers.0.0.weight", backbone.preprocess.channels
    if first in flat and flat[first].shape[1] != channels:
        flat[first] = adapt_input_conv(channels, flat[first])
    return convert(flat, [(r"^head\.", None), *released_names(backbone)], backbone)


def released_names(backbone: UniRepLKNet) -> Rules:
    """Rules from the authors' names to ours; their branches are called by kernel and dilation."""
    rules: list[tuple[str, str | None]] = [(r"^downsample_layers\.", "downs.")]
    for name, module in backbone.named_modules():
        if isinstance(module, DilatedReparam):
            block = re.escape(name.removesuffix(".spatial"))
            rules += [(rf"^{block}\.dwconv\.lk_origin\.", f"{name}.convs.0.")]
            rules += [(rf"^{block}\.dwconv\.origin_bn\.", f"{name}.norms.0.")]
            for number, conv in enumerate(module.convs[1:], start=1):
                mark = f"k{conv.kernel_size[0]}_{conv.dilation[0]}"  # type: ignore[index]
                rules += [(rf"^{block}\.dwconv\.dil_conv_{mark}\.", f"{name}.convs.{number}.")]
                rules += [(rf"^{block}\.dwconv\.dil_bn_{mark}\.", f"{name}.norms.{number}.")]
    pairs = {
        r"dwconv\.lk_origin\.": "spatial.",
        r"dwconv\.": "spatial.",
        r"se\.down\.": "squeeze.reduce.",
        r"se\.up\.": "squeeze.expand.",
        r"pwconv1\.1\.": "widen.",
        r"act\.1\.gamma$": "response.gain",
        r"act\.1\.beta$": "response.bias",
        r"pwconv2\.0\.": "narrow.",
        r"pwconv2\.2\.": "narrow_norm.",
        r"gamma$": "scale",
    }
    return [*rules, *((rf"^(stages\.\d+\.\d+)\.{theirs}", rf"\1.{ours}") for theirs, ours in pairs.items())]


def _last(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as (B, H, W, C), in the memory that linear layers want."""
    return x.permute(0, 2, 3, 1).contiguous()


class Squeeze(nn.Module):
    """Squeeze-and-excitation: a gate for each channel from the means of all (arXiv 1709.01507)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(dim, dim // SQUEEZE), nn.Linear(dim // SQUEEZE, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps times their gates in 0..1."""
        gates = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()[..., None, None]
        return x * gates


class Response(nn.Module):
    """Global response normalisation (arXiv 2301.00808): channels that answer more than the mean are raised.

    Attributes:
        gain: (C,) from 0.
        bias: (C,) from 0; None where it went into the next layer.
    """

    bias: nn.Parameter | None

    def __init__(self, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to maps."""
        strength = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        gates = self.gain * (strength / (strength.mean(-1, keepdim=True) + EPS)) + 1
        if kept():
            return x * gates if self.bias is None else torch.addcmul(self.bias, x, gates)
        return x.mul_(gates) if self.bias is None else torch.addcmul(self.bias, x, gates, out=x)

    def unbiased(self) -> "Response":
        """The same gain, and no bias."""
        made = Response(len(self.gain), bias=False)
        made.gain = nn.Parameter(self.gain.detach().clone(), requires_grad=self.gain.requires_grad)
        return made


_ARMS = {
    "small": "kernels of 3 in all stages",
    "large": "kernels of 13 in all stages, dilated branches",
    "mixed": "the paper's layout: 3, then 13, then 13 and 3 in turn, then 13; dilated branches",
    "plain": "the same layout, large kernels alone",
    "parallel": "the same layout, a kernel of 3 beside each large one",
    "convnext": "ConvNeXt of the same widths and depths, kernels of 7",
    "signals": "the same class on generated tones and series, beside linear models",
}


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> Effect:
    """Kernel sizes and branches on images; the field of the large ones; tones and series through the same class."""
    from vertebra.arms import parts
    from vertebra.backbones.unireplknet.experiment import SETTINGS, measured

    setting = SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=setting.held)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return measured(arm, seed, train, test, setting)

    return Effect(
        claim=(
            "large kernels in the middle and late stages see further and are as good as large ones everywhere, dilated"
            " branches help to train them, and sound and series go through the same network"
        ),
        arms=_ARMS,
        baseline="small",
        metrics={
            "top1": "%",
            "macs": "M",
            "params": "M",
            "seconds": "s",
            "field_start": "%",
            "field": "%",
            "half_start": "%",
            "half": "%",
            "tones": "%",
            "tones_linear": "%",
            "forecast": "",
            "forecast_linear": "",
        },
        measure=measure,
        checks=_checks,
        limits=(
            f"nets of 0.2 M parameters, {len(train)} images of 32 pixels and {setting.epochs} epochs: differences of a"
            " point in top-1 are within the spread of three seeds, and a kernel of 13 covers most of a map of 16 cells;"
            " fields are shares of the image's area that hold 99 % of the gradient (halves: 50 %), at the start of"
            " UniRepLKNet-A and ConvNeXt-Atto at 224 pixels with residual branches at full scale, after training of the"
            f" small nets at {setting.field} pixels; nets that are trained start with layer scales of 0.1, since 1e-6"
            " would need longer; tones and series are generated"
        ),
        data=f"{words}; generated tones and series",
    )


def _checks(found: Measured) -> Sequence[Check]:
    top1 = {arm: found.mean(arm, "top1") for arm in _ARMS if arm != "signals"}
    macs = {arm: found.mean(arm, "macs") for arm in ("mixed", "large")}
    fields = {name: found.mean("mixed", name) / found.mean("convnext", name) for name in ("field_start", "field")}
    signals = {name: found.mean("signals", name) for name in ("tones", "tones_linear", "forecast", "forecast_linear")}
    gains = ", ".join(f"{gain:+.2f}" for gain in found.gain("mixed", "plain", "top1"))
    return [
        Check(
            "dilated branches are at least as accurate as the large kernel alone",
            top1["mixed"] >= top1["plain"],
            f"{top1['mixed'] - top1['plain']:+.2f} points (seeds: {gains}); a kernel of 3 in parallel:"
            f" {top1['parallel'] - top1['plain']:+.2f}",
        ),
        Check(
            "the mixed layout is at most 0.5 points behind large kernels everywhere, at fewer MACs",
            top1["mixed"] >= top1["large"] - 0.5 and macs["mixed"] < macs["large"],
            f"{top1['mixed'] - top1['large']:+.2f} points, {macs['mixed']:.2f} of {macs['large']:.2f} M MACs; kernels"
            f" of 3 alone: {top1['small'] - top1['mixed']:+.2f}",
        ),
        *(
            Check(f"field {when} is at least 1.5 times ConvNeXt's", fields[name] >= 1.5, f"{fields[name]:.2f} times")
            for name, when in (("field_start", "at the start"), ("field", "after training"))
        ),
        Check(
            "tones are told apart at least 10 points better than by a linear model",
            signals["tones"] >= signals["tones_linear"] + 10,
            f"{signals['tones']:.1f} % against {signals['tones_linear']:.1f} %",
        ),
        Check(
            "the forecast's squared error is at least 10 % below a linear model's",
            signals["forecast"] <= 0.9 * signals["forecast_linear"],
            f"{signals['forecast']:.3f} against {signals['forecast_linear']:.3f}",
        ),
    ]
