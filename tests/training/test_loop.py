import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import PLAN, Memory, supervised

from vertebra.config import Plan
from vertebra.contracts import Batch, Curriculum, Progress, Settings
from vertebra.errors import Interrupted, Preempted, UsageError, VertebraError
from vertebra.methods.supervised import Supervised
from vertebra.training import checkpoint
from vertebra.training.loop import evaluate, fit


def _weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "last" / "model.safetensors").read_bytes()


def _probe(method: Supervised):
    return lambda: evaluate(method.task_model, Memory())


class Signalling(Supervised):
    """Sends this process a signal after a step."""

    def __init__(self, method: Supervised, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__(method.task_model)
        self.at, self.number = step, number

    def after_step(self, progress: Progress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), self.number)


def test_training_learns_and_reports() -> None:
    method = supervised()
    history = fit(method, Memory(), dataclasses.replace(PLAN, epochs=12, lr=3e-2), probes=[_probe(method)])
    assert len(history.losses) == history.step == 36 and len(history.rows) == 12
    assert history.rows[-1]["top1"] > 80 and history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert history.best == max(history.rows, key=lambda row: row["top1"])
    assert not method.training


def test_losses_are_those_of_a_loop_written_out() -> None:
    plan = Plan(epochs=3, batch=16, lr=1e-2, weight_decay=0.1, clip=0.3, warmup_epochs=0, schedule="linear")
    method, task_model = supervised(), supervised().task_model
    decayed = [p for p in task_model.parameters() if p.ndim > 1]
    plain = [p for p in task_model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups), []
    task_model.train()
    for step, batch in enumerate(batch for epoch in range(3) for batch in Memory().epoch(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 9)
        loss = task_model.losses(task_model(batch.images), batch.targets)["classify"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task_model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert fit(method, Memory(), plan).losses == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("class_weights", [None, [0.4, 0.8, 1.2, 1.6]])
def test_accumulation_gives_the_gradients_of_the_whole_batch(class_weights: list[float] | None) -> None:
    ended = []
    for micro_batch in (None, 6):  # 16 images in parts of 6, 6 and 4
        method = supervised(norm=False)
        method.task_model.class_weights = torch.tensor(class_weights) if class_weights else None
        history = fit(method, Memory(), Plan(epochs=2, optimizer="sgd", lr=0.1, micro_batch=micro_batch))
        ended.append((torch.cat([p.flatten() for p in method.parameters()]), torch.tensor(history.losses)))
    torch.testing.assert_close(ended[0][0], ended[1][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ended[0][1], ended[1][1], atol=1e-6, rtol=0)


def test_plan_steps_end_the_run_within_an_epoch(tmp_path: Path) -> None:
    history = fit(supervised(), Memory(), dataclasses.replace(PLAN, steps=5), run_dir=tmp_path)
    assert history.step == 5 and [row["step"] for row in history.rows] == [3, 5]


def test_two_fits_are_alike_and_leave_the_random_states_alone() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    methods = [supervised(dropout=0.3), supervised(dropout=0.3)]
    torch.manual_seed(1)
    losses = [fit(method, Memory(), PLAN).losses for method in methods]
    assert losses[0] == losses[1]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path, stop: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    method = supervised(dropout=0.3)
    fit(method, Memory(), PLAN, probes=[_probe(method)], run_dir=whole)
    method = supervised(dropout=0.3)
    with pytest.raises(Preempted, match=f"after step {stop} of 12"):
        fit(Signalling(method, stop), Memory(), PLAN, probes=[_probe(method)], run_dir=parts)
    method = supervised(dropout=0.3, seed=9)
    fit(method, Memory(), PLAN, probes=[_probe(method)], run_dir=parts, resume_from=parts / "checkpoints" / "last")
    assert _weights(whole) == _weights(parts)
    for name in ("ema", "optimizer"):
        one, other = (load_file(d / "checkpoints" / "last" / f"{name}.safetensors") for d in (whole, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, parts)]
    assert [(row["step"], row["loss"]) for row in lines[0]] == [(row["step"], row["loss"]) for row in lines[1]]


def test_a_signal_during_the_evaluation_is_obeyed_at_once_and_the_evaluation_done_again(tmp_path: Path) -> None:
    method, seen = supervised(), []

    def probe() -> dict[str, float]:
        seen.append(len(seen))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal came too late")
        return {"top1": 50.0}

    with pytest.raises(Preempted):
        fit(method, Memory(), PLAN, probes=[probe], run_dir=tmp_path)
    last = tmp_path / "checkpoints" / "last"
    assert checkpoint.load(last).state["position"] == 3 and checkpoint.load(last).state["epoch"] == 1
    history = fit(method, Memory(), PLAN, probes=[probe], run_dir=tmp_path, resume_from=last)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4] and len(seen) == 5


def test_ctrl_c_has_its_own_error_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="nothing is saved without a run_dir") as caught:
        fit(Signalling(supervised(), 2, signal.SIGINT), Memory(), PLAN)
    assert caught.value.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Poisoned(Supervised):
    """The loss of one step is not a number."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        losses = super().forward(batch, progress)
        return {"classify": losses["classify"] * (float("nan") if progress.step == 4 else 1.0)}


def test_a_loss_that_is_no_number_stops_before_the_step_and_keeps_the_batch(tmp_path: Path) -> None:
    method, spoiled = supervised(norm=False), supervised(norm=False)
    plan = dataclasses.replace(PLAN, ema=0.0, epochs=2)
    with pytest.raises(VertebraError, match=r"loss is nan at step 5.*nan_batch.*lower plan\.lr"):
        fit(Poisoned(spoiled.task_model), Memory(), plan, run_dir=tmp_path)
    kept = load_file(tmp_path / "nan_batch" / "batch.safetensors")
    ids = next(iter(Memory().epoch(1, 1))).ids
    assert torch.equal(kept["ids"], ids) and torch.equal(kept["images"], Memory().images[ids])
    assert json.loads((tmp_path / "nan_batch" / "batch.json").read_text())["images"] == ids.tolist()
    with pytest.raises(Preempted):
        fit(Signalling(method, 4), Memory(), plan)
    assert torch.equal(method.task_model.head.weight, spoiled.task_model.head.weight)  # as after step 4


class Hungry(Supervised):
    """Fails as an allocator does when it is given more than some images."""

    def __init__(self, method: Supervised, most: int) -> None:
        super().__init__(method.task_model)
        self.most, self.seen = most, []

    def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        losses = super().forward(batch, progress)
        self.seen.append(len(batch.images))
        if len(batch.images) > self.most:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return losses


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step_exactly() -> None:
    hungry = Hungry(supervised(norm=False, dropout=0.3), most=5)
    history = fit(hungry, Memory(), Plan(epochs=2))
    assert hungry.seen[:6] == [16, 8, 4, 4, 4, 4]
    assert history.losses == fit(supervised(norm=False, dropout=0.3), Memory(), Plan(epochs=2, micro_batch=4)).losses


def test_out_of_memory_with_one_image_is_an_error() -> None:
    with pytest.raises(VertebraError, match="out of memory with 1 image at once"):
        fit(Hungry(supervised(norm=False), most=0), Memory(), Plan(epochs=1))


def test_other_runtime_errors_are_not_taken_for_lack_of_memory() -> None:
    class Broken(Supervised):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        fit(Broken(supervised().task_model), Memory(), Plan(epochs=1))


def test_evaluation_survives_lack_of_memory_with_the_same_result() -> None:
    method = supervised()
    expected = evaluate(method.task_model, Memory())
    forward = method.task_model.forward

    def hungry(images: torch.Tensor):
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    method.task_model.forward = hungry
    assert evaluate(method.task_model, Memory()) == pytest.approx(expected, rel=1e-5)


def test_evaluation_gives_the_mode_back() -> None:
    method = supervised().train()
    evaluate(method.task_model, Memory())
    assert method.task_model.training


def test_averaged_weights_are_evaluated_saved_and_left_in_the_method(tmp_path: Path) -> None:
    method = supervised()
    seen = []
    fit(
        method,
        Memory(),
        dataclasses.replace(PLAN, epochs=1),
        probes=[lambda: {"loss": float(seen.append(method.task_model.head.weight.clone()) or 1)}],
        run_dir=tmp_path,
    )
    saved = checkpoint.load(tmp_path / "checkpoints" / "last").tensors
    assert torch.equal(seen[0], saved["ema"]["head.weight"])
    assert torch.equal(method.task_model.head.weight, seen[0])
    assert not torch.equal(saved["model"]["head.weight"], seen[0])


def test_best_is_the_lowest_loss_and_ties_keep_the_first(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 1.0, 2.0])
    history = fit(supervised(), Memory(), PLAN, probes=[lambda: {"loss": next(losses)}], run_dir=tmp_path)
    assert history.best is not None and history.best["epoch"] == 2
    folder = tmp_path / "checkpoints"
    assert checkpoint.load(folder / "best").state["step"] == 6 and checkpoint.load(folder / "last").state["step"] == 12
    assert sorted(p.name for p in folder.iterdir()) == ["best", "last", "step-000000006", "step-000000012"]


def test_a_network_of_linear_layers_trains_too() -> None:
    class Patches(Supervised):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
            assert batch.images.is_contiguous()
            return super().forward(batch, progress)

    method = Patches(supervised().task_model)
    method.extra = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(9))
    assert len(fit(method, Memory(), Plan(epochs=1, optimizer="sgd")).losses) == 3


def test_bf16_mixed_trains_near_32_bit() -> None:
    plan = Plan(epochs=2, lr=1e-3)
    low = fit(supervised(norm=False), Memory(), dataclasses.replace(plan, precision="bf16-mixed")).losses
    assert low == pytest.approx(fit(supervised(norm=False), Memory(), plan).losses, rel=0.02)


def test_a_curriculum_is_asked_at_the_start_of_each_epoch() -> None:
    asked = []

    class Growing(Curriculum):
        def settings(self, progress: Progress) -> Settings:
            asked.append(progress.step)
            return Settings(image_size=4 + progress.step)

    class Sized(Memory):
        def with_settings(self, settings: Settings) -> "Sized":
            assert settings.image_size is not None
            return self

    fit(supervised(), Sized(), dataclasses.replace(PLAN, epochs=2), curriculum=Growing())
    assert asked == [0, 3]


def test_unknown_device_names_those_that_are_here() -> None:
    with pytest.raises(UsageError, match=r"device 'cuda:99' is not on this machine, which has .*cpu"):
        fit(supervised(), Memory(), PLAN, device="cuda:99")
