"""Surgery to one-way kernels: which layers change, to what size, from which weights; and what its effect measures."""

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.blocks.one_way import OneWayConv2d, OneWayConv3d
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.studies.wave import Task, border
from vertebra.surgery.a_priori import a_priori, effect, weights_of
from vertebra.surgery.a_priori.forecast import (
    RATES,
    SETTINGS,
    Generator,
    Setting,
    built,
    classified,
    data,
    forecast,
    off,
    prepare,
)
from vertebra.surgery.fuse import fuse

TINY = Setting(Task(nodes=16, zone=8, saved=8), 20, 5, width=6, epochs=2, images=40, rounds=1)


class Volumes(nn.Module):
    """Convolutions of every kind that stay, and two that change."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv3d(2, 4, (5, 3, 3), stride=2, padding=1, dilation=(1, 2, 1))
        self.grouped = nn.Conv3d(4, 4, 3, groups=2, padding=1, bias=False)
        self.line = nn.Conv3d(4, 4, (3, 1, 1))
        self.point = nn.Conv3d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(self.line(self.grouped(self.wide(x))))


def one_way_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, OneWayConv2d | OneWayConv3d)}


@pytest.mark.parametrize("rank", [1, 2])
def test_layers_change_where_that_saves(rank):
    model = Volumes()
    operated = a_priori(model, rank=rank, images=(2, 14, 13, 12))
    assert operated.changed == ("wide", "grouped") and list(one_way_layers(operated.model)) == ["wide", "grouped"]
    saved = 2 * 4 * (45 - rank * 11) + 4 * 2 * (27 - rank * 9)
    assert operated.before.params - operated.after.params == saved
    wide = operated.model.get_submodule("wide")
    assert (wide.stride, wide.dilation, wide.padding) == ((2, 2, 2), (1, 2, 1), (1, 1, 1))
    torch.testing.assert_close(wide.bias, model.wide.bias)
    assert isinstance(model.wide, nn.Conv3d) and not one_way_layers(model)


def test_the_rank_never_costs_more_than_it_saves():
    backbone = cifar_resnet("nano")
    ranks = {rank: a_priori(backbone, rank=rank).model for rank in (1, 2)}
    assert all(layer.rank == 1 for model in ranks.values() for layer in one_way_layers(model).values())
    fives = a_priori(nn.Sequential(nn.Conv2d(3, 4, 5)), rank=4, images=(3, 9, 9)).model
    assert one_way_layers(fives)["0"].rank == 2  # of 25 weights, three terms would take 30


def test_the_paper_is_two_thirds_of_a_resnet_and_a_third_of_volumes():
    flat, deep = cifar_resnet("nano"), Generator(16)
    assert weights_of(a_priori(flat).model) / weights_of(flat) == pytest.approx(2 / 3)
    assert weights_of(a_priori(deep, images=(3, 8, 16, 16)).model) / weights_of(deep) == pytest.approx(1 / 3)


def test_multiply_accumulates_are_not_saved_by_a_dense_weight():
    backbone = cifar_resnet("nano")
    dense, layer = a_priori(backbone), a_priori(backbone, "cp_layer")
    assert dense.after.macs > dense.before.macs and fuse(dense.model.eval()).after.macs == dense.before.macs
    assert layer.after.macs < 0.5 * layer.before.macs
    assert a_priori(backbone, "cp_layer", compute="dense").after.macs > layer.before.macs
    with pytest.raises(UsageError, match="per can be kernel, input, layer, and compute dense or chain"):
        a_priori(backbone, compute="svd")  # type: ignore[arg-type]


def test_layers_keep_the_share_that_is_asked():
    backbone = Spec("timm/resnet18", {"image_size": 32}).build()
    for keep in (0.1, 0.4):
        operated = a_priori(backbone, "cp_layer", keep=keep, what="*.layer[34].*.conv?")
        for name, layer in one_way_layers(operated.model).items():
            old: nn.Conv2d = backbone.get_submodule(name)  # type: ignore[assignment]
            share = sum(factor.numel() for factor in layer.parameters() if factor.ndim == 3) / old.weight.numel()
            assert keep - 0.005 < share <= keep
        assert len(operated.changed) == 8


@torch.inference_mode()
def test_fitted_weights_compute_what_was_learned():
    model, sides = fill(Volumes()).eval(), (2, 14, 13, 12)
    x = images((2, *sides))
    expected = model(x)
    models = [a_priori(model, start="fitted", rank=rank, images=sides).model for rank in (2, 1)]
    found = [changed(x) for changed in (*models, a_priori(model, images=sides).model)]
    two, one, drawn = (float((output - expected).norm() / expected.norm()) for output in found)
    assert two < one < drawn


def test_what_has_one_term_is_found_again_after_training():
    """Compressed, exported as dense, compressed again: the same network."""
    torch.manual_seed(0)
    first = a_priori(cifar_resnet("nano").eval(), per="input").model
    dense = fuse(first).model
    again = a_priori(dense, per="input", start="fitted").model
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        torch.testing.assert_close(again(x).pooled, first(x).pooled, rtol=1e-3, atol=1e-4)


def test_shared_frozen_and_typed_layers_stay_so():
    conv = nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    operated = a_priori(model, inplace=True, images=(4, 8, 8))
    assert operated.model is model and operated.changed == ("0", "2") and model[0] is model[2]
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match="no convolution"):
        a_priori(model, images=(4, 8, 8))  # it is done already


def test_layers_with_a_forward_of_their_own_stay():
    backbone = Spec("timm/tf_efficientnet_b0", {"image_size": 32}).build()
    changed = a_priori(backbone).changed
    kinds = {type(backbone.get_submodule(name)).__name__ for name in changed}
    assert kinds == {"Conv2d"} and not any(name.endswith("conv_stem") for name in changed)  # Conv2dSame pads itself


def test_options_out_of_range_are_refused():
    backbone = cifar_resnet("nano")
    for options, words in (
        ({"variant": "cp_r3"}, "no variant 'cp_r3'"),
        ({"rank": 0}, "rank is 0"),
        ({"keep": 1.0}, "keep is 1.0"),
        ({"keep": 0.5, "rank": 2}, "both given"),
        ({"per": "filter"}, "per is 'filter'"),
        ({"start": "svd"}, "start is 'svd'"),
        ({"what": "*.conv9"}, r"named '\*.conv9'"),
    ):
        with pytest.raises(UsageError, match=words):
            a_priori(backbone, **options)  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = cifar_resnet("nano")
    assert a_priori(empty).after.params < a_priori(empty).before.params
    with pytest.raises(UsageError, match="no weights to fit"):
        a_priori(empty, start="fitted")


def test_a_generator_builds_fields_of_the_middle_from_where_they_are():
    torch.manual_seed(0)
    x = torch.zeros(1, 3, 32, 64, 64).requires_grad_(True)
    fields = Generator(4)(x)
    assert fields.shape == (1, 32, 32, 32)
    fields[0, 24, 28, 4].backward()  # node 44 of 64 down, 20 across
    assert x.grad is not None
    weight = x.grad.square().sum((0, 1))
    centre = [
        float((weight.sum([a for a in range(3) if a != at]) * torch.arange(weight.shape[at])).sum() / weight.sum())
        for at in range(3)
    ]
    assert centre == pytest.approx([24, 44, 20], abs=2.5)


def test_networks_of_the_arms_differ_in_weights_as_they_should():
    sizes = {arm: weights_of(built(arm, 0, SETTINGS["toy"])) for arm in ("dense", "cp_r1", "cp_r2", "shrunk")}
    assert sizes["cp_r1"] * 3 == sizes["dense"] and sizes["cp_r2"] == 2 * sizes["cp_r1"]
    assert sizes["shrunk"] == pytest.approx(sizes["cp_r1"], rel=0.05)


def test_arms_measure_what_they_say(tmp_path):
    (tmp_path / "prepared-0").mkdir()
    prepare(0, tmp_path / "prepared-0", TINY)
    found = {}
    for arm in ("dense", "cp_r1", "post_hoc", "dense_few"):
        (tmp_path / arm).mkdir()
        found[arm] = forecast(arm, 0, tmp_path / arm, TINY)
    assert found["dense"]["conv_params"] == 3 * found["post_hoc"]["conv_params"]
    assert found["dense"]["checkpoint_kb"] > 1.5 * found["cp_r1"]["checkpoint_kb"]
    assert found["post_hoc"]["error"] > 0 and np.isfinite(found["post_hoc"]["cut"]) and np.isnan(found["dense"]["cut"])
    assert all(np.isfinite(row["interior"]) and row["error"] > 0 for row in found.values())
    assert {found[arm]["rate"] for arm in found} <= set(RATES)


def test_errors_are_those_of_the_fields():
    _, test, _ = data(TINY)

    class Known(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 0.9 * test.zone

    edge = border(TINY.task.zone)
    found = off(Known(), test, TINY)  # type: ignore[arg-type]
    assert found["error"] == pytest.approx(10, rel=1e-4)
    assert found["interior"] == pytest.approx(10, abs=2)
    assert test.zone[:, :, edge].shape == (5, 8, 28)


def test_the_control_is_resnet_8():
    digits = read("digits")
    train, test = digits.split("train").select(np.arange(40)), digits.split("test").select(np.arange(20))
    found = {arm: classified(arm, 0, train, test, TINY) for arm in ("resnet8", "resnet8_r1")}
    assert found["resnet8_r1"]["conv_params"] < 0.7 * found["resnet8"]["conv_params"]
    assert all(0 <= row["top1"] <= 100 for row in found.values())


def test_the_checks_are_the_claims():
    made = effect("toy", None)
    rows = {
        "dense": (20, 3, 22, 120, 180, 540), "cp_r1": (21, 2, 23, 40, 70, 200), "cp_r2": (20, 2, 23, 80, 130, 380),
        "shrunk": (24, 2, 25, 40, 70, 200), "post_hoc": (26, 2, 28, 40, 70, 200),
        "dense_few": (40, 20, 40, 120, 180, 540),        "cp_r1_few": (39, 15, 40, 40, 70, 200),
        "resnet8": (0, 0, 0, 1, 1, 1), "resnet8_r1": (0, 0, 0, 1, 1, 1),
    }  # fmt: skip
    names = ("error", "gap", "interior", "conv_params", "checkpoint_kb", "training_state_kb")
    assert set(rows) == set(made.arms) and set(names) < set(made.metrics)

    def checks(arm: str = "dense", metric: str = "error", value: float = 20) -> list[bool]:
        values = {
            a: dict(zip(names, map(float, row), strict=True)) | {"cut": 50.0, "top1": 80.0} for a, row in rows.items()
        }
        values[arm][metric] = value
        arrays = {a: {m: np.full(3, v) for m, v in row.items()} for a, row in values.items()}
        return [check.holds for check in made.checks(Measured(arrays))]

    assert all(checks())
    for number, change in enumerate(
        [
            ("dense", "error", 19.0),
            ("shrunk", "error", 20.9),
            ("cp_r1_few", "gap", 20.1),
            ("cp_r1", "interior", 26.5),
            ("cp_r1", "checkpoint_kb", 91.0),
            ("post_hoc", "error", 20.5),
        ]
    ):
        assert [i for i, holds in enumerate(checks(*change)) if not holds] == [number]
