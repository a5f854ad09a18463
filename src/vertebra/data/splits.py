"""Split names, and what turns the finds of a reader into a dataset whose splits agree on their classes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vertebra.data.annotations import Annotations
from vertebra.data.dataset import Dataset, Label, Split, Store
from vertebra.errors import DataError, near

SPLITS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset", "dev", "devel", "development"),
    "test": ("test", "testing", "testset"),
}
"""Our name of a split -> the words that mean it, in lower case."""

OnError = Literal["raise", "skip"]
"""What becomes of data that is listed but cannot be used: an error, or left out with a note."""

_SHOWN = 10
_MEANING = {word: name for name, words in SPLITS.items() for word in words}


@dataclass(frozen=True, eq=False)
class Found:
    """One split as a reader found it, before classes have numbers.

    Attributes:
        names: what users call the images, (n,) array of str.
        labels: a class name an image, or a tuple of names where an image may have many; None without labels.
        store: where the pixels are.
        rows: (n,) positions in the store.
        annotations: boxes, masks, captions and the like, an entry an image.
    """

    names: np.ndarray
    labels: Sequence[str] | Sequence[tuple[str, ...]] | None
    store: Store
    rows: np.ndarray
    annotations: Annotations | None = None


def split_of(word: str) -> str | None:
    """The split that a folder, file or cell of that name means: `Validation` is "val"; None where none."""
    return _MEANING.get(word.strip().lower())


def splits_of_shards(root: Path, shards: Iterable[Path]) -> dict[str, list[Path]]:
    """Shards by split: the split is the folder that a shard lies in, or a word of its name (`cifar10-train-0001.tar`).

    Raises:
        DataError: some shards tell their split and others do not, or one tells two.
    """
    by_split: dict[str, list[Path]] = {}
    for shard in shards:
        words = {split_of(word) for word in re.split(r"[-_.]", shard.stem)} - {None}
        split = split_of(shard.parent.name) if shard.parent != root else None
        if not split and len(words) > 1:
            raise DataError(f"{shard}: the name tells two splits; rename it, as train-0000{shard.suffix}")
        by_split.setdefault(split or str(next(iter(words), "all")), []).append(shard)
    if "all" in by_split and len(by_split) > 1:
        raise DataError(f"{by_split['all'][0]} does not tell its split, and other shards do; rename it, as train-0000")
    return by_split


def leave_out(what: str, faults: Sequence[str], on_error: OnError, notes: list[str]) -> None:
    """Say which rows are at fault: as an error, or as a note where they are to be left out.

    Raises:
        DataError: `on_error` is "raise" and there are faults.
    """
    if not faults:
        return
    shown = "; ".join(faults[:_SHOWN]) + f"; and {len(faults) - _SHOWN} more" * (len(faults) > _SHOWN)
    if on_error == "raise":
        raise DataError(f"{what}: {shown}. Mend them, or leave them out with on_error='skip'")
    notes.append(f"{what}: {len(faults)} left out: {shown}")


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Whole numbers by value, anything else by spelling."""
    unique = set(names)
    if all(name.isdecimal() for name in unique):
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    return tuple(sorted(unique))


def assemble(
    path: str,
    layout: str,
    found: Mapping[str, Found],
    classes: Sequence[str] | None = None,
    notes: Iterable[str] = (),
) -> Dataset:
    """Number the classes and make the splits.

    Args:
        path: the path as the user gave it.
        layout: what the data was recognised as.
        found: split name -> what was found of it.
        classes: names in order, where the data states them; else those of the train split in
            `class_order`, or of all splits where there is no train.
        notes: what the reader has to say.

    Raises:
        DataError: no image at all, or a split has a class that train lacks.
    """
    notes = list(notes)
    found = {name: _plain(found[name]) for name in (*SPLITS, *found) if name in found and len(found[name].rows)}
    if not found:
        raise DataError(f"{path} has no images")
    labelled = {name: one for name, one in found.items() if one.labels is not None}
    if labelled:
        notes += [
            f"{name} has no labels and is left out (images: {len(found[name].rows)})"
            for name in found.keys() - labelled.keys()
        ]
        found = labelled
    label = _label(found.values())
    if classes is None:
        classes = class_order(_used([found["train"]] if "train" in found else found.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {}
    for name, one in found.items():
        _check_classes(path, name, one, numbers)
        targets = _targets(one.labels, numbers, label)
        splits[name] = Split(name, tuple(classes), one.names, targets, one.store, one.rows, one.annotations)
    return Dataset(path, layout, label, tuple(classes), splits, tuple(notes))


def _plain(one: Found) -> Found:
    """The same, where labels that are all empty are none."""
    return one if one.labels is None or any(one.labels) else replace(one, labels=None)


def _label(found: Iterable[Found]) -> Label:
    kinds = {tuple if isinstance(label, tuple) else str for one in found for label in one.labels or ()}
    return "multi" if tuple in kinds else "single" if kinds else "none"


def _names(label: str | tuple[str, ...]) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _used(found: Iterable[Found]) -> set[str]:
    """Every class name that some image has."""
    used: set[str] = set()
    for one in found:
        for label in set(one.labels or ()):
            used.update(_names(label))
    return used


def _check_classes(path: str, split: str, one: Found, numbers: Mapping[str, int]) -> None:
    unknown = sorted(_used([one]) - numbers.keys())
    if unknown:
        hint = near(unknown[0], numbers) or f"; the classes are {', '.join(list(numbers)[:10])}"
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(f"{path}: {split} has a class {unknown[0]!r}{more} that train lacks{hint}")


def _targets(labels: Sequence | None, numbers: Mapping[str, int], label: Label) -> np.ndarray | None:
    if labels is None:
        return None
    if label == "single":
        return np.fromiter((numbers[name] for name in labels), np.int64, len(labels))
    targets = np.zeros((len(labels), len(numbers)), np.uint8)
    many = [_names(names) for names in labels]
    row = np.repeat(np.arange(len(many)), [len(names) for names in many])
    targets[row, [numbers[name] for names in many for name in names]] = 1
    return targets
