"""The window MLP: its sums place by place, which windows there are, swap, errors."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vertebra.blocks.window_mlp import WindowMLP, window_mlp
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_hand(layer: WindowMLP, x: Tensor, before: int) -> Tensor:
    """The layer of rows (B, H, W, C), place by place, in windows that start `before` places ahead of the map."""
    side, heads, out = layer.side, layer.heads, torch.empty_like(x)
    weight, bias = layer.weight.view(heads, side**2, side**2), layer.bias.view(heads, side**2)
    places = [(i, j, (i + before) % side * side + (j + before) % side) for i, j in product(*map(range, x.shape[1:3]))]
    for (i, j, q), head in product(places, range(heads)):
        mine = slice(head * x.shape[3] // heads, (head + 1) * x.shape[3] // heads)
        out[:, i, j, mine] = bias[head, q]
        for k, m, p in places:
            if (k + before) // side == (i + before) // side and (m + before) // side == (j + before) // side:
                out[:, i, j, mine] += weight[head, q, p] * x[:, k, m, mine]
    return out


@pytest.mark.parametrize(
    ("side", "shift", "size", "before"),
    [
        (4, 0, (8, 4), 0),
        (4, 2, (8, 8), 2),
        (3, 1, (6, 9), 2),  # an odd side: the first windows have one row of the map
        (3, 1, (5, 7), 2),
        (3, 0, (5, 7), 0),
        (4, 2, (4, 8), 0),  # no larger than a window: not shifted
        (4, 2, (3, 9), 0),
        (5, 2, (2, 3), 0),
    ],
)
def test_it_is_its_sum(side, shift, size, before):
    block: Any = fill(window_mlp(6, heads=3, side=side, shift=shift)).double()
    x = images((2, 6, *size)).double()
    with torch.inference_mode():
        expected = by_hand(block.layer, x.permute(0, 2, 3, 1), before).permute(0, 3, 1, 2)
        assert difference(block(x), expected) < 1e-13


def reached(layer: torch.nn.Module, place: tuple[int, int]) -> list[list[int]]:
    """Places of a map of 8 x 8 that the output of a place listens to."""
    x = images((1, 8, 8, 8)).requires_grad_(True)
    layer(x)[0, :, place[0], place[1]].sum().backward()
    assert x.grad is not None
    return (x.grad.abs().sum((0, 1)) > 0).nonzero().tolist()


def test_who_sees_whom():
    still, moved = (fill(window_mlp(8, variant, heads=2, side=4)) for variant in ("window", "shifted"))
    assert reached(still, (5, 2)) == [[i, j] for i in range(4, 8) for j in range(4)]
    assert reached(moved, (5, 2)) == [[i, j] for i in range(2, 6) for j in range(2, 6)]
    assert reached(moved, (0, 7)) == [[i, j] for i in (0, 1) for j in (6, 7)]  # none is wrapped around


def test_heads_do_not_mix_channels():
    block, x = fill(window_mlp(8, "shifted", heads=2, side=4)), images((1, 8, 8, 8))
    changed = x.clone()
    changed[:, 5] += 1
    with torch.inference_mode():
        moved = (block(changed) - block(x)).abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [False] * 5 + [True] + [False] * 2


def test_what_is_asked_wins_over_the_variant():
    layers: list[Any] = [
        window_mlp(96, "shifted").layer,
        window_mlp(96, "shifted", side=4, heads=4).layer,
        window_mlp(96, "shifted", shift=1).layer,
        window_mlp(16).layer,
    ]
    assert [(layer.heads, layer.side, layer.shift) for layer in layers] == [(3, 7, 3), (4, 4, 2), (3, 7, 1), (1, 7, 0)]
    assert layers[0].weight.shape == (3 * 49, 49) and layers[0].bias.shape == (3 * 49,)


def test_starts_small():
    torch.manual_seed(0)
    layer: Any = window_mlp(96).layer
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


def test_swap_puts_it_in_the_place_of_a_convolution():
    convnext = Spec("timm/convnext_atto", {"image_size": 64}).build().eval()
    operated = swap(convnext, "*stages.2.*conv_dw", "window_mlp/shifted", heads=10, side=2)
    found = [module for module in operated.model.modules() if isinstance(module, WindowMLP)]
    assert len(operated.changed) == len(found) == 6
    assert [(layer.heads, layer.side, layer.shift) for layer in found] == [(10, 2, 1)] * 6
    assert operated.after.params - operated.before.params == 6 * (10 * 4 * (4 + 1) - 160 * (7 * 7 + 1))
    with torch.inference_mode():
        assert operated.model(images((2, 3, 64, 80))).pooled.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "shift"}, "no variant 'shift'; did you mean shifted"),
        ({"side": 0}, "side 0"),
        ({"side": 4, "shift": 4}, "shift 4; .* shift is in 0..side - 1"),
        ({"shift": -1}, "shift -1"),
        ({"heads": 0}, "heads 0"),
        ({"heads": 3}, "3 heads do not divide 16 channels"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        window_mlp(16, **options)
