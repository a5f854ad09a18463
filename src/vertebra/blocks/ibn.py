"""IBN: instance norm for some channels of a map, batch norm for the others, in place of one batch norm.

Shapes: (B, C, H, W) in, the same out; as many parameters as the batch norm has. Instance norm takes an image's own
statistics and so takes its appearance (brightness, contrast, tint) away, in training and in evaluation alike; the
channels under batch norm keep it. Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.ibn_net`.

    swap(backbone, "*.layer[123].*.bn1", "ibn")              # starts afresh
    swap(backbone, "*.layer[123].*.bn1", from_batch_norm)    # keeps what the old norms had learned

Departs from the paper in nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.transforms.v2.functional import adjust_hue, adjust_saturation, rgb_to_grayscale

from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.contracts import Check, Effect, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.surgery.swap import swap

PAPER = Paper(
    id="ibn",
    title="Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    year=2018,
    arxiv="1807.09441",
    reference="XingangPan/IBN-Net",
    licence="MIT",
    claim=(
        "ImageNet top-1 error of ResNet-50 falls from 24.27 to 22.54 % at no extra parameters; GTA5 to Cityscapes "
        "gains what domain adaptation gains, without seeing the target"
    ),
    numbers="14 networks of ibn_net",
    parity="golden outputs of the authors' layers and networks, in evaluation and in training (ibn_net)",
    note=(
        "The networks of the paper are `ibn_net/resnet50_a` and its like. The effect trains on plain images and tests "
        "on shifted colours; the comparison over the domains of PACS and of driving scenes is not made here."
    ),
)

VARIANTS = {
    "half": {"share": 0.5, "first": "instance"},
    "dense": {"share": 0.4, "first": "batch"},
    "whole": {"share": 1.0, "first": "instance"},
}

First = Literal["instance", "batch"]


def ibn(
    channels: int, variant: str = "half", *, share: float | None = None, first: First | None = None
) -> "IBN | InstanceNorm":
    """The norm for maps of `channels`.

    Args:
        channels: of the maps.
        variant: "half", as residual networks have it (IBN-a); "dense", as DenseNets do, which have batch norm first;
            "whole", instance norm alone (IBN-b).
        share: of the channels that are normalised image by image, above 0 and up to 1, in place of the variant's.
        first: which norm has the first channels, in place of the variant's.

    Raises:
        UsageError: an unknown variant, a share out of range, or one that leaves a norm without channels.
    """
    if variant not in VARIANTS:
        raise UsageError(f"ibn has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    share = VARIANTS[variant]["share"] if share is None else share
    first = first or VARIANTS[variant]["first"]
    instance, batch = _widths(channels, share, first)
    if not batch:
        return InstanceNorm(channels)
    return IBN(instance=instance, batch=batch, first=first)


def _widths(channels: int, share: float, first: str) -> tuple[int, int]:
    """Channels of the instance norm and of the batch norm; the first one's are rounded down, as the authors have it."""
    if first not in ("instance", "batch"):
        raise UsageError(f"ibn: first is {first!r}; it must be instance or batch")
    if not 0 < share <= 1:
        raise UsageError(f"ibn: share is {share}; it must be above 0 and at most 1, as 0.5")
    instance = int(channels * share) if first == "instance" else channels - int(channels * (1 - share))
    if instance < 1 or (share < 1 and instance == channels):
        raise UsageError(f"ibn: {channels} channels with a share of {share} leave a norm without channels; give more")
    return instance, channels - instance


class IBN(nn.Module):
    """Instance norm and batch norm side by side; build it with `ibn`.

    Attributes:
        instance: of its share of the channels.
        batch: of the others.
        first: which of them has the first channels, "instance" or "batch".
    """

    def __init__(self, *, instance: int, batch: int, first: First) -> None:
        super().__init__()
        self.instance = InstanceNorm(instance)
        self.batch = nn.BatchNorm2d(batch)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        wide, other = self.instance.num_channels, self.batch.num_features
        front, back = x.split((wide, other) if self.first == "instance" else (other, wide), 1)
        # batch norm is slow on a slice that has gaps between its images: a copy pays
        if self.first == "instance":
            return torch.cat((self.instance(front), self.batch(back.clone())), 1)
        return torch.cat((self.batch(front.clone()), self.instance(back)), 1)

    def extra_repr(self) -> str:
        return f"first={self.first}"


def from_batch_norm(layer: nn.Module, *, share: float = 0.5, first: First = "instance") -> nn.Module:
    """The norm that takes the place of a trained batch norm and keeps what that one has learned.

    Gains and shifts act on normalised maps in both kinds of norm, and all of them are kept. So are the running
    statistics of the channels that stay under batch norm: these compute what they did before. Those of the other
    channels mean nothing any more and are dropped. An activation inside of the layer (timm's norms may have one)
    follows in a sequence.

    Args:
        layer: `nn.BatchNorm2d` or timm's `BatchNormAct2d`; it stays as it is.
        share: of the channels that are normalised image by image, above 0 and up to 1.
        first: which norm has the first channels.

    Raises:
        UsageError: a layer of another kind, or options as in `ibn`.
    """
    if not isinstance(layer, nn.BatchNorm2d):
        raise UsageError(
            f"ibn: from_batch_norm takes a BatchNorm2d and got a {type(layer).__name__}; for other layers, swap in"
            " 'ibn', which starts afresh (SyncBatchNorm: convert the network after the swap)"
        )
    made = ibn(layer.num_features, share=share, first=first)
    like = next((t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), torch.empty(()))
    made.to(like.device, like.dtype).train(layer.training)
    instance, batch = (made, None) if isinstance(made, InstanceNorm) else (made.instance, made.batch)
    width = instance.num_channels
    cut = width if first == "instance" else layer.num_features - width
    mine, other = (slice(cut), slice(cut, None)) if first == "instance" else (slice(cut, None), slice(cut))
    _keep(layer, instance, mine, ("weight", "bias"))
    if batch is not None:
        _keep(layer, batch, other, ("weight", "bias", "running_mean", "running_var"))
        if layer.num_batches_tracked is not None and batch.num_batches_tracked is not None:
            batch.num_batches_tracked.copy_(layer.num_batches_tracked)
        batch.eps, batch.momentum = layer.eps, layer.momentum
    instance.eps = layer.eps
    frozen = layer.weight is not None and not layer.weight.requires_grad
    made.requires_grad_(not frozen)
    after = _after(layer)
    return nn.Sequential(made, *after) if after else made


def _keep(layer: nn.Module, norm: nn.Module, channels: slice, names: Sequence[str]) -> None:
    """Copy what a layer has of some channels."""
    with torch.no_grad():
        for name in names:
            value = getattr(layer, name)
            if value is not None:
                getattr(norm, name).copy_(value[channels])


def _after(layer: nn.BatchNorm2d) -> Sequence[nn.Module]:
    """What a norm of timm's does once it has normalised."""
    parts: list[Any] = [layer.drop, layer.act] if isinstance(layer, BatchNormAct2d) else []
    return [part for part in parts if not isinstance(part, nn.Identity)]


def _in_stages(share: float, stages: str) -> Callable[[nn.Module], None]:
    """First norms of the blocks of some stages."""

    def change(backbone: nn.Module) -> None:
        swap(backbone, f"layer[{stages}].*.bn1", from_batch_norm, share=share, inplace=True)

    return change


def _as_published(kind: Literal["a", "b"]) -> Callable[[nn.Module], None]:
    def change(backbone: nn.Module) -> None:
        from vertebra.backbones.ibn_net import to_ibn

        to_ibn(backbone, kind)

    return change


def _everywhere(backbone: nn.Module) -> None:
    swap(backbone, "BatchNorm2d", from_batch_norm, share=1.0, inplace=True)


_ARMS: Mapping[str, tuple[str, Callable[[nn.Module], None]]] = {
    "batch": ("batch norm throughout", lambda backbone: None),
    "ibn_a": ("half of the first norm of each block, stages 1 and 2 of 3", _as_published("a")),
    "ibn_b": ("after the last addition of stages 1 and 2, and in the stem", _as_published("b")),
    "quarter": ("ibn_a with a quarter", _in_stages(0.25, "12")),
    "most": ("ibn_a with three quarters", _in_stages(0.75, "12")),
    "last_too": ("ibn_a in the last stage too", _in_stages(0.5, "123")),
    "last_only": ("ibn_a in the last stage alone", _in_stages(0.5, "3")),
    "instance": ("instance norm throughout", _everywhere),
}
"""Arm -> what it is, and what it does to a network with batch norm."""

SEVERITY = 4
"""Of the corruptions among the shifts, 1..5."""


def _jitter(images: Tensor) -> Tensor:
    """A quarter turn of the hue, and half as much colour again."""
    return adjust_saturation(adjust_hue(images, 0.25), 1.5)


def _gradient(images: Tensor) -> Tensor:
    """Half of the image gives way to a slope from one colour to another, of its own direction and colours."""
    generator = torch.Generator().manual_seed(0)
    count, channels, height, width = images.shape
    one, other = torch.rand((2, count, channels, 1, 1), generator=generator)
    angle = 2 * torch.pi * torch.rand((count, 1, 1, 1), generator=generator)
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    place = ((angle.sin() * rows + angle.cos() * columns) / 2**0.5 + 1) / 2  # (n, 1, H, W), 0..1
    return (images + one.lerp(other, place)) / 2


def _corrupted(name: str) -> Callable[[Tensor], Tensor]:
    def apply(images: Tensor) -> Tensor:
        from vertebra.probes.corruptions import CORRUPTIONS

        corruption = CORRUPTIONS[name]
        generator = torch.Generator().manual_seed(0)
        return corruption.apply(images, *corruption.parameters(SEVERITY, images.shape[2]), generator=generator)

    return apply


_COLOURS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "brightness": _corrupted("brightness"),
    "contrast": _corrupted("contrast"),
    "jitter": _jitter,
    "grey": lambda images: rgb_to_grayscale(images, 3),
    "inverted": lambda images: 1 - images,
    "gradient": _gradient,
}
"""Shifts of appearance: images (n, 3, H, W) in 0..1 to the same, the same for every arm and seed."""

_SHIFTS = {**_COLOURS, "blur": _corrupted("defocus_blur"), "noise": _corrupted("gaussian_noise")}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: blocks a stage, channels of the first, pixels, images, epochs."""

    blocks: int
    width: int
    size: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(2, 16, 16, 4000, 10), "gpu": _Setting(2, 64, 32, 50_000, 30)}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Networks trained on plain images and tested under shifts of colour: where instance norm is, and how much."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    metrics = {"shifted": "%", "top1": "%"} | dict.fromkeys(_SHIFTS, "%")
    return Effect(
        claim="half instance norm in the early stages keeps accuracy and loses less of it where colours shift",
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="batch",
        metrics=metrics | dict.fromkeys(("divergence_1", "divergence_2", "divergence_3"), ""),
        measure=measure,
        checks=_checks,
        limits=(
            f"a network of {6 * setting.blocks + 2} layers at {setting.size} pixels and {len(train)} images, shifted by"
            " computation: says nothing of the gain on ImageNet, nor of real domains; `shifted` is the mean over"
            f" {', '.join(_COLOURS)}, and blur and noise are no shifts of colour"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.backbones.ibn_net import SmallResNet
    from vertebra.config import Plan, Views
    from vertebra.data.loader import Batches

    torch.manual_seed(seed)
    preprocess = Preprocess((setting.size, setting.size), (0.5,) * 3, (0.25,) * 3, "bilinear")
    backbone = SmallResNet(preprocess=preprocess, blocks=setting.blocks, width=setting.width)
    _ARMS[arm][1](backbone)
    views = Views(scale=(0.6, 1.0))
    plan = Plan(
        epochs=setting.epochs, batch=64, optimizer="sgd", lr=0.05, weight_decay=5e-4, clip=None, views=views, seed=seed
    )
    model = trained(backbone, train, test, plan).model.eval()
    batches = Batches(test, preprocess, views=None, batch=256, seed=seed, workers=0)
    seen = list(batches.epoch(0, 0))
    images, targets = torch.cat([batch.images for batch in seen]), torch.cat([batch.targets for batch in seen])
    return _judged(model, images, targets)


def _judged(model: Any, images: Tensor, targets: Tensor) -> Mapping[str, float]:
    """Accuracy on images as they are and under each shift, and how far the features of both are apart."""
    preprocess = model.backbone.preprocess
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    seen = (images * deviation + mean).clamp(0, 1)  # rounding must not leave the range: hues of it are undefined
    plain, clean = _answers(model, images)
    found, apart = {"top1": _share(plain, targets)}, []
    for name, shift in _SHIFTS.items():
        shifted = (shift(seen).clamp(0, 1) - mean) / deviation
        answers, responses = _answers(model, shifted)
        found[name] = _share(answers, targets)
        if name in _COLOURS:
            apart.append([divergence(one, other) for one, other in zip(clean, responses, strict=True)])
    found["shifted"] = sum(found[name] for name in _COLOURS) / len(_COLOURS)
    stages = torch.tensor(apart).mean(0).tolist()
    return found | {f"divergence_{number}": value for number, value in enumerate(stages, start=1)}


def _answers(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Classes (n,), and each stage's responses (n, C): the means of its maps."""
    classes, stages = [], []
    with torch.inference_mode():
        for part in images.split(256):
            features = model.backbone(part.to(next(model.parameters()).device))
            classes.append(model.head(features.pooled).argmax(1).cpu())
            stages.append([level.mean((2, 3)).cpu() for level in features.pyramid])
    return torch.cat(classes), [torch.cat(stage) for stage in zip(*stages, strict=True)]


def _share(answers: Tensor, targets: Tensor) -> float:
    return 100 * (answers == targets).double().mean().item()


def divergence(one: Tensor, other: Tensor) -> float:
    """How far the responses to two sets of images are apart (section 4.3 of the paper).

    A channel's responses are taken for a normal distribution; the symmetric Kullback-Leibler divergence of both sets
    is averaged over channels, of which those that never respond are left out.

    Args:
        one: (n, C) means of a layer's maps over space.
        other: (m, C) likewise, of the other images.
    """
    one, other = one.double(), other.double()
    first, second = one.var(0, correction=0), other.var(0, correction=0)
    alive = (first > 1e-12) & (second > 1e-12)
    square = (one.mean(0) - other.mean(0)).square()
    both = (first + square) / (2 * second) + (second + square) / (2 * first) - 1
    return both[alive].mean().item()


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    shifted = {arm: measured.mean(arm, "shifted") for arm in measured.values}
    gains = {arm: (shifted[arm] - shifted["batch"], mean[arm] - mean["batch"]) for arm in ("ibn_a", "ibn_b")}
    drops = {name: _drop(measured, "batch", name) - _drop(measured, "ibn_a", name) for name in _COLOURS}
    apart = {n: [measured.mean(arm, f"divergence_{n}") for arm in ("ibn_a", "batch")] for n in (1, 2)}
    return [
        Check(
            "IBN-a or IBN-b gains at least 1.0 point under shifted colours and loses at most 0.5 on plain images",
            any(target >= 1.0 and source >= -0.5 for target, source in gains.values()),
            "; ".join(f"{arm}: {target:+.2f} shifted, {source:+.2f} plain" for arm, (target, source) in gains.items()),
        ),
        Check(
            "IBN-a loses less than batch norm under every shift of colour",
            min(drops.values()) > 0,
            ", ".join(f"{name} {points:+.2f}" for name, points in drops.items()) + " points kept",
        ),
        Check(
            "instance norm throughout loses on plain images",
            mean["instance"] < mean["batch"],
            f"{mean['instance'] - mean['batch']:+.2f} points",
        ),
        Check(
            "features of plain and shifted images are nearer with IBN-a after stages 1 and 2",
            all(ours < theirs for ours, theirs in apart.values()),
            ", ".join(f"stage {n}: {ours:.3g} against {theirs:.3g}" for n, (ours, theirs) in apart.items()),
        ),
    ]


def _drop(measured: Measured, arm: str, shift: str) -> float:
    """Points that a shift takes of an arm's accuracy."""
    return measured.mean(arm, "top1") - measured.mean(arm, shift)
