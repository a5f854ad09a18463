"""RMT: parity with the authors' networks, their names and counts, what blocks share, and the effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vertebra.backbones import rmt as page
from vertebra.backbones.rmt import VARIANTS, effect, published, rmt
from vertebra.blocks.manhattan_attention import ManhattanAttention
from vertebra.blocks.rows import Local
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "rmt.json"
TINY = {
    "dims": (16, 32, 48, 64),
    "depths": (1, 2, 2, 1),
    "heads": (1, 2, 3, 4),
    "ratios": (4, 3, 3, 2),
    "width": 96,
    "scaled": 2,
}
CASES = {"t": {}, "tiny": TINY, "tiny training": TINY, "decomposed": {**TINY, "whole": 0}}


def filled(**options) -> page.RMT:
    """With smaller weights of the convolutions whose branch grows with the map: attention must not drown in it."""
    backbone = fill(rmt("t", **options))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".position." in name:
                parameter.mul_(0.1)
    return backbone  # type: ignore[return-value]


def outputs(backbone: page.RMT, shape: tuple[int, ...], training: bool) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return named(backbone.train(training)(images(shape)))


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_authors_networks(name):
    reference = stored(GOLDEN, name)
    found = outputs(filled(**CASES[name]), reference.shape, "training" in name)
    assert set(found) == {"pyramid.0", "pyramid.1", "pyramid.2", "pyramid.3", "pooled"}
    assert max(check_golden(found, reference.golden, 2e-5).values()) < 2e-5


@pytest.mark.parametrize("options", [{"reach": 4.2}, {"spreads": (4, 4, 4, 6)}, {"whole": 1}, {"local": 0}])
def test_other_attention_is_no_parity(options):
    reference = stored(GOLDEN, "tiny")
    with pytest.raises(ParityError):
        check_golden(outputs(filled(**{**TINY, **options}), reference.shape, False), reference.golden)


@pytest.mark.parametrize(
    ("variant", "params", "gmacs"),
    [("t", 14_334_216, 2.5), ("s", 26_967_240, 4.5), ("b", 54_154_896, 9.7), ("l", 95_464_864, 18.2)],
)
def test_parameters_are_exact_and_macs_near_the_table(variant, params, gmacs):
    with torch.device("meta"):
        backbone: Any = rmt(variant)
    cost = count(backbone)
    assert cost.params + 1000 * 1025 == params
    assert (cost.macs + 1_024_000) / 1e9 == pytest.approx(gmacs, rel=0.08)  # theirs leave out some of the products
    forms = [stage.blocks[0].mixer.kind.form for stage in backbone.stages]
    assert forms == ["decomposed", "decomposed", "whole" if variant == "t" else "decomposed", "whole"]
    gains = [stage.blocks[0].scale1 is not None for stage in backbone.stages]
    assert gains == [False, False, variant in "bl", variant in "bl"]


def test_gains_start_small():
    backbone: Any = rmt("nano", scaled=1)
    assert backbone.stages[3].blocks[0].scale2.tolist() == pytest.approx([1e-6] * 128)
    assert backbone.stages[2].blocks[0].scale2 is None


def theirs() -> dict[str, torch.Tensor]:
    """A state dict with the authors' names and shapes."""
    listed = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["t"].split()
    shapes = dict(entry.rsplit(":", 1) for entry in listed)
    torch.manual_seed(0)
    return {name: torch.randn([int(side) for side in shape.split("x") if side]) for name, shape in shapes.items()}


def test_released_names_become_ours():
    state, backbone = theirs(), rmt("t")
    parameters = [tensor for name, tensor in state.items() if "Relpos" not in name and "running" not in name]
    assert sum(tensor.numel() for tensor in parameters if tensor.ndim) == 14_334_216
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found)
    block = "layers.2.blocks.5"
    both = torch.cat((state[f"{block}.retention.q_proj.weight"], state[f"{block}.retention.k_proj.weight"]))
    assert torch.equal(found["stages.2.blocks.5.mixer.qk.weight"], both)
    assert torch.equal(found["stages.2.blocks.5.mixer.local.bias"], state[f"{block}.retention.lepe.conv.bias"])
    assert torch.equal(found["stages.2.blocks.5.norm2.weight"], state[f"{block}.final_layer_norm.weight"])
    assert torch.equal(found["stages.3.down.conv.weight"], state["layers.2.downsample.reduction.weight"])
    assert torch.equal(found["head.0.weight"][..., 0, 0], state["proj.weight"])
    assert torch.equal(found["head.1.running_var"], state["norm.running_var"])
    del state["layers.0.blocks.1.retention.k_proj.weight"]
    with pytest.raises(ParityError, match=r"missing from it: stages\.0\.blocks\.1\.mixer\.qk\.weight"):
        published(state, backbone)


def test_released_gains_become_ours():
    backbone = rmt("nano", scaled=1)
    ours = backbone.state_dict()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in ours.items():
        if ".qk." in name:
            for part, half in zip("qk", tensor.chunk(2), strict=True):
                state[name.replace(".qk.", f".{part}_proj.")] = half
        else:
            gain = ".scale" in name
            name = name.replace(".scale", ".gamma_").replace("head.0.", "proj.").replace("head.1.", "norm.")
            state[name] = tensor.view(1, 1, 1, -1) if gain else tensor
    assert all(torch.equal(tensor, ours[name]) for name, tensor in published(state, backbone).items())


def test_blocks_of_a_stage_share_what_its_size_decides(monkeypatch):
    made = []
    prior = ManhattanAttention.prior
    monkeypatch.setattr(ManhattanAttention, "prior", lambda self, like: made.append(self) or prior(self, like))
    backbone: Any = fill(rmt("nano", depths=(2, 2, 2, 2), spreads=(6, 6, 6, 6))).eval()
    with torch.inference_mode():
        expected = backbone(images((2, 3, 33, 47)))
    assert made == [stage.blocks[0].mixer for stage in backbone.stages]
    with torch.inference_mode():  # one by one, each block makes its own
        x = backbone.stem(images((2, 3, 33, 47))).permute(0, 2, 3, 1)
        for stage in backbone.stages:
            x = stage.down(x)
            for block in stage.blocks:
                x = block(x)
    assert difference(x.permute(0, 3, 1, 2), expected.pyramid[-1]) < 1e-5


def test_another_mixer_can_take_the_place_of_attention():
    backbone: Any = fill(rmt("nano")).eval()
    before = backbone(images((2, 3, 32, 32))).pooled
    backbone.stages[2].blocks[0].mixer = torch.nn.Identity()
    after = backbone(images((2, 3, 32, 32))).pooled
    assert after.isfinite().all() and not torch.allclose(before, after)


def test_sizes_do_not_leak_from_one_forward_pass_to_the_next():
    backbone = fill(rmt("nano"))
    with torch.inference_mode():
        backbone.eval()(images((1, 3, 64, 64)))
    backbone.train()(images((4, 3, 64, 64))).pooled.sum().backward()  # no tensor of inference mode is saved
    with torch.inference_mode():
        first = backbone.eval()(images((1, 3, 64, 64))).pooled
        backbone(images((1, 3, 32, 96)))
        assert torch.equal(backbone(images((1, 3, 64, 64))).pooled, first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dims": (32, 64)}, "dims is .* it needs four numbers"),
        ({"depths": (1, 0, 1, 1)}, "depths is"),
        ({"heads": (3, 4, 6, 8)}, "heads is 3 with 32 channels"),
        ({"ratios": (0, 1, 1, 1)}, "ratios is"),
        ({"whole": 5}, "whole is 5"),
        ({"scaled": -1}, "scaled is -1"),
        ({"halvings": 3}, "halvings is 3"),
        ({"positions": "learnt"}, "positions is 'learnt'; it can be conditional or none"),
        ({"reach": 0.5}, "reach is 0.5"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        rmt("nano", **options)


def test_no_such_variant():
    with pytest.raises(UsageError, match="rmt has no variant 'm'"):
        rmt("m")


@pytest.fixture
def small(monkeypatch):
    options = {**VARIANTS["nano"], "depths": (1, 1, 1, 1), "width": 32}
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(options, 16, 24, 24, 1))
    return effect("toy", read("digits"))


def test_effect_measures_scores_and_costs(small, tmp_path):
    assert list(small.arms) == [small.baseline, "whole", "decomposed", "plain", "decay_alone"]
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("whole", "decomposed", "plain")}
    assert all(set(row) == set(small.metrics) for row in found.values())
    counted = [arm for arm, row in found.items() if row["growth"] == row["growth"]]
    assert counted == ["whole", "decomposed"]
    assert found["whole"]["attention_growth"] == pytest.approx(2) and found["whole"]["growth"] > 1.5
    assert found["decomposed"]["attention_growth"] == pytest.approx(1.5) and found["decomposed"]["growth"] < 1.1
    sides, dims = (8, 4, 2, 1), (32, 64, 96, 128)
    whole = sum(2 * side**4 * dim for side, dim in zip(sides, dims, strict=True)) / 1e6
    lines = sum(4 * side**3 * dim for side, dim in zip(sides[:3], dims, strict=False)) / 1e6 + 2 * dims[-1] / 1e6
    assert found["whole"]["attention"] == pytest.approx(whole)
    assert found["decomposed"]["attention"] == pytest.approx(lines)
    assert found["plain"]["macs"] == pytest.approx(found["whole"]["macs"], rel=0.01)
    assert page._counted(rmt("nano").to("meta"), 32)[0] == count(rmt("nano")).macs
    assert small.measure("plain", 0, tmp_path)["nll"] == found["plain"]["nll"]


def test_arms_differ_in_what_they_say():
    setting = page._Setting(VARIANTS["nano"], 32, 1, 1, 1)
    seen: dict[str, tuple] = {}
    for arm in page._ARMS:
        with torch.device("meta"):
            stages: Any = page._armed(arm, setting).stages
        block = stages[0].blocks[0]
        kind, convolutions = block.mixer.kind, (block.mixer.local is not None, isinstance(block.position, Local))
        seen[arm] = (kind.form, kind.reach, *convolutions)
    assert seen == {
        "no_decay": ("whole", float("inf"), True, True),
        "whole": ("whole", 4.0, True, True),
        "decomposed": ("decomposed", 4.0, True, True),
        "plain": ("whole", float("inf"), False, False),
        "decay_alone": ("whole", 4.0, False, False),
    }


def test_effect_checks_what_the_row_asks(small):
    def measured(**top1: float) -> list[bool]:
        rows = {arm: (top1[arm], 25.0, 5.0, 1.6, 2.0) for arm in small.arms}
        rows["decomposed"] = (top1["decomposed"], 20.0, 1.0, 1.03, 1.5)
        if top1["decomposed"] < 50:
            rows["decomposed"], rows["plain"] = (top1["decomposed"], 24.0, 3.0, 1.2, 1.5), (top1["plain"], 20, 5, 1, 2)
        names = ("top1", "macs", "attention", "growth", "attention_growth")
        values = {
            arm: {name: np.array([one, one]) for name, one in zip(names, row, strict=True)} for arm, row in rows.items()
        }
        return [check.holds for check in small.checks(Measured(values))]

    good = {"no_decay": 60.0, "whole": 62.0, "decomposed": 61.5, "plain": 55.0, "decay_alone": 58.0}
    assert measured(**good) == [True] * 5
    assert measured(no_decay=60, whole=59, decomposed=40, plain=55, decay_alone=54) == [False] * 5
