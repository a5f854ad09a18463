"""RepLKNet: depthwise kernels of 31 x 31 between 1 x 1 convolutions, each trained beside a small one.

Shapes: images (B, 3, H, W) to maps at strides 4, 8, 16, 32. A stem of four convolutions; stages of large-kernel blocks
(norm, 1 x 1, large kernel, 1 x 1) that alternate with feed-forward blocks (norm, 1 x 1 to four times the channels,
GELU, 1 x 1), both residual; a 1 x 1 and a depthwise convolution of stride 2 between stages. Batch norm throughout. The
paper is arXiv 2203.06717; `vertebra.studies.large_kernels` asks what large kernels are good for.

`vertebra.surgery.fuse` merges the parallel kernels and folds every norm, also those before the convolutions. On the CPU
the maps lie channels-last, where large kernels are fast.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneOptions,
    build,
    check_at_least,
    check_images,
    drop_rates,
)
from vertebra.blocks.dilated_reparam import filled, folded
from vertebra.blocks.large_kernel import LargeKernel, Path, Policy, large_kernel
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.parity import convert

VARIANTS = {
    "31b": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "kernels": (31, 29, 27, 13)},
    "31l": {"dims": (192, 384, 768, 1536), "depths": (2, 2, 18, 2), "kernels": (31, 29, 27, 13), "image_size": 384},
    "xl": {
        "dims": (256, 512, 1024, 2048),
        "depths": (2, 2, 18, 2),
        "kernels": (27, 27, 27, 13),
        "policy": "none",
        "ratio": 1.5,
        "image_size": 320,
    },
    "nano": {"dims": (32, 64, 128), "depths": (1, 1, 2), "kernels": (13, 9, 7), "stem_stride": 2, "image_size": 32},
}


class RepLKNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three.

    Attributes:
        dims: channels of each stage.
        depths: pairs of a large-kernel and a feed-forward block, a stage.
        kernels: odd size of the large kernels, a stage.
        policy: what is trained beside them: "none", "small" or "dilated".
        small: odd size of the small kernel.
        ratio: channels of the large kernel, a channel of the stage.
        stem_stride: 4, or 2 for small images.
        path: how the large kernels are computed: "auto", "direct" or "fft".
    """

    dims: Sequence[int]
    depths: Sequence[int]
    kernels: Sequence[int]
    policy: Policy
    small: int
    ratio: float
    stem_stride: int
    path: Path


def replknet(variant: str = "31b", **options: Unpack[RepLKNetOptions]) -> "RepLKNet":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `RepLKNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    mean, std = ((0.5,) * 3, (0.5,) * 3) if variant == "xl" else (IMAGENET_MEAN, IMAGENET_STD)
    return build("replknet", VARIANTS, variant, options, RepLKNet, mean=mean, std=std)


class RepLKNet(Backbone):
    """Stages of large-kernel and feed-forward blocks; build it with `replknet`.

    Attributes:
        stem: image to the first map.
        stages: blocks of each stage.
        downs: between stages.
        norm: of the last map, before it is pooled.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[int],
        policy: Policy = "small",
        small: int = 5,
        ratio: float = 1.0,
        stem_stride: int = 4,
        drop_path: float = 0.0,
        path: Path = "auto",
    ) -> None:
        _check(dims, depths, kernels, ratio, stem_stride)
        super().__init__()
        self.stem = _stem(preprocess.channels, dims[0], stem_stride)
        self.stages = nn.ModuleList()
        for dim, kernel, rates in zip(dims, kernels, drop_rates(drop_path, depths), strict=True):
            stage = nn.Sequential()
            for rate in rates:
                large = large_kernel(int(dim * ratio), kernel=kernel, policy=policy, small=small, path=path)
                stage.extend([large_block(dim, large, rate), feed_forward(dim, rate)])
            self.stages.append(stage)
        self.downs = nn.ModuleList(
            nn.Sequential(_conv(before, after, 1), _conv(after, after, 3, 2, after)) for before, after in pairwise(dims)
        )
        self.norm = nn.BatchNorm2d(dims[-1])
        self.levels = tuple(Level(dim, stem_stride * 2**number) for number, dim in enumerate(dims))
        self.width = dims[-1]
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            images = images.contiguous(memory_format=torch.channels_last)
        x, maps = self.stem(images), []
        for number, stage in enumerate(self.stages):
            x = stage(self.downs[number - 1](x) if number else x)
            maps.append(x)
        return Features(tuple(maps), self.norm(x).mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, the blocks of each stage with the convolutions before it, and the last norm."""
        parts: list[nn.Module] = [self.stem]
        for number, stage in enumerate(self.stages):
            parts += [self.downs[number - 1]] if number else []
            parts += list(stage)  # type: ignore[arg-type]
        return [*parts, self.norm]


def _check(dims: Sequence[int], depths: Sequence[int], kernels: Sequence[int], ratio: float, stem_stride: int) -> None:
    check_at_least("replknet", 1, dims=dims, depths=depths, kernels=kernels)
    if not len(dims) == len(depths) == len(kernels):
        raise UsageError(
            f"replknet: dims, depths and kernels have {len(dims)}, {len(depths)} and {len(kernels)} entries; each needs"
            " one a stage"
        )
    if int(min(dims) * ratio) < 1:
        raise UsageError(f"replknet: ratio is {ratio}; it must leave at least one channel to the large kernels")
    if stem_stride not in (2, 4):
        raise UsageError(f"replknet: stem_stride is {stem_stride}; it can be 2 or 4")


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, its norm, a rectifier."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _stem(colours: int, dim: int, stride: int) -> nn.Sequential:
    first, last = _conv(colours, dim, 3, 2), _conv(dim, dim, 3, stride // 2, dim)
    return nn.Sequential(first, _conv(dim, dim, 3, 1, dim), _conv(dim, dim, 1), last)


class Residual(nn.Module):
    """A branch of convolutions and norms beside the identity.

    Attributes:
        branch: keeps the shape.
    """

    def __init__(self, branch: nn.Sequential, drop_path: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps of the same shape."""
        return self.drop_path(self.branch(x)).add_(x)  # no layer's gradient needs what a branch ends in

    def fused(self) -> "Residual":
        """The same in evaluation mode, its norms folded into the convolutions on either side."""
        layers: list[nn.Module] = []
        for layer in self.branch:
            last = layers[-1] if layers else None
            if isinstance(layer, nn.BatchNorm2d) and isinstance(last, nn.Conv2d):
                layers[-1] = _behind(last, layer)
            elif isinstance(layer, nn.Conv2d) and isinstance(last, nn.BatchNorm2d):
                layers[-1] = _before(last, layer)
            else:
                layers.append(layer.fused() if isinstance(layer, LargeKernel) else layer)
        return Residual(nn.Sequential(*layers))


def large_block(dim: int, large: LargeKernel, drop_path: float = 0.0) -> Residual:
    """A large kernel between 1 x 1 convolutions, for maps of `dim` channels."""
    width = large.branches.norms[0].num_features
    assert isinstance(width, int)
    return Residual(_branch(dim, width, nn.ReLU(inplace=True), large, nn.ReLU(inplace=True)), drop_path)


def feed_forward(dim: int, drop_path: float = 0.0) -> Residual:
    """Two 1 x 1 convolutions with four times the channels between them, for maps of `dim` channels."""
    return Residual(_branch(dim, 4 * dim, nn.GELU()), drop_path)


def _branch(dim: int, width: int, activation: nn.Module, *more: nn.Module) -> nn.Sequential:
    layers = {
        "norm": nn.BatchNorm2d(dim),
        "expand": nn.Conv2d(dim, width, 1, bias=False),
        "expand_norm": nn.BatchNorm2d(width),
        "activation": activation,
        **dict(zip(("large", "large_activation"), more, strict=False)),
        "project": nn.Conv2d(width, dim, 1, bias=False),
        "project_norm": nn.BatchNorm2d(dim),
    }
    return nn.Sequential(OrderedDict(layers))


def _behind(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A 1 x 1 convolution with the norm behind it folded in."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 1)
    return filled(new, *folded(conv.weight, norm, conv.bias))


def _before(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """A 1 x 1 convolution with the norm before it folded in: exact, since there is no border."""
    gain, shift = folded(norm.weight.new_ones(len(norm.weight), 1, 1, 1), norm)
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 1)
    return filled(new, conv.weight * gain[:, 0], conv.weight.flatten(1) @ shift)


def published(state: Mapping[str, Tensor], backbone: RepLKNet) -> dict[str, Tensor]:
    """The authors' released weights (DingXiaoH/RepLKNet-pytorch, MIT) under our names; their classifier is left out.

    Args:
        state: tensors of a released checkpoint with its parallel kernels, as `torch.load(..., weights_only=True)` gives
            them.
        backbone: of `replknet`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, RULES, backbone)


RULES = [
    (r"^module\.", ""),
    (r"^head\.", None),
    (r"^(stem\.\d)\.conv\.", r"\1.0."),
    (r"^(stem\.\d)\.bn\.", r"\1.1."),
    (r"^transitions\.(\d\.\d)\.conv\.", r"downs.\1.0."),
    (r"^transitions\.(\d\.\d)\.bn\.", r"downs.\1.1."),
    (r"^(stages\.\d)\.blocks\.(\d+)\.", r"\1.\2.branch."),
    (r"\.pre(lkb|ffn)_bn\.", ".norm."),
    (r"\.pw1\.conv\.", ".expand."),
    (r"\.pw1\.bn\.", ".expand_norm."),
    (r"\.pw2\.conv\.", ".project."),
    (r"\.pw2\.bn\.", ".project_norm."),
    (r"\.large_kernel\.lkb_origin\.conv\.", ".large.branches.convs.0."),
    (r"\.large_kernel\.lkb_origin\.bn\.", ".large.branches.norms.0."),
    (r"\.large_kernel\.small_conv\.conv\.", ".large.branches.convs.1."),
    (r"\.large_kernel\.small_conv\.bn\.", ".large.branches.norms.1."),
]
"""Their names to ours."""
