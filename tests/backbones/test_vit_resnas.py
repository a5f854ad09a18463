"""ViT-ResNAS: the authors' outputs, definitions, counts and names; sizes, definitions of one's own, its effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vertebra.backbones.vit_resnas import VARIANTS, effect, published, vit_resnas
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "vit_resnas.json"
NARROW = {
    "dims": (32, 48, 80), "heads": ((2, 3), (3,), (2, 1)), "hidden": ((48, 80), (64,), (96, 64)),
    "head_dims": (32, 48, 64), "patch": 14,
}  # fmt: skip


def written(key: str) -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))[key]


@pytest.mark.parametrize(
    ("name", "size"), [("tiny", 224), ("narrow", 112), ("narrow odd", 168), ("narrow train", 224), ("narrow 280", 280)]
)
def test_computes_what_the_authors_do(name, size):
    """At the native size, at one whose last map has 3 x 3 cells, in training, and with positions of another size."""
    reference = stored(GOLDEN, name)
    backbone = vit_resnas("tiny") if name == "tiny" else vit_resnas("nano", **NARROW, image_size=size)
    if name == "narrow 280":
        small = fill(vit_resnas("nano", **NARROW, image_size=224))
        backbone.load_state_dict(published(small.state_dict(), backbone))
    else:
        fill(backbone)
    with torch.no_grad():
        found = named(backbone.train(name == "narrow train")(images(reference.shape)))
    assert len(found) == 5 and max(check_golden(found, reference.golden).values()) < 1e-5
    assert torch.equal(found["tokens"][:, 0], found["pooled"])


@pytest.mark.parametrize(
    ("variant", "params", "patches", "macs"),
    [
        ("tiny", 40_793_552, 41_498_552, 1_782_630_272),
        ("small", 63_724_108, 64_605_108, 2_845_501_856),
        ("medium", 96_442_672, 97_323_672, 4_513_135_936),
        ("supernet_tiny", 84_814_464, None, 3_497_553_920),
    ],
)
def test_counts_are_the_authors(variant, params, patches, macs):
    """With the classifier of the class token, and with that of the patches too; MACs to the last one."""
    with torch.device("meta"):
        backbone = vit_resnas(variant)
    cost, head = count(backbone), 1000 * backbone.width + 1000
    assert cost.params + head == params and cost.macs + 1000 * backbone.width == macs
    assert patches is None or cost.params + 2 * head == patches
    assert [level.stride for level in backbone.levels] == [14, 28, 56]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "nano"])
def test_variants_are_the_published_definitions(variant):
    """In the authors' notation: 4 a stem, 1 a block, 3 a reduction, 2 the classifier."""
    ours, rows = VARIANTS[variant], written("definitions")[variant]
    head_dims, dims = (32, 48, 64), ours["dims"]
    found: list = [[4, dims[0]]]
    for stage, dim in enumerate(dims):
        found += [[3, dims[stage - 1], dim]] if stage else []
        pairs = zip(ours["heads"][stage], ours["hidden"][stage], strict=True)
        found += [[1, [dim, heads, head_dims[stage]], [dim, hidden], 1] for heads, hidden in pairs]
    assert [*found, [2, dims[-1], 1000]] == rows


def released() -> dict[str, Tensor]:
    """The authors' names and shapes of the tiny network, with a number of its own in each tensor."""
    listed = (line.rpartition(":") for line in written("keys")["tiny"].split())
    shapes = {name: [int(side) for side in sides.split("x") if side] for name, _, sides in listed}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


PLACES = {
    "tokens": "class_token",
    "pos_embed": "positions",
    "patch_embed.conv1.conv.weight": "stem.down.0.weight",
    "patch_embed.conv2.bn.running_var": "stem.refine.0.1.running_var",
    "patch_embed.conv3.bn.bias": "stem.refine.1.1.bias",
    "patch_embed.conv_proj.bias": "stem.proj.bias",
    "blocks.4.attn.qkv.weight": "stages.0.4.attn.qkv.weight",
    "blocks.5.norm.weight": "reductions.0.norm.weight",
    "blocks.5.pos_embed": "reductions.0.positions",
    "blocks.6.mlp.fc1.bias": "stages.1.0.mlp.fc1.bias",
    "blocks.12.patch_reduce.weight": "reductions.1.conv.weight",
    "blocks.12.token_transform.bias": "reductions.1.widen.bias",
    "blocks.17.norm2.bias": "stages.2.4.norm2.bias",
    "norm.weight": "norm.weight",
}


def test_released_names_become_ours():
    state, backbone = released(), vit_resnas("tiny")
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found)
    for theirs, ours in PLACES.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    gaps = {
        f"blocks.{2 * int(n.split('.')[1])}.{n.split('.', 2)[2]}" if n[:6] == "blocks" else n: t
        for n, t in state.items()
    }
    again = published(gaps, backbone)  # of a network whose search left every second block out
    assert again.keys() == found.keys() and all(torch.equal(again[name], found[name]) for name in found)
    with pytest.raises(ParityError, match=r"missing from it: .*stages\.2\.4|other shapes"):
        published(state, vit_resnas("small"))


def test_positions_of_a_checkpoint_fit_another_size(tmp_path):
    """From 32 pixels to 48 x 80: the network that was built for it computes what the stretched one does."""
    small = fill(vit_resnas("nano")).eval()
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    wide = vit_resnas("nano", image_size=(48, 80), weights=str(tmp_path / "small.safetensors")).eval()
    assert wide.grid == (24, 40) and [part.grid for part in wide.reductions] == [(12, 20), (6, 10)]
    batch = images((2, 3, 48, 80))
    with torch.inference_mode():
        assert difference(wide(batch).pooled, small(batch).pooled) < 1e-6


def test_images_that_do_not_fill_their_patches_are_padded():
    backbone = fill(vit_resnas("nano", **NARROW, image_size=56)).eval()
    batch = images((2, 3, 57, 43))
    with torch.inference_mode():
        found, padded = backbone(batch), backbone(pad(batch, (0, 13, 0, 13)))
    assert torch.equal(found.pooled, padded.pooled)
    assert [tuple(x.shape[2:]) for x in found.pyramid] == [(5, 4), (3, 2), (2, 1)]


def test_an_odd_map_goes_on_as_what_its_reduction_makes_of_it():
    """Stage by stage at 5 x 7 cells, with positions resized by torch itself."""
    backbone = fill(vit_resnas("nano", image_size=32)).eval()
    batch = images((2, 3, 10, 14))

    def spread(table: Tensor, cells: tuple[int, int]) -> Tensor:
        side = int(table.shape[1] ** 0.5)
        return interpolate(table.mT.unflatten(2, (side, side)), cells, mode="bicubic").flatten(2).mT

    with torch.inference_mode():
        found = backbone(batch)
        x = backbone.stem(batch).flatten(2).mT + spread(backbone.positions[:, 1:], (5, 7))
        first = (backbone.class_token + backbone.positions[:, :1]).expand(2, -1, -1)
        maps = x.mT
        for stage, cells in enumerate([(5, 7), (3, 4), (2, 2)]):
            if stage:
                part = backbone.reductions[stage - 1]
                (maps, first), table = part(maps, first), part.positions
                x = maps.flatten(2).mT
                torch.testing.assert_close(part._positions(cells).flatten(2).mT, spread(table, cells))
            x = torch.cat((first, x), 1)
            for block in backbone.stages[stage]:
                x = block(x)
            first, maps = x[:, :1], x[:, 1:].mT.unflatten(2, cells)
            torch.testing.assert_close(found.pyramid[stage], maps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.tokens, backbone.norm(x), rtol=1e-4, atol=1e-5)


def test_a_definition_makes_a_network():
    backbone = vit_resnas(
        "nano", dims=(16, 16), heads=((1, 3, 2), (4,)), hidden=((8, 24, 40), (64,)), head_dims=(8, 16)
    )
    heads = [[block.attn.heads for block in blocks] for blocks in backbone.stages]
    hidden = [[block.mlp.fc1.out_features for block in blocks] for blocks in backbone.stages]
    assert heads == [[1, 3, 2], [4]] and hidden == [[8, 24, 40], [64]]
    assert [(level.channels, level.stride) for level in backbone.levels] == [(16, 2), (16, 4)]
    assert backbone.stages[0][1].attn.qkv.weight.shape == (3 * 3 * 8, 16)
    assert backbone.eval()(images((2, 3, 32, 32))).pooled.shape == (2, 16)
    parts = [type(part).__name__ for part in backbone.trunk()]
    assert parts == ["Stem", *["Block"] * 3, "ResidualSpatialReduction", "Block", "LayerNorm"]


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    backbone = vit_resnas("tiny", drop_path=0.2)
    block = backbone.stages[2][0]
    assert block.norm1.eps == 1e-6 == backbone.norm.eps
    for tensor in (block.mlp.fc1.weight, block.attn.qkv.weight, backbone.positions):
        assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert not block.mlp.fc2.bias.any() and not block.attn.qkv.bias.any() and backbone.stem.proj.bias.any()
    rates = [getattr(block.drop, "drop_prob", 0.0) for blocks in backbone.stages for block in blocks]
    assert rates == pytest.approx(list(np.linspace(0, 0.2, 16)))  # reductions are not counted


def test_wrong_options_are_refused():
    for options, message in [
        ({"dims": (32, 64)}, r"heads is .* and dims is \(32, 64\); give one entry a stage"),
        ({"dims": (64, 32, 112)}, "narrower"),
        ({"heads": ((2, 3), (4,), (3, 4))}, r"stage 1 has heads \(4,\) and hidden \(192, 160\)"),
        ({"heads": ((2, 0), (4, 3), (3, 4))}, r"heads\[0\] is \(2, 0\)"),
        ({"hidden": ((96, 128), (), (320, 256))}, r"hidden\[1\] is \(\)"),
        ({"patch": 7}, "patch is 7; it must be even"),
        ({"stem": 0}, "stem is 0"),
        ({"shortcut": "add"}, "shortcut is 'add'; it can be pooled or none"),
    ]:
        with pytest.raises(UsageError, match=message):
            vit_resnas("nano", **options)
    with pytest.raises(UsageError, match=r"no variant 'tinny'.*tiny"):
        vit_resnas("tinny")


@pytest.fixture(scope="module")
def toy():
    return effect("toy", read("digits"))


def test_arms_differ_in_the_shortcut_alone():
    from vertebra.backbones import vit_resnas as page

    for setting in page._SETTINGS.values():
        with torch.device("meta"):
            none, pooled = (page._arm(arm, setting) for arm in page._ARMS)
        assert {name: t.shape for name, t in none.state_dict().items()} == {
            name: t.shape for name, t in pooled.state_dict().items()
        }
        assert sum(len(blocks) for blocks in pooled.stages) == 18
        assert [part.shortcut for part in (*none.reductions, *pooled.reductions)] == ["none"] * 2 + ["pooled"] * 2


def test_effect_measures_its_arms(tmp_path, monkeypatch):
    from vertebra.backbones import vit_resnas as page

    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting((8, 8, 8), 1, 2, 8, 64, 1))
    experiment = effect("toy", read("digits"))
    found = {arm: experiment.measure(arm, 0, tmp_path) for arm in experiment.arms}
    assert all(set(row) == set(experiment.metrics) for row in found.values()) and experiment.baseline == "none"
    assert found["none"]["nll"] != found["pooled"]["nll"] and found["none"]["params"] == found["pooled"]["params"]
    assert experiment.measure("pooled", 0, tmp_path) == found["pooled"]


def test_effect_checks_what_the_row_asks(toy):
    def measured(ours: float) -> Measured:
        return Measured({"none": {"top1": np.array([50.0, 51.0])}, "pooled": {"top1": np.array([ours, ours + 1])}})

    assert [check.holds for check in toy.checks(measured(51.0))] == [True]
    assert [check.holds for check in toy.checks(measured(50.9))] == [False]
    assert "+0.90" in toy.checks(measured(50.9))[0].found
