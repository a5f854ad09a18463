"""ContMix: depthwise kernels of two sizes that each cell predicts from its affinity to the regions of the whole map.

Shapes: (B, C, H, W) in, the same out. A cell's query meets the keys of 7 x 7 pooled regions; a linear map turns the 49
affinities into the weights of a 5 x 5 and of a large kernel, with a bias for each relative position and a softmax over
each kernel. Half of the channels is mixed with the one, half with the other. Windows are shifted inwards at borders,
as in neighbourhood attention. From OverLoCK (arXiv 2502.20087, section 3.3); used in `vertebra.backbones.overlock` and
through `vertebra.surgery.swap`.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def contmix(channels: int, *, kernel: int = 7, small: int = 5, heads: int = 2, pool: int = 7) -> "ContMix":
    """The block for maps of `channels`, whose context is the map itself.

    Args:
        channels: of the maps, a multiple of 4 * heads.
        kernel: odd size of the large kernel in cells. A smaller map is enlarged to it and averaged back.
        small: odd size of the kernel of the first half of the channels, at most `kernel`.
        heads: as published; each of the two kernels has twice as many groups of channels with weights of their own.
        pool: regions of the context along a side.

    Raises:
        UsageError: sizes below 1, even kernels, small above kernel, or channels that the heads do not divide.
    """
    return ContMix(channels, kernel=kernel, small=small, heads=heads, pool=pool)


class ContMix(nn.Module):
    """Values from a map, mixed by kernels from the same map; build it with `contmix`."""

    def __init__(self, channels: int, *, kernel: int, small: int, heads: int, pool: int) -> None:
        super().__init__()
        self.mix = Mixing(channels, channels, kernel=kernel, small=small, heads=heads, pool=pool)
        self.value = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps."""
        grid = self.mix.grid(x)
        larger = _resized(x, grid)  # the norms behind it see what the reference's see
        return self.mix(self.value(larger), larger, larger, size=(x.shape[2], x.shape[3]))


class Mixing(nn.Module):
    """Kernels from queries and a context, and values mixed by them.

    Attributes:
        logits: affinities to the regions, to the weights of both kernels, the small one first.
        near: (2 * heads, 2 * small - 1, 2 * small - 1), bias of each relative position, of the small kernel.
        far: likewise, of the large kernel.
    """

    def __init__(self, dim: int, context: int, *, kernel: int, small: int = 5, heads: int, pool: int = 7) -> None:
        super().__init__()
        _check(dim, context, kernel, small, heads, pool)
        self.dim, self.kernel, self.small, self.groups = dim, kernel, small, 2 * heads
        self.scale = (dim // self.groups) ** -0.5
        self.query = nn.Sequential(nn.Conv2d(dim, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2))
        self.key = nn.Sequential(
            nn.AdaptiveAvgPool2d(pool), nn.Conv2d(context, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2)
        )
        self.logits = nn.Linear(pool**2, small**2 + kernel**2)
        self.near = nn.Parameter(torch.zeros(self.groups, 2 * small - 1, 2 * small - 1))
        self.far = nn.Parameter(torch.zeros(self.groups, 2 * kernel - 1, 2 * kernel - 1))
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(
        self, values: Tensor, queries: Tensor, context: Tensor, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Mix values.

        Args:
            values: (B, dim, H, W).
            queries: (B, dim, H, W).
            context: (B, context, H, W).
            size: (height, width) of the result, where it is not that of the values.

        Returns:
            (B, dim, H, W).
        """
        size = size or (values.shape[2], values.shape[3])
        values = _resized(values, self.grid(values))
        parts = zip(self.kernels(queries, context), values.chunk(2, 1), strict=True)
        mixed = [windows.mix(weights, self._grouped(value)) for (windows, weights), value in parts]
        out = torch.cat([x.permute(0, 2, 3, 1, 4).flatten(3) for x in mixed], -1).permute(0, 3, 1, 2)
        return self.project(out if out.shape[2:] == size else nn.functional.adaptive_avg_pool2d(out, size))

    def grid(self, x: Tensor) -> tuple[int, int]:
        """(height, width) at which a map is mixed: enlarged where a side is shorter than the large kernel."""
        height, width = x.shape[2:]
        short = min(height, width)
        if short >= self.kernel:
            return height, width
        tall, wide = (self.kernel if side == short else int(self.kernel / short * side) for side in (height, width))
        return tall, wide

    def kernels(self, queries: Tensor, context: Tensor) -> "list[tuple[Windows, Tensor]]":
        """The small and the large kernels of each cell of `grid`, as `Windows.mix` takes them.

        The order of the products is ours: keys meet the linear map before they meet the queries, since there are
        fewer keys than cells.
        """
        queries, context = (_resized(x, self.grid(x)) for x in (queries, context))
        q = self._grouped(self.query(queries) * self.scale)  # (B, groups, H, W, c)
        keys = self.key(context).flatten(2).unflatten(1, (self.groups, -1))  # (B, groups, c, regions)
        maps = (keys @ self.logits.weight.mT).split((self.small**2, self.kernel**2), -1)
        shifts = self.logits.bias.split((self.small**2, self.kernel**2))
        found = []
        for side, table, weight, shift in zip(
            (self.small, self.kernel), (self.near, self.far), maps, shifts, strict=True
        ):
            windows = Windows.of(q.shape[2], q.shape[3], side, q.shape[4])
            logits = windows.split(q).flatten(2, 3) @ weight  # (B, groups, N, k * k)
            logits = logits.add_(windows.biases(table) + shift).softmax(-1)
            found.append((windows, logits.unflatten(2, (windows.tiles, -1))))
        return found

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, groups, H, W, C / groups)."""
        return x.unflatten(1, (self.groups, -1)).permute(0, 1, 3, 4, 2)


def _check(dim: int, context: int, kernel: int, small: int, heads: int, pool: int) -> None:
    for name, value in {"channels": dim, "context": context, "heads": heads, "pool": pool}.items():
        if value < 1:
            raise UsageError(f"contmix: {name} is {value}; it must be at least 1")
    if kernel < 1 or kernel % 2 == 0 or small < 1 or small % 2 == 0 or small > kernel:
        raise UsageError(
            f"contmix: kernel is {kernel} and small is {small}; both must be odd, and small at most kernel"
        )
    if dim % (4 * heads):
        raise UsageError(f"contmix: channels is {dim} with {heads} heads; it must be a multiple of {4 * heads}")


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else interpolate(x, size, mode="bilinear", align_corners=False)


def neighbourhood_mix(weights: Tensor, values: Tensor) -> Tensor:
    """Mix each cell's neighbourhood with weights of its own.

    Windows are k x k cells and lie within the map: at a border they are shifted inwards.

    Args:
        weights: (B, groups, H, W, k * k), row by row; k is odd and at most min(H, W).
        values: (B, groups, H, W, c).

    Returns:
        (B, groups, H, W, c).
    """
    height, width, channels = values.shape[2:]
    windows = Windows.of(height, width, round(weights.shape[-1] ** 0.5), channels)
    return windows.mix(windows.split(weights), values)


@dataclass(frozen=True)
class Windows:
    """The windows of a map, by tiles: cells near each other whose windows together are one slab of values.

    Within a tile the mixing is one matrix product: of the cells' weights, each in its place in the slab, and the slab.
    Where all windows of a tile are the same one, no weight has to be moved: a map of 14 x 14 has four such tiles
    under kernels of 13, and one of 7 x 7 is a single one under kernels of 7.

    Attributes:
        height: of the map in cells.
        width: likewise.
        kernel: side of a window.
        rows: cells of a tile along the height, a divisor of it.
        columns: likewise along the width.
    """

    height: int
    width: int
    kernel: int
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int, kernel: int, channels: int) -> "Windows":
        """The tiles that take the least work for so many channels a group."""
        return cls(height, width, kernel, *_tile(height, width, kernel, channels))

    @property
    def tiles(self) -> int:
        """Tiles of a map."""
        return (self.height // self.rows) * (self.width // self.columns)

    @property
    def slab(self) -> tuple[int, int]:
        """Rows and columns of values that hold every window of a tile."""
        return _span(self.height, self.rows, self.kernel), _span(self.width, self.columns, self.kernel)

    def split(self, x: Tensor) -> Tensor:
        """(B, groups, H, W, c) to (B, groups, tiles, cells, c)."""
        x = x.unflatten(3, (-1, self.columns)).unflatten(2, (-1, self.rows))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def join(self, x: Tensor) -> Tensor:
        """What `split` made, back to (B, groups, H, W, c)."""
        x = x.unflatten(3, (self.rows, self.columns)).unflatten(2, (-1, self.width // self.columns))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """Weights (B, groups, tiles, cells, k * k) and values (B, groups, H, W, c) to (B, groups, H, W, c)."""
        return self.join(self.placed(weights) @ self.slabs(values))

    def placed(self, weights: Tensor) -> Tensor:
        """Weights (B, groups, tiles, cells, k * k) in the places of their slab, zeros elsewhere."""
        if self.slab == (self.kernel, self.kernel):
            return weights
        down, across = (
            _starts(side, self.kernel, weights.device).view(-1, tile) - _firsts(side, tile, self.kernel, weights.device)
            for side, tile in ((self.height, self.rows), (self.width, self.columns))
        )  # (tiles along the side, cells of a tile): where a window starts within its slab
        window = torch.arange(self.kernel, device=weights.device)
        places = (down[:, None, :, None, None, None] + window[:, None]) * self.slab[1]
        places = places + across[None, :, None, :, None, None] + window
        index = places.reshape(1, 1, self.tiles, -1, self.kernel**2).expand_as(weights)
        return weights.new_zeros(*weights.shape[:-1], self.slab[0] * self.slab[1]).scatter(-1, index, weights)

    def slabs(self, values: Tensor) -> Tensor:
        """Values (B, groups, H, W, c) to (B, groups, tiles, cells of a slab, c)."""
        down, across = (
            (_firsts(side, tile, self.kernel, values.device) + torch.arange(slab, device=values.device)).flatten()
            for side, tile, slab in (
                (self.height, self.rows, self.slab[0]),
                (self.width, self.columns, self.slab[1]),
            )
        )
        values = values if self.rows == self.height else values.index_select(2, down)
        values = values if self.columns == self.width else values.index_select(3, across)
        values = values.unflatten(3, (-1, self.slab[1])).unflatten(2, (-1, self.slab[0]))
        return values.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def biases(self, table: Tensor) -> Tensor:
        """A bias a relative position, (groups, 2k - 1, 2k - 1), to (groups, H * W, k * k), cells by tiles."""
        reach, side = torch.arange(self.kernel, device=table.device), table.shape[1]
        down, across = (
            _starts(cells, self.kernel, table.device) - torch.arange(cells, device=table.device) + self.kernel - 1
            for cells in (self.height, self.width)
        )
        places = (down[:, None] * side + across)[..., None, None] + reach[:, None] * side + reach
        index = self.split(places.flatten(2)[None, None]).reshape(1, -1).expand(len(table), -1)
        return table.flatten(1).gather(1, index).unflatten(1, (self.height * self.width, -1))


@torch.compiler.assume_constant_result  # a graph holds its outcome, and tracing it would take long
def _tile(height: int, width: int, kernel: int, channels: int) -> tuple[int, int]:
    """Rows and columns of the tiles that move the fewest numbers a cell.

    Those are weights, which cost more where they have to be put in their places, and a cell's share of the slab.
    """

    def work(tile: tuple[int, int]) -> float:
        slab = _span(height, tile[0], kernel), _span(width, tile[1], kernel)
        moved = 1 if slab == (kernel, kernel) else 3
        return slab[0] * slab[1] * (moved + channels / (tile[0] * tile[1]))

    return min(product(_divisors(height), _divisors(width)), key=work)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _start(cell: int, cells: int, kernel: int) -> int:
    """First cell of a cell's window along a side."""
    return min(max(cell - kernel // 2, 0), cells - kernel)


@torch.compiler.assume_constant_result
def _span(cells: int, tile: int, kernel: int) -> int:
    """Cells that the windows of a tile cover along a side, at most."""
    return max(
        _start(first + tile - 1, cells, kernel) + kernel - _start(first, cells, kernel)
        for first in range(0, cells, tile)
    )


def _starts(cells: int, kernel: int, device: torch.device) -> Tensor:
    """(cells,) int64: first cell of each window."""
    return (torch.arange(cells, device=device) - kernel // 2).clamp(0, cells - kernel)


def _firsts(cells: int, tile: int, kernel: int, device: torch.device) -> Tensor:
    """(tiles along a side, 1) int64: first cell of each slab; the last ones are shifted inwards to their full span."""
    return _starts(cells, kernel, device)[::tile, None].clamp(max=cells - _span(cells, tile, kernel))
