"""SK-ResNet: the residual networks of SimCLRv2, two or three times as wide, with selective kernels.

A selective convolution makes two streams and weighs them, channel by channel, by what the whole image shows. With it
come ResNet-D's stem (three 3 x 3 convolutions) and shortcuts (average pooling before the 1 x 1 convolution).

Shapes: images (B, channels, H, W), four levels of strides 4 to 32, pooled (B, 2048 * width). Pads as TensorFlow does,
which the published weights were trained with. timm's `skresnet50` is another network.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.backbones.building import load
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError, near
from vertebra.shipping import weights as weight_files

VARIANTS = {
    "50_1x": {"depths": (3, 4, 6, 3), "width": 1, "kernels": "plain"},
    "50_1x_sk": {"depths": (3, 4, 6, 3), "width": 1, "kernels": "selective"},
    "50_2x": {"depths": (3, 4, 6, 3), "width": 2, "kernels": "plain"},
    "50_2x_sk": {"depths": (3, 4, 6, 3), "width": 2, "kernels": "selective"},
    "101_2x_sk": {"depths": (3, 4, 23, 3), "width": 2, "kernels": "selective"},
    "152_2x_sk": {"depths": (3, 8, 36, 3), "width": 2, "kernels": "selective"},
    "152_3x_sk": {"depths": (3, 8, 36, 3), "width": 3, "kernels": "selective"},
}

EXPANSION, RATIO, LEAST = 4, 16, 32
"""Output of a block over its width; width of a selective convolution over that of its mixing; least width of that."""


def sk_resnet(
    variant: str = "50_1x",
    *,
    depths: Sequence[int] | None = None,
    dim: int = 64,
    width: int | None = None,
    kernels: Literal["plain", "selective"] | None = None,
    stem: Literal["large", "small"] = "large",
    channels: int = 3,
    image_size: int | None = None,
    weights: str | None = None,
    allow_pickle: bool = False,
) -> "SKResNet":
    """Build a residual network of SimCLRv2 (arXiv 2006.10029, section 2).

    Args:
        variant: depth, width and kernels, as the paper names them.
        depths: blocks of the four stages, in place of the variant's.
        dim: inner channels of the first stage at width 1; 64 in the paper.
        width: factor of all channels, in place of the variant's.
        kernels: in place of the variant's.
        stem: "large" shrinks the image by four; "small" is one 3 x 3 convolution at full size, for images of 32 pixels.
        channels: image channels.
        image_size: side in pixels that images are brought to; 224 by default, and 32 with the small stem.
        weights: "random", a .safetensors file, or a checkpoint folder of vertebra's.
        allow_pickle: whether a .pth file may be read, as tensors only.

    Raises:
        UsageError: an unknown variant or an option out of range.
        VertebraError: weights that do not fit.
    """
    if variant not in VARIANTS:
        raise UsageError(f"sk_resnet has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    chosen: dict[str, Any] = dict(VARIANTS[variant])
    given = {"depths": depths, "width": width, "kernels": kernels}
    chosen |= {name: value for name, value in given.items() if value is not None}
    _check(chosen, dim, stem, channels)
    size = image_size or (32 if stem == "small" else 224)
    # 0..1 as they are: the published weights know no mean and deviation
    preprocess = Preprocess((size, size), (0.0,) * channels, (1.0,) * channels, "bicubic", crop=0.875)
    network = SKResNet(
        depths=tuple(chosen["depths"]),
        dim=dim * chosen["width"],
        kernels=chosen["kernels"],
        stem=stem,
        preprocess=preprocess,
    )
    if weights not in (None, "random"):
        network.weights_info = load(network, f"sk_resnet/{variant}", weights, allow_pickle)
    return network


def _check(chosen: Mapping[str, Any], dim: int, stem: str, channels: int) -> None:
    depths, width, kernels = chosen["depths"], chosen["width"], chosen["kernels"]
    if len(depths) != 4 or min(depths) < 1:
        raise UsageError(f"sk_resnet: depths is {list(depths)}; write the blocks of four stages, as [3, 4, 6, 3]")
    if kernels not in ("plain", "selective"):
        raise UsageError(f"sk_resnet: kernels is {kernels!r}; it must be plain or selective")
    if stem not in ("large", "small"):
        raise UsageError(f"sk_resnet: stem is {stem!r}; it must be large or small")
    for name, value, least in (("dim", dim, 2), ("width", width, 1), ("channels", channels, 1)):
        if value < least:
            raise UsageError(f"sk_resnet: {name} is {value}; it must be at least {least}")


class SKResNet(Backbone):
    """Stem, four stages, mean over the map; build it with `sk_resnet`.

    Attributes:
        stem: image to the first map.
        stages: the four stages, of bottleneck blocks.
        weights_info: where the weights come from, or None where they are random.
        pretrained_cfg: what `vertebra.shipping.weights` asks of a network.
    """

    pretrained_cfg: Mapping[str, Any] = {"first_conv": "stem.0", "classifier": "fc"}

    def __init__(
        self,
        *,
        depths: tuple[int, ...],
        dim: int,
        kernels: Literal["plain", "selective"],
        stem: Literal["large", "small"],
        preprocess: Preprocess,
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.weights_info: weight_files.WeightsInfo | None = None
        self.stem = _stem(preprocess.channels, dim, kernels, stem)
        stages, inputs, stride = [], dim, 1
        for stage, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                first = block == 0
                blocks.append(Bottleneck(inputs, dim << stage, stride if first else 1, kernels, project=first))
                inputs = (dim << stage) * EXPANSION
            stages.append(nn.Sequential(*blocks))
            stride = 2
        self.stages = nn.ModuleList(stages)
        finest = 4 if stem == "large" else 1
        self.levels = tuple(Level((dim << i) * EXPANSION, finest << i) for i in range(4))
        self.width = inputs

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features, each map after the last activation of its stage."""
        x, pyramid = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        return Features(tuple(pyramid), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem and the blocks."""
        return [self.stem, *(block for stage in self.stages for block in stage)]  # type: ignore[attr-defined]


def _stem(channels: int, dim: int, kernels: str, stem: str) -> nn.Sequential:
    if stem == "small":
        return nn.Sequential(_conv(channels, dim, 3), *_norm(dim))
    if kernels == "plain":
        return nn.Sequential(_conv(channels, dim, 7, 2), *_norm(dim), MaxPool())
    half = dim // 2
    return nn.Sequential(
        _conv(channels, half, 3, 2),
        *_norm(half),
        _conv(half, half, 3),
        *_norm(half),
        _conv(half, dim, 3),
        *_norm(dim),
        MaxPool(),
    )


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (plain or selective), 1 x 1, and a shortcut; (B, inputs, H, W) to (B, 4 * dim, H / s, W / s)."""

    def __init__(
        self, inputs: int, dim: int, stride: int, kernels: Literal["plain", "selective"], *, project: bool
    ) -> None:
        super().__init__()
        outputs, selective = dim * EXPANSION, kernels == "selective"
        self.reduce = nn.Sequential(_conv(inputs, dim, 1), *_norm(dim))
        self.middle = Selective(dim, stride) if selective else nn.Sequential(_conv(dim, dim, 3, stride), *_norm(dim))
        self.expand = nn.Sequential(_conv(dim, outputs, 1), nn.BatchNorm2d(outputs))
        nn.init.zeros_(self.expand[1].weight)  # type: ignore[arg-type] # a block starts as its shortcut
        self.shortcut = nn.Sequential()
        if project:
            pool = AveragePool(stride) if selective else nn.Identity()
            narrow = _conv(inputs, outputs, 1, 1 if selective else stride)
            self.shortcut = nn.Sequential(pool, narrow, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """One map to the next."""
        return F.relu(self.expand(self.middle(self.reduce(x))) + self.shortcut(x))


class Selective(nn.Module):
    """Two streams of 3 x 3 convolutions, weighed by a softmax of what the image shows (arXiv 1903.06586, 2006.10029).

    (B, dim, H, W) to (B, dim, H / stride, W / stride).
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        mixing = max(dim // RATIO, LEAST)
        self.streams = nn.Sequential(_conv(dim, 2 * dim, 3, stride), *_norm(2 * dim))
        self.mixing = nn.Sequential(_conv(dim, mixing, 1), *_norm(mixing), _conv(mixing, 2 * dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The weighed sum of the two streams."""
        streams = self.streams(x)
        first, second = streams.chunk(2, dim=1)
        one, other = streams.mean((2, 3), keepdim=True).chunk(2, dim=1)  # means before the sum: no map is added up
        one, other = self.mixing(one + other).chunk(2, dim=1)
        return torch.lerp(second, first, torch.sigmoid(one - other))  # a softmax over two, and its weighed sum


class MaxPool(nn.Module):
    """3 x 3 maxima at stride 2 with TensorFlow's "SAME" padding: of an even side, at the end alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2)); what is not negative is not changed by zeros around it."""
        height, width = x.shape[2:]
        return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), 3, 2)


class AveragePool(nn.Module):
    """2 x 2 means as the reference pads them: at the end, by zeros at stride 2, by nothing that counts at stride 1."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        if self.stride == 1:
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        height, width = x.shape[2:]
        return F.avg_pool2d(F.pad(x, (0, width % 2, 0, height % 2)), 2, 2)


def _conv(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)
    nn.init.trunc_normal_(conv.weight, std=(inputs * side * side) ** -0.5)  # variance scaling over the inputs
    return conv


def _norm(dim: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(dim), nn.ReLU(inplace=True)


PORT = {
    r"\.net\.0\.": ".reduce.0.",
    r"\.net\.1\.0\.": ".reduce.1.",
    r"\.net\.2\.(?=weight)": ".middle.0.",
    r"\.net\.3\.0\.": ".middle.1.",
    r"\.net\.2\.main_conv\.0\.": ".middle.streams.0.",
    r"\.net\.2\.main_conv\.1\.0\.": ".middle.streams.1.",
    r"\.net\.2\.mixing_conv\.0\.": ".middle.mixing.0.",
    r"\.net\.2\.mixing_conv\.1\.0\.": ".middle.mixing.1.",
    r"\.net\.2\.mixing_conv\.2\.": ".middle.mixing.3.",
    r"\.net\.[34]\.(?=weight)": ".expand.0.",
    r"\.net\.[45]\.0\.": ".expand.1.",
    r"\.projection\.shortcut\.(2\.)?(?=weight)": ".shortcut.1.",
    r"\.projection\.bn\.0\.": ".shortcut.2.",
}
"""Key names of the published weights' PyTorch port (Separius/SimCLRv2-Pytorch) below a block -> ours."""


def published(state: Mapping[str, Tensor], network: SKResNet) -> dict[str, Tensor]:
    """A state dict of the port with our key names; any other as it is.

    The port's file is a pickle of `{"resnet": ..., "head": ...}`: `resnet` is what goes in here, and `head` has the
    key names of `vertebra.methods.simclr_v2.ProjectionHead`.
    """
    return {_renamed(key): tensor for key, tensor in state.items()}


def _renamed(key: str) -> str:
    stem, block = re.match(r"net\.0\.(\d+)\.(?:0\.)?(\w+)$", key), re.match(r"net\.(\d)\.blocks\.(\d+)(\..+)$", key)
    if stem:
        layer = int(stem[1])  # convolutions are even; each is followed by its norm, and here by its activation too
        return f"stem.{layer // 2 * 3 + layer % 2}.{stem[2]}"
    if block:
        rest = block[3]
        for pattern, ours in PORT.items():
            rest, found = re.subn(pattern, ours, rest)
            if found:
                break
        return f"stages.{int(block[1]) - 1}.{block[2]}{rest}"
    return key
