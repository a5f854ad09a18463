"""Attention against its formula, with bias, masks, groups and rotations."""

import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.layers.pos_embed_sincos import apply_rot_embed
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.blocks.attention import attend, attention
from vertebra.blocks.positions import RelativeBias, fitted, rotated, sinusoids
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.surgery.swap import swap


def formula(q, k, v, bias=None, mask=None, scale=None):
    """The same in plain products; q, k, v (..., heads, N, d)."""
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else logits.masked_fill(~mask.unsqueeze(-3), float("-inf"))
    return (logits.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


@pytest.mark.parametrize("groups", [(), (5,)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attend_is_its_formula(groups, masked, biased, scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *groups, 3, 7, d, dtype=torch.float64) for d in (4, 4, 6))
    bias = torch.randn(3, 7, 7, dtype=torch.float64) if biased else None
    mask = (torch.rand(*groups, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool) if masked else None
    found = attend(q, k, v, bias=bias, mask=mask, scale=scale)
    assert found.shape == (2, *groups, 7, 18)
    torch.testing.assert_close(found, formula(q, k, v, bias, mask, scale))


@pytest.mark.parametrize(("shape", "each"), [((2, 3, 10, 8), False), ((2, 3, 10, 8), True), ((2, 4, 3, 10, 8), False)])
def test_a_learnt_bias_has_the_gradients_of_torchs(shape, each):
    """One for all, with groups or without, or one for each image; torch's fused kernels know neither gradient."""
    q, k, v = images((3, *shape)).double().requires_grad_(True).unbind()
    bias = images(((shape[0], 3) if each else (3,)) + (10, 10)).double().requires_grad_(True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(-3, -2).flatten(-2)
    weights = images(tuple(expected.shape)).double()
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v, bias))
    found = attend(q, k, v, bias=bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), (q, k, v, bias)), wanted)


def test_it_is_timms_attention():
    theirs = fill(TimmAttention(24, num_heads=3, qkv_bias=True)).eval()
    mine = attention(24, heads=3).eval()
    mine.load_state_dict(theirs.state_dict())
    x = images((2, 10, 24))
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-6)
    bias = images((3, 10, 10))
    torch.testing.assert_close(mine(x, bias), theirs(x, attn_mask=bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine(x[:, None]), theirs(x)[:, None], rtol=1e-5, atol=1e-6)


def test_rotations_tell_only_differences_of_places():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 8, dtype=torch.float64)
    angles = torch.arange(9)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)
    near = rotated(q, angles[:5]) @ rotated(k, angles[:5]).mT
    far = rotated(q, angles[4:]) @ rotated(k, angles[4:]).mT
    torch.testing.assert_close(near, far)
    doubled = angles[:5].repeat_interleave(2, -1)
    torch.testing.assert_close(rotated(q, angles[:5]), apply_rot_embed(q, doubled.sin(), doubled.cos()))


def test_rotations_by_complex_numbers_and_by_sines_are_one(monkeypatch):
    x, angles = images((2, 7, 3, 8)), images((7, 1, 4))
    found, rough = rotated(x, angles), rotated(x.bfloat16(), angles)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), found, rtol=0.02, atol=0.02)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotated(x, angles), found, rtol=1e-5, atol=1e-6)


def test_rotated_attention_moves_with_its_tokens():
    layer = fill(attention(16, heads=2)).eval()
    x, angles = images((1, 6, 16)), torch.arange(6)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    assert not torch.allclose(layer(x, angles=angles), layer(x), atol=1e-3)
    torch.testing.assert_close(layer(x, angles=angles + 3.0), layer(x, angles=angles), rtol=1e-4, atol=1e-5)


def test_sinusoids_are_the_papers():
    table = sinusoids(50, 6)
    assert table.shape == (50, 6)
    place, pair = 7, 2
    angle = torch.tensor(place / 10000 ** (2 * pair / 6))
    torch.testing.assert_close(table[place, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()]))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_learned_positions_fit_another_grid(mode):
    table = images((1, 2 + 12, 5))
    found = fitted(table, (3, 4), (6, 5), 2, mode=mode)
    cells = table[:, 2:].mT.unflatten(2, (3, 4))
    wanted = torch.nn.functional.interpolate(cells, (6, 5), mode=mode, align_corners=False)
    torch.testing.assert_close(found[:, 2:], wanted.flatten(2).mT)
    assert torch.equal(found[:, :2], table[:, :2]) and fitted(table, (3, 4), (3, 4), 2) is table
    smaller = [fitted(table, (3, 4), (2, 2), 2, smooth=smooth) for smooth in (False, True)]
    assert smaller[0].shape == (1, 6, 5) and not torch.allclose(*smaller)


def test_a_relative_bias_depends_on_the_offset_alone():
    bias = RelativeBias(2, (3, 4))
    found = bias().view(2, 3, 4, 3, 4)
    assert found.shape == (2, 3, 4, 3, 4)
    torch.testing.assert_close(found[:, 0, 0, 1, 2], found[:, 1, 1, 2, 3])
    assert not torch.equal(found[:, 0, 0, 1, 2], found[:, 1, 2, 0, 0])
    assert bias((5, 5)).shape == (2, 25, 25) and torch.equal(bias((3, 4)), bias())


def test_swaps_into_a_vit():
    vit = timm("vit_tiny_patch16_224", image_size=64, network={"depth": 2})
    operated = swap(vit, "Attention", "attention", heads=3)
    assert len(operated.changed) == 2
    assert operated.before == operated.after
    assert isinstance(operated.model.get_submodule(operated.changed[0]).qkv, nn.Linear)


def test_heads_must_divide():
    with pytest.raises(UsageError, match="5 heads do not divide dim 16"):
        attention(16, heads=5)
    assert attention(16, heads=5, head_dim=4)(images((1, 3, 16))).shape == (1, 3, 16)
