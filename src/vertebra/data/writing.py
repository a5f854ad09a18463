"""`write`: a dataset in another layout, such as boxes from VOC to COCO, or the sprites as anything that they carry.

Images that are files are copied as they are; others are saved as PNG. What a layout cannot hold is said in the
docstring of its writer.
"""

import os
from importlib import import_module
from pathlib import Path

from vertebra.data.dataset import Dataset
from vertebra.errors import UsageError, near

WRITERS = {
    "imagefolder": "folders",
    "coco": "coco",
    "voc": "voc",
    "yolo": "yolo",
    "masks": "masks",
    "panoptic": "panoptic",
    "pairs": "pairs",
    "image_text": "image_text",
    "videos": "videos",
}
"""Layout -> the module of `vertebra.data` that writes it, as `write_LAYOUT(dataset, folder)`."""


def write(dataset: Dataset, folder: str | os.PathLike[str], layout: str) -> Path:
    """Write a dataset so that `vertebra.data.read` reads it again.

    Args:
        dataset: with what the layout holds: classes, boxes, masks, clean images or captions.
        folder: a new or an empty one.
        layout: one of `WRITERS`.

    Returns:
        The folder.

    Raises:
        UsageError: no such layout, a folder that is not empty, or data that lacks what the layout holds.
        DataError: an image cannot be read.
    """
    if layout not in WRITERS:
        raise UsageError(f"no layout {layout!r} is written{near(layout, WRITERS)}; layouts: {', '.join(WRITERS)}")
    target = Path(folder)
    getattr(import_module(f"vertebra.data.{WRITERS[layout]}"), f"write_{layout}")(dataset, target)
    return target
