"""T2T-ViT: parity with the authors' networks, their counts and names, any size, the effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones import t2t_vit as page
from vertebra.backbones.t2t_vit import effect, published, t2t_vit
from vertebra.blocks.positions import fitted, sinusoids
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "t2t_vit.json"
TINY = {"dim": 48, "depth": 2, "heads": 3, "ratio": 2.0, "hidden": 16}


def filled(network: nn.Module) -> nn.Module:
    """Filled, with keys near enough to each other that performers do not underflow; as the golden numbers were made."""
    with torch.no_grad():
        for module in fill(network).modules():
            if hasattr(module, "kqv"):
                module.kqv.weight.mul_(0.2)  # type: ignore[union-attr, operator]
                module.directions.mul_(5)  # type: ignore[union-attr, operator]
    return network.eval()


def check(network: nn.Module, name: str) -> float:
    reference = stored(GOLDEN, name)
    with torch.inference_mode():
        found = named(network(images(reference.shape)))
    return max(check_golden({key: found[key] for key in reference.golden}, reference.golden, 1e-5).values())


@pytest.mark.parametrize("mix", ["performer", "transformer"])
@pytest.mark.parametrize(("side", "built"), [(64, 64), (65, 65), (384, 224)])
def test_parity_with_the_authors_networks(mix, side, built):
    """At 384 pixels the table of 224 is resized, as theirs is when it is loaded."""
    assert check(filled(t2t_vit("14", mix=mix, image_size=built, **TINY)), f"{mix}_{side}") < 1e-5


def test_parity_of_a_whole_network():
    assert check(filled(t2t_vit("7")), "7") < 1e-5


@pytest.mark.parametrize("wrong", ["scale", "order", "shortcut", "heads"])
def test_what_is_easily_done_wrong_is_no_parity(wrong):
    options = TINY | {"scale": {"scale": 48**-0.5}, "heads": {"heads": 4}}.get(wrong, {})
    network = filled(t2t_vit("14", image_size=64, **options))
    attention = network.tokenizer.mixers[1].attn  # type: ignore[union-attr, index]
    with torch.no_grad():
        if wrong == "order":
            attention.kqv.weight.copy_(attention.kqv.weight.roll(16, 0))
        if wrong == "shortcut":
            attention.mixed = lambda kqv: (attention.__class__.mixed(attention, kqv)[0], kqv[..., :16])
    with pytest.raises(ParityError):
        check(network, "performer_64")


def authors(variant: str = "7") -> dict[str, Tensor]:
    """The authors' names and shapes, with numbers."""
    listed = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
    shapes = listed["7"]["outside"] | {
        f"blocks.{number}.{name}": shape
        for number in range(7)
        for name, shape in listed["7"]["each of 7 blocks"].items()
    }
    if variant == "t_14":
        shapes = {name: shape for name, shape in shapes.items() if "tokens_to_token" not in name}
        shapes |= {name: [256, *s[1:]] if ".project." in name else s for name, s in listed["t_14"]["tokenizer"].items()}
    return {name: images((np.prod(shape, dtype=int).item(),)).view(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("variant", "mix"), [("7", "performer"), ("t_14", "transformer")])
def test_released_names_become_ours(variant, mix):
    state, backbone = authors(variant), t2t_vit("7", mix=mix)
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found)
    assert torch.equal(found["blocks.3.mlp.2.weight"], state["blocks.3.mlp.fc2.weight"])
    assert torch.equal(found["tokenizer.mixers.0.norm1.weight"], state["tokens_to_token.attention1.norm1.weight"])
    if mix == "performer":
        assert torch.equal(found["tokenizer.mixers.1.attn.directions"], state["tokens_to_token.attention2.w"])
    again = published(backbone.state_dict(), backbone)  # ours stay ours
    assert all(torch.equal(tensor, found[name]) for name, tensor in again.items())
    del state["cls_token"]
    with pytest.raises(ParityError, match="missing from it: class_token"):
        published(state, backbone)


def test_a_released_table_fits_another_size():
    state, backbone = authors(), t2t_vit("7", image_size=(384, 256))
    found = published(state, backbone)
    assert found["positions"].shape == (1, 1 + 24 * 16, 256)
    assert torch.equal(found["positions"], fitted(state["pos_embed"], (14, 14), (24, 16), 1))


def test_positions_are_waves_that_nothing_trains():
    backbone = t2t_vit("nano")
    assert torch.equal(backbone.positions[0], sinusoids(65, 96)) and not backbone.positions.requires_grad
    backbone.requires_grad_(True)
    backbone(images((2, 3, 32, 32))).pooled.square().sum().backward()
    assert backbone.positions.grad is None and backbone.class_token.grad is not None


# of the authors' networks: what is trained, in millions
@pytest.mark.parametrize(
    ("variant", "trained"), [("7", 4.256), ("10", 5.835), ("12", 6.887), ("14", 21.466), ("19", 39.085), ("24", 64.001)]
)
def test_what_is_trained_has_the_authors_count(variant, trained):
    with torch.device("meta"):
        backbone = t2t_vit(variant)
    found = sum(p.numel() for p in backbone.parameters() if p.requires_grad) + 1000 * (backbone.width + 1)
    assert found / 1e6 == pytest.approx(trained, abs=6e-4)
    assert not any(name.endswith("attn.qkv.bias") for name in backbone.state_dict())


def test_tokens_start_with_the_pooled_one_and_end_as_the_last_map():
    backbone = filled(t2t_vit("nano"))
    with torch.inference_mode():
        found = backbone(images((2, 3, 40, 33)))
    assert found.tokens is not None and found.tokens.shape == (2, 1 + 10 * 9, 96)
    assert torch.equal(found.tokens[:, 0], found.pooled)
    assert torch.equal(found.tokens[:, 1:].mT.reshape(2, 96, 10, 9), found.pyramid[-1])


def test_scale_is_a_choice():
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        plain, same, other = (
            filled(t2t_vit("nano", **options))(x).pooled for options in ({}, {"scale": 32**-0.5}, {"scale": 96**-0.5})
        )
    assert torch.equal(plain, same) and difference(other, plain) > 1e-3


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="heads do not divide dim"):
        t2t_vit("nano", heads=5)
    with pytest.raises(UsageError, match="ratio is 0"):
        t2t_vit("nano", ratio=0)
    with pytest.raises(UsageError, match="sides of at least 3 pixels"):
        t2t_vit("7", image_size=2)
    with pytest.raises(UsageError, match="at least 3x3 pixels"):
        t2t_vit("14", image_size=64, **TINY)(torch.zeros(1, 3, 2, 40))


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_have_equal_parameters(scale):
    with torch.device("meta"):
        sizes = [page._trainable(page._arm(arm, page._SETTINGS[scale])) for arm in page._ARMS]
    assert max(sizes) / min(sizes) < 1.01


def test_effect_trains_its_arms(tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(16, 4, 8, 16, 1))
    small = effect("toy", read("digits"))
    assert set(small.arms) == {"vit", "t2t", "conv", "wide"} and small.baseline == "vit"
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("t2t", "conv")}
    assert found["t2t"]["nll"] != found["conv"]["nll"]
    assert all(set(small.metrics) == set(scores) and np.isfinite(scores["nll"]) for scores in found.values())


def test_effect_checks_what_the_row_asks():
    def holds(t2t: float, params: float) -> list[bool]:
        values = {arm: {"top1": np.array([50.0, 51.0]), "params": np.array([1.0, 1.0])} for arm in page._ARMS}
        values["t2t"] = {"top1": np.array([t2t, t2t + 1]), "params": np.array([params, params])}
        return [check.holds for check in page._checks(Measured(values))]

    assert holds(52.1, 1.02) == [True, True]
    assert holds(51.9, 1.04) == [False, False]
