"""Where a training runs: the device, the precision, and the ranks that torchrun started."""

import logging
import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment  # pyright: ignore
from torch import nn

from vertebra.errors import UsageError
from vertebra.training.speed import Precision, resolve


def available() -> tuple[str, ...]:
    """Devices that this machine has, the fastest first."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return (*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu")


def device_of(text: str) -> torch.device:
    """The device that a user means by "auto", "cpu", "cuda", "cuda:1", "1" or "mps".

    Raises:
        UsageError: this machine has no such device; the message lists those it has.
    """
    here = available()
    if text == "auto":
        return torch.device(here[0])
    name = f"cuda:{text}" if text.isdigit() else "cuda:0" if text == "cuda" else text
    if name not in here:
        many = "; several GPUs: torchrun --nproc-per-node N $(which vertebra) train ..." if "," in text else ""
        raise UsageError(f"device {text!r} is not on this machine, which has {', '.join(here)}{many}")
    return torch.device(name)


def launch(device: str, precision: Precision, network: nn.Module) -> Fabric:
    """Fabric for one device, or for this rank of those that torchrun started (gloo on the CPU, nccl on GPUs).

    Raises:
        UsageError: an unknown device.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else it announces the precision at each fit
    chosen, world = device_of(device), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        where = {"devices": local, "num_nodes": world // local, "strategy": "ddp", "plugins": TorchElasticEnvironment()}
    else:
        # named, so that SLURM's or MPI's variables in the environment do not turn one process into a rank
        where = {"devices": [chosen.index] if chosen.index is not None else 1, "plugins": LightningEnvironment()}
    fabric = Fabric(accelerator=chosen.type, precision=resolve(precision, chosen, network), **where)  # type: ignore[arg-type]
    fabric.launch()
    return fabric
