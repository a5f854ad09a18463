import numpy as np
import pytest
import torch

import vertebra as vb
from vertebra.backbones.timm import preprocess_of, timm
from vertebra.contracts import Level
from vertebra.errors import UsageError


def meta(name, **options):
    with torch.device("meta"):
        return timm(name, **options)


def trunk_names(backbone):
    names = {module: name.removeprefix("network.") for name, module in backbone.named_modules()}
    return [names[part] for part in backbone.trunk()]


def test_levels_are_the_deepest_map_of_each_stride():
    backbone = meta("efficientnet_b0")
    assert backbone.levels == (Level(16, 2), Level(24, 4), Level(40, 8), Level(112, 16), Level(320, 32))
    assert backbone.width == 1280


def test_crossvit_has_two_token_maps_and_joins_its_class_tokens():
    backbone = meta("crossvit_tiny_240")
    assert backbone.levels == (Level(96, 12), Level(192, 16))
    assert backbone.width == 96 + 192
    assert backbone(torch.empty(1, 3, 240, 240, device="meta")).tokens is None


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("inception_v4", (2, 4, 8, 16, 32)),  # 299 pixels and unpadded convolutions: no ratio is whole
        ("levit_128s", (16, 32, 64)),  # 224 / 4 is 56
        ("vit_small_patch14_dinov2", (14,)),
        ("convmixer_768_32", (7,)),
    ],
)
def test_strides_are_nominal(name, levels):
    assert tuple(level.stride for level in meta(name).levels) == levels


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("resnet18", ["conv1", "bn1", "layer1.0", "layer1.1"], ["layer4.0", "layer4.1"]),
        ("convnext_atto", ["stem.0", "stem.1", "stages.0.blocks.0"], ["stages.3.blocks.1", "head"]),
        ("swin_tiny_patch4_window7_224", ["patch_embed", "layers.0.blocks.0"], ["layers.3.blocks.1", "norm"]),
        ("vit_tiny_patch16_224", ["patch_embed", "blocks.0", "blocks.1"], ["blocks.11", "norm"]),
        ("efficientnet_b0", ["conv_stem", "bn1", "blocks.0.0"], ["blocks.6.0", "conv_head", "bn2"]),
        ("twins_svt_small", ["patch_embeds.0", "blocks.0.0", "pos_block.0", "blocks.0.1"], ["blocks.3.3", "norm"]),
    ],
)
def test_trunk_is_in_signal_order(name, first, last):
    names = trunk_names(meta(name))
    assert names[: len(first)] == first
    assert names[-len(last) :] == last


def test_trunk_of_crossvit_interleaves_its_branches():
    names = trunk_names(meta("crossvit_tiny_240"))
    assert names[:2] == ["patch_embed.0", "patch_embed.1"]
    assert names[-2:] == ["norm.0", "norm.1"]
    order = [name for name in names if name.startswith("blocks.0.")]
    assert order.index("blocks.0.blocks.0.0") < order.index("blocks.0.blocks.1.3") < order.index("blocks.0.fusion.0")


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels(channels):
    backbone = timm("test_resnet", channels=channels).eval()
    assert backbone.preprocess.channels == channels
    assert backbone(torch.rand(1, channels, 32, 32)).pooled.shape == (1, backbone.width)


def test_statistics_follow_the_channels():
    config = {"input_size": (3, 32, 32), "mean": (0.3, 0.4, 0.5), "std": (0.1, 0.2, 0.3)}
    assert preprocess_of(config, 1).mean == (pytest.approx(0.4),)
    assert preprocess_of(config, 4).std == (0.1, 0.2, 0.3, 0.1)
    assert preprocess_of(config, 3, (48, 64)).size == (48, 64)


def test_preprocess_is_that_of_the_pretrained_configuration():
    preprocess = meta("vit_base_patch16_siglip_224").preprocess
    assert (preprocess.mean, preprocess.std, preprocess.fit) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "crop")
    squashed = meta("convnext_tiny.in12k_ft_in1k_384", weights="random").preprocess
    assert (squashed.size, squashed.crop, squashed.fit) == ((384, 384), 1.0, "squash")


def test_a_tag_has_its_own_preprocess():
    with torch.device("meta"):
        crops = {tag: timm(f"resnet50.{tag}", weights="random").preprocess.crop for tag in ("a1_in1k", "tv_in1k")}
    assert crops == {"a1_in1k": 0.95, "tv_in1k": 0.875}


def test_image_size_builds_fixed_networks_for_it():
    backbone = timm("gmlp_ti16_224", image_size=(32, 48)).eval()
    assert backbone.preprocess.size == (32, 48)
    assert backbone(torch.rand(1, 3, 32, 48)).pyramid[0].shape == (1, 128, 2, 3)


def test_transformers_take_any_size_at_once():
    backbone = timm("test_vit").eval()
    assert backbone(torch.rand(1, 3, 64, 96)).pyramid[0].shape == (1, 64, 4, 6)
    assert backbone(torch.rand(1, 3, 33, 47)).pyramid[0].shape == (1, 64, 3, 3)


def test_drop_path_reaches_the_blocks_and_defaults_to_none():
    def rates(backbone):
        return [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]

    assert rates(meta("test_convnext")) == []
    assert max(rates(meta("test_convnext", drop_path=0.3))) == pytest.approx(0.3)


def test_random_weights_follow_the_seed_and_only_it():
    def first(seed):
        torch.manual_seed(seed)
        return next(timm("test_vit_relpos").parameters()).detach().clone()

    assert torch.equal(first(1), first(1))  # the first call measures, the second finds it measured
    assert not torch.equal(first(1), first(2))


def test_compiled_forward_is_the_same():
    backbone = timm("test_convnext").eval()
    images = torch.rand(1, 3, 32, 32)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    with torch.no_grad():
        np.testing.assert_allclose(compiled(images).pooled.numpy(), backbone(images).pooled.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet_18", {}, "did you mean"),
        ("resnet18.a1_in22k", {}, "has no tag 'a1_in22k'; did you mean a1_in1k"),
        ("test_resnet", {"channels": 0}, "channels is 0; it must be at least 1"),
        ("test_resnet", {"drop_path": 1.5}, "drop_path is 1.5"),
        ("vgg11", {"drop_path": 0.1}, "no stochastic depth"),
        ("test_resnet", {"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\)"),
        ("test_resnet", {"network": {"num_classes": 3}}, "a backbone has no classes"),
        ("mobilenetv2_100", {"network": {"pad_typ": "same"}}, "does not take pad_typ='same'; did you mean pad_type"),
        ("test_maxvit", {"image_size": 150}, "150x150.*nearest size that works is 160x160"),
        ("nest_tiny", {"image_size": (224, 256)}, "nearest size that works is 256x256"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(name, options, words):
    with pytest.raises(UsageError, match=words):
        timm(name, **options)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "gmlp_ti16_224",
            (1, 3, 64, 64),
            r"images of 224x224 pixels and got 64x64; build it with image_size=\(64, 64\)",
        ),
        ("test_resnet", (1, 1, 64, 64), r"takes images \(B, 3, H, W\) and got \(1, 1, 64, 64\).*channels="),
        ("test_resnet", (3, 64, 64), "takes images"),
        ("tresnet_m", (1, 3, 65, 64), "got 65x64; the nearest size that works is 68x64"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_the_remedy(name, shape, words):
    backbone = meta(name)
    with pytest.raises(UsageError, match=words):
        backbone.eval()(torch.empty(shape, device="meta"))


def test_errors_that_are_not_about_the_shape_pass_through():
    backbone = timm("test_resnet").eval()
    with pytest.raises(RuntimeError, match="type"):
        backbone(torch.zeros(1, 3, 32, 32, dtype=torch.int64))


def test_pages_are_checked_like_timm():
    with pytest.raises(UsageError, match="has no option 'weight'; did you mean weights"):
        vb.backbone("swin/tiny", weight="pretrained")
    from vertebra.backbones.swin import swin

    with pytest.raises(UsageError, match="swin has no variant 'tinny'; did you mean tiny"):
        swin("tinny")
