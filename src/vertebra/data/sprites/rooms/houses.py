"""Floor plans with named things in them, and how far everything is from everything on foot.

A house is a square of tiles of one metre. Rooms are rectangles of tiles; walls are thin and lie between tiles; a door
is a tile that a wall leaves out. x is to the right, y is up, headings are radians counterclockwise from x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vertebra.data.sprites.orbits.solids import KINDS
from vertebra.data.sprites.pictures import Part
from vertebra.data.sprites.scenes import generator
from vertebra.data.sprites.textures import COLOURS, TEXTURES, muted, second_colour
from vertebra.errors import UsageError, near

NOUNS = {"ball": "ball", "box": "box", "cylinder": "barrel", "cone": "cone"}
"""What a solid is called in a house."""

CLASSES = tuple(f"{colour} {noun}" for noun in NOUNS.values() for colour in COLOURS)
"""Names of the things that houses hold; the position is the target."""

WALLPAPERS = ("plain", "striped", "dotted", "checked", "brick", "zigzag", "woven", "grainy")
"""Patterns of walls and floors: those that repeat without a seam."""

SHADES = 16
"""Steps between the two colours of a surface."""

RADIUS = 0.18
"""Of the walker, metres."""

GRID = 0.125
"""Metres between the nodes that distances are known at."""

_HOP = 0.3  # below 2 * RADIUS, so that a straight hop between two free places crosses no wall
_MOVES = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2), (2, -1), (1, -2), (3, 1), (1, 3), (3, -1), (1, -3))
_MOVES += ((3, 2), (2, 3), (3, -2), (2, -3))


@dataclass(frozen=True, eq=False)
class House:
    """A floor plan of G x G tiles with R rooms and K things.

    Attributes:
        upright: (G + 1, G) bool; [i, j] is a wall on the line x = i from y = j to j + 1.
        level: (G, G + 1) bool; [i, j] is a wall on the line y = j from x = i to i + 1.
        rooms: (G, G) int64, the room of the tile whose lower left corner is (i, j).
        papers: (R, 3) int64 positions in `WALLPAPERS`, of a room's walls, floor and ceiling.
        palettes: (R, 3, SHADES, 3) float32 colours of these surfaces, 0..255.
        kinds: (K,) int64 positions in `KINDS`.
        places: (K, 2) float64 metres, where things stand.
        halves: (K, 3) float64 half extents in metres.
        turns: (K,) float64 radians.
        labels: (K,) int64 positions in `CLASSES`; no two things of a house are of one class.
        patterns: (K,) int64 positions in `TEXTURES`.
        colours: (K, 2, 3) float32, 0..255.
    """

    upright: np.ndarray
    level: np.ndarray
    rooms: np.ndarray
    papers: np.ndarray
    palettes: np.ndarray
    kinds: np.ndarray
    places: np.ndarray
    halves: np.ndarray
    turns: np.ndarray
    labels: np.ndarray
    patterns: np.ndarray
    colours: np.ndarray

    @property
    def tiles(self) -> int:
        """Tiles along a side."""
        return len(self.rooms)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the things."""
        return tuple(CLASSES[label] for label in self.labels)

    @cached_property
    def walls(self) -> np.ndarray:
        """Boxes (W, 4) without thickness: x, y of the lower left end and of the upper right end."""
        line, start, end = _runs(self.upright)
        across, left, right = _runs(self.level.T)
        boxes = [np.stack([line, start, line, end], 1), np.stack([left, across, right, across], 1)]
        return np.concatenate(boxes).astype(float)

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """Metres (N,) from points (N, 2) to the nearest wall or thing; below 0 within a thing or outside."""
        found = self._to_walls(points)
        outside = ((points < 0) | (points > self.tiles)).any(1)
        found[outside] = -1
        return np.minimum(found, self._to_things(points).min(1, initial=np.inf))

    def _to_walls(self, points: np.ndarray) -> np.ndarray:
        """Metres (N,) from points (N, 2) to the nearest wall."""
        x, y, walls = points[:, 0], points[:, 1], self.walls[:, :, None]
        across = np.maximum(np.maximum(walls[:, 0] - x, x - walls[:, 2]), 0)  # (W, N)
        up = np.maximum(np.maximum(walls[:, 1] - y, y - walls[:, 3]), 0)
        return np.sqrt((across * across + up * up).min(0))

    def _to_things(self, points: np.ndarray) -> np.ndarray:
        """Metres (N, K) from points to the things' footprints: discs, and squares that are turned."""
        away = points[:, None] - self.places  # (N, K, 2)
        cos, sin = np.cos(self.turns), np.sin(self.turns)
        x = np.abs(away[..., 0] * cos + away[..., 1] * sin) - self.halves[:, 0]
        y = np.abs(away[..., 1] * cos - away[..., 0] * sin) - self.halves[:, 1]
        square = np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)
        disc = np.hypot(away[..., 0], away[..., 1]) - self.halves[:, 0]
        return np.where(self.kinds == KINDS.index("box"), square, disc)

    @cached_property
    def nodes(self) -> np.ndarray:
        """Places (M, 2) of the grid, tile by tile from the lower left, x outside."""
        line = (np.arange(round(self.tiles / GRID)) + 0.5) * GRID
        return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)

    @cached_property
    def free(self) -> np.ndarray:
        """Which nodes the walker fits on and can walk to from most others, (side, side) bool."""
        from scipy.ndimage import label

        side = round(self.tiles / GRID)
        fits = (self.clearance(self.nodes) >= RADIUS).reshape(side, side)
        parts = np.zeros(fits.shape, dtype=np.int64)
        label(fits, output=parts)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        return parts == sizes.argmax()

    @cached_property
    def _graph(self) -> Any:
        """Lengths of the moves between free nodes, a sparse matrix (M, M).

        A way along moves of up to (3, 2) steps is longer than the straight one by at most 1.3 %. A move that is longer
        than a hop is open where the two nodes next to its thirds are free as well.
        """
        from scipy.sparse import coo_matrix

        side = len(self.free)
        starts, ends, lengths = [], [], []
        for across, up in _MOVES:
            low, high = max(0, -up), side - max(0, up)
            passed = [(0, 0), (across, up)]
            if np.hypot(across, up) * GRID > _HOP:
                passed += [(round(across * third / 3), round(up * third / 3)) for third in (1, 2)]
            clear = [self.free[i : side - across + i, low + j : high + j] for i, j in passed]
            i, j = np.nonzero(np.logical_and.reduce(clear))
            starts.append(i * side + j + low)
            ends.append((i + across) * side + j + low + up)
            lengths.append(np.full(len(i), np.hypot(across, up) * GRID))
        places = np.concatenate(starts), np.concatenate(ends)
        return coo_matrix((np.concatenate(lengths), places), shape=(side * side, side * side)).tocsr()

    def distances(self, goals: np.ndarray) -> np.ndarray:
        """Metres on foot from every node to the nearest of the goals.

        Args:
            goals: (n, 2) metres; what counts is the free node next to a goal, within `GRID`.

        Returns:
            (side, side) float64; infinite where there is no way.

        Raises:
            UsageError: no goal can be walked to.
        """
        from scipy.sparse.csgraph import dijkstra

        free = np.flatnonzero(self.free.ravel())
        away = np.linalg.norm(self.nodes[free, None] - np.asarray(goals, dtype=float), axis=2)  # (free, n)
        seeds = np.unique(free[away.argmin(0)[away.min(0) <= GRID]])
        if not len(seeds):
            raise UsageError(f"the walker fits at none of the goals {np.asarray(goals).round(2).tolist()}")
        found = dijkstra(self._graph, directed=False, indices=seeds, min_only=True)
        return np.asarray(found).reshape(self.free.shape)

    def around(self, thing: int) -> np.ndarray:
        """Free places (n, 2) next to thing number `thing`, from which one sees it; empty where there are none."""
        near_it = (self._to_things(self.nodes)[:, thing] <= RADIUS + 1.5 * GRID) & self.free.ravel()
        spots = self.nodes[near_it]
        middle = (spots + self.places[thing]) / 2
        between = np.concatenate([(spots + middle) / 2, middle, (self.places[thing] + middle) / 2])
        clear = (self._to_walls(between) > GRID).reshape(3, -1).all(0)  # it may stand by a wall, with a place behind it
        return spots[clear]


def _runs(walls: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lines, starts and ends of what is unbroken in walls (lines, tiles)."""
    edges = np.diff(np.pad(walls.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    line, start = np.nonzero(edges == 1)
    return line, start, np.nonzero(edges == -1)[1]


def at(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """What a field of distances says at places between its nodes.

    Args:
        field: (side, side) metres, of `House.distances`.
        points: (N, 2) metres, free.

    Returns:
        (N,) metres: the shortest way over a node within a hop, infinite where no such node leads to the goal.
    """
    reach = int(_HOP / GRID)
    steps = np.arange(-reach, reach + 2)
    low = np.floor(points / GRID - 0.5).astype(np.intp)
    i, j = low[:, 0, None, None] + steps[:, None], low[:, 1, None, None] + steps  # (N, n, 1), (N, 1, n)
    side = len(field)
    hop = np.hypot(points[:, 0, None, None] - (i + 0.5) * GRID, points[:, 1, None, None] - (j + 0.5) * GRID)
    inside = (i >= 0) & (i < side) & (j >= 0) & (j < side) & (hop <= _HOP)
    ways = np.where(inside, field[i.clip(0, side - 1), j.clip(0, side - 1)] + hop, np.inf)
    return ways.reshape(len(points), -1).min(1)


def free_steps(
    house: House, places: np.ndarray, headings: np.ndarray, *, stride: float = 0.25, most: int = 10
) -> np.ndarray:
    """Steps that a walker can take straight ahead before it meets something, 0 to `most`.

    Args:
        house: where.
        places: (N, 2) metres.
        headings: (N,) radians.
        stride: metres a step.
        most: steps to look at.

    Returns:
        (N,) int64.
    """
    ahead = stride * np.arange(1, most + 1)[:, None] * np.stack([np.cos(headings), np.sin(headings)], 1)[:, None]
    fits = house.clearance((places[:, None] + ahead).reshape(-1, 2)).reshape(-1, most) >= RADIUS
    return np.cumprod(fits, axis=1).sum(1)


def house(
    seed: int,
    index: int,
    *,
    part: Part = "train",
    tiles: int = 8,
    things: int = 6,
    classes: Sequence[str] | None = None,
) -> House:
    """A house with things in it; a function of these arguments alone.

    Args:
        seed: of all houses.
        index: of the house, from 0.
        part: train, val and test share no house.
        tiles: metres along a side, 4 to 32.
        things: how many; no two of one class.
        classes: names that things are drawn from, of `CLASSES`; None means all.

    Raises:
        UsageError: an unknown class, a number out of range, or more things than there is room for.
    """
    random = generator(seed, part, index, "layout")
    labels = _labels(random, things, classes)
    if not 4 <= tiles <= 32:
        raise UsageError(f"tiles is {tiles}; a house has 4 to 32 tiles along a side")
    upright, level, rooms, doors = _planned(random, tiles)
    count = int(rooms.max()) + 1
    kinds = np.array([list(NOUNS.values()).index(CLASSES[label].split()[1]) for label in labels], dtype=np.int64)
    halves = _sizes(random, kinds)
    places = _places(random, halves, doors, tiles)
    colours = np.array([COLOURS[CLASSES[label].split()[0]] for label in labels], dtype=np.float32).reshape(-1, 3)
    return House(
        upright,
        level,
        rooms,
        *_decorated(random, count),
        kinds,
        places,
        halves,
        random.uniform(0, 2 * np.pi, things),
        labels,
        random.integers(len(TEXTURES), size=things),
        np.stack([colours, np.array([second_colour(c) for c in colours]).reshape(-1, 3)], 1),
    )


def _labels(random: np.random.Generator, things: int, classes: Sequence[str] | None) -> np.ndarray:
    names = CLASSES if classes is None else tuple(classes)
    for name in names:
        if name not in CLASSES:
            raise UsageError(f"no class is called {name!r}{near(name, CLASSES)}; classes: {', '.join(CLASSES)}")
    if not 0 <= things <= len(names):
        raise UsageError(f"things is {things}; of {len(names)} classes a house can hold 0 to {len(names)}")
    chosen = random.permutation(len(names))[:things]
    return np.array([CLASSES.index(names[i]) for i in chosen], dtype=np.int64)


def _planned(
    random: np.random.Generator, tiles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[tuple[int, int]]]:
    """Walls, rooms at least 2 tiles wide, and the tiles on both sides of each door."""
    upright, level = np.zeros((tiles + 1, tiles), dtype=bool), np.zeros((tiles, tiles + 1), dtype=bool)
    upright[[0, -1]] = level[:, [0, -1]] = True
    lines = upright, level.T  # [line across the axis, tile along the line], whatever the axis
    rooms, count, doors = np.zeros((tiles, tiles), dtype=np.int64), 0, set()
    open_boxes = [((0, 0), (tiles, tiles))]
    while open_boxes:
        low, high = open_boxes.pop()
        size = high[0] - low[0], high[1] - low[1]
        axis = int(size[1] > size[0] or (size[0] == size[1] and random.random() < 0.5))
        if size[axis] < 4 or size[0] * size[1] < 18 or (size[0] * size[1] < 34 and random.random() < 0.5):
            rooms[low[0] : high[0], low[1] : high[1]] = count
            count += 1
            continue
        other = 1 - axis
        cut = int(random.integers(low[axis] + 2, high[axis] - 1))
        door = int(random.integers(low[other], high[other]))
        lines[axis][cut, low[other] : high[other]] = True
        lines[axis][cut, door] = False
        doors |= {(cut + side, door) if axis == 0 else (door, cut + side) for side in (-1, 0)}
        middle_high, middle_low = list(high), list(low)
        middle_high[axis] = middle_low[axis] = cut
        open_boxes += [(low, tuple(middle_high)), (tuple(middle_low), high)]
    return upright, level, rooms, doors


def _sizes(random: np.random.Generator, kinds: np.ndarray) -> np.ndarray:
    """Half extents (K, 3) in metres: balls are round, the others stand upright."""
    wide, tall = random.uniform(0.17, 0.28, len(kinds)), random.uniform(0.25, 0.55, len(kinds))
    wide = np.where(kinds == KINDS.index("box"), wide * 0.85, wide)
    return np.stack([wide, wide, np.where(kinds == KINDS.index("ball"), wide, tall)], 1)


def _places(random: np.random.Generator, halves: np.ndarray, doors: set[tuple[int, int]], tiles: int) -> np.ndarray:
    """Where things stand (K, 2): on tiles of their own that touch neither each other nor a door."""
    chosen: list[tuple[int, int]] = []
    for number in random.permutation(tiles * tiles):
        i, j = divmod(int(number), tiles)
        if len(chosen) == len(halves):
            break
        if (i, j) not in doors and all(max(abs(i - a), abs(j - b)) > 1 for a, b in chosen):
            chosen.append((i, j))
    if len(chosen) < len(halves):
        raise UsageError(f"{len(halves)} things do not fit into {tiles} x {tiles} tiles; give fewer, or more tiles")
    slack = 0.47 - halves[:, :1] * np.sqrt(2)  # a box may be turned
    return np.array(chosen, dtype=float).reshape(-1, 2) + 0.5 + random.uniform(-1, 1, (len(halves), 2)) * slack


def _decorated(random: np.random.Generator, rooms: int) -> tuple[np.ndarray, np.ndarray]:
    """Papers (R, 3) and palettes (R, 3, SHADES, 3) of walls, floors and ceilings; each room has its own."""
    papers = random.integers(len(WALLPAPERS), size=(rooms, 3))
    papers[:, 2] = 0  # ceilings are plain
    first = np.array([[muted(random, 110, 200), muted(random, 70, 150), muted(random, 190, 230)] for _ in range(rooms)])
    sign = np.where(random.random((rooms, 3, 1)) < 0.5, -1, 1)
    second = np.clip(first + sign * random.uniform(18, 50, (rooms, 3, 1)), 0, 255)
    shades = np.linspace(0, 1, SHADES)[:, None]
    return papers, (first[:, :, None] + shades * (second - first)[:, :, None]).astype(np.float32)
