import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from sklearn.neighbors import KNeighborsClassifier

from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence
from vertebra.probes.knn import knn, votes


def test_votes_are_scikit_learns_with_the_same_weights(evidence: Evidence) -> None:
    gallery, labels, queries = evidence.features("train"), evidence.targets("train"), evidence.features("test")
    ours = votes(gallery, F.one_hot(labels, 10).float(), queries, k=20, temperature=0.07, chunk=64)
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    theirs.fit(F.normalize(gallery).numpy(), labels.numpy())
    probabilities = theirs.predict_proba(F.normalize(queries).numpy())
    np.testing.assert_allclose(F.normalize(ours, p=1, dim=1).numpy(), probabilities, atol=1e-4)
    accuracy = 100 * theirs.score(F.normalize(queries).numpy(), evidence.targets("test").numpy())
    assert knn()(evidence.backbone, evidence).scores["knn_top1"].value == pytest.approx(accuracy, abs=0.5)


def test_more_neighbours_than_images_take_all() -> None:
    gallery, labels = torch.eye(3), F.one_hot(torch.tensor([0, 1, 1]), 2).float()
    found = votes(gallery, labels, torch.tensor([[1.0, 0.2, 0.1]]), k=20, temperature=10.0)
    assert found.argmax(1).tolist() == [1]  # two far ones outvote the near one at this temperature
    assert votes(gallery, labels, torch.tensor([[1.0, 0.2, 0.1]]), k=20, temperature=0.07).argmax(1).tolist() == [0]


def test_many_labels_are_ranked(tiny, multi_splits) -> None:
    evidence = Evidence(tiny, multi_splits, multi=True)
    score = knn()(tiny, evidence).scores["knn_map"]
    assert 90 < score.value <= 100 and score.n == 200


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="k is 0"):
        knn(k=0)
    with pytest.raises(UsageError, match="temperature is 0"):
        knn(temperature=0)
