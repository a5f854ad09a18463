import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from sklearn.metrics import average_precision_score

from vertebra.errors import UsageError
from vertebra.probes import NotApplicable
from vertebra.probes.evidence import Evidence
from vertebra.probes.retrieval import retrieval, search


def test_average_precision_is_scikit_learns_without_the_image_itself(evidence: Evidence) -> None:
    features, targets = F.normalize(evidence.features("test"), dim=1), evidence.targets("test")
    similarity, truth = (features @ features.T).numpy(), targets.numpy()
    theirs = [average_precision_score(np.delete(truth == truth[i], i), np.delete(similarity[i], i)) for i in range(200)]
    labels = F.one_hot(targets).float()
    found = search(features, labels, features, labels, itself=True, chunk=48)
    np.testing.assert_allclose(found.precision.numpy(), theirs, atol=1e-6)
    assert retrieval()(evidence.backbone, evidence).scores["map"].value == pytest.approx(
        100 * np.mean(theirs), abs=1e-3
    )


def test_ranks_of_a_case_done_by_hand() -> None:
    gallery = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.3], [1.0, 0.6], [0.2, 1.0]]), dim=1)
    labels = F.one_hot(torch.tensor([1, 0, 1, 0]), 2).float()
    found = search(torch.tensor([[1.0, 0.0]]), F.one_hot(torch.tensor([0]), 2).float(), gallery, labels, itself=False)
    assert found.first.tolist() == [2]  # right answers at ranks 2 and 4
    assert found.precision.tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2])
    assert found.precision_at_r.tolist() == pytest.approx([(1 / 2) / 2])


def test_image_alone_in_its_class_is_no_query(tiny, splits) -> None:
    test = splits["test"]
    alone = np.concatenate([np.flatnonzero(test.targets != 0), np.flatnonzero(test.targets == 0)[:1]])
    report = retrieval()(tiny, Evidence(tiny, {**splits, "test": test.select(alone)}))
    assert report.details == {"gallery": "test", "queries": len(alone) - 1, "images": len(alone)}
    assert report.scores["map"].n == len(alone) - 1


def test_gallery_may_be_the_training_images(evidence: Evidence) -> None:
    report = retrieval(gallery="train")(evidence.backbone, evidence)
    features, gallery = (F.normalize(evidence.features(name), dim=1) for name in ("test", "train"))
    nearest = evidence.targets("train")[(features @ gallery.T).argmax(1)]
    assert report.scores["recall@1"].value == pytest.approx(
        100 * (nearest == evidence.targets("test")).double().mean().item()
    )
    assert report.scores["recall@1"].value <= report.scores["recall@5"].value <= report.scores["recall@10"].value


def test_many_labels_share_at_least_one(tiny, multi_splits) -> None:
    evidence = Evidence(tiny, multi_splits, multi=True)
    score = retrieval()(tiny, evidence).scores["map"]
    assert score.n == int(evidence.targets("test").any(1).sum()) and 60 < score.value <= 100


def test_nothing_to_find_and_unknown_gallery(tiny, splits) -> None:
    _, first = np.unique(splits["test"].targets, return_index=True)
    with pytest.raises(NotApplicable, match="no test image"):
        retrieval()(tiny, Evidence(tiny, {**splits, "test": splits["test"].select(first)}))
    with pytest.raises(UsageError, match="gallery is 'val'"):
        retrieval(gallery="val")  # type: ignore[arg-type]
