"""Where an image looks like the whole of itself: similarity of cells and vector, the box around the best, the crop.

No page: the mechanism of `vertebra.surgery.glsim`, in functions of tensors.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from vertebra.contracts import Backbone, Features

Similarity: TypeAlias = Literal["cosine", "l1", "l2"]
Convention: TypeAlias = Literal["reference", "inclusive"]

SIMILARITIES = ("cosine", "l1", "l2")
CONVENTIONS = ("reference", "inclusive")


def deepest(features: Features) -> int | None:
    """Position of the deepest map of at least two cells; None where there is none."""
    found = [at for at, cells in enumerate(features.pyramid) if cells.shape[2:].numel() > 1]
    return max(found, default=None)


def cells_of(backbone: Backbone, features: Features, level: int) -> Tensor:
    """Cells of a map, (B, C, h, w): of the last one the tokens, where there are, since these are behind the norm."""
    cells, tokens = features.pyramid[level], features.tokens
    if tokens is None or level != len(features.pyramid) - 1:
        return cells
    return backbone.parted(tokens, (cells.shape[2], cells.shape[3]))[1]


def pools_a_token(backbone: Backbone, features: Features) -> bool:
    """Whether `pooled` is a special token, as where a class token is; on the meta device, whether it may be."""
    tokens, (height, width) = features.tokens, features.pyramid[-1].shape[2:]
    if tokens is None or height * width < 2:
        return False
    special, _ = backbone.parted(tokens, (height, width))
    if tokens.is_meta or not special.shape[1]:
        return special.shape[1] > 0
    apart = (special - features.pooled[:, None]).abs().amax(2).amin(1)  # (B,)
    return bool((apart <= 1e-3 * features.pooled.abs().amax(1)).all())


def likeness(backbone: Backbone, features: Features, similarity: Similarity, *, level: int, token: bool) -> Tensor:
    """How much each cell of a map is like the whole image, (B, h, w) float32.

    Args:
        backbone: what made the features.
        features: of images.
        similarity: as for `alike`.
        level: position of the map in the pyramid.
        token: whether the image is its pooled token, else the mean of the cells, which no norm behind a pooling bends.
    """
    cells = cells_of(backbone, features, level)
    return alike(cells, features.pooled if token else cells.mean((2, 3)), similarity)


def alike(cells: Tensor, vector: Tensor, similarity: Similarity = "cosine") -> Tensor:
    """How much each cell of a map is like a vector: more is more alike.

    Args:
        cells: (B, C, h, w), behind the final norm.
        vector: (B, C), likewise.
        similarity: the cosine, which costs h * w * C multiply-accumulates, or minus a distance.

    Returns:
        (B, h, w) float32; -1..1 for the cosine, 0 or less for the others.
    """
    flat, vector = cells.flatten(2).float(), vector.float()
    if similarity == "cosine":
        unit = F.normalize(vector, dim=1)[:, None]  # (B, 1, C)
        found = torch.bmm(unit, flat)[:, 0] / torch.linalg.vector_norm(flat, dim=1).clamp_min(1e-12)
    else:
        found = -torch.linalg.vector_norm(flat - vector[:, :, None], ord=1 if similarity == "l1" else 2, dim=1)
    return found.view(len(cells), *cells.shape[2:])


def extents(scores: Tensor, select: int) -> Tensor:
    """Rows and columns that the best cells reach over.

    Args:
        scores: (B, h, w).
        select: cells of each image; all where there are fewer.

    Returns:
        (B, 4) int64: first row, first column, last row, last column, the last ones inclusive.
    """
    columns = scores.shape[2]
    best = scores.flatten(1).topk(min(select, scores.shape[1] * columns), dim=1).indices
    places = torch.stack([best // columns, best % columns], 2)  # (B, select, 2)
    return torch.cat([places.amin(1), places.amax(1)], 1)


def boxes_of(
    cells: Tensor, grid: tuple[int, int], size: tuple[int, int], stride: int, convention: Convention = "reference"
) -> Tensor:
    """Extents in cells as boxes in pixels.

    Args:
        cells: (B, 4) of `extents`.
        grid: (h, w) of the map.
        size: (H, W) of the images in pixels.
        stride: of the map in pixels.
        convention: "inclusive" ends behind the last cell; "reference" before it, though never within one cell.

    Returns:
        (B, 4) int64: top, left, bottom, right, the last two exclusive.
    """
    pitch = cells.new_tensor([_pitch(side, count, stride) for side, count in zip(size, grid, strict=True)])
    start, last = cells[:, :2] * pitch, cells[:, 2:] * pitch
    if convention == "inclusive":
        last = last + pitch
    end = torch.maximum(last, start + pitch).minimum(cells.new_tensor(size))
    return torch.cat([start, end], 1)


def _pitch(side: int, cells: int, stride: int) -> int:
    """Pixels from cell to cell: the stride, unless cells so far apart would lie beyond the image."""
    return stride if (cells - 1) * stride < side else max(1, side // cells)


def cropped(images: Tensor, boxes: Tensor) -> Tensor:
    """Boxes of images at the images' own size, bilinear with the corners aligned, all images at once.

    Args:
        images: (B, C, H, W).
        boxes: (B, 4) int64: top, left, bottom, right, the last two exclusive.

    Returns:
        (B, C, H, W); gradients reach the pixels.
    """
    rows = _stretched(images.float(), boxes[:, 0], boxes[:, 2] - boxes[:, 0], 2)
    return _stretched(rows, boxes[:, 1], boxes[:, 3] - boxes[:, 1], 3).to(images.dtype)


def _stretched(x: Tensor, start: Tensor, length: Tensor, axis: int) -> Tensor:
    """Of each (C, H, W) the part that starts at `start` (B,), `length` (B,) long, stretched to the whole axis."""
    side = x.shape[axis]
    step = (length - 1).float() / max(1, side - 1)
    along = torch.arange(side, device=x.device) * step[:, None]  # (B, side) in the part
    lower = along.long()
    share = along - lower
    upper = (lower + 1).minimum(length[:, None] - 1)
    shape = (len(x), 1, side, 1) if axis == 2 else (len(x), 1, 1, side)
    first, second = (x.gather(axis, (at + start[:, None]).view(shape).expand_as(x)) for at in (lower, upper))
    return torch.lerp(first, second, share.view(shape))
