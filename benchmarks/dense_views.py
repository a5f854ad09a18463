"""Training views of images with boxes and masks: a batch at once against torchvision's transforms, one by one.

    python benchmarks/dense_views.py

Both sides get the same crops and flips; pixels are left out, as both resize them by torch. Ratio of throughputs in one
interleaved run, with its spread.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from vertebra.data.dense import moved
from vertebra.data.views import Placement

SIZE = (224, 224)


def targets_of(images: int, objects: int, masks: bool, random: np.random.Generator) -> list[dict]:
    """Targets of images of 480 x 640 pixels."""
    found = []
    for _ in range(images):
        corners = random.uniform(0, 0.7, (objects, 2)) * [640, 480]
        boxes = np.concatenate([corners, corners + random.uniform(20, 190, (objects, 2))], 1)
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes).float(), format="XYXY", canvas_size=(480, 640)),
            "labels": torch.arange(objects),
        }
        if masks:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(random.random((objects, 480, 640)) < 0.5))
        found.append(target)
    return found


def one_by_one(targets: list[dict], places: list[Placement]) -> list[dict]:
    """The same with torchvision: crop, resize, flip, clip, and drop what is gone."""
    clean = v2.SanitizeBoundingBoxes(min_size=1)
    found = []
    for target, (box, flipped) in zip(targets, places, strict=True):
        left, top, right, bottom = box
        moved_target = dict(target)
        for name in ("boxes", "masks"):
            if name in target:
                value = v2.functional.resized_crop(target[name], top, left, bottom - top, right - left, list(SIZE))
                moved_target[name] = v2.functional.horizontal_flip(value) if flipped else value
        moved_target["boxes"] = v2.functional.clamp_bounding_boxes(moved_target["boxes"])
        found.append(clean(moved_target))
    return found


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="of a batch")
    parser.add_argument("--objects", type=int, default=10, help="of an image")
    parser.add_argument("--rounds", type=int, default=9, help="times that the two sides take turns")
    chosen = parser.parse_args()
    random = np.random.default_rng(0)
    places = []
    for _ in range(chosen.images):
        left, top = int(random.integers(0, 200)), int(random.integers(0, 150))
        places.append(Placement((left, top, left + 400, top + 320), bool(random.random() < 0.5)))
    for masks in (False, True):
        targets = targets_of(chosen.images, chosen.objects, masks, random)
        rounds = [
            (seconds(lambda: moved(targets, places, SIZE), 5), seconds(lambda: one_by_one(targets, places), 5))  # noqa: B023
            for _ in range(chosen.rounds)
        ]
        ratios = sorted(theirs / ours for ours, theirs in rounds)
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        what = "boxes and masks" if masks else "boxes"
        print(
            f"{what}: {1e3 * ours:.2f} ms a batch, one by one {1e3 * theirs:.2f} ms,"
            f" ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
