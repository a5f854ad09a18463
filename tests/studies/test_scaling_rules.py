"""Scaling any backbone that declares its stages: what is read, what is built, what the law leaves out."""

import pytest
import torch

from vertebra.errors import UsageError
from vertebra.spec import Spec
from vertebra.studies.scaling_rules import outside_law, scale_backbone
from vertebra.training.cost import count

CASES = [
    ("timm/convnext_atto", "dwr", {"depths": (3, 3, 10, 3), "dims": (48, 104, 200, 400), "image_size": (284, 284)}),
    ("timm/vit_tiny_patch16_224", "w", {"num_heads": 6, "embed_dim": 384}),
    ("timm/swin_tiny_patch4_window7_224", "d", {"depths": (8, 8, 24, 8)}),
    ("lsnet/t", "d1_w8_r1", {"depths": (0, 2, 9, 11), "dims": (112, 224, 448, 672), "image_size": (240, 240)}),
]


@pytest.mark.parametrize(("address", "strategy", "expected"), CASES, ids=lambda case: str(case)[:24])
def test_scales_what_a_backbone_declares(address, strategy, expected):
    with torch.device("meta"):
        found = scale_backbone(address, 4, strategy)
        again = found.spec.build()
    assert {name: after for name, (_, after) in found.changed.items()} == expected
    assert found.after == count(again)
    inside = [cost.macs - outside for cost, outside in zip((found.before, found.after), found.outside, strict=True)]
    assert inside[1] / inside[0] == pytest.approx(4, rel=0.12)


def test_products_between_tokens_are_outside_the_law():
    with torch.device("meta"):
        small = Spec("timm/vit_tiny_patch16_224").build()
        found = scale_backbone("timm/vit_tiny_patch16_224", 4, "r")
    tokens, blocks, dim = 197, 12, 192
    assert outside_law(small) == found.outside[0] == 2 * blocks * tokens**2 * dim
    assert found.outside[1] == 2 * blocks * (28**2 + 1) ** 2 * dim  # sixteen times, not four
    with torch.device("meta"):
        assert outside_law(Spec("timm/convnext_atto").build()) == 0


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("hornet/tiny_7x7", {}, "declares none of depths"),
        ("timm/resnet18", {}, "declares none of depths"),
        ("sk_resnet/50_1x", {}, "no channels"),
        ("fast_scaling/en_b0", {}, "the paper's scaler"),
        ("timm/vit_tiny_patch16_224", {"strategy": "q"}, "dwgr"),
        ("timm/vit_tiny_patch16_224", {"scale": -1}, "above 0"),
    ],
)
def test_refuses_what_is_not_declared(address, options, message):
    with pytest.raises(UsageError, match=message):
        scale_backbone(address, **{"scale": 4, **options})


def test_an_option_declares_what_the_page_keeps():
    with torch.device("meta"):
        found = scale_backbone("hornet/nano", 4, "d1_w2", depths=(1, 1, 3, 1))
    assert found.changed == {"depths": ((1, 1, 3, 1), (2, 2, 5, 2)), "width": (24, 40)}
