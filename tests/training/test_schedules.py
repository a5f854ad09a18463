import math

import pytest

from vertebra.config import Plan
from vertebra.contracts import Progress
from vertebra.training.schedules import rate, warmup_steps


def _rates(plan: Plan, steps: int, warmup: int) -> list[float]:
    return [rate(Progress(step, steps, 0, 1), plan, warmup) for step in range(steps)]


def test_cosine_with_warmup_point_by_point() -> None:
    rates = _rates(Plan(lr=2.0, schedule="cosine", min_lr=0.1), 10, 4)
    rise = [0.5, 1.0, 1.5, 2.0]
    fall = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6))) for k in range(6)]
    assert rates == pytest.approx([*rise, *fall], abs=1e-12)


def test_linear_ends_at_its_floor() -> None:
    plan = Plan(lr=1.0, schedule="linear", min_lr=0.2)
    assert _rates(plan, 4, 0) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rate(Progress(4, 4, 0, 1), plan, 0) == pytest.approx(0.2)


def test_step_falls_by_ten_after_each_third_and_no_lower_than_min_lr() -> None:
    assert _rates(Plan(lr=1.0, schedule="step"), 6, 0) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert _rates(Plan(lr=1.0, schedule="step", min_lr=0.05), 6, 0)[-1] == pytest.approx(0.05)


def test_constant_is_constant() -> None:
    assert _rates(Plan(lr=0.3, schedule="constant"), 5, 0) == [0.3] * 5


def test_warmup_takes_at_most_half_of_a_short_run() -> None:
    assert warmup_steps(Plan(warmup_epochs=1.5), 10, 100) == 15
    assert warmup_steps(Plan(warmup_epochs=5), 10, 20) == 10
    assert warmup_steps(Plan(warmup_epochs=0), 10, 20) == 0
