"""MaSA against loops over places, against plain attention where nothing fades, and what its parts promise."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vertebra.blocks.attention import Attention
from vertebra.blocks.manhattan_attention import (
    ManhattanAttention,
    Prior,
    log_decays,
    manhattan_attention,
    raster_angles,
)
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

HEADS, DIM = 2, 8


def layer(form: str, **options) -> ManhattanAttention:
    given = {"dim": DIM, "heads": HEADS, "form": form, "reach": 4.0, "spread": 4.0, "local": 5, **options}
    return fill(ManhattanAttention(**given)).double()  # type: ignore[return-value]


def decay(head: int) -> float:
    return math.log(1 - 2 ** (-2 - 4 * head / HEADS))


def by_loops(block: ManhattanAttention, x: torch.Tensor) -> torch.Tensor:
    """One image (H, W, C), place by place."""
    height, width, _ = x.shape
    d, form = DIM // HEADS, block.kind.form
    places = [(row, column) for row in range(height) for column in range(width)]
    q, k = block.qk(x).chunk(2, -1)
    v = block.v(x)
    out = torch.zeros_like(x)
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)

        def place_of(maps: torch.Tensor, row: int, column: int, part: slice = part) -> torch.Tensor:
            found, index = maps[row, column, part].clone(), row * width + column
            for pair in range(d // 2):
                angle = index * 10000 ** -(pair / (d // 2 - 1))
                even, odd = found[2 * pair].clone(), found[2 * pair + 1].clone()
                found[2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
                found[2 * pair + 1] = odd * math.cos(angle) + even * math.sin(angle)
            return found

        def attended(among, values, part: slice = part, head: int = head) -> torch.Tensor:
            """Every place to the places that `among` names, with the values (H, W, d)."""
            found = torch.zeros(height, width, d, dtype=x.dtype)
            for y, z in places:
                seen = among(y, z)
                logits = [
                    place_of(q, y, z) @ place_of(k, *other) * d**-0.5
                    + decay(head) * (abs(y - other[0]) + abs(z - other[1]))
                    for other in seen
                ]
                weights = torch.stack(logits).softmax(0)
                found[y, z] = sum(weight * values[other] for weight, other in zip(weights, seen, strict=True))
            return found

        if form == "whole":
            out[..., part] = attended(lambda y, z: places, v[..., part])
        else:
            rows = attended(lambda y, z: [(y, other) for other in range(width)], v[..., part])
            out[..., part] = attended(lambda y, z: [(other, z) for other in range(height)], rows)
    local = block.local(v.permute(2, 0, 1)[None])[0].permute(1, 2, 0)  # type: ignore[misc]
    return block.proj(out + local)


@pytest.mark.parametrize("form", ["whole", "decomposed"])
def test_against_loops(form):
    block, x = layer(form), images((2, 3, 4, DIM)).double()
    with torch.no_grad():
        for one, found in zip(x, block(x), strict=True):
            torch.testing.assert_close(found, by_loops(block, one), rtol=1e-10, atol=1e-10)


def test_columns_come_after_rows():
    """Turned upside down in the loops' order, the two steps give something else: the order is seen."""
    block, x = layer("decomposed"), images((1, 3, 4, DIM)).double()
    with torch.no_grad():
        other = block(x.transpose(1, 2)).transpose(1, 2)
    assert (block(x) - other).abs().max() > 1e-3


def test_without_decay_it_is_plain_attention_and_lepe():
    block, x = layer("whole", reach=math.inf), images((2, 5, 7, DIM)).double()
    plain = Attention(dim=DIM, heads=HEADS, head_dim=DIM // HEADS, bias=True, scale=None, drop=0.0).double()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat((block.qk.weight, block.v.weight)))
        plain.qkv.bias.copy_(torch.cat((block.qk.bias, block.v.bias)))
        plain.proj.load_state_dict(block.proj.state_dict())
        angles = raster_angles((5, 7), DIM // HEADS, x)[:, 0]
        expected = plain(x.flatten(1, 2), angles=angles).unflatten(1, (5, 7))
        assert block.local is not None
        local = block.local(block.v(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected = expected + local @ block.proj.weight.mT
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
        assert (layer("whole")(x) - expected).abs().max() > 1e-2


def test_a_wide_spread_leaves_the_decay_of_the_first_head_alone():
    logs = log_decays(4, 4.0, 1e4, torch.empty(0))
    assert logs[0] == pytest.approx(math.log(0.75)) and not logs[1:].any()


@pytest.mark.parametrize(
    ("heads", "spread", "expected"),
    [
        (4, 4.0, [-0.28768206, -0.13353139, -0.06453852, -0.03174870]),  # those of the released networks
        (5, 5.0, [-0.28768206, -0.13353139, -0.06453852, -0.03174870, -0.01574836]),
        (7, 6.0, [-0.28768206, -0.14851302, -0.07924704, -0.04296947, -0.02349243, -0.01290060, -0.00710112]),
    ],
)
def test_decays_of_the_heads(heads, spread, expected):
    assert log_decays(heads, 4.0, spread, torch.empty(0)).tolist() == pytest.approx(expected, rel=1e-5)
    assert log_decays(heads, 4.0, spread, torch.empty(0).double()).dtype == torch.float64


def test_decays_are_shared_and_made_again_where_they_do_not_fit():
    x = images((1, 4, 6, DIM)).double()
    whole, lines = layer("whole"), layer("decomposed")
    assert [tuple(decays.shape) for decays in whole.prior(x).decays] == [(1, HEADS, 24, 24)]
    assert [tuple(decays.shape) for decays in lines.prior(x).decays] == [(1, HEADS, 6, 6), (1, HEADS, 4, 4)]
    assert torch.equal(whole(x, whole.prior(x)), whole(x))
    for wrong in (lines.prior(x), whole.prior(x.transpose(1, 2)), layer("whole", reach=9.0).prior(x)):
        assert torch.equal(whole(x, wrong), whole(x))
    nothing = whole.prior(x)
    nothing = Prior(*nothing[:3], (torch.zeros_like(nothing.decays[0]),))
    assert not torch.allclose(whole(x, nothing), whole(x))  # what fits is taken as it is


def test_far_places_fade():
    """With equal products, the weight of a place falls by the decay for each step down or across."""
    decays = layer("whole").prior(torch.empty(1, 4, 6, DIM).double()).decays[0]
    q = torch.zeros(1, HEADS, 24, 4, dtype=torch.float64)
    weights = scaled_dot_product_attention(q, q, torch.eye(24).double().expand(1, HEADS, -1, -1), attn_mask=decays)
    weights = weights.view(HEADS, 24, 4, 6)[:, 0]  # of the corner
    for head in range(HEADS):
        kept = math.exp(decay(head))
        assert weights[head, 1, 0] / weights[head, 0, 0] == pytest.approx(kept)
        assert weights[head, 2, 3] / weights[head, 0, 0] == pytest.approx(kept**5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 11)])
@pytest.mark.parametrize("variant", ["whole", "decomposed"])
def test_any_size_and_both_gradients(variant, size):
    block = fill(manhattan_attention(16, variant, heads=2))
    x = images((2, 16, *size)).requires_grad_()
    out = block(x)
    assert out.shape == x.shape and out.isfinite().all()
    out.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


def test_without_local_nothing_is_added():
    block, other = layer("whole", local=0), layer("whole")
    assert block.local is None
    x = images((1, 3, 4, DIM)).double()
    with torch.no_grad():
        other.local.weight.zero_()  # type: ignore[union-attr]
        other.local.bias.zero_()  # type: ignore[union-attr]
        torch.testing.assert_close(block(x), other(x))


def test_swap_puts_it_in_the_place_of_a_convolution():
    backbone = Spec("timm/convnext_atto", {"image_size": 64}).build()
    operated = swap(backbone, "*stages.3.*conv_dw", "manhattan_attention", heads=10, form="decomposed")
    assert len(operated.changed) == 2
    kinds = [m.kind for m in operated.model.modules() if isinstance(m, ManhattanAttention)]
    assert [(kind.heads, kind.head_dim, kind.form) for kind in kinds] == [(10, 32, "decomposed")] * 2
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 64, 64))).pooled.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "rows"}, "no variant 'rows'"),
        ({"form": "rows"}, "form is 'rows'; it can be whole or decomposed"),
        ({"heads": 3}, "heads is 3 with 16 channels"),
        ({"heads": 16}, "an even number"),
        ({"reach": 1.0}, "reach must be above 1"),
        ({"spread": -1.0}, "spread at least 0"),
        ({"local": 4}, "local is 4; it must be odd"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        manhattan_attention(16, **options)


def test_channels_below_one_are_refused():
    with pytest.raises(UsageError, match="channels is 0"):
        manhattan_attention(0)
