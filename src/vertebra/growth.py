"""How time and memory of a computation grow with what it is given: what effects about cost share.

No page: an `effect` times its arms at some sizes with `seconds` and `peak`, and fits `exponent` or finds `crossing`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], object]


def seconds(runs: Sequence[Run], turns: int = 7) -> list[float]:
    """Of each computation without gradients, the median of some turns that they take in order.

    One turn before them is not counted.
    """
    found: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for _ in range(turns + 1):
            for run, each in zip(runs, found, strict=True):
                begin = time.perf_counter()
                run()
                each.append(time.perf_counter() - begin)
    return [median(each[1:]) for each in found]


def peak(run: Run, known: Iterable[Tensor]) -> float:
    """Bytes of the tensors that are alive at once in a computation without gradients, beside those that are `known`."""
    from vertebra.probes.memory import Alive

    with torch.no_grad(), Alive(known) as alive:
        run()
    return float(alive.most)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of the power law that fits best, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def crossing(sizes: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Size from which on ours stays below theirs, between the measured ones by power laws; NaN where it never is."""
    gaps = np.log(ours) - np.log(theirs)
    above = np.flatnonzero(gaps >= 0)
    if not len(above):
        return float(sizes[0])
    last = int(above[-1])
    if last == len(gaps) - 1:
        return float("nan")
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    return float(sizes[last] * (sizes[last + 1] / sizes[last]) ** share)
