"""The study of large kernels: what is compared is equal in all but the kernel, and each measurement measures it."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.arms import parts
from vertebra.contracts import Measured
from vertebra.errors import UsageError
from vertebra.studies import large_kernels as study
from vertebra.studies.large_kernels import (
    KERNELS,
    METRICS,
    OWN,
    SETTINGS,
    SHAPES,
    Setting,
    break_even,
    claims,
    conflicts,
    effect,
    examined,
    exponents,
    large_kernels,
    linear_field,
    network,
    opposed,
    settled,
    shape_bias,
    things,
)

TINY = Setting(width=4, size=32, images=64, epochs=1, things=48, rounds=1, side=48, looked=4)


def depthwise_sizes(backbone: nn.Module) -> set[int]:
    return {m.kernel_size[0] for m in backbone.modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d}


def test_networks_differ_in_their_kernels_and_not_in_size_or_depth() -> None:
    nets = {kernel: network(kernel, SETTINGS["toy"]) for kernel in KERNELS}
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert max(sizes) / min(sizes) < 1.02
    for kernel, net in nets.items():
        assert kernel in depthwise_sizes(net)
        assert [len(stage) for stage in net.stages] == [4, 4]  # type: ignore[arg-type]
        assert [level.stride for level in net.levels] == [2, 4]
    assert nets[3].width > nets[7].width > nets[13].width == 32


def test_dilated_branches_are_beside_the_kernels_that_can_have_them() -> None:
    assert max(depthwise_sizes(network(13, TINY, policy="dilated"))) == 13
    assert depthwise_sizes(network(3, TINY, policy="dilated")) == {3}


def test_things_differ_in_texture_inside_their_shape_alone() -> None:
    one, other = (things(np.array([0]), np.array([t]), 48, seed=3)[0].astype(int) for t in (0, 1))
    differs = (one != other).any(-1)
    assert 0.05 < differs.mean() < 0.5
    rows, columns = np.nonzero(differs)
    box = differs[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert max(box.shape) < 0.9 * 48  # the ground is the same
    ring, square = (things(np.array([s]), np.array([0]), 48, seed=3)[0] for s in (SHAPES.index("ring"), 0))
    assert not np.array_equal(ring, square)
    assert np.array_equal(
        things(np.array([2]), np.array([4]), 32, seed=1), things(np.array([2]), np.array([4]), 32, seed=1)
    )


def test_conflicts_are_all_pairs_of_a_shape_with_anothers_texture() -> None:
    shape, texture = conflicts(300)
    assert (shape != texture).all() and len(SHAPES) == len(OWN)
    pairs, counts = np.unique(np.stack([shape, texture]), axis=1, return_counts=True)
    assert pairs.shape[1] == 30 and set(counts) == {10}


@pytest.mark.parametrize(("says", "expected"), [("shape", 100.0), ("texture", 0.0), ("neither", 50.0)])
def test_shape_bias_is_the_share_of_shape_among_what_is_told(monkeypatch, says: str, expected: float) -> None:
    shape, texture = conflicts(24)
    told = {"shape": shape, "texture": texture}.get(says)
    if told is None:
        told = np.array([next(c for c in range(6) if c not in (s, t)) for s, t in zip(shape, texture, strict=True)])
    logits = nn.functional.one_hot(torch.from_numpy(told), 6).float()
    model = lambda images: {"logits": logits[: len(images)]}  # noqa: E731
    monkeypatch.setattr("vertebra.arms.trained", lambda *_, **__: SimpleNamespace(model=model, scores={"top1": 90.0}))
    found = shape_bias(network(3, TINY), TINY, seed=0)
    assert found == {"shape_bias": expected, "own_top1": 90.0, "decided": 0.0 if says == "neither" else 100.0}


def test_settled_takes_the_statistics_of_the_images() -> None:
    backbone = network(3, TINY)
    seen = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    settled(backbone, seen)
    norm = backbone.stem[0][1]  # type: ignore[index]
    inputs = []
    backbone.stem[0][0].register_forward_hook(lambda *args: inputs.append(args[-1]))  # type: ignore[index]
    from vertebra.data.pixels import normalised

    with torch.no_grad():
        backbone(normalised(seen, backbone.preprocess))
    torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)))
    assert not backbone.training and norm.momentum == 0.1


def test_fields_of_linear_stacks_grow_as_theory_says() -> None:
    grown = exponents(depths=(4, 16, 64), kernels=(5, 11, 21), seeds=(0,), side=129)
    assert 0.4 <= grown["depth"] <= 0.6
    assert 0.9 <= grown["kernel"] <= 1.1
    assert linear_field(1, 9, 33, seed=0) == pytest.approx(7 / 33)  # 7 x 7 is the least square with half of 9 x 9


def test_few_large_blocks_see_further_than_many_small_ones_of_equal_cost() -> None:
    few, many = (opposed(name, seed=0, side=64) for name in ("few_large", "many_small"))
    assert few["mmacs"] == pytest.approx(many["mmacs"], rel=0.05)
    assert (few["depth"], many["depth"]) == (2, 6)
    assert few["field_50_init"] > 1.3 * many["field_50_init"]


def test_break_even_is_the_first_kernel_that_is_faster_by_fourier(monkeypatch) -> None:
    monkeypatch.setattr(study, "_milliseconds", lambda ways, repeats: [ways[0].args[0].kernel_size[0], 9.5])
    found = break_even(sides=(8,), kernels=(5, 7, 9, 11, 13))
    assert found["inference"]["8"]["kernel"] == found["training"]["8"]["kernel"] == 11
    assert list(found["training"]["8"]["ms"]) == ["5", "7", "9", "11"]
    assert break_even(sides=(8,), kernels=(5, 7))["inference"]["8"]["kernel"] is None


def test_break_even_measures() -> None:
    found = break_even(sides=(8,), kernels=(3,), channels=2, repeats=1)
    assert all(value > 0 for mode in found.values() for value in mode["8"]["ms"]["3"])


GOOD = {
    "field_50_init": (10, 20, 30),
    "field_50": (10, 20, 30),
    "shape_bias": (20, 22, 26),
}


def table(**changes) -> dict[int, dict[str, float]]:
    return {k: {name: row[i] for name, row in (GOOD | changes).items()} for i, k in enumerate(KERNELS)}


def test_claims_are_seen_where_they_are_and_only_there() -> None:
    few_many = {"few_large": {"field_50_init": 18.0}, "many_small": {"field_50_init": 9.0}}
    grown = {"depth": 0.51, "kernel": 0.96}
    assert all(claims(table(), few_many, grown).values())
    names = list(claims(table(), few_many, grown))
    for lost, seen in [
        (0, claims(table(field_50_init=(10, 9, 30)), few_many, grown)),
        (1, claims(table(field_50=(10, 20, 20)), few_many, grown)),
        (2, claims(table(shape_bias=(20, 40, 24)), few_many, grown)),
        (3, claims(table(), {"few_large": {"field_50_init": 9}, "many_small": {"field_50_init": 9}}, grown)),
        (4, claims(table(), few_many, {"depth": 0.39, "kernel": 1})),
        (5, claims(table(), few_many, {"depth": 0.5, "kernel": 1.2})),
    ]:
        assert [name for name, holds in seen.items() if not holds] == [names[lost]]


def test_examined_gives_every_number() -> None:
    train, test, _ = parts("large_kernels", None, TINY.images)
    found = examined(3, 0, TINY, train, test)
    assert set(METRICS) - set(found) == {"mmacs", "exponent_depth", "exponent_kernel"}
    assert all(np.isfinite(value) for value in found.values())
    assert 0 < found["field_20_init"] <= found["field_50_init"] <= found["field_99_init"] <= 100


def test_the_study_runs_from_one_call(monkeypatch) -> None:
    monkeypatch.setattr(study, "exponents", lambda: {"depth": 0.5, "kernel": 1.0})
    monkeypatch.setattr(study, "break_even", partial(break_even, sides=(8,), kernels=(3,), channels=2, repeats=1))
    monkeypatch.setattr(study, "opposed", partial(opposed, side=32))
    report = large_kernels(kernels=(3, 5), seeds=(0,), setting=TINY)()
    details = json.loads(json.dumps(report.details))
    assert list(details["kernels"]) == ["3", "5"] and details["kernels"]["5"]["ms"] > 0
    first, last = details["kernels"]["3"], details["kernels"]["5"]
    for name in ("field_50", "field_50_init", "shape_bias", "top1"):
        score = report.scores[f"{name}_gain"]
        assert score.n == 1 and score.value == pytest.approx(last[name] - first[name])
    assert len(details["seen"]) == 6 and details["break_even"]["training"]["8"]["ms"]


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match="at least two that rise"):
        large_kernels(kernels=(7, 3))
    with pytest.raises(UsageError, match="no seeds"):
        large_kernels(seeds=())


def test_effect_checks_are_the_claims() -> None:
    made = effect("toy", None)
    assert list(made.arms) == ["kernel_3", "kernel_7", "kernel_13", "few_large", "many_small", "linear"]
    values = {arm: {name: np.full(3, np.nan) for name in METRICS} for arm in made.arms}
    for name, row in GOOD.items():
        for arm, value in zip(("kernel_3", "kernel_7", "kernel_13"), row, strict=True):
            values[arm][name] = np.full(3, float(value))
    values["few_large"]["field_50_init"], values["many_small"]["field_50_init"] = np.full(3, 18.0), np.full(3, 9.0)
    values["linear"]["exponent_depth"], values["linear"]["exponent_kernel"] = np.full(3, 0.5), np.full(3, 1.0)
    assert all(check.holds for check in made.checks(Measured(values)))
    values["kernel_13"]["shape_bias"] = np.full(3, 24.0)
    missed = [check for check in made.checks(Measured(values)) if not check.holds]
    assert [check.name for check in missed] == ["the largest kernel goes by shape, 5 points more"]
    assert "3: 20.0" in missed[0].found
