"""The dilated reparam block: its released branches, one convolution instead of many, fast gradients, errors."""

import copy

import pytest
import torch
from torch import nn

from vertebra.blocks.depthwise import depthwise
from vertebra.blocks.dilated_reparam import TABLE, dilated_reparam
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap


def by_branches(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The definition: every branch by itself, as torch computes it."""
    return sum(
        norm(nn.functional.conv2d(x, conv.weight, None, 1, conv.padding, conv.dilation, conv.groups))
        for conv, norm in zip(block.convs, block.norms, strict=True)
    )


@pytest.mark.parametrize("kernel", TABLE)
def test_one_convolution_is_all_branches(kernel):
    block = fill(dilated_reparam(6, kernel=kernel)).eval().double()
    x = images((2, 6, 21, 14)).double()
    with torch.inference_mode():
        expected = by_branches(block, x)
        fused = block.fused()
        assert difference(block(x), expected) < 1e-12
        assert difference(fused(x), expected) < 1e-12
        assert difference(fused.float()(x.float()), expected) < 1e-5
    assert isinstance(fused, nn.Conv2d) and fused.weight.shape == (6, 1, kernel, kernel) and fused.bias is not None
    assert all((k - 1) * r + 1 <= kernel for k, r in TABLE[kernel])


@pytest.mark.parametrize("kernel", [5, 13, 17])
def test_training_adds_branches_normed_by_the_batch(kernel):
    block = fill(dilated_reparam(4, kernel=kernel)).train()
    other, x = copy.deepcopy(block), images((3, 4, 17, 11))
    assert difference(block(x).detach(), by_branches(other, x).detach()) < 1e-5
    torch.testing.assert_close(block.norms[1].running_mean, other.norms[1].running_mean)


def test_a_norm_that_looks_at_the_batch_is_never_merged():
    block = fill(dilated_reparam(4, kernel=7)).eval()
    block.norms[2].train()  # as test-time adaptation does
    x = images((3, 4, 9, 8))
    other = copy.deepcopy(block)
    assert difference(block(x).detach(), by_branches(other, x).detach()) < 1e-5


@pytest.mark.parametrize(("kernel", "dilation"), [(5, 1), (13, 1), (3, 5), (7, 2), (9, 2)])
def test_gradients_are_torchs(kernel, dilation):
    conv = fill(depthwise(5, kernel, dilation=dilation, bias=True))
    plain = nn.Conv2d(5, 5, kernel, 1, conv.padding, dilation, 5)
    plain.load_state_dict(conv.state_dict())
    x, found = images((3, 5, 19, 8)), {}
    for layer in (conv, plain):
        given = x.clone().requires_grad_()
        out = layer(given)
        (out * images(tuple(out.shape))).sum().backward()
        found[layer] = (out, given.grad, layer.weight.grad, layer.bias.grad)
    for mine, theirs in zip(found[conv], found[plain], strict=True):
        assert difference(mine.detach(), theirs.detach()) < 1e-5


def test_gradients_in_evaluation_reach_every_branch():
    block = fill(dilated_reparam(4)).eval()
    (block(images((2, 4, 9, 9))) * images((2, 4, 9, 9))).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_it_takes_the_place_of_a_large_kernel_and_fuses_back():
    network = Spec("timm/convnext_atto", {"image_size": 64, "weights": "random"}).build().eval()

    def large(name: str, layer: nn.Module) -> bool:
        return name.endswith("conv_dw")

    swapped = swap(network, large, "dilated_reparam", kernel=7)
    assert len(swapped.changed) == 12
    block = swapped.model.get_submodule(swapped.changed[-1])
    assert len(block.convs) == 4 and block.convs[0].weight.shape == (320, 1, 7, 7)
    fused = fuse(fill(swapped.model))
    assert set(swapped.changed) <= set(fused.changed)
    assert fused.after.params == fused.before.params - sum(
        sum(p.numel() for p in swapped.model.get_submodule(name).parameters())
        - fused.model.get_submodule(name).weight.numel()
        - fused.model.get_submodule(name).bias.numel()
        for name in swapped.changed
    )


def test_own_branches_and_errors():
    block = dilated_reparam(4, kernel=31, branches=((5, 1),))
    assert [conv.kernel_size for conv in block.convs] == [(31, 31), (5, 5)]
    with pytest.raises(UsageError, match="no released branches for kernel 19"):
        dilated_reparam(4, kernel=19)
    with pytest.raises(UsageError, match=r"kernel 7 and dilation 2 spans 13 cells; .* at most kernel=11"):
        dilated_reparam(4, kernel=11, branches=((7, 2),))
    with pytest.raises(UsageError, match="kernel is 12; it must be odd"):
        dilated_reparam(4, kernel=12)
    with pytest.raises(UsageError, match="channels is 0"):
        dilated_reparam(0)
