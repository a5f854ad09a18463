"""Dynamic spectrum mixer: the arithmetic by hand with scipy's transform, bands, other grids, selection, surgery."""

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn

from vertebra.blocks import dct as transform
from vertebra.blocks.dct import dct2
from vertebra.blocks.spectrum_mixer import VARIANTS, DSMixer, means_of, rings_of, spectrum_mixer
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def ring(u: int, v: int, height: int, width: int, bands: int) -> int:
    """Band of a frequency."""
    return min(bands - 1, int(np.hypot(u / height, v / width) * bands + 1e-9))


def by_hand(block: DSMixer, x: Tensor) -> Tensor:
    """The block frequency by frequency, in 64 bit, with scipy's transform."""
    block = block.double()
    maps = block.proj_in(x.double().permute(0, 2, 3, 1)).detach().numpy()
    out = np.empty_like(maps)
    _, height, width, channels = maps.shape
    each, bands, groups = channels // block.groups, block.bands, block.groups
    kept = block.filter.detach().numpy()
    for image, one in enumerate(maps):
        spectrum = scipy.fft.dctn(one, axes=(0, 1), norm="ortho")
        sums, counts = np.zeros((bands, groups)), np.zeros(bands)
        for u in range(height):
            for v in range(width):
                band = ring(u, v, height, width, bands)
                counts[band] += each
                for channel in range(channels):
                    sums[band, channel // each] += abs(spectrum[u, v, channel])
        seen = torch.from_numpy((sums / np.maximum(counts, 1)[:, None]).reshape(1, -1))
        weights = np.ones((bands, groups))
        if block.select is not None:
            asked = block.select(seen).detach().reshape(-1, groups)
            weights = (2 / (1 + (-asked).exp()) if block.weighting == "bands" else asked.softmax(0)).numpy()
        for u in range(height):
            for v in range(width):
                for channel in range(channels):
                    group, place = channel // each, channel % each
                    if block.weighting == "filters":
                        gain = (weights[:, group] * kept[:, u, v, place]).sum()
                    else:
                        gain = weights[ring(u, v, height, width, bands), group] * kept[0, u, v, place]
                    spectrum[u, v, channel] *= gain
        out[image] = scipy.fft.idctn(spectrum, axes=(0, 1), norm="ortho")
    mixed = torch.from_numpy(out)
    if block.local is not None:
        mixed = mixed + block.local(x.double()).permute(0, 2, 3, 1)
    return block.proj_out(mixed).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_arithmetic(variant, local):
    block = fill(spectrum_mixer(12, variant, grid=(5, 7), bands=5, groups=3, filters=3, local=local))
    x = images((2, 12, 5, 7))
    with torch.inference_mode():
        found = block(x)
        torch.testing.assert_close(found, by_hand(block, x), rtol=1e-4, atol=1e-5)
    assert found.permute(0, 2, 3, 1).is_contiguous()  # channels last


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_start_only_the_linear_layers_are_left(variant):
    torch.manual_seed(0)
    block = spectrum_mixer(16, variant, grid=6)
    for size in ((6, 6), (9, 5), (70, 3)):
        x = images((2, 16, *size))
        plain = block.proj_out(block.proj_in(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        torch.testing.assert_close(block(x), plain, rtol=0, atol=1e-5)


def test_filters_that_are_mixed_start_apart():
    torch.manual_seed(0)
    block = spectrum_mixer(16, "filters", grid=6, filters=3)
    torch.testing.assert_close(block.filter.mean(0), torch.ones(6, 6, 2), rtol=0, atol=1e-6)
    assert block.filter.std(0).min() > 1e-4
    assert torch.equal(spectrum_mixer(16, grid=6).filter, torch.ones(1, 6, 6, 2))


@pytest.mark.parametrize("band", range(6))
def test_a_band_of_weight_zero_is_gone_from_the_output(band):
    torch.manual_seed(0)
    block = spectrum_mixer(8, grid=12, bands=6, groups=4)
    with torch.no_grad():
        block.select[-1].bias.unflatten(0, (6, 4))[band] = -200.0  # type: ignore[union-attr]
        block.proj_out.bias.zero_()  # it is a constant: frequency 0
        spectrum = dct2(block(images((2, 8, 12, 12)))).flatten(2)  # (2, 8, 144)
    inside = rings_of(12, 12, 6)[:, band].bool()
    assert spectrum[..., inside].abs().max() < 1e-5
    assert spectrum[..., ~inside].abs().mean() > 0.01


def test_a_group_of_channels_has_weights_of_its_own():
    block = spectrum_mixer(8, grid=6, bands=4, groups=2)
    with torch.no_grad():
        block.select[-1].bias.unflatten(0, (4, 2))[3, 1] = -200.0  # type: ignore[union-attr]
    spectrum = dct2(images((1, 8, 6, 6)), (2, 3)).permute(0, 2, 3, 1)
    changed = (block.weighted(spectrum) != spectrum).flatten(1, 2)[0]  # (36, 8)
    assert changed[:, 4:].any() and not changed[:, :4].any()
    assert torch.equal(changed[:, 4], rings_of(6, 6, 4)[:, 3].bool())


def test_bands_are_rings_of_the_same_frequencies_on_any_grid():
    rings = rings_of(4, 4, 8).argmax(1).reshape(4, 4)
    assert rings.tolist() == [[0, 2, 4, 6], [2, 2, 4, 6], [4, 4, 5, 7], [6, 6, 7, 7]]
    assert torch.equal(rings_of(8, 8, 8).argmax(1).reshape(8, 8)[::2, ::2], rings)
    assert torch.equal(rings_of(4, 8, 8).argmax(1).reshape(4, 8)[:, ::2], rings)
    for sides in ((1, 1), (2, 3), (7, 7), (31, 5)):
        assert torch.equal(rings_of(*sides, 8).sum(1), torch.ones(sides[0] * sides[1], dtype=torch.float64))
        found = means_of(*sides, 8).sum(1)
        assert ((found - 1).abs() < 1e-12).logical_or(found == 0).all()
    assert (rings_of(7, 7, 8).sum(0) > 0).all()


def test_filters_fit_other_grids():
    block = spectrum_mixer(8, "static", grid=(8, 6), groups=4)
    with torch.no_grad():
        u, v = torch.linspace(0, 1, 8)[:, None, None], torch.linspace(0, 1, 6)[:, None]
        block.filter.copy_((1 - 0.5 * u - 0.25 * v + 0.1 * torch.arange(2)).expand(1, 8, 6, 2))
    assert torch.equal(block.filter_for(8, 6).unflatten(1, (8, 6)), block.filter)
    for height, width in ((16, 12), (5, 9), (1, 3)):
        found = block.filter_for(height, width).unflatten(1, (height, width))[0]
        u, v = torch.linspace(0, 1, height)[:, None, None], torch.linspace(0, 1, width)[:, None]
        torch.testing.assert_close(found, 1 - 0.5 * u - 0.25 * v + 0.1 * torch.arange(2), rtol=0, atol=1e-6)


def test_weights_see_what_a_mean_over_space_does_not():
    torch.manual_seed(0)
    block = spectrum_mixer(8, grid=8)
    nn.init.normal_(block.select[-1].weight, std=0.5)  # type: ignore[union-attr,arg-type]
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 8, 8, 8)  # (B, C, H, W), of mean 0
    shades = torch.tensor([1.0, -1.0]).repeat_interleave(4).expand(1, 8, 8, 8)
    spectra = [dct2(block.proj_in(maps.permute(0, 2, 3, 1)), (1, 2)) for maps in (stripes, shades, stripes)]
    weights = [block.weights_of(spectrum) for spectrum in spectra]
    assert weights[0].shape == (1, 8, 8) and weights[0].min() > 0 and weights[0].max() < 2
    assert (weights[0] - weights[1]).abs().max() > 0.02 and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_paths_of_the_transform_and_gradients(variant, monkeypatch):
    block, x = fill(spectrum_mixer(16, variant, grid=6)), images((2, 16, 7, 9))
    expected = block(x)
    monkeypatch.setattr(transform, "LONGEST", 0)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    (block(x) * images((2, 16, 7, 9))).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_shares_of_filters_sum_to_one():
    block = fill(spectrum_mixer(16, "filters", grid=6, filters=3))
    shares = block.weights_of(dct2(images((2, 6, 6, 16)), (1, 2)))
    assert shares.shape == (2, 3, 8) and shares.std() > 0.01
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 8))


def test_swap_mixes_a_network_of_timm_in_frequencies():
    backbone = Spec("timm/convnext_atto", {"image_size": 64}).build()
    operated = swap(backbone, "*.conv_dw", "spectrum_mixer/filters", grid=4)
    blocks = [module for module in operated.model.modules() if isinstance(module, DSMixer)]
    assert len(operated.changed) == len(blocks) == 12 and blocks[0].weighting == "filters"
    assert [blocks[number].proj_in.in_features for number in (0, 11)] == [40, 320]


def test_wrong_options_are_refused():
    for options, words in (
        ({"channels": 12}, "channels is 12; it needs a multiple of groups=8"),
        ({"variant": "band"}, "no variant 'band'"),
        ({"bands": 0}, "bands is 0; it must be at least 1"),
        ({"groups": 0}, "groups is 0"),
        ({"filters": 1}, "filters is 1; it must be at least 2"),
        ({"grid": (4, 4, 4)}, r"grid is \(4, 4, 4\); write a side"),
        ({"grid": 0}, "grid is 0"),
    ):
        with pytest.raises(UsageError, match=words):
            spectrum_mixer(**{"channels": 16, **options})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="static filter has no weights"):
        spectrum_mixer(8, "static").weights_of(images((1, 4, 4, 8)))
