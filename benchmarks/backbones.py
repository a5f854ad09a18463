"""One of our backbones against anyone's implementation of the same network: speed and memory, side by side.

    python benchmarks/backbones.py hornet/tiny_7x7 --against hornet:hornet_tiny_7x7 --path THEIR/CLONE
    python benchmarks/backbones.py vovnet/39 --against timm:create_model --with '{"model_name": "vovnet39a"}'

`--against` names a callable that returns a module; it is given no arguments but those of `--with`. Both networks run in
one process and take turns, in an order that changes from round to round, so that what else the machine does meets both.
Each case runs once unmeasured; a ratio is theirs over ours within one round, the median of the rounds is printed with
the smallest and largest. Above 1 ours is faster. Both sides carry a linear classifier of 1000 classes, theirs its own.

Memory (`--memory`) is the largest resident set of a process that does nothing but one case of one side, with its
imports and weights, since torch does not tell the peak of its allocator on the CPU.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from math import exp, log

import torch
from torch import Tensor, nn

from vertebra.spec import Spec
from vertebra.tasks.classify import classify

CLASSES = 1000
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Logits(nn.Module):
    """A network whose output is one tensor: the first of a tuple, the logits of a mapping."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        found = self.network(images)
        found = found["logits"] if isinstance(found, dict) else found
        return found if isinstance(found, Tensor) else found[0]


def ours(address: str, options: dict) -> nn.Module:
    return _Logits(classify(Spec(address, options).build(), [str(number) for number in range(CLASSES)]))


def theirs(address: str, options: dict) -> nn.Module:
    module, _, name = address.partition(":")
    return _Logits(getattr(importlib.import_module(module), name)(**options))


def inference(network: nn.Module, batch: Tensor) -> Callable[[], None]:
    network.eval()

    def run() -> None:
        with torch.inference_mode():
            network(batch)

    return run


def training(network: nn.Module, batch: Tensor) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-6)
    targets = torch.arange(len(batch), device=batch.device) % CLASSES

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch).float(), targets).backward()
        optimizer.step()

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(runs: list[Callable[[], None]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each side, round by round; the first round warms up and is left out."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for side in order:
            spent = seconds(runs[side], device)
            if number:
                found[side].append(spent)
    return found


def peak(arguments: list[str], side: str) -> float:
    """MB that a child process needs at its peak to run one case of one side."""
    command = [sys.executable, __file__, *arguments, "--child", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def case(asked: argparse.Namespace, side: str, mode: str, size: int, kind: str, last: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    known = {"ours": (ours, asked.address, asked.options), "theirs": (theirs, asked.against, getattr(asked, "with"))}
    make, address, options = known[side]
    layout = torch.channels_last if last else torch.contiguous_format
    network = make(address, json.loads(options)).to(asked.device, TYPES[kind], memory_format=layout)
    batch = torch.randn(asked.batch, 3, size, size, device=asked.device).to(TYPES[kind], memory_format=layout)
    return (inference if mode == "inference" else training)(network, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="ours: page/variant")
    parser.add_argument("--against", required=True, metavar="MODULE:CALLABLE")
    parser.add_argument("--with", default="{}", metavar="JSON", help="keywords of the other side's callable")
    parser.add_argument("--options", default="{}", metavar="JSON", help="options of ours")
    parser.add_argument("--path", action="append", default=[], help="folder to import the other side from")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 224])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--types", nargs="+", default=["fp32"], choices=list(TYPES))
    parser.add_argument("--layouts", nargs="+", default=["rows", "last"], choices=["rows", "last"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in child processes")
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path[:0] = asked.path
    torch.set_num_threads(asked.threads)
    cases = list(product(asked.modes, asked.sizes, asked.types, asked.layouts))
    if asked.child:
        mode, size, kind, layout = cases[0]
        case(asked, asked.child, mode, size, kind, layout == "last")()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2))
        return
    print(f"{asked.address} against {asked.against} on {asked.device}, {asked.threads} threads, {asked.batch} images")
    print(f"{'case':32} {'ours ms':>9} {'theirs ms':>9} {'ratio':>6}  spread", flush=True)
    ratios = []
    for mode, size, kind, layout in cases:
        runs = [case(asked, side, mode, size, kind, layout == "last") for side in ("ours", "theirs")]
        mine, other = turns(runs, asked.rounds, asked.device)
        found = sorted(theirs / ours for ours, theirs in zip(mine, other, strict=True))
        ratios.append(statistics.median(found))
        line = f"{mode} {size} {kind} {'channels-last' if layout == 'last' else ''}"
        times = f"{1000 * statistics.median(mine):9.1f} {1000 * statistics.median(other):9.1f}"
        memory = ""
        if asked.memory:
            one = ["--modes", mode, "--sizes", str(size), "--types", kind, "--layouts", layout]
            own, foreign = (peak([*_same(asked), *one], side) for side in ("ours", "theirs"))
            memory = f"  {own:.0f} MB against {foreign:.0f}"
        print(f"{line:32} {times} {ratios[-1]:6.2f}  {found[0]:.2f}..{found[-1]:.2f}{memory}", flush=True)
    mean = exp(sum(map(log, ratios)) / len(ratios))
    print(f"{'geometric mean':52} {mean:6.2f}  {min(ratios):.2f}..{max(ratios):.2f} over {len(ratios)} cases")


def _same(asked: argparse.Namespace) -> list[str]:
    """The arguments of a child that runs on the same networks."""
    same = [asked.address, "--against", asked.against, "--with", getattr(asked, "with"), "--options", asked.options]
    same += ["--batch", str(asked.batch), "--threads", str(asked.threads)]
    return same + [word for path in asked.path for word in ("--path", path)]


if __name__ == "__main__":
    main()
