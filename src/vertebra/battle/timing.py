"""The probes that measure time: last, alone, in the battle's own process, all contenders in turn."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from vertebra.battle.cells import Cell, Row
from vertebra.battle.jobs import Job, device, left_out, reason, work
from vertebra.contracts import Backbone
from vertebra.probes.speed import Speed, measure
from vertebra.training.loop import random_states_kept


def timed_rows(jobs: Iterable[Job]) -> Iterator[Row]:
    """Rows of timed probes. Weights do not change what a network costs, so that nobody is trained for it."""
    jobs = [replace(job, training="pretrained") for job in jobs]
    for name in dict.fromkeys(cell.probe for job in jobs for cell in job.cells):
        probe = next(job.probes[name] for job in jobs).build()
        turns = [(job, cell) for job in jobs for cell in job.cells if cell.probe == name]
        if isinstance(probe, Speed):
            yield from _interleaved(probe, turns)
        else:
            for job, cell in turns:
                yield from work(replace(job, cells=(cell,)))


def _interleaved(probe: Speed, turns: list[tuple[Job, Cell]]) -> Iterator[Row]:
    """All contenders timed together, so that a machine that slows down slows all of them."""
    started, models = time.perf_counter(), dict[Cell, Backbone]()
    for job, cell in turns:
        if job.deadline is not None and time.time() > job.deadline:
            yield left_out(cell)
            continue
        try:
            with random_states_kept():
                models[cell] = job.contender.spec.build()
        except Exception as error:  # it fails alone, the others are timed
            yield Row(cell, "failed", error=reason(error))
    if models:
        reports = measure({cell.key: model for cell, model in models.items()}, device=device(), **probe.options)
        share = (time.perf_counter() - started) / len(models)
        yield from (Row(cell, "done", share, reports[cell.key]) for cell in models)
