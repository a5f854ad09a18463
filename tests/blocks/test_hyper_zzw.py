"""HyperZZW: its arithmetic by hand, the stored context, constants after training, and its places in networks.

Parity with the authors' modules is that of the network, tests/backbones/test_terminator.py.
"""

import pytest
import torch
from torch import nn

from vertebra.blocks.hyper_zzw import (
    RGU,
    Constant,
    ContextSlowNet,
    GlobalHyperZZW,
    HyperChannel,
    HyperInteraction,
    Sine,
    SlowNet,
    hyper_zzw,
    standardise,
)
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap

CONTEXT = {"dim": 8, "layers": 2, "frequency": 1.0, "faithful": False}


def test_global_form_is_a_matrix_product_of_scores_and_maps():
    block, x = fill(hyper_zzw(3, kind="global", size=5, dim=8)), images((2, 3, 5, 5))
    assert isinstance(block, GlobalHyperZZW)
    expected = torch.einsum("bcik,bckj->bcij", x * block.slow(), x)
    torch.testing.assert_close(block(x), expected)
    assert not torch.allclose(block(x), x * block.slow() * x)
    torch.testing.assert_close(block(x, images((2, 3, 5, 5)).flip(0)), block.scores(x) @ x.flip(0))


def test_a_slow_network_is_the_paper_s_recursion():
    network = fill(SlowNet(2, (3, 4), dim=5, layers=1))
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 4), indexing="ij")
    points = torch.stack((rows, columns), -1)  # (3, 4, 2)
    first, second = (sine for sine in network.sines if isinstance(sine, Sine))
    h = (points @ first.weight.T + first.bias).sin()
    h = (points @ second.weight.T + second.bias).sin() * network.hidden[0](h) + network.bias_map[0, 0, ..., None]
    torch.testing.assert_close(network(), network.out(h).permute(2, 0, 1))


def test_start_of_a_slow_network():
    torch.manual_seed(0)
    network = SlowNet(400, (16, 16), dim=256, layers=2, frequency=10.0)
    wide = [float(sine.weight.detach().square().mean().sqrt()) for sine in network.sines]
    expected = [2 * torch.pi * 10 * (1 / 6) ** 0.5 * (shape + shape**2) ** 0.5 for shape in (6, 3, 2)]
    assert wide == pytest.approx(expected, rel=0.1)
    assert float(network.out.weight.detach().std()) == pytest.approx((1 / 256) ** 0.5 / 16, rel=0.02)
    assert all(bool((layer.bias == 1).all()) for layer in network.hidden)  # type: ignore[union-attr]


def test_sines_stay_exact_in_16_bit_and_under_autocast():
    torch.manual_seed(0)
    sine, grid = Sine(2, 8, 10.0, 6.0), images((2, 50))
    with torch.no_grad():
        expected = (sine.weight.double() @ grid.double()).sin()
        with torch.autocast("cpu", torch.bfloat16):
            assert float((sine(grid) - expected).abs().max()) < 1e-3
        rough = sine.bfloat16()(grid.bfloat16())
        rounded = (sine.weight.double() @ grid.bfloat16().double()).sin()
        assert float((rough - rounded).abs().max()) < 0.01


def test_renormalisation_of_context_networks():
    network = fill(ContextSlowNet(3, 3, **(CONTEXT | {"layers": 1})))  # type: ignore[arg-type]
    context = images((2, 3, 9, 9))
    slow, mean = network.slow, nn.functional.adaptive_avg_pool2d(context, 3).mean(0).flatten(1)
    gate = nn.functional.gelu(network.squeeze(network.reduce(mean.T)))
    h = slow.sines[1](slow.grid) * slow.hidden[0](slow.sines[0](slow.grid).T).T + slow.bias_map.flatten()
    h = (h + 0.1 * h / h.norm(dim=1, keepdim=True)) * network.gates[0](gate).T
    torch.testing.assert_close(network.train()(context), slow.out(h.T).T.reshape(3, 3, 3))


def test_context_is_stored_in_training_and_used_in_evaluation():
    torch.manual_seed(0)
    network = ContextSlowNet(3, 3, **CONTEXT)  # type: ignore[arg-type]
    context = images((4, 3, 9, 9))
    for _ in range(200):
        network.train()(context)
    torch.testing.assert_close(network.eval()(images((1, 3, 9, 9))), network.train()(context), rtol=1e-3, atol=1e-5)
    faithful = ContextSlowNet(3, 3, **(CONTEXT | {"faithful": True})).eval()  # type: ignore[arg-type]
    assert not [name for name, _ in faithful.named_buffers() if "running" in name]
    assert difference(faithful(context[:1]), faithful(context)) > 1e-3
    assert faithful.fused() is faithful


def test_constants_take_the_place_of_slow_networks():
    block = fill(hyper_zzw(6, kernel=5, dim=8)).eval()
    fused = fuse(block, images=(6, 9, 8)).model
    assert [type(module) for module in fused.modules()].count(Constant) == 1
    assert not any(isinstance(module, SlowNet | nn.BatchNorm2d) for module in fused.modules())
    x = images((2, 6, 9, 8))
    assert difference(fused(x), block(x)) < 1e-5
    fixed = fuse(fill(hyper_zzw(6, kind="global", size=7, dim=8)).eval(), images=(6, 7, 7)).model
    with pytest.raises(UsageError, match="built for maps of 7x7 and got 6x6"):
        fixed(images((1, 6, 6, 6)))
    exact = fill(hyper_zzw(6, dim=8)).double().eval()
    assert difference(exact.slow.fused()(), exact.slow(images((1, 6, 9, 9)).double())) < 1e-12


def test_gates_by_hand():
    x, high = images((2, 4, 5, 5)), images((2, 4, 5, 5)).flip(1)
    channel = fill(HyperChannel(4, dim=8))
    g = x.mean((2, 3))
    torch.testing.assert_close(channel(x), x * (g * channel.slow() * g).sigmoid()[..., None, None])
    both = fill(HyperInteraction(4, 5, dim=8, channel_dim=4))
    m, g = high.mean(1, keepdim=True), high.mean((2, 3))
    gate = (m * both.space() * m) * (g * both.channel() * g)[..., None, None]
    torch.testing.assert_close(both(high, x), x * gate.sigmoid())


def test_gated_unit_by_hand():
    unit, x = fill(RGU(4, 5)), images((2, 4, 5, 5))
    gated = unit.key(x) * unit.query(unit.value(x))
    norm = nn.InstanceNorm2d(4)
    expected = unit.out(nn.functional.gelu(norm(gated)) + unit.bias_map)
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(standardise(x), norm(x), rtol=1e-4, atol=1e-5)


def test_wrong_options_are_refused():
    for options, words in (
        ({"kernel": 4}, "kernel is 4; it must be odd, as 5"),
        ({"kind": "global"}, "size is None; the global form needs"),
        ({"kind": "both"}, "kind is 'both'"),
        ({"layers": 0}, "layers is 0"),
    ):
        with pytest.raises(UsageError, match=words):
            hyper_zzw(8, **options)
    with pytest.raises(UsageError, match="built for maps of 8x8 and got 8x9; build it with size=8 if"):
        hyper_zzw(4, kind="global", size=8)(images((1, 4, 8, 9)))


def test_swap_puts_it_in_the_place_of_depthwise_convolutions():
    backbone = Spec("timm/mobilenetv3_small_050", {"image_size": 64}).build()

    def mixes(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.stride == (1, 1)

    operated = swap(backbone, mixes, "hyper_zzw", kernel=5, dim=8)
    assert len(operated.changed) >= 6
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 64, 64))).pooled.isfinite().all()
