"""Experts out and in: usage, cuts that change nothing, smaller models for a task, new tasks without a trace."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones.moe_vit import MoEViT, moe_vit
from vertebra.backbones.timm import timm
from vertebra.blocks.mixture_of_experts import Mixture, doing
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.surgery.experts import add_experts, measured_usage, prune_experts, recorded_usage
from vertebra.surgery.swap import swap
from vertebra.tasks.classify import classify
from vertebra.training.cost import count

LAYERS = ["blocks.0.mlp", "blocks.1.attn", "blocks.2.mlp", "blocks.3.attn"]


@torch.no_grad()
def network(tasks: int = 2) -> MoEViT:
    """Task 0 prefers the first experts of each layer and task 1 the last ones, whatever the image."""
    backbone = fill(moe_vit("nano", tasks=tasks)).eval()
    for block in backbone.blocks:
        block.norm1.bias.fill_(1.0)  # a gate has no bias: its tokens shall have a part that never changes
        block.norm2.bias.fill_(1.0)
    for name in LAYERS:
        router = backbone.get_submodule(name).router
        order = torch.arange(router.experts)[:, None] / backbone.width
        for task, gate in enumerate(router.gates):
            gate.weight[: router.experts].mul_(0.3).add_(order if task else -order)
    return backbone


def batch(number: int = 4) -> Tensor:
    return images((number, 3, 32, 32))


def usage_of(backbone: nn.Module, *tasks: int) -> dict[str, Tensor]:
    return measured_usage(backbone, {task: [batch(), batch(2)] for task in tasks})


def test_usage_is_the_share_of_the_places():
    backbone = network()
    usage = usage_of(backbone, 1)
    assert list(usage) == LAYERS and not any(shares[0].any() for shares in usage.values())
    seen = []
    router = backbone.get_submodule("blocks.2.mlp").router
    with torch.inference_mode(), doing(backbone, 1):
        hook = router.register_forward_hook(lambda router, args, out: seen.append(out[1]))
        backbone(batch()), backbone(batch(2))
        hook.remove()
    places = torch.cat(seen).flatten()
    torch.testing.assert_close(usage["blocks.2.mlp"][1], torch.bincount(places, minlength=8) / len(places))
    assert not router.batches.any() and not backbone.training
    backbone.train()(batch())
    recorded = recorded_usage(backbone)
    assert recorded["blocks.2.mlp"][0].sum().item() == pytest.approx(1) and not recorded["blocks.2.mlp"][1].any()


@pytest.mark.parametrize("task", [0, 1])
def test_what_a_task_never_uses_goes_and_its_outputs_stay(task):
    backbone = network()
    usage = usage_of(backbone, task)
    operated = prune_experts(backbone, tasks=[task], threshold=0.0, usage=usage)
    small = operated.model
    lost = [name for name in LAYERS if (usage[name][task] == 0).any()]
    assert lost and set(operated.changed) == {*lost, "stem", *(f"{name}.router" for name in LAYERS)}
    with torch.inference_mode(), doing(backbone, task):
        expected = backbone(batch())
    with torch.inference_mode():
        found = small(batch())
        assert torch.equal(found.pooled, expected.pooled) and torch.equal(found.tokens, expected.tokens)
        with pytest.raises(UsageError, match="knows 1"), doing(small, 1):
            pass
    assert operated.before == count(backbone) and operated.after == count(small)
    assert operated.after.params < 0.8 * operated.before.params
    assert operated.after.macs == operated.before.macs  # a token is given k experts as before
    assert sum(t.numel() for t in small.state_dict().values()) < sum(t.numel() for t in backbone.state_dict().values())
    mine = {p.data_ptr() for p in backbone.parameters()}
    assert not any(p.data_ptr() in mine for p in small.parameters())
    exported = torch.export.export(small, (batch(),)).module()
    assert difference(exported(batch()).pooled, found.pooled) < 1e-5
    small.train()(batch()).pooled.square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_threshold_cuts_more_and_leaves_k_experts():
    backbone = network()
    usage = usage_of(backbone, 0)
    counts = []
    for threshold in (0.0, 0.1, 0.9):
        small = prune_experts(backbone, threshold=threshold, usage=usage).model
        layers = [small.get_submodule(name) for name in LAYERS]
        counts.append([layer.router.experts for layer in layers])
        kept = [sum(group.count for group in layer.members) for layer in layers]
        assert kept == counts[-1]
        with torch.inference_mode():
            assert small(batch()).pooled.isfinite().all()
    assert counts[0] > counts[1] >= counts[2] == [2, 2, 2, 2]
    for name, left in zip(LAYERS, counts[1], strict=True):
        assert left == max(2, int((usage[name][0] > 0.1).sum()))


def test_several_tasks_keep_what_any_of_them_uses_and_are_counted_anew():
    backbone = network(tasks=3)
    with torch.no_grad():
        for name in LAYERS:
            gates = backbone.get_submodule(name).router.gates
            gates[2].weight.copy_(gates[0].weight)
    usage = usage_of(backbone, 0, 2)
    operated = prune_experts(backbone, tasks=(2, 0), threshold=0.0, usage=usage)
    for old, new in ((2, 0), (0, 1)):
        with torch.inference_mode(), doing(backbone, old), doing(operated.model, new):
            assert torch.equal(operated.model(batch()).pooled, backbone(batch()).pooled)
    again = prune_experts(operated.model, tasks=[1], threshold=0.0, usage=usage_of(operated.model, 1)).model
    with torch.inference_mode():
        assert torch.equal(again(batch()).pooled, backbone(batch()).pooled)


def steps(backbone: nn.Module, task: int, number: int = 3) -> None:
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.05, weight_decay=0.1)
    for _ in range(number):
        with doing(backbone, task):
            loss = (backbone.train()(batch()).pooled - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backbone.eval()


def test_a_new_task_is_learned_and_old_ones_give_the_same_bits():
    backbone = network()
    operated = add_experts(backbone, experts=2)
    grown = operated.model
    trains = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert all(name.startswith(tuple(operated.changed)) for name in trains)
    for name in LAYERS:
        assert {f"{name}.groups.1", f"{name}.router.gates.2"} <= set(operated.changed)
    assert "stem.vectors.2" in operated.changed and len(operated.changed) == 2 * len(LAYERS) + 1
    assert (
        sum(p.numel() for p in grown.parameters() if p.requires_grad) == operated.after.params - operated.before.params
    )
    before = {task: result(grown, task) for task in range(3)}
    assert all(torch.equal(before[task], result(backbone, task)) for task in (0, 1))
    torch.manual_seed(0)
    steps(grown, task=2)
    after = {task: result(grown, task) for task in range(3)}
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert difference(after[2], before[2]) > 0.01
    assert all(p.grad.any() for name, p in grown.named_parameters() if name.endswith("groups.1.inputs.weight"))
    for name in LAYERS:
        old, new = backbone.get_submodule(name).router, grown.get_submodule(name).router
        assert new.reach()[:2].sum(1).tolist() == [old.experts] * 2 and new.reach()[2].all()
    small = prune_experts(grown, tasks=[0], threshold=0.0, usage=usage_of(grown, 0)).model
    with torch.inference_mode():
        assert torch.equal(small(batch()).pooled, before[0])
    rarely = {name: torch.zeros_like(shares) for name, shares in recorded_usage(grown).items()}
    for shares in rarely.values():
        shares[0, 0] = 1.0  # one expert does everything: the second of the k must be one that the gate knows
    assert prune_experts(grown, usage=rarely).model(batch()).pooled.isfinite().all()


@torch.no_grad()
def result(backbone: nn.Module, task: int) -> Tensor:
    with doing(backbone, task):
        return backbone.eval()(batch()).pooled.clone()


def test_gates_alone_can_be_added_in_place_and_all_else_is_frozen():
    model = classify(network(tasks=1), ["one", "other"])
    operated = add_experts(model, experts=0, tasks=2, inplace=True)
    assert operated.model is model
    names = {f"backbone.{name}.router.gates.{task}" for name in LAYERS for task in (1, 2)}
    assert set(operated.changed) == names | {"backbone.stem.vectors.1", "backbone.stem.vectors.2"}
    assert not any(p.requires_grad for p in model.head.parameters())
    with torch.inference_mode(), doing(model, 2):
        assert model(batch())["logits"].shape == (4, 2)


def test_any_network_with_layers_of_experts_will_do():
    torch.manual_seed(0)
    vit = swap(timm("test_vit"), "Mlp", "mixture_of_experts", experts=6, k=1, tasks=2, noise="none").model.eval()
    for module in vit.modules():
        if isinstance(module, Mixture):
            fill(module)
    x = images((2, 3, 160, 160))
    usage = measured_usage(vit, {0: [x]})
    small = prune_experts(vit, threshold=0.0, usage=usage)
    with torch.inference_mode():
        expected = vit(x).pooled
        assert torch.equal(small.model(x).pooled, expected)
        assert torch.equal(add_experts(vit, experts=1).model(x).pooled, expected)


def test_wrong_wishes_are_refused():
    backbone = network()
    usage = usage_of(backbone, 0, 1)
    full = {name: torch.full_like(shares, 1 / shares.shape[1]) for name, shares in usage.items()}
    before = copy.deepcopy(backbone.state_dict())
    for options, words in (
        ({"tasks": [2]}, r"tasks is \[2\]; the model knows 2"),
        ({"tasks": []}, r"tasks is \[\]"),
        ({"tasks": [0, 0]}, "at most once"),
        ({"threshold": 1.0}, r"threshold is 1.0; it must be in \[0, 1\)"),
        ({"tasks": [0]}, "nothing is known of what task 0 uses in 'blocks.0.mlp'"),
        ({"usage": {}}, "usage needs 'blocks.0.mlp' of shape"),
        ({"usage": full, "tasks": [0, 1]}, "every expert has a usage above 0.01"),
    ):
        with pytest.raises(UsageError, match=words):
            prune_experts(backbone, **options)
    for options in ({"experts": -1}, {"tasks": 0}):
        with pytest.raises(UsageError, match="add 0 experts or more, and a task"):
            add_experts(backbone, **options)
    with pytest.raises(UsageError, match=r"Tanh has no layer of experts|no layer of experts"):
        prune_experts(nn.Sequential(nn.Tanh()))
    with pytest.raises(UsageError, match="task 1 has no images"):
        measured_usage(backbone, {1: []})
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
