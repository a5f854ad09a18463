"""IBN-Net: residual and dense networks with instance norm where the appearance of an image still shows.

The norms (`vertebra.blocks.ibn`, arXiv 1807.09441) change nothing but themselves, so the networks are timm's after a
surgery, `to_ibn`:

- a: the first norm of every residual block is half instance norm, in all stages but the last. In DenseNets it is
  that of every third layer of the first three blocks, with four tenths of the channels.
- b: instance norm follows the addition of the last block of stages 1 and 2, and takes the stem's batch norm's place.

Instance norm needs more than one cell: images must be larger than the stride of the last stage that has it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

from timm.layers.drop import DropPath
from timm.layers.squeeze_excite import SEModule
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vertebra.backbones.building import build, check_at_least, check_images, drop_rates
from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.blocks.ibn import VARIANTS as IBN
from vertebra.blocks.ibn import from_batch_norm, ibn
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.parity import convert
from vertebra.shipping import weights as weight_files
from vertebra.surgery.operation import put

VARIANTS = {
    "resnet50_a": {"timm": "resnet50", "kind": "a"},
    "resnet50_b": {"timm": "resnet50", "kind": "b"},
    "resnet18_a": {"timm": "resnet18", "kind": "a"},
    "resnet18_b": {"timm": "resnet18", "kind": "b"},
    "resnet34_a": {"timm": "resnet34", "kind": "a"},
    "resnet34_b": {"timm": "resnet34", "kind": "b"},
    "resnet101_a": {"timm": "resnet101", "kind": "a"},
    "resnet101_b": {"timm": "resnet101", "kind": "b"},
    "resnet152_a": {"timm": "resnet152", "kind": "a"},
    "resnet152_b": {"timm": "resnet152", "kind": "b"},
    "resnext101_a": {"timm": "resnext101_32x4d", "kind": "a"},
    "se_resnet101_a": {"timm": "seresnet101", "kind": "a"},
    "densenet121_a": {"timm": "densenet121", "kind": "a"},
    "densenet169_a": {"timm": "densenet169", "kind": "a"},
    "nano": {"blocks": 1, "kind": "a", "image_size": 32},
}

Kind = Literal["a", "b"]


class IbnNetOptions(TimmOptions, total=False):
    """Options of IBN-Net; of timm's, `nano` takes all but `network`.

    Attributes:
        weights: a file or folder holds a network with these norms, ours or as it was published; anything else is as
            in `TimmOptions`, the plain network's weights, of which `from_batch_norm` keeps what has a meaning.
    """


def ibn_net(variant: str = "resnet50_a", **options: Unpack[IbnNetOptions]) -> "Timm | SmallResNet":
    """Build a network with instance and batch norm.

    Args:
        variant: which network, and where its instance norms are.
        options: as in `IbnNetOptions`.

    Raises:
        UsageError: an unknown variant or option, or an image size that leaves an instance norm one cell.
        VertebraError: weights that are not here or do not fit.
    """
    if variant == "nano":
        if options.get("network"):
            raise UsageError("ibn_net/nano is none of timm's networks; leave network=... out")
        return build("ibn_net", VARIANTS, variant, {k: v for k, v in options.items() if k != "network"}, _small)
    plain = {name: {"timm": entry["timm"]} for name, entry in VARIANTS.items() if "timm" in entry}
    given, file = dict(options), _file(options.get("weights"))
    if file:
        given["weights"] = "random"
    backbone = build_variant("ibn_net", {**plain, "nano": {}}, variant, given)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, SEModule):
            put(backbone, name, _squeeze(module))
    to_ibn(backbone, VARIANTS[variant]["kind"])
    if file:
        _load(backbone, f"ibn_net/{variant}", file, bool(options.get("allow_pickle")))
    return backbone


def _squeeze(layer: SEModule) -> SEModule:
    """Squeeze-and-excitation as the authors have it: without biases."""
    made = SEModule(layer.fc1.in_channels, rd_channels=layer.fc1.out_channels, bias=False).to(layer.fc1.weight)
    made.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name.endswith("weight")})
    return made


def to_ibn(backbone: nn.Module, kind: Kind) -> tuple[str, ...]:
    """Put instance norms into a network in place, where the paper has them; gains and shifts stay.

    Args:
        backbone: a residual network with modules named as timm's (`layer1.0.bn1`, `act2`), or timm's DenseNet for a.
        kind: "a" or "b", as this page says.

    Returns:
        The names of the layers that changed.

    Raises:
        UsageError: a network of another kind, or one that does not fit.
    """
    if kind not in ("a", "b"):
        raise UsageError(f"ibn_net: kind is {kind!r}; it must be a or b")
    stages = dict(_stages(backbone))
    if len(stages) > 1 and kind == "a":
        whole = list(stages.items())[:-1]
        return _replaced(backbone, [f"{name}.{block}.bn1" for name, depth in whole for block in range(depth)])
    if len(stages) > 1:
        return _replaced_b(backbone, list(stages.items())[:2])
    dense = [name for name, _ in backbone.named_modules() if _is_split(name)]
    if dense and kind == "a":
        return _replaced(backbone, dense, **IBN["dense"])
    raise UsageError(
        f"ibn_net: {type(backbone).__name__} has neither stages layer1, layer2 ... of blocks"
        f"{', which kind b needs' if dense else ' nor dense blocks'}; place its norms with swap(backbone, ..., 'ibn')"
    )


def _stages(backbone: nn.Module) -> Iterator[tuple[str, int]]:
    """The stages of a residual network by name, and how many blocks each has."""
    for name, stage in backbone.named_modules():
        if isinstance(stage, nn.Sequential) and re.search(r"(^|\.)layer\d$", name):
            yield name, len(stage)


def _is_split(name: str) -> bool:
    """Whether a norm is the first one of every third layer, from the first on, in the dense blocks 1 to 3."""
    found = re.search(r"(?:^|\.)denseblock([123])\.denselayer(\d+)\.norm1$", name)
    return found is not None and int(found[2]) % 3 == 1


def _replaced(backbone: nn.Module, names: Iterable[str], **options: Any) -> tuple[str, ...]:
    """Other norms in place of these batch norms; all of them or, where one is none, nothing."""
    layers = dict(backbone.named_modules())
    made = {name: from_batch_norm(layers.get(name, nn.Identity()), **options) for name in names}
    for name, norm in made.items():
        put(backbone, name, norm)
    return tuple(made)


def _replaced_b(backbone: nn.Module, stages: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """The stem's norm, and a norm before the last activation of each of these stages."""
    changed = list(_replaced(backbone, [f"{next(iter(stages))[0].removesuffix('layer1')}bn1"], share=1.0))
    for name, depth in stages:
        block: Any = backbone.get_submodule(f"{name}.{depth - 1}")
        last, end = _last_names(block)
        norm = ibn(getattr(block, last).num_features, "whole").to(next(block.parameters()))
        setattr(block, end, nn.Sequential(norm.train(block.training), getattr(block, end)))
        changed.append(f"{name}.{depth - 1}.{end}")
    return tuple(changed)


def _last_names(block: nn.Module) -> tuple[str, str]:
    """The last norm of a block, and the activation after its addition, as timm calls them."""
    return ("bn3", "act3") if hasattr(block, "bn3") else ("bn2", "act2")


def published(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The authors' released weights (XingangPan/IBN-Net, MIT) under our names; their classifier is left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `ibn_net`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    end = "act3" if "network.layer1.0.bn3.weight" in backbone.state_dict() else "act2"
    rules = [
        (r"^module\.", ""),
        (r"^(fc|classifier)\.", None),
        (r"^(layer\d\.\d+)\.IN\.", rf"\1.{end}.0."),
        (r"(denselayer\d+\.norm1)\.(?=IN|BN)", r"\1.0."),
        (r"\.IN\.", ".instance."),
        (r"\.BN\.", ".batch."),
        (r"\.se\.fc\.0\.", ".se.fc1."),
        (r"\.se\.fc\.2\.", ".se.fc2."),
        (r"^", "network."),
    ]
    return convert(state, rules, backbone)


def _file(weights: str | None) -> str | None:
    """The weights where they are a file or a folder, and not words for some of timm's."""
    if weights in (None, "random", "pretrained"):
        return None
    path = Path(weights)
    is_file = path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar") or path.expanduser().exists()
    return weights if is_file else None


def _load(backbone: Timm, address: str, weights: str, allow_pickle: bool) -> None:
    """Put a file of ours, or one of the authors', into a network that has its norms."""
    opened = weight_files.locate(address, weights, allow_pickle=allow_pickle)
    state, wanted = weight_files.read(opened), backbone.state_dict()
    ours = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    own = {name: tensor for name, tensor in ours.items() if name in wanted}
    first = "features.conv0.weight" if "network.features.conv0.weight" in wanted else "conv1.weight"
    found = own if wanted.keys() <= own.keys() else published(_for_channels(state, first, backbone), backbone)
    backbone.load_state_dict(found)
    backbone.weights_info = opened.info


def _for_channels(state: Mapping[str, Tensor], first: str, backbone: Backbone) -> dict[str, Tensor]:
    """Released weights whose first convolution takes the images' channels."""
    channels, found = backbone.preprocess.channels, dict(state)
    for name in (first, f"module.{first}"):
        if name in found and found[name].shape[1] != channels:
            found[name] = adapt_input_conv(channels, found[name])
    return found


def _small(
    *, preprocess: Preprocess, blocks: int = 1, width: int = 16, kind: Kind = "a", drop_path: float = 0.0
) -> "SmallResNet":
    network = SmallResNet(preprocess=preprocess, blocks=blocks, width=width, drop_path=drop_path)
    to_ibn(network, kind)
    return network


class SmallResNet(Backbone):
    """A residual network of three stages for small images, batch norm throughout; `to_ibn` puts the other norms in.

    Strides 1, 2, 4; `width`, twice and four times as many channels. Ours, for tests and effects; modules are named as
    those of timm's residual networks.

    Attributes:
        conv1: of the stem, with `bn1` and `act1`.
        layer1: the first stage; `layer2` and `layer3` follow.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "conv1", "classifier": "head"}

    def __init__(self, *, preprocess: Preprocess, blocks: int, width: int = 16, drop_path: float = 0.0) -> None:
        check_at_least("ibn_net", 1, blocks=blocks)
        check_at_least("ibn_net", 2, width=width)
        super().__init__()
        self.preprocess = preprocess
        self.conv1 = nn.Conv2d(preprocess.channels, width, 3, 1, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        widths, rates = (width, 2 * width, 4 * width), drop_rates(drop_path, (blocks,) * 3)
        for number, (before, after) in enumerate(zip((width, *widths), widths, strict=False), start=1):
            places = [(before, 1 if number == 1 else 2)] + [(after, 1)] * (blocks - 1)
            made = (SmallBlock(c, after, s, rate) for (c, s), rate in zip(places, rates[number - 1], strict=True))
            self.add_module(f"layer{number}", nn.Sequential(*made))
        self.levels = tuple(Level(channels, stride) for channels, stride in zip(widths, (1, 2, 4), strict=True))
        self.width = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features.

        Raises:
            UsageError: another number of channels, or images too small for an instance norm.
        """
        check_images(self, images)
        x, maps = self.act1(self.bn1(self.conv1(images))), []
        for stage in self._stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    @property
    def _stages(self) -> tuple[nn.Module, ...]:
        return self.get_submodule("layer1"), self.get_submodule("layer2"), self.get_submodule("layer3")

    def trunk(self) -> list[nn.Module]:
        """The stem's convolution and norm, and the blocks."""
        blocks: list[nn.Module] = [block for stage in self._stages for block in stage.children()]
        return [self.conv1, self.bn1, *blocks]


class SmallBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(self.drop_path(branch) + self.downsample(x))
