import pytest

from vertebra.battle.budget import Sizes, allot, by_value, epochs_within, estimates
from vertebra.battle.cells import Cell
from vertebra.battle.contenders import Facts
from vertebra.contracts import Probe, Report
from vertebra.spec import Spec

SIZES = Sizes({"train": 1000, "val": 200, "test": 300}, classes=10)


class Silent(Probe):
    def __call__(self, model, data) -> Report:
        return Report({})


PROBES = {name: Silent() for name in ("knn", "linear", "speed")}


def facts(training: str, forward: float) -> Facts:
    return Facts(training, None, 1.0, 1.0, (32, 32), forward, 3 * forward)  # type: ignore[arg-type]


FACTS = {"fast": facts("pretrained", 0.001), "slow": facts("scratch", 0.01)}
CELLS = [Cell(name, probe, seed) for name in FACTS for probe in ("knn", "linear", "speed") for seed in (0, 1)]


def test_value_puts_the_first_seed_and_the_deciding_probe_first() -> None:
    order = by_value(CELLS, ["knn", "linear", "speed"], "linear", ["speed"])
    assert [(cell.seed, cell.probe) for cell in order] == [
        *[(0, "linear")] * 2,
        *[(0, "speed")] * 2,
        *[(0, "knn")] * 2,
        *[(1, "linear")] * 2,
        *[(1, "speed")] * 2,
        *[(1, "knn")] * 2,
    ]


def test_training_is_paid_once_a_contender_and_seed() -> None:
    found = estimates(CELLS, FACTS, SIZES, 10, PROBES)
    assert found.shared["fast", 0] == pytest.approx(1.5)
    assert found.shared["slow", 0] == pytest.approx(15 + 10 * 30)
    assert set(found.shared) == {(name, seed) for name in FACTS for seed in (0, 1)}


def test_what_does_not_fit_is_left_out_with_its_price() -> None:
    found = estimates(CELLS, FACTS, SIZES, 10, PROBES)
    order = by_value(CELLS, ["knn", "linear", "speed"], "linear", ["speed"])
    plan = allot(order, found, 100.0, 1, ["speed"])
    assert Cell("fast", "linear", 0) in plan.planned and plan.seconds <= 90
    assert plan.left_out[Cell("slow", "linear", 0)].startswith("estimated 316 s; ")
    assert set(plan.planned) | set(plan.left_out) == set(CELLS)
    assert allot(order, found, None, 1, ["speed"]).left_out == {}
    assert allot(order, found, 0.0, 1, ["speed"]).planned == ()


def test_epochs_fit_half_the_budget() -> None:
    scratch = {"slow": FACTS["slow"]}
    assert epochs_within(None, 30, 3, scratch, 3, SIZES, 2) == 30
    assert epochs_within(900, 30, 3, scratch, 3, SIZES, 2) == 10  # 30 s an epoch, 3 seeds on 2 workers, 450 s
    assert epochs_within(5, 30, 3, scratch, 3, SIZES, 2) == 3
    assert epochs_within(5, 30, 3, {}, 3, SIZES, 2) == 30


def test_every_probe_knows_its_own_work() -> None:
    found = {
        name: Spec(name, {}, "probes").build().work(SIZES.images, SIZES.classes)
        for name in ("corruption", "finetune", "knn", "speed")
    }
    assert found["corruption"].forward == 15 * 256 and found["corruption"].trained == 0
    assert found["finetune"].trained == 3 * 10 * 1000
    assert found["knn"].forward == 0 and found["speed"].forward == 10 * (4 * 10 + 16)
