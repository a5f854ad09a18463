"""Where the residual branches of a network are, found by watching one forward pass.

No page: `vertebra.surgery.rezero` and others of its kind stand on it. An addition of two maps with a common source is
residual: one of them is that source, perhaps resized (the shortcut), the other has come through layers (the branch). No
name and no class is asked for.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vertebra.surgery.operation import Images
from vertebra.training.cost import evaluating

_VIEWS = frozenset(("split", "split_with_sizes", "chunk", "slice", "select", "view", "unbind", "narrow", "detach"))


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        end: name of the module whose output is added to the shortcut.
        inside: names of the modules that the branch alone runs through, in the order in which they finish.
        activation: name of the module that is given the sum alone, or None.
    """

    end: str
    inside: tuple[str, ...]
    activation: str | None


def branches(model: nn.Module, images: Images) -> list[Branch]:
    """The residual branches in the order of the signal.

    Args:
        model: any network; it stays as it is, and a copy without numbers is run.
        images: (channels, height, width).
    """
    twin = copy.deepcopy(model).to("meta")
    watch = _Watch()
    with ExitStack() as hooks, evaluating(twin), torch.no_grad():
        for name, module in twin.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(watch.entered(name)).remove)
                hooks.callback(module.register_forward_hook(watch.left(name)).remove)
        hooks.enter_context(watch)
        twin(torch.zeros(2, *images, device="meta"))
    return list(watch.branches())


@dataclass
class _Watch(TorchDispatchMode):
    """The operations of a forward pass as a graph; an operation in place makes a new node of the same tensor.

    Tensors are kept alive, so that an id means one of them. Ancestors are the bits of a number.
    """

    nodes: dict[int, int] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    ancestors: list[int] = field(default_factory=list)
    sums: list[tuple[int, int, int]] = field(default_factory=list)
    given: dict[int, list[str]] = field(default_factory=dict)
    made: dict[int, list[str]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [
            self.nodes[id(x)] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and id(x) in self.nodes
        ]
        shapes = [tuple(x.shape) for x in args[:2] if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        self.alive.append((args, kwargs, out))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, name, before)
        if name == "add" and len(before) == 2 and len(shapes) == 2 and shapes[0] == shapes[1]:
            self.sums.append((before[0], before[1], self.nodes[id(out)]))
        return out

    def _add(self, tensor: Tensor, kind: str, before: list[int]) -> None:
        number = len(self.kinds)
        mask = 1 << number
        for node in before:
            mask |= self.ancestors[node]
        self.kinds.append(kind)
        self.ancestors.append(mask)
        self.nodes[id(tensor)] = number

    def entered(self, name: str) -> Any:
        def note(_: nn.Module, args: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if args and isinstance(args[0], Tensor):
                self.given.setdefault(self._of(args[0]), []).append(name)

        return note

    def left(self, name: str) -> Any:
        def note(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.made.setdefault(self._of(output), []).append(name)

        return note

    def _of(self, tensor: Tensor) -> int:
        if id(tensor) not in self.nodes:  # the image
            self.alive.append(tensor)
            self._add(tensor, "image", [])
        return self.nodes[id(tensor)]

    def branches(self) -> Iterator[Branch]:
        for one, other, total in self.sums:
            for node, shortcut in ((one, other), (other, one)):
                own = self.ancestors[node] & ~self.ancestors[shortcut]
                ends = [name for name in self.made.get(node, []) if self.calls[name] == 1]
                if ends and self._is_shortcut(shortcut, node):
                    inside = [n for number in _bits(own) for n in self.made.get(number, []) if self.calls[n] == 1]
                    yield Branch(ends[-1], tuple(inside), self._activation(total))
                    break

    def _is_shortcut(self, shortcut: int, node: int) -> bool:
        """Whether one operand is a source of the other, or the shorter way from a common source."""
        common = self.ancestors[shortcut] & self.ancestors[node]
        if not common:
            return False
        alone = [self.kinds[number] for number in _bits(self.ancestors[shortcut] & ~common)]
        longer = [self.kinds[number] for number in _bits(self.ancestors[node] & ~common)]
        if not alone:
            return bool(longer)
        # groups of one map that see each other (Res2Net) are no shortcuts: what was split off came through nothing
        return len(alone) < len(longer) and not _VIEWS.issuperset(alone)

    def _activation(self, total: int) -> str | None:
        names = [name for name in self.given.get(total, []) if self.calls[name] == 1]
        return names[0] if len(names) == 1 else None


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
