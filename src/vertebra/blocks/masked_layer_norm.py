"""Masked layer norm: a layer norm that knows how many of its channels are in use.

Shapes: (B, ..., dim) in, the same out. A super-network trains many widths with one set of weights: an image of a narrow
one uses the first n channels and has zeros in the rest. Statistics are those of the first n alone, and what comes out
has zeros in the rest again, bias or not: the first n are what a layer norm of n channels gives, with the first n gains
and biases, and so are the gradients. Each image may have an n of its own. Without one it is `torch.nn.LayerNorm`.
Of ViT-ResNAS (arXiv 2109.00642); departs from the paper in nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}


def masked_layer_norm(dim: int, *, eps: float = 1e-6) -> "MaskedLayerNorm":
    """The norm of tokens (B, ..., dim).

    Args:
        dim: channels at full width.
        eps: added to the variance.

    Raises:
        UsageError: fewer than one channel.
    """
    if dim < 1:
        raise UsageError(f"masked_layer_norm: dim is {dim}; it must be at least 1")
    return MaskedLayerNorm(dim, eps=eps)


class MaskedLayerNorm(nn.LayerNorm):
    """Layer norm over the channels in use; build it with `masked_layer_norm`."""

    def forward(self, x: Tensor, keep: int | Tensor | None = None) -> Tensor:
        """Tokens to tokens of the same shape.

        Args:
            x: (B, ..., dim); what lies in channels out of use does not matter.
            keep: channels in use, the first ones: a number for all, or (B,) integers, one an image; None is all.

        Raises:
            UsageError: a number that is not in 1..dim, or numbers of another shape than (B,).
        """
        if keep is None:
            return super().forward(x)
        if isinstance(keep, Tensor):
            return self._each(x, keep)
        dim = x.shape[-1]
        if not 1 <= keep <= dim:
            raise UsageError(f"masked_layer_norm: keep is {keep}; it must be in 1..{dim}")
        kept = layer_norm(x[..., :keep], (keep,), self.weight[:keep], self.bias[:keep], self.eps)
        return pad(kept, (0, dim - keep))

    def _each(self, x: Tensor, keep: Tensor) -> Tensor:
        """Images with a number of channels each, in 32 bit at least, as torch's norm counts in 16 bit."""
        if keep.shape != x.shape[:1]:
            raise UsageError(
                f"masked_layer_norm: keep has shape {tuple(keep.shape)}; it must have one number for each of the"
                f" {len(x)} images"
            )
        counts = keep.view(-1, *(1,) * (x.ndim - 1))  # (B, 1, .., 1)
        used = torch.arange(x.shape[-1], device=x.device) < counts  # (B, 1, .., dim)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).where(used, 0)  # even what is infinite there
        centred = (wide - wide.sum(-1, keepdim=True) / counts).where(used, 0)
        spread = centred.square().sum(-1, keepdim=True) / counts
        normed = centred * (spread + self.eps).rsqrt()
        return torch.addcmul(self.bias * used, normed, self.weight.to(wide.dtype)).to(x.dtype)
