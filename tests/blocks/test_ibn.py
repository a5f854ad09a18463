"""IBN: the authors' layers, instance norm as torch has it, what a trained norm keeps, and the effect."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from vertebra.blocks import ibn as page
from vertebra.blocks.ibn import IBN, divergence, effect, from_batch_norm, ibn
from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import check_golden, fill, images, stored
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "ibn_net.json"


@pytest.mark.parametrize("variant", ["half", "dense"])
def test_the_layer_is_the_authors(variant):
    reference = stored(GOLDEN, f"block {variant}")
    with torch.inference_mode():
        found = fill(ibn(30, variant)).eval()(images(reference.shape))
    assert max(check_golden(found, reference.golden, 1e-6).values()) < 1e-6


def test_each_side_is_torchs_norm_in_training_and_evaluation():
    block, x = fill(ibn(10)), images((3, 10, 6, 5))
    instance, batch = nn.InstanceNorm2d(5, affine=True), nn.BatchNorm2d(5)
    instance.load_state_dict(block.instance.state_dict())
    batch.load_state_dict(block.batch.state_dict())
    for mode in (True, False):
        expected = torch.cat((instance.train(mode)(x[:, :5]), batch.train(mode)(x[:, 5:])), 1)
        torch.testing.assert_close(block.train(mode)(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block.batch.running_var, batch.running_var)
    dense = fill(ibn(10, "dense")).eval()
    expected = torch.cat((dense.batch(x[:, :6]), dense.instance(x[:, 6:])), 1)
    torch.testing.assert_close(dense(x), expected)


def test_instance_norm_takes_gain_and_shift_of_an_image_away():
    block, x = fill(ibn(8, "whole")).eval(), images((2, 8, 6, 5))
    assert isinstance(block, InstanceNorm) and len(block.state_dict()) == 2
    torch.testing.assert_close(block(3 * x + 2), block(x), rtol=1e-4, atol=1e-4)
    half = fill(ibn(8)).eval()
    shifted, plain = half(3 * x + 2), half(x)
    torch.testing.assert_close(shifted[:, :4], plain[:, :4], rtol=1e-4, atol=1e-4)
    assert (shifted[:, 4:] - plain[:, 4:]).abs().min() > 0.01


@pytest.mark.parametrize(
    ("channels", "variant", "instance", "batch"),
    [(64, "half", 32, 32), (7, "half", 3, 4), (64, "dense", 26, 38), (128, "dense", 52, 76), (160, "dense", 64, 96)],
)
def test_widths_are_rounded_as_the_authors_do(channels, variant, instance, batch):
    block = ibn(channels, variant)
    assert (block.instance.num_channels, block.batch.num_features) == (instance, batch)
    assert sum(p.numel() for p in block.parameters()) == 2 * channels


def test_layouts_number_formats_and_compilation():
    block, x = fill(ibn(16)).eval(), images((2, 16, 6, 5))
    expected = block(x)
    last = block(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), expected)
    rough = fill(ibn(16)).eval().bfloat16()(x.bfloat16())
    torch.testing.assert_close(rough.float(), expected, rtol=0.03, atol=0.03)


def test_synchronised_batch_norm_leaves_the_instance_norm_alone():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(ibn(8))
    assert type(block.batch) is nn.SyncBatchNorm and type(block.instance) is InstanceNorm


def test_a_trained_norm_keeps_gains_shifts_and_the_statistics_that_still_mean_something():
    old, x = fill(nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)).eval(), images((4, 8, 7, 6))
    new = from_batch_norm(old)
    assert isinstance(new, IBN) and not new.training and (new.batch.eps, new.batch.momentum) == (1e-3, 0.3)
    torch.testing.assert_close(new(x)[:, 4:], old(x)[:, 4:])
    assert torch.equal(new.instance.weight, old.weight[:4]) and torch.equal(new.instance.bias, old.bias[:4])
    old.running_mean.copy_(x[:1].mean((0, 2, 3)))  # where an image has the statistics of all, nothing changes
    old.running_var.copy_(x[:1].var((0, 2, 3), correction=0))
    torch.testing.assert_close(from_batch_norm(old)(x[:1]), old(x[:1]), rtol=1e-4, atol=1e-5)
    dense = from_batch_norm(old, share=0.4, first="batch")
    torch.testing.assert_close(dense(x)[:, :4], old(x)[:, :4])
    assert torch.equal(dense.instance.bias, old.bias[4:])
    frozen = from_batch_norm(old.requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_activation_inside_of_a_norm_stays():
    old, x = fill(BatchNormAct2d(8)).eval(), images((2, 8, 5, 5))
    new = from_batch_norm(old, share=0.5)
    torch.testing.assert_close(new(x)[:, 4:], old(x)[:, 4:])
    assert new(x).min() == 0 and old.act is new[1]
    with pytest.raises(UsageError, match="got a LayerNorm"):
        from_batch_norm(nn.LayerNorm(8))


def test_swap_puts_it_in_the_place_of_batch_norm():
    backbone = Spec("timm/test_resnet", {"image_size": 64}).build()
    fill(backbone)
    fresh = swap(backbone, "*.layer[123].*.bn1", "ibn")
    kept = swap(backbone, "*.layer[123].*.bn1", from_batch_norm)
    assert fresh.changed == kept.changed == tuple(f"network.layer{n}.0.bn1" for n in (1, 2, 3))
    assert fresh.before.params == fresh.after.params == kept.after.params
    old = backbone.network.layer1[0].bn1
    assert torch.equal(kept.model.network.layer1[0].bn1.instance.weight, old.weight[: old.num_features // 2])
    assert fresh.model.network.layer1[0].bn1.instance.weight.eq(1).all()


def test_wrong_options_are_refused():
    for call, says in (
        (lambda: ibn(8, share=0.0), "share is 0.0"),
        (lambda: ibn(8, share=1.5), "at most 1"),
        (lambda: ibn(1), "without channels"),
        (lambda: ibn(8, "third"), "has no variant 'third'"),
        (lambda: ibn(8, first="group"), "first is 'group'"),
        (lambda: ibn(8)(torch.zeros(2, 8, 1, 1)), "1x1 cells"),
    ):
        with pytest.raises(UsageError, match=says):
            call()


def test_divergence_is_the_papers():
    one, other = images((400, 3)), 2 * images((400, 3)) + 1
    a, b = one.double(), other.double()
    va, vb, gap = a.var(0, correction=0), b.var(0, correction=0), (a.mean(0) - b.mean(0)) ** 2
    first = (vb.sqrt() / va.sqrt()).log() + (va + gap) / (2 * vb) - 0.5
    second = (va.sqrt() / vb.sqrt()).log() + (vb + gap) / (2 * va) - 0.5
    assert divergence(one, other) == pytest.approx((first + second).mean().item())
    assert divergence(one, one) == pytest.approx(0, abs=1e-12)
    dead = torch.cat((one, torch.zeros(400, 1)), 1), torch.cat((other, torch.zeros(400, 1)), 1)
    assert divergence(*dead) == pytest.approx(divergence(one, other))


def test_shifts_keep_shape_and_are_the_same_each_time():
    x = (images((4, 3, 16, 16)) / 4 + 0.5).clamp(0, 1)
    for name, shift in page._SHIFTS.items():
        found = shift(x)
        assert found.shape == x.shape and found.isfinite().all() and torch.equal(found, shift(x)), name
        assert not torch.allclose(found, x, atol=0.02), name


def test_effect_compares_arms_that_differ_in_the_norms_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(1, 8, 8, 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("batch", "ibn_a")}
    assert small.baseline == "batch" and set(found) <= set(small.arms) and len(small.arms) == 8
    assert all(set(values) == set(small.metrics) for values in found.values())
    assert all(np.isfinite(list(values.values())).all() for values in found.values())
    assert found["batch"]["divergence_1"] != found["ibn_a"]["divergence_1"]
    assert small.measure("ibn_a", 0, tmp_path) == found["ibn_a"]
    assert found["batch"]["shifted"] == pytest.approx(np.mean([found["batch"][name] for name in page._COLOURS]))


def test_arms_change_the_norms_they_name():
    from vertebra.backbones.ibn_net import SmallResNet
    from vertebra.contracts import Preprocess

    shares = {}
    for arm, (_, change) in page._ARMS.items():
        backbone = SmallResNet(preprocess=Preprocess((16, 16), (0.5,) * 3, (0.25,) * 3), blocks=2, width=8)
        change(backbone)
        whole = sum(isinstance(m, nn.BatchNorm2d | InstanceNorm) for m in backbone.modules())
        split = [m.instance.num_channels for m in backbone.modules() if isinstance(m, IBN)]
        instance = sum(isinstance(m, InstanceNorm) for m in backbone.modules())
        shares[arm] = (split, instance, whole)
    assert {arm: split for arm, (split, _, _) in shares.items()} == {
        "batch": [],
        "ibn_a": [4, 4, 8, 8],
        "ibn_b": [],
        "quarter": [2, 2, 4, 4],
        "most": [6, 6, 12, 12],
        "last_too": [4, 4, 8, 8, 16, 16],
        "last_only": [16, 16],
        "instance": [],
    }
    assert (shares["batch"][1], shares["ibn_b"][1]) == (0, 3) and shares["instance"][1] == shares["instance"][2] == 15


def test_effect_checks_what_the_row_asks():
    toy = effect("toy", read("digits"))

    def measured(**changes: float) -> Measured:
        plain = {name: np.array([40.0, 42.0]) for name in (*page._COLOURS, "shifted")}
        plain |= {"top1": np.array([60.0, 62.0])} | {f"divergence_{n}": np.array([1.0, 1.0]) for n in (1, 2, 3)}
        values = {arm: dict(plain) for arm in toy.arms}
        values["ibn_a"] = {name: value + changes.get(name, 1.5) for name, value in plain.items()}
        values["ibn_a"] |= {f"divergence_{n}": np.array([0.5, 0.7]) for n in (1, 2, 3)}
        values["ibn_a"]["top1"] = plain["top1"] + changes.get("top1", 0.0)
        values["instance"]["top1"] = plain["top1"] - 3
        return Measured(values)

    assert [check.holds for check in toy.checks(measured())] == [True] * 4
    assert [check.holds for check in toy.checks(measured(top1=-0.6))] == [False, True, True, True]
    assert [check.holds for check in toy.checks(measured(grey=-0.1))] == [True, False, True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [4, 40])
def test_instance_norm_in_16_bit_is_that_of_32(layout, side):
    norm, x = fill(InstanceNorm(8)), images((2, 8, side, side)).to(memory_format=layout)
    rough = x.bfloat16().requires_grad_(True)
    found = copy.deepcopy(norm).bfloat16()(rough)
    torch.testing.assert_close(found.float(), norm(x), rtol=0.05, atol=0.05)
    exact = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((norm(exact) * x.flip(-1)).sum(), exact)
    (rough_slope,) = torch.autograd.grad((found * x.flip(-1).bfloat16()).sum(), rough)
    assert nn.functional.cosine_similarity(slope.flatten(), rough_slope.float().flatten(), dim=0) > 0.99
