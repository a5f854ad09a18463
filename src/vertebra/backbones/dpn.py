"""DPN: a residual path that is added to and a dense path that is concatenated to, in every block.

Each block (`vertebra.blocks.dual_path`) reads both paths at once and writes to both, so features are reused as in
ResNet and new ones are kept as in DenseNet. The maps of the pyramid are both paths concatenated. The 3 x 3
convolutions are grouped; norms stand before the convolutions, with eps 1e-3.

timm follows the authors' MXNet networks and carries their weights. 48b is timm's own, smaller; the `b` networks end
each block in two convolutions instead of one, at the same parameter count. Written here (`DPN`) is what takes other
numbers than timm's do, `nano` for one. The authors' pooling at test time (half mean, half maximum of the class map)
belongs to a classifier and is not part of the backbone.
"""

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images
from vertebra.backbones.timm import Timm, TimmOptions, build_either
from vertebra.blocks.dual_path import EPS, DualPath
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="dpn",
    title="Dual Path Networks",
    year=2017,
    arxiv="1707.01629",
    reference="cypw/DPNs",
    licence="none stated",
    claim=(
        "DPN-98 beats ResNeXt-101 64x4d with a 26 % smaller model, 25 % less compute and 8 % less memory; ImageNet "
        "top-1 error 19.93 % (DPN-131)"
    ),
    note="The README's 2.5 GMACs for DPN-68 are 7 % above any count of the network; the released network is kept.",
)

VARIANTS = {
    "68": {"timm": "dpn68"},
    "48b": {"timm": "dpn48b"},
    "68b": {"timm": "dpn68b"},
    "92": {"timm": "dpn92"},
    "98": {"timm": "dpn98"},
    "131": {"timm": "dpn131"},
    "107": {"timm": "dpn107"},
    "nano": {
        "depths": (2, 2, 2),
        "residual": (32, 64, 128),
        "growth": (8, 8, 16),
        "inner": (32, 64, 128),
        "groups": 8,
        "stem": 16,
        "image_size": 32,
    },
}


class DPNOptions(TimmOptions, total=False):
    """Options; those below are of the networks written here, and `network` of timm's. A variant sets some.

    Attributes:
        depths: blocks a stage.
        residual: channels of the residual path, a number a stage.
        growth: channels that a block appends to the dense path; 0 makes a pre-activation ResNeXt.
        inner: width of the 3 x 3 convolutions.
        groups: of these.
        stem: channels of the first convolution.
        stem_side: its kernel: 3 is one of stride 1, for small images; 7 (of stride 2, with a max-pooling) halves twice.
    """

    depths: tuple[int, ...]
    residual: tuple[int, ...]
    growth: tuple[int, ...]
    inner: tuple[int, ...]
    groups: int
    stem: int
    stem_side: int


def dpn(variant: str = "68", **options: Unpack[DPNOptions]) -> "Timm | DPN":
    """Build a dual path network.

    Args:
        variant: one of `VARIANTS`.
        options: as in `DPNOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range or of the other kind of network.
    """
    return build_either(PAPER.id, VARIANTS, variant, options, DPN)


class DPN(Backbone):
    """Stem, stages of dual path units, a last norm and activation; build it with `dpn`.

    Attributes:
        stem: image to the first map.
        stages: units.
        last: norm and activation of both paths together.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "classifier"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depths: Sequence[int],
        residual: Sequence[int],
        growth: Sequence[int],
        inner: Sequence[int],
        groups: int = 32,
        stem: int = 64,
        stem_side: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("dpn", 1, depths=depths, residual=residual, inner=inner, groups=groups, stem=stem)
        check_at_least("dpn", 0, growth=growth)
        if not len(depths) == len(residual) == len(growth) == len(inner) or stem_side not in (3, 7) or drop_path:
            raise UsageError(
                f"dpn: depths {depths}, residual {residual}, growth {growth} and inner {inner} need as many numbers,"
                f" stem_side ({stem_side}) is 3 or 7, and there is no stochastic depth (drop_path is {drop_path})"
            )
        if any(width % groups for width in inner):
            raise UsageError(f"dpn: inner is {inner}; each must be a multiple of groups ({groups})")
        super().__init__()
        self.preprocess = preprocess
        large = stem_side == 7
        conv = nn.Conv2d(preprocess.channels, stem, stem_side, 2 if large else 1, stem_side // 2, bias=False)
        pool = [nn.MaxPool2d(3, 2, 1)] if large else []
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(stem, eps=EPS), nn.ReLU(inplace=True), *pool)
        inputs, stages, widths = stem, [], []
        for stage, depth in enumerate(depths):
            units = []
            for unit in range(depth):
                stride = 2 if stage and not unit else 1
                widths_of = inner[stage], residual[stage], growth[stage]
                units.append(DualPath(inputs, *widths_of, groups=groups, stride=stride, first=not unit))
                inputs = residual[stage] + (3 + unit) * growth[stage]
            stages.append(nn.Sequential(*units))
            widths.append(inputs)
        self.stages = nn.ModuleList(stages)
        self.last = nn.Sequential(nn.BatchNorm2d(inputs, eps=EPS), nn.ReLU(inplace=True))
        finest = 4 if large else 1
        self.levels = tuple(Level(width, finest << stage) for stage, width in enumerate(widths))
        self.width = inputs

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features; the last map is that behind the last norm and activation."""
        check_images(self, images)
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = torch.cat(stage(x), 1)
            maps.append(x)
        x = maps[-1] = self.last(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, the units, the last norm."""
        return [self.stem, *(unit for stage in self.stages for unit in stage.children()), self.last]


def published(state: Mapping[str, Tensor], backbone: DPN) -> dict[str, Tensor]:
    """Timm's weights of `dpn*` without a b, which are the authors', under our names; their classifier is left out.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules: list[tuple[str, str | None]] = [(r"^classifier\.", None), (r"^features\.conv1_1\.conv\.", "stem.0.")]
    rules += [(r"^features\.conv1_1\.bn\.", "stem.1."), (r"^features\.conv5_bn_ac\.bn\.", "last.0.")]
    for stage in range(4):
        for unit in range(len(list(backbone.stages[stage].children())) if stage < len(backbone.stages) else 0):
            rules.append((rf"^features\.conv{stage + 2}_{unit + 1}\.", f"stages.{stage}.{unit}."))
    parts = {r"c1x1_w_s[12]": "project", "c1x1_a": "reduce", "c3x3_b": "middle", "c1x1_c": "expand"}
    rules += [(rf"\.{theirs}\.", f".{ours}.") for theirs, ours in parts.items()]
    rules += [
        (r"(project|reduce|middle|expand)\.bn\.", r"\1.0."),
        (r"(project|reduce|middle|expand)\.conv\.", r"\1.2."),
    ]
    return convert(state, rules, backbone)
