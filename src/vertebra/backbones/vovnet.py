"""VoVNet: modules that concatenate all their layers once, at the end.

A one-shot aggregation module (`vertebra.blocks.osa`) runs five 3 x 3 convolutions of equal width in a row, concatenates
its input and all five outputs, and mixes them with a 1 x 1 convolution. Compared with dense connections this keeps
memory access low and the device busy at the same multiply-accumulates.

Shapes: images (B, channels, H, W), four levels of strides 4 to 32, pooled (B, 1024). Poolings round up, so odd sides
give maps one cell larger. The paper has no shortcuts; the authors' code adds one, without parameters, to each module
after the first of a stage: `identity=True`, which their released weights need.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.osa import OSA, conv_norm, separable_norm
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

if TYPE_CHECKING:
    from vertebra.data.dataset import Dataset, Split

PAPER = Paper(
    id="vovnet",
    title="An Energy and GPU-Computation Efficient Backbone Network for Real-Time Object Detection",
    year=2019,
    arxiv="1904.09730",
    reference="stigma0617/VoVNet.pytorch",
    licence="none stated",
    claim=(
        "Detectors on VoVNet run twice as fast as on DenseNet with 1.6 to 4.1 times less energy, and are better at "
        "small objects than on ResNet"
    ),
    note="Energy and detection are left to a machine with a GPU and to the detectors.",
)

VARIANTS = {
    "39": {"depths": (1, 1, 2, 2)},
    "57": {"depths": (1, 1, 4, 3)},
    "27_slim": {"depths": (1, 1, 1, 1), "inner": (64, 80, 96, 112), "dims": (128, 256, 384, 512)},
    "nano": {
        "depths": (1, 1, 1, 1),
        "stem": (16, 16, 32),
        "stem_strides": (1, 1, 1),
        "inner": (16, 20, 24, 28),
        "dims": (32, 64, 96, 128),
        "layers": 3,
        "image_size": 32,
    },
}


class VoVNetOptions(BackboneOptions, total=False):
    """Options; a variant sets some.

    Attributes:
        depths: modules of the four stages.
        stem: channels of the three convolutions before them.
        stem_strides: of these.
        inner: width of the layers, a number a stage.
        dims: channels that a stage gives.
        layers: of a module.
        identity: whether modules after the first of a stage have a shortcut.
    """

    depths: tuple[int, ...]
    stem: tuple[int, ...]
    stem_strides: tuple[int, ...]
    inner: tuple[int, ...]
    dims: tuple[int, ...]
    layers: int
    identity: bool


def vovnet(variant: str = "39", **options: Unpack[VoVNetOptions]) -> "VoVNet":
    """Build a VoVNet.

    Args:
        variant: one of `VARIANTS`.
        options: as in `VoVNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("vovnet", VARIANTS, variant, options, VoVNet)


class VoVNet(Backbone):
    """Three convolutions and four stages of one-shot aggregation; build it with `vovnet` or `vovnet_v2`.

    Attributes:
        stem: image to the first map.
        stages: poolings and modules.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0.0", "classifier": "classifier"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depths: Sequence[int],
        stem: Sequence[int] = (64, 64, 128),
        stem_strides: Sequence[int] = (2, 1, 2),
        inner: Sequence[int] = (128, 160, 192, 224),
        dims: Sequence[int] = (256, 512, 768, 1024),
        layers: int = 5,
        identity: bool = False,
        depthwise: bool = False,
        attention: Literal["none", "every", "last"] = "none",
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("vovnet", 1, depths=depths, stem=stem, inner=inner, dims=dims, layers=layers)
        if not len(depths) == len(inner) == len(dims) == 4 or not len(stem) == len(stem_strides) == 3:
            raise UsageError(
                f"vovnet: depths {depths}, inner {inner} and dims {dims} need a number for each of four stages, stem"
                f" {stem} and stem_strides {stem_strides} one for each of three convolutions"
            )
        super().__init__()
        self.preprocess = preprocess
        widths, convolutions, stride = (preprocess.channels, *stem), [], 1
        for number, step in enumerate(stem_strides):
            make = separable_norm if depthwise and number else conv_norm
            convolutions.append(make(widths[number], widths[number + 1], 3, step))
            stride *= step
        self.stem = nn.Sequential(*convolutions)
        inputs, stages = stem[-1], []
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            modules: list[nn.Module] = [nn.MaxPool2d(3, 2, ceil_mode=True)] if stage else []
            for block, rate in enumerate(rates):
                module = OSA(
                    inputs,
                    dims[stage],
                    inner[stage],
                    layers,
                    depthwise=depthwise,
                    attention=attention == "every" or (attention == "last" and block == depths[stage] - 1),
                    shortcut=identity and block > 0,
                    drop_path=rate if block else 0.0,
                )
                modules.append(module)
                inputs = dims[stage]
            stages.append(nn.Sequential(*modules))
        self.stages = nn.ModuleList(stages)
        self.levels = tuple(Level(channels, stride << stage) for stage, channels in enumerate(dims))
        self.width = inputs

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The three convolutions and the modules."""
        modules = [module for stage in self.stages for module in stage.children() if isinstance(module, OSA)]
        return [*self.stem, *modules]


def published(state: Mapping[str, Tensor], backbone: VoVNet) -> dict[str, Tensor]:
    """Weights of the authors' code (VoVNet and VoVNetV2) or of timm under our names; classifiers are left out.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    timms = any(name.startswith("stages.") for name in state)
    return convert(state, _timms(separable=any("conv_dw" in name for name in state)) if timms else _authors(), backbone)


def _authors() -> Rules:
    rules: list[tuple[str, str | None]] = [(r"^module\.", ""), (r"^classifier\.", None)]
    rules += [(rf"^stem\.stem_{number}/", f"stem.{number - 1}./") for number in (1, 2, 3)]
    for stage, block in product(range(4), range(_MOST)):
        rules.append((rf"^stage{stage + 2}\.OSA{stage + 2}_{block + 1}\.", f"stages.{stage}.{block + (stage > 0)}."))
    rules += [(r"\.concat\.", ".mix."), (r"\.conv_reduction\.", ".reduce."), (r"\.ese\.fc\.", ".attention.linear.")]
    parts = {"conv": 0, "norm": 1, "dw_conv3x3": 0, "pw_conv1x1": 1, "pw_norm": 2}
    return rules + [(rf"[^./]*/{name}\.", f"{number}.") for name, number in parts.items()]


def _timms(*, separable: bool) -> Rules:
    rules: list[tuple[str, str | None]] = [(r"^head\.", None)]
    rules += [(rf"^stages\.0\.blocks\.{block}\.", f"stages.0.{block}.") for block in range(_MOST)]
    for stage, block in product((1, 2, 3), range(_MOST)):
        rules.append((rf"^stages\.{stage}\.blocks\.{block}\.", f"stages.{stage}.{block + 1}."))
    rules += [(r"\.attn\.fc\.", ".attention.linear."), (r"\.conv_(dw|conv)\.", ".0."), (r"\.conv_pw\.", ".1.")]
    if separable:
        rules.append((r"(stem\.[12]|conv_mid\.\d)\.bn\.", r"\1.2."))
    rules += [(r"\.conv\.", ".0."), (r"\.bn\.", ".1.")]
    rules += [(r"\.conv_mid\.", ".layers."), (r"\.conv_concat\.", ".mix."), (r"\.conv_reduction\.", ".reduce.")]
    return rules


_MOST = 9
"""Modules of a stage, in the deepest of the networks."""


class _Dense(nn.Module):
    """Layers that each see the input and all outputs before them, mixed at the end: what aggregation once replaces."""

    def __init__(self, inputs: int, outputs: int, inner: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv_norm(inputs + number * inner, inner, 3) for number in range(layers))
        self.mix = conv_norm(inputs + layers * inner, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return self.mix(x)


class _Residual(nn.Module):
    """Pairs of layers with shortcuts, between 1 x 1 convolutions to and from their width."""

    def __init__(self, inputs: int, outputs: int, inner: int, layers: int) -> None:
        super().__init__()
        self.reduce = conv_norm(inputs, inner, 1)
        self.pairs = nn.ModuleList(
            nn.Sequential(conv_norm(inner, inner, 3), *conv_norm(inner, inner, 3)[:2]) for _ in range(layers // 2)
        )
        self.mix = conv_norm(inner, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        for pair in self.pairs:
            x = (x + pair(x)).relu()
        return self.mix(x)


_ARMS = {
    "osa": "one-shot aggregation",
    "dense": "dense connections",
    "residual": "shortcuts around pairs of layers",
}
_LAYERS = (4, 6, 8)
_INNER = (16, 20, 24, 28)
_SETTINGS = {"toy": (4000, 10), "gpu": (50_000, 60)}
"""Images and epochs of the accuracies."""


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> Effect:
    """Networks of equal multiply-accumulates that differ in how layers are connected: accuracy, speed, memory."""
    from vertebra.arms import parts

    images, epochs = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        top1, memory = _top1(arm, seed, train, test, epochs)
        return {"top1": top1, "memory": memory, **_speeds(arm, seed)}

    times = {f"ms_{layers}": "ms" for layers in _LAYERS}
    accesses = {f"access_{layers}": "M" for layers in _LAYERS}
    return Effect(
        claim="concatenating once is faster than concatenating everywhere at equal compute, and as accurate",
        arms=_ARMS,
        baseline="dense",
        metrics={"top1": "%", "memory": "MB", "macs": "M", **times, **accesses},
        measure=measure,
        checks=_checks,
        limits=(
            f"accuracy: {len(train)} images of 32 pixels, {epochs} epochs; speed: one thread of this machine, 8 images "
            f"of 112 pixels, modules of {', '.join(map(str, _LAYERS))} layers, other work beside it; memory is that of "
            "the tensors a training step keeps for its backward pass"
        ),
        data=words,
    )


def _network(arm: str, layers: int, *, inner: Sequence[int], size: int, strides: Sequence[int]) -> VoVNet:
    """The nano network, its modules replaced by an arm's of the same shape."""
    network = vovnet("nano", layers=layers, image_size=size, stem_strides=tuple(strides), inner=tuple(inner))
    kinds = {"dense": _Dense, "residual": _Residual}
    for stage in network.stages:
        old: Any = stage[-1]  # type: ignore[index]
        if arm in kinds:
            inputs, outputs = old.mix[0].in_channels, old.mix[0].out_channels
            width = old.layers[0][0].out_channels
            stage[-1] = kinds[arm](inputs - layers * width, outputs, width, layers)  # type: ignore[index, operator]
    return network


def _matched(arm: str, layers: int, size: int, strides: Sequence[int]) -> VoVNet:
    """An arm's network with the widths that bring its multiply-accumulates nearest to one-shot aggregation's."""
    from vertebra.training.cost import count

    def made(share: int) -> VoVNet:
        inner = [max(1, round(share * width / 40)) for width in _INNER]
        return _network(arm, layers, inner=inner, size=size, strides=strides)

    if arm == "osa":
        return made(40)
    with torch.device("meta"):
        wanted = count(_network("osa", layers, inner=_INNER, size=size, strides=strides)).macs
        low, high = 1, 80
        while low < high:  # costs rise with the share
            middle = (low + high) // 2
            low, high = (middle + 1, high) if count(made(middle)).macs < wanted else (low, middle)
        best = min((low - 1, low), key=lambda share: abs(count(made(share)).macs - wanted))
    return made(best)


def _top1(arm: str, seed: int, train: "Split", test: "Split", epochs: int) -> tuple[float, float]:
    """Accuracy in percent, and MB that the backward pass of a step on 64 images needs."""
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    network = _matched(arm, _LAYERS[0], 32, (1, 1, 2))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = network.train()(torch.zeros(64, 3, 32, 32))
    assert features.pooled.requires_grad  # what it keeps lives until here
    plan = Plan(epochs=epochs, batch=64, lr=3e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    return trained(network, train, test, plan).scores["top1"], sum(kept.values()) / 2**20


def _speeds(arm: str, seed: int) -> dict[str, float]:
    """Time of a forward pass and the paper's memory access cost for modules of each length."""
    import statistics
    import time

    from vertebra.training.cost import count

    found = {}
    for layers in _LAYERS:
        torch.manual_seed(seed)
        network = _matched(arm, layers, 112, (2, 1, 1)).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.randn(8, 3, 112, 112).to(memory_format=torch.channels_last)
        spent = []
        with torch.inference_mode():
            for _ in range(9):
                start = time.perf_counter()
                network(images)
                spent.append(1000 * (time.perf_counter() - start))
        found[f"ms_{layers}"] = statistics.median(spent[1:])
        found[f"access_{layers}"] = _access(network, images[:1]) / 1e6
        found["macs"] = count(network).macs / 1e6
    return found


def _access(network: nn.Module, images: Tensor) -> float:
    """Numbers that the convolutions read and write for one image: h w (c_i + c_o) + k^2 c_i c_o each (section 3.1)."""
    total = 0.0

    def note(conv: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        nonlocal total
        total += given[0].numel() + out.numel() + sum(p.numel() for p in conv.parameters())

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        network(images)
    for hook in hooks:
        hook.remove()
    return total


def _checks(measured: Measured) -> Sequence[Check]:
    from scipy.stats import spearmanr

    faster = [measured.mean("dense", f"ms_{n}") / measured.mean("osa", f"ms_{n}") for n in _LAYERS]
    access, times = ([measured.mean(arm, f"{what}_{n}") for arm in _ARMS for n in _LAYERS] for what in ("access", "ms"))
    found: Any = spearmanr(access, times)
    rank = float(found.statistic)
    gain, memory = measured.gain("osa", "dense", "top1").mean(), [measured.mean(arm, "memory") for arm in _ARMS]
    return [
        Check(
            "one-shot aggregation is at least 1.3 times as fast as dense connections",
            min(faster) >= 1.3,
            ", ".join(f"{n} layers: {ratio:.2f}" for n, ratio in zip(_LAYERS, faster, strict=True)),
        ),
        Check("memory access orders the times (Spearman at least 0.8)", rank >= 0.8, f"{rank:.2f} over 9 networks"),
        Check("it is at most 0.5 points behind dense connections", bool(gain >= -0.5), f"{gain:+.2f} points"),
        Check(
            "its training keeps less than dense connections'",
            memory[0] < memory[1],
            f"{memory[0]:.0f} against {memory[1]:.0f} MB, residual {memory[2]:.0f}",
        ),
    ]
