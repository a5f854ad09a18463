import time

import numpy as np
import pytest
from torch import Tensor

from vertebra.contracts import Features
from vertebra.errors import UsageError
from vertebra.probes.speed import _report, measure, quantile, speed


def test_slower_network_is_slower_and_turns_are_interleaved(tiny) -> None:
    calls: list[str] = []

    class Watched(type(tiny)):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, images: Tensor) -> Features:
            calls.append(self.name)
            time.sleep(self.seconds)
            return super().forward(images)

    found = measure({"fast": Watched("fast", 0.0), "slow": Watched("slow", 0.004)}, rounds=4, repeats=3, batch=2)
    assert found["slow"].scores["p50_ms"].value > 4 > found["fast"].scores["p50_ms"].value
    assert found["slow"].scores["img_per_s"].value < 500 < found["fast"].scores["img_per_s"].value
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert turns.count("slow") >= 3 and turns.count("fast") >= 3  # neither runs all its rounds at once
    assert found["fast"].scores["p50_ms"].n == 12
    assert found["fast"].details["batch"] == 2


def test_quantiles_and_their_spread() -> None:
    steady = np.full((10, 10), 5.0) + np.linspace(0, 0.1, 10)
    report = _report(steady, 1 / steady[:, :1], {})
    assert report.scores["p50_ms"].value == pytest.approx(5.05) and not report.details["unstable"]
    assert report.scores["p90_ms"].value == pytest.approx(5.09, abs=0.01)
    drifting = steady + np.arange(10)[:, None]
    assert _report(drifting, 1 / drifting[:, :1], {}).details["unstable"]
    wide, narrow = (quantile(t, 0.5, "lower", "ms").interval for t in (drifting, steady))
    assert wide[1] - wide[0] > 2 > 0.1 > narrow[1] - narrow[0]


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="rounds is 0"):
        speed(rounds=0)
