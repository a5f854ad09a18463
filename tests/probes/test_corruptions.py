from itertools import pairwise

import numpy as np
import pytest
import torch

from vertebra.probes.corruptions import CORRUPTIONS, corrupted, gaussian_blur


def _photos(side: int, channels: int = 3, n: int = 12) -> np.ndarray:
    """Smooth shapes with edges, dark and bright: enough like photographs for every corruption to bite."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    images = np.zeros((n, side, side, channels))
    for image in images:
        for channel in range(channels):
            waves = sum(np.sin(2 * np.pi * (rng.uniform(1, 6) * rows + rng.uniform(1, 6) * columns)) for _ in range(3))
            y, x, radius = rng.uniform(0.2, 0.8, 3)
            image[..., channel] = 0.45 + 0.1 * waves + 0.3 * ((rows - y) ** 2 + (columns - x) ** 2 < radius**2 / 4)
    return (255 * images.clip(0, 1)).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_grow(name: str, side: int) -> None:
    images = _photos(side, n=4 if side == 224 else 12)
    stages = [corrupted(images, name, severity).astype(np.float64) for severity in range(1, 6)]
    if name in ("fog", "frost"):  # they pull everything to one grey: what grows is how little of the image is left
        change = [1 - np.corrcoef(images.ravel(), stage.ravel())[0, 1] for stage in stages]
    else:
        change = [np.abs(stage - images).mean() for stage in stages]
    assert change[0] > 0
    assert all(after > 0.95 * before for before, after in pairwise(change)), change
    assert change[-1] > 1.3 * change[0]


def test_parameters_are_the_published_ones_at_both_sizes_and_between_them_between() -> None:
    noise = CORRUPTIONS["gaussian_noise"]
    assert [noise.parameters(s, 224)[0] for s in range(1, 6)] == [0.08, 0.12, 0.18, 0.26, 0.38]
    assert [noise.parameters(s, 32)[0] for s in range(1, 6)] == [0.04, 0.06, 0.08, 0.09, 0.10]
    assert 0.1 < noise.parameters(5, 96)[0] < 0.38
    assert noise.parameters(5, 8) == noise.parameters(5, 32) and noise.parameters(5, 384) == noise.parameters(5, 224)
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_pixels_for_the_same_arguments(name: str, channels: int) -> None:
    images = _photos(20, channels, n=3)
    before = images.copy()
    first = corrupted(images, name, 3)
    assert first.shape == images.shape and first.dtype == np.uint8
    np.testing.assert_array_equal(first, corrupted(images, name, 3))
    np.testing.assert_array_equal(images, before)


def test_noise_has_the_stated_deviation() -> None:
    grey = np.full((4, 64, 64, 3), 128, dtype=np.uint8)
    side = CORRUPTIONS["gaussian_noise"].parameters(2, 64)[0]
    assert (corrupted(grey, "gaussian_noise", 2) / 255.0).std() == pytest.approx(side, rel=0.03)
    photons = CORRUPTIONS["shot_noise"].parameters(1, 64)[0]
    assert (corrupted(grey, "shot_noise", 1) / 255.0).std() == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.03)
    changed = (corrupted(grey, "impulse_noise", 5) != 128).mean()
    assert changed == pytest.approx(CORRUPTIONS["impulse_noise"].parameters(5, 64)[0], rel=0.05)


def test_blurs_keep_a_flat_image() -> None:
    flat = np.full((2, 40, 40, 3), 77, dtype=np.uint8)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"):
        np.testing.assert_allclose(corrupted(flat, name, 5), flat, atol=1)


def test_gaussian_blur_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    image = np.random.default_rng(0).random((31, 23)).astype(np.float32)
    ours = gaussian_blur(torch.from_numpy(image)[None, None], 1.5)[0, 0].numpy()
    np.testing.assert_allclose(ours, gaussian_filter(image, 1.5, mode="nearest", truncate=4), atol=2e-5)


def test_brightness_keeps_the_hue() -> None:
    image = np.array([[[[40, 80, 20]]]], dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    out = corrupted(image, "brightness", 1)[0, 0, 0].astype(float)
    assert out[1] == pytest.approx(80 + 0.05 * 255, abs=1)
    np.testing.assert_allclose(out / out[1], [0.5, 1, 0.25], atol=0.01)
