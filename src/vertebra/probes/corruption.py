"""Accuracy under the fifteen common corruptions (Hendrycks and Dietterich, arXiv 1903.12261).

The shared linear classifier, fitted on clean features, reads the features of corrupted test images; the corruptions
are `vertebra.probes.corruptions`, applied after resizing as ImageNet-C was made. `quick` deals severities out: each
image suffers every corruption once, at a severity that goes round, so that the mean over the 75 settings is estimated
without bias at a fifth of their cost. `full` shows each image at all five. The noise is the same for all contenders.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report, Work
from vertebra.data.dataset import stratified
from vertebra.errors import UsageError, near
from vertebra.probes import NotApplicable
from vertebra.probes.corruptions import CORRUPTIONS, corrupted
from vertebra.probes.evidence import Evidence, kept
from vertebra.probes.metrics import resampled, share

VARIANTS = {"quick": {"images": 256, "severities": "dealt"}, "full": {"images": 512, "severities": "all"}}
SEVERITIES = 5
KEPT_BYTES = 2 * 2**30
"""Of corrupted pixels on disk, for the other contenders of the same preprocessing; the rest is made again."""


def corruption(
    *, variant: str = "quick", images: int | None = None, severities: Literal["dealt", "all"] | None = None
) -> "CorruptionProbe":
    """The probe.

    Args:
        variant: "quick" or "full".
        images: test images at most, with the test split's mix of classes; None takes the variant's.
        severities: "dealt", one a corruption and image, or "all" five; None takes the variant's.

    Raises:
        UsageError: an unknown variant, or a value out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"corruption has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    options: dict[str, Any] = VARIANTS[variant]
    return CorruptionProbe(images=images or options["images"], severities=severities or options["severities"])


class CorruptionProbe(Probe):
    """Top-1 accuracy under corruption, what is lost of the clean accuracy, and the share of it that is kept."""

    def __init__(self, *, images: int, severities: Literal["dealt", "all"]) -> None:
        if images < 1:
            raise UsageError(f"corruption: images is {images}; it must be at least 1")
        if severities not in ("dealt", "all"):
            raise UsageError(f"corruption: severities is {severities!r}; it must be dealt or all")
        self.images, self.severities = images, severities

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        shown = min(self.images, images["test"]) * len(CORRUPTIONS) * (1 if self.severities == "dealt" else SEVERITIES)
        return Work(forward=shown, seconds=0.5 + 2e-4 * shown)

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        if data.multi:
            raise NotApplicable("corruption: top-1 accuracy needs one label an image")
        chosen = subset(data.targets("test"), self.images)
        targets = data.targets("test")[chosen]
        clean = (data.classifier(data.features("test")[chosen]).argmax(1) == targets).double()
        right = self._right(data, data.images("test")[chosen.numpy()], targets)  # (15, 5, n), nan where not dealt
        each = right.nanmean((0, 1))
        scores = {
            "corruption_top1": share(each),
            "top1_drop": share(clean - each, "lower"),
        }
        if clean.any():
            scores["relative_top1"] = resampled(lambda counts: _share_kept(counts @ each, counts @ clean), len(each))
        return Report(scores, {"images": len(chosen), "severities": self.severities, **curves(right, clean)})

    def _right(self, data: Evidence, images: np.ndarray, targets: Tensor) -> Tensor:
        """Whether the classifier is right, (corruptions, severities, n): 0, 1, or nan where an image was not shown."""
        right = torch.full((len(CORRUPTIONS), SEVERITIES, len(images)), torch.nan, dtype=torch.float64)
        pixels = hashlib.sha256(images.tobytes()).hexdigest()[:16]
        settings = [(kind, level) for kind in range(len(CORRUPTIONS)) for level in range(SEVERITIES)]
        # contenders that run at once begin at different places, so that they find each other's pixels
        begin = int(data.key, 16) % len(settings)
        for kind, level in settings[begin:] + settings[:begin]:
            rows = self._rows(kind, level)
            shown = images[rows]
            if len(shown):
                name = list(CORRUPTIONS)[kind]
                fits = (kind * SEVERITIES + level + 1) * shown.nbytes <= KEPT_BYTES
                file = f"corrupted-{pixels}-{self.severities}-{name}-{level + 1}.npy"
                path = data.folder / file if data.folder and fits else None
                seen = kept(path, partial(corrupted, shown, name, level + 1))
                right[kind, level, rows] = (data.classifier(data.embed(seen)).argmax(1) == targets[rows]).double()
        return right

    def _rows(self, kind: int, level: int) -> slice:
        """The images that see a corruption at a severity."""
        return slice((level - kind) % SEVERITIES, None, SEVERITIES) if self.severities == "dealt" else slice(None)


def _share_kept(corrupted_right: Tensor, clean_right: Tensor) -> Tensor:
    """Percent of the clean accuracy; nan for draws without one right answer."""
    return torch.where(clean_right > 0, 100 * corrupted_right / clean_right, torch.nan)


def subset(targets: Tensor, images: int) -> Tensor:
    """Positions of about `images` test images with the same mix of classes; all of them where there are fewer."""
    if len(targets) <= images:
        return torch.arange(len(targets))
    return torch.from_numpy(stratified(targets.numpy(), (images / len(targets),), seed=0)[0])


def curves(right: Tensor, clean: Tensor) -> dict[str, Any]:
    """Accuracy in percent, JSON-ready: clean, at each severity, and for each corruption at each severity."""

    def percent(values: Tensor) -> list[float | None]:
        return [None if value != value else round(100 * value, 2) for value in values.tolist()]

    by_setting = right.nanmean(2)  # (15, 5)
    return {
        "clean": round(100 * clean.mean().item(), 2),
        "severity": list(range(1, SEVERITIES + 1)),
        "top1": percent(right.nanmean((0, 2))),
        "corruptions": {name: percent(row) for name, row in zip(CORRUPTIONS, by_setting, strict=True)},
    }
