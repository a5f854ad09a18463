"""SAM: the authors' arithmetic, the order of the heads, forms that agree, the fused block, options, a swap."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from vertebra.blocks.scale_aware_modulation import Mix, Scale, ScaleAwareModulation, scale_aware_modulation
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap


def written_out(block: Any, x: Tensor) -> Tensor:
    """The formula on rows (B, H, W, C), channel by channel: group j is given channel j of every head."""
    s, width = block.s(x).permute(0, 3, 1, 2), block.mix.groups
    heads = [
        nn.functional.conv2d(s[:, head * width : (head + 1) * width], conv.weight, conv.bias, 1, "same", 1, width)
        for head, conv in enumerate(block.convs)
    ]
    groups = [torch.stack([head[:, j] for head in heads], 1) for j in range(width)]  # (B, heads, H, W)
    weights = block.mix.weight.unflatten(0, (width, -1))
    mixed = torch.cat([nn.functional.conv2d(group, w) for group, w in zip(groups, weights, strict=True)], 1)
    mixed = gelu(block.norm(mixed + block.mix.bias[:, None, None])).permute(0, 2, 3, 1)
    return block.proj(block.narrow(mixed) * block.v(x))


@pytest.mark.parametrize(("dim", "kernels", "tile"), [(64, (3, 5, 7, 9), 8), (24, (3, 5, 7, 9), 6), (22, (1, 11), 1)])
@pytest.mark.parametrize("training", [False, True])
def test_is_the_formula_written_out(dim, kernels, tile, training):
    block: Any = fill(ScaleAwareModulation(dim=dim, kernels=kernels)).double().train(training)
    rough = copy.deepcopy(block).float()
    x = images((2, dim, 9, 7)).permute(0, 2, 3, 1)
    assert block.mix._tile(x.double()) == 1 and rough.mix._tile(x) == tile
    expected = written_out(copy.deepcopy(block), x.double())
    assert difference(block(x.double()), expected) < 1e-12  # a group by itself
    assert difference(rough(x), expected) < 2e-6  # some groups at a time


def test_gradients_are_those_of_single_groups():
    block = fill(ScaleAwareModulation(dim=32))
    exact = copy.deepcopy(block).double()
    x = images((2, 32, 12, 12)).permute(0, 2, 3, 1)
    grads = []
    for network, given in ((block, x), (exact, x.double())):
        given = given.clone().requires_grad_(True)
        (network(given) * images((2, 12, 12, 32)).to(given)).sum().backward()
        grads.append([given.grad, *(parameter.grad for parameter in network.parameters())])
    largest = max(float(grad.abs().max()) for grad in grads[1])  # type: ignore[union-attr]
    for found, expected in zip(*grads, strict=True):
        assert float((found - expected).abs().max()) < 2e-6 * largest


def test_a_channel_is_mixed_with_its_like_in_the_other_heads():
    """An impulse in channel 1 of head 2 reaches the outputs of group 1 alone, two for each of four heads."""
    mix = Mix(32, 64, 1, groups=8)
    nn.init.ones_(mix.weight)
    nn.init.zeros_(mix.bias)  # type: ignore[arg-type]
    heads = [torch.zeros(1, 8, 3, 3) for _ in range(4)]
    heads[2][0, 1, 1, 1] = 1
    found = mix(heads)
    assert found[0, :, 1, 1].nonzero().flatten().tolist() == list(range(8, 16)) and found.sum() == 8
    assert torch.equal(mix.double()([head.double() for head in heads]).float(), found)


def test_each_head_has_the_reach_of_its_kernel():
    block = ScaleAwareModulation(dim=8)
    assert [conv.weight.shape for conv in block.convs] == [(2, 1, side, side) for side in (3, 5, 7, 9)]
    for conv, side in zip(block.convs, (3, 5, 7, 9), strict=True):
        nn.init.ones_(conv.weight)  # type: ignore[arg-type]
        x = torch.zeros(1, 2, 15, 15)
        x[..., 7, 7] = 1
        assert int(conv(x)[0, 0].count_nonzero()) == side**2


def test_kernels_with_and_without_gradients_agree():
    conv, x = fill(Scale(6, 6, 9, padding=4, groups=6)), images((2, 6, 11, 13))
    with torch.inference_mode():
        plain = conv(x)
    assert difference(conv(x), plain) < 1e-6


def test_fused_is_the_same_without_a_norm():
    block = fill(scale_aware_modulation(16)).eval()
    x = images((2, 16, 9, 7))
    fused = fuse(block, images=(16, 9, 7)).model
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.inference_mode():
        assert difference(fused(x), block(x)) < 1e-5
        exact: Any = copy.deepcopy(block).double()
        assert (
            difference(exact.layer.fused()(x.double().permute(0, 2, 3, 1)).permute(0, 3, 1, 2), exact(x.double()))
            < 1e-13
        )


def test_another_norm_stays_when_fused():
    block = ScaleAwareModulation(dim=16)
    block.norm = nn.GroupNorm(4, 32)  # type: ignore[assignment]
    assert isinstance(block.fused().norm, nn.GroupNorm)


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    block = ScaleAwareModulation(dim=256)
    for tensor, std in [
        (block.v.weight, 0.02),
        (block.proj.weight, 0.02),
        (block.narrow.weight, (2 / 256) ** 0.5),
        (block.mix.weight, (2 / 8) ** 0.5),
        (block.convs[1].weight, (2 / 25) ** 0.5),
    ]:
        assert float(tensor.detach().std()) == pytest.approx(std, rel=0.05)
    assert not any(parameter.any() for name, parameter in block.named_parameters() if name.endswith("bias"))


def test_wrong_options_are_refused():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"channels": 18}, "4 kernels do not divide 18 channels"),
        ({"channels": 0}, "4 kernels do not divide 0 channels"),
        ({"channels": 16, "kernels": (3, 4)}, r"kernels is \(3, 4\); it needs odd sides"),
        ({"channels": 16, "kernels": ()}, "it needs odd sides"),
        ({"channels": 16, "ratio": 0}, "ratio is 0"),
    )
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            scale_aware_modulation(**options)


def test_swap_puts_it_in_the_place_of_convolutions():
    backbone = Spec("timm/convnext_atto", {"image_size": 64}).build()
    operated = swap(backbone, "*.conv_dw", "scale_aware_modulation")
    blocks = [module for module in operated.model.modules() if isinstance(module, ScaleAwareModulation)]
    assert len(operated.changed) == len(blocks) == 12
    assert [blocks[0].mix.groups, blocks[-1].mix.groups] == [10, 80]
    with torch.inference_mode():
        assert operated.model.eval()(images((1, 3, 64, 64))).pooled.isfinite().all()
