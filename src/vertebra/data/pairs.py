"""Pairs of images for restoration: a degraded one, which is the image, and a clean one, which is its target.

Recognised are two folders side by side, one named as the clean side and one as the degraded, with the splits inside,
above, or in the names (`DIV2K_train_HR`, `DIV2K_train_LR_bicubic/X2`):

=========  ========================================================================================
side       words of its name
=========  ========================================================================================
clean      hr, gt, ref, reference, clean, sharp, target, groundtruth, high, original, normal
degraded   lr, lq, dist, distorted, noisy, blur, blurry, rain, rainy, hazy, input, low, degraded, noise
=========  ========================================================================================

A pair has the same path below its side and the same stem, but for marks such as `x2`, `_LR` or `_noisy`. Clean images
may be N times larger: N is told by the folder (`LR_bicubic_x2`, `X2`), or is the ratio of the sizes. A clean image
that is a few pixels larger than N times the degraded one, by less than N, is cut at the right and the bottom, as
the usual test sets have it; any other size is an error.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vertebra.data.annotations import Annotations, digest_of
from vertebra.data.dataset import Dataset, Split
from vertebra.data.folders import Files, Folder
from vertebra.data.images import decode
from vertebra.data.partners import digest_of_files, each, fresh, header, matched, split_folder, stem, write_images
from vertebra.data.splits import Found, OnError, assemble, leave_out, split_of
from vertebra.errors import DataError, UsageError, near

if TYPE_CHECKING:
    from vertebra.data.checking import Finding

_PLAIN_CLEAN = {"clean", "sharp", "target", "targets", "groundtruth", "high", "original", "normal"}
_PLAIN_DEGRADED = {
    *("noisy", "noise", "blur", "blurry", "blurred", "rain", "rainy", "hazy", "haze", "input", "inputs", "low"),
    *("degraded", "distorted"),
}
_CLEAN = _PLAIN_CLEAN | {"hr", "gt", "ref", "reference"}
_DEGRADED = _PLAIN_DEGRADED | {"lr", "lq", "dist", "lrbicubic"}
_SCALE = re.compile(r"(?:^|[^a-z0-9])x(\d+)|(?<![a-z0-9])(\d+)x(?![a-z0-9])", re.IGNORECASE)
_MARK = re.compile(
    rf"(?:[_-]?x\d+[a-z]?|[_-](?:{'|'.join(sorted(_CLEAN | _DEGRADED, key=len, reverse=True))}))+$", re.IGNORECASE
)


@dataclass(frozen=True)
class PairPlan:
    """Where the two sides are.

    Attributes:
        clean: split -> the files of the clean side, relative to the root.
        degraded: name of a degraded side -> split -> its files. More than one name: several scales or degradations.
        roots: name of a degraded side -> split -> what the paths of its files, and of the clean ones, start with.
    """

    clean: Mapping[str, Sequence[str]]
    degraded: Mapping[str, Mapping[str, Sequence[str]]]
    roots: Mapping[str, Mapping[str, tuple[str, str]]]


@dataclass(frozen=True, eq=False)
class CleanFiles(Annotations):
    """Clean images that are files, decoded when asked for.

    Attributes:
        root: the folder.
        images: (n,) paths of the degraded images.
        clean: (n,) paths of the clean ones.
        scale: how many times larger the clean ones are; 0 where the sizes of each pair tell.
    """

    root: Path
    images: np.ndarray
    clean: np.ndarray
    scale: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        return ("clean",)

    def fit(self, index: int) -> tuple[int, int]:
        """Height and width of the clean image of pair `index` after the cut: a whole multiple of the degraded one's.

        Raises:
            DataError: there is none, or a header cannot be read.
        """
        degraded, clean = self.root / str(self.images[index]), self.root / str(self.clean[index])
        height, width = header(degraded)[:2]
        clean_height, clean_width = header(clean)[:2]
        times = self.scale or max(1, clean_height // height)
        over = (clean_height - times * height, clean_width - times * width)
        if not all(0 <= rest < times for rest in over):
            multiple = f"{times} times" if self.scale else "a whole multiple of"
            raise DataError(
                f"{clean} is {clean_width} x {clean_height} pixels, which is not {multiple} "
                f"the {width} x {height} of {degraded}; make one from the other anew"
            )
        return times * height, times * width

    def whole(self, index: int) -> Image.Image:
        """The clean image of pair `index`, cut to fit.

        Raises:
            DataError: it cannot be read, or does not fit.
        """
        height, width = self.fit(index)
        file = self.root / str(self.clean[index])
        image = decode(file, name=str(file))
        return image if image.size == (width, height) else image.crop((0, 0, width, height))

    def target(self, index: int) -> dict[str, Any]:
        import torch
        from torchvision import tv_tensors

        pixels = np.array(self.whole(index))
        channels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return {"clean": tv_tensors.Image(torch.from_numpy(channels))}

    def select(self, indices: np.ndarray) -> "CleanFiles":
        return replace(self, images=self.images[indices], clean=self.clean[indices])

    def digest(self) -> bytes:
        return digest_of(replace(self, root=Path())) + digest_of_files(self.root, map(str, self.clean))


@dataclass
class _Sides:
    """What was found so far."""

    clean: dict[str, list[str]]
    degraded: dict[str, dict[str, list[str]]]
    roots: dict[str, dict[str, tuple[str, str]]]


def find_pairs(root: Path, top: Folder) -> PairPlan | None:
    """Folders of clean and of degraded images, by their names; None where there are none.

    Words that are also names of classes (sharp and blurry, low and high) count only where every image has a partner.

    Raises:
        DataError: two folders may both be the clean side.
    """
    sides = _Sides({}, {}, {})
    _add(sides, top, "all")
    for name, folder in top.filled.items():
        if split := split_of(name):
            _add(sides, folder, split)
    return PairPlan(sides.clean, sides.degraded, sides.roots) if sides.degraded else None


def _add(sides: _Sides, parent: Folder, split: str) -> None:
    """Look for the two sides in a folder."""
    kinds = {name: _kind(name) for name in parent.filled}
    for name, folder in parent.filled.items():
        if kinds[name] != "clean":
            continue
        for other, degraded in parent.filled.items():
            if kinds[other] == "degraded" and _split_in(name) == _split_in(other) and _alike(folder, degraded):
                for label, inner in _scales(other, degraded):
                    _add_side(sides, _split_in(name) or split, label, inner, folder)


def _add_side(sides: _Sides, split: str, label: str, degraded: Folder, clean: Folder) -> None:
    inside = [name for name in degraded.filled if split_of(name)]
    if split == "all" and inside and len(inside) == len(degraded.filled) and not degraded.images:
        for name in inside:
            partner = next((folder for word, folder in clean.filled.items() if split_of(word) == split_of(name)), None)
            if partner:
                _add_side(sides, str(split_of(name)), label, degraded.filled[name], partner)
        return
    files = clean.names()
    if sides.clean.setdefault(split, files) != files:
        raise DataError(f"{clean.path} and the folder of {sides.clean[split][0]} may both be clean; move one away")
    sides.degraded.setdefault(label, {})[split] = degraded.names()
    sides.roots.setdefault(label, {})[split] = (degraded.path, clean.path)


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[^a-z]+", name.lower()) if word}


def _kind(name: str) -> str:
    words = _words(name)
    clean, degraded = bool(words & _CLEAN), bool(words & _DEGRADED)
    return "" if clean == degraded else "clean" if clean else "degraded"


def _is_side(name: str) -> bool:
    return bool(_kind(name) or _scale(name))


def _split_in(name: str) -> str | None:
    """The split that a word of a folder's name means, as in DIV2K_train_HR."""
    return next((split for word in sorted(_words(name)) if (split := split_of(word))), None)


def _alike(clean: Folder, degraded: Folder) -> bool:
    """Whether the files of two folders go together: some of them, or all where the folders have everyday names."""
    everyday = (
        _words(clean.path.split("/")[-2]) & _PLAIN_CLEAN or _words(degraded.path.split("/")[-2]) & _PLAIN_DEGRADED
    )
    one, two = ({_plain(stem(name).rpartition("/")[2]) for name in folder.names()} for folder in (clean, degraded))
    return one == two if everyday else bool(one & two)


def _plain(name: str) -> str:
    return _MARK.sub("", name)


def _scales(name: str, folder: Folder) -> list[tuple[str, Folder]]:
    """A degraded side, or its folders where they are scales: X2, X3, X4."""
    inner = {word: inside for word, inside in folder.filled.items() if _scale(word)}
    if folder.images or not inner or len(inner) < len(folder.filled):
        return [(_without_split(name), folder)]
    return [(f"{_without_split(name)}/{word}", inside) for word, inside in inner.items()]


def _without_split(name: str) -> str:
    """The name of a side, the same for each split: DIV2K_train_LR is DIV2K_LR."""
    return "_".join(word for word in name.split("_") if not split_of(word))


def _scale(name: str) -> int:
    """The scale that a name tells, 0 where it tells none: LR_bicubic_x2."""
    found = _SCALE.findall(name)
    return int("".join(found[-1])) if found else 0


def read_pairs(
    path: str,
    root: Path,
    plan: PairPlan,
    *,
    degraded: str | None = None,
    on_error: OnError = "raise",
    notes: Iterable[str] = (),
) -> Dataset:
    """Read pairs: the degraded images, and the clean ones as their targets.

    Args:
        path: the path as the user gave it.
        root: the folder.
        plan: what `find_pairs` found there.
        degraded: the degraded side, where there are several: its name, or its scale, such as "x2".
        on_error: what becomes of images without a partner.
        notes: what was said so far.

    Returns:
        A data set without labels whose targets hold "clean".

    Raises:
        DataError: several degraded sides and none chosen, or images without a partner.
        UsageError: no degraded side is called so.
    """
    notes = list(notes)
    side = _chosen(path, plan, degraded)
    found = {}
    for split, images in plan.degraded[side].items():
        clean, lonely = matched(images, plan.clean[split], _plain, plan.roots[side][split])
        faults = [f"{name} has no clean image" for name, partner in zip(images, clean, strict=True) if not partner]
        faults += [f"{name} has no degraded image" for name in lonely]
        leave_out(f"{path}: {split}", faults, on_error, notes)
        good = [(name, partner) for name, partner in zip(images, clean, strict=True) if partner]
        names, partners = (np.array([pair[place] for pair in good], dtype=np.str_) for place in (0, 1))
        annotations = CleanFiles(root, names, partners, _scale(side))
        found[split] = Found(names, None, Files(root, names), np.arange(len(names)), annotations)
    return assemble(path, "pairs", found, (), notes)


def _chosen(path: str, plan: PairPlan, degraded: str | None) -> str:
    sides = list(plan.degraded)
    if degraded is None:
        if len(sides) > 1:
            raise DataError(
                f"{path} has several degraded sides: {', '.join(sides)}; say which, as degraded={sides[0]!r}"
            )
        return sides[0]
    exact = [side for side in sides if side.lower() == degraded.lower()]
    scaled = [side for side in sides if _scale(degraded) and _scale(side) == _scale(degraded)]
    found = exact or scaled
    if len(found) != 1:
        many = f"{len(found)} degraded sides are" if found else "no degraded side is"
        raise UsageError(f"{path}: {many} called {degraded!r}{near(degraded, sides)}; there are {', '.join(sides)}")
    return found[0]


def write_pairs(dataset: Dataset, folder: Path) -> None:
    """Write a data set with "clean" targets so that `read_pairs` reads it: `SPLIT/lq/x.png` and `SPLIT/gt/x.png`.

    Clean images are written as they are in the targets (cut), as PNG. A scale that the data states stays stated, in the
    folder's name: `lq_x2`.

    Raises:
        DataError: the targets have no clean image.
        UsageError: there is something in the folder.
    """
    fresh(folder)
    for split in dataset.splits.values():
        annotations = split.annotations
        if annotations is None or "clean" not in annotations.names:
            raise DataError(f"{dataset.path}: the split {split.name!r} has no clean images")
        scale = annotations.scale if isinstance(annotations, CleanFiles) else 0
        place = folder / split_folder(split)
        names = write_images(split, place / (f"lq_x{scale}" if scale else "lq"), _is_side)

        def write(index: int, split: Split = split, names: list[str] = names, place: Path = place) -> None:
            pixels = np.asarray(split.target(index)["clean"])  # (C, H, W)
            file = place / "gt" / f"{stem(names[index])}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file)

        each(write, len(split))


def faults(split: Split) -> "Iterator[Finding]":
    """What is wrong with the pairs of a split: clean images that cannot be read, or whose size is no whole multiple."""
    from vertebra.data.checking import Finding

    annotations = split.annotations
    if not isinstance(annotations, CleanFiles):
        return

    def looked(index: int) -> str:
        try:
            annotations.whole(index)
        except DataError as error:
            return str(error)
        return ""

    for index, message in enumerate(each(looked, len(split))):
        if message:
            yield Finding("pair", str(split.names[index]), message)
