"""The omni-scale block: what each stream sees, the one gate, where its instance norms are, and its norm's kernels."""

import pytest
import torch
from torch import nn

from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.blocks.omni_scale import SharedGate, light_conv, omni_scale
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap


def test_stream_t_sees_2t_plus_1_pixels():
    block = fill(omni_scale(16)).eval()
    x = images((1, 4, 15, 15)).requires_grad_(True)
    for number, stream in enumerate(block.streams, start=1):
        for norm in (m for m in stream.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.constant_(norm.bias, 50)  # no ReLU closes
        (seen,) = torch.autograd.grad(stream(x)[0, :, 7, 7].sum(), x)
        rows, columns = seen.abs().sum((0, 1)).nonzero(as_tuple=True)
        assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 2 * number + 1
        assert 7 - rows.min() == rows.max() - 7 == number


def test_one_gate_weighs_every_channel_of_every_stream():
    block, streams = omni_scale(256), [images((2, 64, 6, 5)) * factor for factor in (1, -2, 3, 0.5)]
    assert sum(isinstance(m, SharedGate) for m in block.modules()) == 1
    gate = fill(block.gate)
    assert [tuple(layer.weight.shape) for layer in (gate.squeeze, gate.excite)] == [(4, 64), (64, 4)]
    expected = torch.zeros(2, 64, 6, 5)
    for stream in streams:
        hidden = (stream.mean((2, 3)) @ gate.squeeze.weight.T + gate.squeeze.bias).relu()
        expected += stream * (hidden @ gate.excite.weight.T + gate.excite.bias).sigmoid()[:, :, None, None]
    torch.testing.assert_close(gate(streams), expected)


def test_gates_it_is_compared_with():
    streams = [images((2, 8, 4, 4)) + shift for shift in (0.0, 1.0)]
    stream_gate = fill(omni_scale(32, middle=8, streams=2, gate="stream").gate)
    ones = stream_gate([torch.ones_like(s) for s in streams])
    assert torch.allclose(ones, ones[:1, :1, :1, :1].expand_as(ones))  # the same weight for every channel
    beside = omni_scale(32, middle=8, streams=2, gate="none")
    assert torch.equal(beside.gate(streams), torch.cat(streams, 1)) and beside.expand[0].in_channels == 16


@pytest.mark.parametrize("variant", ["plain", "inside", "outside", "both"])
def test_instance_norms_are_where_the_variant_says(variant):
    block, x = fill(omni_scale(24, variant, outputs=32)).eval(), images((2, 24, 9, 8))
    with torch.inference_mode():
        reduced = block.reduce(x)
        mixed = block.gate([stream(reduced) for stream in block.streams])
        branch = nn.functional.conv2d(mixed, block.expand[0].weight)
        last = block.expand[1]
        if variant in ("inside", "both"):  # takes the place of the batch norm
            branch = nn.functional.instance_norm(branch, weight=last.weight, bias=last.bias)
            assert not any(isinstance(m, nn.BatchNorm2d) for m in block.expand)
        else:
            branch = last(branch)
        out = branch + block.shortcut(x)
        if variant in ("outside", "both"):
            out = nn.functional.instance_norm(out, weight=block.norm.weight, bias=block.norm.bias)
        torch.testing.assert_close(block(x), out.relu(), rtol=1e-5, atol=1e-5)


def test_light_convolution_is_pointwise_first_and_linear_between():
    layers = light_conv(8)
    assert [layer.kernel_size for layer in layers[:2]] == [(1, 1), (3, 3)] and layers[1].groups == 8
    assert [type(layer) for layer in layers[2:]] == [nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize("size", [(9, 8), (40, 30)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_is_torchs_with_its_gradients(size, layout):
    ours, theirs = fill(InstanceNorm(6)).double(), fill(nn.InstanceNorm2d(6, affine=True)).double()
    x = (images((2, 6, *size)).double() + 3).to(memory_format=layout)
    weights, grads = images((2, 6, *size)).double(), []
    for norm in (ours, theirs):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
        out = norm(given)
        (out * weights).sum().backward()
        grads.append((out.detach(), given.grad, norm.weight.grad, norm.bias.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_style_is_taken_away_by_the_norm_outside_alone():
    x, style = images((2, 16, 8, 8)), torch.linspace(0.5, 2, 16)[:, None, None]
    out = fill(omni_scale(16, "outside")).norm
    torch.testing.assert_close(out(x * style + style), out(x), rtol=1e-3, atol=1e-3)


def test_its_batch_norms_fold_into_the_convolutions():
    block = fill(omni_scale(16, "inside")).eval()
    operated = fuse(block, images=(16, 9, 8))
    assert len(operated.changed) == 1 + 10 and not any(isinstance(m, nn.BatchNorm2d) for m in operated.model.modules())


def test_swap_puts_it_in_the_place_of_blocks_of_a_residual_network():
    backbone = Spec("timm/resnet18", {"image_size": 64}).build()
    operated = swap(backbone, "network.layer?.1", "omni_scale/outside")
    assert operated.changed == tuple(f"network.layer{n}.1" for n in (1, 2, 3, 4))
    assert operated.after.params < 0.6 * operated.before.params
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 64, 64))).pooled.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: omni_scale(0), "channels is 0"),
        (lambda: omni_scale(8, "insid"), "no variant 'insid'; did you mean inside"),
        (lambda: omni_scale(8, streams=0), "streams is 0"),
        (lambda: omni_scale(8, middle=0), "middle is 0"),
        (lambda: omni_scale(8, gate="soft"), "gate is 'soft'; it can be"),
    ],
)
def test_wrong_options_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
