"""Mixture of experts: its limit, an explicit loop, its two forms, noise, what it remembers, tasks, growth and cuts."""

import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones.timm import timm
from vertebra.blocks.mixture_of_experts import Gate, MixtureOfExperts, doing, mixture_of_experts, watched
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.surgery.swap import swap

DIM = 24


def made(**options) -> MixtureOfExperts:
    """Filled, in evaluation mode; gates that tell tokens apart."""
    block = fill(mixture_of_experts(DIM, **{"experts": 6, "k": 3, "ratio": 2.0, **options})).eval()
    with torch.no_grad():
        for gate in block.router.members:
            gate.weight.mul_(3)
    return block


def expert(block: MixtureOfExperts, number: int, x: Tensor) -> Tensor:
    """One expert on tokens, from the tensors as they are kept."""
    start = 0
    for group in block.members:
        if number < start + group.count:
            at, width = number - start, group.width
            rows = slice(at * width, (at + 1) * width)
            hidden = nn.functional.gelu(x @ group.inputs.weight[rows].T + group.inputs.bias[rows])
            return hidden @ group.outputs.weight[:, rows].T + group.bias[at * DIM : (at + 1) * DIM]
        start += group.count
    raise IndexError(number)


def loop(block: MixtureOfExperts, x: Tensor, task: int = 0) -> Tensor:
    """Token by token and expert by expert, without noise."""
    gate = block.router.members[task]
    y = torch.zeros_like(x)
    for place in range(len(x)):
        probabilities = (gate.weight[: len(gate.experts)] @ x[place]).softmax(0)
        for column in probabilities.argsort(descending=True)[: block.router.k]:
            y[place] += probabilities[column] * expert(block, int(gate.experts[column]), x[place])
    return y


def test_one_expert_is_the_plain_mlp_exactly():
    block = fill(mixture_of_experts(DIM, experts=1, k=1)).eval()
    plain = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
    group = block.members[0]
    names = {"0.weight": group.inputs.weight, "0.bias": group.inputs.bias, "2.weight": group.outputs.weight}
    plain.load_state_dict({**names, "2.bias": group.bias})
    x = images((2, 9, DIM))
    with torch.inference_mode():
        assert torch.equal(block(x), plain(x))
        block.form = "dense"
        assert difference(block(x), plain(x)) < 1e-6


@pytest.mark.parametrize("form", ["sorted", "dense"])
def test_both_forms_are_the_explicit_loop(form):
    block, x = made(tasks=2), images((37, DIM))
    block.form = form
    for task in (0, 1):
        with torch.inference_mode(), doing(block, task):
            assert difference(block(x), loop(block, x, task)) < 1e-5
    exact = block.double()
    with torch.inference_mode():
        assert difference(exact(x.double()), loop(exact, x.double())) < 1e-12
        assert not torch.allclose(loop(exact, x.double(), 0), loop(exact, x.double(), 1))


def test_the_forms_agree_and_so_do_their_gradients():
    block, x = made(noise="none").train(), images((3, 20, DIM))
    found = {}
    for form in ("sorted", "dense"):
        block.form = form
        block.zero_grad()
        given = x.clone().requires_grad_()
        y = block(given)
        (y * images(tuple(y.shape)[1:])).sum().backward()
        found[form] = [y, given.grad, *(p.grad.clone() for p in block.parameters())]
    assert len(found["dense"]) == 2 + 5
    for mine, other in zip(found["sorted"], found["dense"], strict=True):
        assert difference(mine, other) < 1e-6


def test_exporting_takes_the_dense_form():
    block, x = made(), images((2, 9, DIM))
    exported = torch.export.export(block, (x,))
    assert not block.dense and not any("argsort" in str(node.target) for node in exported.graph.nodes)
    with torch.inference_mode():
        assert difference(exported.module()(x), block(x)) < 1e-6


def test_gates_start_even_and_their_probabilities_are_not_made_to_sum_to_one():
    torch.manual_seed(0)
    block = mixture_of_experts(DIM, experts=8, k=2).eval()
    assert not any(gate.weight.any() for gate in block.router.members)
    weights, chosen = block.router(images((5, DIM)))
    assert torch.equal(weights, torch.full((5, 2), 1 / 8))
    assert chosen.unique().numel() == 2
    x = images((5, DIM))
    expected = sum(expert(block, int(number), x) for number in chosen[0]) / 8
    torch.testing.assert_close(block(x), expected)


def test_noise_is_of_training_and_of_a_size_that_is_learned():
    torch.manual_seed(0)
    gate, x = Gate(DIM, 8, "learned"), images((4000, DIM))
    assert gate(x).std().item() == pytest.approx(0.6931, rel=0.02)  # softplus(0)
    with torch.no_grad():
        gate.weight[8:, 0] = 4.0
    louder = gate(x)
    noise = nn.functional.softplus(4 * x[:, :1])
    assert (louder / noise).std().item() == pytest.approx(1.0, rel=0.02)
    assert not gate.eval()(x).any()
    silent = Gate(DIM, 8, "none")
    assert silent.weight.shape == (8, DIM) and not silent(x).any()


def test_every_expert_has_a_gradient_though_none_was_given_to_it():
    block = mixture_of_experts(DIM, experts=6, k=1, noise="none").train()
    block(images((7, DIM))).square().sum().backward()  # all logits are zero: one expert takes everything
    gradient = block.members[0].inputs.weight.grad.unflatten(0, (6, -1)).flatten(1).abs().sum(1)
    assert (gradient > 0).sum() == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_a_router_remembers_what_tasks_use_in_training():
    block = made(tasks=2, noise="none", k=1)
    first, second = images((40, DIM))[:20], images((40, DIM))[20:]
    block(first)
    assert not block.router.batches.any() and not block.router.usage.any()
    block.train()
    shares = []
    with doing(block, 1), watched(block) as seen:
        for x in (first, second):
            block(x)
            shares.append(torch.bincount(block.router(x)[1].flatten(), minlength=6) / 20)
    # the router ran twice on each batch
    expected = ((2 * shares[0] + 2 * shares[1]) / 4).tolist()
    assert block.router.usage[1].tolist() == pytest.approx(expected, abs=1e-6)
    assert block.router.probability[1].sum().item() == pytest.approx(1, abs=1e-6)
    assert block.router.batches.tolist() == [0, 4] and not block.router.usage[0].any()
    routings = seen["router"]
    assert [routing.task for routing in routings] == [1] * 4 and block.router.seen is None
    assert torch.equal(routings[0].load, shares[0]) and routings[0].logits.shape == (20, 6)
    probabilities = (first @ block.router.members[1].weight.T).softmax(1).mean(0)
    torch.testing.assert_close(routings[0].probability, probabilities)
    block.router.batches[1] = 1e6  # a long training: the last batch counts one percent
    before = block.router.usage[1].clone()
    with doing(block, 1):
        block(first)
    torch.testing.assert_close(block.router.usage[1], before + 0.01 * (shares[0] - before))


def test_a_task_is_done_for_a_while():
    block = made(tasks=3)
    with pytest.raises(ZeroDivisionError), doing(block, 2):
        assert block.router.task == 2
        raise ZeroDivisionError
    assert block.router.task == 0
    with pytest.raises(UsageError, match="task is 3; the MixtureOfExperts knows 3, counted from 0"), doing(block, 3):
        pass
    with pytest.raises(UsageError, match="the Linear has no gates"), doing(nn.Linear(2, 2), 0):
        pass


def test_experts_that_nobody_chose_go_without_a_trace():
    block, x = made(k=2), images((6, DIM))
    with torch.inference_mode():
        expected, chosen = block(x), block.router(x)[1]
        stay = sorted(set(chosen.flatten().tolist()))
        assert 2 <= len(stay) < 6
        block.keep(stay)
        assert torch.equal(block(x), expected)
    assert block.members[0].count == block.router.experts == len(stay) == block.router.usage.shape[1]
    assert sorted(block.router.members[0].experts.tolist()) == [-1] * (6 - len(stay)) + list(range(len(stay)))
    block.form = "dense"
    with torch.inference_mode():
        assert difference(block(x), expected) < 1e-6


def test_new_experts_are_for_new_gates():
    block, x = made(k=2), images((50, DIM))
    with torch.inference_mode():
        expected = block(x)
        new = fill(block.add(3))
        gate = block.router.add_tasks(1)[0]
        assert torch.equal(block(x), expected)
        assert new.count == 3 and block.router.reach().tolist() == [[True] * 6 + [False] * 3, [True] * 9]
        gate.weight.copy_(3 * images(tuple(gate.weight.shape)))
        with doing(block, 1):
            assert block.router(x)[1].max() > 5
            assert difference(block(x), loop(block, x, 1)) < 1e-5
        block.keep([0, 1, 4, 7])
        assert [group.count for group in block.members] == [3, 1]


def test_number_formats():
    block, x = made(), images((2, 30, DIM))
    with torch.inference_mode():
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = {form: _formed(block, form, x) for form in ("sorted", "dense")}
        rough = block.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    for found in (*mixed.values(), rough):
        assert nn.functional.cosine_similarity(exact.flatten(), found.float().flatten(), dim=0) > 0.99


def _formed(block: MixtureOfExperts, form, x: Tensor) -> Tensor:
    block.form = form
    y = block(x)
    block.form = "auto"
    return y


def test_swap_puts_it_in_the_place_of_an_mlp():
    vit = timm("test_vit").eval()
    operated = swap(vit, "Mlp", "mixture_of_experts", experts=5, k=2)
    blocks = [operated.model.get_submodule(name) for name in operated.changed]
    assert blocks and all(isinstance(block, MixtureOfExperts) for block in blocks)
    assert operated.after.params > operated.before.params
    tokens, width = 1 + (160 // 16) ** 2, operated.model.width
    hidden = 4 * width - blocks[0].router.k * blocks[0].width  # timm's own ratio may be another
    assert blocks[0].width == 2 * width and hidden == 0
    gates = len(blocks) * tokens * width * 5
    old = vit.get_submodule(operated.changed[0]).fc1.out_features
    assert operated.after.macs - operated.before.macs - gates == len(blocks) * tokens * 2 * width * (4 * width - old)


def test_wrong_options_are_refused():
    for options, words in (
        ({"experts": 0}, "experts is 0; it must be at least 1"),
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"experts": 3}, "k is 4; of 3 experts a token can be given at most 3"),
        ({"tasks": 0}, "tasks is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"ratio": -1.0}, "ratio is -1.0; it must be above 0"),
        ({"noise": "loud"}, "noise is 'loud'; it can be learned or none"),
    ):
        with pytest.raises(UsageError, match=words):
            mixture_of_experts(DIM, **options)
