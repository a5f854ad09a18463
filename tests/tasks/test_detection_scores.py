import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from vertebra.contracts import Prediction
from vertebra.data.coco import find_coco, read_coco
from vertebra.data.folders import list_folder
from vertebra.errors import UsageError
from vertebra.tasks.detection_scores import NAMES, DetectionScores

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not shared.is_dir(), reason="the shared test data is not here")
OFFICIAL = (
    "AP",
    "AP50",
    "AP75",
    "APsmall",
    "APmedium",
    "APlarge",
    "AR1",
    "AR10",
    "AR100",
    "ARsmall",
    "ARmedium",
    "ARlarge",
)


def prediction(boxes, scores, labels, masks=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Prediction(torch.tensor(labels, dtype=torch.int64), torch.tensor(scores, dtype=torch.float32), boxes, masks)


def corners(boxes):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def by_image(entries):
    found: dict[int, list] = {}
    for entry in entries:
        found.setdefault(entry["image_id"], []).append(entry)
    return found


def predicted(entries):
    return prediction(
        corners([entry["bbox"] for entry in entries]),
        [entry["score"] for entry in entries],
        [entry["category_id"] for entry in entries],
    )


@pytest.mark.data
@needs_data
def test_cocos_own_numbers():
    with zipfile.ZipFile(shared / "det/coco-metric-case.zip") as archive:
        truth, found, expected = (
            json.loads(archive.read(f"coco-metric-case/{name}.json"))
            for name in ("sampled_gts_bbox_area", "cocoapi_results", "expected")
        )
    scores = DetectionScores(91)
    objects, detections = by_image(truth["annotations"]), by_image(found)
    for image in sorted(image["id"] for image in truth["images"]):
        entries = objects.get(image, [])
        target = {
            "boxes": torch.tensor(corners([entry["bbox"] for entry in entries]), dtype=torch.float32),
            "labels": torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64),
            "crowd": torch.tensor([bool(entry["iscrowd"]) for entry in entries]),
            "area": torch.tensor([entry["area"] for entry in entries], dtype=torch.float32),
        }
        scores.update([predicted(detections.get(image, []))], [target])
    values = scores.compute()
    assert tuple(values) == NAMES
    for name, official in zip(NAMES, OFFICIAL, strict=True):
        assert float(values[name]) / 100 == pytest.approx(expected[official], abs=1e-6)
    per_class = scores.per_class()
    assert float(per_class.nanmean()) == pytest.approx(float(values["map"]), abs=1e-9)
    assert torch.isnan(per_class[0])


@pytest.mark.data
@needs_data
def test_the_reference_detections_of_voc(tmp_path):
    with zipfile.ZipFile(shared / "det/voc2012-100.zip") as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "VOC100"
    plan = find_coco(root, list_folder(root)[0])
    assert plan is not None
    split = read_coco(str(root), root, plan).splits["all"]
    detections = by_image(json.loads((root / "reference_detections.json").read_text()))
    scores = DetectionScores(20)
    for index in range(len(split)):  # the images are in the order of their ids, 0..99
        one = predicted(detections.get(index, []))
        scores.update([Prediction(one.labels - 1, one.scores, one.boxes)], [split.target(index)])
    values = {name: float(value) / 100 for name, value in scores.compute().items()}
    expected = {"map": 0.346958, "map_50": 0.610030, "map_75": 0.353714, "mar_100": 0.522570}
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-6)


def rectangles(count, height=64, width=80, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, [width - 30, height - 30], (count, 2))
    boxes = np.concatenate([low, low + rng.integers(4, 30, (count, 2))], 1)
    masks = np.zeros((count, height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(masks), torch.tensor(rng.integers(0, 3, count))


def cases(images=12):
    """Predictions that are near their targets, with scores that all differ; the last image has no object."""
    generator = torch.Generator().manual_seed(0)
    for index in range(images):
        boxes, masks, labels = rectangles(7 * (index < images - 1), seed=index)
        scores = torch.rand(7 + 4, generator=generator)
        extra = rectangles(11 - len(boxes), seed=100 + index)
        moved = torch.roll(masks, int(torch.randint(0, 5, (1,), generator=generator)), 2)
        sizes = torch.randint(-2, 3, (len(boxes), 4), generator=generator)
        order = scores.argsort(descending=True)
        yield (
            Prediction(
                torch.cat([labels, extra[2]])[order],
                scores[order],
                torch.cat([boxes + sizes, extra[0]])[order],
                torch.cat([moved, extra[1]])[order],
            ),
            {"boxes": boxes, "labels": labels, "masks": masks, "crowd": torch.arange(len(boxes)) == 2},
        )


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_torchmetrics_agrees_where_it_is_exact(kind):
    scores = DetectionScores(3, kind=kind)
    other = MeanAveragePrecision(
        iou_type="bbox" if kind == "boxes" else "segm",
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        backend="faster_coco_eval",
    )
    for one, target in list(cases())[:-1]:  # of masks it forgets the images without objects
        scores.update([one], [target])
        theirs = {"boxes": one.boxes, "masks": one.masks, "scores": one.scores, "labels": one.labels}
        other.update([theirs], [target | {"iscrowd": target["crowd"].int()}])
    expected = other.compute()
    for name, value in scores.compute().items():
        if float(expected[name]) < 0:
            assert torch.isnan(value)
        else:
            assert float(value) / 100 == pytest.approx(float(expected[name]), abs=1e-6)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_detections_in_images_without_objects_cost_precision(kind):
    scores = DetectionScores(3, kind=kind)
    for one, target in list(cases())[:-1]:
        scores.update([one], [target])
    before = scores.compute()
    one, target = list(cases())[-1]
    scores.update([Prediction(one.labels, torch.ones_like(one.scores), one.boxes, one.masks)], [target])
    after = scores.compute()
    assert float(after["map"]) < float(before["map"]) - 1
    assert float(after["mar_100"]) == pytest.approx(float(before["mar_100"]))


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_ranks_with_unequal_shares_add_up(kind):
    whole, first, rest = (DetectionScores(3, kind=kind) for _ in range(3))
    for index, (one, target) in enumerate(cases()):
        whole.update([one], [target])
        (first if index < 2 else rest).update([one], [target])
    expected = whole.compute()
    copied = pickle.loads(pickle.dumps(first))
    rest.merge_state(copied)
    for name, value in rest.compute().items():
        assert float(value) == pytest.approx(float(expected[name]), abs=1e-9, nan_ok=True)
    for name in rest._defaults:  # as torchmetrics leaves the states after it has gathered ranks
        setattr(rest, name, torch.cat(getattr(rest, name)))
    rest._computed = None
    assert float(rest.compute()["map"]) == pytest.approx(float(expected["map"]), abs=1e-9)
    whole.reset()
    assert whole.boxes == []


def test_perfect_worthless_and_nothing():
    box = [[10, 10, 50, 50]]
    target = {"boxes": torch.tensor(box, dtype=torch.float32), "labels": torch.tensor([1])}
    scores = DetectionScores(2)
    scores.update([prediction(box, [0.9], [1])], [target])
    values = {name: float(value) for name, value in scores.compute().items()}
    assert values["map"] == values["map_medium"] == values["mar_1"] == pytest.approx(100)
    assert np.isnan(values["map_small"])
    assert np.isnan(values["map_large"])
    assert scores.per_class().tolist() == [pytest.approx(float("nan"), nan_ok=True), pytest.approx(100)]
    scores = DetectionScores(2)
    scores.update([prediction(box, [0.9], [0])], [target])
    assert float(scores.compute()["map"]) == 0
    scores = DetectionScores(2)
    scores.update([prediction([], [], [])], [target])
    assert float(scores.compute()["map"]) == 0
    scores = DetectionScores(2)
    scores.update([prediction(box, [0.9], [0])], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}])
    assert np.isnan(float(scores.compute()["map"]))


def test_crowds_and_areas_are_honoured():
    boxes = torch.tensor([[0, 0, 20, 20], [40, 40, 80, 80]], dtype=torch.float32)
    target = {"boxes": boxes, "labels": torch.tensor([0, 0]), "crowd": torch.tensor([False, True])}
    found = prediction([[0, 0, 20, 20], [41, 41, 60, 60], [60, 60, 79, 79]], [0.5, 0.9, 0.8], [0, 0, 0])
    scores = DetectionScores(1)
    scores.update([found], [target])
    assert float(scores.compute()["map"]) == pytest.approx(100)  # what lies in the crowd is not counted
    scores = DetectionScores(1)
    scores.update([found], [target | {"crowd": torch.tensor([False, False])}])
    assert float(scores.compute()["map"]) < 40
    scores = DetectionScores(1)
    scores.update([found], [target | {"area": torch.tensor([96.0**2 + 1, 5])}])
    values = scores.compute()
    assert float(values["map_large"]) == pytest.approx(100)
    assert torch.isnan(values["map_small"])


def test_what_does_not_fit_together():
    box = [[10, 10, 50, 50]]
    target = {"boxes": torch.tensor(box, dtype=torch.float32), "labels": torch.tensor([1])}
    with pytest.raises(UsageError, match="2 predictions for 1 targets"):
        DetectionScores(2).update([prediction(box, [1], [1])] * 2, [target])
    with pytest.raises(UsageError, match=r"predictions have boxes \(1, 4\), not \(2, 4\)"):
        DetectionScores(2).update([prediction(box, [1, 1], [1, 0])], [target])
    with pytest.raises(UsageError, match="not finite"):
        DetectionScores(2).update([prediction(box, [float("nan")], [1])], [target])
    with pytest.raises(UsageError, match="have no masks"):
        DetectionScores(2, kind="masks").update([prediction(box, [1], [1])], [target])
    with pytest.raises(UsageError, match="kind is 'mask'"):
        DetectionScores(2, kind="mask")  # type: ignore[arg-type]
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"masks are \(8, 8\) where the target's are \(9, 8\)"):
        other = target | {"masks": torch.zeros(1, 9, 8, dtype=torch.bool)}
        DetectionScores(2, kind="masks").update([prediction(box, [1], [1], masks)], [other])
