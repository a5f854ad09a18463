"""CrossFormer: parity with the authors' networks and their gradients, their names and counts, and the effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones import crossformer as page
from vertebra.backbones.crossformer import Cooling, crossformer, effect, published
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "crossformer.json"
PADDED: dict[str, Any] = {
    "dims": (64, 128, 256),
    "depths": (2, 2, 2),
    "heads": (2, 4, 8),
    "sides": (7, 7, 7),
    "intervals": (8, 4, 2),
}
COOLED: dict[str, Any] = {
    "dims": (64, 128),
    "depths": (2, 4),
    "heads": (2, 4),
    "sides": (4, 4),
    "intervals": (4, 2),
    "cooling": 3,
}


def test_parity_with_the_authors_classifier():
    reference = stored(GOLDEN, "t")
    with torch.inference_mode():
        found = named(fill(crossformer("t")).eval()(images(reference.shape)))
    assert len(found) == 6
    assert max(check_golden(found, reference.golden, 1e-5).values()) < 1e-5


def with_gradients(backbone: Any, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Maps, and gradients of every parameter for a fixed direction of the last map."""
    features = backbone(images(shape))
    last = features.pyramid[-1]
    (last * images(tuple(last.shape))).mean().backward()
    gradients = {f"grad {name}": p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return named(features) | gradients


@pytest.mark.parametrize(("name", "options"), [("padded", PADDED), ("cooled", COOLED)])
def test_parity_with_the_authors_detector_and_its_gradients(name, options):
    """Maps that are no whole number of groups, one group of a map that is not square, odd maps, cooling."""
    reference = stored(GOLDEN, name)
    found = with_gradients(fill(crossformer("t", **options)), reference.shape)
    outputs = {key: found[key] for key in reference.golden}
    assert sum(key.startswith("grad ") for key in outputs) >= 6
    assert max(check_golden(outputs, reference.golden, 2e-5).values()) < 2e-5


@pytest.mark.parametrize(
    "change",
    [{"intervals": (4, 4, 2)}, {"sides": (6, 7, 7)}, {"merges": (2, 6)}, {"kernels": (4, 8, 16, 28)}, {"cooling": 1}],
)
def test_another_network_is_no_parity(change):
    reference = stored(GOLDEN, "padded")
    with torch.inference_mode():
        found = named(fill(crossformer("t", **{**PADDED, **change})).eval()(images(reference.shape)))
    maps = {key: numbers for key, numbers in reference.golden.items() if key.startswith("pyramid")}
    with pytest.raises(ParityError):
        check_golden({key: found[key] for key in maps}, maps)


@pytest.mark.parametrize(
    ("variant", "params"),
    [("t", 27_776_794), ("s", 30_657_394), ("b", 51_971_554), ("l", 91_971_184), ("pp_h", 95_962_944)],
)
def test_parameters_are_exact(variant, params):
    with torch.device("meta"):
        backbone: Any = crossformer(variant)
        assert count(backbone).params + 1000 * (backbone.width + 1) == params
    intervals = [[block.attn.interval for block in blocks] for blocks in backbone.stages]
    assert intervals[2][:4] == ([1, 1, 1, 1] if "pp" in variant else [1, 2, 1, 2])
    cools = [[number for number, block in enumerate(blocks) if block.cool is not None] for blocks in backbone.stages]
    assert cools == ([[2], [2], [2, 5, 8, 11, 14], []] if "pp" in variant else [[], [], [], []])


def theirs(name: str) -> dict[str, torch.Tensor]:
    """A state dict with the authors' names and shapes."""
    listed = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"][name].split()
    torch.manual_seed(0)
    shapes = dict(entry.rsplit(":", 1) for entry in listed)
    return {name: torch.randn([int(side) for side in shape.split("x")]) for name, shape in shapes.items()}


def test_released_names_become_ours():
    state, backbone = theirs("t"), crossformer("t")
    assert sum(tensor.numel() for tensor in state.values()) == 27_776_794
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found)
    pairs = {
        "embeds.0.embed.convs.2.weight": "patch_embed.projs.2.weight",
        "embeds.0.norm.bias": "patch_embed.norm.bias",
        "embeds.3.embed.convs.1.bias": "layers.2.downsample.reductions.1.bias",
        "embeds.3.norm.weight": "layers.2.downsample.norm.weight",
        "stages.2.5.attn.attention.qkv.weight": "layers.2.blocks.5.attn.qkv.weight",
        "stages.2.5.attn.bias.layers.0.weight": "layers.2.blocks.5.attn.pos.pos_proj.weight",
        "stages.2.5.attn.bias.layers.4.weight": "layers.2.blocks.5.attn.pos.pos2.0.weight",
        "stages.2.5.attn.bias.layers.9.bias": "layers.2.blocks.5.attn.pos.pos3.2.bias",
        "stages.3.0.mlp.widen.weight": "layers.3.blocks.0.mlp.fc1.weight",
        "norm.weight": "norm.weight",
    }
    assert all(torch.equal(found[ours], state[name]) for ours, name in pairs.items())
    del state["layers.0.blocks.0.attn.pos.pos1.2.weight"]
    with pytest.raises(ParityError, match=r"missing from it: stages\.0\.0\.attn\.bias\.layers\.3\.weight"):
        published(state, backbone)


def test_released_names_of_the_second_paper_become_ours():
    state = theirs("pp_s with depths 1, 1, 4, 1")
    found = published(state, crossformer("pp_s", depths=(1, 1, 4, 1)))
    assert torch.equal(found["stages.2.2.cool.conv.weight"], state["layers.2.blocks.2.ex_conv.weight"])
    assert torch.equal(found["stages.2.2.cool.norm.bias"], state["layers.2.blocks.2.ex_ln.bias"])


def test_sizes_that_do_not_fit_are_padded():
    backbone = fill(crossformer("nano", depths=(1, 2, 1, 1))).eval()
    x = images((2, 3, 33, 47))
    with torch.inference_mode():
        found = backbone(x)
        assert [tuple(one.shape[2:]) for one in found.pyramid] == [(17, 24), (9, 12), (5, 6), (3, 3)]
        whole = backbone(nn.functional.pad(x, (0, 1, 0, 1)))
        torch.testing.assert_close(found.pyramid[0], whole.pyramid[0])
        assert backbone(images((1, 3, 1, 5))).pooled.isfinite().all()


def test_tokens_are_the_last_map_behind_a_norm():
    backbone: Any = fill(crossformer("nano")).eval()
    with torch.inference_mode():
        found = backbone(images((2, 3, 64, 32)))
        expected = backbone.norm(found.pyramid[-1].flatten(2).mT)
    assert found.tokens is not None and found.tokens.shape == (2, 8, 192)
    torch.testing.assert_close(found.tokens, expected)
    torch.testing.assert_close(found.pooled, expected.mean(1))


def test_cooling_has_no_shortcut():
    layer: Any = Cooling(8)
    with torch.no_grad():
        layer.conv.weight.zero_()
        x = images((2, 5, 6, 8))
        assert torch.allclose(layer(x), layer.norm(layer.conv.bias.expand_as(x)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dims": (24, 48)}, "depths is .* give one number a stage"),
        ({"depths": (1, 0, 1, 1)}, "depths is"),
        ({"sides": (4, 4, 4, 0)}, "sides is"),
        ({"intervals": (4, 2, 1)}, "intervals is"),
        ({"heads": (5, 2, 4, 8)}, "5 heads do not divide dim 24"),
        ({"dims": (20, 40, 80, 160)}, "outputs is 20; with 4 kernels"),
        ({"kernels": (2, 5)}, r"kernels is \(2, 5\) with stride 2"),
        ({"merges": ()}, r"merges is \(\)"),
        ({"ratio": 0}, "ratio is 0"),
        ({"cooling": -1}, "cooling is -1"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        crossformer("nano", **options)


def test_no_such_variant():
    with pytest.raises(UsageError, match="crossformer has no variant 'm'"):
        crossformer("m")


SMALL = page._Setting({"depths": (2, 1, 1, 1)}, 24, 24, 1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", SMALL)
    return effect("toy", read("digits"))


def test_effect_measures_scores_and_what_is_lost(small, tmp_path):
    assert next(iter(small.arms)) == small.baseline == "crossformer"
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("crossformer", "plain", "table", "absolute")}
    assert all(set(row) == set(small.metrics) for row in found.values())
    resized = [arm for arm, row in found.items() if row["grown40"] == row["grown40"]]
    assert resized == ["crossformer", "table", "absolute"]
    assert found["plain"]["macs"] < found["crossformer"]["macs"]
    again = small.measure("crossformer", 0, tmp_path)
    assert again == found["crossformer"]


def test_arms_differ_in_what_they_say():
    seen = {}
    for arm in page._ARMS:
        backbone: Any = page._armed(arm, SMALL)
        first, attn = backbone.stages[0][0].attn, [block.attn.interval for block in backbone.stages[0]]
        kernels = [
            len(embed.embed.convs)
            for embed in (m for m in backbone.modules() if isinstance(m, page.Embed | page.Merge))
        ]
        seen[arm] = (kernels[:2], attn, type(first.bias).__name__, type(backbone.embeds[0]).__name__)
    computed = "DynamicPositionBias"
    assert seen == {
        "crossformer": ([4, 2], [1, 4], computed, "Embed"),
        "single": ([1, 2], [1, 4], computed, "Embed"),
        "plain": ([1, 1], [1, 4], computed, "Embed"),
        "near": ([4, 2], [1, 1], computed, "Embed"),
        "far": ([4, 2], [4, 4], computed, "Embed"),
        "table": ([4, 2], [1, 4], "_Table", "Embed"),
        "absolute": ([4, 2], [1, 4], "NoneType", "Sequential"),
    }


def test_a_table_is_zero_beyond_what_it_learnt():
    table = page._Table(2, 2)
    with torch.no_grad():
        table.table.copy_(torch.arange(1.0, 19).view(2, 3, 3))
    assert table((2, 2))[0].tolist() == [[5, 4, 2, 1], [6, 5, 3, 2], [8, 7, 5, 4], [9, 8, 6, 5]]
    larger = table((3, 3)).view(2, 3, 3, 3, 3)
    assert torch.equal(larger[:, :2, :2, :2, :2].reshape(2, 4, 4), table((2, 2)))
    assert not larger[:, 2, :, 0].any() and not larger[:, :, 0, :, 2].any()
    assert table((1, 2))[0].tolist() == [[5, 4], [6, 5]]


def test_groups_grow_for_a_while():
    backbone: Any = crossformer("nano")
    sides = lambda: [block.attn.side for blocks in backbone.stages for block in blocks]  # noqa: E731
    with page._resized(backbone, 1.5):
        assert sides() == [6] * 7
        assert backbone.stages[0][1].attn.groups((24, 24)) == ((6, 6), (4, 4))
    assert sides() == [4] * 7


def test_effect_checks_what_the_row_asks(small):
    def measured(lost: float = 2.0, **top1: float) -> list[bool]:
        values = {}
        for arm in small.arms:
            rows = {"top1": top1.get(arm, 50.0), "grown40": 5.0, "grown48": 4.0, "kept40": 5.0, "kept48": 4.0}
            if arm == "crossformer":
                rows |= {"grown40": lost, "grown48": lost}
            values[arm] = {name: np.array([one, one]) for name, one in rows.items()}
        return [check.holds for check in small.checks(Measured(values))]

    assert measured(crossformer=50.4) == [True, True, True, True]
    assert measured(crossformer=50.4, near=50.2) == [False, True, True, True]
    assert measured(crossformer=50.4, far=50.2) == [False, True, True, True]
    assert measured(crossformer=50.4, single=50.3) == [True, False, True, True]
    assert measured(crossformer=50.4, lost=4.6) == [True, True, False, False]
