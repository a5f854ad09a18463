"""SGConv: lengths and parameters by formula, parity with the authors' layer, direct convolution, and behaviour."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.blocks import sgconv as page
from vertebra.blocks.sgconv import LongConv, convolve, effect, kernel_parameters, scales_of, sgconv, sgconv_2d, slope
from vertebra.config import Plan
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.methods.supervised import Supervised
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.surgery.swap import swap
from vertebra.tasks.classify import classify
from vertebra.training.optimizers import parameter_groups

GOLDEN = Path(__file__).parents[1] / "golden" / "sgconvnext.json"


@pytest.mark.parametrize(
    ("length", "piece", "scales"),
    [(100, 8, 5), (1024, 32, 6), (1024, 2, 10), (50_176, 64, 11), (64, 64, 1), (7, 64, 1)],
)
def test_pieces_and_parameters_are_those_of_the_formula(length, piece, scales):
    assert scales_of(length, piece) == scales
    for kernels, sides, direction in ((1, 1, "causal"), (1, 2, "bidirectional"), (3, 2, "bidirectional")):
        with torch.device("meta"):
            block = sgconv(6, length=length, piece=piece, kernels=kernels, direction=direction)
        whole = block.conv.kernel.whole()
        assert whole.shape == (kernels * sides, 6, piece * 2 ** (scales - 1)) and whole.shape[-1] >= length
        made = kernels * sides * 6 * piece * scales + kernels * 6 + (kernels * 6 + 1) * 6
        assert sum(p.numel() for p in block.parameters()) == made


def test_parameters_grow_with_the_logarithm_of_the_length():
    found = [sgconv(4, length=length, piece=8).conv.kernel.pieces.numel() for length in (256, 512, 1024, 2048)]
    assert [after - before for before, after in pairwise(found)] == [2 * 4 * 8] * 3


CASES: dict[str, dict[str, Any]] = {
    "causal": {"variant": "causal", "piece": 8},
    "bidirectional": {"piece": 8},
    "sum": {"variant": "sum", "direction": "causal", "piece": 8},
    "sum_bidirectional": {"variant": "sum", "piece": 8},
    "nearest": {"variant": "nearest", "piece": 8},
    "range": {"piece": 4, "decay": (0.5, 3.0)},
    "kernels": {"kernels": 3, "piece": 8},
    "learnable": {"variant": "learnable", "direction": "causal", "kernels": 2, "piece": 8},
}


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_authors_layer_also_at_lengths_after_the_first(name):
    block = fill(sgconv(6, length=100, **CASES[name])).eval()
    kernel = block.conv.kernel
    with torch.no_grad():
        kernel.pieces.copy_(images((kernel.pieces.numel(),)))
        if kernel.power is not None:
            kernel.power.copy_(torch.linspace(0.3, 1, 6))
    kernel.measure()
    with torch.inference_mode():
        found = {f"tokens_{length}": block(images((2, length, 6))) for length in (100, 77, 150)}
    assert max(check_golden(found, stored(GOLDEN, name).golden).values()) < 1e-5


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", [12, 77, 150])
def test_the_transform_is_the_direct_convolution(length, direction):
    conv = sgconv(3, length=100, piece=8, direction=direction).conv
    x = images((2, 3, length))
    forth, *back = conv.kernel(length).split(1)
    behind = back[0][0] if back else torch.zeros(3, length)
    weight = torch.cat([forth[0].flip(-1), behind], -1)[:, None]  # from the oldest place to the one ahead most
    direct = nn.functional.conv1d(nn.functional.pad(x, (length - 1, length)), weight, groups=3) + conv.skip[:, None] * x
    with torch.no_grad():  # the way without gradients is another one
        assert difference(conv(x), direct) < 1e-5
    assert difference(conv(x).detach(), direct.detach()) < 1e-5


def test_a_causal_layer_sees_nothing_ahead_and_the_other_does():
    x = images((1, 40, 4))
    changed = x.clone()
    changed[:, 30:] += 1
    for direction, same in (("causal", True), ("bidirectional", False)):
        block = sgconv(4, length=40, piece=4, direction=direction)
        assert torch.allclose(block(x)[:, :30], block(changed)[:, :30], atol=1e-5) is same


def test_a_scale_falls_by_the_decay_from_the_place_itself_outwards():
    block = sgconv(3, length=64, piece=8, decay=(1.0, 3.0), direction="causal")
    kernel = block.conv.kernel
    nn.init.ones_(kernel.pieces)
    whole = kernel.whole()[0]
    for channel, decay in enumerate((1.0, 2.0, 3.0)):
        expected = [decay**3] * 8 + [decay**2] * 8 + [decay] * 16 + [1.0] * 32
        torch.testing.assert_close(whole[channel], torch.tensor(expected))


def test_the_norm_is_taken_once_and_travels_with_the_weights():
    block, x = sgconv(4, length=50, piece=4), images((2, 4, 50))
    kernel = block.conv.kernel
    torch.testing.assert_close((kernel.whole() / kernel.norm).norm(dim=-1), torch.ones(2, 4))
    first = kernel(50)
    with torch.no_grad():
        kernel.pieces.mul_(2)
    torch.testing.assert_close(kernel(50), 2 * first)  # a scale that is learnt stays
    other = sgconv(4, length=50, piece=4)
    assert "conv.kernel.norm" in block.state_dict()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other.conv(x), block.conv(x))
    kernel.measure()
    torch.testing.assert_close(kernel(50), first)


def test_gradients_are_those_of_torchs_transforms():
    x = images((2, 1, 3, 11)).double().requires_grad_()
    forth, back = (images((2, 3, 11)).double().mul(sign).requires_grad_() for sign in (1, -2))
    assert torch.autograd.gradcheck(convolve, (x, forth))
    assert torch.autograd.gradcheck(convolve, (x, forth, back))
    first = torch.autograd.grad(convolve(x, forth).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_training_compiles_in_one_graph():
    block, x = sgconv(4, length=30, piece=4), images((2, 30, 4))
    block(x).square().sum().backward()
    expected = block.conv.kernel.pieces.grad.clone()
    block.zero_grad()
    torch.compile(block, backend="eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(block.conv.kernel.pieces.grad, expected)


def test_transforms_stay_in_32_bit():
    block, x = sgconv(8, length=200, piece=8), images((2, 8, 200))
    conv = block.conv.bfloat16()
    rough = conv(x.bfloat16())
    exact = LongConv(kernel=conv.kernel, dim=8)
    exact.skip = nn.Parameter(conv.skip.float())
    assert rough.dtype == torch.bfloat16
    assert torch.equal(rough, exact(x.bfloat16().float()).bfloat16())  # rounded once, at the end


def test_maps_are_read_row_after_row():
    block, x = sgconv_2d(3, "causal", length=30, piece=4), images((2, 3, 5, 6))
    torch.testing.assert_close(block(x).flatten(2), block.conv(x.flatten(2)))
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    moved = (block(changed) - block(x)).abs().amax((0, 1)) > 1e-5
    assert not moved[:2].any() and not moved[2, :3].any() and moved[2, 3:].all() and moved[3:].all()


def test_kernels_do_not_decay_in_training():
    net = timm("convnext_atto", image_size=32, network={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]})
    swap(net, "*.conv_dw", sgconv_2d, length=64, piece=4, inplace=True)
    method = Supervised(classify(net, ["one", "other"]))
    groups = parameter_groups(method, Plan(epochs=1, weight_decay=0.05))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decays[id(p)] for name, p in net.named_parameters()}
    assert {rate for name, rate in found.items() if "kernel.pieces" in name or "skip" in name} == {0.0}
    assert found["network.stages.0.blocks.0.mlp.fc1.weight"] == 0.05


def test_takes_the_place_of_a_layer_over_tokens():
    net = timm("vit_tiny_patch16_224", image_size=32, network={"depth": 2, "embed_dim": 24, "num_heads": 2})
    operated = swap(net, "Mlp", "sgconv", length=5, piece=2)
    assert len(operated.changed) == 2
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 32, 32))).pooled.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "twin"}, "no variant 'twin'"),
        ({"mode": "product"}, "mode is 'product'; it can be cat or sum"),
        ({"modes": "cat"}, "no option 'modes'; did you mean|no option 'modes'"),
        ({"length": 0}, "length is 0"),
        ({"piece": 0}, "piece is 0"),
        ({"kernels": 0}, "kernels is 0"),
        ({"decay": 0.0}, "decay is 0.0; it must be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        sgconv(8, **options)


def test_effect_compares_arms_that_differ_in_the_kernel_alone(tmp_path, monkeypatch):
    setting = page._Setting(4, 1, 8, 40, 1)
    monkeypatch.setitem(page._SETTINGS, "toy", setting)
    monkeypatch.setattr(page, "slope", lambda width: 1.1)
    small = effect("toy", read("digits"))
    sequences = {arm: page.armed(arm, setting) for arm in small.arms if not arm.startswith("net")}
    assert {arm: kernel_parameters(net) / 4 for arm, net in sequences.items()} == {
        "local": 7 + 1,
        "sgconv": 2 * 2 * 6,
        "flat": 2 * 2 * 6,
        "free": 2 * 64,
        "s4d": 1 + 16 + 16 + 2 * 2 * 16,
    }
    others = {sum(p.numel() for p in net.parameters()) - kernel_parameters(net) for net in sequences.values()}
    assert max(others) - min(others) == 4  # the local convolution has no factor beside it
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("sgconv", "s4d")}
    assert found["sgconv"]["slope"] == 1.1 and np.isnan(found["s4d"]["slope"])
    assert found["sgconv"]["nll"] != found["s4d"]["nll"]


def test_effect_builds_small_convnexts_with_and_without():
    nets = [page.armed(arm, page._SETTINGS["toy"]) for arm in ("net_7x7", "net_sgconv")]
    found = [sum(isinstance(module, page.SGConv2d) for module in net.modules()) for net in nets]
    assert found == [0, 6] and nets[0].levels == nets[1].levels


def test_effect_checks_what_the_row_asks():
    toy = effect("toy", read("digits"))

    def measured(sgconv: float, kernel: float, slope: float, net: float) -> Measured:
        top1 = {"local": 40.0, "flat": 43.5, "free": 45.0, "s4d": 45.0, "net_7x7": 60.0, "net_sgconv": net}
        arms = {**top1, "sgconv": sgconv}
        values = {arm: {"top1": np.array([one, one])} for arm, one in arms.items()}
        values["free"]["kernel"], values["sgconv"]["kernel"] = np.array([800.0]), np.array([kernel])
        values["sgconv"]["slope"] = np.array([slope])
        return Measured(values)

    assert all(check.holds for check in toy.checks(measured(45.6, 36.0, 1.15, 59.5)))
    assert not any(check.holds for check in toy.checks(measured(44.9, 41.0, 1.3, 58.5)))


def test_the_state_spaces_kernel_is_its_recurrence():
    kernel = page._Diagonal(dim=2, states=3)
    poles = torch.complex(-kernel.fall.exp(), kernel.turn).view(2, 3) * kernel.step.exp()[:, None]
    mix = torch.view_as_complex(kernel.mix) * (poles.exp() - 1) / (poles / kernel.step.exp()[:, None])
    state, found = torch.ones(2, 3, dtype=torch.complex64), []
    for _ in range(6):
        found.append(2 * (mix * state).sum(-1).real)
        state = state * poles.exp()
    torch.testing.assert_close(kernel(6), torch.stack(found, -1), rtol=1e-4, atol=1e-4)


def test_the_slope_is_a_number():
    assert np.isfinite(slope(2, (64, 128, 256)))
