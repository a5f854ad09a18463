"""Recursion: the order of applications and projections, who is told what, gradients of shared weights, swap."""

import pytest
import torch
from torch import nn

from vertebra.blocks.recursive import Projection, Sum, recursive
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def test_is_written_out():
    """Three applications of one layer, each behind it a projection of its own: c x + d MLP(LN x)."""
    whole = fill(recursive(nn.Linear(8, 8), 8, loops=3, ratio=1.5)).double()
    x = images((2, 5, 8)).double()
    expected = x
    for number, projection in enumerate(whole.projections):
        expected = whole.layer(expected)
        named = dict(projection.named_parameters())
        normed = nn.functional.layer_norm(expected, (8,), named["norm.weight"], named["norm.bias"], 1e-6)
        hidden = nn.functional.gelu(normed @ named["mlp.0.weight"].T + named["mlp.0.bias"])
        assert hidden.shape[-1] == 12 and number < 3
        branch = hidden @ named["mlp.2.weight"].T + named["mlp.2.bias"]
        expected = named["sum.shortcut"] * expected + named["sum.branch"] * branch
    assert difference(whole(x), expected) < 1e-12


def test_parameters_of_the_layer_are_there_once():
    layer = nn.Linear(16, 16)
    more = 2 * (2 * 16 * 16 + 4 * 16) + 2 * 2  # norm and biases, two scalars
    assert sum(p.numel() for p in recursive(layer, 16).parameters()) == 16 * 17 + more
    assert sum(p.numel() for p in recursive(layer, 16, loops=12, projection="none").parameters()) == 16 * 17
    assert sum(p.numel() for p in recursive(layer, 16, scalars="none").parameters()) == 16 * 17 + more - 4


def test_the_layer_is_told_the_number_of_the_application_if_it_asks():
    class Asks(nn.Module):
        def forward(self, x, add, loop=0):
            return x + add * 10**loop

    assert recursive(Asks(), 3, loops=3, projection="none")(torch.zeros(1, 3), 2).tolist() == [[222.0] * 3]
    plain = recursive(nn.Identity(), 3, loops=3, projection="none")
    assert not plain.told and plain(torch.ones(1, 3)).tolist() == [[1.0] * 3]


def test_gradients_of_all_applications_add_up():
    layer = nn.Linear(4, 4, bias=False).double()
    whole = recursive(layer, 4, loops=2, projection="none")
    first, second = layer.weight.detach().clone(), layer.weight.detach().clone()
    first.requires_grad_(True), second.requires_grad_(True)
    x = images((3, 4)).double()
    whole(x).square().sum().backward()
    (x @ first.T @ second.T).square().sum().backward()
    assert layer.weight.grad is not None and first.grad is not None and second.grad is not None
    torch.testing.assert_close(layer.weight.grad, first.grad + second.grad)


def test_scalars_start_at_one():
    torch.manual_seed(0)
    learned, plain = Projection(8, 8), Projection(8, 8, scalars="none")
    plain.load_state_dict({name: tensor for name, tensor in learned.state_dict().items() if "sum" not in name})
    x = images((2, 5, 8))
    torch.testing.assert_close(learned(x), plain(x))
    assert {name for name, _ in learned.sum.named_parameters()} == {"shortcut", "branch"}
    both = Sum()
    with torch.no_grad():
        both.shortcut.fill_(2.0)
        both.branch.fill_(-3.0)
    assert both(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0])).tolist() == [-1.0, 7.0]


def test_wrong_options_are_refused():
    for options, message in [
        ({"loops": 0}, "loops 0"),
        ({"ratio": 0.1}, r"ratio 0\.1"),
        ({"projection": "linear"}, "projection is 'linear'; it can be mlp or none"),
        ({"scalars": "fixed"}, "scalars is 'fixed'; it can be learned or none"),
    ]:
        with pytest.raises(UsageError, match=message):
            recursive(nn.Identity(), 8, **options)


@pytest.mark.parametrize(
    ("address", "network", "kind", "blocks"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}, "Block", ["blocks.0", "blocks.1"]),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "num_heads": (3, 6)},
            "SwinTransformerBlock",
            ["layers.0.blocks.0", "layers.1.blocks.0"],
        ),
    ],
)
def test_swap_applies_blocks_again(address, network, kind, blocks):
    """Tokens in a ViT, maps with channels last in Swin: exactly what running each block twice gives."""
    plain = fill(Spec(f"timm/{address}", {"image_size": 64, "network": network}).build()).eval()
    once, twice = (swap(plain, kind, "recursive", loops=n, projection="none") for n in (1, 2))
    assert twice.changed == tuple(f"network.{name}" for name in blocks)
    assert twice.after.params == twice.before.params and twice.after.macs > 1.5 * twice.before.macs
    batch = images((2, 3, 64, 64))
    with torch.inference_mode():
        assert torch.equal(once.model(batch).pooled, plain(batch).pooled)
        for name in blocks:
            plain.get_submodule(f"network.{name}").register_forward_hook(lambda layer, _, out: layer.forward(out))
        assert difference(twice.model(batch).pooled, plain(batch).pooled) < 1e-6


def test_swap_brings_projections_of_the_right_width():
    vit = Spec("timm/vit_tiny_patch16_224", {"image_size": 64, "network": {"depth": 2}}).build()
    operated = swap(vit, "Block", "recursive", loops=2)
    assert operated.changed == ("network.blocks.0", "network.blocks.1")
    assert operated.after.params - operated.before.params == 2 * 2 * (2 * 192 * 192 + 4 * 192 + 2)
    operated.model.train()(images((2, 3, 64, 64))).pooled.sum().backward()
    assert all(p.grad is not None for name, p in operated.model.named_parameters() if "projections" in name)
