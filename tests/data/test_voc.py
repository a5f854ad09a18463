import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vertebra.data.coco import find_coco, read_coco, write_coco
from vertebra.data.folders import list_folder
from vertebra.data.voc import find_voc, read_voc, write_voc
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not shared.is_dir(), reason="the shared test data is not here")


def read(root, **options):
    top, notes = list_folder(root)
    files = find_voc(root, top)
    assert files is not None
    return read_voc(str(root), root, files, notes=notes, **options)


def picture(file, size=(40, 30), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(file, **options)


def thing(name, corners, **more):
    box = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    rest = "".join(f"<{key}>{value}</{key}>" for key, value in more.items())
    return f"<object><name>{name}</name>{rest}<bndbox>{box}</bndbox></object>"


def xml(file, *things, name="", size=(40, 30), head=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    file.write_text(f"{head}<annotation><filename>{name}</filename>{sides}{''.join(things)}</annotation>", "utf-8")


@pytest.fixture
def root(tmp_path):
    """Two images to train on and one to validate, nothing wrong with them."""
    root = tmp_path / "data"
    for name in "abc":
        picture(root / f"JPEGImages/{name}.png")
    xml(
        root / "Annotations/a.xml",
        thing("dog", (1, 1, 40, 30)),
        thing("cat", (3, 4, 10, 20), difficult=1),
        name="a.png",
    )
    xml(root / "Annotations/b.xml", name="b.png")
    xml(root / "Annotations/c.xml", thing("cat", (2, 2, 5, 9), truncated=1), name="c.png")
    lists = root / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\n")
    (lists / "val.txt").write_text("c\n\n")
    (lists / "trainval.txt").write_text("a\nb\nc\n")
    (lists / "cat_train.txt").write_text("a  1\nb -1\n")
    return root


def test_pixels_are_counted_from_one(root):
    data = read(root)
    assert (data.layout, data.label, data.classes, data.notes) == ("voc", "multi", ("cat", "dog"), ())
    train = data.splits["train"]
    assert train.names.tolist() == ["JPEGImages/b.png", "JPEGImages/a.png"]  # in the order of the list
    assert train.targets is not None
    assert train.targets.tolist() == [[0, 0], [1, 1]]
    objects = train.annotations
    assert objects.first.tolist() == [0, 0, 2]
    assert objects.boxes.tolist() == [[0, 0, 40, 30], [2, 3, 10, 20]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.difficult.tolist() == [False, True]
    assert objects.area.tolist() == [1200, 136]
    assert objects.sizes.tolist() == [[30, 40], [30, 40]]
    assert data.splits["val"].annotations.boxes.tolist() == [[1, 1, 5, 9]]


def test_write_and_read_again(root, tmp_path):
    first = read(root)
    write_voc(first, tmp_path / "out")
    again = read(tmp_path / "out")
    assert again.classes == first.classes
    for name, split in first.splits.items():
        assert again.splits[name].names.tolist() == split.names.tolist()
        assert again.splits[name].annotations.digest() == split.annotations.digest()
    assert again.fingerprint == first.fingerprint
    with pytest.raises(UsageError, match="is not empty"):
        write_voc(first, tmp_path / "out")


def test_from_coco_and_back(tmp_path):
    rng = np.random.default_rng(0)
    low = rng.integers(0, [30, 20], (40, 2))
    boxes = np.concatenate([low, rng.integers(2, 11, (40, 2))], 1).tolist()
    whole = {
        "images": [
            {"id": n, "file_name": f"{folder}/{n % 2}.png", "width": 40, "height": 30}
            for n, folder in enumerate(("x", "x", "y", "y"))
        ],
        "annotations": [
            {"id": n, "image_id": n % 3, "category_id": 1 + n % 2, "bbox": box, "iscrowd": int(n == 7)}
            for n, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "a thing"}, {"id": 2, "name": "b & <c>"}],
    }
    for image in whole["images"]:
        picture(tmp_path / "in" / image["file_name"])
    (tmp_path / "in/instances.json").write_text(json.dumps(whole))

    def coco(root):
        plan = find_coco(root, list_folder(root)[0])
        assert plan is not None
        return read_coco(str(root), root, plan)

    first = coco(tmp_path / "in")
    write_voc(first, tmp_path / "voc")
    between = read(tmp_path / "voc")
    write_coco(between, tmp_path / "out")
    again = coco(tmp_path / "out")
    one, other = first.splits["all"], again.splits["all"]
    assert [name.replace("/", "-") for name in one.names] == [name.rpartition("/")[2] for name in other.names]
    assert again.classes == first.classes
    for column in ("first", "sizes", "boxes", "labels", "area"):
        assert getattr(one.annotations, column).tolist() == getattr(other.annotations, column).tolist()
    assert other.annotations.difficult.tolist() == one.annotations.crowd.tolist()
    assert one.annotations.crowd.sum() == 1


@pytest.mark.parametrize("folders", [("",), ("train/", "valid/")])
def test_xml_beside_the_images(tmp_path, folders):
    for folder in folders:
        for name in "ab":
            picture(tmp_path / folder / f"{name}.jpg")
            xml(tmp_path / folder / f"{name}.xml", thing("dog", (1, 2, 3, 4)))
    data = read(tmp_path)
    assert list(data.splits) == (["train", "val"] if len(folders) == 2 else ["all"])
    split = next(iter(data.splits.values()))
    assert split.names.tolist() == [f"{folders[0]}a.jpg", f"{folders[0]}b.jpg"]
    assert split.annotations.boxes.tolist() == [[0, 1, 3, 4]] * 2


def test_one_level_down_and_only_one(root):
    assert read(root.parent).splits["val"].names.tolist() == ["data/JPEGImages/c.png"]
    picture(root.parent / "more/JPEGImages/a.png")
    xml(root.parent / "more/Annotations/a.xml")
    with pytest.raises(DataError, match="several VOC data sets: data/, more/"):
        read(root.parent)


def test_what_is_no_voc(tmp_path):
    picture(tmp_path / "a.png")
    assert find_voc(tmp_path, list_folder(tmp_path)[0]) is None
    (tmp_path / "a.xml").write_text("<urlset></urlset>")
    assert find_voc(tmp_path, list_folder(tmp_path)[0]) is None
    (tmp_path / "pom.xml").write_text("<annotation></annotation>")
    (tmp_path / "a.xml").unlink()
    assert find_voc(tmp_path, list_folder(tmp_path)[0]) is None


laughs = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
outside = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
faults = [
    ({"head": laughs}, (thing("&b;", (1, 2, 3, 4)),), "declares entities"),
    ({"head": outside}, (thing("&a;", (1, 2, 3, 4)),), "declares entities"),
    ({}, ("<object>",), "no xml: mismatched tag: line 1, column"),
    ({}, (thing("", (1, 2, 3, 4)),), "object 1 has no name"),
    ({}, ("<object><name>dog</name></object>",), r"object 1 \(dog\) has no bndbox"),
    ({}, ("<object><name>dog</name><robndbox/></object>",), "rotated boxes"),
    (
        {},
        (thing("cat", (1, 2, 3, 4)), thing("dog", (1, "x", 3, 4))),
        r"object 2 \(dog\): its corners are .*'ymin': 'x'",
    ),
    ({}, (thing("dog", (1, "nan", 3, 4)),), "not four numbers"),
    ({"size": (10**6, 10**6)}, (thing("dog", (1, 2, 3, 4)),), "more than is allowed"),
]


@pytest.mark.parametrize(("options", "things", "message"), faults)
def test_faults_name_the_file_and_can_be_skipped(root, options, things, message):
    xml(root / "Annotations/a.xml", *things, **options)
    with pytest.raises(DataError, match=rf"Annotations/a.xml: .*{message}"):
        read(root)
    data = read(root, on_error="skip")
    assert data.splits["val"].names.tolist() == ["JPEGImages/c.png"]
    assert any("Annotations/a.xml" in note for note in data.notes)


def test_lists_name_their_lines(root):
    file = root / "ImageSets/Main/train.txt"
    file.write_text("a\nb\nzebra\na\n")
    with pytest.raises(DataError, match=r"train.txt, line 3: there is no xml for zebra; .*line 4: a is listed again"):
        read(root)
    assert read(root, on_error="skip").splits["train"].names.tolist() == ["JPEGImages/a.png", "JPEGImages/b.png"]
    file.write_text("a.png\n")
    assert "xml that no list of a split names, left out: 1 (b)" in read(root).notes


def test_trainval_is_train_where_there_is_no_train(root):
    (root / "ImageSets/Main/train.txt").unlink()
    (root / "ImageSets/Main/val.txt").unlink()
    assert read(root).splits["train"].names.tolist() == [f"JPEGImages/{name}.png" for name in "abc"]


def test_names_that_disagree(root):
    xml(root / "Annotations/a.xml", thing("dog", (1, 2, 3, 4)), name="b.png")  # the file's own name counts
    assert read(root).splits["train"].names.tolist() == ["JPEGImages/b.png", "JPEGImages/a.png"]
    (root / "JPEGImages/a.png").rename(root / "JPEGImages/other.png")
    xml(root / "Annotations/a.xml", thing("dog", (1, 2, 3, 4)), name="C:\\photos\\other.png")
    data = read(root)
    assert data.splits["train"].names.tolist() == ["JPEGImages/b.png", "JPEGImages/other.png"]
    assert any("Annotations/a.xml is about JPEGImages/other.png" in note for note in data.notes)
    xml(root / "Annotations/a.xml", name="../../secret.png")
    with pytest.raises(DataError, match=r"there is no image of that name, and none called secret.png"):
        read(root)


def test_repairs_leave_notes(root):
    xml(
        root / "Annotations/a.xml",
        thing("dog", (10, 20, 5, 8)),
        thing("dog", (30.5, 1.25, 45.5, 9.75)),
        thing("dog", (7, 3, 7, 9)),
        thing("dog", (60, 3, 70, 9)),
    )
    picture(root / "JPEGImages/d.png")
    data = read(root)
    assert data.splits["train"].annotations.boxes.tolist() == [[4, 7, 10, 20], [29.5, 0.25, 40, 9.75]]
    assert data.notes == (
        "images without xml, left out: 1 (JPEGImages/d.png)",
        "val has a class 'cat' that train lacks",
        "boxes with exchanged corners, put right: 1 (Annotations/a.xml)",
        "boxes over the edge of their image, cut there: 1 (Annotations/a.xml)",
        "boxes without extent, left out: 1 (Annotations/a.xml)",
        "boxes wholly outside their image, left out: 1 (Annotations/a.xml)",
    )


def test_sizes_that_are_missing_come_from_the_header_upright(root):
    exif = Image.Exif()
    exif[0x0112] = 8
    (root / "JPEGImages/a.png").unlink()
    picture(root / "JPEGImages/a.jpg", exif=exif)
    xml(root / "Annotations/a.xml", thing("dog", (1, 1, 30, 40)), size=None)
    xml(root / "Annotations/b.xml", size=(0, 0))
    data = read(root)
    assert data.splits["train"].annotations.sizes.tolist() == [[30, 40], [40, 30]]
    assert data.splits["train"].annotations.boxes.tolist() == [[0, 0, 30, 40]]
    (root / "JPEGImages/b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b.png: is empty"):
        read(root)


def test_a_class_that_train_lacks_is_noticed(root):
    xml(root / "Annotations/c.xml", thing("dogg", (1, 2, 3, 4)))
    data = read(root)
    assert data.classes == ("cat", "dog", "dogg")
    assert "val has a class 'dogg' that train lacks; did you mean dog?" in data.notes


def test_thin_boxes_survive_writing(root, tmp_path):
    split = read(root).splits["train"]
    split.annotations.boxes[:] = [[39.2, 0, 39.9, 30], [3.4, 4.4, 3.6, 9]]
    write_voc(read(root), tmp_path / "plain")
    data = read(root)
    data.splits["train"].annotations.boxes[:] = split.annotations.boxes
    write_voc(data, tmp_path / "out")
    assert read(tmp_path / "out").splits["train"].annotations.boxes.tolist() == [[38, 0, 40, 30], [3, 4, 5, 9]]


def unpacked(tmp_path, name):
    with zipfile.ZipFile(shared / name) as archive:
        archive.extractall(tmp_path)
    return next(tmp_path.iterdir())


@pytest.mark.data
@needs_data
def test_blood_cells(tmp_path):
    root = unpacked(tmp_path / "in", "det/bccd-voc.zip")
    data = read(root)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert data.classes == ("Platelets", "RBC", "WBC")
    counts = sum(np.bincount(split.annotations.labels, minlength=3) for split in data.splits.values())
    assert counts.tolist() == [361, 4155 - 2, 372]
    assert [note for note in data.notes if "without extent" not in note] == []
    write_voc(data, tmp_path / "out")
    again = read(tmp_path / "out")
    for name, split in data.splits.items():
        assert again.splits[name].names.tolist() == split.names.tolist()
        assert again.splits[name].annotations.digest() == split.annotations.digest()


@pytest.mark.data
@needs_data
def test_voc_and_its_json_agree_but_for_the_first_pixel(tmp_path):
    root = unpacked(tmp_path, "det/voc2012-100.zip")
    data = read(root)
    top, _ = list_folder(root)
    plan = find_coco(root, top)
    assert plan is not None
    whole = read_coco(str(root), root, plan).splits["all"]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 60, "val": 40}
    position = {name: index for index, name in enumerate(whole.names)}
    total = hard = 0
    for split in data.splits.values():
        other = whole.annotations.select(np.array([position[name] for name in split.names]))
        assert (split.annotations.boxes + np.array([1, 1, 0, 0])).tolist() == other.boxes.tolist()
        assert split.annotations.labels.tolist() == other.labels.tolist()
        total, hard = total + len(other.boxes), hard + int(split.annotations.difficult.sum())
    assert (total, hard) == (273, 38)
