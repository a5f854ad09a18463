"""Cells and the journal that keeps them: one line a cell, appended at once, read back after any kill."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from vertebra.contracts import Report, Score
from vertebra.errors import DataError

State = Literal["done", "failed", "left_out", "not_applicable"]


@dataclass(frozen=True, order=True)
class Cell:
    """One contender, one probe, one seed."""

    contender: str
    probe: str
    seed: int

    @property
    def key(self) -> str:
        """`contender|probe|seed`, as results.jsonl has it."""
        return f"{self.contender}|{self.probe}|{self.seed}"


@dataclass(frozen=True, eq=False)
class Row:
    """What became of a cell.

    Attributes:
        cell: which.
        state: "done", "failed" (error says why), "left_out" (of the budget) or "not_applicable" (to these data).
        seconds: what it took.
        report: what the probe found, where done.
        error: the reason, in the other states.
    """

    cell: Cell
    state: State
    seconds: float = 0.0
    report: Report = field(default_factory=lambda: Report({}))
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The line in results.jsonl, without the samples."""
        scores = {
            name: {
                "value": score.value,
                "n": score.n,
                "better": score.better,
                "unit": score.unit,
                "interval": score.interval,
            }
            for name, score in self.report.scores.items()
        }
        return {
            "cell": self.cell.key,
            "contender": self.cell.contender,
            "probe": self.cell.probe,
            "seed": self.cell.seed,
            "state": self.state,
            "seconds": round(self.seconds, 4),
            "scores": scores,
            "details": self.report.details,
            "samples": None,
            "error": self.error,
        }


class Journal:
    """The rows of a battle in its run directory. One process writes: it holds the directory's lock.

    Args:
        run_dir: where results.jsonl and samples/ are.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "results.jsonl"

    def rows(self) -> dict[Cell, Row]:
        """The last row of each cell; a torn last line, which a kill leaves, is cut off.

        Raises:
            DataError: a line before the last cannot be read, or samples are missing.
        """
        if not self.path.is_file():
            return {}
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        found: dict[Cell, Row] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = self._read(json.loads(line))
            except (ValueError, KeyError, OSError) as error:
                raise DataError(
                    f"{self.path}, line {number}: {error}; delete the line to run its cell again"
                ) from error
            found[row.cell] = row
        return found

    def append(self, row: Row) -> None:
        """Samples first, then the line, each flushed to the disk: a line stands for all it names."""
        line = row.to_json()
        samples = {name: score.samples for name, score in row.report.scores.items() if score.samples is not None}
        if samples:
            path = self.run_dir / "samples" / f"{quote(row.cell.key, safe='')}.npz"
            path.parent.mkdir(exist_ok=True)
            _write_arrays(path, samples)
            line["samples"] = str(path.relative_to(self.run_dir))
        with self.path.open("ab") as file:
            file.write(json.dumps(plain(line), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, line: Mapping[str, Any]) -> Row:
        samples: Mapping[str, np.ndarray] = {}
        if line["samples"]:
            with np.load(self.run_dir / line["samples"], allow_pickle=False) as arrays:
                samples = dict(arrays)
        scores = {}
        for name, kept in line["scores"].items():
            low, high = (math.nan if end is None else end for end in kept["interval"] or (None, None))
            value = math.nan if kept["value"] is None else kept["value"]
            ends = (low, high) if kept["interval"] else None
            scores[name] = Score(value, kept["n"], kept["better"], kept["unit"], samples.get(name), ends)
        cell = Cell(line["contender"], line["probe"], line["seed"])
        return Row(cell, line["state"], line["seconds"], Report(scores, line["details"]), line["error"])


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz whole or not at all."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def plain(value: Any) -> Any:
    """JSON values of numpy's numbers and arrays; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
