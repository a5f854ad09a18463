"""One-way convolutions: kernels that are sums of products of one-dimensional filters, in one, two and three dimensions.

    conv = OneWayConv3d(16, 32, 3, rank=1, padding=1)       # 16 * 32 * 9 weights in place of 16 * 32 * 27
    conv.approximate(dense.weight)                          # the factors nearest to a trained layer
    conv.fused()                                            # the dense layer that computes the same

A weight (out, in, K, K) is a canonical polyadic decomposition of some rank: per kernel, W[o,i,a,b] = sum_r u[o,i,r,a]
v[o,i,r,b]; per input channel, sum_r u[i,r,a] v[o,i,r,b]; or per layer, sum_r p[o,r] q[i,r] u[r,a] v[r,b]. It is
computed as one dense convolution, which saves parameters and no multiply-accumulates, or as a chain of one-dimensional
ones. Factors per kernel are what `vertebra.surgery.a_priori` is about; the others are other, smaller families.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation has
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vertebra.blocks.decomposition import decomposed, product
from vertebra.errors import UsageError, near

VARIANTS = {
    "kernel": {"per": "kernel", "compute": "dense", "rank": 1},
    "input": {"per": "input", "compute": "chain", "rank": 1},
    "layer": {"per": "layer", "compute": "chain", "rank": 8},
}

Per = Literal["kernel", "input", "layer"]
Compute = Literal["dense", "chain"]

_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_DENSE: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def one_way(
    channels: int,
    variant: str = "kernel",
    *,
    kernel: int = 3,
    rank: int | None = None,
    compute: Compute | None = None,
    groups: int = 1,
    bias: bool = True,
) -> "OneWayConv2d":
    """A convolution of maps (B, channels, H, W) that keeps their shape.

    Args:
        channels: of the maps.
        variant: what one set of factors is for: "kernel", "input" or "layer".
        kernel: odd side.
        rank: terms of a set, in place of the variant's.
        compute: "dense" or "chain", in place of the variant's.
        groups: of channels that do not meet.
        bias: whether there is one.

    Raises:
        UsageError: an unknown variant, an even kernel, or a rank that the kernel cannot use.
    """
    if variant not in VARIANTS:
        raise UsageError(f"one_way has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"one_way: kernel is {kernel}; it must be odd and at least 1")
    if channels < 1 or groups < 1 or channels % groups:
        raise UsageError(f"one_way: channels is {channels} and groups {groups}; channels must be a multiple of groups")
    options: dict[str, Any] = dict(VARIANTS[variant])
    options |= {name: value for name, value in (("rank", rank), ("compute", compute)) if value is not None}
    return OneWayConv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=bias, **options)


def modes(
    channels: tuple[int, int], kernel: Sequence[int], *, groups: int = 1, per: Per = "kernel"
) -> tuple[int, list[int]]:
    """How many decompositions a layer consists of, and the sides of the tensor that each of them stands for.

    A layer of rank R has R times the first times the sum of the second parameters, and its bias. Sides of 1 have no
    factor, unless there are no others.

    Args:
        channels: (in, out).
        kernel: sides.
        groups: as in torch.
        per: what one set of factors is for.
    """
    inside, outside = channels[0] // groups, channels[1] // groups
    *sides, last = [kernel[way] for way in ways(kernel)]
    if per == "kernel":
        return groups * outside * inside, [*sides, last]
    if per == "input":
        return groups * inside, [*sides, outside * last]
    return groups, [outside, inside, *sides, last]


def ways(kernel: Sequence[int]) -> list[int]:
    """Dimensions in which a kernel has more than one weight; the last one where there is none."""
    return [way for way, side in enumerate(kernel) if side > 1] or [len(kernel) - 1]


def largest_rank(sides: Sequence[int]) -> int:
    """A rank that represents every tensor of these sides: the product of all but the largest."""
    return prod(sides) // max(sides)


class _OneWay(_ConvNd):
    """What the three have in common; it stands before torch's class of the same dimensions, whose weight it lacks.

    Attributes:
        factors: one tensor (sets, rank, side) a mode.
        rank: terms of a set.
        per: what one set of factors is for.
        compute: how it is computed.
    """

    factors: nn.ParameterList

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        rank: int = 1,
        per: Per = "kernel",
        compute: Compute = "dense",
        **options: Any,
    ) -> None:
        if per not in get_args(Per) or compute not in get_args(Compute):
            raise UsageError(
                f"one_way: per is {per!r} and compute {compute!r}; per can be {', '.join(get_args(Per))}, and compute "
                + " or ".join(get_args(Compute))
            )
        super().__init__(in_channels, out_channels, kernel_size, **options)  # type: ignore[call-arg]
        self.weight = None  # type: ignore[assignment] # torch's constructor made one
        self.rank, self.per, self.compute = rank, per, compute
        channels = (in_channels, out_channels)
        self.sets, self.sides = modes(channels, self.kernel_size, groups=self.groups, per=per)
        if not 1 <= rank <= largest_rank(self.sides):
            raise UsageError(
                f"one_way: rank is {rank}; with factors per {per} of a kernel {self.kernel_size} it must be at least 1,"
                f" and {largest_rank(self.sides)} is any kernel"
            )
        self.factors = nn.ParameterList(torch.empty(self.sets, rank, side) for side in self.sides)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors so that the dense weight has He's variance, and the bias as torch does."""
        if "factors" not in self._modules:  # torch's constructor asks before they are there
            return
        inputs = self.in_channels // self.groups * prod(self.kernel_size)
        # a term is a product of one number a factor; the variances of independent factors multiply
        variance = (2 / (inputs * self.rank)) ** (1 / len(self.sides))
        # even, not normal: products of normal numbers are nearly all small and seldom very large
        limit = (3 * variance) ** 0.5
        for factor in self.factors:
            nn.init.uniform_(factor, -limit, limit)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(inputs**-0.5), inputs**-0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, per={self.per!r}, compute={self.compute!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in, ...) to maps, as torch's convolution of the same options."""
        if self.compute == "chain" and len(self.sides) > 1:
            return self._chain(x)
        weight, bias = self.dense_weight(), self.bias
        return self._conv_forward(x, weight, bias)  # type: ignore[attr-defined] # that of torch's class

    def dense_weight(self) -> Tensor:
        """The weight (out, in / groups, ...) that the factors stand for."""
        return self._folded(product(list(self.factors)))

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> float:
        """Set the factors to those nearest to a dense weight (out, in / groups, ...), by SVD or alternating fits.

        Returns:
            What is lost: norm of the difference over the norm of the weight.
        """
        if weight.is_meta:
            raise UsageError("one_way: the weight is on the meta device and has no numbers to approximate")
        for factor, found in zip(self.factors, decomposed(self._unfolded(weight), self.rank), strict=True):
            factor.copy_(found)
        return float((self.dense_weight() - weight).norm() / weight.norm().clamp_min(1e-30))

    def fused(self) -> nn.Module:
        """The dense convolution that computes the same, of torch's class."""
        options: Any = {
            name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        weight = self.dense_weight().detach()
        dense = _DENSE[len(self.kernel_size) - 1](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        dense.load_state_dict({"weight": weight, **({} if self.bias is None else {"bias": self.bias.detach()})})
        return dense.train(self.training)

    def _folded(self, tensors: Tensor) -> Tensor:
        """What the sets stand for, (sets, *sides), as a weight."""
        if self.per == "input":
            inside, outside = self.in_channels // self.groups, self.out_channels // self.groups
            *sides, last = [self.kernel_size[way] for way in ways(self.kernel_size)]
            tensors = tensors.reshape(self.groups, inside, *sides, outside, last).movedim(-2, 1)
        return tensors.reshape(self.out_channels, -1, *self.kernel_size)

    def _unfolded(self, weight: Tensor) -> Tensor:
        """A weight as (sets, *sides)."""
        if self.per == "input":
            inside, outside = self.in_channels // self.groups, self.out_channels // self.groups
            sides = [self.kernel_size[way] for way in ways(self.kernel_size)]
            weight = weight.reshape(self.groups, outside, inside, *sides).movedim(1, -2)
        return weight.reshape(self.sets, *self.sides)

    def _chain(self, x: Tensor) -> Tensor:
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0,) * len(self.kernel_size)
        return getattr(self, f"_chain_per_{self.per}")(x, padding)

    def _chain_per_kernel(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        """Depthwise in all but the last way, with maps for each pair of channels and each term; then their sums."""
        groups, inside, outside = self.groups, self.in_channels // self.groups, self.out_channels // self.groups
        first, *others = ways(self.kernel_size)
        weights = [factor.unflatten(0, (groups, outside, inside)) for factor in self.factors]
        x = self._step(x, weights[0].transpose(1, 2).reshape(-1, 1, weights[0].shape[-1]), first, padding)
        x = x.unflatten(1, (groups, inside, outside, -1)).transpose(2, 3).flatten(1, 4)  # by output channel
        for way, weight in zip(others[:-1], weights[1:-1], strict=True):
            x = self._step(x, weight.reshape(-1, 1, weight.shape[-1]), way, padding)
        weight = weights[-1].reshape(self.out_channels, -1, weights[-1].shape[-1])
        return self._step(x, weight, others[-1], padding, self.bias)

    def _chain_per_input(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        """Depthwise in all but the last way, `rank` maps a channel; then one convolution from all to all."""
        *depthwise, last = ways(self.kernel_size)
        for way, factor in zip(depthwise, list(self.factors)[:-1], strict=True):
            x = self._step(x, factor.reshape(-1, 1, factor.shape[-1]), way, padding)
        side = self.kernel_size[last]
        weight = self.factors[-1].reshape(self.groups, -1, self.rank, self.out_channels // self.groups, side)
        weight = weight.movedim(3, 1).reshape(self.out_channels, -1, side)
        return self._step(x, weight, last, padding, self.bias)

    def _chain_per_layer(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        """Pointwise to `rank` maps a group, depthwise in each way, pointwise to the outputs."""
        out, inside, *others = self.factors
        x = self._step(x, inside.reshape(self.groups * self.rank, -1, 1), None, padding)
        for way, factor in zip(ways(self.kernel_size), others, strict=True):
            x = self._step(x, factor.reshape(-1, 1, factor.shape[-1]), way, padding)
        return self._step(x, out.mT.reshape(self.out_channels, -1, 1), None, padding, self.bias)

    def _step(
        self, x: Tensor, weight: Tensor, way: int | None, padding: tuple[int, ...], bias: Tensor | None = None
    ) -> Tensor:
        """One convolution of the chain, with filters (out, in / groups, side) along one way or none."""
        dimensions, lines = range(len(self.kernel_size)), ways(self.kernel_size)
        # the last way takes the dimensions along that have no factor: they may have strides
        along = {way} if way != lines[-1] else {way, *dimensions} - {*lines[:-1]}
        return _CONVOLUTIONS[dimensions[-1]](
            x,
            weight.reshape(*weight.shape[:2], *(weight.shape[-1] if at == way else 1 for at in dimensions)),
            bias,
            [self.stride[at] if at in along else 1 for at in dimensions],
            [padding[at] if at in along else 0 for at in dimensions],
            [self.dilation[at] if at in along else 1 for at in dimensions],
            x.shape[1] // weight.shape[1],
        )


class OneWayConv1d(_OneWay, nn.Conv1d):
    """One-way convolution of sequences (B, C, L): per kernel it is dense, per layer it saves; see `OneWayConv2d`."""


class OneWayConv2d(_OneWay, nn.Conv2d):
    """One-way convolution of maps (B, C, H, W).

    Parameters, bias apart, with kernels K x K: out * in / groups * rank * 2K per kernel, in * rank * K + out * in /
    groups * rank * K per input, rank * (out + in + groups * 2K) per layer.

    Args:
        in_channels: as torch has it, and so are the others that are not named here.
        out_channels: of the maps that come out.
        kernel_size: one side or all of them.
        rank: terms of a set of factors; K of them are any kernel K x K.
        per: what one set of factors is for: a "kernel" (the paper's), an "input" channel, whose factors but the last
            serve all outputs, or the "layer", within a group.
        compute: "dense" makes the weight of its factors and has the multiply-accumulates of a dense layer; "chain"
            runs one-dimensional convolutions, which per kernel need out times the maps of the input.
        options: stride, padding, dilation, groups, bias and padding_mode.

    Raises:
        UsageError: a rank below 1 or above what can make a difference, or an unknown word.
    """


class OneWayConv3d(_OneWay, nn.Conv3d):
    """One-way convolution of volumes and clips (B, C, D, H, W); see `OneWayConv2d`.

    Per kernel K x K x K it has out * in / groups * rank * 3K parameters and a bias.
    """


ONE_WAY: tuple[type[_OneWay], ...] = (OneWayConv1d, OneWayConv2d, OneWayConv3d)
"""By dimensions of the kernel, less one."""
