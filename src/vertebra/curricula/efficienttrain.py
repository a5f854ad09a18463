"""EfficientTrain: low frequencies and weak augmentation first, all of both at the end.

Every epoch sees every image. What changes from part to part of the training is how many of an image's lowest
frequencies the network gets, as an image of B x B pixels that costs (B/S)^2, and how strong the views' policy is.
Nothing else does: the rate stays one schedule over the whole run, and the last part is the plan as it stands.

`iccv` is the paper of 2023: five equal parts and a crop in Fourier space. `plus` is EfficientTrain++ (arXiv
2405.08768): ten parts of equal compute, so the small ones are longer, and plain resizing in place of the crop. It
trains more epochs than the budget that it is named by: `EfficientTrain.epochs_for` says how many.

The magnitudes are shares of the policy that the plan has, as `views.policy="randaugment"`; without a policy they do
nothing. With one, the last part has the plan's own strength, as the paper's 9 is that of its baseline.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from vertebra.contracts import (
    Backbone,
    Check,
    Curriculum,
    Effect,
    Measured,
    Progress,
    Settings,
)
from vertebra.data.dataset import Dataset, Split, stratified
from vertebra.data.loader import Batches
from vertebra.errors import UsageError, near
from vertebra.paper import Paper

PAPER = Paper(
    id="efficienttrain",
    title="EfficientTrain: Exploring Generalized Curriculum Learning for Training Visual Backbones",
    year=2023,
    arxiv="2211.09703",
    reference="LeapLabTHU/EfficientTrain",
    licence="MIT",
    claim=(
        "training of ResNet, ConvNeXt, DeiT, PVT, Swin and CSWin on ImageNet-1K and 22K 1.5 times faster without loss "
        "of accuracy: 0.653 of the compute"
    ),
    numbers="0.653 of the compute",
    parity="the authors' crop of frequencies, in golden numbers",
    note=(
        "Parts change between epochs. The authors rebuild the network at each size and resize its position tables, "
        "bias tables and Adam moments; ours take any size by interpolating position tables in the forward pass, and "
        "windows keep their size, so parameters and moments keep their shapes and nothing has to be resized. Swin pads "
        "to whole windows at 160 and 192 pixels and so costs 0.62 and 0.81 of a step, not 0.51 and 0.73. In `plus` "
        "images are resized straight to B by the network's own filter where the authors crop to S, augment and then "
        "resize by Lanczos; the rate follows steps where theirs follows compute; magnitude 0 leaves the policy out. "
        "Left to the plan: drop path, which the authors of `plus` scale by epochs / 200, and the batch, constant here. "
        "There is no replay buffer: decoded images are kept by the loader."
    ),
)

VARIANTS = {
    "iccv": {"bands": (160, 160, 160, 192, 224), "magnitudes": (1, 3, 5, 7, 9)},
    "plus": {
        "bands": (96, 96, 160, 160, 160, 160, 224, 224, 224, 224),
        "magnitudes": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "low_pass": "resize",
        "parts": "compute",
    },
    "plus_deit": {
        "bands": (96, 96, 160, 160, 160, 160, 192, 192, 224, 224),
        "magnitudes": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "low_pass": "resize",
        "parts": "compute",
    },
    "plus_convnext": {
        "bands": (160, 160, 160, 160, 160, 160, 224, 224, 224, 224),
        "magnitudes": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "low_pass": "resize",
        "parts": "compute",
    },
}


class EfficientTrainOptions(TypedDict, total=False):
    """Options of the schedule; a variant sets the first four.

    Attributes:
        bands: side in pixels of what is kept in each part, 1 to `side`; the last is `side`.
        magnitudes: strength of the policy in each part, of which the last is the plan's own; None leaves it alone, as
            in masked pre-training, which has no policy.
        low_pass: "crop" cuts the spectrum after normalising and erasing, "resize" makes smaller views.
        parts: equal "steps" or equal "compute", which gives a part of size B a share of the steps in 1/B^2.
        side: side in pixels that the bands are written for.
    """

    bands: Sequence[int]
    magnitudes: Sequence[float] | None
    low_pass: Literal["crop", "resize"]
    parts: Literal["steps", "compute"]
    side: int


def efficienttrain(
    batches: Batches, variant: str = "iccv", **options: Unpack[EfficientTrainOptions]
) -> "EfficientTrain":
    """The curriculum for training on `batches`, whose size is the one that it ends at.

    Args:
        batches: what is trained on; gives the size.
        variant: one of `VARIANTS`.
        options: as in `EfficientTrainOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, images that are not square, or options that are no schedule.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"efficienttrain has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    height, width = batches.preprocess.size
    if height != width:
        raise UsageError(f"efficienttrain cuts squares and the images have {height}x{width} pixels; set a square size")
    merged: dict[str, Any] = {**VARIANTS[variant], **options}
    return EfficientTrain(height, **merged)


def relative_cost(sizes: Sequence[int], full: int, shares: Sequence[float] | None = None) -> float:
    """Compute of a schedule beside that of as many steps at full size.

    Args:
        sizes: side in pixels of each part.
        full: side in pixels of a whole image.
        shares: of the steps, one a part; None takes equal ones.

    Returns:
        The sum of share x (size / full)^2: what convolutions cost exactly, plain transformers a little less.

    >>> round(relative_cost((160, 160, 160, 192, 224), 224), 3)
    0.653
    """
    parts = [1 / len(sizes)] * len(sizes) if shares is None else shares
    return sum(share * (size / full) ** 2 for share, size in zip(parts, sizes, strict=True))


class EfficientTrain(Curriculum):
    """The schedule for images of one size.

    Attributes:
        image_size: side in pixels at the end.
        sizes: side in pixels of each part, rising to `image_size`. Bands written for another side are scaled and
            rounded down to a multiple that strided networks divide: 32 pixels at 224, 4 at 32.
        shares: of the steps, one a part.
        low_pass: as in the options.
        policies: strength of the policy in each part, 0..1; none where the policy is left alone.

    Raises:
        UsageError: bands out of range, that do not end at `side`, or with another number of magnitudes.
    """

    def __init__(
        self,
        image_size: int,
        *,
        bands: Sequence[int] = VARIANTS["iccv"]["bands"],
        magnitudes: Sequence[float] | None = VARIANTS["iccv"]["magnitudes"],
        low_pass: Literal["crop", "resize"] = "crop",
        parts: Literal["steps", "compute"] = "steps",
        side: int = 224,
    ) -> None:
        _check(bands, magnitudes, side)
        for name, value, known in (("low_pass", low_pass, ("crop", "resize")), ("parts", parts, ("steps", "compute"))):
            if value not in known:
                raise UsageError(
                    f"efficienttrain: {name} is {value!r}{near(str(value), known)}; it can be {', '.join(known)}"
                )
        self.image_size = image_size
        self.sizes = tuple(scaled(band, side, image_size) for band in bands)
        self.low_pass = low_pass
        self.policies = () if magnitudes is None else tuple(m / magnitudes[-1] for m in magnitudes)
        weights = [Fraction(1, size**2 if parts == "compute" else 1) for size in self.sizes]
        self._ends = [end / sum(weights) for end in accumulate(weights)]  # exact: a part begins on its very step
        self.shares = tuple(float(weight / sum(weights)) for weight in weights)

    def settings(self, progress: Progress) -> Settings:
        """The part that the next step is in; None where the last part has the plan's own.

        The last epoch is the plan's own however few there are, so that every run ends on whole images.
        """
        done = Fraction(progress.step, max(1, progress.steps))
        part = min(bisect_right(self._ends, done), len(self.sizes) - 1)
        if progress.epoch >= progress.epochs - 1:
            part = len(self.sizes) - 1
        small = None if self.sizes[part] == self.image_size else self.sizes[part]
        policy = self.policies[part] if self.policies else None
        if self.low_pass == "crop":
            return Settings(band=small, policy=policy)
        return Settings(image_size=small, policy=policy)

    @property
    def cost(self) -> float:
        """Compute of a run beside that of as many epochs at full size."""
        return relative_cost(self.sizes, self.image_size, self.shares)

    def epochs_for(self, full: int) -> int:
        """Epochs of this schedule that cost as much as `full` epochs at full size."""
        return max(1, round(full / self.cost))


def scaled(band: int, side: int, image_size: int) -> int:
    """A band that is written for images of `side`, for images of `image_size`.

    It is rounded down to a multiple of the largest power of two up to a seventh of the image, as 160 and 192 are
    multiples of 32 at 224.
    """
    if band == side or side == image_size:
        return band * image_size // side
    multiple = max(2, 1 << max(0, (image_size // 7).bit_length() - 1))
    return min(image_size, max(multiple, band * image_size // side // multiple * multiple))


def _check(bands: Sequence[int], magnitudes: Sequence[float] | None, side: int) -> None:
    if not bands or any(not 0 < band <= side for band in bands):
        raise UsageError(f"efficienttrain: bands are {tuple(bands)}; there must be some, each in 1..{side} (side)")
    if bands[-1] != side:
        raise UsageError(
            f"efficienttrain: the last band is {bands[-1]}; training ends on whole images, at {side} (side)"
        )
    if magnitudes is None:
        return
    if len(magnitudes) != len(bands):
        raise UsageError(
            f"efficienttrain: {len(magnitudes)} magnitudes for {len(bands)} bands; give one a part, or None"
        )
    if not magnitudes[-1] > 0 or any(not 0 <= magnitude <= magnitudes[-1] for magnitude in magnitudes):
        raise UsageError(
            f"efficienttrain: magnitudes are {tuple(magnitudes)}; none may be below 0 or above the last, the plan's own"
        )


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """A ResNet-14 and a small ViT trained with the curriculum, without it, and with its ablations."""
    from vertebra.data.sprites import sprites
    from vertebra.training.running import material

    setup = _SETUPS[scale]
    size, counts = setup["image_size"], {"train": min(setup["images"], 20_000), "val": min(setup["held"], 2000)}
    found = material(data or sprites(size=size, objects=1, classes="shapes", splits=counts), seed=0)

    def subset(split: Split, most: int) -> Split:
        if len(split) <= most or split.targets is None:
            return split
        return split.select(stratified(split.targets, (most / len(split),), seed=0)[0])

    train, held = subset(found.train, setup["images"]), subset(found.val, setup["held"])

    def measure(arm: str, seed: int, folder: Path) -> dict[str, float]:
        values: dict[str, float] = {}
        for network in ("cnn", "vit"):
            values |= {
                f"{name}_{network}": value for name, value in _train(arm, network, seed, train, held, setup).items()
            }
        return values

    images = f"{len(train)} images to train on, {len(held)} to score"
    return Effect(
        claim=(
            "low frequencies and weak augmentation first: the accuracy of plain training at equal epochs for about "
            "half of the compute, and more than plain training of that compute reaches"
        ),
        arms={
            "plain": f"{setup['epochs']} epochs at {size} pixels",
            "efficienttrain": f"bands {list(setup['bands'])}, magnitudes 1, 3, 5, 7, 9",
            "fewer_epochs": "plain training, epochs cut to the same compute",
            "no_magnitudes": "the bands alone, the policy at full strength throughout",
            "resized": "smaller views in place of the crop of the spectrum",
        },
        baseline="plain",
        metrics={
            "top1_cnn": "%",
            "top1_vit": "%",
            "macs_cnn": "",
            "macs_vit": "",
            "fit_seconds_cnn": "s",
            "fit_seconds_vit": "s",
        },
        measure=measure,
        checks=_checks,
        limits=(
            "small networks, few images and epochs: three seeds tell differences of about two points, not the half "
            "point that the paper claims. Seconds are those of this machine and include the views, which cost the same "
            "at every size of the crop. So short a training leaves the ViT near chance on sprites: there its arms say "
            "little, and photographs (--data FOLDER, as CIFAR-10) say more."
        ),
        data=f"{data.path if data else 'sprites of one shape'}: {images}, {len(train.classes)} classes",
    )


_SETUPS: Mapping[str, Mapping[str, Any]] = {
    "toy": {
        "image_size": 32,
        "bands": (20, 20, 20, 24, 32),
        "images": 2000,
        "held": 4000,
        "epochs": 20,
        "batch": 64,
        "width": 8,
        "vit": {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3},
    },
    "gpu": {
        "image_size": 128,
        "bands": (80, 80, 80, 96, 128),
        "images": 100_000,
        "held": 20_000,
        "epochs": 60,
        "batch": 256,
        "width": 32,
        "vit": {"patch_size": 16, "embed_dim": 384, "depth": 8, "num_heads": 6},
    },
}
"""What the effect trains at each scale."""


def _train(
    arm: str, network: Literal["cnn", "vit"], seed: int, train: Split, held: Split, setup: Mapping[str, Any]
) -> dict[str, float]:
    """Top-1, compute beside plain training's, and seconds of one arm."""
    import time

    import torch

    from vertebra.backbones.cifar_resnet import cifar_resnet
    from vertebra.config import Plan, Views
    from vertebra.methods.supervised import Supervised
    from vertebra.tasks.classify import classify
    from vertebra.training.cost import count
    from vertebra.training.loop import evaluate, fit

    size, epochs = setup["image_size"], setup["epochs"]
    options = {"bands": setup["bands"], "side": size}
    curriculum = {
        "efficienttrain": EfficientTrain(size, **options),
        "no_magnitudes": EfficientTrain(size, **options, magnitudes=None),
        "resized": EfficientTrain(size, **options, low_pass="resize"),
    }.get(arm)
    if arm == "fewer_epochs":
        epochs = round(epochs * relative_cost(setup["bands"], size))
    torch.manual_seed(seed)
    backbone = (
        cifar_resnet(blocks=2, width=setup["width"], image_size=size) if network == "cnn" else _vit(setup["vit"], size)
    )
    model = classify(backbone, train.classes, label_smoothing=0.1)
    views = Views(scale=(0.35, 1.0), policy="randaugment")
    plan = Plan(
        epochs=epochs,
        batch=setup["batch"],
        lr=2e-3,
        warmup_epochs=2.0,
        evaluate_every=epochs,
        precision="auto" if torch.cuda.is_available() else "32-true",
        views=views,
        seed=seed,
    )
    batches = Batches(train, backbone.preprocess, views=views, batch=plan.batch, seed=seed)
    started = time.monotonic()
    fit(Supervised(model), batches, plan, curriculum=curriculum)
    seconds = time.monotonic() - started
    batches.close()
    spent = 0.0
    for epoch in range(epochs):
        asked = curriculum.settings(Progress(epoch, epochs, epoch, epochs)) if curriculum else Settings()
        side = asked.band or asked.image_size or size
        spent += count(model, size=(side, side), channels=3).macs
    whole = setup["epochs"] * count(model, size=(size, size), channels=3).macs
    scored = Batches(held, backbone.preprocess, views=None, batch=256, seed=0, workers=0)
    return {"top1": evaluate(model, scored)["top1"], "macs": spent / whole, "fit_seconds": seconds}


def _checks(measured: Measured) -> list[Check]:
    """What the paper's claim comes to at this scale, for each network."""
    checks = []
    for network in ("cnn", "vit"):
        top1, macs = f"top1_{network}", measured.mean("efficienttrain", f"macs_{network}")
        gain = measured.gain("efficienttrain", "plain", top1)
        fewer = measured.gain("efficienttrain", "fewer_epochs", top1)
        seconds = f"fit_seconds_{network}"
        ratio = measured.mean("plain", seconds) / measured.mean("efficienttrain", seconds)
        checks += [
            Check(
                f"{network}: top-1 at most 0.5 point below plain training",
                bool(gain.mean() >= -0.5),
                f"{gain.mean():+.2f} (each seed {', '.join(f'{g:+.2f}' for g in gain)}), {ratio:.2f} times as fast",
            ),
            Check(f"{network}: 0.50 to 0.60 of the MACs", bool(0.5 <= macs <= 0.6), f"{macs:.3f}"),
            Check(
                f"{network}: above plain training of equal compute",
                bool(fewer.mean() > 0),
                f"{fewer.mean():+.2f} (each seed {', '.join(f'{f:+.2f}' for f in fewer)})",
            ),
        ]
    return checks


def _vit(network: Mapping[str, Any], size: int) -> Backbone:
    from vertebra.backbones.timm import timm

    return timm("vit_tiny_patch16_224", image_size=size, network=network)
