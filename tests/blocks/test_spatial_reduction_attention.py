"""Spatial-reduction attention: the paper's arithmetic step by step, timm's layer, grids, padding, swap."""

import pytest
import torch
from timm.models.twins import GlobalSubSampleAttn
from torch import nn

from vertebra.blocks.attention import attention
from vertebra.blocks.spatial_reduction_attention import SpatialReductionAttention, spatial_reduction_attention
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def by_hand(block: SpatialReductionAttention, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """One image, head by head, with loops over the patches of the reduced map."""
    (height, width), reduction, rows = grid, block.reduction, []
    assert block.reduce is not None and block.norm is not None
    cells = x[block.prefix :].view(height, width, -1)
    for top in range(0, height, reduction):
        for left in range(0, width, reduction):
            patch = torch.zeros(reduction, reduction, x.shape[1], dtype=x.dtype)
            there = cells[top : top + reduction, left : left + reduction]
            patch[: there.shape[0], : there.shape[1]] = there
            rows.append(torch.einsum("hwc,ochw->o", patch, block.reduce.weight) + block.reduce.bias)
    fewer = block.norm(torch.stack(rows))
    read = torch.cat([x[: block.prefix], fewer])
    q, (k, v) = block.q(x), block.kv(read).chunk(2, 1)
    d = x.shape[1] // block.heads
    heads = []
    for head in range(block.heads):
        part = slice(head * d, head * d + d)
        heads.append((q[:, part] @ k[:, part].T / d**0.5).softmax(1) @ v[:, part])
    return block.proj(torch.cat(heads, 1))


@pytest.mark.parametrize(
    ("grid", "reduction", "prefix"), [((8, 8), 4, 0), ((7, 5), 2, 0), ((9, 4), 8, 1), ((2, 3), 4, 2)]
)
def test_is_the_papers_arithmetic(grid, reduction, prefix):
    block = fill(spatial_reduction_attention(24, heads=3, reduction=reduction, prefix=prefix)).double().eval()
    x = images((2, prefix + grid[0] * grid[1], 24)).double()
    with torch.inference_mode():
        expected = torch.stack([by_hand(block, each, grid) for each in x])
        assert difference(block(x, grid), expected) < 1e-12


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_parity_with_timms_layer(reduction):
    """Twins' global attention is PVT's: the same names but one."""
    ours = fill(spatial_reduction_attention(32, heads=4, reduction=reduction)).eval()
    theirs = GlobalSubSampleAttn(32, num_heads=4, sr_ratio=reduction).eval()
    state = {name.replace("reduce.", "sr."): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x = images((2, 96, 32))
    with torch.inference_mode():
        assert difference(ours(x, (8, 12)), theirs(x, (8, 12))) < 1e-6


def test_without_reduction_it_is_attention():
    block, plain = fill(spatial_reduction_attention(32, heads=2, reduction=1)).eval(), attention(32, heads=2).eval()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([block.q.weight, block.kv.weight]))
        plain.qkv.bias.copy_(torch.cat([block.q.bias, block.kv.bias]))
        plain.proj.load_state_dict(block.proj.state_dict())
    x = images((2, 19, 32))  # of no square map: nothing is reduced, so that it does not matter
    assert block.reduce is None
    with torch.inference_mode():
        assert difference(block(x), plain(x)) < 1e-6


def test_keys_are_fewer_by_the_square_of_the_reduction():
    block, seen = spatial_reduction_attention(16, reduction=8).eval(), []
    block.kv.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    block(torch.randn(1, 4096, 16))
    block(torch.randn(1, 9 * 17, 16), (9, 17))
    assert seen == [(1, 64, 32), (1, 6, 32)]  # 2 x 3 patches, the last ones padded


def test_weights_are_dropped_in_training_alone():
    block, x = fill(spatial_reduction_attention(16, drop=0.5)), images((2, 16, 16))
    torch.manual_seed(0)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_wrong_options_and_tokens_are_refused():
    for options, message in [
        ({"heads": 3}, "3 heads do not divide dim 16"),
        ({"reduction": 0}, "reduction 0"),
        ({"heads": 0}, "heads 0"),
        ({"prefix": -1}, "prefix -1"),
        ({"drop": 1.0}, "drop 1.0"),
    ]:
        with pytest.raises(UsageError, match=message):
            spatial_reduction_attention(16, **options)
    block = spatial_reduction_attention(16)
    with pytest.raises(UsageError, match=r"50 tokens are not 0 and a square map; .* prefix="):
        block(torch.zeros(1, 50, 16))
    with pytest.raises(UsageError, match="a map of 7 x 8"):
        block(torch.zeros(1, 49, 16), (7, 8))
    with pytest.raises(UsageError, match="1 tokens are not 1 and a square map"):
        spatial_reduction_attention(16, prefix=1)(torch.zeros(1, 1, 16))


def test_swap_in_a_vit_and_in_twins():
    vit = Spec("timm/vit_tiny_patch16_224", {"image_size": 64, "network": {"depth": 2}}).build().eval()
    operated = swap(vit, "Attention", "spatial_reduction_attention", heads=3, reduction=2, prefix=1)
    assert operated.changed == ("network.blocks.0.attn", "network.blocks.1.attn")
    more = 2 * (192 * 192 * 4 + 192 + 2 * 192)  # convolution and norm
    assert operated.after.params - operated.before.params == more
    with torch.inference_mode():
        assert operated.model(images((2, 3, 64, 64))).pooled.isfinite().all()
    twins = Spec("timm/twins_pcpvt_small", {"image_size": 64, "network": {"depths": (1, 1, 1, 1)}}).build().eval()
    layers = {name: layer for name, layer in twins.named_modules() if isinstance(layer, GlobalSubSampleAttn)}

    def make(layer: nn.Module) -> nn.Module:  # the same layer, with its weights
        block = spatial_reduction_attention(layer.dim, heads=layer.num_heads, reduction=layer.sr_ratio)
        block.load_state_dict({name.replace("sr.", "reduce."): t for name, t in layer.state_dict().items()})
        return block

    batch = images((2, 3, 64, 96))
    swapped = swap(twins, GlobalSubSampleAttn, make)
    assert set(swapped.changed) == set(layers) and len(layers) == 4
    with torch.inference_mode():
        assert difference(swapped.model(batch).pooled, twins(batch).pooled) < 1e-5
