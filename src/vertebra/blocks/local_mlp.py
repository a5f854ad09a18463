"""Local MLP: two linear layers of each cell, and between them a depthwise convolution beside its shortcut.

    before    narrow(gelu(u + conv(u))), u = widen(x)       SMT (arXiv 2307.08579)
    after     narrow(u + conv(u)), u = gelu(widen(x))       RMT (arXiv 2309.11523)

Shapes: maps (B, C, H, W) in, the same out, of any size. As a layer of a transformer, `LocalMLP` takes rows
(B, H, W, C). A cell's hidden channels hear those of its eight neighbours, which tells a transformer where cells are.
Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.smt` and `rmt`.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from vertebra.blocks.rows import Dense, Local, activated
from vertebra.blocks.window_attention import OfMaps
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, object]] = {"before": {}, "after": {}}

Place = Literal["before", "after"]
"""Where the convolution is, beside the activation."""


def local_mlp(channels: int, variant: Place = "before", *, ratio: float = 4.0, hidden: int | None = None) -> OfMaps:
    """The block for maps (B, channels, H, W).

    Args:
        channels: of the map.
        variant: one of `VARIANTS`.
        ratio: hidden channels for each of the map's.
        hidden: hidden channels, in place of `ratio`.

    Raises:
        UsageError: an unknown variant, or a number out of range.
    """
    if variant not in get_args(Place):
        raise UsageError(f"local_mlp has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    width = int(channels * ratio) if hidden is None else hidden
    if min(channels, width) < 1:
        raise UsageError(f"local_mlp: channels is {channels} and hidden {width}; both must be at least 1")
    return OfMaps(LocalMLP(channels, width, variant))


class LocalMLP(nn.Module):
    """The block over rows (B, H, W, dim); build it for maps with `local_mlp`.

    Attributes:
        widen: dim to hidden.
        local: the convolution with its shortcut.
        narrow: hidden to dim.
        place: of the convolution, beside the activation.
    """

    def __init__(self, dim: int, hidden: int, place: Place) -> None:
        super().__init__()
        self.widen, self.local, self.narrow = Dense(dim, hidden), Local(hidden), Dense(hidden, dim)
        self.place: Place = place

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        x = self.widen(x)
        return self.narrow(activated(self.local(x)) if self.place == "before" else self.local(activated(x)))
