"""Sound, series, clips and points as maps (B, C, H, W) for any backbone, as UniRepLKNet takes them (arXiv 2311.15599).

No page: front ends. The network behind them is the one for images, built with `channels=` of the map:

    sound = mel_map(waves, rate=16_000)                        # (B, N) -> (B, 1, 128, T)
    series = SeriesMap(variables=3, dim=768)(values)           # (B, T, 3) -> (B, 1, side, side)
    clip = folded_clip(frames)                                 # (B, 3, 16, H, W) -> (B, 3, 4 H, 4 W), as released
    clip = tiled_clip(frames)                                  # the same size, each frame in one piece
    views = PointMaps(views=6, size=224)(points)               # (B, N, 3) -> (B * 6, 3, 224, 224)

The functions have no weights; `SeriesMap` and `PointMaps` are learnt with the network.
"""

from math import ceil, isqrt, log, pi

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError

LOWEST, PREEMPHASIS = 20.0, 0.97
"""Hz that the first mel band starts at; share of the sample before that is taken off each sample. Both are Kaldi's."""


def mel_map(
    waves: Tensor,
    *,
    rate: float,
    bands: int = 128,
    window: float = 0.025,
    hop: float = 0.010,
    frames: int | None = None,
    mean: float = 0.0,
    std: float = 0.5,
) -> Tensor:
    """Log mel spectrograms, computed as Kaldi does: what the released audio network is given.

    Args:
        waves: (B, N) samples, at least one window of them.
        rate: samples a second.
        bands: mel bands from 20 Hz to half the rate.
        window: seconds of a frame.
        hop: seconds from one frame to the next.
        frames: cut or padded (with 0) to so many before they are scaled; None keeps those there are.
        mean: of the data set's spectrograms, for (x - mean) / (2 std); the defaults leave them as they are. The release
            has -6.846 and 5.565 for Speech Commands.
        std: likewise.

    Returns:
        (B, 1, bands, T): low bands first, time to the right.

    Raises:
        UsageError: waves of another rank, or shorter than a window.
    """
    length, step = round(window * rate), round(hop * rate)
    if waves.ndim != 2 or waves.shape[1] < length:
        raise UsageError(f"mel_map takes waves (B, N) of at least {length} samples and got {tuple(waves.shape)}")
    if min(step, bands) < 1 or std <= 0:
        raise UsageError(f"mel_map: hop {hop} s must be a sample or more, bands {bands} and std {std} above 0")
    pieces = (waves - waves.mean(1, keepdim=True)).unfold(1, length, step)  # (B, T, length)
    pieces = pieces - pieces.mean(2, keepdim=True)
    pieces = pieces - PREEMPHASIS * torch.cat([pieces[..., :1], pieces[..., :-1]], 2)
    points = 1 << ceil(log(length, 2))
    power = torch.fft.rfft(pieces * torch.hann_window(length, periodic=False).to(waves), points).abs().square()
    found = (power @ mel_bands(bands, points, rate).to(power)).clamp(min=torch.finfo(torch.float32).eps).log()
    if frames is not None:
        found = nn.functional.pad(found, (0, 0, 0, frames - found.shape[1]))  # a negative number cuts
    return ((found - mean) / (2 * std)).mT[:, None]


def mel_bands(bands: int, points: int, rate: float) -> Tensor:
    """Triangles (points // 2 + 1, bands) that overlap by half and are even on the mel scale, 1127 ln(1 + Hz / 700)."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * (1 + hertz / 700).log()

    ends = mel(torch.tensor([LOWEST, rate / 2], dtype=torch.float64))
    edges = torch.linspace(ends[0].item(), ends[1].item(), bands + 2, dtype=torch.float64)
    bins = mel(torch.arange(points // 2 + 1, dtype=torch.float64) * rate / points)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    found = torch.minimum(rise, fall).clamp(min=0)
    found[-1] = 0  # Kaldi leaves the last bin out
    return found.float()


def folded_clip(clips: Tensor) -> Tensor:
    """Clips (B, C, T, H, W) read as images (B, C, s H, s W), with T = s^2 frames: the released form.

    The memory is read anew, row after row: a row of the image holds s rows of one frame side by side, so that a frame
    becomes a band of H / s rows over the whole width, and the bands lie one under the other in the order of time.

    Raises:
        UsageError: another rank, or a number of frames that is no square.
    """
    side = _square(clips)
    batch, channels, _, height, width = clips.shape
    return clips.reshape(batch, channels, side * height, side * width)


def tiled_clip(clips: Tensor) -> Tensor:
    """Clips (B, C, T, H, W) as images (B, C, s H, s W) with the T = s^2 frames in reading order, each in one piece.

    Ours: what the paper's text suggests. The released weights were trained on `folded_clip`.

    Raises:
        UsageError: another rank, or a number of frames that is no square.
    """
    side = _square(clips)
    tiles = clips.unflatten(2, (side, side)).transpose(3, 4)  # (B, C, s, H, s, W)
    return tiles.flatten(2, 3).flatten(3, 4)


def _square(clips: Tensor) -> int:
    if clips.ndim != 5 or isqrt(clips.shape[2]) ** 2 != clips.shape[2]:
        raise UsageError(f"clips must be (B, C, T, H, W) with a square number of frames, and got {tuple(clips.shape)}")
    return isqrt(clips.shape[2])


class SeriesMap(nn.Module):
    """Series of several variables as a map of one channel.

    Every series is scaled over its own time (`standardised`), each step is embedded together with its two neighbours,
    and the steps are laid out: "folded" reads the memory of (T, dim) as a square, as the release does with 48 steps of
    768; "rows" keeps a row a step.

    Args:
        variables: of the series.
        dim: width of a step's embedding.
        marks: numbers that tell the time of a step (hour, day ...), embedded and added; 0 for none.
        layout: "folded" or "rows".

    Raises:
        UsageError: a layout of another name, or a number below 1.
    """

    def __init__(self, *, variables: int, dim: int, marks: int = 0, layout: str = "folded") -> None:
        super().__init__()
        if layout not in ("folded", "rows") or min(variables, dim) < 1:
            raise UsageError(
                f"SeriesMap: layout is {layout!r} (folded or rows), variables {variables} and dim {dim} (1 and more)"
            )
        self.layout, self.dim = layout, dim
        self.values = nn.Conv1d(variables, dim, 3, padding=1, padding_mode="circular", bias=False)
        self.marks = nn.Linear(marks, dim, bias=False) if marks else None
        nn.init.kaiming_normal_(self.values.weight, nonlinearity="leaky_relu")

    def forward(self, series: Tensor, marks: Tensor | None = None) -> Tensor:
        """Series (B, T, variables), and marks (B, T, marks) where there are some, to maps (B, 1, H, W).

        Raises:
            UsageError: "folded", and T times dim is no square.
        """
        steps = self.values(standardised(series)[0].mT).mT  # (B, T, dim)
        if self.marks is not None and marks is not None:
            steps = steps + self.marks(marks)
        if self.layout == "rows":
            return steps[:, None]
        side = isqrt(steps[0].numel())
        if side**2 != steps[0].numel():
            raise UsageError(
                f"SeriesMap: {steps.shape[1]} steps of dim {self.dim} do not fold to a square; choose dim so that their"
                " product is one, or layout='rows'"
            )
        return steps.reshape(-1, 1, side, side)


def standardised(series: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Series (B, T, V) of mean 0 and variance 1 over time, and mean and deviation (B, 1, V) to undo that."""
    mean = series.mean(1, keepdim=True)
    std = (series.var(1, keepdim=True, correction=0) + eps).sqrt()
    return (series - mean) / std, mean, std


TURNS = (
    *((number * pi / 2, 0.0) for number in range(4)),
    *((number * pi / 4, tilt) for number in (5, 7) for tilt in (-pi / 4, pi / 4)),
    (0.0, -pi / 2),
    (0.0, pi / 2),
)
"""(turn about the vertical axis, tilt) of the released views: four sides, four corners, top and bottom."""


class PointMaps(nn.Module):
    """Clouds of points as images from several sides, one an image a view, made from what each point's neighbours say.

    After the release's front end, P2P (arXiv 2208.02812): a point's features come from its nearest neighbours, fall on
    the cell that it projects to and on the eight around it, add up there, and become three colours by convolutions.
    Ours in the details: views are centred by their extent, the block that colours is one convolution with a group norm
    where the release has a residual block, and views are not mixed before the network.

    Args:
        views: how many of `TURNS`, 1 to 10.
        size: side of the images in pixels, at least 8.
        dim: width of a point's features, a multiple of 4.
        neighbours: points that a point's features are made from, itself among them.
        channels: of the images.

    Raises:
        UsageError: a number out of range.
    """

    turns: Tensor

    def __init__(
        self, *, views: int = 6, size: int = 224, dim: int = 64, neighbours: int = 32, channels: int = 3
    ) -> None:
        super().__init__()
        if not 1 <= views <= len(TURNS) or size < 8 or dim < 4 or dim % 4 or min(neighbours, channels) < 1:
            raise UsageError(
                f"PointMaps: views is {views} (1 to {len(TURNS)}), size {size} (8 and more), dim {dim} (4, 8, ...),"
                f" neighbours {neighbours} and channels {channels} (1 and more)"
            )
        self.size, self.neighbours = size, neighbours
        self.register_buffer("turns", torch.stack([_turn(*angles) for angles in TURNS[:views]]))
        self.lift = nn.Linear(3, 8)
        self.edges = nn.Sequential(nn.Conv2d(16, dim, 1, bias=False), nn.GroupNorm(4, dim), nn.LeakyReLU(0.2))
        self.project = nn.Linear(dim, dim)
        self.colour = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.GroupNorm(4, dim), nn.ReLU(), nn.Conv2d(dim, channels, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        """Points (B, N, 3), at least as many as neighbours, to images (B * views, channels, size, size), view by view.

        Raises:
            UsageError: points of another shape, or too few of them.
        """
        if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] < self.neighbours:
            raise UsageError(
                f"PointMaps takes points (B, N, 3), at least {self.neighbours} of them, and got {tuple(points.shape)}"
            )
        features, views = self.features(points), len(self.turns)
        cells = self.cells(points).flatten(0, 1)  # (B * views, N, 9)
        spread = features.repeat_interleave(views, 0)[:, :, None].expand(-1, -1, 9, -1).flatten(1, 2)  # (., 9 N, dim)
        flat = spread.new_zeros(len(spread), self.size**2, spread.shape[2])
        flat = flat.scatter_add(1, cells.flatten(1)[..., None].expand_as(spread), spread)
        return self.colour(flat.mT.unflatten(2, (self.size, self.size)))

    def features(self, points: Tensor) -> Tensor:
        """What the neighbours of each point say, (B, N, dim)."""
        apart = torch.cdist(
            points, points, compute_mode="donot_use_mm_for_euclid_dist"
        )  # whose rounding swaps neighbours
        near = apart.topk(self.neighbours, largest=False).indices  # (B, N, k)
        lifted = self.lift(points)
        batch = torch.arange(len(points), device=points.device)[:, None, None]
        own = lifted[:, :, None].expand(-1, -1, self.neighbours, -1)
        edges = torch.cat([lifted[batch, near] - own, own], -1)  # (B, N, k, 16)
        return self.project(self.edges(edges.permute(0, 3, 1, 2)).amax(3).mT)

    def cells(self, points: Tensor) -> Tensor:
        """The nine cells of the image that each point falls on, (B, views, N, 9) numbers by rows.

        The larger side of what is seen fills the image but for a margin of a cell.
        """
        seen = torch.einsum("bnc,vdc->bvnd", points, self.turns)[..., :2]  # (B, views, N, 2)
        low, high = seen.amin(2, keepdim=True), seen.amax(2, keepdim=True)
        cell = ((high - low).amax(3, keepdim=True) / (self.size - 3)).clamp(min=1e-12)
        first = ((self.size - 1 - (high - low) / cell) / 2).round()  # centred
        places = (((seen - low) / cell + 1e-4).floor() + first).long().clamp(1, self.size - 2)
        around = torch.arange(-1, 2, device=points.device)
        rows, columns = places[..., 0, None] + around, places[..., 1, None] + around  # (B, views, N, 3)
        return (rows[..., None] * self.size + columns[..., None, :]).flatten(3)


def _turn(turn: float, tilt: float) -> Tensor:
    """The rotation (3, 3) about the vertical axis (the second), then about the horizontal one."""
    a, b = torch.tensor(turn), torch.tensor(tilt)
    one, zero = torch.ones(()), torch.zeros(())
    about = torch.stack([a.cos(), zero, a.sin(), zero, one, zero, -a.sin(), zero, a.cos()]).reshape(3, 3)
    over = torch.stack([one, zero, zero, zero, b.cos(), -b.sin(), zero, b.sin(), b.cos()]).reshape(3, 3)
    return over @ about
