"""`vertebra reproduce`: a page's effect beside its baseline, over seeds, and the evidence that it leaves.

An effect's cells are its arms times the seeds. Each runs in a process of its own, is stored at once, and is not run
again until the page's source or the data change. The evidence is one JSON file a page, one entry a scale and data.
"""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import numpy as np

from vertebra.contracts import Check, Effect, Measured
from vertebra.data import read
from vertebra.data.dataset import Dataset
from vertebra.data.pixels import available_cores
from vertebra.errors import Preempted, UsageError, VertebraError, near
from vertebra.paper import Page, entries, find_page, pages
from vertebra.training import rundir

Scale = Literal["toy", "gpu"]
LEVEL = 0.95


PREPARED = "prepared"
"""Stands in place of an arm for what the arms of a seed share."""


@dataclass(frozen=True)
class Cell:
    """One arm under one seed: all that a process needs to measure it."""

    page: str
    arm: str
    seed: int
    scale: Scale
    data: str | None
    folder: str


@dataclass(frozen=True)
class Done:
    """A measured cell, as it is stored.

    Attributes:
        values: metric -> value, and `seconds`.
        commit: of the sources that measured it, which a later command that finds it stored cannot know.
    """

    values: Mapping[str, float]
    commit: str | None


def with_effects() -> list[str]:
    """Ids of the pages that have an effect to reproduce, read from their sources."""
    return [page.name for page in pages() if page.paper and "\ndef effect(" in page.path.read_text(encoding="utf-8")]


def effect_of(page: Page, scale: Scale, data: Dataset | None) -> Effect:
    """The effect of a page.

    Raises:
        UsageError: it has none.
    """
    module = importlib.import_module(page.module)
    if not hasattr(module, "effect"):
        names = with_effects()
        raise UsageError(
            f"{page.name} has no effect to reproduce{near(page.name, names)}; these have: {', '.join(names)}"
        )
    return module.effect(scale, data)


def reproduce(
    paper_id: str,
    *,
    scale: Scale = "toy",
    seeds: int = 3,
    data: str | None = None,
    jobs: int | None = None,
    runs: Path = Path("runs"),
    out: Path | None = Path("evidence"),
    fresh: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the effect of a page and write its evidence.

    Args:
        paper_id: the page.
        scale: "toy" takes about ten minutes on two cores; "gpu" needs one.
        seeds: 0 to this number, at least 2: no spread, no evidence.
        data: a dataset as `vertebra.data.read` takes it; None takes the page's own choice of built-in data.
        jobs: cells at a time; None takes one a core, or one on a GPU.
        runs: where cells are kept, in `reproduce/ID/`.
        out: folder of the evidence; None writes none.
        fresh: measure again what is stored.
        tell: is told of each cell.

    Returns:
        The entry that was written; its `seconds` are those of all cells together.

    Raises:
        UsageError: no such page, no effect, a GPU scale without a GPU, or too few seeds.
        VertebraError: a cell failed; the others are kept.
        Preempted: SIGTERM; likewise.
    """
    page = find_page(paper_id)
    _check(scale, seeds, jobs)
    dataset = _read(data)
    effect = effect_of(page, scale, dataset)
    folder = runs / "reproduce" / page.name / f"{scale}-{_key(page, dataset)}"

    def cells(arms: Iterable[str]) -> list[Cell]:
        where = [(arm, seed) for seed in range(seeds) for arm in arms]
        return [Cell(page.name, arm, seed, scale, data, str(folder / f"{arm}-{seed}")) for arm, seed in where]

    jobs = jobs or (1 if scale == "gpu" else available_cores())
    with _stoppable():
        shared = dict(_measured(cells([PREPARED]), jobs, fresh, tell)) if effect.prepare else {}
        found = dict(_measured(cells(effect.arms), jobs, fresh, tell))
    cells_done = [*shared.values(), *found.values()]
    names = [*effect.metrics, "seconds"]
    values = {
        arm: {name: np.array([found[arm, seed].values.get(name, math.nan) for seed in range(seeds)]) for name in names}
        for arm in effect.arms
    }
    entry = {
        "id": page.name,
        "scale": scale,
        "command": _command(paper_id, scale, seeds, data),
        "claim": effect.claim,
        "data": {"what": effect.data, "fingerprint": dataset.fingerprint if dataset else None},
        "seeds": seeds,
        "jobs": jobs,
        "seconds": round(sum(done.values["seconds"] for done in cells_done), 1),
        "prepared_seconds": [done.values["seconds"] for done in shared.values()],
        **_summary(effect, Measured(values)),
        **rundir.surroundings(),
        "commit": ", ".join(sorted({done.commit or "unknown" for done in cells_done})),
    }
    if out is not None:
        _write(out / f"{page.name}.json", entry)
    return entry


def _read(data: str | None) -> Dataset | None:
    """The user's data under its name alone: evidence says nothing of where it lies."""
    return replace(read(data), path=Path(data).name) if data else None


def _check(scale: str, seeds: int, jobs: int | None) -> None:
    if scale not in ("toy", "gpu"):
        raise UsageError(f"scale is {scale!r}; it can be toy or gpu")
    if seeds < 2:
        raise UsageError(f"seeds is {seeds}; a spread needs at least 2")
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}; it must be at least 1")
    if scale == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--scale gpu needs a CUDA device and this machine has none; leave it out for --scale toy")


def _key(page: Page, dataset: Dataset | None) -> str:
    """Changes with the page's source and the data."""
    files = sorted(page.path.parent.rglob("*.py")) if page.path.name == "__init__.py" else [page.path]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    digest.update((dataset.fingerprint if dataset else "").encode())
    return digest.hexdigest()[:8]


def _measured(
    cells: Sequence[Cell], jobs: int, fresh: bool, tell: Callable[[str], None]
) -> Iterator[tuple[tuple[str, int], "Done"]]:
    """(arm, seed) -> what was found, of stored cells first."""
    missing = []
    for cell in cells:
        file = Path(cell.folder) / "cell.json"
        if fresh or not file.is_file():
            missing.append(cell)
        else:
            yield (cell.arm, cell.seed), Done(**json.loads(file.read_text(encoding="utf-8")))
    if not missing:
        return
    jobs = min(jobs, len(missing))
    threads = max(1, available_cores() // jobs)
    context = multiprocessing.get_context("spawn")  # a forked torch with threads of its own hangs
    with ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=(threads,)) as pool:
        futures = {pool.submit(_run, cell): cell for cell in missing}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                cell = futures[future]
                found = future.result()
                tell(f"{done}/{len(missing)} {cell.arm}, seed {cell.seed}: {_words(found.values)}")
                yield (cell.arm, cell.seed), found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # cells are written whole or not at all, so nothing is lost but the ones under way
            raise


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the command as an error does, so that no worker goes on alone; resumes with the kept cells."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise Preempted("SIGTERM: the cells that are done are kept; run the same command to go on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepare(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _run(cell: Cell) -> Done:
    """Measure a cell in this process and store it."""
    folder = Path(cell.folder)
    folder.mkdir(parents=True, exist_ok=True)
    effect = effect_of(find_page(cell.page), cell.scale, _read(cell.data))
    started = time.monotonic()
    try:
        values = _measure(effect, cell, folder)
    except Exception as error:
        raise VertebraError(
            f"{cell.page}, arm {cell.arm}, seed {cell.seed}: {type(error).__name__}: {error}"
        ) from error
    values["seconds"] = round(time.monotonic() - started, 2)
    done = Done(values, rundir.surroundings()["commit"])
    rundir.write_json(folder / "cell.json", asdict(done))
    return done


def _measure(effect: Effect, cell: Cell, folder: Path) -> dict[str, float]:
    if cell.arm != PREPARED:
        return dict(effect.measure(cell.arm, cell.seed, folder))
    assert effect.prepare
    effect.prepare(cell.seed, folder)
    return {}


def _words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _summary(effect: Effect, measured: Measured) -> dict[str, Any]:
    """Means, spreads, differences from the baseline, checks and the verdict."""
    arms = {}
    for arm, metrics in measured.values.items():
        arms[arm] = {"what": effect.arms[arm], "metrics": {}}
        for name, values in metrics.items():
            if not np.isfinite(values).all():
                continue
            row = {
                "mean": float(values.mean()),
                "sd": float(values.std(ddof=1)),
                "values": [round(float(value), 6) for value in values],
            }
            if arm != effect.baseline and name != "seconds":
                gain = measured.gain(arm, effect.baseline, name)
                if np.isfinite(gain).all():
                    row["gain"] = float(gain.mean())
                    row["gain_ci95"] = list(_interval(gain))
            arms[arm]["metrics"][name] = row
    checks = list(effect.checks(measured))
    return {
        "baseline": effect.baseline,
        "metrics": dict(effect.metrics),
        "arms": arms,
        "checks": [asdict(check) for check in checks],
        "verdict": verdict(checks),
        "limits": effect.limits,
    }


def _interval(gain: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by Student's t over the seeds."""
    from scipy import stats

    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(gain) - 1) * gain.std(ddof=1) / math.sqrt(len(gain)))
    return float(gain.mean()) - half, float(gain.mean()) + half


def verdict(checks: Sequence[Check]) -> str:
    """How many of the checks hold, in words; whether a difference is beyond chance is what its interval says."""
    held = sum(check.holds for check in checks)
    if held == len(checks):
        return f"all {held} checks hold"
    return f"{held or 'none'} of {len(checks)} checks hold{'s' * (held < 2)}"


def _command(paper_id: str, scale: str, seeds: int, data: str | None) -> str:
    """The command that makes this evidence; of the data's path only the name, as the rest is this machine's."""
    words = ["vertebra", "reproduce", paper_id, "--scale", scale, "--seeds", str(seeds)]
    return shlex.join([*words, *(["--data", Path(data).name] if data else [])])


def _write(path: Path, entry: Mapping[str, Any]) -> None:
    """Replace the entry of the same scale and data, or add it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    same = (entry["scale"], entry["data"]["what"])
    others = [old for old in entries(path) if (old["scale"], old["data"]["what"]) != same]
    rundir.write_json(path, {"evidence": [*others, entry]})
