"""The adapter changes nothing: with timm's own weights it yields timm's own features, at odd sizes too."""

import pytest
import torch
from timm import create_model

from vertebra.spec import Spec

# address, timm's name, (height, width), what timm itself must be told to take that size
CASES = [
    ("convnext/atto", "convnext_atto", (65, 47), {}),
    ("crossvit/9", "crossvit_9_240", (240, 240), {}),
    ("dpn/48b", "dpn48b", (65, 47), {}),
    ("efficientnet/b0", "tf_efficientnet_b0", (65, 47), {}),
    ("fast_scaling/500mf", "regnetz_005", (65, 47), {}),
    ("inception_v4/v4", "inception_v4", (97, 79), {}),
    ("maxvit/tiny", "maxvit_tiny_tf_224", (32, 64), {"img_size": (32, 64)}),
    ("nf_resnet/regnet_b0", "nf_regnet_b0", (65, 47), {}),
    ("preact_resnet/18", "resnetv2_18", (65, 47), {}),
    ("res2net/50_26w_4s", "res2net50_26w_4s", (65, 47), {}),
    ("resnet_rs/50", "resnetrs50", (65, 47), {}),
    ("resnext/50_32x4d", "resnext50_32x4d", (65, 47), {}),
    ("swin/tiny", "swin_tiny_patch4_window7_224", (36, 60), {"strict_img_size": False}),
]


@pytest.mark.parametrize(("address", "name", "size", "told"), CASES, ids=[case[0] for case in CASES])
def test_features_are_timms_own(address, name, size, told):
    torch.manual_seed(0)
    theirs = create_model(name, num_classes=0, **told).eval()
    ours = Spec(address, {"image_size": size} if "img_size" in told else {}).build().eval()
    ours.network.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        final = theirs.forward_features(images)
        pooled = theirs.forward_head(final, pre_logits=True)
        features = ours(images)
        _, maps = theirs.forward_intermediates(images)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-4)
    deepest = next(feature for feature in reversed(maps) if feature.shape == features.pyramid[-1].shape)
    torch.testing.assert_close(features.pyramid[-1], deepest, rtol=1e-4, atol=1e-4)


def test_plain_networks_yield_their_final_normalised_map():
    theirs = create_model("test_vit", num_classes=0).eval()
    ours = Spec("timm/test_vit").build().eval()
    ours.network.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 160, 160)
    with torch.inference_mode():
        final = theirs.forward_features(images)
        features = ours(images)
    torch.testing.assert_close(features.tokens, final)
    torch.testing.assert_close(features.pyramid[0], final[:, 1:].mT.unflatten(2, (10, 10)))


def test_nasnet_on_the_meta_device():
    """85 million parameters are too many for a quick test: the same modules in the same order must do."""
    with torch.device("meta"):
        theirs = create_model("nasnetalarge", num_classes=0)
        ours = Spec("nasnet/large").build()
    assert {k: v.shape for k, v in ours.network.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert [level.channels for level in ours.levels] == [entry["num_chs"] for entry in theirs.feature_info]
