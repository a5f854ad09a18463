import numpy as np
import pytest
from scipy import stats

from vertebra.battle.statistics import (
    Interval,
    compare,
    compare_intervals,
    crossed,
    holm,
    interval,
    paired,
    resampled_means,
    wilson,
)


def experiments(seeds: int, seed_effect: float, repeats: int = 4000, images: int = 200) -> np.ndarray:
    """Differences with true mean 0: an image effect, a seed effect and the rest, (repeats, seeds, images)."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 0.4, (repeats, 1, images))
    seed = rng.normal(0, seed_effect, (repeats, seeds, 1))
    return image + seed + rng.normal(0, 0.5, (repeats, seeds, images))


@pytest.mark.parametrize(("seeds", "seed_effect"), [(1, 0.0), (3, 0.0), (3, 0.02), (3, 0.05), (5, 0.1)])
def test_errors_of_the_first_kind_and_coverage_are_nominal(seeds: int, seed_effect: float) -> None:
    found = experiments(seeds, seed_effect)
    _, low, high, p = paired(found, np.zeros_like(found))
    assert 0.035 <= (p < 0.05).mean() <= 0.068
    assert 0.932 <= ((low < 0) & (high > 0)).mean() <= 0.965


def test_one_seed_alone_would_find_differences_that_are_luck() -> None:
    found = experiments(1, 0.05)
    p = paired(found, np.zeros_like(found))[3]
    assert (p < 0.05).mean() > 0.15


def test_one_seed_equals_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.2, 1, (1, 50)), rng.normal(0, 1, (1, 50))
    difference, low, high, p = paired(a, b)
    expected = stats.ttest_rel(a[0], b[0])
    ends = expected.confidence_interval(0.95)
    assert p == pytest.approx(expected.pvalue) and difference == pytest.approx((a - b).mean())
    assert (low, high) == (pytest.approx(ends.low), pytest.approx(ends.high))


def test_crossed_variance_equals_the_mean_squares_of_its_docstring() -> None:
    x = np.random.default_rng(2).normal(size=(3, 7)) + np.array([[0.0], [2.0], [4.0]])
    image, seed = 3 * x.mean(0).var(ddof=1), 7 * x.mean(1).var(ddof=1)
    rest = ((x - x.mean(0) - x.mean(1)[:, None] + x.mean()) ** 2).sum() / 12
    found = crossed(x)
    assert found.variance == pytest.approx((image + seed - rest) / 21)
    assert found.freedom == pytest.approx((image + seed - rest) ** 2 / (image**2 / 6 + seed**2 / 2 + rest**2 / 12))


def test_wilson_equals_scipy_and_stays_inside() -> None:
    ends = stats.binomtest(97, 100).proportion_ci(method="wilson")
    assert interval(np.array([[1.0] * 97 + [0.0] * 3])) == (pytest.approx(ends.low), pytest.approx(ends.high))
    low, high = interval(np.full((3, 40), 100.0), top=100.0)
    assert high == 100 and 90 < low < 92
    assert wilson(0.5, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


@pytest.mark.parametrize(("seeds", "seed_effect"), [(1, 0.0), (3, 0.0), (3, 0.2)])
def test_interval_of_accuracy_covers(seeds: int, seed_effect: float) -> None:
    rng = np.random.default_rng(3)
    edge = stats.norm.ppf(0.9) * (2 + seed_effect**2) ** 0.5
    covered = 0
    for _ in range(600):
        noise = rng.normal(size=(1, 150)) + rng.normal(0, seed_effect, (seeds, 1)) + rng.normal(size=(seeds, 150))
        low, high = interval((noise < edge) * 100.0, top=100.0)
        covered += low <= 90 <= high
    assert 0.92 <= covered / 600 <= 0.985


def test_interval_of_one_image_is_unknown() -> None:
    assert all(np.isnan(interval(np.ones((3, 1)))))


def test_holm_corrects_in_any_order() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_compare_calls_ties_and_winners() -> None:
    rng = np.random.default_rng(4)
    right = rng.random((3, 300)) < 0.8
    samples = {
        "good": right * 100.0,
        "same": np.roll(right, 1, axis=0) * 100.0,
        "bad": (right & (rng.random((3, 300)) < 0.7)) * 100.0,
    }
    verdicts = {(pair.a, pair.b): pair.verdict for pair in compare(samples)}
    assert verdicts == {("good", "same"): "tie", ("good", "bad"): "good", ("same", "bad"): "same"}
    lower = {(pair.a, pair.b): pair.verdict for pair in compare(samples, "lower")}
    assert lower[("good", "bad")] == "bad"


def test_compare_repeats_a_contender_that_no_seed_changes() -> None:
    rng = np.random.default_rng(5)
    fixed, varying = rng.normal(size=(1, 60)), rng.normal(size=(3, 60))
    (pair,) = compare({"fixed": fixed, "varying": varying})
    assert pair.p == pytest.approx(paired(np.repeat(fixed, 3, 0), varying)[3]) and pair.seeds == 3


def test_equal_answers_are_a_tie_and_a_constant_gap_is_none() -> None:
    x = np.ones((2, 5))
    same, gap = compare({"a": x, "b": x})[0], compare({"a": x + 1, "b": x})[0]
    assert (same.p, same.verdict) == (1.0, "tie")
    assert (gap.p, gap.verdict) == (0.0, "a")


def test_compare_intervals_adds_both_errors() -> None:
    (pair,) = compare_intervals({"a": (10.0, Interval(8.04, 11.96)), "b": (7.0, Interval(5.04, 8.96))})
    assert not pair.paired and pair.p == pytest.approx(2 * stats.norm.sf(3 / 2**0.5), rel=1e-3)


def test_resampled_means_spread_as_the_standard_error() -> None:
    x = np.random.default_rng(6).normal(size=(1, 400))
    means = resampled_means([x, x + 1], draws=2000)
    assert means.std(0) == pytest.approx([x.std() / 20] * 2, rel=0.05)
    assert (means[:, 1] - means[:, 0]) == pytest.approx(np.ones(2000))
