"""Queries, keys, values and masks of the attentions that Kolmogorov-Arnold attention takes over."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError

MASKED = -50.0
"""An additive mask below this hides a key, as Swin's -100 does; above, it is a bias."""


class Heads(NamedTuple):
    """What an attention makes of tokens, heads first.

    Attributes:
        q: (heads, B, N, d), scaled.
        k: (heads, B, N, d).
        v: (heads, B, N, d).
        bias: added to the scores, (heads or 1, B or 1, N, N).
        keep: (heads or 1, B, N, N), True where a key is seen.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    keep: Tensor | None = None

    def scores(self) -> Tensor:
        """(heads, B, N, N), before anything makes attention of them."""
        found = self.q @ self.k.mT
        return found if self.bias is None else found + self.bias


def is_attention(layer: nn.Module) -> bool:
    """Whether `karat` can take a layer over: one of the kinds that it knows, with the forward of its kind."""
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in _readers())


def known() -> list[str]:
    """Names of the kinds."""
    return list(dict.fromkeys(f"{kind.__module__.partition('.')[0]}'s {kind.__name__}" for kind in _readers()))


def heads_of(layer: Any) -> int:
    """Heads of an attention."""
    return layer.num_heads if hasattr(layer, "num_heads") else layer.heads


def reader(layer: nn.Module) -> Callable[..., Heads]:
    """What makes `Heads` of (an attention that `is_attention`, its inputs)."""
    return next(found for kind, found in _readers().items() if isinstance(layer, kind))


@cache
def _readers() -> Mapping[type[nn.Module], Callable[..., Heads]]:
    """Kinds of attention, and what reads their inputs."""
    from timm.layers.attention import Attention as TimmAttention
    from timm.models.convit import GPSA, MHSA
    from timm.models.swin_transformer import WindowAttention

    from vertebra.blocks.attention import Attention

    return {TimmAttention: _read, WindowAttention: _read, MHSA: _read, GPSA: _read_gated, Attention: _read_own}


def _split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * heads * d) to parts of (heads, B, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 3, 0, 1, 4).unbind(0)


def _read(
    layer: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, mask: Tensor | None = None
) -> Heads:
    if is_causal:
        raise UsageError("karat: is_causal has no meaning for an operator of all keys; give attn_mask")
    q, k, v = _split(layer.qkv(x), 3, layer.num_heads)
    if hasattr(layer, "q_norm"):
        q, k = layer.q_norm(q), layer.k_norm(k)
    windows = layer._get_rel_pos_bias().transpose(0, 1) if hasattr(layer, "_get_rel_pos_bias") else None
    bias, keep = _masks(mask if attn_mask is None else attn_mask, len(x), x.shape[1])
    both = windows if bias is None else bias if windows is None else windows + bias
    return Heads(q * layer.scale, k, v, both, keep)


def _masks(mask: Tensor | None, images: int, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask (N, N), (G, N, N) or (B, heads or 1, N, N) as bias and as what is seen, heads first; None for neither.

    G groups of an image are neighbours along the batch. A mask of numbers is a bias, and hides what is below `MASKED`.
    """
    if mask is None:
        return None, None
    mask = mask if mask.ndim == 4 else mask.expand(1, tokens, tokens)[:, None] if mask.ndim == 2 else mask[:, None]
    mask = mask.repeat(images // len(mask), 1, 1, 1).expand(-1, -1, tokens, tokens).transpose(0, 1)
    if mask.dtype == torch.bool:
        return None, mask
    keep = mask > MASKED
    return mask.masked_fill(~keep, 0.0), keep


def _read_gated(layer: Any, x: Tensor) -> Heads:
    q, k = _split(layer.qk(x), 2, layer.num_heads)
    return Heads(q * layer.scale, k, _split(layer.v(x), 1, layer.num_heads)[0])


def _read_own(
    layer: Any, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, angles: Tensor | None = None
) -> Heads:
    from vertebra.blocks.positions import rotated

    groups = x.flatten(0, -3)  # (B * G, N, dim)
    q, k, v = _split(layer.qkv(groups), 3, layer.heads)
    if angles is not None:
        q, k = rotated(q, angles), rotated(k, angles)
    seen = _masks(mask, len(groups), groups.shape[1])[1]
    return Heads(q * layer.scale, k, v, None if bias is None else bias[:, None], seen)


def positions_of(layer: Any, heads: Heads) -> tuple[Tensor, Tensor]:
    """ConViT's gate (heads, 1, 1, 1), and its attention to positions (heads, 1, N, N)."""
    count = heads.q.shape[2]
    if layer.rel_indices.shape[1] != count:
        layer.rel_indices = layer.get_rel_indices(count)
    positions = layer.pos_proj(layer.rel_indices).softmax(2).permute(3, 0, 1, 2)
    return layer.gating_param.sigmoid().view(-1, 1, 1, 1), positions


def projected(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a layer does behind its attention, as far as it has it."""
    y = layer.norm(y) if hasattr(layer, "norm") else y
    if getattr(layer, "gate", None) is not None:
        y = y * layer.gate(x).sigmoid()
    return layer.proj_drop(layer.proj(y)) if hasattr(layer, "proj_drop") else layer.proj(y)
