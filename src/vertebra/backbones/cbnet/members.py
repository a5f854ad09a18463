"""Networks taken apart into stages, so that something can be added to what a stage is given.

A network is known by the names of its parts, and believed only after a proof: stem, stages and pooling, run one after
the other, must do the operations of its own forward pass on tensors of the same shapes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vertebra.backbones.timm import Timm
from vertebra.contracts import Backbone
from vertebra.errors import UsageError
from vertebra.training.cost import evaluating

_COPIES = frozenset(("clone", "_to_copy", "_unsafe_view", "detach", "empty", "empty_like", "contiguous"))

_WORKS = (
    "what works: timm's ResNet family (resnet*, resnext*, res2net*, se*, eca*), Swin (1 and 2) and ConvNeXt (1 and 2),"
    " and our own networks of a stem and plain stages, as cifar_resnet, vovnet and hornet"
)


@dataclass(frozen=True, eq=False)
class Parts:
    """A network in pieces.

    Attributes:
        stem: images to the first signal.
        enters: a module a stage, from the signal of the stage before to the place where something may be added.
        stages: what follows that place.
        norm: over the last signal, where the network has one there; what is pooled has passed it.
        pool: the last signal to pooled features (B, width).
        last: whether signals have their channels last, (B, H, W, C).
    """

    stem: nn.Module
    enters: tuple[nn.Module, ...]
    stages: tuple[nn.Module, ...]
    norm: nn.Module | None
    pool: nn.Module
    last: bool = False


@dataclass(frozen=True)
class Sizes:
    """Channels at the seams of a network.

    Attributes:
        stem: of the stem's output.
        entered: of the signal at the place before each stage where something may be added.
        given: of the output of each stage.
    """

    stem: int
    entered: tuple[int, ...]
    given: tuple[int, ...]


def apart(backbone: Backbone, address: str) -> tuple[Parts, Sizes]:
    """A network's pieces, the network's own modules, and the channels between them.

    Args:
        backbone: of ours or timm's; is not changed.
        address: its name, for messages.

    Raises:
        UsageError: a network whose pieces are not known, or do not make up its forward pass.
    """
    network: Any = backbone.network if isinstance(backbone, Timm) else backbone
    own = _operations(backbone, backbone)
    for parts in _candidates(network, isinstance(backbone, Timm)):
        chain = _Chain(parts)
        try:
            same = _operations(chain, backbone) == own
        except (RuntimeError, TypeError, ValueError, AttributeError):  # modules that do not fit each other
            continue
        if same:
            _check_levels(backbone, chain.sizes, address)
            return parts, chain.sizes
    raise UsageError(f"cbnet: the stages of {address} are not known, so nothing can be linked to them; {_WORKS}")


def _check_levels(backbone: Backbone, sizes: Sizes, address: str) -> None:
    levels = backbone.levels[-len(sizes.given) :]
    if tuple(level.channels for level in levels) != sizes.given:
        raise UsageError(
            f"cbnet: two stages of {address} share a stride, or it ends in a map of another width; {_WORKS}"
        )


def has_batch_norms(parts: Parts) -> bool:
    """Whether there is any; it decides the form of the links."""
    return any(isinstance(module, _BatchNorm) for stage in parts.stages for module in stage.modules())


def map_norm(channels: int, last: bool) -> nn.Module:
    """A fresh norm over channels for signals of a network without batch norms."""
    return nn.LayerNorm(channels) if last else LayerNorm2d(channels)


def _candidates(network: Any, timms: bool) -> Iterator[Parts]:
    """Readings of a network by the names of its parts; none, one, or two that differ in how they pool."""
    for reading in (_residual, _windowed, _staged, _blocked):
        try:
            stem, enters, stages, norm, last = reading(network)
        except AttributeError:
            continue
        for pooled_norm, pool in _pools(network, norm, timms):
            yield Parts(stem, tuple(enters), tuple(stages), pooled_norm, pool, last)


_Reading = tuple[nn.Module, Sequence[nn.Module], Sequence[nn.Module], nn.Module | None, bool]


def _residual(network: Any) -> _Reading:
    """conv1, bn1, act1, maxpool, layer1, layer2, ...: what is added comes before a stage halves the map."""
    stem = nn.Sequential(
        network.conv1, network.bn1, network.act1, *([network.maxpool] if _has(network, "maxpool") else [])
    )
    stages = [getattr(network, f"layer{n}") for n in range(1, 9) if _has(network, f"layer{n}")]
    return stem, [nn.Identity() for _ in stages], stages, None, False


def _windowed(network: Any) -> _Reading:
    """patch_embed, layers, norm, with channels last: what is added comes after the patches of a stage are merged."""
    stages = [nn.Sequential(*layer.blocks) for layer in network.layers]
    return (
        nn.Sequential(network.patch_embed),
        [layer.downsample for layer in network.layers],
        stages,
        network.norm,
        True,
    )


def _staged(network: Any) -> _Reading:
    """Stem and stages; stages that shrink the map by a module of their own, inside or in `downs`, are cut after it."""
    stages, downs = list(network.stages), list(getattr(network, "downs", ()))
    if len(downs) == len(stages):  # the first of them is the stem
        return nn.Sequential(downs[0]), [nn.Identity(), *downs[1:]], stages, None, False
    stem = network.stem if isinstance(network.stem, nn.Sequential) else nn.Sequential(network.stem)
    if downs:
        return stem, [nn.Identity(), *downs], stages, None, False
    if all(_has(stage, "downsample") and _has(stage, "blocks") for stage in stages):
        blocks = [stage.blocks for stage in stages]
        return stem, [stage.downsample for stage in stages], blocks, getattr(network, "norm_pre", None), False
    return stem, [nn.Identity() for _ in stages], stages, getattr(network, "norm_pre", None), False


def _blocked(network: Any) -> _Reading:
    """Stem and a flat list of blocks, the same number a stage."""
    blocks, each = list(network.blocks), network.per_stage
    stages = [nn.Sequential(*blocks[start : start + each]) for start in range(0, len(blocks), each)]
    return network.stem, [nn.Identity() for _ in stages], stages, None, False


def _pools(network: Any, norm: nn.Module | None, timms: bool) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Ways in which the last signal may become pooled features, with the norm that comes before."""
    norm = None if isinstance(norm, nn.Identity) else norm
    if timms:
        yield norm, Headless(network.head) if _has(network, "head") else network.global_pool
    elif _has(network, "norm"):
        yield None, nn.Sequential(Mean(), network.norm)
        yield network.norm, Mean()
    else:
        yield None, Mean()


def _has(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


class Mean(nn.Module):
    """Maps (B, C, H, W) to their means (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over rows and columns."""
        return x.mean((2, 3))


class Headless(nn.Module):
    """A head of timm's up to what its classifier takes."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """The last signal to pooled features (B, width)."""
        return self.head(x, pre_logits=True)


class _Chain(nn.Module):
    """The pieces one after the other; notes the channels between them."""

    sizes: Sizes

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.stem, self.enters, self.stages = parts.stem, nn.ModuleList(parts.enters), nn.ModuleList(parts.stages)
        self.norm, self.pool = parts.norm or nn.Identity(), parts.pool
        self.axis = 3 if parts.last else 1

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        stem, entered, given = x.shape[self.axis], [], []
        for enter, stage in zip(self.enters, self.stages, strict=True):
            x = enter(x)
            entered.append(x.shape[self.axis])
            x = stage(x)
            given.append(x.shape[self.axis])
        self.sizes = Sizes(stem, tuple(entered), tuple(given))
        return self.pool(self.norm(x))


def _operations(network: nn.Module, backbone: Backbone) -> list[tuple[str, list[torch.Size]]]:
    """Operations of an evaluation that compute something, in order, with the shapes that they are given."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    kind = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    with evaluating(network), torch.no_grad(), torch.device("meta"):
        images = torch.empty(1, backbone.preprocess.channels, *backbone.preprocess.size, dtype=kind)
        with _Seen() as seen:
            functional_call(network, shapes, (images,))
    return seen.operations


class _Seen(TorchDispatchMode):
    """Writes down each operation that is neither a view nor a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _COPIES:
            given = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.operations.append((name, given))
        return func(*args, **(kwargs or {}))
