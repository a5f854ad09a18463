"""Residual units: the authors' unit in numpy, and what each order and shortcut computes."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.residual_unit import VARIANTS, Order, Shortcut, residual_unit
from vertebra.errors import UsageError
from vertebra.parity import fill, images


def normed(x: np.ndarray, norm: nn.Module) -> np.ndarray:
    state = {name: value.double().numpy()[:, None, None] for name, value in norm.state_dict().items() if value.ndim}
    return (x - state["running_mean"]) / np.sqrt(state["running_var"] + 1e-5) * state["weight"] + state["bias"]


def convolved(x: np.ndarray, conv: nn.Module, stride: int = 1) -> np.ndarray:
    weight = conv.state_dict()["weight"].double().numpy()
    side = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, weight)


@pytest.mark.parametrize(("outputs", "stride"), [(16, 1), (32, 2)])
def test_the_authors_unit_in_numpy(outputs, stride):
    unit, x = residual_unit(16, outputs=outputs, stride=stride).eval(), images((2, 16, 6, 6))
    fill(unit)
    parts, way, changes = list(unit.branch), x.double().numpy(), stride > 1
    if changes:
        assert len(unit.common) == 2 and not isinstance(unit.shortcut.way, nn.Sequential)  # no norm on the shortcut
        way = np.maximum(normed(way, unit.common[0]), 0)
    h = convolved(way if changes else np.maximum(normed(way, parts[0]), 0), parts[0 if changes else 2], stride)
    rest = parts[1:] if changes else parts[3:]
    for norm, conv in ((rest[0], rest[2]), (rest[3], rest[5])):
        h = convolved(np.maximum(normed(h, norm), 0), conv)
    expected = h + (convolved(way, unit.shortcut.way, stride) if changes else way)
    np.testing.assert_allclose(unit(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def kinds(order: Order) -> list[str]:
    unit = residual_unit(16, order)
    return [type(m).__name__[0] for m in (*unit.branch, nn.Linear(1, 1), *unit.behind)]


def test_orders_are_the_papers():
    assert "".join(kinds("full")) == "BRCBRCBRCL"
    assert "".join(kinds("original")) == "CBRCBRCBLR"
    assert "".join(kinds("norm_behind")) == "CBRCBRCLBR"
    assert "".join(kinds("activation_before")) == "CBRCBRCBRL"
    assert "".join(kinds("activation_only")) == "RCBRCBRCBL"
    assert set(VARIANTS) == set(get_args(Order))


def test_shortcuts_are_the_papers():
    x = images((2, 16, 5, 5))

    def both(kind: Shortcut) -> tuple[Tensor, Tensor, nn.Module]:
        unit = fill(residual_unit(16, shortcut=kind)).eval()
        return unit(x), unit.branch(x), unit.shortcut

    out, branch, _ = both("identity")
    torch.testing.assert_close(out, x + branch)
    out, branch, _ = both("half")
    torch.testing.assert_close(out, 0.5 * x + branch)
    out, branch, _ = both("half_both")
    torch.testing.assert_close(out, 0.5 * x + 0.5 * branch)
    out, branch, way = both("gate")
    gate = torch.sigmoid(way.gate(x))
    torch.testing.assert_close(out, (1 - gate) * x + gate * branch)
    out, branch, way = both("shortcut_gate")
    torch.testing.assert_close(out, (1 - torch.sigmoid(way.gate(x))) * x + branch)
    out, branch, way = both("conv")
    torch.testing.assert_close(out, way.way(x) + branch)
    out, branch, _ = both("dropout")
    torch.testing.assert_close(out, x + branch)  # in evaluation
    assert residual_unit(16, shortcut="gate").shortcut.gate.bias.unique().item() == -6


def test_strides_stand_where_they_are_asked_for():
    def strides(where: str) -> list[int]:
        unit = residual_unit(16, stride=2, stride_in=where)  # type: ignore[arg-type]
        return [m.stride[0] for m in unit.branch if isinstance(m, nn.Conv2d)]

    assert strides("1x1") == [2, 1, 1] and strides("3x3") == [1, 2, 1]
    assert [m.kernel_size[0] for m in residual_unit(16, bottleneck=False).branch if isinstance(m, nn.Conv2d)] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"variant": "ful"}, "did you mean full"), ({"outputs": 18}, "multiple of 4"), ({"stride": 3}, "stride 1 or 2")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        residual_unit(16, **options)
