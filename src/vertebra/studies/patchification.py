"""Scaling laws in patchification: the same network and training with ever smaller patches, down to one pixel.

    rows = sweep("my_images", patches=(8, 4, 2, 1))             # a row a patch size, family and seed
    law([row.tokens for row in rows], [row.loss for row in rows])

Images, network, epochs and augmentation stay; the side of a patch is halved, which makes four times as many tokens.
Test loss against tokens is then fitted as a power law. Positions are told by waves of pixels that are not trained, so
that smaller patches bring no more parameters for places (the paper's tables, which grow with the tokens, are
`positions="learned"`). The law is that of equal networks and epochs, not of equal compute: rows hold both.

The paper's networks are `adventurer`, of which any patch size can be built; a ViT of any patch size is timm's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from vertebra.contracts import Backbone, Check, Effect, Features, Measured, Report, Score, Study
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError, near
from vertebra.paper import Paper

if TYPE_CHECKING:
    from torch import Tensor

PAPER = Paper(
    id="patchification",
    title="Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
    year=2025,
    arxiv="2502.03738",
    reference="wangf3014/Patch_Scaling",
    licence="none stated",
    claim="test loss falls steadily from patches of 16 x 16 pixels to 1 x 1, across tasks, input sizes and "
    "architectures; 50,176 tokens give 84.6 % ImageNet top-1 with a base-sized network",
    builds_on=("adventurer",),
    numbers="7 networks of adventurer",
    parity="golden outputs of the authors' networks (adventurer); the recurrence of Mamba-2 (mamba2)",
    note="The paper's networks are `adventurer`. Patches of one pixel of 224 pixel images need a GPU to be trained.",
)

Positions = Literal["fixed", "learned"]
Family: TypeAlias = "str | Callable[[int, int], Backbone]"
HEADS = ("linear", "decoder")
SHAPES = ("square", "triangle", "star", "cross")


@dataclass(frozen=True)
class Setting:
    """What the study trains.

    Attributes:
        patches: side of the images in pixels -> sides of the patches.
        dim: of the tokens; a multiple of 16.
        depth: blocks.
        state: of the scans.
        images: of the data set.
        epochs: on them.
        batch: images a step.
        scenes: drawn scenes that are segmented, for training.
        rounds: epochs on those.
    """

    patches: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: {32: (8, 4, 2), 16: (8, 4, 2, 1)})
    dim: int = 32
    depth: int = 3
    state: int = 16
    images: int = 1000
    epochs: int = 8
    batch: int = 32
    scenes: int = 600
    rounds: int = 8


SETTINGS = {
    "toy": Setting(),
    "gpu": Setting(
        patches={64: (16, 8, 4, 2, 1), 32: (8, 4, 2, 1), 16: (8, 4, 2, 1)},
        dim=64,
        depth=4,
        state=64,
        images=50_000,
        epochs=30,
        batch=128,
        scenes=8000,
        rounds=20,
    ),
}
MAIN = 32
"""Side in pixels that the effect is judged at."""


class Row(NamedTuple):
    """One training of a sweep.

    Attributes:
        family: name of the kind of network.
        size: side of the images in pixels.
        patch: side of a patch in pixels.
        seed: of weights, order and views.
        tokens: patches of an image.
        loss: cross-entropy on the test images, in nats.
        top1: in percent.
        params: parameters of the backbone.
        macs: multiply-accumulates of an image.
        activations: elements in the outputs of convolutions and linear layers, for an image.
        seconds: of training.
    """

    family: str
    size: int
    patch: int
    seed: int
    tokens: int
    loss: float
    top1: float
    params: int
    macs: int
    activations: int
    seconds: float


class Law(NamedTuple):
    """Loss as a power of the number of tokens: log(loss) = constant + exponent log(tokens).

    Attributes:
        exponent: below 0 where more tokens make less loss.
        interval: of the exponent, at 95 %.
        r2: share of the variance of log(loss) that the line explains, 0..1.
        points: that it was fitted to.
    """

    exponent: float
    interval: tuple[float, float]
    r2: float
    points: int


def law(tokens: Sequence[float], losses: Sequence[float]) -> Law:
    """Fit a power law by least squares of logarithms; the interval is Student's.

    Args:
        tokens: (n,) numbers of tokens, at least two different ones.
        losses: (n,) test losses, above 0.

    Raises:
        UsageError: fewer than three points, one number of tokens only, or a loss that is not above 0.
    """
    from scipy.stats import linregress, t

    if len(tokens) != len(losses) or len(tokens) < 3 or len(set(tokens)) < 2:
        raise UsageError(
            f"law: {len(tokens)} numbers of tokens ({len(set(tokens))} different) and {len(losses)} losses; give at "
            "least three of each, of at least two patch sizes"
        )
    if not min(losses) > 0 or not min(tokens) > 0:
        raise UsageError(f"law: the smallest loss is {min(losses)}; tokens and losses must be above 0")
    found: Any = linregress(np.log(tokens), np.log(losses))
    half = t.ppf(0.975, len(tokens) - 2) * found.stderr
    interval = (float(found.slope - half), float(found.slope + half))
    return Law(float(found.slope), interval, float(found.rvalue**2), len(tokens))


def costs(
    address: str = "adventurer/tiny",
    patches: Sequence[int] = (16, 8, 4, 2, 1),
    *,
    image_size: int = 224,
    **options: Any,
) -> list[dict[str, int]]:
    """What smaller patches cost, without building anything: parameters, MACs and activations for an image.

    Args:
        address: of a backbone with an option `patch_size`, or of one of timm's whose constructor has it.
        patches: sides in pixels.
        image_size: side of the images in pixels.
        options: further ones of the backbone.

    Returns:
        A mapping with `patch`, `tokens`, `params`, `macs` and `activations` for each patch size.
    """
    import torch

    from vertebra.spec import Spec
    from vertebra.training.cost import count

    rows = []
    for patch in patches:
        given: dict[str, Any] = {**options, "image_size": image_size}
        if address.startswith("timm/"):
            given["network"] = {**options.get("network", {}), "patch_size": patch}
        else:
            given["patch_size"] = patch
        with torch.device("meta"):
            cost = count(Spec(address, given).build(), size=(image_size, image_size))
        tokens = (-(-image_size // patch)) ** 2
        found = {"params": cost.params, "macs": cost.macs, "activations": cost.activations}
        rows.append({"patch": patch, "tokens": tokens, **found})
    return rows


def network(
    family: str, patch: int, size: int, setting: Setting = SETTINGS["toy"], positions: Positions = "fixed"
) -> Backbone:
    """A network of the study: "vit" is timm's VisionTransformer, "adventurer" the causal one of Mamba-2.

    Args:
        family: which.
        patch: side of a patch in pixels.
        size: side of the images in pixels.
        setting: width and depth.
        positions: waves of the patch's first pixel, the same for all patch sizes, or a trained table.

    Raises:
        UsageError: an unknown family.
    """
    import torch

    if family == "vit":
        from vertebra.backbones.timm import timm

        sizes = {"embed_dim": setting.dim, "depth": setting.depth, "num_heads": setting.dim // 16}
        backbone = timm("vit_tiny_patch16_224", image_size=size, network={"patch_size": patch, **sizes})
        table: Any = backbone.network.pos_embed
    elif family == "adventurer":
        from vertebra.backbones.adventurer import adventurer

        backbone = adventurer(
            "tiny", image_size=size, patch_size=patch, dim=setting.dim, depth=setting.depth, state=setting.state
        )
        table = backbone.embed.positions
    else:
        raise UsageError(f"patchification has no family {family!r}{near(family, FAMILIES)}; it has {list(FAMILIES)}")
    if positions == "fixed":
        with torch.no_grad():
            table.copy_(waves(size, patch, setting.dim))
        table.requires_grad_(False)
    return backbone


FAMILIES = ("vit", "adventurer")


def waves(size: int, patch: int, dim: int) -> "Tensor":
    """Sines of row and column of each patch's first pixel, and zeros for the class token before them, (1, 1 + N, dim).

    A place has the same waves whatever the patch size.
    """
    import torch

    from vertebra.blocks.positions import sinusoids

    line = sinusoids(size, dim // 2)[::patch]  # (side, dim / 2)
    side = len(line)
    grid = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return torch.nn.functional.pad(grid.flatten(0, 1), (0, 0, 1, 0))[None]


def sweep(
    data: Dataset | str | Path | None = None,
    patches: Sequence[int] = (8, 4, 2),
    *,
    size: int = MAIN,
    families: Sequence[Family] = FAMILIES,
    seeds: Sequence[int] = (0,),
    setting: Setting = SETTINGS["toy"],
    positions: Positions = "fixed",
) -> list[Row]:
    """Train the same network with patches of each size on a folder of images, everything else equal.

    Args:
        data: images of one class each, or a path as `vertebra.data.read` takes it; None takes the built-in digits.
        patches: sides in pixels.
        size: side in pixels that images are brought to.
        families: "vit", "adventurer", or functions (patch, size) -> backbone of your own.
        seeds: of every training.
        setting: widths, images and epochs.
        positions: of the study's own families, as in `network`.

    Returns:
        A row for each family, patch size and seed, in this order.

    Raises:
        UsageError: nothing to train, or a patch that is larger than the images.
    """
    from vertebra.arms import parts

    if not patches or not families or not seeds:
        raise UsageError("patchification: give at least one patch size, one family and one seed")
    if min(patches) < 1 or max(patches) > size:
        raise UsageError(f"patchification: patches are {list(patches)}; they must lie in 1..{size}, the image's side")
    for family in families:
        if isinstance(family, str) and family not in FAMILIES:
            raise UsageError(
                f"patchification has no family {family!r}{near(family, FAMILIES)}; it has {list(FAMILIES)}"
            )
    train, test, _ = parts(PAPER.id, _read(data), setting.images)
    rows = []
    for family in families:
        named = family if isinstance(family, str) else getattr(family, "__name__", type(family).__name__)
        make = partial(network, family, setting=setting, positions=positions) if isinstance(family, str) else family
        rows += [row(named, make, patch, size, seed, setting, train, test) for patch in patches for seed in seeds]
    return rows


def _read(data: Dataset | str | Path | None) -> Dataset | None:
    if isinstance(data, str | Path):
        from vertebra.data import read

        return read(str(data))
    return data


def row(
    family: str,
    make: Callable[[int, int], Backbone],
    patch: int,
    size: int,
    seed: int,
    setting: Setting,
    train: Split,
    test: Split,
) -> Row:
    """One training of a sweep: build with `make(patch, size)`, train, test, count."""
    import torch

    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.training.cost import count

    torch.manual_seed(seed)
    backbone = make(patch, size)
    plan = Plan(
        epochs=setting.epochs, batch=setting.batch, lr=2e-3, weight_decay=0.05, views=Views(scale=(0.6, 1.0)), seed=seed
    )
    scores, cost = trained(backbone, train, test, plan).scores, count(backbone)
    tokens = (-(-size // patch)) ** 2
    found = (scores["nll"], scores["top1"], cost.params, cost.macs, cost.activations, scores["seconds"])
    return Row(family, size, patch, seed, tokens, *found)


class Enlarged(Backbone):
    """A backbone that sees its images enlarged, bilinearly: more tokens of the same pixels."""

    def __init__(self, inner: Backbone, factor: int) -> None:
        from dataclasses import replace

        super().__init__()
        self.inner, self.factor = inner, factor
        height, width = inner.preprocess.size
        self.levels, self.width = inner.levels, inner.width
        self.preprocess = replace(inner.preprocess, size=(height // factor, width // factor))

    def forward(self, images: "Tensor") -> Features:
        """Images (B, channels, H, W) to the features of images of `factor` times the side."""
        from torch.nn.functional import interpolate

        return self.inner(interpolate(images, scale_factor=self.factor, mode="bilinear", align_corners=False))

    def trunk(self) -> Sequence[Any]:
        """The inner backbone's."""
        return self.inner.trunk()


def segmented(patch: int, head: str, seed: int, setting: Setting = SETTINGS["toy"]) -> float:
    """Train a ViT to segment drawn scenes of four shapes, pixel by pixel; returns mIoU on new scenes, in percent.

    Args:
        patch: side of a patch in pixels.
        head: "linear" is one 1 x 1 convolution, its scores enlarged bilinearly; "decoder" is a 3 x 3 convolution for
            each doubling of the map before it.
        seed: of weights and order.
        setting: scenes, epochs and the network's width.

    Raises:
        UsageError: an unknown head.
    """
    import torch
    from torchmetrics.classification import MulticlassJaccardIndex

    if head not in HEADS:
        raise UsageError(f"patchification has no head {head!r}{near(head, HEADS)}; it has {', '.join(HEADS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = _segmenter(patch, head, setting).to(device)
    images, classes = (values.to(device) for values in _scenes("train", setting.scenes))
    order, steps = torch.Generator().manual_seed(seed), setting.rounds * -(-len(images) // setting.batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(setting.rounds):
        for ids in torch.randperm(len(images), generator=order).split(setting.batch):
            loss = torch.nn.functional.cross_entropy(model(images[ids]), classes[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    images, classes = _scenes("test", setting.scenes // 2)
    metric = MulticlassJaccardIndex(len(SHAPES) + 1, average="macro")
    with torch.inference_mode():
        for seen, known in zip(images.split(100), classes.split(100), strict=True):
            metric.update(model.eval()(seen.to(device)).argmax(1).cpu(), known)
    return 100 * float(metric.compute())


def _segmenter(patch: int, head: str, setting: Setting) -> Any:
    """Images (B, 3, 32, 32) to scores of classes (B, 5, 32, 32)."""
    from torch import nn

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network("vit", patch, MAIN, setting)
            dim, layers = setting.dim, []
            for _ in range((patch - 1).bit_length() if head == "decoder" else 0):
                layers += [nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(), nn.Upsample(scale_factor=2, mode="bilinear")]
            self.head = nn.Sequential(*layers, nn.Conv2d(dim, len(SHAPES) + 1, 1))

        def forward(self, images: "Tensor") -> "Tensor":
            scores = self.head(self.backbone(images).pyramid[-1])
            return nn.functional.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)

    return Segmenter()


def _scenes(part: Literal["train", "test"], count: int) -> tuple["Tensor", "Tensor"]:
    """Scenes (n, 3, 32, 32) and the class of each pixel, 0 for the background, (n, 32, 32)."""
    import torch

    from vertebra.data.sprites import arrays, sprites

    drawn = arrays(sprites(size=MAIN, classes=SHAPES, splits={part: count}).split(part))
    classes = np.zeros(drawn.ids.shape, np.int64)
    for place in range(count):
        labels = drawn.labels[drawn.first[place] : drawn.first[place + 1]]
        classes[place] = np.concatenate([[0], labels + 1])[drawn.ids[place]]
    pixels = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.5) / 0.25, torch.from_numpy(classes)


def patchification(**options: Any) -> "Patchification":
    """The study; see `Patchification`."""
    return Patchification(**options)


class Patchification(Study):
    """Sweep patch sizes and fit the law for each family and image size, from one call.

    Args:
        data: as in `sweep`.
        patches: side of the images -> sides of the patches; None takes the setting's.
        families: as in `sweep`.
        seeds: of every training.
        setting: widths, images and epochs.
        positions: as in `network`.

    Raises:
        UsageError: patches of one size only, which make no law.
    """

    def __init__(
        self,
        data: Dataset | str | Path | None = None,
        *,
        patches: Mapping[int, Sequence[int]] | None = None,
        families: Sequence[Family] = FAMILIES,
        seeds: Sequence[int] = (0,),
        setting: Setting = SETTINGS["toy"],
        positions: Positions = "fixed",
    ) -> None:
        self.patches = {size: tuple(sides) for size, sides in (patches or setting.patches).items()}
        for size, sides in self.patches.items():
            if len(set(sides)) < 2 or len(sides) * len(seeds) < 3:
                raise UsageError(
                    f"patchification: {list(sides)} patches at {size} pixels and {len(seeds)} seeds make no law; give "
                    "at least two patch sizes, and three trainings"
                )
        self.data, self.families, self.seeds, self.setting = data, families, tuple(seeds), setting
        self.positions: Positions = positions

    def __call__(self) -> Report:
        """Scores are the exponents, `exponent_FAMILY_SIZE`; details hold `rows`, `laws`, `setting` and `costs`."""
        options = {"families": self.families, "seeds": self.seeds, "setting": self.setting, "positions": self.positions}
        rows = [one for size, sides in self.patches.items() for one in sweep(self.data, sides, size=size, **options)]
        kinds = dict.fromkeys((one.family, one.size) for one in rows)
        laws = {
            f"{family}_{size}": law(*_points(one for one in rows if (one.family, one.size) == (family, size)))
            for family, size in kinds
        }
        scores = {
            f"exponent_{name}": Score(found.exponent, found.points, "lower", "", interval=found.interval)
            for name, found in laws.items()
        }
        details = {"rows": [one._asdict() for one in rows], "laws": {k: found._asdict() for k, found in laws.items()}}
        return Report(scores, {**details, "setting": asdict(self.setting), "costs": costs()})


def _points(rows: Any) -> tuple[list[int], list[float]]:
    found = list(rows)
    return [one.tokens for one in found], [one.loss for one in found]


METRICS = {"loss": "", "top1": "%", "miou": "%", "tokens": "", "params_k": "", "mmacs": "", "activations_k": ""}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Patch sizes for a ViT and a causal scan at two input sizes; enlarged images; heads of segmenters."""
    from vertebra.arms import parts

    setting = SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        found = _measured(arm, seed, setting, train, test)
        return {name: found.get(name, float("nan")) for name in METRICS}

    return Effect(
        claim="test loss falls as a power of the number of tokens when patches shrink, for attention and for scans",
        arms=_arms(setting),
        baseline=f"vit_{MAIN}_p8",
        metrics=METRICS,
        measure=measure,
        checks=partial(_checks, setting=setting),
        limits=(
            f"{setting.dim} channels, {setting.depth} blocks, {len(train)} images and {setting.epochs} epochs: the "
            "largest number of tokens is "
            f"{max((size // side) ** 2 for size, sides in setting.patches.items() for side in sides)}, patches of one "
            "pixel are those of the smallest images at the toy scale, and the exponent is not the paper's. Enlarging "
            "images by two and taking patches of twice the side shows each token the same pixels as a smaller patch "
            "does, so that it should give that patch's gain: that check is kept as it was planned"
        ),
        data=f"{words}; {setting.scenes} drawn scenes",
    )


def _arms(setting: Setting) -> dict[str, str]:
    arms = {
        f"{family}_{size}_p{side}": f"{family}, {size} pixels, {(size // side) ** 2} tokens"
        for family in FAMILIES
        for size, sides in setting.patches.items()
        for side in sides
    }
    arms |= {f"{family}_enlarged_p8": f"{family}, {MAIN} pixels enlarged by 2, patches of 8" for family in FAMILIES}
    return arms | {
        f"dense_{head}_p{side}": f"ViT with patches of {side}, segmentation by a {head} head"
        for side in (8, 2)
        for head in HEADS
    }


def _measured(arm: str, seed: int, setting: Setting, train: Split, test: Split) -> dict[str, float]:
    family, what, side = arm.split("_")
    patch = int(side.removeprefix("p"))
    if family == "dense":
        return {"miou": segmented(patch, what, seed, setting), "tokens": (MAIN // patch) ** 2}

    def make(patch: int, size: int) -> Backbone:
        if what == "enlarged":
            return Enlarged(network(family, patch, 2 * size, setting), 2)
        return network(family, patch, size, setting)

    size = MAIN if what == "enlarged" else int(what)
    one = row(family, make, patch, size, seed, setting, train, test)
    counts = {"params_k": one.params / 1e3, "mmacs": one.macs / 1e6, "activations_k": one.activations / 1e3}
    tokens = one.tokens * (4 if what == "enlarged" else 1)
    return {"loss": one.loss, "top1": one.top1, "tokens": tokens, **counts}


def _checks(measured: Measured, setting: Setting) -> Sequence[Check]:
    loss = {arm: measured.mean(arm, "loss") for arm in measured.values if not arm.startswith("dense")}
    checks = []
    for family in FAMILIES:
        sizes = {size: [f"{family}_{size}_p{side}" for side in sides] for size, sides in setting.patches.items()}
        steps = [loss[f"{family}_{MAIN}_p{side}"] for side in (8, 4, 2)]
        words = "; ".join(f"{size} pixels: {_fitted(measured, arms)}" for size, arms in sizes.items())
        checks.append(Check(f"{family}: test loss falls from p = 8 to 4 to 2", _falls(steps), words))
    for family in FAMILIES:
        before, smaller = loss[f"{family}_{MAIN}_p8"], loss[f"{family}_{MAIN}_p4"]
        gain, other = before - smaller, before - loss[f"{family}_enlarged_p8"]
        found = f"loss falls by {gain:.3f} with p = 4, by {other:.3f} with p = 8 of enlarged images (equal tokens)"
        checks.append(Check(f"{family}: enlarged images do not give the gain of smaller patches", other < gain, found))
    gaps = {p: measured.gain(f"dense_decoder_p{p}", f"dense_linear_p{p}", "miou") for p in (8, 2)}
    found = "; ".join(
        f"p = {p}: {gap.mean():+.1f} points (seeds: {', '.join(f'{one:+.1f}' for one in gap)}), linear "
        f"{measured.mean(f'dense_linear_p{p}', 'miou'):.1f} %"
        for p, gap in gaps.items()
    )
    shrinks = bool(gaps[2].mean() < gaps[8].mean())
    return [*checks, Check("the decoder's gain over a linear head shrinks from p = 8 to p = 2", shrinks, found)]


def _falls(losses: Sequence[float]) -> bool:
    return all(after < before for before, after in pairwise(losses))


def _fitted(measured: Measured, arms: Sequence[str]) -> str:
    """Losses of arms and the law through all their seeds, in words."""
    means = ", ".join(f"{arm.rpartition('_')[2]} {measured.mean(arm, 'loss'):.3f}" for arm in arms)
    values = [measured.values[arm] for arm in arms]
    tokens, losses = (np.concatenate([one[name] for one in values]).tolist() for name in ("tokens", "loss"))
    if len(tokens) < 3:
        return means
    found = law(tokens, losses)
    low, high = found.interval
    return f"{means}, exponent {found.exponent:.3f} ({low:.3f} to {high:.3f}), R2 {found.r2:.2f}"
