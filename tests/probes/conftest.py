"""Digits in few, and a network small enough to be looked at many times."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.data.dataset import Split
from vertebra.data.digits import digits
from vertebra.probes.evidence import Evidence


class Tiny(Backbone):
    """One convolution; its maps are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.levels, self.width = (Level(16, 2),), 256
        self.preprocess = Preprocess((8, 8), (0.5,), (0.5,), crop=1.0)
        self.passes = 0

    def forward(self, images: Tensor) -> Features:
        self.passes += 1
        maps = self.conv(images).relu()
        return Features((maps,), maps.flatten(1))

    def trunk(self) -> tuple[nn.Module, ...]:
        return (self.conv,)


@pytest.fixture
def tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()


@pytest.fixture(scope="session")
def splits() -> dict[str, Split]:
    found = digits().splits
    return {
        "train": found["train"].select(np.arange(400)),
        "val": found["val"].select(np.arange(150)),
        "test": found["test"].select(np.arange(200)),
    }


@pytest.fixture
def multi_splits(splits: dict[str, Split]) -> dict[str, Split]:
    """Three labels an image: whether its digit is even, above four, a multiple of three."""
    from dataclasses import replace

    rules = np.array([[d % 2 == 0, d > 4, d % 3 == 0] for d in range(10)], dtype=np.uint8)
    return {
        name: replace(split, classes=("even", "above four", "threefold"), targets=rules[split.targets])
        for name, split in splits.items()
    }


@pytest.fixture
def evidence(tiny: Tiny, splits: dict[str, Split]) -> Evidence:
    return Evidence(tiny, splits)


@pytest.fixture
def open_evidence(tiny: Tiny, splits: dict[str, Split]) -> Callable[[Path], Evidence]:
    return lambda folder: Evidence(tiny, splits, folder=folder)
