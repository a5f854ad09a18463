"""The networks of the effect of a priori compression: what they are, how they learn, how far off they are.

A generator of boundary data maps source, speed and kind of boundary, in space and time, to the waves on the boundary of
a zone; finite elements in the zone alone turn these into the fields inside.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation has
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vertebra.config import Plan, Views
from vertebra.contracts import Batch, Method, Progress
from vertebra.data.dataset import Split
from vertebra.errors import DivergedError
from vertebra.studies.wave import Draws, Task, apart, border, draws, sub_model, trajectories
from vertebra.surgery.a_priori import Start, a_priori, weights_of
from vertebra.training.loop import fit


@dataclass(frozen=True)
class Setting:
    """What a scale of the effect simulates and trains.

    Attributes:
        task: the simulation.
        train: trajectories to learn from; `few` arms take a quarter of them and twice the epochs.
        test: further ones.
        width: channels of the dense network.
        epochs: over the trajectories.
        images: of the control.
        rounds: epochs of the control.
    """

    task: Task = field(default_factory=Task)
    train: int = 200
    test: int = 50
    width: int = 16
    epochs: int = 32
    images: int = 1500
    rounds: int = 12


SETTINGS = {
    "toy": Setting(),
    "gpu": Setting(Task(nodes=64, zone=32, saved=64), 2000, 200, width=32, epochs=40, images=50_000, rounds=30),
}


RATES = (2e-3, 5e-3, 1e-2, 2e-2)
"""Each arm takes the one that is best on further draws after a quarter of its epochs."""
HELD = 20
"""Trajectories to choose the rate by."""


class Generator(nn.Module):
    """Inputs (B, 3, T, n, n) to fields of the middle (B, T, n / 2, n / 2); T and n are multiples of 4.

    Two convolutions of stride 2, four with shortcuts, the middle cut out, and two that build the fields again, the last
    one eight values a place.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = (width + 1) // 2
        self.encoder = nn.ModuleList(
            nn.Conv3d(*channels, 3, stride=2, padding=1) for channels in ((3, half), (half, width))
        )
        self.middle = nn.ModuleList(nn.Conv3d(width, width, 3, padding=1) for _ in range(4))
        self.decoder = nn.Conv3d(width, width, 3, padding=1)
        self.fields = nn.Conv3d(width, 8, 3, padding=1)
        for conv in (*self.encoder, *self.middle, self.decoder, self.fields):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type] # the arms start alike

    def trunk(self) -> Sequence[nn.Module]:
        """Parts in the order of the signal."""
        return [*self.encoder, *self.middle, self.decoder, self.fields]

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs to fields, in units of their standard deviation."""
        x = inputs
        for conv in self.encoder:
            x = F.silu(conv(x))
        for conv in self.middle:
            x = x + F.silu(conv(x))
        quarter = x.shape[-1] // 4
        x = x[..., quarter:-quarter, quarter:-quarter]
        x = F.silu(self.decoder(F.interpolate(x, scale_factor=2.0)))
        return _spread(self.fields(x))


def _spread(x: Tensor) -> Tensor:
    """Eight channels (B, 8, T, H, W) to one of twice the sides, (B, 2T, 2H, 2W)."""
    batch, _, steps, rows, columns = x.shape
    x = x.reshape(batch, 2, 2, 2, steps, rows, columns).permute(0, 4, 1, 5, 2, 6, 3)
    return x.reshape(batch, 2 * steps, 2 * rows, 2 * columns)


class _Forecast(Method):
    """Mean squared error on the boundary of the zone."""

    edge: Tensor

    def __init__(self, network: Generator, edge: Tensor) -> None:
        super().__init__()
        # the loop asks a backbone for its trunk alone; the contract of images has no place for time
        self.backbone = network  # type: ignore[assignment]
        self.register_buffer("edge", edge)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        fields: Tensor = self.backbone(batch.images)  # type: ignore[assignment]
        return {"error": F.mse_loss(fields[:, :, self.edge], batch.targets)}


@dataclass(frozen=True)
class _Batches:
    """Trajectories in an order that depends on seed and epoch."""

    inputs: Tensor
    rings: Tensor
    seed: int
    batch: int = 5

    def __len__(self) -> int:
        return len(self.inputs) // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start` on."""
        order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self.inputs)))
        for ids in order.split(self.batch)[start : len(self)]:
            yield Batch(self.inputs[ids], self.rings[ids], ids)


@dataclass(frozen=True)
class _Part:
    """Trajectories as tensors.

    Attributes:
        drawn: their parameters.
        inputs: (N, 3, T, n, n).
        zone: (N, T, z, z) in units of the training set's standard deviation.
    """

    drawn: Draws
    inputs: Tensor
    zone: Tensor

    def first(self, count: int) -> "_Part":
        """The first ones."""
        drawn = Draws(*(getattr(self.drawn, name)[:count] for name in Draws.__dataclass_fields__))
        return _Part(drawn, self.inputs[:count], self.zone[:count])


def data(setting: Setting) -> tuple[_Part, _Part, _Part]:
    """Trajectories to train on, to test on and to choose rates by, the same for all arms and seeds."""
    counts = (setting.train, setting.test, HELD)
    found = [trajectories(setting.task, draws(n, seed=seed)) for seed, n in enumerate(counts)]
    unit = found[0].zone[:, :, border(setting.task.zone)].std()
    train, test, held = (
        _Part(f.draws, torch.from_numpy(f.inputs), torch.from_numpy(f.zone / unit).float()) for f in found
    )
    return train, test, held


def prepare(seed: int, folder: Path, setting: Setting) -> None:
    """Train the dense network of a seed, which two arms begin with."""
    learn, _, held = data(setting)
    plan = chosen("dense", seed, learn, held, setting, setting.epochs)
    network = built("dense", seed, setting)
    train(network, learn, setting, plan)
    save_file(network.state_dict(), folder / "dense.safetensors", {"rate": str(plan.lr)})


def chosen(arm: str, seed: int, learn: _Part, held: _Part, setting: Setting, epochs: int) -> Plan:
    """The plan of an arm: at each of `RATES` it is trained for a quarter of the epochs, and the best one is taken."""
    short = max(1, epochs // 4)
    errors = {}
    for rate in RATES:
        plan = Plan(epochs=short, lr=rate, weight_decay=0.0, evaluate_every=short, seed=seed, workers=0)
        network = built(arm, seed, setting)
        try:
            train(network, learn, setting, plan)
        except DivergedError:
            continue
        errors[rate] = off(network, held, setting)["error"]
    if not errors:
        raise DivergedError(f"a_priori, {arm}: no rate of {RATES} trains it; give smaller ones")
    best = min(errors, key=lambda rate: errors[rate])
    return Plan(epochs=epochs, lr=best, weight_decay=0.0, evaluate_every=epochs, seed=seed, workers=0)


def train(network: Generator, part: _Part, setting: Setting, plan: Plan) -> None:
    """Train a generator in place; it is back on the CPU and in evaluation mode afterwards."""
    edge = torch.from_numpy(border(setting.task.zone))
    fit(_Forecast(network, edge), _Batches(part.inputs, part.zone[:, :, edge], plan.seed), plan)
    network.cpu()


def forecast(arm: str, seed: int, folder: Path, setting: Setting) -> Mapping[str, float]:
    """One arm on waves: trained, tested, and its zone simulated from what it forecasts."""
    learn, test, held = data(setting)
    name, cut, epochs = arm.removesuffix("_few"), float("nan"), setting.epochs
    if arm.endswith("_few"):
        learn, epochs = learn.first(len(learn.inputs) // 4), 2 * epochs
    network = built(name, seed, setting)
    if arm in ("dense", "post_hoc"):
        rate = load_dense(network, folder.parent / f"prepared-{seed}" / "dense.safetensors")
        if arm == "post_hoc":
            network = _compressed(network, setting, "cp_r1", "fitted")
            cut, short = off(network, test, setting)["error"], max(1, epochs // 4)
            plan = Plan(epochs=short, lr=rate / 2, weight_decay=0.0, evaluate_every=short, seed=seed, workers=0)
            train(network, learn, setting, plan)
    else:
        plan = chosen(name, seed, learn, held, setting, epochs)
        rate = plan.lr
        train(network, learn, setting, plan)
    found = off(network, test, setting)
    seen = off(network, learn, setting)["error"]
    save_file(network.state_dict(), folder / "network.safetensors")
    return {
        **found,
        "gap": found["error"] - seen,
        "cut": cut,
        "rate": rate,
        "conv_params": float(weights_of(network)),
        "checkpoint_kb": (folder / "network.safetensors").stat().st_size / 1024,
        "training_state_kb": 3 * sum(p.numel() * p.element_size() for p in network.parameters()) / 1024,
    }


def load_dense(network: Generator, file: Path) -> float:
    """Put the dense network's weights into `network`; returns the rate that they were learned with."""
    network.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        return float(opened.metadata()["rate"])


def built(arm: str, seed: int, setting: Setting) -> Generator:
    """The network of an arm with the weights that its training begins with."""
    torch.manual_seed(seed)
    network = Generator(setting.width)
    if arm in ("cp_r1", "cp_r2"):
        return _compressed(network, setting, arm, "fresh")
    if arm == "shrunk":
        wanted = weights_of(_compressed(network, setting, "cp_r1", "fresh"))
        widths = range(1, setting.width)
        torch.manual_seed(seed)
        return Generator(min(widths, key=lambda width: abs(weights_of(_meta(width)) - wanted)))
    return network


def _meta(width: int) -> Generator:
    with torch.device("meta"):
        return Generator(width)


def _compressed(network: Generator, setting: Setting, variant: str, start: Start) -> Generator:
    """A copy with one-way kernels in place of all."""
    task = setting.task
    changed = a_priori(network, variant, start=start, images=(3, task.saved, task.nodes, task.nodes)).model
    assert isinstance(changed, Generator)
    return changed


@torch.inference_mode()
def off(network: Generator, part: _Part, setting: Setting) -> dict[str, float]:
    """How far forecasts are off, in percent of the truth's norm: on the boundary of the zone, and inside of it.

    Means over trajectories. The truth inside is that of the whole square's simulation.
    """
    network.eval()
    edge = border(setting.task.zone)
    fields = torch.cat([network(inputs) for inputs in part.inputs.split(10)])
    ring, truth = fields.numpy()[:, :, edge].astype(float), part.zone.numpy().astype(float)
    inside = sub_model(setting.task, part.drawn, ring)[:, :, ~edge]
    return {
        "error": 100 * float(np.mean([apart(*pair) for pair in zip(ring, truth[:, :, edge], strict=True)])),
        "interior": 100 * float(np.mean([apart(*pair) for pair in zip(inside, truth[:, :, ~edge], strict=True)])),
    }


def classified(arm: str, seed: int, train: Split, test: Split, setting: Setting) -> Mapping[str, float]:
    """One arm of the control: ResNet-8 on images of 16 pixels, dense or with one term a kernel."""
    from vertebra.arms import trained
    from vertebra.backbones.cifar_resnet import cifar_resnet

    torch.manual_seed(seed)
    backbone = cifar_resnet("nano", image_size=16)
    if arm == "resnet8_r1":
        a_priori(backbone, inplace=True)
    plan = Plan(epochs=setting.rounds, lr=3e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    return {"top1": trained(backbone, train, test, plan).scores["top1"], "conv_params": float(weights_of(backbone))}
