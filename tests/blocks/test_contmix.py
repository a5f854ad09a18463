"""ContMix: the neighbourhood product against a loop, parity with the authors' block, and behaviour."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vertebra.blocks.contmix import Windows, contmix, neighbourhood_mix
from vertebra.errors import UsageError
from vertebra.parity import check_golden, fill, images, stored
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "overlock.json"


def by_loop(weights: Tensor, values: Tensor, kernel: int) -> Tensor:
    height, width = values.shape[2:4]
    out = torch.zeros_like(values)
    for row in range(height):
        for column in range(width):
            top = min(max(row - kernel // 2, 0), height - kernel)
            left = min(max(column - kernel // 2, 0), width - kernel)
            window = values[:, :, top : top + kernel, left : left + kernel].flatten(2, 3)
            out[:, :, row, column] = (weights[:, :, row, column, :, None] * window).sum(2)
    return out


# one tile, tiles that share a window, tiles with slabs, sides of one divisor, slabs shifted inwards at the end
SIZES = [(5, 5, 5), (7, 7, 5), (14, 14, 13), (14, 14, 5), (13, 11, 5), (17, 23, 17), (24, 9, 7), (20, 33, 3), (4, 6, 1)]


@pytest.mark.parametrize(("height", "width", "kernel"), SIZES)
def test_neighbourhood_product_is_the_loops(height, width, kernel):
    weights = images((2, 3, height, width, kernel**2)).softmax(-1)
    values = images((2, 3, height, width, 4)).contiguous()
    torch.testing.assert_close(neighbourhood_mix(weights, values), by_loop(weights, values, kernel))


@pytest.mark.parametrize("tile", [(1, 1), (1, 12), (3, 4), (9, 6), (9, 12)])
def test_every_tiling_gives_the_same(tile):
    windows = Windows(9, 12, 5, *tile)
    weights, values = images((1, 2, 9, 12, 25)).double(), images((1, 2, 9, 12, 3)).double()
    found = windows.mix(windows.split(weights), values)
    torch.testing.assert_close(found, by_loop(weights, values, 5))
    assert torch.equal(windows.join(windows.split(values)), values)


@pytest.mark.parametrize(("height", "width", "kernel"), [(4, 4, 3), (6, 5, 5), (5, 5, 5)])
def test_gradients_of_the_product(height, width, kernel):
    weights = images((1, 1, height, width, kernel**2)).double().requires_grad_()
    values = images((1, 1, height, width, 2)).double().requires_grad_()
    assert torch.autograd.gradcheck(neighbourhood_mix, (weights, values))


def test_biases_are_those_of_relative_positions():
    windows = Windows(6, 9, 5, 3, 9)
    table = torch.arange(2 * 81.0).view(2, 9, 9)
    found = windows.join(windows.biases(table).view(1, 2, windows.tiles, -1, 25))
    for row, column in ((0, 0), (3, 4), (5, 8), (1, 7)):
        top, left = min(max(row - 2, 0), 1), min(max(column - 2, 0), 4)
        expected = table[:, top - row + 4 : top - row + 9, left - column + 4 : left - column + 9]
        assert torch.equal(found[0, :, row, column], expected.flatten(1))


def test_a_map_of_the_kernels_size_is_one_product_and_no_weight_is_moved():
    assert Windows.of(7, 7, 7, 16).slab == (7, 7) and Windows.of(7, 7, 7, 16).tiles == 1
    windows = Windows.of(14, 14, 13, 16)
    weights = images((1, 1, 4, 49, 169))
    assert windows.tiles == 4 and windows.placed(weights) is weights


@pytest.mark.parametrize(("name", "kernel"), [("contmix_7", 7), ("contmix_13", 13), ("contmix_enlarged", 7)])
def test_parity_with_the_authors_block(name, kernel):
    reference = stored(GOLDEN, name)
    block = fill(contmix(16, kernel=kernel)).eval()
    with torch.inference_mode():
        found = {"output": block(images(reference.shape))}
    assert max(check_golden(found, reference.golden, 1e-5).values()) < 1e-5


def test_kernels_are_distributions_that_see_the_whole_map():
    block = fill(contmix(16)).eval()
    x = images((1, 16, 12, 12))
    other = x.clone()
    other[..., :3, :3] += 1  # far from the last cell, whose window ends at column 5
    with torch.inference_mode():
        (_, near), (windows, far) = block.mix.kernels(x, x)
        torch.testing.assert_close(near.sum(-1), torch.ones(near.shape[:-1]))
        torch.testing.assert_close(far.sum(-1), torch.ones(far.shape[:-1]))
        moved = windows.join(block.mix.kernels(x, other)[1][1])[..., -1, -1, :] - windows.join(far)[..., -1, -1, :]
        assert moved.abs().max() > 1e-4
        assert (block(other) - block(x))[..., -1, -1].abs().max() > 1e-5


def test_small_maps_and_number_formats():
    block = fill(contmix(16, kernel=13)).eval()
    x = images((2, 16, 5, 9))
    with torch.inference_mode():
        expected = block(x)
        assert expected.shape == x.shape and block.mix.grid(x) == (13, 23)
        rough = block.bfloat16()(x.bfloat16())
    assert torch.nn.functional.cosine_similarity(expected.flatten(1), rough.float().flatten(1)).min() > 0.99


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="channels is 12 with 2 heads; it must be a multiple of 8"):
        contmix(12)
    with pytest.raises(UsageError, match="kernel is 6 and small is 5; both must be odd"):
        contmix(16, kernel=6)
    with pytest.raises(UsageError, match="small at most kernel"):
        contmix(16, kernel=3)
    with pytest.raises(UsageError, match="heads is 0"):
        contmix(16, heads=0)


def test_swap_puts_it_in_the_place_of_convolutions():
    backbone = Spec("timm/convnext_atto", {"image_size": 32}).build()
    operated = swap(backbone, "*.stages.3.*.conv_dw", "contmix", kernel=5)
    assert len(operated.changed) == 2
    assert [type(operated.model.get_submodule(name)).__name__ for name in operated.changed] == ["ContMix"] * 2
