"""GLS maps: how much each place of an image is like all of it, from one forward pass and no gradient.

No page: functions for any backbone, with or without the second look of `vertebra.surgery.glsim`. A map is the
similarity of the backbone's class token, or the mean of its cells where it pools those, to each cell of its last map
(arXiv 2407.12891). It says what the network takes the image for as a whole; it knows no classes, and needs no head.

    maps = gls(backbone, images)                            (B, H, W), for the scores of `vertebra.probes.faithfulness`
    boxes = gls_boxes(backbone, images, select=8)           (B, 4), around the most similar cells

It costs h * w * C multiply-accumulates behind the forward pass.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features, TaskModel
from vertebra.errors import UsageError
from vertebra.probes.grad_cam.maps import resized
from vertebra.surgery.glsim import GLSim
from vertebra.surgery.glsim.crops import (
    CONVENTIONS,
    SIMILARITIES,
    Convention,
    Similarity,
    boxes_of,
    deepest,
    extents,
    likeness,
    pools_a_token,
)
from vertebra.training.cost import evaluating


def gls(
    model: nn.Module, images: Tensor, *, similarity: Similarity = "cosine", at: Literal["image", "cells"] = "image"
) -> Tensor:
    """Where images look like the whole of themselves.

    Args:
        model: a backbone, or a task model on one; it runs in evaluation mode.
        images: (B, channels, H, W), normalised.
        similarity: "cosine", or "l1" or "l2" for the smallest distance.
        at: "image" resizes to the images' size (bilinear), "cells" leaves the maps as they are, (B, h, w).

    Returns:
        (B, H, W) float32; each image's smallest similarity is taken off, so that maps start at zero.

    Raises:
        UsageError: no backbone, no map of two cells, or an unknown option.
    """
    _check("at", at, ("image", "cells"))
    scores, _ = _scores(_backbone(model), images, similarity)
    maps = scores - scores.amin((1, 2), keepdim=True)
    return maps if at == "cells" else resized(maps, images.shape[2:])


def gls_boxes(
    model: nn.Module,
    images: Tensor,
    *,
    select: int = 8,
    similarity: Similarity = "cosine",
    crop: Convention = "inclusive",
) -> Tensor:
    """Boxes around the cells that are most like the whole image.

    Args:
        model: as for `gls`.
        images: (B, channels, H, W), normalised.
        select: cells that a box is drawn around; all where there are fewer.
        similarity: as for `gls`.
        crop: whether the last row and column of cells are in the box: "inclusive", or "reference" as GLSim crops.

    Returns:
        (B, 4) int64, xyxy in pixels, the last two exclusive.

    Raises:
        UsageError: as for `gls`.
    """
    _check("crop", crop, CONVENTIONS)
    if select < 1:
        raise UsageError(f"gls: select is {select}; it must be at least 1")
    backbone = _backbone(model)
    scores, level = _scores(backbone, images, similarity)
    grid, size = (scores.shape[1], scores.shape[2]), (images.shape[2], images.shape[3])
    found = boxes_of(extents(scores, select), grid, size, backbone.levels[level].stride, crop)
    return found[:, [1, 0, 3, 2]]


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"gls: {name} is {value!r}; it can be {', '.join(known)}")


def _backbone(model: nn.Module) -> Backbone:
    """What sees the image once."""
    found = model.backbone if isinstance(model, TaskModel) else model
    found = found.inner if isinstance(found, GLSim) else found
    if not isinstance(found, Backbone):
        raise UsageError(f"gls: a {type(model).__name__} is no backbone, nor a task model on one")
    return found


def _scores(backbone: Backbone, images: Tensor, similarity: Similarity) -> tuple[Tensor, int]:
    """Similarities (B, h, w) of each cell and the whole, and which map has the cells."""
    _check("similarity", similarity, SIMILARITIES)
    with evaluating(backbone), torch.no_grad():
        features: Features = backbone(images)
        level = deepest(features)
        if level is None:
            raise UsageError(
                f"gls: no map of the {type(backbone).__name__} has two cells at {images.shape[2]}x{images.shape[3]} "
                "pixels; give larger images, or take a ViT"
            )
        return likeness(backbone, features, similarity, level=level, token=pools_a_token(backbone, features)), level
