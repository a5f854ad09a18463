"""A network and batches small enough to train in milliseconds; subprocesses of tests import it too."""

import os
import signal
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vertebra.config import Plan
from vertebra.contracts import Backbone, Batch, Features, Level, Preprocess
from vertebra.methods.supervised import Supervised
from vertebra.tasks.classify import classify


class Net(Backbone):
    """Three convolutions, with or without batch norm and dropout."""

    def __init__(self, *, norm: bool = True, dropout: float = 0.0, image_size: int = 8, channels: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # in no part of the trunk
        parts = [
            self._part(channels, 6, norm, dropout),
            self._part(6, 8, norm, dropout),
            self._part(8, 10, norm, dropout),
        ]
        self.parts = nn.ModuleList(parts)
        self.levels = (Level(6, 1), Level(8, 1), Level(10, 1))
        self.width = 10
        self.preprocess = Preprocess((image_size, image_size), (0.5,) * channels, (0.25,) * channels, "bilinear")

    @staticmethod
    def _part(inputs: int, outputs: int, norm: bool, dropout: float) -> nn.Sequential:
        middle = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), middle, nn.GELU(), nn.Dropout(dropout))

    def forward(self, images: Tensor) -> Features:
        maps, x = [], images * self.scale
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        return list(self.parts)


def net(*, norm: bool = True, dropout: float = 0.0, image_size: int = 8, channels: int = 3) -> Net:
    """What `tiny:net` names."""
    return Net(norm=norm, dropout=dropout, image_size=image_size, channels=channels)


class Memory:
    """Batches of random images whose mean brightness tells the class, in an order that depends on the epoch."""

    def __init__(self, *, images: int = 44, classes: int = 4, batch: int = 16, rank: int = 0, world: int = 1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.targets = torch.arange(images) % classes
        self.images = torch.randn(images, 3, 8, 8, generator=generator) + 2 * self.targets[:, None, None, None]
        self.batch, self.rank, self.world = batch, rank, world

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        for step in range(start, len(self)):
            ids = order[step * self.batch : (step + 1) * self.batch].tensor_split(self.world)[self.rank]
            yield Batch(self.images[ids], self.targets[ids], ids)


def supervised(*, norm: bool = True, dropout: float = 0.0, classes: int = 4, seed: int = 0) -> Supervised:
    """A fresh classifier with seeded weights."""
    torch.manual_seed(seed)
    names = [f"class-{i}" for i in range(classes)]
    return Supervised(classify(Net(norm=norm, dropout=dropout), names, label_smoothing=0.1))


PLAN = Plan(
    epochs=4, batch=16, micro_batch=6, optimizer="adamw", lr=3e-3, layer_decay=0.8, clip=0.5, ema=0.9, warmup_epochs=1.0
)
"""Everything at once: accumulation, layer-wise decay, clipping, averaging, warm-up."""


class Doomed(Net):
    """Sends its process SIGTERM in its third training pass, once."""

    passes = 0

    def forward(self, images: Tensor) -> Features:
        Doomed.passes += self.training
        if Doomed.passes == 3 and self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(images)


def doomed(*, image_size: int = 8) -> Doomed:
    """What `tiny:doomed` names."""
    return Doomed(image_size=image_size, dropout=0.2)
