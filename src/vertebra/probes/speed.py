"""Latency of one image and throughput of a batch on this machine: eager, 32 bit, features only.

Contenders are timed in rounds, each round every contender in a new order, so that a machine that slows down slows all
of them. Intervals resample rounds, not single timings, which resemble their neighbours. Where the rounds of a
contender differ much the report says `unstable`.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report, Score, Work
from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence

VARIANTS: dict[str, dict[str, object]] = {}
UNSTABLE = 0.1
"""Interquartile range of the rounds' medians, as a share of the median, above which a timing is unstable."""
RESAMPLES = 500


def speed(*, rounds: int = 10, repeats: int = 10, batch: int = 16) -> "Speed":
    """The probe.

    Args:
        rounds: times that a contender gets its turn.
        repeats: single images timed a turn.
        batch: images of the batch timed a turn.

    Raises:
        UsageError: a value below 1.
    """
    return Speed(rounds=rounds, repeats=repeats, batch=batch)


class Speed(Probe):
    """Times one contender; a battle calls `measure` to time all of them in turn."""

    timed = True

    def __init__(self, *, rounds: int, repeats: int, batch: int) -> None:
        for name, value in (("rounds", rounds), ("repeats", repeats), ("batch", batch)):
            if value < 1:
                raise UsageError(f"speed: {name} is {value}; it must be at least 1")
        self.options = {"rounds": rounds, "repeats": repeats, "batch": batch}

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        # an image alone takes a few times its share of a batch; building the network and warming up take the rest
        images_a_round = 4 * self.options["repeats"] + self.options["batch"]
        return Work(forward=self.options["rounds"] * images_a_round, seconds=2.0)

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        return measure({"it": model}, device=data.device, **self.options)["it"]


def measure(
    models: Mapping[str, Backbone],
    *,
    rounds: int = 10,
    repeats: int = 10,
    batch: int = 16,
    device: str | torch.device = "cpu",
) -> dict[str, Report]:
    """Time backbones in turn, each at its own image size.

    Args:
        models: name -> backbone; they are put in evaluation mode on `device`.
        rounds: turns each.
        repeats: single images timed a turn.
        batch: images of the batch timed a turn.
        device: where to run.

    Returns:
        Name -> report with `p50_ms`, `p90_ms` and `img_per_s`.
    """
    singles, batches = {}, {}
    for name, model in models.items():
        model.eval().to(device)
        singles[name], batches[name] = (_images(model, count, device) for count in (1, batch))
        for images in (singles[name], singles[name], batches[name]):  # warm-up
            _seconds(model, images)
    one = {name: np.empty((rounds, repeats)) for name in models}
    many = {name: np.empty((rounds, 1)) for name in models}
    rng = np.random.default_rng(0)
    for turn in range(rounds):
        for name in rng.permutation(list(models)):
            _seconds(models[name], singles[name])  # the caches are the last contender's
            one[name][turn] = [_seconds(models[name], singles[name]) for _ in range(repeats)]
            many[name][turn] = _seconds(models[name], batches[name])
    facts = {"batch": batch, "threads": torch.get_num_threads(), "device": str(device)}
    return {name: _report(1000 * one[name], batch / many[name], facts) for name in models}


def _images(model: Backbone, count: int, device: str | torch.device) -> Tensor:
    shape = (count, model.preprocess.channels, *model.preprocess.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _seconds(model: Backbone, images: Tensor) -> float:
    """One forward pass, until its result is there."""
    with torch.inference_mode():
        _wait(images.device)
        start = time.perf_counter()
        model(images)
        _wait(images.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _report(milliseconds: np.ndarray, rates: np.ndarray, facts: Mapping[str, Any]) -> Report:
    """Scores of timings (rounds, repeats) and (rounds, 1)."""
    low, middle, high = np.quantile(np.median(milliseconds, axis=1), (0.25, 0.5, 0.75))
    spread = float((high - low) / middle)
    scores = {
        "p50_ms": quantile(milliseconds, 0.5, "lower", "ms"),
        "p90_ms": quantile(milliseconds, 0.9, "lower", "ms"),
        "img_per_s": quantile(rates, 0.5, "higher", "img/s"),
    }
    return Report(scores, {**facts, "spread": round(spread, 4), "unstable": spread > UNSTABLE})


def quantile(timings: np.ndarray, share: float, better: Any, unit: str) -> Score:
    """A quantile of timings (rounds, repeats), with a bootstrap over the rounds."""
    rounds = len(timings)
    drawn = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
    found = np.quantile(timings[drawn].reshape(RESAMPLES, -1), share, axis=1)
    low, high = np.quantile(found, (0.025, 0.975))
    return Score(float(np.quantile(timings, share)), timings.size, better, unit, interval=(float(low), float(high)))
