import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.detection import PanopticQuality as TorchPanopticQuality

from vertebra.data.annotations import IGNORE
from vertebra.data.folders import list_folder
from vertebra.data.panoptic import find_panoptic, read_panoptic
from vertebra.errors import UsageError
from vertebra.tasks.segmentation_scores import (
    TOLERANCE,
    BoundaryF1,
    PanopticQuality,
    PanopticScores,
    SegmentationScores,
    boundary_f1,
)

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def scores(count):
    return SegmentationScores(lambda outputs: outputs["classes"], count)


def blobs(rng, classes, shape=(2, 40, 50)):
    """Patches of classes, some ignored."""
    coarse = rng.integers(0, classes, (shape[0], 8, 10))
    found = coarse.repeat(5, 1).repeat(5, 2)
    found[rng.random(shape) < 0.1] = rng.integers(0, classes)
    return found


def confusion(predicted, target, classes):
    """Counts (target, predicted), by a loop over pixels."""
    table = np.zeros((classes, classes))
    for p, t in zip(predicted.ravel(), target.ravel(), strict=True):
        if t != IGNORE:
            table[t, p] += 1
    return table


def test_miou_and_pixel_accuracy_are_those_of_a_confusion_matrix_over_all_batches():
    rng = np.random.default_rng(0)
    metric, table = scores(7), np.zeros((7, 7))
    for _ in range(3):
        target, predicted = blobs(rng, 6), blobs(rng, 6)  # class 6 occurs nowhere
        target[rng.random(target.shape) < 0.2] = IGNORE
        table += confusion(predicted, target, 7)
        metric.update({"classes": torch.from_numpy(predicted)}, torch.from_numpy(target))
    hits, there = np.diag(table), table.sum(0) + table.sum(1) > 0
    union = table.sum(0) + table.sum(1) - hits
    found = metric.compute()
    assert list(found) == ["miou", "pixel_acc", "boundary_f1"]
    assert abs(found["miou"].item() / 100 - (hits[there] / union[there]).mean()) < 1e-6
    assert abs(found["pixel_acc"].item() / 100 - hits.sum() / table.sum()) < 1e-6


def test_what_is_predicted_where_nothing_counts_changes_nothing():
    rng = np.random.default_rng(1)
    target, predicted = blobs(rng, 5), blobs(rng, 5)
    target[:, :, 20:31] = IGNORE
    values = []
    for fill in (0, 3):
        predicted[:, :, 20:31] = fill
        metric = scores(5)
        metric.update({"classes": torch.from_numpy(predicted)}, torch.from_numpy(target))
        values.append({name: value.item() for name, value in metric.compute().items()})
    assert values[0] == values[1]
    assert values[0]["miou"] > 5


def test_images_of_any_size_as_targets_of_a_reader():
    rng = np.random.default_rng(2)
    together, apart = scores(4), scores(4)
    target, predicted = blobs(rng, 4), blobs(rng, 4)
    together.update({"classes": torch.from_numpy(predicted)}, torch.from_numpy(target))
    pieces = [{"semantic": torch.from_numpy(one)} for one in target]
    apart.update({"classes": list(torch.from_numpy(predicted))}, pieces)
    assert together.compute() == apart.compute()
    apart.update({"classes": [torch.zeros(3, 9, dtype=torch.long)]}, [torch.zeros(3, 9, dtype=torch.long)])
    apart.reset()
    assert not apart["boundary_f1"].images


def test_perfect_and_wrong():
    target = torch.from_numpy(blobs(np.random.default_rng(3), 3))
    metric = scores(3)
    metric.update({"classes": target}, target)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "miou": 100,
        "pixel_acc": 100,
        "boundary_f1": 100,
    }
    metric.reset()
    metric.update({"classes": (target + 1) % 3}, target)
    assert metric.compute()["pixel_acc"].item() == 0


@pytest.mark.parametrize(
    ("predicted", "target", "reason"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, 2), r"sizes \(1, 2, 3\) and \(1, 3, 2\)"),
        (torch.zeros(1, 2, 3), torch.full((1, 2, 3), 9), "a target holds the class 9; there are 4"),
        (torch.full((1, 2, 3), 255), torch.zeros(1, 2, 3), "a prediction holds the class 255"),
    ],
)
def test_what_cannot_be_scored(predicted, target, reason):
    with pytest.raises(UsageError, match=reason):
        scores(4).update({"classes": predicted.long()}, target.long())
    with pytest.raises(UsageError, match="300 classes"):
        scores(300)


def reference_boundary_f1(predicted, target, count, tolerance):
    """By the distance transform of each class's outline."""
    radius = max(1.0, tolerance * np.hypot(*target.shape))
    counted = target != IGNORE

    def outline(classes):
        found = np.zeros(target.shape, bool)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            other, known = np.roll(classes, (dy, dx), (0, 1)), np.roll(counted, (dy, dx), (0, 1))
            differ = (other != classes) & known & counted
            if dy:
                differ[0 if dy == 1 else -1] = False
            if dx:
                differ[:, 0 if dx == 1 else -1] = False
            found |= differ
        return found

    wanted, given, values = outline(target), outline(predicted), []
    for number in range(count):
        one, two = wanted & (target == number), given & (predicted == number)
        if not one.any() and not two.any():
            continue
        precision = recall = 0.0
        if one.any() and two.any():
            precision = (ndimage.distance_transform_edt(~one)[two] <= radius).mean()
            recall = (ndimage.distance_transform_edt(~two)[one] <= radius).mean()
        values.append(2 * precision * recall / max(precision + recall, 1e-12))
    return np.mean(values) if values else None


@pytest.mark.parametrize("tolerance", [TOLERANCE, 0.04, 0.1])
def test_outlines_against_distance_transforms(tolerance):
    rng = np.random.default_rng(4)
    for shape in ((40, 50), (23, 61), (5, 90)):
        target = rng.integers(0, 4, shape).repeat(3, 0).repeat(3, 1)
        predicted = np.roll(target, (1, 2), (0, 1))
        predicted[:9, :9] = 3
        target[12:, :4] = IGNORE
        found = boundary_f1(torch.from_numpy(predicted), torch.from_numpy(target), 5, tolerance)
        assert abs(found.item() - reference_boundary_f1(predicted, target, 5, tolerance)) < 1e-9


def test_images_without_outlines_do_not_count():
    metric = BoundaryF1(3)
    flat = torch.ones(1, 8, 8, dtype=torch.long)
    halves = flat.clone()
    halves[:, :, 4:] = 2
    metric.update(flat, flat)
    metric.update(halves, halves)
    assert (metric.compute().item(), metric.images.item()) == (1.0, 1)
    metric.update(flat, halves)
    assert metric.compute().item() == 0.5


def panoptic(numbers, labels, **more):
    """An image of segments: number -> class."""
    found = {"panoptic": torch.as_tensor(numbers), "segments": torch.tensor(list(labels), dtype=torch.long)}
    return found | {"segment_labels": torch.tensor(list(labels.values()), dtype=torch.long)} | more


def reference_pq(predicted, targets, count):
    """COCO's evaluation, a segment at a time."""
    table = np.zeros((count, 4))  # overlap, hits, wrong, missed
    for one, target in zip(predicted, targets, strict=True):
        p, g = one["panoptic"].numpy(), target["panoptic"].numpy()
        labels = dict(zip(one["segments"].tolist(), one["segment_labels"].tolist(), strict=True))
        classes = dict(zip(target["segments"].tolist(), target["segment_labels"].tolist(), strict=True))
        crowd = dict(zip(classes, target.get("segment_crowd", torch.zeros(len(classes))).tolist(), strict=True))
        matched = set()
        for segment, label in classes.items():
            for other in labels:
                inside = ((g == segment) & (p == other)).sum()
                union = (g == segment).sum() + (p == other).sum() - inside - ((g == 0) & (p == other)).sum()
                if labels[other] == label and inside / union > 0.5 and not crowd[segment]:
                    table[label, :2] += inside / union, 1
                    matched |= {("g", segment), ("p", other)}
        for segment, label in classes.items():
            table[label, 3] += ("g", segment) not in matched and not crowd[segment]
        for other, label in labels.items():
            spared = [0] + [segment for segment in classes if crowd[segment] and classes[segment] == label]
            share = np.isin(g[p == other], spared).mean()
            table[label, 2] += ("p", other) not in matched and share <= 0.5
    overlap, hits, wrong, missed = table.T
    there = hits + wrong + missed > 0
    halves = (hits + (wrong + missed) / 2)[there]
    segmentation = np.divide(overlap, hits, out=np.zeros(count), where=hits > 0)[there]
    quality = (overlap[there] / halves, segmentation, hits[there] / halves)
    return {name: 100 * values.mean() for name, values in zip(("pq", "sq", "rq"), quality, strict=True)}


def scene(rng, void, crowd):
    """A target of segments in patches, and a prediction that moves and joins some of them."""
    numbers = rng.integers(0 if void else 1, 9, (6, 6)).repeat(6, 0).repeat(6, 1)
    labels = {int(n): int(rng.integers(0, 4)) for n in np.unique(numbers) if n}
    moved = np.roll(numbers, rng.integers(0, 4), 1)
    moved[moved == 8] = 1
    moved[: rng.integers(1, 12)] = rng.integers(0 if void else 1, 2)
    given = {int(n): labels.get(int(n), 0) for n in np.unique(moved) if n}
    given[next(iter(given))] = int(rng.integers(0, 4))
    more = {"segment_crowd": torch.from_numpy(rng.random(len(labels)) < 0.4)} if crowd else {}
    return panoptic(moved, given), panoptic(numbers, labels, **more)


@pytest.mark.parametrize(("void", "crowd"), [(False, False), (True, False), (True, True)])
def test_panoptic_quality_is_that_of_cocos_evaluation(void, crowd):
    rng = np.random.default_rng(5)
    pairs = [scene(rng, void, crowd) for _ in range(12)]
    metric = PanopticScores(lambda outputs: outputs["segments"], 4)
    for start in (0, 5):
        stop = 5 if start == 0 else 12
        metric.update({"segments": [pair[0] for pair in pairs[start:stop]]}, [pair[1] for pair in pairs[start:stop]])
    wanted = reference_pq([pair[0] for pair in pairs], [pair[1] for pair in pairs], 4)
    found = metric.compute()
    assert list(found) == ["pq", "sq", "rq"]
    assert 5 < wanted["pq"] < 95
    assert {name: round(value.item(), 4) for name, value in found.items()} == {
        n: round(v, 4) for n, v in wanted.items()
    }


def test_without_void_and_crowds_it_is_torchmetrics_too():
    rng = np.random.default_rng(6)
    pairs = [scene(rng, False, False) for _ in range(6)]
    ours, theirs = PanopticQuality(4), TorchPanopticQuality(things=set(range(4)), stuffs=set(), return_sq_and_rq=True)
    for one, target in pairs:
        ours.update([one], [target])
        theirs.update(*(_as_pairs(image)[None] for image in (one, target)))
    wanted = dict(zip(("pq", "sq", "rq"), (100 * theirs.compute()).tolist(), strict=True))
    assert {name: value.item() for name, value in ours.compute().items()} == pytest.approx(wanted, rel=1e-5)


def _as_pairs(image):
    """(H, W, 2): class and number of each pixel."""
    table = torch.zeros(10, dtype=torch.long)
    table[image["segments"]] = image["segment_labels"]
    return torch.stack([table[image["panoptic"]], image["panoptic"]], -1)


def test_a_prediction_of_nothing_misses_everything():
    target = panoptic([[1, 1, 2, 2]], {1: 0, 2: 1})
    metric = PanopticQuality(3)
    metric.update([panoptic([[0, 0, 0, 0]], {})], [target])  # torchmetrics would call this nothing at all
    assert metric.compute()["pq"].item() == 0
    assert metric.missed.tolist() == [1, 1, 0]
    assert torch.isnan(metric.per_class()["pq"][2])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (panoptic([[1, 7]], {1: 0}), "a prediction has pixels of segment 7, which its segments do not list"),
        (panoptic([[1, 1]], {1: 5}), "a prediction has a segment of class 5; there are 2 classes"),
        (panoptic([[1]], {1: 0}), r"sizes \(1, 1\) and \(1, 2\)"),
    ],
)
def test_segments_that_cannot_be_scored(image, reason):
    with pytest.raises(UsageError, match=reason):
        PanopticQuality(2).update([image], [panoptic([[1, 1]], {1: 0})])


@pytest.mark.data
def test_the_ground_truth_of_coco_against_itself(tmp_path):
    if not (archive := shared / "seg/coco-panoptic-2.zip").exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    root = tmp_path / "coco-panoptic"
    plan = find_panoptic(root, list_folder(root)[0])
    assert plan is not None
    split = read_panoptic(str(root), root, plan).splits["all"]
    targets = [split.target(index) for index in range(2)]
    metric = PanopticQuality(133)
    metric.update(targets, targets)
    assert {name: value.item() for name, value in metric.compute().items()} == {"pq": 100, "sq": 100, "rq": 100}
    crowds = sum(int(target["segment_crowd"].sum()) for target in targets)
    assert int(metric.hits.sum()) == 50 - crowds
    semantic = scores(133)
    known = [target["semantic"] for target in targets]
    semantic.update({"classes": [torch.where(one == IGNORE, 0, one) for one in known]}, targets)
    assert {name: value.item() for name, value in semantic.compute().items()} == {
        "miou": 100,
        "pixel_acc": 100,
        "boundary_f1": 100,
    }
