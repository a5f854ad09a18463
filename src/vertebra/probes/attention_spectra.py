"""What attention does to its scores, as singular values, and how the loss looks around a network's weights.

No page: functions for any network with attention that `vertebra.blocks.karat` knows (ViT, DeiT, ConViT, Swin, our own),
with softmax or a learned operator. Spectra, maps and landscapes are the analyses of arXiv 2503.10632.

    attention_spectra(backbone, images)[0].rank_after       effective rank of each head of the first attention
    attention_maps(backbone, images)[0].after               its maps, (B, heads, N, N)
    landscape(model, lambda: loss(model(images)))           the loss on a plane of two random directions
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.blocks.karat import KArAttention
from vertebra.blocks.karat.reading import is_attention, positions_of, reader
from vertebra.errors import UsageError
from vertebra.surgery.operation import kinds, listed


@dataclass(frozen=True)
class Maps:
    """One attention's maps; of windows, B counts windows of images.

    Attributes:
        name: of the attention in the network.
        before: scores with their biases, (B, heads, N, N); 0 where a mask hides a key.
        after: what values are multiplied by, (B, heads, N, N): softmax of the scores, or the operator's rows.
    """

    name: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one attention, means over the images.

    Attributes:
        name: of the attention in the network.
        before: of the scores, (heads, N), largest first.
        after: of the attention, (heads, N).
        rank_before: effective rank of the scores, (heads,), 1..N.
        rank_after: effective rank of the attention, (heads,), 1..N.
    """

    name: str
    before: Tensor
    after: Tensor
    rank_before: Tensor
    rank_after: Tensor


def attention_spectra(network: nn.Module, images: Tensor) -> tuple[Spectrum, ...]:
    """Singular values before and after softmax or operator, an attention at a time, in the order of the signal.

    Args:
        network: in evaluation mode.
        images: (B, channels, H, W).

    Raises:
        UsageError: no attention that is known, or a network in training mode.
    """
    return tuple(_spectrum(maps) for maps in attention_maps(network, images))


def attention_maps(network: nn.Module, images: Tensor) -> tuple[Maps, ...]:
    """Scores and attention of every attention in the order of the signal; the same one may come more than once.

    Raises:
        UsageError: no attention that is known, or a network in training mode.
    """
    if network.training:
        raise UsageError("attention_maps: the network is in training mode, which drops things; call eval() first")
    layers = _attentions(network)
    if not layers:
        raise UsageError(
            f"attention_maps: the {type(network).__name__} has no attention that is known; it has "
            f"{listed(kinds(network))}"
        )
    found: list[Maps] = []

    def note(name: str) -> Callable[..., None]:
        return lambda layer, given, named: found.append(_maps(name, layer, *given, **named))

    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found)


def effective_rank(values: Tensor) -> Tensor:
    """Effective rank of singular values (..., N): exp of the entropy of their shares (Roy and Vetterli, 2007), 1..N."""
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()


def _spectrum(maps: Maps) -> Spectrum:
    before, after = (torch.linalg.svdvals(each.double()) for each in (maps.before, maps.after))
    ranks = (effective_rank(values).mean(0) for values in (before, after))
    return Spectrum(maps.name, before.mean(0), after.mean(0), *ranks)


def _attentions(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> attention; those inside of a Kolmogorov-Arnold attention do not run."""
    ours = {name: layer for name, layer in network.named_modules() if isinstance(layer, KArAttention)}
    others = {name: m for name, m in network.named_modules() if is_attention(m)}
    return ours | {name: layer for name, layer in others.items() if name.rpartition(".")[0] not in ours}


def _maps(name: str, layer: nn.Module, *given: Any, **named: Any) -> Maps:
    inner = layer.layer if isinstance(layer, KArAttention) else layer
    heads = reader(inner)(inner, *given, **named)
    scores = heads.scores()
    shown = scores if heads.keep is None else scores.masked_fill(~heads.keep, 0.0)
    if isinstance(layer, KArAttention):
        return Maps(name, shown.transpose(0, 1), layer.attention(*given, **named))
    hidden = scores if heads.keep is None else scores.masked_fill(~heads.keep, float("-inf"))
    after = hidden.softmax(-1)
    if hasattr(layer, "gating_param"):
        share, positions = positions_of(layer, heads)
        after = (1 - share) * after + share * positions
    return Maps(name, shown.transpose(0, 1), after.transpose(0, 1))


def landscape(
    model: nn.Module, loss: Callable[[], Tensor], *, radius: float = 1.0, steps: int = 11, seed: int = 0
) -> Tensor:
    """The loss on a plane through the weights, along two random directions scaled filter by filter (arXiv 1712.09913).

    Each direction has, in every filter (a row of a weight; a bias or norm stays), the length of the weights there. Draw
    contours or slices of it; a row through the middle is one slice.

    Args:
        model: its weights move and come back.
        loss: () -> scalar, of `model` as it is then, in evaluation mode and on the same images every time.
        radius: farthest step along a direction; 1 is the weights' own length.
        steps: points along each direction; odd ones have the weights themselves in the middle.
        seed: of the directions.

    Returns:
        (steps, steps) float64: rows along the first direction, columns along the second.

    Raises:
        UsageError: a model in training mode, fewer than two steps, or a radius that is not above 0.
    """
    if model.training:
        raise UsageError("landscape: the model is in training mode, which moves statistics; call eval() first")
    if steps < 2 or radius <= 0:
        raise UsageError(f"landscape: steps is {steps} and radius {radius}; they must be at least 2 and above 0")
    draw = torch.Generator().manual_seed(seed)
    weights = [p for p in model.parameters() if p.ndim > 1]
    directions = [[_direction(weight, draw) for weight in weights] for _ in range(2)]
    places = torch.linspace(-radius, radius, steps, dtype=torch.float64).tolist()
    found = torch.empty(steps, steps, dtype=torch.float64)
    with torch.no_grad(), _restored(weights) as start:
        for row, along in enumerate(places):
            for column, across in enumerate(places):
                for weight, origin, first, second in zip(weights, start, *directions, strict=True):
                    weight.copy_(origin + along * first + across * second)
                found[row, column] = loss().double()
    return found


def _direction(weight: Tensor, draw: torch.Generator) -> Tensor:
    """Normal noise with the length of the weights in each filter."""
    noise = torch.randn(weight.shape, generator=draw).to(weight)
    over = list(range(1, weight.ndim))
    lengths = [torch.linalg.vector_norm(each.detach(), dim=over, keepdim=True) for each in (weight, noise)]
    return noise * lengths[0] / lengths[1]


@contextmanager
def _restored(weights: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    start = [weight.detach().clone() for weight in weights]
    try:
        yield start
    finally:
        for weight, origin in zip(weights, start, strict=True):
            weight.data.copy_(origin)
