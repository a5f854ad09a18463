"""UniRepLKNet: counts of both forms, parity with the authors' code, re-parameterisation, released names, the effect."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vertebra.backbones.unireplknet import VARIANTS, effect, experiment, published, released_names, unireplknet
from vertebra.blocks.dilated_reparam import DilatedReparam
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError, VertebraError
from vertebra.parity import check_golden, difference, fill, fill_as, images, stored
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "unireplknet.json"
NUMBERS = json.loads(GOLDEN.read_text(encoding="utf-8"))
SMALL = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "kernels": (3, 17, (15, 11), 9)}


@pytest.mark.parametrize("variant", NUMBERS["variants"])
def test_deployed_parameters_and_macs(variant):
    expected = NUMBERS["variants"][variant]
    with torch.device("meta"):
        backbone = unireplknet(variant, deploy=True)
    cost = count(backbone, size=(224, 224))
    head = backbone.width * 1000
    assert (cost.params + head + 1000) / 1e6 == pytest.approx(expected["deploy_m"], abs=6e-4)
    assert (cost.macs + head) / 1e9 == pytest.approx(expected["gmacs"], rel=1e-3)


@pytest.mark.parametrize("variant", ["a", "f"])
def test_macs_in_training_count_every_branch(variant):
    with torch.device("meta"):
        backbone = unireplknet(variant).train()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            backbone(torch.empty(2, 3, 224, 224))
    expected = NUMBERS["variants"][variant]["training_gmacs"]
    assert (flops.get_total_flops() / 4 + backbone.width * 1000) / 1e9 == pytest.approx(expected, rel=1e-3)


def test_kernels_of_every_block():
    def kernels(variant: str) -> list[list[int]]:
        with torch.device("meta"):
            stages = unireplknet(variant, dims=(4, 4, 4, 4)).stages
        return [
            [
                block.spatial.convs[0].kernel_size[0]
                if isinstance(block.spatial, DilatedReparam)
                else block.spatial.kernel_size[0]
                for block in stage
            ]
            for stage in stages
        ]

    assert kernels("a") == [[3] * 2, [13] * 2, [13] * 6, [13] * 2]
    assert kernels("t") == [[3] * 3, [13] * 3, [13, 3] * 9, [13] * 3]
    assert kernels("xl") == [[3] * 3, [13] * 3, [13, 3, 3] * 9, [13] * 3]


CASES = {
    "a": ("a", {}),
    "a_odd": ("a", {}),
    "a_deploy": ("a", {"deploy": True}),
    "n4": ("n", {"depths": (1, 1, 1, 1), "kernels": (3, 13, 13, 13)}),
    "small": ("n", SMALL),
}


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_authors_do(case):
    variant, options = CASES[case]
    reference = stored(GOLDEN, case)
    with torch.inference_mode():
        features = fill(unireplknet(variant, **options)).eval()(images(reference.shape))
    check_golden({"pyramid": features.pyramid, "pooled": features.pooled}, reference.golden, 1e-4)


def test_computes_what_the_authors_do_in_training():
    reference = stored(GOLDEN, "a_training")
    features = fill(unireplknet("a")).train()(images(reference.shape))
    check_golden({"pyramid": features.pyramid, "pooled": features.pooled}, reference.golden, 1e-4)


def test_fuses_to_what_the_authors_deploy():
    reference = stored(GOLDEN, "a_merged")
    operated = fuse(fill(unireplknet("a", image_size=64)).eval())
    with torch.inference_mode():
        features = operated.model(images(reference.shape))
    check_golden({"pyramid": features.pyramid, "pooled": features.pooled}, reference.golden, 1e-4)
    with torch.device("meta"):
        deployed = unireplknet("a", deploy=True)
    assert {n: p.shape for n, p in operated.model.named_parameters()} == {
        n: p.shape for n, p in deployed.named_parameters()
    }
    delta = NUMBERS["variants"]["a"]["params_m"] - NUMBERS["variants"]["a"]["deploy_m"]
    assert (operated.before.params - operated.after.params) / 1e6 == pytest.approx(delta, abs=6e-4)


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11, 13, 15, 17])
def test_every_kernel_fuses_without_loss(kernel):
    backbone = unireplknet("nano", dims=(8, 16), depths=(1, 2), kernels=(kernel, kernel))
    fill(backbone).eval()
    fused, batch = fuse(backbone).model, images((2, 3, 40, 29))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        assert difference(fused(batch).pooled, backbone(batch).pooled) < 1e-5
        exact = copy.deepcopy(backbone).double()
        assert difference(fuse(exact).model(batch.double()).pooled, exact(batch.double()).pooled) < 1e-9


def test_a_block_with_another_mixer_still_fuses():
    backbone = fill(unireplknet("nano")).eval()
    swapped = swap(backbone, "*.spatial", lambda channels: nn.AvgPool2d(3, 1, 1), images=(3, 32, 32)).model
    batch = images((2, 3, 32, 32))
    with torch.inference_mode():
        assert difference(fuse(swapped).model(batch).pooled, swapped(batch).pooled) < 1e-5


def authors_state(form: str) -> dict[str, torch.Tensor]:
    """Tensors under the authors' names and shapes, as their network lists them, filled by our names."""

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for entry in NUMBERS["keys"][form].split():
                name, _, sides = entry.partition(":")
                parent: nn.Module = self
                for part in name.split(".")[:-1]:
                    if part not in parent._modules:
                        parent.add_module(part, nn.Module())
                    parent = parent._modules[part]  # type: ignore[assignment]
                parent.register_buffer(name.rpartition(".")[2], torch.zeros([int(side) for side in sides.split("x")]))

    state = Theirs().state_dict()
    owner = nn.ParameterDict()
    backbone = unireplknet("n", **SMALL, deploy=form.endswith("deploy"))
    rules = released_names(backbone)
    for name, tensor in state.items():
        owner[name.replace(".", "/")] = nn.Parameter(tensor)
    fill_as(owner, [("/", "."), *rules])
    return {name.replace("/", "."): tensor.detach() for name, tensor in owner.items()}


@pytest.mark.parametrize("form", ["small", "small_deploy"])
def test_released_names_become_ours(form, tmp_path):
    options = {**SMALL, "deploy": form.endswith("deploy")}
    state = authors_state(form)
    assert len(state) > 70 and "head.weight" in state
    backbone = unireplknet("n", **options)
    backbone.load_state_dict(published(state, backbone))
    expected = fill(unireplknet("n", **options)).state_dict()
    for name, tensor in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, expected[name]), name
    torch.save({"model": state}, tmp_path / "theirs.pth")
    loaded = unireplknet("n", **options, weights=str(tmp_path / "theirs.pth"), allow_pickle=True, channels=1)
    assert loaded.downs[0][0].weight.shape[1] == 1
    torch.testing.assert_close(loaded.state_dict()["norm.weight"], expected["norm.weight"])
    other = unireplknet("n", **{**options, "deploy": not options["deploy"]})
    with pytest.raises(ParityError, match="left over in the checkpoint"):
        published(state, other)
    with pytest.raises(VertebraError, match="do not fit"):
        unireplknet("a", weights=str(tmp_path / "theirs.pth"), allow_pickle=True)


def test_norms_and_branches_are_in_their_order():
    """The norm follows the convolution between stages, and gates follow the block's norm."""
    backbone = fill(unireplknet("nano")).eval()
    down, block = backbone.downs[1], backbone.stages[1][0]
    assert isinstance(down[0], nn.Conv2d) and down[1].weight.shape == (32,)
    x = images((2, 32, 9, 7))
    with torch.inference_mode():
        y = block.squeeze(block.norm(block.spatial(x)))
        wide = nn.functional.gelu(block.widen(y.permute(0, 2, 3, 1)))
        size = wide.norm(dim=(1, 2), keepdim=True)
        wide = (block.response.gain * size / (size.mean(-1, keepdim=True) + 1e-6) + 1) * wide + block.response.bias
        narrow = block.narrow_norm(block.narrow(wide).permute(0, 3, 1, 2))
        torch.testing.assert_close(block(x), x + block.scale[:, None, None] * narrow, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_in_place_or_not():
    backbone = fill(unireplknet("nano")).eval()
    batch = images((2, 3, 32, 32))
    with torch.inference_mode():
        expected = backbone(batch).pooled
    torch.testing.assert_close(backbone(batch).pooled, expected, rtol=1e-4, atol=1e-5)


def test_errors_say_what_works():
    for options, words in (
        ({"kernels": (3, 13, 13)}, "different numbers of stages"),
        ({"kernels": (3, 12, 13, 13)}, "kernels has 12; sizes are odd"),
        ({"kernels": (3, 31, 13, 13)}, "no dilated branches for kernel 31, only for 7, 9, 11, 13, 15, 17"),
        ({"branches": "many"}, "branches is 'many'; it can be dilated, small or none"),
        ({"stem_stride": 3}, "stem_stride is 3; it can be 4, 2 or 1"),
        ({"dims": (2, 8, 8, 8)}, "dims is"),
        ({"depths": (0, 1, 1, 1)}, "depths is"),
    ):
        with pytest.raises(UsageError, match=words):
            unireplknet("nano", **options)
    assert unireplknet("nano", kernels=(3, 31, 13, 13), branches="small").levels[0].stride == 2
    assert set(VARIANTS) - {"nano"} == set(NUMBERS["variants"])


def test_effect_measures_every_arm(tmp_path, monkeypatch):
    setting = experiment.Setting((4, 8, 8, 8), (1, 1, 2, 1), 64, 20, 32, 1, 32, 40)
    monkeypatch.setitem(experiment.SETTINGS, "toy", setting)
    monkeypatch.setattr(experiment, "fresh", lambda arm, test: experiment.network(arm, setting).eval())
    for name, small in (("EPOCHS", 1), ("HELD", 40), ("NATIVE", 32)):
        monkeypatch.setattr(experiment, name, small)
    found = effect("toy", read("digits"))
    values = {arm: found.measure(arm, 0, tmp_path) for arm in found.arms}
    assert values["small"]["macs"] < values["mixed"]["macs"] == values["plain"]["macs"] < values["large"]["macs"]
    assert values["plain"]["params"] < values["parallel"]["params"] < values["mixed"]["params"]
    assert 0 < values["mixed"]["field"] <= 100 and 0 < values["convnext"]["field_start"] <= 100
    assert set(values["signals"]) == {"tones", "tones_linear", "forecast", "forecast_linear"}
    assert all(metric in found.metrics for arm in values.values() for metric in arm)


def test_effect_checks_what_the_row_asks():
    found = effect("toy", read("digits"))

    def checks(plain: float, large: float, start: float, tones: float) -> list[bool]:
        values = {arm: {"top1": np.array([50.0, 51.0])} for arm in found.arms}
        values["plain"]["top1"], values["large"]["top1"] = np.array([plain] * 2), np.array([large] * 2)
        for arm, macs, field in (("mixed", 5.0, 30.0), ("convnext", 5.0, 15.0), ("large", 6.0, 50.0)):
            values[arm] |= {"macs": np.array([macs]), "field": np.array([field]), "field_start": np.array([field])}
        values["mixed"]["field_start"] = np.array([start])
        signals = {"tones": tones, "tones_linear": 40.0, "forecast": 0.5, "forecast_linear": 0.6}
        values["signals"] |= {name: np.array([value]) for name, value in signals.items()}
        return [check.holds for check in found.checks(Measured(values))]

    assert checks(50.0, 51.0, 30.0, 60.0) == [True] * 6
    assert checks(50.6, 51.1, 20.0, 49.0) == [False, False, False, True, False, True]
