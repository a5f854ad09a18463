import os
import pickle

import numpy as np
import pytest
from PIL import Image

from vertebra.data import read
from vertebra.errors import DataError


def draw(file, shade=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (12, 8), shade).save(file)


def tree(root, names):
    for shade, name in enumerate(names):
        draw(root / name, shade)


def sizes(dataset):
    return {name: len(split) for name, split in dataset.splits.items()}


def test_class_folders(tmp_path):
    tree(tmp_path, ["dog/b.png", "cat/z.PNG", "cat/a.png", "dog/sub/deeper/c.png"])
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, dataset.classes) == ("imagefolder", "single", ("cat", "dog"))
    split = dataset.splits["all"]
    assert split.names.tolist() == ["cat/a.png", "cat/z.PNG", "dog/b.png", "dog/sub/deeper/c.png"]
    assert split.names.dtype.kind == "U"
    assert split.targets is not None
    assert split.targets.tolist() == [0, 0, 1, 1]
    assert split.targets.dtype == np.int64
    assert [split.image(i).getpixel((0, 0)) for i in range(4)] == [2, 1, 0, 3]


def test_splits_under_any_of_their_names(tmp_path):
    tree(tmp_path, ["Training/cat/a.png", "Training/dog/b.png", "valid/cat/c.png", "TEST/dog/d.png"])
    dataset = read(tmp_path)
    assert sizes(dataset) == {"train": 1 + 1, "val": 1, "test": 1}
    assert list(dataset.splits) == ["train", "val", "test"]
    assert dataset.splits["test"].targets.tolist() == [1]
    assert "the folder valid is read as the split 'val'" in dataset.notes
    assert "val has no images of dog" in dataset.notes


def test_two_folders_for_one_split(tmp_path):
    tree(tmp_path, ["val/cat/a.png", "valid/cat/b.png"])
    with pytest.raises(DataError, match=r"val/ and valid/ both mean the split 'val'"):
        read(tmp_path)


def test_splits_must_agree_on_classes(tmp_path):
    tree(tmp_path, ["train/cat/a.png", "train/dog/b.png", "val/cats/c.png", "val/dog/d.png"])
    with pytest.raises(DataError, match=r"val has a class 'cats' that train lacks; did you mean cat\?"):
        read(tmp_path)


def test_an_empty_class_is_kept_and_noted(tmp_path):
    tree(tmp_path, ["cat/a.png", "dog/b.png"])
    (tmp_path / "eel").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/readme.md").write_text("no class")
    dataset = read(tmp_path)
    assert dataset.classes == ("cat", "dog", "eel")
    assert dataset.splits["all"].counts.tolist() == [1, 1, 0]
    assert "all has no images of eel" in dataset.notes
    assert "left out, as by their suffix they are no images: .md 1" in dataset.notes


def test_a_class_called_train_is_a_class(tmp_path):
    tree(tmp_path, ["bus/a.png", "train/b.png"])
    assert read(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "cat/b.png"], r"images of its own \(a.png\)"),
        (["train/cat/a.png", "extra/b.png"], r"split folders \(train\) and beside them extra"),
        (["train/a.png", "train/cat/b.png", "val/cat/c.png"], "train has images both beside and in class folders"),
        (["photo/train/cat/a.png", "photo/test/cat/b.png", "art/c.png"], "photo holds splits of its own"),
        (["pets/cat/a.png", "pets/dog/b.png"], "images in one folder only, pets; give .*pets"),
        (["images/a.png"], "images in one folder only, images"),
    ],
)
def test_what_can_be_read_in_two_ways_is_a_question(tmp_path, names, message):
    tree(tmp_path, names)
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    assert sum(sizes(read(tmp_path, layout="flat")).values()) == len(names)
    assert read(tmp_path, layout="imagefolder").label == "single"


def test_images_without_folders_have_no_labels(tmp_path):
    tree(tmp_path, ["b.png", "a.jpg", ".hidden.png", "__MACOSX/._a.jpg"])
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, dataset.classes) == ("flat", "none", ())
    assert dataset.splits["all"].names.tolist() == ["a.jpg", "b.png"]
    assert dataset.splits["all"].targets is None


def test_splits_without_classes(tmp_path):
    tree(tmp_path, ["train/a.png", "test/b.png"])
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, sizes(dataset)) == ("flat", "none", {"train": 1, "test": 1})


def test_a_test_split_without_labels_is_left_out(tmp_path):
    tree(tmp_path, ["train/cat/a.png", "train/dog/b.png", "test/c.png"])
    dataset = read(tmp_path)
    assert sizes(dataset) == {"train": 2}
    assert "test has no labels and is left out (images: 1)" in dataset.notes


def test_links_are_followed_and_loops_end(tmp_path):
    tree(tmp_path / "data", ["cat/a.png", "dog/b.png"])
    tree(tmp_path / "elsewhere", ["c.png"])
    (tmp_path / "data/eel").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/cat/link.png").symlink_to(tmp_path / "elsewhere/c.png")
    (tmp_path / "data/cat/dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "data/dog/loop").symlink_to(tmp_path / "data")
    dataset = read(tmp_path / "data")
    assert dataset.classes == ("cat", "dog", "eel")
    assert dataset.splits["all"].names.tolist() == ["cat/a.png", "cat/link.png", "dog/b.png", "eel/c.png"]
    assert any("dog/loop/ leads back" in note for note in dataset.notes)
    assert any("cat/dead.png is no file" in note for note in dataset.notes)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_not_utf8_are_left_out(tmp_path):
    tree(tmp_path, ["cat/größe.png", "dog/b.png"])
    bad = os.fsencode(tmp_path / "dog") + b"/\xff.png"
    try:
        with open(bad, "wb") as file:  # noqa: PTH123 - pathlib takes no bytes
            file.write((tmp_path / "dog/b.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    dataset = read(tmp_path)
    assert dataset.splits["all"].names.tolist() == ["cat/größe.png", "dog/b.png"]
    assert r"dog/\xff.png: the name is not UTF-8: left out" in dataset.notes
    assert len(dataset.fingerprint) == 16


def test_a_split_survives_pickling_and_knows_its_sizes(tmp_path):
    tree(tmp_path, ["cat/a.png", "dog/b.png"])
    split = pickle.loads(pickle.dumps(read(tmp_path).splits["all"]))
    assert split.image(1).getpixel((0, 0)) == 1
    assert split.store.size_bytes(0) == (tmp_path / "cat/a.png").stat().st_size


def test_an_unreadable_image_is_named_by_its_file(tmp_path):
    tree(tmp_path, ["cat/a.png", "dog/b.png"])
    (tmp_path / "dog/b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"dog.b\.png: is empty"):
        read(tmp_path).splits["all"].image(1)
