from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.data.dataset import Split, Store
from vertebra.data.pixels import normalised
from vertebra.errors import DataError
from vertebra.probes.evidence import Evidence


def test_features_are_the_backbones_in_the_splits_order(evidence: Evidence) -> None:
    images = normalised(evidence.images("test")[10:13], evidence.backbone.preprocess)
    with torch.no_grad():
        expected = evidence.backbone(images).pooled
    torch.testing.assert_close(evidence.features("test")[10:13], expected)
    assert evidence.features("test").shape == (200, 256)
    assert evidence.features("test").dtype == torch.float32
    assert not evidence.features("test").is_inference()  # a probe may train on them
    assert evidence.targets("test").tolist() == evidence.split("test").targets.tolist()


def test_features_are_computed_once_and_read_back(open_evidence: Callable[[Path], Evidence], tmp_path: Path) -> None:
    first = open_evidence(tmp_path)
    features = first.features("test")
    passes = first.backbone.passes
    assert first.features("test") is features
    again = open_evidence(tmp_path)
    torch.testing.assert_close(again.features("test"), features, rtol=0, atol=0)
    assert again.backbone.passes == passes == 4  # 200 images, 64 a pass
    assert not list(tmp_path.glob("*.part"))


def test_features_of_other_weights_are_not_read_back(open_evidence: Callable[[Path], Evidence], tmp_path: Path) -> None:
    first = open_evidence(tmp_path)
    features, key = first.features("test"), first.key
    with torch.no_grad():
        first.backbone.conv.weight[0, 0, 0, 0] += 1
    changed = open_evidence(tmp_path)
    assert changed.key != key
    assert not torch.equal(changed.features("test"), features)


def test_classifier_reads_features_as_they_are(evidence: Evidence) -> None:
    logits = evidence.classifier(evidence.features("test"))
    assert logits.shape == (200, 10)
    assert (logits.argmax(1) == evidence.targets("test")).float().mean() > 0.9
    assert evidence.classifier is evidence.classifier


def test_many_labels_are_floats(tiny, multi_splits: dict[str, Split]) -> None:
    evidence = Evidence(tiny, multi_splits, multi=True)
    assert evidence.targets("val").shape == (150, 3)
    assert evidence.targets("val").dtype == torch.float32


def test_split_without_targets_is_refused(tiny, splits: dict[str, Split]) -> None:
    evidence = Evidence(tiny, {**splits, "test": replace(splits["test"], targets=None)})
    with pytest.raises(DataError, match="'test' has no targets"):
        evidence.targets("test")


@dataclass(frozen=True, eq=False)
class Torn(Store):
    """Images of which one cannot be read."""

    inner: Store
    row: int

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        if index == self.row:
            raise DataError("digit: truncated")
        return self.inner.image(index, least)

    def size_bytes(self, index: int) -> int:
        return self.inner.size_bytes(index)


def test_unreadable_image_is_left_out_with_its_target(tiny, splits: dict[str, Split]) -> None:
    test = splits["test"]
    torn = {**splits, "test": replace(test, store=Torn(test.store, int(test.rows[7])))}
    evidence = Evidence(tiny, torn, on_error="skip")
    good = np.delete(np.arange(200), 7)
    assert evidence.names("test").tolist() == test.names[good].tolist()
    assert evidence.targets("test").tolist() == test.targets[good].tolist()
    torch.testing.assert_close(evidence.features("test"), Evidence(tiny, splits).features("test")[good])
    with pytest.raises(DataError, match="truncated"):
        Evidence(tiny, torn).images("test")
