import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vertebra
from vertebra.battle.contest import battle, command_of
from vertebra.battle.ranking import Ranking
from vertebra.data import Dataset, digits
from vertebra.errors import DataError, Preempted, UsageError, VertebraError
from vertebra.training.rundir import locked

FROZEN = ["tiny_nets:narrow?training=pretrained", "tiny_nets:wide?training=pretrained"]
HERE = Path(__file__).parent


def quick(run_dir: Path, contenders: Any = FROZEN, probes: Any = ("knn", "linear", "cost"), **options: Any) -> Ranking:
    options = {"seeds": 2, "jobs": 1, "quiet": True, **options}
    return battle(contenders, probes, "digits", run_dir=run_dir, **options)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]


def values(run_dir: Path) -> dict[str, Any]:
    """Everything that was found, but for the time it took."""
    return {row["cell"]: {name: score["value"] for name, score in row["scores"].items()} for row in lines(run_dir)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A battle of two contenders that are trained, over two seeds."""
    run_dir = tmp_path_factory.mktemp("battle") / "whole"
    quick(run_dir, ["tiny_nets:narrow", "tiny_nets:wide"], epochs=1)
    return run_dir


def test_every_cell_is_run_once(finished: Path) -> None:
    cells = [row["cell"] for row in lines(finished)]
    trained = {f"tiny_nets:{n}|{p}|{s}" for n in ("narrow", "wide") for p in ("knn", "linear") for s in (0, 1)}
    assert len(cells) == len(set(cells)) == 10
    assert set(cells) == trained | {"tiny_nets:narrow|cost|0", "tiny_nets:wide|cost|0"}
    assert all(row["state"] == "done" for row in lines(finished))


def test_report_json_keeps_its_schema(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    fields = (
        "vertebra created command data machine settings contenders probes scores table comparisons pick pareto "
        "aggregate per_class mistakes explanations robustness calibration left_out failed seconds"
    )
    assert list(report) == fields.split()
    assert report["data"]["sizes"] == {"train": 1078, "val": 269, "test": 450}
    assert report["settings"]["primary"] == "linear_top1" and report["settings"]["seeds"] == [0, 1]
    assert [c["training"] for c in report["contenders"]] == ["scratch", "scratch"]
    cell = report["table"]["tiny_nets:wide"]["linear_top1"]
    assert cell["low"] < cell["value"] < cell["high"] and (cell["n"], cell["seeds"]) == (450, 2)
    assert report["pick"]["best"] == "tiny_nets:wide" and report["pick"]["reasons"]
    assert report["aggregate"]["bob"]["rank"][0] == "tiny_nets:wide"
    assert len(report["per_class"]["tiny_nets:wide"]) == 10 and report["mistakes"][0]["split"] == "test"
    assert (finished / "report.html").is_file()


def test_resuming_a_finished_battle_runs_nothing(finished: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    ranking = battle(run_dir=finished, resume=True, quiet=True)
    assert (finished / "results.jsonl").read_bytes() == before
    assert ranking.table["tiny_nets:wide"]["linear_top1"]["seeds"] == 2


def test_a_torn_line_is_run_again_with_the_same_result(finished: Path) -> None:
    journal = finished / "results.jsonl"
    whole, found = journal.read_bytes(), values(finished)
    journal.write_bytes(whole[:-40])
    battle(run_dir=finished, resume=True, quiet=True, jobs=1)
    assert values(finished) == found and len(lines(finished)) == 10


def test_a_battle_that_was_killed_ends_as_one_that_was_not(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    call = "from vertebra.battle.contest import battle; battle(%r, %r, 'digits', run_dir=%r, seeds=2, epochs=1, jobs=1)"
    code = call % (["tiny_nets:narrow", "tiny_nets:wide"], ["knn", "linear", "cost"], str(run_dir))
    path = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run_dir / "results.jsonl").exists() and (run_dir / "results.jsonl").read_bytes().count(b"\n") >= 3:
            process.kill()
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    kept = {row["cell"] for row in lines(run_dir)}
    assert 3 <= len(kept) < 10
    battle(run_dir=run_dir, resume=True, quiet=True, jobs=1)
    assert values(run_dir) == values(finished) and len(lines(run_dir)) == 10


def test_pretrained_contenders_run_once_unless_the_probe_draws(tmp_path: Path) -> None:
    ranking = quick(tmp_path, probes=["linear", "few_shot?repeats=2"])
    cells = [row["cell"].removeprefix("tiny_nets:narrow|") for row in lines(tmp_path) if "narrow" in row["cell"]]
    assert sorted(cells) == ["few_shot?repeats=2|0", "few_shot?repeats=2|1", "linear|0"]
    assert "seed variation not included" not in ranking.reasons[0]


def test_a_failing_contender_costs_its_own_cells_only(tmp_path: Path) -> None:
    names = [FROZEN[0], "tiny_nets:broken", "tiny_nets:explosive?training=pretrained"]
    report = quick(tmp_path, names).to_json()
    assert report["pick"]["name"] == FROZEN[0].partition("?")[0]
    failed = {(f["contender"], f["probe"]): f["error"] for f in report["failed"]}
    assert failed["tiny_nets:broken", "linear"].startswith("RuntimeError: no such luck (tiny_nets.py, line ")
    assert failed["tiny_nets:explosive", "knn"].startswith("MemoryError: too many images")
    assert ("tiny_nets:explosive", "cost") not in failed


def test_nobody_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(VertebraError, match="no contender can be built; RuntimeError: no such luck"):
        quick(tmp_path / "new", ["tiny_nets:broken"])
    assert not (tmp_path / "new").exists()


def test_constraints_bind_the_pick_and_bring_their_probe(tmp_path: Path) -> None:
    ranking = quick(
        tmp_path, probes=["linear", "speed?rounds=2&repeats=2&batch=1"], max_latency="1us", max_params="400K"
    )
    assert ranking.pick is None
    assert ranking.reasons[0] == "No contender satisfies the constraints."
    assert "above 0.001 ms" in ranking.reasons[1]
    contender = ranking.to_json()["contenders"][0]
    assert not contender["allowed"] and len(contender["why_not"]) == 1


def test_a_budget_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    ranking = quick(tmp_path, probes=["linear", "knn", "finetune?epochs=1000"], budget="25s", primary="linear_top1")
    left_out = {item["what"]: item["why"] for item in ranking.to_json()["left_out"]}
    assert set(left_out) == {f"tiny_nets:{n}, finetune?epochs=1000, seeds 0, 1" for n in ("narrow", "wide")}
    assert all(why.startswith("estimated ") and "of the budget were left" in why for why in left_out.values())
    assert ranking.pick is not None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seeds": 3}, r"seeds was \[0, 1\] and is now \[0, 1, 2\]"),
        ({"contenders": FROZEN}, "contenders was "),
        ({"epochs": 2}, "epochs was 1 and is now 2"),
    ],
)
def test_a_resumed_battle_must_be_the_same(finished: Path, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        battle(run_dir=finished, resume=True, quiet=True, **changed)


def test_data_that_changed_cannot_be_resumed(finished: Path) -> None:
    data = digits()
    fewer = Dataset(
        "digits",
        "digits",
        "single",
        data.classes,
        {name: split.select(range(len(split) - 1)) for name, split in data.splits.items()},
    )
    with pytest.raises(UsageError, match="the data have changed"):
        battle(data=fewer, run_dir=finished, resume=True, quiet=True)


def test_a_directory_in_use_names_the_process(finished: Path) -> None:
    with locked(finished), pytest.raises(VertebraError, match=f"in use by process {os.getpid()}"):
        battle(run_dir=finished, resume=True, quiet=True)


def test_an_existing_directory_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exists; choose another name, say --overwrite, or go on with --resume"):
        quick(finished)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is no run directory"):
        quick(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="no run directory"):
        battle(run_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"contenders": ["timm/resnet81"]}, "no network called 'resnet81'"),
        ({"contenders": "timm/resnet18"}, "contenders and probes are lists"),
        ({"contenders": []}, "contenders is empty"),
        ({"probes": ["linaer"]}, r"no probe is called 'linaer'; did you mean linear\?"),
        ({"probes": ["knn?k=0"]}, "k is 0; it must be at least 1"),
        ({"probes": ["knn", "knn"]}, "probe knn is given twice"),
        ({"probes": ["cost"]}, "none of the probes cost can decide"),
        ({"primary": "linear_top11"}, r"no score is called 'linear_top11'; did you mean linear_top1"),
        ({"primary": "finetune_top1"}, "comes from the probe finetune, which is not in this battle"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"budget": "soon"}, "budget is 'soon'"),
        ({"max_latency": "-3"}, "max_latency is '-3'"),
        ({"max_latencies": 3}, r"has no option 'max_latencies'; did you mean max_latency"),
        ({"jobs": 0}, "jobs is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"licence": "free"}, "licence is 'free'"),
        ({"weights": {"timm/resnet81": "x"}}, "no contender has that address"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        quick(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_data_are_needed_and_must_have_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="battle\\(\\) needs data"):
        battle(FROZEN, ["knn"])
    with pytest.raises(DataError, match="nowhere"):
        battle(FROZEN, ["knn"], tmp_path / "nowhere")


def test_sigterm_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vertebra.battle import running

    def work(job: Any) -> Any:
        rows = running_work(job)
        yield next(rows)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    running_work = running.work
    monkeypatch.setattr(running, "work", work)
    with pytest.raises(Preempted, match="SIGTERM; what is finished is kept; go on with: vertebra battle --resume"):
        quick(tmp_path)
    assert len(lines(tmp_path)) == 1


def test_the_command_can_be_typed_again() -> None:
    call = {
        "data": "my images",
        "contenders": ["a/b", "c?d=1"],
        "seeds": [0, 4],
        "budget": "10m",
        "weights": {"a/b": "w"},
    }
    assert command_of(call) == (
        "vertebra battle 'my images' --contenders 'a/b,c?d=1' --seeds 0,4 --budget 10m --weights a/b=w"
    )


def test_the_next_score_decides_where_not_every_contender_has_the_first(tmp_path: Path) -> None:
    names = ["tiny_nets:narrow?training=pretrained", "tiny_nets:picky?training=pretrained"]
    report = quick(tmp_path, names, ["finetune?epochs=1&rates=[1.0]", "linear"], seeds=1).to_json()
    assert report["settings"]["primary"] == report["pick"]["score"] == "linear_top1"
    assert "linear_top1 decides, because not every contender has a finetune_top1" in report["data"]["notes"]


def test_a_backbone_that_sees_nothing_is_last_for_bob(tmp_path: Path) -> None:
    names = [*FROZEN, "tiny_nets:blind?training=pretrained"]
    bob = quick(tmp_path, names, ["linear", "few_shot?repeats=2", "retrieval"], seeds=1).aggregate["bob"]
    assert bob["rank"][-1] == "tiny_nets:blind" and bob["n"] == 3
    assert set(bob["tasks"]) == {"classification", "low-label", "retrieval"}
    assert bob["intervals"]["tiny_nets:blind"][1] < min(bob["intervals"][n][0] for n in bob["rank"][:2])


def test_what_was_trained_can_be_loaded(tmp_path: Path) -> None:
    quick(tmp_path, ["timm/test_vit?image_size=32"], ["knn"], seeds=1, epochs=1)
    (folder,) = (tmp_path / "trained").iterdir()
    predictor = vertebra.load(folder)
    assert tuple(predictor.classes) == tuple("0123456789")
    assert not (tmp_path / "evidence").exists()


def test_many_labels_an_image_are_ranked_by_mean_average_precision(tmp_path: Path) -> None:
    data = digits()
    classes = ("even", "small", "round")
    truth = np.array([[d % 2 == 0, d < 5, d in (0, 6, 8, 9)] for d in range(10)], dtype=np.uint8)
    splits = {name: replace(one, classes=classes, targets=truth[one.targets]) for name, one in data.splits.items()}
    many = Dataset("many", "table", "multi", classes, splits)
    ranking = battle(FROZEN, ["linear", "knn", "calibration"], many, run_dir=tmp_path, seeds=1, jobs=1, quiet=True)
    report = ranking.to_json()
    assert report["settings"]["primary"] == "linear_map" and ranking.pick is not None
    cell = ranking.table["tiny_nets:wide"]["linear_map"]
    assert 50 < cell["low"] < cell["value"] < cell["high"] < 100
    assert not report["comparisons"]["linear_map"][0]["paired"]
    assert report["left_out"][0]["why"].startswith("calibration: ") and report["failed"] == []
