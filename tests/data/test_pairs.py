import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.data.folders import list_folder
from vertebra.data.pairs import faults, find_pairs, read_pairs, write_pairs
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def photo(file, size=(4, 2), seed=0):
    """Noise of (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def find(root):
    return find_pairs(root, list_folder(root)[0])


def read(root, **options):
    plan = find(root)
    assert plan is not None
    return read_pairs(str(root), root, plan, **options)


def unpacked(name, folder):
    if not (archive := shared / name).exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def test_the_degraded_is_the_image_and_the_clean_its_target(tmp_path):
    photo(tmp_path / "lq/a.png", seed=1)
    clean = photo(tmp_path / "gt/a.png", seed=2)
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, dataset.classes) == ("pairs", "none", ())
    split = dataset.splits["all"]
    assert (list(split.names), split.annotations.names) == (["lq/a.png"], ("clean",))
    found = split.target(0)["clean"]
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0), clean)


@pytest.mark.parametrize(
    ("clean", "degraded"),
    [
        ("HR/{}.png", "LR_bicubic_x2/{}.png"),
        ("HR/{}.png", "LR/{}x2.png"),
        ("gt/{}.png", "lq/{}.jpg"),
        ("ref/{}.png", "dist/{}.png"),
        ("clean/{}.png", "noisy/{}.png"),
        ("train/sharp/{}.png", "train/blur/{}.png"),
        ("target/train/{}.png", "input/train/{}.png"),
        ("DIV2K_train_HR/{}.png", "DIV2K_train_LR_bicubic/X2/{}x2.png"),
        ("high/{}_high.png", "low/{}_low.png"),
        ("gt/deep/{}.png", "noisy25/deep/{}.png"),
    ],
)
def test_names_of_sides(tmp_path, clean, degraded):
    for name in "ab":
        photo(tmp_path / clean.format(name), (8, 4))
        photo(tmp_path / degraded.format(name), (4, 2))
    dataset = read(tmp_path)
    (split,) = dataset.splits.values()
    assert split.name == ("train" if "train" in clean else "all")
    assert list(split.names) == [degraded.format("a"), degraded.format("b")]
    assert split.target(1)["clean"].shape == (3, 4, 8)


def test_splits_in_the_names_of_folders(tmp_path):
    for word in ("train", "valid"):
        photo(tmp_path / f"DIV2K_{word}_HR/1.png", (4, 4))
        for scale in (2, 4):
            photo(tmp_path / f"DIV2K_{word}_LR_bicubic/X{scale}/1x{scale}.png", (4 // scale, 4 // scale))
    dataset = read(tmp_path, degraded="x4")
    assert list(dataset.splits) == ["train", "val"]
    assert list(dataset.splits["val"].names) == ["DIV2K_valid_LR_bicubic/X4/1x4.png"]
    assert dataset.splits["val"].image(0).size == (1, 1)


def test_classes_of_everyday_names_are_no_pairs(tmp_path):
    photo(tmp_path / "sharp/a.png")
    photo(tmp_path / "sharp/b.png")
    photo(tmp_path / "blurry/b.png")
    photo(tmp_path / "cat/b.png")
    assert find(tmp_path) is None


def test_several_scales_are_asked_for(tmp_path):
    photo(tmp_path / "HR/a.png", (12, 12))
    for scale in (2, 3):
        photo(tmp_path / f"LR_bicubic_x{scale}/a.png", (12 // scale, 12 // scale))
    with pytest.raises(
        DataError, match=r"several degraded sides: LR_bicubic_x2, LR_bicubic_x3; say which, as degraded="
    ):
        read(tmp_path)
    for word in ("x3", "LR_bicubic_x3", "3x"):
        dataset = read(tmp_path, degraded=word)
        assert dataset.splits["all"].image(0).size == (4, 4)
        assert dataset.splits["all"].annotations.scale == 3
    with pytest.raises(UsageError, match=r"no degraded side is called 'x4'.*there are LR_bicubic_x2, LR_bicubic_x3"):
        read(tmp_path, degraded="x4")


def test_a_clean_image_slightly_larger_is_cut_and_others_are_refused(tmp_path):
    photo(tmp_path / "LR_x3/a.png", (3, 2))
    clean = photo(tmp_path / "HR/a.png", (11, 7))
    for name, size in (("b", (12, 7)), ("c", (8, 6))):
        photo(tmp_path / f"LR_x3/{name}.png", (3, 2))
        photo(tmp_path / f"HR/{name}.png", size)
    split = read(tmp_path).splits["all"]
    assert np.array_equal(split.target(0)["clean"].permute(1, 2, 0), clean[:6, :9])
    with pytest.raises(
        DataError, match=r"HR/b\.png is 12 x 7 pixels, which is not 3 times the 3 x 2 of .*LR_x3/a?b\.png"
    ):
        split.target(1)
    with pytest.raises(DataError, match=r"HR/c\.png is 8 x 6 pixels, which is not 3 times"):
        split.target(2)
    assert [(one.kind, one.where) for one in faults(split)] == [("pair", "LR_x3/b.png"), ("pair", "LR_x3/c.png")]


def test_without_a_stated_scale_the_sizes_tell(tmp_path):
    photo(tmp_path / "lq/a.png", (4, 2))
    photo(tmp_path / "gt/a.png", (8, 4))
    photo(tmp_path / "lq/b.png", (4, 2))
    photo(tmp_path / "gt/b.png", (8, 2))
    split = read(tmp_path).splits["all"]
    assert split.target(0)["clean"].shape == (3, 4, 8)
    with pytest.raises(DataError, match=r"gt/b\.png is 8 x 2 pixels, which is not a whole multiple of the 4 x 2"):
        split.target(1)


def test_missing_partners_are_raised_or_left_out(tmp_path):
    for name in ("lq/a.png", "lq/b.png", "gt/b.png", "gt/c.png"):
        photo(tmp_path / name)
    with pytest.raises(DataError, match=r"lq/a\.png has no clean image; gt/c\.png has no degraded image"):
        read(tmp_path)
    dataset = read(tmp_path, on_error="skip")
    assert list(dataset.splits["all"].names) == ["lq/b.png"]
    photo(tmp_path / "gt/b.jpg")
    with pytest.raises(DataError, match=r"lq/b\.png: gt/b\.jpg and gt/b\.png may both belong to it"):
        read(tmp_path)


def test_unreadable_and_grey_clean_images(tmp_path):
    photo(tmp_path / "lq/a.png")
    photo(tmp_path / "lq/b.png")
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt/a.png").write_bytes(b"x")
    Image.new("L", (4, 2), 9).save(tmp_path / "gt/b.png")
    split = read(tmp_path).splits["all"]
    with pytest.raises(DataError, match=r"gt/a\.png: is text"):
        split.target(0)
    assert split.target(1)["clean"].shape == (1, 2, 4)


def same(first, second):
    assert list(first.splits) == list(second.splits)
    for name, split in first.splits.items():
        other = second.splits[name]
        assert len(split) == len(other)
        for index in range(len(split)):
            assert split.image(index).tobytes() == other.image(index).tobytes()
            assert torch.equal(split.target(index)["clean"], other.target(index)["clean"])


def test_written_and_read_again_it_is_the_same(tmp_path):
    for split in ("train", "test"):
        photo(tmp_path / f"one/{split}/LR_x2/a/1.png", (3, 2), 1)
        photo(tmp_path / f"one/{split}/HR/a/1.png", (7, 4), 2)
    first = read(tmp_path / "one")
    write_pairs(first, tmp_path / "two")
    second = read(tmp_path / "two")
    same(first, second)
    assert list(second.splits["train"].names) == ["train/lq_x2/a/1.png"]
    assert second.splits["train"].annotations.scale == 2
    copy = pickle.loads(pickle.dumps(second.splits["test"].select([0])))
    assert torch.equal(copy.target(0)["clean"], second.splits["test"].target(0)["clean"])


@pytest.mark.data
@pytest.mark.parametrize(("name", "count"), [("Set5", 5), ("Set14", 14)])
def test_super_resolution_sets(tmp_path, name, count):
    root = unpacked("sr/set5-set14.zip", tmp_path) / name
    for scale in (2, 3, 4):
        split = read(root, degraded=f"x{scale}").splits["all"]
        assert len(split) == count
        assert not list(faults(split))
        for index in range(count):
            width, height = split.image(index).size
            assert split.annotations.whole(index).size == (scale * width, scale * height)
    image = split.image(0).resize(split.annotations.whole(0).size, Image.Resampling.BICUBIC)
    error = np.asarray(image, float) - np.asarray(split.annotations.whole(0), float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 20  # the pair shows one scene


@pytest.mark.data
def test_quality_pairs(tmp_path):
    root = unpacked("iqa/tid2013-calibration-5.zip", tmp_path) / "iqa-calib"
    split = read(root).splits["all"]
    assert list(split.names) == [f"dist/{name}.png" for name in ("I03", "I04", "I06", "I08", "I19")]
    psnr = []
    for index in range(5):
        error = np.asarray(split.image(index), float) - split.target(index)["clean"].permute(1, 2, 0).numpy()
        psnr.append(10 * np.log10(255**2 / (error**2).mean()))
    # the officials' figures are of luma; these are of colour, near them
    assert np.allclose(psnr, [21.11, 20.99, 27.01, 23.30, 21.62], atol=2.5)
