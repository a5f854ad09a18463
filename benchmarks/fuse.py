"""Forward passes before and after `vertebra.surgery.fuse`, on one thread.

    python benchmarks/fuse.py [--rounds 9] [--batch 8] [--size 128]

The two networks take turns, in an order that changes from round to round, so that what else the machine does meets
both; a ratio is of one round's two times, and the spread is that of the rounds. Both lie channels-last or not as the
network prefers.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.training.speed import prefers_channels_last

NETWORKS = (
    "timm/resnet18",
    "timm/resnet50",
    "timm/mobilenetv2_100",
    "timm/mobilenetv3_small_100",
    "efficientnet/b0",
    "timm/regnetx_002",
    "vovnet/39",
    "timm/densenet121",
)


def seconds(model: nn.Module, batch: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        model(batch)
    return time.perf_counter() - start


def rounds(before: nn.Module, after: nn.Module, batch: torch.Tensor, count: int) -> list[tuple[float, float]]:
    """Seconds of both sides, round by round; the first round of each warms up and is left out."""
    turns = []
    for number in range(count + 1):
        if number % 2:
            slow, fast = seconds(before, batch), seconds(after, batch)
        else:
            fast, slow = seconds(after, batch), seconds(before, batch)
        turns.append((slow, fast))
    return turns[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="*", help="names out of the list above, or others")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{asked.threads} threads, {asked.rounds} rounds, {asked.batch} images of {asked.size} pixels")
    print(f"{'network':28} {'folded':>6} {'before ms':>10} {'after ms':>9} {'ratio':>6}  spread")
    for name in asked.networks or NETWORKS:
        model = fill(Spec(name, {"image_size": asked.size}).build()).eval()
        operated = fuse(model)
        layout = torch.channels_last if prefers_channels_last(model) else torch.contiguous_format
        batch = images((asked.batch, 3, asked.size, asked.size)).to(memory_format=layout)
        sides = [side.to(memory_format=layout) for side in (model, operated.model)]  # type: ignore[call-overload]
        turns = rounds(*sides, batch, asked.rounds)
        ratios = sorted(before / after for before, after in turns)
        middle = [1000 * statistics.median(side) for side in zip(*turns, strict=True)]
        print(
            f"{name:28} {len(operated.changed):6} {middle[0]:10.1f} {middle[1]:9.1f} {statistics.median(ratios):6.2f}"
            f"  {ratios[0]:.2f}..{ratios[-1]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
