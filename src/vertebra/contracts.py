"""What every part promises. Nothing here computes.

What holds tensors is an `nn.Module` with keyword-only arguments; what describes a run is a frozen
dataclass; nothing is both. Contracts are abstract and pages are final: change a part by wrapping it.

Shapes are written (B, C, H, W): images in a batch, channels, rows, columns. Images are float tensors that
`Preprocess` has normalised, unless a line says uint8.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor, nn

Outputs: TypeAlias = Mapping[str, Tensor]
"""What a task model's forward returns: named tensors, so that it traces and exports."""


@dataclass(frozen=True)
class Level:
    """One map of a pyramid. The stride is nominal: read sizes off the tensor."""

    channels: int
    stride: int


class Features(NamedTuple):
    """What a backbone makes of a batch of images.

    Attributes:
        pyramid: one map a level, fine to coarse, (B, C_i, H_i, W_i).
        pooled: one vector an image, (B, width).
        tokens: (B, N, width) where the network has tokens of that width, else None: one for each cell of the last map,
            row by row and perhaps behind a norm, and those of `Backbone.special_tokens`.
    """

    pyramid: tuple[Tensor, ...]
    pooled: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Preprocess:
    """How images become the tensors that a network was trained on.

    Attributes:
        size: (height, width) in pixels that the network sees.
        mean: per channel, on the scale 0..1; its length is the number of channels.
        std: per channel, on the scale 0..1.
        interpolation: Pillow's filter by name.
        crop: share of the resized image that the central crop keeps, 0..1; 1 keeps all of it.
        fit: how an image of another shape gets to `size`. "crop" resizes the shorter side and cuts the
            centre, "squash" resizes both sides and bends the image.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop: float = 1.0
    fit: Literal["crop", "squash"] = "crop"

    @property
    def channels(self) -> int:
        """Image channels that the network takes."""
        return len(self.mean)


class Backbone(nn.Module, ABC):
    """Images to features: no head, no classes.

    Attributes:
        levels: the pyramid's maps, fine to coarse, exact channels.
        width: channels of `Features.pooled`.
        preprocess: what the weights expect.
    """

    levels: tuple[Level, ...]
    width: int
    preprocess: Preprocess

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""

    @abstractmethod
    def trunk(self) -> Sequence[nn.Module]:
        """The parts in the order in which the signal meets them.

        Freezing, layer-wise rate decay, checkpointing, stitching and probing walk this sequence. Every
        parameter is in at most one part; those in none (a position table, say) belong before the first.
        """

    def special_tokens(self, tokens: int, cells: int) -> tuple[int, ...]:
        """Places of what stands for no cell, as a class token, in a sequence of `tokens` with `cells`: the first ones.

        A network whose class token is elsewhere says so here.
        """
        return tuple(range(tokens - cells))

    def parted(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) as special ones (B, K, C) and a map (B, C, h, w) of the others."""
        count, cells = tokens.shape[1], grid[0] * grid[1]
        special = self.special_tokens(count, cells)
        places = sorted({*range(count)} - {*special})
        return tokens[:, list(special)], tokens[:, places].mT.unflatten(2, grid)


class Neck(nn.Module, ABC):
    """Pyramid to pyramid: `Neck(levels, *, ...)`.

    Attributes:
        levels: the maps that come out, fine to coarse.
    """

    levels: tuple[Level, ...]

    @abstractmethod
    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps (B, C_i, H_i, W_i) to maps, both fine to coarse."""


@dataclass(frozen=True)
class Prediction:
    """What a task model says of one image, best first.

    Attributes:
        labels: (N,) int64 indices into the task's classes.
        scores: (N,) in 0..1, falling.
        boxes: (N, 4) xyxy in pixels of the image as given, where the task finds boxes.
        masks: (N, H, W) bool, where the task finds masks.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor | None = None
    masks: Tensor | None = None


class TaskModel(nn.Module, ABC):
    """A backbone and what turns its features into predictions.

    Attributes:
        backbone: the backbone inside.
        classes: names, in the order of the outputs.
    """

    backbone: Backbone
    classes: tuple[str, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> Outputs:
        """Images (B, channels, H, W) to named tensors; traceable and exportable."""

    @abstractmethod
    def losses(self, outputs: Outputs, targets: Any) -> dict[str, Tensor]:
        """Named scalars; training minimises their sum."""

    @abstractmethod
    def predict(self, outputs: Outputs, image_sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """One prediction an image; `image_sizes` are (height, width) before preprocessing."""

    @abstractmethod
    def metrics(self) -> Any:
        """A fresh torchmetrics `MetricCollection`, updated with `(outputs, targets)` by `evaluate`."""


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        images: (B, C, H, W) float, normalised.
        targets: (B,) int64 for one label an image, (B, classes) float for many, or the task's own.
        ids: (B,) int64 positions in the split.
        views: further views of the same images, (B, C, H_v, W_v) each, where the plan asks for more than one.
    """

    images: Tensor
    targets: Any
    ids: Tensor
    views: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        step: optimiser steps done.
        steps: optimiser steps planned.
        epoch: the epoch under way, from 0.
        epochs: epochs planned.
    """

    step: int
    steps: int
    epoch: int
    epochs: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0..1."""
        return self.step / max(1, self.steps)


class Method(nn.Module, ABC):
    """A training objective around a backbone or a task model, usable in anyone's loop.

    Attributes:
        backbone: the backbone that is being trained.
    """

    backbone: Backbone

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Named scalars; their sum is minimised."""

    def after_step(self, progress: Progress) -> None:
        """Moving averages and queues, after each optimiser step."""


@dataclass(frozen=True)
class Settings:
    """What a curriculum asks of the next batches; None leaves a thing as the plan has it.

    Attributes:
        image_size: side in pixels.
        band: side of the square of low frequencies that is kept, in pixels.
        augmentation: strength of all views, 0 (none) to 1 (the plan's).
        policy: strength of the views' policy (RandAugment's magnitude) alone, 0..1, on top of `augmentation`.
        weights: (n,) sampling weights over the training set.
    """

    image_size: int | None = None
    band: int | None = None
    augmentation: float | None = None
    policy: float | None = None
    weights: Tensor | None = None


class Curriculum(ABC):
    """What is seen when. A page's factory takes the `Batches` to be trained on, whose size and splits it may read."""

    @abstractmethod
    def settings(self, progress: Progress) -> Settings:
        """The settings that hold from this point on; a pure function of progress and what was observed."""

    def observe(self, ids: Tensor, losses: Tensor) -> None:  # noqa: B027 - many do not look
        """Losses (B,) of the samples `ids` (B,) that were just seen."""


@dataclass(frozen=True)
class Score:
    """One number with what is needed to trust and to compare it.

    Attributes:
        value: the number, in `unit`.
        n: images (or repeats, for a timing) behind it.
        better: which way is good.
        unit: "%" for shares (0..100), "ms", "img/s", "MB", "M", "G", or "" for a bare number.
        samples: (n,) per-image values whose mean is `value`, for paired tests; None where the score is no mean.
        interval: 95 % interval where the probe knows a better one than the samples give.
    """

    value: float
    n: int
    better: Literal["higher", "lower"] = "higher"
    unit: str = "%"
    samples: np.ndarray | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Report:
    """What a probe or a study found.

    Attributes:
        scores: name -> score; the first is the one that ranks.
        details: JSON-ready extras (curves, per-class values, what was chosen on validation data).
    """

    scores: Mapping[str, Score]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a probe will do, for planning within a time budget; right within a factor of two is enough.

    Attributes:
        forward: images in forward passes, beside the features that probes share.
        trained: images in training steps.
        seconds: of everything else.
    """

    forward: int = 0
    trained: int = 0
    seconds: float = 0.5


class Probe(ABC):
    """Evidence about a model; never trains the backbone it is given.

    Attributes:
        seeded: whether the result depends on the seed even when the weights do not.
        timed: whether the probe measures time or memory, and so must run alone on the machine.
        weightless: whether the structure decides and the weights do not matter, so that one seed will do.
    """

    seeded: bool = False
    timed: bool = False
    weightless: bool = False

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        """What a call will do with splits of so many images (name -> n) and so many classes."""
        return Work()

    @abstractmethod
    def __call__(self, model: Backbone, data: Any) -> Report:
        """Look at `model` with `data` (in a battle, `vertebra.probes.evidence.Evidence`)."""


class Operated(NamedTuple):
    """A model after surgery.

    Attributes:
        model: the changed model.
        changed: names of the parts that changed; never empty (nothing changed is an error).
        before: parameters and MACs before.
        after: parameters and MACs after.
    """

    model: nn.Module
    changed: tuple[str, ...]
    before: "Cost"
    after: "Cost"


@dataclass(frozen=True)
class Cost:
    """What a network costs for one image.

    Attributes:
        params: parameters.
        macs: multiply-accumulates; convolutions, linear layers and attention products count.
        activations: elements in the outputs of convolutions and linear layers.
        resolution: (height, width) that MACs and activations were counted at.
    """

    params: int
    macs: int
    activations: int
    resolution: tuple[int, int]


Surgery: TypeAlias = Callable[[nn.Module], Operated]
Adapter: TypeAlias = Callable[[Backbone], Backbone]
"""Frozen inside, a few new parameters, the same contract outside; the backbone it stands on is its `inner`."""


class Space(ABC):
    """A search space."""

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Any:
        """A `Spec` drawn with `rng`."""

    @abstractmethod
    def cost(self, spec: Any) -> Cost:
        """What the network of `spec` costs."""


class Study(ABC):
    """A law, a simulator, a measurement: whatever fits no other contract."""

    @abstractmethod
    def __call__(self) -> Report:
        """Run the study."""


@dataclass(frozen=True)
class Check:
    """One thing that an effect must show.

    Attributes:
        name: what, in a few words, with its threshold.
        holds: whether the measurement shows it.
        found: the figures, in words.
    """

    name: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Measured:
    """What an effect's arms gave, seed by seed.

    Attributes:
        values: arm -> metric -> (S,) one value a seed, in the order of the seeds; every arm has the same seeds.
    """

    values: Mapping[str, Mapping[str, np.ndarray]]

    def mean(self, arm: str, metric: str) -> float:
        """Mean over the seeds."""
        return float(self.values[arm][metric].mean())

    def gain(self, arm: str, baseline: str, metric: str) -> np.ndarray:
        """Difference of an arm from another one, seed by seed, (S,)."""
        return self.values[arm][metric] - self.values[baseline][metric]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A paper's claim as an experiment: arms that differ in one thing, over seeds, beside a baseline.

    A page that claims one has a function `effect(scale, data) -> Effect`, where `scale` is "toy" (about ten minutes
    on two cores) or "gpu", and `data` is a dataset or None for the page's own choice of built-in data.
    `vertebra reproduce` measures it and writes the evidence.

    Attributes:
        claim: what the paper says, as this experiment asks it.
        arms: arm -> what it is, in a few words; the order of the table.
        baseline: the arm that the others are compared with.
        metrics: metric -> unit, as in `Score`; the first one ranks.
        measure: (arm, seed, folder) -> metric -> value, NaN where an arm has no such thing. Runs in a process of
            its own; the folder is the arm's and seed's, and is kept.
        prepare: (seed, folder) -> None, what the arms of a seed share, such as weights; done before them in a process
            of its own. Its folder is `prepared-SEED` beside the arms' folders.
        checks: what the figures must show.
        limits: what this scale can and cannot show.
        data: what the arms were measured on, in words.
    """

    claim: str
    arms: Mapping[str, str]
    baseline: str
    metrics: Mapping[str, str]
    measure: Callable[[str, int, Path], Mapping[str, float]]
    checks: Callable[[Measured], Sequence[Check]]
    limits: str
    data: str
    prepare: Callable[[int, Path], None] | None = None
