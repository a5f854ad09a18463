import io
import json
import os
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.contracts import Preprocess
from vertebra.data.dataset import Split, Store
from vertebra.data.pixels import Pixels, fitted, least_fitted, normalised
from vertebra.errors import DataError, UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Preprocess((8, 8), MEAN, STD)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photograph-like image: noise at three scales."""
    rng = np.random.default_rng(seed)
    planes = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((width, height)), float)
        for cells in (4, 16, 64)
    ]
    return Image.fromarray(np.average(planes, axis=0, weights=(4, 2, 1)).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class Counting(Store):
    """Images from memory that counts what it decodes and fails where it is told to."""

    images: list[Image.Image]
    broken: tuple[int, ...] = ()
    interrupt: list[int] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        self.decoded.append(index)
        if index in self.interrupt:
            raise KeyboardInterrupt
        if index in self.broken:
            raise DataError(f"image-{index}.png: is damaged")
        return self.images[index]

    def size_bytes(self, index: int) -> int:
        return 100 + index


def split_of(store: Counting) -> Split:
    count = len(store.images)
    names = np.array([f"image-{index}.png" for index in range(count)])
    return Split("test", ("a",), names, np.zeros(count, np.int64), store, np.arange(count))


def forty(**options) -> Counting:
    return Counting([smooth(11 + index % 3, 9, index) for index in range(40)], **options)


@pytest.mark.parametrize("size", [(101, 67), (67, 101), (33, 20), (500, 375), (64, 64)])
@pytest.mark.parametrize(
    ("target", "crop", "crop_mode", "interpolation"),
    [
        ((32, 32), 0.875, "center", "bicubic"),
        ((32, 32), 0.9, "center", "bilinear"),
        ((31, 31), 1.0, "center", "lanczos"),
        ((32, 32), 0.95, "squash", "bicubic"),
        ((24, 40), 0.9, "center", "bicubic"),
    ],
)
def test_fitted_is_timms_evaluation_transform(size, target, crop, crop_mode, interpolation):
    from timm.data import create_transform

    image = smooth(*size)
    theirs = create_transform(
        (3, *target), interpolation=interpolation, crop_pct=crop, crop_mode=crop_mode, mean=MEAN, std=STD
    )
    fit = "squash" if crop_mode == "squash" else "crop"
    preprocess = Preprocess(target, MEAN, STD, interpolation=interpolation, crop=crop, fit=fit)
    ours = normalised(fitted(image, preprocess)[None], preprocess)[0]
    grey_levels = (ours - theirs(image)).abs() * 255 * torch.tensor(STD)[:, None, None]
    assert ours.shape == (3, *target)
    assert grey_levels.max() < 1.01


def test_fitted_follows_the_networks_channels():
    colour, grey = smooth(20, 12), smooth(20, 12).convert("L")
    one = Preprocess((8, 8), (0.5,), (0.5,))
    assert fitted(colour, one).shape == (8, 8, 1)
    np.testing.assert_array_equal(fitted(colour, one), fitted(grey, one))
    spread = fitted(grey, SMALL)
    assert spread.shape == (8, 8, 3)
    np.testing.assert_array_equal(spread[..., 0], spread[..., 2])
    with pytest.raises(UsageError, match="4 channels"):
        fitted(colour, Preprocess((8, 8), (0.5,) * 4, (0.5,) * 4))


@pytest.mark.parametrize("size", [(501, 375), (333, 503)])
def test_a_reduced_jpeg_is_fitted_where_the_whole_would_be(size):
    file = io.BytesIO()
    smooth(*size).save(file, "JPEG", quality=92)
    preprocess = Preprocess((64, 64), MEAN, STD, crop=0.875)
    reduced, least = Image.open(file), least_fitted(preprocess)
    reduced.draft(None, (least[1], least[0]))
    reduced.load()
    reduced.info["whole"] = size
    assert reduced.width == -(-size[0] // 2)
    difference = np.abs(fitted(reduced, preprocess).astype(int) - fitted(Image.open(file), preprocess))
    assert difference.mean() < 0.6
    assert difference.max() <= 8


def test_normalised_is_the_formula_for_arrays_and_tensors():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    images = normalised(pixels, SMALL)
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    assert images.dtype == torch.float32 and images.is_contiguous()
    torch.testing.assert_close(images, expected)
    assert torch.equal(normalised(torch.from_numpy(pixels), SMALL), images)
    pixels.flags.writeable = False
    assert torch.equal(normalised(pixels, SMALL), images)


def test_pixels_are_decoded_once(tmp_path):
    store = forty()
    first = Pixels.of(split_of(store), SMALL, tmp_path, threads=2)
    assert sorted(store.decoded) == list(range(40))
    assert first.array.shape == (40, 8, 8, 3) and isinstance(first.array, np.memmap)
    np.testing.assert_array_equal(first.array[7], fitted(store.images[7], SMALL))
    again = Pixels.of(split_of(store), replace(SMALL, mean=(0, 0, 0)), tmp_path)
    assert len(store.decoded) == 40
    np.testing.assert_array_equal(again.array, first.array)
    Pixels.of(split_of(store), replace(SMALL, crop=0.9), tmp_path)
    Pixels.of(split_of(store).select(range(39)), SMALL, tmp_path)
    assert len(store.decoded) == 40 + 40 + 39
    np.testing.assert_array_equal(Pixels.of(split_of(store), SMALL, None).array, first.array)


def test_a_kill_leaves_no_half_file(tmp_path):
    store = forty(interrupt=[30])
    with pytest.raises(KeyboardInterrupt):
        Pixels.of(split_of(store), SMALL, tmp_path, threads=2)
    assert list(tmp_path.iterdir()) == []
    store.interrupt.clear()
    pixels = Pixels.of(split_of(store), SMALL, tmp_path, threads=2)
    assert (pixels.array.reshape(40, -1).max(1) > 0).all()


def test_what_a_killed_process_left_is_removed(tmp_path):
    store = forty()
    Pixels.of(split_of(store), SMALL, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    file.unlink()
    old, young = file.with_name(f"{file.name}.1.part"), file.with_name(f"{file.name}.2.part")
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    Pixels.of(split_of(store), SMALL, tmp_path)
    assert not old.exists() and young.exists() and file.exists()


def test_an_unreadable_image_is_named(tmp_path):
    store = forty(broken=(3, 21))
    for folder in (tmp_path, None):
        with pytest.raises(DataError, match=r"image-3\.png: is damaged"):
            Pixels.of(split_of(store), SMALL, folder, threads=1)
    assert list(tmp_path.iterdir()) == []
    for folder in (tmp_path, None, tmp_path):
        pixels = Pixels.of(split_of(store), SMALL, folder, threads=2, on_error="skip")
        assert [bad.index for bad in pixels.bad] == [3, 21]
        assert pixels.bad[1].name == "image-21.png" and pixels.bad[1].reason == "image-21.png: is damaged"
        assert not pixels.array[[3, 21]].any() and pixels.array[[2, 4, 20, 22]].any()
    with pytest.raises(DataError, match=r"image-3\.png"):  # kept by a run that skipped, asked for by one that does not
        Pixels.of(split_of(store), SMALL, tmp_path)
    (listing,) = tmp_path.glob("*.json")
    assert len(json.loads(listing.read_text())) == 2


def test_an_empty_split_has_no_pixels(tmp_path):
    pixels = Pixels.of(split_of(Counting([])), SMALL, tmp_path)
    assert len(pixels) == 0 and pixels.array.shape == (0, 8, 8, 3)
