"""How time and memory of backbones grow with the side of the image, and the power that fits them.

    python benchmarks/growth.py vim/tiny rmt/t timm/deit_tiny_patch16_224 [--sizes 128 256 512 1024] [--chart FILE.svg]

Inference of one image, the best of a few runs after one unmeasured. Every network and side runs in a process of its
own, whose largest resident set less what it had before the first image is the memory; that includes what torch keeps
for later. At each side the networks take turns in an order of its own, so that a slow minute meets them all.

The power is fitted to the upper half of the sides, where what grows fastest rules: 2 is linear in pixels, 4 quadratic.
A network that needs more than `--most` seconds an image at one side is not run at larger ones. `--chart` draws both in
one file and needs matplotlib.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vertebra.spec import Spec

Found = dict[tuple[str, int], tuple[float, float]]
"""(network, side) -> milliseconds, MB."""


def resident() -> float:
    """Largest resident set of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def child(address: str, side: int, runs: int) -> None:
    """Measure one network at one side, and print milliseconds and MB."""
    torch.manual_seed(0)
    backbone = Spec(address, {"image_size": side}).build().eval()
    image = torch.randn(1, backbone.preprocess.channels, side, side)
    before, times = resident(), []
    with torch.inference_mode():
        for _ in range(runs + 1):
            started = time.perf_counter()
            backbone(image)
            times.append(time.perf_counter() - started)
    print(json.dumps([1000 * min(times[1:]), resident() - before]))


def measured(networks: Sequence[str], sizes: Sequence[int], *, runs: int, threads: int, most: float) -> Found:
    """Every network at every side, smaller sides first; what would take too long is left out."""
    found: Found = {}
    order = random.Random(0)
    slow: set[str] = set()
    for side in sorted(sizes):
        for address in order.sample(list(networks), len(networks)):
            if address in slow:
                continue
            command = [sys.executable, __file__, "--child", address, str(side), "--runs", str(runs)]
            done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True)
            if done.returncode:
                print(f"{address} at {side}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                slow.add(address)
                continue
            milliseconds, memory = json.loads(done.stdout.splitlines()[-1])
            found[address, side] = milliseconds, memory
            print(f"{address:40} {side:5} {milliseconds:9.1f} ms {memory:8.0f} MB", file=sys.stderr, flush=True)
            if milliseconds > 1000 * most:
                slow.add(address)
    return found


def power(found: Found, address: str, which: int) -> float:
    """Power of the side, fitted to the upper half of the sides; NaN below three sides or without any memory."""
    sides = sorted(side for name, side in found if name == address)
    values = [found[address, side][which] for side in sides]
    upper = slice(len(sides) // 2 - (len(sides) < 5), None)
    if len(sides) < 3 or min(values[upper]) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sides[upper]), np.log(values[upper]), 1)[0])


def table(found: Found, networks: Sequence[str], sizes: Sequence[int]) -> str:
    """Markdown: milliseconds and MB at each side, then both powers."""
    head = ["network", *(f"{side} px" for side in sizes), "power of time", "of memory"]
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for address in networks:
        cells = [found.get((address, side)) for side in sizes]
        shown = ["-" if cell is None else f"{cell[0]:.0f} ms, {cell[1]:.0f} MB" for cell in cells]
        lines.append(" | ".join([address, *shown, *(f"{power(found, address, which):.2f}" for which in (0, 1))]))
    return "\n".join(f"| {line} |" if " | " in line else f"|{line}|" for line in lines)


def chart(found: Found, networks: Sequence[str], file: Path) -> None:
    """Time and memory against the side, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharex=True, layout="constrained")
    for which, (axis, title) in enumerate(zip(axes, ("milliseconds", "MB"), strict=True)):
        for number, address in enumerate(networks):
            sides = sorted(side for name, side in found if name == address)
            values = [found[address, side][which] for side in sides]
            axis.loglog(sides, values, marker="osD^vPX*"[number // 10 % 8], markersize=4, linewidth=1.2, label=address)
        axis.set(title=title, xlabel="side of the image in pixels")
        axis.set_xticks(ticks := sorted({side for _, side in found}), [str(side) for side in ticks])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="addresses, as vim/tiny")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 192, 256, 384, 512, 768, 1024])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=float, default=8.0, help="seconds an image")
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.child:
        child(asked.child[0], int(asked.child[1]), asked.runs)
        return
    if not asked.networks:
        parser.error("give at least one network, as vim/tiny")
    found = measured(asked.networks, asked.sizes, runs=asked.runs, threads=asked.threads, most=asked.most)
    print(table(found, asked.networks, sorted(asked.sizes)))
    if asked.chart:
        chart(found, asked.networks, asked.chart)


if __name__ == "__main__":
    main()
