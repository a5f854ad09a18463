"""Mixture of experts: several small MLPs beside each other, of which a gate gives each token a few.

    mixture_of_experts(384, experts=16, k=4)                 tokens (..., 384), in place of an Mlp
    with doing(model, task=2): model(images)                 the gates of another task
    with watched(model) as seen: model(images)               what every router did, for losses

Shapes: (..., dim) in, the same out: `sum over the k chosen experts of probability * expert(x)`. Each task has a gate of
its own, a linear layer without bias that starts at zero; its softmax is taken over all experts, and the k largest
probabilities stay as they are, without being made to sum to 1. In training the gate may add noise whose size it learns.
An expert has hidden / k channels where a plain MLP has `hidden`, so k of them cost as much. Written from the
description of Mod-Squad (arXiv 2212.08066), whose code is not free to use. Attention of experts is
`vertebra.blocks.expert_attention`.

There are two forms of the same sum. "sorted" puts the tokens of each expert in a row and computes no more than was
chosen: its shapes depend on the data. "dense" computes all experts as one wide MLP whose hidden channels are gated: its
shapes are fixed, for `torch.compile` and export, at experts / k times the cost. They agree but for rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softplus

from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Noise = Literal["learned", "none"]
Form = Literal["auto", "sorted", "dense"]
Layers: TypeAlias = Sequence[tuple[Tensor, Tensor | None]]
"""Weight (outputs, inputs) and bias (outputs,) of each expert."""

_MEMORY = 0.01
"""Share of the last batch in what a router remembers."""


def mixture_of_experts(
    dim: int,
    *,
    experts: int = 16,
    k: int = 4,
    ratio: float = 4.0,
    hidden: int | None = None,
    tasks: int = 1,
    noise: Noise = "learned",
) -> "MixtureOfExperts":
    """The block for tokens of width `dim`.

    Args:
        dim: width of a token.
        experts: how many there are.
        k: how many a token is given, at most `experts`.
        ratio: hidden channels of the k experts of a token together, as a multiple of `dim`.
        hidden: channels of one expert, in place of `ratio`.
        tasks: how many gates there are; `doing` says which one is at work.
        noise: whether the gates' logits are noisy in training.

    Raises:
        UsageError: a number below 1, more experts a token than there are, or another kind of noise.
    """
    width = max(1, int(ratio * dim / max(1, k))) if hidden is None else hidden
    check("mixture_of_experts", experts=experts, k=k, tasks=tasks, noise=noise, dim=dim, hidden=width)
    if ratio <= 0:
        raise UsageError(f"mixture_of_experts: ratio is {ratio}; it must be above 0")
    return MixtureOfExperts(dim=dim, width=width, experts=experts, k=k, tasks=tasks, noise=noise)


def check(page: str, *, experts: int, k: int, tasks: int, noise: str, **numbers: int) -> None:
    """Refuse options of a mixture that do not work together.

    Raises:
        UsageError: names the option, its value and what works.
    """
    for name, value in {"experts": experts, "k": k, "tasks": tasks, **numbers}.items():
        if value < 1:
            raise UsageError(f"{page}: {name} is {value}; it must be at least 1")
    if k > experts:
        raise UsageError(f"{page}: k is {k}; of {experts} experts a token can be given at most {experts}")
    if noise not in get_args(Noise):
        raise UsageError(f"{page}: noise is {noise!r}; it can be {' or '.join(get_args(Noise))}")


class PerTask(nn.Module, ABC):
    """What has a part for each task.

    Attributes:
        task: whose part is at work, from 0.
    """

    task: int = 0

    @property
    @abstractmethod
    def tasks(self) -> int:
        """How many it knows."""

    @abstractmethod
    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Forget the parts of all other tasks; those that stay are counted anew, in the order given."""

    @abstractmethod
    def add_tasks(self, tasks: int) -> Sequence[nn.Module | nn.Parameter]:
        """Add parts for so many new tasks; returns them."""


def per_task(model: nn.Module) -> list[PerTask]:
    """Everything in a model that has a part for each task.

    Raises:
        UsageError: there is nothing.
    """
    found = [module for module in model.modules() if isinstance(module, PerTask)]
    if not found:
        raise UsageError(f"the {type(model).__name__} has no gates: nothing in it is a mixture of experts")
    return found


@contextmanager
def doing(model: nn.Module, task: int) -> Iterator[None]:
    """Let a model work on a task for a while. A pass that is computed again in backward has to lie inside as well.

    Args:
        model: with mixtures of experts inside.
        task: from 0.

    Raises:
        UsageError: a task that it does not know, or a model without experts.
    """
    parts = per_task(model)
    known = min(part.tasks for part in parts)
    if not 0 <= task < known:
        raise UsageError(f"task is {task}; the {type(model).__name__} knows {known}, counted from 0")
    before = [part.task for part in parts]
    try:
        for part in parts:
            part.task = task
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.task = old


class Routing(NamedTuple):
    """What a router did with T tokens of one task.

    Attributes:
        task: the task.
        logits: of the gate, (T, columns), in 32 bit at least; a column is an expert unless some were pruned.
        probability: of each expert, mean over the tokens, (experts,); what losses of balance are made of.
        load: share of the T * k places that each expert was given, (experts,); no gradient.
    """

    task: int
    logits: Tensor
    probability: Tensor
    load: Tensor


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect what the routers of a model do for a while: name of the router -> a `Routing` a forward pass."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    found: dict[str, list[Routing]] = {name: [] for name in routers}
    before = [router.seen for router in routers.values()]
    try:
        for name, router in routers.items():
            router.seen = found[name]
        yield found
    finally:
        for router, old in zip(routers.values(), before, strict=True):
            router.seen = old


class Gate(nn.Module):
    """A linear layer from tokens to one logit a column, at zero in the beginning.

    Attributes:
        weight: (columns, dim), or (2 * columns, dim) with those of the noise after those of the logits.
        experts: (columns,), which expert a column stands for; -1 where it was pruned, so that the column counts in
            the softmax and is never chosen.
    """

    experts: Tensor

    def __init__(self, dim: int, experts: int, noise: Noise) -> None:
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.zeros(experts * (2 if noise == "learned" else 1), dim))
        self.register_buffer("experts", torch.arange(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, dim) to logits (T, columns)."""
        columns = len(self.experts)
        if self.noise == "none" or not self.training:
            return linear(x, self.weight[:columns])
        logits, spread = linear(x, self.weight).split(columns, -1)
        return logits + softplus(spread) * torch.randn_like(logits)


class Router(PerTask):
    """Chooses k experts for each token, by the gate of the task.

    Attributes:
        k: experts of a token.
        experts: how many there are.
        gates: one a task.
        usage: (tasks, experts), share of the places that a task gave each expert: P(expert | task), a running mean over
            training batches; zero where the task was not trained.
        probability: (tasks, experts), likewise of the gates' probabilities.
        batches: (tasks,), how many training batches these are of.
        seen: what `watched` collects in.
    """

    usage: Tensor
    probability: Tensor
    batches: Tensor

    def __init__(self, dim: int, experts: int, k: int, tasks: int, noise: Noise) -> None:
        super().__init__()
        self.dim, self.k, self.experts = dim, k, experts
        self.noise: Noise = noise
        self.gates = nn.ModuleList(Gate(dim, experts, noise) for _ in range(tasks))
        self.register_buffer("usage", torch.zeros(tasks, experts))
        self.register_buffer("probability", torch.zeros(tasks, experts))
        self.register_buffer("batches", torch.zeros(tasks))
        self.seen: list[Routing] | None = None

    @property
    def tasks(self) -> int:
        """How many gates there are."""
        return len(self.gates)

    @property
    def members(self) -> list[Gate]:
        """The gates, as what they are."""
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (T, dim) to the probabilities of their experts and the experts, both (T, k)."""
        gate = self.members[self.task]
        logits = gate(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = logits.softmax(-1)
        weights, columns = probabilities.masked_fill(gate.experts < 0, -1.0).topk(self.k)
        chosen = gate.experts[columns]
        if self.training or self.seen is not None:
            self._note(gate, logits, probabilities, chosen)
        return weights.to(x.dtype), chosen

    def _note(self, gate: Gate, logits: Tensor, probabilities: Tensor, chosen: Tensor) -> None:
        """Remember a training batch, and tell who watches."""
        mean = probabilities.mean(0)
        which = gate.experts[:, None] == torch.arange(self.experts, device=mean.device)  # (columns, experts)
        probability = mean @ which.to(mean.dtype)
        load = places(chosen, self.experts) / chosen.numel()
        if self.training:
            with torch.no_grad():
                share = (1 / (self.batches[self.task] + 1)).clamp(min=_MEMORY)
                for memory, now in ((self.usage, load), (self.probability, probability)):
                    memory[self.task] += share * (now.to(memory.dtype) - memory[self.task])
                self.batches[self.task] += 1
        if self.seen is not None:
            self.seen.append(Routing(self.task, logits, probability, load))

    @torch.no_grad()
    def keep(self, experts: Sequence[int]) -> None:
        """Forget all other experts; the columns of the gates stay, so that probabilities are what they were."""
        new = torch.full((self.experts + 1,), -1)  # the last place is where -1 looks
        new[list(experts)] = torch.arange(len(experts))
        for gate in self.members:
            gate.experts = new.to(gate.experts.device)[gate.experts]
        self.usage, self.probability = self.usage[:, list(experts)], self.probability[:, list(experts)]
        self.experts = len(experts)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Forget the gates of all other tasks."""
        self.gates = nn.ModuleList(self.gates[task] for task in tasks)
        self.usage, self.probability = self.usage[list(tasks)], self.probability[list(tasks)]
        self.batches, self.task = self.batches[list(tasks)], 0

    def add_tasks(self, tasks: int) -> list[nn.Module]:
        """Add gates that know all experts there are now."""
        like = self.members[0].weight
        made = (Gate(self.dim, self.experts, self.noise).to(like.device, like.dtype) for _ in range(tasks))
        new: list[nn.Module] = [gate.train(self.training) for gate in made]
        self.gates.extend(new)
        self.usage, self.probability = (pad(memory, (0, 0, 0, tasks)) for memory in (self.usage, self.probability))
        self.batches = pad(self.batches, (0, tasks))
        return new

    def widen(self, experts: int) -> None:
        """Take note of new experts, which the gates that there are do not know."""
        self.experts += experts
        self.usage, self.probability = (pad(memory, (0, experts)) for memory in (self.usage, self.probability))

    def reach(self) -> Tensor:
        """(tasks, experts), True where the gate of a task can choose an expert."""
        every = torch.arange(self.experts, device=self.usage.device)
        return torch.stack([(gate.experts == every[:, None]).any(1) for gate in self.members])


def places(chosen: Tensor, experts: int) -> Tensor:
    """How many places each expert was given, (experts,), of any tensor of experts."""
    return (chosen.reshape(-1, 1) == torch.arange(experts, device=chosen.device)).sum(0)


class Plan:
    """Which token goes to which expert: T * k places, sorted by expert.

    Attributes:
        order: (T * k,), from sorted places to places in the order of the tokens.
        back: (T * k,), the reverse.
        sizes: places of each expert.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        """Sort; `chosen` is (T, k). On the meta device, where nothing is chosen, experts get equal shares."""
        self.k = chosen.shape[1]
        flat = chosen.flatten()
        self.order = flat.argsort(stable=True)
        self.back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(flat), device=flat.device))
        even = [len(flat) // experts + (number < len(flat) % experts) for number in range(experts)]
        self.sizes: list[int] = even if flat.is_meta else places(flat, experts).tolist()

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (T, C) to those of each place, (T * k, C), sorted."""
        return x.index_select(0, self.order // self.k)

    def places(self, x: Tensor) -> Tensor:
        """(T * k, C) in the order of the tokens to sorted places."""
        return x.index_select(0, self.order)

    def each(self, rows: Tensor, layers: Layers) -> Tensor:
        """A linear layer of each expert on its own places, (T * k, C) sorted."""
        parts = rows.split(self.sizes)
        return torch.cat([linear(part, *layer) for part, layer in zip(parts, layers, strict=True)])

    def summed(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sorted places (T * k, C) to tokens (T, C): the sum of a token's places, times their weights (T, k)."""
        together = self.restored(rows).unflatten(0, weights.shape)  # (T, k, C)
        return (together * weights[..., None].to(rows.dtype)).sum(1)

    def restored(self, rows: Tensor) -> Tensor:
        """Sorted places (T * k, C) in the order of the tokens."""
        return rows.index_select(0, self.back)


class Experts(nn.Module):
    """Several experts' two linear layers, dim to width and width to dim, held together.

    Attributes:
        inputs: dim to count * width, expert by expert.
        outputs: count * width to dim, without bias: on gated channels it sums over experts.
        bias: (count * dim,), of the second layers.
    """

    def __init__(self, dim: int, width: int, count: int) -> None:
        super().__init__()
        self.dim, self.width, self.count = dim, width, count
        self.inputs = nn.Linear(dim, count * width)
        self.outputs = nn.Linear(count * width, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(count * dim))
        for layer in (self.inputs, self.outputs):
            trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.inputs.bias)

    def first(self) -> Layers:
        """Each expert's first layer: (width, dim) and (width,)."""
        shape = (self.count, self.width)
        weights, biases = self.inputs.weight.unflatten(0, shape), self.inputs.bias.unflatten(0, shape)
        return list(zip(weights.unbind(), biases.unbind(), strict=True))

    def second(self) -> Layers:
        """Each expert's second layer: (dim, width) and (dim,)."""
        weights = self.outputs.weight.unflatten(1, (self.count, self.width))
        return list(zip(weights.unbind(1), self.bias.unflatten(0, (self.count, self.dim)).unbind(), strict=True))

    def joined(self, gated: Tensor, gates: Tensor) -> Tensor:
        """Second layers of all experts and their sum: (T, count, width), already gated, and gates (T, count)."""
        return self.outputs(gated.flatten(1)) + gates @ self.bias.unflatten(0, (self.count, self.dim)).to(gates.dtype)

    @torch.no_grad()
    def only(self, numbers: Sequence[int]) -> "Experts":
        """A copy with some of the experts."""
        like, index = self.bias, torch.tensor(numbers, device=self.bias.device)
        made = Experts(self.dim, self.width, len(numbers)).to(like.device, like.dtype).train(self.training)
        for (weight, bias), number in zip(made.first(), numbers, strict=True):
            old, shift = self.first()[number]
            weight.copy_(old)
            assert bias is not None and shift is not None
            bias.copy_(shift)
        columns = self.outputs.weight.unflatten(1, (self.count, self.width))[:, index]
        made.outputs.weight.copy_(columns.flatten(1))
        made.bias.copy_(self.bias.unflatten(0, (self.count, self.dim))[index].flatten())
        for new, old in zip(made.parameters(), self.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        return made


class Mixture(nn.Module):
    """What every layer of experts has: a router, and experts in groups that came at different times.

    Attributes:
        router: gives each token its experts.
        groups: of experts; one, and another each time that some were added.
        form: "sorted", "dense", or the one that suits: "dense" while compiling or exporting.
    """

    def __init__(self, *, dim: int, width: int, experts: int, k: int, tasks: int, noise: Noise) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.form: Form = "auto"
        self.router = Router(dim, experts, k, tasks, noise)
        self.groups = nn.ModuleList([Experts(dim, width, experts)])

    @property
    def members(self) -> list[Experts]:
        """The groups, as what they are."""
        return [group for group in self.groups if isinstance(group, Experts)]

    @property
    def dense(self) -> bool:
        """Whether all experts are computed now."""
        return self.form == "dense" or (self.form == "auto" and torch.compiler.is_compiling())

    def first(self) -> Layers:
        """First layers of all experts."""
        return [layer for group in self.members for layer in group.first()]

    def second(self) -> Layers:
        """Second layers of all experts."""
        return [layer for group in self.members for layer in group.second()]

    def gates(self, weights: Tensor, chosen: Tensor) -> list[Tensor]:
        """Weights (T, k) of chosen experts as those of all, zero elsewhere: (T, count) a group."""
        whole = weights.new_zeros(len(weights), self.router.experts).scatter(1, chosen, weights)
        return list(whole.split([group.count for group in self.members], 1))

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all other experts."""
        groups, start = [], 0
        for group in self.members:
            numbers = [number - start for number in experts if start <= number < start + group.count]
            groups += [group.only(numbers)] if numbers else []
            start += group.count
        self.groups = nn.ModuleList(groups)
        self.router.keep(sorted(experts))

    def add(self, experts: int) -> Experts:
        """Add experts as a group of their own, which is returned; gates that are added later know them."""
        like = self.members[0].bias
        new = Experts(self.dim, self.width, experts).to(like.device, like.dtype).train(self.training)
        self.groups.append(new)
        self.router.widen(experts)
        return new


class MixtureOfExperts(Mixture):
    """MLPs as experts; build it with `mixture_of_experts`."""

    def __init__(self, *, dim: int, width: int, experts: int, k: int, tasks: int, noise: Noise) -> None:
        super().__init__(dim=dim, width=width, experts=experts, k=k, tasks=tasks, noise=noise)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., dim) to tokens."""
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat)
        if self.dense:
            return self._dense(flat, weights, chosen).view(x.shape)
        plan = Plan(chosen, self.router.experts)
        rows = self.activation(plan.each(plan.tokens(flat), self.first()))
        return plan.summed(plan.each(rows, self.second()), weights).view(x.shape)

    def _dense(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """All experts on tokens (T, dim)."""
        y = torch.zeros_like(x)
        for group, gates in zip(self.members, self.gates(weights, chosen), strict=True):
            hidden = self.activation(group.inputs(x)).unflatten(1, (group.count, group.width))
            y = y + group.joined(hidden * gates[..., None], gates)
        return y
