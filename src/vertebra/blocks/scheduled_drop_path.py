"""ScheduledDropPath: drop path whose probability rises linearly over training.

Shapes: any (B, ...) in, the same out. In training every image's whole input is dropped with probability
`progress * drop`, and what survives is divided by the probability to stay, so that its mean is kept; in evaluation the
block does nothing. Constant drop path, with which the paper could not train its cells well, is `progress` left at 1.

A training objective moves it: `set_progress(model, progress.fraction)` before each forward pass sets the attribute of
every such block of a network (NASNet, arXiv 1707.07012, section A.6). It is no part of the state dict, since each step
sets it anew.
"""

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def scheduled_drop_path(*, drop: float = 0.4, progress: float = 1.0) -> "ScheduledDropPath":
    """The block.

    Args:
        drop: probability at the end of training that the input of one image is dropped, in [0, 1).
        progress: share of training that is done, 0..1; the probability is its product with `drop`.

    Raises:
        UsageError: a number out of range.
    """
    return ScheduledDropPath(drop, progress)


def set_progress(model: nn.Module, progress: float) -> int:
    """Tell every block inside of a model how much of the training is done.

    Args:
        model: any network, with blocks of this page or without.
        progress: share of the training, such as `Progress.fraction`, 0..1.

    Returns:
        The number of blocks.

    Raises:
        UsageError: a share out of range.
    """
    _check_share(progress)
    blocks = [module for module in model.modules() if isinstance(module, ScheduledDropPath)]
    for block in blocks:
        block.progress = progress
    return len(blocks)


class ScheduledDropPath(nn.Module):
    """The block; build it with `scheduled_drop_path`.

    Attributes:
        drop: probability at the end of training.
        progress: share of training that is done, 0..1, to be set from outside.
    """

    def __init__(self, drop: float, progress: float = 1.0) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise UsageError(f"scheduled_drop_path: drop is {drop}; it must be in [0, 1), as 0.4")
        _check_share(progress)
        self.drop = drop
        self.progress = progress

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same."""
        drop = self.drop * self.progress
        if not self.training or not drop:
            return x
        stays = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= drop
        return x * (stays / (1 - drop)).to(x.dtype)

    def extra_repr(self) -> str:
        """The probabilities."""
        return f"drop={self.drop:g}, progress={self.progress:g}"


def _check_share(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise UsageError(f"scheduled_drop_path: progress is {progress}; it is a share of the training, from 0 to 1")
