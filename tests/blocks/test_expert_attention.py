"""Attention with experts as query heads: its limit, an explicit loop, its two forms, swap."""

import pytest
import torch
from torch import Tensor

from vertebra.backbones.timm import timm
from vertebra.blocks.expert_attention import ExpertAttention, expert_attention, multi_query_attention
from vertebra.blocks.mixture_of_experts import doing
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.surgery.swap import swap

DIM = 24


def made(**options) -> ExpertAttention:
    """Filled, in evaluation mode; gates that tell tokens apart."""
    block = fill(expert_attention(DIM, **{"experts": 5, "k": 3, "head_dim": 8, **options})).eval()
    with torch.no_grad():
        for gate in block.router.members:
            gate.weight.mul_(3)
    return block


def loop(block: ExpertAttention, x: Tensor, task: int = 0) -> Tensor:
    """One sequence (N, DIM), token by token and expert by expert."""
    width, group = block.width, block.members[0]
    keys, values = (x @ block.shared.weight.T + block.shared.bias).split(width, 1)
    y = torch.zeros_like(x)
    for place in range(len(x)):
        probabilities = (block.router.members[task].weight[: group.count] @ x[place]).softmax(0)
        for number in probabilities.argsort(descending=True)[: block.router.k].tolist():
            rows = slice(number * width, (number + 1) * width)
            query = group.inputs.weight[rows] @ x[place] + group.inputs.bias[rows]
            head = (keys @ query * width**-0.5).softmax(0) @ values
            found = group.outputs.weight[:, rows] @ head + group.bias[number * DIM : (number + 1) * DIM]
            y[place] += probabilities[number] * found
    return y


def test_one_expert_is_plain_attention_exactly():
    block = fill(expert_attention(DIM, experts=1, k=1, head_dim=8)).eval()
    plain = multi_query_attention(DIM, heads=1, head_dim=8)
    group = block.members[0]
    names = {"queries.weight": group.inputs.weight, "queries.bias": group.inputs.bias}
    names |= {"outputs.weight": group.outputs.weight, "outputs.bias": group.bias}
    names |= {"shared.weight": block.shared.weight, "shared.bias": block.shared.bias}
    plain.load_state_dict(names)
    x = images((2, 9, DIM))
    with torch.inference_mode():
        assert torch.equal(block(x), plain(x))


def test_plain_attention_shares_keys_and_values():
    plain, x = fill(multi_query_attention(DIM, heads=3)), images((2, 9, DIM))
    width = 2 * DIM // 3
    queries = plain.queries(x).view(2, 9, 3, width).transpose(1, 2)
    keys, values = plain.shared(x)[:, None].split(width, 3)
    heads = (queries @ keys.mT * width**-0.5).softmax(-1) @ values  # (2, 3, 9, width)
    torch.testing.assert_close(plain(x), plain.outputs(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("form", ["sorted", "dense"])
def test_both_forms_are_the_explicit_loop(form):
    block, x = made(tasks=2), images((2, 13, DIM))
    block.form = form
    for task in (0, 1):
        with torch.inference_mode(), doing(block, task):
            expected = torch.stack([loop(block, one, task) for one in x])
            assert difference(block(x), expected) < 1e-5
    exact = block.double()
    with torch.inference_mode():
        assert difference(exact(x.double())[0], loop(exact, x[0].double())) < 1e-12


def test_the_forms_agree_and_so_do_their_gradients():
    block, x = made(noise="none").train(), images((2, 13, DIM))
    found = {}
    for form in ("sorted", "dense"):
        block.form = form
        block.zero_grad()
        given = x.clone().requires_grad_()
        y = block(given)
        (y * images((13, DIM))).sum().backward()
        found[form] = [y, given.grad, *(p.grad.clone() for p in block.parameters())]
    assert len(found["dense"]) == 2 + 7
    for mine, other in zip(found["sorted"], found["dense"], strict=True):
        assert difference(mine, other) < 1e-6


def test_experts_come_and_go():
    block, x = made(k=2), images((1, 7, DIM))
    with torch.inference_mode():
        expected, stay = block(x), block.router(x[0])[1].unique().tolist()
        block.keep(stay)
        assert torch.equal(block(x), expected)
        fill(block.add(2))
        block.router.add_tasks(1)[0].weight.normal_(generator=torch.Generator().manual_seed(0))
        assert torch.equal(block(x), expected)
        with doing(block, 1):
            other = block(x)
            block.form = "dense"
            assert difference(block(x), other) < 1e-6


def test_swap_puts_it_in_the_place_of_an_attention():
    vit = timm("test_vit").eval()
    operated = swap(vit, "Attention", "expert_attention", experts=4, k=2)
    blocks = [operated.model.get_submodule(name) for name in operated.changed]
    assert blocks and all(isinstance(block, ExpertAttention) and block.width == vit.width for block in blocks)
    with torch.inference_mode():
        assert operated.model(images((2, 3, 160, 160))).pooled.isfinite().all()


def test_wrong_options_are_refused():
    for options, words in (
        ({"k": 16}, "k is 16; of 15 experts a token can be given at most 15"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"noise": "loud"}, "noise is 'loud'"),
    ):
        with pytest.raises(UsageError, match=words):
            expert_attention(DIM, **options)
    with pytest.raises(UsageError, match="heads 0"):
        multi_query_attention(DIM, heads=0)
