"""Maps cut into groups of places that attend (or mix) among themselves, and put together again.

Shapes: maps (B, H, W, C) to groups (B, G, h * w, C) and back. No page: a tool of whatever works within windows.

A group has h x w places. With `interval` 1 they are neighbours (a window); with a larger one they lie that many places
apart (a dilated group, as CrossFormer's), and with H / h apart they spread over the whole map (a grid, as MaxViT's).
Maps that are no whole number of groups are padded at the bottom and on the right; `seen` keeps what was padded, and
what a shift brought in from the other side, out of an attention.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

Sides = tuple[int, int]


def padded(x: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, H, W, C) with zeros at the bottom and on the right, to multiples of `height` and `width` places."""
    more = -x.shape[1] % height, -x.shape[2] % width
    return pad(x, (0, 0, 0, more[1], 0, more[0])) if any(more) else x


def group(x: Tensor, sides: Sides, interval: Sides = (1, 1)) -> Tensor:
    """Maps (B, H, W, C) to groups (B, G, h * w, C), in the order of rows and, within a group, of its rows.

    Args:
        x: H and W are multiples of side times interval.
        sides: h and w of a group.
        interval: places from one member to the next, down and across.
    """
    (h, w), (down, across) = sides, interval
    x = x.unflatten(2, (-1, w, across)).unflatten(1, (-1, h, down))  # (B, R, h, down, S, w, across, C)
    return x.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(5, 6).flatten(1, 4)


def ungroup(x: Tensor, sides: Sides, interval: Sides, size: Sides) -> Tensor:
    """Groups (B, G, h * w, C) back to maps (B, H, W, C) of `size`; the inverse of `group`."""
    (h, w), (down, across) = sides, interval
    rows, columns = size[0] // (h * down), size[1] // (w * across)
    x = x.view(x.shape[0], rows, columns, down, across, h, w, x.shape[-1])
    return x.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(x.shape[0], *size, x.shape[-1])


def seen(
    real: Sides, size: Sides, sides: Sides, interval: Sides = (1, 1), shift: Sides = (0, 0), *, device: torch.device
) -> Tensor | None:
    """Which places of a group may attend to which: (G, n, n), True where they may; None where all may.

    Padded places are hidden from real ones. A map that was rolled by `shift` towards its start has the far side in its
    last groups: members of the two sides do not see each other.

    Args:
        real: height and width before the padding.
        size: after it.
        sides: h and w of a group.
        interval: as for `group`.
        shift: places that the map was rolled up and to the left.
        device: of the result.
    """
    if real == size and shift == (0, 0):
        return None
    inside, parts = [], []
    for length, whole, side, rolled in zip(real, size, sides, shift, strict=True):
        places = torch.arange(whole, device=device).roll(-rolled)
        inside.append(places < length)
        wrapped = torch.arange(whole, device=device) >= whole - rolled
        parts.append(wrapped if 0 < rolled < side else torch.zeros_like(wrapped))
    labels = 2 * parts[0].long()[:, None] + parts[1].long()  # (H, W), which side of the seam
    real_places = inside[0][:, None] & inside[1]
    known = group(torch.stack([labels, real_places.long()], -1)[None], sides, interval)[0]  # (G, n, 2)
    side_of, is_real = known[..., 0], known[..., 1].bool()
    allowed = (side_of[:, :, None] == side_of[:, None, :]) & is_real[:, None, :]
    return allowed | ~is_real[:, :, None]  # what is padded sees anything: a row of nothing has no softmax
