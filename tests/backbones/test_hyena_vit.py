"""Hyena ViT: parity with the authors' network in every order of mixers, their names, and behaviour."""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from vertebra.backbones.hyena_vit import hyena_vit, kinds, published
from vertebra.errors import UsageError
from vertebra.parity import check_golden, difference, fill, images, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "hyena_vit.json"

SMALL: dict[str, Any] = {"dim": 12, "heads": 2, "patch": 4, "image_size": 20, "kernel_width": 8}
CASES: dict[str, dict[str, Any]] = {
    "seq": {**SMALL, "depth": 3, "image_size": 28},
    "hyena_attention": {
        **SMALL,
        "depth": 5,
        "mixers": "hyena_attention",
        "kernel": "product",
        "directions": "4dir",
    },
    "attention_hyena": {
        **SMALL,
        "depth": 5,
        "mixers": "attention_hyena",
        "directions": "parallel",
        "window": "learnt",
    },
    "alternating": {**SMALL, "depth": 4, "mixers": "alternating"},
    "attention": {**SMALL, "depth": 2, "mixers": "attention"},
    "tiny": {},
}


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_authors_network(name):
    backbone = fill(hyena_vit("tiny", pooling="first", **CASES[name])).eval()
    expected = stored(GOLDEN, name)
    with torch.inference_mode():
        features = backbone(images(expected.shape))
    found = {"tokens": features.tokens, "first": features.pooled}
    assert max(check_golden(found, expected.golden).values()) < 1e-4


def authors() -> dict[str, torch.Tensor]:
    """The state that the authors' network of the hybrid has, on the meta device."""
    state = {}
    for name, (shape, *blocks) in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["tiny_hybrid"].items():
        for number in chain(*blocks) if blocks else ("",):
            state[name.replace("*", str(number))] = torch.empty(shape, device="meta")
    return state


def test_the_authors_names_become_ours():
    state = authors()
    with torch.device("meta"):
        backbone = hyena_vit("tiny_hybrid")
    found = published(state, backbone)
    assert found.keys() == backbone.state_dict().keys()
    hyena = {re.findall(r"\d+", name)[0] for name in state if "filter_fn" in name}
    assert hyena == {str(number) for number, kind in enumerate(kinds("hyena_attention", 12)) if kind == "hyena"}


def test_mean_of_all_tokens_is_the_default():
    backbone = hyena_vit("nano").eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, 32, 40)))
    assert features.tokens.shape == (2, 80, 96) and features.pyramid[0].shape == (2, 96, 8, 10)
    torch.testing.assert_close(features.pooled, features.tokens.mean(1))
    torch.testing.assert_close(features.pyramid[0].flatten(2).mT, features.tokens)


def test_the_first_token_sees_the_image_through_blocks_that_look_back_alone():
    """In blocks that look above and left it sees only what short convolutions carry to it."""
    x = images((1, 3, 32, 32)).double()
    changed = x.clone()
    changed[:, :, 24:, 24:] += 1
    moved = {}
    for directions in ("standard", "seq"):
        backbone = fill(hyena_vit("nano", depth=2, pooling="first", directions=directions)).double().eval()
        with torch.inference_mode():
            moved[directions] = bool((backbone(changed).pooled - backbone(x).pooled).abs().max() > 1e-10)
    assert moved == {"standard": False, "seq": True}


def test_even_and_odd_blocks_look_to_opposite_corners():
    nets: dict[str, Any] = {directions: hyena_vit("nano", directions=directions) for directions in ("seq", "4dir")}
    seen = {directions: [block.mixer.directions for block in net.blocks] for directions, net in nets.items()}
    assert seen == {"seq": ["seq", "standard", "seq", "standard"], "4dir": ["4dir"] * 4}


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [
        ("hyena", "HHHHH"),
        ("attention", "AAAAA"),
        ("hyena_attention", "HHHAA"),
        ("attention_hyena", "AAAHH"),
        ("alternating", "HAHAH"),
    ],
)
def test_orders_of_mixers(mixers, expected):
    assert "".join(kind[0].upper() for kind in kinds(mixers, 5)) == expected
    options: dict[str, Any] = {**SMALL, "depth": 5, "mixers": mixers}
    backbone: Any = hyena_vit(**options)
    assert "".join(type(block.mixer).__name__[0] for block in backbone.blocks) == expected


def test_tokens_row_after_row_as_one_sequence():
    backbone: Any = fill(hyena_vit("nano", axes=1)).eval()
    assert backbone.blocks[0].mixer.grid == (64,)
    with torch.inference_mode():
        features = backbone(images((2, 3, 32, 32)))
        assert difference(features.pooled, fill(hyena_vit("nano")).eval()(images((2, 3, 32, 32))).pooled) > 1e-3


def test_drop_path_acts_in_training_alone():
    torch.manual_seed(0)
    backbone = fill(hyena_vit("nano", drop_path=0.5))
    x = images((4, 3, 32, 32))
    with torch.no_grad():
        assert not torch.equal(backbone.train()(x).pooled, backbone(x).pooled)
        assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixers": "hyena2dattn"}, "mixers is 'hyena2dattn'"),
        ({"pooling": "token"}, "pooling is 'token'"),
        ({"axes": 3}, "axes is 3; it can be 1 or 2"),
        ({"depth": 0}, "depth is 0"),
        ({"windows": "none"}, "no option 'windows'; did you mean 'window'|no option 'windows'"),
        ({"heads": 5, "mixers": "attention"}, "5 heads do not divide dim"),
        ({"order": 1}, "order is 1"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        hyena_vit("nano", **options)
