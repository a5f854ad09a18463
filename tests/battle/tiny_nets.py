"""Backbones small enough to be built, trained and timed in milliseconds; addressed as `tiny_nets:narrow`."""

import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features, Level, Preprocess


class Tiny(Backbone):
    def __init__(self, width: int, shuffled: bool) -> None:
        super().__init__()
        self.width = width
        self.levels = (Level(width, 2),)
        self.preprocess = Preprocess((8, 8), (0.3, 0.3, 0.3), (0.4, 0.4, 0.4), "bilinear")
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.shuffled = shuffled

    def forward(self, images: Tensor) -> Features:
        if self.shuffled:
            images = images.mean((2, 3), keepdim=True).expand_as(images)
        maps = self.stem(images).relu()
        return Features((maps,), maps.flatten(2)[:, :, ::4].mean(2) + maps.amax((2, 3)))

    def trunk(self) -> list[nn.Module]:
        return [self.stem]


def narrow() -> Tiny:
    return Tiny(8, shuffled=False)


def wide(*, image_size: int = 8) -> Tiny:
    return Tiny(24, shuffled=False)


def blind() -> Tiny:
    return Tiny(16, shuffled=True)


def broken() -> Tiny:
    raise RuntimeError("no such luck")


class Explosive(Tiny):
    def forward(self, images: Tensor) -> Features:
        if len(images) > 40:
            raise MemoryError("too many images")
        return super().forward(images)


def explosive() -> Tiny:
    torch.manual_seed(0)
    return Explosive(8, shuffled=False)


class Picky(Tiny):
    def forward(self, images: Tensor) -> Features:
        if self.training:
            raise RuntimeError("not to be trained")
        return super().forward(images)


def picky() -> Tiny:
    return Picky(8, shuffled=False)
