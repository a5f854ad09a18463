"""Dynamic spectrum mixer: a filter over the cosine frequencies of a map, weighted band by band as the map itself asks.

Shapes: (B, C, H, W) in, the same out, any size, in channels-last memory. A linear layer, an orthonormal DCT-II over the
map (`vertebra.blocks.dct`), a learnt filter, weights from the coefficients, the inverse transform, a linear layer.
With the filter and the weights at 1, where both start, what is left is the two linear layers. The paper (arXiv
2309.06721) has no public code: the idea is its abstract's, all else here is a design of ours.

Frequencies are those of the map, not of an index: u of H stands for u / H, so that bands mean the same on any grid.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vertebra.blocks.dct import constant, dct2
from vertebra.blocks.depthwise import depthwise
from vertebra.blocks.rows import Dense
from vertebra.errors import UsageError, near

Weighting: TypeAlias = Literal["bands", "filters", "static"]

VARIANTS: dict[str, dict[str, Any]] = {
    "bands": {"weighting": "bands"},
    "filters": {"weighting": "filters"},
    "static": {"weighting": "static"},
}


def spectrum_mixer(
    channels: int,
    variant: str = "bands",
    *,
    grid: int | Sequence[int] = 14,
    bands: int = 8,
    groups: int = 8,
    filters: int = 4,
    local: bool = False,
) -> "DSMixer":
    """The block for maps of `channels`.

    Args:
        channels: of the maps; a multiple of `groups`.
        variant: "bands" weights the bands of frequencies by 0..2, "filters" mixes several filters by shares that sum
            to 1, "static" has one filter for every map.
        grid: (height, width), or both in one, of the maps that filters are held for; others get them interpolated.
        bands: of frequencies, at least 1: rings of equal width.
        groups: of channels; a group has weights of its own, and the filter is the same for all.
        filters: how many "filters" mixes, at least 2.
        local: whether a 3 x 3 depthwise convolution of the map is added before the last linear layer.

    Raises:
        UsageError: an unknown variant, channels that the groups do not divide, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"spectrum_mixer has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}"
        )
    for name, value, least in (("bands", bands, 1), ("groups", groups, 1), ("filters", filters, 2)):
        if value < least:
            raise UsageError(f"spectrum_mixer: {name} is {value}; it must be at least {least}")
    if channels < 1 or channels % groups:
        raise UsageError(f"spectrum_mixer: channels is {channels}; it needs a multiple of groups={groups}")
    sides = (grid, grid) if isinstance(grid, int) else tuple(grid)
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"spectrum_mixer: grid is {grid!r}; write a side or (height, width), as 14 or (14, 14)")
    chosen: Weighting = VARIANTS[variant]["weighting"]
    return DSMixer(channels, weighting=chosen, grid=sides, bands=bands, groups=groups, filters=filters, local=local)


class DSMixer(nn.Module):
    """Dynamic spectrum mixer; build it with `spectrum_mixer`.

    Attributes:
        proj_in: before the transform.
        filter: (filters, H, W, C / groups), one filter unless the weights mix them; a channel takes the plane of its
            place in its group.
        select: from the bands' mean coefficients to weights; None for a static filter.
        local: the depthwise convolution, or None.
        proj_out: after the inverse transform.
    """

    def __init__(
        self,
        channels: int,
        *,
        weighting: Weighting,
        grid: tuple[int, int],
        bands: int,
        groups: int,
        filters: int,
        local: bool,
    ) -> None:
        super().__init__()
        self.weighting, self.bands, self.groups = weighting, bands, groups
        self.proj_in = Dense(channels, channels)
        self.filter = nn.Parameter(torch.ones(filters if weighting == "filters" else 1, *grid, channels // groups))
        self.select: nn.Sequential | None = None
        if weighting != "static":
            hidden, made = bands * groups, (bands if weighting == "bands" else filters) * groups
            self.select = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, made))
        self.local = depthwise(channels, 3, bias=True) if local else None
        self.proj_out = Dense(channels, channels)
        self.reset_weights()

    def reset_weights(self) -> None:
        """Weights of every map at 1, and a filter, or the mean of the filters, of ones."""
        if self.select is not None:
            nn.init.zeros_(self.select[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.select[-1].bias)  # type: ignore[arg-type]
        with torch.no_grad():
            apart = torch.randn_like(self.filter) * 0.02  # filters that are equal would have equal gradients for ever
            self.filter.copy_(1 + (apart - apart.mean(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to mixed maps of that shape."""
        maps = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        spectrum = dct2(self.proj_in(maps), (1, 2))
        mixed = dct2(self.weighted(spectrum), (1, 2), inverse=True)
        if self.local is not None:
            mixed = mixed + self.local(x).permute(0, 2, 3, 1)
        return self.proj_out(mixed).permute(0, 3, 1, 2)

    def weighted(self, spectrum: Tensor) -> Tensor:
        """A spectrum (B, H, W, C) times the filter and the weights that it asks for."""
        batch, height, width, channels = spectrum.shape
        grouped = spectrum.reshape(batch, height * width, self.groups, channels // self.groups)
        filters = self.filter_for(height, width)[:, :, None]  # (M, H * W, 1, C / groups)
        if self.weighting == "filters":
            shares = self.weights_of(spectrum).transpose(1, 2)  # (B, groups, M)
            mixed = (shares.reshape(-1, shares.shape[2]) @ filters.flatten(1)).unflatten(0, (batch, self.groups))
            grouped = grouped * mixed.unflatten(2, (height * width, -1)).transpose(1, 2)
        else:
            grouped = grouped * filters
            if self.select is not None:
                rings = constant(rings_of, height, width, self.bands, like=spectrum)  # (H * W, bands)
                grouped = grouped * (rings @ self.weights_of(spectrum))[..., None]  # (B, H * W, groups, 1)
        return grouped.reshape(spectrum.shape)

    def weights_of(self, spectrum: Tensor) -> Tensor:
        """What a spectrum (B, H, W, C) asks for: (B, bands, groups) in 0..2, or shares (B, filters, groups).

        A band's share of what is looked at is the mean size of its coefficients in each group; 0 where the grid is too
        small to have it.

        Raises:
            UsageError: the filter is static.
        """
        if self.select is None:
            raise UsageError("spectrum_mixer: a static filter has no weights of its own for a map")
        batch, height, width, _ = spectrum.shape
        means = constant(means_of, height, width, self.bands, like=spectrum)  # (bands, H * W)
        found = torch.bmm(means.expand(batch, -1, -1), spectrum.abs().flatten(1, 2))  # (B, bands, C)
        found = found.unflatten(2, (self.groups, -1)).mean(3).flatten(1)
        return self.weights_from(self.select(found))

    def weights_from(self, asked: Tensor) -> Tensor:
        """What `select` gives, (B, bands * groups) or (B, filters * groups), as weights."""
        asked = asked.unflatten(1, (-1, self.groups))
        return 2 * asked.sigmoid() if self.weighting == "bands" else asked.softmax(1)

    def filter_for(self, height: int, width: int) -> Tensor:
        """The filters for maps of a size, (filters, H * W, C / groups), frequency by frequency."""
        if tuple(self.filter.shape[1:3]) == (height, width):
            return self.filter.flatten(1, 2)
        planes = self.filter.permute(0, 3, 1, 2).float()  # (filters, C / groups, H, W)
        planes = nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=True)
        return planes.permute(0, 2, 3, 1).flatten(1, 2).to(self.filter.dtype)


def rings_of(height: int, width: int, bands: int) -> Tensor:
    """Which band a frequency is of, (H * W, bands) of 0 and 1.

    Band number b holds the frequencies (u, v) whose radius, the root of (u / H)^2 + (v / W)^2, lies in b / bands to
    (b + 1) / bands; the last one has the corners as well, which no axis reaches.
    """
    u, v = (torch.arange(side, dtype=torch.float64, device="cpu") / side for side in (height, width))
    radius = (u[:, None].square() + v.square()).sqrt().flatten()
    bands_of = (radius * bands + 1e-9).floor().clamp(max=bands - 1)  # what lies on an edge is of the band above
    return (bands_of[:, None] == torch.arange(bands, device="cpu")).double()


def means_of(height: int, width: int, bands: int) -> Tensor:
    """The matrix that takes frequencies to means of bands, (bands, H * W); a band without any has zeros."""
    rings = rings_of(height, width, bands).mT
    return rings / rings.sum(1, keepdim=True).clamp(min=1)
