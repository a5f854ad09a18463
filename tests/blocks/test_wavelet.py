import numpy as np
import pytest
import torch
from torch import nn

from vertebra.blocks.wavelet import FILTERS, Bands, haar, unhaar, wavelet
from vertebra.errors import UsageError
from vertebra.parity import images

MAP = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8], [2, 0, 1, 0], [0, 1, 0, 5]]]], dtype=torch.float64)

# what PyWavelets 1.8 gives for pywt.dwt2(MAP, name, mode="zero")
PYWAVELETS = {
    "haar": (
        [[7.0, 11.0], [1.5, 3.0]],
        [[-4.0, -4.0], [0.5, -2.0]],
        [[-1.0, -1.0], [0.5, -2.0]],
        [[0.0, 0.0], [1.5, 3.0]],
    ),
    "db2": (
        [
            [-0.05232304, -0.51313972, -0.22876588],
            [0.38846189, 8.02331668, 10.3088929],
            [0.10825318, 0.73325318, 3.73205081],
        ],
        [
            [-0.19527223, -1.91506351, -0.85376588],
            [0.36482304, -1.18093014, -4.49431033],
            [-0.02900635, -0.1964746, -1.0],
        ],
        [
            [-0.19527223, 0.0, 0.06129763],
            [1.44975953, 0.47099365, -2.76225953],
            [0.40400635, -1.9285254, -1.0],
        ],
        [
            [-0.72876588, 0.0, 0.22876588],
            [1.36153811, 1.75777223, 1.20424682],
            [-0.10825318, 0.51674682, 0.26794919],
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_daubechies(name):
    """K / 2 vanishing moments and orthonormal shifts leave nothing else but the mirror image and other phases."""
    low = np.array(FILTERS[name])
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    assert low.sum() == pytest.approx(2**0.5, abs=1e-9) and (low**2).sum() == pytest.approx(1, abs=1e-9)
    for shift in range(2, len(low), 2):
        assert low[shift:] @ low[:-shift] == pytest.approx(0, abs=1e-9)
    for moment in range(len(low) // 2):
        assert (np.arange(len(low)) ** moment) @ high == pytest.approx(0, abs=1e-7)


def test_filters_in_closed_form():
    root = np.sqrt(3)
    db2 = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * np.sqrt(2))
    np.testing.assert_allclose(FILTERS["db2"], db2, atol=1e-11)
    assert FILTERS["haar"] == pytest.approx((0.5**0.5, 0.5**0.5), abs=1e-15)


def test_haar_by_hand():
    """1 2 / 5 6 give 14 / 2, (3 - 11) / 2, (6 - 8) / 2 and (7 - 7) / 2."""
    expected = (7.0, -4.0, -1.0, 0.0)
    assert [band.item() for band in haar(MAP[..., :2, :2])] == list(expected)


@pytest.mark.parametrize("name", PYWAVELETS)
def test_bands_are_those_of_pywavelets(name):
    low, ((rows, columns, both),) = wavelet(name).double()(MAP)
    for found, expected in zip((low, rows, columns, both), PYWAVELETS[name], strict=True):
        np.testing.assert_allclose(found[0, 0], expected, atol=1e-7)


@pytest.mark.parametrize("name", FILTERS)
def test_one_line_is_the_sum_over_its_filter(name):
    """c[k] = sum_j h[j] x[2 k + 1 - j] along a row, with zeros outside: PyWavelets' convention, written as a loop."""
    taps = FILTERS[name][::-1]  # PyWavelets' dec_lo
    line = images((5,)).double()
    count = (len(line) + len(taps) - 1) // 2
    index = [[2 * k + 1 - j for j in range(len(taps))] for k in range(count)]
    inside = [[line[i].item() if 0 <= i < len(line) else 0.0 for i in row] for row in index]
    expected = np.array(inside) @ np.array(taps)
    low, ((rows, columns, _),) = wavelet(name).double()(line.expand(1, 1, 40, 5))
    middle = low[0, 0, low.shape[2] // 2] / 2**0.5  # constant along the other side
    np.testing.assert_allclose(middle, expected, atol=1e-6)
    assert rows[0, 0, low.shape[2] // 2].abs().max() < 1e-6 < columns.abs().max()


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("size", [(16, 24), (13, 7), (1, 2)])
@pytest.mark.parametrize("name", FILTERS)
def test_inverse_and_energy(name, size, levels):
    transform, x = wavelet(name, levels=levels).double(), images((2, 3, *size)).double()
    bands = transform(x)
    assert len(bands.details) == levels
    torch.testing.assert_close(transform.inverse(bands, size), x, rtol=0, atol=1e-6)
    energy = bands.low.square().sum() + sum(band.square().sum() for level in bands.details for band in level)
    torch.testing.assert_close(energy, x.square().sum(), rtol=1e-6, atol=0)
    if not any(side % 2 for side in size):
        torch.testing.assert_close(transform.inverse(bands)[:, :, : size[0], : size[1]], x, rtol=0, atol=1e-6)


def test_sizes_follow_the_filter():
    for name, filters in FILTERS.items():
        for side in (6, 7):
            low = wavelet(name)(images((1, 1, side, side))).low
            assert low.shape[2:] == ((side + len(filters) - 1) // 2,) * 2


def test_haar_is_the_strided_convolution_in_both_directions():
    x = images((2, 4, 6, 10)).double()
    slow = wavelet("haar").double()
    assert slow.haar
    slow.haar = False
    fast, by_convolution = wavelet("haar").double()(x), slow(x)
    torch.testing.assert_close(fast, by_convolution)
    torch.testing.assert_close(slow.inverse(fast), unhaar(fast.low, *fast.details[0]))


def test_haar_keeps_what_it_is_given_and_its_gradient():
    x = images((2, 3, 5, 7)).double().requires_grad_()
    before = x.detach().clone()
    assert torch.autograd.gradcheck(haar, (x,))
    assert torch.equal(x.detach(), before)
    last = images((2, 3, 6, 8)).to(memory_format=torch.channels_last)
    for found, expected in zip(haar(last), haar(last.contiguous()), strict=True):
        assert torch.equal(found, expected)


def test_transform_exports_and_follows_the_type():
    transform, x = wavelet("db2", levels=2).eval(), images((1, 2, 12, 9))
    torch.testing.assert_close(torch.export.export(transform, (x,)).module()(x), transform(x))
    assert isinstance(transform(x), Bands) and not transform.state_dict()
    assert transform.to(torch.bfloat16)(x.bfloat16()).low.dtype == torch.bfloat16


def test_haar_before_a_pointwise_convolution_turns_its_weights_alone():
    """The bands of one level and the four pixels of a square are one linear family with other weights."""
    x, weight = images((2, 3, 8, 6)), images((5, 12))
    bands = nn.functional.conv2d(torch.cat(haar(x), 1), weight[..., None, None])
    turn = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    kernel = (weight.reshape(5, 4, 3).mT @ turn).reshape(5, 3, 2, 2)
    torch.testing.assert_close(nn.functional.conv2d(x, kernel, stride=2), bands, rtol=1e-5, atol=1e-5)


def test_filters_of_ones_own_and_what_is_refused():
    mine = wavelet(FILTERS["db2"], levels=2)
    assert torch.equal(mine.kernels, wavelet("db2").kernels)
    with pytest.raises(UsageError, match="filters is 'harr'"):
        wavelet("harr")
    with pytest.raises(UsageError, match="levels is 0"):
        wavelet(levels=0)
    for wrong in ((0.5, 0.5), (1.0, 0.0, 0.4142135), (), (0.8, 0.6142135, 0.0, 0.0)):
        with pytest.raises(UsageError, match="orthonormal low-pass filter"):
            wavelet(wrong)
