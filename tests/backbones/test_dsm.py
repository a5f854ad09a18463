"""DSM: the design's counts by a formula, blocks and options, and the effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones import dsm as page
from vertebra.backbones.dsm import VARIANTS, Block, SpatialMLP, armed, band_weights, dsm, effect
from vertebra.blocks.spectrum_mixer import DSMixer
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "dsm.json"


def sums(variant: str, classes: int = 1000) -> tuple[int, int]:
    """Parameters and MACs at 224 pixels with a classifier, from the design on paper: 8 bands, 8 groups, ratio 4."""
    dims, depths = VARIANTS[variant]["dims"], VARIANTS[variant]["depths"]
    asks = 8 * 8
    params, macs, before = 2 * dims[-1] + (dims[-1] + 1) * classes, dims[-1] * classes, 3
    for stage, (c, depth) in enumerate(zip(dims, depths, strict=True)):
        side, kernel = 56 >> stage, 3 if stage else 7
        places = side * side
        params += kernel**2 * before * c + 3 * c  # and a norm
        macs += kernel**2 * before * c * places
        linear, biases, norms, scales = 10 * c * c, 7 * c, 4 * c, 2 * c
        params += depth * (linear + biases + norms + scales + places * c // 8 + 2 * (asks * asks + asks))
        transforms = 2 * places * c * (side + side)
        selection = places * c * 8 + 2 * asks * asks + places * 8 * 8  # band means, linear layers, weights to places
        macs += depth * (places * linear + transforms + selection)
        before = c
    return params, macs


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_counts_are_those_of_the_design(variant):
    with torch.device("meta"):
        backbone = dsm(variant)
    cost, (params, macs) = count(backbone), sums(variant)
    classifier = backbone.width * 1000
    assert (cost.params + classifier + 1000, cost.macs + classifier) == (params, macs)
    numbers = json.loads(GOLDEN.read_text(encoding="utf-8"))["variants"][variant]
    assert (round(params / 1e6, 3), round(macs / 1e9, 3)) == (numbers["params_m"], numbers["gmacs"])


@pytest.mark.parametrize("size", [(224, 224), (160, 288), (97, 65)])
def test_a_pyramid_at_any_size(size):
    with torch.device("meta"):
        features = dsm().eval()(torch.empty(1, 3, *size))
    for feature, channels, stride in zip(features.pyramid, (64, 128, 320, 512), (4, 8, 16, 32), strict=True):
        assert feature.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))  # rounded up
    assert features.pooled.shape == (1, 512)


def test_maps_stay_in_channels_last_memory():
    with torch.inference_mode():
        features = dsm("nano").eval()(images((2, 3, 64, 32)))
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features.pyramid)


def test_the_last_map_is_normalised_and_then_pooled():
    backbone = fill(dsm("nano")).eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, 32, 32)))
        tokens = features.pyramid[-1].flatten(2).mT
        pooled = nn.functional.layer_norm(tokens, (128,), backbone.norm.weight, backbone.norm.bias, 1e-6).mean(1)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-5, atol=1e-6)


def test_a_block_is_two_branches():
    torch.manual_seed(0)
    block = fill(Block(8, nn.Conv2d(8, 8, 3, padding=1), 20, 1.0, 0.0)).eval()
    x = images((2, 8, 5, 6))

    def normed(layer: nn.LayerNorm, maps: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(maps.movedim(1, -1), (8,), layer.weight, layer.bias, 1e-6).movedim(-1, 1)

    with torch.inference_mode():
        y = x + block.scale1[:, None, None] * block.mixer(normed(block.norm1, x))
        rows = normed(block.norm2, y).movedim(1, -1)
        hidden = nn.functional.gelu(nn.functional.linear(rows, block.mlp[0].weight, block.mlp[0].bias))
        branch = nn.functional.linear(hidden, block.mlp[2].weight, block.mlp[2].bias).movedim(-1, 1)
        torch.testing.assert_close(block(x), y + block.scale2[:, None, None] * branch, rtol=1e-4, atol=1e-5)


def test_options_reach_the_mixers():
    for options, check in (
        ({"weighting": "static"}, lambda mixer: mixer.select is None),
        ({"weighting": "filters"}, lambda mixer: mixer.weighting == "filters" and len(mixer.filter) > 1),
        ({"local": True}, lambda mixer: mixer.local is not None),
        ({"bands": 12, "groups": 2}, lambda mixer: mixer.select[0].in_features == 24),
    ):
        mixers = [module for module in dsm("nano", **options).modules() if isinstance(module, DSMixer)]
        assert len(mixers) == 5 and all(check(mixer) for mixer in mixers), options
    assert [m.filter.shape[1] for m in dsm("nano").modules() if isinstance(m, DSMixer)] == [16, 8, 4, 4, 2]


def test_mixers_start_as_linear_layers():
    torch.manual_seed(0)
    backbone = dsm("nano")
    mixers = [module for module in backbone.modules() if isinstance(module, DSMixer)]
    assert all(m.select is not None and not m.select[-1].weight.any() and (m.filter == 1).all() for m in mixers)


def test_drop_path_rises_and_drops_branches():
    backbone = dsm("nano", drop_path=0.4)
    rates = [block.drop.drop_prob for stage in backbone.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = images((4, 3, 32, 32))
    torch.manual_seed(0)
    first = fill(backbone).train()(x).pooled
    assert not torch.equal(first, backbone(x).pooled)
    assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_mixed_precision_trains():
    backbone = fill(dsm("nano")).train()
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images((4, 3, 32, 32)))
    features.pooled.float().square().mean().backward()
    exact = backbone(images((4, 3, 32, 32))).pooled
    assert nn.functional.cosine_similarity(features.pooled.float(), exact).min() > 0.99
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_wrong_options_are_refused():
    for options, words in (
        ({"dims": (12, 24, 48, 98)}, "channels is 98; it needs a multiple of groups=4"),
        ({"depths": (1, 1)}, r"depths is \(1, 1\); it needs four"),
        ({"grids": (8, 4, 2, 0)}, "must be at least 1"),
        ({"patch": 0}, "patch is 0"),
        ({"weighting": "band"}, "no variant 'band'"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            dsm("nano", **options)


def test_spatial_mlp_mixes_places_of_each_channel():
    torch.manual_seed(0)
    mixer, x = SpatialMLP(12, 5), images((2, 6, 3, 4))
    moved = x.clone()
    moved[:, 2, 1, 1] += 1
    changed = (mixer(moved) - mixer(x)).abs() > 1e-7
    assert changed[:, 2].all() and not changed[:, [0, 1, 3, 4, 5]].any()
    torch.testing.assert_close(mixer(x)[:, 3].flatten(1), mixer.mlp(x[:, 3].flatten(1)))


@pytest.fixture(scope="module")
def toy():
    return effect("toy", read("digits"))


def test_arms_have_the_same_parameters():
    for setting in page._SETTINGS.values():
        with torch.device("meta"):
            networks = {arm: armed(arm, setting) for arm in page._ARMS}
        sizes = {arm: sum(p.numel() for p in network.parameters()) for arm, network in networks.items()}
        assert max(sizes.values()) / min(sizes.values()) < 1.005
        assert all(
            block.mlp[0].out_features == 4 * dim
            for dim, (block, *_) in zip(setting.dims, networks["dynamic"].stages, strict=True)
        )
    assert sum(p.numel() for p in armed("dynamic", page._SETTINGS["toy"]).parameters()) < 1e6


def test_effect_measures_every_arm(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting((8, 8, 16, 16), (1, 1, 1, 1), 4, 16, 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert len({values["nll"] for values in found.values()}) == len(found) == 4 and small.baseline in found
    assert {arm for arm, values in found.items() if np.isfinite(values["log10_p"])} == {"dynamic", "filters"}
    assert small.measure("dynamic", 0, tmp_path) == found["dynamic"]


def test_weights_tell_textured_images_only_once_something_is_learnt():
    torch.manual_seed(0)
    backbone, split = (
        armed("dynamic", page._Setting((8, 8, 16, 16), (1, 1, 1, 1), 4, 16, 64, 1)),
        read("digits").split("test"),
    )
    weights, texture = band_weights(backbone, split)
    assert weights.shape == (len(split), 4 * 8) and (weights == 1).all() and texture.std() > 0
    assert page._adapts(backbone, split) == 0.0  # p is 1
    for module in backbone.modules():
        if isinstance(module, DSMixer) and module.select is not None:
            nn.init.normal_(module.select[-1].weight, std=0.1)  # type: ignore[arg-type]
    assert page._adapts(backbone, split) < -2


def test_effect_checks_what_the_row_asks(toy):
    def holds(log10_p: float = -9.0, more: float = 0.0, **changed: float) -> list[bool]:
        top1 = {"dynamic": 62.0, "static": 61.0, "spatial": 60.0, "filters": 61.0} | changed
        values = {
            arm: {
                "top1": np.array([value, value + 1]),
                "more": np.array([more if arm == "spatial" else 0.0] * 2),
                "log10_p": np.array([-9.0, log10_p]) if arm == "dynamic" else np.full(2, np.nan),
            }
            for arm, value in top1.items()
        }
        return [check.holds for check in toy.checks(Measured(values))]

    assert holds() == [True, True, True, True]
    assert holds(static=62.0) == [False, True, True, True]
    assert holds(spatial=61.5) == [True, False, True, True]
    assert holds(log10_p=-1.9) == [True, True, False, True]
    assert holds(more=-3.5) == [True, True, True, False]
