"""What may be said of scores: intervals, paired comparisons, corrections, ties.

A score comes as samples x[s, i], seeds by images. Both are drawn from larger populations (other trainings,
other images), so they are two crossed random effects, as readers and cases are in the analysis of diagnostic
imaging (Dorfman, Berbaum and Metz 1992; Hillis 2007):

    x[s, i] = mean + image_i + seed_s + rest_si
    MS_image = S * var(mean over seeds),  MS_seed = n * var(mean over images),  MS_rest = the remaining mean square
    var(mean) = (MS_image + max(MS_seed - MS_rest, 0)) / (n S)
    freedom   = (MS_image + MS_seed - MS_rest)^2
                / (MS_image^2 / (n - 1) + MS_seed^2 / (S - 1) + MS_rest^2 / ((n - 1) (S - 1)))      Satterthwaite

A mean then has a t interval, and two contenders are compared by the same formulas on the differences of their
samples. Where the estimate of the seeds' variance is not positive the term and its freedom are dropped. With
one seed the formulas become the one-sample (or paired) t test over images, which says nothing about another
training; `Comparison.seeds` tells.

Arrays may have leading dimensions: everything is computed for all pairs at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Coverage of every interval; a comparison is a tie where p after Holm is not below 1 - LEVEL."""


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Mean(NamedTuple):
    """Mean of crossed samples and what is known of its error; each (...)."""

    value: np.ndarray
    variance: np.ndarray
    freedom: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """One pair of contenders on one score.

    Attributes:
        a: first contender.
        b: second contender.
        difference: score of `a` minus score of `b`.
        low: lower end of the difference's 95 % interval, not corrected for the number of pairs.
        high: upper end.
        p: two-sided p value of "no difference".
        p_holm: p after Holm's correction over all pairs of the score.
        verdict: "tie", or the name of the contender that is better.
        seeds: seeds behind it; 1 means that seed variation is not included.
        paired: whether the same images were compared; otherwise the two intervals were taken as independent.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    verdict: str
    seeds: int
    paired: bool


def crossed(samples: np.ndarray) -> Mean:
    """Mean over seeds and images, both random.

    Args:
        samples: (..., S, n) with n >= 2.
    """
    seeds, images = samples.shape[-2:]
    over_seeds, over_images = samples.mean(-2), samples.mean(-1)  # (..., n), (..., S)
    mean = over_images.mean(-1)
    ms_image = seeds * over_seeds.var(-1, ddof=1)
    if seeds == 1:
        return Mean(mean, ms_image / images, np.full(mean.shape, images - 1.0))
    ms_seed = images * over_images.var(-1, ddof=1)
    rest = samples - over_seeds[..., None, :] - over_images[..., :, None] + mean[..., None, None]
    ms_rest = np.square(rest).sum((-2, -1)) / ((seeds - 1) * (images - 1))
    excess = ms_seed - ms_rest
    spread = np.square(ms_image) / (images - 1)
    spread_seeds = np.square(ms_seed) / (seeds - 1) + np.square(ms_rest) / ((seeds - 1) * (images - 1))
    total = ms_image + np.maximum(excess, 0)
    spread = np.where(excess > 0, spread + spread_seeds, spread)
    freedom = np.divide(np.square(total), spread, out=np.full(mean.shape, images - 1.0), where=spread > 0)
    return Mean(mean, total / (seeds * images), freedom)


def wilson(share: float, n: float, quantile: float | None = None) -> Interval:
    """Wilson's score interval of a share.

    Args:
        share: 0..1.
        n: trials; an effective number where trials are not independent.
        quantile: of the normal (the default) or of a t distribution.
    """
    z = stats.norm.ppf(0.5 + LEVEL / 2) if quantile is None else quantile
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, float(centre - half)), min(1.0, float(centre + half)))  # but for rounding


def interval(samples: np.ndarray, top: float = 1.0) -> Interval:
    """95 % interval of the mean of samples.

    Samples that are all 0 or `top` are a share: Wilson's interval, for several seeds with the effective number
    n' = share (1 - share) / var(mean) and the t quantile (as surveys do, Korn and Graubard 1998), which stays
    within 0..top. Other samples have a t interval.

    Args:
        samples: (S, n).
        top: what a right answer counts: 1, or 100 where scores are in percent.

    Returns:
        (nan, nan) where there are fewer than two images.
    """
    if samples.shape[-1] < 2:
        return Interval(float("nan"), float("nan"))
    value, variance, freedom = (float(x) for x in crossed(samples))
    quantile = float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
    if not np.isin(samples, (0, top)).all():
        half = quantile * variance**0.5
        return Interval(value - half, value + half)
    seeds, n = samples.shape
    share = value / top
    if seeds == 1 or variance == 0:
        low, high = wilson(share, n)
    else:
        low, high = wilson(share, share * (1 - share) * top**2 / variance, quantile)
    return Interval(low * top, high * top)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p values (m,), in their order."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compare samples of the same images.

    Args:
        a: (..., S, n).
        b: (..., S, n).

    Returns:
        Difference of the means, ends of its 95 % interval, and the two-sided p value, each (...).
    """
    return _t_test(*crossed(a - b))


def _t_test(
    difference: np.ndarray, variance: np.ndarray, freedom: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    error = np.sqrt(variance)
    half = stats.t.ppf(0.5 + LEVEL / 2, freedom) * error
    certain = np.where(difference == 0, 1.0, 0.0)  # no variance at all: the same answers, or a constant gap
    ratio = np.divide(np.abs(difference), error, out=np.zeros_like(error), where=error > 0)
    p = np.where(error > 0, 2 * stats.t.sf(ratio, freedom), certain)
    return difference, difference - half, difference + half, p


def compare(samples: Mapping[str, np.ndarray], better: str = "higher") -> list[Comparison]:
    """Compare every pair of contenders on the same images.

    Args:
        samples: name -> (S, n); the same n for all. A contender whose result does not depend on the seed has
            S = 1 and is repeated against those that have more.
        better: which way is good, "higher" or "lower".
    """
    names = list(samples)
    if len(names) < 2:
        return []
    seeds = max(len(rows) for rows in samples.values())
    table = np.stack([_spread_over(samples[name].astype(np.float64), seeds) for name in names])  # (K, S, n)
    pairs = list(combinations(range(len(names)), 2))
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    found = paired(table[first], table[second])
    behind = [min(seeds, max(len(samples[names[i]]), len(samples[names[j]]))) for i, j in pairs]
    return _judge(names, pairs, found, better, behind, is_paired=True)


def compare_intervals(
    scores: Mapping[str, tuple[float, Interval]], better: str = "higher", seeds: int = 1
) -> list[Comparison]:
    """Compare every pair of contenders on a score that is no mean of images, from values and intervals.

    The two errors are taken as normal and independent; scores on the same images are positively correlated, so
    this test is cautious.
    """
    names = list(scores)
    if len(names) < 2:
        return []
    pairs = list(combinations(range(len(names)), 2))
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    values = np.array([scores[name][0] for name in names])
    z = stats.norm.ppf(0.5 + LEVEL / 2)
    error = np.array([(high - low) / (2 * z) for _, (low, high) in scores.values()])
    variance = np.square(error[first]) + np.square(error[second])
    found = _t_test(values[first] - values[second], variance, np.full(len(pairs), 1e9))
    return _judge(names, pairs, found, better, [seeds] * len(pairs), is_paired=False)


def _spread_over(rows: np.ndarray, seeds: int) -> np.ndarray:
    """(1, n) repeated to (seeds, n); (S, n) with fewer seeds than the others is an error of the caller."""
    assert len(rows) in (1, seeds), f"{len(rows)} seeds cannot be compared with {seeds}"
    return np.broadcast_to(rows, (seeds, rows.shape[1]))


def _judge(
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    found: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    better: str,
    seeds: Sequence[int],
    *,
    is_paired: bool,
) -> list[Comparison]:
    difference, low, high, p = found
    corrected = holm(p)
    judged = []
    for row, (i, j) in enumerate(pairs):
        winner = names[i] if (difference[row] > 0) == (better == "higher") else names[j]
        judged.append(
            Comparison(
                a=names[i],
                b=names[j],
                difference=float(difference[row]),
                low=float(low[row]),
                high=float(high[row]),
                p=float(p[row]),
                p_holm=float(corrected[row]),
                verdict=winner if corrected[row] < 1 - LEVEL else "tie",
                seeds=seeds[row],
                paired=is_paired,
            )
        )
    return judged


def resampled_means(samples: Sequence[np.ndarray], draws: int, seed: int = 0) -> np.ndarray:
    """Means over resampled seeds and images: the draws of a percentile bootstrap, for what has no closed form.

    All contenders see the same resampled images, as they saw the same images.

    Args:
        samples: (S, n) a contender; S may differ, n may not.
        draws: resamples.
        seed: of the draws.

    Returns:
        (draws, contenders).
    """
    rng = np.random.default_rng(seed)
    n = samples[0].shape[1]
    images = rng.multinomial(n, np.full(n, 1 / n), size=draws).T / n  # (n, draws)
    means = []
    for rows in samples:
        seeds = len(rows)
        share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).T / seeds  # (S, draws)
        means.append(((rows @ images) * share).sum(0))
    return np.stack(means, axis=1)
