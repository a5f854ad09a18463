"""Losses of balance: their formulas, what is remembered of other tasks, and what minimising them does to gates."""

from math import log

import numpy as np
import pytest
import torch

from vertebra.backbones.moe_vit import moe_vit
from vertebra.backbones.timm import timm
from vertebra.blocks.mixture_of_experts import Router, Routing, doing, watched
from vertebra.contracts import Batch, Progress
from vertebra.errors import UsageError
from vertebra.methods.mthl import Balanced, joint, mthl, mutual_information, router_z_loss, switch_loss
from vertebra.parity import fill, images
from vertebra.tasks.classify import classify

START = Progress(0, 4, 0, 1)


def batch() -> Batch:
    return Batch(images((4, 3, 32, 32)), torch.tensor([0, 1, 0, 1]), torch.arange(4))


def method(tasks: int = 1, **options) -> Balanced:
    torch.manual_seed(0)
    return mthl(classify(fill(moe_vit("nano", tasks=tasks)), ["one", "other"]), **options)


def test_mutual_information_is_that_of_numpy():
    table = np.random.default_rng(0).random((3, 5))
    table[1, 2] = 0.0
    table /= table.sum()
    tasks, experts = table.sum(1), table.sum(0)
    expected = sum(
        table[t, e] * np.log(table[t, e] / (tasks[t] * experts[e])) for t in range(3) for e in range(5) if table[t, e]
    )
    assert mutual_information(torch.from_numpy(table)).item() == pytest.approx(expected, rel=1e-12)
    assert mutual_information(torch.full((2, 4), 1 / 8)).item() == pytest.approx(0, abs=1e-7)
    apart = torch.eye(2, 6).requires_grad_()
    found = mutual_information(apart / 2)
    found.backward()
    assert found.item() == pytest.approx(log(2)) and apart.grad.isfinite().all()


def test_switch_and_z_are_their_formulas():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 0.5, 0.0, 0.0]])
    routing = Routing(0, logits, logits.softmax(1).mean(0), torch.tensor([0.5, 0.25, 0.25, 0.0]))
    expected = 4 * sum(f * p for f, p in zip((0.5, 0.25, 0.25, 0.0), logits.softmax(1).mean(0).tolist(), strict=True))
    assert switch_loss(routing).item() == pytest.approx(expected)
    z = sum(log(sum(np.exp(row))) ** 2 for row in logits.tolist()) / 2
    assert router_z_loss(routing).item() == pytest.approx(z)
    even = torch.full((4,), 0.25)
    assert switch_loss(Routing(0, logits, even, even)).item() == pytest.approx(1)


def test_a_batch_of_one_task_knows_of_the_others_from_memory():
    torch.manual_seed(0)
    router = fill(Router(8, 4, 2, 3, "none")).train()
    x = images((50, 8))
    with watched(router) as seen:
        router(x)
    assert mutual_information(joint(router, seen[""])).item() == pytest.approx(0, abs=1e-6)  # one task alone
    with watched(router) as seen, doing(router, 2):
        router(x)
    found = joint(router, seen[""])
    probabilities = [(x @ router.members[task].weight.T).softmax(1).mean(0) / 2 for task in (0, 2)]
    torch.testing.assert_close(found[0], probabilities[0])
    torch.testing.assert_close(found[2], probabilities[1])
    assert not found[1].any() and found.sum().item() == pytest.approx(1)
    (-mutual_information(found)).backward()
    assert [gate.weight.grad is not None and bool(gate.weight.grad.any()) for gate in router.members] == [
        False,
        False,
        True,
    ]


def test_the_losses_of_a_method_add_up_layer_by_layer():
    switch = method(weight=0.02, z_weight=0.5).eval()
    losses = switch(batch(), START)
    with torch.no_grad(), watched(switch.task_model) as seen:
        plain = switch.task_model.losses(switch.task_model(batch().images), batch().targets)
    routings = [routing for several in seen.values() for routing in several]
    assert len(routings) == 4 and list(losses) == ["classify", "switch", "router_z"]
    assert losses["classify"].item() == pytest.approx(plain["classify"].item())
    assert losses["switch"].item() == pytest.approx(0.02 * sum(float(switch_loss(r)) for r in routings))
    assert losses["router_z"].item() == pytest.approx(0.5 * sum(float(router_z_loss(r)) for r in routings))
    assert set(switch.state_dict()) == set(switch.task_model.state_dict())
    several = method(tasks=2).train()
    for task in (0, 1):
        with doing(several.backbone, task):
            losses = several(batch(), START)
    assert list(losses) == ["classify", "information"] and -0.02 < losses["information"].item() < 0
    losses["information"].backward()
    gate = several.backbone.get_submodule("blocks.0.mlp").router.gates[1]
    assert gate.weight.grad is not None and gate.weight.grad.any()


def trained(balance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """P(task, expert) of gates of two tasks on the same tokens, before and after a loss of balance alone."""
    router, x = fill(Router(8, 4, 1, 2, "none")).train(), images((64, 8)) + 1
    with torch.no_grad():
        for gate in router.members:
            gate.weight.mul_(0.1)[0] += 0.2  # both begin with the first expert, and are nearly alike
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    tables = []
    for step in range(150):
        with watched(router) as seen, doing(router, step % 2):
            router(x)
        table = joint(router, seen[""])
        loss = switch_loss(seen[""][0]) if balance == "switch" else -mutual_information(table)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tables.append(table.detach())
    return tables[1], tables[-1]


def test_switch_spreads_each_task_and_information_parts_the_tasks():
    start, even = trained("switch")
    _, apart = trained("information")
    assert (start[:, 0] > 0.5 / 2).all() and mutual_information(start).item() < 0.05
    assert even.min() > 0.1 / 2 and mutual_information(even).item() < 0.1
    assert 0.4 < mutual_information(apart).item() <= log(2) + 1e-5


def test_training_lowers_the_loss():
    several = method(tasks=2)
    optimizer = torch.optim.AdamW(several.parameters(), 2e-3)
    losses = []
    for step in range(12):
        with doing(several.backbone, step % 2):
            found = several.train()(batch(), START)
            total = torch.stack(list(found.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.8 * losses[0]


def test_wrong_options_are_refused():
    for options, words in (
        ({"balance": "even"}, "balance is 'even'; it can be switch or information"),
        ({"balance": "information"}, "of one task there is no mutual information"),
        ({"weight": -1.0}, "weight is -1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            method(**options)
    with pytest.raises(UsageError, match="the Timm has no gates"):
        mthl(classify(timm("test_resnet", image_size=32), ["one", "other"]))
    assert method().balance == "switch" and method(tasks=2).balance == "information"
    assert method(tasks=2, balance="switch").weight == 0.01


def test_plain_training_keeps_experts_in_use():
    from vertebra.methods.assisted import supervised

    backbone = moe_vit("nano")
    assert isinstance(supervised(classify(backbone, ["one", "other"])), Balanced)
    plain = timm("test_resnet", image_size=32)
    assert not isinstance(supervised(classify(plain, ["one", "other"])), Balanced)
