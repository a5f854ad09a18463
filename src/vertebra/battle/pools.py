"""Where jobs run: in this process, in a few spawned ones, or on a Ray cluster.

A pool takes jobs one by one from an iterator, so that whoever makes them may stop at a deadline, and yields what
happens as it happens. `work(job)` is a generator of rows that lives in an importable module. Nothing here imports
torch before a worker has set its threads.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from vertebra.battle.cells import Cell, Row
from vertebra.errors import Preempted, UsageError, VertebraError

READY, ENDED, LEAVE = "ready", "ended", "leave"


class Job(Protocol):
    """Cells that share one trained contender and its features, in the order in which they run."""

    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Started:
    """A job was handed to a worker."""

    job: Any


@dataclass(frozen=True)
class Ended:
    """A job is over; `error` says why where its worker was lost with it."""

    job: Any
    error: str | None = None


Event = Started | Ended | Row
Work = Callable[[Any], Iterator[Row]]


class Pool(Protocol):
    """What runs jobs.

    Attributes:
        workers: jobs at a time.
    """

    workers: int

    def run(self, jobs: Iterable[Any], work: Work) -> Iterator[Event]:
        """Run every job; rows come as they are found, from any job in any order."""
        ...


class Here:
    """One job after the other in this process."""

    workers = 1

    def run(self, jobs: Iterable[Any], work: Work) -> Iterator[Event]:
        """See `Pool.run`."""
        for job in jobs:
            yield Started(job)
            yield from work(job)
            yield Ended(job)


class Processes:
    """Spawned processes on this machine.

    A process that is lost (killed for memory, say) costs its job alone; another takes its place.

    Args:
        workers: processes at a time.
        threads: torch's threads in each.
        devices: CUDA devices by number, dealt out in turn; none leaves them to torch.
    """

    def __init__(self, workers: int, threads: int = 1, devices: tuple[int, ...] = ()) -> None:
        self.workers, self.threads, self.devices = workers, threads, devices
        self._context = multiprocessing.get_context("spawn")
        self._started = 0

    def run(self, jobs: Iterable[Any], work: Work) -> Iterator[Event]:
        """See `Pool.run`.

        Raises:
            VertebraError: a worker ended before it took a job.
        """
        waiting = iter(jobs)
        busy: dict[Connection, tuple[Any, Any]] = {}  # connection -> (process, its job or None before the first)
        try:
            for _ in range(self.workers):
                self._start(work, busy)
            while busy:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    yield from self._hear(connection, waiting, work, busy)
        finally:
            for process, _ in busy.values():
                process.terminate()
            for process, _ in busy.values():
                process.join()

    def _start(self, work: Work, busy: dict[Connection, tuple[Any, Any]]) -> None:
        ours, theirs = self._context.Pipe()
        device = self.devices[self._started % len(self.devices)] if self.devices else None
        process = self._context.Process(target=_serve, args=(theirs, work, self.threads, device), daemon=True)
        process.start()
        theirs.close()
        self._started += 1
        busy[ours] = (process, None)

    def _hear(
        self, connection: Connection, waiting: Iterator[Any], work: Work, busy: dict[Connection, tuple[Any, Any]]
    ) -> Iterator[Event]:
        process, job = busy[connection]
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            del busy[connection]
            process.join()
            if job is None:
                raise VertebraError(
                    f"a worker ended with exit code {process.exitcode} before its first job; a script calls battle() "
                    'under `if __name__ == "__main__":`, or with jobs=1'
                ) from None
            self._start(work, busy)
            yield Ended(job, _loss(process.exitcode))
            return
        if message not in (READY, ENDED):
            yield message
            return
        if message == ENDED:
            yield Ended(job)
        following = next(waiting, None)
        if following is None:
            del busy[connection]
            connection.send(LEAVE)
            process.join()
            return
        busy[connection] = (process, following)
        connection.send(following)
        yield Started(following)


def _loss(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "its process was killed, as Linux does when memory runs out; fewer --jobs need less"
    if exit_code is not None and exit_code < 0:
        return f"its process ended by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _serve(connection: Connection, work: Work, threads: int, device: int | None) -> None:
    """A worker's life: take a job, send its rows, say that it ended, until told to leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        connection.send(READY)
        while (job := connection.recv()) != LEAVE:
            for row in work(job):
                connection.send(row)
            connection.send(ENDED)
    except (Preempted, EOFError, BrokenPipeError):  # the battle has ended, and knows why
        return


def _leave_with_parent() -> None:
    """End at once when the parent is gone, however it went: another battle may be resuming its directory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class RayCluster:
    """The workers of a Ray cluster; a row reaches the parent when its cell is done.

    Args:
        address: of the cluster; "auto" joins the one that this machine belongs to, or else starts one here.
        threads: CPUs that a job takes.

    Raises:
        UsageError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, address: str = "auto", threads: int = 1) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        try:
            import ray
        except ImportError as error:
            raise UsageError("--ray needs Ray: pip install 'vertebra[ray]'") from error
        self.threads = threads
        if not ray.is_initialized():
            self._join(address)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)

    def _join(self, address: str) -> None:
        import ray

        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            if address != "auto":
                raise UsageError(f"--ray {address}: no cluster answers ({error})") from error
            ray.init(include_dashboard=False, log_to_driver=False)

    def run(self, jobs: Iterable[Any], work: Work) -> Iterator[Event]:
        """See `Pool.run`."""
        import ray

        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        call = ray.remote(work).options(num_returns="streaming", num_cpus=self.threads, num_gpus=gpus, max_retries=0)
        waiting, running = iter(jobs), {}
        while True:
            while len(running) < self.workers and (job := next(waiting, None)) is not None:
                running[call.remote(job)] = job
                yield Started(job)
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            yield from self._hear(ready[0], running)

    def _hear(self, stream: Any, running: dict[Any, Any]) -> Iterator[Event]:
        import ray
        from ray.exceptions import RayError

        try:
            yield ray.get(next(stream))  # type: ignore[misc] - a row
        except StopIteration:
            yield Ended(running.pop(stream))
        except RayError as error:
            yield Ended(running.pop(stream), str(error).strip().splitlines()[-1])


WORTH_A_PROCESS = 20.0
"""Seconds of work below which a spawned process, which loads torch first, does not pay."""


ROOM = 2 * 2**30
"""Bytes of memory that there should be for each process."""


def memory_bytes() -> int:
    """Memory of this machine, or a lot where the system does not say."""
    if not hasattr(os, "sysconf"):
        return 2**40
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def local_pool(jobs: int | None, count: int, seconds: float) -> Pool:
    """The pool of this machine.

    By default one process a core with one thread each: networks as small as those of most battles keep one core busy,
    not two. With CUDA it is one process a device.

    Args:
        jobs: processes at most; None chooses.
        count: jobs that there are.
        seconds: estimate of their work on one process.
    """
    from vertebra.data.pixels import available_cores

    cores, devices = available_cores(), _devices()
    chosen = jobs or len(devices) or max(1, min(cores, 1 + int(seconds / WORTH_A_PROCESS), memory_bytes() // ROOM))
    workers = min(chosen, max(1, count))
    if workers == 1:
        return Here()
    return Processes(workers, max(1, cores // workers), devices)


def _devices() -> tuple[int, ...]:
    import torch

    return tuple(range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
