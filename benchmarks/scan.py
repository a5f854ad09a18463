"""The selective scan on the CPU: against the authors' sequential path, and how its time grows with tokens.

    python benchmarks/scan.py --path THEIR/CLONE
    python benchmarks/scan.py --growth

`--path` is a clone of state-spaces/mamba (or of hustvl/Vim: its folder mamba-1p1p1). Of its file
mamba_ssm/ops/selective_scan_interface.py `selective_scan_ref` runs as it is; it needs einops. What the file imports
besides for CUDA alone is left empty. Both sides get their own layout, and take turns as in benchmarks/backbones.py:
each case runs once unmeasured, a ratio is theirs over ours within one round, and the median of the rounds is printed
with the smallest and largest. Above 1 ours is faster. `training` is forward and backward.

The growth exponent is the slope of log seconds over log tokens, least squares.
"""

import argparse
import importlib.util
import statistics
import sys
import types
from collections.abc import Callable
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from backbones import turns
from torch import Tensor

from vertebra.blocks.selective_scan import selective_scan

FILE = "mamba_ssm/ops/selective_scan_interface.py"
GPU_ALONE = {
    "causal_conv1d": ["causal_conv1d_fn"],
    "causal_conv1d_cuda": [],
    "causal_conv1d.cpp_functions": [
        "causal_conv1d_fwd_function",
        "causal_conv1d_bwd_function",
        "causal_conv1d_update_function",
    ],
    "selective_scan_cuda": [],
    "mamba_ssm": [],
    "mamba_ssm.utils": [],
    "mamba_ssm.utils.torch": ["custom_bwd", "custom_fwd"],
    "mamba_ssm.ops": [],
    "mamba_ssm.ops.triton": [],
    "mamba_ssm.ops.triton.layer_norm": ["_layer_norm_fwd"],
}
"""What the authors' file imports and `selective_scan_ref` does not use; the decorators are set to do nothing."""


def reference(folder: Path) -> Callable[..., Tensor]:
    for name, contents in GPU_ALONE.items():
        module: Any = types.ModuleType(name)
        for one in contents:
            setattr(module, one, lambda *given, **_: given[0] if given else lambda function: function)
        sys.modules[name] = module
    found = importlib.util.spec_from_file_location("selective_scan_interface", folder / FILE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.selective_scan_ref


def arguments(batch: int, tokens: int, channels: int, states: int, training: bool) -> list[Tensor]:
    """Of `selective_scan`, in its order; decays start as Mamba's do."""
    torch.manual_seed(0)
    made = [
        torch.randn(batch, tokens, channels),
        torch.nn.functional.softplus(torch.randn(batch, tokens, channels) - 4),
    ]
    made += [-torch.arange(1.0, states + 1).repeat(channels, 1)]
    made += [torch.randn(batch, tokens, states), torch.randn(batch, tokens, states), torch.ones(channels)]
    return [tensor.requires_grad_(training) for tensor in made]


def theirs(given: list[Tensor]) -> list[Tensor]:
    """The same in the authors' layout, (B, C, N)."""
    return [
        (tensor.mT.contiguous() if tensor.dim() == 3 else tensor).detach().requires_grad_(tensor.requires_grad)
        for tensor in given
    ]


def run(scan: Callable[..., Tensor], given: list[Tensor], training: bool) -> Callable[[], None]:
    def once() -> None:
        if training:
            y = scan(*given)
            torch.autograd.grad(y, given, torch.ones_like(y))
        else:
            with torch.inference_mode():
                scan(*given)

    return once


def growth(asked: argparse.Namespace, training: bool) -> None:
    lengths = [64 * 2**power for power in range(7)]  # 64 to 4,096
    runs = [run(selective_scan, arguments(1, n, asked.channels, asked.states, training), training) for n in lengths]
    middle = [statistics.median(times) for times in turns(runs, asked.rounds, "cpu")]
    logs = [(log(n), log(seconds)) for n, seconds in zip(lengths, middle, strict=True)]
    x, y = (statistics.mean(column) for column in zip(*logs, strict=True))
    slope = sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)
    times = ", ".join(f"{n}: {1000 * seconds:.2f} ms" for n, seconds in zip(lengths, middle, strict=True))
    print(f"{'training' if training else 'inference'}: {times}; exponent {slope:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="the authors' clone")
    parser.add_argument("--growth", action="store_true", help="ours alone, 64 to 4,096 tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[197, 1024])
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.path is None and not asked.growth:
        parser.error("--path or --growth says what to measure")
    scan = reference(asked.path) if asked.path else None
    ratios = []
    for threads, mode in product(asked.threads, asked.modes):
        torch.set_num_threads(threads)
        if asked.growth:
            growth(asked, mode == "training")
        for batch, tokens in product(asked.batches, asked.tokens):
            if scan is None:
                break
            given = arguments(batch, tokens, asked.channels, asked.states, mode == "training")
            runs = [run(selective_scan, given, mode == "training"), run(scan, theirs(given), mode == "training")]
            mine, other = turns(runs, asked.rounds, "cpu")
            found = sorted(slow / fast for fast, slow in zip(mine, other, strict=True))
            ratios.append(statistics.median(found))
            line = f"{mode}, {batch} x {tokens} tokens, {threads} threads"
            times = f"{1000 * statistics.median(mine):9.1f} {1000 * statistics.median(other):9.1f} ms"
            print(f"{line:40} {times} {ratios[-1]:7.1f}  {found[0]:.1f}..{found[-1]:.1f}", flush=True)
    if ratios:
        mean = exp(sum(map(log, ratios)) / len(ratios))
        print(f"{'geometric mean':63} {mean:7.1f}  {min(ratios):.1f}..{max(ratios):.1f} over {len(ratios)} cases")


if __name__ == "__main__":
    main()
