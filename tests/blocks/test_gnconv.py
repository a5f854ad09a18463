"""gnConv: the recursion by hand, the global filter in space, gradients, number formats, errors, surgery."""

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.gnconv import GlobalLocalFilter, GnConv, gnconv
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_hand(block: GnConv, x: Tensor) -> Tensor:
    """The recursion in the paper's order, one convolution a line."""

    def pointwise(layer: nn.Module, maps: Tensor) -> Tensor:
        return nn.functional.conv2d(maps, layer.weight[:, :, None, None], layer.bias)

    first, *_ = block.dims
    p, q = pointwise(block.proj_in, x).split((first, sum(block.dims)), 1)
    mixer = block.mixer
    q = nn.functional.conv2d(q, mixer.weight, mixer.bias, padding=mixer.weight.shape[-1] // 2, groups=q.shape[1]) / 3
    gates = q.split(block.dims, 1)
    p = p * gates[0]
    for step, gate in zip(block.steps, gates[1:], strict=True):
        p = pointwise(step, p) * gate
    return pointwise(block.proj_out, p)


@pytest.mark.parametrize(("order", "dims"), [(1, (48,)), (2, (24, 48)), (3, (12, 24, 48)), (5, (3, 6, 12, 24, 48))])
def test_groups_double_and_gate_each_other(order, dims):
    block = fill(gnconv(48, order=order))
    assert block.dims == dims and block.proj_in.weight.shape == (96, 48)
    for shape in ((2, 48, 9, 8), (1, 48, 3, 2), (2, 48, 19, 4)):  # on either side of what counts as small
        x = images(shape)
        torch.testing.assert_close(block(x), by_hand(block, x), rtol=1e-4, atol=1e-5)


def test_the_kernel_and_the_scale_are_options():
    wide, plain = (gnconv(16, order=2, kernel=11, scale=scale) for scale in (0.5, 1.0))
    assert wide.mixer.weight.shape == (24, 1, 11, 11)
    for layer in (wide.steps[0], wide.proj_out):
        nn.init.zeros_(layer.bias)
    plain.load_state_dict(wide.state_dict())
    x = images((2, 16, 8, 8))
    torch.testing.assert_close(plain(x), 4 * wide(x), rtol=1e-4, atol=1e-6)  # two gates, each with the scale


def in_space(mixer: GlobalLocalFilter, x: Tensor) -> Tensor:
    """What the filter does to maps (B, C, H, W), as a sum over all shifts of the map."""
    spectrum = torch.view_as_complex(mixer.spectrum.detach().contiguous())
    height, width = x.shape[2:]
    kernel = torch.fft.irfft2(spectrum, s=(height, width))  # (C, H, W)
    shifts = [(i, j) for i in range(height) for j in range(width)]
    return sum(kernel[:, i, j, None, None] * x.roll((i, j), (2, 3)) for i, j in shifts)


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_the_filter_is_a_circular_convolution_as_large_as_the_map(size):
    mixer = fill(gnconv(8, order=1, grid=size).mixer)
    assert mixer.spectrum.shape == (4, size[0], size[1] // 2 + 1, 2)
    x = images((2, 4, *size))
    found = mixer.filtered(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, in_space(mixer, x), rtol=1e-4, atol=1e-5)


def test_halves_come_out_interleaved():
    mixer = fill(gnconv(8, order=1, grid=4).mixer)
    mixer.after = nn.LayerNorm(8, eps=1e-6)
    x = images((2, 4, 4, 8))
    normed = mixer.before(x).permute(0, 3, 1, 2)
    near_by = nn.functional.conv2d(normed[:, :4], mixer.local.weight, padding=1, groups=4)
    far = in_space(mixer, normed[:, 4:])
    order = torch.cat((near_by, far), 1)[:, [0, 4, 1, 5, 2, 6, 3, 7]].permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), mixer.after(order) / 3, rtol=1e-4, atol=1e-5)


def test_a_filter_is_interpolated_for_other_sizes():
    mixer = fill(gnconv(8, order=1, grid=(4, 4)).mixer)
    corners = mixer.spectrum_for(9, 10)
    assert corners.shape == (9, 6, 4, 2)
    for there, here in ((0, 0), (8, 3)):  # corners stay where they are
        torch.testing.assert_close(corners[there, 0], mixer.spectrum[:, here, 0])
    middle = mixer.spectrum_for(7, 4)[1]
    torch.testing.assert_close(middle, mixer.spectrum[:, :2].mean(1).permute(1, 0, 2))
    assert torch.equal(mixer.spectrum_for(4, 4).permute(2, 0, 1, 3), mixer.spectrum)


@pytest.mark.parametrize("grid", [None, 8])
def test_number_formats(grid):
    torch.manual_seed(0)
    block, x = gnconv(32, grid=grid, scale=1.0), images((2, 32, 8, 8))
    expected = block(x)
    rough = gnconv(32, grid=grid, scale=1.0).bfloat16()
    rough.load_state_dict(block.state_dict())
    found = rough(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), 0) > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    assert nn.functional.cosine_similarity(mixed.float().flatten(), expected.flatten(), 0) > 0.999
    mixed.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    precise = gnconv(32, grid=grid, scale=1.0).double()
    precise.load_state_dict(block.state_dict())
    torch.testing.assert_close(precise(x.double()).float(), expected, rtol=1e-4, atol=1e-6)


def test_the_filter_is_computed_in_32_bit():
    mixer = fill(gnconv(32, order=1, grid=8).mixer)
    x = images((2, 8, 8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer.filtered(x)
    assert found.dtype == torch.float32 and torch.equal(found, mixer.filtered(x))
    assert mixer.bfloat16().filtered(x.bfloat16()).dtype == torch.float32


def test_wrong_options_are_refused():
    for options, words in (
        ({"channels": 24, "order": 5}, "channels is 24; order 5 needs a multiple of 16"),
        ({"channels": 16, "order": 5, "grid": 7}, "halves the 31 mixed channels: it needs a multiple of 32"),
        ({"channels": 16, "order": 0}, "order is 0"),
        ({"channels": 16, "kernel": 4}, "kernel is 4; it must be odd"),
        ({"channels": 16, "scale": 0.0}, "scale is 0"),
        ({"channels": 16, "grid": (7, 4, 2)}, r"grid is \(7, 4, 2\); write a side"),
        ({"channels": 16, "variant": "gff"}, "no variant 'gff'; did you mean gf"),
    ):
        with pytest.raises(UsageError, match=words):
            gnconv(**options)


def test_swap_puts_it_in_the_place_of_depthwise_convolutions():
    backbone = Spec("timm/convnext_atto", {"image_size": 64}).build()
    operated = swap(backbone, "*.conv_dw", "gnconv", order=2)
    blocks = [m for m in operated.model.modules() if isinstance(m, GnConv)]
    assert len(operated.changed) == len(blocks) == 12
    assert [blocks[0].dims, blocks[-1].dims] == [(20, 40), (160, 320)]
    x = images((2, 3, 64, 64))
    with torch.inference_mode():
        before, after = backbone.eval()(x), operated.model.eval()(x)
    assert before.pooled.shape == after.pooled.shape and not torch.allclose(before.pooled, after.pooled)
