"""Every backbone keeps the contract: all pages by discovery, and one network of each of timm's modules.

Shapes are checked on the meta device; what needs real numbers is checked on tiny networks.
"""

import copy

import pytest
import torch
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.contracts import Backbone
from vertebra.errors import UsageError
from vertebra.paper import pages
from vertebra.spec import Spec

# The smallest or quickest network of each of timm's modules, with an image side where the network's own is costly.
NAMES = """
    beit_base_patch16_224 halonet_h1 gernet_s cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
    deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
    hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
    levit_128s lowformer_b0 test_mambaout test_maxvit poolformerv2_s12 gmlp_ti16_224 fbnetv3_b mobilenetv5_base
    mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet
    pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50
    resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s:32 shvit_s1 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
"""
SMALLEST = NAMES.split()
REFUSED = {"gemma4_vit_167m": "reads values in its forward pass"}
PAGES = [page.name for page in pages() if page.kind == "backbones"]


def assert_keeps_contract(backbone: Backbone, device: str = "meta") -> None:
    size, channels = backbone.preprocess.size, backbone.preprocess.channels
    with torch.no_grad():
        pyramid, pooled, tokens = backbone.eval()(torch.zeros(2, channels, *size, device=device))
    assert len(pyramid) == len(backbone.levels) >= 1
    assert pooled.shape == (2, backbone.width)
    if tokens is not None:
        cells = pyramid[-1][0, 0].numel()
        assert tokens.ndim == 3 and tokens.shape[2] == backbone.width
        assert tokens.shape[1] == cells + len(backbone.special_tokens(tokens.shape[1], cells))
    strides = [level.stride for level in backbone.levels]
    assert strides == sorted(set(strides))
    for level, feature in zip(backbone.levels, pyramid, strict=True):
        assert feature.shape[:2] == (2, level.channels)
        # unpadded convolutions shrink maps, rounding up widens them: a quarter of an octave at most
        assert size[0] / feature.shape[2] == pytest.approx(level.stride, rel=0.19)
        assert size[1] / feature.shape[3] == pytest.approx(level.stride, rel=0.19)
    assert_trunk_covers(backbone)


def assert_trunk_covers(backbone: Backbone) -> None:
    parts = list(backbone.trunk())
    inside = [parameter for part in parts for parameter in part.parameters()]
    assert len(inside) == len(set(inside)), "a parameter is in two parts"
    assert all(next(part.parameters(), None) is not None for part in parts)
    names = {module: name for name, module in backbone.named_modules()}
    places = [names[part] for part in parts]
    for name, parameter in backbone.named_parameters():
        if parameter not in set(inside):  # only what stands above the parts, such as a position table
            owner = name.rpartition(".")[0]  # "" is the backbone itself
            assert any(place.startswith(f"{owner}." if owner else "") for place in places), f"{name} is in no part"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_keeps_the_contract(page):
    with torch.device("meta"):
        assert_keeps_contract(Spec(page).build())


@pytest.mark.parametrize("name", SMALLEST)
def test_a_network_of_each_module_of_timm_keeps_the_contract(name):
    name, _, side = name.partition(":")
    with torch.device("meta"):
        assert_keeps_contract(timm(name, image_size=int(side) if side else None))


def test_nearly_all_of_timms_modules_are_covered():
    from timm.models import list_models, model_entrypoint

    modules = {model_entrypoint(name).__module__ for name in list_models()}
    covered = {model_entrypoint(name.partition(":")[0]).__module__ for name in SMALLEST}
    refused = {model_entrypoint(name).__module__ for name in REFUSED}
    assert modules - covered - refused == set(), "timm has a new module: add its smallest network"
    assert len(covered) >= 0.95 * len(modules)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_by_name(name):
    with pytest.raises(UsageError, match=name):
        timm(name)


# Tiny networks with real numbers, one of each kind; 33 and 47 are odd and not square.
TINY = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"]


@pytest.fixture(params=TINY)
def tiny(request) -> Backbone:
    torch.manual_seed(0)
    return timm(request.param)


@pytest.mark.parametrize("size", [(33, 47), (64, 49)])
def test_odd_sizes(tiny, size):
    features = tiny.eval()(torch.rand(2, 3, *size))
    for level, feature in zip(tiny.levels, features.pyramid, strict=True):
        assert feature.shape[1] == level.channels
        assert all(abs(side / level.stride - cells) < 1 for side, cells in zip(size, feature.shape[2:], strict=True))
    assert features.pooled.shape == (2, tiny.width)


def test_gradients_reach_every_part(tiny):
    features = tiny.train()(torch.rand(4, 3, 64, 64))
    (features.pooled.square().sum() + sum(feature.square().mean() for feature in features.pyramid)).backward()
    for part in tiny.trunk():
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_state_dict_round_trip(tiny):
    other = timm(tiny.name).eval()
    images = torch.rand(1, 3, 64, 64)
    assert not torch.equal(other(images).pooled, tiny.eval()(images).pooled)
    other.load_state_dict(tiny.state_dict())
    assert torch.equal(other(images).pooled, tiny(images).pooled)


def test_deep_copies_are_independent(tiny):
    twin = copy.deepcopy(tiny).eval()
    images = torch.rand(1, 3, 64, 64)
    before = twin(images).pooled
    nn.init.zeros_(next(tiny.parameters()))
    assert torch.equal(twin(images).pooled, before)


def test_bfloat16_stays_near_float32(tiny):
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        exact = tiny.eval()(images).pooled
        rough = tiny.to(torch.bfloat16)(images.to(torch.bfloat16)).pooled
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float()).min() > 0.99


def test_channels_last_gives_the_same_numbers(tiny):
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        plain = tiny.eval()(images)
        last = tiny.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last.pooled, plain.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.pyramid, plain.pyramid, rtol=1e-4, atol=1e-5)


def test_forward_is_one_graph(tiny):
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = tiny.eval()(images)
    exported = torch.export.export(tiny, (images,)).module()
    torch.testing.assert_close(exported(images).pooled, expected.pooled, rtol=1e-4, atol=1e-5)
