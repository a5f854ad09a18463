"""Cross-scale embedding: against patches cut by hand, its channels, its fast gradients, and in place of timm's."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, pad

from vertebra.blocks.cross_scale_embedding import Patches, cross_scale_embedding
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def test_kernels_are_centred_on_the_same_patches():
    """The output at a cell is a weighted sum over the square of each kernel's side around the middle of the cell."""
    block: Any = fill(cross_scale_embedding(3, 16, kernels=(2, 4, 8), stride=2)).double()
    x = images((2, 3, 12, 8)).double()
    found = block(x)
    assert found.shape == (2, 16, 6, 4)
    wide, at = pad(x, (3, 3, 3, 3)), 0
    for conv, kernel, outputs in zip(block.convs, (2, 4, 8), (8, 4, 4), strict=True):
        weight, bias = (tensor.double() for tensor in conv.parameters())
        assert weight.shape == (outputs, 3, kernel, kernel)
        for row, column in ((0, 0), (2, 3), (5, 1)):
            top, left = 3 + 2 * row + 1 - kernel // 2, 3 + 2 * column + 1 - kernel // 2
            patch = wide[:, :, top : top + kernel, left : left + kernel]
            expected = torch.einsum("bchw,ochw->bo", patch, weight) + bias
            torch.testing.assert_close(found[:, at : at + outputs, row, column], expected)
        at += outputs


@pytest.mark.parametrize(
    ("variant", "outputs", "parts"), [("patches", 96, [48, 24, 12, 12]), ("merging", 128, [64, 64])]
)
def test_large_kernels_have_few_channels(variant, outputs, parts):
    block: Any = cross_scale_embedding(3, outputs, variant)
    assert [conv.out_channels for conv in block.convs] == parts
    sides = {"patches": [4, 8, 16, 32], "merging": [2, 4]}[variant]
    assert [conv.kernel_size[0] for conv in block.convs] == sides
    assert {conv.stride[0] for conv in block.convs} == {sides[0]}


def test_what_is_missing_is_padded_at_the_end():
    block, x = fill(cross_scale_embedding(3, 8, "merging")), images((2, 3, 5, 9))
    assert torch.equal(block(x), block(pad(x, (0, 1, 0, 1))))
    assert cross_scale_embedding(3, 8)(images((1, 3, 1, 2))).shape == (1, 8, 1, 1)


@pytest.mark.parametrize(("kernel", "stride"), [(16, 4), (32, 4), (8, 2), (9, 1)])
def test_long_kernels_have_the_same_numbers_and_gradients(kernel, stride):
    before = (kernel - stride) // 2
    conv: Any = fill(Patches(3, 4, kernel, stride, before))
    x, plain = images((2, 3, 20, 12)).requires_grad_(), images((2, 3, 20, 12)).requires_grad_()
    assert conv._slow(x) and conv._slow(x.detach())
    found, expected = conv(x), conv2d(plain, conv.weight, conv.bias, stride, before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    towards = images(tuple(found.shape))
    first = torch.autograd.grad((found * towards).sum(), [x, conv.weight, conv.bias])
    second = torch.autograd.grad((expected * towards).sum(), [plain, conv.weight, conv.bias])
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not conv._slow(x)
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    assert not conv.requires_grad_(False)._slow(x) and not Patches(3, 4, 6, 4, 1)._slow(x)


def test_swap_puts_it_in_the_place_of_a_patch_embedding():
    backbone = Spec("timm/convnext_atto", {"image_size": 64}).build()
    operated = swap(backbone, "*stem.0", "cross_scale_embedding", outputs=40)
    (name,) = operated.changed
    block: Any = operated.model.get_submodule(name)
    assert sum(conv.weight.numel() for conv in block.convs) == 3 * (20 * 16 + 10 * 64 + 5 * 256 + 5 * 1024)
    assert operated.after.params > operated.before.params
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 64, 64))).pooled.isfinite().all()


def test_layouts_and_export():
    block, x = fill(cross_scale_embedding(3, 16)).eval(), images((2, 3, 33, 24))
    expected = block(x)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "image"}, "no variant 'image'"),
        ({"channels": 0}, "channels is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"kernels": (4, 7)}, r"kernels is \(4, 7\) with stride 4"),
        ({"kernels": (2, 4)}, r"kernels is \(2, 4\) with stride 4"),
        ({"kernels": ()}, r"kernels is \(\)"),
        ({"outputs": 12}, "outputs is 12; with 4 kernels it must be a multiple of 8"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        cross_scale_embedding(**{"channels": 3, "outputs": 16, **options})


def test_it_is_a_module_of_plain_convolutions():
    block = cross_scale_embedding(3, 16)
    assert all(isinstance(conv, nn.Conv2d) for conv in block.convs)
    assert set(block.state_dict()) == {f"convs.{n}.{part}" for n in range(4) for part in ("weight", "bias")}
