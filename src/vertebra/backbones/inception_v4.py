"""Inception-v4 and Inception-ResNet: parallel convolutions of several shapes, with and without residuals.

Each module runs branches of different receptive fields side by side (1x1, 3x3, and 7x7 split into 1x7 and 7x1) and
concatenates them. Inception-ResNet adds the scaled result to its input instead (`vertebra.blocks.scaled_residual`);
the scale of 0.1 to 0.2 keeps very wide networks alive. Convolutions of the stem and those that halve a map are
unpadded, so maps are a little smaller than the stride says; sides from 75 pixels up will do.

timm carries Inception-v4 and Inception-ResNet-v2 as TF-slim distributes them, with weights. Slim's v2 has a stem of the
Inception-v3 kind and 10, 20 and 10 modules. The paper's own figure, with the stem of Inception-v4 and 5, 10 and 5
modules, is `resnet_v2_paper`. Its figures write 1154 and 2048 channels where their own concatenations give 1152 and
2144, which is what this page has, as an addition needs. `resnet_v1` has no reference by the authors;
`final=True` adds the last module of the networks that faces are recognised with.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images, drop_rates
from vertebra.backbones.timm import Timm, TimmOptions, build_either
from vertebra.blocks.scaled_residual import scaled_residual
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="inception_v4",
    title="Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    year=2016,
    arxiv="1602.07261",
    reference="tensorflow/models",
    licence="Apache-2.0",
    claim=(
        "Residual connections speed up the training of Inception networks markedly; 3.08 % top-5 error on the "
        "ILSVRC test set for an ensemble of four"
    ),
    note=(
        "Nobody published the counts of Inception-ResNet-v1 and of the paper's v2: they are those of other ports of "
        "the figures."
    ),
)

VARIANTS = {
    "v4": {"timm": "inception_v4"},
    "resnet_v2": {"timm": "inception_resnet_v2"},
    "resnet_v1": {"layout": "v1", "image_size": 299},
    "resnet_v2_paper": {"layout": "v2", "image_size": 299},
    "nano": {
        "layout": "v1",
        "depths": (1, 1, 1),
        "width": 0.25,
        "padding": "same",
        "stem_stride": 1,
        "image_size": 32,
    },
}


class InceptionOptions(TimmOptions, total=False):
    """Options; timm's variants take those of `TimmOptions`, the others all but `network`.

    Attributes:
        depths: residual modules of the three stages that have some.
        scales: what their outputs are multiplied by before the addition, a number a stage.
        width: channels as a multiple of the paper's.
        padding: "valid" leaves the stem and all halvings unpadded, as the paper; "same" pads them, for small images.
        stem_stride: of the first convolution, 1 or 2.
        final: whether one more module, unscaled and without activation, ends the network, as in published face
            networks.
    """

    depths: tuple[int, int, int]
    scales: tuple[float, float, float]
    width: float
    padding: Literal["valid", "same"]
    stem_stride: int
    final: bool


def inception_v4(variant: str = "v4", **options: Unpack[InceptionOptions]) -> "Timm | InceptionResNet":
    """Build an Inception network.

    Args:
        variant: one of `VARIANTS`.
        options: as in `InceptionOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option that is out of range or not the variant's.
    """
    crop = 1.0 if variant == "nano" else 0.875
    colours = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return build_either(PAPER.id, VARIANTS, variant, options, InceptionResNet, crop=crop, **colours)


class _Conv(NamedTuple):
    """A convolution with norm and ReLU as the paper's figures write it; V in them is `padded=False`."""

    outputs: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padded: bool = True


Branch = tuple[_Conv, ...]
"""Convolutions one after the other; none at all is the max pooling 3 x 3 of stride 2."""


class _Layout(NamedTuple):
    """A network of the paper: what each of five stages opens with, and the residual module that three of them repeat.

    Attributes:
        openings: modules of parallel branches, one after the other.
        residuals: branches of the repeated module of the last three stages.
    """

    openings: tuple[tuple[tuple[Branch, ...], ...], ...]
    residuals: tuple[tuple[Branch, ...], ...]


_POOL: Branch = ()
_FIRST: tuple[tuple[Branch, ...], ...] = (
    ((_Conv(32, 3, 2, padded=False),),),
    ((_Conv(32, 3, 1, padded=False),),),
    ((_Conv(64, 3),),),
)
_LAYOUTS = {
    "v1": _Layout(
        openings=(
            _FIRST,
            ((_POOL,), ((_Conv(80),),), ((_Conv(192, 3, 1, padded=False),),)),
            (((_Conv(256, 3, 2, padded=False),),),),
            (
                (
                    (_Conv(384, 3, 2, padded=False),),
                    (_Conv(192), _Conv(192, 3), _Conv(256, 3, 2, padded=False)),
                    _POOL,
                ),
            ),
            (
                (
                    (_Conv(256), _Conv(384, 3, 2, padded=False)),
                    (_Conv(256), _Conv(256, 3, 2, padded=False)),
                    (_Conv(256), _Conv(256, 3), _Conv(256, 3, 2, padded=False)),
                    _POOL,
                ),
            ),
        ),
        residuals=(
            ((_Conv(32),), (_Conv(32), _Conv(32, 3)), (_Conv(32), _Conv(32, 3), _Conv(32, 3))),
            ((_Conv(128),), (_Conv(128), _Conv(128, (1, 7)), _Conv(128, (7, 1)))),
            ((_Conv(192),), (_Conv(192), _Conv(192, (1, 3)), _Conv(192, (3, 1)))),
        ),
    ),
    "v2": _Layout(
        openings=(
            _FIRST,
            (
                (_POOL, (_Conv(96, 3, 2, padded=False),)),
                (
                    (_Conv(64), _Conv(96, 3, 1, padded=False)),
                    (_Conv(64), _Conv(64, (1, 7)), _Conv(64, (7, 1)), _Conv(96, 3, 1, padded=False)),
                ),
            ),
            (((_Conv(192, 3, 2, padded=False),), _POOL),),
            (
                (
                    (_Conv(384, 3, 2, padded=False),),
                    (_Conv(256), _Conv(256, 3), _Conv(384, 3, 2, padded=False)),
                    _POOL,
                ),
            ),
            (
                (
                    (_Conv(256), _Conv(384, 3, 2, padded=False)),
                    (_Conv(256), _Conv(288, 3, 2, padded=False)),
                    (_Conv(256), _Conv(288, 3), _Conv(320, 3, 2, padded=False)),
                    _POOL,
                ),
            ),
        ),
        residuals=(
            ((_Conv(32),), (_Conv(32), _Conv(32, 3)), (_Conv(32), _Conv(48, 3), _Conv(64, 3))),
            ((_Conv(192),), (_Conv(128), _Conv(160, (1, 7)), _Conv(192, (7, 1)))),
            ((_Conv(192),), (_Conv(192), _Conv(224, (1, 3)), _Conv(256, (3, 1)))),
        ),
    ),
}


class InceptionResNet(Backbone):
    """Five stages, of which the last three repeat a residual module; build it with `inception_v4`.

    Attributes:
        stages: modules in the order of the signal; each stage halves the map, the first where its stride is 2.
        final: whether the last module is unscaled and not rectified.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stages.0.0.0", "classifier": "classifier"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        layout: Literal["v1", "v2"],
        depths: Sequence[int] = (5, 10, 5),
        scales: Sequence[float] = (0.17, 0.1, 0.2),
        width: float = 1.0,
        padding: Literal["valid", "same"] = "valid",
        stem_stride: int = 2,
        final: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        _check(depths, scales, width, padding, stem_stride)
        super().__init__()
        self.preprocess = preprocess
        made = _LAYOUTS[layout]
        inputs, stages, levels = preprocess.channels, [], []
        rates = drop_rates(drop_path, depths)
        for stage, opening in enumerate(made.openings):
            modules = []
            for number, branches in enumerate(opening):
                scaled = [_scaled(branch, width, padding) for branch in branches]
                if stage == number == 0:
                    scaled = [[scaled[0][0]._replace(stride=stem_stride)]]
                module = _module(inputs, scaled, padding)
                modules.append(module)
                inputs = _outputs(inputs, scaled)
            if stage > 1:
                place = stage - 2
                branches = [_scaled(branch, width, padding) for branch in made.residuals[place]]
                modules += [_residual(inputs, branches, scales[place], rate) for rate in rates[place]]
                if final and stage == 4:
                    modules.append(_residual(inputs, branches, 1.0, 0.0, activation="none"))
            stages.append(nn.Sequential(*modules))
            levels.append(Level(inputs, stem_stride << stage))
        self.stages = nn.ModuleList(stages)
        self.final = final
        self.levels = tuple(levels)
        self.width = inputs
        self._least = 75 if padding == "valid" and stem_stride == 2 else 39 if padding == "valid" else 1

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images, least=self._least)
        x, maps = images, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The convolutions of the stem and the modules, without poolings."""
        modules = [module for stage in self.stages for module in stage.children()]
        return [module for module in modules if next(module.parameters(), None) is not None]


def _check(depths: Sequence[int], scales: Sequence[float], width: float, padding: str, stem_stride: int) -> None:
    check_at_least(PAPER.id, 1, depths=depths)
    if len(depths) != 3 or len(scales) != 3:
        raise UsageError(f"{PAPER.id}: depths {depths} and scales {scales} need a number for each of three stages")
    if not width > 0:
        raise UsageError(f"{PAPER.id}: width is {width}; it is a multiple of the paper's channels, above 0")
    if padding not in ("valid", "same"):
        raise UsageError(f"{PAPER.id}: padding is {padding!r}; it can be valid or same")
    if stem_stride not in (1, 2):
        raise UsageError(f"{PAPER.id}: stem_stride is {stem_stride}; it can be 1 or 2")


def _scaled(branch: Branch, width: float, padding: str) -> list[_Conv]:
    """A branch at another width, padded everywhere where it has to be."""
    return [
        layer._replace(outputs=max(1, round(width * layer.outputs)), padded=layer.padded or padding == "same")
        for layer in branch
    ]


def _outputs(inputs: int, branches: Iterable[Sequence[_Conv]]) -> int:
    return sum(branch[-1].outputs if branch else inputs for branch in branches)


def _module(inputs: int, branches: Sequence[Sequence[_Conv]], padding: str) -> nn.Module:
    """Parallel branches; one alone is a convolution or a pooling."""
    pooling = nn.MaxPool2d(3, 2, int(padding == "same"))
    if len(branches) > 1:
        return Branches(inputs, branches, pooling)
    return _conv_norm(inputs, branches[0][0]) if branches[0] else pooling


def _residual(
    inputs: int,
    branches: Sequence[Sequence[_Conv]],
    scale: float,
    drop_path: float,
    *,
    activation: Literal["relu", "none"] = "relu",
) -> nn.Module:
    linear = nn.Conv2d(_outputs(inputs, branches), inputs, 1)
    nn.init.kaiming_normal_(linear.weight)
    nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    drop = [DropPath(drop_path)] if drop_path else []
    return scaled_residual(nn.Sequential(Branches(inputs, branches), linear, *drop), scale=scale, activation=activation)


def _conv_norm(inputs: int, layer: _Conv) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU."""
    kernel = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
    padding = (kernel[0] // 2, kernel[1] // 2) if layer.padded else 0
    conv = nn.Conv2d(inputs, layer.outputs, kernel, layer.stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(layer.outputs, eps=1e-3), nn.ReLU(inplace=True))


class Branches(nn.Module):
    """Branches side by side, concatenated along the channels.

    Most branches start with a 1 x 1 convolution of the same input: these are one, whose channels are then dealt out.

    Attributes:
        shared: the 1 x 1 convolution that opens branches, of all of them together.
        branches: what is left of each.
    """

    def __init__(self, inputs: int, branches: Sequence[Sequence[_Conv]], pooling: nn.Module | None = None) -> None:
        super().__init__()
        self.opened = tuple(bool(branch) and branch[0].kernel == 1 for branch in branches)
        self.widths = [branch[0].outputs for branch, opened in zip(branches, self.opened, strict=True) if opened]
        self.shared = _conv_norm(inputs, _Conv(sum(self.widths))) if self.widths else None
        self.branches = nn.ModuleList()
        for branch, opened in zip(branches, self.opened, strict=True):
            if not branch:
                assert pooling is not None
                self.branches.append(pooling)
                continue
            widths = (branch[0].outputs if opened else inputs, *(layer.outputs for layer in branch[opened:]))
            layers = zip(widths, branch[opened:], strict=False)
            self.branches.append(nn.Sequential(*(_conv_norm(width, layer) for width, layer in layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        parts = iter(() if self.shared is None else self.shared(x).split(self.widths, 1))
        outputs = (
            branch(next(parts) if opened else x) for branch, opened in zip(self.branches, self.opened, strict=True)
        )
        return torch.cat(tuple(outputs), 1)


def published(state: Mapping[str, Tensor], backbone: InceptionResNet) -> dict[str, Tensor]:
    """Weights of facenet-pytorch's Inception-ResNet-v1 under our names, for a network with `final=True`.

    The 1 x 1 convolutions that open the branches of a module become one; the layers after the pooling are left out.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(_shared(state), _rules(backbone), backbone)


def _rules(backbone: InceptionResNet) -> list[tuple[str, str | None]]:
    """Names of facenet-pytorch -> ours, once the openings of branches are one."""
    stem = {"1a": "0.0", "2a": "0.1", "2b": "0.2", "3b": "1.1", "4a": "1.2", "4b": "2.0"}
    rules: list[tuple[str, str | None]] = [(r"^(last_linear|last_bn|logits)\.", None)]
    rules += [(rf"^conv2d_{theirs}\.", f"stages.{ours}.") for theirs, ours in stem.items()]
    for number, stage in enumerate((2, 3, 4), start=1):
        for block in range(_MOST):
            rules.append((rf"^repeat_{number}\.{block}\.", f"stages.{stage}.{block + 1}.layer."))
    if backbone.final:  # elsewhere it is left over, and the message says so
        rules.append((r"^block8\.", f"stages.4.{len(list(backbone.stages[-1].children())) - 1}.layer."))
    rules.append((r"^mixed_6a\.", "stages.3.0."))
    rules += [(r"^mixed_7a\.", "stages.4.0."), (r"\.conv2d\.", ".1."), (r"\.layer\.(shared|branches)", r".layer.0.\1")]
    return [*rules, (r"\.conv\.", ".0."), (r"\.bn\.", ".1.")]


def _shared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint whose branches are numbered as ours, their opening 1 x 1 convolutions one."""
    found: dict[str, Any] = {}
    openings: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".branch")
        if not rest:
            found[name] = tensor
            continue
        number, *path = rest.split(".")
        layer, leaf = (int(path[0]), path[1:]) if path[0].isdigit() else (0, path)  # one alone has no number
        single = "" if path[0].isdigit() is False else "0."
        opened = state[f"{module}.branch{number}.{single}conv.weight"].shape[2:].numel() == 1
        if opened and layer == 0:
            openings.setdefault(f"{module}.shared.{'.'.join(leaf)}", []).append(tensor)
        else:
            found[f"{module}.branches.{number}.{layer - opened}.{'.'.join(leaf)}"] = tensor
    return found | {name: parts[0] if not parts[0].ndim else torch.cat(parts) for name, parts in openings.items()}


_MOST = 10
"""Residual modules of a stage, in the deepest of the networks."""
