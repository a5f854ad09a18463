import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.data.annotations import IGNORE
from vertebra.data.folders import list_folder
from vertebra.data.panoptic import faults, find_panoptic, read_panoptic, write_panoptic
from vertebra.errors import DataError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
CATEGORIES = [
    {"id": 7, "name": "sky", "isthing": 0},
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 90, "name": "dog", "isthing": 1},
]
SEGMENTS = [{"id": 70000, "category_id": 7, "iscrowd": 0}, {"id": 300, "category_id": 3, "iscrowd": 1}]
NUMBERS = np.array([[0, 300, 300], [70000, 70000, 0]])


def paint(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1)
    Image.fromarray(colours.astype(np.uint8)).save(file)


def photo(file, size=(3, 2)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(file)


def make(root, split="train", names=("a", "b"), image="train2017/{}.jpg", **changes):
    """COCO's tree, with `changes` to the json's parts."""
    for name in names:
        photo(root / image.format(name))
        paint(root / f"annotations/panoptic_{split}2017/{name}.png", NUMBERS)
    data = {
        "images": [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": n, "file_name": f"{name}.png", "segments_info": SEGMENTS} for n, name in enumerate(names)
        ],
        "categories": CATEGORIES,
    } | changes
    (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(data))
    return data


def read(root, **options):
    top, notes = list_folder(root)
    plan = find_panoptic(root, top)
    assert plan is not None
    return read_panoptic(str(root), root, plan, notes=notes, **options)


def test_what_targets_hold(tmp_path):
    make(tmp_path)
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, dataset.classes) == ("panoptic", "multi", ("cat", "sky", "dog"))
    split = dataset.splits["train"]
    assert split.targets.tolist() == [[1, 1, 0], [1, 1, 0]]
    target = split.target(1)
    assert tuple(target) == split.annotations.names
    assert target["panoptic"].tolist() == NUMBERS.tolist()
    assert target["segments"].tolist() == [300, 70000]
    assert target["segment_labels"].tolist() == [0, 1]
    assert target["segment_crowd"].tolist() == [True, False]
    assert target["semantic"].tolist() == [[IGNORE, 0, 0], [1, 1, IGNORE]]
    assert split.annotations.things == (True, False, True)
    assert split.annotations.presence().tolist() == split.targets.tolist()


def test_splits_and_selection(tmp_path):
    make(tmp_path)
    make(tmp_path, "val", ("c", "a"), "val2017/{}.jpg")
    dataset = read(tmp_path)
    assert {name: list(split.names) for name, split in dataset.splits.items()} == {
        "train": ["train2017/a.jpg", "train2017/b.jpg"],
        "val": ["val2017/a.jpg", "val2017/c.jpg"],
    }
    one = pickle.loads(pickle.dumps(dataset.splits["val"].select([1])))
    assert list(one.names) == ["val2017/c.jpg"]
    assert one.target(0)["segments"].tolist() == [300, 70000]


def test_other_json_files_are_not_taken(tmp_path):
    photo(tmp_path / "instances/a.jpg")
    (tmp_path / "instances.json").write_text("{}")
    (tmp_path / "panoptic_val.json").write_text("{}")  # without its folder
    assert find_panoptic(tmp_path, list_folder(tmp_path)[0]) is None


def test_segments_of_the_png_and_of_the_json_must_be_the_same(tmp_path):
    make(tmp_path)
    split = read(tmp_path).splits["train"]
    paint(tmp_path / "annotations/panoptic_train2017/a.png", np.array([[0, 300, 5], [70000, 6, 0]]))
    paint(tmp_path / "annotations/panoptic_train2017/b.png", np.array([[0, 300, 300], [300, 0, 0]]))
    with pytest.raises(DataError, match=r"a\.png has segments that the json lacks: 5, 6"):
        split.target(0)
    with pytest.raises(DataError, match=r"b\.png lacks segments of the json: 70000"):
        split.target(1)
    assert [(one.kind, one.where) for one in faults(split)] == [
        ("panoptic", "train2017/a.jpg"),
        ("panoptic", "train2017/b.jpg"),
    ]


def test_sizes_and_modes_that_do_not_fit(tmp_path):
    make(tmp_path)
    split = read(tmp_path).splits["train"]
    photo(tmp_path / "train2017/a.jpg", (6, 4))
    Image.new("L", (3, 2)).save(tmp_path / "annotations/panoptic_train2017/b.png")
    with pytest.raises(DataError, match=r"a\.png is 3 x 2 pixels, and its image 6 x 4"):
        split.target(0)
    with pytest.raises(DataError, match=r"b\.png has pixels of mode L; panoptic PNGs are RGB"):
        split.target(1)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "C:\\a.jpg", ""])
def test_names_that_lead_out_are_refused(tmp_path, name):
    images = [{"id": 0, "file_name": name}]
    make(tmp_path, names=("a",), images=images)
    with pytest.raises(DataError, match=r"panoptic_train2017\.json: .* (leads upwards|is no file name relative)"):
        read(tmp_path, on_error="skip")
    make(tmp_path, names=("a",), annotations=[{"image_id": 0, "file_name": name or "/", "segments_info": []}])
    with pytest.raises(DataError, match=r"(leads upwards|is no file name relative)"):
        read(tmp_path, on_error="skip")


def segments(**change):
    return [{"image_id": 0, "segments_info": [SEGMENTS[0], SEGMENTS[1] | change]}, {"image_id": 1, "segments_info": []}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": segments(id=0)}, r"a\.jpg: segment id 0; ids are 1 to 16777215, as 0 is void"),
        ({"annotations": segments(id="x")}, r"a\.jpg: segment id 'x'"),
        ({"annotations": segments(id=70000)}, r"a\.jpg: a segment id is there twice"),
        ({"annotations": segments(category_id=4)}, r"a\.jpg: segment 300 is of category 4, which is not listed"),
        ({"annotations": segments() + segments()[:1]}, r"image 0 is annotated twice"),
        ({"annotations": [*segments(), {"image_id": 9}]}, r"an annotation is of image 9, which images do not list"),
        ({"annotations": segments()[1:]}, r"image 0 has no annotation"),
        ({"annotations": [*segments()[1:], {"image_id": 0, "file_name": "z.png"}]}, r"a\.jpg has no PNG .*/z\.png"),
        (
            {"annotations": [*segments()[1:], {"image_id": 0, "segments_info": 4}]},
            r"a\.jpg: segments_info is no list of objects",
        ),
        ({"annotations": segments(category_id=[3])}, r"a\.jpg: segment 300 is of category \[3\], which is not listed"),
        ({"images": [{"id": 0, "file_name": "z.jpg"}, {"id": 1, "file_name": "b.jpg"}]}, r"no such image: z\.jpg"),
    ],
)
def test_entries_at_fault_are_raised_or_left_out(tmp_path, changes, reason):
    make(tmp_path, **changes)
    with pytest.raises(DataError, match=reason):
        read(tmp_path)
    dataset = read(tmp_path, on_error="skip")
    assert list(dataset.splits["train"].names)[-1] == "train2017/b.jpg"
    assert any("1 left out" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"categories": {}}, "it needs the lists images, annotations, categories"),
        ({"categories": []}, "has 0 categories"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "cow"}]}, r"'cow' \(id 3\) is there twice"),
        ({"categories": [{"id": "3", "name": "cow"}]}, "needs a whole number as id"),
        ({"images": ["a.jpg"]}, "entry 0 of images is no object"),
        ({"images": [{"id": [1], "file_name": "a.jpg"}]}, "entry 0 of images has no id, a number or a word"),
        ({"annotations": [{"segments_info": []}]}, "entry 0 of annotations has no image_id"),
    ],
)
def test_files_at_fault(tmp_path, changes, reason):
    make(tmp_path, **changes)
    with pytest.raises(DataError, match=reason):
        read(tmp_path)


def test_a_name_in_two_folders_is_told_by_the_split_or_asked_for(tmp_path):
    make(tmp_path, names=("a",), image="val/{}.jpg")
    photo(tmp_path / "train/a.jpg")
    assert list(read(tmp_path).splits["train"].names) == ["train/a.jpg"]
    photo(tmp_path / "train/more/a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is there more than once: train/a\.jpg, train/more/a\.jpg"):
        read(tmp_path)


def same(first, second):
    assert (first.classes, list(first.splits)) == (second.classes, list(second.splits))
    for name, split in first.splits.items():
        other = second.splits[name]
        assert np.array_equal(split.targets, other.targets)
        assert split.annotations.class_ids == other.annotations.class_ids
        assert split.annotations.things == other.annotations.things
        for index in range(len(split)):
            assert split.image(index).tobytes() == other.image(index).tobytes()
            one, two = split.target(index), other.target(index)
            assert all(torch.equal(one[key], two[key]) for key in one)


def test_written_and_read_again_it_is_the_same(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "one", "val", ("a", "c"), "val2017/{}.jpg")
    first = read(tmp_path / "one")
    write_panoptic(first, tmp_path / "two")
    second = read(tmp_path / "two")
    same(first, second)
    written = json.loads((tmp_path / "two/annotations/panoptic_val.json").read_text())
    assert written["annotations"][0]["segments_info"] == [
        {"id": 300, "category_id": 3, "iscrowd": 1, "area": 2, "bbox": [1, 0, 2, 1]},
        {"id": 70000, "category_id": 7, "iscrowd": 0, "area": 2, "bbox": [0, 1, 2, 1]},
    ]
    write_panoptic(second, tmp_path / "three")
    assert read(tmp_path / "three").fingerprint == second.fingerprint


def test_only_panoptic_targets_are_written(tmp_path):
    make(tmp_path)
    dataset = read(tmp_path)
    bare = replace(dataset, splits={"train": replace(dataset.splits["train"], annotations=None)})
    with pytest.raises(DataError, match="the split 'train' has no panoptic masks"):
        write_panoptic(bare, tmp_path / "two")


@pytest.mark.data
def test_the_examples_of_coco(tmp_path):
    if not (archive := shared / "seg/coco-panoptic-2.zip").exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    root = tmp_path / "coco-panoptic"
    dataset = read(root)
    split = dataset.splits["all"]
    assert list(split.names) == [f"input_images/{name}.jpg" for name in ("000000142238", "000000439180")]
    assert (len(dataset.classes), len(split.annotations.segments)) == (133, 50)
    assert not list(faults(split))
    stated = json.loads((root / "panoptic_examples.json").read_text())["annotations"]
    for index, entry in enumerate(sorted(stated, key=lambda one: one["image_id"])):
        found = split.target(index)
        areas = {one["id"]: one["area"] for one in entry["segments_info"]}
        numbers, counts = np.unique(found["panoptic"], return_counts=True)
        assert {int(n): int(c) for n, c in zip(numbers, counts, strict=True) if n} == areas
    write_panoptic(dataset, tmp_path / "again")
    same(dataset, read(tmp_path / "again"))
    written = json.loads((tmp_path / "again/annotations/panoptic.json").read_text())["annotations"]
    boxes = {one["id"]: one["bbox"] for entry in stated for one in entry["segments_info"]}
    assert {one["id"]: one["bbox"] for entry in written for one in entry["segments_info"]} == boxes
