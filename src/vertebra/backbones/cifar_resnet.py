"""Residual networks for small images, as the paper has them for CIFAR-10: what effects are measured on.

Shapes: images (B, 3, H, W) to maps of width, 2 and 4 times the width at strides 1, 2, 4. The shortcut of a block that
halves the map takes every second pixel and pads the new channels with zeros (option A), so that it has no parameters.
The paper is that of ResNet (arXiv 1512.03385, section 4.2), whose large networks are timm's.
"""

from collections.abc import Callable, Mapping
from typing import Unpack

from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images
from vertebra.contracts import Backbone, Features, Level, Preprocess

VARIANTS = {
    "20": {"blocks": 3, "image_size": 32},
    "32": {"blocks": 5, "image_size": 32},
    "44": {"blocks": 7, "image_size": 32},
    "56": {"blocks": 9, "image_size": 32},
    "110": {"blocks": 18, "image_size": 32},
    "nano": {"blocks": 1, "image_size": 32},
}


class CifarResNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first.

    Attributes:
        blocks: of two convolutions, a stage.
        width: channels of the first stage.
        attention: channels -> a module that keeps the shape, put after the last norm of each branch.
    """

    blocks: int
    width: int
    attention: Callable[[int], nn.Module] | None


def cifar_resnet(variant: str = "20", **options: Unpack[CifarResNetOptions]) -> "CifarResNet":
    """Build a variant; it has 6 blocks + 2 layers with its classifier.

    Args:
        variant: one of `VARIANTS`.
        options: as in `CifarResNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option below 1.
    """
    colours = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return build("cifar_resnet", VARIANTS, variant, options, CifarResNet, crop=1.0, interpolation="bilinear", **colours)


class CifarResNet(Backbone):
    """Three stages of residual blocks; build it with `cifar_resnet`.

    Attributes:
        stem: image to the first map.
        blocks: of all stages.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        blocks: int,
        width: int = 16,
        attention: Callable[[int], nn.Module] | None = None,
    ) -> None:
        check_at_least("cifar_resnet", 1, blocks=blocks, width=width)
        super().__init__()
        widths, made = (width, 2 * width, 4 * width), attention or (lambda channels: nn.Identity())
        colours = preprocess.channels
        self.stem = nn.Sequential(nn.Conv2d(colours, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList()
        for before, after in zip((width, *widths), widths, strict=False):
            places = [(before, 1 + (before < after))] + [(after, 1)] * (blocks - 1)
            self.blocks.extend(Residual(inputs, after, stride, made(after)) for inputs, stride in places)
        self.per_stage = blocks
        self.levels = tuple(Level(channels, stride) for channels, stride in zip(widths, (1, 2, 4), strict=True))
        self.width = widths[-1]
        self.preprocess = preprocess
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number % self.per_stage == 0:
                maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem and the blocks."""
        return [self.stem, *self.blocks]


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int, attention: nn.Module) -> None:
        super().__init__()
        self.more, self.stride = outputs - inputs, stride
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            attention,
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.more // 2
        return self.activation(self.branch(x) + nn.functional.pad(shortcut, (0, 0, 0, 0, before, self.more - before)))
