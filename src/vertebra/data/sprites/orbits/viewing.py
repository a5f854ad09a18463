"""Cameras around things: what they see, and how pixels and places correspond."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from vertebra.data.sprites.orbits.solids import NOTHING, Solids, cast, covered, outward, painted
from vertebra.data.sprites.orbits.things import THINGS, placed, thing
from vertebra.data.sprites.pictures import Part
from vertebra.data.sprites.scenes import generator
from vertebra.data.sprites.textures import GROUNDS, lattice, mixed, muted, pattern
from vertebra.errors import UsageError

FIELD_OF_VIEW = 40.0
"""Degrees across the image."""

AMBIENT = 0.5
"""Share of a colour that is seen in the shadow."""


@dataclass(frozen=True, eq=False)
class Orbit:
    """V views of things that stand still.

    Attributes:
        images: (V, S, S, 3) uint8 RGB.
        depth: (V, S, S) float32 metres along the optical axis (not along the ray); 0 where there is only sky.
        masks: (V, S, S) uint8: 0 is ground or sky, i is thing i, from 1.
        parts: (V, S, S) uint8: 0 is ground or sky, i is solid i of `solids`, from 1.
        normals: (V, S, S, 3) float32 unit normals in world coordinates; 0 in the sky.
        poses: (V, 4, 4) float64, world to camera.
        intrinsics: (3, 3) float64, camera to pixels.
        points: (P, 3) float32 metres, drawn from the surfaces of the things that some view shows.
        point_colours: (P, 3) uint8 RGB, as first seen.
        point_normals: (P, 3) float32.
        point_things: (P,) uint8, the thing that a point is on, from 1.
        labels: (N,) int64 classes of the things, positions in `THINGS`.
        solids: what the things are made of.
    """

    images: np.ndarray
    depth: np.ndarray
    masks: np.ndarray
    parts: np.ndarray
    normals: np.ndarray
    poses: np.ndarray
    intrinsics: np.ndarray
    points: np.ndarray
    point_colours: np.ndarray
    point_normals: np.ndarray
    point_things: np.ndarray
    labels: np.ndarray
    solids: Solids

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the things, in the order of `labels`."""
        return tuple(THINGS[label] for label in self.labels)

    @property
    def cameras(self) -> np.ndarray:
        """Where the cameras stand, (V, 3) metres."""
        return -np.einsum("vji,vj->vi", self.poses[:, :3, :3], self.poses[:, :3, 3])

    @property
    def angles(self) -> np.ndarray:
        """Degrees between the viewing directions of any two views, (V, V)."""
        forward = self.poses[:, 2, :3]
        return np.degrees(np.arccos(np.clip(forward @ forward.T, -1, 1)))


def orbit(
    seed: int,
    index: int,
    *,
    part: Part = "train",
    views: int = 16,
    size: int = 64,
    label: str | None = None,
    things: tuple[int, int] = (1, 1),
    spread: float = 360.0,
    points: int = 2048,
) -> Orbit:
    """One or more things, seen from cameras around them; a function of these arguments alone.

    Args:
        seed: of the world.
        index: of the scene, from 0.
        part: train, val and test share no scene, so that no thing is in two of them.
        views: cameras.
        size: side of the images in pixels.
        label: class of the (first) thing; None goes through `THINGS` with the index.
        things: fewest and most things in the scene.
        spread: degrees of the circle that the cameras take; below 360 the last one is at its end.
        points: of the point cloud.

    Raises:
        UsageError: an unknown class or a number out of range.
    """
    _checked(views, size, things, spread, points)
    random = generator(seed, part, index, "layout")
    names = [label or THINGS[index % len(THINGS)]]
    names += [THINGS[int(choice)] for choice in random.integers(len(THINGS), size=things[1] - 1)]
    names = names[: int(random.integers(things[0], things[1] + 1))]
    solids = _arranged([thing(name, random, number=i + 1) for i, name in enumerate(names)], random)
    poses, intrinsics = _cameras(solids, views, size, spread, random), _intrinsics(size)
    seen = render(solids, poses, intrinsics, size, random=random)
    labels = np.array([THINGS.index(name) for name in names])
    return Orbit(*seen, poses, intrinsics, *_cloud(seen, poses, intrinsics, points, random), labels, solids)


def _checked(views: int, size: int, things: tuple[int, int], spread: float, points: int) -> None:
    if views < 1 or size < 8 or points < 1:
        raise UsageError(f"views {views}, size {size}, points {points}: they must be at least 1, 8 and 1")
    if not 1 <= things[0] <= things[1] <= 9:
        raise UsageError(f"things is {things}; it must rise within 1..9, as (1, 3)")
    if not 0 <= spread <= 360:
        raise UsageError(f"spread is {spread}; it must be in 0..360 degrees")


def _arranged(many: list[Solids], random: np.random.Generator) -> Solids:
    """Things side by side on a circle, far enough apart not to touch."""
    if len(many) == 1:
        return many[0]
    reach = [np.linalg.norm(one.corners[..., :2], axis=-1).max() for one in many]
    apart = 2 * np.sin(np.pi / len(many))  # of neighbours on a unit circle
    radius = (max(a + b for a, b in zip(reach, [*reach[1:], reach[0]], strict=True)) + 0.05) / apart
    turn = random.uniform(0, 2 * np.pi)
    angles = turn + 2 * np.pi * np.arange(len(many)) / len(many)
    spots = radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return Solids.joined([placed(one, spot, 0.0) for one, spot in zip(many, spots, strict=True)])


def _cameras(solids: Solids, views: int, size: int, spread: float, random: np.random.Generator) -> np.ndarray:
    """Poses (V, 4, 4) of cameras that look at the middle of the solids and see all of them."""
    corners = solids.corners.reshape(-1, 3)
    middle = (corners.min(0) + corners.max(0)) / 2
    reach = np.linalg.norm(corners - middle, axis=1).max()
    start, low, swing = random.uniform(0, 360), random.uniform(15, 30), random.uniform(0, 12)
    steps = np.arange(views) / max(views - (spread < 360), 1)
    around, above = np.radians(start + spread * steps), np.radians(low + swing * (1 - np.cos(4 * np.pi * steps)) / 2)
    away = 1.02 * reach / np.sin(np.radians(FIELD_OF_VIEW / 2))
    place = np.stack([np.cos(above) * np.cos(around), np.cos(above) * np.sin(around), np.sin(above)], 1)
    return look_at(middle + away * place, middle)


def look_at(cameras: np.ndarray, target: np.ndarray) -> np.ndarray:
    """World-to-camera poses (V, 4, 4) of upright cameras (V, 3) that look at `target` (3,), not straight down."""
    forward = target - cameras
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    poses = np.tile(np.eye(4), (len(cameras), 1, 1))
    poses[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    poses[:, :3, 3] = -np.einsum("vij,vj->vi", poses[:, :3, :3], cameras)
    return poses


def _intrinsics(size: int) -> np.ndarray:
    focal = size / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2))
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])


def rays(poses: np.ndarray, intrinsics: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rays through pixels, in world coordinates, with 1 along the optical axis.

    Args:
        poses: (V, 4, 4) world to camera.
        intrinsics: (3, 3).
        pixels: (P, 2) x, y; the centre of the left upper pixel is (0.5, 0.5).

    Returns:
        Starts (V, 3) and directions (V, 3, P); a start plus depth times its direction is the place that is seen.
    """
    local = np.linalg.solve(intrinsics, np.vstack([pixels.T, np.ones(len(pixels))]))  # (3, P)
    turns = np.swapaxes(poses[:, :3, :3], 1, 2)
    return -(turns @ poses[:, :3, 3:])[..., 0], turns @ local


def projected(points: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2) x, y and depth (N,) in metres of points (N, 3) in the view of `pose` (4, 4)."""
    local = points @ pose[:3, :3].T + pose[:3, 3]
    flat = local @ intrinsics.T
    return flat[:, :2] / flat[:, 2:], local[:, 2]


def backprojected(depth: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Places (H, W, 3) in the world that a depth map (H, W) of the view of `pose` (4, 4) shows."""
    starts, steps = rays(pose[None], intrinsics, pixel_centres(*depth.shape))
    return (starts[0] + steps[0].T * depth.reshape(-1, 1)).reshape(*depth.shape, 3)


@cache
def pixel_centres(height: int, width: int) -> np.ndarray:
    """Centres x, y of all pixels in reading order, (height * width, 2)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows], -1).reshape(-1, 2) + 0.5


def render(
    solids: Solids, poses: np.ndarray, intrinsics: np.ndarray, size: int, *, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What cameras see of solids on the ground, under one distant light.

    Args:
        solids: the scene.
        poses: (V, 4, 4) world to camera.
        intrinsics: (3, 3).
        size: side of the images in pixels.
        random: draws the light, the ground and the sky.

    Returns:
        Images, depth, masks, parts and normals as `Orbit` has them.
    """
    stage = _stage(random)
    starts, steps = rays(poses, intrinsics, pixel_centres(size, size))
    hits = cast(solids, starts, steps)
    flat = hits.solid.ravel()
    met = np.flatnonzero(flat != NOTHING)
    depth = np.where(hits.solid == NOTHING, 0, hits.distance)
    view, pixel = np.divmod(met, size * size)
    places = starts[view] + steps[view, :, pixel] * depth.ravel()[met, None]  # (hits, 3)
    surface, colours = _surfaces(solids, flat[met], places, stage)
    images = _sky(steps, stage)
    images[met] = _lit(solids, places, surface, colours, stage)
    normals = np.zeros((flat.size, 3), dtype=np.float32)
    normals[met] = surface
    of_things = np.concatenate([[0, 0], solids.things]).astype(np.uint8)  # sky and ground come first
    shape = (len(poses), size, size)
    return (
        np.rint(images * 255).clip(0, 255).astype(np.uint8).reshape(*shape, 3),
        depth.astype(np.float32).reshape(shape),
        of_things[hits.solid + 2].reshape(shape),
        np.maximum(hits.solid + 1, 0).astype(np.uint8).reshape(shape),
        normals.reshape(*shape, 3),
    )


class _Stage(NamedTuple):
    """What is around the things.

    Attributes:
        light: (3,) direction towards it.
        ground: (2, 3) colours in 0..1 that its texture mixes.
        texture: of the ground.
        period: metres that the texture takes.
        table: of its noise.
        sky: (2, 3) colours at the horizon and above.
    """

    light: np.ndarray
    ground: np.ndarray
    texture: str
    period: float
    table: np.ndarray
    sky: np.ndarray


def _stage(random: np.random.Generator) -> _Stage:
    around, above = random.uniform(0, 2 * np.pi), random.uniform(0.7, 1.2)
    light = np.array([np.cos(above) * np.cos(around), np.cos(above) * np.sin(around), np.sin(above)])
    first = muted(random, 110, 200)
    ground = np.stack([first, np.clip(first + random.choice([-1, 1]) * random.uniform(15, 45), 0, 255)]) / 255
    texture, period = GROUNDS[int(random.integers(len(GROUNDS)))], random.uniform(0.4, 1.2)
    horizon = muted(random, 190, 230) / 255
    return _Stage(light, ground, texture, period, lattice(random), np.stack([horizon, horizon * [0.7, 0.82, 0.97]]))


def _surfaces(solids: Solids, found: np.ndarray, places: np.ndarray, stage: _Stage) -> tuple[np.ndarray, np.ndarray]:
    """Normals and colours (M, 3) of the places (M, 3) on the solids `found` (M,)."""
    normals, colours = np.empty(places.shape), np.empty(places.shape)
    order = np.argsort(found, kind="stable")
    cuts = np.searchsorted(found[order], np.arange(-1, len(solids) + 1))  # the ground is -1
    rows = order[cuts[0] : cuts[1]]
    normals[rows] = (0, 0, 1)
    x, y = places[rows, 0], places[rows, 1]
    colours[rows] = mixed(pattern(stage.texture, x, y, scale=stage.period, table=stage.table), *stage.ground)
    faded = np.exp(-(((x * x + y * y) / 30) ** 2))[:, None]  # the ground meets the sky without a line
    colours[rows] = stage.sky[0] + faded * (colours[rows] - stage.sky[0])
    for number in range(len(solids)):
        rows = order[cuts[number + 1] : cuts[number + 2]]
        normals[rows], local = outward(solids, places[rows], number)
        colours[rows] = painted(solids, local, number)
    return normals, colours


def _lit(solids: Solids, places: np.ndarray, normals: np.ndarray, colours: np.ndarray, stage: _Stage) -> np.ndarray:
    """Colours (M, 3) under the light, with the shadows that things cast."""
    facing = normals @ stage.light
    corners = solids.corners.reshape(-1, 3)
    fallen = corners - corners[:, 2:] / stage.light[2] * stage.light  # where their shadows end on the ground
    low, high = np.minimum(corners, fallen).min(0), np.maximum(corners, fallen).max(0)
    near = np.flatnonzero((facing > 0) & (places >= low - 1e-6).all(1) & (places <= high + 1e-6).all(1))
    facing[near[covered(solids, places[near] + 1e-5 * normals[near], stage.light)]] = 0
    from_above = 0.12 * normals[:, 2:]  # the sky's own light
    return colours * (AMBIENT + from_above + (1 - AMBIENT) * np.maximum(facing, 0)[:, None])


def _sky(steps: np.ndarray, stage: _Stage) -> np.ndarray:
    """Colours (V * P, 3) where rays (V, 3, P) go into the sky."""
    rise = np.clip(2 * steps[:, 2] / np.linalg.norm(steps, axis=1), 0, 1).reshape(-1, 1)
    return stage.sky[0] + rise * (stage.sky[1] - stage.sky[0])


def _cloud(
    seen: tuple[np.ndarray, ...], poses: np.ndarray, intrinsics: np.ndarray, points: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points on what the views show of the things, with their colours, normals and things.

    A pixel is drawn in proportion to the area that it covers on the surface, so that the points lie evenly, but for
    places that more views see.
    """
    images, depth, masks, _, normals = seen
    rows = np.flatnonzero(masks)
    if not len(rows):
        raise UsageError("no view shows a thing: the images are too small for the scene; give a larger size")
    view, pixel = np.divmod(rows, masks[0].size)
    starts, steps = rays(poses, intrinsics, pixel_centres(*masks.shape[1:]))
    steps = steps[view, :, pixel]
    away, facing = depth.ravel()[rows], normals.reshape(-1, 3)[rows]
    slant = np.abs(np.einsum("ni,ni->n", steps, facing)) / np.linalg.norm(steps, axis=1)
    area = away**2 / np.maximum(slant, 0.1)
    drawn = random.choice(len(rows), size=points, p=area / area.sum())
    rows, view = rows[drawn], view[drawn]
    places = (starts[view] + steps[drawn] * away[drawn, None]).astype(np.float32)
    return places, images.reshape(-1, 3)[rows], facing[drawn], masks.ravel()[rows]


def pairs(seen: Orbit, degrees: float, count: int, *, seed: int = 0) -> np.ndarray:
    """Pairs of views whose directions differ by about an angle.

    Args:
        seen: the views.
        degrees: the angle that is asked for.
        count: pairs to draw, with replacement.
        seed: of the draw.

    Returns:
        (count, 2) int64 views, drawn from the pairs at the next smaller and the next larger angle that there are, as
        often as makes the mean `degrees`.

    Raises:
        UsageError: there are fewer than two views.
    """
    if len(seen) < 2:
        raise UsageError("a pair takes two views; the orbit has one")
    first, second = np.nonzero(~np.eye(len(seen), dtype=bool))
    angle, random = seen.angles[first, second], np.random.default_rng(seed)
    below, above = angle[angle <= degrees], angle[angle >= degrees]
    low = below.max() if len(below) else above.min()
    high = above.min() if len(above) else low
    share = (degrees - low) / (high - low) if high > low else 0.0
    wanted = np.where(random.random(count) < share, high, low)
    drawn = np.empty(count, dtype=np.int64)
    for one in (low, high):
        rows = np.flatnonzero(wanted == one)
        drawn[rows] = random.choice(np.flatnonzero(np.abs(angle - one) < 0.5), size=len(rows))
    return np.stack([first[drawn], second[drawn]], 1)
