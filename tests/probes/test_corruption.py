from collections.abc import Callable
from pathlib import Path

import pytest

from vertebra.errors import UsageError
from vertebra.probes import NotApplicable
from vertebra.probes import corruption as page
from vertebra.probes.corruption import corruption, subset
from vertebra.probes.evidence import Evidence


def test_dealt_severities_estimate_the_mean_over_all(evidence: Evidence) -> None:
    dealt = corruption(images=200)(evidence.backbone, evidence)
    every = corruption(variant="full")(evidence.backbone, evidence)
    assert dealt.scores["corruption_top1"].value == pytest.approx(every.scores["corruption_top1"].value, abs=2.5)
    top1 = every.details["top1"]
    assert every.details["clean"] > top1[0] > top1[4]
    assert sum(top1) / 5 == pytest.approx(every.scores["corruption_top1"].value, abs=0.02)
    values = [value for row in every.details["corruptions"].values() for value in row]
    assert len(values) == 75 and sum(values) / 75 == pytest.approx(every.scores["corruption_top1"].value, abs=0.02)


def test_drop_and_share_follow_from_clean_and_corrupted(evidence: Evidence) -> None:
    report = corruption(images=60)(evidence.backbone, evidence)
    value = {name: score.value for name, score in report.scores.items()}
    assert value["top1_drop"] == pytest.approx(report.details["clean"] - value["corruption_top1"], abs=0.01)
    assert value["relative_top1"] == pytest.approx(100 * value["corruption_top1"] / report.details["clean"], abs=0.01)
    low, high = report.scores["relative_top1"].interval
    assert low < value["relative_top1"] < high


def test_pixels_are_made_once_for_all_contenders(
    open_evidence: Callable[[Path], Evidence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_evidence(tmp_path)
    first = corruption(images=40)(data.backbone, data)
    assert len(list(tmp_path.glob("corrupted-*.npy"))) == 75
    monkeypatch.setattr(page, "corrupted", lambda *arguments: pytest.fail("made again"))
    again = corruption(images=40)(data.backbone, open_evidence(tmp_path))
    assert again.scores["corruption_top1"].value == first.scores["corruption_top1"].value


def test_disk_is_bounded(
    open_evidence: Callable[[Path], Evidence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "KEPT_BYTES", 10 * 8 * 64)  # ten settings of eight images
    data = open_evidence(tmp_path)
    report = corruption(images=40)(data.backbone, data)
    assert len(list(tmp_path.glob("corrupted-*.npy"))) == 10
    assert report.details["images"] == len(subset(data.targets("test"), 40))


def test_many_labels_and_bad_values_are_refused(tiny, multi_splits) -> None:
    with pytest.raises(NotApplicable, match="one label an image"):
        corruption()(tiny, Evidence(tiny, multi_splits, multi=True))
    with pytest.raises(UsageError, match="did you mean quick"):
        corruption(variant="quik")
    with pytest.raises(UsageError, match="severities is 'some'"):
        corruption(severities="some")  # type: ignore[arg-type]
