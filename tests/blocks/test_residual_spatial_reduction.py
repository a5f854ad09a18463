"""Residual spatial reduction: the paper's arithmetic step by step, odd sides, class tokens, positions, swap."""

import pytest
import torch
from torch import nn

from vertebra.blocks.residual_spatial_reduction import ResidualSpatialReduction, residual_spatial_reduction
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_hand(block: ResidualSpatialReduction, x: torch.Tensor) -> torch.Tensor:
    """One map, cell by cell."""
    channels, height, width = x.shape
    cells = x.permute(1, 2, 0)
    centred = cells - cells.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + block.norm.eps).sqrt()
    framed = torch.zeros(height + 2, width + 2, channels, dtype=x.dtype)
    framed[1:-1, 1:-1] = normed * block.norm.weight + block.norm.bias
    out = torch.zeros(block.conv.out_channels, -(-height // 2), -(-width // 2), dtype=x.dtype)
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            seen = framed[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            out[:, row, column] = torch.einsum("hwc,ochw->o", seen, block.conv.weight) + block.conv.bias
            if block.shortcut == "pooled":
                there = cells[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                out[:channels, row, column] += there.flatten(0, 1).mean(0)
    return out if block.positions is None else out + block.positions[0].mT.view_as(out)


@pytest.mark.parametrize("shortcut", ["pooled", "none"])
@pytest.mark.parametrize("grid", [(6, 4), (5, 7), (1, 3)])
def test_is_the_papers_arithmetic(grid, shortcut):
    x = images((2, 6, *grid)).double()
    for known in (grid, None):
        block = fill(residual_spatial_reduction(6, 10, grid=known, shortcut=shortcut)).double().eval()
        with torch.no_grad():
            expected = torch.stack([by_hand(block, one) for one in x])
            assert difference(block(x), expected) < 1e-13


def test_tokens_go_through_the_same_norm_and_a_linear_layer():
    block = fill(residual_spatial_reduction(6, 10, grid=(4, 4), prefix=2)).double()
    maps, tokens = images((2, 6, 4, 4)).double(), images((2, 2, 6)).double()
    found, first = block(maps, tokens)
    assert torch.equal(found, block(maps))  # they do not meet
    expected = block.norm(tokens) @ block.widen.weight.T + block.widen.bias
    expected[..., :6] += tokens
    assert difference(first, expected) < 1e-13
    bare = fill(residual_spatial_reduction(6, 10, prefix=1, shortcut="none")).double()
    assert torch.equal(bare(maps, tokens)[1], bare.widen(bare.norm(tokens)))


def test_the_shortcut_leaves_new_channels_and_masked_ones_at_zero():
    """So that the first n channels of a wide network are those of a narrow one."""
    block = residual_spatial_reduction(8, 16, prefix=1)
    for tensor in (*block.conv.parameters(), *block.widen.parameters()):
        nn.init.zeros_(tensor)
    maps, tokens = images((2, 8, 6, 6)), images((2, 1, 8))
    maps[:, 5:], tokens[..., 5:] = 0, 0
    found, first = block(maps, tokens)
    assert torch.equal(found[:, :5], nn.functional.avg_pool2d(maps[:, :5], 2)) and not found[:, 5:].any()
    assert torch.equal(first[..., :5], tokens[..., :5]) and not first[..., 5:].any()


def test_the_shortcut_is_of_the_map_before_the_norm():
    block = fill(residual_spatial_reduction(4, 4)).double()
    x = images((1, 4, 4, 4)).double()
    shift = 3.0  # of all channels: the norm takes it away
    assert difference(block(x + shift), block(x) + shift) < 1e-13


def test_positions_are_resized():
    block = fill(residual_spatial_reduction(4, 6, grid=(8, 8))).eval()
    assert block.grid == (4, 4)
    plain = residual_spatial_reduction(4, 6).eval()
    plain.load_state_dict({name: tensor for name, tensor in block.state_dict().items() if name != "positions"})
    for size, cells in [((8, 8), (4, 4)), ((12, 20), (6, 10)), ((7, 5), (4, 3))]:
        x = images((1, 4, *size))
        table = block.positions.mT.unflatten(2, (4, 4))
        wanted = nn.functional.interpolate(table, cells, mode="bicubic", align_corners=False)
        torch.testing.assert_close(block(x) - plain(x), wanted, rtol=1e-4, atol=1e-5)


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    block = residual_spatial_reduction(176, 352, grid=(16, 16), prefix=1)
    assert float(block.positions.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(block.widen.weight.detach().std()) == pytest.approx(0.02, rel=0.03) and not block.widen.bias.any()
    assert float(block.conv.weight.detach().abs().max()) == pytest.approx((176 * 9) ** -0.5, rel=0.01)
    assert block.norm.eps == 1e-6 and block.conv.bias.any()


def test_number_formats_layouts_and_export():
    block, x = fill(residual_spatial_reduction(16, 24, grid=(6, 6), prefix=1)).eval(), images((2, 16, 6, 6))
    token = images((2, 1, 16))
    with torch.inference_mode():
        expected = block(x, token)
        last = block(x.contiguous(memory_format=torch.channels_last), token)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(block, (x, token)).module()
    torch.testing.assert_close(exported(x, token), block(x, token), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        rough = block.bfloat16()(x.bfloat16(), token.bfloat16())
    assert all(difference(one.float(), exact) < 0.03 for one, exact in zip(rough, expected, strict=True))


def test_gradients_reach_everything():
    block, x = fill(residual_spatial_reduction(6, 10, grid=(5, 5), prefix=1)), images((2, 6, 5, 5)).requires_grad_(True)
    maps, tokens = block(x, images((2, 1, 6)))
    ((maps * images(tuple(maps.shape))).sum() + (tokens * images(tuple(tokens.shape))).sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in (x, *block.parameters()))


def test_swap_in_a_convnext():
    """In the place of its norm and convolution between stages."""
    network = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    convnext = Spec("timm/convnext_atto", {"image_size": 64, "network": network}).build().eval()
    operated = swap(convnext, "*.stages.1.downsample", "residual_spatial_reduction", outputs=16)
    assert len(operated.changed) == 1
    assert operated.after.params - operated.before.params == 8 * 16 * (9 - 4)
    with torch.inference_mode():
        assert operated.model(images((2, 3, 64, 48))).pooled.isfinite().all()


def test_wrong_options_and_tokens_are_refused():
    for arguments, options, message in [
        ((0, 4), {}, "channels is 0"),
        ((8, 4), {}, "outputs is 4; .* outputs at least channels"),
        ((8, 0), {"shortcut": "none"}, "outputs is 0"),
        ((8, 8), {"shortcut": "sum"}, "shortcut is 'sum'; it can be pooled or none"),
        ((8, 8), {"prefix": -1}, "prefix is -1"),
    ]:
        with pytest.raises(UsageError, match=message):
            residual_spatial_reduction(*arguments, **options)
    assert residual_spatial_reduction(8, 4, shortcut="none")(torch.zeros(1, 8, 4, 4)).shape == (1, 4, 2, 2)
    with pytest.raises(UsageError, match="prefix=1"):
        residual_spatial_reduction(8, 8)(torch.zeros(1, 8, 4, 4), torch.zeros(1, 1, 8))
