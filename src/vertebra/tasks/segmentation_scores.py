"""Segmentation metrics, as torchmetrics adds them up over batches and ranks; all are shares in percent.

===========  ===========================================================================================
miou         intersection over union of each class over all pixels of the data, mean over the classes
pixel_acc    pixels whose class is right
boundary_f1  F1 of the classes' outlines within a tolerance, mean over an image's classes, then over images
             (Csurka et al., BMVC 2013)
pq, sq, rq   panoptic, segmentation and recognition quality (arXiv 1801.00868), mean over the classes
===========  ===========================================================================================

Pixels of `IGNORE` in the target count for nothing, whatever is predicted there. A class that occurs in neither targets
nor predictions does not count. `miou` and `pixel_acc` are torchmetrics' own. Its PanopticQuality is not used: it
forgives pixels that are predicted as void, and knows no crowds, so that its values are not COCO's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from vertebra.contracts import Outputs
from vertebra.data.annotations import IGNORE
from vertebra.errors import UsageError

TOLERANCE = 0.0075
"""How far outlines may be apart, as a share of the image's diagonal; one pixel at least."""


class SegmentationScores(MetricCollection):
    """`miou`, `pixel_acc` and `boundary_f1` of a task model's outputs.

    Args:
        predicted: outputs to the class of each pixel, (B, H, W) int64 at the targets' size, or one (H, W) an image.
        count: classes.
    """

    def __init__(self, predicted: Callable[[Outputs], Tensor | Sequence[Tensor]], count: int) -> None:
        if not 2 <= count <= IGNORE:
            raise UsageError(f"{count} classes: segmentation is scored for 2 to {IGNORE}, as {IGNORE} is ignored")
        metrics: dict[str, Metric | MetricCollection] = {
            "miou": MulticlassJaccardIndex(count, average="macro", ignore_index=IGNORE, validate_args=False),
            "pixel_acc": MulticlassAccuracy(count, average="micro", ignore_index=IGNORE, validate_args=False),
            "boundary_f1": BoundaryF1(count),
        }
        super().__init__(metrics, compute_groups=False)  # groups are found by equal states, not by what they mean
        self._predicted, self._count, self._names = predicted, count, tuple(metrics)

    def update(self, outputs: Outputs, targets: Any) -> None:
        """Add a batch.

        Args:
            outputs: what the task model's forward gave.
            targets: (B, H, W) classes; or an image each, (H, W) or a mapping with "semantic", of any sizes.

        Raises:
            UsageError: sizes differ, or a class is none of the classes.
        """
        predicted = self._predicted(outputs)
        if isinstance(targets, Tensor) and isinstance(predicted, Tensor):
            self._add(predicted, targets)
            return
        for one, target in zip(predicted, targets, strict=True):
            semantic = target if isinstance(target, Tensor) else target["semantic"]
            self._add(one[None], semantic[None])

    def _add(self, predicted: Tensor, targets: Tensor) -> None:
        if predicted.shape != targets.shape:
            shapes = f"{tuple(predicted.shape)} and {tuple(targets.shape)}"
            raise UsageError(f"predictions and targets are of sizes {shapes}; resize the predictions to the targets")
        found, known = predicted.as_subclass(Tensor).long(), targets.as_subclass(Tensor).long()
        strange = (known < 0) | ((known >= self._count) & (known != IGNORE))
        wild = (found < 0) | (found >= self._count)
        if bool((strange | wild).any()):
            what, value = ("target", known[strange]) if bool(strange.any()) else ("prediction", found[wild])
            raise UsageError(
                f"a {what} holds the class {int(value[0])}; there are {self._count}, and {IGNORE} is ignored"
            )
        super().update(found, known)

    def compute(self) -> dict[str, Tensor]:
        """Name -> percent, the one that ranks first."""
        values = super().compute()
        return {name: 100 * values[name] for name in self._names}


class BoundaryF1(Metric):
    """F1 of outlines: which outline pixels have one of the other side's within a tolerance.

    A pixel is on the outline of its class where one of its four neighbours is of another; neighbours that are ignored
    and the image's edge make no outline.

    Args:
        count: classes.
        tolerance: share of the image's diagonal.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, count: int, tolerance: float = TOLERANCE) -> None:
        super().__init__()
        self.count, self.tolerance = count, tolerance
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        """Add a batch: classes (B, H, W) both."""
        for one, target in zip(predicted, targets, strict=True):
            value = boundary_f1(one, target, self.count, self.tolerance)
            if value is not None:
                self.total += value
                self.images += 1

    def compute(self) -> Tensor:
        """A share, 0..1; nan where no image has an outline."""
        return (self.total / self.images).float()


def boundary_f1(predicted: Tensor, target: Tensor, count: int, tolerance: float = TOLERANCE) -> Tensor | None:
    """F1 of the outlines of one image, mean over the classes that have one; None where none has.

    Args:
        predicted: (H, W) classes.
        target: (H, W) classes, `IGNORE` where nothing counts.
        count: classes.
        tolerance: share of the diagonal, one pixel at least.
    """
    radius = max(1.0, tolerance * math.hypot(*target.shape))
    edges, found = _outlines(target, target), _outlines(predicted, target)
    there = torch.zeros(count, dtype=torch.bool, device=target.device)
    there[target[edges]] = True
    there[predicted[found]] = True
    classes = torch.nonzero(there)[:, 0]
    if not len(classes):
        return None
    wanted = edges & (target == classes[:, None, None])  # (classes there, H, W)
    given = found & (predicted == classes[:, None, None])
    right = (given & _near(wanted, radius)).sum((1, 2)).double()
    reached = (wanted & _near(given, radius)).sum((1, 2)).double()
    precision, recall = right / given.sum((1, 2)).clamp(min=1), reached / wanted.sum((1, 2)).clamp(min=1)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-12)).mean()


def _outlines(classes: Tensor, target: Tensor) -> Tensor:
    """(H, W) whether a pixel has a neighbour of another class, both counted by the target."""
    counted, found = target != IGNORE, torch.zeros_like(target, dtype=torch.bool)
    for axis in (0, 1):
        size = classes.shape[axis] - 1
        one, other = (classes.narrow(axis, start, size) for start in (0, 1))
        both = counted.narrow(axis, 0, size) & counted.narrow(axis, 1, size)
        differ = (one != other) & both
        found.narrow(axis, 0, size).logical_or_(differ)
        found.narrow(axis, 1, size).logical_or_(differ)
    return found


def _near(marked: Tensor, radius: float) -> Tensor:
    """(N, H, W) whether a marked pixel lies within the radius, in pixels: rows first, then as many shifts as rows."""
    height, width = marked.shape[1:]
    place = torch.arange(width, device=marked.device)
    far = 4 * max(height, width)
    left = torch.where(marked, place, -far).cummax(2).values  # the last marked pixel at or before each
    right = -torch.where(marked, place, far).neg().flip(2).cummax(2).values.flip(2)
    across = torch.minimum(place - left, right - place)
    found = torch.zeros_like(marked)
    for down in range(-min(int(radius), height - 1), min(int(radius), height - 1) + 1):
        reach = math.isqrt(int(radius**2 - down**2))
        rows = slice(max(0, down), height + min(0, down))
        found[:, rows] |= across[:, max(0, -down) : height - max(0, down)] <= reach
    return found


class PanopticScores(MetricCollection):
    """`pq`, `sq` and `rq` of a task model's outputs.

    Args:
        predicted: outputs to an image each: mappings with "panoptic", "segments" and "segment_labels", as the targets.
        count: classes.
    """

    def __init__(self, predicted: Callable[[Outputs], Sequence[Mapping[str, Tensor]]], count: int) -> None:
        super().__init__({"panoptic": PanopticQuality(count)}, compute_groups=False)
        self._predicted = predicted

    def update(self, outputs: Outputs, targets: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch: what the task model's forward gave, and the images' targets."""
        super().update(self._predicted(outputs), targets)

    def compute(self) -> dict[str, Tensor]:
        """Name -> percent, the one that ranks first."""
        found = super().compute()
        return {name: found[name] for name in ("pq", "sq", "rq")}


class PanopticQuality(Metric):
    """Panoptic quality (arXiv 1801.00868, eq. 1), as COCO's evaluation has it.

    A predicted segment and one of the target match where they are of one class and their intersection over union is
    above one half; pixels that the target leaves void belong to no union. A predicted segment without a match is
    forgiven where more than half of it is void or a crowd of its class; crowds themselves are never missed.

    Args:
        count: classes.
    """

    full_state_update = False
    overlap: Tensor
    hits: Tensor
    wrong: Tensor
    missed: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.add_state("overlap", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("hits", "wrong", "missed"):
            self.add_state(name, torch.zeros(count, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            predicted: an image each, "panoptic" (H, W) segment numbers with 0 for void, "segments" (S,) the numbers,
                "segment_labels" (S,) their classes.
            targets: likewise, and "segment_crowd" (S,) where there are crowds.

        Raises:
            UsageError: sizes differ, or a number or a class is not listed.
        """
        for one, target in zip(predicted, targets, strict=True):
            self._add(one, target)

    def _add(self, one: Mapping[str, Tensor], target: Mapping[str, Any]) -> None:
        if one["panoptic"].shape != target["panoptic"].shape:
            shapes = f"{tuple(one['panoptic'].shape)} and {tuple(target['panoptic'].shape)}"
            raise UsageError(f"predictions and targets are of sizes {shapes}; resize the predictions to the targets")
        (found, labels), (known, classes) = self._ranks(one, "prediction"), self._ranks(target, "target")
        crowd = torch.as_tensor(target.get("segment_crowd", torch.zeros_like(classes))).bool().to(classes.device)
        rows, columns = len(classes) + 1, len(labels) + 1
        shared = torch.bincount(known * columns + found, minlength=rows * columns).view(rows, columns).double()
        inside, void = shared[1:, 1:], shared[0, 1:]  # (target segments, predicted segments)
        areas, sizes = shared[1:].sum(1), shared[:, 1:].sum(0)
        overlap = inside / (areas[:, None] + sizes - inside - void).clamp(min=1)
        same = classes[:, None] == labels
        match = same & (overlap > 0.5) & ~crowd[:, None]
        forgiven = void + (inside * (same & crowd[:, None])).sum(0)
        wrong = ~match.any(0) & (sizes > 0) & (2 * forgiven <= sizes)
        missed = ~match.any(1) & ~crowd
        self.overlap.index_add_(0, classes, (overlap * match).sum(1))
        self.hits += torch.bincount(classes[match.any(1)], minlength=self.count)
        self.wrong += torch.bincount(labels[wrong], minlength=self.count)
        self.missed += torch.bincount(classes[missed], minlength=self.count)

    def _ranks(self, one: Mapping[str, Any], what: str) -> tuple[Tensor, Tensor]:
        """Segments as 0 (void), 1, 2 ... a pixel, and their classes."""
        device = self.hits.device
        numbers = torch.as_tensor(one["panoptic"]).as_subclass(Tensor).to(device).long().flatten()
        order = torch.as_tensor(one["segments"]).to(device).long().argsort()
        segments = torch.as_tensor(one["segments"]).to(device).long()[order]
        labels = torch.as_tensor(one["segment_labels"]).to(device).long()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.count:
            raise UsageError(f"a {what} has a segment of class {int(labels.max())}; there are {self.count} classes")
        known = torch.cat([segments.new_zeros(1), segments])
        places = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
        if bool((known[places] != numbers).any()):
            strange = int(numbers[known[places] != numbers][0])
            raise UsageError(f"a {what} has pixels of segment {strange}, which its segments do not list")
        rank = torch.cat([order.new_zeros(1), order + 1])  # back to the order in which segments are listed
        return rank[places], labels

    def per_class(self) -> dict[str, Tensor]:
        """`pq`, `sq`, `rq` of each class, (classes,) float64 in percent; nan where a class does not occur."""
        halves = self.hits + 0.5 * (self.wrong + self.missed)
        quality = torch.where(halves > 0, self.hits / halves, torch.nan)
        segmentation = self.overlap / self.hits.clamp(min=1)
        segmentation = torch.where(halves > 0, segmentation, torch.nan)
        return {"pq": 100 * quality * segmentation, "sq": 100 * segmentation, "rq": 100 * quality}

    def compute(self) -> dict[str, Tensor]:
        """`pq`, `sq`, `rq` in percent, means over the classes that occur."""
        return {name: values.nanmean().float() for name, values in self.per_class().items()}
