"""Performer: the arithmetic of its definition, how near it comes to a softmax, its use in a network."""

from itertools import pairwise
from math import log2

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.performer import performer, performer_attend, positive_features
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_definition(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> Tensor:
    """Weights of every pair, one by one, of single-head tokens (N, d), with their sum in the denominator."""

    def feature(x: Tensor) -> Tensor:
        return torch.stack([(w @ x - x @ x / 2).exp() for w in directions]) / len(directions) ** 0.5

    rows = []
    for query in q:
        weights = torch.stack([feature(query) @ feature(key) for key in k])
        rows.append((weights[:, None] * v).sum(0) / (weights.sum() + 1e-8))
    return torch.stack(rows)


def test_it_is_its_definition():
    q, k, v = images((3, 1, 1, 7, 8)).double().mul(0.7)
    directions = images((4, 8)).double()
    found = performer_attend(q, k, v, directions, scale=1.0)
    torch.testing.assert_close(found[0, 0], by_definition(q[0, 0], k[0, 0], v[0, 0], directions))
    halved = performer_attend(q, k, v, directions, scale=0.25)
    torch.testing.assert_close(halved, performer_attend(q / 2, k / 2, v, directions, scale=1.0))


def test_the_order_is_keys_queries_values_head_by_head():
    block = performer(12, heads=2, features=5)
    fill(block)
    x = images((2, 9, 12))
    k, q, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in block.kqv(x).split(12, -1))
    expected = block.proj(performer_attend(q, k, v, block.directions).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), expected)
    _, values = block.mixed(block.kqv(x))
    assert torch.equal(values, block.kqv(x)[..., 24:])
    swapped = block.proj(performer_attend(k, q, v, block.directions).transpose(1, 2).flatten(2))
    assert not torch.allclose(swapped, expected, atol=1e-3)


def test_it_nears_a_softmax_as_the_root_of_its_features():
    """Errors over m = 8, 32, 128, 512, for queries and keys of unit length: the variance grows as exp(|q + k|^2)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 64, 8).double()
    q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
    exact = nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for features in (8, 32, 128, 512):
        drawn = [performer(8, features=features).directions.double() for _ in range(60)]
        found = [performer_attend(q, k, v, w) for w in drawn]
        errors.append(float(torch.stack([(y - exact).norm() / exact.norm() for y in found]).square().mean().sqrt()))
    even = float((v.mean(-2, keepdim=True) - exact).norm() / exact.norm())  # of an attention that tells no key apart
    assert errors[-1] < even / 4 < errors[0]
    assert log2(errors[-1] / errors[0]) / 6 == pytest.approx(-0.5, abs=0.08)
    assert all(log2(after / before) / 2 < -0.35 for before, after in pairwise(errors))


def test_features_are_unbiased_in_the_lemmas_sense():
    torch.manual_seed(0)
    q, k = 0.5 * torch.randn(2, 6, dtype=torch.float64)
    directions = torch.randn(200_000, 6, dtype=torch.float64)
    estimate = positive_features(q, directions) @ positive_features(k, directions)
    assert float(estimate) == pytest.approx(float((q @ k).exp()), rel=0.01)


def test_directions_are_orthogonal_and_never_trained():
    block = performer(64)
    w = block.directions
    torch.testing.assert_close(w @ w.mT, 32 * torch.eye(32), atol=1e-4, rtol=0)
    assert not w.requires_grad
    w.requires_grad_(True)  # as unfreezing a network does
    block(images((1, 5, 64))).sum().backward()
    assert w.grad is None and block.kqv.weight.grad is not None


def test_cost_is_linear_in_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    block, flops = performer(64), []
    for tokens in (256, 1024):
        with FlopCounterMode(display=False) as counter:
            block(torch.zeros(1, tokens, 64))
        flops.append(counter.get_total_flops())
    assert flops[1] == 4 * flops[0]


def test_sixteen_bits():
    block, x = performer(64), images((2, 49, 64))
    expected = fill(block)(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    rough = performer(64).bfloat16()
    rough.load_state_dict(block.state_dict())
    for found in (mixed, rough(x.bfloat16())):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_swap_puts_it_into_a_vision_transformer():
    backbone = Spec("timm/vit_tiny_patch16_224", {"image_size": 64}).build()
    operated = swap(backbone, "Attention", "performer", heads=3)
    blocks = [m for m in operated.model.modules() if type(m).__name__ == "Performer"]
    assert len(operated.changed) == len(blocks) == 12
    assert all(b.directions.shape == (32, 64) and b.heads == 3 for b in blocks)
    assert operated.after.params - operated.before.params == 12 * 32 * 64


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="5 heads do not divide dim 64"):
        performer(64, heads=5)
    with pytest.raises(UsageError, match="features is 0"):
        performer(64, features=0)
    with pytest.raises(UsageError, match="scale is 0"):
        performer(64, scale=0)
