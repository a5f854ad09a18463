"""What a map is worth: whether it names the pixels that the network goes by, and whether it lies on the object.

For every method that gives maps (B, H, W), where more is more important and only the order within an image counts:

- deletion and insertion (Petsiuk et al., arXiv 1806.07421): pixels vanish, or appear, from the most important one on;
  the area under the curve of the class's probability is small for deletion and large for insertion;
- rank correlation with occlusion: what a network loses when a window is covered (Zeiler and Fergus, arXiv 1311.2901);
- the pointing game (Zhang et al., arXiv 1608.00507): whether the largest value lies on an object of the class;
- localisation: the box around the largest segment above 15 % of the maximum (Grad-CAM, arXiv 1610.02391, 4.1);
- randomisation (Adebayo et al., arXiv 1810.03292): a map that survives other weights says nothing of the network.

Ties are broken at random with a fixed seed, so that a map which is flat somewhere gains nothing from the order of its
pixels.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from scipy import ndimage, stats
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as transforms

from vertebra.contracts import Preprocess, TaskModel
from vertebra.data.dataset import Split
from vertebra.data.pixels import central
from vertebra.errors import UsageError

T = TypeVar("T", bound=TaskModel)
Confidence: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Variants (N, C, H, W) of images, and which image each varies (N,), to the probability of that image's class (N,)."""

THRESHOLD = 0.15
"""Share of a map's maximum above which it belongs to the object."""


def confidence(model: Callable[[Tensor], Any], targets: Tensor, *, multi: bool = False, batch: int = 64) -> Confidence:
    """The probability of each image's own class, as `deletion`, `insertion` and `occlusion` ask for it.

    Args:
        model: normalised images to logits (B, classes), or to a mapping with `logits`; in evaluation mode.
        targets: (B,) int64, the class of each image.
        multi: whether classes are independent (sigmoid) or exclude each other (softmax).
        batch: images a forward pass.
    """

    def ask(images: Tensor, rows: Tensor) -> Tensor:
        said = []
        for some, wanted in zip(images.split(batch), targets.to(images.device)[rows].split(batch), strict=True):
            with torch.inference_mode():
                outputs = model(some)
            logits = (outputs if isinstance(outputs, Tensor) else outputs["logits"]).float()
            shares = logits.sigmoid() if multi else logits.softmax(1)
            said.append(shares.gather(1, wanted[:, None])[:, 0])
        return torch.cat(said).clone()

    return ask


def deletion(ask: Confidence, images: Tensor, maps: Tensor, *, steps: int = 10) -> Tensor:
    """Probability while the most important pixels become the image's mean colour.

    Args:
        ask: see `confidence`.
        images: (B, C, H, W), normalised.
        maps: (B, H, W).
        steps: parts in which the pixels go.

    Returns:
        (B, steps + 1), from the whole image to none of it; `area` makes one number of it, lower is better.
    """
    return _exchange(ask, images, images.mean((2, 3), keepdim=True).expand_as(images), maps, steps)


def insertion(ask: Confidence, images: Tensor, maps: Tensor, *, steps: int = 10) -> Tensor:
    """Probability while the most important pixels of a blurred image become sharp.

    Returns:
        (B, steps + 1), from the blurred image to the whole one; `area` makes one number of it, higher is better.
    """
    return _exchange(ask, blurred(images), images, maps, steps)


def area(curves: Tensor) -> Tensor:
    """Area (B,) under curves (B, steps + 1) over the share of pixels, 0..1."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def blurred(images: Tensor) -> Tensor:
    """Images (B, C, H, W) of which only colours and brightness can be told: sigma is a tenth of the shorter side."""
    side = min(images.shape[-2:])
    return transforms.gaussian_blur(images, [2 * ((side - 1) // 4) + 1] * 2, [side / 10] * 2)


def order(maps: Tensor) -> Tensor:
    """Place of each pixel, (B, H, W) int64: 0 for the most important one; ties at random, but always the same."""
    flat = maps.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(maps.device)
    falling = shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]  # (B, H * W) pixels
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(falling)
    return torch.empty_like(falling).scatter_(1, falling, places).unflatten(1, maps.shape[1:])


def _exchange(ask: Confidence, start: Tensor, end: Tensor, maps: Tensor, steps: int) -> Tensor:
    """Probability while pixels of `start` become those of `end`, the most important first, (B, steps + 1)."""
    if steps < 1:
        raise UsageError(f"steps is {steps}; it must be at least 1")
    if maps.shape != (len(start), *start.shape[2:]):
        raise UsageError(f"maps have shape {tuple(maps.shape)}, the images {tuple(start.shape)}; resize the maps")
    places, rows = order(maps)[:, None], torch.arange(len(start), device=start.device)
    pixels = places[0].numel()
    shown = [torch.where(places * steps < step * pixels, end, start) for step in range(steps + 1)]
    return torch.stack([ask(images, rows) for images in shown], dim=1)


def occlusion(ask: Confidence, images: Tensor, *, window: int, stride: int) -> Tensor:
    """What is lost of the probability when a window is covered with the image's mean colour.

    Args:
        ask: see `confidence`.
        images: (B, C, H, W), normalised.
        window: side in pixels.
        stride: pixels between windows.

    Returns:
        (B, h, w), a value a window: positive where the window speaks for the class.
    """
    height, width = images.shape[-2:]
    if not 1 <= window <= min(height, width) or stride < 1:
        raise UsageError(f"window {window} and stride {stride} do not fit images of {height}x{width} pixels")
    covers = _windows(height, width, window, stride).to(images.device)  # (P, 1, H, W)
    mean = images.mean((2, 3), keepdim=True)
    everyone = torch.arange(len(images), device=images.device)
    lost = torch.empty(len(images), len(covers), device=images.device)
    for row, whole in enumerate(ask(images, everyone)):
        covered = torch.where(covers, mean[row], images[row])  # (P, C, H, W)
        lost[row] = whole - ask(covered, everyone[row].expand(len(covered)))
    return lost.unflatten(1, ((height - window) // stride + 1, (width - window) // stride + 1))


def _windows(height: int, width: int, window: int, stride: int) -> Tensor:
    """Masks (P, 1, H, W) of all windows, row by row."""
    tops = torch.arange(0, height - window + 1, stride)
    lefts = torch.arange(0, width - window + 1, stride)
    y, x = torch.arange(height), torch.arange(width)
    down = (y >= tops[:, None]) & (y < tops[:, None] + window)  # (h, H)
    across = (x >= lefts[:, None]) & (x < lefts[:, None] + window)  # (w, W)
    return (down[:, None, :, None] & across[None, :, None, :]).flatten(0, 1)[:, None]


def windowed(maps: Tensor, *, window: int, stride: int) -> Tensor:
    """Maps (B, H, W) averaged over the windows of `occlusion`, (B, h, w)."""
    return F.avg_pool2d(maps[:, None], window, stride)[:, 0]


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation of each pair of maps (B, h, w), (B,) in -1..1; 0 where one of them is constant."""
    ranks = [stats.rankdata(some.flatten(1).cpu().numpy(), axis=1) for some in (maps, others)]
    first, second = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return torch.from_numpy((first * second).sum(1) / np.maximum(scale, 1e-12))


def pointing(maps: Tensor, objects: Tensor) -> Tensor:
    """The pointing game: share of each map's largest values that lie on an object.

    Args:
        maps: (B, H, W).
        objects: (B, H, W) bool, where objects of the class are.

    Returns:
        (B,) float64, 0 or 1 where the maximum is one pixel; a constant map scores the objects' share of the image.
    """
    largest = maps == maps.amax((1, 2), keepdim=True)
    return (largest & objects).sum((1, 2)).double() / largest.sum((1, 2))


def mass(maps: Tensor, regions: Tensor) -> Tensor:
    """Share (B,) float64 of maps (B, H, W) that lies in regions (B, H, W) bool; 0 where a map is all zero."""
    positive = maps.double().clamp(min=0)
    return (positive * regions).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1e-30)


def centres(maps: Tensor) -> Tensor:
    """Centre (B, 2) x, y in pixels of what is above `THRESHOLD` in maps (B, H, W); the image's where nothing is."""
    bright = (maps >= THRESHOLD * maps.amax((1, 2), keepdim=True)) * maps.double().clamp(min=0)
    bright = bright + 1e-30
    height, width = maps.shape[1:]
    total = bright.sum((1, 2))
    x = (bright.sum(1) * (torch.arange(width, device=maps.device) + 0.5)).sum(1) / total
    y = (bright.sum(2) * (torch.arange(height, device=maps.device) + 0.5)).sum(1) / total
    return torch.stack([x, y], dim=1)


def boxes(maps: Tensor, *, threshold: float = THRESHOLD) -> Tensor:
    """Boxes (B, 4) xyxy in pixels around the largest connected segment above a share of each maximum.

    Neighbours are those of the four sides. The threshold is a share of the maximum of maps that start at zero: a map
    that was shifted first has another box. A map without anything positive has an empty box at 0.
    """
    found = torch.zeros(len(maps), 4)
    for row, one in enumerate(maps.detach().cpu().numpy()):
        if one.max() <= 0:
            continue
        segments = np.asarray(ndimage.label(one >= threshold * one.max())[0])  # type: ignore[index]
        largest = 1 + int(np.bincount(np.ravel(segments))[1:].argmax())
        down, across = np.nonzero(segments == largest)
        found[row] = torch.tensor([across.min(), down.min(), across.max() + 1, down.max() + 1])
    return found


def overlap(found: Tensor, truth: Sequence[Tensor]) -> Tensor:
    """Intersection over union (B,) of boxes (B, 4) with the best of each image's true boxes (N, 4), xyxy."""
    best = [
        box_iou(one[None], true.float()) if len(true) else torch.zeros(1)
        for one, true in zip(found, truth, strict=True)
    ]
    return torch.stack([each.amax() for each in best])


def within(truth: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Masks (B, height, width) bool of the pixels whose centre lies in one of an image's boxes (N, 4) xyxy."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    found = torch.zeros(len(truth), height, width, dtype=torch.bool)
    for row, true in enumerate(truth):
        left, top, right, bottom = true.float().unbind(1)
        across = (x >= left[:, None]) & (x < right[:, None])  # (N, W)
        down = (y >= top[:, None]) & (y < bottom[:, None])  # (N, H)
        found[row] = (down[:, :, None] & across[:, None, :]).any(0)
    return found


def seen(width: int, height: int, preprocess: Preprocess) -> np.ndarray:
    """(left, top, right, bottom) in pixels of what a network sees of an image of this size; may reach beyond it."""
    return central(width, height, preprocess)


def has_boxes(split: Split) -> bool:
    """Whether it is known where the things of a split's images are."""
    return split.annotations is not None and {"boxes", "labels"} <= set(split.annotations.names)


def true_boxes(split: Split, index: int, preprocess: Preprocess) -> dict[int, Tensor]:
    """Where the things of an image are, as the network sees it.

    Args:
        split: with boxes, see `has_boxes`.
        index: of the image.
        preprocess: that the network asks for.

    Returns:
        Class -> boxes (N, 4) xyxy in pixels of the network's input; crowds and what is cut off are left out.
    """
    target = split.target(index)
    height, width = target["boxes"].canvas_size
    left, top, right, bottom = seen(width, height, preprocess)
    down, across = preprocess.size
    boxes = torch.as_tensor(target["boxes"]).double().as_subclass(Tensor)
    scale = torch.tensor([across / (right - left), down / (bottom - top)] * 2, dtype=torch.float64)
    boxes = (boxes - torch.tensor([left, top] * 2)) * scale
    boxes = boxes.clamp(min=0).minimum(torch.tensor([across, down] * 2))
    shows = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)
    if "crowd" in target:
        shows &= ~target["crowd"]
    labels = target["labels"]
    return {int(label): boxes[shows & (labels == label)].float() for label in labels[shows].unique()}


def randomised(model: T, *, parts: int | None = None, seed: int = 0) -> T:
    """A copy whose weights are drawn anew from the output back: the head, then the last parts of the trunk.

    Args:
        model: stays as it is.
        parts: of the trunk; None takes all.
        seed: of the new weights.

    Raises:
        UsageError: more parts than the trunk has.
    """
    other = copy.deepcopy(model)
    trunk = list(other.backbone.trunk())
    if parts is not None and not 0 <= parts <= len(trunk):
        raise UsageError(f"parts is {parts}; the trunk has {len(trunk)}")
    behind = set(other.modules()) - set(other.backbone.modules())
    behind |= {module for part in trunk[len(trunk) - (parts or 0) :] for module in part.modules()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in other.modules():
            if parts is None or module in behind:
                _redraw(module)
    return other.eval()


@torch.no_grad()
def _redraw(module: nn.Module) -> None:
    """New weights for the parameters of this module alone."""
    own = dict(module.named_parameters(recurse=False))
    if own and callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    for parameter in own.values():  # position tables, scales: the same values in another order
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
