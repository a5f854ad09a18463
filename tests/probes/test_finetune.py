import pytest
import torch

from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence
from vertebra.probes.finetune import finetune


def test_rate_is_chosen_on_validation_data_and_the_sweep_is_told(tiny, splits) -> None:
    evidence = Evidence(tiny, splits)
    before, key = tiny.conv.weight.clone(), evidence.key
    report = finetune(epochs=4, rates=(0.01, 20.0))(tiny, evidence)
    sweep = report.details["sweep"]
    assert report.details["rate"] == min(sweep, key=lambda one: one["val_nll"])["rate"] == sweep[1]["rate"]
    assert sweep[1]["rate"] == pytest.approx(2000 * sweep[0]["rate"])
    assert report.scores["finetune_top1"].value > 60 and report.scores["finetune_top1"].n == 200
    assert torch.equal(tiny.conv.weight, before) and Evidence(tiny, splits).key == key
    assert len(report.details["per_class"]) == 10 and not tiny.training


def test_many_labels(tiny, multi_splits) -> None:
    report = finetune(epochs=2, rates=(20.0,))(tiny, Evidence(tiny, multi_splits, multi=True))
    assert list(report.scores) == ["finetune_map", "nll"]
    assert 40 < report.scores["finetune_map"].value <= 100


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="rates"):
        finetune(rates=())
    with pytest.raises(UsageError, match="epochs is 0"):
        finetune(epochs=0)
