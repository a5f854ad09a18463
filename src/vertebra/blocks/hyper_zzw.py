"""HyperZZW: weights that a small network of coordinates makes, multiplied with the signal that they then act on.

Shapes: maps (B, C, H, W) in, the same out. A slow network (`SlowNet`) turns positions into a kernel. The global form
multiplies maps with a kernel of their own size, and the product, as H x W matrices, with the maps again: they must be
square and of one fixed size. The local form convolves each channel with a small kernel that depends on the signal,
averaged over the batch. Used alone, through `vertebra.surgery.swap`, and in `vertebra.backbones.terminator`
(arXiv 2401.17948), whose gates `RGU`, `HyperChannel` and `HyperInteraction` are here too. Two departures: in evaluation
running means take the place of the batch (`faithful` keeps it), and frequencies are 10 where the released code, whose
configuration sets none, falls back on 2000: sines of noise at 32 pixels.
"""

from collections.abc import Sequence
from math import pi, prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Gamma
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

EPS = 1e-5
FREQUENCY = 10.0
_SHAPE, _MOMENTUM = 6.0, 0.1
_KEPT, _DIRECTION = 1.0, 0.1
"""Of the renormalisation in a context's slow network; the reference makes them parameters, yet never trains them."""


def hyper_zzw(
    channels: int,
    *,
    kind: Literal["local", "global"] = "local",
    kernel: int = 7,
    size: int | None = None,
    dim: int | None = None,
    layers: int = 2,
    frequency: float = FREQUENCY,
    faithful: bool = False,
) -> "LocalHyperZZW | GlobalHyperZZW":
    """The block for maps of `channels`, which act on themselves.

    Args:
        channels: of the maps.
        kind: depth-wise kernels of the context, or products of whole maps.
        kernel: odd size of a local kernel.
        size: side of the square maps in pixels; the global form needs it, the local one takes any.
        dim: width of the slow network; 32 for the local form and 64 for the global one by default.
        layers: of the slow network.
        frequency: of its sines, about periods across the map at the first layer.
        faithful: keep the batch's own statistics in evaluation, as the reference does.

    Raises:
        UsageError: an option below 1, an even kernel, or a global form without a size.
    """
    chosen = dim or (32 if kind == "local" else 64)
    for name, value in {"channels": channels, "kernel": kernel, "dim": chosen, "layers": layers}.items():
        if value < 1:
            raise UsageError(f"hyper_zzw: {name} is {value}; it must be at least 1")
    if kind not in ("local", "global"):
        raise UsageError(f"hyper_zzw: kind is {kind!r}; it must be 'local' or 'global'")
    if kind == "local":
        if kernel % 2 == 0:
            raise UsageError(f"hyper_zzw: kernel is {kernel}; it must be odd, as {kernel + 1}")
        return LocalHyperZZW(channels, kernel=kernel, dim=chosen, layers=layers, frequency=frequency, faithful=faithful)
    if size is None or size < 1:
        raise UsageError(f"hyper_zzw: size is {size}; the global form needs the side of the maps in pixels, as size=32")
    return GlobalHyperZZW(channels, size=size, dim=chosen, layers=layers, frequency=frequency)


class LocalHyperZZW(nn.Module):
    """Depth-wise convolution with kernels of the context, 1 x 1 convolution, standardisation over the batch, GELU.

    Attributes:
        slow: context (B, C, H, W) to kernels (C, k, k).
    """

    def __init__(
        self, channels: int, *, kernel: int, dim: int = 32, layers: int = 2, frequency: float, faithful: bool
    ) -> None:
        super().__init__()
        self.slow = ContextSlowNet(channels, kernel, dim=dim, layers=layers, frequency=frequency, faithful=faithful)
        self.mix = mixer(channels, channels)
        assert self.mix.bias is not None
        self.mix.bias.requires_grad_(False)  # standardised away; kept for the authors' checkpoints
        self.norm = nn.BatchNorm2d(channels, EPS, affine=False, track_running_stats=not faithful)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W) under kernels of `context` (B, C, H', W'), by default of themselves."""
        kernels = self.slow(x if context is None else context)[:, None].to(x.dtype)  # (C, 1, k, k)
        if x.device.type == "cpu":  # torch's depth-wise kernels there want channels last
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, kernels, padding=kernels.shape[-1] // 2, groups=x.shape[1])
        return F.gelu(self.norm(self.mix(x))) + self.bias


class GlobalHyperZZW(nn.Module):
    """Scores, that is maps times a kernel of their size; then a matrix product of scores and maps, channel by channel.

    Attributes:
        slow: makes the kernel (C, size, size).
    """

    def __init__(
        self, channels: int, *, size: int, dim: int = 64, layers: int = 2, frequency: float = FREQUENCY
    ) -> None:
        super().__init__()
        self.slow = SlowNet(channels, (size, size), dim=dim, layers=layers, frequency=frequency)

    def scores(self, x: Tensor) -> Tensor:
        """Maps (B, C, size, size) times the kernel.

        Raises:
            UsageError: maps of another size.
        """
        size = self.slow.sides if isinstance(self.slow, SlowNet) else tuple(self.slow.kernel.shape[1:])
        if not torch.compiler.is_compiling() and tuple(x.shape[2:]) != size:
            raise UsageError(
                f"hyper_zzw: the global form is built for maps of {size[0]}x{size[1]} and got"
                f" {x.shape[2]}x{x.shape[3]}; build it with size={x.shape[2]} if they are square"
            )
        return x * self.slow().to(x.dtype)

    def forward(self, x: Tensor, value: Tensor | None = None) -> Tensor:
        """Scores of x times `value` (B, C, size, size), by default x, over the last two axes."""
        return self.scores(x) @ (x if value is None else value)


class SlowNet(nn.Module):
    """Coordinates in [-1, 1] to a kernel: h = sin(A_i c) (W_i h + b_i) + bias map, then one linear layer.

    Sines are computed in 32 bit at least, whatever the parameters are in: their arguments are large.

    Attributes:
        sides: of the kernel, one (a line of channels) or two.
    """

    grid: Tensor

    def __init__(
        self, outputs: int, sides: Sequence[int], *, dim: int, layers: int, frequency: float = FREQUENCY
    ) -> None:
        super().__init__()
        self.sides = tuple(sides)
        axes = [torch.linspace(-1, 1, side) for side in self.sides]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        self.register_buffer("grid", grid.flatten(1), persistent=False)  # (axes, N)
        self.sines = nn.ModuleList(Sine(len(self.sides), dim, frequency, _SHAPE / (i + 1)) for i in range(layers + 1))
        self.hidden = nn.ModuleList(_linear(dim, dim, 1.0) for _ in range(layers))
        self.bias_map = nn.Parameter(torch.zeros(1, 1, *self.sides))
        self.out = _linear(dim, outputs, 0.0)
        with torch.no_grad():
            self.out.weight /= prod(self.sides) ** 0.5

    def forward(self) -> Tensor:
        """The kernel (outputs, *sides)."""
        h, bias_map = self.sines[0](self.grid), self.bias_map.flatten()
        for sine, layer in zip(list(self.sines)[1:], self.hidden, strict=True):
            h = sine(self.grid) * _apply(layer, h) + bias_map
        return _apply(self.out, h).unflatten(1, self.sides)

    def fused(self) -> "Constant":
        """The kernel alone: in evaluation it does not change."""
        with torch.no_grad():
            return Constant(self())


class ContextSlowNet(nn.Module):
    """A slow network whose hidden layers are multiplied with what a context says, (C, k, k) kernels.

    Attributes:
        context: mean of the pooled context over the batch, or over training.
        slow: the part without a context.
    """

    def __init__(self, channels: int, kernel: int, *, dim: int, layers: int, frequency: float, faithful: bool) -> None:
        super().__init__()
        self.context = BatchMean(channels, kernel, faithful=faithful)
        self.reduce, self.squeeze = nn.Linear(channels, dim), nn.Linear(dim, dim)
        self.gates = nn.ModuleList(_linear(dim, dim, 1.0) for _ in range(layers))
        self.slow = SlowNet(channels, (kernel, kernel), dim=dim, layers=layers, frequency=frequency)

    def forward(self, context: Tensor) -> Tensor:
        """Context (B, C, H, W) to kernels (C, k, k)."""
        return self._kernels(self.context(context))

    def _kernels(self, mean: Tensor) -> Tensor:
        slow, gate = self.slow, F.gelu(_apply(self.squeeze, _apply(self.reduce, mean.flatten(1))))  # (dim, k * k)
        h, bias_map = slow.sines[0](slow.grid), slow.bias_map.flatten()
        for sine, layer, turn in zip(list(slow.sines)[1:], slow.hidden, self.gates, strict=True):
            h = sine(slow.grid) * _apply(layer, h) + bias_map
            h = (_KEPT * h.detach() + _DIRECTION * F.normalize(h, dim=1)) * _apply(turn, gate)
        return _apply(slow.out, h).unflatten(1, slow.sides)

    def fused(self) -> nn.Module:
        """The kernels of the stored context; itself where the context is that of each batch."""
        if self.context.running_mean is None:
            return self
        with torch.no_grad():
            return Constant(self._kernels(self.context.running_mean[0]))


class BatchMean(nn.Module):
    """Maps pooled to k x k and averaged over the batch; in evaluation, the running mean of training.

    The reference takes the batch in evaluation too, so that an image's result depends on its neighbours.
    """

    running_mean: Tensor | None

    def __init__(self, channels: int, kernel: int, *, faithful: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("running_mean", None if faithful else torch.zeros(1, channels, kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (C, k, k)."""
        stored = self.running_mean
        if stored is not None and not self.training:
            return stored[0]
        mean = F.adaptive_avg_pool2d(x.mean(0, keepdim=True), self.kernel)
        if stored is not None:
            with torch.no_grad():
                stored.lerp_(mean.to(stored.dtype), _MOMENTUM)
        return mean[0]


class Sine(nn.Module):
    """sin(A c + b) of coordinates c: a Gabor-like filter of one frequency a row.

    Args:
        axes: of the coordinates.
        dim: rows.
        frequency: omega_0; a weight starts as a plain linear layer's, times 2 pi omega_0 times a draw of Gamma(shape).
        shape: of the gamma distribution; smaller in later layers.
    """

    def __init__(self, axes: int, dim: int, frequency: float, shape: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(dim, axes)), nn.Parameter(torch.zeros(dim))
        nn.init.uniform_(self.weight, -(axes**-0.5), axes**-0.5)
        with torch.no_grad():
            self.weight *= (
                2 * pi * frequency * Gamma(shape, 1.0, validate_args=False).sample((dim, axes)).to(self.weight)
            )

    def forward(self, grid: Tensor) -> Tensor:
        """Coordinates (axes, N) to (dim, N), in the type of the parameters."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        weight, grid = self.weight.to(exact)[..., None], grid.to(exact)
        found = sum(weight[:, axis] * grid[axis] for axis in range(len(grid))) + self.bias.to(exact)[:, None]
        return found.sin().to(self.weight.dtype)  # products by hand: autocast would run a linear layer in 16 bit


class RGU(nn.Module):
    """Recursive gated unit: y = W_y(GELU(standardised(W_k x * W_q W_v x)) + bias map).

    W_q and W_v follow each other, and are multiplied before they meet the maps.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.key, self.value, self.query, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.bias_map = nn.Parameter(torch.zeros(1, 1, size, size))
        for layer in (self.key, self.value, self.query, self.out):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, size, size), the same out."""
        query, value = self.query, self.value
        assert query.bias is not None and value.bias is not None
        weight = query.weight.flatten(1) @ value.weight.flatten(1)
        bias = query.weight.flatten(1) @ value.bias + query.bias
        gated = self.key(x) * F.conv2d(x, weight[..., None, None], bias)
        return self.out(F.gelu(standardise(gated)) + self.bias_map)


class HyperChannel(nn.Module):
    """x * sigmoid(g hk g): g are the channels' means, hk a kernel along the channels that a slow network makes."""

    def __init__(self, channels: int, *, dim: int = 32, frequency: float = FREQUENCY) -> None:
        super().__init__()
        self.slow = SlowNet(1, (channels,), dim=dim, layers=2, frequency=frequency)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W), the same out."""
        gates = (x.mean((2, 3)).square() * self.slow().to(x.dtype)).sigmoid()  # (B, C)
        return x * gates[..., None, None]


class HyperInteraction(nn.Module):
    """x * sigmoid((m hk_s m) (g hk_c g)): m the mean over channels and g over space of a map that comes later."""

    def __init__(
        self, channels: int, size: int, *, dim: int = 64, channel_dim: int = 16, frequency: float = FREQUENCY
    ) -> None:
        super().__init__()
        self.channel = SlowNet(1, (channels,), dim=channel_dim, layers=2, frequency=frequency)
        self.space = SlowNet(1, (size, size), dim=dim, layers=2, frequency=frequency)

    def forward(self, high: Tensor, x: Tensor) -> Tensor:
        """The later map and the one that is gated, both (B, C, size, size)."""
        across = high.mean((2, 3)).square() * self.channel().to(x.dtype)  # (B, C)
        within = high.mean(1, keepdim=True).square() * self.space().to(x.dtype)  # (B, 1, size, size)
        return x * (within * across[..., None, None]).sigmoid()


class Constant(nn.Module):
    """A kernel that no longer needs the network that made it."""

    kernel: Tensor

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel)

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The kernel, whatever the context."""
        return self.kernel


def standardise(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) with mean 0 and variance 1 in each channel of each image, nothing learned."""
    centred = x - x.mean((2, 3), keepdim=True)
    return centred * (centred.square().mean((2, 3), keepdim=True) + EPS).rsqrt()


def mixer(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1 x 1 convolution as the paper's networks start it."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _linear(inputs: int, outputs: int, bias: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.constant_(layer.bias, bias)
    return layer


def _apply(layer: nn.Module, h: Tensor) -> Tensor:
    """A linear layer on columns, (inputs, N) to (outputs, N), so that kernels come out as maps lie in memory."""
    assert isinstance(layer, nn.Linear)
    return torch.addmm(layer.bias[:, None], layer.weight, h.to(layer.weight.dtype))
