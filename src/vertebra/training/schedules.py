"""Learning rates as pure functions of where training stands: nothing to save, nothing to resume."""

import math

from vertebra.config import Plan
from vertebra.contracts import Progress
from vertebra.errors import UsageError, near

MOST_WARMUP = 0.5
"""Share of the run that the warm-up may take, so that short runs still train at the full rate."""


def cosine(fraction: float) -> float:
    """Half a cosine from 1 to 0 (SGDR without restarts, arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


def linear(fraction: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - fraction


def step(fraction: float) -> float:
    """A tenth after each third."""
    return 0.1 ** min(2, int(3 * fraction))


def constant(fraction: float) -> float:
    """Always 1."""
    return 1.0


SHAPES = {"cosine": cosine, "linear": linear, "step": step, "constant": constant}


def warmup_steps(plan: Plan, steps_per_epoch: int, steps: int) -> int:
    """Optimiser steps of the linear rise: what the plan asks for, at most half of the run."""
    return min(round(plan.warmup_epochs * steps_per_epoch), int(MOST_WARMUP * steps))


def rate(progress: Progress, plan: Plan, warmup: int) -> float:
    """Learning rate of the step that comes next.

    The first step of a warm-up has `lr / warmup`, its last one `lr`; the shape starts at `lr` on the step
    after and never falls below `lr * min_lr`.

    Args:
        progress: where training stands; `step` counts the steps done.
        plan: gives `lr`, `schedule` and `min_lr`.
        warmup: steps of the linear rise.

    Raises:
        UsageError: an unknown schedule.
    """
    if plan.schedule not in SHAPES:
        raise UsageError(
            f"no schedule is called {plan.schedule!r}{near(plan.schedule, SHAPES)}; there are {', '.join(SHAPES)}"
        )
    if progress.step < warmup:
        return plan.lr * (progress.step + 1) / warmup
    fraction = min(1.0, (progress.step - warmup) / max(1, progress.steps - warmup))
    if plan.schedule in ("cosine", "linear"):
        return plan.lr * (plan.min_lr + (1 - plan.min_lr) * SHAPES[plan.schedule](fraction))
    return plan.lr * max(plan.min_lr, SHAPES[plan.schedule](fraction))
