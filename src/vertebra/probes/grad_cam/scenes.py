"""The claim on scenes of two things: does the map find the thing that is asked for, and is it what the network uses?

A small plain network (convolutions, average, linear) learns from labels alone which of six shapes a scene shows. Its
maps have cells of 4 pixels and its receptive field is about as wide as a thing, as VGG-16's is for ImageNet.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.data.digits import Arrays
from vertebra.data.loader import Batches
from vertebra.data.pixels import fitted, normalised
from vertebra.data.sprites import Sprites, sprites
from vertebra.errors import UsageError
from vertebra.methods.supervised import Supervised
from vertebra.probes import faithfulness
from vertebra.probes.grad_cam.maps import Method, explain, resized
from vertebra.tasks.classify import Classify, classify
from vertebra.training.loop import evaluate, fit

SHAPES = ("circle", "triangle", "star", "cross", "ring", "heart")
SIDE = 64
PATCH = 16
"""Side in pixels of the corner patch of the bias test."""

ARMS = {
    "grad_cam": "Grad-CAM",
    "guided_backprop": "guided backpropagation, averaged over Grad-CAM's cells",
    "gradient_input": "gradient times input, averaged over Grad-CAM's cells",
    "random": "random cells",
    "centre": "a Gaussian at the image's centre",
    "biased": "Grad-CAM; in training a patch in the corner goes with the first class",
    "rebalanced": "Grad-CAM; in training every other image has the patch",
}
METRICS = {
    "pointing": "%",
    "box_iou50": "%",
    "moved": "%",
    "insertion_auc": "%",
    "deletion_auc": "%",
    "occlusion": "",
    "sanity": "",
    "attacked": "%",
    "misled": "%",
    "bias_mass": "%",
    "map": "%",
}


class Plain(Backbone):
    """Four convolutions with batch norm and ReLU, strides 2 and 4; each cell sees 25 pixels."""

    def __init__(self, *, dims: tuple[int, int], image_size: int) -> None:
        super().__init__()
        first, second = dims
        self.stem = nn.Sequential(*_convolution(3, first, 2), *_convolution(first, first))
        self.body = nn.Sequential(nn.MaxPool2d(2), *_convolution(first, second), *_convolution(second, second))
        self.levels, self.width = (Level(first, 2), Level(second, 4)), second
        self.preprocess = Preprocess((image_size, image_size), (0.5,) * 3, (0.25,) * 3)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to maps of strides 2 and 4 and their mean."""
        fine = self.stem(images)
        coarse = self.body(fine)
        return Features((fine, coarse), coarse.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """Stem and body."""
        return [self.stem, self.body]


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        dims: of the network.
        train: training scenes.
        test: test scenes, of which those with two classes are asked for both.
        epochs: of training.
    """

    dims: tuple[int, int]
    train: int
    test: int
    epochs: int


SCALES = {"toy": Scale((16, 48), 2000, 200, 18), "gpu": Scale((64, 192), 40000, 2000, 20)}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Test images and classes that they show, one entry a pair; pairs of one image follow each other.

    Attributes:
        images: (P, 3, H, W), normalised.
        classes: (P,) int64.
        boxes: (N, 4) xyxy of the class's things, one a pair.
    """

    images: Tensor
    classes: Tensor
    boxes: list[Tensor]


def effect(scale: str, data: Dataset | None) -> Effect:
    """See `vertebra.probes.grad_cam.effect`.

    Raises:
        UsageError: data without boxes, or without two splits.
    """
    if data is not None and not (len(data.splits) > 1 and all(map(faithfulness.has_boxes, data.splits.values()))):
        raise UsageError(f"{data.path}: the effect of grad_cam needs boxes, and a train and a test or val split")
    return Effect(
        claim="class-discriminative maps from labels alone: they find the asked class, name what the network goes by, "
        "depend on its weights and show its bias",
        arms=ARMS,
        baseline="gradient_input",
        metrics=METRICS,
        measure=partial(measure, SCALES[scale], data),
        checks=checks,
        limits="Plain shapes on textures and a network of four convolutions; says nothing of photographs, of people's "
        "trust, or of the paper's localisation error on ImageNet.",
        data="sprites, one or two of six plain shapes"
        if data is None
        else f"{data.layout}, {len(data.classes)} classes",
    )


def measure(scale: Scale, data: Dataset | None, arm: str, seed: int, folder: Path) -> Mapping[str, float]:
    """Train a classifier on labels, and judge one kind of map."""
    train, test = scenes(scale, seed) if data is None else _of(data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_bias = arm in ("biased", "rebalanced")
    if on_bias:
        train = patched(train, "first" if arm == "biased" else "every other")
    model = trained(train, scale, seed, device, flip=0.0 if on_bias else 0.5)  # the patch stays in its corner
    batches = Batches(test, model.backbone.preprocess, views=None, batch=64, seed=0, workers=0)
    found = dict.fromkeys(METRICS, float("nan")) | {"map": evaluate(model, batches)["map"]}
    if on_bias:
        return found | bias(model, test, device)
    pairs = pairs_of(test, model.backbone.preprocess, device)
    draw = MAPS[arm]
    maps = draw(model, pairs)
    found |= localisation(maps, pairs) | faithful(model, maps, pairs)
    if arm not in ("random", "centre"):
        other = faithfulness.randomised(model, seed=seed + 1)
        found["sanity"] = faithfulness.rank_correlation(maps, draw(other, pairs)).mean().item()
    if arm == "grad_cam":
        found["attacked"] = attacked(model, pairs)
    return found


def scenes(scale: Scale, seed: int) -> tuple[Split, Split]:
    """Train and test scenes of one or two large plain shapes that do not touch; test scenes show two."""
    train = sprites(classes=SHAPES, size=SIDE, objects=(1, 2), overlap=0, touching=0, seed=seed, splits={"train": 1})
    known = train.split("train").annotations
    assert isinstance(known, Sprites)
    world = replace(known.world, sizes=(("large", 0.2, 0.26),), textures=("plain",))
    return (
        _drawn(Sprites(world, "train", np.arange(scale.train))),
        _drawn(Sprites(replace(world, objects=(2, 2)), "test", np.arange(scale.test))),
    )


def _drawn(known: Sprites) -> Split:
    """A split of scenes, drawn once and kept."""
    side, count = known.world.size, len(known)
    pixels = np.empty((count, side, side, 3), dtype=np.uint8)
    targets = np.zeros((count, len(known.world.classes)), dtype=np.uint8)
    for index in range(count):
        scene = known.render(index)
        pixels[index], targets[index, scene.plan.labels] = scene.image, 1
    names = np.array([f"{known.part}-{index:05d}" for index in range(count)])
    return Split(known.part, known.world.classes, names, targets, Arrays(pixels), np.arange(count), known)


def _of(data: Dataset) -> tuple[Split, Split]:
    """Train and test of data with boxes, drawn at the network's size."""
    names = [name for name in ("test", "val", *data.splits) if name in data.splits and name != "train"]
    return data.split("train"), data.split(names[0])


def patched(split: Split, where: Literal["first", "every other", "all"]) -> Split:
    """A patch in the upper left corner: of images that show the first class, of every other image, or of all."""
    assert split.targets is not None
    size = Preprocess((SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)
    pixels = np.stack([fitted(split.image(index), size) for index in range(len(split))])
    chosen = {
        "first": split.targets[:, 0] > 0,
        "every other": np.arange(len(split)) % 2 == 0,
        "all": np.ones(len(split), dtype=bool),
    }[where]
    corner = pixels[chosen, :PATCH, :PATCH]
    corner[:] = (230, 60, 200)
    corner[:, PATCH // 4 : 3 * PATCH // 4, PATCH // 4 : 3 * PATCH // 4] = (60, 230, 90)
    pixels[chosen, :PATCH, :PATCH] = corner
    return replace(split, store=Arrays(pixels), rows=np.arange(len(split)))


def trained(split: Split, scale: Scale, seed: int, device: str, *, flip: float = 0.5) -> Classify:
    """A classifier of what a scene shows; `flip` is the probability of a mirrored view."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classify(Plain(dims=scale.dims, image_size=SIDE), split.classes, multi=True)
    views = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip)
    plan = Plan(epochs=scale.epochs, batch=32, lr=1e-2, weight_decay=0.02, views=views, seed=seed, workers=0)
    batches = Batches(split, model.backbone.preprocess, views=views, batch=plan.batch, seed=seed, workers=0)
    fit(Supervised(model), batches, plan, device=device)
    return model.eval()


def pairs_of(split: Split, preprocess: Preprocess, device: str) -> Pairs:
    """Both classes of every image that shows two."""
    images, classes, boxes = [], [], []
    for index in range(len(split)):
        found = faithfulness.true_boxes(split, index, preprocess)
        if len(found) == 2:
            pixels = fitted(split.image(index), preprocess)
            images += [pixels, pixels]
            classes += list(found)
            boxes += list(found.values())
    if not images:
        raise UsageError(f"split {split.name!r} has no image with things of exactly two classes")
    return Pairs(normalised(np.stack(images), preprocess).to(device), torch.tensor(classes), boxes)


def _explained(method: Method, model: Classify, pairs: Pairs) -> Tensor:
    maps = explain(model, pairs.images, pairs.classes, method=method, at="cells")
    return resized(maps, pairs.images.shape[-2:]).cpu()


def _random(model: Classify, pairs: Pairs) -> Tensor:
    cells = torch.rand(len(pairs.images), SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0))
    return resized(cells, pairs.images.shape[-2:])


def _centre(model: Classify, pairs: Pairs) -> Tensor:
    height, width = pairs.images.shape[-2:]
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.exp(-2 * (y[:, None] ** 2 + x**2)).expand(len(pairs.images), -1, -1)


MAPS: dict[str, Callable[[Classify, Pairs], Tensor]] = {
    "grad_cam": partial(_explained, "grad_cam"),
    "guided_backprop": partial(_explained, "guided_backprop"),
    "gradient_input": partial(_explained, "gradient_input"),
    "random": _random,
    "centre": _centre,
}


def localisation(maps: Tensor, pairs: Pairs) -> dict[str, float]:
    """The pointing game, boxes, and whether the map moves when the other class is asked for."""
    height, width = maps.shape[1:]
    hits = faithfulness.pointing(maps, faithfulness.within(pairs.boxes, height, width))
    fits = faithfulness.overlap(faithfulness.boxes(maps), pairs.boxes) >= 0.5
    first, second = faithfulness.centres(maps).unflatten(0, (-1, 2)).unbind(1)
    moved = (first - second).norm(dim=1) > width / 8
    return {
        name: 100 * values.double().mean().item()
        for name, values in (("pointing", hits), ("box_iou50", fits), ("moved", moved))
    }


def faithful(model: Classify, maps: Tensor, pairs: Pairs) -> dict[str, float]:
    """Insertion, deletion and the rank correlation with occlusion, of every fourth pair of images."""
    some = torch.arange(len(maps)).unflatten(0, (-1, 2))[::4].flatten()
    images, maps = pairs.images[some], maps[some].to(pairs.images.device)
    ask = faithfulness.confidence(model, pairs.classes[some], multi=True)
    lost = faithfulness.occlusion(ask, images, window=PATCH, stride=PATCH // 2)
    correlation = faithfulness.rank_correlation(faithfulness.windowed(maps, window=PATCH, stride=PATCH // 2), lost)
    return {
        "insertion_auc": 100 * faithfulness.area(faithfulness.insertion(ask, images, maps)).mean().item(),
        "deletion_auc": 100 * faithfulness.area(faithfulness.deletion(ask, images, maps)).mean().item(),
        "occlusion": correlation.mean().item(),
    }


def attacked(model: Classify, pairs: Pairs, step: float = 8 / 255) -> float:
    """Pointing, in percent, where one step against the gradient (FGSM) has made the network deny the class.

    Args:
        model: is attacked.
        pairs: images and the classes that are to be denied.
        step: of the grey levels, which go from 0 to 1.
    """
    leaf, wanted = pairs.images.clone().requires_grad_(), pairs.classes.to(pairs.images.device)[:, None]
    (gradient,) = torch.autograd.grad(model(leaf)["logits"].gather(1, wanted).sum(), leaf)
    images = pairs.images - step / model.backbone.preprocess.std[0] * gradient.sign()
    with torch.no_grad():
        denied = (model(images)["logits"].gather(1, wanted)[:, 0] < 0).cpu()
    if not denied.any():
        return float("nan")
    fooled = Pairs(images[denied], pairs.classes[denied], [pairs.boxes[i] for i in denied.nonzero()[:, 0].tolist()])
    return localisation_of(MAPS["grad_cam"](model, fooled), fooled)


def localisation_of(maps: Tensor, pairs: Pairs) -> float:
    """The pointing game alone, in percent."""
    objects = faithfulness.within(pairs.boxes, *maps.shape[1:])
    return 100 * faithfulness.pointing(maps, objects).mean().item()


def bias(model: Classify, test: Split, device: str) -> dict[str, float]:
    """How often the patch alone makes the network say the first class, and whether its map tells.

    The images bear the patch and do not show the class. `bias_mass` is the share of the first class's map on the patch
    and the cell around it, in percent.
    """
    assert test.targets is not None
    shown = patched(test.select(np.flatnonzero(test.targets[:, 0] == 0)), "all")
    pixels = np.stack([np.asarray(shown.image(index)) for index in range(len(shown))])
    images = normalised(pixels, model.backbone.preprocess).to(device)
    with torch.no_grad():
        said = model(images)["logits"][:, 0] > 0
    maps = explain(model, images, 0).cpu()
    region = torch.zeros(maps.shape, dtype=torch.bool)
    region[:, : PATCH + 4, : PATCH + 4] = True
    return {
        "misled": 100 * said.double().mean().item(),
        "bias_mass": 100 * faithfulness.mass(maps, region).mean().item(),
    }


def checks(found: Measured) -> Sequence[Check]:
    """What the claim comes to here: thresholds of the atlas."""
    blind, simple = ("random", "centre"), ("gradient_input", "guided_backprop")

    def value(metric: str, arm: str = "grad_cam") -> float:
        return found.mean(arm, metric)

    def others(metric: str, arms: Sequence[str]) -> str:
        return ", ".join(f"{arm} {value(metric, arm):.3g}" for arm in arms)

    return [
        Check("pointing game at least 85 %", value("pointing") >= 85, f"{value('pointing'):.1f} %"),
        Check("boxes with an overlap of 0.5 at least 50 %", value("box_iou50") >= 50, f"{value('box_iou50'):.1f} %"),
        Check("the map moves with the class in 80 %", value("moved") >= 80, f"{value('moved'):.1f} %"),
        Check(
            "points better than simple gradients and moves more often",
            all(value(m) > value(m, arm) for m in ("pointing", "moved") for arm in simple),
            f"pointing {others('pointing', simple)}; moved {others('moved', simple)}",
        ),
        Check(
            "insertion above and deletion below random and centre maps",
            all(
                value("insertion_auc") > value("insertion_auc", arm)
                and value("deletion_auc") < value("deletion_auc", arm)
                for arm in blind
            ),
            f"insertion {value('insertion_auc'):.1f} against {others('insertion_auc', blind)}; deletion "
            f"{value('deletion_auc'):.1f} against {others('deletion_auc', blind)}",
        ),
        Check("rank correlation with occlusion at least 0.3", value("occlusion") >= 0.3, f"{value('occlusion'):.2f}"),
        Check(
            "other weights, another map: below 0.3, and below guided backpropagation",
            value("sanity") < min(0.3, value("sanity", "guided_backprop")),
            f"{value('sanity'):.2f}; guided backpropagation {value('sanity', 'guided_backprop'):.2f}",
        ),
        Check("after FGSM still on the thing in 70 %", value("attacked") >= 70, f"{value('attacked'):.1f} %"),
        Check(
            "70 % of a biased network's map is on the patch, and balanced data remove it",
            value("bias_mass", "biased") >= 70 and value("bias_mass", "rebalanced") < value("bias_mass", "biased") / 2,
            f"{value('bias_mass', 'biased'):.1f} % (misled in {value('misled', 'biased'):.1f} %); rebalanced "
            f"{value('bias_mass', 'rebalanced'):.1f} % ({value('misled', 'rebalanced'):.1f} %)",
        ),
    ]
