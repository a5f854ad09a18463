"""How long reading and checking annotations takes, beside faster-coco-eval's own loading of the same json.

    python benchmarks/annotations.py [--objects 5000] [--repeats 5] [--folder DIR]

Makes COCO data with polygons and run-length masks (a seventh of the objects), writes it as VOC and as YOLO too, and
times, in turn within every round: reading each of them; the checks of `vertebra.data.geometry`; targets with boxes and
masks; and as the peer `faster_coco_eval.COCO(json)`, which parses and indexes the same json but checks nothing.
Medians and ranges of the rounds; imports are not timed. Images are small, as only their headers are read.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core import mask
from PIL import Image

from vertebra.data.coco import find_coco, read_coco
from vertebra.data.dataset import Dataset
from vertebra.data.folders import list_folder
from vertebra.data.geometry import faults
from vertebra.data.voc import find_voc, read_voc, write_voc
from vertebra.data.yolo import find_yolo, read_yolo, write_yolo

_SIDE, _PER_IMAGE, _CLASSES, _CORNERS = 512, 7, 80, 20


def make(folder: Path, count: int) -> None:
    """COCO data with `count` objects, 7 an image."""
    rng = np.random.default_rng(0)
    images = -(-count // _PER_IMAGE)
    picture = Image.new("RGB", (_SIDE, _SIDE), "grey")
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        picture.save(folder / f"images/{number:06d}.jpg")
    centre = rng.uniform(80, _SIDE - 80, (count, 1, 2))
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    radius = rng.uniform(10, 75, (count, _CORNERS, 1))
    shapes = centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    low, high = shapes.min(1), shapes.max(1)
    whole = {
        "images": [{"id": n, "file_name": f"{n:06d}.jpg", "width": _SIDE, "height": _SIDE} for n in range(images)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": n // _PER_IMAGE,
                "category_id": 1 + n % _CLASSES,
                "bbox": [*low[n].tolist(), *(high[n] - low[n]).tolist()],
                "iscrowd": 0,
                "segmentation": _runs(shapes[n]) if n % 7 == 0 else [shapes[n].ravel().tolist()],
            }
            for n in range(count)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, _CLASSES + 1)],
    }
    for entry in whole["annotations"]:
        entry["area"] = float(entry["bbox"][2] * entry["bbox"][3] / 2)
    (folder / "instances.json").write_text(json.dumps(whole))


def _runs(shape: np.ndarray) -> dict:
    encoded = mask.frPyObjects([shape.ravel().tolist()], _SIDE, _SIDE)[0]
    return {"size": [_SIDE, _SIDE], "counts": encoded["counts"].decode()}


def read(folder: Path, find: Callable, reader: Callable) -> Dataset:
    top, notes = list_folder(folder)
    return reader(str(folder), folder, find(folder, top), notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the data are made; a temporary folder where not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        _measure(Path(name), options.objects, options.repeats)


def _measure(root: Path, count: int, repeats: int) -> None:
    coco, voc, yolo = root / "coco", root / "voc", root / "yolo"
    make(coco, count)
    data = read(coco, find_coco, read_coco)
    split = data.splits["all"]
    write_voc(data, voc)
    write_yolo(data, yolo)
    split.target(0)  # imports torch
    tasks: dict[str, Callable] = {
        "read COCO json": lambda: read(coco, find_coco, read_coco),
        "check boxes and masks": lambda: list(faults(split)),
        "faster_coco_eval.COCO": lambda: COCO(str(coco / "instances.json"), print_function=lambda *words: None),
        "read VOC xml": lambda: read(voc, find_voc, read_voc),
        "read YOLO txt": lambda: read(yolo, find_yolo, read_yolo),
        "100 targets with masks": lambda: [split.target(index % len(split)) for index in range(100)],
    }
    seconds: dict[str, list[float]] = {task: [] for task in tasks}
    for _ in range(repeats):
        for task, run in tasks.items():
            start = time.perf_counter()
            run()
            seconds[task].append(time.perf_counter() - start)
    size = (coco / "instances.json").stat().st_size / 1e6
    print(f"{count} objects in {len(split)} images, json {size:.1f} MB, {repeats} rounds")
    for task, times in seconds.items():
        print(f"{task:24s} {statistics.median(times):7.3f} s  ({min(times):.3f} to {max(times):.3f})")
    both = [a + b for a, b in zip(seconds["read COCO json"], seconds["check boxes and masks"], strict=True)]
    ratio = [one / peer for one, peer in zip(both, seconds["faster_coco_eval.COCO"], strict=True)]
    print(f"reading and checking COCO: {statistics.median(both):.3f} s, {statistics.median(ratio):.2f} times the peer")


if __name__ == "__main__":
    main()
