import json

import pytest
import torch

from vertebra.probes.evidence import Evidence
from vertebra.probes.linear import linear


def test_scores_and_mistakes_agree_with_the_classifier(evidence: Evidence) -> None:
    report = linear()(evidence.backbone, evidence)
    logits, targets = evidence.classifier(evidence.features("test")), evidence.targets("test")
    right = logits.argmax(1) == targets
    assert report.scores["linear_top1"].samples.tolist() == (100 * right.double()).tolist()
    assert next(iter(report.scores)) == "linear_top1"
    assert report.scores["linear_top5"].value >= report.scores["linear_top1"].value
    mistakes = report.details["mistakes"]
    assert 0 < len(mistakes) <= 24 and sum(c["n"] for c in report.details["confusions"]) == int((~right).sum())
    assert [m["confidence"] for m in mistakes] == sorted((m["confidence"] for m in mistakes), reverse=True)
    for mistake in mistakes:
        assert mistake["name"] == evidence.names("test")[mistake["index"]]
        assert mistake["truth"] == str(targets[mistake["index"]].item()) != mistake["predicted"]
    by_class = report.details["per_class"]
    assert [entry["class"] for entry in by_class] == list(evidence.classes)
    mean = sum(entry["value"] for entry in by_class) / 10
    assert report.scores["balanced_acc"].value == pytest.approx(mean, abs=0.01)


def test_contenders_own_head_is_scored_beside(tiny, splits) -> None:
    plain = Evidence(tiny, splits)
    report = linear()(tiny, Evidence(tiny, splits, head=plain.classifier))
    assert report.scores["head_top1"].value == report.scores["linear_top1"].value
    assert report.details["head"]["mistakes"] == report.details["mistakes"]


def test_many_labels(tiny, multi_splits) -> None:
    report = linear()(tiny, Evidence(tiny, multi_splits, multi=True))
    assert list(report.scores) == ["linear_map", "nll"]
    assert 90 < report.scores["linear_map"].value <= 100
    assert [entry["n"] for entry in report.details["per_class"]] == multi_splits["test"].targets.sum(0).tolist()
    json.dumps(report.details, allow_nan=False)


def test_class_without_test_images_has_no_value(tiny, splits) -> None:
    kept = torch.nonzero(torch.from_numpy(splits["test"].targets) != 3).flatten().numpy()
    evidence = Evidence(tiny, {**splits, "test": splits["test"].select(kept)})
    entry = linear()(tiny, evidence).details["per_class"][3]
    assert entry == {"class": "3", "value": None, "n": 0}
