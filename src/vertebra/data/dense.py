"""Boxes, masks and points of a training view: what is known of an image, moved as its pixels were.

The pixels are those of `vertebra.data.views.view`; the same `Placement` moves everything else. Boxes and points of a
whole batch are moved in one pass; the masks of an image are gathered by two index vectors, which is what resizing to
the nearest pixel comes to.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from vertebra.config import Views
from vertebra.contracts import Preprocess
from vertebra.data.views import Placement, generator, place, source, view

SMALLEST = 1.0
"""Pixels that a box must keep in both directions to stay."""

Target = dict[str, Any]


def dense_view(
    images: Sequence[Image.Image | np.ndarray],
    targets: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    epoch: int,
    seed: int,
    views: Views,
    preprocess: Preprocess,
    strength: float = 1.0,
    *,
    mirrored: Sequence[int] | None = None,
) -> tuple[Tensor, list[Target]]:
    """A batch of training views with what is known of the images.

    Args:
        images: B images of any size, whole: their pixels are those that the targets count in.
        targets: B targets, as `Split.target` gives them.
        ids: (B,) positions in the split.
        epoch: from 0.
        seed: of the run.
        views: how images are varied.
        preprocess: size, filter and channels that the network takes.
        strength: of the views, 0..1.
        mirrored: (K,) keypoint that each keypoint becomes when left and right are swapped; None keeps them.

    Returns:
        (B, C, H, W) uint8, and B targets in its pixels; objects that left the view are gone from them.
    """
    sources = [source(image, preprocess) if isinstance(image, Image.Image) else image for image in images]
    placements = [
        place(pixels.shape[1], pixels.shape[0], views, generator(seed, epoch, index), strength)
        for pixels, index in zip(sources, ids, strict=True)
    ]
    seen = [
        view(pixels, index, epoch, seed, views, preprocess, strength)
        for pixels, index in zip(sources, ids, strict=True)
    ]
    batch = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
    return batch, moved(targets, placements, preprocess.size, mirrored=mirrored)


def moved(
    targets: Sequence[Mapping[str, Any]],
    placements: Sequence[Placement],
    size: tuple[int, int],
    *,
    mirrored: Sequence[int] | None = None,
) -> list[Target]:
    """Targets in the pixels of views.

    Args:
        targets: B targets, as `Split.target` gives them; `clean` images are left as they are.
        placements: where each view lies.
        size: (height, width) of the views.
        mirrored: as for `dense_view`.

    Returns:
        New targets. Boxes are clipped; those that keep less than a pixel either way are dropped with all that
        belongs to their object, as are objects with masks of which no pixel is left.
    """
    found = [dict(target) for target in targets]
    _move_boxes(found, placements, size)
    for target, placement in zip(found, placements, strict=True):
        _move_masks(target, placement, size)
        _move_points(target, placement, size, mirrored)
    return found


def _scales(placements: Sequence[Placement], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 2) corners x, y, (B, 2) factors x, y and (B,) whether flipped."""
    boxes = torch.tensor([placement.box for placement in placements], dtype=torch.float32)  # (B, 4)
    factors = torch.tensor([size[1], size[0]]) / (boxes[:, 2:] - boxes[:, :2])
    return boxes[:, :2], factors, torch.tensor([placement.flipped for placement in placements])


def _move_boxes(targets: list[Target], placements: Sequence[Placement], size: tuple[int, int]) -> None:
    """Move the boxes of all images at once, and drop the objects that are gone."""
    boxed = [number for number, target in enumerate(targets) if "boxes" in target]
    if not boxed:
        return
    height, width = size
    corners, factors, flipped = _scales([placements[number] for number in boxed], size)
    counts = torch.tensor([len(targets[number]["boxes"]) for number in boxed])
    owner = torch.repeat_interleave(torch.arange(len(boxed)), counts)  # (N,)
    boxes = torch.cat([targets[number]["boxes"].as_subclass(Tensor) for number in boxed])
    boxes = (boxes - corners.repeat(1, 2)[owner]) * factors.repeat(1, 2)[owner]
    swapped = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    boxes = torch.where(flipped[owner][:, None], swapped, boxes)
    limits = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(dim=1)
    zoom = factors.prod(dim=1)
    for place_, (number, some, keep) in enumerate(
        zip(boxed, boxes.split(counts.tolist()), kept.split(counts.tolist()), strict=True)
    ):
        target = targets[number]
        target["boxes"] = tv_tensors.BoundingBoxes(some, format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        if "area" in target:
            target["area"] = target["area"] * zoom[place_]
        _keep(target, keep)


def _keep(target: Target, keep: Tensor) -> None:
    """Leave out the objects that are not kept, from everything that has one entry an object."""
    if bool(keep.all()):
        return
    for name in ("boxes", "labels", "crowd", "difficult", "area", "masks", "keypoints"):
        if name in target:
            value = target[name]
            typed = isinstance(value, tv_tensors.BoundingBoxes | tv_tensors.Mask)
            kept = value[keep]  # a plain tensor: indexing sheds the type
            target[name] = tv_tensors.wrap(kept, like=value) if typed else kept  # pyright: ignore[reportCallIssue]


def _move_masks(target: Target, placement: Placement, size: tuple[int, int]) -> None:
    names = [name for name in ("masks", "semantic", "panoptic") if name in target]
    if not names:
        return
    rows, columns = _nearest(placement, size)
    for name in names:
        value = target[name].as_subclass(Tensor)
        target[name] = tv_tensors.Mask(value.index_select(-2, rows).index_select(-1, columns))
    if "masks" in target:
        _keep(target, target["masks"].flatten(1).any(dim=1))


def _nearest(placement: Placement, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the image that the pixels of the view show, by their centres."""
    left, top, right, bottom = placement.box
    height, width = size
    rows = top + ((torch.arange(height) + 0.5) * ((bottom - top) / height)).long()
    columns = left + ((torch.arange(width) + 0.5) * ((right - left) / width)).long()
    return rows, columns.flip(0) if placement.flipped else columns


def _move_points(target: Target, placement: Placement, size: tuple[int, int], mirrored: Sequence[int] | None) -> None:
    """Points that left the view are dropped; keypoints stay in their place, as not visible."""
    if "points" not in target and "keypoints" not in target:
        return
    corner, factor, _ = (value[0] for value in _scales([placement], size))
    limits = torch.tensor([size[1], size[0]])

    def across(points: Tensor) -> Tensor:
        points = (points - corner) * factor
        return torch.stack([size[1] - points[..., 0], points[..., 1]], dim=-1) if placement.flipped else points

    if "points" in target:
        points = across(target["points"])
        target["points"] = points[((points >= 0) & (points < limits)).all(dim=-1)]
    if "keypoints" in target:
        points, visible = across(target["keypoints"][..., :2]), target["keypoints"][..., 2]
        inside = ((points >= 0) & (points < limits)).all(dim=-1) & (visible > 0)
        found = torch.cat([points * inside[..., None], (visible * inside)[..., None]], dim=-1)
        swap = placement.flipped and mirrored is not None
        target["keypoints"] = found[:, list(mirrored or ())] if swap else found
