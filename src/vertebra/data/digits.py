"""Real handwriting, built in: scikit-learn's 1,797 digits of 8 x 8 pixels (UCI, public domain)."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vertebra.data.dataset import Dataset, Split, Store, stratified


@dataclass(frozen=True, eq=False)
class Arrays(Store):
    """Images that are in memory already.

    Attributes:
        pixels: (n, H, W) grey or (n, H, W, 3) RGB, uint8.
    """

    pixels: np.ndarray

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def size_bytes(self, index: int) -> int:
        return int(self.pixels[index].nbytes)


def digits() -> Dataset:
    """The digits, split 60 / 15 / 25 into train, val and test with the same mix of classes."""
    from sklearn.datasets import load_digits

    levels, labels = map(np.asarray, load_digits(return_X_y=True))
    pixels = (levels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)  # 17 grey levels to 0..255
    targets = labels.astype(np.int64)
    store, classes = Arrays(pixels), tuple(str(d) for d in range(10))
    everything = Split(
        "all", classes, np.array([f"digit-{i:04d}" for i in range(len(pixels))]), targets, store, np.arange(len(pixels))
    )
    test, val, train = stratified(targets, (0.25, 0.15), seed=0)
    splits = {
        "train": everything.select(train, "train"),
        "val": everything.select(val, "val"),
        "test": everything.select(test, "test"),
    }
    return Dataset("digits", "digits", "single", classes, splits)
