"""Vision Mamba: parameters, golden outputs of the authors' network, released names, sizes, the arms of its effect."""

import json
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones import vim as page
from vertebra.backbones.vim import effect, published, vim
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "vim.json"
SMALL = {"dim": 48, "depth": 4}
PARAMS = {
    "tiny": 7_148_008,
    "small": 25_796_584,
    "base": 97_598_440,
    "tiny_plus": 7_250_344,
    "small_plus": 26_001_256,
}


@pytest.mark.parametrize("variant", PARAMS)
def test_parameters_are_exactly_the_authors(variant):
    with torch.device("meta"):
        backbone = vim(variant)
    assert sum(p.numel() for p in backbone.parameters()) + backbone.width * 1000 + 1000 == PARAMS[variant]


def test_macs_are_those_of_the_layers_and_three_a_state_of_the_scans():
    with torch.device("meta"):
        backbone = vim("tiny", depth=2)
    dim, inner, rank, tokens = 192, 384, ceil(192 / 16), 197
    # the convolutions are counted over three tokens more, which are cut off
    layers = tokens * (3 * dim * inner + 2 * inner * (rank + 32 + rank)) + 2 * (tokens + 3) * 4 * inner
    scans = 2 * 3 * tokens * inner * 16
    assert count(backbone).macs == 196 * 3 * 16**2 * dim + 2 * (layers + scans)


def network(case: str) -> page.Vim:
    name, _, size = case.partition(" at ")
    sides = tuple(int(side) for side in size.split("x"))
    if name == "tiny":
        return vim("tiny", image_size=sides)
    options = {"plus": {"stride": 8}, "forward": {"directions": "forward"}}.get(name, {"place": name})
    return vim("tiny", **SMALL, image_size=sides, **options)


CASES = [name for name in json.loads(GOLDEN.read_text(encoding="utf-8"))["parity"] if " at " in name]


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_authors_network_does(case):
    reference = stored(GOLDEN, case)
    with torch.inference_mode():
        features = fill(network(case)).eval()(images(reference.shape))
    assert max(check_golden({"pooled": features.pooled}, reference.golden).values()) < 1e-4


def test_parity_sees_the_class_tokens_place_and_the_starts_are_the_authors():
    reference = stored(GOLDEN, "middle at 64x64")
    backbone = fill(network("middle at 64x64")).eval()
    backbone.place = "head"
    with torch.inference_mode(), pytest.raises(ParityError):
        check_golden({"pooled": backbone(images(reference.shape)).pooled}, reference.golden)
    torch.manual_seed(0)
    fresh = vim("tiny", dim=64, depth=16, image_size=64)
    bound = fresh.get_parameter("blocks.3.mixer.outputs.weight").abs().max().item() * 4  # over the root of 16 blocks
    assert bound == pytest.approx(128**-0.5, rel=0.01)
    assert fresh.positions.std().item() == pytest.approx(0.02, rel=0.1)
    assert fresh.stem.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    assert not fresh.get_parameter("blocks.0.mixer.directions.1.step.bias").any()
    symmetric = vim("nano", start="symmetric")
    assert symmetric.get_parameter("blocks.0.mixer.directions.1.step.bias").max() < -2


@cache
def released() -> dict[str, Tensor]:
    """Tensors with the names and shapes of the authors' tiny network."""
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
    shapes = dict(keys["shapes"])
    for name, shape in keys["shapes"].items():
        if name.startswith("layers.0."):
            shapes |= {name.replace("layers.0.", f"layers.{number}."): shape for number in range(1, keys["depth"])}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_released_names_become_ours():
    with torch.device("meta"):
        backbone, single = vim("tiny"), vim("tiny", directions="forward")
    found = published(released(), backbone)
    backbone.load_state_dict(found, assign=True)
    for theirs, ours in {
        "cls_token": "class_token",
        "pos_embed": "positions",
        "patch_embed.proj.weight": "stem.weight",
        "layers.0.norm.weight": "blocks.0.norm.weight",
        "layers.23.mixer.in_proj.weight": "blocks.23.mixer.inputs.weight",
        "layers.7.mixer.A_log": "blocks.7.mixer.directions.0.decay_log",
        "layers.7.mixer.A_b_log": "blocks.7.mixer.directions.1.decay_log",
        "layers.7.mixer.D_b": "blocks.7.mixer.directions.1.skip",
        "layers.7.mixer.conv1d.bias": "blocks.7.mixer.directions.0.conv.bias",
        "layers.7.mixer.x_proj_b.weight": "blocks.7.mixer.directions.1.select.weight",
        "layers.7.mixer.dt_proj.weight": "blocks.7.mixer.directions.0.step.weight",
        "layers.7.mixer.out_proj.weight": "blocks.7.mixer.outputs.weight",
        "norm_f.weight": "norm.weight",
    }.items():
        assert torch.equal(found[ours], released()[theirs]), theirs
    with pytest.raises(ParityError, match="left over"):
        published(released(), single)


def test_released_positions_fit_other_sizes_and_two_class_tokens_become_one_table():
    with torch.device("meta"):  # shapes are all that is asked of them
        wide, plus, double = vim("tiny", image_size=(192, 256)), vim("tiny_plus"), vim("tiny", place="double")
    table = torch.randn(1, 197, 192)
    found = published({**released(), "pos_embed": table}, wide)["positions"]
    assert found.shape == (1, 12 * 16 + 1, 192)
    assert torch.equal(found[:, 96], table[:, 98])  # of the class token
    plain = torch.full((1, 197, 192), 0.5)
    finer = published({**released(), "pos_embed": plain}, plus)["positions"]
    torch.testing.assert_close(finer, torch.full((1, 730, 192), 0.5))
    state = {name: tensor for name, tensor in released().items() if name != "cls_token"}
    ends = {"cls_token_head": torch.zeros(1, 1, 192), "cls_token_tail": torch.ones(1, 1, 192)}
    both = published({**state, **ends, "pos_embed": torch.zeros(1, 198, 192)}, double)
    assert both["class_token"][0, :, 5].tolist() == [0, 1]


@pytest.mark.parametrize(("place", "pooled"), [("middle", 8), ("head", 0), ("tail", 16), ("double", None)])
def test_where_the_class_token_is(place, pooled):
    backbone = fill(vim("nano", image_size=16, place=place)).eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, 16, 16)))
    assert features.tokens is not None and features.pyramid[0].shape == (2, 64, 4, 4)
    tokens = features.tokens
    expected = (tokens[:, 0] + tokens[:, -1]) / 2 if pooled is None else tokens[:, pooled]
    torch.testing.assert_close(features.pooled, expected)
    classes = [0, 17] if pooled is None else [pooled]
    cells = [number for number in range(tokens.shape[1]) if number not in classes]
    assert torch.equal(features.pyramid[0].flatten(2).mT, tokens[:, cells])


def test_positions_stay_with_what_they_are_of():
    backbone = fill(vim("nano", place="middle")).eval()
    with torch.no_grad():
        backbone.positions[:, :32] = 1.0  # the upper half of 8 x 8 cells
        backbone.positions[:, 32] = 7.0  # the class token
        backbone.positions[:, 33:] = 2.0
        found = backbone._positions((4, 6))[0, :, 0]
    assert len(found) == 25 and found[12] == 7.0
    assert (found[:6] < 1.1).all() and (found[-6:] > 1.9).all()
    assert backbone._positions((8, 8)) is backbone.positions


def test_odd_images_are_padded_with_zeros():
    backbone = fill(vim("nano", stride=2, patch=4)).eval()
    x = images((2, 3, 31, 18))
    padded = nn.functional.pad(x, (0, 0, 0, 1))
    with torch.inference_mode():
        found, expected = backbone(x), backbone(padded)
    assert found.pyramid[0].shape == (2, 64, 15, 8)
    assert torch.equal(found.pooled, expected.pooled)
    assert vim("nano")(images((1, 3, 1, 2))).pyramid[0].shape == (1, 64, 1, 1)  # less than a patch


def test_the_stream_is_in_32_bit_and_mixed_precision_trains():
    backbone = fill(vim("nano", depth=2)).train()
    seen = []
    backbone.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    x = images((4, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(x)
    features.pooled.float().square().mean().backward()
    assert nn.functional.cosine_similarity(features.pooled.float(), backbone(x).pooled).min() > 0.99
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())
    with torch.inference_mode():
        assert backbone.bfloat16()(x.bfloat16()).pooled.dtype == torch.bfloat16
    assert seen == [torch.float32] * 3


def test_drop_path_rises_and_drops_branches():
    backbone = vim("nano", depth=6, drop_path=0.5)
    rates = [getattr(block.drop, "drop_prob", 0.0) for block in backbone.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    x = images((4, 3, 32, 32))
    torch.manual_seed(0)
    assert not torch.equal(fill(backbone).train()(x).pooled, backbone(x).pooled)
    assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_wrong_options_are_refused():
    for options, words in (
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"stride": 5}, "stride is 5; above the patch of 4 pixels"),
        ({"stride": 0}, "stride is 0"),
        ({"place": "centre"}, "place is 'centre'; it can be middle, head"),
        ({"directions": "backward"}, "no variant 'backward'"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            vim("nano", **options)


def test_the_arms_differ_in_what_they_say():
    setting = page._SETTINGS["toy"]
    arms = {arm: page._armed(arm, setting) for arm in page._ARMS}
    sizes = {arm: sum(p.numel() for p in backbone.parameters()) for arm, backbone in arms.items()}
    assert sizes["both"] == sizes["head"] and sizes["forward"] == sizes["forward_tail"] < sizes["both"]
    assert sizes["vit"] == pytest.approx(sizes["both"], rel=0.05)
    naive = page._Naive(32)
    x = images((2, 9, 32))
    torch.testing.assert_close(naive(x), naive.inner(x), rtol=1e-4, atol=1e-5)


def test_its_effect_checks_what_the_paper_says():
    made = effect("toy", read("digits"))
    assert list(made.arms) == list(page._ARMS) and made.baseline == "vit"

    def held(both: float, growth: float) -> list[bool]:
        top1 = {"vit": 40.0, "both": both, "head": 40.0, "forward": 37.0, "forward_tail": 38.5}
        values = {arm: {"top1": np.array([value])} for arm, value in top1.items()}
        values["both"] |= {"time_growth": np.array([growth]), "memory_growth": np.array([1.0])}
        values["both"] |= {"faster_from": np.array([500.0]), "less_from": np.array([200.0])}
        values["vit"] |= {"time_growth": np.array([2.0]), "memory_growth": np.array([1.9])}
        return [check.holds for check in made.checks(Measured(values))]

    assert held(39.8, 1.0) == [True] * 5
    assert held(39.2, 1.3) == [False, True, False, False, True]
    assert held(37.0, 1.0) == [False, False, False, True, True]
