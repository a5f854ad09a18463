"""Sliced attention: slices by hand, the order of later applications, any number of tokens, swap."""

import pytest
import torch

from vertebra.blocks.attention import attention
from vertebra.blocks.sliced_attention import shuffled, sliced_attention
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_hand(block, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """One image (N, C): head by head, slice by slice, with a softmax written out."""
    q, k, v = block.qkv(x).chunk(3, 1)
    d, parts = x.shape[1] // block.heads, []
    for slice_ in torch.arange(len(x)).split(sizes):
        heads = [slice(head * d, head * d + d) for head in range(block.heads)]
        weights = [(q[slice_, head] @ k[slice_, head].T / d**0.5).softmax(1) for head in heads]
        parts.append(torch.cat([w @ v[slice_, head] for w, head in zip(weights, heads, strict=True)], 1))
    return block.proj(torch.cat(parts))


@pytest.mark.parametrize(
    ("tokens", "groups", "sizes"),
    [(48, 4, [12] * 4), (50, 4, [13, 13, 12, 12]), (49, 1, [49]), (3, 8, [1, 1, 1]), (15, 8, [2] * 7 + [1])],
)
def test_slices_are_attended_to_one_by_one(tokens, groups, sizes):
    block = fill(sliced_attention(24, heads=3, groups=(groups,))).double().eval()
    x = images((2, tokens, 24)).double()
    with torch.inference_mode():
        assert difference(block(x), torch.stack([by_hand(block, one, sizes) for one in x])) < 1e-12


def test_one_group_is_attention():
    block, plain = fill(sliced_attention(32, heads=2, groups=(1, 1))).eval(), attention(32, heads=2).eval()
    plain.load_state_dict(block.state_dict())
    x = images((2, 19, 32))
    with torch.inference_mode():
        assert torch.equal(block(x), plain(x)) and torch.equal(block(x, loop=1), plain(x))


def test_each_application_has_slices_of_its_own():
    """The second and the third: tokens in another order, attention in slices of that, and back."""
    block = fill(sliced_attention(24, heads=3, groups=(8, 2), seed=5)).double().eval()
    x = images((1, 21, 24)).double()
    with torch.inference_mode():
        for loop in (1, 2, 3):
            places = shuffled(21, 5, loop)
            expected = torch.empty(21, 24, dtype=torch.float64)
            expected[places] = by_hand(block, x[0, places], [11, 10])
            assert difference(block(x, loop=loop)[0], expected) < 1e-12
        assert difference(block(x, loop=2), block(x, loop=1)) > 1e-3


def test_who_sees_whom():
    """The first application keeps to a slice of 4 tokens; the second reaches half of them, from everywhere."""
    block = fill(sliced_attention(16, heads=1, groups=(8, 2))).eval()
    seen = []
    for loop in (0, 1):
        x = images((1, 32, 16)).requires_grad_(True)
        block(x, loop=loop)[0, 5].sum().backward()
        seen.append((x.grad[0].abs().sum(1) > 0).nonzero()[:, 0].tolist())
    assert seen[0] == [4, 5, 6, 7]
    assert len(seen[1]) == 16 and 5 in seen[1] and seen[1] not in (list(range(16)), list(range(16, 32)))


def test_training_draws_and_evaluation_does_not():
    block, other = (sliced_attention(16, heads=2, groups=(4, 2), order=order) for order in ("fixed", "random"))
    other.load_state_dict(fill(block).state_dict())
    x = images((1, 24, 16))
    torch.manual_seed(0)
    with torch.inference_mode():
        assert not torch.equal(block.train()(x, loop=1), block(x, loop=1))
        assert torch.equal(block.eval()(x, loop=1), block(x, loop=1))
        assert not torch.equal(other.eval()(x, loop=1), other(x, loop=1))
        assert torch.equal(block.train()(x), other(x))  # the first application has nothing to draw


@pytest.mark.parametrize("tokens", [1, 2, 784, 3000])
def test_an_order_has_every_token_once(tokens):
    found = [shuffled(tokens, seed, loop) for seed, loop in ((0, 1), (1, 1), (0, 2))]
    for order in found:
        assert torch.equal(order.sort().values, torch.arange(tokens))
    assert tokens < 3 or not any(torch.equal(found[0], order) for order in found[1:])


def test_an_order_is_the_same_everywhere():
    assert shuffled(12, 3, 1).tolist() == [3, 0, 6, 2, 5, 10, 4, 7, 11, 1, 9, 8]


def test_an_order_looks_drawn():
    """Neighbours do not stay so: about one in N pairs, and half of the tokens change halves."""
    order = torch.stack([shuffled(784, seed, 1) for seed in range(50)])
    assert float(((order[:, 1:] - order[:, :-1]).abs() == 1).float().mean()) == pytest.approx(2 / 784, rel=0.3)
    assert float((order[:, :392] < 392).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_cost_falls_with_the_slices():
    from vertebra.training.cost import count

    vit = Spec("timm/vit_tiny_patch16_224", {"image_size": 64, "network": {"depth": 1}}).build()
    sliced = swap(vit, "Attention", "sliced_attention", heads=3, groups=(17,)).model
    assert count(vit).macs - count(sliced).macs == 2 * 17 * 17 * 192 * 16 // 17  # 17 tokens, each by itself


def test_wrong_options_are_refused():
    for options, message in [
        ({"heads": 3}, "3 heads do not divide dim 16"),
        ({"groups": ()}, r"groups \(\)"),
        ({"groups": (8, 0)}, r"groups \(8, 0\)"),
        ({"heads": 0}, "heads 0"),
        ({"seed": -1}, "seed -1"),
        ({"drop": 1.0}, "drop 1.0"),
        ({"order": "drawn"}, "order is 'drawn'; it can be fixed or random"),
    ]:
        with pytest.raises(UsageError, match=message):
            sliced_attention(16, **options)


def test_swap_in_a_vit():
    vit = fill(Spec("timm/vit_tiny_patch16_224", {"image_size": 64, "network": {"depth": 2}}).build()).eval()
    batch = images((2, 3, 64, 64))

    def make(layer: torch.nn.Module, groups: int) -> torch.nn.Module:  # the same layer, with its weights
        block = sliced_attention(192, heads=3, groups=(groups,))
        block.load_state_dict(layer.state_dict())
        return block

    whole, sliced = (swap(vit, "Attention", lambda layer, g=g: make(layer, g)) for g in (1, 4))
    assert whole.changed == ("network.blocks.0.attn", "network.blocks.1.attn")
    with torch.inference_mode():
        assert difference(whole.model(batch).pooled, vit(batch).pooled) < 1e-5
        assert difference(sliced.model(batch).pooled, vit(batch).pooled) > 1e-3
    assert sliced.after.macs < sliced.before.macs and sliced.after.params == sliced.before.params
