"""An orbit as files: images, masks, depth and the cameras in COLMAP's formats, as multi-view data sets come.

FOLDER/images/000.png ...      FOLDER/sparse/0/cameras.txt, images.txt, points3D.txt (or .bin)
FOLDER/masks/000.png ...       FOLDER/points.ply
FOLDER/depth/000.npy ...       FOLDER/normals/000.npy ...
"""

import struct
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vertebra.data.sprites.orbits.viewing import Orbit, projected
from vertebra.errors import UsageError

PINHOLE = 1
"""COLMAP's number of the camera model with two focal lengths and a principal point."""

ON_SURFACE = 0.01
"""Metres by which a point may be off what a view shows and still counts as seen."""


class Tracks(NamedTuple):
    """Which points are seen where; one entry a sighting, view by view.

    Attributes:
        views: (M,) int64.
        points: (M,) int64.
        pixels: (M, 2) float64 x, y.
        places: (M,) int64, number of the sighting in its view.
    """

    views: np.ndarray
    points: np.ndarray
    pixels: np.ndarray
    places: np.ndarray


def tracks(seen: Orbit) -> Tracks:
    """Where the points of an orbit are seen: in a view, and not behind something."""
    size = seen.depth.shape[1]
    views, points, pixels = [], [], []
    for view, pose in enumerate(seen.poses):
        place, depth = projected(seen.points.astype(float), pose, seen.intrinsics)
        column, row = np.floor(place).astype(np.int64).clip(0, size - 1).T
        inside = ((place >= 0) & (place < size)).all(1)
        found = np.flatnonzero(inside & (np.abs(seen.depth[view, row, column] - depth) < ON_SURFACE))
        views.append(np.full(len(found), view))
        points.append(found)
        pixels.append(place[found])
    places = np.concatenate([np.arange(len(found)) for found in points])
    return Tracks(np.concatenate(views), np.concatenate(points), np.concatenate(pixels), places)


def quaternions(turns: np.ndarray) -> np.ndarray:
    """Rotations (V, 3, 3) as unit quaternions (V, 4), w first and not negative, as COLMAP has them."""
    from scipy.spatial.transform import Rotation

    found = np.roll(Rotation.from_matrix(turns).as_quat(), 1, axis=1)
    return np.where(found[:, :1] < 0, -found, found)


def export(seen: Orbit, folder: str | Path, *, form: Literal["text", "binary"] = "text") -> Path:
    """Write an orbit.

    Args:
        seen: the orbit.
        folder: made where it is not there.
        form: of the three files of COLMAP.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds cameras already, or an unknown form.
    """
    root = Path(folder)
    if form not in ("text", "binary"):
        raise UsageError(f"form is {form!r}; COLMAP's files are 'text' or 'binary'")
    if any((root / "sparse" / "0" / f"cameras.{suffix}").exists() for suffix in ("txt", "bin")):
        raise UsageError(f"{root} holds cameras already; give another folder")
    for name in ("images", "masks", "depth", "normals", "sparse/0"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for view in range(len(seen)):
        Image.fromarray(seen.images[view]).save(root / "images" / f"{view:03d}.png")
        Image.fromarray(seen.masks[view]).save(root / "masks" / f"{view:03d}.png")
        np.save(root / "depth" / f"{view:03d}.npy", seen.depth[view])
        np.save(root / "normals" / f"{view:03d}.npy", seen.normals[view])
    (_text if form == "text" else _binary)(seen, tracks(seen), root / "sparse" / "0")
    _ply(seen, root / "points.ply")
    return root


def _grouped(keys: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of each key 0 to count - 1, in order."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.searchsorted(keys[order], np.arange(1, count)))


def _text(seen: Orbit, found: Tracks, folder: Path) -> None:
    size, k = seen.images.shape[1], seen.intrinsics
    pinhole = " ".join(repr(float(value)) for value in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
    lines = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", f"1 PINHOLE {size} {size} {pinhole}"]
    (folder / "cameras.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME", "# POINTS2D[] as (X, Y, POINT3D_ID)"]
    turns = quaternions(seen.poses[:, :3, :3])
    for view, rows in enumerate(_grouped(found.views, len(seen))):
        pose = " ".join(repr(float(value)) for value in (*turns[view], *seen.poses[view, :3, 3]))
        lines.append(f"{view + 1} {pose} 1 {view:03d}.png")
        points = zip(found.pixels[rows].tolist(), found.points[rows].tolist(), strict=True)
        lines.append(" ".join(f"{x:.4f} {y:.4f} {point + 1}" for (x, y), point in points))
    (folder / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"]
    for point, rows in enumerate(_grouped(found.points, len(seen.points))):
        place = " ".join(f"{value:.6f}" for value in seen.points[point].tolist())
        colour = " ".join(map(str, seen.point_colours[point].tolist()))
        track = zip(found.views[rows].tolist(), found.places[rows].tolist(), strict=True)
        lines.append(f"{point + 1} {place} {colour} 0 " + " ".join(f"{view + 1} {number}" for view, number in track))
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _binary(seen: Orbit, found: Tracks, folder: Path) -> None:
    size, k = seen.images.shape[1], seen.intrinsics
    camera = struct.pack("<QIiQQ4d", 1, 1, PINHOLE, size, size, k[0, 0], k[1, 1], k[0, 2], k[1, 2])
    (folder / "cameras.bin").write_bytes(camera)
    turns = quaternions(seen.poses[:, :3, :3])
    sighting = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
    blocks = [struct.pack("<Q", len(seen))]
    for view, rows in enumerate(_grouped(found.views, len(seen))):
        blocks.append(struct.pack("<I7dI", view + 1, *turns[view], *seen.poses[view, :3, 3], 1))
        blocks.append(f"{view:03d}.png".encode() + b"\0" + struct.pack("<Q", len(rows)))
        table = np.empty(len(rows), dtype=sighting)
        table["xy"], table["point"] = found.pixels[rows], found.points[rows] + 1
        blocks.append(table.tobytes())
    (folder / "images.bin").write_bytes(b"".join(blocks))
    blocks = [struct.pack("<Q", len(seen.points))]
    for point, rows in enumerate(_grouped(found.points, len(seen.points))):
        place, colour = seen.points[point].astype(float), seen.point_colours[point]
        blocks.append(struct.pack("<Q3d3BdQ", point + 1, *place, *colour, 0.0, len(rows)))
        blocks.append(np.stack([found.views[rows] + 1, found.places[rows]], 1).astype("<i4").tobytes())
    (folder / "points3D.bin").write_bytes(b"".join(blocks))


def _ply(seen: Orbit, file: Path) -> None:
    """Points with normals, colours and things, as a binary PLY."""
    columns = [*(("f4", name) for name in ("x", "y", "z", "nx", "ny", "nz"))]
    columns += [("u1", name) for name in ("red", "green", "blue", "thing")]
    table = np.empty(len(seen.points), dtype=[(name, "<" + kind if kind == "f4" else kind) for kind, name in columns])
    values = [*seen.points.T, *seen.point_normals.T, *seen.point_colours.T, seen.point_things]
    for (_, name), value in zip(columns, values, strict=True):
        table[name] = value
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property {'float' if kind == 'f4' else 'uchar'} {name}" for kind, name in columns]
    file.write_bytes("\n".join([*header, "end_header", ""]).encode() + table.tobytes())
