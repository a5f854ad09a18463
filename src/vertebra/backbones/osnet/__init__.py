"""OSNet: a small network for re-identification, whose blocks see several scales and weigh them by the image.

Shapes: images (B, 3, H, W), 256 x 128 pixels for people, to maps at strides 2, 4, 8, 16, and `pooled`, the 512 numbers
that two pictures of one person are compared by: the mean of the last map after a linear layer, batch norm and ReLU.
OSNet-IBN and OSNet-AIN have instance norms, which take away what cameras differ in; AIN's places were found by
`vertebra.search.osnet_ain`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images
from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.blocks.omni_scale import Gate, conv_norm, omni_scale, start
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

if TYPE_CHECKING:
    from vertebra.contracts import Effect
    from vertebra.data.dataset import Dataset

PAPER = Paper(
    id="osnet",
    title=(
        "Learning Generalisable Omni-Scale Representations for Person Re-Identification (OSNet, OSNet-IBN, OSNet-AIN)"
    ),
    year=2019,
    arxiv="1910.06827",
    reference="KaiyangZhou/deep-person-reid",
    licence="MIT",
    claim=(
        "state of the art in same-dataset person re-identification with 2.2 M parameters; OSNet-AIN, whose instance "
        "norms a differentiable search places, beats most unsupervised domain adaptation across data sets without any "
        "target data"
    ),
    note=(
        "The block is `omni_scale`, the search `osnet_ain`. The block and OSNet are of arXiv 1905.00953. The effect "
        "has no people: its identities are pictures, and its cameras filters."
    ),
)

VARIANTS = {
    "x1_0": {"dims": (64, 256, 384, 512)},
    "x0_75": {"dims": (48, 192, 288, 384)},
    "x0_5": {"dims": (32, 128, 192, 256)},
    "x0_25": {"dims": (16, 64, 96, 128)},
    "ibn_x1_0": {
        "dims": (64, 256, 384, 512),
        "stem_norm": "instance",
        "placement": ("outside", "outside", "plain", "plain", "plain", "plain"),
    },
    "ain_x1_0": {
        "dims": (64, 256, 384, 512),
        "stem_norm": "instance",
        "placement": ("inside", "inside", "plain", "inside", "inside", "plain"),
    },
    "ain_x0_75": {
        "dims": (48, 192, 288, 384),
        "stem_norm": "instance",
        "placement": ("inside", "inside", "plain", "inside", "inside", "plain"),
    },
    "ain_x0_5": {
        "dims": (32, 128, 192, 256),
        "stem_norm": "instance",
        "placement": ("inside", "inside", "plain", "inside", "inside", "plain"),
    },
    "ain_x0_25": {
        "dims": (16, 64, 96, 128),
        "stem_norm": "instance",
        "placement": ("inside", "inside", "plain", "inside", "inside", "plain"),
    },
    "nano": {
        "dims": (32, 192, 192, 256),
        "stem_norm": "instance",
        "placement": ("inside", "inside", "plain", "inside", "inside", "plain"),
        "features": 128,
        "stem": 2,
        "image_size": 32,
    },
}

PLAIN = ("plain",) * 6
"""No instance norm in any block."""


class OSNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three.

    Attributes:
        dims: channels of the stem and of the three stages.
        stem_norm: after the first convolution.
        placement: variant of `vertebra.blocks.omni_scale` of each of the six blocks, two a stage.
        features: width of `pooled`.
        stem: stride of the stem with its pool: 4, or 2 for small images, which halves all strides.
        streams: of each block.
        gate: of each block, as `vertebra.blocks.omni_scale` has it.
        middles: channels of a stage's streams; a quarter of the stage's where None.
    """

    dims: tuple[int, int, int, int]
    stem_norm: Literal["batch", "instance"]
    placement: tuple[str, ...]
    features: int
    stem: Literal[2, 4]
    streams: int
    gate: Gate
    middles: tuple[int, int, int] | None


def osnet(variant: str = "x1_0", **options: Unpack[OSNetOptions]) -> "OSNet":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `OSNetOptions`; they win over the variant's. Images are 256 x 128 unless `image_size` says
            otherwise.

    Raises:
        UsageError: an unknown variant, or options out of range.
    """
    sized = {name: {"image_size": (256, 128), **entry} for name, entry in VARIANTS.items()}
    return build("osnet", sized, variant, options, OSNet, crop=1.0, interpolation="bilinear")


class OSNet(Backbone):
    """Stem, three stages of two omni-scale blocks, a pointwise convolution and an embedding; build it with `osnet`.

    Attributes:
        stem: image to the first map.
        stages: the blocks, stage by stage.
        transitions: between stages: a pointwise convolution and a mean over 2 x 2 cells.
        last: pointwise convolution before the mean over space.
        embed: the mean to `pooled`.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "classifier"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        stem_norm: Literal["batch", "instance"] = "batch",
        placement: Sequence[str] = PLAIN,
        features: int = 512,
        stem: int = 4,
        streams: int = 4,
        gate: Gate = "channel",
        middles: Sequence[int] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        _check(dims, stem_norm, placement, features, stem, middles, drop_path)
        super().__init__()
        first, *widths = dims
        norm = InstanceNorm(first) if stem_norm == "instance" else nn.BatchNorm2d(first)
        conv = nn.Conv2d(preprocess.channels, first, 7, stem // 2, 3, bias=False)
        self.stem = nn.Sequential(conv, norm, nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        for number, (before, after) in enumerate(zip(dims, widths, strict=False)):
            blocks = []
            for inputs, variant in zip((before, after), placement[2 * number : 2 * number + 2], strict=True):
                middle = middles[number] if middles else None
                blocks.append(omni_scale(inputs, variant, outputs=after, middle=middle, streams=streams, gate=gate))
            self.stages.append(nn.Sequential(*blocks))
        self.transitions = nn.ModuleList(
            nn.Sequential(conv_norm(width, width), nn.AvgPool2d(2, 2)) for width in widths[:2]
        )
        self.last = conv_norm(widths[2], widths[2])
        self.embed = nn.Sequential(nn.Linear(widths[2], features), nn.BatchNorm1d(features), nn.ReLU(inplace=True))
        strides = [stem // 2 * 2**number for number in range(4)]
        self.levels = tuple(Level(width, stride) for width, stride in zip(dims, strides, strict=True))
        # the last maps have a cell at least, or two a side where an instance norm needs more than one
        self.least = stem * (7 if any(variant != "plain" for variant in placement[4:]) else 3) + 1
        self.width, self.preprocess = features, preprocess
        start(self)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features; the last map is that after `last`."""
        check_images(self, images, least=self.least)
        if images.device.type == "cpu":  # thin depthwise convolutions are twice as fast there with channels last
            images = images.contiguous(memory_format=torch.channels_last)
        maps = [self.stem(images)]
        x = self.pool(maps[0])
        for number, stage in enumerate(self.stages):
            maps.append(stage(x if number == 0 else self.transitions[number - 1](maps[-1])))
        maps[-1] = self.last(maps[-1])
        return Features(tuple(maps), self.embed(maps[-1].mean((2, 3))))

    def trunk(self) -> list[nn.Module]:
        """Stem, blocks and transitions in turn, last convolution, embedding."""
        first, second, third = (list(stage) for stage in self.stages)  # type: ignore[arg-type]
        between = list(self.transitions)
        return [self.stem, *first, between[0], *second, between[1], *third, self.last, self.embed]


def _check(
    dims: Sequence[int],
    stem_norm: str,
    placement: Sequence[str],
    features: int,
    stem: int,
    middles: Sequence[int] | None,
    drop_path: float,
) -> None:
    check_at_least("osnet", 1, dims=dims, features=features, **({"middles": middles} if middles else {}))
    if len(dims) != 4 or len(placement) != 6 or (middles and len(middles) != 3):
        raise UsageError(
            f"osnet: dims is {tuple(dims)}, placement {tuple(placement)}, middles {middles}; it needs 4 dims, a"
            " placement of 6 blocks, and None or 3 middles"
        )
    if stem not in (2, 4) or stem_norm not in ("batch", "instance"):
        raise UsageError(f"osnet: stem is {stem} and stem_norm {stem_norm!r}; they can be 2 or 4, batch or instance")
    if drop_path:
        raise UsageError(f"osnet: drop_path is {drop_path}; OSNet drops no branches")


def published(state: Mapping[str, Tensor], backbone: OSNet) -> dict[str, Tensor]:
    """The authors' released weights (KaiyangZhou/deep-person-reid, MIT) under our names, without their classifier.

    Args:
        state: tensors of a released checkpoint of OSNet, OSNet-IBN or OSNet-AIN.
        backbone: of `osnet`, the same variant.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    instance = "expand.1" if any(".layers." in name for name in state) else "norm"  # AIN's are inside, IBN's outside
    rules = [
        (r"^module\.", ""),
        (r"^classifier\.", None),
        (r"^conv1\.conv", "stem.0"),
        (r"^conv1\.bn", "stem.1"),
        (r"^conv5\.conv", "last.0"),
        (r"^conv5\.bn", "last.1"),
        (r"^fc\.", "embed."),
        (r"^pool2\.0\.|^conv2\.2\.0\.", "transitions.0.0."),
        (r"^pool3\.0\.|^conv3\.2\.0\.", "transitions.1.0."),
        (r"^(transitions\.\d\.0)\.conv", r"\1.0"),
        (r"^(transitions\.\d\.0)\.bn", r"\1.1"),
        *((rf"^conv{number + 2}\.(?=\d)", f"stages.{number}.") for number in range(3)),
        (r"\.conv2a\.", ".streams.0.0."),
        *((rf"\.conv2{letter}\.", f".streams.{number}.") for number, letter in enumerate("bcd", start=1)),
        (r"\.conv2\.(\d)\.layers\.", r".streams.\1."),
        (r"(streams\.\d\.\d)\.conv1", r"\1.0"),
        (r"(streams\.\d\.\d)\.conv2", r"\1.1"),
        (r"(streams\.\d\.\d)\.bn", r"\1.2"),
        *((rf"\.{theirs}\.conv", f".{ours}.0") for theirs, ours in _PARTS.items()),
        *((rf"\.{theirs}\.bn", f".{ours}.1") for theirs, ours in _PARTS.items()),
        (r"\.gate\.fc1", ".gate.squeeze"),
        (r"\.gate\.fc2", ".gate.excite"),
        (r"\.IN\.", f".{instance}."),
    ]
    return convert(state, rules, backbone)


_PARTS = {"conv1": "reduce", "conv3": "expand", "downsample": "shortcut"}


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> "Effect":
    """Scales, gates and instance norms in a re-identification task made of any pictures, and the search for places."""
    from vertebra.backbones.osnet.cameras import comparison

    return comparison(scale, data)
