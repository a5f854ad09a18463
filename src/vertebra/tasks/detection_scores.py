"""COCO's twelve numbers for boxes or masks, as torchmetrics adds them up over batches and ranks.

The numbers are faster-coco-eval's, which are those of COCO's own program to the last digit. torchmetrics'
`MeanAveragePrecision` has the same engine, but single-precision recall thresholds (0.3463 instead of 0.3470 on
100 images of VOC), forgets images without objects when it looks at masks, and cannot be gathered where ranks saw
different numbers of images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vertebra.contracts import Prediction
from vertebra.errors import UsageError

NAMES = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)
"""What `DetectionScores` gives, in COCO's order; the first one ranks."""

_COLUMNS = ("boxes", "scores", "labels", "found", "true_boxes", "true_labels", "crowd", "area", "objects")
_FRACTIONS = ("boxes", "scores", "true_boxes", "area")
_RUNS = ("sizes", "texts", "lengths", "true_texts", "true_lengths")


class DetectionScores(Metric):
    """Average precision and recall over IoU 0.50 to 0.95 and over classes, in percent.

    NaN where the data have nothing to measure: `map_small` without small objects, say. Crowds are not counted, neither
    for nor against. Small, medium and large go by the targets' area (of the mask where the data have one): under
    32 x 32 pixels, up to 96 x 96, above. Difficult objects count like others, as COCO knows none. Between equal scores
    the order of the images decides, as in COCO's program; give them in the order of the split.

    Args:
        classes: how many there are.
        kind: "boxes" compares boxes, "masks" masks.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, classes: int, *, kind: Literal["boxes", "masks"] = "boxes") -> None:
        super().__init__()
        if kind not in ("boxes", "masks"):
            raise UsageError(f"kind is {kind!r}; it can be boxes or masks")
        self.classes, self.kind = classes, kind
        for name in (*_COLUMNS, *(_RUNS if kind == "masks" else ())):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            predictions: one an image; boxes xyxy and masks in pixels of the image as given.
            targets: one an image, in the same pixels: `boxes` and `labels`, `masks` where those are compared, and where
                the data have them `crowd` and `area`, as `vertebra.data.annotations` has them.

        Raises:
            UsageError: predictions and targets do not fit together, or a score or box is not finite.
        """
        if len(predictions) != len(targets):
            raise UsageError(f"{len(predictions)} predictions for {len(targets)} targets; give one an image")
        for prediction, target in zip(predictions, targets, strict=True):
            self._add(prediction, target)

    def _add(self, prediction: Prediction, target: Mapping[str, Any]) -> None:
        labels, true_labels = prediction.labels, target["labels"]
        boxes = self._boxes(prediction.boxes, len(labels), "predictions")
        true_boxes = self._boxes(target.get("boxes"), len(true_labels), "targets")
        if not torch.isfinite(prediction.scores).all() or not torch.isfinite(boxes).all():
            raise UsageError("predictions have scores or boxes that are not finite; has the training diverged?")
        nothing = torch.zeros(len(true_labels), device=true_labels.device)
        sides = true_boxes[:, 2:] - true_boxes[:, :2]
        values = {
            "boxes": boxes,
            "scores": prediction.scores,
            "labels": labels,
            "found": torch.tensor([len(labels)]),
            "true_boxes": true_boxes,
            "true_labels": true_labels,
            "crowd": target.get("crowd", nothing).long(),
            "area": target.get("area", sides.prod(1)),
            "objects": torch.tensor([len(true_labels)]),
        }
        if self.kind == "masks":
            values |= self._masks(prediction.masks, target.get("masks"), len(labels), len(true_labels))
            if "area" not in target:
                values["area"] = torch.as_tensor(target["masks"]).flatten(1).sum(1)
        for name, value in values.items():
            plain = torch.as_tensor(value).detach().as_subclass(Tensor).to(self.device)
            getattr(self, name).append(plain.float() if name in _FRACTIONS else plain)

    def _boxes(self, boxes: Tensor | None, count: int, what: str) -> Tensor:
        if boxes is None and self.kind == "masks":
            return torch.zeros(count, 4)
        if boxes is None or boxes.shape != (count, 4):
            raise UsageError(f"{what} have boxes {None if boxes is None else tuple(boxes.shape)}, not ({count}, 4)")
        return boxes.detach().as_subclass(Tensor)

    def _masks(self, masks: Tensor | None, true_masks: Tensor | None, count: int, true_count: int) -> dict[str, Tensor]:
        if masks is None or true_masks is None or len(masks) != count or len(true_masks) != true_count:
            raise UsageError("kind is masks, and predictions or targets have no masks, or not one an object")
        if masks.shape[1:] != true_masks.shape[1:]:
            raise UsageError(f"masks are {tuple(masks.shape[1:])} where the target's are {tuple(true_masks.shape[1:])}")
        (texts, lengths), (true_texts, true_lengths) = _encoded(masks), _encoded(true_masks)
        sizes = torch.tensor([tuple(true_masks.shape[1:])])
        found = {"sizes": sizes, "texts": texts, "lengths": lengths}
        return found | {"true_texts": true_texts, "true_lengths": true_lengths}

    def _sync_dist(self, *args: Any, **options: Any) -> None:
        """Gather the ranks; one that saw no image brings nothing of the right type, or the others would wait."""
        for name in self._defaults:
            if not getattr(self, name):
                whole = name not in _FRACTIONS
                kind = torch.uint8 if name in ("texts", "true_texts") else torch.int64 if whole else torch.float32
                shape = (0, 4) if name in ("boxes", "true_boxes") else (0, 2) if name == "sizes" else (0,)
                setattr(self, name, [torch.empty(shape, dtype=kind, device=self.device)])
        super()._sync_dist(*args, **options)

    def compute(self) -> dict[str, Tensor]:
        """The names of `NAMES` -> percent, NaN where there is nothing to measure."""
        stats = np.asarray(self._evaluated().stats[: len(NAMES)], dtype=np.float64)
        values = np.where(stats < 0, np.nan, 100 * stats)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(NAMES, values, strict=True)}

    def per_class(self) -> Tensor:
        """`map` of each class, (classes,) percent; NaN for a class without objects. Of this rank's images only."""
        precision = np.asarray(self._evaluated().eval["precision"])[:, :, :, 0, -1]  # (IoU, recall, classes)
        values = np.where(precision < 0, np.nan, 100 * precision).reshape(-1, precision.shape[2])
        there = ~np.isnan(values).all(0)
        found = np.full(self.classes, np.nan)
        found[there] = np.nanmean(values[:, there], 0)
        return torch.from_numpy(found)

    def _evaluated(self) -> Any:
        """faster-coco-eval's evaluation, summed up."""
        from faster_coco_eval import COCO, COCOeval_faster

        columns = {name: _joined(getattr(self, name)) for name in _COLUMNS}
        images: list[dict[str, Any]] = [{"id": number + 1} for number in range(len(columns["found"]))]
        found_masks = true_masks = None
        if self.kind == "masks":
            runs = {name: _joined(getattr(self, name)) for name in _RUNS}
            for image, (height, width) in zip(images, runs["sizes"].reshape(-1, 2).tolist(), strict=True):
                image |= {"height": height, "width": width}
            found_masks = _decoded(runs["texts"], runs["lengths"], runs["sizes"], columns["found"])
            true_masks = _decoded(runs["true_texts"], runs["true_lengths"], runs["sizes"], columns["objects"])
        categories = [{"id": number, "name": str(number)} for number in range(self.classes)]
        area, crowd = columns["area"].astype(np.float64), columns["crowd"]
        truth = _annotations(columns["true_boxes"], columns["true_labels"], columns["objects"], true_masks)
        for entry, one_area, one_crowd in zip(truth, area.tolist(), crowd.tolist(), strict=True):
            entry |= {"area": one_area, "iscrowd": int(one_crowd)}
        found = _annotations(columns["boxes"], columns["labels"], columns["found"], found_masks)
        for entry, score in zip(found, columns["scores"].astype(np.float64).tolist(), strict=True):
            entry["score"] = score
        evaluation = COCOeval_faster(
            COCO({"images": images, "annotations": truth, "categories": categories}, print_function=_silent),
            COCO({"images": images, "annotations": found, "categories": categories}, print_function=_silent),
            "segm" if self.kind == "masks" else "bbox",
            print_function=_silent,
            rle_iou_max_workers=1,
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation


def _silent(*words: Any) -> None:
    """The library says what it does; nobody asked."""


def _joined(state: list[Tensor] | Tensor) -> np.ndarray:
    """A state as one array; a list on this rank alone, one tensor after ranks were gathered."""
    return dim_zero_cat(state).cpu().numpy() if len(state) else np.empty(0)


def _annotations(
    boxes: np.ndarray, labels: np.ndarray, counts: np.ndarray, masks: Sequence[dict] | None
) -> list[dict[str, Any]]:
    """COCO's entries, with the area of the mask or the box."""
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    images = np.repeat(np.arange(1, len(counts) + 1), counts.astype(np.int64)).tolist()
    columns = zip(images, labels.astype(np.int64).tolist(), boxes.tolist(), strict=True)
    entries: list[dict[str, Any]] = [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (image, label, box) in enumerate(columns, 1)
    ]
    if masks is not None:
        from faster_coco_eval.core import mask

        areas = mask.area(list(masks)).tolist() if masks else []
        for entry, one, area in zip(entries, masks, areas, strict=True):
            entry |= {"segmentation": one, "area": float(area)}
    return entries


def _encoded(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W) as the bytes of their compressed runs, one after the other, and how many bytes each has."""
    from faster_coco_eval.core import mask

    if not len(masks):
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    down = masks.detach().as_subclass(Tensor).to("cpu", torch.uint8).transpose(1, 2).contiguous().numpy()  # (N, W, H)
    texts = [_bytes(one["counts"]) for one in mask.encode(down.T)]  # type: ignore[union-attr]
    lengths = torch.tensor([len(text) for text in texts])
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), lengths


def _bytes(counts: bytes | str) -> bytes:
    return counts.encode() if isinstance(counts, str) else counts


def _decoded(texts: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> list[dict[str, Any]]:
    """COCO's compressed masks; the runs stay as they are."""
    whole = texts.astype(np.uint8).tobytes()
    ends = np.cumsum(lengths.astype(np.int64)).tolist()
    size = np.repeat(sizes.reshape(-1, 2).astype(np.int64), counts.astype(np.int64), axis=0).tolist()
    begins = [0, *ends]
    return [{"size": one, "counts": whole[start:end]} for one, start, end in zip(size, begins, ends, strict=False)]
