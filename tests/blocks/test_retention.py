import copy

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.blocks.retention import (
    CHUNK,
    PARALLEL,
    causal_decays,
    chunkwise,
    distance_decays,
    log_rates,
    parallel,
    recurrent,
    retention,
)
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

HEADS = 3


def heads_of(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    return tuple(torch.randn(2, HEADS, tokens, 8, dtype=dtype) for _ in range(3))


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> np.ndarray:
    """The paper's recurrence, written out in numpy."""
    queries, keys, values = (part.numpy() for part in (q, k, v))
    rates = 1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), HEADS))
    found = np.zeros_like(values)
    for image, head in np.ndindex(found.shape[:2]):
        state = np.zeros((8, 8))
        for n in range(found.shape[2]):
            state = rates[head] * state + np.outer(keys[image, head, n], values[image, head, n])
            found[image, head, n] = queries[image, head, n] * 8**-0.5 @ state
    return found


@pytest.mark.parametrize("tokens", [1, 2, 17, 50])
def test_three_forms_are_the_papers_recurrence(tokens):
    q, k, v = heads_of(tokens)
    logs, expected = log_rates(HEADS, q), torch.from_numpy(by_hand(q, k, v))
    torch.testing.assert_close(parallel(q, k, v, causal_decays(logs, tokens)), expected, rtol=0, atol=1e-12)
    y, last = recurrent(q, k, v, logs)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for chunk in (1, 5, 16, tokens, 64):
        y, state = chunkwise(q, k, v, logs, chunk)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 20, 49])
def test_a_state_carries_everything_from_one_part_to_the_next(cut):
    q, k, v = heads_of(50)
    logs = log_rates(HEADS, q)
    expected, last = recurrent(q, k, v, logs)
    for form in (recurrent, lambda *args: chunkwise(*args[:4], 7, *args[4:])):
        y, state = form(*(part[:, :, :cut] for part in (q, k, v)), logs)
        z, state = form(*(part[:, :, cut:] for part in (q, k, v)), logs, state)
        torch.testing.assert_close(torch.cat((y, z), 2), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_decays_are_powers_of_the_released_rates():
    logs = log_rates(3, torch.zeros((), dtype=torch.float64))
    rates = torch.tensor([1 - 1 / 32, 1 - 1 / 128, 1 - 1 / 512], dtype=torch.float64)
    torch.testing.assert_close(logs.exp(), rates)
    decays = causal_decays(logs, 5)
    torch.testing.assert_close(decays[:, 4, 1], rates**3)
    assert (decays.triu(1) == 0).all() and (decays.diagonal(dim1=1, dim2=2) == 1).all()
    both = distance_decays(logs, 5)
    torch.testing.assert_close(both.exp()[:, 1, 4], rates**3)
    assert torch.equal(both, both.mT)
    torch.testing.assert_close(both.exp().tril(), decays)
    assert log_rates(1, logs).exp().item() == pytest.approx(1 - 1 / 32)


def test_far_tokens_fade_without_underflow_of_near_ones():
    logs = log_rates(2, torch.zeros((), dtype=torch.float16))
    assert logs.dtype == torch.float32
    decays = causal_decays(logs, 3000)
    assert decays.isfinite().all() and decays[0, -1, 0] < 1e-30
    assert decays[1, -1, -1001].item() == pytest.approx((511 / 512) ** 1000, rel=1e-4)


@pytest.mark.parametrize("late", [0, 1])
def test_the_form_can_be_changed_and_changes_nothing(late):
    block, x = fill(retention(48, heads=3, late=late)).double().eval(), images((2, 21, 48)).double()
    expected = block(x)
    for form, chunk in (("parallel", 1), ("recurrent", 1), ("chunkwise", 4), ("chunkwise", 64)):
        block.form, block.chunk = form, chunk
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-10)
    block.form = "auto"
    assert block.taken(PARALLEL) == "parallel" and block.taken(PARALLEL + 1) == "chunkwise" and block.chunk == CHUNK


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_forms_have_the_same_gradients(form):
    block, x = fill(retention(24, heads=3)).double(), images((2, 13, 24)).double().requires_grad_()
    other = copy.deepcopy(block)
    other.form, other.chunk = form, 5
    weight = images((2, 13, 24)).double()
    found = [torch.autograd.grad((each(x) * weight).sum(), [x, *each.parameters()]) for each in (block, other)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_a_token_sees_what_came_before_it_and_late_ones_see_all(form):
    x = images((1, 12, 16)).requires_grad_()
    plain, late = (fill(retention(16, heads=2, form=form, chunk=5, late=count)) for count in (0, 2))
    (seen,) = torch.autograd.grad(plain(x)[0, 6].sum(), x)
    assert seen[0, :7].any(-1).all() and not seen[0, 7:].any()
    (seen,) = torch.autograd.grad(late(x)[0, 6].sum(), x)  # the front comes last
    assert seen[0, 2:7].any(-1).all() and not seen[0, :2].any() and not seen[0, 7:].any()
    (seen,) = torch.autograd.grad(late(x)[0, 1].sum(), x)
    assert seen.any(-1).all()


def test_steps_are_the_sequence():
    block, x = fill(retention(32, heads=2, chunk=4)).double().eval(), images((2, 19, 32)).double()
    expected, state, found = block(x), None, []
    for piece in x.split((1, 7, 1, 10), 1):
        y, state = block.step(piece, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-10)
    assert state is not None and state.shape == (2, 2, 16, 16)


def test_the_released_softmax_is_another_thing():
    block, x = fill(retention(16, heads=2, compat="released")).eval(), images((1, 6, 16)).requires_grad_()
    q, k, v = block.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    decays = causal_decays(log_rates(2, x), 6)
    expected = (q @ k.mT * 8**-0.5 * decays).softmax(-1) @ v
    torch.testing.assert_close(block(x), block.proj(expected.transpose(1, 2).flatten(2)))
    (seen,) = torch.autograd.grad(block(x)[0, 0].sum(), x)
    assert seen[0, 1:].any(-1).all()  # the first token reads what is to come
    assert block.taken(10 * PARALLEL) == "parallel"
    with pytest.raises(UsageError, match="parallel form alone"):
        block.form = "chunkwise"
    with pytest.raises(UsageError, match="takes no steps"):
        block.step(x)


def test_half_precision_keeps_its_state_in_32_bit():
    block, x = fill(retention(64, heads=1, chunk=16)).eval(), images((1, 200, 64))
    with torch.inference_mode():
        exact = block(x)
        block.bfloat16()
        for form in ("parallel", "recurrent", "chunkwise"):
            block.form = form
            rough = block(x.bfloat16())
            assert rough.dtype == torch.bfloat16
            assert nn.functional.cosine_similarity(rough.float(), exact, dim=-1).min() > 0.999
        assert block.step(x[:, :20].bfloat16())[1].dtype == torch.float32


def test_swap_puts_it_in_the_place_of_attention():
    backbone = fill(Spec("timm/vit_tiny_patch16_224", {"image_size": 32, "network": {"depth": 2}}).build()).eval()
    operated = swap(backbone, "Attention", "retention", heads=3, late=1)
    assert operated.changed == ("network.blocks.0.attn", "network.blocks.1.attn")
    assert operated.after.params == operated.before.params
    other = fill(operated.model).eval()
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        found = other(x).pooled
        other.get_submodule("network.blocks.1.attn").form = "recurrent"
        torch.testing.assert_close(other(x).pooled, found, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, backbone(x).pooled, atol=1e-2)


def test_wrong_options_are_refused():
    assert retention(96).heads == 1 and retention(200).heads == 2 and retention(384).heads == 6
    for wrong, words in (
        ({"dim": 0}, "dim is 0"),
        ({"dim": 16, "heads": 3}, "3 heads do not divide dim 16"),
        ({"dim": 16, "late": -1}, "late is -1"),
        ({"dim": 16, "chunk": 0}, "chunk is 0"),
        ({"dim": 16, "form": "linear"}, "form is 'linear'; it can be auto, parallel, recurrent, chunkwise"),
        ({"dim": 16, "compat": "theirs"}, "compat is 'theirs'; it can be paper or released"),
    ):
        with pytest.raises(UsageError, match=words):
            retention(**wrong)
    with pytest.raises(UsageError, match="form is 'linear'"):
        retention(16).form = "linear"
