"""The effect's work: small nets on images, their receptive fields, and the same class on generated tones and series."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vertebra.arms import trained
from vertebra.backbones.unireplknet import unireplknet
from vertebra.blocks.modality_maps import SeriesMap, mel_map, standardised
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone
from vertebra.training.cost import count

if TYPE_CHECKING:
    from vertebra.data.dataset import Split


@dataclass(frozen=True)
class Setting:
    """What a scale trains and measures.

    Attributes:
        dims: channels of the four stages, of every arm.
        depths: blocks of the four stages.
        images: to train on.
        held: images to test on.
        size: of the images in pixels.
        epochs: over the images.
        field: pixels that fields after training are measured at.
        signals: tones, and windows of series, to train on.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    images: int
    held: int
    size: int
    epochs: int
    field: int
    signals: int


SETTINGS = {
    "toy": Setting((12, 24, 48, 96), (1, 2, 2, 1), 2000, 4000, 32, 8, 96, 800),
    "gpu": Setting((24, 48, 96, 192), (2, 2, 6, 2), 20_000, 10_000, 48, 15, 144, 6000),
}
KERNELS: Mapping[str, tuple[Any, ...]] = {"small": (3, 3, 3, 3), "large": (13, 13, 13, 13)}
MIXED = (3, 13, (13, 3), 13)
BRANCHES = {"plain": "none", "parallel": "small"}
SHARE, NATIVE = 0.99, 224
"""Of the gradient that a field holds; pixels of the fields at the start."""
LAYER_SCALE = 0.1
"""Of all arms: 1e-6 needs longer training than this to be left."""


def measured(arm: str, seed: int, train: "Split", test: "Split", setting: Setting) -> Mapping[str, float]:
    """Metrics of an arm and a seed."""
    torch.manual_seed(seed)
    if arm == "signals":
        return {**_tones(seed, setting.signals), **_forecast(seed, setting.signals)}
    backbone = network(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    cost = count(backbone)
    found = {"top1": scores["top1"], "seconds": scores["seconds"], "macs": cost.macs / 1e6, "params": cost.params / 1e6}
    if arm in ("mixed", "convnext"):
        found["field"], found["half"] = fields(backbone.eval(), photos(test, 48, setting.field, backbone))
        found["field_start"], found["half_start"] = fields(fresh(arm, test), photos(test, 8, NATIVE, backbone))
    return found


def network(arm: str, setting: Setting) -> Backbone:
    """The small net of an arm; all have the same widths, depths and strides."""
    if arm == "convnext":
        from vertebra.spec import Spec

        inside = {"dims": setting.dims, "depths": setting.depths, "patch_size": 2, "ls_init_value": LAYER_SCALE}
        options = {"weights": "random", "image_size": setting.size, "network": inside}
        return Spec("timm/convnext_atto", options).build()
    return unireplknet(
        "nano",
        dims=setting.dims,
        depths=setting.depths,
        kernels=KERNELS.get(arm, MIXED),
        branches=BRANCHES.get(arm, "dilated"),  # type: ignore[arg-type]
        layer_scale=LAYER_SCALE,
        image_size=setting.size,
    )


def fresh(arm: str, test: "Split") -> Backbone:
    """A published net of 3.7 to 4.4 M parameters at random weights, its residual branches at full scale.

    Layer scales start at 1e-6, which hides what the blocks do; batch norms take their statistics from images.
    """
    if arm == "convnext":
        from vertebra.spec import Spec

        return Spec("timm/convnext_atto", {"weights": "random", "network": {"ls_init_value": 1.0}}).build().eval()
    backbone = unireplknet("a", layer_scale=1.0).train()
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        backbone(photos(test, 8, NATIVE, backbone))
    return backbone.eval()


def photos(test: "Split", number: int, size: int, backbone: Backbone) -> Tensor:
    """Test images, evenly spaced, enlarged to `size` pixels and normalised, (number, 3, size, size)."""
    import numpy as np

    places = np.linspace(0, len(test) - 1, number).round().astype(int)
    shown = [np.asarray(test.image(int(place)).convert("RGB").resize((size, size))) for place in places]
    pixels = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.preprocess.mean, backbone.preprocess.std))
    return (pixels - mean) / std


def fields(backbone: Backbone, images: Tensor) -> tuple[float, float]:
    """Areas of the smallest centred squares that hold 99 and 50 % of the gradient, in percent of the image's."""
    from vertebra.probes.receptive_field import contributions, share_radius

    seen = contributions(backbone, images)
    return 100 * share_radius(seen, SHARE) ** 2, 100 * share_radius(seen, 0.5) ** 2


EPOCHS = 8
"""Of the network on signals; a linear model gets ten times as many."""
HELD = 1000
"""Tones, and windows of series, to test on."""
RATE, SECONDS = 8000, 0.5
STEPS, AHEAD, VARIABLES = 48, 12, 3


def _tones(seed: int, number: int) -> dict[str, float]:
    """Accuracy of the network and of a linear model on the mel maps of ten kinds of tones."""
    draw = torch.Generator().manual_seed(seed)
    maps, kinds = _mels(*tones(number, draw))
    held, truth = _mels(*tones(HELD, draw))
    mean, std = maps.mean(), maps.std()
    maps, held = (maps - mean) / std, (held - mean) / std
    found = {}
    for name, model in (("tones", _Read(None, 10)), ("tones_linear", _linear(maps[0].numel(), 10))):
        predicted = _fitted(model, maps, kinds, held, nn.functional.cross_entropy, seed)
        found[name] = 100 * (predicted.argmax(1) == truth).double().mean().item()
    return found


def _mels(waves: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    return mel_map(waves, rate=RATE, bands=32, window=0.032, hop=0.016), kinds


def tones(number: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tones (number, samples) in noise, and which of ten kinds each is; pitch, onset and loudness are random.

    Kinds: steady, rising, falling, up and down, down and up, vibrato, tremolo, an octave up, one down, two at once.
    """
    time = torch.linspace(0, 1, int(RATE * SECONDS))
    kinds = torch.randint(10, (number,), generator=draw)
    pitch, phase, depth = (torch.rand(number, 1, generator=draw) for _ in range(3))
    bend = 0.2 + 0.2 * depth
    wave = torch.sin(2 * pi * (5 * time + phase))
    ramp = time.expand(number, -1)
    hat = 1 - (2 * ramp - 1).abs()
    jump = (ramp > 0.35 + 0.3 * phase).float()
    curves = [
        ramp * 0,
        ramp * bend,
        -ramp * bend,
        hat * bend,
        -hat * bend,
        wave * 0.05,
        ramp * 0,
        jump,
        -jump,
        ramp * 0,
    ]
    curve = torch.stack(curves).gather(0, kinds[None, :, None].expand(1, -1, len(time)))[0]  # in octaves
    hertz = 500 * 2 ** (1.5 * pitch + curve)
    turns = 2 * pi * (hertz / RATE).cumsum(1)
    found = turns.sin() * torch.where(kinds[:, None] == 6, 0.55 + 0.45 * wave, 1.0)
    found = found + torch.where(kinds[:, None] == 9, (1.5 * turns).sin(), 0.0)
    loud = 0.3 + torch.rand(number, 1, generator=draw)
    return loud * found + 0.3 * torch.randn(found.shape, generator=draw), kinds


def _forecast(seed: int, number: int) -> dict[str, float]:
    """Mean squared error, in variances of a window, of the next twelve steps: the network and a linear model."""
    draw = torch.Generator().manual_seed(seed)
    windows, held = series(number, draw), series(HELD, draw)
    found = {}
    for name, model in (
        ("forecast", _Read(SeriesMap(variables=VARIABLES, dim=STEPS, layout="rows"), AHEAD * VARIABLES)),
        ("forecast_linear", _linear(STEPS * VARIABLES, AHEAD * VARIABLES)),
    ):
        (past, wanted), (seen, truth) = _cut(windows), _cut(held)
        predicted = _fitted(model, past, wanted, seen, nn.functional.mse_loss, seed)
        found[name] = (predicted - truth).square().mean().item()
    return found


def _cut(windows: Tensor) -> tuple[Tensor, Tensor]:
    """What is seen of each window, standardised, and what follows on the same scale, (n, ahead * variables)."""
    past, mean, std = standardised(windows[:, :STEPS])
    return past, ((windows[:, STEPS:] - mean) / std).flatten(1)


def series(number: int, draw: torch.Generator) -> Tensor:
    """Windows (number, steps + ahead, variables): two waves each, of periods that differ from window to window.

    All variables of a window have its periods, at other phases and loudness: what one shows tells of the others.
    """
    time = torch.arange(STEPS + AHEAD)[None, :, None]
    found = torch.zeros(number, STEPS + AHEAD, VARIABLES)
    for shortest, longest in ((6, 12), (16, 32)):
        period = shortest + (longest - shortest) * torch.rand(number, 1, 1, generator=draw)
        phase, loud = torch.rand(2, number, 1, VARIABLES, generator=draw)
        found += (0.5 + loud) * (2 * pi * (time / period + phase)).sin()
    return found + 0.1 * torch.randn(found.shape, generator=draw)


class _Read(nn.Module):
    """The network behind a front end, and a linear layer."""

    def __init__(self, front: nn.Module | None, outputs: int) -> None:
        super().__init__()
        self.front = front or nn.Identity()
        self.backbone = unireplknet(
            "nano", dims=(12, 24, 48, 96), depths=(1, 2, 2, 1), kernels=MIXED, channels=1, layer_scale=LAYER_SCALE
        )
        self.head = nn.Linear(self.backbone.width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(self.front(x)).pooled)


def _linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def _fitted(
    model: nn.Module, given: Tensor, wanted: Tensor, held: Tensor, loss: Callable[[Tensor, Tensor], Tensor], seed: int
) -> Tensor:
    """What a model says of `held` after its training."""
    epochs = EPOCHS if isinstance(model, _Read) else 10 * EPOCHS
    draw = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(given), generator=draw).split(32) for _ in range(epochs)]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    steps = sum(map(len, rounds))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for rows in (few for order in rounds for few in order):
        optimizer.zero_grad()
        loss(model(given[rows]), wanted[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        return model.eval()(held)
