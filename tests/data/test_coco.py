import copy
import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as reference
from PIL import Image

from vertebra.data.annotations import Annotations, Objects
from vertebra.data.coco import coco_file, find_coco, is_coco, read_coco, write_coco
from vertebra.data.dataset import Store
from vertebra.data.folders import list_folder
from vertebra.data.segmentations import decode_runs
from vertebra.data.voc import write_voc
from vertebra.data.yolo import write_yolo
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not shared.is_dir(), reason="the shared test data is not here")


def read(root, **options):
    top, notes = list_folder(root)
    plan = find_coco(root, top)
    assert plan is not None
    return read_coco(str(root), root, plan, notes=notes, **options)


def picture(file, size=(40, 30), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(file, **options)


def small():
    """Three images, one of them empty, ids with holes, polygons, both kinds of runs, a crowd and keypoints."""
    covered = np.zeros((30, 40), np.uint8)
    covered[5:20, 10:25] = covered[22:25, 0:3] = 1
    packed = reference.encode(np.asfortranarray(covered))
    text = packed["counts"] if isinstance(packed["counts"], str) else packed["counts"].decode()
    runs = [30 * 2 + 3, 4, 26, 4, 30 * 40 - 97]
    return {
        "images": [
            {"id": 17, "file_name": "c.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {
                "id": 70,
                "image_id": 17,
                "category_id": 44,
                "bbox": [0.1, 0.2, 10.7, 11.3],
                "area": 60.25,
                "iscrowd": 0,
                "segmentation": [[0.1, 0.2, 10.8, 0.2, 10.8, 11.5], [1, 2, 3, 2.5, 3, 4, 1.25, 4]],
                "keypoints": [1, 2, 2, 0, 0, 0],
            },
            {
                "id": 5,
                "image_id": 3,
                "category_id": 2,
                "bbox": [0, 5, 25, 20],
                "area": 234,
                "iscrowd": 0,
                "segmentation": {"size": [30, 40], "counts": text},
            },
            {
                "id": 8,
                "image_id": 17,
                "category_id": 2,
                "bbox": [2, 3, 2, 4],
                "area": 8,
                "iscrowd": 1,
                "segmentation": {"size": [30, 40], "counts": runs},
            },
            {"id": 6, "image_id": 3, "category_id": 44, "bbox": [1.5, 2.5, 3.25, 4.125], "iscrowd": 0},
        ],
        "categories": [
            {"id": 44, "name": "dog", "keypoints": ["nose", "tail"]},
            {"id": 2, "name": "cat", "keypoints": ["nose", "tail"]},
        ],
    }


@pytest.fixture
def root(tmp_path):
    for name in "abc":
        picture(tmp_path / f"data/images/{name}.png")
    return tmp_path / "data"


def save(root, whole, name="instances.json"):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole), encoding="utf-8")
    return file


def test_columns_are_the_jsons(root):
    save(root, small())
    data = read(root)
    split = data.splits["all"]
    objects = split.annotations
    assert isinstance(objects, Objects)
    assert (data.layout, data.label, data.classes) == ("coco", "multi", ("cat", "dog"))
    assert objects.class_ids == (2, 44)
    assert split.names.tolist() == ["images/a.png", "images/b.png", "images/c.png"]  # by id: 3, 9, 17
    assert split.targets is not None
    assert split.targets.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert objects.first.tolist() == [0, 2, 2, 4]
    assert objects.labels.tolist() == [0, 1, 1, 0]
    assert objects.boxes.tolist()[0] == [0, 5, 25, 25]
    assert objects.boxes[2].tolist() == [0.1, 0.2, 0.1 + 10.7, 0.2 + 11.3]
    assert objects.crowd.tolist() == [False, False, False, True]
    assert objects.area.tolist() == [234, 3.25 * 4.125, 60.25, 8]
    assert objects.keypoint_names == ("nose", "tail")
    assert objects.keypoints is not None
    assert objects.keypoints[2].tolist() == [[1, 2, 2], [0, 0, 0]]
    assert not objects.keypoints[0].any()
    assert objects.outlines is not None
    assert [part.tolist() for part in objects.outlines.polygons(2)][1] == [[1, 2], [3, 2.5], [3, 4], [1.25, 4]]
    masks = objects.masks(0)
    assert masks[0].sum() == 234
    assert masks[0, 5:20, 10:25].all()
    assert not masks[1].any()
    crowd = objects.masks(2)[1]
    assert np.argwhere(crowd).tolist() == [[row, column] for row in range(3, 7) for column in (2, 3)]
    target = split.target(2)
    assert target["boxes"].shape == (2, 4)
    assert target["masks"].shape == (2, 30, 40)
    assert target["crowd"].tolist() == [False, True]


def test_views_that_change_a_target_leave_the_data_alone(root):
    save(root, small())
    split = read(root).splits["all"]
    target = split.target(0)
    for name in ("labels", "crowd", "boxes", "area"):
        target[name][...] = 1
    assert split.target(0)["labels"].tolist() == [0, 1]


def test_write_and_read_again_to_the_last_bit(root, tmp_path):
    rng = np.random.default_rng(0)
    whole = small()
    for number in range(300):
        x, y, w, h = (rng.random(4) * [30, 20, 10, 10] + [0, 0, 0.01, 0.01]).tolist()
        whole["annotations"].append(
            {"id": 100 + number, "image_id": 9, "category_id": 2, "bbox": [x, y, w, h], "area": w * h}
        )
    whole["annotations"][-1]["difficult"] = 1
    save(root, whole)
    first = read(root)
    write_coco(first, tmp_path / "out")
    again = read(tmp_path / "out")
    assert again.classes == first.classes
    assert again.splits.keys() == first.splits.keys()
    for name, split in first.splits.items():
        other = again.splits[name]
        assert other.names.tolist() == split.names.tolist()
        assert np.array_equal(other.targets, split.targets)
        assert other.annotations.boxes.tolist() == split.annotations.boxes.tolist()
        assert other.annotations.digest() == split.annotations.digest()
    assert first.fingerprint == again.fingerprint
    write_coco(again, tmp_path / "more")
    written = [(tmp_path / folder / "annotations/instances.json").read_text() for folder in ("out", "more")]
    assert written[0] == written[1]
    with pytest.raises(UsageError, match="is not empty"):
        write_coco(first, tmp_path / "out")


class Squares(Store):
    """Images that are no files."""

    def image(self, index, least=None):
        return Image.new("RGB", (40, 30), (index, 0, 0))

    def size_bytes(self, index):
        return 1


def test_images_that_are_no_files_are_saved_as_png(root, tmp_path):
    save(root, small())
    data = read(root)
    one = data.splits["all"]
    splits = {
        name: replace(one, name=name, names=np.array(names), store=Squares(), rows=np.arange(3))
        for name, names in (("train", ["row 0", "row 1", "x.jpg"]), ("val", ["row 0", "row 1", "row 2"]))
    }
    for number, write in enumerate((write_coco, write_voc, write_yolo)):
        write(replace(data, splits=splits), tmp_path / str(number))
    again = read(tmp_path / "0")
    assert again.splits["train"].names.tolist() == ["train/row 0.png", "train/row 1.png", "train/x.png"]
    assert again.splits["val"].image(2).getpixel((0, 0)) == (2, 0, 0)
    assert again.splits["val"].annotations.digest() == one.annotations.digest()  # type: ignore[union-attr]
    assert (tmp_path / "1/Annotations/val-row 2.xml").is_file()
    assert (tmp_path / "2/labels/val/val-row 2.txt").is_file()
    clash = {"train": replace(splits["train"], names=np.array(["a.jpg", "a.png", "b"]))}
    for write in (write_coco, write_voc, write_yolo):
        with pytest.raises(UsageError, match=r"two images would be written|more than one image is called a"):
            write(replace(data, splits=clash), tmp_path / f"clash {write.__name__}")
    outside = {"train": replace(splits["train"], names=np.array(["../a", "b", "c"]))}
    with pytest.raises(UsageError, match="leads outside"):
        write_coco(replace(data, splits=outside), tmp_path / "outside")
    bare = {"train": replace(splits["train"], annotations=None)}
    with pytest.raises(UsageError, match="split train has no boxes"):
        write_coco(replace(data, splits=bare), tmp_path / "bare")


class Asked(Annotations):
    """Objects that are known one image at a time."""

    def __init__(self, objects):
        self.objects = objects

    def __len__(self):
        return len(self.objects)

    @property
    def names(self):
        return self.objects.names

    def target(self, index):
        return self.objects.target(index)

    def select(self, indices):
        return Asked(self.objects.select(indices))

    def digest(self):
        return self.objects.digest()


def test_annotations_of_another_kind_are_asked_for_their_boxes(root, tmp_path):
    save(root, small())
    data = read(root)
    split = data.splits["all"]
    write_coco(replace(data, splits={"all": replace(split, annotations=Asked(split.annotations))}), tmp_path / "out")
    one, other = split.annotations, read(tmp_path / "out").splits["all"].annotations
    assert isinstance(one, Objects)
    assert isinstance(other, Objects)
    assert np.allclose(other.boxes, one.boxes)
    for column in ("first", "sizes", "labels", "crowd"):
        assert np.array_equal(getattr(other, column), getattr(one, column))
    assert all(np.array_equal(other.masks(index), one.masks(index)) for index in range(3))


def test_nothing_but_images_without_objects(root, tmp_path):
    save(root, {**small(), "annotations": []})
    data = read(root)
    assert (data.label, data.classes) == ("none", ("cat", "dog"))
    assert len(data.splits["all"].annotations) == 3  # type: ignore[arg-type]
    assert data.splits["all"].target(0)["boxes"].shape == (0, 4)
    write_coco(data, tmp_path / "out")
    assert read(tmp_path / "out").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("images", "file"),
    [
        ("train2017/", "annotations/instances_train2017.json"),
        ("images/train/", "annotations/instances_train.json"),
        ("train/", "train/_annotations.coco.json"),
        ("train/images/", "train.json"),
        ("train/images/", "train/labels.json"),
    ],
)
def test_where_jsons_and_images_lie(tmp_path, images, file):
    whole = small()
    for name in "abc":
        picture(tmp_path / images / f"{name}.png")
        picture(tmp_path / images.replace("train", "val") / f"{name}.png")  # the same names: the folder decides
    save(tmp_path, whole, file)
    save(tmp_path, {**whole, "annotations": whole["annotations"][:1]}, file.replace("train", "val"))
    data = read(tmp_path)
    assert list(data.splits) == ["train", "val"]
    assert data.splits["train"].names[0] == f"{images}a.png"
    assert data.splits["val"].names[0] == f"{images.replace('train', 'val')}a.png"
    assert len(data.splits["val"].annotations.boxes) == 1  # type: ignore[union-attr]


def test_instances_come_before_keypoints_and_one_json_by_its_path(root):
    save(root, small(), "annotations/instances_val2017.json")
    other = save(root, small(), "annotations/person_keypoints_val2017.json")
    save(root, {"images": [], "annotations": [{"caption": "a"}]}, "annotations/captions_val2017.json")
    data = read(root)
    assert list(data.splits) == ["val"]
    assert any("person_keypoints_val2017.json is not read" in note for note in data.notes)
    found = coco_file(other)
    assert found is not None
    assert found[0] == root
    assert len(read_coco(str(other), *found).splits["all"]) == 3
    (root / "annotations/instances_val2017.json").rename(root / "annotations/things_val.json")
    with pytest.raises(DataError, match="several json files on val"):
        read(root)


def test_what_is_no_coco_json(tmp_path):
    whole = small()
    assert is_coco(save(tmp_path, whole))
    panoptic = {**whole, "annotations": [{"image_id": 3, "file_name": "a.png", "segments_info": []}]}
    for other in (panoptic, {"images": [], "annotations": []}, [whole], {}):
        assert not is_coco(save(tmp_path, other, "other.json"))
    (tmp_path / "other.json").write_bytes(b"")
    assert not is_coco(tmp_path / "other.json")
    assert coco_file(tmp_path / "other.json") is None
    assert find_coco(tmp_path, list_folder(tmp_path)[0]) is not None
    (tmp_path / "instances.json").unlink()
    assert find_coco(tmp_path, list_folder(tmp_path)[0]) is None


def broken(change):
    whole = small()
    change(whole)
    return whole


def at(index, **fields):
    return lambda whole: whole["annotations"][index].update(fields)


bomb = {"size": [30, 40], "counts": "0" * 30}
faults = [
    (at(0, image_id=99), r"annotation 70: no image 99"),
    (at(0, category_id=7), r"annotation 70: no category 7"),
    (at(0, image_id=[3]), r"annotation 70: no image \[3\]"),
    (at(0, bbox=[1, 2, float("nan"), 4]), r"annotation 70: bbox is \[1, 2, nan, 4\]"),
    (at(0, bbox=[1, 2, 3]), "annotation 70: bbox is"),
    (at(0, bbox=["x", 2, 3, 4]), "annotation 70: bbox is"),
    (at(3, bbox=None), "annotation 6: bbox is None"),
    (at(0, segmentation=[1, 2, 3, 4, 5, 6]), "annotation 70: segmentation is a flat list"),
    (at(0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "odd number"),
    (at(0, segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "coordinates that are no numbers"),
    (at(0, segmentation="abc"), "segmentation is str"),
    (at(0, keypoints=[1, 2]), "keypoints are not 2 times"),
    (at(1, segmentation={"size": [100000, 100000], "counts": [10**10]}), r"RLE of size \[100000, 100000\] in an image"),
    (at(1, segmentation={"size": [30, 40], "counts": [10, 20]}), "do not add up to the image's 1200 pixels"),
    (at(1, segmentation={"size": [30, 40], "counts": [-10, 1210]}), "do not add up"),
    (at(1, segmentation={"size": [30, 40], "counts": [1200.5]}), "do not add up"),
    (at(1, segmentation={"size": [30, 40], "counts": ["a"]}), "do not add up"),
    (at(1, segmentation=bomb), "do not add up"),
    (at(1, segmentation={"size": [30, 40], "counts": "oooooooooooo1"}), "do not add up"),
    (at(1, segmentation={"size": [30, 40], "counts": "o"}), "do not add up"),
    (at(1, segmentation={"size": [30, 40], "counts": "ké"}), "neither a list nor a string"),
    (lambda whole: whole["images"][0].update(id=3), r"image 3 \(c.png\): the id is there twice|image 3 \(a.png\)"),
    (lambda whole: whole["images"][0].update(file_name="b.png"), "image 17: images/b.png is also image 9"),
    (lambda whole: whole["images"][0].update(file_name="/etc/passwd"), "image 17: /etc/passwd leads out"),
    (lambda whole: whole["images"][0].update(file_name="../images/c.png"), "leads out of the data's folder"),
    (lambda whole: whole["images"][0].update(file_name="C:\\x\\c.png"), "leads out"),
    (lambda whole: whole["images"][0].update(file_name="d.png"), "image 17: there is no image d.png"),
    (lambda whole: whole["images"][0].update(file_name=None), "image 17: it has no file_name"),
    (lambda whole: whole["images"][0].update(width=10**6, height=10**6), "1000000 x 1000000 pixels are more than"),
]


@pytest.mark.parametrize(("change", "message"), faults)
def test_faults_name_the_place_and_can_be_skipped(root, change, message):
    file = save(root, broken(change))
    with pytest.raises(DataError, match=message) as caught:
        read(root)
    assert str(file) in str(caught.value)
    data = read(root, on_error="skip")
    assert any(re.search(message, note) for note in data.notes)
    assert len(data.splits["all"].annotations.boxes) in (2, 3, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole["categories"].append({"id": 2, "name": "pig"}), r"category 2 \(pig\) is there twice"),
        (lambda whole: whole["categories"].append({"id": 3, "name": "cat"}), r"category 3 \(cat\) is there twice"),
        (lambda whole: whole["categories"].append({"name": "pig"}), "needs a whole number as id"),
        (lambda whole: whole.update(categories=[]), "has no categories"),
        (lambda whole: whole.update(annotations={}), "annotations is no list of objects"),
        (lambda whole: whole.update(images=[1]), "images is no list of objects"),
    ],
)
def test_what_cannot_be_skipped(root, change, message):
    save(root, broken(change))
    with pytest.raises(DataError, match=message):
        read(root, on_error="skip")


def test_json_that_is_none(root):
    text = json.dumps(small())
    (root / "instances.json").write_text(text[:-20] + '"categories"', encoding="utf-8")
    with pytest.raises(DataError, match="is no JSON"):
        read(root)
    (root / "instances.json").write_text(text[:-1] + ', "x": ' + "[" * 200_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"instances.json"):
        read(root)


def test_repairs_leave_notes(root):
    whole = small()
    whole["annotations"] += [
        {"id": 201, "image_id": 9, "category_id": 2, "bbox": [20, 20, -5, -6]},  # from the other corner
        {"id": 202, "image_id": 9, "category_id": 2, "bbox": [30, 20, 15, 5]},  # over the right edge
        {"id": 203, "image_id": 9, "category_id": 2, "bbox": [5, 5, 0, 3]},
        {"id": 204, "image_id": 9, "category_id": 2, "bbox": [50, 5, 3, 3]},
        {"id": 204, "image_id": 9, "category_id": 2, "segmentation": [[1, 1, 5, 1, 5, 4], [1, 2, 3, 4]]},
        {"image_id": 9, "category_id": 2, "segmentation": {"size": [30, 40], "counts": [31, 2, 1167]}},
    ]
    save(root, whole)
    data = read(root)
    objects = data.splits["all"].annotations.select(np.array([1]))
    assert objects.boxes.tolist() == [[15, 14, 20, 20], [30, 20, 40, 25], [1, 1, 5, 4], [1, 1, 2, 3]]
    assert objects.area.tolist() == [30, 50, 6, 2]
    notes = "\n".join(data.notes)
    for words in (
        "boxes with exchanged corners, put right: 1 (annotation 201)",
        "boxes over the edge of their image, cut there: 1 (annotation 202)",
        "boxes without extent, left out: 1 (annotation 203)",
        "boxes wholly outside their image, left out: 1 (annotation 204)",
        "annotations without bbox, taken from their outline: 2",
        "polygons of less than three corners, left out: 1",
        "1 annotation ids are missing or there twice",
    ):
        assert words in notes


def test_sizes_that_are_missing_come_from_the_header_upright(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "images/c.jpg", size=(40, 30), exif=exif)
    whole = small()
    whole["images"][0] = {"id": 17, "file_name": "c.jpg"}
    whole["images"][1] |= {"width": 0, "height": None}
    whole["annotations"] = whole["annotations"][3:]
    save(root, whole)
    data = read(root)
    assert data.splits["all"].annotations.sizes.tolist() == [[30, 40], [30, 40], [40, 30]]  # type: ignore[union-attr]
    assert "images without width and height, read from their headers: 2" in data.notes
    (root / "images/c.jpg").write_bytes(b"none")
    with pytest.raises(DataError, match=r"image 17: .*c.jpg: is text"):
        read(root)


def test_images_that_no_json_lists_are_noticed(root):
    whole = small()
    save(root, {**whole, "images": whole["images"][:1], "annotations": []}, "annotations/instances_val.json")
    save(root, {**whole, "images": whole["images"][1:], "annotations": whole["annotations"][1:2]}, "train.json")
    assert read(root).notes == ("val has no labels and is left out (images: 1)",)
    picture(root / "images/d.png")
    note = "images beside those of train.json or instances_val.json that are not listed, left out: 1 (images/d.png)"
    assert note in read(root).notes


def test_names_with_folders_are_found_by_their_last_part_if_only_one_is(root):
    whole = small()
    whole["images"][0]["file_name"] = "upload\\2021\\c.png"
    save(root, whole)
    assert read(root).splits["all"].names.tolist() == ["images/a.png", "images/b.png", "images/c.png"]
    assert any("upload/2021/c.png is images/c.png" in note for note in read(root).notes)
    picture(root / "more/c.png")
    with pytest.raises(DataError, match="not exactly one that is called so"):
        read(root)


def test_nothing_outside_the_root_is_opened(root, tmp_path):
    picture(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "images/../../secret.png"):
        whole = small()
        whole["images"][0] = {"id": 17, "file_name": name}
        save(root, whole)
        data = read(root, on_error="skip")
        assert data.splits["all"].names.tolist() == ["images/a.png", "images/b.png"]
        assert len(data.splits["all"].annotations.boxes) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "extra",
    [
        {"id": 0, "name": "__background__"},
        {"id": 0, "name": "pets", "supercategory": "none"},  # as Roboflow writes it
    ],
)
def test_categories_that_are_no_classes(root, extra):
    whole = small()
    for entry in whole["categories"]:
        entry["supercategory"] = "pets"
    whole["categories"].insert(0, extra)
    save(root, whole)
    data = read(root)
    assert data.classes == ("cat", "dog")
    assert data.splits["all"].annotations.class_ids == (2, 44)  # type: ignore[union-attr]
    assert any("has no objects and is no class" in note for note in data.notes)
    whole["annotations"][0]["category_id"] = 0
    save(root, whole)
    assert read(root).classes == (extra["name"], "cat", "dog")


def test_splits_agree_by_name_whatever_their_ids(root):
    train, val = small(), copy.deepcopy(small())
    val["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}]
    for annotation in val["annotations"]:
        annotation["category_id"] = {44: 1, 2: 2}[annotation["category_id"]]
        annotation.pop("keypoints", None)
    save(root, train, "annotations/instances_train.json")
    save(root, val, "annotations/instances_val.json")
    data = read(root)
    assert data.classes == ("cat", "dog")
    train_labels, val_labels = (data.splits[name].annotations.labels.tolist() for name in ("train", "val"))
    assert train_labels == val_labels == [0, 1, 1, 0]
    val["annotations"][0]["category_id"] = 3
    save(root, val, "annotations/instances_val.json")
    with pytest.raises(DataError, match=r"category 3 \(cow\) is none of instances_train.json"):
        read(root)


def test_compressed_runs_are_the_references():
    rng = np.random.default_rng(0)
    masks = [rng.random((37, 53)) < share for share in (0, 0.02, 0.5, 0.98, 1)]
    masks += [np.zeros((300, 400), bool) for _ in range(2)]
    masks[-1][100:200, 150:390] = True
    encoded = [reference.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    texts = [one["counts"] if isinstance(one["counts"], bytes) else one["counts"].encode() for one in encoded]
    first, counts, sound = decode_runs([*texts, b"", b"\xff0", b"o", b"oooooooo0"])
    assert sound.tolist() == [True] * len(masks) + [False] * 4
    for index, mask in enumerate(masks):
        runs = counts[first[index] : first[index + 1]]
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        assert np.array_equal(values.reshape(mask.shape[::-1]).T, mask)
    assert decode_runs([])[0].tolist() == [0]


def unpacked(tmp_path, name):
    with zipfile.ZipFile(shared / name) as archive:
        archive.extractall(tmp_path)
    return next(tmp_path.iterdir())


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "images", "objects", "classes"),
    [
        ("seg/fruit-nuts-18.zip", {"all": 18}, {"all": 165}, ("date", "fig", "hazelnut")),
        (
            "seg/nuclei-dsb2018-200.zip",
            {"train": 120, "val": 30, "test": 50},
            {"train": 3580, "val": 828, "test": 1470},
            ("nucleus",),
        ),
    ],
)
def test_real_data_there_and_back(tmp_path, name, images, objects, classes):
    root = unpacked(tmp_path / "in", name)
    data = read(root)
    assert data.classes == classes
    assert {split: len(one) for split, one in data.splits.items()} == images
    assert {split: len(one.annotations.boxes) for split, one in data.splits.items()} == objects
    for split in data.splits.values():
        objects_there = split.annotations
        for index in (0, len(split) - 1):
            masks, rows = objects_there.masks(index), objects_there.rows(index)
            areas = masks.sum((1, 2))
            assert np.allclose(areas, objects_there.area[rows], rtol=0.12, atol=25)
    write_coco(data, tmp_path / "out")
    again = read(tmp_path / "out")
    for split, one in data.splits.items():
        assert again.splits[split].names.tolist() == one.names.tolist()
        assert again.splits[split].annotations.digest() == one.annotations.digest()


@pytest.mark.data
@needs_data
def test_nuclei_masks_are_those_of_the_png(tmp_path):
    root = unpacked(tmp_path, "seg/nuclei-dsb2018-200.zip")
    split = read(root).splits["val"]
    for index in range(5):
        ids = np.asarray(Image.open(root / str(split.names[index]).replace("images", "masks")))
        masks = split.annotations.masks(index)
        assert len(masks) == len(np.unique(ids)) - 1
        assert np.array_equal(masks.any(0), ids > 0)
        assert all(len(np.unique(ids[mask])) == 1 for mask in masks)
