"""Sprite scenes per second on one core: drawn with boxes and masks, with targets as tensors, and with words.

    python benchmarks/sprites.py [--size 64]

Seconds are processor time of one thread. The first pass also makes the fields of distances of the handwriting that it
meets, once a process (about two milliseconds each); later passes draw scenes that were not drawn before.
"""

import argparse
import os
import statistics
import time

from vertebra.data.sprites import sprites
from vertebra.data.sprites.language import captions, facts, referring
from vertebra.data.sprites.rendering import render
from vertebra.data.sprites.scenes import plan


def speeds(size: int, images: int, repeats: int) -> dict[str, list[float]]:
    """Images a second of each kind of work, a value a repeat."""
    split = sprites(size=size, annotate="all", splits={"train": images * (repeats + 1)}).split("train")
    world = split.annotations.world
    split.target(0)  # imports torch
    found: dict[str, list[float]] = {}

    def drawn(index: int) -> None:
        _ = render(world, "train", index).masks

    def worded(index: int) -> None:
        known = facts(world, render(world, "train", index))
        captions(world, "train", index, known)
        referring(world, "train", index, known)

    def trained(index: int) -> None:
        split.image(index)
        split.target(index)

    work = {
        "plan only": lambda index: plan(world, "train", index),
        "image, boxes, masks": drawn,
        "and words": worded,
        "image and target, all annotations": trained,
    }
    for repeat in range(repeats + 1):
        for name, one in work.items():
            start = time.process_time()
            for index in range(repeat * images, (repeat + 1) * images):
                one(index)
            label = name if repeat else f"{name}, first pass"
            found.setdefault(label, []).append(images / (time.process_time() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--images", type=int, default=300, help="a pass")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{arguments.size} x {arguments.size} pixels, 1 to 3 things, one core")
    for name, values in speeds(arguments.size, arguments.images, arguments.repeats).items():
        spread = f"({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
        print(f"  {name:<46} {statistics.median(values):7.0f} img/s {spread}")


if __name__ == "__main__":
    main()
