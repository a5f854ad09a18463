"""Re-identification made of any pictures: cameras with a style each, its two scores, and OSNet's effect on it.

Every picture is an identity. A camera sees it through a random crop, turn and mirror, and gives it colours, contrast
and blur of its own. Identities of the test are others than those of the training, and so is one camera.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from vertebra.backbones.osnet import PAPER, OSNet, osnet
from vertebra.contracts import Batch, Check, Effect, Measured, Method, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.probes.metrics import ranked_precision, run_ends


@dataclass(frozen=True)
class Camera:
    """What a camera does to pixels in 0..1: contrast around the middle, brightness, then a factor a colour, a blur."""

    colours: tuple[float, float, float]
    contrast: float
    brightness: float
    blur: float


CAMERAS = (
    Camera((1.1, 1.0, 0.85), 1.0, 0.0, 0.0),
    Camera((0.8, 0.95, 1.15), 0.6, 0.1, 1.0),
    Camera((0.9, 1.15, 0.8), 1.3, -0.2, 0.5),  # never seen in training
)
ALIKE = (CAMERAS[0],) * len(CAMERAS)
"""As many cameras of one style."""

_NOISE, _TURN, _SHIFT, _ZOOM = 0.02, 0.2, 0.15, (0.7, 1.0)
_KNOWN, _PIXELS = 2, 48


def sight(pictures: Tensor, camera: Camera, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """What a camera sees of pictures: each through a crop, turn and mirror of its own.

    Args:
        pictures: (n, 3, H, W) in 0..1.
        camera: whose style they get.
        size: (height, width) in pixels of what comes out; the pictures are squashed to it.
        rng: of crops and noise.

    Returns:
        (n, 3, *size) in 0..1.
    """
    turn, zoom, right, down = (torch.rand(len(pictures), generator=rng) for _ in range(4))
    angle, zoom = (2 * turn - 1) * _TURN, _ZOOM[0] + (_ZOOM[1] - _ZOOM[0]) * zoom
    mirror = 1 - 2 * (torch.rand(len(pictures), generator=rng) < 0.5).float()
    rows = [angle.cos() * zoom * mirror, -angle.sin() * zoom, (2 * right - 1) * _SHIFT]
    rows += [angle.sin() * zoom * mirror, angle.cos() * zoom, (2 * down - 1) * _SHIFT]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(pictures), 3, *size], align_corners=False)
    seen = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    seen = (seen - 0.5) * camera.contrast + 0.5 + camera.brightness
    seen = _blurred(seen * torch.tensor(camera.colours)[:, None, None], camera.blur)
    return (seen + _NOISE * torch.randn(seen.shape, generator=rng)).clamp(0, 1)


def _blurred(pictures: Tensor, sigma: float) -> Tensor:
    if not sigma:
        return pictures
    line = torch.arange(-3, 4).float()
    line = (-(line**2) / (2 * sigma**2)).exp()
    kernel = (line / line.sum()).outer(line / line.sum()).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(pictures, (3, 3, 3, 3), mode="reflect"), kernel, groups=3)


class Sightings:
    """Batches for `vertebra.training.loop.fit`: every identity by every camera, seen anew in each epoch.

    Attributes:
        pictures: (n, 3, H, W) in 0..1, one an identity.
        cameras: that see them.
    """

    def __init__(
        self, pictures: Tensor, cameras: Sequence[Camera], preprocess: Preprocess, *, times: int, batch: int, seed: int
    ) -> None:
        self.pictures, self.cameras, self.preprocess = pictures, cameras, preprocess
        self.times, self.batch, self.seed = times, batch, seed

    def __len__(self) -> int:
        return len(self.pictures) * len(self.cameras) * self.times // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch, a function of seed and epoch, from step `start` on; what fills no batch is left out."""
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        images, identities, _ = self.all(rng)
        order = torch.randperm(len(images), generator=rng)
        for step in range(start, len(self)):
            rows = order[step * self.batch : (step + 1) * self.batch]
            yield Batch(images[rows], identities[rows], rows)

    def all(self, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (n, 3, H, W) of all identities by all cameras, identities (n,), cameras (n,)."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        seen, identities, cameras = [], [], []
        for number, camera in enumerate(self.cameras):
            for _ in range(self.times):
                seen.append((sight(self.pictures, camera, self.preprocess.size, rng) - mean) / std)
                identities.append(torch.arange(len(self.pictures)))
                cameras.append(torch.full((len(self.pictures),), number))
        return torch.cat(seen), torch.cat(identities), torch.cat(cameras)


@dataclass(frozen=True)
class Seen:
    """Embedded pictures: features (n, width), identities (n,) and cameras (n,)."""

    features: Tensor
    identities: Tensor
    cameras: Tensor

    def by(self, *cameras: int) -> "Seen":
        """Those of some cameras."""
        kept = torch.isin(self.cameras, torch.tensor(cameras))
        return Seen(self.features[kept], self.identities[kept], self.cameras[kept])


def reidentified(queries: Seen, gallery: Seen, *, ranks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The scores of re-identification: how soon each query finds its identity, by cosine similarity.

    What the query's own camera saw of its identity is taken out of the gallery first, as on Market-1501. A query that
    nothing is then left for does not count.

    Args:
        queries: whose identity is asked for.
        gallery: what is searched; may be the queries themselves.
        ranks: of the cumulative matching characteristic.

    Returns:
        `r1` and so on, share of queries with an answer up to that rank, and `map`, mean average precision, in percent;
        NaN without a query that counts.
    """
    similarity = F.normalize(queries.features, dim=1) @ F.normalize(gallery.features, dim=1).T
    same = queries.identities[:, None] == gallery.identities
    own = same & (queries.cameras[:, None] == gallery.cameras)
    similarity, hits = similarity.masked_fill(own, -torch.inf), same & ~own
    counted = hits.any(1)
    ordered, order = similarity[counted].sort(dim=1, descending=True, stable=True)
    hits = hits[counted].gather(1, order)
    first = hits.int().argmax(1) + 1
    found = {f"r{rank}": 100 * float((first <= rank).double().mean()) for rank in ranks}
    return {**found, "map": 100 * float(ranked_precision(hits, run_ends(ordered)).mean())}


@dataclass(frozen=True)
class _Setting:
    """What a scale trains.

    Attributes:
        variant: of OSNet.
        size: (height, width) in pixels.
        identities: to train on.
        tested: identities of the test.
        times: that a camera sees each in an epoch.
        epochs: of a network.
        searched: epochs of a search.
        batch: images a step.
    """

    variant: str
    size: tuple[int, int]
    identities: int
    tested: int
    times: int
    epochs: int
    searched: int
    batch: int


_SETTINGS = {
    "toy": _Setting("x0_25", (64, 32), 60, 100, 3, 20, 12, 30),
    "gpu": _Setting("x1_0", (128, 64), 600, 400, 8, 60, 60, 64),
}

_IBN = ("outside", "outside", "plain", "plain", "plain", "plain")
_AIN = ("inside", "inside", "plain", "inside", "inside", "plain")

_ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "osnet": ("four scales, a gate a channel", {}),
    "one_scale": ("one stream, wider", {"streams": 1}),
    "no_gate": ("four scales side by side, narrower", {"gate": "none"}),
    "stream_gate": ("four scales, a gate a stream", {"gate": "stream"}),
    "ibn": ("instance norm in the stem and the first stage", {"stem_norm": "instance", "placement": _IBN}),
    "ain": ("instance norms where the paper's search put them", {"stem_norm": "instance", "placement": _AIN}),
    "search": ("the search, cameras of different styles", {}),
    "search_alike": ("the search, cameras of one style", {}),
}

_WIDER = {"one_scale": 2.125, "no_gate": 0.72}
"""Width of the streams that gives an arm the parameters of the first."""


def comparison(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The effect of `vertebra.backbones.osnet`."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.identities, held=setting.tested)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        if arm.startswith("search"):
            return _searched(arm, seed, setting, train)
        return _trained(arm, seed, setting, train, test)

    return Effect(
        claim="several scales weighed by a shared gate identify best for their size; instance norms carry over to new"
        " cameras, and a search finds where they belong",
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="osnet",
        metrics={"r1": "%", "map": "%", "r1_new": "%", "params": "M", "normed": "", "plain": "%"},
        measure=measure,
        checks=_checks,
        limits=(
            f"OSNet-{setting.variant} on {len(train)} identities of {setting.size[0]} x {setting.size[1]} pixels; every"
            f" picture is an identity and the cameras are filters, no people. {setting.searched} epochs move the"
            " search's strengths little, and a choice by chance puts instance norms in 4.5 of 6 blocks"
        ),
        data=f"{words}, an identity each, seen by 3 cameras",
    )


def _trained(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.methods.supervised import Supervised
    from vertebra.tasks.classify import classify

    torch.manual_seed(seed)
    backbone = osnet(setting.variant, image_size=setting.size, **{**_ARMS[arm][1], **_middles(arm, setting.variant)})
    model = classify(backbone, [str(name) for name in train.names], label_smoothing=0.1)
    _fit(Supervised(model), backbone, pictures(train), CAMERAS, setting, setting.epochs, seed)
    seen = embedded(backbone.eval(), pictures(test), CAMERAS, times=3)
    known, new = seen.by(*range(_KNOWN)), seen.by(_KNOWN)
    scores = reidentified(known, known)
    params = sum(tensor.numel() for tensor in backbone.parameters()) / 1e6
    found = {"r1": scores["r1"], "map": scores["map"], "r1_new": reidentified(new, known)["r1"], "params": params}
    return {**found, "normed": math.nan, "plain": math.nan}


def _searched(arm: str, seed: int, setting: _Setting, train: Split) -> Mapping[str, float]:
    from vertebra.search.osnet_ain import Search, mixtures, osnet_ain

    torch.manual_seed(seed)
    places = osnet_ain(setting.variant, image_size=setting.size)
    backbone = places.network()
    method = Search(backbone, [str(name) for name in train.names])
    cameras = ALIKE if arm == "search_alike" else CAMERAS
    _fit(method, backbone, pictures(train), cameras, setting, setting.searched, seed)
    strengths = torch.stack([mixture.strengths.detach().relu() for mixture in mixtures(backbone)])
    plain = (strengths[:, 0] / strengths.sum(1)).mean()
    normed = sum(name != "plain" for name in places.found(backbone).options["placement"])
    lacking = dict.fromkeys(("r1", "map", "r1_new", "params"), math.nan)
    return {**lacking, "normed": float(normed), "plain": 100 * float(plain)}


def _fit(
    method: Method,
    backbone: OSNet,
    seen: Tensor,
    cameras: Sequence[Camera],
    setting: _Setting,
    epochs: int,
    seed: int,
) -> None:
    from vertebra.config import Plan
    from vertebra.training.loop import fit

    batches = Sightings(
        seen, cameras[:_KNOWN], backbone.preprocess, times=setting.times, batch=setting.batch, seed=seed
    )
    plan = Plan(epochs=epochs, batch=setting.batch, lr=1.5e-3, weight_decay=5e-4, clip=None, workers=0, seed=seed)
    fit(method, batches, plan)


def embedded(backbone: OSNet, seen: Tensor, cameras: Sequence[Camera], *, times: int, seed: int = 0) -> Seen:
    """What a backbone in evaluation mode makes of pictures by all cameras, `times` each."""
    device = next(backbone.parameters()).device
    whole = Sightings(seen, cameras, backbone.preprocess, times=times, batch=1, seed=seed)
    images, identities, by = whole.all(torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        features = torch.cat([backbone(part.to(device)).pooled.cpu() for part in images.split(200)])
    return Seen(features, identities, by)


def pictures(split: Split) -> Tensor:
    """The images of a split as tensors (n, 3, 48, 48) in 0..1."""
    made = [split.image(index).convert("RGB").resize((_PIXELS, _PIXELS)) for index in range(len(split))]
    return torch.from_numpy(np.stack([np.asarray(image) for image in made])).permute(0, 3, 1, 2).float() / 255


def _middles(arm: str, variant: str) -> dict[str, Any]:
    from vertebra.backbones.osnet import VARIANTS

    dims: Any = VARIANTS[variant]["dims"]
    return {"middles": tuple(round(_WIDER[arm] * width / 4) for width in dims[1:])} if arm in _WIDER else {}


def _checks(measured: Measured) -> Sequence[Check]:
    others = ("one_scale", "no_gate", "stream_gate")
    r1 = {arm: measured.mean(arm, "r1") for arm in ("osnet", *others, "ibn", "ain")}
    new = {arm: measured.mean(arm, "r1_new") for arm in r1}
    normed = {arm: measured.mean(arm, "normed") for arm in ("search", "search_alike")}
    words = ", ".join(f"{arm} {value:.1f}" for arm, value in r1.items())
    gains = {arm: measured.gain(arm, "osnet", "r1_new") for arm in ("ibn", "ain")}
    checks = [
        Check(
            "four scales and the channel gate are at least as good as each of one scale, no gate, a gate a stream",
            r1["osnet"] >= max(r1[arm] for arm in others),
            f"R1 {words}",
        )
    ]
    checks += [
        Check(
            f"{arm.upper()} gains at least 3 points of R1 from a camera never seen, and loses at most 2 elsewhere",
            new[arm] - new["osnet"] >= 3 and r1[arm] >= r1["osnet"] - 2,
            f"{gains[arm].mean():+.1f} points (seeds: {', '.join(f'{gain:+.1f}' for gain in gains[arm])}) from"
            f" {new['osnet']:.1f}; elsewhere {r1[arm] - r1['osnet']:+.1f}",
        )
        for arm in ("ibn", "ain")
    ]
    return [
        *checks,
        Check(
            "the search places instance norms where styles differ, and fewer where they do not",
            min(measured.values["search"]["normed"]) > 0 and normed["search_alike"] < normed["search"],
            f"blocks with one: {normed['search']:.1f} of 6, and {normed['search_alike']:.1f} where cameras are alike;"
            f" strength of no norm {measured.mean('search', 'plain'):.1f} % and"
            f" {measured.mean('search_alike', 'plain'):.1f} % (25 at the start)",
        ),
    ]
