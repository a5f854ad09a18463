"""What fits into the time: seconds of every cell from a short calibration, and what has to be left out.

Estimates are made of forward passes, which `contenders.inspect` times. They need to be right within a factor of two
only: each job and each cell looks at the clock again before it starts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vertebra.battle.cells import Cell
from vertebra.battle.contenders import Facts
from vertebra.contracts import Probe, Work

TRAINING_SHARE = 0.5
"""Of the budget, at most, for training contenders from scratch."""

USABLE = 0.9
"""Of the workers' time: the rest goes into starting, decoding and the report."""


@dataclass(frozen=True)
class Sizes:
    """How much data there is: images of each split, and classes."""

    images: Mapping[str, int]
    classes: int

    @property
    def total(self) -> int:
        """Images of all splits."""
        return sum(self.images.values())


@dataclass(frozen=True)
class Estimates:
    """Seconds on one worker.

    Attributes:
        shared: (contender, seed) -> what its first cell costs beside itself: training and features.
        cells: cell -> its own seconds.
    """

    shared: Mapping[tuple[str, int], float]
    cells: Mapping[Cell, float]

    @property
    def total(self) -> float:
        """Seconds of everything, on one worker."""
        return sum(self.shared.values()) + sum(self.cells.values())


@dataclass(frozen=True)
class Allotment:
    """What is run and what is not.

    Attributes:
        planned: cells in order of their value.
        left_out: cell -> why.
        seconds: estimate of everything planned, on one worker.
    """

    planned: tuple[Cell, ...]
    left_out: Mapping[Cell, str]
    seconds: float


def by_value(cells: Iterable[Cell], probes: Sequence[str], primary: str, timed: Sequence[str]) -> list[Cell]:
    """The first seed before the second; within a seed the probe that decides, then those that are timed.

    Args:
        cells: all of them.
        probes: names in the user's order.
        primary: the probe of the primary score.
        timed: probes that measure time: constraints and ties look at them.
    """
    rank = {name: (name != primary, name not in timed, i) for i, name in enumerate(probes)}
    order = list(cells)
    seeds = sorted({cell.seed for cell in order})
    return sorted(order, key=lambda cell: (seeds.index(cell.seed), rank[cell.probe]))


def epochs_within(
    budget: float | None,
    planned: int,
    least: int,
    contenders: Mapping[str, Facts],
    seeds: int,
    sizes: Sizes,
    workers: int,
) -> int:
    """Epochs of training from scratch that the budget allows, the same for all contenders.

    Args:
        budget: seconds for the battle, or None.
        planned: epochs of the recipe.
        least: below this training is not worth its time; then cells are left out instead.
        contenders: those that train from scratch.
        seeds: trainings of each.
        sizes: of the data.
        workers: that share the trainings.
    """
    epoch = sum(_epoch(facts, sizes) for facts in contenders.values()) * seeds / workers
    if budget is None or epoch == 0:
        return planned
    return max(least, min(planned, int(budget * TRAINING_SHARE / epoch)))


def estimates(
    cells: Iterable[Cell],
    facts: Mapping[str, Facts],
    sizes: Sizes,
    epochs: int,
    probes: Mapping[str, Probe],
) -> Estimates:
    """Seconds of every cell.

    Args:
        cells: all of them.
        facts: contender -> what is known of it.
        sizes: of the data.
        epochs: of training from scratch.
        probes: name -> probe, which knows its own work.
    """
    cells = list(cells)
    shared = {(cell.contender, cell.seed): _shared(facts[cell.contender], sizes, epochs) for cell in cells}
    works = {name: probe.work(sizes.images, sizes.classes) for name, probe in probes.items()}
    own = {cell: _own(facts[cell.contender], works[cell.probe]) for cell in cells}
    return Estimates(shared, own)


def _shared(facts: Facts, sizes: Sizes, epochs: int) -> float:
    features = facts.forward * sizes.total
    if facts.training == "pretrained":
        return features
    return features + epochs * _epoch(facts, sizes)


def _epoch(facts: Facts, sizes: Sizes) -> float:
    """Seconds of one epoch of training from scratch."""
    return facts.step * sizes.images["train"]


def _own(facts: Facts, work: Work) -> float:
    return facts.forward * work.forward + facts.step * work.trained + work.seconds


def allot(
    ordered: Sequence[Cell], found: Estimates, seconds: float | None, workers: int, timed: Sequence[str]
) -> Allotment:
    """Plan cells by value until the time is full; a smaller cell may still fit after a larger one did not.

    Args:
        ordered: cells by value.
        found: their seconds.
        seconds: that are left of the budget, or None.
        workers: that share the cells; timed probes run alone.
        timed: their names.
    """
    free = float("inf") if seconds is None else seconds * workers * USABLE
    opened: set[tuple[str, int]] = set()
    planned, left_out, total = [], {}, 0.0
    for cell in ordered:
        group = (cell.contender, cell.seed)
        if cell.probe in timed:
            price, load = found.cells[cell], found.cells[cell] * workers  # everyone else waits
        else:
            price = load = found.cells[cell] + (0.0 if group in opened else found.shared[group])
        if load > free:
            left_out[cell] = f"estimated {price:.0f} s; {max(0.0, free / workers):.0f} s of the budget were left for it"
            continue
        if cell.probe not in timed:
            opened.add(group)
        free -= load
        total += load
        planned.append(cell)
    return Allotment(tuple(planned), left_out, total)
