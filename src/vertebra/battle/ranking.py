"""From rows to a recommendation: the table, the comparisons, the pick and its reasons."""

import html
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from vertebra.battle.cells import Row
from vertebra.battle.statistics import LEVEL, Comparison, Interval, compare, compare_intervals, interval
from vertebra.contracts import Score
from vertebra.errors import UsageError

LATENCY = "p50_ms"
"""The score that says how fast a contender is; constraints and ties look at it."""

MEMORY = "peak_mem_mb"
"""The score that says how much memory inference takes."""


AS_FAST = 1.05
"""Ratio of latencies below which two contenders are as fast as one another."""

NEGLIGIBLE = 2.0
"""Points that nobody minds losing for a cheaper network; a tie that may hide more does not decide the pick."""


@dataclass(frozen=True)
class Constraints:
    """What a contender must satisfy to be picked; None asks nothing.

    Attributes:
        max_latency: milliseconds an image, median, on this machine.
        max_params: parameters in millions.
        max_memory: peak memory of inference in MB.
        licence: "commercial" wants weights whose licence is known to allow commercial use.
    """

    max_latency: float | None = None
    max_params: float | None = None
    max_memory: float | None = None
    licence: Literal["any", "commercial"] = "any"

    def __post_init__(self) -> None:
        if self.licence not in ("any", "commercial"):
            raise UsageError(f"licence is {self.licence!r}; it must be any or commercial")


@dataclass(frozen=True, eq=False)
class Estimate:
    """One score of one contender over its seeds.

    Attributes:
        value: mean over seeds.
        low: lower end of the 95 % interval; nan where none is known.
        high: upper end.
        n: images (or repeats) behind it.
        seeds: seeds behind it.
        samples: seed -> (n,) per-image values; empty where the score is no mean.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int
    samples: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A score as all contenders have it."""

    name: str
    probe: str
    unit: str
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Pick:
    """The recommendation.

    Attributes:
        name: the contender, or None where none satisfies the constraints.
        score: the score that decided.
        value: its value for the pick.
        best: the highest of those that satisfy the constraints.
        tied_with: contenders that the data cannot tell from the best, the pick left out.
        reasons: sentences with numbers.
    """

    name: str | None
    score: str
    value: float | None
    best: str | None
    tied_with: tuple[str, ...]
    reasons: tuple[str, ...]


Table = Mapping[str, Mapping[str, Estimate]]
"""Contender -> score -> estimate."""


Key = tuple[str, str]
"""Probe and score, as the probe names it."""


def columns(rows: Iterable[Row]) -> dict[Key, Column]:
    """Every score that some row has, in order of appearance; a name that two probes use gets its probe in front."""
    found: dict[Key, Score] = {}
    for row in rows:
        for name, score in row.report.scores.items():
            found.setdefault((row.cell.probe, name), score)
    names = [name for _, name in found]
    return {
        (probe, name): Column(f"{probe}_{name}" if names.count(name) > 1 else name, probe, score.unit, score.better)
        for (probe, name), score in found.items()
    }


def comparable(rows: Iterable[Row], fixed: Callable[[str, str], bool]) -> tuple[list[Row], list[str]]:
    """Rows of the seeds that all contenders have, probe by probe, and notes on what is left aside.

    A budget or a failure can leave one contender with fewer seeds; values over different seeds would not compare.

    Args:
        rows: that are done.
        fixed: whether a contender's result on a probe does not depend on the seed.
    """
    rows = list(rows)
    seeds: dict[str, dict[str, set[int]]] = {}
    for row in rows:
        if not fixed(row.cell.contender, row.cell.probe):
            seeds.setdefault(row.cell.probe, {}).setdefault(row.cell.contender, set()).add(row.cell.seed)
    shared = {probe: set.intersection(*found.values()) for probe, found in seeds.items()}
    kept, aside = [], dict[str, set[int]]()
    for row in rows:
        common = shared.get(row.cell.probe)
        if fixed(row.cell.contender, row.cell.probe) or not common or row.cell.seed in common:
            kept.append(row)
        else:
            aside.setdefault(row.cell.probe, set()).add(row.cell.seed)
    notes = [
        f"{probe}: left aside is what not every contender has, seed {', '.join(map(str, sorted(found)))}"
        for probe, found in aside.items()
    ]
    return kept, notes


def tabulate(rows: Iterable[Row], named: Mapping[Key, Column]) -> dict[str, dict[str, Estimate]]:
    """One estimate for each contender and score, over the seeds that are done."""
    scores: dict[str, dict[str, dict[int, Score]]] = {}
    for row in rows:
        for name, score in row.report.scores.items():
            column = named[row.cell.probe, name].name
            scores.setdefault(row.cell.contender, {}).setdefault(column, {})[row.cell.seed] = score
    return {
        contender: {name: estimate(by_seed) for name, by_seed in found.items()} for contender, found in scores.items()
    }


def estimate(scores: Mapping[int, Score]) -> Estimate:
    """Seeds of one score as one estimate.

    With samples the interval covers images and seeds (see `statistics`). Without, the probe's own interval is
    widened by the t interval of the seeds' values, as errors that add in squares.
    """
    values = np.array([score.value for score in scores.values()], dtype=np.float64)
    first = next(iter(scores.values()))
    samples = {seed: score.samples for seed, score in scores.items() if score.samples is not None}
    sizes = {len(row) for row in samples.values()}
    if len(samples) == len(scores) and len(sizes) == 1 and first.interval is None:
        ends = interval(np.stack(list(samples.values())).astype(np.float64), 100.0 if first.unit == "%" else 1.0)
        return Estimate(float(values.mean()), *ends, first.n, len(scores), samples)
    return Estimate(float(values.mean()), *_widened(scores, values), first.n, len(scores), samples)


def _widened(scores: Mapping[int, Score], values: np.ndarray) -> Interval:
    mean, known = values.mean(), [score.interval for score in scores.values() if score.interval]
    if len(known) < len(values) and len(values) == 1:
        return Interval(float("nan"), float("nan"))
    seeds = len(values)
    error = stats.t.ppf(0.5 + LEVEL / 2, seeds - 1) * values.std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    below = np.mean([score.value - score.interval[0] for score in scores.values() if score.interval]) if known else 0.0
    above = np.mean([score.interval[1] - score.value for score in scores.values() if score.interval]) if known else 0.0
    return Interval(float(mean - np.hypot(below, error)), float(mean + np.hypot(above, error)))


def comparisons(table: Table, column: Column, fixed: Collection[str] = ()) -> list[Comparison]:
    """Every pair of contenders on one score.

    Per-image samples are compared in pairs over the seeds that all have; else the intervals are compared.

    Args:
        table: estimates.
        column: the score.
        fixed: contenders whose score does not depend on the seed: their one seed stands for all.
    """
    found = {name: row[column.name] for name, row in table.items() if column.name in row}
    varying = [set(one.samples) for name, one in found.items() if name not in fixed]
    common = sorted(set.intersection(*varying)) if varying else []
    sizes = {len(row) for one in found.values() for row in one.samples.values()}
    if all(one.samples for one in found.values()) and len(sizes) == 1 and (common or not varying):
        chosen = {
            name: np.stack([one.samples[seed] for seed in (list(one.samples)[:1] if name in fixed else common)])
            for name, one in found.items()
        }
        return compare(chosen, column.better)
    known = {name: (one.value, Interval(one.low, one.high)) for name, one in found.items() if np.isfinite(one.low)}
    return compare_intervals(known, column.better, min((one.seeds for one in found.values()), default=1))


def best_of(names: Iterable[str], table: Table, column: Column) -> str | None:
    """The contender with the best value of a score."""
    sign = 1 if column.better == "higher" else -1
    scored = [name for name in names if column.name in table.get(name, {})]
    return max(scored, key=lambda name: sign * table[name][column.name].value, default=None)


def tied(best: str, judged: Sequence[Comparison]) -> list[str]:
    """Contenders whose comparison with the best is a tie."""
    return [
        pair.b if pair.a == best else pair.a for pair in judged if best in (pair.a, pair.b) and pair.verdict == "tie"
    ]


def possible_loss(best: str, name: str, judged: Sequence[Comparison], column: Column) -> float:
    """By how much `name` may be worse than `best`: the far end of the difference's 95 % interval."""
    pair = next(p for p in judged if {p.a, p.b} == {best, name})
    sign = (1 if pair.a == best else -1) * (1 if column.better == "higher" else -1)
    return max(sign * pair.low, sign * pair.high)


def choose(
    column: Column,
    table: Table,
    judged: Sequence[Comparison],
    refused: Mapping[str, Sequence[str]],
    params: Mapping[str, float],
    nearest: Mapping[str, float],
    fixed: Collection[str] = (),
) -> Pick:
    """The pick: the best on the primary score, or a cheaper contender that is as good for all that matters.

    A tie alone is no proof of equality: a cheaper contender takes the best one's place only where the 95 % interval of
    the difference rules out a loss of more than `NEGLIGIBLE`.

    Args:
        column: the primary score.
        table: estimates.
        judged: comparisons on the primary score.
        refused: contender -> why it breaks the constraints; empty where it keeps them.
        params: contender -> parameters in millions, which decide where latency does not.
        nearest: contender -> by what factor it exceeds the constraint that it misses most.
        fixed: contenders whose score does not depend on the seed.
    """
    scored = [name for name in table if column.name in table[name]]
    allowed = [name for name in scored if not refused[name]]
    best = best_of(allowed, table, column)
    if best is None:
        return Pick(None, column.name, None, None, (), _no_pick(refused, nearest, column, bool(scored)))
    equals = [name for name in tied(best, judged) if name in allowed]

    losses = {name: possible_loss(best, name, judged, column) for name in equals}
    pick = cheapest([best, *(name for name in equals if losses[name] <= NEGLIGIBLE)], table, params)
    others = tuple(name for name in (best, *equals) if name != pick)
    reasons = [
        _best_sentence(pick, best, column, table, judged),
        *_tie_sentences(pick, best, equals, table, judged, params, fixed),
        *_cautions(pick, best, losses, table, params),
        *_refusal_sentences(best, column, table, refused),
    ]
    return Pick(pick, column.name, table[pick][column.name].value, best, others, tuple(filter(None, reasons)))


def cheapest(names: Sequence[str], table: Table, params: Mapping[str, float]) -> str:
    """The fastest; of those that are as fast, the smallest; of those the first, which is the best.

    As fast is who is within 5 % of the fastest, or whose interval touches the fastest one's.
    """
    timed = [name for name in names if LATENCY in table[name]]
    if timed:
        fastest = min((table[name][LATENCY] for name in timed), key=lambda one: one.value)
        names = [name for name in timed if _as_fast(table[name][LATENCY], fastest)]
    return min(names, key=lambda name: params.get(name, float("inf")))


def _as_fast(one: Estimate, fastest: Estimate) -> bool:
    return one.value <= AS_FAST * fastest.value or one.low <= fastest.high


def _best_sentence(pick: str, best: str, column: Column, table: Table, judged: Sequence[Comparison]) -> str:
    one = table[pick][column.name]
    shown = f"{title(column)} {_amount(one.value, column.unit)} (95 % interval {one.low:.1f}..{one.high:.1f}, "
    shown += f"{one.n} images, {one.seeds} seed{'s' * (one.seeds > 1)})"
    if pick != best:
        return f"{pick}: {shown}."
    sign = 1 if column.better == "higher" else -1
    beaten = [pair for pair in judged if pair.verdict == best]
    if not beaten:
        return f"{best} has the best {shown}."
    closest = min(beaten, key=lambda pair: abs(pair.difference))
    other = closest.b if closest.a == best else closest.a
    better = f"{abs(closest.difference):.1f} {_points(column.unit)} {'above' if sign > 0 else 'below'}"
    return f"{best} has the best {shown}; it is {better} {other} ({_p(closest.p_holm)} after Holm)."


def _tie_sentences(
    pick: str,
    best: str,
    equals: Sequence[str],
    table: Table,
    judged: Sequence[Comparison],
    params: Mapping[str, float],
    fixed: Collection[str],
) -> list[str]:
    """One sentence for each contender that ties with the best; differences are subject minus object."""
    said = []
    for name in equals:
        if name == pick:
            subject, words, other = name, f"It ties with {best}, the best value", best
        elif pick == best:
            subject, words, other = best, f"It ties with {name}", name
        else:
            subject, words, other = name, f"{name} ties with {best} too", name
        pair = next(p for p in judged if {p.a, p.b} == {best, name})
        sign = 1 if pair.a == subject else -1
        low, high = sorted((sign * pair.low, sign * pair.high))
        unsure = pair.seeds == 1 and not {pair.a, pair.b} <= set(fixed)
        said.append(
            f"{words}: {sign * pair.difference:+.1f} points, 95 % interval {low:+.1f}..{high:+.1f}, "
            f"{_p(pair.p_holm)} after Holm{', seed variation not included' if unsure else ''}"
            f"{_cheaper(pick, other, table, params)}."
        )
    return said


def _cautions(
    pick: str, best: str, losses: Mapping[str, float], table: Table, params: Mapping[str, float]
) -> list[str]:
    """Cheaper contenders that tie with the best and are not picked, because the tie may hide a loss."""
    unsure = {name: loss for name, loss in losses.items() if loss > NEGLIGIBLE}
    return [
        f"{name} would be cheaper, but may be up to {loss:.1f} points behind {best}; "
        "more test images or seeds would tell."
        for name, loss in unsure.items()
        if cheapest([pick, name], table, params) == name
    ]


def _cheaper(pick: str, other: str, table: Table, params: Mapping[str, float]) -> str:
    ours, theirs = table[pick].get(LATENCY), table[other].get(LATENCY)
    said = ""
    if ours and theirs:
        times = f"({ours.value:.3g} ms against {theirs.value:.3g} ms)"
        if not _as_fast(theirs, ours):
            return f"; {pick} is {theirs.value / ours.value:.1f}x as fast {times}"
        said = f"; their latencies cannot be told apart {times}"
    if pick in params and other in params:
        said += f"; {pick} has {params[pick]:.3g} M parameters against {params[other]:.3g} M"
    return said


def _refusal_sentences(best: str, column: Column, table: Table, refused: Mapping[str, Sequence[str]]) -> list[str]:
    """Contenders that score better than the best allowed one, and what they break."""
    sign = 1 if column.better == "higher" else -1
    bar = sign * table[best][column.name].value
    better = [
        name
        for name in table
        if refused[name] and column.name in table[name] and sign * table[name][column.name].value > bar
    ]
    return [
        f"{name} scores {_amount(table[name][column.name].value, column.unit)}, but {' and '.join(refused[name])}."
        for name in better
    ]


def _no_pick(
    refused: Mapping[str, Sequence[str]], nearest: Mapping[str, float], column: Column, scored: bool
) -> tuple[str, ...]:
    if not scored or not any(refused.values()):
        return (f"No contender has a {title(column)}: see what failed.",)
    name = min(nearest, key=lambda one: nearest[one], default=None)
    said = ["No contender satisfies the constraints."]
    if name is not None:
        said.append(f"The nearest is {name}: {' and '.join(refused[name])}.")
    return tuple(said)


def title(column: Column) -> str:
    """A score's name in a sentence: `linear top-1`."""
    spelled = {"top1": "top-1", "top5": "top-5", "map": "mAP", "ece": "ECE"}
    return " ".join(spelled.get(word, word) for word in column.name.split("_"))


def _amount(value: float, unit: str) -> str:
    return f"{value:.1f} %" if unit == "%" else f"{value:.3g} {unit}".rstrip()


def _points(unit: str) -> str:
    return "points" if unit == "%" else unit or "units"


def _p(p: float) -> str:
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.1g}" if p >= 0.001 else "p < 0.001"


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a battle found.

    Attributes:
        data: report.json as Python values.
        report: path of report.html.
    """

    data: Mapping[str, Any]
    report: Path

    @property
    def pick(self) -> str | None:
        """The recommended contender, or None where none satisfies the constraints."""
        return self.data["pick"]["name"]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, in sentences with numbers."""
        return tuple(self.data["pick"]["reasons"])

    @property
    def table(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Contender -> score -> value, low, high, n, seeds, best, tied; best contender first."""
        return self.data["table"]

    @property
    def aggregate(self) -> Mapping[str, Any]:
        """Other ways to rank over several tasks: `bob`, the mean z score of Battle of the Backbones."""
        return self.data["aggregate"]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return dict(self.data)

    def to_pandas(self) -> Any:
        """One row for each contender and score.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("to_pandas() needs pandas: pip install 'vertebra[pandas]'") from error
        units = {score["name"]: score["unit"] for score in self.data["scores"]}
        return pandas.DataFrame.from_records(
            [
                {"contender": contender, "score": name, "unit": units[name], **cell}
                for contender, row in self.table.items()
                for name, cell in row.items()
            ],
            columns=["contender", "score", "unit", "value", "low", "high", "n", "seeds", "best", "tied"],
        )

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        scores = [score for score in self.data["scores"] if any(score["name"] in row for row in self.table.values())]
        head = "".join(f"<th>{html.escape(score['name'])}<br>{html.escape(score['unit'])}</th>" for score in scores)
        body = "".join(
            f"<tr><th>{html.escape(name)}{' (pick)' * (name == self.pick)}</th>"
            + "".join(_html_cell(row.get(score["name"])) for score in scores)
            + "</tr>"
            for name, row in self.table.items()
        )
        said = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons)
        return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table><ul>{said}</ul>"


def _html_cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return "<td>–</td>"
    ends = "" if cell["low"] is None else f"<br><small>{cell['low']:.1f}..{cell['high']:.1f}</small>"
    value = f"{cell['value']:.4g}"
    return f"<td>{f'<b>{value}</b>' if cell['best'] else value}{ends}</td>"
