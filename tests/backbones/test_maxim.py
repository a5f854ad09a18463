import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vertebra.backbones.maxim import cropped, experiment, extended, maxim, published, restorer
from vertebra.backbones.maxim.stage import Fusion, enlarged, shrunk
from vertebra.contracts import Batch, Measured, Progress
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "maxim.json"
KEYS = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["tiny"]
TINY = {"width": 8, "stages": 2, "scales": 3, "groups": 1, "bottlenecks": 1, "block": (4, 2), "grid": (2, 2)}
PARAMS = {
    "1s_single": 6_108_515,
    "2s_single": 13_353_830,
    "3s_single": 20_599_145,
    "2s": 14_176_178,
    "3s": 22_212_795,
}


def released() -> dict[str, np.ndarray]:
    """A checkpoint with the authors' names and shapes, filled by name as their network was."""
    root, names = nn.Module(), {}

    def grow(tree: dict, above: tuple[str, ...], module: nn.Module) -> None:
        for name, inside in tree.items():
            if isinstance(inside, dict):
                module.add_module(name, nn.Module())
                grow(inside, (*above, name), module.get_submodule(name))
            else:
                leaf = "bias" if name == "bias" else "weight"
                module.register_parameter(leaf, nn.Parameter(torch.zeros(inside[::-1])))
                names[".".join((*above, leaf))] = "/".join((*above, name))

    grow(KEYS, (), root)
    state = fill(root).state_dict()
    return {names[name]: value.numpy().T if value.ndim > 1 else value.numpy() for name, value in state.items()}


@pytest.mark.parametrize(("variant", "params"), PARAMS.items())
def test_published_counts_to_the_last_parameter(variant, params):
    with torch.device("meta"):
        assert sum(p.numel() for p in restorer(maxim(variant)).parameters()) == params


def in_the_references_order(self: Fusion, maps: list[Tensor]) -> Tensor:
    """Resize, project, concatenate, project."""
    direct = len(maps) - len(self.projections)
    found, (height, width) = list(maps[:direct]), maps[self.own].shape[1:3]
    for x, projection in zip(maps[direct:], self.projections, strict=True):
        if x.shape[1] > height:
            x = nn.functional.interpolate(
                x.permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True
            ).permute(0, 2, 3, 1)
        found.append(projection(x if x.shape[1] == height else enlarged(x, (height, width))))
    return self.mix(torch.cat(found, -1))


@pytest.mark.parametrize(("own", "direct"), [(0, 0), (1, 0), (2, 0), (0, 6)])
def test_merged_projections_are_the_two_in_a_row(own, direct):
    dims, sizes = [4, 6, 8], [(16, 24), (8, 12), (4, 6)]
    fusion = fill(Fusion(dims, 6, own=own, direct=direct)).double()
    maps = [images((2, *size, dim)).double() for dim, size in zip(dims, sizes, strict=True)]
    maps = [images((2, 16, 24, 6)).double(), *maps] if direct else maps
    torch.testing.assert_close(fusion(maps), in_the_references_order(fusion, maps), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("variant", "gmacs"), [("1s_single", 40.98), ("2s", 96.66)])
def test_in_the_references_order_the_multiply_adds_are_those_of_its_formula(variant, gmacs, monkeypatch):
    def counted(self: Fusion, maps: list[Tensor]) -> Tensor:
        size = maps[self.own].shape[1:3]
        direct = len(maps) - len(self.projections)
        pairs = zip(maps[direct:], self.projections, strict=True)
        return self.mix(torch.cat([*maps[:direct], *(p(x.new_zeros(1, *size, x.shape[3])) for x, p in pairs)], -1))

    with torch.device("meta"):
        network = restorer(maxim(variant))
    monkeypatch.setattr(Fusion, "forward", counted)
    assert count(network, size=(256, 256), channels=3).macs / 1e9 == pytest.approx(gmacs, rel=0.002)


@pytest.mark.parametrize("times", [2, 4])
def test_shrinking_does_not_alias(times):
    x = images((2, 3, 8, 16)).double()
    expected = nn.functional.interpolate(x, scale_factor=1 / times, mode="bilinear", antialias=True)
    torch.testing.assert_close(shrunk(x.permute(0, 2, 3, 1), times).permute(0, 3, 1, 2), expected)


def test_released_weights_restore_what_the_authors_network_does():
    """Golden numbers of the authors' flax network in 64 bit: every stage and scale, and their padding of odd sizes."""
    network = restorer(maxim("2s", **TINY)).eval()
    state = {f"opt/target/{name}": value for name, value in released().items()} | {"opt/state/step": np.array(7)}
    network.load_state_dict(published(state, network))
    reference, odd = stored(GOLDEN, "tiny"), stored(GOLDEN, "tiny_21x35")
    with torch.inference_mode():
        assert max(check_golden(named(network(images(reference.shape))), reference.golden).values()) < 1e-4
        network.double()
        found = named(network(images(reference.shape).double()))
        assert max(check_golden(found, reference.golden, 1e-7).values()) < 1e-7
        restored = network(images(odd.shape).double())[-1][-1]
        assert max(check_golden(named(restored), odd.golden, 1e-7).values()) < 1e-7


def test_the_published_network_of_one_stage():
    network, reference = fill(restorer(maxim("1s_single"))).eval(), stored(GOLDEN, "1s_single")
    with torch.inference_mode():
        check_golden(named(network(images(reference.shape))), reference.golden, 1e-4)


def test_a_released_file_is_loaded_and_another_networks_is_refused(tmp_path):
    state = {name: torch.tensor(value) for name, value in released().items()}
    save_file({f"params/{name}": value.contiguous() for name, value in state.items()}, tmp_path / "authors.safetensors")
    backbone = maxim("2s", **TINY, weights=str(tmp_path / "authors.safetensors"))
    whole = published(state, restorer(backbone))
    assert torch.equal(whole["backbone.stages.1.gates.0.upsample.weight"], backbone.stages[1].gates[0].upsample.weight)
    assert not any(name.startswith("outputs") for name in published(state, backbone))
    with pytest.raises(ParityError, match=r"missing from it: stages\.1\.attentions"):
        published(state, maxim("3s", **{**TINY, "stages": 3}))


def test_kernels_are_turned_as_the_layouts_ask():
    state = released()
    backbone = maxim("2s", **TINY)
    backbone.load_state_dict(published(state, backbone))
    up = state["stage_0_decoder_block_1/ConvTranspose_0/kernel"]  # (h, w, inputs, outputs)
    assert backbone.stages[0].decoders[1].up.weight[3, 5, 0, 1].item() == up[1, 0, 3, 5]
    mix = state["stage_0_global_block_0/SplitHeadMultiAxisGmlpLayer_0/GridGmlpLayer/GridGatingUnit/Dense_0/kernel"]
    assert backbone.stages[0].bottleneck[0].blocks[0].mlps[0].mix.weight[1, 2].item() == mix[2, 1]


@pytest.mark.parametrize("side", [1, 2, 5, 16, 21, 33])
def test_sides_are_extended_as_the_authors_do(side):
    even = np.pad(np.arange(side), (0, side % 2), mode="reflect")
    more = -(len(even)) % 16 // 2
    line = extended(torch.arange(side).float().view(1, 1, side, 1).expand(1, 1, side, 16), 16)
    assert line[0, 0, :, 0].tolist() == np.pad(even, (more, more), mode="reflect").tolist()
    assert cropped(line.permute(0, 2, 3, 1), (side, 16), 16, 1)[0, 0, :, 0].tolist() == list(range(side))


def test_scales_take_the_pixel_behind_the_centre():
    x = torch.arange(1024.0).view(1, 1, 32, 32)
    scaled = maxim("nano", channels=1, scales=3).scaled(x)
    assert [image.shape[1] for image in scaled] == [32, 16, 8]
    assert torch.equal(scaled[1][0, :, :, 0], x[0, 0, 1::2, 1::2]) and scaled[2][0, 0, :2, 0].tolist() == [66, 70]


def test_a_later_stage_hears_the_one_before():
    network = fill(restorer(maxim("nano", stages=2, scales=2))).eval()
    x = images((1, 3, 32, 32))
    with torch.inference_mode():
        before = network(x)
        nn.init.zeros_(network.backbone.stages[0].decoders[0].up.weight)
        after = network(x)
    assert not torch.equal(after[1][1], before[1][1]) and torch.equal(after[0][0], before[0][0])


def test_gradients_reach_every_parameter_of_two_stages():
    network = fill(restorer(maxim("nano", stages=2, scales=2)))
    outputs = named(network(images((4, 3, 32, 32)))).values()
    sum((x * images(tuple(x.shape))).sum() for x in outputs).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_options():
    assert maxim("nano", block=(4, 2), grid=(6, 2)).multiple == 48 and maxim("nano").multiple == 32
    assert maxim("1s", skips="conv").multiple == 64
    single = maxim("nano", stages=1, skips="conv", mixer="grid", drop_path=0.5)
    assert {m.axis for m in single.modules() if hasattr(m, "axis")} == {"grid"}
    assert single.stages[0].decoders[0].group.blocks[1].drop_path.drop_prob == pytest.approx(0.5)
    with torch.inference_mode():
        assert single.eval()(images((1, 3, 40, 24))).pyramid[0].shape == (1, 12, 40, 24)
    for options, words in (
        ({"scales": 4}, "scales is 4"),
        ({"block": (4,)}, "takes two sides"),
        ({"mixer": "blok"}, "mixer is 'blok'.*block"),
        ({"skips": "none"}, "skips is 'none'"),
        ({"width": 0}, "width is 0"),
    ):
        with pytest.raises(UsageError, match=words):
            maxim("nano", **options)


def test_training_takes_noise_away():
    torch.manual_seed(0)
    setting = experiment.SETTINGS["toy"]
    network = experiment.arm_of("full", setting)
    method = experiment.Restoring(network, experiment.noise, 0)
    batch = Batch(torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32), torch.zeros(4), torch.arange(4))
    optimizer, losses = torch.optim.AdamW(network.parameters(), 3e-3), []
    for step in range(15):
        loss = method(batch, Progress(step, 15, 0, 1))["charbonnier"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_arms_have_as_many_parameters_and_differ():
    setting = experiment.SETTINGS["toy"]
    with torch.device("meta"):
        sizes = {arm: sum(p.numel() for p in experiment.arm_of(arm, setting).parameters()) for arm in experiment.ARMS}
    assert sizes["full"] == sizes["block"] == sizes["grid"]
    assert all(abs(size / sizes["full"] - 1) < 0.1 for size in sizes.values())


def test_degradations_and_mosaics():
    clean = torch.full((30, 3, 32, 32), 0.4)
    noisy = experiment.noise(clean, torch.Generator().manual_seed(0))
    assert (noisy - clean).std().item() == pytest.approx(25 / 255, rel=0.01)
    wet = experiment.rain(clean, torch.Generator().manual_seed(0))
    share = ((wet - clean).abs() > 0).float().mean().item()
    assert (wet >= clean).all() and 0.03 < share < 0.12 and torch.equal(wet[:, :1], wet[:, :1].clamp(0, 1))
    whole = experiment.mosaic(noisy, 3, 5)
    assert whole.shape == (2, 3, 96, 160) and torch.equal(whole[0, :, :32, 32:64], noisy[1])
    assert torch.equal(experiment.cut(whole, 3, 5), noisy)
    same = experiment.judged(nn.Identity(), clean, noisy, "noise")
    assert same["noise_64x64"] == pytest.approx(same["noise"]) and same["noise"] >= same["noise_input"]


def test_effect_measures_arms(tmp_path, monkeypatch):
    small = experiment.SETTINGS["toy"]
    tiny = experiment.Setting({**small.network, "width": 4}, 32, 15, 4, {"noise": 1, "rain": 1})
    monkeypatch.setitem(experiment.SETTINGS, "toy", tiny)
    from vertebra.backbones.maxim import effect

    made = effect("toy", read("digits"))
    found = {arm: made.measure(arm, 0, tmp_path) for arm in ("full", "conv_skips", "conv_unet")}
    assert set(found["full"]) == set(made.metrics) and len({scores["noise"] for scores in found.values()}) == 3


def test_effect_checks_what_the_row_asks():
    from vertebra.backbones.maxim import effect

    def holds(block: float, unet: float, large: float, params: float) -> list[bool]:
        noise = {"conv_unet": unet, "full": 28.0, "block": block, "grid": 27.0, "conv_skips": 27.5}
        rows = {
            arm: {
                "noise": np.array([value] * 2),
                "noise_64x64": np.array([value] * 2),
                "noise_96x160": np.array([large] * 2),
                "params": np.array([params if arm == "conv_unet" else 100.0] * 2),
            }
            for arm, value in noise.items()
        }
        return [check.holds for check in effect("toy", read("digits")).checks(Measured(rows))]

    assert holds(27.9, 27.8, 27.8, 105) == [True] * 4
    assert holds(27.96, 27.95, 27.6, 111) == [False] * 4


def test_an_image_of_another_number_of_channels_is_refused():
    with pytest.raises(UsageError, match="1, H, W"):
        restorer(maxim("nano", channels=1))(torch.zeros(1, 3, 32, 32))
