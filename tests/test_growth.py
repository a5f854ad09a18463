"""Power laws, crossings, and what is counted of time and memory."""

import numpy as np
import pytest
import torch

from vertebra.growth import crossing, exponent, peak, seconds


def test_exponents_and_crossings():
    sizes = (64, 128, 256)
    assert exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert crossing(sizes, [100 * n for n in sizes], [n**2 for n in sizes]) == pytest.approx(100)
    assert crossing(sizes, [1, 1, 1], [2, 2, 2]) == 64
    assert np.isnan(crossing(sizes, [2, 2, 2], [3, 3, 1]))
    assert crossing(sizes, [1, 3, 1], [2, 2, 4]) > 128  # only from where it stays ahead


def test_what_was_known_is_not_in_the_peak():
    x = torch.randn(100)
    assert peak(lambda: x * 2, (x,)) == 400
    assert peak(lambda: (x * 2 + 1).sum(), (x,)) == 800  # both alive at once


def test_turns_are_taken_in_order_without_gradients():
    weight, met = torch.ones(1, requires_grad=True), []
    found = seconds([lambda: met.append((0, (weight * 2).requires_grad)), lambda: met.append((1, None))], turns=2)
    assert [place for place, _ in met] == [0, 1] * 3 and not any(graded for _, graded in met)
    assert len(found) == 2 and min(found) >= 0
