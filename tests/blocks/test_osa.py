"""One-shot aggregation: what is concatenated, where the shortcut and the attention are."""

import pytest
import torch
from torch import nn

from vertebra.blocks.osa import EffectiveSqueeze, osa
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def test_input_and_every_layer_are_mixed_once():
    block, x = osa(8, outputs=12, inner=4, layers=3).eval(), images((2, 8, 6, 5))
    fill(block)
    seen, y = [x], x
    for layer in block.layers:
        y = layer(y)
        seen.append(y)
    assert block.mix[0].in_channels == 8 + 3 * 4
    torch.testing.assert_close(block(x), block.mix(torch.cat(seen, 1)))


def test_shortcut_comes_behind_the_attention():
    block, x = osa(8, "v2", layers=2).eval(), images((2, 8, 6, 5))
    fill(block)
    nn.init.constant_(block.get_parameter("attention.linear.bias"), -10.0)  # a hard sigmoid is zero there
    assert torch.equal(block(x), x)


def test_attention_is_a_hard_sigmoid_of_all_means():
    block, x = EffectiveSqueeze(4), images((2, 4, 3, 3))
    fill(block)
    gate = (x.mean((2, 3)) @ block.linear.weight[:, :, 0, 0].T + block.linear.bias + 3).clamp(0, 6) / 6
    torch.testing.assert_close(block(x), x * gate[..., None, None])


def test_depthwise_layers_reduce_first():
    block = osa(8, inner=4, layers=2, depthwise=True)
    assert block.reduce[0].weight.shape == (4, 8, 1, 1)  # type: ignore[index, union-attr]
    assert block.layers[0][0].groups == 4  # type: ignore[index]
    assert osa(8, inner=4, layers=2, depthwise=True).mix[0].in_channels == 8 + 2 * 4


def test_in_place_of_residual_blocks():
    backbone = Spec("timm/resnet18", {"image_size": 32}).build()
    operated = swap(backbone, "*.layer[34].1", "osa/v2", layers=2)
    assert operated.changed == ("network.layer3.1", "network.layer4.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"variant": "v3"}, "v1, v2"), ({"layers": 0}, "layers is 0"), ({"variant": "v2", "outputs": 9}, "shortcut")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        osa(8, **options)
