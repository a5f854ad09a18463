"""Grad-CAM: where a network finds what speaks for a class, and how faithful such maps are.

    maps = explain(model, images, "owl")    # (B, H, W), any CNN, Swin or ViT of vertebra, no layer to name

As a probe of a battle it explains what the contender's own head, or else the shared linear classifier, says of a few
test images. Insertion and deletion tell whether the maps name what the network goes by; pointing and boxes, where the
data have boxes, whether that is the object. The linear classifier's worst mistakes are explained for the report. The
suite of scores is `vertebra.probes.faithfulness`; it takes the maps of any method.

Departs from the paper in one thing: the layer is found, not named (see `vertebra.probes.grad_cam.sites`). For VGG,
ResNet and ConvNeXt it is the last map as in the paper, for transformers what the paper could not know. Captions,
questions and detections are explained through a callable target. Names for neurons need a data set of concepts; the
weights that would be named are `channels`.
"""

import base64
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone, Effect, Probe, Report, Score, Work
from vertebra.data.dataset import Dataset
from vertebra.data.pixels import normalised
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.probes import NotApplicable, faithfulness
from vertebra.probes.corruption import subset
from vertebra.probes.evidence import Evidence
from vertebra.probes.grad_cam.maps import (
    METHODS,
    activations_and_gradients,
    channels,
    explain,
    guided_backprop,
    resized,
    scaled,
)
from vertebra.probes.grad_cam.sites import Site, site_of
from vertebra.probes.linear import mistakes
from vertebra.probes.metrics import share

__all__ = [
    "METHODS",
    "GradCAM",
    "Site",
    "activations_and_gradients",
    "channels",
    "effect",
    "explain",
    "grad_cam",
    "guided_backprop",
    "resized",
    "scaled",
    "site_of",
]

PAPER = Paper(
    id="grad_cam",
    title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    year=2016,
    arxiv="1610.02391",
    reference="ramprs/grad-cam",
    licence="",
    claim="class-discriminative maps for any CNN without change or re-training; ILSVRC15 val localisation error "
    "56.51 % top-1 with VGG-16",
    parity="the packages grad-cam and captum",
    note="the layer is found through the backbone contract instead of named; captions and questions need a callable "
    "target; naming neurons is left out",
)
VARIANTS = {"quick": {"images": 48, "steps": 10}, "full": {"images": 256, "steps": 20}}
SHOWN = 24
"""Mistakes that are explained for the report: as many as the linear probe lists."""


def grad_cam(
    *, variant: str = "quick", images: int | None = None, steps: int | None = None, cells: int = 4
) -> "GradCAM":
    """The probe; for maps of your own model call `explain`.

    Args:
        variant: "quick" or "full".
        images: test images at most, with the test split's mix of classes; None takes the variant's.
        steps: parts in which pixels come and go; None takes the variant's.
        cells: fewest cells of a map, down and across; of maps with fewer nothing is said, as they point at all or
            nothing. With a stride of 32 four cells are 128 pixels.

    Raises:
        UsageError: an unknown variant, or a value out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"grad_cam has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    options = VARIANTS[variant]
    return GradCAM(
        images=options["images"] if images is None else images,
        steps=options["steps"] if steps is None else steps,
        cells=cells,
    )


class Headed(nn.Module):
    """A backbone and whatever turns its pooled features into logits (B, classes)."""

    def __init__(self, backbone: Backbone, head: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to logits (B, classes)."""
        return self.head(self.backbone(images).pooled)


class GradCAM(Probe):
    """Insertion and deletion area, and pointing and boxes where there are boxes; explains the worst mistakes."""

    def __init__(self, *, images: int, steps: int, cells: int) -> None:
        for name, value in (("images", images), ("steps", steps), ("cells", cells)):
            if value < 1:
                raise UsageError(f"grad_cam: {name} is {value}; it must be at least 1")
        self.images, self.steps, self.cells = images, steps, cells

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        chosen = min(self.images, images["test"])
        explained = 3 * chosen + 2 * min(SHOWN, images["test"])  # a pass, a pass for the boxes, a little way back
        return Work(forward=chosen * 2 * (self.steps + 1) + explained, seconds=0.5)

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        shared = Headed(model, _on(data.classifier, data.device)).eval()
        network = shared if data.head is None else Headed(model, data.head).eval()
        chosen = subset(data.targets("test"), self.images)
        try:
            site = site_of(model, self._pixels(data, chosen[:1]))
        except UsageError as error:
            raise NotApplicable(f"grad_cam: {error}") from error
        if min(site.grid) < self.cells:
            down, across = site.grid
            raise NotApplicable(
                f"grad_cam: maps of {down} x {across} cells say too little; give larger images (--img-size), or "
                f"grad_cam?cells={min(site.grid)} to have them all the same"
            )
        with torch.inference_mode():
            said = network.head(data.features("test")[chosen].to(data.device)).argmax(1).cpu()
        scores = self._faithful(network, data, chosen, said, site)
        scores |= self._localised(network, data, chosen, site)
        details = {"layer": site.layer, "grid": list(site.grid), "images": len(chosen), "steps": self.steps}
        if not data.multi:
            details["explanations"] = explanations(shared, data, site)
        return Report(scores, details)

    def _pixels(self, data: Evidence, rows: Tensor) -> Tensor:
        return normalised(data.images("test")[rows.numpy()], data.backbone.preprocess).to(data.device)

    def _faithful(self, network: Headed, data: Evidence, chosen: Tensor, said: Tensor, site: Site) -> dict[str, Score]:
        """Insertion and deletion of what the network says, in percent of the probability."""
        areas: dict[str, list[Tensor]] = {"insertion_auc": [], "deletion_auc": []}
        for rows, classes in zip(chosen.split(data.batch), said.split(data.batch), strict=True):
            images = self._pixels(data, rows)
            maps = explain(network, images, classes, layer=site)
            ask = faithfulness.confidence(network, classes, multi=data.multi, batch=data.batch)
            for name, curve in (("insertion_auc", faithfulness.insertion), ("deletion_auc", faithfulness.deletion)):
                areas[name].append(faithfulness.area(curve(ask, images, maps, steps=self.steps)).cpu())
        return {
            "insertion_auc": share(torch.cat(areas["insertion_auc"])),
            "deletion_auc": share(torch.cat(areas["deletion_auc"]), "lower"),
        }

    def _localised(self, network: Headed, data: Evidence, chosen: Tensor, site: Site) -> dict[str, Score]:
        """The pointing game, and boxes with an overlap of a half, of each class that an image has boxes of."""
        split, preprocess = data.split("test"), data.backbone.preprocess
        if not faithfulness.has_boxes(split):
            return {}
        found = {row: faithfulness.true_boxes(split, row, preprocess) for row in chosen.tolist()}
        asked = [(row, label, boxes) for row, some in found.items() for label, boxes in some.items()]
        if not asked:
            return {}
        height, width = preprocess.size
        hits, fits = [], []
        for start in range(0, len(asked), data.batch):
            some = asked[start : start + data.batch]
            images = self._pixels(data, torch.tensor([row for row, _, _ in some]))
            maps = explain(network, images, [label for _, label, _ in some], layer=site).cpu()
            truth = [boxes for _, _, boxes in some]
            hits.append(faithfulness.pointing(maps, faithfulness.within(truth, height, width)))
            fits.append(faithfulness.overlap(faithfulness.boxes(maps), truth) >= 0.5)
        return {"pointing": share(torch.cat(hits)), "box_iou50": share(torch.cat(fits))}


def _on(head: nn.Module, device: torch.device) -> nn.Module:
    """The shared classifier on the backbone's device; a copy where that is another one."""
    if device.type == "cpu":
        return head
    return copy.deepcopy(head).to(device)


def explanations(network: Headed, data: Evidence, site: Site) -> list[dict[str, Any]]:
    """Maps of the linear probe's worst mistakes for the class that was said, JSON-ready.

    Args:
        network: the backbone under the shared linear classifier, whose mistakes they are.
        data: the evidence.
        site: where to look.

    Returns:
        One entry a mistake: its index in the test split, the class, the part of the image that the network sees
        (left, top, right, bottom as shares of its sides), rows and columns of the map, and its cells as bytes, base64.
    """
    worst = mistakes(data.classifier(data.features("test")), data)["mistakes"][:SHOWN]
    if not worst:
        return []
    rows = torch.tensor([one["index"] for one in worst])
    images = normalised(data.images("test")[rows.numpy()], data.backbone.preprocess).to(data.device)
    said = [data.classes.index(one["predicted"]) for one in worst]
    maps = scaled(explain(network, images, said, layer=site, at="cells")).cpu()
    split = data.split("test")
    return [
        {
            "index": one["index"],
            "predicted": one["predicted"],
            "seen": _shares(split.image(one["index"]).size, data.backbone),
            "grid": list(cells.shape),
            "cells": base64.b64encode((cells * 255).round().byte().numpy().tobytes()).decode(),
        }
        for one, cells in zip(worst, maps, strict=True)
    ]


def _shares(size: Sequence[int], backbone: Backbone) -> list[float]:
    """The part of an image of this (width, height) that the network sees, as shares of its sides."""
    width, height = size
    box = faithfulness.seen(width, height, backbone.preprocess) / np.array([width, height] * 2)
    return [round(float(value), 5) for value in box]


def effect(scale: str, data: Dataset | None) -> Effect:
    """Localisation, faithfulness, sanity and bias on scenes of two things, beside simple gradients and blind maps."""
    from vertebra.probes.grad_cam.scenes import effect as on_scenes

    return on_scenes(scale, data)
