from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vertebra.battle.preparation import examined, prepare
from vertebra.data import digits
from vertebra.data.dataset import Dataset, Split
from vertebra.data.digits import Arrays
from vertebra.errors import DataError


def dataset(
    path: str = "made", label: Any = "single", classes: tuple[str, ...] = ("cat", "dog"), **sizes: int
) -> Dataset:
    """Random pictures; targets go round, or as one-hot rows where there are many labels."""
    splits = {}
    for number, (name, size) in enumerate(sizes.items()):
        pixels = np.random.default_rng(number).integers(0, 255, (size, 40, 40), dtype=np.uint8)
        targets = np.arange(size) % len(classes)
        if label == "multi":
            targets = np.eye(len(classes), dtype=np.uint8)[targets]
        names = np.array([f"{name}/{i}.png" for i in range(size)])
        given = None if label == "none" else targets
        splits[name] = Split(name, classes, names, given, Arrays(pixels), np.arange(size))
    return Dataset(path, "imagefolder", label, classes, splits)


def sizes(data: Dataset) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


def test_one_split_is_cut_in_three_and_noted() -> None:
    found = prepare(dataset(all=200))
    assert sizes(found) == {"train": 120, "val": 30, "test": 50}
    assert "one was found, all; cut 60/15/25" in found.notes[0]
    assert not set(found.split("train").names) & set(found.split("test").names)


def test_a_missing_val_or_test_is_made_and_noted() -> None:
    assert sizes(prepare(dataset(train=100, test=30))) == {"train": 80, "val": 20, "test": 30}
    found = prepare(dataset(train=100, val=30))
    assert sizes(found) == {"train": 80, "val": 20, "test": 30}
    assert found.split("test").names[0] == "val/0.png" and "there is no test" in found.notes[1]
    assert prepare(dataset(train=10, val=10, test=10)).notes == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (dataset(label="none", all=9), "made has no labels"),
        (dataset(classes=("cat",), all=9), "made has one class, cat"),
        (dataset(test=9, val=9), "but no train"),
        (dataset(all=2), "nothing is left for val"),
    ],
)
def test_data_that_cannot_tell_backbones_apart_are_refused(data: Dataset, says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepare(data)


@pytest.mark.parametrize("label", ["single", "multi"])
def test_other_data_to_test_on_are_matched_by_name(label: str) -> None:
    train = dataset(classes=("ant", "cat", "dog"), label=label, train=60, test=9)
    other = dataset("elsewhere", classes=("dog", "cat"), label=label, all=10)
    found = prepare(train, other)
    assert sizes(found) == {"train": 48, "val": 12, "test": 10}
    targets = found.split("test").targets
    assert targets is not None
    first = targets[0] if label == "single" else targets[0].argmax()
    assert found.classes[int(first)] == "dog" and found.split("test").classes == ("ant", "cat", "dog")
    assert "test has no image of ant" in found.notes[-1]


def test_a_class_that_train_lacks_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"elsewhere has a class 'doge' that made lacks; did you mean dog\?"):
        prepare(dataset(train=60), dataset("elsewhere", classes=("cat", "doge"), all=10))


def test_labels_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match="many labels an image, made has one label an image"):
        prepare(dataset(train=60), dataset("elsewhere", label="multi", all=10))


def test_images_in_two_splits_are_warned_about() -> None:
    data = prepare(dataset(train=40, val=10, test=10))
    leaking = replace(data, splits={**data.splits, "test": data.split("train").select(range(5), "test")})
    notes = examined(leaking, "raise").notes
    assert notes[-1].startswith("warning: 5 images are the same in two splits")
    assert examined(data, "raise").notes == ()


class Torn(Arrays):
    """One image cannot be read."""

    def image(self, index: int, least: tuple[int, int] | None = None) -> Any:
        if index == 3:
            raise DataError("train/3.png: truncated")
        return super().image(index, least)


def test_unreadable_images_raise_or_are_set_aside() -> None:
    data = prepare(dataset(train=40, val=10, test=10))
    train = data.split("train")
    torn = replace(data, splits={**data.splits, "train": replace(train, store=Torn(train.store.pixels))})  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"train/3\.png: truncated"):
        examined(torn, "raise")
    found = examined(torn, "skip")
    assert len(found.split("train")) == 39 and "train/3.png" not in found.split("train").names
    assert "1 images could not be read and are left out: train/3.png" in found.notes


def test_digits_are_ready_as_they_are() -> None:
    assert sizes(prepare(digits())) == {"train": 1078, "val": 269, "test": 450}
