"""What a probe is given: pixels decoded once, features computed once, one linear classifier fitted once."""

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vertebra.contracts import Backbone
from vertebra.data.dataset import Split
from vertebra.data.pixels import OnError, Pixels, normalised
from vertebra.errors import DataError
from vertebra.probes.logistic import Classifier, fit


class Evidence:
    """The data of a battle as one contender sees them.

    Pixels are shared by contenders with the same preprocessing, features by all probes of one contender. Test
    images never choose anything: strengths and temperatures come from `val`.

    Attributes:
        backbone: the contender, in evaluation mode on `device`.
        classes: class names in the order of the targets.
        seed: for probes that draw.
        folder: where pixels and features are kept; None keeps them in memory.
        multi: whether an image may have many labels.
        device: where the backbone runs; what comes out of it is on the CPU.
        head: pooled features (B, width) to logits (B, classes), where the contender was trained on these classes.
        batch: images a forward pass.

    Args:
        splits: `train`, `val` and `test`, with targets.
        on_error: what an unreadable image does: "raise", or "skip", which leaves it out.
    """

    def __init__(
        self,
        backbone: Backbone,
        splits: Mapping[str, Split],
        *,
        seed: int = 0,
        folder: Path | None = None,
        multi: bool = False,
        device: str | torch.device = "cpu",
        head: Callable[[Tensor], Tensor] | None = None,
        batch: int = 64,
        on_error: OnError = "raise",
    ) -> None:
        self.device = torch.device(device)
        self.backbone = backbone.eval().to(self.device)
        self.classes = splits["train"].classes
        self.seed = seed
        self.folder = folder
        self.multi = multi
        self.head = head
        self.batch = batch
        self._splits = splits
        self._on_error: OnError = on_error
        self._opened: dict[str, tuple[Split, np.ndarray]] = {}
        self._features: dict[str, Tensor] = {}

    def _open(self, name: str) -> tuple[Split, np.ndarray]:
        """A split and its pixels, without the images that could not be read."""
        if name not in self._opened:
            split = self._splits[name]
            if split.targets is None:
                raise DataError(f"split {name!r} has no targets; probes need a class for each image")
            pixels = Pixels.of(split, self.backbone.preprocess, self.folder, on_error=self._on_error)
            array = pixels.array
            if pixels.bad:
                good = np.setdiff1d(np.arange(len(split)), [bad.index for bad in pixels.bad])
                split, array = split.select(good), array[good]
            self._opened[name] = split, array
        return self._opened[name]

    def split(self, name: str) -> Split:
        """The split called `name`, as it is probed."""
        return self._open(name)[0]

    def names(self, name: str) -> np.ndarray:
        """What users call the images of a split, (n,) str."""
        return self.split(name).names

    def targets(self, name: str) -> Tensor:
        """(n,) int64, or (n, classes) float32 where an image may have many labels."""
        targets = torch.from_numpy(np.array(self.split(name).targets))
        return targets.float() if self.multi else targets.long()

    def images(self, name: str) -> np.ndarray:
        """(n, H, W, C) uint8, as the network sees them but for the normalisation."""
        return self._open(name)[1]

    def features(self, name: str) -> Tensor:
        """Pooled features (n, width) float32 of a split, in its order."""
        if name not in self._features:
            path = self.folder and self.folder / f"features-{self.key}-{self._key_of(name)}.npy"
            self._features[name] = torch.from_numpy(kept(path, lambda: self.embed(self.images(name)).numpy()))
        return self._features[name]

    def embed(self, images: np.ndarray) -> Tensor:
        """Pooled features (n, width) float32 of pixels (n, H, W, C) uint8."""
        return self.through(lambda batch: self.backbone(batch).pooled, images, self.backbone.width)

    def through(self, network: Callable[[Tensor], Tensor], images: np.ndarray, width: int) -> Tensor:
        """What a network on `device` makes of pixels, on the CPU.

        Args:
            network: normalised images (B, C, H, W) to (B, width).
            images: (n, H, W, C) uint8.
            width: of what comes out.

        Returns:
            (n, width) float32.
        """
        out = torch.empty(len(images), width)
        for start in range(0, len(images), self.batch):
            rows = slice(start, start + self.batch)
            batch = normalised(images[rows], self.backbone.preprocess)
            with torch.inference_mode():
                # channels last: convolutions take up to 1.4 times less, attention the same
                out[rows] = network(batch.to(self.device, memory_format=torch.channels_last)).float().cpu()
        return out

    @cached_property
    def classifier(self) -> Classifier:
        """The linear classifier on the training features that several probes share."""
        sides = [(self.features(name), self.targets(name)) for name in ("train", "val")]
        return fit(sides[0], sides[1], len(self.classes))

    @cached_property
    def key(self) -> str:
        """16 hex digits that change with the backbone's weights, structure or preprocessing."""
        digest = hashlib.sha256(f"{self.backbone!r}{self.backbone.preprocess!r}".encode())
        for name, tensor in self.backbone.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _key_of(self, name: str) -> str:
        """16 hex digits that change with the images of a split or their order."""
        split = self.split(name)
        digest = hashlib.sha256("\0".join(map(str, split.names)).encode())
        digest.update(np.array([split.store.size_bytes(int(row)) for row in split.rows], dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


def kept(path: Path | None, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from its file, or computed and then kept there; a file is whole or absent."""
    if path is not None and path.is_file():
        return np.load(path, allow_pickle=False)
    array = compute()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.part")
        with beside.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        beside.replace(path)
    return array
