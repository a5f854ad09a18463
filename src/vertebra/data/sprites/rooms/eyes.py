"""Where walkers look: the rays of the columns and rows of their images."""

from typing import NamedTuple

import numpy as np

EYE, CEILING = 1.0, 2.4
"""Heights of the walker's eye and of the walls, in metres."""


class Eyes(NamedTuple):
    """N walkers' eyes, with a field of view of 90 degrees both ways; rays have 1 along the line of sight.

    Attributes:
        x: (N, 1) metres.
        y: (N, 1) metres.
        cos: (N, 1) of the heading.
        sin: (N, 1) of the heading.
        across: (S,) metres to the right a metre ahead, of the columns.
        down: (S,) metres down a metre ahead, of the rows; never 0.
        dx: (N, S) direction of the columns.
        dy: (N, S) direction of the columns.
    """

    x: np.ndarray
    y: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    across: np.ndarray
    down: np.ndarray
    dx: np.ndarray
    dy: np.ndarray

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return len(self.across)

    @property
    def plane(self) -> np.ndarray:
        """Depth (S,) of floor or ceiling in the rows, float32."""
        return (np.where(self.down > 0, EYE, EYE - CEILING) / self.down).astype(np.float32)


def eyes(places: np.ndarray, headings: np.ndarray, size: int) -> Eyes:
    """Eyes of walkers at places (N, 2) with headings (N,) in radians, for images of a side of `size` pixels."""
    across = (np.arange(size) + 0.5) * (2 / size) - 1
    down = np.where(across == 0, 1e-6, across)  # the middle row of an odd number looks level
    cos, sin = np.cos(headings)[:, None], np.sin(headings)[:, None]
    return Eyes(places[:, :1], places[:, 1:], cos, sin, across, down, cos + across * sin, sin - across * cos)
