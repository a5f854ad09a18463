"""NF-ResNet in the authors' layout: one block in numpy, variances that follow the rule, no image sees another."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones.nf_resnet import ALPHA, Block, NFResNet, nf_resnet
from vertebra.blocks.scaled_conv import ACTIVATION_GAINS, SameConv, ScaledConv
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.probes.signals import signals
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse


def convolved(x: np.ndarray, conv: ScaledConv) -> np.ndarray:
    """A scaled convolution by its formula, padded as TensorFlow does."""
    weight = conv.weight.detach().double().numpy()
    flat = weight.reshape(len(weight), -1)
    scale = 1 / np.sqrt(np.maximum(flat.var(1) * flat.shape[1], 1e-4))
    flat = (flat - flat.mean(1, keepdims=True)) * scale[:, None] * conv.gain.detach().numpy().reshape(-1, 1)
    side, stride = conv.kernel_size[0], conv.stride[0]
    needed = [max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[2:]]
    padded = np.pad(x, ((0, 0), (0, 0), *((n // 2, n - n // 2) for n in needed)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))[:, :, ::stride, ::stride]
    per = x.shape[1] // conv.groups
    outputs = len(weight) // conv.groups
    parts = [
        np.einsum("bchwij,ocij->bohw", windows[:, g * per : (g + 1) * per], part.reshape(outputs, per, side, side))
        for g, part in enumerate(np.split(flat, conv.groups))
    ]
    return np.concatenate(parts, 1) + conv.bias.detach().numpy()[:, None, None]  # type: ignore[union-attr]


def activated(x: np.ndarray, name: str) -> np.ndarray:
    return ACTIVATION_GAINS[name] * (np.maximum(x, 0) if name == "relu" else x / (1 + np.exp(-x)))


@pytest.mark.parametrize(("kind", "name"), [("resnet", "relu"), ("regnet", "silu")])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_is_the_papers(kind, name, stride):
    block = Block(
        16, 32, stride, kind=kind, beta=1.3, transition=True, expansion=2.25 if kind == "regnet" else 1.0, drop_path=0.0
    )
    fill(block).eval()
    x = images((2, 16, 6, 6))
    h = activated(x.double().numpy(), name) / 1.3
    way = h
    if kind == "regnet" and stride == 2:
        way = h.reshape(2, 16, 3, 2, 3, 2).mean((3, 5))
    convs = [m for m in block.branch if isinstance(m, ScaledConv)]  # type: ignore[union-attr]
    f = convolved(activated(convolved(h, convs[0]), name), convs[1])
    if kind == "regnet":
        gates = block.branch[3].gates(torch.from_numpy(f.mean((2, 3))).float())  # type: ignore[index]
        f = f * 2 * gates.detach().numpy()[..., None, None]
    f = convolved(activated(f, name), convs[2])
    shortcut = convolved(way, block.shortcut[1])  # type: ignore[index]
    expected = shortcut + ALPHA * block.gain.alpha.item() * f
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_variances_follow_the_rule_and_means_stay_small():
    torch.manual_seed(0)
    backbone = nf_resnet("nano", depths=(12, 12), dims=(128, 256), image_size=40).train()
    assert isinstance(backbone, NFResNet)
    for block in backbone.modules():
        if isinstance(block, Block):
            nn.init.ones_(block.gain.alpha)
    found = signals(backbone, torch.randn(8, 3, 40, 40))
    assert len(found.variances) == 25 and len(found.branches) == 24
    for stage in range(2):
        variances = found.variances[1 + 12 * stage : 13 + 12 * stage]
        expected = [1 + ALPHA**2 * (number + 1) for number in range(12)]
        np.testing.assert_allclose(variances, expected, rtol=0.1)  # zeros around small maps take more
    assert max(found.squared_means) < 0.1


def test_means_grow_where_weights_are_not_standardised():
    torch.manual_seed(0)
    plain = nf_resnet("nano", depths=(12, 12), dims=(64, 128), image_size=16)
    for module in plain.modules():
        if isinstance(module, Block):
            nn.init.ones_(module.gain.alpha)
            for index, conv in enumerate(module.branch):  # type: ignore[arg-type, var-annotated]
                if isinstance(conv, ScaledConv):
                    he = SameConv(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
                    nn.init.normal_(he.weight, std=he.weight[0].numel() ** -0.5)
                    module.branch[index] = he  # type: ignore[index, operator]
    means = signals(plain, torch.randn(16, 3, 16, 16)).squared_means
    assert means[12] > 3 * means[2] and max(means) > 0.1


def test_signals_of_a_network_of_timms():
    backbone = Spec("timm/test_resnet", {"image_size": 32}).build().eval()
    found = signals(backbone, torch.randn(2, 3, 32, 32))
    assert len(found.branches) == 4 and all(np.isfinite(found.variances))


def test_an_image_does_not_depend_on_its_neighbours_in_training_either():
    backbone, batch = fill(nf_resnet("nano")).train(), images((4, 3, 32, 32))
    torch.testing.assert_close(backbone(batch).pooled[:1], backbone(batch[:1]).pooled, rtol=1e-4, atol=1e-4)


def test_standardised_weights_can_be_kept():
    backbone = fill(nf_resnet("nano")).eval()
    fused = fuse(backbone).model
    assert not any(isinstance(m, ScaledConv) for m in fused.modules())


def test_a_block_starts_as_its_shortcut():
    block = Block(64, 64, 1, kind="resnet", beta=1.0, transition=False, expansion=1.0, drop_path=0.0)
    x: Tensor = images((1, 64, 5, 5))
    assert torch.equal(block(x), x)


def test_odd_sides_round_up():
    shapes = [tuple(m.shape[2:]) for m in nf_resnet("authors_regnet_b0").eval()(images((1, 3, 65, 47))).pyramid]
    assert shapes == [(17, 12), (9, 6), (5, 3), (3, 2)]


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="timm's network and has no option kind"):
        nf_resnet("resnet50", kind="regnet")
    with pytest.raises(UsageError, match="as many numbers"):
        nf_resnet("nano", dims=(64, 128))
