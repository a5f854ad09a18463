"""Groups of maps and attention within them, against timm's Swin and against what each place may see."""

import pytest
import torch
from timm.models.maxxvit import grid_partition_nchw
from timm.models.swin_transformer import SwinTransformerBlock, window_partition

from vertebra.blocks.window_attention import WindowAttention, window_attention
from vertebra.blocks.windows import group, padded, seen, ungroup
from vertebra.errors import UsageError
from vertebra.parity import fill, images


def test_windows_and_grids_are_timms():
    x = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3).float()
    theirs = window_partition(x, (4, 4)).view(2, 6, 16, 3)
    assert torch.equal(group(x, (4, 4)), theirs)
    grid = grid_partition_nchw(x.permute(0, 3, 1, 2), (4, 4))  # (B * groups, C, 4, 4)
    assert torch.equal(group(x, (4, 4), (2, 3)), grid.flatten(2).mT.reshape(2, 6, 16, 3))


@pytest.mark.parametrize(
    ("sides", "interval"), [((2, 3), (1, 1)), ((2, 3), (2, 2)), ((1, 12), (1, 1)), ((8, 1), (1, 1))]
)
def test_ungroup_inverts_group(sides, interval):
    x = images((2, 8, 12, 5))
    assert torch.equal(ungroup(group(x, sides, interval), sides, interval, (8, 12)), x)


def test_a_dilated_group_has_places_an_interval_apart():
    x = torch.arange(64).view(1, 8, 8, 1)
    first = group(x, (2, 2), (4, 4))[0, 0, :, 0]
    assert first.tolist() == [0, 4, 32, 36]
    second = group(x, (2, 2), (4, 4))[0, 1, :, 0]
    assert second.tolist() == [1, 5, 33, 37]


def test_padding_is_at_the_end():
    x = torch.ones(1, 5, 7, 2)
    assert padded(x, 5, 7) is x
    assert padded(x, 4, 4).shape == (1, 8, 8, 2) and padded(x, 4, 4)[:, :5, :7].sum() == padded(x, 4, 4).sum()


def test_everything_is_seen_where_nothing_is_padded_or_shifted():
    assert seen((8, 8), (8, 8), (4, 4), device=torch.device("cpu")) is None


@pytest.mark.parametrize("shift", [0, 2])
def test_a_block_of_swin(shift):
    block = fill(SwinTransformerBlock(32, (8, 12), num_heads=2, window_size=4, shift_size=shift)).eval()
    mine = WindowAttention(dim=32, heads=2, side=4, shift=shift).eval()
    mine.attention.load_state_dict({k: v for k, v in block.attn.state_dict().items() if k.startswith(("qkv", "proj"))})
    mine.bias.table.data = block.attn.relative_position_bias_table.data
    x = images((2, 8, 12, 32))
    torch.testing.assert_close(mine(x), block._attn(x), rtol=1e-4, atol=1e-5)


def reached(layer: torch.nn.Module, size: tuple[int, int], place: tuple[int, int]) -> torch.Tensor:
    """(H, W), True where the output of a place listens to."""
    x = images((1, 16, *size)).requires_grad_(True)
    layer(x)[0, :, place[0], place[1]].sum().backward()
    return x.grad.abs().sum((0, 1)) > 0


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (3, 20), (4, 4), (1, 1)])
@pytest.mark.parametrize("variant", ["window", "shifted", "dilated", "grid", "row", "column"])
def test_any_size_and_only_real_neighbours(variant, size):
    layer = fill(window_attention(16, variant, side=4)).eval()
    x = images((2, 16, *size))
    assert layer(x).shape == x.shape
    assert layer(x).isfinite().all()
    assert reached(layer, size, (0, 0))[0, 0]


def test_who_sees_whom():
    place = (5, 6)
    kinds = {variant: fill(window_attention(16, variant, side=4)).eval() for variant in ("window", "grid", "row")}
    seen_by = {variant: reached(layer, (8, 8), place).nonzero().tolist() for variant, layer in kinds.items()}
    assert seen_by["window"] == [[i, j] for i in range(4, 8) for j in range(4, 8)]
    assert seen_by["grid"] == [[i, j] for i in (1, 3, 5, 7) for j in (0, 2, 4, 6)]
    assert seen_by["row"] == [[5, j] for j in range(8)]
    shifted = fill(window_attention(16, "window", side=4, shift=2)).eval()
    assert reached(shifted, (8, 8), (0, 0)).nonzero().tolist() == [[i, j] for i in (0, 1) for j in (0, 1)]
    assert reached(shifted, (8, 8), (2, 5)).nonzero().tolist() == [[i, j] for i in range(2, 6) for j in range(2, 6)]


def test_padding_is_not_attended_to():
    """A map of 5 x 5 in windows of 4: the last place is a window of its own, whose weights are all on itself."""
    layer = fill(window_attention(16, side=4)).eval()
    x = images((1, 16, 5, 5))
    alone = layer(x[:, :, 4:, 4:])
    torch.testing.assert_close(layer(x)[:, :, 4:, 4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "shfited"}, "no variant 'shfited'; did you mean shifted"),
        ({"shift": 7}, "shift is in 0..side - 1"),
        ({"side": 0}, "side 0"),
        ({"variant": "dilated", "interval": 0}, "interval 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        window_attention(16, **options)


def test_what_is_asked_wins_over_the_variant():
    shifts = {options: window_attention(16, "shifted", **dict(options)).layer.shift for options in ((), (("side", 4),))}
    assert list(shifts.values()) == [3, 2]
    assert window_attention(16, "shifted", side=4, shift=1).layer.shift == 1
    assert window_attention(16, "dilated", interval=3).layer.groups((9, 9)) == ((7, 7), (3, 3))
    with pytest.raises(UsageError, match="pattern is 'diagonal'"):
        WindowAttention(dim=16, heads=1, side=7, pattern="diagonal")
