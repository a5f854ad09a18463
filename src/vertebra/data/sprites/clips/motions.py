"""How things and cameras move: paths through a clip, computed for all frames at once."""

from typing import Literal, NamedTuple

import numpy as np

MOTIONS = (
    *("left", "right", "up", "down"),
    *("clockwise", "anticlockwise", "grow", "shrink"),
    *("bounce", "circle", "shake", "still"),
)
"""Names of the motions; the position is the target."""

PHRASES = {
    **{way: f"moving {way}" for way in MOTIONS[:4]},
    **{way: f"turning {way}" for way in MOTIONS[4:6]},
    **dict(
        zip(
            MOTIONS[6:],
            ("growing", "shrinking", "bouncing", "going in a circle", "shaking", "standing still"),
            strict=True,
        )
    ),
}
"""What a sentence says of each motion."""

Camera = Literal["still", "shake", "pan"]

DRIFTS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

SPEEDS = (0.016, 0.034)
"""Slowest and fastest drift, as a share of the side a frame."""

GROWTH = 2.2
"""Times that a radius grows while a thing grows."""


class Path(NamedTuple):
    """Where a thing is in each frame.

    Attributes:
        centres: (T, 2) x, y in pixels.
        radii: (T,) pixels.
        angles: (T,) radians, clockwise.
    """

    centres: np.ndarray
    radii: np.ndarray
    angles: np.ndarray


def moved(motions: np.ndarray, radius: float, side: int, random: np.random.Generator) -> Path:
    """A path around (0, 0) of a thing that does one motion after another.

    Args:
        motions: (T,) positions in `MOTIONS`, the motion of each frame.
        radius: of the thing halfway, in pixels.
        side: of the frames in pixels; speeds are shares of it.
        random: draws speeds, phases and the first angle; always the same number of times.
    """
    speed, spin, phase, slope, first = random.random(5)
    pace = side * (SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * speed)
    turn = np.radians(6 + 8 * spin)  # a frame
    names = np.array(MOTIONS)[motions]
    count = np.arange(len(motions))
    steps = np.zeros((len(motions), 2))
    for name, way in DRIFTS.items():
        steps[names == name] = np.multiply(way, pace)
    tilt = np.pi * (0.15 + 0.2 * slope) + np.pi / 2 * np.floor(4 * phase)  # of a bounce, never along the sides
    steps[names == "bounce"] = 1.6 * pace * np.array([np.cos(tilt), np.sin(tilt)])
    angles = 2 * np.pi * phase + np.sign(slope - 0.5) * (0.35 + 0.2 * spin) * count
    steps[names == "circle"] = 1.2 * pace * np.stack([np.cos(angles), np.sin(angles)], 1)[names == "circle"]
    steps[names == "shake", 0] = 1.6 * pace * np.cos(np.pi / 2 * (count + 0.5))[names == "shake"]
    turns = turn * ((names == "clockwise") * 1.0 - (names == "anticlockwise"))
    swells = np.zeros(len(motions))
    for name, sign in (("grow", 1), ("shrink", -1)):
        swells[names == name] = sign * np.log(GROWTH) / max(1, (names == name).sum() - 1)
    scale = _summed(swells)
    scale -= (scale.max() + scale.min()) / 2
    return Path(_summed(steps), radius * np.exp(scale), np.radians(40 * first - 20) + _summed(turns))


def _summed(steps: np.ndarray) -> np.ndarray:
    """Positions after steps, of which the first frame takes none."""
    found = np.cumsum(steps, axis=0)
    return found - found[:1]


def somewhere(path: Path, side: int, random: np.random.Generator, *, tries: int = 6) -> np.ndarray:
    """Places (tries, 2) for a path to begin, such that all of it, or at least its middle, is in the frame."""
    reach = path.radii[:, None]
    low, high = (reach - path.centres).max(0), (side - reach - path.centres).min(0)
    middle = (low + high) / 2
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    return np.where(high > low, low + random.random((tries, 2)) * (high - low), middle)


def beside(path: Path, others: list[Path], side: int, random: np.random.Generator) -> Path:
    """The path at a place of its own, as far from the others as a few tries find."""
    spots = somewhere(path, side, random)
    apart = np.full(len(spots), np.inf)
    for other in others:
        away = np.linalg.norm(path.centres + spots[:, None] - other.centres, axis=2)
        apart = np.minimum(apart, away.min(1))
    return path._replace(centres=path.centres + spots[apart.argmax()])


def crossing(path: Path, other: Path) -> Path:
    """The path moved so that both are at one place halfway."""
    middle = len(path.centres) // 2
    return path._replace(centres=path.centres + other.centres[middle] - path.centres[middle])


def entering(path: Path, name: str, side: int, random: np.random.Generator) -> Path:
    """A drift that comes in from outside after a third of the clip or so, or has left a third before the end.

    In short clips it is faster than other drifts, so that it shows whole in the end, or did at the beginning.
    """
    chance, share = random.random(2)
    late, last = chance < 0.5, len(path.centres) - 1
    axis, sign = (0 if DRIFTS[name][0] else 1), sum(DRIFTS[name])
    edge = 0.0 if (sign > 0) == late else float(side)
    frame = int(last * (0.2 + 0.25 * share if late else 0.8 - 0.25 * share))
    outside = (-sign if late else sign) * path.radii[frame]
    centres = path.centres.copy()
    along = centres[:, axis] - centres[frame, axis]
    travel = abs(along[last if late else 0])
    along *= max(1.0, 2.4 * path.radii[frame] / max(travel, 1e-6))
    centres[:, axis] = edge + outside + along
    return path._replace(centres=centres)


def bouncing(path: Path, motions: np.ndarray, side: int, random: np.random.Generator) -> Path:
    """A path that meets an edge of the frame in the middle third of its bouncing, and is folded back at all edges."""
    frames = np.flatnonzero(motions == MOTIONS.index("bounce"))
    when, across = random.random(2)
    frame = frames[int(len(frames) * (1 + when) / 3)]
    way = path.centres[min(frame + 1, len(motions) - 1)] - path.centres[max(frame - 1, 0)]
    axis, reach = int(np.abs(way).argmax()), path.radii[:, None]
    spot = np.full(2, reach[frame, 0] + across * (side - 2 * reach[frame, 0]))
    spot[axis] = side - reach[frame, 0] if way[axis] > 0 else reach[frame, 0]
    room = np.maximum(side - 2 * reach, 1e-6)
    share = (path.centres + spot - path.centres[frame] - reach) / room
    return path._replace(centres=reach + room * np.abs((share + 1) % 2 - 1))


def kept_in(path: Path, side: int) -> Path:
    """A path that is taken up again on the other side of the frame where it has left it."""
    reach = path.radii.max() + 1
    return path._replace(centres=(path.centres + reach) % (side + 2 * reach) - reach)


def camera_path(camera: Camera, frames: int, side: int, random: np.random.Generator) -> np.ndarray:
    """Where the camera looks, (T, 2) int64 x, y pixels away from the middle; at most `side / 2`."""
    angle, speed = random.random(2)
    jitter = random.standard_normal((frames, 2))
    if camera == "shake":
        return np.rint(np.clip(jitter * side * 0.02, -0.06 * side, 0.06 * side)).astype(np.int64)
    if camera == "pan":
        pace = min(side * (0.008 + 0.012 * speed), side / max(1, frames - 1))
        away = (np.arange(frames) - (frames - 1) / 2)[:, None] * pace
        return np.rint(away * [np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)]).astype(np.int64)
    return np.zeros((frames, 2), dtype=np.int64)
