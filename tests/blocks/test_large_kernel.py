"""The large kernel: policies, one kernel in the end, and ways to compute it that agree."""

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from vertebra.blocks.large_kernel import (
    LargeDepthwise,
    LargeKernel,
    convolved,
    depthwise_fft,
    fast_length,
    large_kernel,
)
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap

SIZES = [(9, 8), (20, 17), (33, 64)]


@pytest.mark.parametrize("kernel", [1, 3, 7, 13, 15, 31, 51])
@pytest.mark.parametrize("size", SIZES)
def test_fourier_is_torchs_convolution(kernel: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=6)
    x = images((2, 6, *size))
    with torch.inference_mode():
        expected = conv(x)
        assert difference(depthwise_fft(x, conv.weight, conv.bias), expected) < 1e-5
        exact = depthwise_fft(x.double(), conv.weight.double(), conv.bias.double())  # type: ignore[union-attr]
        assert difference(exact, conv.double()(x.double())) < 1e-13


@pytest.mark.parametrize("path", ["auto", "direct", "fft"])
@pytest.mark.parametrize("kernel", [3, 13, 15, 31])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_way_gives_the_numbers_and_gradients_of_torch(path, kernel: int, channels_last: bool) -> None:
    conv = nn.Conv2d(5, 5, kernel, padding=kernel // 2, groups=5)
    ours = LargeDepthwise(5, kernel, bias=True, path=path)
    ours.load_state_dict(conv.state_dict())
    x = images((2, 5, 20, 17))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = conv(a), ours(b)
    assert difference(found.detach(), expected.detach()) < 1e-5
    for out in (expected, found):
        (out * images(tuple(out.shape))).sum().backward()
    assert a.grad is not None and b.grad is not None and conv.weight.grad is not None and ours.weight.grad is not None
    assert difference(b.grad, a.grad) < 1e-5
    assert difference(ours.weight.grad, conv.weight.grad) < 1e-5
    with torch.inference_mode():
        assert difference(ours(x), expected.detach()) < 1e-5


def test_fourier_in_half_precision_keeps_the_type() -> None:
    x, weight = images((2, 4, 12, 12)).bfloat16(), torch.randn(4, 1, 5, 5, dtype=torch.bfloat16)
    found = depthwise_fft(x, weight)
    assert found.dtype == torch.bfloat16
    assert difference(found, F.conv2d(x.float(), weight.float(), padding=2, groups=4)) < 0.01


def test_auto_takes_fourier_where_it_is_faster(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr("vertebra.blocks.large_kernel.depthwise_fft", lambda x, *_: taken.append(x.shape) or x)
    small, large = images((1, 2, 20, 20)), images((1, 2, 128, 128))
    for kernel, x, learning, expected in [
        (13, small, True, False),
        (15, small, True, True),
        (31, small, True, True),
        (31, small, False, False),
        (31, large, False, False),
        (41, large, False, True),
        (13, large, False, False),
    ]:
        taken.clear()
        with torch.set_grad_enabled(learning):
            convolved(x, torch.zeros(2, 1, kernel, kernel, requires_grad=learning), None)
        assert bool(taken) == expected, (kernel, learning, x.shape)
    taken.clear()
    convolved(large, torch.zeros(2, 1, 41, 41), None, path="direct")
    assert not taken


def test_fast_lengths() -> None:
    assert [fast_length(n) for n in (1, 7, 11, 13, 97, 128)] == [1, 8, 12, 15, 100, 128]


@pytest.mark.parametrize("policy", ["none", "small", "dilated"])
@pytest.mark.parametrize("kernel", [5, 7, 13, 17])
def test_fused_is_equal(policy, kernel: int) -> None:
    block = fill(large_kernel(8, kernel=kernel, policy=policy)).eval()
    assert isinstance(block, LargeKernel)
    x = images((2, 8, 19, 14))
    with torch.inference_mode():
        assert difference(block.fused()(x), block(x)) < 1e-5
    block, x = block.double(), x.double()
    assert difference(block.fused()(x).detach(), block(x).detach()) < 1e-13


def test_policies_differ_in_what_is_trained_beside_the_large_kernel() -> None:
    def kernels(**options) -> list[tuple[int, int]]:
        convs = large_kernel(4, **options).branches.convs
        return [(conv.kernel_size[0], conv.dilation[0]) for conv in convs]  # type: ignore[index]

    assert kernels(policy="none") == [(13, 1)]
    assert kernels(policy="small", kernel=31) == [(31, 1), (5, 1)]
    assert kernels(policy="dilated") == [(13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]
    assert kernels(variant="dilated", policy="none") == [(13, 1)]


def test_in_place_of_a_networks_depthwise_convolutions() -> None:
    network = fill(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=4)).eval()
    operated = swap(network, "*.conv_dw", "large_kernel", kernel=9, images=(3, 64, 49))
    assert len(operated.changed) == 4
    fill(operated.model).eval()
    fused = fuse(operated.model, images=(3, 64, 49))
    assert len(fused.changed) == 4 and fused.after.params < fused.before.params
    with torch.inference_mode():
        x = images((2, 3, 64, 49))
        assert not torch.allclose(operated.model(x), network(x), atol=1e-2)


def test_wrong_options_are_refused() -> None:
    for options, message in [
        ({"kernel": 8}, "kernel is 8; it must be odd"),
        ({"small": 4}, "small is 4; it must be odd"),
        ({"kernel": 3}, "must fit into the large kernel of 3"),
        ({"policy": "dilated", "kernel": 31}, "no dilated branches for kernel 31"),
        ({"policy": "wide"}, "policy is 'wide'"),
        ({"path": "gemm"}, "path is 'gemm'"),
        ({"variant": "smal"}, "did you mean|no variant 'smal'"),
    ]:
        with pytest.raises(UsageError, match=message):
            large_kernel(8, **options)
    with pytest.raises(UsageError, match="channels is 0"):
        large_kernel(0)
