"""Kar3: signed steps along the gradient and two moving averages of it, the optimiser of Terminator's authors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.errors import UsageError


class Kar3(torch.optim.Optimizer):
    """Three signed steps: p -= lr (sign(g) + sign(m1) + sign(m2)), where the moving averages follow afterwards.

    Args:
        params: parameters or groups.
        lr: of each of the three; the paper's is 1.215e-3.
        betas: decay of the two averages of gradients, in [0, 1).
        weight_decay: added to the gradient before its sign is taken, as a penalty on squares would be.

    Raises:
        UsageError: a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.215e-3,
        betas: tuple[float, float] = (0.5, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise UsageError(f"Kar3: lr is {lr} and weight_decay {weight_decay}; neither may be below 0")
        if len(betas) != 2 or any(not 0 <= beta < 1 for beta in betas):
            raise UsageError(f"Kar3: betas is {betas}; it takes two numbers in [0, 1), as (0.5, 0.95)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        gradient, state = parameter.grad, self.state[parameter]
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        if not state:
            state["fast"], state["slow"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        parameter.sub_(gradient.sign() + state["fast"].sign() + state["slow"].sign(), alpha=group["lr"])
        for average, beta in zip(("fast", "slow"), group["betas"], strict=True):
            state[average].lerp_(gradient, 1 - beta)
