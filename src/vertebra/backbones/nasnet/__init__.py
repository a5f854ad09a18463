"""NASNet-A: a cell found by search on CIFAR-10, stacked for CIFAR-10 and for ImageNet.

A normal cell and a reduction cell of five pairs of operations each (separable convolutions, poolings, identity) were
found by a controller that samples cells and learns from their accuracy. Each cell reads the two cells before it.

`large` is NASNet-A (6 @ 4032), timm's; `mobile` is (4 @ 1056), `cifar` (6 @ 768): N normal cells a stage, and the
channels that the classifier sees. A genotype is data, so `nasnet("cifar", genotype=..., depth=2, width=16)` stacks any
cell of the search space. What training adds stays outside of the features: `auxiliary_head`, and drop paths whose
probability `vertebra.blocks.scheduled_drop_path.set_progress` moves; the paper ends at drop_path 0.4 for `cifar`, 0.3
for `large` and 0 for `mobile`.

Shapes: ImageNet networks give levels of strides 2 to 32, the others 1, 2, 4. Every map is rectified: all that reads a
cell starts with a ReLU. Departs from the released code in one thing: a state before the cell whose channels fit
already is brought in by a 1 x 1 convolution all the same, which the published cells never meet.
"""

from collections.abc import Mapping
from typing import Literal, Unpack

from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images
from vertebra.backbones.nasnet.cell import (
    NASNET_A,
    Genotype,
    Padding,
    SearchedCell,
    check_genotype,
    conv_norm,
    initialise,
)
from vertebra.backbones.timm import Timm, TimmOptions, build_either
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="nasnet",
    title="Learning Transferable Architectures for Scalable Image Recognition",
    year=2017,
    arxiv="1707.07012",
    reference="tensorflow/models",
    licence="Apache-2.0",
    claim=(
        "82.7 % ImageNet top-1, 1.2 points above the best network designed by hand at 28 % less compute; 43.1 mAP "
        "with Faster R-CNN on COCO"
    ),
    note=(
        "The search itself comes with the search pages. timm's average poolings of `large` count the padding where "
        "they halve a map with network={'pad_type': 'same'}, which the released networks do not."
    ),
)

VARIANTS = {
    "large": {"timm": "nasnetalarge"},
    "mobile": {"depth": 4, "width": 44, "stem": "imagenet", "stem_width": 32},
    "cifar": {"depth": 6, "width": 32, "stem": "cifar", "stem_width": 96, "eps": 1e-5, "image_size": 32},
    "nano": {"depth": 1, "width": 10, "stem": "cifar", "stem_width": 30, "eps": 1e-5, "image_size": 32},
}


class NasNetOptions(TimmOptions, total=False):
    """Options; timm's variants take those of `TimmOptions`, the others all but `network`. A variant sets the first.

    Attributes:
        depth: normal cells a stage, the paper's N.
        width: channels of an operation in the first stage, at least 8 for ImageNet; they double at each reduction.
        stem: "imagenet" starts with an unpadded convolution of stride 2 and two reduction cells, "cifar" with a
            convolution of stride 1.
        stem_width: channels of that convolution.
        genotype: the two cells; None takes `NASNET_A`.
        padding: of what halves a map. "same" is TensorFlow's, which pads maps of even sides at their end alone and
            which released weights need; "symmetric" pads both ends alike.
        skip_reduction: whether the cell after a reduction reads the state before what the reduction read, as `large`
            does.
        eps: of the norms.
    """

    depth: int
    width: int
    stem: Literal["imagenet", "cifar"]
    stem_width: int
    genotype: Genotype | None
    padding: Padding
    skip_reduction: bool
    eps: float


def nasnet(variant: str = "large", **options: Unpack[NasNetOptions]) -> "Timm | NASNet":
    """Build a NASNet.

    Args:
        variant: one of `VARIANTS`.
        options: as in `NasNetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant or operation, or an option that is out of range or not the variant's.
    """
    crop = 0.875 if variant == "mobile" else 1.0
    colours = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return build_either(PAPER.id, VARIANTS, variant, options, NASNet, crop=crop, **colours)


class NASNet(Backbone):
    """A stem and three stages of cells; build it with `nasnet`.

    Attributes:
        stem: a convolution and its norm.
        cells: two reduction cells for an ImageNet stem, then a stage's normal cells and a reduction, thrice without
            the last reduction.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "last_linear"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depth: int,
        width: int,
        stem: Literal["imagenet", "cifar"],
        stem_width: int,
        genotype: Genotype | None = None,
        padding: Padding = "same",
        skip_reduction: bool = False,
        eps: float = 1e-3,
        drop_path: float = 0.0,
    ) -> None:
        _check(depth, width, stem, stem_width, padding)
        chosen = genotype or NASNET_A
        check_genotype(chosen)
        super().__init__()
        self.preprocess = preprocess
        large = stem == "imagenet"
        conv = nn.Conv2d(preprocess.channels, stem_width, 3, 2 if large else 1, 0 if large else 1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(stem_width, eps))
        plan = [("reduction", width // 4), ("reduction", width // 2)] if large else []
        for stage in range(3):
            plan += [("reduction", width << stage)] * (stage > 0) + [("normal", width << stage)] * depth
        maps = [(stem_width, 2 if large else 1)]  # channels and stride of what cells have to read
        self.cells, self._before = nn.ModuleList(), []
        for number, (kind, filters) in enumerate(plan):
            skips = skip_reduction and kind == "normal" and number > 2 * large and plan[number - 1][0] == "reduction"
            self._before.append(-3 if skips else -2)
            before = maps[self._before[-1]] if number else None
            cell = SearchedCell(
                chosen[kind],
                maps[-1],
                before,
                filters,
                stride=2 if kind == "reduction" else 1,
                padding=padding,
                eps=eps,
                drop_path=drop_path * (number + 1) / len(plan),
            )
            self.cells.append(cell)
            maps.append((cell.width, maps[-1][1] * (2 if kind == "reduction" else 1)))
        deepest = {stride: (channels, number) for number, (channels, stride) in enumerate(maps)}
        self._kept = frozenset(number for _, number in deepest.values())
        self.levels = tuple(Level(channels, stride) for stride, (channels, _) in deepest.items())
        self.width = maps[-1][0]
        initialise(self)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images, least=3)
        x = self.stem(images)
        maps = [x.relu()]
        kept = [maps[0]] if 0 in self._kept else []
        for number, cell in enumerate(self.cells):
            before = maps[self._before[number]] if number else x  # the first cell reads the image's map twice
            maps = [*maps[-2:], cell(maps[-1], before)]
            if number + 1 in self._kept:
                kept.append(maps[-1])
        return Features(tuple(kept), kept[-1].mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem and the cells."""
        return [self.stem, *self.cells]


def _check(depth: int, width: int, stem: str, stem_width: int, padding: str) -> None:
    check_at_least(PAPER.id, 1, depth=depth, width=width, stem_width=stem_width)
    if stem not in ("imagenet", "cifar"):
        raise UsageError(f"{PAPER.id}: stem is {stem!r}; it can be imagenet or cifar")
    if stem == "imagenet":
        check_at_least(PAPER.id, 8, width=width)  # its first cell has a quarter, whose halves are two convolutions
    if padding not in ("same", "symmetric"):
        raise UsageError(f"{PAPER.id}: padding is {padding!r}; it can be same or symmetric")


def auxiliary_head(backbone: NASNet, classes: int) -> "AuxiliaryHead":
    """The classifier that helps to train: its loss is added with a weight of 0.4, and it is thrown away afterwards.

    Args:
        backbone: its `preprocess.size` is the size of the images that are trained on.
        classes: how many.

    Raises:
        UsageError: images too small, whose map of the second level from the end has less than 5 cells a side.
    """
    check_at_least(PAPER.id, 1, classes=classes)
    level, start = backbone.levels[-2], backbone.levels[0].stride
    sides = [(side - 1) // 2 if start == 2 else side for side in backbone.preprocess.size]
    cells = [-(-side * start // level.stride) for side in sides]
    if min(cells) < 5:
        raise UsageError(f"{PAPER.id}: the auxiliary head needs a map of 5 x 5 cells, images of this size give {cells}")
    eps = backbone.stem[1].eps
    return AuxiliaryHead(level.channels, ((cells[0] - 5) // 3 + 1, (cells[1] - 5) // 3 + 1), classes, float(eps))  # type: ignore[arg-type]


class AuxiliaryHead(nn.Module):
    """Logits from the last level but one; build it with `auxiliary_head`."""

    def __init__(self, channels: int, cells: tuple[int, int], classes: int, eps: float) -> None:
        super().__init__()
        self.cells = cells
        self.pool = nn.AvgPool2d(5, 3)
        self.project = nn.Sequential(*conv_norm(channels, 128, eps), nn.ReLU(inplace=True))
        self.whole = nn.Sequential(
            nn.Conv2d(128, 768, cells, bias=False), nn.BatchNorm2d(768, eps), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(768, classes)
        initialise(self)

    def forward(self, features: Features) -> Tensor:
        """Features of the backbone to logits (B, classes).

        Raises:
            UsageError: features of images of another size.
        """
        x = self.pool(features.pyramid[-2])
        if tuple(x.shape[2:]) != self.cells:
            raise UsageError(
                f"the auxiliary head pools to {self.cells} cells and got {tuple(x.shape[2:])}; build it with the size"
                " of the images"
            )
        return self.classifier(self.whole(self.project(x)).flatten(1))


def published(state: Mapping[str, Tensor], backbone: NASNet) -> dict[str, Tensor]:
    """Weights of pretrained-models.pytorch's mobile network, or of timm's large one, under our names.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, _rules(len(backbone.cells)), backbone)


def _rules(cells: int) -> Rules:
    """Names of pretrained-models.pytorch and of timm -> ours, for a network with so many cells."""
    depth = (cells - 4) // 3
    rules: list[tuple[str, str | None]] = [
        (r"^last_linear\.", None),
        (r"^conv0\.", "stem."),
        (r"^cell_stem_", "cells."),
    ]
    for stage in range(3):
        rules.append((rf"^reduction_cell_{stage}\.", f"cells.{2 + (stage + 1) * (depth + 1) - 1}."))
        rules += [  # they count six cells a stage, whatever its depth
            (rf"^cell_{6 * stage + number}\.", f"cells.{2 + stage * (depth + 1) + number}.") for number in range(depth)
        ]
    rules += [(r"\.conv_prev_1x1\.", ".fit."), (r"\.conv_1x1\.", ".squeeze."), (r"\.final_path_bn\.", ".fit.norm.")]
    rules += [(r"\.path_1\.conv\.", ".fit.even."), (r"\.path_2\.conv\.", ".fit.odd.")]
    rules.append((r"\.comb_iter_(\d)_(left|right)\.", r".\2.\1."))
    for half, start in ((1, 0), (2, 4)):
        rules += [(rf"\.separable_{half}\.depthwise_conv2d\.", f".{start}."), (rf"\.bn_sep_{half}\.", f".{start + 2}.")]
        rules.append((rf"\.separable_{half}\.pointwise_conv2d\.", f".{start + 1}."))
    return [*rules, (r"\.conv\.", ".0."), (r"\.bn\.", ".1.")]
