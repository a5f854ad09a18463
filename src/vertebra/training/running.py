"""A run from its description to its directory: read the data, check everything, build, fit, and go on later."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from vertebra import recipes
from vertebra.config import Run, from_json, to_json
from vertebra.contracts import Backbone, Method, Preprocess
from vertebra.data import read
from vertebra.data.dataset import Dataset, Split, stratified
from vertebra.data.loader import Batches
from vertebra.errors import DataError, UsageError
from vertebra.methods.assisted import supervised
from vertebra.methods.supervised import Supervised
from vertebra.paper import find_page
from vertebra.spec import Spec, options_of
from vertebra.tasks.classify import Classify, classify
from vertebra.training import pretraining, rundir
from vertebra.training.launching import device_of
from vertebra.training.loop import Evaluation, History, Meter, evaluate, fit, random_states_kept
from vertebra.training.optimizers import check_optimizer
from vertebra.training.speed import resolve

logger = logging.getLogger("vertebra.training")

VAL_SHARE = 0.2
"""Share of the training images that is held out where the data has no val split."""

KEEPS_EXACTNESS = frozenset({"plan.workers", "plan.checkpoint_every", "plan.evaluate_every"})
"""Fields that may change on resume and leave the weights what they would have been."""

FIXED = frozenset(
    {
        "data",
        "backbone",
        "adapter",
        "method",
        "task",
        "image_size",
        "plan.batch",
        "plan.optimizer",
        "plan.freeze",
        "plan.layer_decay",
    }
)
"""Fields that a checkpoint's contents hang on; a resumed run cannot change them."""


@dataclass(frozen=True, eq=False)
class Material:
    """What a run trains and is judged on.

    Attributes:
        dataset: as it was read.
        train: images to train on.
        val: images that decide which checkpoint is best; none where no label can.
        multi: many labels an image.
        notes: what a reader should know, such as a val split that was held out here.
    """

    dataset: Dataset
    train: Split
    val: Split
    multi: bool
    notes: tuple[str, ...]


def material(
    dataset: Dataset, *, task: str = "auto", seed: int = 0, labels: Literal["needed", "optional"] = "needed"
) -> Material:
    """Split a data set for training; what cannot be trained on is refused here.

    Args:
        dataset: as it was read.
        task: one label an image, many, or whatever the data says.
        seed: of what is held out.
        labels: where they are optional, images of one class, of many labels each or of none are all trained on.

    Raises:
        DataError: no labels, one class only, no images to train on, or labels of the other kind than `task`.
    """
    if labels == "optional" and not pretraining.tells_classes(dataset):
        return _unlabelled(dataset)
    if dataset.label == "none":
        raise DataError(
            f"{dataset.path} has no labels ({dataset.layout}); a classifier needs a folder a class, or a table"
        )
    if task not in ("auto", dataset.label):
        raise DataError(f"task is {task!r} and {dataset.path} has {dataset.label}-label targets")
    train, multi = pretraining.train_split(dataset), dataset.label == "multi"
    seen = int((train.counts > 0).sum())
    if not multi and seen < 2:
        raise DataError(f"{dataset.path}: {train.name} has images of {seen} class; training needs at least 2")
    notes = list(dataset.notes)
    if not multi and seen < len(train.classes):
        absent = [name for name, count in zip(train.classes, train.counts, strict=True) if count == 0]
        notes.append(f"no training image of {', '.join(absent)}")
    if "val" in dataset.splits:
        return Material(dataset, train, dataset.splits["val"], multi, tuple(notes))
    train, val = _held_out(train, seed)
    total = len(train) + len(val)
    notes.append(f"no val split: {len(val)} of {total} training images are held out, with the same mix of classes")
    return Material(dataset, train, val, multi, tuple(notes))


def _unlabelled(dataset: Dataset) -> Material:
    train = pretraining.train_split(dataset)
    notes = (*dataset.notes, "no classes to judge by: the loss alone is watched")
    return Material(dataset, train, train.select([], "val"), dataset.label == "multi", notes)


def _held_out(split: Split, seed: int) -> tuple[Split, Split]:
    assert split.targets is not None
    held, kept = stratified(split.targets, (VAL_SHARE,), seed)
    if not len(held):
        held = kept  # too few images of every class to hold one out
    return split.select(kept, "train"), split.select(held, "val")


def propose(data: str, backbone: Spec, images: int, recipe: str | None = None) -> Run:
    """The run that a recipe makes; without a name, `finetune` for pretrained weights and `scratch` for random ones.

    Raises:
        UsageError: no such recipe, or one of a method.
    """
    name = recipe or ("finetune" if has_weights(backbone) else "scratch")
    run = recipes.find(name)(data, backbone, images)
    if run.method is not None:
        raise UsageError(f"recipe {name!r} pretrains and takes no labels: vertebra pretrain --method {name}")
    return run


def has_weights(backbone: Spec) -> bool:
    """Whether a spec asks for pretrained weights: by its option, or by the tag of timm's name."""
    page, _, variant = backbone.address.partition("/")
    if backbone.options.get("weights"):
        return True
    if ":" in backbone.address:
        return False
    if page == "timm":
        return "." in variant
    variants = find_page(page, "backbones").variants
    chosen = variants.get(variant) or next(iter(variants.values()), {})
    return "." in str(chosen.get("timm", "")) or bool(chosen.get("weights"))


def pretrained(backbone: Spec, wanted: bool) -> Spec:
    """The same backbone with or without its published weights.

    Raises:
        UsageError: its factory takes no `weights`.
    """
    if has_weights(backbone) == wanted:
        return backbone
    if wanted:
        return replace(backbone, options={**backbone.options, "weights": "pretrained"})
    options = {name: value for name, value in backbone.options.items() if name != "weights"}
    address = backbone.address.partition(".")[0] if backbone.address.startswith("timm/") else backbone.address
    return replace(backbone, address=address, options=options)


def check(run: Run, data: Material, device: str) -> None:
    """Refuse what would fail later.

    Raises:
        UsageError: the message names the field.
    """
    device_of(device)
    check_optimizer(run.plan.optimizer)
    if data.multi and (run.plan.views.mixup or run.plan.views.cutmix):
        raise UsageError("views.mixup and views.cutmix mix one label an image; this data has many: set both to 0")
    if run.plan.micro_batch is not None and run.plan.micro_batch < 1:
        raise UsageError(f"plan.micro_batch is {run.plan.micro_batch}; it must be at least 1")
    if run.image_size is not None:
        known = options_of(run.backbone.resolve()[0])
        if "image_size" not in known and "" not in known:
            raise UsageError(f"{run.backbone.address} takes no image_size; leave --img-size out")


def build(run: Run, data: Material) -> Method:
    """What a run minimises, with seeded random parts: a method around its backbone, or a classifier.

    Raises:
        VertebraError: the backbone cannot be built; its factory says why.
    """
    size = {} if run.image_size is None else {"image_size": run.image_size}
    torch.manual_seed(run.plan.seed)
    backbone = replace(run.backbone, options={**run.backbone.options, **size}).build()
    if run.adapter is not None:
        backbone = run.adapter.build(backbone)
    if run.method is not None:
        return run.method.build(backbone)
    return supervised(_classifier(run, data, backbone))


def _classifier(run: Run, data: Material, backbone: Backbone) -> Classify:
    return classify(
        backbone,
        data.train.classes,
        multi=data.multi,
        label_smoothing=run.label_smoothing,
        class_weights=balanced(data.train) if run.class_weights == "balanced" else None,
    )


def balanced(split: Split) -> Tensor:
    """Class weights (classes,) in inverse proportion to the images, mean 1."""
    inverse = 1 / np.maximum(1, split.counts)
    return torch.from_numpy(inverse / inverse.mean()).float()


def train(
    run: Run,
    run_dir: Path | None = None,
    *,
    data: Material | None = None,
    device: str = "auto",
    meter: Meter | None = None,
    resuming: bool = False,
) -> History:
    """Do a run.

    Args:
        run: what, on what, how.
        run_dir: folder for everything the run leaves; None writes nothing.
        data: what `run.data` holds, where it has been read already.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        meter: is told of each step and epoch.
        resuming: go on from the last checkpoint in `run_dir`, or from the start where there is none.

    Raises:
        DataError: the data cannot be trained on.
        UsageError: the run cannot be done with this backbone or on this machine, or `run_dir` holds another.
        VertebraError: as `fit` raises.
    """
    data = data or material_of(run)
    check(run, data, device)
    with random_states_kept():
        method = build(run, data)
    # written out in run.json, so that the run goes on as it began
    run = replace(run, plan=replace(run.plan, precision=resolve(run.plan.precision, device_of(device), method)))
    batches, val = loaders(run, data, method.backbone.preprocess)
    with _occupied(run_dir if batches.rank == 0 else None, resuming) as folder:
        if folder:
            rundir.write_json(folder / "run.json", record(run, data))
        last = run_dir / "checkpoints" / "last" if run_dir and resuming else None
        history = fit(
            method,
            batches,
            run.plan,
            curriculum=run.curriculum.build(batches) if run.curriculum else None,
            probes=[_judge(run, method, data, val)] if val is not None else [],
            run_dir=folder,
            resume_from=last if last and last.exists() else None,
            documents=documents(run, method),
            device=device,
            meter=meter if batches.rank == 0 else None,
        )
        for bad in batches.bad:
            logger.warning("unreadable; others stood in for it: %s", bad.reason)
    return history


def material_of(run: Run) -> Material:
    """What a run trains and is judged on, read from where its data is.

    Raises:
        DataError: as `material` raises.
    """
    return material(
        read(run.data), task=run.task, seed=run.plan.seed, labels="optional" if run.method is not None else "needed"
    )


def _judge(run: Run, method: Method, data: Material, val: Batches) -> Evaluation:
    """What decides which checkpoint is best: a classifier's metrics, or the neighbours of a pretrained backbone."""
    if isinstance(method, Supervised):
        return lambda: evaluate(method.task_model, val)
    return pretraining.Neighbours(method.backbone, data.train, val, run.on_error)


def loaders(run: Run, data: Material, preprocess: Preprocess) -> tuple[Batches, Batches | None]:
    """Training batches of this rank, and those of the val split, if any, which every rank evaluates whole."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    plan, on_error = run.plan, run.on_error
    batches = Batches(
        data.train,
        preprocess,
        views=plan.views,
        more_views=plan.more_views,
        batch=plan.batch,
        seed=plan.seed,
        workers=plan.workers,
        rank=rank,
        world=world,
        on_error=on_error,
    )
    if not len(data.val):
        return batches, None
    return batches, Batches(data.val, preprocess, views=None, batch=plan.batch, seed=0, workers=0, on_error=on_error)


@contextmanager
def _occupied(run_dir: Path | None, resuming: bool) -> Iterator[Path | None]:
    """The run directory, held and logged into."""
    if run_dir is None:
        yield None
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "run.json").exists() and not resuming:
        raise UsageError(f"{run_dir} holds a run already; choose another folder, or `vertebra resume {run_dir}`")
    with rundir.locked(run_dir), rundir.logged(run_dir):
        yield run_dir


def record(run: Run, data: Material) -> dict[str, Any]:
    """What `run.json` holds: enough to start the run again and to know what it ran on."""
    dataset = data.dataset
    splits = {name: len(split) for name, split in dataset.splits.items()}
    return {
        "run": to_json(run),
        "data": {
            "path": str(Path(run.data).resolve()) if Path(run.data).exists() else run.data,
            "layout": dataset.layout,
            "fingerprint": dataset.fingerprint,
            "splits": splits,
            "train": len(data.train),
            "val": len(data.val),
            "classes": list(dataset.classes),
            "notes": list(data.notes),
        },
        "threads": torch.get_num_threads(),
        **rundir.surroundings(),
    }


def documents(run: Run, method: Method) -> dict[str, Any]:
    """What every checkpoint says of itself; `config.json` has the shape that timm and the hub know."""
    backbone = method.backbone
    preprocess, spec = backbone.preprocess, unweighted(run, backbone)
    height, width = preprocess.size
    model = method.task_model if isinstance(method, Supervised) else None
    classes = list(model.classes) if model else []
    ours = {"name": run.backbone.name, "backbone": spec.to_json()}
    config = {
        "architecture": spec.address.removeprefix("timm/"),
        "num_classes": len(classes),
        "num_features": backbone.width,
        "model_args": dict(spec.options.get("network", {})),
        "label_names": classes,
        "pretrained_cfg": {
            "input_size": [preprocess.channels, height, width],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop,
            "crop_mode": "squash" if preprocess.fit == "squash" else "center",
            "num_classes": len(classes),
        },
        "vertebra": {"task": "classify", "multi": model.multi, **ours}
        if model
        else {"method": to_json(run.method), **ours},
    }
    labels = {"labels.json": classes} if model else {}
    return {"config.json": config, **labels, "preprocess.json": to_json(preprocess)}


def unweighted(run: Run, backbone: Backbone) -> Spec:
    """A spec that builds the same network without looking for weights: what a checkpoint is loaded into."""
    from vertebra.backbones.timm import Timm

    if run.adapter is not None:
        plain = unweighted(replace(run, adapter=None), cast(Any, backbone).inner)
        return Spec("vertebra.adapters:adapted", {"backbone": plain.to_json(), "adapter": run.adapter.to_json()})
    size = {} if run.image_size is None else {"image_size": run.image_size}
    if not isinstance(backbone, Timm):
        options = {name: value for name, value in run.backbone.options.items() if name != "weights"}
        return replace(run.backbone, options={**options, **size})
    if backbone.altered:  # the page builds what timm's name alone does not
        options = {name: value for name, value in run.backbone.options.items() if name != "weights"}
        return replace(run.backbone, options={**options, **backbone.options})
    return Spec(f"timm/{backbone.name.partition('.')[0]}", backbone.options)


def resume(run_dir: Path, edits: Sequence[str] = (), *, device: str = "auto", meter: Meter | None = None) -> History:
    """Go on with a run from its last checkpoint, or from its start where it has none.

    Args:
        run_dir: of the run.
        edits: `field=value`, as `plan.epochs=200`.
        device: as for `train`.
        meter: as for `train`.

    Raises:
        UsageError: no run directory, or an edit of something that the checkpoint hangs on.
        DataError: the data is no longer what the run was trained on.
    """
    _, edited, recorded = reread(run_dir, edits)
    data = material_of(edited)
    if data.dataset.fingerprint != recorded["data"]["fingerprint"]:
        raise DataError(f"{edited.data} is not what {run_dir} was started on (names, sizes, labels); start a new run")
    return train(edited, run_dir, data=data, device=device, meter=meter, resuming=True)


def reread(run_dir: Path, edits: Sequence[str] = ()) -> tuple[Run, Run, Mapping[str, Any]]:
    """A run as it was, as the edits make it, and all that `run.json` says.

    Raises:
        UsageError: no run directory, an unknown field, or a field that cannot change.
    """
    recorded = rundir.read_run(run_dir)
    # the path as it was given may be relative to another folder than this one
    run = from_json(Run, {**recorded["run"], "data": recorded["data"]["path"]})
    edited = pretraining.edited(run, edits)
    for name in differing(run, edited):
        if name in FIXED or name.split(".")[0] in FIXED:
            raise UsageError(
                f"{name} cannot change on resume: the checkpoint in {run_dir} hangs on it; start a new run"
            )
    return run, edited, recorded


def differing(before: Any, after: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two descriptions, by dotted name."""
    if dataclasses.is_dataclass(before) and not isinstance(before, Spec):
        found: dict[str, tuple[Any, Any]] = {}
        for f in dataclasses.fields(before):
            found |= differing(getattr(before, f.name), getattr(after, f.name), f"{place}.{f.name}".lstrip("."))
        return found
    return {} if before == after else {place: (before, after)}


def changes(before: Run, after: Run, recorded: Mapping[str, Any]) -> list[str]:
    """What is no longer as it was, a line each, and whether the weights will still be those of an uninterrupted run.

    Args:
        before: the run as it was.
        after: the run as the edits make it.
        recorded: what `run.json` says: other threads or another torch add up in another order.
    """
    found = differing(before, after)
    for name, was, now in (
        ("threads", recorded["threads"], torch.get_num_threads()),
        ("torch", recorded["versions"]["torch"], version("torch")),
    ):
        if was != now:
            found[name] = was, now
    return [
        f"{name}: {old} -> {new} ({'exact' if name in KEEPS_EXACTNESS else 'not exact: the rest of the run differs'})"
        for name, (old, new) in found.items()
    ]
