"""What a battle shows while it runs: a live board on a terminal, a line for each finished job elsewhere."""

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vertebra.battle.cells import Cell, Row
from vertebra.battle.pools import Ended, Event, Started
from vertebra.battle.quantities import duration
from vertebra.battle.ranking import Ranking

LINE_SECONDS = 5.0
"""Least time between two lines where there is no terminal."""


class Board:
    """Listens to a pool and shows what happens on stderr; stdout is for results.

    Args:
        cells: everything that will be run, and what an earlier process has finished.
        done: rows of the latter.
        primary: the score by which "best so far" goes.
        seconds: estimate of what is still to be run, wall clock.
        quiet: shows nothing.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        done: Mapping[Cell, Row],
        primary: str,
        seconds: float,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self.total = len(list(cells))
        self.rows = dict(done)
        self.primary = primary
        self.console = console or Console(stderr=True, quiet=quiet)
        self.running: dict[int, Any] = {}
        self.started = self.said = time.monotonic()
        self.earlier, self.estimate = len(self.rows), seconds
        self.live = Live(get_renderable=self._render, console=self.console, transient=True, refresh_per_second=4)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def hear(self, event: Event) -> None:
        """One event of a pool, or a row of a cell that the battle ran itself."""
        if isinstance(event, Started):
            self.running[id(event.job)] = event.job
        elif isinstance(event, Ended):
            self.running.pop(id(event.job), None)
        else:
            self.rows[event.cell] = event
            self._speak(event)

    def _speak(self, row: Row) -> None:
        """A failure always has its line; progress has one every few seconds where there is no live board."""
        if row.state == "failed":
            self.console.print(
                Text(f"failed: {row.cell.contender}, {row.cell.probe}: {row.error}", style="red"), soft_wrap=True
            )
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.said > LINE_SECONDS or len(self.rows) == self.total):
            self.said = now
            self.console.print(Text(self._line()), soft_wrap=True)

    def _line(self) -> str:
        best = self._best()
        return f"{len(self.rows)}/{self.total} cells, {duration(self._left())} left" + (
            f", best so far {best}" if best else ""
        )

    def _best(self) -> str:
        scored = [row for row in self.rows.values() if self.primary in row.report.scores]
        if not scored:
            return ""
        sign = 1 if scored[0].report.scores[self.primary].better == "higher" else -1
        top = max(scored, key=lambda row: sign * row.report.scores[self.primary].value)
        score = top.report.scores[self.primary]
        return f"{top.cell.contender} ({self.primary} {score.value:.1f}{f' {score.unit}' if score.unit else ''})"

    def _left(self) -> float:
        """Seconds left: the estimate at first, more and more the pace so far."""
        spent, found = time.monotonic() - self.started, len(self.rows) - self.earlier
        share = found / max(1, self.total - self.earlier)
        if share == 0:
            return max(0.0, self.estimate - spent)
        paced = spent / share * (1 - share)
        return share * paced + (1 - share) * max(0.0, self.estimate * (1 - share))

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 1))
        head.add_row(ProgressBar(self.total, len(self.rows), width=30), Text(self._line()))
        lines = [Text(f"  {job.contender.name}, seed {job.seed}", style="dim") for job in self.running.values()]
        return Group(head, *lines[:8])


MOST_COLUMNS = 6
WIDE = 200
"""Columns of text where there is no terminal, so that nothing is folded."""
SHOWN = ("p50_ms", "params_m", "knn_top1", "knn_map", "fewshot_10", "map", "corruption_top1", "ece")
"""Scores beside the primary one that a terminal has room for, in this order."""


def conclusion(ranking: Ranking) -> None:
    """The end of a battle on stdout: the table, the pick, its reasons, and the report's path as the last line."""
    console = Console(highlight=False, soft_wrap=True)
    scores = {score["name"]: score for score in ranking.data["scores"]}
    primary = ranking.data["settings"]["primary"]
    names = [name for name in (primary, *SHOWN) if name in scores][:MOST_COLUMNS]
    if console.is_terminal:
        while len(names) > 1 and console.measure(_table(ranking, names)).maximum > console.width:
            names.pop()
    else:
        console.width = WIDE
    console.print(_table(ranking, names))
    failed = ranking.data["failed"]
    if failed:
        said = "; ".join(f"{one['contender']}, {one['probe']}: {one['error']}" for one in failed)
        console.print(Text(f"{len(failed)} failed: {said}"))
    if ranking.data["left_out"]:
        more = f"vertebra battle --resume {shlex.quote(str(ranking.report.parent))} --budget TIME"
        console.print(Text(f"left out: {len(ranking.data['left_out'])} (the report lists them); go on with: {more}"))
    console.print(Text(f"pick: {ranking.pick or 'none'}"))
    for reason in ranking.reasons:
        console.print(Text(f"  {reason}"))
    console.print(Text(str(ranking.report)))


def _table(ranking: Ranking, names: Sequence[str]) -> Table:
    """Contenders, best first, and their scores; the first score has its interval."""
    units = {score["name"]: " %" if score["unit"] == "%" else "" for score in ranking.data["scores"]}
    table = Table("", box=None, pad_edge=False)
    for name in names:
        table.add_column(name + units[name], justify="right", no_wrap=True)
    for contender, row in ranking.table.items():
        mark = "*" if contender == ranking.pick else " "
        table.add_row(Text(f"{mark} {contender}"), *(Text(_cell(row.get(name), name == names[0])) for name in names))
    return table


def _cell(cell: Mapping[str, Any] | None, deciding: bool) -> str:
    if cell is None or cell["value"] is None:
        return "-"
    if not deciding or cell["low"] is None:
        return f"{cell['value']:.3g}"
    tie = " tie" if cell["tied"] else " best" if cell["best"] else ""
    return f"{cell['value']:.1f} ({cell['low']:.1f}..{cell['high']:.1f}){tie}"
