"""Battle of the Backbones: the same tasks for every backbone, and z scores that put them on one scale.

A task has settings (linear and fine-tuned classification, say), a setting has one score a backbone. Within a
setting scores become z = (score - mean) / std over the backbones; a backbone's z is averaged over the settings
of a task and then over the tasks. Scaling or shifting a setting's unit therefore changes nothing, and neither
does a task that happens to have many settings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from vertebra.battle.statistics import LEVEL, resampled_means
from vertebra.contracts import Check, Effect, Measured, Report, Score, Study
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper

PAPER = Paper(
    id="bob",
    title="Battle of the Backbones: A Large-Scale Comparison of Pretrained Models across Computer Vision Tasks",
    year=2023,
    arxiv="2310.19909",
    reference="hsouri/Battle-of-the-Backbones",
    licence="none stated (the classification and detection repositories: MIT)",
    claim="supervised convolutional networks pretrained on large sets win most tasks; on equal data and architecture "
    "self-supervised ones compete; rankings of tasks correlate above 0.8",
    parity="scikit-learn's logistic regression and average precision",
    note="tasks that classification data allows: classification, low-label, retrieval, robustness; detection and "
    "segmentation wait for their task models. Adds leave-one-task-out stability and bootstrap intervals.",
)

DRAWS = 400
"""Bootstrap resamples: the ends of a 95 % interval move by about a tenth of its width between repeats."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One column of the comparison.

    Attributes:
        task: the task it counts for.
        name: the score's name, unique.
        scores: backbone -> score.
        better: which way is good.
        samples: backbone -> (S, n) per-seed, per-image values whose mean is the score; empty where there are none.
    """

    task: str
    name: str
    scores: Mapping[str, float]
    better: Literal["higher", "lower"] = "higher"
    samples: Mapping[str, np.ndarray] = field(default_factory=dict)


NETWORKS = ("timm/test_resnet", "timm/test_vit", "timm/test_efficientnet")
PRETRAINED_EPOCHS = (0, 2, 16)
"""Each network meets its data after so many epochs on other data: random, briefly trained, well trained."""
CHEAP = {"knn": "knn_top1", "linear": "linear_top1", "few_shot": "fewshot_10", "retrieval": "map"}
"""Probe on frozen features -> its score."""
FULL = "finetune_top1"
SOURCE, JUDGED = 2500, 400
"""Images that contenders are pretrained on, and test images that judge them."""


def bob(settings: Sequence[Setting], **options: int) -> "Bob":
    """The study of `settings`; see `Bob`."""
    return Bob(settings, **options)


class Bob(Study):
    """Rank backbones by their mean z over tasks.

    A backbone that lacks a score of any setting cannot be placed and is listed under `left_out`.

    Args:
        settings: at least one, with two complete backbones or more.
        seed: of the bootstrap.

    Raises:
        UsageError: fewer than two backbones have every score.
    """

    def __init__(self, settings: Sequence[Setting], *, seed: int = 0) -> None:
        self.settings, self.seed = tuple(settings), seed
        everyone = list(dict.fromkeys(name for setting in self.settings for name in setting.scores))
        self.names = [name for name in everyone if all(name in setting.scores for setting in self.settings)]
        self.left_out = [name for name in everyone if name not in self.names]
        if len(self.names) < 2:
            raise UsageError(f"z scores compare at least two backbones; complete are {', '.join(self.names) or 'none'}")

    def __call__(self) -> Report:
        """Scores: backbone -> mean z with its interval, best first. Details as the class describes.

        Details hold `rank`, `tasks` (task -> backbone -> z), `intervals`, `stability` (leave one task out),
        `correlation` (Pearson, task by task), `n` (backbones), `resampled` (settings the bootstrap varied) and
        `left_out`.
        """
        values = np.array([[setting.scores[name] for name in self.names] for setting in self.settings])  # (settings, K)
        tasks = self._tasks(self._signed(values)[None])[0]  # (tasks, K)
        mean = tasks.mean(0)
        low, high, resampled = self._intervals(values)
        order = np.argsort(-mean, kind="stable")
        scores = {
            self.names[i]: Score(float(mean[i]), n=len(self.names), unit="", interval=(float(low[i]), float(high[i])))
            for i in order
        }
        details = {
            "rank": list(scores),
            "tasks": {
                task: dict(zip(self.names, row.tolist(), strict=True))
                for task, row in zip(self.task_names, tasks, strict=True)
            },
            "intervals": {name: list(score.interval or ()) for name, score in scores.items()},
            "stability": self._stability(tasks),
            "correlation": self._correlation(tasks),
            "n": len(self.names),
            "resampled": resampled,
            "left_out": self.left_out,
        }
        return Report(scores, details)

    @property
    def task_names(self) -> list[str]:
        """Tasks in the order in which the settings name them."""
        return list(dict.fromkeys(setting.task for setting in self.settings))

    def _signed(self, values: np.ndarray) -> np.ndarray:
        sign = np.array([1.0 if setting.better == "higher" else -1.0 for setting in self.settings])
        return values * sign[:, None]

    def _tasks(self, values: np.ndarray) -> np.ndarray:
        """Scores (..., settings, K), higher is better, to mean z of each task (..., tasks, K)."""
        z = standardise(values)
        of_task = np.array(
            [[setting.task == task for setting in self.settings] for task in self.task_names], dtype=float
        )
        return (of_task / of_task.sum(1, keepdims=True)) @ z

    def _intervals(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Percentile bootstrap over images and seeds; settings without samples keep their scores."""
        draws = np.repeat(values[None], DRAWS, axis=0)  # (draws, settings, K)
        resampled = []
        for column, setting in enumerate(self.settings):
            rows = [setting.samples.get(name) for name in self.names]
            present = [row for row in rows if row is not None]
            if len(present) < len(rows) or len({row.shape[-1] for row in present}) > 1:
                continue
            # One seed for all settings: those on the same images draw the same images.
            draws[:, column] = resampled_means(present, DRAWS, self.seed)
            resampled.append(setting.name)
        means = self._tasks(self._signed(draws)).mean(1)  # (draws, K)
        low, high = np.percentile(means, [50 - 50 * LEVEL, 50 + 50 * LEVEL], axis=0)
        return low, high, resampled

    def _stability(self, tasks: np.ndarray) -> dict[str, object]:
        """Kendall's tau of the ranking with the ranking that leaves one task out, and whether the first stays."""
        full = tasks.mean(0)
        found: dict[str, object] = {}
        for row, task in enumerate(self.task_names if len(tasks) > 1 else []):
            rest = np.delete(tasks, row, axis=0).mean(0)
            tau = float(stats.kendalltau(full, rest)[0])  # pyright: ignore[reportArgumentType]
            found[task] = {"tau": tau, "same_first": bool(rest.argmax() == full.argmax())}
        return found

    def _correlation(self, tasks: np.ndarray) -> dict[str, dict[str, float | None]]:
        """Pearson's correlation between tasks over the backbones; None where a task does not tell them apart."""
        centred = tasks - tasks.mean(1, keepdims=True)
        norm = np.sqrt(np.square(centred).sum(1))
        product, size = centred @ centred.T, np.outer(norm, norm)
        table = np.divide(product, size, out=np.full_like(product, np.nan), where=size > 0)
        return {
            a: {b: None if np.isnan(table[i, j]) else float(table[i, j]) for j, b in enumerate(self.task_names)}
            for i, a in enumerate(self.task_names)
        }


def standardise(values: np.ndarray) -> np.ndarray:
    """Z scores over the last axis; 0 where all are equal.

    Args:
        values: (..., K).
    """
    centred = values - values.mean(-1, keepdims=True)
    deviation = values.std(-1, keepdims=True)
    tiny = 1e-9 * np.abs(values).max(-1, keepdims=True)  # rounding alone must not tell equal scores apart
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > tiny)


def effect(scale: str, data: Dataset | None) -> Effect:
    """Do cheap probes on frozen features rank backbones as full fine-tuning does?"""
    rankings = {name: f"ranked by {score} on frozen features" for name, score in CHEAP.items()}
    images = 300 if scale == "toy" else 4000
    return Effect(
        claim="frozen features rank backbones as fine-tuning does: tasks correlate above 0.8",
        arms={"parameters": "ranked by size", **rankings, "bob": "ranked by the mean z of these probes"},
        baseline="parameters",
        metrics={"tau": "", "pearson": "", "regret": "%"},
        measure=measure,
        checks=_checks,
        limits="nine small networks at 32 pixels, random to well pretrained on other classes; says nothing of the "
        "order among strong pretrained networks, which differ far less",
        data=f"{images} training images each of " + ", ".join(sets_of(data, 8)),
        prepare=partial(_prepare, data=data, images=images),
    )


def sets_of(data: Dataset | None, images: int) -> dict[str, Dataset]:
    """The data sets that backbones are ranked on: two built-in ones, and half of the classes of the user's own."""
    from vertebra.data.digits import digits
    from vertebra.data.sprites import sprites

    drawn = {"size": 32, "objects": 1, "shift": "style", "shifted": ("train", "val", "test")}
    drawn["splits"] = {"train": images, "val": JUDGED // 4, "test": JUDGED}
    found = {"digits": digits(), "shapes in ink": sprites(classes="shapes", seed=1, **drawn)}
    if data is None:
        return {**found, "digits in ink": sprites(classes="digits", seed=2, **drawn)}
    return {**found, "own, second half of the classes": half(data, 1)}


def half(data: Dataset, which: int) -> Dataset:
    """Half of the classes of a data set, with splits train, val and test.

    Raises:
        UsageError: fewer than four classes, or not one label an image.
    """
    from vertebra.training.running import material

    if data.label != "single" or len(data.classes) < 4:
        raise UsageError(f"{data.path} has {len(data.classes)} classes, {data.label} label; bob halves four or more")
    cut = len(data.classes) // 2
    classes = data.classes[:cut] if which == 0 else data.classes[cut:]
    ready = material(data)
    splits = {"train": ready.train, "val": ready.val, "test": data.splits.get("test", ready.val)}
    first = 0 if which == 0 else cut
    return replace(data, classes=classes, splits={n: _of_classes(s, classes, first) for n, s in splits.items()})


def _of_classes(split: Split, classes: tuple[str, ...], first: int) -> Split:
    assert split.targets is not None
    kept = split.select(np.flatnonzero((split.targets >= first) & (split.targets < first + len(classes))))
    assert kept.targets is not None
    return replace(kept, classes=classes, targets=kept.targets - first)


def _fewer(split: Split, images: int, seed: int) -> Split:
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:images]))


def _prepare(seed: int, folder: Path, *, data: Dataset | None, images: int) -> None:
    """Pretrain the contenders and let them fight on each data set."""
    from vertebra.battle.contest import battle

    contenders = _contenders(seed, folder, data)
    for name, dataset in sets_of(data, images).items():
        sizes = {"train": images, "val": JUDGED // 4, "test": JUDGED}
        fewer = replace(dataset, splits={one: _fewer(dataset.split(one), n, seed) for one, n in sizes.items()})
        probes = [*CHEAP, "finetune?epochs=6", "cost"]
        battle(contenders, probes, fewer, seeds=(seed,), run_dir=folder / name, jobs=1, quiet=True, overwrite=True)


def _contenders(seed: int, folder: Path, data: Dataset | None) -> list[str]:
    """Addresses of the networks, each with the weights of so many epochs on other classes."""
    import torch
    from safetensors.torch import save_file

    import vertebra
    from vertebra.config import Plan, Views
    from vertebra.data.loader import Batches
    from vertebra.data.sprites import sprites
    from vertebra.methods.supervised import Supervised
    from vertebra.tasks.classify import classify
    from vertebra.training.loop import fit

    lit = sprites(size=32, objects=1, seed=3, shift="colour", shifted=("train",), splits={"train": SOURCE})
    source = _fewer((lit if data is None else half(data, 0)).split("train"), SOURCE, seed)
    addresses = []
    for network in NETWORKS:
        for epochs in PRETRAINED_EPOCHS:
            torch.manual_seed(seed)
            model = classify(vertebra.backbone(network, image_size=32), source.classes)
            if epochs:
                plan = Plan(epochs=epochs, batch=64, lr=2e-3, seed=seed, workers=0, views=Views(scale=(0.6, 1.0)))
                preprocess = model.backbone.preprocess
                batches = Batches(source, preprocess, views=plan.views, batch=64, seed=seed, workers=0)
                fit(Supervised(model), batches, plan, device="cpu")
            file = folder / f"{network.partition('/')[2]}-{epochs}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}, file)
            addresses.append(f"{network}?weights={file.resolve()}&image_size=32")
    return addresses


def measure(arm: str, seed: int, folder: Path) -> dict[str, float]:
    """Agreement of one ranking with that of fine-tuning, mean over the data sets.

    Returns:
        tau: Kendall's tau-b. pearson: of the values. regret: points that its first choice loses to the best.
    """
    reports = sorted((folder.parent / f"prepared-{seed}").glob("*/report.json"))
    rows = [_agreement(arm, json.loads(file.read_text(encoding="utf-8"))["table"]) for file in reports]
    return dict(zip(("tau", "pearson", "regret"), np.mean(rows, axis=0).tolist(), strict=True))


def _agreement(arm: str, table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[float, float, float]:
    def column(score: str) -> np.ndarray:
        return np.array([table[name][score]["value"] for name in sorted(table)])

    full = column(FULL)
    if arm == "parameters":
        values = column("params_m")
    elif arm == "bob":
        values = np.mean([standardise(column(score)) for score in CHEAP.values()], axis=0)
    else:
        values = column(CHEAP[arm])
    tau, pearson = stats.kendalltau(values, full)[0], stats.pearsonr(values, full)[0]
    return float(tau), float(pearson), float(full.max() - full[values.argmax()])  # pyright: ignore[reportArgumentType]


def _checks(measured: Measured) -> list[Check]:
    def found(arm: str) -> str:
        return f"{arm} {measured.mean(arm, 'tau'):.2f}, size {measured.mean('parameters', 'tau'):.2f}"

    better = [
        Check(
            f"{arm} ranks better than size does", bool((measured.gain(arm, "parameters", "tau") > 0).all()), found(arm)
        )
        for arm in ("linear", "bob")
    ]
    pearson, regret = measured.mean("linear", "pearson"), measured.mean("linear", "regret")
    return [
        *better,
        Check("linear correlates above 0.8", pearson > 0.8, f"Pearson's r {pearson:.2f}"),
        Check("linear's first choice loses at most 2 points", regret <= 2, f"{regret:.1f} points"),
    ]
