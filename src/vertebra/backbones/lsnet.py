"""LSNet: light networks that see large and focus small.

Shapes: images (B, 3, H, W) of any size to maps at strides 8, 16, 32 and 64. Blocks come in pairs: a depth-wise
3 x 3 convolution with squeeze-and-excitation, then a mixer (LS convolution, or attention in the last stage), each with
a feed-forward of two 1 x 1 convolutions. `surgery.fuse` folds all norms that follow a convolution, and the
branches of the depth-wise ones. Departs from the paper in nothing at its own size; other sizes stretch the table of the
attention's biases, so that the largest offset keeps its bias.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from timm.layers.squeeze_excite import SqueezeExcite
from torch import Tensor, nn
from torch.nn import functional

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.dilated_reparam import filled, folded
from vertebra.blocks.ls_conv import aggregate, conv_norm, ls_conv
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="lsnet",
    title="LSNet: See Large, Focus Small",
    year=2025,
    arxiv="2503.23135",
    reference="THU-MIG/lsnet",
    licence="none",
    claim=(
        "80.3 % ImageNet top-1 at 1.3 G and 23.2 M (81.6 % distilled), 74.9 % at 0.3 G; ahead of light networks of its"
        " speed"
    ),
    note=(
        "The Triton kernels of LS convolution are proved under Triton's interpreter, on the CPU; their speed on a GPU"
        " is not measured yet. The aggregation's multiply-accumulates are not counted."
    ),
)

VARIANTS = {
    "t": {"dims": (64, 128, 256, 384), "depths": (0, 2, 8, 10)},
    "s": {"dims": (96, 192, 320, 448), "depths": (1, 2, 8, 10)},
    "b": {"dims": (128, 256, 384, 512), "depths": (4, 6, 8, 10)},
    "nano": {"dims": (32, 64, 96, 128), "depths": (0, 2, 2, 2), "halvings": 1, "image_size": 32},
}

_KEY = 16
"""Channels of a head's queries and keys."""


class LSNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first two.

    Attributes:
        dims: channels of the four stages; multiples of 8, the last one of `heads` too.
        depths: blocks of the four stages.
        halvings: stride-2 convolutions of the stem; 3 give stride 8, 1 suits small images.
        heads: of the attention in the last stage.
        ratio: hidden channels of a feed-forward for each of its own.
        mixer: channels -> a module that keeps the shape, in place of LS convolution.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    halvings: int
    heads: int
    ratio: float
    mixer: Callable[[int], nn.Module]


def lsnet(variant: str = "t", **options: Unpack[LSNetOptions]) -> "LSNet":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`; the distilled networks of the paper are the same ones.
        options: as in `LSNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("lsnet", VARIANTS, variant, options, LSNet, crop=0.9)


class LSNet(Backbone):
    """Stem and four stages; build it with `lsnet`.

    Attributes:
        stem: image to the first map.
        stages: of blocks, each but the first with its downsampling in front.
        norm: of the pooled vector.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0.conv", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        halvings: int = 3,
        heads: int = 4,
        ratio: float = 2.0,
        mixer: Callable[[int], nn.Module] = ls_conv,
        drop_path: float = 0.0,
    ) -> None:
        _check(dims, depths, halvings, heads, ratio)
        super().__init__()
        stride = 2**halvings
        last: tuple[int, int] = tuple(-(-side // (8 * stride)) for side in preprocess.size)  # type: ignore[assignment]
        self.stem = _stem(preprocess.channels, dims[0], halvings)
        self.stages = nn.ModuleList()
        for stage, (dim, rates) in enumerate(zip(dims, drop_rates(drop_path, depths), strict=True)):
            blocks = _down(dims[stage - 1], dim) if stage else []
            for depth, rate in enumerate(rates):
                odd = Attention(dim, heads=heads, size=last) if stage == 3 and depth % 2 else None
                blocks.append(Block(dim, odd or (mixer(dim) if depth % 2 else None), ratio=ratio, drop=rate))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm1d(dims[-1])
        self.levels = tuple(Level(dim, stride * 2**stage) for stage, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), self.norm(x.mean((2, 3))))

    def trunk(self) -> list[nn.Module]:
        """The stem, downsamplings and blocks in order, and the last norm."""
        return [self.stem, *(block for stage in self.stages for block in stage), self.norm]  # type: ignore[union-attr]


def _check(dims: Sequence[int], depths: Sequence[int], halvings: int, heads: int, ratio: float) -> None:
    if len(dims) != 4 or len(depths) != 4:
        raise UsageError(f"lsnet: dims is {dims} and depths is {depths}; each needs four numbers, one a stage")
    check_at_least("lsnet", 1, dims=dims, halvings=halvings, heads=heads)
    check_at_least("lsnet", 0, depths=depths)
    if any(dim % 8 for dim in dims) or dims[-1] % heads:
        raise UsageError(f"lsnet: dims is {dims}; they must be multiples of 8, the last one of heads ({heads}) too")
    if dims[0] % 2 ** (halvings - 1):
        raise UsageError(f"lsnet: halvings is {halvings}; the {dims[0]} channels of the stem cannot be halved so often")
    if ratio <= 0:
        raise UsageError(f"lsnet: ratio is {ratio}; it must be above 0")


def _stem(colours: int, dim: int, halvings: int) -> nn.Sequential:
    """Convolutions of stride 2 that double their channels up to `dim`, ReLU between them."""
    widths = [colours, *(dim // 2 ** (halvings - 1 - step) for step in range(halvings))]
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [conv_norm(inputs, outputs, 3, 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts[:-1])


def _down(inputs: int, outputs: int) -> list[nn.Module]:
    return [conv_norm(inputs, inputs, 3, 2, groups=inputs), conv_norm(inputs, outputs)]


class Block(nn.Module):
    """A mixer and a feed-forward.

    Attributes:
        mixer: the given one with its own shortcut, or a depth-wise convolution.
        gate: squeeze-and-excitation behind the depth-wise convolution.
        ffn: the feed-forward's branch.
    """

    def __init__(self, dim: int, mixer: nn.Module | None, *, ratio: float, drop: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.mixer = mixer or RepDepthwise(dim)
        self.gate = nn.Identity() if mixer else SqueezeExcite(dim, rd_ratio=0.25)
        widen, narrow = conv_norm(dim, hidden), conv_norm(hidden, dim)
        self.ffn = nn.Sequential(OrderedDict[str, nn.Module](widen=widen, act=nn.ReLU(inplace=True), narrow=narrow))
        nn.init.zeros_(self.ffn.narrow.norm.weight)  # type: ignore[union-attr, arg-type]
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        x = self.gate(self.mixer(x))
        return x + self.drop(self.ffn(x))


class RepDepthwise(nn.Module):
    """Depth-wise 3 x 3 and 1 x 1 convolutions, each with a batch norm, and the identity: one convolution once fused.

    Attributes:
        large: 3 x 3.
        small: 1 x 1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.large = conv_norm(dim, dim, 3, groups=dim)
        self.small = conv_norm(dim, dim, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        return self.large(x) + self.small(x) + x

    def fused(self) -> nn.Conv2d:
        """The convolution that gives the same in evaluation."""
        pairs: list[Any] = [self.large, self.small]
        (weight, bias), (centre, shift) = (folded(pair.conv.weight, pair.norm) for pair in pairs)
        weight = weight + nn.functional.pad(centre + 1, (1, 1, 1, 1))
        return filled(nn.Conv2d(len(weight), len(weight), 3, padding=1, groups=len(weight)), weight, bias + shift)


class Attention(nn.Module):
    """Attention over a whole map with a learned bias for each distance in rows and columns, and its shortcut.

    Attributes:
        qkv: queries of all heads, then keys, then values.
        local: depth-wise convolution of the queries.
        proj: of what the heads give.
        bias: (heads, rows * columns), a number for each distance.
    """

    places: Tensor

    def __init__(self, dim: int, *, heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        keys = heads * _KEY
        self.heads, self.size = heads, size
        self.qkv = conv_norm(dim, 2 * keys + dim)
        self.local = conv_norm(keys, keys, 3, groups=keys)
        self.proj = conv_norm(dim, dim)
        nn.init.zeros_(self.proj.norm.weight)  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(heads, size[0] * size[1]))
        self.register_buffer("places", _places(*size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        batch, dim, height, width = x.shape
        keys = self.heads * _KEY
        queries, key, value = self.qkv(x).split((keys, keys, dim), 1)
        queries = self.local(queries).reshape(batch, self.heads, _KEY, -1)
        key, value = (part.reshape(batch, self.heads, -1, height * width) for part in (key, value))
        weights = queries.mT @ key * _KEY**-0.5 + self._biases(height, width)  # (B, heads, N, N)
        found = value @ weights.softmax(-1).mT  # (B, heads, C / heads, N)
        return x + self.proj(found.reshape(batch, dim, height, width).relu_())

    def _biases(self, height: int, width: int) -> Tensor:
        """The table spread over all pairs of places, (heads, N, N); stretched where the map has another size."""
        if (height, width) == self.size:
            return self.bias[:, self.places]
        table = self.bias.unflatten(1, self.size)[None]
        table = functional.interpolate(table, (height, width), mode="bilinear", align_corners=True)
        return table[0].flatten(1)[:, _places(height, width, table.device)]


def _places(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Number in the table of each pair of places, (N, N)."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return (rows[:, None] - rows).abs() * width + (columns[:, None] - columns).abs()


_RULES = [
    (r"^module\.", ""),
    (r"^head(_dist)?\.l\.|^head_dist\.|attention_bias_idxs$|\.ab$", None),
    (r"^head\.bn\.", "norm."),
    (r"^patch_embed\.", "stem."),
    (r"\.mixer\.m\.attention_biases$", ".mixer.bias"),
    (r"\.mixer\.m\.dw\.", ".mixer.local."),
    (r"\.mixer\.m\.proj\.1\.", ".mixer.proj."),
    (r"\.mixer\.m\.", ".mixer."),
    (r"\.mixer\.conv\.", ".mixer.large."),
    (r"\.mixer\.conv1\.", ".mixer.small."),
    (r"\.lkp\.cv1\.", ".perception.narrow."),
    (r"\.lkp\.cv2\.", ".perception.look."),
    (r"\.lkp\.cv3\.", ".perception.mix."),
    (r"\.lkp\.cv4\.", ".perception.weigh."),
    (r"\.lkp\.", ".perception."),
    (r"\.se\.", ".gate."),
    (r"\.ffn\.m\.pw1\.", ".ffn.widen."),
    (r"\.ffn\.m\.pw2\.", ".ffn.narrow."),
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
    *((rf"^blocks{number}\.", f"stages.{number - 1}.") for number in (1, 2, 3, 4)),
]


def published(state: Mapping[str, Tensor], backbone: LSNet) -> dict[str, Tensor]:
    """The authors' released weights (THU-MIG/lsnet) under our names; their classifiers are left out.

    Of a distilled network the norm is that of the first of its two classifiers.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `lsnet`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, _RULES, backbone)


class _Static(nn.Module):
    """A depth-wise convolution with norm and shortcut; for the effect."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = conv_norm(channels, channels, kernel, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class _Involution(nn.Module):
    """Small kernels from a place's own channels, as in involution (arXiv 2103.06255); for the effect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow, self.kernels = conv_norm(channels, channels // 4), channels // 8
        self.weigh = nn.Conv2d(channels // 4, 9 * self.kernels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weigh(self.narrow(x).relu_()).unflatten(1, (self.kernels, 9))
        return self.norm(aggregate(x, weights)) + x


_ARMS: Mapping[str, tuple[str, float, Callable[[int], nn.Module]]] = {
    "dw3": ("static depth-wise 3 x 3", 2.24, lambda channels: _Static(channels, 3)),
    "dw7": ("static depth-wise 7 x 7", 2.14, lambda channels: _Static(channels, 7)),
    "involution": ("3 x 3 kernels from a place's own channels", 2.16, _Involution),
    "ls": ("LS convolution: 3 x 3 kernels from 7 x 7 places", 2.0, ls_conv),
    "ls_1": ("the same, from 1 x 1 place", 2.0, lambda channels: ls_conv(channels, kernel=1)),
}
"""Arm -> what it is, the feed-forward's ratio that makes parameters equal within 3 %, and its mixer."""


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains."""

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    images: int
    epochs: int


_SETTINGS = {
    "toy": _Setting((16, 32, 64, 96), (2, 2, 4, 2), 3000, 8),
    "gpu": _Setting((32, 64, 96, 128), (2, 4, 8, 4), 50_000, 60),
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """LS convolution beside static convolutions, kernels without context, and perception of a single place."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="at equal parameters, small kernels set by a large neighbourhood beat static ones and those of a place",
        arms={name: what for name, (what, _, _) in _ARMS.items()},
        baseline="dw3",
        metrics={"top1": "%", "nll": "", "params": "M", "seconds": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of 32 pixels, {setting.epochs} epochs, {sum(setting.depths)} blocks from stride 2: "
            "differences of a point or less need more seeds than three; speed is no part of it"
        ),
        data=words,
    )


def _arm(arm: str, setting: _Setting) -> LSNet:
    _, ratio, mixer = _ARMS[arm]
    return lsnet("nano", dims=setting.dims, depths=setting.depths, ratio=ratio, mixer=mixer)


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = _arm(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, weight_decay=0.025, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    params = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    return {"top1": scores["top1"], "nll": scores["nll"], "params": params, "seconds": scores["seconds"]}


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    gains = measured.gain("ls", "dw3", "top1")
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    return [
        Check(
            "LS convolution is at least 0.3 points above a static 3 x 3",
            bool(gains.mean() >= 0.3),
            f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)}); all arms: {words}",
        ),
        Check(
            "LS convolution is not below a static 7 x 7",
            mean["ls"] >= mean["dw7"],
            f"{mean['ls'] - mean['dw7']:+.2f} points; kernels from a place alone: {mean['involution']:.2f}",
        ),
        Check(
            "it does not gain where it sees a single place",
            mean["ls_1"] <= mean["ls"],
            f"{mean['ls_1'] - mean['ls']:+.2f} points",
        ),
    ]
