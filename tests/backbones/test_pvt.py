"""PVT: the authors' outputs and names, transformers' names, positions, pooling, its effect."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vertebra.backbones.pvt import FeedForward, effect, published, pvt
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "pvt.json"
NARROW = {
    "dims": (16, 32, 40, 64), "heads": (1, 2, 5, 4), "depths": (1, 2, 2, 1), "patches": (4, 2, 2, 2), "image_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "narrow", "narrow wide", "narrow odd"])
def test_computes_what_the_authors_do(name):
    """At the native size, at others, whose positions are resized, and at an odd one, which is padded."""
    reference = stored(GOLDEN, name)
    backbone = fill(pvt("tiny") if name == "tiny" else pvt("nano", **NARROW)).eval()
    with torch.inference_mode():
        found = named(backbone(images(reference.shape)))
    outputs = {name: found[name] for name in reference.golden}
    assert len(outputs) == 5 and max(check_golden(outputs, reference.golden).values()) < 1e-5
    assert torch.equal(found["tokens"][:, 0], found["pooled"])


def test_maps_without_a_class_token_are_those_of_the_authors_detectors():
    reference, whole = stored(GOLDEN, "narrow dense"), fill(pvt("nano", **NARROW))
    backbone = pvt("nano", **NARROW, pooling="mean").eval()
    backbone.load_state_dict(published(whole.state_dict(), backbone))  # positions without the class token's
    with torch.inference_mode():
        found = backbone(images(reference.shape))
        mean = backbone.norm(found.pyramid[-1].flatten(2).mT).mean(1)
    maps = {name: tensor for name, tensor in named(found).items() if "pyramid" in name}
    assert max(check_golden(maps, reference.golden).values()) < 1e-5
    torch.testing.assert_close(found.pooled, mean)


@pytest.mark.parametrize(
    ("variant", "params"),
    [("tiny", 13_229_288), ("small", 24_485_864), ("medium", 44_208_104), ("large", 61_369_320)],
)
def test_parameters_are_the_published_ones(variant, params):
    with torch.device("meta"):
        backbone = pvt(variant)
    assert count(backbone).params + 1000 * backbone.width + 1000 == params
    assert [level.stride for level in backbone.levels] == [4, 8, 16, 32]


def released() -> dict[str, torch.Tensor]:
    """The authors' names and shapes of PVT-Tiny, with a number of its own in each tensor."""
    listed = (line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["tiny"].split())
    shapes = {name: [int(side) for side in sides.split("x")] for name, sides in listed}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


PLACES = {
    "patch_embed1.proj.weight": "embeds.0.conv.weight",
    "patch_embed3.norm.bias": "embeds.2.norm.bias",
    "pos_embed2": "embeds.1.positions",
    "cls_token": "embeds.3.class_token",
    "block1.1.attn.sr.weight": "stages.0.1.attn.reduce.weight",
    "block2.0.attn.norm.weight": "stages.1.0.attn.norm.weight",
    "block4.1.attn.kv.bias": "stages.3.1.attn.kv.bias",
    "block3.0.mlp.fc2.weight": "stages.2.0.mlp.narrow.weight",
    "norm.weight": "norm.weight",
}


def test_released_names_become_ours():
    state, backbone = released(), pvt("tiny")
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found)
    for theirs, ours in PLACES.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    with pytest.raises(ParityError, match=r"left over in the checkpoint: stages\.0\.2|missing from it: stages\.0\.2"):
        published(state, pvt("small"))


TRANSFORMERS = (
    (r"^(patch_embed|block)(?=\d)", r"pvt.encoder.\1."),
    (r"^pos_embed(\d)$", r"pvt.encoder.patch_embed.\1.position_embeddings"),
    (r"^cls_token$", "pvt.encoder.patch_embed.4.cls_token"),
    (r"^norm\.", "pvt.encoder.layer_norm."),
    (r"^head\.", "classifier."),
    (r"(patch_embed\.\d)\.proj\.", r"\1.projection."),
    (r"(patch_embed\.\d)\.norm\.", r"\1.layer_norm."),
    (r"\.norm([12])\.", r".layer_norm_\1."),
    (r"\.attn\.q\.", ".attention.self.query."),
    (r"\.attn\.norm\.", ".attention.self.layer_norm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc", ".mlp.dense"),
)


def transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under the names of transformers' `PvtForImageClassification`, which counts stages from 0."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"(patch_embed|block)\.(\d)", lambda match: f"{match[1]}.{int(match[2]) - 1}", name)
        name = name.replace("patch_embed.", "patch_embeddings.")
        if ".kv." in name:
            halves = zip(("key", "value"), tensor.chunk(2), strict=True)
            found |= {name.replace("kv", part): half for part, half in halves}
        else:
            found[name] = tensor
    return found


def test_names_of_transformers_become_ours():
    backbone = pvt("tiny")
    state = {name: images(tuple(tensor.shape)) for name, tensor in released().items()}
    theirs = transformers(state)
    assert "pvt.encoder.block.0.1.attention.self.value.weight" in theirs and "pvt.encoder.layer_norm.bias" in theirs
    found, expected = published(theirs, backbone), published(state, backbone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_positions_of_a_checkpoint_fit_another_size(tmp_path):
    """From 64 pixels to 96 x 160: the network that was built for it computes what the stretched one does."""
    small = fill(pvt("nano", **NARROW)).eval()
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    wide = pvt("nano", **{**NARROW, "image_size": (96, 160)}, weights=str(tmp_path / "small.safetensors")).eval()
    assert [tuple(embed.positions.shape) for embed in wide.embeds] == [
        (1, 960, 16), (1, 240, 32), (1, 60, 40), (1, 16, 64),
    ]  # fmt: skip
    batch = images((2, 3, 96, 160))
    with torch.inference_mode():
        assert difference(wide(batch).pooled, small(batch).pooled) < 1e-6


def test_grids_of_as_many_cells_are_told_apart():
    """The authors' code takes 4 x 64 cells for 16 x 16, and 2 x its size for its own; ours looks at the sides."""
    backbone = fill(pvt("nano", **NARROW)).eval()  # 16 x 16 cells in the first stage
    embed = backbone.embeds[0]
    flat = embed(torch.zeros(1, 3, 16, 256))[0] - embed.norm(embed.conv.bias)
    wanted = nn.functional.interpolate(embed.positions.mT.unflatten(2, (16, 16)), (4, 64), mode="bilinear")
    torch.testing.assert_close(flat, wanted.flatten(2).mT, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert backbone(images((1, 3, 128, 128))).pooled.isfinite().all()


def test_one_stage_is_a_plain_transformer():
    column = pvt("nano", depths=(3,), dims=(48,), heads=(3,), ratios=(4,), reductions=(1,), patches=(4,))
    assert [(level.channels, level.stride) for level in column.levels] == [(48, 4)]
    found = column.eval()(images((2, 3, 30, 32)))
    assert found.tokens is not None and found.tokens.shape == (2, 65, 48) and found.pyramid[0].shape == (2, 48, 8, 8)


def test_a_feed_forward_in_pieces_is_the_whole_one():
    mlp = fill(FeedForward(8, 2048)).double()
    x, weights = images((2, 1100, 8)).double().requires_grad_(True), images((2, 1100, 8)).double() + 0.5
    assert x.shape[0] * x.shape[1] * 2048 > 4 * 2**20  # so many that they come in pieces
    sizes = []
    mlp.widen.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    found = mlp(x)
    assert len(sizes) > 1 and max(sizes) <= 2**20
    expected = mlp._whole(x)
    assert difference(found, expected) < 1e-13
    ours, theirs = (torch.autograd.grad((out * weights).sum(), [x, *mlp.parameters()]) for out in (found, expected))
    assert all(difference(one, other) < 1e-11 for one, other in zip(ours, theirs, strict=True))


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    backbone = pvt("tiny", drop_path=0.1)
    block = backbone.stages[0][1]
    assert block.norm1.eps == 1e-6 == backbone.norm.eps and block.attn.norm.eps == 1e-5 == backbone.embeds[1].norm.eps
    for tensor in (block.mlp.widen.weight, backbone.embeds[3].positions, backbone.stages[3][0].attn.kv.weight):
        assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert not block.mlp.widen.bias.any() and not block.attn.q.bias.any() and block.attn.reduce.bias.any()
    rates = [getattr(block.drop, "drop_prob", 0.0) for blocks in backbone.stages for block in blocks]
    assert rates == pytest.approx(list(np.linspace(0, 0.1, 8)))


def test_wrong_options_are_refused():
    for options, message in [
        ({"dims": (16, 32, 80)}, r"dims is \(16, 32, 80\) and depths is"),
        ({"dims": (16, 32, 80, 100)}, "8 heads do not divide dim 100"),
        ({"reductions": (8, 4, 2, 0)}, r"reductions is .* at least 1"),
        ({"ratios": (8, 8, 4, 0.0)}, r"ratios is .* above 0"),
        ({"pooling": "first"}, "pooling is 'first'; it can be token or mean"),
        ({"depths": (2, 0, 2, 2)}, "depths is"),
    ]:
        with pytest.raises(UsageError, match=message):
            pvt("nano", **options)
    with pytest.raises(UsageError, match=r"no variant 'smal'.*small"):
        pvt("smal")


@pytest.fixture(scope="module")
def toy():
    return effect("toy", read("digits"))


def test_arms_have_equal_parameters():
    from vertebra.backbones import pvt as page

    for setting in page._SETTINGS.values():
        with torch.device("meta"):
            arms = {arm: page._arm(arm, setting) for arm in page._ARMS}
        sizes = {arm: sum(p.numel() for p in backbone.parameters()) for arm, backbone in arms.items()}
        assert all(sizes[arm] / sizes["pvt"] == pytest.approx(1, abs=0.03) for arm in ("vit", "resnet")), sizes
        assert not any(block.attn.reduce for blocks in arms["full"].stages for block in blocks)


def test_effect_measures_its_arms(tmp_path, monkeypatch):
    from vertebra.backbones import pvt as page

    narrow = {"dims": (8, 8, 8, 8), "heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}
    column = {"dims": (8,), "heads": (1,), "depths": (1,), **page._COLUMN}
    small = page._Setting(narrow, column, {"blocks": 1, "width": 4}, 16, 64, 1)
    monkeypatch.setitem(page._SETTINGS, "toy", small)
    monkeypatch.setattr(page, "_SIDE", 32)
    experiment = effect("toy", read("digits"))
    found = {arm: experiment.measure(arm, 0, tmp_path) for arm in experiment.arms}
    assert all(set(row) == set(experiment.metrics) for row in found.values()) and experiment.baseline == "vit"
    assert len({row["nll"] for row in found.values()}) == 4
    assert found["pvt"]["leaner"] > found["pvt"]["leaner_fused"] > 0 and found["pvt"]["faster"] > 0
    assert np.isnan(found["full"]["leaner"]) and found["full"]["macs"] > found["pvt"]["macs"]


def test_effect_checks_what_the_row_asks(toy):
    def measured(faster: float, leaner: float, ours: float) -> Measured:
        values = {arm: {"top1": np.array([50.0, 51.0]), "macs": np.array([9.0, 9.0])} for arm in toy.arms}
        shares = {"faster": faster, "leaner": leaner, "faster_plain": 20.0, "leaner_fused": 1.0}
        values["pvt"] |= {"top1": np.array([ours, ours + 1]), **{name: np.array([s, s]) for name, s in shares.items()}}
        return Measured(values)

    assert [check.holds for check in toy.checks(measured(16.5, 17.0, 53.5))] == [True] * 4
    assert [check.holds for check in toy.checks(measured(15.0, 15.0, 49.5))] == [False] * 4
    assert [check.holds for check in toy.checks(measured(16.0, 16.0, 52.5))] == [True, True, False, True]
