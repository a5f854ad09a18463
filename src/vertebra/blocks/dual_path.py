"""Dual path unit: what is put out is added to one path and appended to the other.

Shapes: a pair of maps (B, R, H, W) and (B, D, H, W) in, a pair (B, R, h, w) and (B, D + growth, h, w) out; a first unit
of a stage takes one map and makes the pair. Both paths together are normed, activated and convolved (1 x 1, grouped
3 x 3, 1 x 1); the first channels of the result are added to the residual path, the others appended to the dense one
(arXiv 1707.01629, equations 6 to 10). With no growth it is a pre-activation residual unit, with no residual path a
dense layer. No page: a tool of `vertebra.backbones.dpn`.
"""

from typing import TypeAlias

import torch
from torch import Tensor, nn

EPS = 1e-3
"""Of all norms, as the authors' MXNet has it."""

Paths: TypeAlias = tuple[Tensor, Tensor]


class DualPath(nn.Module):
    """One unit.

    Attributes:
        project: of a first unit, one map to both paths: residual channels, then twice the growth.
        reduce: norm, activation, 1 x 1 convolution.
        middle: norm, activation, grouped 3 x 3 convolution.
        expand: norm, activation, 1 x 1 convolution to both paths.
    """

    def __init__(
        self, inputs: int, inner: int, residual: int, growth: int, *, groups: int, stride: int = 1, first: bool = False
    ) -> None:
        super().__init__()
        self.residual = residual
        self.project = norm_conv(inputs, residual + 2 * growth, 1, stride) if first else None
        self.reduce = norm_conv(inputs, inner, 1)
        self.middle = norm_conv(inner, inner, 3, stride, groups)
        self.expand = norm_conv(inner, residual + growth, 1)

    def forward(self, paths: Paths | Tensor) -> Paths:
        """Both paths, or the one map before the first unit of a stage, to both paths."""
        x = paths if isinstance(paths, Tensor) else torch.cat(paths, 1)
        old = x if self.project is None else self.project(x)
        new = self.expand(self.middle(self.reduce(x)))
        added = old[:, : self.residual] + new[:, : self.residual]
        return added, torch.cat((old[:, self.residual :], new[:, self.residual :]), 1)


def norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Norm, activation, convolution."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(nn.BatchNorm2d(inputs, eps=EPS), nn.ReLU(inplace=True), conv)
