"""What is written is read again, through the one function and the one verb that do it."""

import numpy as np
import pytest
from click.testing import CliRunner

from vertebra.cli.convert import LAYOUTS
from vertebra.cli.main import vertebra
from vertebra.data import read
from vertebra.data.sprites import sprites
from vertebra.data.writing import WRITERS, write
from vertebra.errors import UsageError

FEW = {"train": 5, "val": 3}
CARRIES = {
    "imagefolder": {"objects": 1},
    "coco": {},
    "voc": {},
    "yolo": {},
    "masks": {"annotate": "semantic"},
    "panoptic": {"annotate": "panoptic"},
    "pairs": {"annotate": "clean", "degrade": "blur"},
    "image_text": {"annotate": "captions"},
}


@pytest.mark.parametrize("layout", CARRIES)
def test_sprites_are_read_again(tmp_path, layout):
    world = sprites(size=32, splits=FEW, **CARRIES[layout])
    found = read(write(world, tmp_path / "out", layout))
    assert found.layout == layout
    assert {name: len(split) for name, split in found.splits.items()} == FEW
    for name, split in world.splits.items():
        again = found.split(name)
        pixels = sorted(np.asarray(split.image(index)).tobytes() for index in range(len(split)))
        assert pixels == sorted(np.asarray(again.image(index)).tobytes() for index in range(len(again)))
    if layout == "imagefolder":
        counts = found.split("train").counts
        assert dict(zip(found.classes, counts, strict=True)) == dict(
            zip(world.classes, world.split("train").counts, strict=True)
        )


def test_every_writer_is_there():
    assert set(CARRIES) == set(WRITERS) - {"videos"}  # which has tests of its own
    assert tuple(WRITERS) == LAYOUTS


def test_bad_calls(tmp_path):
    world = sprites(size=32, splits=FEW)
    with pytest.raises(UsageError, match="no layout 'cocoa' is written; did you mean coco"):
        write(world, tmp_path / "out", "cocoa")
    with pytest.raises(UsageError, match="has multi labels an image"):
        write(world, tmp_path / "out", "imagefolder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    with pytest.raises(UsageError, match="not empty"):
        write(world, tmp_path / "full", "coco")


def test_the_verb(tmp_path):
    write(sprites(size=32, splits=FEW), tmp_path / "voc", "voc")
    done = CliRunner().invoke(vertebra, ["convert", str(tmp_path / "voc"), str(tmp_path / "coco"), "--to", "coco"])
    assert done.exit_code == 0, done.output
    assert "8 images of" in done.stdout and "(voc) as coco" in done.stdout
    assert read(tmp_path / "coco").layout == "coco"
