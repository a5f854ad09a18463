"""Residual networks for small images, as the paper has them for CIFAR-10: what effects are measured on.

Shapes: images (B, 3, H, W) to maps of width, 2 and 4 times the width at strides 1, 2, 4. The shortcut of a block that
halves the map takes every second pixel and pads the new channels with zeros (option A), so that it has no parameters.
The paper is that of ResNet (arXiv 1512.03385, section 4.2), whose large networks are timm's.
"""

from collections.abc import Callable
from typing import TypedDict, Unpack

from torch import Tensor, nn

from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError, near

VARIANTS = {
    "20": {"blocks": 3},
    "32": {"blocks": 5},
    "44": {"blocks": 7},
    "56": {"blocks": 9},
    "110": {"blocks": 18},
}


class CifarResNetOptions(TypedDict, total=False):
    """Options; a variant sets the first.

    Attributes:
        blocks: of two convolutions, a stage.
        width: channels of the first stage.
        image_size: side in pixels that the preprocessing gives.
    """

    blocks: int
    width: int
    image_size: int


def cifar_resnet(
    variant: str = "20",
    *,
    attention: Callable[[int], nn.Module] | None = None,
    **options: Unpack[CifarResNetOptions],
) -> "CifarResNet":
    """Build a variant; it has 6 blocks + 2 layers with its classifier.

    Args:
        variant: one of `VARIANTS`.
        attention: channels -> a module that keeps the shape, put after the last norm of each branch.
        options: as in `CifarResNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option below 1.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"cifar_resnet has no variant {variant!r}{near(variant, VARIANTS)}; it has {known}")
    merged = {"width": 16, "image_size": 32, **VARIANTS[variant], **options}
    for name, value in merged.items():
        if value < 1:
            raise UsageError(f"cifar_resnet: {name} is {value}; it must be at least 1")
    return CifarResNet(attention=attention or (lambda channels: nn.Identity()), **merged)


class CifarResNet(Backbone):
    """Three stages of residual blocks; build it with `cifar_resnet`."""

    def __init__(self, *, blocks: int, width: int, image_size: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList()
        for before, after in zip((width, *widths), widths, strict=False):
            places = [(before, 1 + (before < after))] + [(after, 1)] * (blocks - 1)
            self.blocks.extend(Residual(inputs, after, stride, attention(after)) for inputs, stride in places)
        self.per_stage = blocks
        self.levels = tuple(Level(channels, stride) for channels, stride in zip(widths, (1, 2, 4), strict=True))
        self.width = widths[-1]
        self.preprocess = Preprocess((image_size, image_size), (0.5,) * 3, (0.25,) * 3, "bilinear")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
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

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.more // 2
        return (self.branch(x) + nn.functional.pad(shortcut, (0, 0, 0, 0, before, self.more - before))).relu()
