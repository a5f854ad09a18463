"""Large kernels: a few of them in place of many small ones, and what that does to field, shape bias, score and time.

    report = large_kernels()()

Networks of equal parameters and depth that differ in the size of their kernels (RepLKNets of two stages, each kernel
trained beside one of 3 x 3) are compared by their effective receptive field before and after training, accuracy,
latency, and shape bias: of the images whose shape says one class and whose texture another, the share that is told by
shape, among those told by either. Beside them: a few large blocks against many small ones at equal multiply-
accumulates, how the field of random linear stacks grows with depth and kernel, and from which kernel on the Fourier
transform is faster on this machine.
"""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vertebra.contracts import Backbone, Check, Effect, Measured, Report, Score, Study
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper

if TYPE_CHECKING:
    from torch import Tensor

    from vertebra.backbones.replknet import RepLKNet
    from vertebra.blocks.large_kernel import Path as Way
    from vertebra.blocks.large_kernel import Policy

PAPER = Paper(
    id="large_kernels",
    title="Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations",
    year=2024,
    arxiv="2410.08049",
    reference="AILab-CVC/UniRepLKNet",
    licence="Apache-2.0",
    claim="a few large kernels in place of many small ones: larger effective receptive field, higher shape bias than "
    "convolutional networks of small kernels, 88.0 % ImageNet top-1, 55.6 ADE20K mIoU, faster inference than ViTs",
    builds_on=("unireplknet", "replknet"),
    numbers="3 networks of replknet; those of unireplknet",
    parity="the authors' RepLKNet (replknet) and UniRepLKNet (unireplknet)",
    note="The paper's networks are `unireplknet` and `replknet`; here is its study of kernels. Latency against "
    "attention in 16 bit needs a GPU. Other modalities are adapters of `unireplknet`.",
)

KERNELS = (3, 7, 13)
SHARES = (0.2, 0.3, 0.5, 0.99)
SHAPES = ("square", "triangle", "star", "cross", "ring", "heart")
WAYS: "tuple[Way, ...]" = ("direct", "fft")
OWN = ("striped", "dotted", "checked", "zigzag", "brick", "woven")
"""The texture that things of a shape bear in training, in the order of `SHAPES`."""


@dataclass(frozen=True)
class Setting:
    """What the study trains and measures.

    Attributes:
        width: channels of the first stage with the largest kernel; those of smaller ones follow.
        size: of training images, in pixels.
        images: of the data set, for accuracy.
        epochs: on them.
        things: drawn images of shapes in their own texture, for shape bias.
        rounds: epochs on those.
        side: of the images that fields are measured on, in pixels; the network is convolutional.
        looked: images that fields are measured on.
    """

    width: int = 16
    size: int = 32
    images: int = 1500
    epochs: int = 8
    things: int = 1500
    rounds: int = 12
    side: int = 128
    looked: int = 50


SETTINGS = {
    "toy": Setting(),
    "gpu": Setting(width=48, images=20_000, epochs=15, things=12_000, rounds=15, looked=100),
}


def large_kernels(**options: Any) -> "LargeKernels":
    """The study; see `LargeKernels`."""
    return LargeKernels(**options)


class LargeKernels(Study):
    """Compare kernel sizes at equal parameters and depth, from one call.

    Args:
        data: images of one class each; None takes the built-in digits.
        kernels: odd sizes, rising, at least two.
        policy: what is trained beside each kernel, as in `vertebra.blocks.large_kernel`.
        seeds: of every training.
        setting: what is trained and measured.

    Raises:
        UsageError: fewer than two kernels, or ones that do not rise.
    """

    def __init__(
        self,
        data: Dataset | None = None,
        *,
        kernels: Sequence[int] = KERNELS,
        policy: "Policy" = "small",
        seeds: Sequence[int] = (0,),
        setting: Setting = SETTINGS["toy"],
    ) -> None:
        if len(kernels) < 2 or list(kernels) != sorted(set(kernels)):
            raise UsageError(f"large_kernels: kernels are {list(kernels)}; give at least two that rise, as 3 7 13")
        if not seeds:
            raise UsageError("large_kernels: there are no seeds; give at least one")
        self.data, self.kernels, self.seeds, self.setting = data, tuple(kernels), tuple(seeds), setting
        self.policy: Policy = policy

    def __call__(self) -> Report:
        """Scores are differences of the largest from the smallest kernel, in points; then the two exponents.

        Details hold `kernels` (size -> what `examined` gives, mean over the seeds, and `ms`), `few_large` and
        `many_small` (their fields and MACs), `exponents`, `break_even`, `setting` and whether each claim was `seen`.
        """
        from vertebra.arms import parts
        from vertebra.probes.speed import measure as timed

        train, test, words = parts(PAPER.id, self.data, self.setting.images)
        found = {k: self._examined(k, train, test) for k in self.kernels}
        nets = {str(k): network(k, self.setting, self.kernels[-1], policy=self.policy) for k in self.kernels}
        speeds = timed(nets, rounds=5, repeats=5)
        table = {k: {name: float(np.mean(values)) for name, values in found[k].items()} for k in self.kernels}
        for k in self.kernels:
            table[k]["ms"] = speeds[str(k)].scores["p50_ms"].value
        few_many = {name: opposed(name, seed=0) for name in ("few_large", "many_small")}
        grown = exponents()
        largest, smallest = found[self.kernels[-1]], found[self.kernels[0]]
        scores = {
            f"{name}_gain": _difference(largest[name] - smallest[name])
            for name in ("field_50", "field_50_init", "shape_bias", "top1")
        }
        scores |= {f"exponent_{name}": Score(value, 1, unit="") for name, value in grown.items()}
        seen = claims(table, few_many, grown)
        details = {"kernels": {str(k): row for k, row in table.items()}, **few_many, "exponents": grown}
        details |= {"break_even": break_even(), "setting": asdict(self.setting), "data": words, "policy": self.policy}
        return Report(scores, {**details, "seen": seen, "seeds": list(self.seeds)})

    def _examined(self, kernel: int, train: Split, test: Split) -> dict[str, np.ndarray]:
        rows = [examined(kernel, s, self.setting, train, test, self.kernels[-1], self.policy) for s in self.seeds]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _difference(gains: np.ndarray) -> Score:
    return Score(float(gains.mean()), len(gains), samples=gains)


def claims(
    table: Mapping[int, Mapping[str, float]], few_many: Mapping[str, Mapping[str, float]], grown: Mapping[str, float]
) -> dict[str, bool]:
    """Which of the paper's statements measurements show.

    Args:
        table: kernel -> measurement -> value; kernels rise.
        few_many: "few_large" and "many_small" -> their field.
        grown: of `exponents`.
    """
    rows = list(table.values())

    def rises(name: str) -> bool:
        return all(b[name] > a[name] for a, b in pairwise(rows))

    return {
        "the field grows with the kernel before training": rises("field_50_init"),
        "the field grows with the kernel after training": rises("field_50"),
        "the largest kernel goes by shape, 5 points more": rows[-1]["shape_bias"] - rows[0]["shape_bias"] >= 5,
        "few large kernels see further than many small ones": few_many["few_large"]["field_50_init"]
        > few_many["many_small"]["field_50_init"],
        "the field of a linear stack grows as depth ** 0.5": 0.4 <= grown["depth"] <= 0.6,
        "the field of a linear stack grows as its kernel": 0.9 <= grown["kernel"] <= 1.1,
    }


def network(kernel: int, setting: Setting, largest: int = KERNELS[-1], *, policy: "Policy" = "small") -> "RepLKNet":
    """A RepLKNet of two stages and four large-kernel blocks, with the parameters that it has for the largest kernel.

    Depth and strides are the same for all kernels; what a smaller kernel saves goes into channels.
    """
    from vertebra.backbones.replknet import replknet

    def options(k: int, first: int, second: int) -> dict[str, Any]:
        sizes = {"kernels": (k, k), "small": min(3, k), "policy": "small" if policy == "dilated" and k < 5 else policy}
        return {"dims": (first, second), "depths": (2, 2), "stem_stride": 2, "image_size": setting.size, **sizes}

    def parameters(first: int, second: int) -> int:
        return _size(options(kernel, first, second))

    wanted, narrow = _size(options(largest, setting.width, 2 * setting.width)), setting.width
    widths = range(narrow, 2 * narrow)  # the pointwise convolutions alone grow fourfold
    first = widths[bisect_right(widths, wanted, key=lambda width: parameters(width, 2 * width)) - 1]
    second = min(range(2 * first, 2 * first + 5), key=lambda second: abs(parameters(first, second) - wanted))
    return replknet("nano", **options(kernel, first, second))


def _size(options: Mapping[str, Any]) -> int:
    """Parameters of a RepLKNet."""
    import torch

    from vertebra.backbones.replknet import replknet

    with torch.device("meta"):
        return sum(p.numel() for p in replknet("nano", **options).parameters())


def _macs(options: Mapping[str, Any]) -> int:
    import torch

    from vertebra.backbones.replknet import replknet
    from vertebra.training.cost import count

    with torch.device("meta"):
        return count(replknet("nano", **options)).macs


def examined(
    kernel: int,
    seed: int,
    setting: Setting,
    train: Split,
    test: Split,
    largest: int = KERNELS[-1],
    policy: "Policy" = "small",
) -> dict[str, float]:
    """Build, look, train, look again; then train a twin on shapes in their own texture and show it others.

    Returns:
        `top1` and `shape_bias` in percent, `field_X` after and `field_X_init` before training in percent of the image
        side for X in 20, 30, 50, 99, `own_top1` (new things in their own texture, %), `decided` (conflicting ones told
        by shape or texture, %), `params_k`.
    """
    import torch

    from vertebra.arms import trained

    torch.manual_seed(seed)
    backbone = network(kernel, setting, largest, policy=policy)
    seen = pictures(test, setting.side, setting.looked)
    found = {f"{name}_init": value for name, value in fields(settled(backbone, seen), seen).items()}
    found["top1"] = trained(backbone, train, test, _plan(setting.epochs, seed, flip=0.5)).scores["top1"]
    found |= fields(backbone, seen)
    found["params_k"] = sum(p.numel() for p in backbone.parameters()) / 1e3
    torch.manual_seed(seed)
    return found | shape_bias(network(kernel, setting, largest, policy=policy), setting, seed)


def _plan(epochs: int, seed: int, *, flip: float) -> Any:
    from vertebra.config import Plan, Views

    return Plan(epochs=epochs, batch=64, lr=2e-3, seed=seed, views=Views(scale=(0.6, 1.0), flip=flip))


def pictures(split: Split, side: int, most: int) -> np.ndarray:
    """Evenly spaced images of a split at another size, (n, side, side, 3) uint8."""
    rows = np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int)
    return np.stack([np.asarray(split.image(int(i)).convert("RGB").resize((side, side), 3)) for i in rows])


def settled(backbone: "RepLKNet", seen: np.ndarray) -> "RepLKNet":
    """The network in evaluation mode with the batch statistics of these images, as its first step of training has them.

    Without them a branch at its start is much weaker than the identity beside it, which no training ever sees.
    """
    import torch

    from vertebra.data.pixels import normalised

    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        backbone.train()(normalised(seen[:16], backbone.preprocess))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return backbone.eval()


def fields(backbone: Backbone, seen: np.ndarray) -> dict[str, float]:
    """Sides of the squares that hold 20, 30, 50 and 99 % of the last map's contributions, in percent of the side."""
    from vertebra.data.pixels import normalised
    from vertebra.probes.receptive_field import contributions, share_radius

    found = contributions(backbone.eval(), normalised(seen, backbone.preprocess))
    return {f"field_{100 * share:.0f}": 100 * share_radius(found, share) for share in SHARES}


def shape_bias(backbone: Backbone, setting: Setting, seed: int) -> dict[str, float]:
    """Train on shapes in their own texture, where both say the class, and ask which of them was learnt.

    Returns:
        `shape_bias`: percent of the conflicting things told by shape, among those told by shape or texture; 50 where
        none is told. `own_top1`, `decided`: as in `examined`.
    """
    import torch

    from vertebra.arms import trained
    from vertebra.data.pixels import normalised

    count = setting.things
    shapes = np.arange(count) % len(SHAPES)
    drawn = _split("train", shapes, things(shapes, shapes, setting.size, seed=seed))
    fresh = np.arange(count // 4) % len(SHAPES)
    own = _split("test", fresh, things(fresh, fresh, setting.size, seed=seed + 1000))
    result = trained(backbone, drawn, own, _plan(setting.rounds, seed, flip=0.0))
    shape, texture = conflicts(count // 2)
    images = normalised(things(shape, texture, setting.size, seed=seed + 2000), backbone.preprocess)
    with torch.inference_mode():
        told = torch.cat([result.model(few)["logits"].argmax(1) for few in images.split(128)]).numpy()
    by_shape, by_texture = int((told == shape).sum()), int((told == texture).sum())
    either = by_shape + by_texture
    return {
        "shape_bias": 100 * by_shape / either if either else 50.0,
        "own_top1": result.scores["top1"],
        "decided": 100 * either / len(told),
    }


def conflicts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Shapes and textures (count,) of things that bear another shape's texture, every pair about as often."""
    kinds = len(SHAPES)
    pairs = np.arange(count) % (kinds * (kinds - 1))
    shape, other = pairs // (kinds - 1), pairs % (kinds - 1)
    return shape, (shape + 1 + other) % kinds


def things(shapes: np.ndarray, textures: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """One thing an image on a plain ground, its colours, place, size and turn by chance.

    Args:
        shapes: (n,) positions in `SHAPES`.
        textures: (n,) positions in `OWN`.
        size: side in pixels.
        seed: of everything that is drawn by chance.

    Returns:
        (n, size, size, 3) uint8.
    """
    rng = np.random.default_rng(seed)
    return np.stack([_thing(SHAPES[s], OWN[t], size, rng) for s, t in zip(shapes, textures, strict=True)])


def _thing(shape: str, texture: str, size: int, rng: np.random.Generator) -> np.ndarray:
    from vertebra.data.sprites.shapes import draw, placed
    from vertebra.data.sprites.textures import COLOURS, lattice, mixed, muted, pattern, second_colour

    canvas = np.broadcast_to(muted(rng), (size, size, 3)).copy()
    radius = size * rng.uniform(0.32, 0.42)
    x, y = rng.uniform(radius, size - radius, 2)
    rows, columns, alpha = placed(draw(shape, x, y, radius, rng.uniform(-0.4, 0.4)), size, size)
    v, u = np.mgrid[rows, columns].astype(np.float32) + rng.uniform(0, size, (2, 1, 1)).astype(np.float32)
    period, angle = size * rng.uniform(0.14, 0.2), rng.uniform(0, np.pi)
    first = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))], dtype=np.float32)
    weights = pattern(texture, u, v, scale=period, angle=angle, table=lattice(rng))
    coat = mixed(weights, first, second_colour(first, 0.7))
    canvas[rows, columns] += alpha[..., None] * (coat - canvas[rows, columns])
    return np.clip(canvas + rng.normal(0, 4, canvas.shape), 0, 255).round().astype(np.uint8)


def _split(name: str, targets: np.ndarray, pixels: np.ndarray) -> Split:
    from vertebra.data.digits import Arrays

    names = np.array([f"thing-{i:05d}" for i in range(len(pixels))])
    return Split(name, SHAPES, names, targets.astype(np.int64), Arrays(pixels), np.arange(len(pixels)))


def opposed(which: Literal["few_large", "many_small"], *, seed: int, side: int = 128) -> dict[str, float]:
    """Field at the start of two blocks of 13 x 13, or of six of 3 x 3 with as many MACs, in one stage.

    Returns:
        `field_50_init` in percent of the image side, `mmacs` of an image of 32 pixels, `depth`.
    """
    import torch

    from vertebra.backbones.replknet import replknet

    shape = {"policy": "none", "stem_stride": 2, "image_size": 32}
    few = {"dims": (48,), "depths": (2,), "kernels": (13,), **shape}
    many = [{"dims": (dim,), "depths": (6,), "kernels": (3,), **shape} for dim in range(24, 48)]
    wanted = _macs(few)
    above = bisect_left(many, wanted, lo=1, hi=len(many) - 1, key=_macs)
    nearest = min(many[above - 1 : above + 1], key=lambda options: abs(_macs(options) - wanted))
    chosen = few if which == "few_large" else nearest
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    seen = rng.integers(0, 256, (32, side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    found = fields(settled(replknet("nano", **chosen), seen), seen)
    return {"field_50_init": found["field_50"], "mmacs": _macs(chosen) / 1e6, "depth": float(chosen["depths"][0])}


def exponents(
    *,
    depths: Sequence[int] = (4, 8, 16, 32, 64),
    kernels: Sequence[int] = (5, 9, 13, 17, 21),
    seeds: Sequence[int] = (0, 1, 2),
    side: int = 161,
) -> dict[str, float]:
    """How the field of random linear stacks grows with depth, at 5 x 5, and with the kernel, at four layers.

    Fits of log(side of the square that holds half) = exponent * log(x) + constant, over the mean of the seeds. Theory
    says 1/2 and 1 (Luo et al., arXiv 1701.04128), as long as the image holds the whole field.
    """

    def grown(places: Sequence[tuple[int, int]], x: Sequence[int]) -> float:
        sides = [np.mean([linear_field(depth, kernel, side, seed) for seed in seeds]) for depth, kernel in places]
        return float(np.polyfit(np.log(x), np.log(sides), 1)[0])

    return {"depth": grown([(d, 5) for d in depths], depths), "kernel": grown([(4, k) for k in kernels], kernels)}


def linear_field(depth: int, kernel: int, side: int, seed: int, channels: int = 6) -> float:
    """Side, as a fraction, of the square that holds half of what feeds the centre of a stack of random convolutions."""
    import torch
    from torch import nn

    from vertebra.probes.receptive_field import share_radius

    torch.manual_seed(seed)
    convs = nn.Sequential(
        *(nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False) for _ in range(depth))
    )
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")  # type: ignore[arg-type]
    image = torch.zeros(1, channels, side, side, requires_grad=True)
    centre = convs(image)[:, :, side // 2, side // 2].sum()
    return share_radius(torch.autograd.grad(centre, image)[0].abs().sum((0, 1)), 0.5)


def break_even(
    *,
    sides: Sequence[int] = (14, 28, 56, 112),
    kernels: Sequence[int] = (5, 7, 9, 11, 13, 15, 21, 31, 51),
    channels: int = 16,
    batch: int = 2,
    repeats: int = 3,
) -> dict[str, dict[str, Any]]:
    """From which kernel size on the Fourier transform is faster than the direct convolution, on this CPU.

    Returns:
        "inference" and "training" -> side of the map -> `kernel` (None where it never is) and `ms` (kernel -> direct,
        Fourier; up to the one after which there is nothing to learn).
    """
    import torch

    found: dict[str, dict[str, Any]] = {"inference": {}, "training": {}}
    for mode, table in found.items():
        for side in sides:
            maps = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
            table[str(side)] = _first_faster(maps.requires_grad_(mode == "training"), kernels, repeats)
    return found


def _first_faster(maps: "Tensor", kernels: Sequence[int], repeats: int) -> dict[str, Any]:
    from vertebra.blocks.large_kernel import LargeDepthwise

    timings: dict[str, list[float]] = {}
    for kernel in kernels:
        ways = [partial(_once, LargeDepthwise(maps.shape[1], kernel, path=path), maps) for path in WAYS]
        timings[str(kernel)] = [round(value, 3) for value in _milliseconds(ways, repeats)]
        if timings[str(kernel)][1] < timings[str(kernel)][0]:
            return {"kernel": kernel, "ms": timings}
    return {"kernel": None, "ms": timings}


def _once(conv: Any, maps: "Tensor") -> None:
    import torch

    with torch.set_grad_enabled(maps.requires_grad):
        out = conv(maps)
        if maps.requires_grad:
            torch.autograd.grad(out.sum(), [maps, conv.weight])


def _milliseconds(ways: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """The least time of each way, taken in turns."""
    best = [float("inf")] * len(ways)
    for turn in range(repeats + 1):
        for number, way in enumerate(ways):
            start = time.perf_counter()
            way()
            if turn:  # the first one warms up
                best[number] = min(best[number], 1000 * (time.perf_counter() - start))
    return best


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Kernels of 3, 7 and 13 at equal parameters; few large against many small; growth of random linear stacks."""
    from vertebra.arms import parts

    setting = SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        if arm.startswith("kernel_"):
            found = examined(int(arm.removeprefix("kernel_")), seed, setting, train, test)
        elif arm == "linear":
            found = {f"exponent_{name}": value for name, value in exponents(seeds=(seed,)).items()}
        else:
            found = opposed("few_large" if arm == "few_large" else "many_small", seed=seed)
        return {name: found.get(name, float("nan")) for name in METRICS}

    return Effect(
        claim="larger kernels see further before and after training, and go by shape rather than by texture; a few of "
        "them see further than many small ones",
        arms={
            **{f"kernel_{k}": f"{k} x {k} kernels, four blocks, equal parameters" for k in KERNELS},
            "few_large": "two blocks of 13 x 13 (field before training only)",
            "many_small": "six blocks of 3 x 3, as many MACs (field before training only)",
            "linear": "random linear stacks: growth of the field with depth and kernel",
        },
        baseline="kernel_3",
        metrics=METRICS,
        measure=measure,
        checks=_checks,
        limits=(
            f"about 100 thousand parameters and {len(train)} images of {setting.size} pixels, where a kernel of 13 "
            "covers most of the last map: accuracy says nothing of ImageNet; shape bias is that of drawn things of six "
            "shapes and textures, not of stylised photographs"
        ),
        data=f"{words}; {setting.things} drawn things",
    )


METRICS = {
    "field_50": "%",
    "field_50_init": "%",
    "field_20": "%",
    "field_30": "%",
    "field_99": "%",
    "shape_bias": "%",
    "top1": "%",
    "own_top1": "%",
    "decided": "%",
    "params_k": "",
    "mmacs": "",
    "exponent_depth": "",
    "exponent_kernel": "",
}


def _checks(measured: Measured) -> Sequence[Check]:
    table = {k: {name: measured.mean(f"kernel_{k}", name) for name in METRICS} for k in KERNELS}
    few_many = {arm: {"field_50_init": measured.mean(arm, "field_50_init")} for arm in ("few_large", "many_small")}
    grown = {name: measured.mean("linear", f"exponent_{name}") for name in ("depth", "kernel")}
    seen = list(claims(table, few_many, grown).items())

    def each(name: str) -> str:
        return ", ".join(f"{k}: {table[k][name]:.1f}" for k in KERNELS)

    gains = measured.gain(f"kernel_{KERNELS[-1]}", f"kernel_{KERNELS[0]}", "shape_bias")
    found = [
        f"field of half the contributions, % of the side: {each('field_50_init')}",
        f"field of half the contributions, % of the side: {each('field_50')}",
        f"shape bias: {each('shape_bias')}; gain by seed: {', '.join(f'{gain:+.1f}' for gain in gains)}",
        " and ".join(f"{arm} {row['field_50_init']:.1f} %" for arm, row in few_many.items()),
        f"exponent {grown['depth']:.2f}, allowed 0.4 to 0.6",
        f"exponent {grown['kernel']:.2f}, allowed 0.9 to 1.1",
    ]
    return [Check(name, holds, words) for (name, holds), words in zip(seen, found, strict=True)]
