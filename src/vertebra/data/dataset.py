"""What a reader returns: splits of images with names and targets.

Nothing here imports torch. A split is small whatever its images weigh: names and targets are arrays, and
pixels stay where they are until `Split.image` asks its store for one.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from vertebra.data.annotations import Annotations
from vertebra.errors import DataError, near

Label = Literal["single", "multi", "none"]


class Store(ABC):
    """Where the pixels of a split are. Picklable, so that loader workers can be spawned with it."""

    @abstractmethod
    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        """Decode one image by the policy of `vertebra.data.images`: upright, 8 bit, mode "RGB" or "L".

        Args:
            index: position in the store.
            least: (height, width) that are enough; a decoder may return a smaller version of a larger image
                that still covers them (JPEG decodes at 1/2, 1/4 and 1/8).

        Raises:
            DataError: the image cannot be read; the message names it.
        """

    @abstractmethod
    def size_bytes(self, index: int) -> int:
        """Bytes that the encoded image takes, for the fingerprint."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, and what is known of them.

    Attributes:
        name: "train", "val", "test", or "all" where the data has no splits.
        classes: class names in the order of the targets.
        names: what users call the images: paths relative to the data, or row names. (n,) array of str.
        targets: (n,) int64 for one label, (n, classes) uint8 for many, None where there are none.
        store: where the pixels are.
        rows: (n,) positions in the store.
        annotations: boxes, masks, captions and the like, an entry an image, where the data has them.
    """

    name: str
    classes: tuple[str, ...]
    names: np.ndarray
    targets: np.ndarray | None
    store: Store
    rows: np.ndarray
    annotations: Annotations | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        """Decode image `index` of the split; see `Store.image`."""
        return self.store.image(int(self.rows[index]), least)

    def target(self, index: int) -> dict[str, Any]:
        """What is known of image `index`; the names are those of `vertebra.data.annotations`.

        Raises:
            DataError: nothing but classes is known.
        """
        if self.annotations is None:
            raise DataError(f"split {self.name!r} has no boxes, masks or captions; its classes are in `targets`")
        return self.annotations.target(index)

    def select(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "Split":
        """The images at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            name=name or self.name,
            names=self.names[chosen],
            targets=None if self.targets is None else self.targets[chosen],
            rows=self.rows[chosen],
            annotations=None if self.annotations is None else self.annotations.select(chosen),
        )

    @property
    def counts(self) -> np.ndarray:
        """Images a class, (classes,)."""
        if self.targets is None:
            return np.zeros(len(self.classes), dtype=np.int64)
        if self.targets.ndim == 2:
            return self.targets.sum(0, dtype=np.int64)
        return np.bincount(self.targets, minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class Dataset:
    """What was found at a path.

    Attributes:
        path: the path as given.
        layout: what it was recognised as, one of `vertebra.data.reading.LAYOUTS`.
        label: one class an image, many, or none. Of boxes and masks, the classes that an image shows are its many.
        classes: class names in the order of the targets.
        splits: name -> split.
        notes: what a reader should know: files that were skipped, empty classes, synonyms that were mapped.
    """

    path: str
    layout: str
    label: Label
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = field(default=())

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            DataError: the data has no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"{self.path} has no split {name!r}{near(name, self.splits)}; it has {', '.join(self.splits)}"
            )
        return self.splits[name]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with names, sizes, targets, classes or order."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(name.encode())
            digest.update("\0".join(map(str, split.names)).encode())
            digest.update(np.array([split.store.size_bytes(int(r)) for r in split.rows], dtype=np.int64).tobytes())
            if split.targets is not None:
                digest.update(np.ascontiguousarray(split.targets).tobytes())
            if split.annotations is not None:
                digest.update(split.annotations.digest())
        return digest.hexdigest()[:16]


def stratified(targets: np.ndarray, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Cut positions into parts with the same mix of classes.

    Args:
        targets: (n,) int64; many-label targets (n, classes) are stratified by their rarest label.
        shares: share of each part but the last, which takes the rest; each 0..1.
        seed: of the order within a class.

    Returns:
        Sorted positions of each part. A class with too few images for every part fills the last part first,
        which is the one to train on.
    """
    if targets.ndim == 2:
        rarity = np.where(targets > 0, targets.sum(0)[None, :], np.iinfo(np.int64).max)
        targets = np.where(targets.any(1), rarity.argmin(1), targets.shape[1])
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(len(shares) + 1)]
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        start = 0
        for part, share in enumerate(shares):
            count = min(round(share * len(members)), len(members) - start - 1)
            parts[part].append(members[start : start + max(0, count)])
            start += max(0, count)
        parts[-1].append(members[start:])
    return [np.sort(np.concatenate(part)) if part else np.empty(0, dtype=np.int64) for part in parts]
