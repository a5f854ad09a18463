import json

import numpy as np
import pytest
from PIL import Image

from vertebra.data.coco import find_coco, read_coco
from vertebra.data.folders import list_folder
from vertebra.data.yolo import find_yolo, read_yolo, write_yolo, yolo_file
from vertebra.errors import DataError, UsageError


def read(root, **options):
    top, notes = list_folder(root)
    files = find_yolo(root, top)
    assert files is not None
    return read_yolo(str(root), root, files, notes=notes, **options)


def picture(file, size=(40, 30), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(file, **options)


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


NESTINGS = [
    ("images/train", "labels/train"),
    ("train/images", "train/labels"),
    ("images/train/sub", "labels/train/sub"),
]


def make(root, images="images/train", labels="labels/train", yaml="names: [cat, dog]\n"):
    """Two images to train on, one of them empty, and one to validate."""
    for name in ("train", "val"):
        for stem in ("a", "b") if name == "train" else ("c",):
            picture(root / images.replace("train", name) / f"{stem}.png")
    write(root / labels / "a.txt", "1 0.5 0.5 1 1\n\n0 .25 0.5 0.1 0.2\n")
    write(root / labels / "b.txt", "")
    write(root / labels.replace("train", "val") / "c.txt", "0 0.5 0.5 0.5 0.5\n")
    write(root / "data.yaml", f"train: {images}\nval: {images.replace('train', 'val')}\n{yaml}")


@pytest.fixture
def root(tmp_path):
    make(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(("images", "labels"), NESTINGS)
def test_shares_become_pixels_in_every_nesting(tmp_path, images, labels):
    make(tmp_path, images, labels)
    data = read(tmp_path)
    assert (data.layout, data.label, data.classes, data.notes) == ("yolo", "multi", ("cat", "dog"), ())
    train = data.splits["train"]
    assert train.names.tolist() == [f"{images}/a.png", f"{images}/b.png"]
    assert train.targets is not None
    assert train.targets.tolist() == [[1, 1], [0, 0]]
    objects = train.annotations
    assert np.allclose(objects.boxes, [[0, 0, 40, 30], [8, 12, 12, 18]], atol=1e-12)
    assert objects.labels.tolist() == [1, 0]
    assert np.allclose(objects.area, [1200, 24])
    assert objects.outlines is None
    assert data.splits["val"].annotations.boxes.tolist() == [[10, 7.5, 30, 22.5]]


@pytest.mark.parametrize(
    "yaml",
    [
        "names: {0: cat, 1: dog}\nnc: 2\n",
        "path: .\nnames:\n  - cat\n  - dog\n",
        "path: ../data\nnames: [cat, dog]\n",
        "path: ../datasets/coco8\nnames: [cat, dog]\n",
        "path: /home/me/data\nnames: {'0': cat, '1': dog}\ntest:\nkpt_shape: null\n",
    ],
)
def test_yaml_in_its_forms(root, yaml):
    make(root, yaml=yaml)
    data = read(root)
    assert data.classes == ("cat", "dog")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 2, "val": 1}
    assert len(data.notes) == (2 if "coco8" in yaml or "/home" in yaml else 0)


def test_paths_of_the_yaml_are_below_it(root, tmp_path):
    names = "names: [cat, dog]\n"
    write(root / "data.yaml", f"train: ../images/train\n{names}")  # as Roboflow writes it
    assert len(read(root).splits["train"]) == 2
    assert "data.yaml: ../images/train is read as images/train" in read(root).notes
    write(root / "data.yaml", f"train: [images/train, images/val]\n{names}")
    assert len(read(root).splits["train"]) == 3
    write(root / "data.yaml", f"train: {root}/images/train\n{names}")
    assert len(read(root).splits["train"]) == 2
    write(root / "data.yaml", f"train: lists/train.txt\n{names}")
    write(root / "lists/train.txt", "./images/train/b.png\n../images/val/c.png\nimages/train/a.png\n")
    assert [name[-5:] for name in read(root).splits["train"].names] == ["b.png", "c.png", "a.png"]
    write(root / "lists/train.txt", "images/train/b.png\nimages/train/zebra.png\n")
    with pytest.raises(DataError, match=r"train.txt, line 2: there is no image images/train/zebra.png"):
        read(root)
    assert len(read(root, on_error="skip").splits["train"]) == 1
    picture(tmp_path / "secret/a.png")
    for outside in ("../secret", str(tmp_path / "secret"), "images/../../secret"):
        write(root / "data.yaml", f"train: {outside}\n{names}")
        with pytest.raises(DataError, match=r"no images in .*; tried .*secret"):
            read(root)


def test_polygons_and_oriented_boxes(root):
    write(root / "labels/train/a.txt", "0 0.1 0.1 0.5 0.1 0.5 0.9\n1 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5\n1 0.5 0.5 1 1\n")
    objects = read(root).splits["train"].annotations
    assert objects.names == ("boxes", "labels", "crowd", "difficult", "area", "masks")
    assert np.allclose(objects.boxes, [[4, 3, 20, 27], [4, 3, 36, 27], [0, 0, 40, 30]])
    assert np.allclose(objects.area, [16 * 24 / 2, 32 * 24 / 2, 1200])
    assert np.allclose(objects.outlines.polygons(1)[0], [[20, 3], [36, 15], [20, 27], [4, 15]])
    assert objects.outlines.polygons(2) == []
    assert abs(objects.masks(0)[1].sum() - 384) < 40


@pytest.mark.parametrize("names", ["[cat, dog]", "{3: cat, 7: dog}"])
def test_write_and_read_again(tmp_path, names):
    rng = np.random.default_rng(0)
    make(tmp_path / "in", yaml=f"names: {names}\n")
    numbers = (0, 1) if names[0] == "[" else (3, 7)
    lines = []
    for number in range(200):
        low, high = np.sort(rng.random((2, 2)), axis=0)
        centre, size = (low + high) / 2, high - low
        shares = [*centre, *size] if number % 3 else rng.random(2 * rng.integers(3, 9))
        lines.append(f"{numbers[number % 2]} {' '.join(map(str, shares))}\n")
    for name in ("train/a", "val/c"):
        write(tmp_path / f"in/labels/{name}.txt", "".join(lines))
    write(tmp_path / "in/labels/train/b.txt", "")
    first = read(tmp_path / "in")
    write_yolo(first, tmp_path / "out")
    again = read(tmp_path / "out")
    assert again.classes == first.classes
    assert again.notes == ()
    for name, split in first.splits.items():
        one, other = split.annotations, again.splits[name].annotations
        assert again.splits[name].names.tolist() == split.names.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.first.tolist() == other.first.tolist()
        assert np.abs(one.boxes - other.boxes).max() < 1e-6
        assert np.abs(one.outlines.points - other.outlines.points).max() < 1e-6
        assert one.outlines.corners.tolist() == other.outlines.corners.tolist()
        assert np.allclose(one.area, other.area, atol=1e-6)
    assert again.splits["train"].annotations.class_ids == (0, 1)
    write_yolo(again, tmp_path / "more")
    assert read(tmp_path / "more").classes == first.classes
    with pytest.raises(UsageError, match="is not empty"):
        write_yolo(first, tmp_path / "out")


def test_parts_runs_and_crowds_of_coco(tmp_path):
    square = [[2, 2, 12, 2, 12, 12, 2, 12], [20, 10, 30, 10, 30, 20, 20, 20]]
    runs = {"size": [30, 40], "counts": [30 * 5 + 3, 4, 30 * 35 - 7]}
    whole = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "bbox": [2, 2, 28, 18], "segmentation": square},
            {"id": 2, "image_id": 1, "category_id": 5, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 3, "image_id": 1, "category_id": 9, "bbox": [5, 3, 1, 4], "segmentation": runs},
        ],
        "categories": [{"id": 5, "name": "yes"}, {"id": 9, "name": "7"}],
    }
    picture(tmp_path / "in/a.png")
    write(tmp_path / "in/instances.json", json.dumps(whole))
    plan = find_coco(tmp_path / "in", list_folder(tmp_path / "in")[0])
    assert plan is not None
    first = read_coco("in", tmp_path / "in", plan)
    write_yolo(first, tmp_path / "out")
    again = read(tmp_path / "out")
    one, other = first.splits["all"].annotations, again.splits["train"].annotations
    assert again.classes == ("yes", "7")
    assert again.splits["train"].names.tolist() == ["images/all/a.png"]
    assert other.labels.tolist() == [0, 1]
    assert np.allclose(other.boxes, [[2, 2, 30, 20], [5, 3, 6, 7]])
    assert np.array_equal(other.masks(0)[0], one.masks(0)[0])  # the way between the parts covers nothing
    assert np.isclose(other.area[0], 200)


faults = [
    ("0 0.5 0.5 0.5", "line 2: 4 columns, not 5"),
    ("0 0.5 0.5 0.5 0.5 0.9", "line 2: 6 columns, .*; a score or an angle is not read"),
    ("0 0.5 0.5 0.5 0.5 0.9 0.1 0.2", "line 2: 8 columns"),
    ("0", "line 2: 1 columns"),
    ("2 0.5 0.5 0.5 0.5", r"line 2: class '2' is not among names \(0 to 1\)"),
    ("-1 0.5 0.5 0.5 0.5", "line 2: class '-1'"),
    ("cat 0.5 0.5 0.5 0.5", "line 2: class 'cat'"),
    ("0.5 0.5 0.5 0.5 0.5", "line 2: class '0.5'"),
    ("0 320 0.5 0.5 0.5", "line 2: 320 is no share"),
    ("0 0.5 x 0.5 0.5", "line 2: x is no share"),
    ("0 0.5 nan 0.5 0.5", "line 2: nan is no share"),
    ("0 0.1 0.1 0.2 0.2 0.3 99", "line 2: 99 is no share"),
]


@pytest.mark.parametrize(("line", "message"), faults)
def test_faults_name_file_and_line_and_can_be_skipped(root, line, message):
    write(root / "labels/train/a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(DataError, match=f"labels/train/a.txt, {message}"):
        read(root)
    data = read(root, on_error="skip")
    assert len(data.splits["train"].annotations.boxes) == 1
    assert any("labels/train/a.txt, line 2" in note for note in data.notes)


def test_repairs_and_missing_files_leave_notes(root):
    write(root / "labels/train/a.txt", "0 0.9 0.5 0.4 0.5\n0 0.5 0.5 0 0.5\n0 0.5 0.5 -0.5 0.5\n0 1.5 0.5 0.1 0.1\n")
    (root / "labels/train/b.txt").unlink()
    write(root / "labels/val/zebra.txt", "")
    data = read(root)
    assert np.allclose(data.splits["train"].annotations.boxes, [[28, 7.5, 40, 22.5], [10, 7.5, 30, 22.5]])
    assert data.notes == (
        "label files without an image, left out: 1 (labels/val/zebra.txt)",
        "images without a label file, taken to show none of the classes: 1 (images/train/b.png)",
        "boxes with exchanged corners, put right: 1 (labels/train/a.txt, line 3)",
        "boxes over the edge of their image, cut there: 1 (labels/train/a.txt, line 1)",
        "boxes without extent, left out: 1 (labels/train/a.txt, line 2)",
        "boxes wholly outside their image, left out: 1 (labels/train/a.txt, line 4)",
    )


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat, cat]\n", "two classes are called 'cat'"),
        ("names: [yes, no]\n", "class 0 is read as True; put it in quotes"),
        ("names: [cat, dog]\nnc: 3\n", "nc is 3, and names has 2"),
        ("names: {a: cat}\n", "names has the key 'a'"),
        ("names: []\n", "names is"),
        ("names: 2\n", "names is 2"),
        ("names: [cat\n", "is no yaml"),
        ("names: !!python/object/apply:os.system [ls]\n", "is no yaml"),
        ("names: [cat, dog]\nkpt_shape: [17, 3]\n", "keypoints"),
        ("names: [cat, dog]\nvalid: images/val\n", "valid is the split val again"),
    ],
)
def test_yaml_that_cannot_be_used(root, yaml, message):
    make(root, yaml=yaml)
    with pytest.raises(DataError, match=message):
        read(root)


def test_without_yaml_the_folders_tell(root):
    (root / "data.yaml").unlink()
    with pytest.raises(DataError, match="labels but no class names"):
        read(root)
    write(root / "labels/train/classes.txt", "cat\ndog\n")
    data = read(root)
    assert data.classes == ("cat", "dog")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 2, "val": 1}
    assert data.notes == ()


def test_one_yaml_by_its_path(root):
    write(root / "other.yaml", "train: images/val\nnames: [pig, cow]\n")
    found = yolo_file(root / "other.yaml")
    assert found is not None
    data = read_yolo(str(root / "other.yaml"), *found)
    assert data.classes == ("pig", "cow")
    assert len(data.splits["train"]) == 1
    write(root / "none.yaml", "a: 1\n")
    assert yolo_file(root / "none.yaml") is yolo_file(root / "images/val/c.png") is None


def test_what_is_no_yolo(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "data.yaml", "name: x\nversion: 2\n")
    write(tmp_path / "notes.txt", "0 1 2 3 4\n")
    assert find_yolo(tmp_path, list_folder(tmp_path)[0]) is None
    write(tmp_path / "one.yaml", "names: [a]\ntrain: .\n")
    write(tmp_path / "two.yaml", "names: [a]\ntrain: .\n")
    with pytest.raises(DataError, match=r"several yaml files with names: one.yaml, two.yaml"):
        find_yolo(tmp_path, list_folder(tmp_path)[0])


def test_sizes_are_of_the_image_as_shown_and_must_be_readable(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images/train/a.png").unlink()
    picture(root / "images/train/a.jpg", exif=exif)
    write(root / "labels/train/a.txt", "0 0.5 0.5 1 1\n")
    objects = read(root).splits["train"].annotations
    assert objects.sizes.tolist() == [[40, 30], [30, 40]]
    assert objects.boxes.tolist() == [[0, 0, 30, 40]]
    (root / "images/train/a.jpg").write_bytes(b"")
    write(root / "labels/train/b.txt", "0 0.5 0.5 1 1\n")
    with pytest.raises(DataError, match=r"a.jpg: is empty"):
        read(root)
    assert read(root, on_error="skip").splits["train"].names.tolist() == ["images/train/b.png"]
