"""The loop: every method of vertebra is trained by these lines.

Everything random in a step is f(seed, step, rank) (and, in the loader, f(seed, epoch, index)), so a run that
was stopped anywhere goes on as if it had not been.
"""

import dataclasses
import json
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
import torch.distributed as distributed
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from vertebra.config import Plan
from vertebra.contracts import Batch, Curriculum, Method, Progress, TaskModel
from vertebra.errors import DivergedError, Interrupted, Preempted, UsageError, VertebraError
from vertebra.training import checkpoint, memory
from vertebra.training.averaging import Average
from vertebra.training.launching import launch
from vertebra.training.optimizers import freeze, optimizer_for
from vertebra.training.schedules import rate, warmup_steps
from vertebra.training.speed import prefers_channels_last
from vertebra.training.stopping import Stop, Stopped

logger = logging.getLogger("vertebra.training")

LOWER_IS_BETTER = frozenset({"loss", "nll", "ece"})
LINES_AN_EPOCH = 10
"""Step lines in metrics.jsonl."""


class Batches(Protocol):
    """What `fit` needs of a loader: `vertebra.data.loader.Batches`, or anything with these two methods."""

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from step `start` on."""
        ...


Evaluation = Callable[[], Mapping[str, float]]
"""A probe of `fit`: looks at the model it knows and names what it finds, the number that decides `best` first."""


class Meter(Protocol):
    """Who watches: the console's bar or lines."""

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        """After each optimiser step."""
        ...

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After each epoch."""
        ...


@dataclass
class History:
    """What a training did.

    Attributes:
        rows: one an epoch: epoch (from 1), step, loss (mean over images), lr, seconds, and what the probes found.
        losses: one an optimiser step that this call made, over all ranks.
        best: the row whose first probe value is best, or None before any evaluation.
        step: optimiser steps done since the run began.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None
    step: int = 0


def fit(
    method: Method,
    batches: Batches,
    plan: Plan,
    *,
    curriculum: Curriculum | None = None,
    probes: Sequence[Evaluation] = (),
    run_dir: Path | None = None,
    resume_from: Path | None = None,
    documents: Mapping[str, Any] | None = None,
    device: str = "auto",
    meter: Meter | None = None,
) -> History:
    """Train `method` in place.

    Afterwards the method is in evaluation mode, on the device, and holds the averaged weights where the plan
    has them. SIGTERM and Ctrl-C end the run after the step under way, with a checkpoint where there is a
    `run_dir`. The global random states are seeded for each step and given back as they were.

    Args:
        method: what is minimised.
        batches: the training images. Under torchrun each rank brings its own part of each batch.
        plan: how.
        curriculum: what is seen when, asked at the start of each epoch; needs batches with `with_settings`.
        probes: called every `plan.evaluate_every` epochs; the first value of the first decides `best`.
        run_dir: folder for `metrics.jsonl` and `checkpoints/`; None writes nothing.
        resume_from: a checkpoint to go on from.
        documents: file name -> JSON value, written into every checkpoint (classes, preprocessing, configuration).
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        meter: is told of each step and epoch.

    Raises:
        UsageError: a plan that this method or this machine cannot follow.
        DivergedError: the loss is not finite.
        VertebraError: one image does not fit in memory, or a checkpoint cannot be written.
        Preempted: SIGTERM.
        Interrupted: Ctrl-C.
    """
    fabric = launch(device, plan.precision, method)
    with Stop() as stop, random_states_kept():
        training = Training(fabric, method, batches, plan, curriculum, probes, run_dir, documents or {}, meter, stop)
        if resume_from:
            training.load(resume_from)
        return training.run()


class Training:
    """One run of `fit`: the parts, and where it stands.

    Attributes:
        epoch: the epoch under way, from 0.
        position: steps done of it.
        history: what has happened.
    """

    def __init__(
        self,
        fabric: Fabric,
        method: Method,
        batches: Batches,
        plan: Plan,
        curriculum: Curriculum | None,
        probes: Sequence[Evaluation],
        run_dir: Path | None,
        documents: Mapping[str, Any],
        meter: Meter | None,
        stop: Stop,
    ) -> None:
        self.fabric, self.method, self.batches, self.plan = fabric, method, batches, plan
        self.curriculum, self.probes, self.run_dir, self.documents = curriculum, probes, run_dir, documents
        self.meter, self.stop = meter, stop
        self.steps = steps_of(plan, len(batches))
        self.epochs = math.ceil(self.steps / len(batches))
        self.warmup = warmup_steps(plan, len(batches), self.steps)
        self.epoch = self.position = 0
        self.sums, self.history, self.stops = Sums(), History(), 0.0
        self.micro_batch = plan.micro_batch
        self.saved_at = time.monotonic()
        self.layout = torch.channels_last if prefers_channels_last(method) else torch.preserve_format
        method.to(fabric.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.frozen = freeze(method.backbone, plan.freeze)
        self.optimizer = optimizer_for(method, plan)
        self.optimizer.zero_grad()
        self.average = Average(method, plan.ema) if plan.ema else None
        self.objective = Objective(method)
        self.forward, self.stepper = fabric.setup(self.objective, self.optimizer, move_to_device=False)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return Progress(self.history.step, self.steps, self.epoch, self.epochs)

    def run(self) -> History:
        """Train to the end of the plan."""
        where, done, precision = self.fabric.device, self.history.step, self.fabric.strategy.precision.precision
        logger.info("%s, %s: steps %d to %d, %d an epoch", where, precision, done, self.steps, len(self.batches))
        while self.epoch < self.epochs:
            self.train_epoch()
            self.close_epoch()
        if self.average:
            self.average.swap()
        self.method.eval()
        return self.history

    def train_epoch(self) -> None:
        """The steps of the epoch that are still to be done."""
        self.train_mode()
        steps = range(self.steps_left())  # first in zip, so that no batch is fetched to be thrown away
        for _, batch in zip(steps, self.loader().epoch(self.epoch, self.position), strict=False):
            self.step(batch)
            if self.stopping:
                self.leave()
            if time.monotonic() - self.saved_at > self.plan.checkpoint_every:
                self.save()

    def step(self, batch: Batch) -> None:
        """One optimiser step on one batch."""
        started = time.monotonic()
        seed_step(self.plan.seed, self.history.step, self.fabric.global_rank)
        lr = self.set_rate()
        loss, images = self.gradients(self.placed(batch))
        norm = self.clip()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.refuse(batch, loss, norm)
        self.stepper.step()
        self.optimizer.zero_grad()
        self.history.step, self.position = self.history.step + 1, self.position + 1
        if self.average:
            self.average.update()
        self.method.after_step(self.progress)
        self.note(loss, images, lr, time.monotonic() - started)

    def placed(self, batch: Batch) -> Batch:
        """The batch on the device, its images as the network's weights lie."""
        placed = self.fabric.to_device(batch)
        images, *views = (images.to(memory_format=self.layout) for images in (placed.images, *placed.views))
        return placed._replace(images=images, views=tuple(views))

    def close_epoch(self) -> None:
        """Evaluate where it is time, write the epoch's row, keep a checkpoint."""
        row = {"epoch": self.epoch + 1, "step": self.history.step, **self.sums.row()}
        due = (self.epoch + 1) % self.plan.evaluate_every == 0 or self.epoch + 1 == self.epochs
        found = self.evaluate() if due and self.probes else {}
        row |= found
        best = bool(found) and better(found, self.history.best)
        if best:
            self.history.best = row
        self.history.rows.append(row)
        self.epoch, self.position, self.sums = self.epoch + 1, 0, Sums()
        self.write(row)
        logger.info("%s", row)
        if self.meter:
            self.meter.epoch(row)
        if due:
            self.save(best=best)
        if self.stopping:
            self.leave()

    def loader(self) -> Batches:
        """The batches with what the curriculum asks of this epoch."""
        if self.curriculum is None:
            return self.batches
        start = self.epoch * len(self.batches)
        settings = self.curriculum.settings(Progress(start, self.steps, self.epoch, self.epochs))
        return self.batches.with_settings(settings)  # type: ignore[attr-defined]

    def steps_left(self) -> int:
        """Steps still to do in this epoch; the last epoch ends where the plan's steps do."""
        return min(len(self.batches), self.steps - self.epoch * len(self.batches)) - self.position

    def train_mode(self) -> None:
        """Training mode for all but the frozen parts, whose statistics stay as they are."""
        self.method.train()
        for part in self.frozen:
            part.eval()

    def set_rate(self) -> float:
        """Give each group of parameters its rate for the step that comes."""
        lr = rate(self.progress, self.plan, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def gradients(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the mean loss over the images of all ranks; returns that loss and how many images it is of.

        Out of memory, the same step starts again in halves: the batch stays, the micro-batch shrinks. (Batch-norm
        statistics then see the images of the failed attempt twice.)
        """
        images, self.stops = self.over_ranks(len(batch.images), self.stop.requested is not None)
        while True:
            try:
                loss = self.accumulate(batch, images)
                break
            except (RuntimeError, MemoryError) as error:
                if not memory.exhausted(error):
                    raise
                reason = str(error).partition("\n")[0]
            self.shrink(len(batch.images), reason)  # outside of the handler, which keeps the failed tensors alive
        return self.over_ranks(loss)[0], int(images)

    def accumulate(self, batch: Batch, images: float) -> float:
        """Add up gradients, a micro-batch at a time, each with its share of the batch; returns this rank's loss."""
        total = torch.zeros((), device=self.fabric.device)
        rest = len(batch.images)
        for part in memory.parts(batch, self.micro_batch):
            rest -= len(part.images)
            with self.fabric.no_backward_sync(self.forward, enabled=rest > 0):
                self.objective.batch, self.objective.progress = part, self.progress
                losses = list(self.forward(part.images, *part.views).values())
                share = torch.stack(losses).sum() * (len(part.images) / images)
                self.fabric.backward(share * self.fabric.world_size)  # ranks' gradients are averaged, not summed
            total += share.detach()
        return float(total)

    def shrink(self, images: int, reason: str) -> None:
        """Halve the micro-batch after memory ran out, and forget the gradients of the attempt."""
        size = min(self.micro_batch or images, images)
        if size == 1 or self.fabric.world_size > 1:
            smaller = f"plan.micro_batch below {size} (one rank cannot shrink alone)"
            remedy = "a smaller image size" if size == 1 else smaller
            raise VertebraError(f"out of memory with {size} image{'s' * (size > 1)} at once ({reason}); set {remedy}")
        self.micro_batch = size // 2
        logger.warning("out of memory: micro-batch %d -> %d; the batch stays at %d", size, self.micro_batch, images)
        self.optimizer.zero_grad()
        memory.release()
        seed_step(self.plan.seed, self.history.step, self.fabric.global_rank)

    def clip(self) -> float:
        """Scale the gradients down to the plan's norm; returns the norm they had, 0 where nobody asked."""
        if self.plan.clip is None:
            return 0.0
        norm = self.fabric.clip_gradients(self.forward, self.stepper, max_norm=self.plan.clip, error_if_nonfinite=False)
        # a gradient scaler meets infinities and skips the step by itself
        return 0.0 if self.scaler or norm is None else float(norm)

    @property
    def stopping(self) -> bool:
        """Whether a signal asks for the end; ranks agree on it at the start of each step, to leave together."""
        return self.stops > 0 or (self.fabric.world_size == 1 and self.stop.requested is not None)

    @property
    def scaler(self) -> Any:
        """Fabric's gradient scaler, where the precision needs one."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def over_ranks(self, *values: float) -> list[float]:
        """Sums over ranks."""
        if self.fabric.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.fabric.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    def note(self, loss: float, images: int, lr: float, seconds: float) -> None:
        """Keep what the step did, for the history, the file and the console."""
        self.history.losses.append(loss)
        self.sums.add(loss, images, lr, seconds)
        if self.meter:
            self.meter.step(self.progress, loss, lr)
        if self.history.step % max(1, len(self.batches) // LINES_AN_EPOCH) == 0:
            self.write({"step": self.history.step, "loss": loss, "lr": lr})

    def evaluate(self) -> dict[str, float]:
        """What the probes find, with the averaged weights where there are any."""
        self.method.eval()
        seed_step(self.plan.seed, self.history.step, self.fabric.global_rank)
        with self.average.inside() if self.average else nullcontext():
            try:
                with self.stop.at_once() if self.fabric.world_size == 1 else nullcontext():
                    return {name: float(value) for probe in self.probes for name, value in probe().items()}
            except Stopped:
                logger.info("stopped during the evaluation, which a resumed run starts again")
        return self.leave()

    def refuse(self, batch: Batch, loss: float, norm: float) -> NoReturn:
        """Stop before a step that would spoil the weights, and keep its batch."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        names = getattr(getattr(self.batches, "split", None), "names", None)
        seen = [str(names[i]) if names is not None else int(i) for i in batch.ids.tolist()]
        kept = f"; images: {', '.join(map(str, seen[:5]))}{' ...' if len(seen) > 5 else ''}"
        if self.run_dir:
            folder = self.run_dir / "nan_batch"
            checkpoint.save_batch(folder, batch, {"step": self.history.step, "loss": str(loss), "images": seen})
            kept = f"; its batch is in {folder}"
        lr = self.optimizer.param_groups[-1]["lr"]
        raise DivergedError(
            f"{what} at step {self.history.step + 1}{kept}; the weights are as they were before it; try a lower plan.lr"
            f" (the rate is {lr:.2g}), a smaller plan.clip (it is {self.plan.clip}) or plan.precision=32-true"
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.run_dir and self.fabric.global_rank == 0:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def leave(self) -> NoReturn:
        """Save and go, with the error that a signal stands for."""
        self.save()
        self.fabric.barrier()
        where = f"go on with: vertebra resume {self.run_dir}" if self.run_dir else "nothing is saved without a run_dir"
        done = f"stopped after step {self.history.step} of {self.steps}; {where}"
        logger.info("%s", done)
        if self.stop.requested == signal.SIGINT:
            raise Interrupted(f"Ctrl-C: {done}")
        raise Preempted(f"SIGTERM: {done}")

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint, on the first rank."""
        self.saved_at = time.monotonic()
        if self.run_dir is None or self.fabric.global_rank > 0:
            return
        tensors = {"model": self.method.state_dict(), "optimizer": {}}
        optimizer = checkpoint.flatten(self.optimizer.state_dict()["state"], tensors["optimizer"])
        if self.average:
            tensors["ema"] = self.average.tensors
        state = {
            "step": self.history.step,
            "epoch": self.epoch,
            "position": self.position,
            "rng": {"seed": self.plan.seed, "step": self.history.step},  # all there is to it: see seed_step
            "micro_batch": self.micro_batch,
            "sums": dataclasses.asdict(self.sums),
            "average_updates": self.average.updates if self.average else 0,
            "scaler": self.fabric.strategy.precision.state_dict(),
            "optimizer": optimizer,
            "best": self.history.best,
            "history": self.history.rows,
        }
        checkpoint.save(self.run_dir / "checkpoints", checkpoint.Checkpoint(tensors, state, self.documents), best=best)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            VertebraError: it is corrupt or of another method.
        """
        saved = checkpoint.load(path)
        state = saved.state
        try:
            self.method.load_state_dict(dict(saved.tensors["model"]))
        except RuntimeError as error:
            raise VertebraError(f"{path} does not fit this method: {error}") from error
        if self.average:
            # a run that had no averages starts them from its weights
            self.average.load(saved.tensors.get("ema", saved.tensors["model"]), state["average_updates"])
        load_moments(self.optimizer, checkpoint.unflatten(state["optimizer"], saved.tensors["optimizer"]))
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.epoch, self.position, self.sums = state["epoch"], state["position"], Sums(**state["sums"])
        if state["step"] < min(self.epoch * len(self.batches), self.steps):
            self.epoch -= 1  # plan.steps had cut this epoch short, and now there are more
            self.position = state["step"] - self.epoch * len(self.batches)
        self.micro_batch = state["micro_batch"]
        self.history = History(rows=state["history"], best=state["best"], step=state["step"])
        if self.run_dir and self.fabric.global_rank == 0:
            forget_after(self.run_dir / "metrics.jsonl", state["step"])


class Objective(nn.Module):
    """What Fabric wraps. Only images go through its casts: targets stay exact."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.batch: Batch | None = None
        self.progress: Progress | None = None

    def forward(self, images: Tensor, *views: Tensor) -> dict[str, Tensor]:
        """The method's losses on the batch that was put here, with these images and further views of them."""
        assert self.batch is not None and self.progress is not None
        return self.method(self.batch._replace(images=images, views=views), self.progress)


@dataclass
class Sums:
    """What an epoch adds up."""

    loss: float = 0.0
    images: int = 0
    seconds: float = 0.0
    lr: float = 0.0

    def add(self, loss: float, images: int, lr: float, seconds: float) -> None:
        """Add a step."""
        self.loss, self.images = self.loss + loss * images, self.images + images
        self.lr, self.seconds = lr, self.seconds + seconds

    def row(self) -> dict[str, float]:
        """Mean loss over images, the last rate, seconds in steps."""
        return {"loss": self.loss / max(1, self.images), "lr": self.lr, "seconds": round(self.seconds, 3)}


def steps_of(plan: Plan, steps_per_epoch: int) -> int:
    """Optimiser steps that a plan asks for.

    Raises:
        UsageError: an epoch has no step.
    """
    if steps_per_epoch < 1:
        raise UsageError("an epoch has no step: the training split is empty")
    return min(plan.epochs * steps_per_epoch, plan.steps or math.inf)  # type: ignore[return-value]


def load_moments(optimizer: Optimizer, moments: Mapping[int, Any]) -> None:
    """Give an optimiser the state it was saved with; rates and decays stay as the plan has them now.

    Moments are laid out as their parameters are: fused kernels read both in the order of memory.
    """
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def better(found: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    """Whether the first value found beats the best row's; an equal one does not."""
    name, value = next(iter(found.items()))
    if best is None or name not in best:
        return True
    return value < best[name] if name in LOWER_IS_BETTER else value > best[name]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch, NumPy and Python for one step, so that dropout and its like are f(seed, step, rank)."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give the global random states back as they were found."""
    numbers, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        yield
    np.random.set_state(numbers)
    random.setstate(python)


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run makes again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    beside = path.with_suffix(".unfinished")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)


@torch.no_grad()
def evaluate(task_model: TaskModel, batches: Batches) -> dict[str, float]:
    """A task model's metrics over one pass of `batches`, in 32 bit, in evaluation mode.

    Args:
        task_model: is given back in the mode it was in.
        batches: evaluation views in the split's order; see `vertebra.data.loader.Batches`.

    Returns:
        Metric -> value, the one that ranks first. Shares are in percent.
    """
    device = next(task_model.parameters()).device
    metrics, training = task_model.metrics().to(device), task_model.training
    task_model.eval()
    size = None
    for batch in batches.epoch(0, 0):
        size = memory.in_parts(lambda part: metrics.update(task_model(part.images), part.targets), batch, size, device)
    task_model.train(training)
    return {name: float(value) for name, value in metrics.compute().items()}
