"""Peak memory of inference on one image and of a training step on a few.

On a CPU: bytes of the tensors that are alive at once, weights included, counted operator by operator; exact, the same
on every run, blind to the buffers that a kernel takes for itself. On a GPU: what torch's allocator reports, without
what was allocated before. A training step has the gradients and AdamW's two moments.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vertebra.contracts import Backbone, Probe, Report, Score, Work
from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence

VARIANTS: dict[str, dict[str, object]] = {}


def memory(*, batch: int = 1, train_batch: int = 8) -> "Memory":
    """The probe.

    Args:
        batch: images of the inference.
        train_batch: images of the training step.

    Raises:
        UsageError: a value below 1.
    """
    return Memory(batch=batch, train_batch=train_batch)


class Memory(Probe):
    """Peak megabytes (10^6 bytes); counted rather than timed, so that it need not run alone."""

    weightless = True

    def __init__(self, *, batch: int, train_batch: int) -> None:
        if min(batch, train_batch) < 1:
            raise UsageError(f"memory: batch is {batch} and train_batch {train_batch}; both must be at least 1")
        self.batch, self.train_batch = batch, train_batch

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        return Work(forward=self.batch, trained=self.train_batch, seconds=2.0)

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        scores = {
            "peak_mem_mb": _score(inference_bytes(model, self.batch)),
            "train_peak_mem_mb": _score(training_bytes(model, self.train_batch)),
        }
        details = {"batch": self.batch, "train_batch": self.train_batch, "device": _device(model).type}
        return Report(scores, details)


def inference_bytes(model: Backbone, batch: int) -> int:
    """Peak bytes of a forward pass in evaluation mode."""

    def run() -> None:
        with torch.no_grad():
            model(_images(model, batch))

    return peak(run, model)


def training_bytes(model: Backbone, batch: int) -> int:
    """Peak bytes of a training step: forward, backward, and the moments that AdamW keeps.

    It runs on a copy: neither gradients nor running statistics reach `model`.
    """
    twin = copy.deepcopy(model).train().requires_grad_(True)

    def run() -> None:
        twin(_images(twin, batch)).pooled.square().mean().backward()

    return peak(run, twin) + 2 * _bytes(twin.parameters())


def peak(run: Callable[[], None], model: Backbone) -> int:
    """Most bytes alive at once while `run` uses `model`, whose weights count."""
    own = _bytes((*model.parameters(), *model.buffers()))
    device = _device(model)
    if device.type == "cuda":
        gc.collect()  # what is freed meanwhile would be taken off
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before + own
    with Alive((*model.parameters(), *model.buffers())) as alive:
        run()
    return own + alive.most


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, until nobody holds them.

    Args:
        known: tensors that are not counted.

    Attributes:
        most: the most bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._now = 0
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        weakref.finalize(storage, self._gone, storage.nbytes())
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)

    def _gone(self, size: int) -> None:
        self._now -= size


def _images(model: Backbone, batch: int) -> Tensor:
    return torch.zeros(batch, model.preprocess.channels, *model.preprocess.size, device=_device(model))


def _device(model: Backbone) -> torch.device:
    return next(model.parameters()).device


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _score(count: int) -> Score:
    return Score(count / 1e6, 1, "lower", "MB")
