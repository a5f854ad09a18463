import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as reference
from PIL import Image

from vertebra.data.annotations import Objects, Outlines, starts
from vertebra.data.checking import check
from vertebra.data.coco import find_coco, read_coco
from vertebra.data.dataset import Split
from vertebra.data.folders import Files, list_folder
from vertebra.data.geometry import DEFECTS, faults, outline_areas, outline_boxes


def runs_of(mask):
    """Run lengths down the columns, beginning with 0."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]]))


def split_of(boxes, *, images=1, first=None, size=(30, 40), classes=("cat", "dog"), root="/nowhere", **columns):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)
    objects = Objects(
        first=starts([count, *[0] * (images - 1)]) if first is None else np.array(first),
        sizes=np.tile(size, (images, 1)),
        boxes=boxes,
        labels=columns.pop("labels", np.zeros(count, np.int64)),
        class_ids=tuple(range(len(classes))),
        crowd=columns.pop("crowd", np.zeros(count, bool)),
        difficult=columns.pop("difficult", np.zeros(count, bool)),
        area=columns.pop("area", (boxes[:, 2:] - boxes[:, :2]).prod(1)),
        **columns,
    )
    names = np.array([f"{number}.png" for number in range(images)])
    return Split("train", classes, names, None, Files(root, names), np.arange(images), objects)  # type: ignore[arg-type]


def found(split, sizes=None):
    return {(finding.kind, finding.where): finding.message for finding in faults(split, sizes)}


def test_areas_and_bounds_of_outlines_are_those_of_their_masks():
    rng = np.random.default_rng(0)
    masks = rng.random((4, 21, 17)) < 0.4
    masks[1] = False
    masks[2, 3:9, 5:6] = True
    masks[3] = True
    square = [np.array([[1, 2], [5, 2], [5, 7], [1, 7]]), np.array([[10, 3], [12.5, 3], [12.5, 4]])]
    outlines = Outlines.of([runs_of(mask) for mask in masks] + [square, None, [square[0][::-1]]])
    areas = outline_areas(outlines)
    assert areas.tolist() == [*masks.sum((1, 2)).tolist(), 20 + 1.25, 0, 20]
    boxes = outline_boxes(outlines, np.full(7, 21))
    for mask, box in zip(masks, boxes, strict=False):
        if mask.any():
            assert box.tolist() == [
                mask.any(0).argmax(),
                mask.any(1).argmax(),
                17 - mask.any(0)[::-1].argmax(),
                21 - mask.any(1)[::-1].argmax(),
            ]
    assert np.isnan(boxes[[1, 5]]).all()
    assert boxes[[4, 6]].tolist() == [[1, 2, 12.5, 7], [1, 2, 5, 7]]
    assert all(np.array_equal(outlines.mask(index, 21, 17), mask) for index, mask in enumerate(masks))


def test_bounds_of_runs_are_the_references():
    rng = np.random.default_rng(1)
    masks = [np.pad(rng.random((5, 8)) < 0.5, ((3, 6), (rng.integers(1, 9), 2))) for _ in range(30)]
    outlines = Outlines.of([runs_of(mask) for mask in masks])
    boxes = outline_boxes(outlines, np.array([mask.shape[0] for mask in masks]))
    x, y, width, height = np.array(
        [reference.toBbox(reference.encode(np.asfortranarray(mask.astype(np.uint8)))) for mask in masks]
    ).T
    assert np.array_equal(boxes, np.stack([x, y, x + width, y + height], 1))


def test_polygons_are_filled_as_coco_fills_them():
    rng = np.random.default_rng(2)
    shapes = [
        [rng.random((rng.integers(3, 9), 2)) * [60, 50] - 5 for _ in range(rng.integers(1, 4))] for _ in range(40)
    ]
    outlines = Outlines.of(shapes)
    masks = outlines.masks(range(40), 41, 53)
    for shape, mask in zip(shapes, masks, strict=True):
        encoded = reference.merge(reference.frPyObjects([part.ravel().tolist() for part in shape], 41, 53))
        assert np.array_equal(mask, reference.decode(encoded).astype(bool))
    assert outlines.masks([], 41, 53).shape == (0, 41, 53)


def test_a_polygon_of_two_corners_covers_nothing():
    outlines = Outlines.of([[np.array([[1.0, 2], [8, 9]])]])
    assert not outlines.mask(0, 20, 20).any()


def test_nothing_wrong_and_nothing_there():
    square = [np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])]
    split = split_of([[0, 0, 20, 20], [5, 5, 40, 30]], labels=np.array([0, 1]), outlines=Outlines.of([square, None]))
    assert found(split, np.array([[30, 40]])) == {}
    assert found(split_of([], images=3)) == {}
    assert found(Split("train", (), split.names, None, split.store, split.rows)) == {}


def test_boxes():
    wrong = [[1, 1, 1, 9], [9, 9, 3, 20], [np.nan, 1, 2, 3], [30, 20, 41.5, 30], [39, 29, 40.9, 30.9], [-9, 0, 20, 20]]
    wrong += [[10, 10, 20, 20], [10, 10, 20.001, 20], [10, 10, 20, 20.02]]
    messages = found(split_of(wrong))
    assert messages.pop(("degenerate-box", "0.png")) == "boxes without extent: 3; the first is cat at [1, 1, 1, 9]"
    assert (
        messages.pop(("outside-image", "0.png"))
        == "boxes that leave the image: 2; the first is cat at [30, 20, 41.5, 30]"
    )
    assert messages.pop(("duplicate-object", "0.png")).startswith(
        "boxes given twice: 1; the first is cat at [10, 10, 20"
    )
    assert messages.pop(("tiny-objects", "train")) == "1 of 9 boxes have a side under 4 pixels"
    assert messages == {}


def test_the_same_box_of_another_class_image_or_crowd_is_no_duplicate():
    box = [10, 10, 20, 20]
    split = split_of(
        [box] * 4,
        images=2,
        first=[0, 3, 4],
        labels=np.array([0, 1, 1, 0]),
        crowd=np.array([False, False, True, False]),
    )
    assert found(split) == {}


def test_masks_that_do_not_fit():
    square = [np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])]
    line = [np.array([[0.0, 0], [20, 0], [10, 0]])]
    empty = runs_of(np.zeros((30, 40)))
    split = split_of(
        [[0, 0, 20, 20], [10, 0, 30, 20], [0, 0, 20, 20], [0, 0, 20, 20], [1, 1, 20, 20], [2, 2, 21, 21]],
        outlines=Outlines.of([square, square, square, line, empty, square]),
        labels=np.array([0, 0, 1, 0, 0, 0]),
        area=np.array([400, 400, 100, 400, 400, 380]),
    )
    messages = found(split)
    assert messages.pop(("empty-mask", "0.png")).startswith("masks that cover nothing: 2")
    assert messages.pop(("mask-box", "0.png")).startswith(
        "boxes that do not fit their mask: 1; the first is cat at [10,"
    )
    assert messages.pop(("mask-area", "0.png")).startswith("areas that do not fit their mask: 1; the first is dog")
    assert list(messages) == [("duplicate-object", "0.png")]


def test_keypoints_and_classes_that_never_count():
    points = np.array([[[1, 2, 2], [50, 2, 0]], [[1, 2, 2], [50, 2, 1]]], np.float64)
    split = split_of(
        [[0, 0, 20, 20], [5, 5, 40, 30]],
        labels=np.array([0, 1]),
        difficult=np.array([False, True]),
        keypoints=points,
        keypoint_names=("a", "b"),
    )
    messages = found(split)
    assert messages[("keypoint-outside", "0.png")].startswith("objects with keypoints outside the image: 1")
    assert messages[("no-countable-object", "dog")] == "all its objects in train (1) are crowd or difficult"
    assert len(messages) == 2


def test_sizes_that_differ():
    split = split_of([[0, 0, 20, 20]], images=4)
    messages = found(split, np.array([[30, 40], [40, 30], [60, 80], [0, 0]]))
    assert messages == {
        ("size-mismatch", "1.png"): "is 30 x 40, its annotations say 40 x 30: drawn before the EXIF rotation? "
        "Turn the boxes, or save the image without EXIF",
        ("size-mismatch", "2.png"): "is 80 x 60, its annotations say 40 x 30",
    }


@pytest.fixture
def checked(tmp_path):
    """A data set with an image that is turned by EXIF, one that is larger than said, and one box given twice."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size, options in (("a", (96, 64), {}), ("b", (96, 64), {"exif": exif}), ("c", (1000, 800), {})):
        pixels = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size)
        pixels.save(tmp_path / f"{name}.jpg", **options)
    whole = {
        "images": [
            {"id": number, "file_name": f"{name}.jpg", "width": 96, "height": 64} for number, name in enumerate("abc")
        ],
        "annotations": [{"id": n, "image_id": 0, "category_id": 0, "bbox": [8, 8, 40, 40]} for n in range(2)],
        "categories": [{"id": 0, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(whole))
    plan = find_coco(tmp_path, list_folder(tmp_path)[0])
    assert plan is not None
    return check(read_coco(str(tmp_path), tmp_path, plan), workers=2)


def test_check_tells_of_objects_too(checked):
    assert [(finding.kind, finding.where) for finding in checked.defects] == [
        ("size-mismatch", "b.jpg"),
        ("size-mismatch", "c.jpg"),
    ]
    assert "is 1000 x 800" in checked.defects[1].message  # and not the size that the reduced decoding has
    assert ("duplicate-object", "a.jpg") in [(finding.kind, finding.where) for finding in checked.warnings]
    assert {finding.kind for finding in checked.defects} <= DEFECTS
