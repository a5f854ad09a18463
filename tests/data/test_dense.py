"""Targets move as the pixels do: against torchvision, one image at a time, and against the pixels themselves."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2

from vertebra.config import Views
from vertebra.contracts import Preprocess
from vertebra.data.dense import dense_view, moved
from vertebra.data.views import Placement, view

PREPROCESS = Preprocess((40, 56), (0.5,) * 3, (0.25,) * 3, interpolation="bilinear")
VIEWS = Views(scale=(0.3, 0.9), flip=0.5)


def target_of(height: int, width: int, count: int, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 0.7, (count, 2)) * [width, height]
    sides = random.uniform(0.1, 0.3, (count, 2)) * [width, height]
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float()
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(count),
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        "masks": tv_tensors.Mask(masks),
        "semantic": tv_tensors.Mask(torch.from_numpy(random.integers(0, 5, (height, width)))),
        "points": boxes[:, :2].clone(),
    }


@pytest.mark.parametrize("flipped", [False, True])
def test_against_torchvision(flipped):
    box, size = (7, 5, 47, 44), (40, 56)
    target = target_of(50, 60, 9)
    found = moved([target], [Placement(box, flipped)], size)[0]
    left, top, right, bottom = box
    crop = {"top": top, "left": left, "height": bottom - top, "width": right - left}
    boxes = v2.functional.resized_crop(target["boxes"], **crop, size=list(size))
    boxes = v2.functional.clamp_bounding_boxes(v2.functional.horizontal_flip(boxes) if flipped else boxes)
    whole = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)
    assert found["labels"].tolist() == target["labels"][whole].tolist() and len(found["labels"]) > 0
    torch.testing.assert_close(found["boxes"].as_subclass(torch.Tensor), boxes[whole].as_subclass(torch.Tensor))
    assert found["boxes"].canvas_size == size
    planes = target["masks"][:, top:bottom, left:right].as_subclass(torch.Tensor).float()[None]
    masks = interpolate(planes, size, mode="nearest-exact")[0] > 0
    assert torch.equal(found["masks"].as_subclass(torch.Tensor), (masks.flip(-1) if flipped else masks)[whole])
    assert found["semantic"].shape == size


def test_a_batch_is_its_images_one_by_one():
    targets = [
        target_of(50, 60, 4, 1),
        target_of(33, 80, 0, 2),
        target_of(64, 64, 7, 3),
        {"semantic": target_of(9, 9, 1)["semantic"]},
    ]
    places = [Placement((0, 0, 60, 50), True), Placement((3, 3, 30, 30), False), Placement((10, 0, 50, 64), True)]
    places.append(Placement((0, 0, 9, 9), False))
    together = moved(targets, places, (40, 56))
    for target, place, found in zip(targets, places, together, strict=True):
        alone = moved([target], [place], (40, 56))[0]
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in found)


def test_boxes_and_masks_follow_the_pixels():
    """A white rectangle on black stays inside its box and on its mask, whatever the view."""
    image = np.zeros((90, 120, 3), dtype=np.uint8)
    image[30:60, 40:90] = 255
    masks = torch.zeros(1, 90, 120, dtype=torch.bool)
    masks[0, 30:60, 40:90] = True
    target = {
        "boxes": tv_tensors.BoundingBoxes([[40.0, 30, 90, 60]], format="XYXY", canvas_size=(90, 120)),
        "masks": tv_tensors.Mask(masks),
    }
    images, targets = dense_view([image] * 20, [target] * 20, range(20), 0, 3, VIEWS, PREPROCESS)
    for index in range(20):
        assert np.array_equal(images[index].permute(1, 2, 0), view(image, index, 0, 3, VIEWS, PREPROCESS))
        white = images[index, 0] > 127
        assert (
            white == targets[index]["masks"][0]
        ).float().mean() > 0.96  # an edge between two pixels falls either way
        rows, columns = np.nonzero(white.numpy())
        edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (targets[index]["boxes"][0] - edges).abs().max() < 1


def test_points_leave_and_keypoints_are_hidden_and_mirrored():
    target = {
        "points": torch.tensor([[1.0, 1.0], [20.0, 20.0]]),
        "keypoints": torch.tensor([[[20.0, 20.0, 2.0], [1.0, 1.0, 2.0], [22.0, 20.0, 1.0]]]),
    }
    place = [Placement((10, 10, 30, 30), True)]
    found = moved([target], place, (40, 40), mirrored=[2, 1, 0])[0]
    assert found["points"].tolist() == [[20, 20]]
    assert found["keypoints"].tolist() == [[[16, 20, 1], [0, 0, 0], [20, 20, 2]]]
    assert target["points"].shape == (2, 2)  # as it was
