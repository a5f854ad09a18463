"""The contract of a probe, over every probe that is found: same evidence, same report; good scores above bad."""

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from vertebra.contracts import Backbone, Probe, Report
from vertebra.data.digits import digits
from vertebra.paper import pages
from vertebra.probes.evidence import Evidence
from vertebra.spec import Spec, addresses

PROBES = addresses("probes")
CHEAP: Mapping[str, Mapping[str, Any]] = {
    "corruption/quick": {"images": 60},
    "corruption/full": {"images": 20},
    "finetune": {"epochs": 1, "rates": [1.0]},
    "grad_cam/quick": {"images": 20, "steps": 4, "cells": 1},
    "grad_cam/full": {"images": 20, "steps": 4, "cells": 1},
    "speed": {"rounds": 2, "repeats": 2, "batch": 2},
}
"""Options under which a probe takes about a second."""
COUNTED = ("cost", "memory", "speed")
"""Probes of the network and not of what it knows."""


def _backbone() -> Backbone:
    torch.manual_seed(0)
    return Spec("timm/test_resnet", {"image_size": 32, "channels": 1}).build()


def _evidence(backbone: Backbone, seed: int = 0) -> Evidence:
    found = digits().splits
    few = {name: found[name].select(np.arange(n)) for name, n in (("train", 200), ("val", 80), ("test", 120))}
    return Evidence(backbone, few, seed=seed)


def _report(address: str, evidence: Evidence) -> Report:
    return Spec(address, CHEAP.get(address, {}), kind="probes").build()(evidence.backbone, evidence)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return _evidence(_backbone())


@pytest.fixture(scope="module")
def reports(evidence: Evidence) -> dict[str, Report]:
    return {}


@pytest.fixture
def report(request: pytest.FixtureRequest, evidence: Evidence, reports: dict[str, Report]) -> Report:
    if request.param not in reports:
        reports[request.param] = _report(request.param, evidence)
    return reports[request.param]


def every(argument: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, PROBES, indirect=argument == "report", ids=str)


def test_the_probes_of_the_battle_are_found() -> None:
    named = {page.name for page in pages() if page.kind == "probes"}
    assert named >= {
        "knn",
        "linear",
        "few_shot",
        "finetune",
        "corruption",
        "calibration",
        "retrieval",
        "speed",
        "memory",
        "cost",
    }
    assert all(page.summary.endswith(".") for page in pages() if page.kind == "probes")


@every("report")
def test_scores_carry_what_is_needed_to_trust_them(report: Report) -> None:
    assert report.scores
    for name, score in report.scores.items():
        assert math.isfinite(score.value) and score.n >= 1, name
        assert score.unit in ("%", "ms", "img/s", "MB", "M", "G", ""), name
        if score.samples is not None:
            assert score.samples.shape == (score.n,), name
            assert score.samples.mean() == pytest.approx(score.value), name
        if score.interval is not None:
            assert score.interval[0] <= score.interval[1], name
        if name.endswith("_top1") and score.n == 120 and name in ("knn_top1", "linear_top1", "finetune_top1"):
            assert set(np.unique(score.samples)) <= {0, 100}


@every("report")
def test_details_are_json(report: Report) -> None:
    assert json.loads(json.dumps(report.details, allow_nan=False)) is not None


@pytest.mark.parametrize("address", [a for a in PROBES if a not in ("speed", "corruption/full")])
def test_same_evidence_same_report(address: str, evidence: Evidence, reports: dict[str, Report]) -> None:
    first = reports.get(address) or _report(address, evidence)
    again = _report(address, _evidence(_backbone()))
    for name, score in first.scores.items():
        assert again.scores[name].value == score.value, name
        if score.samples is not None:
            np.testing.assert_array_equal(again.scores[name].samples, score.samples)
    assert again.details == first.details


@every("address")
def test_seeded_says_whether_the_seed_matters(address: str, evidence: Evidence) -> None:
    probe = Spec(address, CHEAP.get(address, {}), kind="probes").build()
    assert isinstance(probe, Probe)
    assert probe.timed == (address == "speed")
    if address not in ("speed", "finetune", "corruption/full"):
        other = deepcopy_seed(evidence, 1)
        values = [[s.value for s in probe(e.backbone, e).scores.values()] for e in (evidence, other)]
        assert (values[0] != values[1]) == probe.seeded


def deepcopy_seed(evidence: Evidence, seed: int) -> Evidence:
    """The same evidence with another seed; features and classifier are kept."""
    other = deepcopy(evidence)
    other.seed = seed
    return other


@every("address")
def test_backbone_stays_as_it_is(address: str, evidence: Evidence) -> None:
    backbone = evidence.backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    _report(address, evidence)
    assert not backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("address", [a for a in PROBES if a not in (*COUNTED, "finetune")])
def test_destroyed_backbone_is_worse(address: str, evidence: Evidence, reports: dict[str, Report]) -> None:
    destroyed = _backbone()
    with torch.no_grad():
        for parameter in destroyed.parameters():
            parameter.zero_()
    good = reports.get(address) or _report(address, evidence)
    bad = _report(address, _evidence(destroyed))
    name = "nll" if address == "calibration" else next(iter(good.scores))  # who knows nothing may say so honestly
    difference = good.scores[name].value - bad.scores[name].value
    assert difference > 5 if good.scores[name].better == "higher" else difference < -0.5
