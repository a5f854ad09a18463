"""What a training shows: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vertebra.contracts import Progress

LINE_SECONDS = 30.0


def meter(stream: TextIO, *, quiet: bool = False) -> "TerminalMeter | LineMeter":
    """The meter that suits a stream: a bar where it is a terminal, lines where it is a file or a pipe."""
    return TerminalMeter(stream) if stream.isatty() and not quiet else LineMeter(stream, quiet=quiet)


def row_text(row: Mapping[str, Any]) -> str:
    """A row of a history as one line.

    >>> row_text({"epoch": 2, "step": 38, "loss": 0.7357, "lr": 0.0026, "seconds": 1.0, "top1": 44.72})
    'epoch 2  loss 0.7357  lr 2.60e-03  1.0 s  top1 44.72'
    """
    found = [
        f"{name} {value:.4g}" for name, value in row.items() if name not in ("epoch", "step", "loss", "lr", "seconds")
    ]
    parts = [f"epoch {row['epoch']}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"{row['seconds']:.1f} s"]
    return "  ".join([*parts, *found])


class LineMeter(AbstractContextManager):
    """A line an epoch, and one every 30 seconds within it; silent if `quiet`."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.stream = stream
        self.quiet = quiet
        self.said = time.monotonic()

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        """After an optimiser step."""
        if time.monotonic() - self.said >= LINE_SECONDS:
            self._say(
                f"step {progress.step}/{progress.steps}  epoch {progress.epoch + 1}/{progress.epochs}  loss {loss:.4f}"
            )

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch."""
        self._say(row_text(row))

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    def __exit__(self, *_: object) -> None:
        return None


class TerminalMeter(AbstractContextManager):
    """A bar over the steps of the run, with each epoch's row above it; rich honours NO_COLOR."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, transient=True)
        self.task = self.bar.add_task("train", total=None)

    def __enter__(self) -> "TerminalMeter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        """After an optimiser step."""
        text = f"epoch {progress.epoch + 1}/{progress.epochs}  loss {loss:.4f}"
        self.bar.update(self.task, description=text, completed=progress.step, total=progress.steps)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch."""
        self.bar.console.print(row_text(row), highlight=False, markup=False)
