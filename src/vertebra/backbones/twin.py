"""A network's twin on the meta device, where building and running compute shapes only.

What `vertebra.backbones.timm` declares of a network is measured here: the channels and strides of its maps,
the width of its pooled features, the order in which the signal meets its parts. Nothing real is touched.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import log2
from typing import Any, get_type_hints

import torch
from timm import create_model
from timm.models import model_entrypoint
from torch import Tensor, nn

from vertebra.contracts import Features, Level

Size = tuple[int, int]

FAILURES = (AssertionError, RuntimeError, ValueError, TypeError)
"""What timm's networks raise where they cannot be built as asked or cannot run on an image."""


@dataclass(frozen=True)
class Blueprint:
    """A call of timm's constructor that can be made more than once: for the network and for its twins.

    Attributes:
        name: timm's name, with its tag if there is one.
        channels: image channels.
        size: (height, width) in pixels that the network is measured at.
        keywords: JSON of timm's keywords.
    """

    name: str
    channels: int
    size: Size
    keywords: str

    def build(self, drop_path: float = 0.0) -> nn.Module:
        """The network, without its classifier, on torch's default device."""
        keywords: dict[str, Any] = json.loads(self.keywords)
        if "drop_path_rate" in accepted(self.name):
            keywords["drop_path_rate"] = drop_path
        return create_model(self.name, num_classes=0, **keywords)

    def resized(self, size: Size) -> "Blueprint":
        """The same network for another size, built for it where its constructor asks."""
        keywords = json.loads(self.keywords)
        if "img_size" in accepted(self.name):
            keywords["img_size"] = size
        return replace(self, size=size, keywords=json.dumps(keywords, sort_keys=True))


@dataclass(frozen=True)
class Measured:
    """What a twin shows.

    Attributes:
        levels: of the pyramid, fine to coarse.
        width: channels of the pooled features.
        indices: which of timm's intermediate maps make the pyramid, rising.
        order: positions in `indices` of the levels, fine to coarse.
        plain: whether all maps have one stride.
        tokens: whether the final output is a sequence of `width` channels, with a token a cell at least.
        parts: names of the trunk's modules in signal order.
    """

    levels: tuple[Level, ...]
    width: int
    indices: tuple[int, ...]
    order: tuple[int, ...]
    plain: bool
    tokens: bool
    parts: tuple[str, ...]


def features(network: Any, images: Tensor, measured: Measured) -> Features:
    """One forward pass of a network of timm's, of which only the maps of the pyramid are kept."""
    norm = {"norm": True} if measured.plain else {}
    final, maps = network.forward_intermediates(images, indices=list(measured.indices), **norm)
    pooled = network.forward_head(final, pre_logits=True)
    return Features(tuple(maps[i] for i in measured.order), pooled, final if measured.tokens else None)


@cache
def accepted(name: str) -> frozenset[str]:
    """Keywords that the constructor behind a timm name takes."""
    kind = get_type_hints(model_entrypoint(name.partition(".")[0])).get("return")
    if kind is None:
        with torch.device("meta"):
            kind = type(create_model(name, num_classes=0))
    found: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        found |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return frozenset(found - {"self", "args", "kwargs"})


@lru_cache(maxsize=1)
def _twin(blueprint: Blueprint) -> Any:
    """The twin itself; one is kept, since explaining a failure runs it at many sizes."""
    with torch.device("meta"):
        return blueprint.build().eval()


@cache
def measure(blueprint: Blueprint) -> Measured:
    """Run a twin once and read its maps, its width and the order of its parts.

    Raises:
        TypeError: a keyword that the constructor does not take.
        AssertionError, RuntimeError, ValueError: the network cannot run on images of this shape.
    """
    twin = _twin(blueprint)
    with torch.device("meta"), torch.no_grad(), _watched(twin) as calls:
        final, maps = twin.forward_intermediates(torch.empty(2, blueprint.channels, *blueprint.size))
        pooled = twin.forward_head(final, pre_logits=True)
    declared = [entry.get("reduction") for entry in getattr(twin, "feature_info", [])]
    if len(declared) != len(maps):
        declared = [None] * len(maps)
    strides = [_stride(blueprint.size, *pair) for pair in zip(maps, declared, strict=True)]
    deepest = {stride: index for index, stride in enumerate(strides)}  # a deeper map overwrites the one before
    indices = sorted(deepest.values())
    cells = maps[indices[-1]].shape[-2:].numel()
    sequence = isinstance(final, Tensor) and final.ndim == 3 and final.shape[-1] == pooled.shape[-1]
    return Measured(
        levels=tuple(Level(maps[deepest[stride]].shape[1], stride) for stride in sorted(deepest)),
        width=pooled.shape[-1],
        indices=tuple(indices),
        order=tuple(indices.index(deepest[stride]) for stride in sorted(deepest)),
        plain=len(deepest) == 1,
        tokens=sequence and final.shape[1] >= cells,
        parts=tuple(_parts(twin, calls)),
    )


def trial(blueprint: Blueprint) -> Exception | None:
    """What goes wrong when a twin is built and run, or None."""
    try:
        measure(blueprint)
    except FAILURES as error:
        return error
    return None


def runs(blueprint: Blueprint, size: Size) -> bool:
    """Whether the network as built takes images of `size`."""
    try:
        with torch.device("meta"), torch.no_grad():
            images = torch.empty(2, blueprint.channels, *size)
            features(_twin(blueprint), images, measure(blueprint))
    except FAILURES:
        return False
    return True


def _stride(size: Size, feature: Tensor, declared: int | None) -> int:
    """Nominal stride of a map: what timm declares or a power of two where the sides bear it out, else their ratio.

    Unpadded convolutions shrink maps a little and padded ones round up, hence the tolerances (in octaves).
    """
    ratio = size[0] / feature.shape[-2]
    power = 2 ** round(log2(ratio))
    for nominal, tolerance in ((declared, 0), (power, 0.15), (declared, 0.3)):
        if nominal and abs(log2(ratio / nominal)) <= tolerance:
            return nominal
    return round(ratio)


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[nn.Module, int]]:
    """A mapping that fills, as `network` runs, with its modules in the order of their first call."""
    calls: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any) -> None:
        calls.setdefault(module, len(calls))

    hooks = [module.register_forward_pre_hook(note) for module in network.modules()]
    yield calls
    for hook in hooks:
        hook.remove()


def _holds_blocks(module: nn.Module, calls: Mapping[nn.Module, int]) -> bool:
    """Whether a module only holds blocks: a sequence, a stage, or a wrapper that is never called itself."""
    if module not in calls:
        return True
    if next(module.parameters(recurse=False), None) is not None:
        return False
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    is_stage = type(module).__name__.endswith("Stage") or isinstance(getattr(module, "blocks", None), containers)
    return is_stage or isinstance(module, containers)


def _blocks(module: nn.Module, calls: Mapping[nn.Module, int], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The blocks below `module` that the forward pass calls, as they are registered."""
    for name, child in module.named_children():
        if _holds_blocks(child, calls):
            yield from _blocks(child, calls, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _parts(network: nn.Module, calls: Mapping[nn.Module, int]) -> Iterator[str]:
    """Names of the blocks in the order of their first call, each parameter in the first block that holds it."""
    claimed: set[nn.Parameter] = set()
    waiting = list(_blocks(network, calls))
    while waiting:
        waiting.sort(key=lambda block: calls[block[1]], reverse=True)
        name, module = waiting.pop()
        own = set(module.parameters())
        if own and not own & claimed:
            claimed |= own
            yield name
        elif own - claimed:  # shares some with an earlier block, as in CoaT: what is left is taken child by child
            waiting += _blocks(module, calls, f"{name}.")
