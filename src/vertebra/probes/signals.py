"""How the size of a signal changes from block to block: the plot that NF-ResNets were found with.

No page: a function for any backbone (arXiv 2101.08692, section 3).
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone
from vertebra.surgery.branches import branches


@dataclass(frozen=True)
class Signals:
    """A number a block, in the order of the signal.

    Attributes:
        squared_means: mean over the channels of the squared mean of a block's output.
        variances: mean over the channels of the variance of a block's output.
        branches: the same variance of what each residual branch adds.
    """

    squared_means: tuple[float, ...]
    variances: tuple[float, ...]
    branches: tuple[float, ...]


def signals(backbone: Backbone, images: Tensor) -> Signals:
    """Look at the maps between the parts of a backbone's trunk, in the mode that it is in.

    Args:
        backbone: any; a part whose output is no map or token sequence is left out.
        images: (B, channels, H, W); standard normal noise in the paper.
    """
    blocks: list[tuple[float, float]] = []
    added: list[float] = []

    def block(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 2:
            blocks.append(_moments(output))

    def branch(_: nn.Module, __: Any, output: Tensor) -> None:
        added.append(_moments(output)[1])

    ends = [found.end for found in branches(backbone, (images.shape[1], images.shape[2], images.shape[3]))]
    with ExitStack() as hooks, torch.no_grad():
        for part in backbone.trunk():
            hooks.callback(part.register_forward_hook(block).remove)
        for end in ends:
            hooks.callback(backbone.get_submodule(end).register_forward_hook(branch).remove)
        backbone(images)
    return Signals(tuple(mean for mean, _ in blocks), tuple(variance for _, variance in blocks), tuple(added))


def _moments(x: Tensor) -> tuple[float, float]:
    """Mean over the channels of squared mean and variance; channels are second in maps, last in tokens."""
    over = [d for d in range(x.ndim) if d != (1 if x.ndim == 4 else x.ndim - 1)]
    variance, mean = torch.var_mean(x.float(), over, correction=0)
    return float(mean.square().mean()), float(variance.mean())
