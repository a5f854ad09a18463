"""Recursion: a layer applied several times in a row with the same weights, and a small projection after each time.

    recursive(block, 192, loops=2)                           a layer that keeps the shape of tokens (B, N, 192)
    swap(backbone, "Block", "recursive")                     every block of a vision transformer twice

Shapes: what the layer keeps, channels last: (B, N, C) or (B, H, W, C). Depth grows by `loops`, parameters by the
projections alone. A projection is x <- c x + d MLP(LN x) with scalars c and d that are learnt and start at 1, and
belongs to one application: it keeps the applications from repeating themselves (arXiv 2111.05297, section 3.2). A layer
whose `forward` has a parameter `loop` is told the number of the application, from 0.

Departs from the reference, which marks applications by a count that is right for two loops alone.
"""

import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Kind = Literal["mlp", "none"]
Scalars = Literal["learned", "none"]


def recursive(
    layer: nn.Module,
    dim: int,
    *,
    loops: int = 2,
    projection: Kind = "mlp",
    ratio: float = 1.0,
    scalars: Scalars = "learned",
) -> "Recursive":
    """A layer applied `loops` times.

    Args:
        layer: keeps the shape of what it is given.
        dim: channels there, the last dimension.
        loops: applications.
        projection: what follows each application, with weights of its own; "none" repeats the layer and no more.
        ratio: hidden channels of a projection, as a multiple of dim.
        scalars: of the projections.

    Raises:
        UsageError: a number out of range, or an unknown word.
    """
    for name, value, known in (("projection", projection, Kind), ("scalars", scalars, Scalars)):
        if value not in get_args(known):
            raise UsageError(f"recursive: {name} is {value!r}; it can be {' or '.join(get_args(known))}")
    if min(dim, loops) < 1 or int(dim * ratio) < 1:
        raise UsageError(
            f"recursive: dim {dim}, loops {loops}, ratio {ratio}; dim, loops and dim * ratio are at least 1"
        )
    hidden = int(dim * ratio) if projection == "mlp" else 0
    return Recursive(layer, dim, loops=loops, hidden=hidden, scalars=scalars)


class Recursive(nn.Module):
    """A layer and what follows each of its applications; build it with `recursive`.

    Attributes:
        layer: the weights that all applications share.
        projections: one an application; identities where there are none.
    """

    def __init__(self, layer: nn.Module, dim: int, *, loops: int, hidden: int, scalars: Scalars) -> None:
        super().__init__()
        self.layer = layer
        self.projections = nn.ModuleList(
            Projection(dim, hidden, scalars=scalars) if hidden else nn.Identity() for _ in range(loops)
        )
        self.told = "loop" in inspect.signature(layer.forward).parameters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer takes, and gives; further arguments go to the layer each time."""
        for loop, projection in enumerate(self.projections):
            known = {**kwargs, "loop": loop} if self.told else kwargs
            x = projection(self.layer(x, *args, **known))
        return x


class Projection(nn.Module):
    """c x + d MLP(LN x): a non-linear projection of each token by itself.

    Attributes:
        norm: of what the MLP is given.
        mlp: two linear layers with GELU between them.
        sum: of both, with the scalars.
    """

    def __init__(self, dim: int, hidden: int, *, scalars: Scalars = "learned") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(Dense(dim, hidden), nn.GELU(), Dense(hidden, dim))
        self.sum = Sum(scalars)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same."""
        return self.sum(x, self.mlp(self.norm(x)))


class Sum(nn.Module):
    """shortcut * x + branch * y with two learned scalars, or the plain sum.

    Attributes:
        shortcut: (1,), 1 at the start; None in a plain sum.
        branch: likewise.
    """

    def __init__(self, scalars: Scalars = "learned") -> None:
        super().__init__()
        learned = scalars == "learned"
        self.shortcut = nn.Parameter(torch.ones(1)) if learned else None
        self.branch = nn.Parameter(torch.ones(1)) if learned else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors of one shape to their sum."""
        if self.shortcut is None or self.branch is None:
            return x + y
        return torch.addcmul(y * self.branch, x, self.shortcut)
