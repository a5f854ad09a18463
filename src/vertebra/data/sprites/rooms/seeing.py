"""What a walker sees, for many walkers in many houses at once.

Walls stand upright, so a column of pixels meets one wall at one depth, and floor and ceiling lie at a depth that the
row alone decides. Only the things need a ray a pixel, and only in the columns that they are in.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from vertebra.data.sprites.rooms.eyes import EYE, Eyes, eyes
from vertebra.data.sprites.rooms.furniture import fading, furnish
from vertebra.data.sprites.rooms.houses import SHADES, WALLPAPERS, House
from vertebra.data.sprites.textures import pattern
from vertebra.errors import UsageError

SPAN, TEXELS = 2.0, 64
"""Metres and pixels along the side of a wallpaper's square, which repeats."""


class Sights(NamedTuple):
    """What N walkers see, looking straight ahead with a field of view of 90 degrees.

    Attributes:
        images: (N, S, S, 3) uint8 RGB.
        depth: (N, S, S) float32 metres along the line of sight's axis (not along the ray).
        things: (N, S, S) uint8; 0 is the house, i is thing i of the house, from 1.
    """

    images: np.ndarray
    depth: np.ndarray
    things: np.ndarray


class _Walls(NamedTuple):
    """The wall that each column meets, (N, S) each.

    Attributes:
        depth: float32 metres.
        surface: int32 number, see `_surfaces`.
        along: float32 metres along the wall.
    """

    depth: np.ndarray
    surface: np.ndarray
    along: np.ndarray


def look(
    houses: Sequence[House], places: np.ndarray, headings: np.ndarray, *, size: int = 64, rooms: bool = True
) -> Sights:
    """Render one view a walker.

    Args:
        houses: one a walker, all with the same number of tiles and of things; or one for all.
        places: (N, 2) metres, free.
        headings: (N,) radians.
        size: side of the images in pixels.
        rooms: whether images are drawn; without, `Sights.images` is black, and depth and things come sooner.

    Raises:
        UsageError: not one house, place and heading a walker, houses that differ in tiles or number of things, or a
            place outside.
    """
    places, headings = np.asarray(places, dtype=float), np.asarray(headings, dtype=float)
    homes = list(houses) * len(places) if len(houses) == 1 else list(houses)
    _check(homes, places, headings)
    view = eyes(places, headings, size)
    walls = _walls(homes, view)
    depth = np.minimum(walls.depth[:, None], view.plane[:, None])  # (N, S, S)
    images = np.zeros((*depth.shape, 3), dtype=np.uint8)
    if rooms:
        images[...] = _papered(homes, view, walls, depth)
    things = np.zeros(depth.shape, dtype=np.uint8)
    furnish(homes, view, walls.depth, depth, things, images if rooms else None)
    return Sights(images, depth, things)


def _check(houses: list[House], places: np.ndarray, headings: np.ndarray) -> None:
    if not len(houses) == len(places) == len(headings):
        counts = f"{len(houses)} houses, {len(places)} places, {len(headings)} headings"
        raise UsageError(f"{counts}: give one of each a walker, or one house for all")
    if len({(house.tiles, len(house.kinds)) for house in houses}) != 1:
        raise UsageError("houses that are seen together must have as many tiles and as many things each")
    if not ((places > 0) & (places < houses[0].tiles)).all():
        raise UsageError(f"a place is outside; houses reach from 0 to {houses[0].tiles} metres")


def _walls(houses: list[House], view: Eyes) -> _Walls:
    upright = _met(view.x, view.y, view.dx, view.dy, np.stack([house.upright for house in houses]))
    level = _met(view.y, view.x, view.dy, view.dx, np.stack([house.level.T for house in houses]))
    across = upright < level
    depth = np.where(across, upright, level)
    before = depth - 1e-3
    last = houses[0].tiles - 1
    i, j = (start + before * step for start, step in ((view.x, view.dx), (view.y, view.dy)))
    i, j = i.astype(np.intp).clip(0, last), j.astype(np.intp).clip(0, last)
    room = _rooms(houses)[np.arange(len(houses))[:, None], i, j]
    along = np.where(across, view.y + depth * view.dy, view.x + depth * view.dx)
    return _Walls(depth.astype(np.float32), (room * 4 + across).astype(np.int32), along.astype(np.float32))


def _met(x: np.ndarray, y: np.ndarray, dx: np.ndarray, dy: np.ndarray, walls: np.ndarray) -> np.ndarray:
    """Depth (N, S) of the first wall on the lines x = 0, 1, ... (N, G + 1, G) that columns meet."""
    lines, tiles = walls.shape[1:]
    step = np.where(np.abs(dx) < 1e-12, 1e-12, dx)[..., None]
    ahead = (np.arange(lines) - x[..., None]) / step  # (N, S, G + 1)
    tile = np.floor(y[..., None] + ahead.clip(0, 4 * tiles) * dy[..., None]).astype(np.intp)
    there = (ahead > 1e-9) & (tile >= 0) & (tile < tiles)
    number = np.arange(len(walls))[:, None, None]
    there &= walls[number, np.arange(lines), tile.clip(0, tiles - 1)]
    return np.where(there, ahead, np.inf).min(2)


def _rooms(houses: list[House]) -> np.ndarray:
    """Rooms of the tiles (N, G, G), numbered on from house to house."""
    counts = np.array([0, *(len(house.papers) for house in houses[:-1])])
    return np.stack([house.rooms for house in houses]) + np.cumsum(counts)[:, None, None]


@cache
def _library() -> tuple[np.ndarray, np.ndarray]:
    """Wallpapers in four sizes, each half the last, so that what is far does not flicker.

    Returns:
        Shades, flat uint8; and where each paper begins in each size, (papers, 4) int32.
    """
    places = (np.arange(TEXELS, dtype=np.float32) + 0.5) * (8 / TEXELS)  # 8 periods a square
    sheets, starts = [], []
    for name in WALLPAPERS:
        weights = np.broadcast_to(pattern(name, places[None], places[:, None], scale=2.0), (TEXELS, TEXELS))
        for _ in range(4):
            starts.append(sum(sheet.size for sheet in sheets))
            sheets.append(np.rint(weights * (SHADES - 1)).astype(np.uint8).ravel())
            weights = weights.reshape(len(weights) // 2, 2, -1, 2).mean((1, 3))
    return np.concatenate(sheets), np.array(starts, dtype=np.int32).reshape(-1, 4)


def _surfaces(houses: list[House]) -> tuple[np.ndarray, np.ndarray]:
    """Papers (rooms * 4) and palettes (rooms * 4 * SHADES, 3): walls, darker walls, floor and ceiling of each room."""
    papers = np.concatenate([house.papers for house in houses])[:, [0, 0, 1, 2]]
    palettes = np.concatenate([house.palettes for house in houses])[:, [0, 0, 1, 2]]
    shaded = palettes * np.array([1, 0.82, 1, 1], dtype=np.float32)[:, None, None]  # so that corners show
    return papers.ravel(), shaded.reshape(-1, 3)


def _papered(houses: list[House], view: Eyes, walls: _Walls, depth: np.ndarray) -> np.ndarray:
    """Colours (N, S, S, 3) float32 of walls, floors and ceilings."""
    upright = walls.depth[:, None] <= view.plane[:, None]
    x, y = (
        start[..., None].astype(np.float32) + depth * step[:, None].astype(np.float32)
        for start, step in ((view.x, view.dx), (view.y, view.dy))
    )
    tiles = houses[0].tiles
    tile = x.astype(np.int32).clip(0, tiles - 1) * tiles + y.astype(np.int32).clip(0, tiles - 1)
    tile += (np.arange(len(houses), dtype=np.int32) * (tiles * tiles))[:, None, None]
    lying = np.where(view.down > 0, 2, 3).astype(np.int32)[:, None]
    surface = np.where(upright, walls.surface[:, None], _rooms(houses).astype(np.int32).ravel()[tile] * 4 + lying)
    np.copyto(x, walls.along[:, None], where=upright)
    np.copyto(y, EYE - view.down.astype(np.float32)[:, None] * depth, where=upright)
    return _texels(houses, surface, x, y, np.where(upright, depth, depth * 1.7)) * fading(depth)


def _texels(houses: list[House], surface: np.ndarray, x: np.ndarray, y: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Colours (N, S, S, 3) float32 of places on surfaces."""
    papers, palettes = _surfaces(houses)
    shades, starts = _library()
    size = far.shape[-1]
    scaled = far * np.float32(TEXELS / SPAN * 2 / size)  # texels a pixel
    smaller = (scaled > 1.4).astype(np.int32) + (scaled > 2.8) + (scaled > 5.6)
    side = TEXELS >> smaller
    metre = side.astype(np.float32) / np.float32(SPAN)
    texel = ((y * metre).astype(np.int32) & (side - 1)) * side + ((x * metre).astype(np.int32) & (side - 1))
    texel += starts.ravel()[papers[surface] * 4 + smaller]
    return palettes[surface * SHADES + shades[texel]]
