import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vertebra
from vertebra.cli.main import main
from vertebra.config import Run
from vertebra.contracts import Progress
from vertebra.data import digits, read
from vertebra.data.loader import Batches
from vertebra.errors import DataError, Preempted, UsageError
from vertebra.spec import Spec
from vertebra.training import pretraining, running

SMALL = ["-m", "tiny:net", "--imgsz", "8", "--set", "steps=4", "-b", "64", "-j", "0", "--precision", "32-true"]
DIGITS = ["pretrain", "digits", "--method", "simclr_v2", *SMALL]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training"))


@pytest.fixture
def flat(tmp_path: Path) -> str:
    """Twenty images without labels."""
    (tmp_path / "flat").mkdir()
    random = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{i:02d}.png")
    return "flat"


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(list(words))
    found = capsys.readouterr()
    return int(leave.value.code or 0), found.out, found.err


def test_a_flat_folder_is_pretrained_on_and_its_weights_are_a_backbones(
    capsys: pytest.CaptureFixture[str], flat: str
) -> None:
    words = ["pretrain", flat, "--method", "simclr_v2", "-m", "timm/test_resnet", "--imgsz", "32", "--epochs", "1"]
    code, out, _ = _run(capsys, *words, "--precision", "32-true", "--name", "mine")
    assert code == 0 and "20 to train on without labels\n" in out and "no classes to judge by" in out
    assert out.endswith("--backbone timm/test_resnet --weights runs/pretrain/mine/checkpoints/last\n")
    last = Path("runs/pretrain/mine/checkpoints/last")
    assert not Path("runs/pretrain/mine/checkpoints/best").exists()
    saved, config = load_file(last / "model.safetensors"), json.loads((last / "config.json").read_text())
    assert config["architecture"] == "test_resnet" and config["vertebra"]["method"]["address"] == "simclr_v2"
    assert not (last / "labels.json").exists()
    backbone = vertebra.backbone("timm/test_resnet", weights=str(last))
    assert backbone.preprocess.size == (32, 32)
    state = backbone.state_dict()
    assert all(torch.equal(tensor, saved[f"backbone.{name}"]) for name, tensor in state.items())
    assert {name.partition(".")[0] for name in saved} == {"backbone", "head"}

    words = ["train", "digits", "-m", "timm/test_resnet", "--weights", str(last), "--set", "steps=1", "--json"]
    code, out, _ = _run(capsys, *words, "--name", "tuned")
    assert code == 0
    run = json.loads(Path("runs/train/tuned/run.json").read_text())["run"]
    assert run["recipe"] == "finetune" and run["backbone"]["options"]["weights"] == str(last)


def test_labels_judge_by_neighbours_and_choose_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, *DIGITS, "--name", "mine", "--set", "evaluate_every=1", "--json")
    result = json.loads(out)
    assert code == 0 and result["steps"] == 4 and 0 < result["best"]["knn_top1"] <= 100
    recorded = json.loads(Path("runs/pretrain/mine/run.json").read_text())
    assert recorded["run"]["method"] == {"address": "simclr_v2", "options": {}, "kind": "methods"}
    assert len(recorded["run"]["plan"]["more_views"]) == 1 and recorded["run"]["plan"]["optimizer"] == "lars"
    assert recorded["data"]["val"] == 269


def test_resume_ends_in_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    class Preempting:
        def step(self, progress: Progress, loss: float, lr: float) -> None:
            if progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def epoch(self, row: dict) -> None:
            """Nothing."""

    code, out, _ = _run(capsys, *DIGITS, "--print-config")
    run = pretraining.edited(
        pretraining.propose("digits", Spec("tiny:net"), 1078, Spec("simclr_v2", kind="methods")), []
    )
    assert code == 0 and json.loads(out)["method"]["address"] == run.method.address  # type: ignore[union-attr]
    edits = ["image_size=8", "plan.steps=4", "plan.batch=64", "plan.workers=0", "plan.precision=32-true"]
    run = pretraining.edited(run, edits)
    with pytest.raises(Preempted, match="vertebra resume"):
        running.train(run, Path("part"), meter=Preempting())
    assert _run(capsys, "resume", "part", "-q")[0] == 0
    running.train(run, Path("whole"))
    models = [Path(name, "checkpoints", "last", "model.safetensors").read_bytes() for name in ("part", "whole")]
    assert models[0] == models[1]
    code, _, err = _run(capsys, "resume", "part", "--set", "method.options.temperature=0.2")
    assert code == 2 and "method cannot change on resume" in err


def test_views_that_are_alike_stay_alike_when_they_are_edited() -> None:
    run = pretraining.propose("digits", Spec("tiny:net"), 1078, Spec("simclr_v2", kind="methods"))
    plan = pretraining.edited(run, ["plan.views.flip=0", "plan.lr=0.5"]).plan
    assert plan.views.flip == 0 and plan.more_views == (plan.views,) and plan.lr == 0.5
    assert pretraining.edited(Run(data="x", backbone=Spec("tiny:net")), ["plan.views.flip=0"]).plan.more_views == ()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--method", "simclr_v3"], 2, "did you mean simclr_v2"),
        (["--recipe", "finetune"], 2, "trains a classifier on labels: vertebra train --recipe finetune"),
        (["--set", "method.options.heat=1"], 2, "has no option 'heat'"),
        (["--epochs", "0"], 2, "must be at least 1"),
        (["--name", "a/b"], 2, "name of a folder"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found, _, err = _run(capsys, *DIGITS, *words)
    assert found == code and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = _run(capsys, *DIGITS, "--dry-run")
    assert code == 0 and "1078 to train on without labels, 269 to judge by their neighbours" in out
    assert "method simclr_v2, recipe simclr_v2" in out and "64 images in 2 views, lars at 0.6" in out
    assert list(tmp_path.iterdir()) == []


def test_training_refuses_a_recipe_that_pretrains(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "train", "digits", *SMALL, "--recipe", "simclr_v2")
    assert code == 2 and "vertebra pretrain --method simclr_v2" in err
    with pytest.raises(UsageError, match="has no recipe of its name; give --recipe"):
        pretraining.propose("digits", Spec("tiny:net"), 10, Spec("tiny:net", kind="methods"))


def test_images_of_any_label_are_material(flat: str) -> None:
    found = running.material(read(flat), labels="optional")
    assert len(found.train) == 20 and len(found.val) == 0
    with pytest.raises(DataError, match="has no labels"):
        running.material(read(flat))
    labelled = running.material(digits(), labels="optional")
    assert (len(labelled.train), len(labelled.val)) == (1078, 269)


def test_neighbours_vote_for_classes() -> None:
    class Brightness(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor):
            from vertebra.contracts import Features

            return Features((), self.scale * images.flatten(1))

    data = running.material(digits())
    from vertebra.contracts import Preprocess

    preprocess = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")
    val = Batches(data.val, preprocess, views=None, batch=64, seed=0, workers=0)
    found = pretraining.Neighbours(Brightness(), data.train, val)()  # type: ignore[arg-type]
    assert found["knn_top1"] == pytest.approx(96.7, abs=2.5)  # pixels alone tell digits apart
