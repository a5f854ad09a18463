import numpy as np
import pytest

from vertebra.errors import UsageError
from vertebra.studies.bob import Setting, bob, standardise

NAMES = ("good", "fair", "poor", "broken")


def settings(rng: np.random.Generator) -> list[Setting]:
    """Three tasks, one with two settings; "broken" is at chance."""
    found = []
    for task, name, level in (
        ("classification", "linear_top1", 80),
        ("classification", "finetune_top1", 85),
        ("low-label", "fewshot_5", 60),
        ("retrieval", "map", 50),
    ):
        chances = dict(zip(NAMES, (level, level - 4, level - 15, 10), strict=True))
        samples = {one: (rng.random((3, 300)) < chance / 100) * 100.0 for one, chance in chances.items()}
        found.append(Setting(task, name, {one: x.mean() for one, x in samples.items()}, "higher", samples))
    return found


def test_a_broken_backbone_is_last_and_intervals_tell_it_apart() -> None:
    report = bob(settings(np.random.default_rng(0)))()
    assert report.details["rank"][-1] == "broken" and report.details["n"] == 4
    assert report.scores["broken"].interval[1] < report.scores["poor"].interval[0]
    assert all(low < report.scores[name].value < high for name, (low, high) in report.details["intervals"].items())


def test_z_is_the_mean_over_tasks_of_the_mean_over_settings() -> None:
    given = settings(np.random.default_rng(1))
    z = [standardise(np.array([s.scores[name] for name in NAMES])) for s in given]
    expected = ((z[0] + z[1]) / 2 + z[2] + z[3]) / 3
    found = bob(given)()
    assert [found.scores[name].value for name in NAMES] == pytest.approx(expected)


def test_affine_rescaling_changes_nothing() -> None:
    given = settings(np.random.default_rng(2))
    scaled = [
        Setting(
            s.task,
            s.name,
            {name: -0.3 * value + 7 for name, value in s.scores.items()},
            "lower",
            {name: -0.3 * x + 7 for name, x in s.samples.items()},
        )
        for s in given
    ]
    a, b = bob(given)(), bob(scaled)()
    assert list(a.scores) == list(b.scores)
    for name in NAMES:
        assert a.scores[name].value == pytest.approx(b.scores[name].value)
        assert a.scores[name].interval == pytest.approx(b.scores[name].interval)


def test_stability_and_correlation() -> None:
    same = {"a": 3.0, "b": 2.0, "c": 1.0}
    given = [Setting("x", "x1", same), Setting("y", "y1", same), Setting("z", "z1", {"a": 1.0, "b": 2.0, "c": 3.0})]
    details = bob(given)().details
    assert details["correlation"]["x"]["y"] == pytest.approx(1) and details["correlation"]["x"]["z"] == pytest.approx(
        -1
    )
    assert details["stability"]["z"] == {"tau": pytest.approx(1), "same_first": True}
    assert details["resampled"] == []


def test_an_incomplete_backbone_is_left_out_and_one_alone_is_refused() -> None:
    given = [Setting("x", "x1", {"a": 1.0, "b": 2.0, "c": 3.0}), Setting("y", "y1", {"a": 1.0, "b": 2.0})]
    assert bob(given)().details["left_out"] == ["c"]
    with pytest.raises(UsageError, match="at least two backbones"):
        bob([Setting("x", "x1", {"a": 1.0})])


def test_equal_scores_are_all_zero() -> None:
    assert standardise(np.array([0.1 + 0.2, 0.3, 0.3])).tolist() == [0, 0, 0]
