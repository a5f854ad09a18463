"""Scaling on scales (S2): a backbone that looks at an image at several sizes, tile by tile, without a new parameter.

    s2(backbone)                    # from 448 pixels: all of it at 224, and four tiles of 224
    s2(backbone, "three")           # around a backbone of 336 pixels, 336, 672 and 1008, as LLaVA has it
    s2(backbone, given=1)           # images of the backbone's own size, enlarged, as in the reference's example

Each size is cut into tiles as large as the images that the backbone knows, and every tile is an image of its own: the
weights and positions are the same, and cost grows with the number of tiles. The maps of a size are glued together,
brought to one grid by area, and concatenated over channels, so that grid and number of tokens stay and the width grows.
Only what stands on top is trained. Departs from the reference (arXiv 2403.13043) where it would fail: sides that tiles
do not divide, and images that are not square.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, isfinite
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from vertebra.backbones.building import check_images, pair
from vertebra.contracts import Backbone, Effect, Features, Level, Operated
from vertebra.data.dataset import Dataset
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.surgery.operation import images_of, measured

PAPER = Paper(
    id="s2",
    title="When Do We Not Need Larger Vision Models?",
    year=2024,
    arxiv="2403.13043",
    reference="bfshi/scaling_on_scales",
    licence="MIT",
    claim=(
        "a frozen smaller model over several image scales matches or beats a larger one at a single scale in "
        "classification, segmentation, depth, multimodal language models and robotics"
    ),
    numbers="multiply-accumulates of the scales: 5 times the backbone's at two scales, 14 times at three",
    note=(
        "Surgery on any backbone. The paper's own numbers are those of language models and robots, which are not here; "
        "depth and V* neither. The effect probes classes that the backbones were not trained on, and sprites."
    ),
)

VARIANTS = {
    "two": {"scales": (1, 2)},
    "three": {"scales": (1, 2, 3)},
}

_SLACK = 1e-6
"""What a product of sides and scales may lack of a whole number by rounding."""

Fit = Literal["resize", "pad"]
Tiles = Literal["together", "in_turn"]
Resampling = Literal["bicubic", "antialiased"]
Statistics = Literal["kept", "updated"]


def s2(
    model: nn.Module,
    variant: str = "two",
    *,
    scales: Sequence[float] | None = None,
    given: float | None = None,
    onto: int = 0,
    tile: int | tuple[int, int] | None = None,
    fit: Fit = "resize",
    tiles: Tiles = "together",
    resampling: Resampling = "bicubic",
    statistics: Statistics = "kept",
    inplace: bool = False,
) -> Operated:
    """Make a backbone see several scales; fold norms before (`vertebra.surgery.fuse`), not after.

    Args:
        model: a backbone.
        variant: one of `VARIANTS`.
        scales: sizes as multiples of the backbone's own, in the order of the channels, in place of the variant's.
        given: the scale at which images are given; None is the largest, so that each size is made from all pixels
            there are. 1 enlarges images of the backbone's own size, which shows it no more than there is.
        onto: position in `scales` of the one whose grid the others are brought to.
        tile: largest tile in pixels, or (height, width), for backbones of one size and images of any shape; None cuts
            scale s into ceil(s) x ceil(s) tiles, of the image's own shape.
        fit: what happens where tiles do not divide a size: "resize" to the next one that they do, or "pad" with zeros
            at the right and the bottom, which the maps are cropped of.
        tiles: all tiles of a size in one batch, or "in_turn", which takes the memory of one.
        resampling: "bicubic" as in the reference, or "antialiased" as most images are made smaller.
        statistics: of batch norms in training mode: "kept" as they are, as for a frozen backbone; or "updated" by
            the tiles, which then depend on `tiles` and mix the scales.
        inplace: wrap `model` itself; otherwise a copy.

    Returns:
        The backbone around it (`changed` is "", the model itself), the cost before and after.

    Raises:
        UsageError: no backbone, an unknown variant, an option out of range, or a grid finer than the images.
    """
    if variant not in VARIANTS:
        raise UsageError(f"s2 has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if not isinstance(model, Backbone):
        raise UsageError(f"s2: a {type(model).__name__} is no backbone; wrap the backbone, then put what is trained on")
    before = measured(model, images_of(model, None))
    wrapped = S2(
        model if inplace else copy.deepcopy(model),
        scales=tuple(VARIANTS[variant]["scales"] if scales is None else scales),
        given=given,
        onto=onto,
        tile=tile,
        fit=fit,
        tiles=tiles,
        resampling=resampling,
        statistics=statistics,
    )
    after = measured(wrapped, images_of(wrapped, None))
    return Operated(wrapped, ("",), before.cost, after.cost)


class S2(Backbone):
    """A backbone over several scales; build it with `s2`, which explains the arguments.

    `tokens` are there where the backbone has them: first its special tokens (a class token), then the cells. Special
    tokens and `pooled` are the means over the tiles of a scale.

    Attributes:
        inner: the backbone.
        scales: in the order of the channels.
    """

    def __init__(
        self,
        inner: Backbone,
        *,
        scales: tuple[float, ...],
        given: float | None = None,
        onto: int = 0,
        tile: int | tuple[int, int] | None = None,
        fit: Fit = "resize",
        tiles: Tiles = "together",
        resampling: Resampling = "bicubic",
        statistics: Statistics = "kept",
    ) -> None:
        _check(scales, given, onto)
        for name, value, known in (
            ("fit", fit, ("resize", "pad")),
            ("tiles", tiles, ("together", "in_turn")),
            ("resampling", resampling, ("bicubic", "antialiased")),
            ("statistics", statistics, ("kept", "updated")),
        ):
            if value not in known:
                raise UsageError(f"s2: {name} is {value!r}; it can be {' or '.join(known)}")
        super().__init__()
        self.scales, self.given, self.onto = scales, given or max(scales), onto
        self.tile = None if tile is None else pair(tile)
        self.fit: Fit = fit
        self.tiles: Tiles = tiles
        self.resampling: Resampling = resampling
        self.statistics: Statistics = statistics
        self.inner = inner
        self.levels = tuple(self._level(level) for level in inner.levels)
        self.width = len(scales) * inner.width
        height, width = (max(1, round(side * self.given)) for side in inner.preprocess.size)
        self.preprocess = replace(inner.preprocess, size=(height, width))
        self.train(inner.training)

    def _level(self, level: Level) -> Level:
        stride = level.stride * self.given / self.scales[self.onto]
        if stride < 1:
            raise UsageError(
                f"s2: a map of stride {level.stride} at scale {self.scales[self.onto]} would be finer than the images,"
                f" which are given at scale {self.given}; choose another scale with onto=..., or give larger images"
            )
        return Level(len(self.scales) * level.channels, round(stride))

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) at scale `given` to features, of as many times the width as there are scales."""
        check_images(self, images)
        seen = [self._seen(images, scale) for scale in self.scales]
        pyramids = [_on_grid(list(maps), self.onto) for maps in zip(*(one.maps for one in seen), strict=True)]
        pooled = torch.cat([one.pooled for one in seen], 1)
        cells = [one.cells for one in seen if one.cells is not None]
        special = [one.special for one in seen if one.special is not None]
        if not cells:
            return Features(tuple(pyramids), pooled)
        grid = _on_grid(cells, self.onto).flatten(2).mT  # (B, N, scales * C)
        return Features(tuple(pyramids), pooled, torch.cat([torch.cat(special, 2), grid], 1))

    @property
    def whole_look(self) -> int | None:
        """Which run of the backbone sees the image in one piece, from 0; None where all see tiles."""
        runs = 0
        for scale in self.scales:
            plan = self._plan(*self.preprocess.size, scale)
            if plan.rows * plan.columns == 1:
                return runs
            runs += 1 if self.tiles == "together" else plan.rows * plan.columns
        return None

    def trunk(self) -> Sequence[nn.Module]:
        """The backbone's parts."""
        return self.inner.trunk()

    def train(self, mode: bool = True) -> "S2":
        """Training mode; batch norms stay in evaluation mode unless their statistics are to be updated."""
        super().train(mode)
        if self.statistics == "kept":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _seen(self, images: Tensor, scale: float) -> "_Seen":
        """What the backbone makes of one scale, in one piece again."""
        plan = self._plan(images.shape[2], images.shape[3], scale)
        pieces = split(self._sized(images, plan), plan.rows, plan.columns)
        if self.tiles == "together":
            found = self.inner(pieces)
        else:
            found = _stacked([self.inner(piece) for piece in pieces.chunk(plan.rows * plan.columns)])
        maps = tuple(_glued(x, plan) for x in found.pyramid)
        pooled = _mean(found.pooled, plan)
        if found.tokens is None:
            return _Seen(maps, pooled)
        height, width = found.pyramid[-1].shape[2:]
        special, cells = self.inner.parted(found.tokens, (height, width))  # of tiles * B
        return _Seen(maps, pooled, _mean(special, plan), _glued(cells, plan))

    def _plan(self, height: int, width: int, scale: float) -> "_Plan":
        """How images of a size are cut at a scale."""
        sized = [max(1, int(side * scale / self.given + _SLACK)) for side in (height, width)]
        if self.tile is None:
            rows = columns = max(1, ceil(scale - _SLACK))
            tile = ceil(sized[0] / rows), ceil(sized[1] / columns)
        else:
            tile = self.tile
            rows, columns = (ceil(side / most) for side, most in zip(sized, tile, strict=True))
        whole = rows * tile[0], columns * tile[1]
        return _Plan(rows, columns, whole, whole if self.fit == "resize" else (sized[0], sized[1]))

    def _sized(self, images: Tensor, plan: "_Plan") -> Tensor:
        """Images at a scale, always made from those that were given, and padded to whole tiles."""
        x = images
        if tuple(images.shape[2:]) != plan.shown:
            smooth = self.resampling == "antialiased"
            # half precision would shift colours, and the reference resizes in 32 bit
            x = F.interpolate(images.float(), plan.shown, mode="bicubic", antialias=smooth).to(images.dtype)
        if plan.shown != plan.whole:
            x = F.pad(x, (0, plan.whole[1] - plan.shown[1], 0, plan.whole[0] - plan.shown[0]))
        return x


class _Plan(NamedTuple):
    """How one scale is cut: tiles, the size they cover in pixels, and what of it shows the image."""

    rows: int
    columns: int
    whole: tuple[int, int]
    shown: tuple[int, int]


class _Seen(NamedTuple):
    """What is seen at one scale: maps of the whole image, and means over the tiles of vectors and special tokens."""

    maps: tuple[Tensor, ...]
    pooled: Tensor
    special: Tensor | None = None
    cells: Tensor | None = None


def split(images: Tensor, rows: int, columns: int) -> Tensor:
    """Images (B, C, H, W) to tiles (rows * columns * B, C, H / rows, W / columns), in the order row, column, image."""
    count, channels, height, width = images.shape
    tiles = images.reshape(count, channels, rows, height // rows, columns, width // columns)
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def merge(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maps of tiles (rows * columns * B, C, h, w) to maps (B, C, rows * h, columns * w); undoes `split`."""
    tiles = maps.unflatten(0, (rows, columns, -1))
    return tiles.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


def _glued(maps: Tensor, plan: _Plan) -> Tensor:
    """Maps of tiles as one, without the cells that saw padding alone."""
    whole = merge(maps, plan.rows, plan.columns)
    height, width = (
        -(-cells * shown // side) for cells, shown, side in zip(whole.shape[2:], plan.shown, plan.whole, strict=True)
    )
    return whole[:, :, :height, :width]


def _mean(x: Tensor, plan: _Plan) -> Tensor:
    """Vectors or tokens of tiles (rows * columns * B, ...) to their means (B, ...)."""
    return x.unflatten(0, (plan.rows * plan.columns, -1)).mean(0)


def _on_grid(maps: Sequence[Tensor], onto: int) -> Tensor:
    """Maps of all scales at the size of one, side by side in the channels."""
    height, width = maps[onto].shape[2:]
    return torch.cat([_by_area(x, (height, width)) for x in maps], 1)


def _by_area(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x.float(), size, mode="area").to(x.dtype)


def _stacked(parts: Sequence[Features]) -> Features:
    """Features of batches as those of one."""
    pyramid = tuple(torch.cat(maps) for maps in zip(*(part.pyramid for part in parts), strict=True))
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return Features(pyramid, torch.cat([part.pooled for part in parts]), torch.cat(tokens) if tokens else None)


def _check(scales: Sequence[float], given: float | None, onto: int) -> None:
    """Refuse options that describe nothing."""
    if not scales or not all(isfinite(scale) and scale > 0 for scale in scales):
        raise UsageError(f"s2: scales is {tuple(scales)}; they must be above 0, as (1, 2)")
    if given is not None and not (isfinite(given) and given > 0):
        raise UsageError(f"s2: given is {given}; it must be a scale above 0, as 2")
    if tuple(scales) == (1,) and given in (None, 1):
        raise UsageError("s2: at scale 1 alone nothing changes; give more scales, as (1, 2)")
    if not 0 <= onto < len(scales):
        raise UsageError(f"s2: onto is {onto}; it must be the position of one of the {len(scales)} scales, from 0")


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """A small backbone over two scales beside a large one, and beside what the scales could be mistaken for."""
    from vertebra.surgery.s2.experiment import experiment

    return experiment(scale, data)
