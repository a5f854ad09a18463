"""The deep networks of ReZero's effect: fully connected, convolutional, and of transformer layers.

No page: each is a backbone whose only feature is the pooled vector, in the four forms that the effect compares.
"""

from collections.abc import Mapping
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vertebra.arms import Trained, fitted
from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.blocks.rezero import EncoderLayer, Residual, jacobian_spectrum
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Batch, Features, Preprocess, Progress
from vertebra.data.dataset import Split
from vertebra.errors import DivergedError
from vertebra.methods.supervised import Supervised
from vertebra.surgery.rezero import rezero as gated
from vertebra.tasks.classify import classify

Form = Literal["plain", "residual", "norm", "rezero"]


class Deep(Backbone):
    """An input layer and many layers of one width, on vectors or on tokens; their mean is pooled."""

    def __init__(self, stem: nn.Module, layers: list[nn.Module], width: int, size: int) -> None:
        super().__init__()
        self.stem, self.layers = stem, nn.Sequential(*layers)
        self.levels, self.width = (), width
        self.preprocess = Preprocess((size, size), (0.5,) * 3, (0.25,) * 3, "bilinear")

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to a pooled vector; there are no maps."""
        x = self.layers(self.stem(images))
        return Features((), x if x.ndim == 2 else x.mean(1))

    def trunk(self) -> list[nn.Module]:
        """The stem and the layers."""
        return [self.stem, *self.layers]


def connected(form: Form, *, depth: int, width: int, size: int) -> Deep:
    """Layers ReLU(W x) of one width; Kaiming's input layer and Xavier's hidden ones, as in the paper's examples."""
    inputs = nn.Linear(3 * size * size, width)
    nn.init.kaiming_normal_(inputs.weight)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.xavier_normal_(linear.weight, gain=0.5 if form == "residual" else 2**0.5)
        nn.init.zeros_(linear.bias)
        branch = nn.Sequential(linear, nn.ReLU())
        wrapped: nn.Module = (
            branch if form == "plain" else Residual(branch, gate="rezero" if form == "rezero" else "one")
        )
        layers += [wrapped, nn.LayerNorm(width)] if form == "norm" else [wrapped]
    return Deep(nn.Sequential(nn.Flatten(), inputs, nn.ReLU()), layers, width, size)


class Attended(nn.Module):
    """A transformer layer without the gate: norms behind the sums ("post"), before the sublayers ("pre"), or none."""

    def __init__(self, dim: int, heads: int, hidden: int, norms: Literal["post", "pre", "none"]) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.before = nn.ModuleList(nn.LayerNorm(dim) if norms == "pre" else nn.Identity() for _ in range(2))
        self.behind = nn.ModuleList(nn.LayerNorm(dim) if norms == "post" else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to the same."""
        seen = self.before[0](x)
        x = self.behind[0](x + self.attention(seen, seen, seen, need_weights=False)[0])
        return self.behind[1](x + self.mlp(self.before[1](x)))


class Patches(nn.Module):
    """Image to tokens of 4 x 4 pixels with learned positions: (B, 3, H, W) to (B, N, dim)."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, dim, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2, dim))

    def forward(self, images: Tensor) -> Tensor:
        """The patches, row by row."""
        return self.project(images).flatten(2).mT + self.positions


def attending(form: Form, *, layers: int, dim: int, size: int) -> Deep:
    """A transformer of so many layers on the patches of an image."""
    norms: Literal["post", "none"] = "post" if form == "norm" else "none"

    def layer() -> nn.Module:
        if form == "rezero":
            return EncoderLayer(dim, heads=4, hidden=2 * dim, dropout=0.0, batch_first=True)
        return Attended(dim, 4, 2 * dim, norms)

    return Deep(Patches(dim, size), [layer() for _ in range(layers)], dim, size)


class Counting(Supervised):
    """Supervised training that notes the share of right answers of every batch in `right`."""

    right: list[float]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The task model's losses."""
        outputs = self.task_model(batch.images)
        self.right.append(float((outputs["logits"].argmax(1) == batch.targets).float().mean()))
        return self.task_model.losses(outputs, batch.targets)


def run(backbone: Backbone, train: Split, test: Split, plan: Plan) -> tuple[Trained, list[float]]:
    """Train a classifier; returns it, and the share of right answers batch by batch."""
    model = classify(backbone, train.classes)
    method = Counting(model)
    method.right = []
    return fitted(model, method, train, test, plan), method.right


def adagrad(seed: int, *, epochs: int, lr: float = 0.01, batch: int = 100) -> Plan:
    """The paper's recipe for fully connected nets: Adagrad at a constant rate, no warm-up, no views."""
    return Plan(
        epochs=epochs,
        batch=batch,
        optimizer="adagrad",
        lr=lr,
        weight_decay=0.0,
        schedule="constant",
        warmup_epochs=0.0,
        clip=None,
        views=Views(scale=(1.0, 1.0), flip=False),
        seed=seed,
    )


def fc_epochs(form: Form, seed: int, train: Split, test: Split, size: int, epochs: int) -> float:
    """Epochs until the mean loss of 64 layers of width 256 is below 0.8 of chance; never is one more than there are."""
    network = connected(form, depth=64, width=256, size=size)
    rows = _rows(network, train, test, adagrad(seed, epochs=epochs))
    level = 0.8 * log(len(train.classes))
    return next((float(row["epoch"]) for row in rows if row["loss"] < level), epochs + 1.0)


def deep_loss(form: Form, seed: int, train: Split, test: Split, size: int, depth: int) -> float:
    """Mean loss of the third epoch of a very deep net of width 64."""
    network = connected(form, depth=depth, width=64, size=size)
    return _last_loss(network, train, test, adagrad(seed, epochs=3, lr=0.003))


def attention_loss(form: Form, seed: int, train: Split, test: Split, size: int, layers: int) -> float:
    """Mean loss of the second epoch of a transformer of so many layers of width 32, without warm-up."""
    network = attending(form, layers=layers, dim=32, size=size)
    return _last_loss(network, train, test, adagrad(seed, epochs=2, batch=64))


def _rows(network: Deep, train: Split, test: Split, plan: Plan) -> list[dict[str, Any]]:
    """The epochs of a training; none where the loss stopped being finite, which ends it."""
    try:
        return run(network, train, test, plan)[0].history.rows
    except DivergedError:
        return []


def _last_loss(network: Deep, train: Split, test: Split, plan: Plan) -> float:
    """Mean loss of the last epoch; that of chance where it stopped being finite."""
    rows = _rows(network, train, test, plan)
    return float(rows[-1]["loss"]) if rows else log(len(train.classes))


def cnn_steps(form: Form, seed: int, train: Split, test: Split, size: int, width: int, steps: int) -> float:
    """Steps of ResNet-56 until half of 10 batches in a row are right; one more than there are for never."""
    backbone: Backbone = cifar_resnet("56", width=width, image_size=size)
    if form == "rezero":
        gated(backbone, activation="inside", inplace=True)
    plan = Plan(
        epochs=1000,
        steps=steps,
        batch=64,
        optimizer="sgd",
        lr=0.1,
        weight_decay=1e-4,
        schedule="constant",
        warmup_epochs=0.0,
        clip=None,
        views=Views(scale=(1.0, 1.0)),
        seed=seed,
    )
    _, right = run(backbone, train, test, plan)
    means = [sum(right[i : i + 10]) / 10 for i in range(len(right) - 9)]
    return next((float(i + 10) for i, mean in enumerate(means) if mean >= 0.5), steps + 1.0)


def spread(form: Form, layers: int) -> float:
    """Standard deviation of the logarithms of the Jacobian's singular values, encoders of width 16 on 4 tokens.

    ReZero with its scalars at 0.1; the normalised form is the better one of norms before and behind.
    """
    x = torch.randn(1, 4, 16)

    def of(network: nn.Module) -> float:
        values = jacobian_spectrum(network.double().eval(), x.double())
        return float(values.clamp(min=1e-30).log().std())

    if form == "rezero":
        stack = [EncoderLayer(16, heads=2, hidden=64, batch_first=True) for _ in range(layers)]
        for layer in stack:
            nn.init.constant_(layer.resweight, 0.1)
        return of(nn.Sequential(*stack))
    kinds: tuple[Literal["post", "pre", "none"], ...] = ("post", "pre") if form == "norm" else ("none",)
    return min(of(nn.Sequential(*(Attended(16, 2, 64, norms) for _ in range(layers)))) for norms in kinds)


def measured(form: Form, seed: int, train: Split, test: Split, setting: Mapping[str, int]) -> dict[str, float]:
    """All of the effect's figures of one form; NaN where a form has no such network."""
    size, nan = setting["size"], float("nan")
    common = (form, seed, train, test, size)
    torch.manual_seed(seed)
    found = {"fc_epochs": fc_epochs(*common, setting["epochs"])}
    torch.manual_seed(seed)
    found["deep_loss"] = deep_loss(*common, setting["depth"])
    torch.manual_seed(seed)
    convolutional = form in ("residual", "rezero")
    found["cnn_steps"] = cnn_steps(*common, setting["width"], setting["steps"]) if convolutional else nan
    torch.manual_seed(seed)
    found["attention_loss"] = nan if form == "plain" else attention_loss(*common, setting["layers"])
    torch.manual_seed(seed)
    spreads = {f"spread_{layers}": nan if form == "plain" else spread(form, layers) for layers in (12, 64)}
    return found | spreads
