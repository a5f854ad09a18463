import html
from collections.abc import Mapping

import numpy as np
import pytest

from vertebra.battle.cells import Cell, Row
from vertebra.battle.ranking import (
    Column,
    Constraints,
    Estimate,
    Pick,
    Ranking,
    cheapest,
    choose,
    columns,
    comparable,
    comparisons,
    estimate,
    tabulate,
)
from vertebra.contracts import Report, Score
from vertebra.errors import UsageError

TOP1 = Column("linear_top1", "linear", "%", "higher")


def rows(shares: dict[str, float], latency: dict[str, float], seeds: int = 3, images: int = 400) -> list[Row]:
    """Contenders that are right on the first images, with a little luck a seed."""
    found = []
    for name, share in shares.items():
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            right = (np.arange(images) / images < share) ^ (rng.random(images) < 0.02)
            score = Score(100 * right.mean(), images, samples=100.0 * right)
            found.append(Row(Cell(name, "linear", seed), "done", report=Report({"linear_top1": score})))
        time = Score(latency[name], 100, "lower", "ms", interval=(latency[name] - 0.1, latency[name] + 0.1))
        found.append(Row(Cell(name, "speed", 0), "done", report=Report({"p50_ms": time})))
    return found


def pick(given: list[Row], refused: Mapping[str, list[str]] = {}, nearest: Mapping[str, float] = {}) -> Pick:
    named = columns(given)
    table = tabulate(given, named)
    judged = comparisons(table, named["linear", "linear_top1"])
    none = {name: [] for name in table}
    return choose(TOP1, table, judged, {**none, **refused}, dict.fromkeys(table, 5.0), nearest)


LATENCY = {"big": 20.0, "small": 5.0, "weak": 1.0}


def test_the_cheapest_of_those_that_tie_is_picked() -> None:
    found = pick(rows({"big": 0.905, "small": 0.9, "weak": 0.6}, LATENCY))
    assert (found.name, found.best, found.tied_with) == ("small", "big", ("big",))
    assert found.reasons[0].startswith("small: linear top-1 ")
    assert "It ties with big, the best value: -0.5 points" in found.reasons[1]
    assert "small is 4.0x as fast (5 ms against 20 ms)" in found.reasons[1]


def test_a_clear_winner_is_picked_whatever_it_costs() -> None:
    found = pick(rows({"big": 0.95, "small": 0.8, "weak": 0.6}, LATENCY))
    assert (found.name, found.tied_with) == ("big", ())
    assert "it is 14." in found.reasons[0] and "above small (p < 0.001 after Holm)" in found.reasons[0]


def test_constraints_bind_the_pick_and_say_what_they_cost() -> None:
    given = rows({"big": 0.95, "small": 0.8, "weak": 0.6}, LATENCY)
    found = pick(given, {"big": ["its latency is 20 ms, above 10 ms"]})
    assert found.name == "small"
    assert found.reasons[-1] == "big scores 93.3 %, but its latency is 20 ms, above 10 ms."


def test_nobody_within_the_constraints_shows_the_nearest() -> None:
    given = rows({"big": 0.95, "small": 0.8}, LATENCY)
    refused = {"big": ["its latency is 20 ms, above 4 ms"], "small": ["its latency is 5 ms, above 4 ms"]}
    found = pick(given, refused, {"big": 5.0, "small": 1.25})
    assert found.name is None
    assert found.reasons[1] == "The nearest is small: its latency is 5 ms, above 4 ms."


def test_a_tie_that_may_hide_a_loss_does_not_decide_the_pick() -> None:
    found = pick(rows({"big": 0.8, "small": 0.75}, LATENCY, images=40))
    assert (found.name, found.tied_with) == ("big", ("small",))
    assert found.reasons[-1].startswith("small would be cheaper, but may be up to ")


def test_parameters_decide_where_latency_was_not_measured() -> None:
    given = [row for row in rows({"a": 0.9, "b": 0.9}, {"a": 1, "b": 1}) if row.cell.probe == "linear"]
    named = columns(given)
    table = tabulate(given, named)
    found = choose(TOP1, table, comparisons(table, TOP1), {"a": [], "b": []}, {"a": 30.0, "b": 3.0}, {})
    assert found.name == "b" and "b has 3 M parameters against 30 M" in found.reasons[1]


def test_a_name_that_two_probes_use_gets_the_probe_in_front() -> None:
    reports = {"linear": Report({"nll": Score(1, 5)}), "calibration": Report({"nll": Score(2, 5), "ece": Score(3, 5)})}
    given = [Row(Cell("a", probe, 0), "done", report=report) for probe, report in reports.items()]
    assert [column.name for column in columns(given).values()] == ["linear_nll", "calibration_nll", "ece"]
    assert tabulate(given, columns(given))["a"]["calibration_nll"].value == 2


def test_seeds_without_samples_widen_the_probes_interval() -> None:
    scores = {seed: Score(value, 100, interval=(value - 3, value + 4)) for seed, value in enumerate((50.0, 50.0, 50.0))}
    assert (estimate(scores).low, estimate(scores).high) == (47, 54)
    moved = estimate({0: Score(48.0, 9), 1: Score(52.0, 9)})
    assert moved.value == 50 and moved.high - 50 == pytest.approx(12.706 * 2, rel=1e-3)
    assert np.isnan(estimate({0: Score(48.0, 9)}).low)


def test_seeds_that_not_all_have_are_left_aside_and_noted() -> None:
    given = rows({"a": 0.9, "b": 0.5}, {"a": 1, "b": 1})
    fewer = [row for row in given if row.cell != Cell("b", "linear", 2)]
    kept, notes = comparable(fewer, lambda contender, probe: probe == "speed")
    assert notes == ["linear: left aside is what not every contender has, seed 2"]
    table = tabulate(kept, columns(kept))
    (pair,) = comparisons(table, TOP1)
    assert pair.seeds == 2 and pair.paired
    assert pair.difference == pytest.approx(table["a"]["linear_top1"].value - table["b"]["linear_top1"].value)
    assert comparable(given, lambda contender, probe: probe == "speed") == (given, [])


def test_as_fast_means_within_noise_and_then_the_smaller_one_is_cheaper() -> None:
    table = {
        name: {"p50_ms": Estimate(ms, ms - 0.1, ms + 0.1, 9, 1)} for name, ms in (("a", 10.0), ("b", 10.4), ("c", 20.0))
    }
    assert cheapest(["a", "b", "c"], table, {"a": 9.0, "b": 3.0, "c": 1.0}) == "b"
    assert cheapest(["c", "a"], table, {"a": 9.0, "c": 1.0}) == "a"


def test_an_unknown_licence_word_is_refused() -> None:
    with pytest.raises(UsageError, match="licence is 'free'; it must be any or commercial"):
        Constraints(licence="free")  # type: ignore[arg-type]


def ranking(name: str) -> Ranking:
    cell = {"value": 90.0, "low": 85.0, "high": 94.0, "n": 50, "seeds": 3, "best": True, "tied": False}
    data = {
        "pick": {"name": name, "reasons": [f"{name} is best"]},
        "scores": [{"name": "linear_top1", "probe": "linear", "unit": "%", "better": "higher"}],
        "table": {name: {"linear_top1": cell}},
        "aggregate": {},
    }
    return Ranking(data, None)  # type: ignore[arg-type]


def test_notebook_table_escapes_names() -> None:
    name = "<script>alert(1)</script>"
    shown = ranking(name)._repr_html_()
    assert "<script>" not in shown and html.escape(name) in shown and "<b>90</b>" in shown and "85.0..94.0" in shown


def test_pandas_has_a_row_a_score() -> None:
    pytest.importorskip("pandas")
    frame = ranking("a").to_pandas()
    assert frame.loc[0, "contender"] == "a" and frame.loc[0, "value"] == 90 and frame.loc[0, "unit"] == "%"
