"""ReZero: one scalar, the identity at the start, the authors' transformer layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.blocks.rezero import DecoderLayer, EncoderLayer, Gate, Residual, effect, jacobian_spectrum, rezero
from vertebra.blocks.rezero.deep_nets import attending, connected, spread
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import check_golden, fill, images, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "rezero.json"


def test_a_layer_has_one_scalar_more_than_its_branch():
    branch = nn.Linear(8, 8)
    layer = rezero(branch)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in branch.parameters()) + 1
    x = images((3, 8))
    assert torch.equal(layer(x), x)
    assert layer.gate is not None
    layer.gate.alpha.data.fill_(0.5)
    torch.testing.assert_close(layer(x), x + 0.5 * branch(x))
    torch.testing.assert_close(Residual(branch, gate="one")(x), x + branch(x))


def test_transformer_layers_share_one_scalar_and_start_as_the_identity():
    x, memory = images((5, 2, 16)), images((4, 2, 16))
    for layer in (EncoderLayer(16, heads=4, hidden=32), DecoderLayer(16, heads=4, hidden=32)):
        assert [name for name, p in layer.named_parameters() if p.shape == (1,)] == ["resweight"]
        given = (x, memory) if isinstance(layer, DecoderLayer) else (x,)
        assert torch.equal(layer.eval()(*given), x)


def test_the_jacobian_of_new_layers_is_the_identity():
    stack = nn.Sequential(*(EncoderLayer(8, heads=2, hidden=16) for _ in range(12))).eval()
    torch.testing.assert_close(jacobian_spectrum(stack, images((4, 1, 8))), torch.ones(32), rtol=0, atol=1e-6)


def test_the_spectrum_of_a_linear_map_is_its_own():
    linear = nn.Linear(6, 4, bias=False)
    expected = torch.linalg.svdvals(linear.weight)
    torch.testing.assert_close(jacobian_spectrum(linear, images((1, 6))[0]), expected)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_parity_with_the_authors_layers(kind):
    known = stored(GOLDEN, kind)
    layer = (EncoderLayer if kind == "encoder" else DecoderLayer)(32, heads=4, hidden=64)
    x = images(known.shape)
    with torch.inference_mode():
        found = fill(layer).eval()(x) if kind == "encoder" else fill(layer).eval()(x, x[:5].flip(0))
    check_golden(found, known.golden, 1e-6)


def test_masks_reach_the_attention():
    layer = fill(EncoderLayer(16, heads=4, hidden=32)).eval()
    x, causal = images((5, 2, 16)), torch.ones(5, 5).triu(1).bool()
    torch.testing.assert_close(layer(x, causal)[0], layer(x[:1])[0])
    assert not torch.allclose(layer(x)[0], layer(x[:1])[0], atol=1e-3)


def test_gates_are_small_in_bfloat16_too():
    gate = Gate(0.25).bfloat16()
    assert gate(torch.ones(2, dtype=torch.bfloat16)).tolist() == [0.25, 0.25]


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="dim must be a multiple of heads"):
        EncoderLayer(10, heads=4)
    with pytest.raises(UsageError, match="activation is 'tanh'"):
        EncoderLayer(8, heads=4, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gate is 'none'"):
        Residual(nn.Identity(), gate="none")  # type: ignore[arg-type]


def test_the_effects_networks_differ_in_the_gate_alone():
    sizes = {form: sum(p.numel() for p in connected(form, depth=5, width=8, size=4).parameters()) for form in FORMS}
    assert sizes["plain"] == sizes["residual"] == sizes["rezero"] - 5 == sizes["norm"] - 5 * 16
    tokens = attending("rezero", layers=3, dim=8, size=8)(images((2, 3, 8, 8)))
    assert tokens.pooled.shape == (2, 8)
    assert spread("rezero", 2) < spread("residual", 2)


FORMS = ("plain", "residual", "norm", "rezero")


def test_checks_read_the_measurements():
    found = effect("toy", read("digits"))
    values = {arm: {metric: np.full(2, 5.0) for metric in found.metrics} for arm in found.arms}
    assert not any(check.holds for check in found.checks(Measured(values)))
    values["rezero"] = {metric: np.full(2, 1.0) for metric in found.metrics}
    values["plain"]["fc_epochs"] += 6
    assert all(check.holds for check in found.checks(Measured(values)))
