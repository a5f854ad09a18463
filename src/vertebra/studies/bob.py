"""Battle of the Backbones: the same tasks for every backbone, and z scores that put them on one scale.

A task has settings (linear and fine-tuned classification, say), a setting has one score a backbone. Within a
setting scores become z = (score - mean) / std over the backbones; a backbone's z is averaged over the settings
of a task and then over the tasks. Scaling or shifting a setting's unit therefore changes nothing, and neither
does a task that happens to have many settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy import stats

from vertebra.battle.statistics import LEVEL, resampled_means
from vertebra.contracts import Report, Score, Study
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
