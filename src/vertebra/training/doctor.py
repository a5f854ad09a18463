"""What this machine has, what works on it, and what is slow: `vertebra doctor`."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import features
from torch import nn

from vertebra.data.pixels import available_cores
from vertebra.training.launching import available
from vertebra.training.rundir import LIBRARIES
from vertebra.training.speed import bf16_gain, cpu_has_bf16, resolve

EXTRAS = {
    "pandas": "tables as data frames: results.to_pandas(), `pip install vertebra[pandas]`",
    "pyarrow": "data in Parquet, Hugging Face folders: `pip install vertebra[tables]`",
    "ray": "battles on many machines: `pip install vertebra[ray]`",
}
"""Optional package -> what it would give."""

NETWORK = (
    "VERTEBRA_OFFLINE",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "TORCH_HOME",
    "VERTEBRA_HOME",
    "VERTEBRA_CACHE",
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")
LITTLE_MEMORY, LITTLE_DISK = 4.0, 5.0  # GB
TOLERANCE = 1e-3


def examine(folder: Path) -> dict[str, Any]:
    """Look at the machine; takes a few seconds.

    Args:
        folder: where runs would be written.

    Returns:
        JSON-ready facts by topic; `advice` lists what is worth changing.
    """
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "system": {"name": platform.platform(), "processor": _processor(), "cores": available_cores()},
        "memory_gb": memory_gb(),
        "disk_free_gb": round(shutil.disk_usage(folder).free / 1e9, 1),
        "devices": {device: self_test(torch.device(device)) for device in available()},
        "bf16": bf16(),
        "threads": {"torch": torch.get_num_threads()} | {name: os.environ.get(name) for name in THREADS},
        "network": {name: os.environ.get(name) for name in NETWORK},
        "extras": {name: {"version": _installed(name), "gives": gives} for name, gives in EXTRAS.items()},
        "jpeg": {"turbo": features.check_feature("libjpeg_turbo")},
    }
    return facts | {"advice": advice(facts)}


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def memory_gb() -> dict[str, float | None]:
    """Memory of the machine and what is free of it, in GB; None where the system does not tell."""
    sizes = {line.partition(":")[0]: int(line.split()[1]) / 1e6 for line in _lines("/proc/meminfo")}
    return {"total": _rounded(sizes.get("MemTotal")), "available": _rounded(sizes.get("MemAvailable"))}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def self_test(device: torch.device) -> dict[str, Any]:
    """Does a device compute what NumPy does? A convolution as a matrix product, forward and backward, and its speed."""
    generator = torch.Generator().manual_seed(0)
    images, kernel = torch.randn(4, 8, 16, 16, generator=generator), torch.randn(16, 8, 3, 3, generator=generator)
    try:
        weight = kernel.to(device).clone().requires_grad_()
        out = torch.nn.functional.conv2d(images.to(device), weight)
        out.square().sum().backward()
        assert weight.grad is not None
        wrong = _worst(out, _convolved(images, kernel)), _worst(weight.grad, _kernel_gradient(images, kernel))
        ok = max(wrong) < TOLERANCE
    except RuntimeError as error:
        return {"ok": False, "error": str(error).partition("\n")[0]}
    return {
        "ok": ok,
        "error": "" if ok else f"results are off by {max(wrong):.2g}",
        "gflops": round(_gflops(device), 1),
    }


def _convolved(images: torch.Tensor, kernel: torch.Tensor) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, kernel.double().numpy())


def _kernel_gradient(images: torch.Tensor, kernel: torch.Tensor) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (3, 3), axis=(2, 3))
    return np.einsum("bohw,bchwij->ocij", 2 * _convolved(images, kernel), windows)


def _worst(found: torch.Tensor, right: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found.detach().cpu().double().numpy() - right).max() / np.abs(right).max())


def _gflops(device: torch.device, side: int = 512, repeats: int = 10) -> float:
    matrix = torch.randn(side, side, device=device)
    seconds = _seconds(lambda: float((matrix @ matrix)[0, 0]), repeats)  # float waits for the device
    return 2 * side**3 / seconds / 1e9


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    """Least time of one of `repeats` calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bf16() -> dict[str, Any]:
    """Whether training in bf16 pays on the device that "auto" means, and how much on the processor."""
    device = torch.device(available()[0])
    plain, depthwise = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, groups=2)
    return {
        "device": device.type,
        "cpu_instructions": cpu_has_bf16(),
        "cpu_gain": round(bf16_gain(), 2),
        "auto": resolve("auto", device, plain),
        "auto_depthwise": resolve("auto", device, depthwise),
    }


def advice(facts: dict[str, Any]) -> list[str]:
    """What is worth changing, a sentence each."""
    memory, threads = facts["memory_gb"]["available"], facts["threads"]["torch"]
    broken = [name for name, found in facts["devices"].items() if not found["ok"]]
    found = {
        f"{', '.join(broken)} computes wrong results or fails; train with --device cpu": broken,
        f"{memory} GB of memory are free; use a small --batch-size": memory is not None and memory < LITTLE_MEMORY,
        f"{facts['disk_free_gb']} GB of disk are free here; checkpoints need room": facts["disk_free_gb"] < LITTLE_DISK,
        f"torch uses {threads} of {facts['system']['cores']} cores; unset OMP_NUM_THREADS to use all": threads
        < facts["system"]["cores"],
        "no accelerator: choose small backbones and images, or few epochs": list(facts["devices"]) == ["cpu"],
        "Pillow has no libjpeg-turbo: JPEGs decode slowly": not facts["jpeg"]["turbo"],
    }
    return [sentence for sentence, applies in found.items() if applies]
