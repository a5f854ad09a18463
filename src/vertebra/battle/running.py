"""A battle under way: cells, what fits into the budget, the pool, the timed probes, the ranking."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vertebra.battle import budget
from vertebra.battle.board import Board
from vertebra.battle.cells import Cell, Journal, Row
from vertebra.battle.contenders import Facts, inspect
from vertebra.battle.jobs import Job, device, reason, scratch_epochs, work
from vertebra.battle.pools import Ended, Pool
from vertebra.battle.quantities import duration
from vertebra.battle.ranking import Ranking
from vertebra.battle.report import write_report
from vertebra.battle.settings import Settings
from vertebra.battle.summary import Told, summarise
from vertebra.battle.timing import timed_rows
from vertebra.contracts import Probe
from vertebra.data.dataset import Dataset
from vertebra.data.pixels import available_cores
from vertebra.errors import UsageError, VertebraError
from vertebra.shipping.weights import offline

LEAST_EPOCHS = 3
"""Training from scratch for less is not worth its time; cells are left out instead."""

FINISHED = ("done", "not_applicable")
"""States that a resumed battle takes over; failed and left-out cells are tried again."""


class Contest:
    """One battle in its run directory.

    Attributes:
        epochs: of training contenders from scratch; known after `inspect`.
        facts: contender -> what is known of it; known after `inspect`.
        broken: contender -> why it cannot be built.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        data: Dataset,
        fingerprint: str,
        command: str,
        epochs: int | None = None,
    ) -> None:
        self.folder, self.settings, self.data = folder, settings, data
        self.fingerprint, self.command = fingerprint, command
        self.journal = Journal(folder)
        self.started = time.time()
        self.probes: dict[str, Probe] = {name: spec.build() for name, spec in settings.probes.items()}
        self.timed = [name for name, probe in self.probes.items() if probe.timed]
        self.facts: dict[str, Facts] = {}
        self.broken: dict[str, str] = {}
        self.epochs = epochs or 0

    def inspect(self) -> None:
        """Build and time every contender, and settle how long to train those without weights.

        Raises:
            UsageError: an option that a contender does not take, or a size that it cannot take.
            VertebraError: no contender can be built.
        """
        for contender in self.settings.contenders:
            try:
                self.facts[contender.name] = inspect(contender, device())
            except UsageError:
                raise
            except Exception as error:  # it fails as a contender, the others fight on
                self.broken[contender.name] = reason(error)
        if not self.facts:
            raise VertebraError(f"no contender can be built; {next(iter(self.broken.values()))}")
        if not self.epochs:
            self.epochs = self.settings.epochs or self._epochs()

    def _epochs(self) -> int:
        scratch = {name: facts for name, facts in self.facts.items() if facts.training == "scratch"}
        planned = scratch_epochs(self.sizes.images["train"])
        workers = min(available_cores(), max(1, len(scratch) * len(self.settings.seeds)))
        seeds = len(self.settings.seeds)
        return budget.epochs_within(self.settings.budget, planned, LEAST_EPOCHS, scratch, seeds, self.sizes, workers)

    @property
    def sizes(self) -> budget.Sizes:
        """How much data there is."""
        return budget.Sizes({name: len(split) for name, split in self.data.splits.items()}, len(self.data.classes))

    def seeds_of(self, contender: str, probe: str) -> tuple[int, ...]:
        """Seeds for which a cell can differ: all, or only the first where nothing depends on the seed."""
        return self.settings.seeds[:1] if self.fixed(contender, probe) else self.settings.seeds

    def fixed(self, contender: str, probe: str) -> bool:
        """Whether the result does not depend on the seed."""
        if self.probes[probe].timed or self.probes[probe].weightless:
            return True
        facts = self.facts.get(contender)
        trained = facts is not None and facts.training == "scratch"
        return not trained and not self.probes[probe].seeded

    def cells(self) -> list[Cell]:
        """Every cell of the battle, contenders that cannot be built included."""
        return [
            Cell(contender.name, probe, seed)
            for contender in self.settings.contenders
            for probe in self.settings.probes
            for seed in self.seeds_of(contender.name, probe)
        ]

    def run(self, make_pool: Callable[[int, float], Pool], *, quiet: bool = False) -> Ranking:
        """Run what is not finished, then rank.

        Args:
            make_pool: number of jobs and their seconds to the pool that runs them.
            quiet: shows no board.

        Raises:
            VertebraError: not one cell was done.
        """
        cells = self.cells()
        kept = self.journal.rows()
        rows = {cell: kept[cell] for cell in cells if cell in kept and kept[cell].state in FINISHED}
        still = [cell for cell in cells if cell not in rows]
        able = [cell for cell in still if cell.contender in self.facts]
        found = self._estimates(able)
        pool = make_pool(len(found.shared), found.total)
        allotment = self._allot(able, found, pool.workers)
        console = Console(stderr=True, quiet=quiet)
        self._announce(console, allotment, len(rows), pool.workers)
        with Board(cells, rows, self.settings.primary, allotment.seconds / pool.workers, console=console) as board:
            for cell in still:
                if cell in allotment.left_out:
                    self._keep(Row(cell, "left_out", error=allotment.left_out[cell]), rows, board)
                elif cell.contender in self.broken:
                    self._keep(Row(cell, "failed", error=self.broken[cell.contender]), rows, board)
            reserved = sum(found.cells[cell] for cell in allotment.planned if cell.probe in self.timed)
            for row in self._rows(pool, allotment.planned, reserved, rows, board):
                self._keep(row, rows, board)
        return self._ranked(rows)

    def _rows(
        self, pool: Pool, planned: Sequence[Cell], reserved: float, rows: Mapping[Cell, Row], board: Board
    ) -> Iterator[Row]:
        """Rows as they are found: of the pool, of jobs whose worker was lost, of the timed probes.

        Args:
            pool: runs the jobs.
            planned: cells in order of their value.
            reserved: seconds of the budget that the timed probes need at the end.
            rows: what is known already.
            board: is told of jobs.
        """
        jobs = self._jobs([cell for cell in planned if cell.probe not in self.timed], reserved)
        with closing(pool.run(jobs, work)) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Row):
                    yield event
                    continue
                board.hear(event)
                if isinstance(event, Ended) and event.error:
                    yield from (Row(cell, "failed", error=event.error) for cell in event.job.cells if cell not in rows)
        yield from timed_rows(self._jobs([cell for cell in planned if cell.probe in self.timed]))

    def _keep(self, row: Row, rows: dict[Cell, Row], board: Board) -> None:
        self.journal.append(row)
        rows[row.cell] = row
        board.hear(row)

    def _estimates(self, cells: list[Cell]) -> budget.Estimates:
        return budget.estimates(cells, self.facts, self.sizes, self.epochs, self.probes)

    def _allot(self, cells: list[Cell], found: budget.Estimates, workers: int) -> budget.Allotment:
        primary = next((n for n in self.probes if self.settings.primary.startswith(f"{n}_")), next(iter(self.probes)))
        ordered = budget.by_value(cells, list(self.probes), primary, self.timed)
        left = None if self.settings.budget is None else self.settings.budget - (time.time() - self.started)
        return budget.allot(ordered, found, left, workers, self.timed)

    def _jobs(self, cells: Iterable[Cell], reserved: float = 0.0) -> Iterator[Job]:
        """Cells that share a contender and a seed, in the order of their first cell."""
        groups: dict[tuple[str, int], list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.contender, cell.seed), []).append(cell)
        contenders = {contender.name: contender for contender in self.settings.contenders}
        deadline = None if self.settings.budget is None else self.started + self.settings.budget - reserved
        for (name, seed), group in groups.items():
            yield Job(
                contenders[name],
                self.facts[name].training,
                seed,
                tuple(group),
                self.settings.probes,
                self.data,
                self.folder.resolve(),
                self.epochs,
                deadline,
                self.settings.on_error,
                offline(),
            )

    def _announce(self, console: Console, allotment: budget.Allotment, finished: int, workers: int) -> None:
        """What is going to happen."""
        count, cells = len(self.settings.contenders), len(allotment.planned)
        earlier = f" ({finished} are finished already)" if finished else ""
        said = [
            f"{count} contender{'s' * (count > 1)} x {len(self.probes)} probes on {self.data.path}: {cells} cells, "
            f"about {duration(allotment.seconds / workers)}{earlier}"
        ]
        if allotment.left_out:
            said.append(
                f"{len(allotment.left_out)} cells do not fit into the budget and are left out; the report lists them"
            )
        if any(facts.training == "scratch" for facts in self.facts.values()):
            said.append(f"contenders without weights are trained from scratch for {self.epochs} epochs with each seed")
        for line in (self.settings.lineup, *said):
            if line:
                console.print(Text(line), soft_wrap=True)

    def _ranked(self, rows: Mapping[Cell, Row]) -> Ranking:
        if not any(row.state == "done" for row in rows.values()):
            first = next((row.error for row in rows.values() if row.state == "failed"), "every cell was left out")
            raise VertebraError(f"not one cell was done; the first says: {first}. The rows are in {self.journal.path}")
        primary = self._deciding(rows.values())
        notes = [self.settings.lineup] if self.settings.lineup else []
        if primary != self.settings.primary:
            notes.append(f"{primary} decides, because not every contender has a {self.settings.primary}")
        told = Told(
            command=self.command,
            data=self.data,
            fingerprint=self.fingerprint,
            contenders=self.settings.contenders,
            facts=self.facts,
            fixed=self.fixed,
            probes=list(self.probes),
            primary=primary,
            constraints=self.settings.constraints,
            settings={
                "seeds": self.settings.seeds,
                "budget": self.settings.budget,
                "image_size": self.settings.image_size,
                "epochs": self.epochs,
            },
            notes=notes,
            seconds=round(time.time() - self.started, 1),
        )
        report = summarise(told, rows.values())
        page = write_report(report, self.folder, lambda split, index: self.data.split(split).image(index))
        shutil.rmtree(
            self.folder / "evidence", ignore_errors=True
        )  # pixels and features: large, and made again if needed
        return Ranking(report, page)

    def _deciding(self, rows: Iterable[Row]) -> str:
        """The first of the scores that may decide which every contender with any result has."""
        scores: dict[str, set[str]] = {}
        for row in rows:
            if row.state == "done":
                scores.setdefault(row.cell.contender, set()).update(row.report.scores)
        shared = set.intersection(*scores.values())
        return next((name for name in self.settings.primaries if name in shared), self.settings.primary)
