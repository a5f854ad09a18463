import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from vertebra.data.folders import list_folder
from vertebra.data.image_text import faults, find_image_text, read_image_text, write_image_text
from vertebra.errors import DataError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def photos(root, *names):
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2), shade).save(root / name)


def find(root):
    return find_image_text(root, list_folder(root)[0])


def read(root, **options):
    plan = find(root)
    assert plan is not None
    return read_image_text(str(root), root, plan, **options)


def told(dataset):
    """split -> image -> captions."""
    return {
        name: {str(image): split.target(index)["captions"] for index, image in enumerate(split.names)}
        for name, split in dataset.splits.items()
    }


def test_rows_of_one_image_are_its_captions_and_quotes_are_kept(tmp_path):
    photos(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    (tmp_path / "captions.csv").write_text(
        'image,caption\na.jpg,"A dog, and ""another"" one"\nb.jpg, Ein Bär \na.jpg,"two\nlines"\n', encoding="utf-8"
    )
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label) == ("image_text", "none")
    assert told(dataset) == {
        "all": {"images/a.jpg": ('A dog, and "another" one', "two\nlines"), "images/b.jpg": ("Ein Bär",)}
    }
    assert "left out, as nothing captions them: 1 images" in dataset.notes
    assert dataset.splits["all"].annotations.names == ("captions",)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("captions.txt", "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),
        ("metadata.tsv", "file_name\ttext\na.jpg\tone\na.jpg\ttwo\nb.jpg\tthree\n"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": ["one", "two"]}\n{"file_name": "b.jpg", "text": "three"}\n'),
        ("captions.json", '[{"image": "a.jpg", "captions": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}]'),
        (
            "dataset_flickr8k.json",
            '{"images": [{"filename": "a.jpg", "split": "", "sentences": [{"raw": "one"}, {"raw": "two"}]},'
            ' {"filename": "b.jpg", "sentences": [{"raw": "three"}]}]}',
        ),
        (
            "annotations/captions.json",
            '{"images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}], "annotations":'
            ' [{"image_id": 5, "caption": "one"}, {"image_id": 6, "caption": "three"},'
            ' {"image_id": 5, "caption": "two"}]}',
        ),
    ],
)
def test_forms(tmp_path, file, text):
    photos(tmp_path, "pictures/a.jpg", "pictures/b.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert told(read(tmp_path)) == {"all": {"pictures/a.jpg": ("one", "two"), "pictures/b.jpg": ("three",)}}


def test_splits_of_files_folders_and_fields(tmp_path):
    coco = tmp_path / "coco"
    photos(coco, "train2017/1.jpg", "val2017/1.jpg", "train/2.jpg")
    (coco / "annotations").mkdir()
    for split in ("train", "val"):
        data = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": f"of {split}"}]}
        (coco / f"annotations/captions_{split}2017.json").write_text(json.dumps(data))
    assert told(read(coco)) == {"train": {"train2017/1.jpg": ("of train",)}, "val": {"val2017/1.jpg": ("of val",)}}
    folders = tmp_path / "folders"
    photos(folders, "train/1.jpg", "test/1.jpg")
    for split in ("train", "test"):
        (folders / split / "metadata.csv").write_text(f"file_name,text\n1.jpg,of {split}\n")
    assert told(read(folders)) == {"train": {"train/1.jpg": ("of train",)}, "test": {"test/1.jpg": ("of test",)}}
    fields = tmp_path / "fields"
    photos(fields, "1.jpg", "2.jpg", "3.jpg")
    (fields / "captions.csv").write_text("image,text,split\n1.jpg,a,val\n2.jpg,b,restval\n3.jpg,c,dev\n")
    assert told(read(fields)) == {"train": {"2.jpg": ("b",)}, "val": {"1.jpg": ("a",), "3.jpg": ("c",)}}


def test_tables_with_labels_and_lists_of_names_are_not_taken(tmp_path):
    photos(tmp_path, "a.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,label,text\na.jpg,cat,a cat\n")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("a\n")
    assert find(tmp_path) is None


@pytest.mark.parametrize("name", ["../a.jpg", "images/../../a.jpg", "/tmp/a.jpg", "C:/a.jpg", ""])
def test_names_that_lead_out_are_refused(tmp_path, name):
    photos(tmp_path, "images/a.jpg")
    (tmp_path / "captions.csv").write_text(f"image,caption\na.jpg,one\n{name},two\n")
    with pytest.raises(DataError, match=r"captions\.csv, line 3: '.*' (leads upwards|is no file name relative)"):
        read(tmp_path, on_error="skip")


def test_faults_are_raised_or_left_out(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg", "c.jpg", "x/d.jpg", "y/d.jpg")
    rows = [
        {"image": "a.jpg", "captions": ["one", " "]},
        {"image": "z.jpg", "captions": ["two"]},
        {"image": "b.jpg", "captions": []},
        {"image": "c.jpg", "captions": "three", "split": "everything"},
        {"image": "d.jpg", "captions": "four"},
    ]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    for reason in (
        "entry 0: a.jpg has an empty caption",
        "entry 1: no such image: z.jpg",
        "entry 2: b.jpg has no caption",
        "entry 3: 'everything' is no split; splits are train, val and test",
        "entry 4: d.jpg is there more than once: x/d.jpg, y/d.jpg",
    ):
        assert reason in str(caught.value)
    dataset = read(tmp_path, on_error="skip")
    assert told(dataset) == {"all": {"a.jpg": ("one",)}}
    assert any("5 left out" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "entry 0: int where an object"),
        ('[{"image": "a.jpg", "words": ["x"]}]', "entry 0: it needs an image and captions; it has image, words"),
        ('{"a": 1}', "no captions in a form that is read"),
        ("[", "is no JSON"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "annotation 0: it needs the image_id"),
    ],
)
def test_files_at_fault(tmp_path, text, reason):
    photos(tmp_path, "a.jpg")
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        read(tmp_path)


def test_a_quote_that_never_ends_is_named(tmp_path):
    photos(tmp_path, "a.jpg")
    (tmp_path / "captions.csv").write_text('image,caption\na.jpg,"one\n')
    with pytest.raises(DataError, match=r"captions\.csv, line 2: unexpected end of data"):
        read(tmp_path)


def test_an_image_cannot_be_in_two_splits(tmp_path):
    photos(tmp_path, "a.jpg")
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,one,train\na.jpg,two,val\n")
    with pytest.raises(DataError, match=r"line 3: a\.jpg is in two splits, train and val"):
        read(tmp_path)


def test_captions_of_several_images_are_found(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,one\nb.jpg,one\nc.jpg,two\nc.jpg,two\n")
    (finding,) = faults(read(tmp_path).splits["all"])
    assert (finding.kind, finding.where) == ("caption-shared", "all")
    assert finding.message == "1 captions belong to more than one image; most often, 2 times: 'one'"


def test_written_and_read_again_it_is_the_same(tmp_path):
    photos(tmp_path / "one", "images/a.jpg", "images/deep/b.png", "images/c.jpg")
    rows = [
        {"image": "a.jpg", "captions": ['"quoted", and', "zwei\nZeilen", "日本"], "split": "train"},
        {"image": "deep/b.png", "captions": ["x"], "split": "val"},
        {"image": "c.jpg", "captions": ["y", "y"], "split": "train"},
    ]
    (tmp_path / "one/captions.json").write_text(json.dumps(rows))
    first = read(tmp_path / "one")
    write_image_text(first, tmp_path / "two")
    second = read(tmp_path / "two")
    assert told(second) == {
        "train": {"images/train/a.jpg": tuple(rows[0]["captions"]), "images/train/c.jpg": ("y", "y")},
        "val": {"images/val/deep/b.png": ("x",)},
    }
    write_image_text(second, tmp_path / "three")
    assert read(tmp_path / "three").fingerprint == second.fingerprint
    one = pickle.loads(pickle.dumps(second.splits["train"].select([1])))
    assert one.target(0) == {"captions": ("y", "y")}
    assert one.image(0).tobytes() == first.splits["train"].image(1).tobytes()


@pytest.mark.data
def test_flickr(tmp_path):
    if not (archive := shared / "text/flickr8k-875.zip").exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    dataset = read(tmp_path / "flickr8k-875")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 762, "val": 113}
    assert dataset.notes == ()
    counts = {len(split.target(i)["captions"]) for split in dataset.splits.values() for i in range(len(split))}
    assert counts == {5}
    first = dataset.splits["train"]
    assert first.names[0] == "images/1000268201_693b08cb0e.jpg"
    assert first.target(0)["captions"][1] == "A girl going into a wooden building ."
    assert first.image(0).size == (150, 200)
    write_image_text(dataset, tmp_path / "again")
    again = read(tmp_path / "again")
    assert [again.splits["val"].target(i) for i in range(113)] == [dataset.splits["val"].target(i) for i in range(113)]
    assert again.classes == dataset.classes
