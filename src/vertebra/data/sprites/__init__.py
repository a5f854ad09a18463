"""Sprites: one deterministic world of digits, shapes and your own cut-outs, with every kind of annotation.

`sprites()` is a data set whose images are drawn when they are asked for; `scene(seed, index)` is one scene with all
that is known of it. `shapes` and `textures` draw, `scenes` puts things in places, `rendering` makes pixels, `language`
says what is there, and `degradations` makes it worse. Nothing here imports torch before a target is made.
"""

from vertebra.data.sprites.dataset import sprites
from vertebra.data.sprites.degradations import DEGRADATIONS, degrade, psnr, quality
from vertebra.data.sprites.language import RELATIONS
from vertebra.data.sprites.scenes import ALONE, ATTRIBUTES, POSITIONS, SIZES, World
from vertebra.data.sprites.shapes import DIGITS, GLYPHS, SHAPES
from vertebra.data.sprites.targets import Sprites, arrays, objects
from vertebra.data.sprites.textures import COLOURS, TEXTURES
from vertebra.data.sprites.things import Scene, Thing, scene, world

__all__ = [
    "ALONE",
    "ATTRIBUTES",
    "COLOURS",
    "DEGRADATIONS",
    "DIGITS",
    "GLYPHS",
    "POSITIONS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Scene",
    "Sprites",
    "Thing",
    "World",
    "arrays",
    "degrade",
    "objects",
    "psnr",
    "quality",
    "scene",
    "sprites",
    "world",
]
