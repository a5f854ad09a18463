"""VCMamba: parameters and MACs, golden outputs of the authors' network, its names and start, sizes, its effect."""

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones import vcmamba as page
from vertebra.backbones.vcmamba import ConvBlock, MambaBlock, Positions, effect, published, resized, vcmamba
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.surgery.fuse import fuse
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "vcmamba.json"
TINY = {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 3), "mamba": 2, "halvings": 2}


@pytest.mark.parametrize(
    ("variant", "params", "macs"),
    [("s", 10_478_720, 1_041_414_400), ("m", 21_072_176, 2_272_463_872), ("b", 31_450_832, 3_947_868_160)],
)
def test_parameters_and_macs_are_exactly_the_authors(variant, params, macs):
    """With both of their classifiers; their MACs are without the scans, since a plain loop counts nothing."""
    with torch.device("meta"):
        backbone = vcmamba(variant)
    cost, classifiers = count(backbone), 2 * 1000 * backbone.width
    scans = 4 * 4 * 3 * 49 * 2 * backbone.width * 16  # blocks, directions, products, cells, channels, states
    assert cost.params + classifiers + 2 * 1000 == params
    assert cost.macs - scans + classifiers == macs


def network(case: str) -> page.VCMamba:
    sizes = {"tiny at 96x160": (96, 160), "tiny training": (96, 160), "tiny at 211x197": 224}
    return vcmamba("s") if case == "s" else vcmamba("nano", **TINY, image_size=sizes[case])


def found(backbone: page.VCMamba, case: str) -> dict[str, Tensor]:
    """Outputs of a filled network; layer scales are a tenth in the full one, as signals grow beyond 32 bit without."""
    fill(backbone).train("training" in case)
    with torch.inference_mode():
        for block in backbone.modules():
            if isinstance(block, ConvBlock) and case == "s":
                block.scale.mul_(0.1)
        return named(backbone(images(stored(GOLDEN, case).shape)))


@pytest.mark.parametrize("case", ["s", "tiny at 96x160", "tiny at 211x197", "tiny training"])
def test_computes_what_the_authors_network_does(case):
    outputs = found(network(case), case)
    assert max(check_golden(outputs, stored(GOLDEN, case).golden).values()) < 1e-4


def test_parity_sees_what_is_corrected_and_the_positions():
    case = "tiny at 96x160"
    reference, backbone = stored(GOLDEN, case), network(case)
    with pytest.raises(ParityError, match=r"pyramid\.3"):
        check_golden(found(vcmamba("nano", **TINY, image_size=(96, 160), scan="corrected"), case), reference.golden)
    backbone.stages[-1][2] = nn.Identity()
    with pytest.raises(ParityError, match=r"pyramid\.3"):
        check_golden(found(backbone, case), reference.golden)


@cache
def released() -> dict[str, Tensor]:
    """Tensors with the names and shapes of the authors' network S, each of a number of its own."""
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
    listed = (line.split(":") for line in keys["shapes"].split())
    shapes = {name: [int(side) for side in sides.split("x") if side] for name, sides in listed}
    for first, others in keys["like"].items():
        for name in [name for name in shapes if name.startswith(f"{first}.")]:
            start, _, end = first.rpartition(".")
            assert end.isdigit()
            shapes |= {f"{start}.{number}{name.removeprefix(first)}": shapes[name] for number in others}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_released_names_become_ours():
    with torch.device("meta"):
        backbone, small = vcmamba("s"), vcmamba("nano")
    converted = published(released(), backbone)
    backbone.load_state_dict(converted, assign=True)
    for theirs, ours in {
        "patch_embed.3.weight": "stem.2.conv.weight",
        "patch_embed.1.running_mean": "stem.0.norm.running_mean",
        "network.0.3.layer_scale_2": "stages.0.3.scale",
        "network.3.proj.bias": "stages.2.0.conv.bias",
        "network.4.11.mlp.mid_norm.weight": "stages.2.12.mlp.local.norm.weight",
        "network.6.3.mlp.fc2.weight": "stages.3.4.mlp.narrow.conv.weight",
        "network.6.4.norm2.weight": "stages.3.6.mlp_norm.weight",
        "network.6.7.mlp.norm2.weight": "stages.3.9.mlp.narrow.norm.weight",
        "network.6.5.mamba.direction_Bs": "stages.3.7.mixer.scan.moves",
        "network.6.5.mamba.norm.bias": "stages.3.7.mixer.norm.bias",
        "network.6.5.mamba.out_conv.2.weight": "stages.3.7.mixer.outputs.norm.weight",
        "pos_embed": "stages.3.5.table",
        "norm.weight": "norm.weight",
    }.items():
        assert torch.equal(converted[ours], released()[theirs]), theirs
    with pytest.raises(ParityError, match="left over"):
        published(released(), small)


def test_released_positions_fit_another_size():
    with torch.device("meta"):
        backbone = vcmamba("s", image_size=(256, 320))
    table = torch.arange(7.0).expand(1, 288, 7, 7)
    resized_table = published({**released(), "pos_embed": table}, backbone)["stages.3.5.table"]
    assert resized_table.shape == (1, 288, 8, 10)
    line = resized_table[0, 0, 0]
    assert (line.diff() > 0).all() and line.mean().item() == pytest.approx(3, abs=0.02)


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    backbone = vcmamba("nano", dims=(32, 64, 96, 128), halvings=2)
    deviations = {
        "stem.2.conv.weight": 144**-0.5,  # LeCun's
        "stages.3.1.mlp.widen.conv.weight": 0.02,
        "stages.3.4.mlp.narrow.conv.weight": 0.02,
        "stages.3.4.mixer.scan.select.weight": 0.02,
        "stages.3.4.mixer.scan.step.weight": 0.02,
        "stages.1.0.conv.weight": (3 * 288) ** -0.5,  # torch's own
        "stages.3.4.mixer.inputs.conv.weight": (3 * 128) ** -0.5,
    }
    for name, expected in deviations.items():
        assert backbone.get_parameter(name).std().item() == pytest.approx(expected, rel=0.06), name
    assert backbone.get_parameter("stages.3.3.table").std().item() == pytest.approx(0.02, rel=0.15)  # of 512 numbers
    zero = ("stem.0.conv.bias", "stages.0.0.mlp.widen.conv.bias", "stages.3.4.mixer.scan.step.bias")
    assert not any(backbone.get_parameter(name).any() for name in zero)
    assert backbone.get_parameter("stages.0.0.scale").eq(1e-5).all()
    assert vcmamba("nano", start="mamba").get_parameter("stages.3.4.mixer.scan.step.bias").max() < -2


def test_where_the_mamba_blocks_are():
    kinds = [[type(block) for block in stage] for stage in vcmamba("nano", **TINY).stages]
    assert kinds[2] == [nn.Sequential, ConvBlock, ConvBlock]
    assert kinds[3] == [nn.Sequential, ConvBlock, Positions, MambaBlock, MambaBlock]
    plain = vcmamba("nano", mamba=0)
    assert not [module for module in plain.modules() if isinstance(module, Positions | MambaBlock)]
    assert vcmamba("nano", depths=(1, 1, 1, 2)).stages[-1][1].table.shape == (1, 64, 2, 2)


def test_positions_are_added_cell_by_cell_and_stretched():
    positions, x = Positions(4, (3, 5)), images((2, 4, 3, 5))
    assert torch.equal(positions(x), x + positions.table)
    assert torch.equal(positions(torch.zeros(1, 4, 6, 7)), resized(positions.table, (6, 7)))
    flat = resized(torch.full((1, 2, 3, 5), 0.25), (7, 4))
    torch.testing.assert_close(flat, torch.full((1, 2, 7, 4), 0.25))
    assert positions.bfloat16()(torch.zeros(1, 4, 6, 7).bfloat16()).dtype == torch.bfloat16


def test_tokens_are_the_last_maps_cells_and_pooled_their_mean():
    backbone = fill(vcmamba("nano")).eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, 48, 80)))
        assert features.pyramid[-1].shape == (2, 64, 3, 5) and features.tokens is not None
        torch.testing.assert_close(features.tokens, backbone.norm(features.pyramid[-1].flatten(2).mT))
        torch.testing.assert_close(features.pooled, features.tokens.mean(1))
        assert backbone(images((1, 3, 1, 1))).pooled.isfinite().all()


def test_halvings_of_the_stem():
    for halvings in (0, 1, 2):
        backbone = vcmamba("nano", halvings=halvings).eval()
        with torch.inference_mode():
            maps = backbone(images((1, 3, 64, 64))).pyramid
        assert [level.stride for level in backbone.levels] == [2**halvings * 2**stage for stage in range(4)]
        assert [tuple(x.shape[2:]) for x in maps] == [(64 // level.stride,) * 2 for level in backbone.levels]


def test_a_fused_network_keeps_its_outputs():
    backbone = fill(vcmamba("nano")).eval()
    fused = fuse(backbone).model
    left = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == [f"stages.3.{place}.{norm}" for place in (4, 5) for norm in ("norm", "mlp_norm")]  # before the layer
    x = images((2, 3, 49, 64)).double()
    with torch.inference_mode():
        expected, result = named(copy.deepcopy(backbone).double()(x)), named(fuse(backbone.double()).model(x))
    assert max(difference(result[name], expected[name]) for name in expected) < 1e-11


def test_drop_path_rises_and_drops_branches():
    backbone = vcmamba("nano", drop_path=0.35)
    blocks = [module for module in backbone.modules() if isinstance(module, ConvBlock | MambaBlock)]
    assert [getattr(block.drop, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.05 * n for n in range(8)])
    x = images((4, 3, 32, 32))
    torch.manual_seed(0)
    assert not torch.equal(fill(backbone).train()(x).pooled, backbone(x).pooled)
    assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_wrong_options_are_refused():
    for options, words in (
        ({"dims": (16, 32, 48)}, "each needs four numbers"),
        ({"dims": (15, 32, 48, 64)}, "the first must be even"),
        ({"dims": (16, 0, 48, 64)}, "it must be at least 1"),
        ({"depths": (1, -1, 1, 4)}, "it must be at least 0"),
        ({"mamba": 5}, "mamba is 5; the last stage has 4 blocks"),
        ({"halvings": 3}, "halvings is 3"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"state": 0}, "state is 0"),
        ({"scan": "corect"}, "no variant 'corect'"),
        ({"start": "zero"}, "start is 'zero'"),
        ({"layer_scale": -1.0}, "layer_scale is -1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            vcmamba("nano", **options)


def test_arms_have_equal_parameters_and_differ_in_what_they_say():
    for setting in page._SETTINGS.values():
        with torch.device("meta"):
            arms = {arm: page._armed(arm, setting) for arm in page._ARMS}
        sizes = {arm: sum(p.numel() for p in backbone.parameters()) for arm, backbone in arms.items()}
        assert sizes["mamba"] == sizes["corrected"]
        assert sizes["conv"] == pytest.approx(sizes["mamba"], rel=0.005)
        kinds = {arm: [type(block).__name__ for block in backbone.stages[-1]] for arm, backbone in arms.items()}
        assert kinds["mamba"] == kinds["corrected"] and kinds["mamba"].count("MambaBlock") == 4
        assert set(kinds["conv"]) == {"Sequential", "ConvBlock"}
        assert len(kinds["conv"]) > len(kinds["mamba"])
    assert [arms[arm].stages[-1][-1].mixer.scan.corrected for arm in ("mamba", "corrected")] == [False, True]


def test_effect_measures_its_arms(tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting((8, 8, 8, 16), (1, 0, 0, 4), 1, 16, 64, 1))
    monkeypatch.setattr(page, "_SIDES", (2, 4))
    monkeypatch.setattr(page, "_HELD", 64)
    small = effect("toy", read("digits"))
    measured = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert all(set(values) == set(small.metrics) for values in measured.values()) and small.baseline == "conv"
    assert np.isfinite(measured["mamba"]["growth"]) and np.isnan(measured["conv"]["growth"])
    assert measured["mamba"]["params"] == measured["corrected"]["params"]


def test_effect_checks_what_the_row_asks():
    made = effect("toy", read("digits"))

    def held(mamba: tuple[float, ...], growth: float) -> list[bool]:
        values = {arm: {"top1": np.array([60.0, 61.0, 60.5])} for arm in made.arms}
        values["mamba"] = {
            "top1": np.array(mamba), "growth": np.full(3, growth), "attention_growth": np.full(3, 1.8),
        }  # fmt: skip
        checks = made.checks(Measured(values))
        assert "significant" in checks[0].found
        return [check.holds for check in checks]

    assert held((61.0, 62.1, 61.4), 1.0) == [True, True]
    assert held((60.0, 60.9, 60.4), 1.3) == [False, False]
