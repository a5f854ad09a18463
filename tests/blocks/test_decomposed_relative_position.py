"""Decomposed relative positions: the paper's arithmetic place by place, timm's layer, other maps, prefixes, swap."""

import pytest
import torch
from timm.models.vision_transformer_sam import Attention, get_rel_pos

from vertebra.blocks.attention import attention
from vertebra.blocks.decomposed_relative_position import (
    DecomposedRelativePosition,
    decomposed_relative_position,
    fitted,
    offsets,
)
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_hand(block: DecomposedRelativePosition, x: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """One image, head by head and pair by pair."""
    (height, width), d = sides, block.head_dim
    places = [(row, column) for row in range(height) for column in range(width)]
    whole = [part.view(len(places), block.heads, d) for part in block.qkv(x).chunk(3, 1)]
    heads = []
    for q, k, v in zip(*(part.unbind(1) for part in whole), strict=True):
        products = torch.empty(len(places), len(places), dtype=x.dtype)
        for one, (row, column) in enumerate(places):
            for other, (down, across) in enumerate(places):
                place = block.rows[row - down + height - 1] + block.columns[column - across + width - 1]
                products[one, other] = q[one] @ (k[other] * d**-0.5 + place)
        heads.append(products.softmax(1) @ v)
    return block.proj(torch.cat(heads, 1))


@pytest.mark.parametrize("sides", [(3, 3), (4, 2), (1, 5)])
def test_is_the_papers_arithmetic(sides):
    block = fill(decomposed_relative_position(24, heads=3, sides=sides)).double().eval()
    x = images((2, sides[0] * sides[1], 24)).double()
    with torch.inference_mode():
        expected = torch.stack([by_hand(block, each, sides) for each in x])
        assert difference(block(x, sides), expected) < 1e-12


@pytest.mark.parametrize("grid", [(7, 7), (5, 9), (12, 4)])
def test_parity_with_timms_layer(grid):
    """Segment Anything's attention, also on maps that its tables are not for."""
    ours = fill(decomposed_relative_position(32, heads=4, sides=7)).eval()
    theirs = Attention(32, num_heads=4, use_rel_pos=True, input_size=(7, 7)).eval()
    names = {"rows": "rel_pos_h", "columns": "rel_pos_w"}
    theirs.load_state_dict({names.get(name, name): tensor for name, tensor in ours.state_dict().items()})
    x = images((2, grid[0] * grid[1], 32))
    with torch.inference_mode():
        assert difference(ours(x, grid), theirs(x.unflatten(1, grid)).flatten(1, 2)) < 1e-6
    torch.testing.assert_close(offsets(ours.rows, grid[0]), get_rel_pos(grid[0], grid[0], ours.rows))


@pytest.mark.parametrize("prefix", [0, 2])
def test_starts_as_plain_attention(prefix):
    block, plain = decomposed_relative_position(32, heads=2, sides=3, prefix=prefix).eval(), attention(32, heads=2)
    plain.load_state_dict({name: tensor for name, tensor in block.state_dict().items() if name[:4] in ("qkv.", "proj")})
    x = images((2, prefix + 9, 32))
    with torch.inference_mode():
        assert difference(block(x), plain(x)) < 1e-6
        fill(block)
        plain.load_state_dict({name: block.state_dict()[name] for name in plain.state_dict()})
        apart = (block(x) - plain(x)).abs().amax((0, 2))
    assert not apart[:prefix].gt(1e-5).any() and apart[prefix:].gt(1e-3).all()  # tokens in front have no place


def test_tables_are_stretched_linearly():
    table = torch.arange(5.0)[:, None].expand(5, 3)  # of 3 places: offsets -2..2
    assert fitted(table, 3) is table
    stretched = fitted(table, 6)  # 11 offsets
    torch.testing.assert_close(stretched[:, 0], ((torch.arange(11) + 0.5) * 5 / 11 - 0.5).clamp(0, 4))
    assert offsets(table, 3)[:, :, 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_all_heads_share_two_tables():
    block = decomposed_relative_position(48, heads=6, sides=(5, 8))
    assert tuple(block.rows.shape) == (9, 8) and tuple(block.columns.shape) == (15, 8)
    plain = attention(48, heads=6)
    more = sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == (9 + 15) * 8


def test_gradients_reach_the_tables_through_zero():
    block, x = decomposed_relative_position(16, heads=2, sides=4), images((2, 16, 16))
    (block(x) * images((2, 16, 16))).sum().backward()
    assert block.rows.grad.abs().sum(1).gt(0).all() and block.columns.grad.abs().sum(1).gt(0).all()


def test_wrong_options_and_tokens_are_refused():
    for options, message in [
        ({"heads": 3}, "3 heads do not divide dim 16"),
        ({"heads": 0}, "heads 0"),
        ({"sides": 0}, r"sides \(0, 0\)"),
        ({"prefix": -1}, "prefix -1"),
    ]:
        with pytest.raises(UsageError, match=message):
            decomposed_relative_position(16, **options)
    assert decomposed_relative_position(16, heads=3, head_dim=4).qkv.out_features == 36
    block = decomposed_relative_position(16)
    with pytest.raises(UsageError, match=r"50 tokens are not 0 and a square map; .* prefix="):
        block(torch.zeros(1, 50, 16))
    with pytest.raises(UsageError, match="a map of 7 x 8"):
        block(torch.zeros(1, 49, 16), (7, 8))


def test_swap_in_a_vit_keeps_what_it_computes():
    vit = Spec("timm/test_vit", {}).build().eval()

    def make(layer: torch.nn.Module) -> torch.nn.Module:  # the same attention, with its weights
        block = decomposed_relative_position(64, heads=2, sides=10, prefix=1)
        block.load_state_dict(layer.state_dict(), strict=False)
        return block

    operated, batch = swap(vit, "Attention", make), images((2, 3, 160, 160))
    assert operated.changed == tuple(f"network.blocks.{number}.attn" for number in range(6))
    assert operated.after.params - operated.before.params == 6 * 2 * 19 * 32
    with torch.inference_mode():
        assert difference(operated.model(batch).pooled, vit(batch).pooled) < 1e-5
    fresh = swap(vit, "*.blocks.5.attn", "decomposed_relative_position", heads=2, prefix=1)
    assert fresh.changed == ("network.blocks.5.attn",)
