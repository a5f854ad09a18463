"""The effect of S2: a small frozen backbone over two scales, a large one at one scale, and what else could explain it.

Backbones are trained on half of the classes at half of the pixels, and probed on what they were not trained on: the
other classes, single drawn shapes, and the outlines of drawn things. Every arm is given the same images at full size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from safetensors.torch import load_file, save_file
from torch import Tensor

from vertebra.arms import parts, trained
from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Check, Effect, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split, stratified
from vertebra.data.loader import Batches
from vertebra.data.sprites import arrays, sprites
from vertebra.errors import DataError
from vertebra.probes.logistic import fit
from vertebra.surgery.s2 import s2
from vertebra.training.cost import count


@dataclass(frozen=True)
class _Setting:
    """What a scale trains and probes: pixels of scale 1, images of all classes, epochs, sprites of each task.

    Networks are (blocks a stage, channels); the large one has about 6 times the multiply-accumulates.
    """

    size: int
    images: int
    epochs: int
    sprites: int
    small: tuple[int, int] = (1, 16)
    large: tuple[int, int] = (3, 22)


_SETTINGS = {
    "toy": _Setting(16, 5000, 20, 1500),
    "gpu": _Setting(16, 50_000, 60, 12_000, small=(3, 32), large=(5, 60)),
}

_ARMS = {
    "large": "6 times the cost at scale 1",
    "small": "at scale 1",
    "s2": "the small one at scales 1 and 2",
    "two": "two small ones of other seeds, at scale 1",
    "unsplit": "the small one at scales 1 and 2, the larger image in one piece",
}
_TASKS = {"transfer": "classes not trained on", "sprites": "single shapes", "miou": "things or background"}
_RIDGE = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
_SPRITE_PIXELS = 64


class _Seen(NamedTuple):
    """Features of a split: pooled (n, C), cells of the last map (n, C, h, w), targets (n,)."""

    pooled: Tensor
    cells: Tensor
    targets: Tensor


def experiment(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """See `vertebra.surgery.s2.effect`."""
    setting = _SETTINGS[scale]
    train, test, words = parts("s2", data, setting.images)
    half = len(train.classes) // 2
    if half < 2:
        raise DataError(f"s2: {len(train.classes)} classes; the effect trains on half of them and needs at least 4")
    known, new = range(half), range(half, len(train.classes))

    def prepare(seed: int, folder: Path) -> None:
        for name in ("small", "twin", "large"):
            torch.manual_seed(seed + 1000 * (name == "twin"))
            backbone = _network(name, setting)
            _train(backbone, setting, seed, _of(train, known), _of(test, known))
            state = {key: tensor.contiguous() for key, tensor in backbone.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        weights = folder.parent / f"prepared-{seed}"
        return _measure(arm, setting, weights, _of(train, new), _of(test, new))

    return Effect(
        claim="a frozen small backbone over two scales matches a larger one at one scale of more multiply-accumulates",
        arms=_ARMS,
        baseline="large",
        metrics={"transfer": "%", "sprites": "%", "miou": "%", "r2": "", "macs": "M"},
        measure=measure,
        prepare=prepare,
        checks=_checks,
        limits=(
            f"networks of {' and '.join(f'{6 * blocks + 2} layers' for blocks, _ in (setting.small, setting.large))},"
            f" trained on {half} classes at {setting.size} pixels: far from the paper's ViTs, trained on millions of"
            " images, whose larger ones learn what no scale shows. One data set of classes and drawn scenes stand for"
            " photographs of other domains, cell crops and street scenes; depth, language and robots are not asked."
            " They took the place of other tasks after a first look, so that what holds here is weaker evidence than of"
            " tasks chosen blindly. Differences below a point need more seeds than three"
        ),
        data=f"{words}; {setting.sprites} sprites for each of two tasks",
    )


def _of(split: Split, classes: Sequence[int]) -> Split:
    """The images of some classes, which are numbered anew."""
    if split.targets is None:
        raise DataError("s2: images have no targets; the effect needs one class an image")
    chosen = split.select(np.flatnonzero(np.isin(split.targets, classes)))
    assert chosen.targets is not None
    names = tuple(split.classes[number] for number in classes)
    return replace(chosen, classes=names, targets=chosen.targets - classes[0])


def _network(name: str, setting: _Setting) -> Backbone:
    blocks, width = setting.large if name == "large" else setting.small
    return cifar_resnet(blocks=blocks, width=width, image_size=setting.size)


def _train(backbone: Backbone, setting: _Setting, seed: int, train: Split, test: Split) -> None:
    views = Views(scale=(0.6, 1.0))
    plan = Plan(
        epochs=setting.epochs, batch=64, optimizer="sgd", lr=0.05, weight_decay=5e-4, clip=None, views=views, seed=seed
    )
    trained(backbone, train, test, plan)


def _looks(arm: str, setting: _Setting, weights: Path) -> list[Backbone]:
    """The backbones of an arm, whose features stand side by side; all take images at scale 2."""

    def loaded(name: str) -> Backbone:
        backbone = _network(name, setting)
        backbone.load_state_dict(load_file(weights / f"{name}.safetensors"))
        return backbone.eval().requires_grad_(False)

    def at(name: str, *scales: float) -> Backbone:
        made = s2(loaded(name), scales=scales, given=2, resampling="antialiased").model
        assert isinstance(made, Backbone)
        return made

    return {
        "large": lambda: [at("large", 1)],
        "small": lambda: [at("small", 1)],
        "s2": lambda: [at("small", 1, 2)],
        "two": lambda: [at("small", 1), at("twin", 1)],
        "unsplit": lambda: [at("small", 1), loaded("small")],
    }[arm]()


def _measure(arm: str, setting: _Setting, weights: Path, train: Split, test: Split) -> Mapping[str, float]:
    looks, side = _looks(arm, setting, weights), 2 * setting.size
    rows = stratified(_targets(train), (0.2,), seed=0)
    splits = {"val": train.select(rows[0]), "train": train.select(rows[1]), "test": test}
    seen = {name: _features(looks, *_pixels(split, looks[0].preprocess)) for name, split in splits.items()}
    found = {"transfer": _linear(seen, len(train.classes))}
    if arm == "large":
        found["r2"] = float("nan")
    else:
        large = _looks("large", setting, weights)
        wanted = {name: _features(large, *_pixels(split, large[0].preprocess)) for name, split in splits.items()}
        found["r2"] = _ridge(seen, wanted)
    single = sprites(setting.sprites, size=_SPRITE_PIXELS, classes="shapes", objects=1)
    drawn = {name: _features(looks, *_drawn(single.split(name))) for name in splits}
    found["sprites"] = _linear(drawn, len(single.classes))
    found["miou"] = _dense(looks, sprites(setting.sprites, size=_SPRITE_PIXELS))
    found["macs"] = sum(count(look, size=(side, side)).macs for look in looks) / 1e6
    return found


def _targets(split: Split) -> np.ndarray:
    assert split.targets is not None
    return split.targets


def _pixels(split: Split, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    batches = [*Batches(split, preprocess, views=None, batch=256, seed=0, workers=0).epoch(0)]
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])


def _drawn(split: Split) -> tuple[Tensor, Tensor]:
    """Images of sprites and the class of the first thing."""
    whole = arrays(split)
    return _normalised(whole.images), torch.from_numpy(whole.labels[whole.first[:-1]])


def _normalised(images: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 as the networks take them."""
    return (torch.from_numpy(images).movedim(3, 1) / 255 - 0.5) / 0.25


@torch.no_grad()
def _features(looks: Sequence[Backbone], images: Tensor, targets: Tensor) -> _Seen:
    pooled, cells = [], []
    for batch in images.split(256):
        found = [look(batch) for look in looks]
        grid = found[0].pyramid[-1].shape[2:]
        pooled.append(torch.cat([one.pooled for one in found], 1))
        cells.append(torch.cat([F.adaptive_avg_pool2d(one.pyramid[-1], grid) for one in found], 1))
    return _Seen(torch.cat(pooled).clone(), torch.cat(cells).clone(), targets)


def _linear(seen: Mapping[str, _Seen], classes: int) -> float:
    """Accuracy of a linear classifier on pooled features, in percent."""
    classifier = fit((seen["train"].pooled, seen["train"].targets), (seen["val"].pooled, seen["val"].targets), classes)
    right = classifier(seen["test"].pooled).argmax(1) == seen["test"].targets
    return 100 * right.double().mean().item()


def _dense(looks: Sequence[Backbone], data: Dataset) -> float:
    """Mean IoU of things and background, from a linear layer on the cells enlarged to pixels, in percent."""
    seen, masks = {}, {}
    for name, split in data.splits.items():
        whole = arrays(split)
        masks[name] = torch.from_numpy(whole.ids > 0).long()
        seen[name] = _features(looks, _normalised(whole.images), torch.empty(0)).cells
    flat = {
        name: (cells.movedim(1, 3).flatten(0, 2), _majority(masks[name], cells.shape[2]).flatten())
        for name, cells in seen.items()
    }
    classifier = fit(flat["train"], flat["val"], 2)
    logits = classifier(seen["test"].movedim(1, 3)).movedim(3, 1)
    predicted = F.interpolate(logits, masks["test"].shape[1:], mode="bilinear").argmax(1)
    table = torch.bincount((2 * masks["test"] + predicted).flatten(), minlength=4).view(2, 2).double()
    return 100 * (table.diag() / (table.sum(0) + table.sum(1) - table.diag())).mean().item()


def _majority(masks: Tensor, cells: int) -> Tensor:
    """Whether at least half of a cell shows things: masks (n, H, H) of 0 and 1 to (n, cells, cells)."""
    side = masks.shape[1] // cells
    return (F.avg_pool2d(masks[:, None].float(), side)[:, 0] >= 0.5).long()


def _ridge(seen: Mapping[str, _Seen], wanted: Mapping[str, _Seen]) -> float:
    """Share of the variance of the large network's cells that a linear map of an arm's cells explains."""
    given = {name: one.cells.movedim(1, 3).flatten(0, 2).double() for name, one in seen.items()}
    asked = {name: one.cells.movedim(1, 3).flatten(0, 2).double() for name, one in wanted.items()}
    mean, middle = given["train"].mean(0), asked["train"].mean(0)
    x, y = given["train"] - mean, asked["train"] - middle
    gram, right = x.T @ x, x.T @ y
    scale = gram.diag().mean()

    def explained(name: str, strength: float) -> float:
        weight = torch.linalg.solve(gram + strength * scale * torch.eye(len(gram)), right)
        left = asked[name] - middle - (given[name] - mean) @ weight
        return 1 - (left.square().sum() / (asked[name] - asked[name].mean(0)).square().sum()).item()

    return explained("test", max(_RIDGE, key=lambda strength: explained("val", strength)))


def _checks(measured: Measured) -> Sequence[Check]:
    """The thresholds of the paper's row."""
    behind = {task: measured.gain("s2", "large", task) for task in _TASKS}
    near = [task for task, gains in behind.items() if gains.mean() >= -1]
    costs = {arm: measured.mean(arm, "macs") for arm in measured.values}
    found = ", ".join(f"{task} ({_TASKS[task]}) {_seeds(gains)}" for task, gains in behind.items())
    alone, two = (measured.gain("s2", arm, "miou") for arm in ("small", "two"))
    explained = measured.gain("s2", "small", "r2")
    return [
        Check(
            "S2 is within a point of the large backbone, or above, on at least 2 of 3 tasks",
            len(near) >= 2,
            f"on {len(near)} of 3; {found}",
        ),
        Check("S2 gains at least a point of mean IoU over scale 1", bool(alone.mean() >= 1), _seeds(alone)),
        Check("S2 beats two small backbones of the same width on masks", bool(two.mean() > 0), _seeds(two)),
        Check(
            "S2 explains at least 0.03 more of the large backbone's features than scale 1",
            bool(explained.mean() > 0.03),
            f"{explained.mean():+.3f} (R2 {measured.mean('small', 'r2'):.3f} at scale 1)",
        ),
        Check(
            "S2 costs 5 times the small backbone, and less than the large one",
            abs(costs["s2"] / costs["small"] - 5) <= 0.05 and costs["s2"] < costs["large"],
            ", ".join(f"{arm} {cost:.1f} M" for arm, cost in costs.items()),
        ),
    ]


def _seeds(gains: np.ndarray) -> str:
    return f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)})"
