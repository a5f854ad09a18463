"""Discrete wavelet transform of maps and its inverse: orthonormal Daubechies filters, any size, exact.

Shapes: maps (B, C, H, W) to bands of half the size (rounded up with Haar's filters), level by level. Images are
continued by zeros, as PyWavelets' mode "zero" and the networks on wavelets do: nothing is lost, and the energy of the
bands is that of the maps. Haar's bands are sums and differences of slices, others one strided depthwise convolution.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError, near

VARIANTS: dict[str, dict[str, object]] = {}

Details: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Bands of one level, (B, C, h, w) each: changes from row to row, from column to column, and both."""

FILTERS: dict[str, tuple[float, ...]] = {
    "haar": (0.7071067811865476, 0.7071067811865476),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db3": (
        0.3326705529500826,
        0.8068915093110926,
        0.45987750211849154,
        -0.13501102001025458,
        -0.08544127388202666,
        0.03522629188570953,
    ),
    "db4": (
        0.23037781330885523,
        0.7148465705525415,
        0.6308807679295904,
        -0.02798376941698385,
        -0.18703481171888114,
        0.030841381835986965,
        0.032883011666982945,
        -0.010597401784997278,
    ),
}
"""Name -> low-pass filter as it meets the pixels from left to right; Daubechies' extremal phase filters."""


class Bands(NamedTuple):
    """What a transform makes of maps.

    Attributes:
        low: (B, C, h, w), the coarsest low frequencies.
        details: of every level, fine to coarse.
    """

    low: Tensor
    details: tuple[Details, ...]


def wavelet(filters: str | Sequence[float] = "haar", *, levels: int = 1) -> "Wavelet":
    """The transform; it has no parameters.

    Args:
        filters: one of `FILTERS`, or an orthonormal low-pass filter of even length.
        levels: how often the low band is transformed again.

    Raises:
        UsageError: an unknown name, numbers that are no orthonormal filter, or no level.
    """
    if isinstance(filters, str) and filters not in FILTERS:
        raise UsageError(f"wavelet: filters is {filters!r}{near(filters, FILTERS)}; it can be {', '.join(FILTERS)}")
    if levels < 1:
        raise UsageError(f"wavelet: levels is {levels}; it must be at least 1")
    return Wavelet(filters=FILTERS[filters] if isinstance(filters, str) else filters, levels=levels)


class Wavelet(nn.Module):
    """A transform of some levels and its inverse; build it with `wavelet`.

    Attributes:
        kernels: (4, 1, K, K), of the low band and the three details.
        levels: how many.
    """

    kernels: Tensor

    def __init__(self, *, filters: Sequence[float], levels: int = 1) -> None:
        super().__init__()
        _check_orthonormal(filters)
        low = torch.tensor(filters, dtype=torch.float64)
        high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(low) // 2)
        kernels = [torch.outer(down, across) for across in (low, high) for down in (low, high)]
        self.register_buffer("kernels", torch.stack(kernels)[:, None].to(torch.get_default_dtype()), persistent=False)
        self.levels, self.haar = levels, len(low) == 2

    def forward(self, x: Tensor) -> Bands:
        """Maps (B, C, H, W) to bands; those of a level have (H + K - 1) // 2 rows."""
        details: list[Details] = []
        for _ in range(self.levels):
            x, *rest = haar(x) if self.haar else self._split(x)
            details.append((rest[0], rest[1], rest[2]))
        return Bands(x, tuple(details))

    def inverse(self, bands: Bands, size: tuple[int, int] | None = None) -> Tensor:
        """The maps that bands are of.

        Args:
            bands: as `forward` returns them.
            size: (height, width) of the maps; None takes them to be even.
        """
        x, finer = bands.low, [details[0].shape[2:] for details in bands.details[:-1]]
        for details, sides in zip(reversed(bands.details), reversed([size, *finer]), strict=True):
            x = unhaar(x, *details) if self.haar else self._join(x, *details)
            x = x if sides is None else x[:, :, : sides[0], : sides[1]]
        return x

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        channels, margin = x.shape[1], self.kernels.shape[-1] - 2
        right, bottom = margin + x.shape[3] % 2, margin + x.shape[2] % 2
        padded = nn.functional.pad(x, (margin, right, margin, bottom))
        bands = nn.functional.conv2d(padded, self.kernels.repeat(channels, 1, 1, 1), stride=2, groups=channels)
        return bands.unflatten(1, (channels, 4)).unbind(2)

    def _join(self, *bands: Tensor) -> Tensor:
        channels, margin = bands[0].shape[1], self.kernels.shape[-1] - 2
        kernels = self.kernels.repeat(channels, 1, 1, 1)
        stacked = torch.stack(bands, 2).flatten(1, 2)
        return nn.functional.conv_transpose2d(stacked, kernels, stride=2, padding=margin, groups=channels)


def haar(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Haar's bands of maps (B, C, H, W): low, and differences of rows, of columns, of both; (B, C, h, w) each.

    Each 2 x 2 pixels a b / c d give (a+b+c+d) / 2, (a+b-c-d) / 2, (a-b+c-d) / 2 and (a-b-c+d) / 2. An odd side is
    continued by a row or column of zeros.
    """
    bottom, right = x.shape[2] % 2, x.shape[3] % 2
    x = nn.functional.pad(x, (0, right, 0, bottom)) if bottom or right else x
    upper, lower = x.unflatten(2, (-1, 2)).unbind(3)  # views whose gradient is one copy, as slices' is not
    (a, b), (c, d) = ((rows.unflatten(3, (-1, 2)).unbind(4)) for rows in (upper + lower, upper - lower))
    return (a + b).mul_(0.5), (c + d).mul_(0.5), (a - b).mul_(0.5), (c - d).mul_(0.5)


def unhaar(low: Tensor, rows: Tensor, columns: Tensor, both: Tensor) -> Tensor:
    """Inverse of `haar`: maps (B, C, 2 h, 2 w)."""
    upper, lower = (low + columns, low - columns), (rows + both, rows - both)
    sums, changes = (torch.stack(pair, 4).flatten(3) for pair in (upper, lower))
    return torch.stack((sums + changes, sums - changes), 3).flatten(2, 3).mul_(0.5)


def _check_orthonormal(low: Sequence[float]) -> None:
    """Refuse a filter whose shifts by two are not orthonormal, so that nothing would invert it."""
    overlaps = [sum(a * b for a, b in zip(low, low[shift:], strict=False)) for shift in range(0, len(low), 2)]
    wanted = [1.0] + [0.0] * (len(overlaps) - 1)
    apart = [abs(found - right) for found, right in zip([sum(low), *overlaps], [2**0.5, *wanted], strict=False)]
    if not low or len(low) % 2 or max(apart) > 1e-6:
        raise UsageError(
            f"wavelet: filters is {tuple(low)}; an orthonormal low-pass filter has an even number of values,"
            " the sum sqrt(2), the sum of squares 1, and no overlap with itself two places on"
        )
