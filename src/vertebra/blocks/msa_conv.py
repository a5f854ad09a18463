"""MSA-Conv: self-attention over the window of a convolution, and then the convolution.

Shapes: (B, C, H, W) in, (B, outputs, H / stride, W / stride) out, of any size. A 1 x 1 convolution makes queries, keys
and values; each cell attends to the k x k cells around it (dilated or not), the shortcut is added, and a k x k
convolution with a rectifier follows. Keys beyond the border are zeros and take part in the softmax, as in the authors'
operator; `border="masked"` leaves them out. There is no table of positions, so weights fit every size of map.
Used alone, through `vertebra.surgery.swap` (`msa_conv_for` takes the place of an `nn.Conv2d`), and in
`vertebra.backbones.tic`. The operator of TiC (arXiv 2310.04134). Heads, the cyclic shift and the pooling are made after
the paper's abstract: its authors published the operator alone, with one head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import avg_pool2d, dropout, interpolate, pad

from vertebra.errors import UsageError, near
from vertebra.parity import convert

VARIANTS: dict[str, dict[str, object]] = {
    "standard": {},
    "masked": {"border": "masked"},
    "dilated": {"dilation": 2},
    "depthwise": {"form": "depthwise"},
    "shifted": {"shift": "back"},
    "pooled": {"pooling": "average"},
}

Form = Literal["standard", "depthwise"]
Border = Literal["zeros", "masked"]
Shift = Literal["none", "back", "open"]
Pooling = Literal["none", "average"]

_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))


class MsaConvOptions(TypedDict, total=False):
    """Options of `msa_conv`.

    Attributes:
        outputs: channels that come out; None, the default, takes `channels`.
        kernel: odd side in cells of the window, and of the convolution behind it; 3 by default.
        stride: of that convolution.
        dilation: cells from one key of a window to the next.
        heads: of the attention, a divisor of `channels`; 1 by default, as in the authors' code.
        form: "depthwise" has a head for each channel and a depthwise convolution; `outputs` is then `channels`.
        dropout: of attention weights, 0..1; 0.1 by default.
        border: keys beyond the map are "zeros", as published, or "masked".
        shift: keys and values of each group of channels move by one window in the group's direction, round the edge
            ("none", the default, leaves them). "back" moves what comes out back to where its values lay, so that a
            group is weighed as a distant cell asks; "open" leaves it, so that a cell looks at distant windows.
        directions: groups of the shift, 4 (straight) or 8 (and diagonal, the default); a divisor of `channels`.
        pooling: "average" runs the attention on the map pooled by `kernel` as well, and adds what it gives.
    """

    outputs: int | None
    kernel: int
    stride: int
    dilation: int
    heads: int
    form: Form
    dropout: float
    border: Border
    shift: Shift
    directions: int
    pooling: Pooling


def msa_conv(channels: int, variant: str = "standard", **options: Unpack[MsaConvOptions]) -> "MSAConv":
    """The layer for maps of `channels`.

    Args:
        channels: of the maps.
        variant: one of `VARIANTS`.
        options: as in `MsaConvOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, an even kernel, or other options out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"msa_conv has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    return MSAConv(channels, **{**VARIANTS[variant], **options})  # type: ignore[arg-type]


def msa_conv_for(layer: nn.Conv2d, **options: Unpack[MsaConvOptions]) -> "MSAConv":
    """The layer in the place of a convolution, whose weights the convolution inside takes over.

    `swap(network, "Conv2d", msa_conv_for)` works where every convolution has an odd square kernel that keeps the size
    but for its stride; a pattern keeps others out. A depthwise convolution gets the depthwise form, and a bias is lost.

    Args:
        layer: the convolution.
        options: further ones of `msa_conv`.

    Raises:
        UsageError: a convolution that the layer cannot stand for.
    """
    square = all(len(set(sides)) == 1 for sides in (layer.kernel_size, layer.stride, layer.dilation))
    (kernel, _), (stride, _), (dilation, _) = layer.kernel_size, layer.stride, layer.dilation
    keeps = layer.padding in ("same", (dilation * (kernel - 1) // 2,) * 2) and layer.padding_mode == "zeros"
    depthwise = 1 < layer.groups == layer.in_channels == layer.out_channels
    if not (square and kernel % 2 and keeps and (depthwise or layer.groups == 1)):
        raise UsageError(
            f"msa_conv_for: it cannot stand for {layer}; it needs an odd square kernel, padding with zeros that keeps"
            " the size but for the stride, and one group or as many as channels"
        )
    sizes = {"outputs": layer.out_channels, "kernel": kernel, "stride": stride, "dilation": dilation}
    given: Any = {**sizes, "form": "depthwise" if depthwise else "standard", **options}
    made = msa_conv(layer.in_channels, **given)
    made.conv.load_state_dict({"weight": layer.weight.detach()})
    return made


def published(state: Mapping[str, Tensor], layer: "MSAConv") -> dict[str, Tensor]:
    """Weights of the authors' layer (zs670980918/MSA-Conv) under our names.

    Raises:
        ParityError: they are of another layer.
    """
    return convert(state, [(r"^qkv_conv\.", "attention.qkv."), (r"^mlp\.", "conv.")], layer)


class MSAConv(nn.Module):
    """Window attention with its shortcut, a convolution, a rectifier; build it with `msa_conv`.

    Attributes:
        attention: keeps channels and size.
        conv: behind it, with the stride.
    """

    def __init__(
        self,
        channels: int,
        *,
        outputs: int | None = None,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        heads: int = 1,
        form: Form = "standard",
        dropout: float = 0.1,
        border: Border = "zeros",
        shift: Shift = "none",
        directions: int = 8,
        pooling: Pooling = "none",
    ) -> None:
        outputs, depthwise = outputs or channels, form == "depthwise"
        heads = channels if depthwise else heads
        _check(channels, kernel, heads, dropout, stride=stride, dilation=dilation, outputs=outputs)
        _check_words(form=(form, Form), border=(border, Border), shift=(shift, Shift), pooling=(pooling, Pooling))
        if depthwise and outputs != channels:
            raise UsageError(f"msa_conv: outputs is {outputs}; of the depthwise form it must be channels, {channels}")
        if shift != "none" and (directions not in (4, 8) or channels % directions):
            raise UsageError(
                f"msa_conv: directions is {directions} with {channels} channels; it must be 4 or 8 and divide them"
            )
        super().__init__()
        window = Window(kernel, dilation, border)
        self.attention = LocalAttention(
            channels, window, heads=heads, dropout=dropout, shift=shift, directions=directions, pooling=pooling
        )
        groups = channels if depthwise else 1
        self.conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps (B, outputs, H / stride, W / stride), rounded up."""
        return self.conv(self.attention(x) + x).relu_()


def _check(channels: int, kernel: int, heads: int, dropout: float, **sizes: int) -> None:
    for name, value in {"channels": channels, "heads": heads, **sizes}.items():
        if value < 1:
            raise UsageError(f"msa_conv: {name} is {value}; it must be at least 1")
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"msa_conv: kernel is {kernel}; it must be odd and at least 1")
    if channels % heads:
        raise UsageError(f"msa_conv: heads is {heads} with {channels} channels; it must divide them")
    if not 0 <= dropout < 1:
        raise UsageError(f"msa_conv: dropout is {dropout}; it must be in [0, 1), as 0.1")


def _check_words(**words: tuple[str, Any]) -> None:
    for name, (value, allowed) in words.items():
        if value not in get_args(allowed):
            raise UsageError(f"msa_conv: {name} is {value!r}; it can be {', '.join(get_args(allowed))}")


@dataclass(frozen=True)
class Window:
    """The cells that a cell attends to.

    Attributes:
        kernel: odd side in keys.
        dilation: cells from one key to the next.
        border: what keys beyond the map are.
    """

    kernel: int
    dilation: int = 1
    border: Border = "zeros"

    @property
    def reach(self) -> int:
        """Cells from the centre to the last key; what a map is padded by."""
        return self.dilation * (self.kernel - 1) // 2

    @property
    def extent(self) -> int:
        """Side in cells."""
        return 2 * self.reach + 1

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        """Maps as each key of the windows meets them, row by row: k * k maps (..., H, W), zeros beyond the border."""
        height, width = x.shape[-2:]
        x = pad(x, (self.reach,) * 4)
        for row in range(0, self.extent, self.dilation):
            for column in range(0, self.extent, self.dilation):
                yield x[..., row : row + height, column : column + width]

    def shifts(self, width: int) -> list[int]:
        """How far along the padded rows of a map, laid end to end, each key lies from its window's first one."""
        steps = range(0, self.extent, self.dilation)
        return [row * (width + 2 * self.reach) + column for row in steps for column in steps]

    def beyond(self, height: int, width: int, device: torch.device) -> Tensor:
        """Whether a key lies beyond the map, (k * k, 1, 1, H, W)."""
        steps = torch.arange(-self.reach, self.reach + 1, self.dilation, device=device)
        rows = steps[:, None] + torch.arange(height, device=device)  # (k, H)
        columns = steps[:, None] + torch.arange(width, device=device)  # (k, W)
        down, across = (rows < 0) | (rows >= height), (columns < 0) | (columns >= width)
        return (down[:, None, :, None] | across[None, :, None, :]).flatten(0, 1)[:, None, None]


class LocalAttention(nn.Module):
    """Attention of each cell over its window, with the two mechanisms that widen its field.

    Attributes:
        qkv: queries, keys and values, in this order.
    """

    def __init__(
        self,
        channels: int,
        window: Window,
        *,
        heads: int = 1,
        dropout: float = 0.0,
        shift: Shift = "none",
        directions: int = 8,
        pooling: Pooling = "none",
    ) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.window, self.heads, self.dropout = window, heads, dropout
        self.shift: Shift = shift
        self.directions, self.pooling = _DIRECTIONS[:directions], pooling

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape; the shortcut is the caller's."""
        q, k, v = self.qkv(x).chunk(3, 1)
        moved = (k, v) if self.shift == "none" else (self._rolled(k, 1), self._rolled(v, 1))
        out = self._attended(q, *moved)
        if self.shift == "back":
            out = self._rolled(out, -1)
        return out if self.pooling == "none" else out + self._pooled(q, k, v)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = self.dropout if self.training else 0.0
        return attend_around(q, k, v, self.window, heads=self.heads, drop=drop)

    def _rolled(self, x: Tensor, sign: int) -> Tensor:
        """Each group of channels moved by one window in its direction, or back."""
        by = sign * self.window.extent
        groups = zip(x.chunk(len(self.directions), 1), self.directions, strict=True)
        return torch.cat([group.roll((by * down, by * across), (2, 3)) for group, (down, across) in groups], 1)

    def _pooled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention on the map pooled by the kernel, brought back to the size of the map."""
        side, (height, width) = self.window.kernel, q.shape[2:]
        q, k, v = (avg_pool2d(x, side, ceil_mode=True, count_include_pad=False) for x in (q, k, v))
        wide = interpolate(self._attended(q, k, v), scale_factor=side, mode="nearest")
        return wide[:, :, :height, :width]


def attend_around(q: Tensor, k: Tensor, v: Tensor, window: Window, *, heads: int = 1, drop: float = 0.0) -> Tensor:
    """Attention of each cell to the keys of its window, with a softmax over them.

    Args:
        q: queries (B, C, H, W).
        k: keys, likewise.
        v: values, likewise.
        window: around each cell.
        heads: a divisor of C; logits are scaled by (C / heads) ** -0.5.
        drop: probability that a weight is dropped, 0..1.

    Returns:
        (B, C, H, W) in the number format and layout of `q`. Derivatives are of first order.
    """
    if q.is_meta:
        return _as_products(q, k, v, window, heads)
    q = q * (q.shape[1] // heads) ** -0.5
    if torch.compiler.is_compiling():
        return plain_attend(q, k, v, window, heads, drop)
    out: Any = _Attended.apply(q, k, v, window, heads, drop)
    return out


def _as_products(q: Tensor, k: Tensor, v: Tensor, window: Window, heads: int) -> Tensor:
    """Shapes alone, as the matrix products that a counter of multiply-accumulates knows."""
    keys, values = (
        torch.stack(list(window.taps(x)), -1).unflatten(1, (heads, -1)).movedim(2, -2) for x in (k, v)
    )  # (B, heads, H, W, c, k * k)
    weights = q.unflatten(1, (heads, -1)).movedim(2, -1)[..., None, :] @ keys
    return (weights @ values.mT).squeeze(-2).movedim(-1, 2).flatten(1, 2)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, window: Window, heads: int, drop: float = 0.0) -> Tensor:
    """`attend_around` of scaled queries by operations that a compiler fuses and exports; slow to train without one."""
    parts = q.unflatten(1, (heads, -1))  # (B, heads, c, H, W)
    logits = torch.stack([(parts * key.unflatten(1, (heads, -1))).sum(2) for key in window.taps(k)])
    if window.border == "masked":
        logits = logits.masked_fill(window.beyond(q.shape[2], q.shape[3], q.device), float("-inf"))
    weights = dropout(logits.softmax(0).to(q.dtype), drop)  # (k * k, B, heads, H, W)
    out = torch.zeros_like(parts)
    for value, weight in zip(window.taps(v), weights.unbind(), strict=True):
        out = out + value.unflatten(1, (heads, -1)) * weight[:, :, None]
    return out.flatten(1, 2)


class _Attended(Function):
    """The same, key by key: each of the k * k steps reads whole maps where they lie, and nothing is unfolded.

    Maps are padded and their rows laid end to end, so that a key is a shift and every operation runs over long lines.
    The margins of the rows are computed too, and cropped. The gradients take the same steps; torch's own would
    keep k * k products of maps.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: Window, heads: int, drop: float) -> Tensor:
        result = torch.empty_like(q)
        q = _lines(q, heads, window.reach, centred=False)
        k, v = (_lines(x, heads, window.reach) for x in (k, v))
        shifts, (height, width) = window.shifts(result.shape[3]), result.shape[2:]
        weights = _correlate(q, k, shifts)
        if window.border == "masked":
            _grid(weights, height)[..., :width].masked_fill_(window.beyond(height, width, q.device), float("-inf"))
        weights = weights.softmax(0).to(q.dtype)  # automatic mixed precision gives 32 bit
        keep = torch.empty_like(weights).bernoulli_(1 - drop).div_(1 - drop) if drop else None
        out = torch.zeros_like(q)
        for shift, weight in zip(shifts, _times(weights, keep).unbind(), strict=True):
            out.addcmul_(v[..., shift : shift + q.shape[3]], weight[:, :, None])
        ctx.save_for_backward(q, k, v, weights, keep)
        ctx.shifts, ctx.reach, ctx.sides = shifts, window.reach, (height, width)
        return result.copy_(_grid(out, height)[..., :width].flatten(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, weights, keep), shifts = ctx.saved_tensors, ctx.shifts
        grad = _lines(grads[0], q.shape[1], ctx.reach, centred=False)
        moved = _times(_correlate(grad, v, shifts), keep)  # of the weights
        moved = moved.sub_((moved * weights).sum(0)).mul_(weights)  # of the logits
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        steps = zip(shifts, moved[:, :, :, None].unbind(), _times(weights, keep)[:, :, :, None].unbind(), strict=True)
        for shift, logit, weight in steps:
            place = slice(shift, shift + q.shape[3])
            grad_v[..., place].addcmul_(grad, weight)
            grad_q.addcmul_(k[..., place], logit)
            grad_k[..., place].addcmul_(q, logit)
        reach, (height, width) = ctx.reach, ctx.sides
        rows, columns = slice(reach, reach + height), slice(reach, reach + width)
        grad_k, grad_v = (_grid(x, height + 2 * reach + 1)[..., rows, columns].flatten(1, 2) for x in (grad_k, grad_v))
        return _grid(grad_q, height)[..., :width].flatten(1, 2), grad_k, grad_v, None, None, None


def _lines(x: Tensor, heads: int, reach: int, *, centred: bool = True) -> Tensor:
    """Maps (B, C, H, W) to lines (B, heads, c, rows * (W + 2 * reach)), zeros in the margins.

    Centred ones have rows above and below; the others have their margin on the right alone.
    """
    batch, channels, height, width = x.shape
    above = reach if centred else 0
    rows = height + (2 * reach + 1 if centred else 0)  # one more, since the last shift reaches beyond its row
    room = x.new_zeros(batch, channels, rows, width + 2 * reach)
    room[:, :, above : above + height, above : above + width] = x
    return room.view(batch, heads, channels // heads, -1)


def _grid(lines: Tensor, rows: int) -> Tensor:
    return lines.unflatten(3, (rows, -1))


def _times(weights: Tensor, keep: Tensor | None) -> Tensor:
    return weights if keep is None else weights * keep


def _correlate(q: Tensor, k: Tensor, shifts: Sequence[int]) -> Tensor:
    """Products of lines (B, heads, c, n) with longer ones at each shift, summed over c: (shifts, B, heads, n)."""
    out, products = q.new_empty(len(shifts), *q.shape[:2], q.shape[3]), torch.empty_like(q)
    for shift, found in zip(shifts, out.unbind(), strict=True):
        torch.sum(torch.mul(q, k[..., shift : shift + q.shape[3]], out=products), 2, out=found)
    return out
