"""The sprite world as a data set: splits, targets, columns."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from vertebra.contracts import Preprocess
from vertebra.data.annotations import Annotations, Objects
from vertebra.data.dataset import Dataset
from vertebra.data.digits import digits
from vertebra.data.loader import Batches
from vertebra.data.sprites import ATTRIBUTES, DEGRADATIONS, GLYPHS, arrays, objects, psnr, quality, scene, sprites
from vertebra.data.sprites.targets import GIVES, OBJECTS
from vertebra.errors import DataError, UsageError

DATA = sprites(60, annotate="all", degrade="any")
TRAIN = DATA.split("train")


def test_one_thing_an_image_is_a_classification_set():
    data = sprites(200, objects=1)
    assert isinstance(data, Dataset)
    assert (data.layout, data.label, data.classes) == ("sprites", "single", GLYPHS)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 120, "val": 30, "test": 50}
    split = data.split("val")
    assert split.targets.dtype == np.int64
    for index in range(5):
        assert split.target(index)["labels"].tolist() == [split.targets[index]]
    assert split.image(3).size == (64, 64)
    assert split.image(3).mode == "RGB"


def test_many_things_an_image_are_a_multi_label_set():
    data = sprites(90, classes="shapes")
    assert data.label == "multi"
    for split in data.splits.values():
        assert split.targets.shape == (len(split), 12)
        for index in range(4):
            labels = split.target(index)["labels"].tolist()
            assert np.flatnonzero(split.targets[index]).tolist() == sorted(set(labels))


def test_targets_have_the_names_types_and_shapes_of_the_table():
    assert isinstance(TRAIN.annotations, Annotations)
    assert set(TRAIN.annotations.names) == {name for names in GIVES.values() for name in names}
    for index in range(6):
        target = TRAIN.target(index)
        assert tuple(target) == TRAIN.annotations.names
        count = len(target["labels"])
        shapes = {
            "boxes": (count, 4), "labels": (count,), "crowd": (count,), "difficult": (count,), "area": (count,),
            "masks": (count, 64, 64), "semantic": (64, 64), "panoptic": (64, 64), "segments": (count + 1,),
            "segment_labels": (count + 1,), "points": (count, 2), "attributes": (count, 4), "depth": (count,),
            "hidden": (count,), "clean": (3, 64, 64),
        }  # fmt: skip
        assert {name: tuple(target[name].shape) for name in shapes} == shapes
        assert [target[name].dtype for name in ("boxes", "masks", "semantic", "clean", "points")] == [
            *(torch.float32, torch.bool, torch.int64, torch.uint8, torch.float32)
        ]
        assert target["relations"].shape[1] == 3
        assert len(target["captions"]) == len(target["foils"]) == 5
        assert len(target["sentences"]) == len(target["referents"])


def test_annotations_agree_with_each_other_and_with_the_scene():
    for index in range(8):
        target, found = TRAIN.target(index), scene(0, index)
        masks, labels = target["masks"], target["labels"]
        np.testing.assert_array_equal(masks, np.stack([thing.visible for thing in found.things]))
        assert target["boxes"].tolist() == [thing.box.tolist() for thing in found.things]
        for mask, box, area in zip(masks, target["boxes"], target["area"], strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum()
        background = len(GLYPHS)
        semantic = torch.full((64, 64), background)
        for mask, label in zip(masks, labels, strict=True):
            semantic[mask] = label
        np.testing.assert_array_equal(target["semantic"], semantic)
        spelled = dict(zip(target["segments"].tolist(), target["segment_labels"].tolist(), strict=True))
        np.testing.assert_array_equal(target["panoptic"].clone().apply_(spelled.get), semantic)
        assert target["captions"] == found.captions
        assert list(zip(target["sentences"], target["referents"].tolist(), strict=True)) == list(found.referring)
        world = TRAIN.annotations.world
        named = [[world.values(name)[value] for name, value in zip(ATTRIBUTES, row, strict=True)]
                 for row in target["attributes"].tolist()]  # fmt: skip
        assert named == [[thing.colour, thing.size, thing.texture, thing.position] for thing in found.things]


def test_the_background_is_a_class_where_every_pixel_needs_one():
    assert DATA.classes == (*GLYPHS, "background")
    assert TRAIN.targets[:, -1].tolist() == [1] * len(TRAIN)
    assert "background" not in sprites(30).classes


def test_pairs_are_the_same_scene_clean_and_worse():
    scores = []
    for index in range(len(TRAIN)):
        target, shown = TRAIN.target(index), np.asarray(TRAIN.image(index))
        clean = target["clean"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(clean, scene(0, index).image)
        assert target["psnr"] == pytest.approx(psnr(clean, shown), rel=1e-5)
        assert target["quality"] == pytest.approx(quality(psnr(clean, shown)), rel=1e-5)
        assert 1 <= target["severity"] <= 5
        scores.append(float(target["quality"]))
    assert {int(TRAIN.target(index)["degradation"]) for index in range(len(TRAIN))} == set(range(len(DEGRADATIONS)))
    assert max(scores) - min(scores) > 0.5
    only = sprites(20, degrade="haze", annotate="clean").split("train").target(0)
    assert DEGRADATIONS[only["degradation"]] == "haze"


def test_columns_are_what_targets_are():
    split = sprites(40, objects=(1, 4)).split("train")
    columns = objects(split)
    assert isinstance(columns, Objects)
    assert len(columns) == len(split)
    assert columns.class_ids == tuple(range(1, 23))
    assert columns.names == OBJECTS
    for index in range(len(split)):
        wanted, found = split.target(index), columns.target(index)
        for name in OBJECTS:
            np.testing.assert_array_equal(found[name], wanted[name])
    np.testing.assert_array_equal(columns.presence(22), split.targets)
    with pytest.raises(DataError, match="is not drawn by sprites"):
        objects(digits().split("train"))


def test_columns_of_chosen_images_are_theirs():
    split = sprites(60).split("train").select([7, 3, 11])
    columns = objects(split)
    drawn = arrays(split)
    for place, index in enumerate((7, 3, 11)):
        found = scene(0, index)
        np.testing.assert_array_equal(drawn.images[place], found.image)
        np.testing.assert_array_equal(drawn.ids[place], found.ids)
        rows = slice(drawn.first[place], drawn.first[place + 1])
        assert drawn.boxes[rows].tolist() == [thing.box.tolist() for thing in found.things]
        np.testing.assert_array_equal(columns.masks(place), np.stack([thing.visible for thing in found.things]))
        np.testing.assert_array_equal(split.target(place)["boxes"], drawn.boxes[rows])


def test_a_split_depends_on_neither_the_others_nor_its_length():
    small, large = sprites(20), sprites(splits={"val": 40})
    assert list(large.splits) == ["val"]
    for index in range(3):
        np.testing.assert_array_equal(small.split("val").image(index), large.split("val").image(index))
    assert np.abs(np.asarray(small.split("train").image(0), float) - np.asarray(small.split("val").image(0))).mean() > 1


def test_shift_and_tail_are_of_the_splits_that_are_named():
    usual, other = sprites(200), sprites(200, shift="style", long_tail=2.0)
    np.testing.assert_array_equal(usual.split("val").image(0), other.split("val").image(0))
    assert (
        np.abs(np.asarray(usual.split("test").image(0), float) - np.asarray(other.split("test").image(0))).mean() > 10
    )
    np.testing.assert_array_equal(usual.split("test").targets, other.split("test").targets)
    counts = other.split("train").counts
    assert counts[0] > 5 * counts[5] > 0
    both = sprites(200, long_tail=2.0, tailed=("train", "val"), objects=1)
    assert both.split("val").counts[0] > 10


def test_fingerprints_tell_worlds_apart():
    marks = [
        sprites(20, **options).fingerprint
        for options in ({}, {"seed": 1}, {"shift": "colour"}, {"size": 96}, {"degrade": "rain"}, {"annotate": "boxes"})
    ]
    assert len(set(marks)) == len(marks)
    assert sprites(20).fingerprint == marks[0]


def test_everything_travels_to_other_processes():
    split = pickle.loads(pickle.dumps(TRAIN))
    np.testing.assert_array_equal(split.image(2), TRAIN.image(2))
    assert split.target(2)["captions"] == TRAIN.target(2)["captions"]
    code = (
        "import hashlib, sys; from vertebra.data.sprites import scene, sprites; "
        "print(hashlib.sha256(scene(0, 2).image.tobytes()).hexdigest()); sprites(10).split('train').image(0); "
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == [hashlib.sha256(scene(0, 2).image.tobytes()).hexdigest(), "False"], "pixels, and torch not needed"


def test_the_loader_takes_it():
    split = sprites(40, objects=1).split("train")
    preprocess = Preprocess((64, 64), (0.5,) * 3, (0.5,) * 3)
    batch = next(iter(Batches(split, preprocess, views=None, batch=8, seed=0, workers=0).epoch(0)))
    assert batch.images.shape == (8, 3, 64, 64)
    assert batch.targets.tolist() == split.targets[:8].tolist()
    pixels = (batch.images[3] * 0.5 + 0.5).permute(1, 2, 0) * 255
    np.testing.assert_allclose(pixels, np.asarray(split.image(3)), atol=0.01)


def test_pixels_tell_the_class():
    """Nearest neighbours on raw pixels of one large shape on plain ground are above chance: labels go with images."""
    data = sprites(splits={"train": 300, "test": 100}, objects=1, classes=("circle", "ring", "cross"), size=32)
    train, test = (arrays(data.split(name)) for name in ("train", "test"))

    def masked(drawn):
        found = []
        for ids, box in zip(drawn.ids, drawn.boxes.astype(int), strict=True):
            crop = ids[box[1] : box[3], box[0] : box[2]] > 0
            rows, columns = (np.linspace(0, side - 1, 12).round().astype(int) for side in crop.shape)
            found.append(crop[np.ix_(rows, columns)].ravel())
        return np.stack(found).astype(np.float32)

    nearest = np.abs(masked(test)[:, None] - masked(train)[None]).sum(2).argmin(1)
    assert (train.labels[nearest] == test.labels).mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotate": "box"}, "sprites cannot annotate 'box'; did you mean boxes"),
        ({"annotate": "clean"}, "images are clean already; say degrade="),
        ({"degrade": "rainy"}, "no degradation is called 'rainy'; did you mean rain"),
        ({"images": 2}, "images is 2; three splits need at least 3"),
        ({"splits": {"training": 5}}, "splits has 'training'; did you mean train"),
        ({"splits": {"train": 0}}, "at least one"),
        ({"shifted": ("tests",)}, "shifted has 'tests'; did you mean test"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        sprites(**options)
