"""SMT: parity with the authors' networks, their names, counts and start, what stacks where, its effect."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones import smt as page
from vertebra.backbones.smt import Attention, effect, published, smt
from vertebra.blocks.scale_aware_modulation import ScaleAwareModulation
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.surgery.fuse import fuse
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "smt.json"
TINY: Any = {"dims": (16, 32, 64, 128), "depths": (2, 1, 3, 1), "heads": (1, 1, 8, 16)}
CASES: dict[str, tuple[str, Any]] = {
    "t": ("t", {}),
    "l of five blocks": ("l", {"depths": (1, 1, 2, 1)}),
    "tiny odd": ("t", TINY),
    "tiny training": ("t", TINY),
}


def outputs(case: str, **options) -> dict[str, Tensor]:
    variant, chosen = CASES[case]
    backbone = fill(smt(variant, **{**chosen, **options})).train("training" in case)
    with torch.no_grad():
        return named(backbone(images(stored(GOLDEN, case).shape)))


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_authors_networks_do(case):
    """At an odd size too: the authors leave out the same cells at the border."""
    found = outputs(case)
    assert set(found) == {"pyramid.0", "pyramid.1", "pyramid.2", "pyramid.3", "pooled", "tokens"}
    assert max(check_golden(found, stored(GOLDEN, case).golden, 2e-5).values()) < 2e-5


@pytest.mark.parametrize("options", [{"heads": (1, 1, 8, 8)}, {"layer_scale": 1.0}])
def test_other_networks_are_no_parity(options):
    with pytest.raises(ParityError, match=r"pyramid\.[03]"):
        check_golden(outputs("tiny odd", **options), stored(GOLDEN, "tiny odd").golden)


@pytest.mark.parametrize(
    ("variant", "params", "printed"),
    [("t", 11_506_536, 2.4), ("s", 22_550_952, 4.7), ("b", 32_037_352, 7.7), ("l", 80_589_544, 17.6)],
)
def test_parameters_are_exact_and_macs_the_printed_ones(variant, params, printed):
    """MACs without the attention's two products, which the authors' counter does not see."""
    with torch.device("meta"):
        backbone: Any = smt(
            variant, layer_scale=None
        )  # the authors' function has none, their configuration asks for it
    cost, classifier = count(backbone), 1000 * backbone.width
    assert cost.params + classifier + 1000 == params
    sides, dims = (14, 7), [level.channels for level in backbone.levels[2:]]
    attends = [sum(isinstance(block.mixer, Attention) for block in stage.blocks) for stage in backbone.stages[2:]]
    products = sum(2 * side**4 * dim * n for side, dim, n in zip(sides, dims, attends, strict=True))
    assert (cost.macs + classifier - products) / 1e9 == pytest.approx(printed, rel=0.01)


def test_the_large_network_has_layer_scales():
    with torch.device("meta"):
        backbone = smt("l")
    scales = 2 * (4 * 96 + 6 * 192 + 28 * 384 + 4 * 768)
    assert sum(tensor.numel() for tensor in backbone.parameters()) + 769_000 == 80_589_544 + scales


def test_what_stacks_where():
    with torch.device("meta"):
        backbone: Any = smt("t")
    kinds = [[type(block.mixer) for block in stage.blocks] for stage in backbone.stages]
    assert kinds[:2] == [[ScaleAwareModulation] * 2] * 2 and kinds[3] == [Attention]
    assert kinds[2] == [ScaleAwareModulation, Attention] * 4
    assert [stage.blocks[1].mixer.heads for stage in backbone.stages[2:3]] == [8] and backbone.levels[3].stride == 32
    eps = [(stage.embed.norm.eps, stage.blocks[0].norm1.eps, stage.norm.eps) for stage in backbone.stages]
    assert eps == [(1e-5, 1e-6, 1e-6)] * 4
    other: Any = smt("nano", mixers=("attention", "modulation", "modulation", "attention"), kernels=(3, 3))
    assert isinstance(other.stages[0].blocks[0].mixer, Attention)
    assert [len(block.mixer.convs) for block in other.stages[2].blocks] == [2, 2]


@pytest.mark.parametrize("size", [(64, 96), (32, 160)])
def test_strides_are_those_of_a_pyramid(size):
    backbone = smt("t", **TINY).eval()
    with torch.inference_mode():
        features = backbone(images((1, 3, *size)))
    shapes = [tuple(x.shape[2:]) for x in features.pyramid]
    assert shapes == [(size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
    assert features.tokens is not None and torch.equal(features.tokens.mean(1), features.pooled)
    assert torch.equal(features.tokens, features.pyramid[-1].flatten(2).mT)


def test_the_smallest_images():
    for halvings, least in ((2, 3), (1, 2)):
        backbone = smt("nano", halvings=halvings).eval()
        with torch.inference_mode():
            assert backbone(images((1, 3, least, least))).pooled.isfinite().all()
        with pytest.raises(UsageError, match=f"at least {least}x{least} pixels"):
            backbone(images((1, 3, least - 1, 32)))


def released() -> dict[str, Tensor]:
    """The authors' names and shapes of SMT-T, with a number of its own in each tensor."""
    listed = [line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["t"].split()]
    for number in range(2, 8):  # in the third stage two kinds of blocks take turns
        start = f"block3.{number % 2}."
        listed += [[name.replace(start, f"block3.{number}."), s] for name, s in listed if name.startswith(start)]
    shapes = {name: [int(side) for side in sides.split("x") if side] for name, sides in listed}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_released_names_become_ours():
    state = released()
    with torch.device("meta"):
        backbone, small = smt("t"), smt("s")
    assert sum(tensor.numel() for name, tensor in state.items() if not re.search("running|num_", name)) == 11_506_536
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found, assign=True)
    for theirs, ours in {
        "patch_embed1.conv.1.running_var": "stages.0.embed.conv.1.running_var",
        "patch_embed1.conv.3.bias": "stages.0.embed.conv.3.bias",
        "patch_embed3.proj.weight": "stages.2.embed.conv.weight",
        "patch_embed4.norm.bias": "stages.3.embed.norm.bias",
        "block1.1.attn.local_conv_4.weight": "stages.0.blocks.1.mixer.convs.3.weight",
        "block2.0.attn.proj0.weight": "stages.1.blocks.0.mixer.mix.weight",
        "block2.0.attn.bn.running_mean": "stages.1.blocks.0.mixer.norm.running_mean",
        "block3.6.attn.proj.bias": "stages.2.blocks.6.mixer.proj.bias",
        "block3.7.attn.local_conv.weight": "stages.2.blocks.7.mixer.local.weight",
        "block3.2.mlp.dwconv.dwconv.bias": "stages.2.blocks.2.mlp.local.bias",
        "block4.0.mlp.fc2.weight": "stages.3.blocks.0.mlp.narrow.weight",
        "norm2.weight": "stages.1.norm.weight",
    }.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    both = torch.cat((state["block3.1.attn.q.weight"], state["block3.1.attn.kv.weight"]))
    assert torch.equal(found["stages.2.blocks.1.mixer.qkv.weight"], both)
    assert torch.equal(found["stages.1.blocks.1.mixer.narrow.weight"], state["block2.1.attn.proj1.weight"][..., 0, 0])
    with pytest.raises(ParityError, match=r"missing from it: stages\.0\.blocks\.2"):
        published(state, small)


def test_released_layer_scales_become_ours():
    backbone = smt("nano", layer_scale=1e-4)
    ours = backbone.state_dict()
    assert ours["stages.2.blocks.1.scale2"].tolist() == pytest.approx([1e-4] * 96)
    state = {re.sub(r"\.scale([12])$", r".gamma_\1", name): tensor for name, tensor in ours.items()}
    assert any(name.endswith("gamma_1") for name in state)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in published(state, backbone).items())


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    backbone: Any = smt("t", drop_path=0.12)
    attends, stage = backbone.stages[2].blocks[1], backbone.stages[2]
    for tensor, std in [
        (attends.mixer.qkv.weight, 0.02),
        (attends.mlp.widen.weight, 0.02),
        (attends.mlp.local.weight, (2 / 9) ** 0.5),
        (attends.mixer.local.weight, (2 / 9) ** 0.5),
        (stage.blocks[0].mixer.narrow.weight, (2 / 256) ** 0.5),
        (stage.embed.conv.weight, (2 / (9 * 256)) ** 0.5),
    ]:
        assert float(tensor.detach().std()) == pytest.approx(std, rel=0.05)
    assert not stage.embed.conv.bias.any() and not attends.mlp.narrow.bias.any()
    rates = [getattr(block.drop, "drop_prob", 0.0) for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx(list(np.linspace(0, 0.12, 13)))


def test_a_fused_network_keeps_its_outputs():
    backbone = fill(smt("nano", layer_scale=0.5)).eval()
    fused = fuse(backbone).model
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    x = images((2, 3, 49, 64)).double()
    with torch.inference_mode():
        expected, result = named(copy.deepcopy(backbone).double()(x)), named(fuse(backbone.double()).model(x))
    assert max(difference(result[name], expected[name]) for name in expected) < 1e-12


def test_wrong_options_are_refused():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dims": (32, 64)}, r"dims is \(32, 64\); it needs four"),
        ({"depths": (1, 0, 1, 1)}, r"depths is .* at least 1"),
        ({"ratios": (4, 4, 4, 0)}, "ratios is .* above 0"),
        ({"mixers": ("modulation",) * 3}, "mixers is .* it needs four"),
        ({"mixers": ("modulation", "both", "alternate", "attention")}, "mixers has 'both'; each can be modulation"),
        ({"heads": (1, 1, 5, 1)}, "5 heads do not divide dim 96"),
        ({"kernels": (3, 5, 7)}, "3 kernels do not divide 32 channels"),
        ({"kernel": 4}, "kernel is 4"),
        ({"halvings": 0}, "halvings is 0"),
    )
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            smt("nano", **options)
    with pytest.raises(UsageError, match="smt has no variant 'm'"):
        smt("m")


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_have_equal_parameters_and_differ_in_what_they_say(scale):
    setting, made = page._SETTINGS[scale], effect(scale, read("digits"))
    assert ("swin" in made.arms) == (scale == "gpu")
    with torch.device("meta"):
        arms: Any = {arm: page._armed(arm, setting) for arm in made.arms}
    sizes = {arm: sum(p.numel() for p in backbone.parameters()) for arm, backbone in arms.items()}
    assert all(size / sizes["full"] == pytest.approx(1, abs=0.03) for size in sizes.values()), sizes
    third = {arm: [type(block.mixer).__name__ for block in arms[arm].stages[2].blocks] for arm in page._ARMS}
    assert third["full"] == third["one_scale"] and set(third["full"]) == {"ScaleAwareModulation", "Attention"}
    assert set(third["modulated"]) == {"ScaleAwareModulation"} and set(third["attended"]) == {"Attention"}
    sides = {arm: [conv.kernel_size[0] for conv in arms[arm].stages[0].blocks[0].mixer.convs] for arm in page._ARMS}
    assert sides["one_scale"] == [3, 3, 3, 3] and sides["full"] == sides["attended"] == [3, 5, 7, 9]


def test_effect_measures_its_arms(tmp_path, monkeypatch):
    options = {"dims": (8, 8, 8, 8), "depths": (1, 1, 2, 1), "heads": (1, 1, 1, 1), "halvings": 1}
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(options, 16, 64, 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert all(set(row) == set(small.metrics) for row in found.values()) and small.baseline == "full"
    assert len({row["nll"] for row in found.values()}) == 4
    assert small.measure("attended", 0, tmp_path)["nll"] == found["attended"]["nll"]


def test_effect_checks_what_the_row_asks():
    def held(scale: Any, params: float, **top1: float) -> list[bool]:
        made = effect(scale, read("digits"))
        assert set(made.arms) == set(top1)
        sizes = {arm: params if arm == "modulated" else 1.0 for arm in top1}
        values = {
            arm: {"top1": np.array([one, one + 1]), "params": np.array([sizes[arm]] * 2)} for arm, one in top1.items()
        }
        return [check.holds for check in made.checks(Measured(values))]

    assert held("toy", 1.02, full=60, modulated=60.2, attended=59, one_scale=60.3) == [True] * 5
    assert held("toy", 1.04, full=60, modulated=60.4, attended=60.5, one_scale=61) == [False] * 5
    assert held("gpu", 1.0, full=60, modulated=60, attended=59, one_scale=59, swin=59) == [True] * 6
    assert not held("gpu", 1.0, full=60, modulated=60, attended=59, one_scale=59, swin=59.5)[-1]
