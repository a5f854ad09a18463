"""What a run that needs no labels has of its own: its images, its plan, a look at its features."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from vertebra import recipes
from vertebra.config import Run, edit
from vertebra.contracts import Backbone
from vertebra.data.dataset import Dataset, Split
from vertebra.data.loader import Batches
from vertebra.data.pixels import OnError
from vertebra.errors import DataError, UsageError
from vertebra.spec import Spec
from vertebra.training import memory

NEIGHBOURS, TEMPERATURE = 20, 0.07
GALLERY = 20_000
"""Training images among which neighbours are looked for, at most."""


def propose(data: str, backbone: Spec, images: int, method: Spec, recipe: str | None = None) -> Run:
    """The run of the recipe that has the method's name, or of another one.

    Raises:
        UsageError: no such recipe, or one that trains a classifier.
    """
    name = recipe or method.address.partition("/")[0]
    if name not in recipes.names() and recipe is None:
        raise UsageError(
            f"method {method.address!r} has no recipe of its name; give --recipe: {', '.join(recipes.names())}"
        )
    run = recipes.find(name)(data, backbone, images)
    if run.method is None:
        raise UsageError(f"recipe {name!r} trains a classifier on labels: vertebra train --recipe {name}")
    return replace(run, method=method)


def edited(run: Run, edits: Sequence[str]) -> Run:
    """A run with `field=value` edits; further views that were like the first stay like it.

    Raises:
        UsageError: as `vertebra.config.edit` raises.
    """
    alike = all(views == run.plan.views for views in run.plan.more_views)
    changed = edit(run, edits)
    if not alike:
        return changed
    plan = changed.plan
    return replace(changed, plan=replace(plan, more_views=(plan.views,) * len(plan.more_views)))


def train_split(dataset: Dataset) -> Split:
    """The images to train on: the train split, or all where there are no splits.

    Raises:
        DataError: there are splits, and none of them is train.
    """
    for name in ("train", "all"):
        if name in dataset.splits:
            return dataset.splits[name]
    raise DataError(f"{dataset.path} has no train split; it has {', '.join(dataset.splits)}")


def tells_classes(dataset: Dataset) -> bool:
    """Whether each image has one class and there are several, so that neighbours can be asked for theirs."""
    return dataset.label == "single" and int((train_split(dataset).counts > 0).sum()) > 1


class Neighbours:
    """A probe of `fit`: the share of val images whose nearest training images vote for their class, in percent.

    The labels judge and train nothing. A large training set is represented by every n-th of its images.

    Args:
        backbone: whose pooled features are compared, by their cosines.
        train: labelled images that vote.
        val: labelled images that are classified.
        on_error: what an unreadable image does: "raise", or "skip", which shows another one.
    """

    def __init__(self, backbone: Backbone, train: Split, val: Batches, on_error: OnError = "raise") -> None:
        every = max(1, -(-len(train) // GALLERY))
        self.backbone, self.val, self.classes = backbone, val, len(train.classes)
        gallery = train.select(range(0, len(train), every)) if every > 1 else train
        self.gallery = Batches(
            gallery, val.preprocess, views=None, batch=val.batch, seed=0, workers=0, on_error=on_error
        )

    def __call__(self) -> dict[str, float]:
        """`{"knn_top1": percent}`."""
        from vertebra.probes.knn import votes  # a probe: pages import the training, and not the other way round

        gallery, labels = self._embedded(self.gallery)
        queries, truth = self._embedded(self.val)
        scores = votes(gallery, F.one_hot(labels, self.classes).float(), queries, NEIGHBOURS, TEMPERATURE)
        return {"knn_top1": 100 * float((scores.argmax(1) == truth).float().mean())}

    @torch.no_grad()
    def _embedded(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Pooled features (n, width) and targets (n,) of a split, on the CPU."""
        device = next(self.backbone.parameters()).device
        features: list[Tensor] = []
        targets: list[Tensor] = []
        size = None
        for batch in batches.epoch(0, 0):
            size = memory.in_parts(
                lambda part: features.append(self.backbone(part.images).pooled.float().cpu()), batch, size, device
            )
            targets.append(batch.targets)
        return torch.cat(features), torch.cat(targets)
