"""Window MLP: a matrix for each head mixes the places of a window, in place of Swin's attention.

Shapes: maps (B, C, H, W) in, the same out, of any size. As a layer of a transformer, `WindowMLP` takes rows
(B, H, W, C). Heads are contiguous channels, and what a place gives to another one depends on where the two are in
their window, not on the image:

    y[q, head] = sum over p of weight[head, q, p] x[p, head] + bias[head, q],   p, q in 0..side^2 - 1

Windows that are "shifted" start `side - shift` places before the map, by zeros: nothing is rolled, so that no window
has both sides of a map and none needs a mask. A map that is no whole number of windows gets zeros at its end too, and
all of that is cropped again. Windows are shifted only where both sides of a map are longer than theirs.

Introduced as Swin-MLP by the authors of Swin (arXiv 2103.14030) with their code. Departs from it where a map is
smaller than a window: theirs shrinks the window, and with it the weights, to the map. Used alone, through
`vertebra.surgery.swap`, and in `vertebra.backbones.swin_mlp`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from vertebra.blocks.window_attention import OfMaps
from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, object]] = {"window": {}, "shifted": {"shifted": True}}


def window_mlp(
    channels: int, variant: str = "window", *, heads: int | None = None, side: int = 7, shift: int | None = None
) -> OfMaps:
    """The layer for maps (B, channels, H, W).

    Args:
        channels: of the map.
        variant: one of `VARIANTS`.
        heads: matrices, which divide the channels among themselves; by default one for each 32 channels.
        side: of a window in places.
        shift: places that windows are moved by, 0..side - 1; half a window, rounded down, in "shifted", else none.

    Raises:
        UsageError: an unknown variant, a number out of range, or heads that do not divide the channels.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"window_mlp has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    if shift is None:
        shift = side // 2 if "shifted" in VARIANTS[variant] else 0
    return OfMaps(WindowMLP(channels, max(1, channels // 32) if heads is None else heads, side=side, shift=shift))


class WindowMLP(nn.Module):
    """The layer over rows (B, H, W, dim); build it for maps with `window_mlp`.

    Attributes:
        weight: (heads * side^2, side^2), head by head, to from; places in the order of rows.
        bias: (heads * side^2,).
    """

    def __init__(self, dim: int, heads: int, *, side: int, shift: int = 0) -> None:
        if min(dim, heads, side) < 1 or not 0 <= shift < side:
            raise UsageError(
                f"window_mlp: channels {dim}, heads {heads}, side {side}, shift {shift}; the first three are at least 1"
                " and shift is in 0..side - 1"
            )
        if dim % heads:
            raise UsageError(f"window_mlp: {heads} heads do not divide {dim} channels; take a divisor")
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads * side**2, side**2), std=0.02))
        self.bias = nn.Parameter(torch.zeros(heads * side**2))

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        height, width = x.shape[1:3]
        before = self.side - self.shift if self.shift and min(height, width) > self.side else 0
        below, right = -(before + height) % self.side, -(before + width) % self.side
        if before or below or right:
            x = pad(x, (0, 0, before, right, before, below))
        x = self.mixed(x)
        if before or below or right:
            x = x[:, before : before + height, before : before + width]
        return x

    def mixed(self, x: Tensor) -> Tensor:
        """Rows of whole windows, (B, R * side, S * side, dim), to the same: each window's places are mixed."""
        side, heads = self.side, self.heads
        # one copy each way, where `group` and the heads behind it would be two
        x = x.unflatten(3, (heads, -1)).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, R, h, S, w, heads, c)
        windows = x.permute(0, 1, 3, 5, 2, 4, 6)
        y = conv1d(windows.flatten(3, 5).flatten(0, 2), self.weight[..., None], self.bias, groups=heads)
        return y.reshape(windows.shape).permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
