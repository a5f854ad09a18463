"""Averaged weights: an exponential moving average of everything floating that a method holds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """A moving average of a module's parameters and buffers (batch-norm statistics too).

    The decay rises as (1 + t) / (10 + t) to its full value, so that short runs are not held back by their
    first weights; integers (counters) are copied.

    Attributes:
        tensors: the averages by name, as in the module's `state_dict`.
        updates: steps averaged so far.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self._pairs = self._paired(module)

    def _paired(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Averages and their sources where they float, and pairs of the rest."""
        sources = module.state_dict()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        others = [(self.tensors[n], sources[n]) for n in self.tensors if n not in set(floats)]
        return [self.tensors[n] for n in floats], [sources[n] for n in floats], others

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the module as it stands."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, sources, others = self._pairs
        torch._foreach_lerp_(averages, sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, source in others:
            average.copy_(source)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue an average that was saved."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        self.updates = updates

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The module holds the averages within this block and its own weights after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the module's own weights."""
        averages, sources, others = self._pairs
        for average, source in [*zip(averages, sources, strict=True), *others]:
            kept = source.clone()
            source.copy_(average)
            average.copy_(kept)
