"""Pre-activation ResNet: exact counts, timm's outputs, the paper's equation forward and backward."""

import pytest
import torch
from timm import create_model
from torch import nn

from vertebra.backbones.preact_resnet import PreactResNet, preact_resnet, published
from vertebra.blocks.residual_unit import ResidualUnit
from vertebra.contracts import Preprocess
from vertebra.errors import ParityError, UsageError
from vertebra.parity import difference, fill, images

PREPROCESS = Preprocess((64, 64), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(("variant", "params"), [("164", 1_703_258), ("1001", 10_327_706)])
def test_the_authors_counts(variant, params):
    with torch.device("meta"):
        backbone = preact_resnet(variant)
    assert sum(p.numel() for p in backbone.parameters()) + 10 * backbone.width + 10 == params


def test_timms_weights_give_timms_outputs():
    theirs = fill(create_model("resnetv2_50", num_classes=0, layers=(1, 2, 1, 1))).eval()
    ours = PreactResNet(
        preprocess=PREPROCESS, depths=(1, 2, 1, 1), dims=(256, 512, 1024, 2048), stem="bare", stride_in="3x3"
    ).eval()
    ours.load_state_dict(published(theirs.state_dict(), ours))
    for size in ((64, 64), (65, 47)):
        batch = images((2, 3, *size))
        with torch.inference_mode():
            assert difference(ours(batch).pyramid[-1], theirs.forward_features(batch)) < 1e-5
    with pytest.raises(ParityError, match="missing"):
        published({n: t for n, t in theirs.state_dict().items() if "conv2" not in n}, ours)


def stage_of(backbone: PreactResNet) -> list[ResidualUnit]:
    return [unit for unit in backbone.stages[0].children() if isinstance(unit, ResidualUnit)][1:]


def test_a_map_is_the_sum_of_all_that_units_put_out():
    torch.manual_seed(0)
    units = stage_of(preact_resnet("nano", depths=(4, 1, 1)))
    fill(nn.ModuleList(units)).eval()
    x = first = images((2, 64, 8, 8))
    total = torch.zeros_like(x)
    for unit in units:
        total = total + unit.branch(x)
        x = unit(x)
    torch.testing.assert_close(x - first, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("order", "same"), [("full", True), ("original", False)])
def test_the_gradient_reaches_every_unit_undiminished(order, same):
    units = nn.Sequential(*stage_of(preact_resnet("nano", depths=(4, 1, 1), order=order)))
    fill(units).eval()
    for unit in units:
        convs = [m for m in unit.branch if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
        nn.init.zeros_(convs[-1].weight)
    x, weights = images((2, 64, 8, 8)).requires_grad_(), images((2, 64, 8, 8)).flip(0)
    (units(x) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights) is same


def test_stem_and_ends_follow_the_order():
    small, large = preact_resnet("nano"), preact_resnet("200", depths=(1, 1, 1, 1))
    assert [type(m).__name__ for m in small.stem] == ["Conv2d"]  # type: ignore[union-attr]
    assert [type(m).__name__ for m in large.stem] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]  # type: ignore[union-attr]
    assert isinstance(stage_first(large).branch[0], nn.Conv2d)  # the stem has activated already
    assert isinstance(preact_resnet("nano", order="original").last, nn.Identity)
    assert preact_resnet("nano").eval()(images((1, 3, 32, 32))).pyramid[-1].min() >= 0


def stage_first(backbone: nn.Module) -> ResidualUnit:
    return next(m for m in backbone.modules() if isinstance(m, ResidualUnit))


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="timm's network and has no option depths; 200, 164"):
        preact_resnet("50", depths=(1, 1))
    with pytest.raises(UsageError, match="none of timm's networks"):
        preact_resnet("nano", network={"stem_type": "deep"})
    with pytest.raises(UsageError, match="did you mean identity"):
        preact_resnet("nano", shortcut="identiti")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="as many numbers"):
        preact_resnet("nano", depths=(1, 1))
