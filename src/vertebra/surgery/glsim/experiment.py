"""The effect of GLSim: small drawn things on photographs, whose classes differ in a mark of three pixels.

A ViT is trained on what the things are, and then tuned on what their marks are: with one look, or with a second one at
the whole image, at a random box, at the box that GLSim finds, and at the one that attention rollout finds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.ops import box_iou

from vertebra.arms import trained
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Check, Effect, Features, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.data.digits import Arrays
from vertebra.data.pixels import normalised
from vertebra.errors import DataError
from vertebra.probes.attention_spectra import attention_maps
from vertebra.spec import Spec
from vertebra.surgery.glsim import GLSim
from vertebra.surgery.glsim.crops import boxes_of, extents
from vertebra.training.cost import evaluating

SIDE, THING, PATCH = 64, 12, 8
COLOURS = np.array([[230, 60, 60], [70, 200, 70], [80, 110, 240], [235, 215, 70], [210, 80, 220]])
"""Of the digits 0 to 4, the coarse classes."""
MARKS = ("upright", "level")


@dataclass(frozen=True)
class _Setting:
    """A scale: images and epochs of the coarse training and of the tuning, and the ViT."""

    images: int
    epochs: int
    tuned_images: int
    tuned_epochs: int
    dim: int
    depth: int
    held: int = 1000
    select: int = 4


_SETTINGS = {
    "toy": _Setting(8000, 5, 1500, 8, 64, 4),
    "gpu": _Setting(50_000, 60, 10_000, 40, 192, 12),
}

_ARMS = {
    "vit": "one look",
    "whole": "the aggregator, and the whole image again",
    "random": "a second look at a random box as large as GLSim's",
    "glsim": "a second look at the box of the patches most like the class token",
    "rollout": "a second look at the box of the patches that attention rollout finds",
}


class _Scenes(NamedTuple):
    """Drawn images (n, 64, 64, 3) uint8, their coarse and fine classes (n,), and boxes (n, 4) xyxy in pixels."""

    pixels: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray
    boxes: np.ndarray


def experiment(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """See `vertebra.surgery.glsim.effect`."""
    setting = _SETTINGS[scale]

    def prepare(seed: int, folder: Path) -> None:
        backbone = _network(setting, seed)
        scenes = {
            "train": _scenes(data, "train", setting.images, seed),
            "test": _scenes(data, "test", setting.held, seed),
        }
        split = {name: _split(some, fine=False) for name, some in scenes.items()}
        found = trained(backbone, split["train"], split["test"], _plan(setting.epochs, 1e-3, seed))
        save_file({**backbone.state_dict(), "coarse": torch.tensor(found.scores["top1"])}, folder / "vit.safetensors")

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        state = load_file(folder.parent / f"prepared-{seed}" / "vit.safetensors")
        coarse = state.pop("coarse").item()
        return {**_measure(arm, setting, state, seed, data), "coarse": coarse}

    return Effect(
        claim="a second look at what is most like the whole gains in fine-grained classes, at a negligible selection",
        arms=_ARMS,
        baseline="vit",
        metrics={"top1": "%", "iou": "%", "untrained": "%", "select": "ms", "coarse": "%"},
        measure=measure,
        prepare=prepare,
        checks=_checks,
        limits=(
            f"a ViT of {setting.depth} blocks and width {setting.dim} with patches of {PATCH}, trained on drawn things"
            f" of {THING} pixels in {SIDE}: photographs of birds and pretraining on millions of images are not here."
            f" The grid is 8 x 8, so that {setting.select} patches are selected and the box is inclusive: the reference"
            " would leave the last row and column of a thing of two patches out"
        ),
        data=f"{setting.tuned_images} training and {setting.held} test scenes of scikit-learn's digits on "
        f"{'two photographs' if data is None else Path(data.path).name}",
    )


def _network(setting: _Setting, seed: int) -> Backbone:
    torch.manual_seed(seed)
    shape = {"patch_size": PATCH, "embed_dim": setting.dim, "depth": setting.depth, "num_heads": setting.dim // 32}
    backbone = Spec("timm/vit_tiny_patch16_224", {"image_size": SIDE, "network": shape}).build()
    backbone.preprocess = Preprocess((SIDE, SIDE), (0.5,) * 3, (0.25,) * 3, "bilinear")
    return backbone


def _plan(epochs: int, lr: float, seed: int) -> Plan:
    views = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    return Plan(epochs=epochs, batch=64, lr=lr, views=views, seed=seed, evaluate_every=epochs)


def _measure(
    arm: str, setting: _Setting, state: Mapping[str, Tensor], seed: int, data: Dataset | None
) -> Mapping[str, float]:
    backbone, fresh = _network(setting, seed), _network(setting, seed)
    backbone.load_state_dict(state)
    train = _scenes(data, "train", setting.tuned_images, seed + 1000)
    test = _scenes(data, "test", setting.held, seed + 1000)
    looks = backbone if arm == "vit" else _LOOKS[arm](backbone, select=setting.select, crop="inclusive")
    plan = _plan(setting.tuned_epochs, 5e-4, seed)
    top1 = trained(looks, _split(train, fine=True), _split(test, fine=True), plan).scores["top1"]
    if not isinstance(looks, GLSim):
        return {"top1": top1, "iou": float("nan"), "untrained": float("nan"), "select": float("nan")}
    blind = _LOOKS[arm](fresh.eval(), select=setting.select, crop="inclusive")
    found = {"top1": top1, "iou": _overlap(looks.eval(), test), "untrained": _overlap(blind.eval(), test)}
    return {**found, "select": _seconds(looks, test) * 1000}


class _Whole(GLSim):
    """Looks at the whole image again, of which the features are those that it has."""

    def forward(self, images: Tensor) -> Features:
        whole = self.inner(images)
        both = torch.stack([whole.pooled, whole.pooled], 1)
        return Features(whole.pyramid, self.norm(self.aggregator(both))[:, 0], whole.tokens)

    def boxes(self, images: Tensor, features: Features) -> Tensor:
        return torch.tensor([[0, 0, *images.shape[2:]]]).expand(len(images), 4)


class _Random(GLSim):
    """Looks at a box of the same size somewhere else."""

    @torch.no_grad()
    def boxes(self, images: Tensor, features: Features) -> Tensor:
        found = super().boxes(images, features)
        size = found[:, 2:] - found[:, :2]
        free = torch.tensor(images.shape[2:]) - size + 1
        start = (torch.rand(len(images), 2) * free).long().minimum(free - 1)
        return torch.cat([start, start + size], 1)


class _Rollout(GLSim):
    """Looks where attention rollout (Abnar and Zuidema, 2020) comes from."""

    @torch.no_grad()
    def boxes(self, images: Tensor, features: Features) -> Tensor:
        with evaluating(self.inner):
            maps = [maps.after for maps in attention_maps(self.inner, images)]
        h, w = features.pyramid[-1].shape[2:]
        cells = extents(rollout(maps)[:, -h * w :].view(-1, h, w), self.select)
        return boxes_of(cells, (h, w), (images.shape[2], images.shape[3]), self.levels[self._level].stride, self.crop)


_LOOKS = {"whole": _Whole, "random": _Random, "glsim": GLSim, "rollout": _Rollout}


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """What the first token hears of each, through all blocks with their residuals: (B, heads, N, N) each to (B, N)."""
    heard = torch.zeros(len(maps[0]), 1, maps[0].shape[-1])
    heard[:, :, 0] = 1
    for attention in reversed(maps):
        heard = 0.5 * (torch.bmm(heard, attention.mean(1)) + heard)
    return heard[:, 0]


@torch.no_grad()
def _overlap(model: GLSim, scenes: _Scenes) -> float:
    """Mean intersection over union of what is looked at with where the things are, in percent."""
    torch.manual_seed(0)
    found = []
    for some in _tensor(model, scenes).split(250):
        top, left, bottom, right = model.boxes(some, model.inner(some)).float().unbind(1)
        found.append(torch.stack([left, top, right, bottom], 1))
    return 100 * box_iou(torch.cat(found), torch.from_numpy(scenes.boxes).float()).diagonal().mean().item()


@torch.no_grad()
def _seconds(model: GLSim, scenes: _Scenes) -> float:
    """Seconds a batch of 64 to find the best patches, once features (and, for rollout, its attention) are there."""
    images = _tensor(model, scenes)[:64]
    features = model.inner(images)
    maps = [maps.after for maps in attention_maps(model.inner, images)] if isinstance(model, _Rollout) else []
    taken = []
    for _ in range(30):
        started = time.perf_counter()
        scores = rollout(maps)[:, None] if maps else model.scores(features)
        extents(scores, model.select)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _tensor(model: Backbone, scenes: _Scenes) -> Tensor:
    return normalised(scenes.pixels, model.preprocess)


def _split(scenes: _Scenes, *, fine: bool) -> Split:
    digits = tuple(str(digit) for digit in range(len(COLOURS)))
    classes = tuple(f"{digit} {mark}" for digit in digits for mark in MARKS) if fine else digits
    names = np.array([f"scene-{row:05d}" for row in range(len(scenes.pixels))])
    targets = scenes.fine if fine else scenes.coarse
    return Split("all", classes, names, targets, Arrays(scenes.pixels), np.arange(len(names)))


def _scenes(data: Dataset | None, name: Literal["train", "test"], count: int, seed: int) -> _Scenes:
    """Digits in their colours with a mark, each at a random place of a photograph; no digit is in both parts."""
    from sklearn.datasets import load_digits

    random = np.random.default_rng([seed, name == "test"])
    canvas = _photographs(data, name, count, random)
    levels, labels = map(np.asarray, load_digits(return_X_y=True))
    part = (np.arange(len(labels)) % 4 == 0) == (name == "test")
    known = np.flatnonzero(part & (labels < len(COLOURS)))
    shapes = np.stack([_enlarged(levels[row].reshape(8, 8)) for row in known])  # (known, 12, 12) in 0..1
    chosen, mark = random.integers(len(known), size=count), random.integers(len(MARKS), size=count)
    corners = random.integers(SIDE - THING + 1, size=(count, 2))
    coarse = labels[known][chosen].astype(np.int64)
    for row, (top, left) in enumerate(corners):
        colour = COLOURS[coarse[row]] + random.normal(0, 15, 3)
        _draw(canvas[row, top : top + THING, left : left + THING], shapes[chosen[row]], colour, mark[row])
    boxes = np.concatenate([corners[:, ::-1], corners[:, ::-1] + THING], 1)
    return _Scenes(canvas, coarse, len(MARKS) * coarse + mark, boxes)


def _enlarged(levels: np.ndarray) -> np.ndarray:
    image = Image.fromarray((levels * (255 / 16)).round().astype(np.uint8))
    return np.asarray(image.resize((THING, THING), Image.Resampling.BICUBIC)) / 255


def _draw(place: np.ndarray, shape: np.ndarray, colour: np.ndarray, mark: int) -> None:
    """A digit on a dark plate, in place, and at its lower right corner a white bar that stands or lies."""
    plate = 0.3 * place.astype(float)
    drawn = plate + shape[:, :, None] * (colour - plate)
    corner = drawn[-4:-1, -4:-1]
    corner[:] = 0
    bar = corner[:, 1] if mark == 0 else corner[1]
    bar[:] = 255
    place[:] = drawn.clip(0, 255).astype(np.uint8)


def _photographs(data: Dataset | None, name: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Backgrounds (count, 64, 64, 3) uint8 of one part of the data, or of one part of scikit-learn's photographs."""
    if data is None:
        from sklearn.datasets import load_sample_images

        whole = [image[:, :430] if name == "train" else image[:, 430:] for image in load_sample_images().images]
        return np.stack([_cut(whole[row % len(whole)], random) for row in range(count)])
    part = next((part for part in (name, "val") if part in data.splits), None)
    if part is None:
        raise DataError(f"glsim: {data.path} has no test images; the effect needs a split test or val")
    split = data.split(part)
    rows = random.integers(len(split), size=count)
    return np.stack([np.asarray(split.image(int(row)).convert("RGB").resize((SIDE, SIDE))) for row in rows])


def _cut(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    top, left = (int(random.integers(side - SIDE + 1)) for side in image.shape[:2])
    return image[top : top + SIDE, left : left + SIDE]


def _checks(measured: Measured) -> Sequence[Check]:
    """The thresholds of the paper's row."""
    vit, blind, rolled = (measured.gain("glsim", arm, "top1") for arm in ("vit", "random", "rollout"))
    iou, elsewhere = measured.mean("glsim", "iou"), measured.mean("random", "iou")
    untrained, chance = measured.mean("glsim", "untrained"), measured.mean("random", "untrained")
    times = measured.mean("glsim", "select"), measured.mean("rollout", "select")
    return [
        Check("GLSim gains at least 2 points over one look", bool(vit.mean() >= 2), _seeds(vit)),
        Check("GLSim gains at least a point over random boxes of its size", bool(blind.mean() >= 1), _seeds(blind)),
        Check(
            "GLSim is within half a point of attention rollout, or above", bool(rolled.mean() >= -0.5), _seeds(rolled)
        ),
        Check(
            "GLSim selects in less time than rollout, whose attention is not counted",
            times[0] < times[1],
            f"{times[0]:.3f} and {times[1]:.3f} ms for 64 images",
        ),
        Check(
            "GLSim's boxes overlap the things at least twice as much as random ones",
            iou >= 2 * elsewhere,
            f"mean IoU {iou:.1f} and {elsewhere:.1f} %",
        ),
        Check(
            "around an untrained backbone GLSim's boxes are near random ones, below 1.5 times their overlap",
            untrained < 1.5 * chance,
            f"mean IoU {untrained:.1f} and {chance:.1f} %",
        ),
    ]


def _seeds(gains: np.ndarray) -> str:
    return f"{gains.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in gains)})"
