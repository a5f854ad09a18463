import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vertebra.cli.main import main
from vertebra.data import read
from vertebra.data.checking import check, quarantine, signature


def scene(seed, size=(96, 96)):
    """A picture with structure at all scales, unlike any other seed's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = rng.integers(-8, 9, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))


@pytest.fixture
def root(tmp_path):
    """Two classes, 12 images each to train on and 4 to test on, nothing wrong with them."""
    seed = 0
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                scene(seed).save(folder / f"{number:02d}.png")
                seed += 1
    return tmp_path / "data"


def kinds(findings):
    return sorted({finding.kind for finding in findings})


def test_nothing_wrong(root):
    report = check(read(root), workers=2)
    assert (report.defects, report.warnings) == ((), ())
    assert report.counts == {"train": {"cat": 12, "dog": 12}, "test": {"cat": 4, "dog": 4}}
    assert report.images == 32
    assert json.loads(json.dumps(report.to_json()))["layout"] == "imagefolder"


def test_unreadable_images_are_named_with_their_reason(root):
    (root / "train/cat/03.png").write_bytes(b"")
    good = (root / "test/dog/01.png").read_bytes()
    (root / "test/dog/01.png").write_bytes(good[: len(good) // 2])
    report = check(read(root))
    assert [finding.where for finding in report.defects] == ["train/cat/03.png", "test/dog/01.png"]
    assert kinds(report.defects) == ["unreadable"]
    assert "is empty (0 bytes)" in report.defects[0].message


def test_quarantine_sets_the_bad_aside(root):
    split = read(root).splits["train"]
    assert quarantine(split) == (split, [])
    (root / "train/cat/03.png").write_bytes(b"no image")
    good, bad = quarantine(split, workers=2)
    assert len(good) == 23
    assert "train/cat/03.png" not in good.names
    assert [(name, "is text" in reason) for name, reason in bad] == [("train/cat/03.png", True)]
    assert good.targets is not None
    assert good.counts.tolist() == [11, 12]


def test_the_same_pixels_in_two_splits_whatever_the_file(root):
    Image.open(root / "train/cat/05.png").save(root / "test/cat/copy.bmp")
    report = check(read(root))
    assert kinds(report.defects) == ["duplicate-across"]
    assert report.defects[0].where == "test/cat/copy.bmp"
    assert report.defects[0].message == "same pixels in test and train: train/cat/05.png"
    assert report.warnings == ()


@pytest.mark.parametrize("change", ["encoded", "smaller", "brighter"])
def test_almost_the_same_picture_in_two_splits(root, change):
    image = Image.open(root / "train/dog/07.png")
    if change == "smaller":
        image = image.resize((61, 61))
    elif change == "brighter":
        image = image.point(lambda value: min(255, int(value * 1.1 + 5)))
    image.save(root / "test/dog/copy.jpg", quality=50)
    report = check(read(root))
    assert report.defects == ()
    assert [(finding.kind, finding.where) for finding in report.warnings] == [
        ("near-duplicate-across", "test/dog/copy.jpg")
    ]
    assert "train/dog/07.png of train" in report.warnings[0].message


def test_blank_and_tiny_images_have_no_signature():
    assert not signature(Image.new("L", (64, 64), 128)).any()
    assert not signature(scene(0, (31, 64))).any()
    assert np.linalg.norm(signature(scene(0)).astype(np.float32)) == pytest.approx(1, abs=1e-2)


def test_copies_in_one_split_and_with_two_labels(root):
    shutil.copy(root / "train/cat/00.png", root / "train/cat/again.png")
    shutil.copy(root / "train/cat/01.png", root / "train/dog/again.png")
    report = check(read(root))
    assert report.defects == ()
    assert kinds(report.warnings) == ["duplicate-within", "two-labels"]
    (two,) = [finding for finding in report.warnings if finding.kind == "two-labels"]
    assert (two.where, two.message) == ("train/dog/again.png", "is dog; the same pixels are cat in train/cat/01.png")


def test_class_sizes(root):
    (root / "train/eel").mkdir()
    for number in range(11):
        (root / f"train/dog/{number:02d}.png").unlink()
    scene(999, (20, 40)).save(root / "train/cat/tiny.png")
    report = check(read(root))
    assert report.defects == ()
    assert kinds(report.warnings) == ["empty-class", "few-images", "imbalance", "note", "tiny-images"]
    messages = {finding.kind: finding.message for finding in report.warnings}
    assert messages["few-images"] == "has only 1 images in train"
    assert messages["imbalance"] == "cat has 13 images, dog 1: 13 times"
    assert messages["tiny-images"].startswith("1 of 14 images have a side under 32 pixels")


def test_one_class_only_is_a_defect(root):
    shutil.rmtree(root / "train/dog")
    shutil.rmtree(root / "test/dog")
    report = check(read(root))
    assert kinds(report.defects) == ["one-class"]


def test_unlabelled_images_are_checked_too(root):
    report = check(read(root, layout="flat"))
    assert report.defects == ()
    assert report.counts == {"train": {"": 24}, "test": {"": 8}}


def run(capsys, *words):
    with pytest.raises(SystemExit) as leave:
        main(["check", *map(str, words)])
    return leave.value.code, capsys.readouterr().out


def test_the_command_says_what_is_wrong_and_exits_with_3(root, capsys):
    code, text = run(capsys, root)
    assert code == 0
    assert "train: 24 images of 2 classes, 12 to 12 each" in text
    assert text.endswith("no defects\n")
    for number in range(7):
        shutil.copy(root / f"train/cat/{number:02d}.png", root / f"test/cat/copy{number}.png")
    code, text = run(capsys, root)
    assert code == 3
    assert "defect duplicate-across: 7\n  test/cat/copy0.png: same pixels in test and train" in text
    assert "... and 2 more; --json lists all" in text
    code, text = run(capsys, root, "--json", "--workers", 1)
    assert code == 3
    assert len(json.loads(text)["defects"]) == 7


def test_the_command_on_data_that_cannot_be_read(tmp_path, capsys):
    assert run(capsys, tmp_path)[0] == 3
    assert run(capsys, tmp_path / "none")[0] == 3
