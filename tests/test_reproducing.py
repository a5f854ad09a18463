"""`vertebra reproduce` on a page that is made here: cells are kept, spreads and verdicts are right."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from vertebra import paper, reproducing
from vertebra.cli.main import vertebra
from vertebra.contracts import Check, Effect, Measured
from vertebra.errors import UsageError, VertebraError

PAGE = '''
"""A page with an effect."""

from pathlib import Path

from vertebra.contracts import Check, Effect
from vertebra.paper import Paper

PAPER = Paper(id="doubling", title="Twice Is More", year=2026)


def effect(scale, data):
    return Effect(
        claim="twice the seed is more than the seed",
        arms={"once": "the seed", "twice": "the seed, twice"},
        baseline="once",
        metrics={"top1": "%", "other": ""},
        measure=measure,
        checks=lambda m: [
            Check("twice above once", m.mean("twice", "top1") > m.mean("once", "top1"), "figures"),
            Check("never", False, "figures"),
        ],
        limits="shows nothing",
        data="none",
        prepare=lambda seed, folder: (folder / "shared.txt").write_text(str(seed)),
    )


def measure(arm, seed, folder):
    with (folder.parent / "calls.txt").open("a") as file:
        file.write(f"{arm} {seed}\\n")
    if (folder.parent / "break").exists():
        raise RuntimeError("broken on purpose")
    assert (folder.parent / f"prepared-{seed}" / "shared.txt").read_text() == str(seed)
    found = {"top1": (1 + seed) * (2.0 if arm == "twice" else 1.0)}
    return found if arm == "once" else {**found, "other": 7.0}
'''


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> paper.Page:
    """The page, importable here and in the processes that measure; it is found as an ordinary one is."""
    (tmp_path / "doubling.py").write_text(PAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = paper.read_page(tmp_path / "doubling.py", "blocks")
    assert found
    monkeypatch.setattr(paper.Page, "module", property(lambda self: self.name))
    monkeypatch.setattr(reproducing, "find_page", lambda name: found)
    monkeypatch.setattr(reproducing, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(reproducing, "as_completed", lambda futures: list(futures))
    yield found
    sys.modules.pop("doubling", None)


class Here:
    """A pool that is this process."""

    def __init__(self, *_: object, **__: object) -> None:
        self.broken = False

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shutdown(self, **_: object) -> None:
        self.broken = True

    def submit(self, work: object, cell: reproducing.Cell) -> "Later":
        return Later(work, cell)


class Later:
    def __init__(self, work: object, cell: reproducing.Cell) -> None:
        self.work, self.cell = work, cell

    def result(self) -> dict[str, float]:
        return self.work(self.cell)


def calls(tmp_path: Path) -> list[str]:
    return next(tmp_path.rglob("calls.txt")).read_text().splitlines()


def test_entry(page: paper.Page, tmp_path: Path) -> None:
    entry = reproducing.reproduce("doubling", seeds=3, runs=tmp_path / "runs", out=tmp_path / "evidence")
    twice = entry["arms"]["twice"]["metrics"]
    assert twice["top1"]["values"] == [2, 4, 6] and twice["top1"]["mean"] == 4 and twice["top1"]["sd"] == 2
    assert twice["top1"]["gain"] == 2
    # mean 2, sd 1, three seeds: 2 -+ t(0.975, 2) / sqrt(3)
    assert twice["top1"]["gain_ci95"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], abs=1e-5)
    assert twice["other"]["mean"] == 7 and "gain" not in twice["other"]
    assert "other" not in entry["arms"]["once"]["metrics"]
    assert entry["verdict"] == "1 of 2 checks holds" and [c["holds"] for c in entry["checks"]] == [True, False]
    assert entry["command"] == "vertebra reproduce doubling --scale toy --seeds 3"
    assert json.loads((tmp_path / "evidence" / "doubling.json").read_text())["evidence"] == [entry]


def test_cells_are_kept_until_the_page_changes(page: paper.Page, tmp_path: Path) -> None:
    def run(seeds: int, **choices: bool) -> None:
        reproducing.reproduce("doubling", seeds=seeds, runs=tmp_path, out=None, **choices)

    run(2)
    run(3)
    assert calls(tmp_path) == ["once 0", "twice 0", "once 1", "twice 1", "once 2", "twice 2"]
    run(2, fresh=True)
    assert len(calls(tmp_path)) == 10
    page.path.write_text(PAGE + "\n# changed\n")
    run(2)
    assert len(list(tmp_path.glob("reproduce/doubling/toy-*"))) == 2


def test_evidence_names_the_commits_that_measured_it(page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(commit: str, seeds: int) -> str:
        monkeypatch.setattr(reproducing.rundir, "surroundings", lambda: {"commit": commit})
        return reproducing.reproduce("doubling", seeds=seeds, runs=tmp_path, out=None)["commit"]

    assert at("a1", 2) == "a1"
    assert at("b2", 2) == "a1"  # nothing was measured again
    assert at("b2", 3) == "a1, b2"


def test_a_broken_cell_names_itself_and_spares_the_others(page: paper.Page, tmp_path: Path) -> None:
    reproducing.reproduce("doubling", seeds=2, runs=tmp_path, out=None)
    folder = next(tmp_path.glob("reproduce/doubling/toy-*"))
    (folder / "break").touch()
    with pytest.raises(VertebraError, match="doubling, arm once, seed 2: RuntimeError: broken on purpose"):
        reproducing.reproduce("doubling", seeds=3, runs=tmp_path, out=None)
    assert (folder / "once-1" / "cell.json").is_file() and not (folder / "once-2" / "cell.json").exists()


def test_evidence_of_another_scale_or_data_stays(page: paper.Page, tmp_path: Path) -> None:
    reproducing.reproduce("doubling", seeds=2, runs=tmp_path, out=tmp_path)
    file = tmp_path / "doubling.json"
    other = json.loads(file.read_text())["evidence"][0] | {"scale": "gpu"}
    file.write_text(json.dumps({"evidence": [other]}))
    reproducing.reproduce("doubling", seeds=2, runs=tmp_path, out=tmp_path)
    reproducing.reproduce("doubling", seeds=3, runs=tmp_path, out=tmp_path)
    assert [(one["scale"], one["seeds"]) for one in json.loads(file.read_text())["evidence"]] == [
        ("gpu", 2),
        ("toy", 3),
    ]
    file.write_text("{}")
    with pytest.raises(UsageError, match=r"doubling\.json is no evidence"):
        reproducing.reproduce("doubling", seeds=2, runs=tmp_path, out=tmp_path)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"seeds": 1}, "seeds is 1; a spread needs at least 2"),
        ({"scale": "huge"}, "scale is 'huge'; it can be toy or gpu"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_bad_choices(choices: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reproducing.reproduce("swin", out=None, **choices)


def test_gpu_scale_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--scale gpu needs a CUDA device"):
        reproducing.reproduce("swin", scale="gpu", out=None)


def test_pages_without_an_effect_say_who_has_one() -> None:
    with pytest.raises(UsageError, match="crossvit has no effect to reproduce"):
        reproducing.reproduce("crossvit", out=None)
    with pytest.raises(UsageError, match=r"no page is called 'swim'.*swin"):
        reproducing.reproduce("swim", out=None)


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ([True, True], "all 2 checks hold"),
        ([True, False, True], "2 of 3 checks hold"),
        ([False, True], "1 of 2 checks holds"),
        ([False], "none of 1 checks holds"),
    ],
)
def test_verdict(holds: list[bool], said: str) -> None:
    assert reproducing.verdict([Check("a", one, "") for one in holds]) == said


def test_measured() -> None:
    values = {"a": {"m": np.array([1.0, 3.0])}, "b": {"m": np.array([2.0, 2.0])}}
    assert Measured(values).mean("a", "m") == 2 and Measured(values).gain("a", "b", "m").tolist() == [-1, 1]


def test_every_effect_is_whole() -> None:
    """Of each page with an effect: what the contract asks, without measuring."""
    for name in reproducing.with_effects():
        effect = reproducing.effect_of(paper.find_page(name), "toy", None)
        assert isinstance(effect, Effect) and effect.baseline in effect.arms and len(effect.arms) > 1, name
        assert effect.claim and effect.limits and effect.data and callable(effect.measure), name


def test_command(page: paper.Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(vertebra, ["reproduce", "doubling", "--seeds", "2"])
    assert result.exit_code == 0, result.output
    assert "twice   3 ± 1.4 (+1.5, -4.85..+7.85)  7 ± 0" in result.stdout
    assert "holds: twice above once: figures" in result.stdout and "fails: never" in result.stdout
    assert "verdict: 1 of 2 checks holds" in result.stdout and "evidence/doubling.json" in result.stdout
    shown = CliRunner().invoke(vertebra, ["reproduce", "doubling", "--seeds", "2", "--json"])
    assert json.loads(shown.stdout)["verdict"] == "1 of 2 checks holds"
