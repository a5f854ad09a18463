"""Recipes: functions that return a `Run`, one a module, found by the module's name.

A recipe is `def NAME(data: str, backbone: Spec, images: int) -> Run` in `recipes/NAME.py`, where `images` counts
the training images. Adding one edits nothing.
"""

import importlib
import math
import os
from pathlib import Path
from typing import Protocol

from vertebra.config import Run
from vertebra.errors import UsageError, near
from vertebra.spec import Spec


class Recipe(Protocol):
    """What a recipe's module holds under the module's name."""

    def __call__(self, data: str, backbone: Spec, images: int) -> Run:
        """The run for a training set of `images` images."""
        ...


def names() -> list[str]:
    """Recipes that are here, sorted."""
    files = [Path(entry.name) for entry in os.scandir(Path(__file__).parent)]
    return sorted(file.stem for file in files if file.suffix == ".py" and not file.stem.startswith("_"))


def find(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UsageError: there is none; the message names the nearest ones.
    """
    if name not in names():
        raise UsageError(f"no recipe is called {name!r}{near(name, names())}; there are {', '.join(names())}")
    return getattr(importlib.import_module(f"vertebra.recipes.{name}"), name)


def batch_for(images: int, most: int) -> int:
    """A power of two that leaves small sets at least ten steps an epoch, between 8 and `most`."""
    return max(8, min(most, 2 ** int(math.log2(max(1, images / 10)))))


def epochs_for(images: int, batch: int, *, steps: int, least: int, most: int) -> int:
    """Epochs that come to about `steps` optimiser steps, within bounds."""
    return min(most, max(least, round(steps * batch / max(batch, images))))
