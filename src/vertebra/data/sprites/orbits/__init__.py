"""Things seen from known cameras on an orbit: colour, metric depth, masks, normals, poses and points, ray by ray.

`orbit(seed, index)` builds one or more things from balls, boxes, cylinders and cones, and renders them in closed form,
so that depth, normals and poses are exact. Lengths are in metres, z is up. Cameras are pinholes as COLMAP has them:
x to the right, y down, z forward, the centre of the left upper pixel at (0.5, 0.5). `export` writes an orbit as
multi-view data sets come.

>>> seen = orbit(0, 0, views=4, size=32, label="car")
>>> seen.images.shape, seen.depth.shape, seen.names
((4, 32, 32, 3), (4, 32, 32), ('car',))
"""

from vertebra.data.sprites.orbits.colmap import Tracks, export, tracks
from vertebra.data.sprites.orbits.solids import Solids, cast
from vertebra.data.sprites.orbits.things import THINGS
from vertebra.data.sprites.orbits.viewing import Orbit, backprojected, look_at, orbit, pairs, projected, rays, render

__all__ = [
    "THINGS",
    "Orbit",
    "Solids",
    "Tracks",
    "backprojected",
    "cast",
    "export",
    "look_at",
    "orbit",
    "pairs",
    "projected",
    "rays",
    "render",
    "tracks",
]
