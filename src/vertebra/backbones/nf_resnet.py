"""NF-ResNet: residual networks without normalisation, their variance kept by arithmetic.

A block computes x + alpha * f(x / beta), where f keeps the variance and beta^2 is the variance that x is known to
have: 1 behind a transition, and alpha^2 more after each block. Convolutions standardise their weights
(`vertebra.blocks.scaled_conv`) and activations are scaled to unit variance, so no statistics of the batch are needed:
an image's features do not depend on its neighbours. `vertebra.probes.signals` shows the variances of any network.

timm departs from the authors' Haiku code: average-pooled shortcuts, a zero gain in each block's last convolution in
place of a scalar, activation scales folded into the convolutions, and widths of the RegNets rounded to multiples of
8 (2 to 4 % more parameters). The variants that begin with "authors" are the authors' layout; NF-ResNet-152, -200 and
-288 are theirs too, since timm lacks them.

Shapes: images (B, channels, H, W), levels of strides 4 to 32 (of RegNets 4 to 32 as well, from a stem of stride 2).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images, drop_rates
from vertebra.backbones.timm import Timm, TimmOptions, build_either
from vertebra.blocks.rezero import Gate
from vertebra.blocks.scaled_conv import ACTIVATION_GAINS, ScaledConv, same_padded
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="nf_resnet",
    title="Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    year=2021,
    arxiv="2101.08692",
    reference="deepmind/deepmind-research",
    licence="Apache-2.0",
    claim=(
        "ResNets and RegNets without activation normalisation match those with BatchNorm and rival EfficientNets at "
        "equal compute, whatever the batch size"
    ),
    builds_on=("rezero",),
    parity="timm's own; of the authors' layout one block of each kind in numpy",
    note="The authors' weights are Haiku's, which no reader here opens.",
)

VARIANTS = {
    "resnet50": {"timm": "nf_resnet50"},
    "resnet101": {"timm": "nf_resnet101"},
    "regnet_b0": {"timm": "nf_regnet_b0"},
    "regnet_b1": {"timm": "nf_regnet_b1"},
    "regnet_b2": {"timm": "nf_regnet_b2"},
    "regnet_b3": {"timm": "nf_regnet_b3"},
    "regnet_b4": {"timm": "nf_regnet_b4"},
    "regnet_b5": {"timm": "nf_regnet_b5"},
    "resnet152": {"depths": (3, 8, 36, 3)},
    "resnet200": {"depths": (3, 24, 36, 3)},
    "resnet288": {"depths": (24, 24, 24, 24)},
    "authors_resnet50": {"depths": (3, 4, 6, 3)},
    "authors_resnet101": {"depths": (3, 4, 23, 3)},
    "authors_regnet_b0": {"kind": "regnet", "depths": (1, 3, 6, 6), "dims": (36, 78, 156, 330), "image_size": 224},
    "authors_regnet_b1": {"kind": "regnet", "depths": (2, 4, 7, 7), "dims": (36, 78, 156, 330), "image_size": 256},
    "authors_regnet_b2": {"kind": "regnet", "depths": (2, 4, 8, 8), "dims": (42, 84, 174, 366), "image_size": 272},
    "authors_regnet_b3": {"kind": "regnet", "depths": (2, 5, 9, 9), "dims": (42, 96, 186, 396), "image_size": 320},
    "authors_regnet_b4": {"kind": "regnet", "depths": (2, 6, 11, 11), "dims": (48, 108, 216, 462), "image_size": 384},
    "authors_regnet_b5": {"kind": "regnet", "depths": (3, 7, 14, 14), "dims": (60, 126, 252, 528), "image_size": 456},
    "nano": {"depths": (1, 1, 1), "dims": (64, 128, 256), "stem": "small", "image_size": 32},
}

ALPHA = 0.2
_EXPANSION, _GROUP, _SQUEEZE = 2.25, 8, 0.5


class NFResNetOptions(TimmOptions, total=False):
    """Options; those below are of the networks written here, and `network` of timm's. A variant sets some.

    Attributes:
        kind: of the blocks: "resnet" (ReLU) or "regnet" (SiLU, grouped convolutions, squeeze-and-excitation).
        depths: blocks a stage.
        dims: channels that a stage gives.
        stem: "large", or "small" for images of 32 pixels: one 3 x 3 convolution of stride 1.
    """

    kind: Literal["resnet", "regnet"]
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem: Literal["large", "small"]


def nf_resnet(variant: str = "resnet50", **options: Unpack[NFResNetOptions]) -> "Timm | NFResNet":
    """Build a network without normalisation.

    Args:
        variant: one of `VARIANTS`.
        options: as in `NFResNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range or of the other kind of network.
    """
    return build_either(PAPER.id, VARIANTS, variant, options, NFResNet)


class NFResNet(Backbone):
    """The authors' layout; build it with `nf_resnet`.

    Attributes:
        stem: image to the first map.
        stages: blocks.
        last: 1 x 1 convolution of a RegNet behind its blocks.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        kind: Literal["resnet", "regnet"] = "resnet",
        depths: Sequence[int],
        dims: Sequence[int] = (256, 512, 1024, 2048),
        stem: Literal["large", "small"] = "large",
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("nf_resnet", 1, depths=depths, dims=dims)
        if len(depths) != len(dims) or kind not in ("resnet", "regnet") or stem not in ("large", "small"):
            raise UsageError(
                f"nf_resnet: depths {depths} and dims {dims} need as many numbers, kind ({kind}) is resnet or regnet,"
                f" stem ({stem}) large or small"
            )
        super().__init__()
        self.preprocess = preprocess
        regnet = kind == "regnet"
        inputs = dims[0] if regnet else max(1, dims[0] // 4)
        colours = preprocess.channels
        if stem == "small":
            self.stem = nn.Sequential(ScaledConv(colours, inputs, 3))
        elif regnet:
            self.stem = nn.Sequential(ScaledConv(colours, inputs, 3, 2))
        else:
            self.stem = nn.Sequential(ScaledConv(colours, inputs, 7, 2), MaxPool())
        stages, variance, first = [], 1.0, True
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            blocks = []
            for number, rate in enumerate(rates):
                transition = number == 0
                stride = 2 if transition and (stage or (regnet and stem == "large")) else 1
                blocks.append(
                    Block(
                        inputs,
                        dims[stage],
                        stride,
                        kind=kind,
                        beta=variance**0.5,
                        transition=transition,
                        expansion=1.0 if first else _EXPANSION,
                        drop_path=rate,
                    )
                )
                variance = (1.0 if transition else variance) + ALPHA**2  # a transition begins anew
                inputs, first = dims[stage], False
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.activation = Activation("silu" if regnet else "relu")
        self.width = int(1280 * inputs / 440) if regnet else inputs
        self.last = ScaledConv(inputs, self.width, 1) if regnet else nn.Identity()
        finest = 1 if stem == "small" else 4
        widths = (*dims[:-1], self.width)
        self.levels = tuple(Level(dim, finest << stage) for stage, dim in enumerate(widths))

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features; the last map is that behind the last activation."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = maps[-1] = self.activation(self.last(x))
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, the blocks, the last convolution of a RegNet."""
        blocks = [block for stage in self.stages for block in stage.children()]
        return [self.stem, *blocks, *([self.last] if isinstance(self.last, ScaledConv) else [])]


class Block(nn.Module):
    """shortcut + alpha * gain * f(activation(x) / beta), where `gain` is a scalar that starts at zero (figure 5).

    (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        kind: Literal["resnet", "regnet"],
        beta: float,
        transition: bool,
        expansion: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        regnet = kind == "regnet"
        name = "silu" if regnet else "relu"
        groups = max(1, int(inputs * expansion) // _GROUP) if regnet else 1
        width = groups * _GROUP if regnet else max(1, outputs // 4)
        self.beta, self.stride = beta, stride
        self.activation = Activation(name)
        pool = AveragePool() if regnet and stride > 1 else nn.Identity()
        strided = 1 if regnet else stride
        self.shortcut = nn.Sequential(pool, ScaledConv(inputs, outputs, 1, strided)) if transition else None
        self.branch = nn.Sequential(
            ScaledConv(inputs, width, 1),
            Activation(name),
            ScaledConv(width, width, 3, stride, groups),
            Squeeze(width) if regnet else nn.Identity(),
            Activation(name),
            ScaledConv(width, outputs, 1),
        )
        self.drop_path = DropPath(drop_path, scale_by_keep=False) if drop_path else nn.Identity()
        self.gain = SkipGain()

    def forward(self, x: Tensor) -> Tensor:
        """One map to the next."""
        h = self.activation(x) / self.beta
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return shortcut + self.gain(self.drop_path(self.branch(h)))


class SkipGain(Gate):
    """Times alpha and a learned scalar."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x * (ALPHA * self.alpha)


class Activation(nn.Module):
    """An activation times the constant that gives a standard normal signal a variance of 1."""

    def __init__(self, name: Literal["relu", "silu"]) -> None:
        super().__init__()
        self.function = nn.ReLU() if name == "relu" else nn.SiLU()
        self.scale = ACTIVATION_GAINS[name]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return self.function(x) * self.scale


class Squeeze(nn.Module):
    """Channels times twice the sigmoid of two linear layers on their means, which is 1 at the start on average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, int(channels * _SQUEEZE))
        self.gates = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x * (2 * self.gates(x.mean((2, 3))))[..., None, None]


class MaxPool(nn.Module):
    """3 x 3 maxima at stride 2 with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        return F.max_pool2d(same_padded(x, 3, 2, float("-inf")), 3, 2)


class AveragePool(nn.Module):
    """2 x 2 means at stride 2, of what there is at the border."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        return F.avg_pool2d(x, 2, 2, ceil_mode=True)
