"""Out of memory: how to know it, and the parts in which a batch still fits."""

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.contracts import Batch

SAYINGS = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on an accelerator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS)


def release() -> None:
    """Give back what the failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parts(batch: Batch, size: int | None) -> Iterator[Batch]:
    """A batch in parts of `size` images, the last one smaller; None leaves it whole."""
    count = len(batch.images)
    if size is None or size >= count:
        yield batch
        return
    for start in range(0, count, size):
        yield _part(batch, slice(start, start + size))


def in_parts(work: Callable[[Batch], Any], batch: Batch, size: int | None, device: torch.device) -> int:
    """Do `work` on all of a batch, in halves of halves where memory runs out.

    Args:
        work: is done once an image; what fails for want of memory must have left nothing behind.
        batch: on any device.
        size: images at once to begin with; None tries the whole batch.
        device: where the parts are worked on.

    Returns:
        The size that was enough, for the next batch.
    """
    size, start = size or len(batch.images), 0
    while start < len(batch.images):
        part = _part(batch, slice(start, start + size))
        try:
            work(Batch(part.images.to(device), _on(part.targets, device), part.ids))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not exhausted(error):
                raise
        else:
            start += size
            continue
        size //= 2
        release()
    return size


def _part(batch: Batch, rows: slice) -> Batch:
    views = tuple(view[rows] for view in batch.views)
    return Batch(batch.images[rows], _rows(batch.targets, rows), batch.ids[rows], views)


def _on(targets: Any, device: torch.device) -> Any:
    if isinstance(targets, Mapping):
        return {name: _on(value, device) for name, value in targets.items()}
    if isinstance(targets, list | tuple):
        return [_on(value, device) for value in targets]
    return targets.to(device) if isinstance(targets, Tensor) else targets


def _rows(targets: Any, rows: slice) -> Any:
    if isinstance(targets, Mapping):
        return {name: _rows(value, rows) for name, value in targets.items()}
    return targets[rows] if isinstance(targets, Tensor | list | tuple) else targets
