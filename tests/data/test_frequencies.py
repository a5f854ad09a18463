import math

import pytest
import torch
from torch import Tensor

from vertebra.data.frequencies import low_frequencies
from vertebra.errors import UsageError

# What the published `freq_crop` (LeapLabTHU/EfficientTrain, commit 552b73c) makes of sin(n^1.5), n = 0..127 as
# (1, 2, 8, 8), at a band of 4, in single precision.
PUBLISHED = [
    [
        [-0.00709373, 0.39543452, -0.32852043, 0.01953396],
        [0.22968323, 0.49706779, 0.32198884, 0.45248543],
        [-0.2929997, 0.1590811, -0.07087564, 0.08646993],
        [-0.22514252, 0.25312136, -0.08081596, -0.14278998],
    ],
    [
        [0.21986405, 0.81281732, 0.49684313, 0.35779548],
        [0.30565439, 0.53187282, 0.10999737, -0.4690054],
        [-0.05011456, -0.03929202, -0.05905377, 0.13385184],
        [-0.21283721, -0.04643279, 0.03114237, -0.04714131],
    ],
]


def _by_transforms(images: Tensor, band: int) -> Tensor:
    """The definition: two transforms and a crop of the shifted spectrum."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    (top, left) = (size // 2 - band // 2 for size in images.shape[-2:])
    kept = torch.fft.ifftshift(spectrum[..., top : top + band, left : left + band], dim=(-2, -1))
    return torch.fft.ifft2(kept).real * (band * band / images[0, 0].numel())


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_equals_the_published_crop() -> None:
    images = torch.sin(torch.arange(128, dtype=torch.float64) ** 1.5).reshape(1, 2, 8, 8)
    torch.testing.assert_close(low_frequencies(images, 4)[0], torch.tensor(PUBLISHED).double(), rtol=0, atol=2e-8)
    torch.testing.assert_close(low_frequencies(images.float(), 4)[0], torch.tensor(PUBLISHED), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "band"),
    [((224, 224), 160), ((224, 224), 96), ((32, 32), 20), ((33, 33), 16), ((32, 32), 2), ((32, 40), 32), ((9, 12), 5)],
)
def test_equals_its_definition(size: tuple[int, int], band: int) -> None:
    images = _random(2, 3, *size)
    torch.testing.assert_close(low_frequencies(images, band), _by_transforms(images, band), rtol=0, atol=1e-5)


def test_an_odd_band_keeps_frequencies_and_their_partners() -> None:
    rows = torch.arange(9)[:, None] * 2 * math.pi / 9
    images = (torch.cos(2 * rows + 0.3) + torch.zeros(9, 9))[None, None].double()
    expected = torch.cos(2 * torch.arange(5)[:, None] * 2 * math.pi / 5 + 0.3) + torch.zeros(5, 5)
    torch.testing.assert_close(low_frequencies(images, 5)[0, 0], expected.double(), rtol=0, atol=1e-6)


def test_nothing_is_lost_of_an_image_without_high_frequencies() -> None:
    size, band = 32, 16
    spectrum = torch.fft.fft2(_random(1, 3, size, size))
    frequencies = torch.fft.fftfreq(size, 1 / size).abs()
    low = frequencies < band / 2
    images = torch.fft.ifft2(spectrum * (low[:, None] & low)).real
    cropped = torch.fft.fftshift(torch.fft.fft2(low_frequencies(images, band)), dim=(-2, -1))
    padded = torch.nn.functional.pad(cropped, [(size - band) // 2] * 4) * (size / band) ** 2
    restored = torch.fft.ifft2(torch.fft.ifftshift(padded, dim=(-2, -1))).real
    torch.testing.assert_close(restored, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("band", [1, 20, 27, 32])
def test_the_mean_intensity_stays(band: int) -> None:
    images = _random(4, 3, 32, 32) + 0.7
    torch.testing.assert_close(low_frequencies(images, band).mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-5)


def test_types_and_whole_images() -> None:
    images = _random(1, 3, 8, 8)
    assert low_frequencies(images, 8) is images
    assert low_frequencies(images.bfloat16(), 6).dtype == torch.bfloat16
    exact = low_frequencies(images.double(), 6)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, _by_transforms(images.double(), 6), rtol=0, atol=1e-12)
    last = low_frequencies(images.contiguous(memory_format=torch.channels_last), 6)
    torch.testing.assert_close(last, low_frequencies(images, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("band", [0, -2, 9])
def test_a_band_out_of_range_is_refused(band: int) -> None:
    with pytest.raises(UsageError, match=f"band is {band}; images of 8 x 10 pixels have 1 to 8"):
        low_frequencies(torch.zeros(1, 1, 8, 10), band)
