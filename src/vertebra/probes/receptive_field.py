"""The effective receptive field: which pixels a centre cell of the last map listens to, and how far out they lie.

`contributions` is the measurement, `share_radius` its summary, and the probe reports both of the test images, as the
paper of RepLKNet does (arXiv 2203.06717, appendix; Luo et al., arXiv 1701.04128, for the idea). Field 50 is the side of
the centred square that holds half of what the pixels contribute, in percent of the image side: large where a network
looks at whole shapes, a few pixels where it looks at texture.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vertebra.contracts import Backbone, Probe, Report, Work
from vertebra.data.pixels import normalised
from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence
from vertebra.probes.metrics import resampled

VARIANTS: dict[str, dict[str, object]] = {}
SHARES = (0.5, 0.2, 0.3, 0.99)
"""Of the paper's table; the first one ranks."""
BATCH = 16
"""Images that are backpropagated at once."""


def receptive_field(*, images: int = 50, level: int = -1) -> "ReceptiveField":
    """The probe.

    Args:
        images: test images at most, evenly spaced in the split; the paper takes 50.
        level: the map of the pyramid whose centre is looked from.

    Raises:
        UsageError: fewer than one image.
    """
    return ReceptiveField(images=images, level=level)


class ReceptiveField(Probe):
    """Sides of the centred squares that hold 50, 20, 30 and 99 % of the contributions, in percent of the image side."""

    def __init__(self, *, images: int, level: int) -> None:
        if images < 1:
            raise UsageError(f"receptive_field: images is {images}; it must be at least 1")
        self.images, self.level = images, level

    def work(self, images: Mapping[str, int], classes: int) -> Work:
        return Work(forward=3 * min(self.images, images["test"]))  # backwards takes two

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        pixels = data.images("test")
        rows = np.linspace(0, len(pixels) - 1, min(self.images, len(pixels))).round().astype(int)
        images = normalised(pixels[rows], model.preprocess).to(data.device)
        held = torch.cat([_rings(each) for each in _each(model, images, self.level)]).cpu()  # (n, rings)
        side = max(images.shape[2:])

        def field(counts: Tensor, share: float) -> Tensor:
            return 100 * _side(counts @ held, share, side)

        scores = {
            f"field_{100 * share:.0f}": resampled(lambda counts, share=share: field(counts, share), len(held))
            for share in SHARES
        }
        return Report(scores, {"images": len(held), "level": self.level, "pixels": side, "within": _curve(held, side)})


def contributions(backbone: Backbone, images: Tensor, *, level: int = -1) -> Tensor:
    """What each input pixel contributes to the centre cell of a map: the effective receptive field as a picture.

    The centre cell (H_i // 2, W_i // 2) of `pyramid[level]`, summed over the channels of that map, is differentiated
    with respect to the images. The result is the absolute value of that gradient, summed over the image's channels and
    averaged over the images: mean over b of sum over c of |d sum_k M[b, k, centre] / d images[b, c, y, x]|. Many images
    are needed, 50 or more: rectifiers switch much of a network off for any one of them.

    RepLKNet's paper (arXiv 2203.06717) measures the same with the positive part of the gradient in place of its
    absolute value, of images of 1024 pixels, and shows log10(1 + it); take the logarithm for a picture, not for shares.

    Args:
        backbone: in evaluation mode, since a batch norm in training mixes images; its weights and their gradients stay.
        images: (B, channels, H, W), as `backbone.preprocess` says.
        level: index of the map, from the fine ones; -1 is the last.

    Returns:
        (H, W) float64 on the images' device, at least 0; 0 everywhere where the cell depends on no pixel.

    Raises:
        UsageError: no images, a backbone in training mode, or no such level.
    """
    total = sum(each.sum(0) for each in _each(backbone, images, level))
    assert isinstance(total, Tensor)
    return total / len(images)


def share_radius(contributions: Tensor, share: float) -> float:
    """Side of the smallest centred square that holds a share of the total, as a fraction of the image side.

    Squares have sides of 1, 3, 5 ... pixels around the pixel (H // 2, W // 2), cut off at the border, so that the field
    of a convolution of size k has the side k / H. The paper tabulates areas: about the square of this.

    Args:
        contributions: (H, W), at least 0.
        share: in (0, 1].

    Returns:
        In (0, 1], of the longer side; 0 where the total is 0, since then nothing is held.

    Raises:
        UsageError: a share out of range, or contributions of another shape, negative or not finite.
    """
    if contributions.ndim != 2:
        raise UsageError(f"share_radius takes contributions (H, W) and got {tuple(contributions.shape)}")
    if not 0 < share <= 1:
        raise UsageError(f"share_radius: share is {share}; it must be in (0, 1], as 0.5")
    if not bool(contributions.isfinite().all()) or bool((contributions < 0).any()):
        raise UsageError("share_radius: contributions must be finite and at least 0")
    return _side(_rings(contributions[None].double()), share, max(contributions.shape)).item()


def _each(backbone: Backbone, images: Tensor, level: int) -> Iterator[Tensor]:
    """Absolute gradients (b, H, W) float64 of a few images at a time."""
    if backbone.training:
        raise UsageError("receptive_field: the backbone is in training mode, which mixes images; call eval() first")
    if len(images) < 1:
        raise UsageError("receptive_field: there are no images; give at least one, better 50")
    if not -len(backbone.levels) <= level < len(backbone.levels):
        raise UsageError(f"receptive_field: level is {level}; the pyramid has {len(backbone.levels)} maps")
    for few in images.split(BATCH):
        with torch.inference_mode(False), torch.enable_grad():
            given = few.detach().clone().requires_grad_()
            cells = backbone(given).pyramid[level]
            centre = cells[:, :, cells.shape[2] // 2, cells.shape[3] // 2].sum()
            # what a network multiplies by zero or never reads has no gradient rather than a zero
            found: Any = torch.autograd.grad(centre, given, materialize_grads=True)
        yield found[0].double().abs().sum(1)


def _rings(contributions: Tensor) -> Tensor:
    """Sums (n, rings) of contributions (n, H, W) at each distance from the centre, 0 first, counted as a king moves."""
    rows, columns = (torch.arange(size, device=contributions.device) for size in contributions.shape[1:])
    far = torch.maximum((rows - len(rows) // 2).abs()[:, None], (columns - len(columns) // 2).abs())
    out = contributions.new_zeros(len(contributions), int(far.max()) + 1)
    return out.index_add_(1, far.flatten(), contributions.flatten(1))


def _side(rings: Tensor, share: float, pixels: int) -> Tensor:
    """Fraction (n,) of a side of so many pixels that the square takes which holds a share of each row of rings."""
    held = rings.cumsum(1)
    wanted = share * (1 - 1e-12) * held[:, -1:]  # rounding of the sum must not ask for one ring more
    side = 2 * (held < wanted).sum(1) + 1
    return torch.where(held[:, -1] > 0, (side / pixels).clamp(max=1), 0.0).double()


def _curve(rings: Tensor, pixels: int) -> dict[str, list[float]]:
    """Share of the contributions in percent within squares of rising side, in percent of the image side."""
    held = rings.sum(0).cumsum(0)
    sides = [min(100.0, 100 * (2 * ring + 1) / pixels) for ring in range(len(held))]
    share = 100 * held / held[-1] if held[-1] > 0 else held
    return {"side": [round(value, 2) for value in sides], "share": [round(value, 2) for value in share.tolist()]}
