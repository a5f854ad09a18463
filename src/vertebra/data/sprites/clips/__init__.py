"""Clips of digits and shapes that drift, turn, grow, bounce and hide each other, with all that is known of them.

`clip(seed, index)` is a function of its arguments alone: pixels, masks, boxes, tracks, how much of each thing shows,
the motion of each thing and sentences that single it out. Things move over textures or over a user's photographs; the
camera may stand, shake or pan.

>>> seen = clip(0, 0, frames=8, size=48)
>>> seen.frames.shape, seen.boxes.shape[0], len(seen.sentences) == len(seen.tracks)
((8, 48, 48, 3), 8, True)
"""

from vertebra.data.sprites.clips.drawing import Clip, clip
from vertebra.data.sprites.clips.motions import MOTIONS, Camera
from vertebra.data.sprites.clips.saving import save_frames, save_video

__all__ = ["MOTIONS", "Camera", "Clip", "clip", "save_frames", "save_video"]
