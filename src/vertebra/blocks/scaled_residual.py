"""Scaled residual: what a layer computes is multiplied by a small constant before it is added to its input.

activation(x + scale * layer(x)), with a scale of 0.1 to 0.3. Residual Inception networks of more than 1000 filters
"die" early in training (their last layer gives only zeros) without it, and neither lower rates nor more norms
help (arXiv 1602.07261, section 3.3). The constant is not learned; `vertebra.blocks.rezero` is the learned one.

Shapes: what the layer keeps. `swap(network, "InceptionA", "scaled_residual")` puts it around layers of any network.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Activation = Literal["relu", "none"]


def scaled_residual(layer: nn.Module, *, scale: float = 0.1, activation: Activation = "relu") -> "ScaledResidual":
    """A scaled residual around a layer.

    Args:
        layer: keeps the shape of what it is given; in the paper it ends in a linear 1 x 1 convolution.
        scale: what its output is multiplied by, above 0.
        activation: after the addition; "none" where another one follows.

    Raises:
        UsageError: a scale that is not above 0, or an unknown activation.
    """
    return ScaledResidual(layer, scale=scale, activation=activation)


class ScaledResidual(nn.Module):
    """activation(x + scale * layer(x)); build it with `scaled_residual`.

    Attributes:
        layer: the branch.
        scale: the constant.
        activation: a ReLU, or None.
    """

    def __init__(self, layer: nn.Module, *, scale: float = 0.1, activation: Activation = "relu") -> None:
        super().__init__()
        if not scale > 0:
            raise UsageError(f"scaled_residual: scale is {scale}; it must be above 0, as 0.1")
        if activation not in ("relu", "none"):
            raise UsageError(f"scaled_residual: activation is {activation!r}; it can be relu or none")
        self.layer = layer
        self.scale = scale
        self.activation = nn.ReLU(inplace=True) if activation == "relu" else None

    def forward(self, x: Tensor) -> Tensor:
        """What the layer takes, and gives."""
        total = torch.add(x, self.layer(x), alpha=self.scale)
        return total if self.activation is None else self.activation(total)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale:g}"
