import json
import math
from pathlib import Path

import numpy as np
import pytest

from vertebra.battle.cells import Cell, Journal, Row, plain
from vertebra.contracts import Report, Score
from vertebra.errors import DataError

SCORE = Score(75.0, 4, samples=np.array([100.0, 0.0, 100.0, 100.0]))


def row(seed: int, value: Score = SCORE) -> Row:
    report = Report({"linear_top1": value, "ece": Score(math.nan, 4, "lower")}, {"odd": math.inf, "list": np.arange(2)})
    return Row(Cell("my/net?a=b|c", "linear", seed), "done", 1.5, report)


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(row(0))
    journal.append(Row(Cell("other", "knn", 1), "failed", 0.1, error="no memory"))
    read = Journal(tmp_path).rows()
    kept = read[row(0).cell]
    assert kept.report.scores["linear_top1"].samples.tolist() == SCORE.samples.tolist()
    assert kept.report.scores["linear_top1"].value == 75 and math.isnan(kept.report.scores["ece"].value)
    assert kept.report.details == {"odd": None, "list": [0, 1]} and kept.seconds == 1.5
    assert read[Cell("other", "knn", 1)].error == "no memory"


def test_a_torn_last_line_is_cut_off_and_written_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(row(0))
    journal.append(row(1))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-25])
    assert list(journal.rows()) == [row(0).cell]
    journal.append(row(1))
    assert journal.path.read_bytes() == whole and len(journal.rows()) == 2


def test_the_last_row_of_a_cell_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(Row(row(0).cell, "failed", error="first try"))
    journal.append(row(0))
    assert [kept.state for kept in journal.rows().values()] == ["done"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(row(0))
    journal.append(row(1))
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join(["{nonsense", lines[1]]) + "\n")
    with pytest.raises(DataError, match=r"results.jsonl, line 1: .*delete the line"):
        journal.rows()


def test_lines_have_the_documented_fields(tmp_path: Path) -> None:
    Journal(tmp_path).append(row(2))
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert list(line) == [
        "cell",
        "contender",
        "probe",
        "seed",
        "state",
        "seconds",
        "scores",
        "details",
        "samples",
        "error",
    ]
    assert line["cell"] == "my/net?a=b|c|linear|2" and (tmp_path / line["samples"]).is_file()


def test_plain_makes_json_of_numpy() -> None:
    assert plain({"a": (np.float32(1), np.nan, np.array([True]))}) == {"a": [1.0, None, [True]]}
