"""Adventurer: the authors' outputs and names, which blocks read backwards, and what a causal network must not see."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from vertebra.backbones.adventurer import VARIANTS, Adventurer, adventurer, published
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.spec import Spec
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "adventurer.json"
CASES = {
    "tiny": {},
    "wide_64": {"dim": 128, "depth": 6, "image_size": 64},
    "p4": {"dim": 128, "depth": 5, "image_size": 20, "patch_size": 4},
    "p1": {"dim": 64, "depth": 4, "image_size": 12, "patch_size": 1},
}


def small(**options) -> Any:
    torch.manual_seed(0)
    return fill(adventurer("nano", **options))


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_authors_network_does(case):
    reference = stored(GOLDEN, case)
    with torch.inference_mode():
        found = fill(adventurer("tiny", **CASES[case])).eval()(images(reference.shape))
    outputs = {"pooled": found.pooled, "tokens": found.tokens}
    assert max(check_golden(outputs, reference.golden, 2e-5).values()) < 2e-5


def test_the_other_flip_rules_are_other_networks():
    reference = stored(GOLDEN, "wide_64")
    for rule in ("alternate", "none"):
        with torch.inference_mode(), pytest.raises(ParityError):
            found = fill(adventurer("tiny", **CASES["wide_64"], flip_rule=rule)).eval()(images(reference.shape))
            check_golden({"pooled": found.pooled, "tokens": found.tokens}, reference.golden)


@pytest.mark.parametrize(
    ("rule", "backwards"), [("released", [2, 3]), ("alternate", [1, 3, 5, 7, 9, 11]), ("none", [])]
)
def test_which_blocks_read_backwards(rule, backwards):
    with torch.device("meta"):
        blocks = adventurer("tiny", flip_rule=rule).blocks
    assert [number for number, block in enumerate(blocks) if block.backwards] == backwards


@pytest.mark.parametrize(("patch", "tokens"), [(16, 196), (8, 784), (1, 50_176)])
def test_smaller_patches_cost_tokens_and_only_places_and_filters_differ(patch, tokens):
    with torch.device("meta"):
        coarse, fine = adventurer("tiny"), adventurer("tiny", patch_size=patch)
    assert fine.embed.positions.shape == (1, 1 + tokens, 256) and fine.levels[0].stride == patch
    more = (tokens - 196) * 256 - 3 * 256 * (16**2 - patch**2)
    assert count(fine).params - count(coarse).params == more


def test_forms_of_the_scan_agree():
    x = images((2, 3, 32, 32))
    chunked, loop = small().eval(), small(form="sequential").eval()
    with torch.inference_mode():
        assert difference(chunked(x).pooled, loop(x).pooled) < 1e-5


def test_patches_see_what_is_before_them_and_the_mean_alone():
    """Without the heading mean and backward blocks, a change in the last patch would reach the class token only."""
    backbone = small(flip_rule="none").eval()
    block = backbone.blocks[0]
    x = images((1, 1 + 12, 64))
    other = x.clone()
    other[:, [5, 9]] = x[:, [9, 5]]  # the mean of all tokens stays
    with torch.inference_mode():
        one, two = block(x), block(other)
    same = (one - two).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [False, True, True, True, True] + [False] * 8  # class token, patches 1-4, the rest
    other[:, 12] += 1
    with torch.inference_mode():
        moved = (block(other) - two).abs().amax((0, 2))
    assert (moved > 1e-6).all()  # through the mean


def test_backward_blocks_read_from_the_last_patch():
    block = small().eval().blocks[2]
    x = images((1, 1 + 12, 64))
    other = x.clone()
    other[:, [5, 9]] = x[:, [9, 5]]
    with torch.inference_mode():
        same = (block(x) - block(other)).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [False] * 10 + [True] * 3


def test_sides_that_the_patch_does_not_divide_are_filled_with_zeros():
    backbone = small().eval()
    batch = images((2, 3, 30, 45))
    with torch.inference_mode():
        found, expected = backbone(batch), backbone(pad(batch, (0, 3, 0, 2)))
        one = backbone(images((1, 3, 1, 1)))
    assert torch.equal(found.pooled, expected.pooled)
    assert found.pyramid[0].shape == (2, 64, 8, 12) and found.tokens is not None
    assert torch.equal(found.tokens[:, 1:].mT.unflatten(2, (8, 12)), found.pyramid[0])
    assert torch.equal(found.tokens[:, 0], found.pooled)
    assert one.pyramid[0].shape == (1, 64, 1, 1)


def test_positions_are_resized_and_the_class_tokens_own_is_kept():
    backbone = small()
    resized = backbone.embed.places((4, 16))
    assert resized.shape == (1, 1 + 64, 64)
    assert torch.equal(resized[:, 0], backbone.embed.positions[:, 0])
    assert backbone.embed.places((8, 8)) is backbone.embed.positions


def released(backbone: Adventurer) -> dict[str, Tensor]:
    """A state dict with the authors' names and shapes: those of the first block stand for the others."""
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
    state = {}
    for name, shape in keys.items():
        for block in range(len(backbone.blocks)) if "layers.0." in name else [0]:
            state[name.replace("layers.0.", f"layers.{block}.")] = torch.randn(shape)
    return state


def test_released_names_become_ours():
    torch.manual_seed(0)
    backbone = adventurer("tiny")
    state = released(backbone)
    found = published(state, backbone)
    backbone.load_state_dict(found)
    pairs = {
        "cls_token": "embed.class_token",
        "patch_embed.proj.bias": "embed.patches.bias",
        "norm_f.weight": "norm.weight",
        "layers.7.norm.weight": "blocks.7.norm1.weight",
        "layers.7.norm_mlp.weight": "blocks.7.norm2.weight",
        "layers.7.mixer.norm.weight": "blocks.7.mixer.norm.weight",
        "layers.11.mixer.A_log": "blocks.11.mixer.decay_log",
        "layers.0.mixer.D": "blocks.0.mixer.skip",
        "layers.3.mixer.dt_bias": "blocks.3.mixer.step_bias",
        "layers.3.mlp.w1.weight": "blocks.3.mlp.gate.weight",
        "layers.3.mlp.w2.weight": "blocks.3.mlp.value.weight",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    assert torch.equal(backbone.embed.positions[:, 0], state["pos_embed"][:, -1])  # their class token is the last
    assert torch.equal(backbone.embed.positions[:, 1:], state["pos_embed"][:, :-1])
    smaller = adventurer("tiny", image_size=(96, 64))
    resized = published(state, smaller)["embed.positions"]
    assert resized.shape == (1, 1 + 6 * 4, 256) and torch.equal(resized[:, 0], state["pos_embed"][:, -1])
    del state["layers.4.mixer.D"]
    with pytest.raises(ParityError, match=r"missing from it: blocks\.4\.mixer\.skip"):
        published(state, backbone)


def test_released_weights_are_loaded_from_a_file(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    plain = adventurer("tiny")
    state = released(plain)
    save_file(state, tmp_path / "tiny.safetensors")
    loaded: Any = adventurer("tiny", weights=str(tmp_path / "tiny.safetensors"))
    assert loaded.weights_info is not None
    assert torch.equal(loaded.blocks[5].mixer.project.weight, state["layers.5.mixer.in_proj.weight"])


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="flip_rule is 'second'; it can be released, alternate or none"):
        adventurer("nano", flip_rule="second")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="patch_size is 0; it must be at least 1"):
        adventurer("nano", patch_size=0)
    with pytest.raises(UsageError, match="dropout is 1"):
        adventurer("nano", dropout=1.0)
    with pytest.raises(UsageError, match="has no variant 'huge'"):
        adventurer("huge")


def test_drop_path_and_dropout_act_in_training_alone():
    backbone = small(drop_path=0.5, dropout=0.5)
    x = images((2, 3, 32, 32))
    torch.manual_seed(0)
    assert not torch.equal(backbone.train()(x).pooled, backbone(x).pooled)
    assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_variants_are_spelled_by_patch():
    assert {name for name in VARIANTS if name.endswith("_p1")} == {"tiny_p1", "small_p1", "base_p1"}
    with torch.device("meta"):
        assert len(Spec("adventurer/large").build().blocks) == 24  # type: ignore[arg-type]
