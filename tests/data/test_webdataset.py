import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vertebra.data import read
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def png(shade):
    buffer = io.BytesIO()
    Image.new("L", (12, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def tar(file, members, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def samples(labels, member="cls", first=0):
    for number, label in enumerate(labels, first):
        yield f"{number:04d}.png", png(number)
        yield f"{number:04d}.{member}", label.encode()


def test_one_tar(tmp_path):
    dataset = read(tar(tmp_path / "a.tar", samples(["10", "9", "10\n"])))
    assert (dataset.layout, dataset.label, dataset.classes) == ("webdataset", "single", ("9", "10"))
    split = pickle.loads(pickle.dumps(dataset.splits["all"]))
    assert split.targets.tolist() == [1, 0, 1]
    assert [split.image(index).getpixel((0, 0)) for index in range(3)] == [0, 1, 2]
    assert split.names.tolist() == ["a/0000.png", "a/0001.png", "a/0002.png"]
    assert split.store.size_bytes(0) == len(png(0))


def test_a_folder_of_tars_with_splits(tmp_path):
    tar(tmp_path / "my-train-000.tar", samples(["cat", "dog"]))
    tar(tmp_path / "my-train-001.tar", samples(["dog"], first=2))
    tar(tmp_path / "my-val-000.tar", samples(["dog"]))
    dataset = read(tmp_path)
    assert dataset.splits["train"].targets.tolist() == [0, 1, 1]
    assert dataset.splits["train"].image(2).getpixel((0, 0)) == 2
    assert dataset.splits["val"].targets.tolist() == [1]
    tar(tmp_path / "more.tar", samples(["dog"]))
    with pytest.raises(DataError, match=r"more.tar does not tell its split"):
        read(tmp_path)


def test_splits_by_folder(tmp_path):
    tar(tmp_path / "train/000.tar", samples(["cat", "dog"]))
    tar(tmp_path / "validation/000.tar", samples(["dog"]))
    assert list(read(tmp_path).splits) == ["train", "val"]


def test_a_brace_pattern(tmp_path):
    for number in range(3):
        tar(tmp_path / f"a-{number:03d}.tar", samples(["x", "y"]))
    assert len(read(f"{tmp_path}/a-{{000..002}}.tar").splits["all"]) == 6
    with pytest.raises(DataError, match=r"there is no .*a-003\.tar \(and 1 more\)"):
        read(f"{tmp_path}/a-{{002..004}}.tar")
    with pytest.raises(DataError, match=r"runs backwards; write \{000..002\}"):
        read(f"{tmp_path}/a-{{002..000}}.tar")


def test_labels_in_json(tmp_path):
    one = (json.dumps({"label": label, "name": "x"}) for label in ("b", "a"))
    assert read(tar(tmp_path / "one.tar", samples(one, "json"))).classes == ("a", "b")
    many = (json.dumps({"tags": label}) for label in (["b", "a"], []))
    dataset = read(tar(tmp_path / "many.tar", samples(many, "json")))
    assert (dataset.label, dataset.splits["all"].targets.tolist()) == ("multi", [[1, 1], [0, 0]])
    other = tar(tmp_path / "other.tar", samples((json.dumps({"kind": label}) for label in "ba"), "json"))
    assert read(other).label == "none"
    assert read(other, labels="kind").classes == ("a", "b")
    with pytest.raises(UsageError, match=r"no member or json field 'kin'; did you mean kind"):
        read(other, labels="kin")
    with pytest.raises(DataError, match=r"bad.tar, 0000.json cannot be read"):
        read(tar(tmp_path / "bad.tar", samples(["{"], "json")))


def test_captions_are_no_labels(tmp_path):
    assert read(tar(tmp_path / "a.tar", samples(["a cat", "a dog"], "txt"))).label == "none"


def test_missing_members_are_named_or_left_out(tmp_path):
    members = [*samples(["x", "y"]), ("0002.cls", b"x"), ("0003.png", png(3))]
    file = tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"a.tar, 0002 has no image, only cls; a.tar, 0003 has no label, only png"):
        read(file)
    dataset = read(file, on_error="skip")
    assert len(dataset.splits["all"]) == 2
    assert "2 left out" in dataset.notes[0]


def test_a_truncated_tar(tmp_path):
    file = tar(tmp_path / "a.tar", samples(["x", "y", "x"]))
    place = file.read_bytes().index(b"0002.png")
    file.write_bytes(file.read_bytes()[: place + 512 + 20])
    with pytest.raises(DataError, match=r"a\.tar: the tar is truncated in 0002\.png"):
        read(file)
    assert len(read(file, on_error="skip").splits["all"]) == 2
    file.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"a\.tar: the tar is truncated or damaged"):
        read(file)


def test_keys_that_are_not_utf8(tmp_path):
    members = [*samples(["x", "y"]), ("\udcff.png", png(1)), ("\udcff.cls", b"x")]
    file = tar(tmp_path / "a.tar", members, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=r"\\xff\.png: the name is not UTF-8"):
        read(file)
    assert len(read(file, on_error="skip").splits["all"]) == 2


def test_several_images_and_twice_the_same(tmp_path):
    members = [(f"0.{suffix}", png(shade)) for shade, suffix in enumerate(("left.png", "right.png"))]
    file = tar(tmp_path / "a.tar", [*members, ("0.cls", b"x")])
    with pytest.raises(DataError, match=r"several images: left.png, right.png; say images='SUFFIX'"):
        read(file)
    assert read(file, images="right.png").splits["all"].image(0).getpixel((0, 0)) == 1
    with pytest.raises(DataError, match=r"0\.png is there twice"):
        read(tar(tmp_path / "b.tar", [("0.png", png(0)), ("0.png", png(1))]))


def test_compressed_tars_say_why_not(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"a.tar.gz is compressed"):
        read(tmp_path / "in")
    with pytest.raises(DataError, match=r"is packed; unpack it"):
        read(tmp_path / "in/a.tar.gz")
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir()
        (tmp_path / "in" / name / "a.png").write_bytes(png(1))
    assert read(tmp_path / "in").classes == ("cat", "dog")


def test_members_that_point_outside_are_never_written(tmp_path):
    """Keys with `..` are only names: nothing is extracted."""
    file = tar(tmp_path / "in/a.tar", [("../../evil.png", png(1)), ("../../evil.cls", b"x")])
    assert read(file).splits["all"].image(0).size == (12, 8)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a.tar", "in"]


@pytest.mark.data
def test_a_real_tar():
    file = shared / "text" / "cc12m-32-webdataset.tar"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    dataset = read(file)
    split = dataset.splits["all"]
    assert (dataset.label, len(split), split.targets) == ("none", 32, None)
    assert split.names[0] == "cc12m-32-webdataset/000000003.jpg"
    assert split.store.size_bytes(0) == 103637
    sizes = {split.image(index, least=(64, 64)).mode for index in range(32)}
    assert sizes <= {"RGB", "L"}
