"""Terminator's claims at a small scale: epochs to fit, features of zero mean, the slow neural loss, and its batches.

All arms have as many parameters and one plan. Training accuracy is counted on the way, of the views as they are
trained on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vertebra.backbones.cifar_resnet import CifarResNet, cifar_resnet
from vertebra.backbones.terminator import PAPER, SFNE, Terminator, slow_neural_loss, terminator
from vertebra.contracts import Backbone, Batch, Check, Effect, Measured, Method, Progress, TaskModel
from vertebra.data.dataset import Dataset, Split
from vertebra.tasks.classify import classify

FIT = 0.6
"""Training accuracy whose epoch is noted."""
SMOOTHING, BATCH, ALONE = 0.1, 64, 128


@dataclass(frozen=True)
class Setting:
    """What a scale trains: the network, pixels, images, epochs."""

    network: Mapping[str, Any]
    size: int
    images: int
    epochs: int


_SMALL = {
    "dims": (12, 24, 48),
    "layers": (2, 1, 1),
    "earlier": ((), (), (0,)),
    "slow_dim": 32,
    "local_dim": 16,
}
SETTINGS = {"toy": Setting(_SMALL, 16, 1000, 25), "gpu": Setting({}, 32, 50_000, 20)}
ARMS = {
    "plain": "the residual network without its shortcuts",
    "resnet": "ResNet-20's layout, as many parameters",
    "terminator": "with the slow neural loss",
    "no_slow_loss": "without it",
}


def compared(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The effect of the page."""
    from vertebra.arms import parts

    setting = SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return measured(arm, seed, setting, train, test)

    return Effect(
        claim="without residuals and with no more parameters Terminator fits in fewer epochs, with zero-mean features",
        arms={**ARMS, **({"resnet20": "ResNet-20 as it is"} if scale == "gpu" else {})},
        baseline="plain",
        metrics={
            "top1": "%",
            "fit": "epochs",
            "params": "",
            "slow": "%",
            "offset": "",
            "offset_norm": "",
            "faithful": "%",
            "flips": "%",
            "flips_faithful": "%",
            "seconds": "s",
        },
        measure=measure,
        checks=_checks if scale == "toy" else _checks_gpu,
        limits=(
            f"{len(train)} images at {setting.size} pixels, {setting.epochs} epochs, AdamW and one rate for all arms"
            " where the paper has 100 epochs of Kar3: says who fits sooner here, and nothing about 95 % on CIFAR-10"
        ),
        data=words,
    )


class Counted(Method):
    """Supervised training that counts what it gets right, epoch by epoch, with or without the slow neural loss."""

    def __init__(self, task_model: TaskModel, *, slow: bool) -> None:
        super().__init__()
        self.task_model, self.slow = task_model, slow
        self.right: dict[int, list[float]] = {}

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # a module registered twice would be saved twice
        return self.task_model.backbone

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The losses of the task, and `slow`."""
        outputs = self.task_model(batch.images)
        hits = (outputs["logits"].argmax(1) == batch.targets).float().mean().item()
        self.right.setdefault(progress.epoch, []).append(hits)
        losses = self.task_model.losses(outputs, batch.targets)
        if self.slow:
            assert isinstance(self.task_model.backbone, Terminator)
            losses = {**losses, "slow": slow_neural_loss(self.task_model.backbone)}
        return losses

    def fit(self) -> int:
        """The first epoch, from 1, of which `FIT` was right; one more than there were where none was."""
        reached = [epoch for epoch, hits in self.right.items() if sum(hits) / len(hits) >= FIT]
        return min(reached, default=len(self.right)) + 1


def measured(arm: str, seed: int, setting: Setting, train: Split, test: Split) -> Mapping[str, float]:
    """One cell: what an arm gives with a seed."""
    from vertebra.arms import fitted
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = arm_of(arm, setting)
    method = Counted(classify(backbone, train.classes, label_smoothing=SMOOTHING), slow=arm == "terminator")
    plan = Plan(epochs=setting.epochs, batch=BATCH, lr=2e-3, views=Views(scale=(1.0, 1.0)), seed=seed)
    scores = fitted(method.task_model, method, train, test, plan).scores
    found = {"top1": scores["top1"], "fit": float(method.fit()), "params": float(_size(backbone))}
    found |= {"slow": _slow_share(backbone), "seconds": scores["seconds"]}
    return {**found, **_judged(method.task_model, test, setting)}


def arm_of(arm: str, setting: Setting) -> Backbone:
    """The backbone of an arm; the others have the width that gives them as many parameters as Terminator."""
    if arm in ("terminator", "no_slow_loss"):
        return terminator("cifar10", image_size=setting.size, **setting.network)
    if arm == "resnet20":
        return cifar_resnet("20", image_size=setting.size)
    with torch.device("meta"):  # parameters grow as the square of the width
        ours = _size(arm_of("terminator", setting))
        width = round(16 * (ours / _size(cifar_resnet("20"))) ** 0.5)
    network = cifar_resnet("20", width=width, image_size=setting.size)
    return without_shortcuts(network) if arm == "plain" else network


def without_shortcuts(network: CifarResNet) -> CifarResNet:
    """The same layers, each branch alone."""
    pairs = [(block.branch, block.activation) for block in network.blocks]
    network.blocks = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)  # type: ignore[arg-type]
    return network


def _size(backbone: nn.Module) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def _slow_share(backbone: Backbone) -> float:
    """Percent of the parameters that are slow networks'."""
    from vertebra.blocks.hyper_zzw import ContextSlowNet, SlowNet

    slow = {
        id(p): p.numel() for m in backbone.modules() if isinstance(m, SlowNet | ContextSlowNet) for p in m.parameters()
    }
    return 100 * sum(slow.values()) / _size(backbone)


def _judged(model: TaskModel, test: Split, setting: Setting) -> Mapping[str, float]:
    """Means of features, and what the batch does to predictions in both modes of evaluation."""
    from vertebra.data.loader import Batches
    from vertebra.training.loop import evaluate

    backbone, names = model.backbone, ("offset", "offset_norm", "faithful", "flips", "flips_faithful")
    if not isinstance(backbone, Terminator):
        return dict.fromkeys(names, 0.0)
    batches = Batches(test, backbone.preprocess, views=None, batch=BATCH, seed=0, workers=0)
    images = torch.cat([batch.images for batch, _ in zip(batches.epoch(0), range(ALONE // BATCH), strict=False)])
    model.eval()
    with watched(backbone) as offsets, torch.inference_mode():
        backbone(images)
    twin = faithful(model, setting)
    values = (*offsets, evaluate(twin, batches)["top1"], flips(model, images), flips(twin, images))
    return dict(zip(names, values, strict=True))


@contextmanager
def watched(backbone: Terminator) -> Iterator[list[float]]:
    """While this lasts a forward pass leaves the largest |mean| / deviation of any block: of outputs, of norms."""
    found: list[float] = []
    seen: dict[str, list[float]] = {"out": [], "norm": []}

    def note(kind: str) -> Callable[..., None]:
        return lambda module, args, x: seen[kind].append(float(x.mean().abs() / x.std()))

    blocks = [block for block in backbone.blocks if isinstance(block, SFNE)]
    hooks = [block.register_forward_hook(note("out")) for block in blocks]
    hooks += [block.norm.register_forward_hook(note("norm")) for block in blocks]
    try:
        yield found
    finally:
        found.extend(max(values) for values in seen.values())
        for hook in hooks:
            hook.remove()


def faithful(model: TaskModel, setting: Setting) -> TaskModel:
    """The same weights, with the batch's own statistics and context in evaluation."""
    backbone = terminator("cifar10", image_size=setting.size, faithful=True, **setting.network)
    twin = classify(backbone, model.classes)
    wanted = twin.state_dict()
    twin.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in wanted})
    return twin.eval()


def flips(model: TaskModel, images: Tensor) -> float:
    """Percent of images whose class is another one alone than among 63 others."""
    with torch.inference_mode():
        together = torch.cat([model(part)["logits"].argmax(1) for part in images.split(BATCH)])
        alone = torch.cat([model(image)["logits"].argmax(1) for image in images.split(1)])
    return 100 * float((together != alone).float().mean())


def _checks(found: Measured) -> Sequence[Check]:
    def mean(metric: str) -> dict[str, float]:
        return {arm: found.mean(arm, metric) for arm in found.values}

    fit, top1, params = mean("fit"), mean("top1"), mean("params")
    accuracies, epochs = (", ".join(f"{arm} {v:.1f}" for arm, v in values.items()) for values in (top1, fit))
    shares = {arm: params[arm] / params["terminator"] - 1 for arm in ("plain", "resnet")}
    offset, inner = found.mean("terminator", "offset"), found.mean("terminator", "offset_norm")
    stored, batched = found.mean("terminator", "flips"), found.mean("terminator", "flips_faithful")
    return [
        Check(
            f"Terminator has {100 * FIT:.0f} % of its training images right in fewer epochs than the plain network",
            fit["terminator"] < fit["plain"],
            f"epochs: {epochs}",
        ),
        Check(
            "the outputs of its blocks have means below 0.05 deviations",
            offset < 0.05,
            f"{offset:.3f} at most; {inner:.3f} before the activation",
        ),
        Check(
            "the slow neural loss costs no accuracy",
            top1["terminator"] >= top1["no_slow_loss"],
            f"test accuracy: {accuracies}",
        ),
        Check(
            "predictions alone and in a batch differ in the faithful mode and not by default",
            stored == 0 < batched,
            f"{stored:.2f} % and {batched:.2f} %; accuracy {top1['terminator']:.2f} % by default and"
            f" {found.mean('terminator', 'faithful'):.2f} % with the batch's statistics",
        ),
        Check(
            "all arms have as many parameters within 5 %",
            max(abs(share) for share in shares.values()) <= 0.05,
            f"{', '.join(f'{arm} {100 * share:+.1f} %' for arm, share in shares.items())};"
            f" slow networks are {found.mean('terminator', 'slow'):.1f} % of Terminator's",
        ),
    ]


def _checks_gpu(found: Measured) -> Sequence[Check]:
    top1 = found.mean("terminator", "top1")
    words = f"{top1:.2f} %; ResNet-20 {found.mean('resnet20', 'top1'):.2f} %"
    return [*_checks(found), Check("Terminator has at least 85 %", top1 >= 85, words)]
