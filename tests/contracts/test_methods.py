"""Every method keeps the contract: all pages by discovery, on a tiny backbone, with the views of its recipe."""

import copy
import dataclasses
import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vertebra import recipes
from vertebra.backbones.timm import timm
from vertebra.config import Plan
from vertebra.contracts import Batch, Method, Progress
from vertebra.errors import Preempted
from vertebra.paper import pages
from vertebra.spec import Spec
from vertebra.training.loop import fit

SIZE, IMAGES = 32, 8
ADDRESSES = [
    f"{page.name}/{variant}".rstrip("/")
    for page in pages()
    if page.kind == "methods"
    for variant in (page.variants or ("",))
]
PRETRAINING = [
    address
    for address in ADDRESSES
    if next(iter(inspect.signature(Spec(address, kind="methods").resolve()[0]).parameters)) == "backbone"
]
"""Those that are built on a backbone alone."""

START = Progress(0, 4, 0, 2)


def plan_of(address: str) -> Plan:
    """A short plan with the optimiser and the views of the method's recipe."""
    name = address.partition("/")[0]
    run = recipes.find(name)("data", Spec("timm/test_resnet"), 1000)
    return dataclasses.replace(run.plan, epochs=2, steps=3, batch=IMAGES, warmup_epochs=0.0, precision="32-true")


def built(address: str, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return Spec(address, kind="methods").build(timm("test_resnet", image_size=SIZE))


class Random:
    """Two steps an epoch of random images in as many views as a plan asks for; all f(epoch, step)."""

    def __init__(self, plan: Plan) -> None:
        self.sides = [views.size or SIZE for views in (plan.views, *plan.more_views)]

    def __len__(self) -> int:
        return 2

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step in range(start, 2):
            random = torch.Generator().manual_seed(10 * epoch + step)
            images, *views = (torch.rand(IMAGES, 3, side, side, generator=random) for side in self.sides)
            yield Batch(images, torch.arange(IMAGES) % 3, torch.arange(IMAGES), tuple(views))


def first_batch(address: str) -> Batch:
    return next(Random(plan_of(address)).epoch(0))


def test_pages_are_found() -> None:
    assert "simclr_v2/plain" in PRETRAINING


@pytest.mark.parametrize("address", PRETRAINING)
def test_losses_are_named_finite_scalars_whose_gradient_reaches_the_backbone(address: str) -> None:
    method = built(address).train()
    losses = method(first_batch(address), START)
    assert losses and all(name.isidentifier() and loss.shape == () for name, loss in losses.items())
    total = torch.stack(list(losses.values())).sum()
    assert bool(total.isfinite())
    total.backward()
    for part in method.backbone.trunk():
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("address", PRETRAINING)
def test_a_state_dict_and_after_step_round_trip(address: str) -> None:
    method, other = built(address).train(), built(address, seed=1).train()
    for module in (method, other):
        module(first_batch(address), START)
        module.after_step(Progress(1, 4, 0, 2))
    other.load_state_dict(method.state_dict())
    assert list(other.state_dict()) == list(method.state_dict())
    assert any(name.startswith("backbone.") for name in method.state_dict())
    torch.manual_seed(3)
    expected = method(first_batch(address), START)
    torch.manual_seed(3)
    found = other(first_batch(address), START)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("address", PRETRAINING)
def test_evaluation_mode_changes_nothing_and_is_finite(address: str) -> None:
    method = built(address).eval()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        losses = method(first_batch(address), START)
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


class Preempting:
    """A meter that sends SIGTERM after the first step."""

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def epoch(self, row: dict) -> None:
        """Nothing."""


@pytest.mark.parametrize("address", PRETRAINING)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(address: str, tmp_path: Path) -> None:
    plan = plan_of(address)
    for run in ("whole", "part"):
        (tmp_path / run).mkdir()
    fit(built(address), Random(plan), plan, run_dir=tmp_path / "whole", device="cpu")
    with pytest.raises(Preempted, match="after step 1 of 3"):
        fit(built(address), Random(plan), plan, run_dir=tmp_path / "part", device="cpu", meter=Preempting())
    last = tmp_path / "part" / "checkpoints" / "last"
    history = fit(built(address, seed=1), Random(plan), plan, run_dir=tmp_path / "part", resume_from=last, device="cpu")
    assert history.step == 3 and len(history.losses) == 2
    files = [tmp_path / run / "checkpoints" / "last" / "model.safetensors" for run in ("whole", "part")]
    assert files[0].read_bytes() == files[1].read_bytes()
