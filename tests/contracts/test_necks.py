"""The contract of a neck, over every one that is found, on backbones of every family and on pyramids of odd sizes."""

import copy

import pytest
import torch
from torch import Tensor

from vertebra.backbones.timm import timm
from vertebra.contracts import Level, Neck
from vertebra.spec import Spec, addresses

NECKS = addresses("necks")
FAMILIES = [
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_maxvit",
    "test_mambaout",
    "test_vit",  # one level
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "dpn48b",
    "ese_vovnet19b_slim_dw",
    "xcit_nano_12_p8_224",  # one level
]
LEVELS = (Level(8, 4), Level(12, 8), Level(16, 16), Level(24, 32))
SIZES = ((225, 193), (224, 224), (64, 96))


def _neck(address: str, levels: tuple[Level, ...] = LEVELS) -> Neck:
    torch.manual_seed(0)
    return Spec(address, {"channels": 32}, kind="necks").build(levels)


def _pyramid(size: tuple[int, int], levels: tuple[Level, ...] = LEVELS, batch: int = 2) -> tuple[Tensor, ...]:
    """Maps as padded convolutions make them: sizes round up."""
    generator = torch.Generator().manual_seed(1)
    sides = [[-(-side // level.stride) for side in size] for level in levels]
    return tuple(torch.randn(batch, lv.channels, *s, generator=generator) for lv, s in zip(levels, sides, strict=True))


def _assert_kept(neck: Neck, out: tuple[Tensor, ...], size: tuple[int, int], batch: int) -> None:
    assert len(out) == len(neck.levels) >= 1
    strides = [level.stride for level in neck.levels]
    assert strides == sorted(set(strides))
    for level, x in zip(neck.levels, out, strict=True):
        assert x.shape[:2] == (batch, level.channels)
        # a map is a cell larger or smaller where convolutions round or do not pad
        assert all(abs(cells - side / level.stride) <= 1 for cells, side in zip(x.shape[2:], size, strict=True))


def test_some_necks_are_found() -> None:
    assert "fpn" in NECKS


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("address", NECKS)
def test_a_neck_takes_any_backbones_pyramid(address: str, name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = timm(name).eval()
        neck = _neck(address, backbone.levels).eval()
        size = backbone.preprocess.size
        _assert_kept(neck, neck(backbone(torch.zeros(2, 3, *size)).pyramid), size, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("address", NECKS)
def test_odd_sizes(address: str, size: tuple[int, int]) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid(size)
    with torch.no_grad():
        out = neck(pyramid)
    _assert_kept(neck, out, size, 2)
    assert all(torch.isfinite(x).all() for x in out)


@pytest.mark.parametrize("address", NECKS)
def test_a_backbones_own_odd_maps(address: str) -> None:
    backbone = timm("test_resnet").eval()
    neck = _neck(address, backbone.levels).eval()
    with torch.no_grad():
        _assert_kept(neck, neck(backbone(torch.rand(1, 3, 225, 193)).pyramid), (225, 193), 1)


@pytest.mark.parametrize("levels", [LEVELS[:1], LEVELS[1:3], LEVELS])
@pytest.mark.parametrize("address", NECKS)
def test_gradients_reach_every_parameter_and_every_map(address: str, levels: tuple[Level, ...]) -> None:
    neck = _neck(address, levels).train()
    pyramid = tuple(x.requires_grad_() for x in _pyramid((97, 65), levels))
    generator = torch.Generator().manual_seed(2)
    # a random projection: a plain sum would be flat after a norm
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in neck(pyramid)).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in pyramid)


@pytest.mark.parametrize("address", NECKS)
def test_images_of_a_batch_do_not_see_each_other(address: str) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid((97, 65))
    with torch.no_grad():
        both, one = neck(pyramid), neck(tuple(x[1:] for x in pyramid))
    torch.testing.assert_close(tuple(x[1:] for x in both), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("address", NECKS)
def test_the_maps_that_come_in_stay_as_they_are(address: str) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid((64, 96))
    before = tuple(x.clone() for x in pyramid)
    with torch.no_grad():
        neck(pyramid)
    assert all(torch.equal(x, y) for x, y in zip(pyramid, before, strict=True))


@pytest.mark.parametrize("address", NECKS)
def test_bfloat16_stays_near_float32(address: str) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid((64, 96))
    with torch.no_grad():
        exact = neck(pyramid)
        rough = copy.deepcopy(neck).to(torch.bfloat16)(tuple(x.to(torch.bfloat16) for x in pyramid))
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("address", NECKS)
def test_channels_last_gives_the_same_numbers(address: str) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid((97, 65))
    with torch.no_grad():
        plain = neck(pyramid)
        last = neck.to(memory_format=torch.channels_last)(
            tuple(x.contiguous(memory_format=torch.channels_last) for x in pyramid)
        )
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("address", NECKS)
def test_a_neck_exports_as_one_graph(address: str) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid((97, 65))
    with torch.no_grad():
        expected = neck(pyramid)
        exported = torch.export.export(neck, (pyramid,)).module()
        torch.testing.assert_close(exported(pyramid), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("address", NECKS)
def test_state_dict_round_trip(address: str) -> None:
    neck, pyramid = _neck(address).eval(), _pyramid((64, 96))
    torch.manual_seed(9)
    other = Spec(address, {"channels": 32}, kind="necks").build(LEVELS).eval()
    with torch.no_grad():
        expected = neck(pyramid)
        assert not all(torch.equal(x, y) for x, y in zip(other(pyramid), expected, strict=True))
        other.load_state_dict(neck.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(other(pyramid), expected, strict=True))
