"""The contract of a curriculum, over every one that is found: a function of progress, in range, at the plan at last."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vertebra.config import Plan, Views
from vertebra.contracts import Curriculum, Progress, Settings
from vertebra.data.digits import digits
from vertebra.data.loader import Batches
from vertebra.errors import Preempted
from vertebra.methods.supervised import Supervised
from vertebra.spec import Spec, addresses
from vertebra.tasks.classify import classify
from vertebra.training.loop import fit
from vertebra.training.schedules import rate

CURRICULA = addresses("curricula")
IMAGE_SIZE, EPOCHS, BATCH = 32, 10, 16
VIEWS = Views(scale=(0.6, 1.0), flip=0.0, policy="randaugment")
PLAN = Plan(epochs=EPOCHS, batch=BATCH, lr=3e-3, warmup_epochs=1.0, ema=0.9, views=VIEWS, evaluate_every=EPOCHS)


def _batches(method: Supervised) -> Batches:
    split = digits().split("train").select(np.arange(2 * BATCH))
    return Batches(split, method.backbone.preprocess, views=VIEWS, batch=BATCH, seed=0, workers=0)


def _method(seed: int = 0) -> Supervised:
    torch.manual_seed(seed)
    backbone = Spec("timm/test_resnet", {"image_size": IMAGE_SIZE, "channels": 1}).build()
    return Supervised(classify(backbone, digits().classes))


def _curriculum(address: str, batches: Batches) -> Curriculum:
    return Spec(address, kind="curricula").build(batches)


def _values(settings: Settings) -> tuple[Any, ...]:
    weights = None if settings.weights is None else tuple(settings.weights.tolist())
    return settings.image_size, settings.band, settings.augmentation, settings.policy, weights


def _progress(epoch: int, epochs: int = EPOCHS, steps: int = 2) -> Progress:
    return Progress(epoch * steps, epochs * steps, epoch, epochs)


def test_some_curricula_are_found() -> None:
    assert "efficienttrain/iccv" in CURRICULA


@pytest.mark.parametrize("address", CURRICULA)
def test_settings_are_a_function_of_progress(address: str) -> None:
    batches = _batches(_method())
    one, other = (_curriculum(address, batches) for _ in range(2))
    forwards = [_values(one.settings(_progress(epoch, 40))) for epoch in range(40)]
    backwards = [_values(other.settings(_progress(epoch, 40))) for epoch in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert forwards == [_values(one.settings(_progress(epoch, 40))) for epoch in range(40)]
    # the share that is done decides, not how many steps it took
    assert forwards == [_values(one.settings(_progress(epoch, 40, steps=977))) for epoch in range(40)]


@pytest.mark.parametrize("address", CURRICULA)
def test_settings_stay_in_range_and_end_at_the_plan(address: str) -> None:
    batches = _batches(_method())
    curriculum = _curriculum(address, batches)
    for epoch in range(101):
        asked = curriculum.settings(_progress(epoch, 100))
        changed = batches.with_settings(asked)  # refuses what is out of range
        assert changed.preprocess.size <= batches.preprocess.size
        assert asked.augmentation is None or 0 <= asked.augmentation <= 1
        assert asked.policy is None or 0 <= asked.policy <= 1
        assert asked.weights is None or asked.weights.shape == (len(batches.split),)
    for progress in (_progress(99, 100), Progress(200, 200, 99, 100)):
        last = batches.with_settings(curriculum.settings(progress))
        assert last.preprocess == batches.preprocess and last.band in (None, IMAGE_SIZE)
        assert (last.strength, last.policy) == (batches.strength, batches.policy)


class Stopper:
    """A meter that sends SIGTERM after one step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def epoch(self, row: Mapping[str, Any]) -> None:
        pass


def _fitted(address: str, folder: Path, seed: int = 0, **options: Any) -> tuple[Supervised, list[tuple[int, ...]]]:
    """A trained method and the shapes of the images that it saw."""
    method, seen = _method(seed), []
    method.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    batches = _batches(method)
    folder.mkdir(exist_ok=True)
    fit(method, batches, PLAN, curriculum=_curriculum(address, batches), run_dir=folder, **options)
    return method, seen


@pytest.mark.parametrize("address", CURRICULA)
def test_a_run_that_is_stopped_within_any_part_ends_with_the_same_bytes(address: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, seen = _fitted(address, whole)
    assert len(seen) == 2 * EPOCHS and seen[-1] == (BATCH, 1, IMAGE_SIZE, IMAGE_SIZE)
    changes = [step for step in range(1, 2 * EPOCHS) if seen[step] != seen[step - 1]] or [5]
    stop = changes[0] - 1  # one step before the size changes, so that the change happens in the resumed run
    with pytest.raises(Preempted):
        _fitted(address, parts, meter=Stopper(stop))
    _, rest = _fitted(address, parts, seed=9, resume_from=parts / "checkpoints" / "last")
    assert rest == seen[stop:]
    for name in ("model", "ema", "optimizer"):
        one, other = (load_file(d / "checkpoints" / "last" / f"{name}.safetensors") for d in (whole, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, parts)]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


@pytest.mark.parametrize("address", CURRICULA)
def test_the_rates_are_those_of_the_plan(address: str) -> None:
    method = _method()
    batches = _batches(method)

    class Rates(Stopper):
        def __init__(self) -> None:
            super().__init__(-1)
            self.seen: list[float] = []

        def step(self, progress: Progress, loss: float, lr: float) -> None:
            self.seen.append(lr)

    rates, steps = Rates(), 2 * EPOCHS
    fit(method, batches, PLAN, curriculum=_curriculum(address, batches), meter=rates)
    assert rates.seen == [rate(Progress(step, steps, 0, EPOCHS), PLAN, warmup=2) for step in range(steps)]
