import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vertebra.battle.cells import Cell, Row
from vertebra.battle.pools import Ended, Here, Pool, Processes, RayCluster, Started
from vertebra.contracts import Report
from vertebra.errors import UsageError


@dataclass(frozen=True)
class Errand:
    """Cells of one contender; `fate` is what happens to its worker at the second."""

    contender: str
    fate: str = ""
    cells: tuple[Cell, ...] = ()

    @classmethod
    def of(cls, contender: str, fate: str = "") -> "Errand":
        return cls(contender, fate, tuple(Cell(contender, probe, 0) for probe in ("knn", "linear")))


def do(errand: Errand) -> Iterator[Row]:
    for number, cell in enumerate(errand.cells):
        if number and errand.fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        yield Row(cell, "done", report=Report({}, {"process": os.getpid()}))


def outcome(pool: Pool, errands: list[Errand]) -> tuple[dict[str, int], dict[str, str | None], set[int]]:
    """Rows a contender, how each job ended, and the processes that worked."""
    rows: dict[str, int] = {}
    ends: dict[str, str | None] = {}
    processes = set()
    for event in pool.run(iter(errands), do):
        if isinstance(event, Row):
            rows[event.cell.contender] = rows.get(event.cell.contender, 0) + 1
            processes.add(event.report.details["process"])
        elif isinstance(event, Ended):
            ends[event.job.contender] = event.error
        else:
            assert isinstance(event, Started)
    return rows, ends, processes


def test_here_runs_in_this_process() -> None:
    rows, ends, processes = outcome(Here(), [Errand.of("a"), Errand.of("b")])
    assert rows == {"a": 2, "b": 2} and ends == {"a": None, "b": None} and processes == {os.getpid()}


def test_a_killed_worker_costs_its_job_alone() -> None:
    errands = [Errand.of("a", "killed"), Errand.of("b"), Errand.of("c")]
    rows, ends, processes = outcome(Processes(1), errands)
    assert rows == {"a": 1, "b": 2, "c": 2} and os.getpid() not in processes and len(processes) == 2
    assert "killed, as Linux does when memory runs out" in str(ends["a"]) and ends["b"] is ends["c"] is None


def test_jobs_are_taken_by_free_workers_who_leave_with_the_battle() -> None:
    taken: list[str] = []

    def errands() -> Iterator[Errand]:
        for name in "abc":
            taken.append(name)
            yield Errand.of(name)

    events = Processes(1).run(errands(), do)
    process = next(event for event in events if isinstance(event, Row)).report.details["process"]
    assert taken == ["a"]
    events.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_ray_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'vertebra\[ray\]'"):
        RayCluster("auto")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_runs_jobs_on_two_workers() -> None:
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    paths = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, runtime_env=paths)
    try:
        cluster = RayCluster("auto")
        errands = [Errand.of("a"), Errand.of("b", "killed"), Errand.of("c")]
        rows, ends, processes = outcome(cluster, errands)
        assert cluster.workers == 2 and rows["a"] == rows["c"] == 2 and os.getpid() not in processes
        assert ends["a"] is ends["c"] is None and ends["b"]
    finally:
        ray.shutdown()
