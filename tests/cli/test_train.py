import csv
import io
import json
from pathlib import Path

import pytest

from vertebra.cli.main import main
from vertebra.data import digits

TRAIN = ["train", "digits", "-m", "tiny:net", "--imgsz", "8", "--set", "steps=4", "-j", "0", "--precision", "32-true"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training"))


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(list(words))
    found = capsys.readouterr()
    return int(leave.value.code or 0), found.out, found.err


def test_train_predict_val_and_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = _run(capsys, *TRAIN, "--name", "mine", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["run"] == "runs/train/mine" and result["steps"] == 4 and 0 <= result["best"]["top1"] <= 100

    code, out, err = _run(capsys, *TRAIN, "--name", "mine")
    assert code == 2 and "runs/train/mine exists" in err

    digits().split("test").image(0).save("a.png")
    Path("b.png").write_bytes(b"no image")
    code, out, err = _run(capsys, "predict", result["run"], "a.png", "b.png", "--top", "2")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 3 and [row["image"] for row in rows] == ["a.png", "a.png", "b.png"]
    assert rows[2]["error"] and "warning: b.png" in err
    code, out, _ = _run(capsys, "predict", result["run"], "a.png", "--out", "answers.json")
    assert code == 0 and out == "" and len(json.loads(Path("answers.json").read_text())["images"]) == 1

    code, out, _ = _run(capsys, "val", result["run"], "digits", "--split", "val", "--json")
    found = json.loads(out)
    assert code == 0 and found["n"] == 269
    assert found["metrics"]["top1"] == pytest.approx(result["best"]["top1"], abs=1e-3)
    code, out, _ = _run(capsys, "val", result["run"], "digits")
    assert "split test, 450 images" in out and "balanced_acc" in out

    code, out, _ = _run(capsys, "resume", result["run"], "--set", "steps=6", "--dry-run")
    assert code == 0 and out == "plan.steps: 4 -> 6 (not exact: the rest of the run differs)\n"
    code, out, _ = _run(capsys, "resume", result["run"], "--set", "steps=6", "--json")
    assert code == 0 and json.loads(out)["steps"] == 6


def test_pre_emption_ends_with_75_and_resumes_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "-m", "tiny:doomed"]
    code, out, err = _run(capsys, *words, "--name", "part")
    assert (
        code == 75
        and "error: SIGTERM: stopped after step 4 of 4" not in out
        and "vertebra resume runs/train/part" in err
    )
    assert _run(capsys, "resume", "runs/train/part", "-q")[0] == 0
    assert _run(capsys, *words, "--name", "whole", "-q")[0] == 0
    models = [Path(f"runs/train/{name}/checkpoints/last/model.safetensors").read_bytes() for name in ("part", "whole")]
    assert models[0] == models[1]


def test_a_dry_run_shows_the_plan_and_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = _run(capsys, *TRAIN, "--epochs", "3", "--lr", "0.5", "--dry-run")
    assert code == 0 and "1078 to train on, 269 to choose by, 10 classes" in out and "adamw at 0.5" in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = _run(capsys, *TRAIN, "--epochs", "3", "--recipe", "finetune", "--print-config")
    run = json.loads(out)
    assert run["plan"]["epochs"] == 3 and run["recipe"] == "finetune" and run["plan"]["steps"] == 4


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--recipe", "scrach"], 2, "did you mean scratch"),
        (["--set", "plan.optimiser=sgd"], 2, "did you mean optimizer"),
        (["--set", "optimizer=sdg"], 2, "did you mean sgd"),
        (["--epochs", "0"], 2, "must be at least 1"),
        (["--device", "cuda:77"], 2, "which has"),
        (["--name", "a/b"], 2, "name of a folder"),
        (["--precision", "fp16"], 2, "plan.precision is 'fp16'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found, _, err = _run(capsys, *TRAIN, *words)
    assert found == code and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_doctor_speaks_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "doctor", "--json")
    assert code == 0 and json.loads(out)["devices"]["cpu"]["ok"]
    code, out, _ = _run(capsys, "doctor")
    assert code == 0 and "device cpu: works" in out and "network: VERTEBRA_OFFLINE 1" in out
