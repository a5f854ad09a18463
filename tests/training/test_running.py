import dataclasses
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra import recipes
from vertebra.config import Plan, Run, Views
from vertebra.contracts import Progress
from vertebra.data import digits, read
from vertebra.data.dataset import Dataset
from vertebra.errors import DataError, Preempted, UsageError
from vertebra.spec import Spec
from vertebra.training import running

TINY = Spec("tiny:net", {"dropout": 0.2})
PLAN = Plan(steps=6, batch=64, ema=0.9, lr=3e-3, workers=0, views=Views(scale=(0.5, 1.0), mixup=0.2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty images of two classes, without splits."""
    for name, shade, count in (("dark", 40, 10), ("light", 200, 20)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 10), (shade, shade + i, shade)).save(tmp_path / "data" / name / f"{i:02d}.png")
    return tmp_path / "data"


def test_a_missing_val_split_is_held_out_with_the_same_mix(folder: Path) -> None:
    data = running.material(read(folder))
    assert data.train.counts.tolist() == [8, 16] and data.val.counts.tolist() == [2, 4]
    assert not set(data.train.names) & set(data.val.names)
    assert data.notes[-1] == "no val split: 6 of 30 training images are held out, with the same mix of classes"


def test_the_datas_own_val_split_is_used() -> None:
    data = running.material(digits())
    assert len(data.val) == 269 and data.notes == ()


def _changed(**changes) -> Dataset:
    return dataclasses.replace(digits(), **changes)


def test_data_that_cannot_be_trained_on_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        running.material(_changed(label="none"))
    with pytest.raises(DataError, match="task is 'multi' and digits has single-label targets"):
        running.material(digits(), task="multi")
    with pytest.raises(DataError, match="has no train split; it has test"):
        running.material(_changed(splits={"test": digits().split("test")}))
    train = digits().split("train")
    ones = train.select(np.flatnonzero(train.targets == 1))
    with pytest.raises(DataError, match="images of 1 class; training needs at least 2"):
        running.material(_changed(splits={"train": ones}))


def test_balanced_weights_are_inverse_frequencies_of_mean_one(folder: Path) -> None:
    weights = running.balanced(running.material(read(folder)).train)
    assert weights.tolist() == pytest.approx([4 / 3, 2 / 3])


def test_weights_decide_the_recipe() -> None:
    with_tag, without = Spec("timm/test_resnet.r160_in1k"), Spec("timm/test_resnet")
    assert running.propose("x", with_tag, 500).recipe == "finetune"
    assert running.propose("x", without, 500).recipe == "scratch"
    assert running.pretrained(without, True).options == {"weights": "pretrained"}
    assert running.pretrained(with_tag, False) == without
    assert running.has_weights(Spec("timm/test_resnet", {"weights": "file.safetensors"}))


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_give_small_sets_enough_steps(name: str) -> None:
    for images in (20, 200, 2_000, 200_000):
        run = recipes.find(name)("data", Spec("timm/test_resnet"), images)
        steps = run.plan.epochs * max(1, images // run.plan.batch)
        assert run.recipe == name and 8 <= run.plan.batch <= (64 if run.method is None else 256)
        assert steps >= 60 and (images < 2_000 or steps >= 800)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'finetun'; did you mean finetune"):
        recipes.find("finetun")


class Preempting:
    """A meter that sends SIGTERM after the fourth step."""

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def epoch(self, row: Mapping[str, Any]) -> None:
        pass


def test_a_run_is_recorded_resumed_with_workers_and_exact(tmp_path: Path) -> None:
    run, state = Run(data="digits", backbone=TINY, plan=PLAN, image_size=8), torch.get_rng_state()
    running.train(run, tmp_path / "whole")
    with pytest.raises(Preempted):
        running.train(run, tmp_path / "part", meter=Preempting())
    running.resume(tmp_path / "part", ["workers=1"])
    assert torch.equal(torch.get_rng_state(), state)
    files = [tmp_path / name / "checkpoints" / "last" / "model.safetensors" for name in ("whole", "part")]
    assert files[0].read_bytes() == files[1].read_bytes()
    recorded = json.loads((tmp_path / "part" / "run.json").read_text())
    assert recorded["run"]["plan"]["workers"] == 1 and recorded["data"]["fingerprint"] == digits().fingerprint
    with pytest.raises(UsageError, match="holds a run already"):
        running.train(run, tmp_path / "whole")


def test_changed_data_cannot_be_resumed(tmp_path: Path, folder: Path) -> None:
    run = Run(data=str(folder), backbone=TINY, plan=dataclasses.replace(PLAN, steps=1, batch=8), image_size=8)
    running.train(run, tmp_path / "run")
    (folder / "dark" / "00.png").unlink()
    with pytest.raises(DataError, match=r"is not what .* was started on"):
        running.resume(tmp_path / "run")


def test_edits_say_what_they_cost(tmp_path: Path) -> None:
    running.train(
        Run(data="digits", backbone=TINY, plan=dataclasses.replace(PLAN, steps=1), image_size=8), tmp_path / "r"
    )
    before, after, recorded = running.reread(tmp_path / "r", ["workers=2", "lr=0.5"])
    assert running.changes(before, after, recorded) == [
        "plan.lr: 0.003 -> 0.5 (not exact: the rest of the run differs)",
        "plan.workers: 0 -> 2 (exact)",
    ]
    other = running.changes(before, before, {**recorded, "threads": 99})
    assert other == [f"threads: 99 -> {torch.get_num_threads()} (not exact: the rest of the run differs)"]
    with pytest.raises(UsageError, match=r"plan\.optimizer cannot change on resume"):
        running.reread(tmp_path / "r", ["optimizer=sgd"])


def test_a_size_that_the_backbone_does_not_take_is_refused() -> None:
    run = Run(data="digits", backbone=Spec("tiny:Memory"), plan=PLAN, image_size=8)
    with pytest.raises(UsageError, match="tiny:Memory takes no image_size"):
        running.check(run, running.material(digits()), "cpu")


def test_mixing_many_labels_is_refused() -> None:
    run = Run(data="digits", backbone=TINY, plan=PLAN)
    many = dataclasses.replace(running.material(digits()), multi=True)
    with pytest.raises(UsageError, match=r"mixup and views\.cutmix mix one label"):
        running.check(run, many, "cpu")
