"""The data of a battle: train, val and test, whatever splits the user's folder has; each choice is noted."""

from dataclasses import replace
from typing import Literal

import numpy as np

from vertebra.data.checking import CheckReport, check
from vertebra.data.dataset import Dataset, Split, stratified
from vertebra.errors import DataError, near

VAL_SHARE, TEST_SHARE = 0.15, 0.25
"""Of data that have one split."""


def prepare(data: Dataset, test: Dataset | None = None) -> Dataset:
    """Splits train, val and test with targets; the cuts are stratified with a fixed seed.

    Args:
        data: as read.
        test: other data to test on; classes are matched by name.

    Raises:
        DataError: no labels, fewer than two classes, an empty split, or a class of `test` that `data` lacks.
    """
    if data.label == "none":
        raise DataError(f"{data.path} has no labels; a battle needs a class for each image, as one folder a class")
    if len(data.classes) < 2:
        raise DataError(f"{data.path} has one class, {', '.join(data.classes)}; a battle needs two or more")
    splits, notes = _without_test(data) if test else _own(data)
    if test:
        foreign, said = _foreign(data, test)
        splits, notes = {**splits, "test": foreign}, [*notes, *said]
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"{data.path}: nothing is left for {name}; a battle needs at least 5 images of each class")
    notes += _absent(splits)
    return replace(data, splits={name: splits[name] for name in ("train", "val", "test")}, notes=(*data.notes, *notes))


def examined(data: Dataset, on_error: Literal["raise", "skip"]) -> Dataset:
    """The data after `vertebra check`: unreadable images raise or are set aside, leaks between splits are noted.

    Raises:
        DataError: an image cannot be read and `on_error` is "raise".
    """
    report = check(data)
    bad = {finding.where: finding.message for finding in report.defects if finding.kind == "unreadable"}
    if bad and on_error == "raise":
        name, message = next(iter(bad.items()))
        raise DataError(
            f"{message}; {len(bad)} unreadable in all. --on-error skip leaves them out" if name in message else message
        )
    notes = list(data.notes)
    if bad:
        listed = ", ".join(list(bad)[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        notes.append(f"{len(bad)} images could not be read and are left out: {listed}")
    notes += _leaks(report)
    splits = {name: _without(split, bad) for name, split in data.splits.items()} if bad else data.splits
    return replace(data, splits=splits, notes=tuple(notes))


def _leaks(report: CheckReport) -> list[str]:
    kinds = (
        ("duplicate-across", report.defects, "the same"),
        ("near-duplicate-across", report.warnings, "almost the same"),
    )
    notes = []
    for kind, findings, words in kinds:
        found = [finding for finding in findings if finding.kind == kind]
        if found:
            notes.append(
                f"warning: {len(found)} images are {words} in two splits, so that scores flatter; the first: "
                f"{found[0].where}, {found[0].message}"
            )
    return notes


def _without(split: Split, bad: dict[str, str]) -> Split:
    return split.select([i for i, name in enumerate(split.names) if str(name) not in bad])


def _own(data: Dataset) -> tuple[dict[str, Split], list[str]]:
    """All three from one data set."""
    have = dict(data.splits)
    if len(have) == 1:
        return _cut_in_three(next(iter(have.values())))
    if "train" not in have:
        raise DataError(f"{data.path} has the splits {', '.join(have)} but no train; name one of its folders train")
    if "val" in have and "test" in have:
        return have, []
    test = have.get("test") or have["val"]
    rest, val = _cut(have["train"], VAL_SHARE / (1 - TEST_SHARE))
    notes = [f"val: {len(val)} images taken from train by class (seed 0)"]
    if "test" not in have:
        notes.append(f"test: the {len(test)} images of val, because there is no test")
    return {"train": rest, "val": val, "test": test.select(np.arange(len(test)), "test")}, notes


def _without_test(data: Dataset) -> tuple[dict[str, Split], list[str]]:
    """Train and val of data whose own test is not asked for."""
    have = dict(data.splits)
    if "train" in have and "val" in have:
        return {name: have[name] for name in ("train", "val")}, []
    whole = have.get("train") or next(iter(have.values()))
    rest, val = _cut(whole, VAL_SHARE / (1 - TEST_SHARE))
    return {"train": rest, "val": val}, [f"val: {len(val)} images taken from {whole.name} by class (seed 0)"]


def _cut_in_three(whole: Split) -> tuple[dict[str, Split], list[str]]:
    assert whole.targets is not None
    test, val, train = stratified(whole.targets, (TEST_SHARE, VAL_SHARE), seed=0)
    splits = {
        "train": whole.select(train, "train"),
        "val": whole.select(val, "val"),
        "test": whole.select(test, "test"),
    }
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    return splits, [f"splits: one was found, {whole.name}; cut 60/15/25 by class (seed 0) into {sizes}"]


def _cut(split: Split, share: float) -> tuple[Split, Split]:
    assert split.targets is not None
    val, rest = stratified(split.targets, (share,), seed=0)
    return split.select(rest), split.select(val, "val")


def _foreign(data: Dataset, test: Dataset) -> tuple[Split, list[str]]:
    """The test split of other data, with targets in the order of our classes."""
    if test.label != data.label:
        raise DataError(f"{test.path} has {_labels(test)}, {data.path} has {_labels(data)}; both must have the same")
    position = {name: i for i, name in enumerate(data.classes)}
    for name in test.classes:
        if name not in position:
            raise DataError(
                f"{test.path} has a class {name!r} that {data.path} lacks{near(name, position)}; "
                f"its classes: {', '.join(data.classes)}"
            )
    chosen = next(test.splits[name] for name in ("test", "val", *test.splits) if name in test.splits)
    assert chosen.targets is not None
    order = np.array([position[name] for name in test.classes], dtype=np.int64)
    if chosen.targets.ndim == 1:
        targets = order[chosen.targets]
    else:
        targets = np.zeros((len(chosen), len(data.classes)), dtype=chosen.targets.dtype)
        targets[:, order] = chosen.targets
    others = [name for name in test.splits if name != chosen.name]
    note = f"test: {len(chosen)} images of {test.path}, split {chosen.name}" + (
        f" (not used: {', '.join(others)})" if others else ""
    )
    return replace(chosen, name="test", classes=data.classes, targets=targets), [note]


def _labels(data: Dataset) -> str:
    return {"single": "one label an image", "multi": "many labels an image", "none": "no labels"}[data.label]


def _absent(splits: dict[str, Split]) -> list[str]:
    """Notes on classes that a split lacks."""
    notes = []
    for name, split in splits.items():
        absent = [split.classes[i] for i in np.flatnonzero(split.counts == 0)]
        if absent:
            listed = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            notes.append(f"{name} has no image of {listed}")
    return notes
