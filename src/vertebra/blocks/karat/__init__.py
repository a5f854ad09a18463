"""Kolmogorov-Arnold attention: a learned operator on the rows of the scores, in place of their softmax.

    karat(192, heads=3, tokens=65)                           tokens (B, 65, 192), with new weights
    karat(layer, tokens=65)                                  takes over the weights of an attention
    swap(backbone, "Attention", "karat", tokens=65)          in a network; `vertebra.surgery.karat` finds `tokens`
    RowOperator(heads=3, tokens=65)(scores)                  by itself, (B, heads, rows, 65) to attention

A row x of scores, one number a token, becomes W y with y_p = sum_q phi_pq(x_q), p = 1..r: r x N functions of one
variable, each `base_weight * b(x) + basis_weight * basis(x)` with its own coefficients, then a linear map of r numbers
to N (arXiv 2503.10632, modular form). No softmax follows: rows may be negative and sum to anything. An attention has at
most rank r, so that its product with values is y (W^T v), and no N x N matrix is made behind the operator.

Ours: two weights a function, which the published counts imply; the wavelets, in their usual forms; W is stored times
sqrt(N) and starts at 1 / sqrt(N r), so that an attention's rows start near length 1; keys that a mask hides neither
enter a row nor are attended to; the functions of a number of tokens are interpolated to another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vertebra.blocks.karat.operator import Base, BasisName, RowOperator
from vertebra.blocks.karat.reading import Heads, heads_of, is_attention, known, positions_of, projected, reader
from vertebra.contracts import Backbone, Check, Effect, Measured
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError, near
from vertebra.paper import Paper

PAPER = Paper(
    id="karat",
    title="Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?",
    year=2025,
    arxiv="2503.10632",
    reference="MaitySubhajit/KArAt",
    licence="CC BY-NC-SA 4.0",
    claim=(
        "learnable attention beats softmax on small ViTs and small data (ViT-Tiny: CIFAR-10 +3.9 points, CIFAR-100 "
        "+2.8), is on par or worse on larger ones, and takes 2.5 to 3 times the GPU memory"
    ),
    numbers="parameters, operations and networks of all six published rows",
    parity="a triple loop over functions, tokens and harmonics; no public code exists",
    note=(
        "Also `vertebra.surgery.karat`, which puts it into ViT, DeiT, ConViT and Swin, and "
        "`vertebra.probes.attention_spectra`. The projection of rows onto the simplex is not there, nor is ViTDet."
    ),
)

VARIANTS = {
    "g3": {"basis": "fourier", "grid": 3},
    "g1": {"basis": "fourier", "grid": 1},
    "rational": {"basis": "rational"},
    "mexican_hat": {"basis": "mexican_hat"},
    "morlet": {"basis": "morlet"},
    "dog": {"basis": "dog"},
    "meyer": {"basis": "meyer"},
    "shannon": {"basis": "shannon"},
}


def karat(
    layer: nn.Module | int,
    variant: str = "g3",
    *,
    tokens: int | None = None,
    heads: int | None = None,
    r: int = 12,
    base: Base = "zero",
    prefix: int | None = None,
    basis: BasisName | None = None,
    grid: int | None = None,
    operator: RowOperator | None = None,
    shared: bool = False,
) -> "KArAttention":
    """An attention whose rows a learned operator makes.

    Args:
        layer: an attention whose projections, heads and norms it takes over (they are the same modules afterwards), or
            the width of tokens for a new one. Known are timm's `Attention` (ViT, DeiT), Swin's `WindowAttention`,
            ConViT's `MHSA` and `GPSA`, whose attention to positions stays, and `vertebra.blocks.attention`'s.
        variant: one of `VARIANTS`; sets basis and grid.
        tokens: keys of the operator, N; windows know theirs.
        heads: of a new attention; one for each 64 channels, at least one, by default.
        r: numbers that a row is reduced to; 12 in the paper.
        base: b of the functions.
        prefix: tokens in front of those of the grid; by default the fewest that leave a square.
        basis: in place of the variant's.
        grid: harmonics of the Fourier basis, in place of the variant's.
        operator: a ready one, of several layers; then `tokens` to `grid` are its own.
        shared: whether another layer holds that operator, so that this one uses it and does not list its parameters.

    Raises:
        UsageError: a layer of another kind, an unknown number of tokens, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"karat has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if isinstance(layer, int):
        layer = _fresh(layer, heads)
    elif heads is not None:
        raise UsageError(f"karat: heads is {heads}, but the {type(layer).__name__} that is taken over has its own")
    if not is_attention(layer):
        raise UsageError(f"karat cannot take over a {type(layer).__name__}; it knows {', '.join(known())}")
    if operator is None:
        found = tokens or getattr(layer, "window_area", None)
        if found is None:
            raise UsageError(
                "karat: the operator belongs to a number of tokens; give tokens=..., or use vertebra.surgery.karat, "
                "which looks at the network"
            )
        given = VARIANTS[variant] | ({"basis": basis} if basis else {}) | ({"grid": grid} if grid is not None else {})
        options: dict[str, Any] = {"r": r, "base": base, "prefix": prefix, **given}
        operator = RowOperator(heads=heads_of(layer), tokens=found, **options)
    return KArAttention(layer, operator, shared=shared)


def _fresh(dim: int, heads: int | None) -> nn.Module:
    from timm.layers.attention import Attention

    heads = max(1, dim // 64) if heads is None else heads
    if dim < 1 or heads < 1 or dim % heads:
        raise UsageError(f"karat: {heads} heads do not divide dim {dim}; take a divisor")
    return Attention(dim, num_heads=heads, qkv_bias=True)


def operations(tokens: int, *, grid: int, r: int = 12) -> int:
    """Multiplications of one head's operator for one image as the paper counts them: (3 grid + 1) N^2 r.

    Three a function and harmonic, m x and the two coefficients, and W; so the published 0.268 G of ViT-Base with one
    harmonic and 0.168 G of ViT-Tiny with three. Here cos(m x) is made once for all functions, and 2 grid N^2 r
    multiplications in a matrix product, 2 N r channels and 2 N^2 cosines and sines are what is left.
    """
    return (3 * grid + 1) * tokens**2 * r


class KArAttention(nn.Module):
    """An attention with a row operator for its softmax; build it with `karat`. Called as the layer it replaces was.

    Attributes:
        layer: the attention taken over; its softmax is not called.
        operator: makes attention of scores.
    """

    operator: RowOperator

    def __init__(self, layer: nn.Module, operator: RowOperator, *, shared: bool = False) -> None:
        super().__init__()
        if heads_of(layer) != operator.heads:
            raise UsageError(f"karat: the operator has {operator.heads} heads, the layer {heads_of(layer)}")
        self.layer, self._read = layer, reader(layer)
        if shared:
            self.__dict__["operator"] = operator  # its parameters belong to one part of a network
        else:
            self.operator = operator

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """Tokens (B, N, dim), and what else the layer takes, to (B, N, dim)."""
        layer: Any = self.layer
        heads = self._read(layer, x, *given, **named)
        dropped = layer.attn_drop if isinstance(getattr(layer, "attn_drop", None), nn.Dropout) else None
        share = dropped.p if dropped else getattr(layer, "drop", 0.0)
        if heads.keep is None and (not self.training or share == 0):
            y = self._by_rank(heads)
        else:
            y = nn.functional.dropout(self._made(heads), share, self.training) @ heads.v
        if hasattr(layer, "gating_param"):
            y = self._with_positions(y, heads)
        return projected(layer, x, y.permute(1, 2, 0, 3).flatten(2).view(*x.shape[:-1], -1))

    def attention(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """What the values are multiplied by, (B, heads, N, N), without dropout."""
        heads = self._read(self.layer, x, *given, **named)
        found = self._made(heads)
        if hasattr(self.layer, "gating_param"):
            share, positions = positions_of(self.layer, heads)
            found = (1 - share) * found + share * positions
        return found.transpose(0, 1)

    def _made(self, heads: Heads) -> Tensor:
        """The operator's attention, heads first."""
        keep = None if heads.keep is None else heads.keep.transpose(0, 1)
        return self.operator(heads.scores().transpose(0, 1), keep).transpose(0, 1)

    def _by_rank(self, heads: Heads) -> Tensor:
        """Attention times values, (heads, B, N, d), without the attention."""
        scores = heads.scores()
        reduced = self.operator.reduced(scores.flatten(1, 2)).unflatten(1, scores.shape[1:3])  # (heads, B, N, r)
        return reduced @ (self.operator.mixed(scores)[:, None] @ heads.v)

    def _with_positions(self, y: Tensor, heads: Heads) -> Tensor:
        share, positions = positions_of(self.layer, heads)
        return (1 - share) * y + share * (positions @ heads.v)


_ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("as in ViT", {}),
    "g3b": ("3 harmonics, blockwise, base zero, r 12", {}),
    "g3u": ("the same operators in all blocks", {"mode": "universal"}),
    "g1b": ("1 harmonic", {"grid": 1}),
    "silu": ("base SiLU", {"base": "silu"}),
    "r4": ("r 4", {"r": 4}),
}


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: a ViT of 3 heads, pixels, images, epochs, the peak rate."""

    dim: int
    depth: int
    patch: int
    size: int
    images: int
    epochs: int
    lr: float


_SETTINGS = {"toy": _Setting(48, 3, 4, 24, 2000, 18, 1e-3), "gpu": _Setting(192, 12, 16, 224, 50_000, 10, 5e-4)}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """A small ViT with learned operators beside the same one with softmax, and four changes of the operator."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="in a small ViT and with few images, a learned operator on the rows is at least as good as softmax",
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="softmax",
        metrics={"top1": "%", "nll": "", "loss": "", "rank": "", "added": "%"},
        measure=measure,
        checks=_checks,
        limits=(
            f"a ViT of {setting.depth} blocks, width {setting.dim}, {(setting.size // setting.patch) ** 2 + 1} tokens,"
            f" and {setting.epochs} epochs where the paper takes 100 at 197 tokens: it shows how both begin to"
            " learn, not where they end; rank is the effective rank of attention on test images"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import added, trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    plain = _vit(setting)
    backbone = plain if arm == "softmax" else _operated(plain, **_ARMS[arm][1])
    plan = Plan(epochs=setting.epochs, batch=64, lr=setting.lr, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    measured = {name: scores[name] for name in ("top1", "nll", "loss")}
    return measured | {"rank": _rank(backbone, test), "added": added(backbone, plain)}


def _vit(setting: _Setting) -> Backbone:
    from vertebra.backbones.timm import timm

    network = {"patch_size": setting.patch, "embed_dim": setting.dim, "depth": setting.depth, "num_heads": 3}
    return timm("vit_tiny_patch16_224", image_size=setting.size, network=network)


def _operated(backbone: Backbone, *, mode: Literal["blockwise", "universal"] = "blockwise", **options: Any) -> Backbone:
    from vertebra.surgery.karat import karat as operate

    found = operate(backbone, mode, **options).model
    assert isinstance(found, Backbone)
    return found


def _rank(backbone: Backbone, test: Split) -> float:
    """Mean effective rank of the attentions of a few test images."""
    from vertebra.data.pixels import Pixels, normalised
    from vertebra.probes.attention_spectra import attention_spectra

    few = test.select(np.arange(min(64, len(test))))
    images = normalised(Pixels.of(few, backbone.preprocess, None).array, backbone.preprocess)
    images = images.to(next(backbone.parameters()).device)
    return float(torch.stack([spectrum.rank_after for spectrum in attention_spectra(backbone.eval(), images)]).mean())


def _checks(measured: Measured) -> Sequence[Check]:
    gain = measured.gain("g3b", "softmax", "top1")
    words = ", ".join(f"{arm} {measured.mean(arm, 'top1'):.2f}" for arm in measured.values)
    return [
        Check(
            "three harmonics, blockwise, are at most 1 point below softmax",
            bool(gain.mean() >= -1),
            f"{gain.mean():+.2f} points (seeds: {', '.join(f'{each:+.2f}' for each in gain)}); all arms: {words}",
        ),
        Check(
            "they are above softmax, as the paper has it for ViT-Tiny on CIFAR-10 (+3.9)",
            bool(gain.mean() > 0),
            f"{gain.mean():+.2f} points, standard deviation {gain.std(ddof=1) if len(gain) > 1 else 0:.2f}",
        ),
    ]
