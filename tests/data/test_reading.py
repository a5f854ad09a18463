import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vertebra.data import read
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def draw(file, shade=0, size=(12, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).save(file)


@pytest.mark.parametrize("name", ["annotations/instances_val.json", "panoptic_val.json"])
def test_broken_annotations_are_not_passed_over(tmp_path, name):
    draw(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=f"{Path(name).name} is called as annotations are"):
        read(tmp_path)
    assert len(read(tmp_path, layout="flat").splits["all"]) == 1


def test_two_layouts_at_once_ask(tmp_path):
    draw(tmp_path / "JPEGImages/a.png")
    draw(tmp_path / "SegmentationClass/a.png", 1)
    (tmp_path / "Annotations").mkdir()
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    (tmp_path / "Annotations/a.xml").write_text(
        f"<annotation><filename>a.png</filename><object><name>cat</name>{box}</object></annotation>"
    )
    with pytest.raises(DataError, match=r"can be read as voc and as masks; say which: layout='voc'"):
        read(tmp_path)
    assert read(tmp_path, layout="voc").classes == ("cat",)
    assert read(tmp_path, layout="masks").layout == "masks"


def test_sprites_are_built_in():
    data = read("sprites")
    assert data.layout == "sprites" and data.label == "single" and len(data.split("train")) == 1200
    assert "boxes" in data.split("val").target(0)


def test_a_scale_is_chosen_by_name(tmp_path):
    draw(tmp_path / "HR/a.png", size=(24, 16))
    draw(tmp_path / "LR_bicubic_x2/a.png", size=(12, 8))
    draw(tmp_path / "LR_bicubic_x4/a.png", size=(6, 4))
    assert read(tmp_path, degraded="x4").splits["all"].image(0).size == (6, 4)
    draw(tmp_path / "flat/a.png")
    with pytest.raises(UsageError, match="degraded= means nothing"):
        read(tmp_path / "flat", degraded="x4")


def test_nothing_recognised_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"looked for class folders .*; found no folders; files notes.txt"):
        read(tmp_path)


def test_a_wrong_path_names_the_nearest(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match=r"there is nothing of that name; did you mean flowers"):
        read(tmp_path / "flower")


def test_files_that_are_no_dataset(tmp_path):
    draw(tmp_path / "one.png")
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "a.docx").write_bytes(b"PK")
    for name, message in {"one.png": "one image", "a.zip": "unpack it", "a.docx": "a kind that is not read"}.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_options_are_checked(tmp_path):
    draw(tmp_path / "cat/a.png")
    draw(tmp_path / "dog/a.png")
    with pytest.raises(UsageError, match=r"no layout is called 'imagefolders'; did you mean imagefolder"):
        read(tmp_path, layout="imagefolders")
    with pytest.raises(UsageError, match=r"on_error is 'ignore'"):
        read(tmp_path, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"read as imagefolder, where images= and labels= mean nothing"):
        read(tmp_path, labels="species")
    with pytest.raises(DataError, match=r"has no files of the layout webdataset"):
        read(tmp_path, layout="webdataset")


def test_digits_are_built_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = read("digits")
    assert (dataset.layout, dataset.label, len(dataset.classes)) == ("digits", "single", 10)
    assert [len(split) for split in dataset.splits.values()] == [1078, 269, 450]
    draw(tmp_path / "digits/one/a.png")
    draw(tmp_path / "digits/two/a.png")
    assert read("digits").classes == ("one", "two")
    assert read("digits", layout="digits").layout == "digits"


def test_a_table_beside_class_folders_is_a_question(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        draw(tmp_path / name)
    table = tmp_path / "labels.csv"
    table.write_text("file,label\ncat/a.png,big\ndog/b.png,small\n")
    with pytest.raises(
        DataError, match=r"has labels.csv and also images in the usual places \(cat, dog\); give .*labels.csv"
    ):
        read(tmp_path)
    assert read(tmp_path, layout="imagefolder").classes == ("cat", "dog")
    assert read(tmp_path, layout="table").classes == read(table).classes == ("big", "small")


@pytest.mark.parametrize("name", ["cat/a.png", "a.png"])
def test_an_archive_left_beside_what_came_out_of_it_is_a_question(tmp_path, name):
    draw(tmp_path / name)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / name, name)
    with pytest.raises(DataError, match=r"has all.tar and also images"):
        read(tmp_path)
    (note,) = read(tmp_path / "all.tar").notes
    assert ("if its folders are classes, unpack it" in note) == ("/" in name)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, vertebra.data, vertebra.data.checking, vertebra.cli.check; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == "False"


@pytest.mark.data
def test_a_real_imagefolder(tmp_path):
    archive = shared / "cls" / "clothing10-112.zip"
    if not archive.exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path, [name for name in packed.namelist() if "/val/" in name or "/test/hat" in name])
    dataset = read(tmp_path / "clothing10")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"val": 341, "test": 12}
    assert len(dataset.classes) == 10
    image = dataset.splits["val"].image(0)
    assert (image.mode, min(image.size)) == ("RGB", 112)
    assert np.asarray(dataset.splits["test"].targets).tolist() == [1] * 12
