"""What a worker does: train a contender where it has no weights, then ask every probe of its job."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, cast
from urllib.parse import quote

import torch
from torch import nn

from vertebra.battle.cells import Cell, Row
from vertebra.battle.contenders import Contender, Training
from vertebra.config import Plan
from vertebra.contracts import Backbone
from vertebra.data.dataset import Dataset
from vertebra.data.loader import Batches
from vertebra.errors import Interrupted, Preempted, VertebraError
from vertebra.methods.supervised import Supervised
from vertebra.probes import NotApplicable
from vertebra.probes.evidence import Evidence
from vertebra.recipes import epochs_for
from vertebra.recipes.scratch import scratch
from vertebra.spec import Spec
from vertebra.tasks.classify import Classify
from vertebra.training import checkpoint
from vertebra.training.loop import fit, random_states_kept
from vertebra.training.running import Material, build, documents

SCRATCH_STEPS = 400


@dataclass(frozen=True, eq=False)
class Job:
    """Cells that share one evidence: one contender with the weights of one seed.

    Attributes:
        contender: who.
        training: whether its weights are given or made here.
        seed: of the training and of the probes that draw.
        cells: in the order in which they run.
        probes: name -> spec.
        data: with splits train, val and test.
        run_dir: of the battle; pixels, features and trained weights are kept there.
        epochs: of training from scratch.
        deadline: `time.time()` at which the budget ends, or None.
        on_error: what an unreadable image does.
        offline: whether the hub may not be asked.
    """

    contender: Contender
    training: Training
    seed: int
    cells: tuple[Cell, ...]
    probes: Mapping[str, Spec]
    data: Dataset
    run_dir: Path
    epochs: int
    deadline: float | None = None
    on_error: Literal["raise", "skip"] = "raise"
    offline: bool = True


class OverBudget(BaseException):
    """The budget ended while a cell was running."""


def work(job: Job) -> Iterator[Row]:
    """The rows of a job, each as soon as it is known; an error of the contender or of a probe becomes a row."""
    if job.offline:
        os.environ["VERTEBRA_OFFLINE"] = "1"
    try:
        with _until(job.deadline):
            evidence = evidence_of(job)
    except (Preempted, Interrupted):
        raise
    except OverBudget:
        yield from (left_out(cell) for cell in job.cells)
        return
    except Exception as error:  # whatever a contender throws costs its own cells only
        yield from (Row(cell, "failed", error=reason(error)) for cell in job.cells)
        return
    for cell in job.cells:
        yield _run_cell(cell, job.probes[cell.probe], evidence, job.deadline)


def left_out(cell: Cell) -> Row:
    """The row of a cell that the clock was against."""
    return Row(cell, "left_out", error="the budget ended before it was done")


@contextmanager
def _until(deadline: float | None) -> Iterator[None]:
    """Raise `OverBudget` in what runs within when the time comes; only the main thread can be stopped so."""
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise OverBudget

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.time()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run_cell(cell: Cell, probe: Spec, evidence: Evidence, deadline: float | None) -> Row:
    """Ask one probe."""
    start = time.perf_counter()
    try:
        with _until(deadline):
            report = probe.build()(evidence.backbone, evidence)
    except (Preempted, Interrupted):
        raise
    except OverBudget:
        return left_out(cell)
    except NotApplicable as error:
        return Row(cell, "not_applicable", time.perf_counter() - start, error=str(error))
    except Exception as error:  # whatever a probe throws costs its own cell only
        return Row(cell, "failed", time.perf_counter() - start, error=reason(error))
    return Row(cell, "done", time.perf_counter() - start, report)


def reason(error: Exception) -> str:
    """An error on one line: our own as they are, others with their type and where they arose."""
    if isinstance(error, VertebraError):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{where}"


def device() -> str:
    """The accelerator of this process, or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def evidence_of(job: Job) -> Evidence:
    """Build the contender, train it where it has to be, and open the evidence for its probes."""
    with random_states_kept():
        torch.manual_seed(job.seed)
        backbone, head = _trained(job) if job.training == "scratch" else (job.contender.spec.build(), None)
    return Evidence(
        backbone,
        job.data.splits,
        seed=job.seed,
        folder=job.run_dir / "evidence",
        multi=job.data.label == "multi",
        device=device(),
        head=head,
        on_error=job.on_error,
    )


def scratch_epochs(images: int) -> int:
    """Epochs of training from scratch where no budget and nobody says: about 400 steps, an eighth of the recipe's."""
    plan = scratch("", Spec("timm/resnet18"), images).plan
    return epochs_for(images, plan.batch, steps=SCRATCH_STEPS, least=10, most=plan.epochs)


def _trained(job: Job) -> tuple[Backbone, nn.Module]:
    """The contender after the recipe `scratch` on train, and its own head.

    The weights are kept as a checkpoint: a resumed battle does not train them again, and `vertebra.load` reads them.
    """
    material = Material(job.data, job.data.split("train"), job.data.split("val"), job.data.label == "multi", ())
    run = scratch(job.data.path, job.contender.spec, len(material.train))
    run = replace(run, plan=_shortened(run.plan, job, len(material.train)))
    method = build(run, material)
    assert isinstance(method, Supervised)  # the recipe names no other
    folder = job.run_dir / "trained" / f"{quote(job.contender.name, safe='')}-{job.seed}" / "checkpoints"
    if (folder / "last").exists():
        method.load_state_dict(checkpoint.load(folder / "last", only=("model",)).tensors["model"])
    else:
        preprocess, plan = method.backbone.preprocess, run.plan
        feed = {"batch": plan.batch, "seed": plan.seed, "workers": 0, "on_error": job.on_error}
        history = fit(method, Batches(material.train, preprocess, views=plan.views, **feed), plan, device=device())
        tensors, state = {"model": method.state_dict()}, {"step": history.step, "epoch": job.epochs}
        checkpoint.save(folder, checkpoint.Checkpoint(tensors, state, documents(run, method)), best=True)
    return method.backbone, cast(Classify, method.task_model).head.to(device()).eval()


def _shortened(plan: Plan, job: Job, images: int) -> Plan:
    """The recipe's plan for the battle's epochs: warm-up and averaging keep their share of the training."""
    steps = job.epochs * max(1, images // plan.batch)
    return replace(
        plan,
        epochs=job.epochs,
        warmup_epochs=plan.warmup_epochs * job.epochs / plan.epochs,
        ema=min(plan.ema, max(0.0, 1 - 10 / steps)),
        seed=job.seed,
        workers=0,
    )
