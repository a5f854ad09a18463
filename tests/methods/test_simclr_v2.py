"""The loss in numpy after the reference's formulas, over ranks, head and selector, memory, LARS."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.config import Plan
from vertebra.contracts import Batch, Progress
from vertebra.errors import UsageError
from vertebra.methods.simclr_v2 import ProjectionHead, SimCLRv2, nt_xent, simclr_v2, with_head
from vertebra.methods.supervised import Supervised
from vertebra.tasks.classify import classify
from vertebra.training.optimizers import optimizer_for

START = Progress(0, 1, 0, 1)


def reference(first: np.ndarray, second: np.ndarray, temperature: float, others: np.ndarray | None = None) -> float:
    """The reference's four blocks of similarities with its mask of 1e9, and two softmaxes over 2N and more columns."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    eye = np.eye(len(a))
    more = np.zeros((len(a), 0)) if others is None else others
    losses = np.zeros(len(a))
    for one, other in ((a, b), (b, a)):
        negatives = one @ more.T if others is not None else more
        logits = np.concatenate([one @ other.T, one @ one.T - 1e9 * eye, negatives], axis=1) / temperature
        shifted = logits - logits.max(1, keepdims=True)
        losses += np.log(np.exp(shifted).sum(1)) - np.diagonal(shifted)
    return float(losses.mean())


@pytest.mark.parametrize(("count", "temperature"), [(2, 0.1), (7, 0.1), (33, 0.5)])
def test_the_loss_is_the_references(count: int, temperature: float) -> None:
    random = np.random.default_rng(count)
    first, second = random.standard_normal((2, count, 16))
    found = nt_xent(torch.from_numpy(first), torch.from_numpy(second), temperature=temperature)
    assert found.item() == pytest.approx(reference(first, second, temperature), rel=1e-6)
    others = random.standard_normal((5, 16))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    found = nt_xent(
        torch.from_numpy(first), torch.from_numpy(second), temperature=temperature, others=torch.from_numpy(others)
    )
    assert found.item() == pytest.approx(reference(first, second, temperature, others), rel=1e-6)


def test_orthogonal_projections_give_the_loss_by_hand() -> None:
    views = torch.eye(4)[:2]  # partners agree, others are at a right angle: 2N - 2 = 2 negatives
    assert nt_xent(views, 3 * views, temperature=1.0).item() == pytest.approx(2 * np.log(np.e + 2) - 2, rel=1e-6)
    with pytest.raises(UsageError, match="at least 2 images"):
        nt_xent(views[:1], views[:1])


def test_bf16_autocast_leaves_the_similarities_exact() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 8, 128)
    exact = nt_xent(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(first, second), exact)


RANK = """
import json, os, sys, torch
import torch.distributed as distributed
from pathlib import Path
from vertebra.methods.simclr_v2 import nt_xent

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
views, weight = torch.randn(2, 6, 5), torch.randn(5, 4, requires_grad=True)
mine = views[:, 3 * rank : 3 * rank + 3] @ weight
loss = nt_xent(mine[0], mine[1])
loss.backward()
distributed.all_reduce(weight.grad)
Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps([loss.item(), (weight.grad / 2).tolist()]))
distributed.destroy_process_group()
"""


def test_two_ranks_have_one_ranks_loss_and_gradient(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**os.environ, **own, "RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    torch.manual_seed(0)
    views, weight = torch.randn(2, 6, 5), torch.randn(5, 4, requires_grad=True)
    loss = nt_xent(*(views @ weight))
    loss.backward()
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-6)
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(torch.tensor(found[0][1]), weight.grad, rtol=1e-5, atol=1e-6)


def batch(count: int = 6, *, size: int = 32, views: int = 1) -> Batch:
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))
    further = tuple(images.flip(3) + 0.1 * number for number in range(views))
    return Batch(images, torch.full((count,), -1), torch.arange(count), further)


def method(**options) -> SimCLRv2:
    torch.manual_seed(0)
    return simclr_v2(timm("test_resnet", image_size=32), **options)


def test_the_head_is_the_papers() -> None:
    head = ProjectionHead(96)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert [type(part) for part in head.layers] == kinds
    assert [part.weight.shape[0] for part in head.layers if isinstance(part, nn.Linear)] == [96, 96, 128]
    assert all(part.bias is None for part in head.layers if isinstance(part, nn.Linear))
    still = [name for name, parameter in head.named_parameters() if not parameter.requires_grad]
    assert still == ["layers.7.bias"] and not head.layers[7].bias.any()  # the last norm has a scale and no shift


def test_both_views_pass_together_and_the_loss_is_theirs() -> None:
    trained = method().train()
    batch_ = batch()
    found = trained(batch_, START)["contrast"]
    again = method().train()
    projected = again.head(again.backbone(torch.cat([batch_.images, batch_.views[0]])).pooled)
    assert found.item() == pytest.approx(nt_xent(projected[:6], projected[6:]).item(), rel=1e-6)


def test_batches_without_two_views_of_one_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"was given 1: plan\.more_views needs one entry"):
        method()(batch(views=0), START)
    with pytest.raises(UsageError, match="was given 3"):
        method()(batch(views=2), START)
    small = batch()._replace(views=(torch.zeros(6, 3, 16, 16),))
    with pytest.raises(UsageError, match="two views of one size"):
        method()(small, START)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "memroy"}, "did you mean memory"),
        ({"layers": 0}, "layers is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"memory": -1}, "memory is -1"),
    ],
)
def test_options_are_checked(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        method(**options)


def test_the_selector_keeps_hidden_layers_of_the_head_as_a_backbone() -> None:
    trained = method().eval()
    images = torch.rand(2, 3, 32, 32)
    assert with_head(trained.backbone, trained.head, layers=0) is trained.backbone
    plain = trained.backbone(images)
    for layers in (1, 2):
        kept = with_head(trained.backbone, trained.head, layers=layers).eval()
        found = kept(images)
        assert torch.equal(found.pooled, trained.head.layers[: 3 * layers](plain.pooled))
        assert found.pooled.shape == (2, kept.width) and bool((found.pooled >= 0).all())
        assert torch.equal(found.pyramid[-1], plain.pyramid[-1]) and kept.levels == trained.backbone.levels
        assert len(kept.trunk()) == len(trained.backbone.trunk()) + layers
        assert len(set(kept.parameters())) == sum(len(list(part.parameters())) for part in kept.trunk())
    with pytest.raises(UsageError, match=r"2 hidden layers, so it can be 0\.\.2"):
        with_head(trained.backbone, trained.head, layers=3)
    with pytest.raises(UsageError, match="takes 8 features and the backbone gives 96"):
        with_head(trained.backbone, ProjectionHead(8))


def test_fine_tuning_trains_the_kept_layer_too() -> None:
    trained = method()
    kept = with_head(trained.backbone, trained.head)
    supervised = Supervised(classify(kept, ["a", "b"]))
    nn.init.zeros_(supervised.task_model.head.weight)
    labelled = batch()._replace(targets=torch.arange(6) % 2)
    assert supervised(labelled, START)["classify"].item() == pytest.approx(np.log(2), rel=1e-6)
    nn.init.normal_(supervised.task_model.head.weight)
    supervised(labelled, START)["classify"].backward()
    assert trained.head.layers[0].weight.grad.abs().sum() > 0 and trained.head.layers[3].weight.grad is None


def test_the_memory_holds_the_last_projections_of_the_averaged_network() -> None:
    trained = method(memory=16, momentum=0.9).train()
    first = trained(batch(), START)["contrast"]
    assert first.item() == pytest.approx(method().train()(batch(), START)["contrast"].item(), rel=1e-6)  # empty so far
    assert int(trained.written) == 12 and bool((trained.kept[:12].norm(dim=1) - 1).abs().max() < 1e-5)
    assert not trained.kept[12:].any()
    before = trained.kept.clone()
    second = trained(batch(), START)["contrast"]
    assert second > first and int(trained.written) == 24
    second.backward()
    assert all(parameter.grad is None for parameter in trained.averaged.parameters())
    assert torch.equal(trained.kept[8:12], before[8:12])  # 12 more fill the last four places and the first eight
    assert trained.kept[12:].any(1).all()
    trained.eval()(batch(), START)
    assert int(trained.written) == 24
    weight = trained.head.layers[0].weight
    slow = trained.averaged[1].layers[0].weight
    assert not slow.requires_grad
    with torch.no_grad():
        weight.add_(1.0)
    old = slow.clone()
    trained.after_step(START)
    torch.testing.assert_close(slow, old + 0.1 * (weight - old))


def test_lars_adapts_weights_and_leaves_norms_alone() -> None:
    trained = method().train()
    plan = Plan(optimizer="lars", lr=2.0, weight_decay=0.0, momentum=0.9)
    optimizer = optimizer_for(trained, plan)
    assert {group["params"][0].ndim >= 2: group["always_adapt"] for group in optimizer.param_groups} == {
        True: True,
        False: False,
    }
    trained(batch(), START)["contrast"].backward()
    weight, scale = trained.head.layers[0].weight, trained.head.layers[1].weight
    before, gradient = weight.detach().clone(), weight.grad.clone()
    plain, slope = scale.detach().clone(), scale.grad.clone()
    optimizer.step()
    step = 2.0 * 0.001 * before.norm() / gradient.norm() * gradient
    torch.testing.assert_close(before - weight, step, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(plain - scale, 2.0 * slope, rtol=1e-4, atol=1e-7)
