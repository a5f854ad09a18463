"""Degradations get worse with severity, and the quality scores say so."""

import math

import numpy as np
import pytest

from vertebra.data.sprites import DEGRADATIONS, degrade, psnr, quality, scene
from vertebra.errors import UsageError

IMAGES = [scene(4, index, size=64).image for index in range(12)]
SEVERITIES = (0.5, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_quality_falls_with_severity_in_every_image(kind):
    last = []
    for number, image in enumerate(IMAGES):
        worse = [degrade(image, kind, severity, np.random.default_rng(number)) for severity in SEVERITIES]
        ratios = [psnr(image, one) for one in worse]
        assert all(np.diff(ratios) < 0), (number, ratios)
        scores = [quality(ratio) for ratio in ratios]
        assert all(np.diff(scores) < 0)
        assert 0 < scores[-1] < scores[0] < 1
        assert worse[0].dtype == np.uint8
        assert worse[0].shape == image.shape
        last.append(scores[-1])
    assert np.mean(last) < 0.75, "the worst is not bad"


def test_no_severity_leaves_the_image():
    for kind in DEGRADATIONS:
        assert degrade(IMAGES[0], kind, 0, np.random.default_rng(0)) is IMAGES[0]
    assert psnr(IMAGES[0], IMAGES[0]) == math.inf
    assert quality(math.inf) == 1
    assert quality(24) == 0.5


def test_psnr_is_that_of_the_mean_squared_error():
    image = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(image, image + np.uint8(10)) == pytest.approx(20 * math.log10(255 / 10))


def test_kinds_do_what_their_names_say():
    image, random = IMAGES[3], np.random.default_rng
    dark = degrade(image, "low light", 5, random(0))
    assert dark.mean() < image.mean() / 5
    hazy = degrade(image, "haze", 4, random(0)).astype(float)
    assert hazy.std() < 0.7 * image.std()
    assert hazy[:16].std() / image[:16].std() < hazy[-16:].std() / image[-16:].std(), "the far side loses more"
    for kind in ("blur", "downscale"):
        sharp, soft = (
            np.abs(np.diff(one.astype(float), axis=1)).mean() for one in (image, degrade(image, kind, 5, random(0)))
        )
        assert soft < 0.8 * sharp, kind
    noisy = degrade(np.full((64, 64, 3), 128, np.uint8), "noise", 2, random(0))
    assert noisy.std() == pytest.approx(45 * 2 / 5, rel=0.03)
    rainy = degrade(np.full((64, 64, 3), 60, np.uint8), "rain", 3, random(0))
    assert 0.02 < (rainy[..., 0] > 120).mean() < 0.4


def test_wrong_kinds_and_severities_are_named():
    with pytest.raises(UsageError, match="no degradation is called 'fog'"):
        degrade(IMAGES[0], "fog", 1, np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"severity is 6; it must be in 0\.\.5"):
        degrade(IMAGES[0], "haze", 6, np.random.default_rng(0))
