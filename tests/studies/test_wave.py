"""The wave solvers meet the truth and each other, and a zone driven from its boundary is the whole again."""

import numpy as np
import pytest

from vertebra.errors import UsageError
from vertebra.studies.wave import (
    RANGES,
    Differences,
    Draws,
    Elements,
    Task,
    apart,
    border,
    disagreement,
    draws,
    drift,
    simulate,
    sub_model,
    trajectories,
    wave,
)


def test_the_study_finds_what_solvers_owe():
    report = wave()()
    value = {name: score.value for name, score in report.scores.items()}
    assert value["disagreement"] < 1
    assert value["standing"] < 0.5
    assert value["drift"] < 0.5
    assert all(1.9 < order < 2.1 for found in report.details["orders"].values() for order in found)


def test_both_kinds_of_elements_know_planes_and_parabolas():
    at = np.linspace(0, 1, 9)
    plane, bowl = np.add.outer(2 * at, 3 * at)[None], np.add.outer(at**2, at**2)[None]
    for solver in (Elements(9, 1 / 8), Elements(9, 1 / 8, "triangles"), Differences(1 / 8)):
        assert np.abs(solver.laplacian(plane)[:, 1:-1, 1:-1]).max() < 1e-10
        np.testing.assert_allclose(solver.laplacian(bowl)[:, 1:-1, 1:-1], 4, rtol=1e-10)
    for shape in ("quads", "triangles"):
        elements = Elements(9, 1 / 8, shape)
        assert elements.mass.sum() == pytest.approx(1)
        assert np.abs((elements.stiffness - elements.stiffness.T).toarray()).max() == 0
        assert np.abs(elements.stiffness.sum(1)).max() < 1e-12


def test_triangles_are_the_five_point_stencil_and_quads_are_not():
    first = np.random.default_rng(0).normal(size=(1, 12, 12))
    fixed = {"fixed": np.ones(1, bool), "dt": 0.04, "steps": 30}
    expected = simulate(Differences(1 / 11), first, np.ones(1), **fixed)
    triangles = simulate(Elements(12, 1 / 11, "triangles"), first, np.ones(1), **fixed)
    quads = simulate(Elements(12, 1 / 11), first, np.ones(1), **fixed)
    np.testing.assert_allclose(triangles, expected, atol=1e-10)
    assert apart(quads, expected) > 0.1


def test_energy_is_lost_where_it_should_not_be_only_by_rounding_of_time():
    assert drift(65) < 0.005 and drift(33) > 3 * drift(65)
    assert disagreement(65) < 0.01 and disagreement(33) > 3 * disagreement(65)


def test_trajectories_do_not_meet():
    drawn = draws(6, seed=1)
    alone = Draws(*(getattr(drawn, name)[4:5] for name in ("x", "y", "frequency", "speed", "fixed")))
    task = Task(nodes=20, zone=8, saved=10)
    together, one = trajectories(task, drawn), trajectories(task, alone)
    np.testing.assert_allclose(together.zone[4:5], one.zone, atol=1e-12)
    np.testing.assert_array_equal(together.inputs[4:5], one.inputs)


def test_draws_keep_to_their_ranges_and_depend_on_the_seed_alone():
    first, again, other = draws(500, seed=3), draws(500, seed=3), draws(500, seed=4)
    for name, (low, high) in RANGES.items():
        values = getattr(first, name)
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
        np.testing.assert_array_equal(values, getattr(again, name))
        assert not np.array_equal(values, getattr(other, name))
    assert 0.4 < first.fixed.mean() < 0.6


def test_what_a_network_is_given():
    task = Task()
    found = trajectories(task, draws(4, seed=0))
    assert found.inputs.shape == (4, 3, 40, 32, 32) and found.inputs.dtype == np.float32
    assert found.zone.shape == (4, 40, 16, 16)
    for number in range(4):
        source = np.abs(found.inputs[number, 0]).max(0)
        row, column = np.unravel_index(source.argmax(), source.shape)
        assert abs(row / 31 - found.draws.y[number]) < 0.02 and abs(column / 31 - found.draws.x[number]) < 0.02
        assert found.inputs[number, 2, 0, 0, 0] == (1 if found.draws.fixed[number] else -1)
    assert np.abs(found.zone[:, :3]).max() < 1e-3 * np.abs(found.zone).max()  # the wave is still on its way
    assert np.abs(found.inputs[:, 0, :, task.inside, task.inside]).max() == 0  # no source in the zone


def test_a_zone_driven_from_its_true_boundary_is_the_whole_again():
    task, drawn = Task(every=1, saved=60), draws(3, seed=5)
    found = trajectories(task, drawn)
    ring = found.zone[:, :, border(task.zone)]
    assert ring.shape == (3, 60, 60)
    assert apart(sub_model(task, drawn, ring), found.zone) < 1e-10
    coarse = Task()
    found = trajectories(coarse, drawn)
    assert apart(sub_model(coarse, drawn, found.zone[:, :, border(16)]), found.zone) < 0.01
    assert apart(sub_model(coarse, drawn, 0.9 * found.zone[:, :, border(16)]), found.zone) == pytest.approx(
        0.1, abs=0.01
    )


def test_what_cannot_work_is_refused():
    with pytest.raises(UsageError, match=r"speed \* dt / spacing is 0.88; at most 0.7"):
        simulate(Differences(1 / 11), np.zeros((1, 12, 12)), np.ones(1), dt=0.08, steps=2)
    with pytest.raises(UsageError, match="as 17 33 65"):
        wave(sides=(17, 32))
