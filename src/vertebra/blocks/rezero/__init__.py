"""ReZero: a residual branch behind one scalar that starts at zero.

x + alpha * branch(x) with alpha = 0: at the start every layer is the identity, its Jacobian too, whatever the depth;
norms and warm-up can go. `Residual` wraps any branch; `EncoderLayer` and `DecoderLayer` are the paper's transformer
layers, whose sublayers share one scalar. `vertebra.surgery.rezero` puts the gate into a network that exists.

Shapes: what the branch keeps. Departs from the paper in nothing.
"""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vertebra.contracts import Check, Effect, Measured
from vertebra.errors import UsageError
from vertebra.paper import Paper

if TYPE_CHECKING:
    from vertebra.data.dataset import Dataset

PAPER = Paper(
    id="rezero",
    title="ReZero is All You Need: Fast Convergence at Large Depth",
    year=2020,
    arxiv="2003.04887",
    reference="majumderb/rezero",
    licence="MIT",
    claim=(
        "one zero-initialised scalar a residual layer trains fully connected nets of thousands of layers and "
        "transformers of over a hundred, and 12-layer transformers on enwiki8 56 % faster"
    ),
    numbers="one scalar a layer; ResNet-56's 27",
    parity="golden outputs of the authors' transformer layers, from the same weights",
    note="Also `vertebra.surgery.rezero`: the gate in any residual network.",
)

VARIANTS: dict[str, dict[str, object]] = {}

Kind = Literal["rezero", "one"]


def rezero(branch: nn.Module, *, start: float = 0.0) -> "Residual":
    """A residual layer around `branch`: x + alpha * branch(x).

    Args:
        branch: keeps the shape of what it is given.
        start: first value of alpha.
    """
    return Residual(branch, start=start)


class Gate(nn.Module):
    """Times one learned scalar, `alpha` of shape (1,)."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x * self.alpha


class Residual(nn.Module):
    """x + alpha * branch(x); build it with `rezero`.

    Attributes:
        branch: the layers.
        gate: the scalar, or None for a plain residual layer.
    """

    def __init__(self, branch: nn.Module, *, start: float = 0.0, gate: Kind = "rezero") -> None:
        super().__init__()
        if gate not in ("rezero", "one"):
            raise UsageError(f"rezero: gate is {gate!r}; it can be rezero or one")
        self.branch = branch
        self.gate = Gate(start) if gate == "rezero" else None

    def forward(self, x: Tensor) -> Tensor:
        """What the branch takes, and gives."""
        return x + (self.branch(x) if self.gate is None else self.gate(self.branch(x)))


class EncoderLayer(nn.Module):
    """The paper's transformer layer: attention and MLP behind one scalar, `resweight` (1,), and no norm.

    Attributes:
        self_attn: attention of all heads.
        linear1: into the hidden width.
        linear2: and back.
        resweight: alpha of both sublayers, 0 at the start.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        hidden: int = 2048,
        dropout: float = 0.1,
        activation: Literal["relu", "gelu"] = "relu",
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        _check(dim, heads, activation)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=batch_first)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation: nn.Module = nn.ReLU() if activation == "relu" else nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.resweight = nn.Parameter(torch.zeros(1))

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Sequences (N, B, dim), or (B, N, dim) with `batch_first`, to the same; masks as `nn.MultiheadAttention`'s."""
        src = src + self._attended(self.self_attn, src, src, src_mask, src_key_padding_mask)
        return src + self._transformed(src)

    def _attended(
        self, attention: nn.Module, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        seen = attention(x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        return self.dropout(self.resweight * seen)

    def _transformed(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.dropout(self.resweight * self.linear2(hidden))


class DecoderLayer(EncoderLayer):
    """An encoder layer with attention to a memory between its two sublayers, behind the same scalar.

    Attributes:
        multihead_attn: attention to the memory.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        hidden: int = 2048,
        dropout: float = 0.1,
        activation: Literal["relu", "gelu"] = "relu",
        batch_first: bool = False,
    ) -> None:
        super().__init__(
            dim, heads=heads, hidden=hidden, dropout=dropout, activation=activation, batch_first=batch_first
        )
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=batch_first)

    def forward(  # type: ignore[override]
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Sequences and memory, (N, B, dim) and (M, B, dim), to sequences."""
        tgt = tgt + self._attended(self.self_attn, tgt, tgt, tgt_mask, tgt_key_padding_mask)
        tgt = tgt + self._attended(self.multihead_attn, tgt, memory, memory_mask, memory_key_padding_mask)
        return tgt + self._transformed(tgt)


def _check(dim: int, heads: int, activation: str) -> None:
    if dim < 1 or heads < 1 or dim % heads:
        raise UsageError(f"rezero: dim is {dim} and heads is {heads}; dim must be a multiple of heads")
    if activation not in ("relu", "gelu"):
        raise UsageError(f"rezero: activation is {activation!r}; it must be relu or gelu")


def jacobian_spectrum(network: nn.Module, x: Tensor) -> Tensor:
    """Singular values of the Jacobian of a network's output by its input at `x`, largest first.

    Equal values mean that no direction of the signal dies or explodes (paper, section 3; of the identity all are 1).

    Args:
        network: of any shape; in evaluation mode.
        x: one input; its numbers squared should fit in memory a few times.
    """
    jacobian: Any = torch.autograd.functional.jacobian(network, x, vectorize=True)
    return torch.linalg.svdvals(jacobian.reshape(-1, x.numel()))


_ARMS = {
    "plain": "no shortcuts",
    "residual": "x + branch(x); the network of convolutions with batch norms",
    "norm": "x + branch(x), normalised behind the sum",
    "rezero": "x + alpha branch(x), no norms but in the convolutional network",
}
_SETTINGS: Mapping[str, Mapping[str, int]] = {
    "toy": {"images": 4000, "size": 16, "epochs": 10, "depth": 1000, "width": 8, "steps": 250, "layers": 120},
    "gpu": {"images": 50_000, "size": 32, "epochs": 10, "depth": 10_000, "width": 16, "steps": 1500, "layers": 120},
}


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> Effect:
    """ReZero beside no shortcuts, plain shortcuts, and norms: how soon deep networks of three kinds learn."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting["images"])

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        from vertebra.blocks.rezero.deep_nets import measured

        return measured(arm, seed, train, test, setting)  # type: ignore[arg-type] # the arms are the forms

    return Effect(
        claim="a scalar that starts at zero lets deep networks learn at once, without norms or warm-up",
        arms=_ARMS,
        baseline="residual",
        metrics=dict.fromkeys(("fc_epochs", "deep_loss", "cnn_steps", "attention_loss", "spread_12", "spread_64"), ""),
        measure=measure,
        checks=lambda found: _checks(found, len(train.classes), setting),
        limits=(
            f"{setting['size']} pixels; epochs of 64 layers of width 256 and steps of ResNet-56 of width "
            f"{setting['width']} end after {setting['epochs']} and {setting['steps']}, and one more is written for "
            "never; the transformer sees patches of images, not the paper's characters"
        ),
        data=words,
    )


def _checks(measured: Measured, classes: int, setting: Mapping[str, int]) -> Sequence[Check]:
    def mean(arm: str, metric: str) -> float:
        return measured.mean(arm, metric)

    epochs, steps = mean("rezero", "fc_epochs"), mean("rezero", "cnn_steps")
    learned = log(classes) - 0.3
    deep = {arm: mean(arm, "deep_loss") for arm in measured.values}
    attention = {arm: mean(arm, "attention_loss") for arm in ("residual", "norm", "rezero")}
    spreads = {n: [mean(arm, f"spread_{n}") for arm in ("rezero", "norm", "residual")] for n in (12, 64)}
    return [
        Check(
            "64 connected layers need at most half of the epochs of plain shortcuts",
            epochs <= 0.5 * mean("residual", "fc_epochs"),
            f"{epochs:.1f} against {mean('residual', 'fc_epochs'):.1f}; with norms {mean('norm', 'fc_epochs'):.1f}",
        ),
        Check(
            "without shortcuts they do not get there",
            mean("plain", "fc_epochs") > setting["epochs"],
            f"{mean('plain', 'fc_epochs'):.1f} epochs",
        ),
        Check(
            f"{setting['depth']} connected layers learn with the gate, and not without",
            deep["rezero"] < learned <= min(deep["plain"], deep["residual"]),
            ", ".join(f"{arm} {loss:.2f}" for arm, loss in deep.items()) + f"; chance is {log(classes):.2f}",
        ),
        Check(
            "ResNet-56 is right half of the time in at most half of the steps",
            steps <= 0.5 * mean("residual", "cnn_steps"),
            f"{steps:.0f} against {mean('residual', 'cnn_steps'):.0f} steps",
        ),
        Check(
            f"a transformer of {setting['layers']} layers learns, and not with norms behind the sums",
            attention["rezero"] < learned <= attention["norm"],
            ", ".join(f"{arm} {loss:.2f}" for arm, loss in attention.items()),
        ),
        Check(
            "directions of the signal stay closer together than with norms, at 12 and 64 layers",
            all(values[0] < values[1] for values in spreads.values()),
            "; ".join(f"{n} layers: {v[0]:.2f}, norms {v[1]:.2f}, neither {v[2]:.2f}" for n, v in spreads.items()),
        ),
    ]
