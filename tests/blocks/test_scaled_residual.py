"""Scaled residual: its formula, its gradient, and Inception-v4 made residual by surgery."""

import pytest
import torch
from torch import nn

from vertebra.blocks.scaled_residual import ScaledResidual, scaled_residual
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


def test_formula_with_and_without_activation():
    layer, x = fill(nn.Conv2d(6, 6, 3, padding=1)), images((2, 6, 5, 4))
    total = x + 0.17 * layer(x)
    before = x.clone()
    torch.testing.assert_close(scaled_residual(layer, scale=0.17)(x), total.relu())
    torch.testing.assert_close(scaled_residual(layer, scale=0.17, activation="none")(x), total)
    assert torch.equal(x, before)  # the ReLU in place is on the sum alone


def test_gradient_of_the_layer_is_scaled():
    x = images((2, 6, 5, 4))
    grads = []
    for scale in (1.0, 0.1):
        layer = fill(nn.Conv2d(6, 6, 1))
        scaled_residual(layer, scale=scale, activation="none")(x).sum().backward()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(grads[1], 0.1 * grads[0])


def test_surgery_makes_inception_v4_residual():
    backbone = Spec("inception_v4/v4", {"image_size": 75}).build()
    operated = swap(backbone, "InceptionA", "scaled_residual", scale=0.17, inplace=True)
    blocks = [module for module in backbone.modules() if isinstance(module, ScaledResidual)]
    assert len(blocks) == len(operated.changed) == 4 and {block.scale for block in blocks} == {0.17}
    assert operated.after.params == operated.before.params
    block, x = blocks[0].eval(), images((1, 384, 5, 5))
    with torch.inference_mode():
        torch.testing.assert_close(block(x), (x + 0.17 * block.layer(x)).relu())


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="scale is 0; it must be above 0"):
        scaled_residual(nn.Identity(), scale=0)
    with pytest.raises(UsageError, match="activation is 'gelu'; it can be relu or none"):
        scaled_residual(nn.Identity(), activation="gelu")  # type: ignore[arg-type]
