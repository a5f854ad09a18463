import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vertebra.backbones import wavemix as page
from vertebra.backbones.wavemix import effect, published, wavemix
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "wavemix.json"
KEYS = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
TINY = {"dim": 16, "image_size": 64}
NETWORKS = {  # what the golden numbers are of -> our variant and options
    "level1": ("lite_64_6", TINY | {"depth": 1}),
    "level2": ("192_16_level2", TINY | {"depth": 1}),
    "level3": ("192_16_level3", TINY | {"depth": 2}),
    "level4": ("256_16_level4", TINY | {"depth": 1}),
    "v3": ("v3_144_16", TINY | {"depth": 1, "patch": 4}),
    "lite_64_6": ("lite_64_6", {}),
}


def released(name: str) -> dict[str, Tensor]:
    """A state dict with the authors' names and shapes, filled by name as their network was."""
    root = nn.Module()
    for line in KEYS[name]:
        key, *sides = line.split()
        module, shape = root, [int(side) for side in sides]
        for part in key.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        leaf = key.rpartition(".")[2]
        if leaf in ("running_mean", "running_var", "num_batches_tracked"):
            module.register_buffer(leaf, torch.zeros(shape, dtype=torch.float if shape else torch.long))
        else:
            module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return fill(root).state_dict()


@pytest.mark.parametrize(
    ("variant", "classes", "params"),
    [
        ("lite_64_6", 10, 520_106),
        ("lite_8_5", 10, 7_156),
        ("lite_32_7", 10, 37_058),
        ("lite_8_10", 10, 3_566),
        ("192_16_level3", 1000, 27_857_608),
        ("192_16_level1", 1000, 12_494_536),
    ],
)
def test_published_counts_to_the_last_parameter(variant, classes, params):
    with torch.device("meta"):
        backbone = wavemix(variant)
    assert sum(p.numel() for p in backbone.parameters()) + classes * (backbone.width + 1) == params


@pytest.mark.parametrize("name", [*NETWORKS, "level3_training"])
def test_released_weights_compute_what_the_authors_network_does(name):
    """Golden numbers of the authors' code, at sizes that are not square; its keys and the order of its bands too."""
    reference, kind = stored(GOLDEN, name), name.removesuffix("_training")
    variant, options = NETWORKS[kind]
    backbone = wavemix(variant, **options, **({"dropout": 0.0} if kind != name else {}))
    backbone.load_state_dict(published(released(kind), backbone))
    with torch.inference_mode():
        found = named(backbone.train(kind != name)(images(reference.shape)))
    assert max(check_golden(found, reference.golden, 1e-5).values()) < 1e-5


def test_order_of_the_details_matters():
    backbone = wavemix("192_16_level3", **NETWORKS["level3"][1]).eval()
    state, reference = released("level3"), stored(GOLDEN, "level3")
    backbone.load_state_dict(published(state, backbone))
    theirs = state["layers.0.feedforward2.0.weight"]
    with torch.no_grad():
        first = backbone.blocks[0].mix.levels[1][0]
        assert torch.equal(first.weight[:, [0, 4, 8, 12]], theirs[:, [0, 4, 5, 6]])  # channel 0: low and three details
        first.weight.copy_(theirs)
    with torch.inference_mode(), pytest.raises(ParityError):
        check_golden(named(backbone(images(reference.shape))), reference.golden)


def test_released_file_is_loaded_and_another_networks_is_refused(tmp_path):
    state = released("level2")
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "authors.safetensors")
    backbone = wavemix("192_16_level2", **NETWORKS["level2"][1], weights=str(tmp_path / "authors.safetensors")).eval()
    reference = stored(GOLDEN, "level2")
    with torch.inference_mode():
        check_golden(named(backbone(images(reference.shape))), reference.golden, 1e-5)
    with pytest.raises(ParityError, match=r"missing from it: blocks\.0\.mix\.levels\.2"):
        published(state, wavemix("192_16_level3", dim=16, depth=1))


def test_odd_images_are_continued_by_zeros():
    """A map of 13 x 9 is that of 14 x 10 with zeros behind it, up to what the last blocks see of the border."""
    backbone = fill(wavemix("nano", depth=1, level=1, patch=1)).eval()
    block, x = backbone.blocks[0].mix, images((2, 32, 13, 9))
    x = x - x.mean()
    reduced = block.reduce(x)
    padded = nn.functional.pad(reduced, (0, 1, 0, 1))
    block.reduce = nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(block(reduced), block(padded)[:, :, :13, :9])
        assert backbone.stem(images((1, 3, 13, 9))).shape[2:] == (13, 9)


def test_options():
    assert [level.stride for level in wavemix("256_12_level2", depth=1).levels] == [8]
    assert wavemix("256_16_level4", depth=1).levels[0].stride == 4
    assert wavemix("lite_8_5").preprocess.channels == 1 and wavemix("lite_8_5").preprocess.crop == 1.0
    assert wavemix("nano", drop_path=0.2).blocks[2].drop_path.drop_prob == pytest.approx(0.2)
    with pytest.raises(UsageError, match="channels is 30; it must be a multiple of 4"):
        wavemix("nano", dim=30)
    with pytest.raises(UsageError, match="depth is 0"):
        wavemix("nano", depth=0)
    with pytest.raises(UsageError, match="has no variant '192_16'"):
        wavemix("192_16")
    with pytest.raises(UsageError, match="at least 4x4 pixels"):
        wavemix("nano", patch=4)(torch.zeros(1, 3, 3, 9))


def test_arms_have_equal_parameters_and_differ_in_the_bands():
    setting = page._SETTINGS["toy"]
    sizes = {arm: sum(p.numel() for p in page._arm(arm, setting).parameters()) for arm in page._ARMS}
    assert sizes["space_to_depth"] == sizes["haar"] < sizes["learned"] < 1.05 * sizes["haar"]
    assert 0.95 * sizes["haar"] < sizes["resnet"] < 1.05 * sizes["haar"]
    x = images((1, 2, 4, 4))
    learned, pixels = page._Learned(2), page._SpaceToDepth(2)(x)
    assert torch.equal(torch.stack(pixels, 2).flatten(1, 2), nn.functional.pixel_unshuffle(x, 2))
    assert [band.shape for band in learned(x)] == [(1, 2, 2, 2)] * 4


def test_space_to_depth_is_haar_with_turned_weights():
    """What the effect compares is one family of functions, where the start and the optimiser alone differ."""
    haar, pixels = fill(wavemix("nano", level=1)).eval(), wavemix("nano", level=1, bands=page._SpaceToDepth).eval()
    state = haar.state_dict()
    turn = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    for name in [name for name in state if name.endswith("levels.0.0.weight")]:
        state[name] = torch.einsum("obchw,bp->opchw", state[name].unflatten(1, (4, -1)), turn).flatten(1, 2)
    pixels.load_state_dict(state)
    with torch.inference_mode():
        assert difference(pixels(images((2, 3, 32, 32))).pooled, haar(images((2, 3, 32, 32))).pooled) < 1e-5


def test_effect_measures_every_arm(tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(16, 1, 8, 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert set(found) == {"space_to_depth", "haar", "learned", "resnet", "level_2"}
    assert len({scores["nll"] for scores in found.values()}) == 5


def test_effect_checks_what_the_row_asks():
    def measured(haar: float, learned: float, resnet_params: float) -> Measured:
        top1 = {"space_to_depth": 60.0, "haar": haar, "learned": learned, "resnet": 50.0, "level_2": 61.0}
        params = dict.fromkeys(top1, 100.0) | {"resnet": resnet_params}
        return Measured({a: {"top1": np.array([t, t]), "params": np.array([params[a]] * 2)} for a, t in top1.items()})

    def holds(*numbers: float) -> list[bool]:
        return [check.holds for check in effect("toy", read("digits")).checks(measured(*numbers))]

    assert holds(60.1, 60.3, 96.0) == [True, True, True]
    assert holds(59.9, 60.3, 96.0) == [False, False, True]
    assert holds(60.1, 60.3, 94.0) == [True, True, False]
