import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vertebra.battle import board
from vertebra.battle.board import Board, conclusion
from vertebra.battle.cells import Cell, Row
from vertebra.battle.pools import Ended, Started
from vertebra.battle.ranking import Ranking
from vertebra.contracts import Report, Score

CELLS = [Cell("a/b", "linear", seed) for seed in range(3)]


def done(cell: Cell, value: float) -> Row:
    return Row(cell, "done", 1.0, Report({"linear_top1": Score(value, 9)}))


def shown(terminal: bool, quiet: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=90, quiet=quiet, color_system=None)
    job = SimpleNamespace(contender=SimpleNamespace(name="a/b"), seed=0)
    with Board(CELLS, {CELLS[0]: done(CELLS[0], 50.0)}, "linear_top1", 60.0, console=console) as one:
        one.hear(Started(job))
        one.hear(done(CELLS[1], 70.0))
        if terminal:
            one.live.refresh()
        one.hear(Row(CELLS[2], "failed", error="no memory"))
        one.hear(Ended(job))
    return stream.getvalue()


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "LINE_SECONDS", -1.0)
    text = shown(terminal=False)
    assert "2/3 cells, " in text and "best so far a/b (linear_top1 70.0 %)" in text
    assert "failed: a/b, linear: no memory" in text and "3/3 cells, 0 s left" in text


def test_a_live_board_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "2/3 cells" in text and "a/b, seed 0" in text


def test_quiet_is_silent() -> None:
    assert shown(terminal=False, quiet=True) == ""


def test_conclusion_says_what_failed_and_ends_with_the_report(capsys: Any) -> None:
    cell = {"value": 90.0, "low": 85.0, "high": 94.0, "n": 50, "seeds": 3, "best": True, "tied": False}
    score = {"name": "linear_top1", "probe": "linear", "unit": "%", "better": "higher"}
    data = {
        "settings": {"primary": "linear_top1"},
        "pick": {"name": "[a/b]", "reasons": ["because"]},
        "scores": [score, {**score, "name": "p50_ms", "unit": "ms"}],
        "table": {"[a/b]": {"linear_top1": cell, "p50_ms": {**cell, "value": 3.21}}, "c/d": {}},
        "failed": [{"contender": "c/d", "probe": "linear", "error": "no memory"}],
        "left_out": [{"what": "x", "why": "y"}],
    }
    conclusion(Ranking(data, Path("runs/report.html")))
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["linear_top1", "%", "p50_ms"]
    assert out[1].split() == ["*", "[a/b]", "90.0", "(85.0..94.0)", "best", "3.21"]
    assert out[3:] == [
        "1 failed: c/d, linear: no memory",
        "left out: 1 (the report lists them); go on with: vertebra battle --resume runs --budget TIME",
        "pick: [a/b]",
        "  because",
        "runs/report.html",
    ]
