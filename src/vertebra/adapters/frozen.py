"""A frozen backbone: its weights and statistics stay as they are, and what stands on it trains.

The plainest adapter, without a new parameter: with `classify` on top it is linear evaluation under the views of a
plan. In training mode the backbone stays in evaluation mode, so batch norms keep their statistics and nothing is
dropped. Gradients still pass through to the images, for who explains. The state dict is that of the backbone alone,
under its own names: a checkpoint loads with or without the adapter.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from vertebra.contracts import Backbone, Features

VARIANTS: dict[str, dict[str, object]] = {}

_INNER = "inner."


def frozen(backbone: Backbone) -> "Frozen":
    """Freeze a backbone, in place; `plan.freeze` freezes a part of one."""
    return Frozen(backbone)


class Frozen(Backbone):
    """A backbone that does not train.

    Attributes:
        inner: the backbone, in evaluation mode, without gradients of its parameters.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.inner = backbone.requires_grad_(False).eval()
        self.levels, self.width, self.preprocess = backbone.levels, backbone.width, backbone.preprocess
        self.register_state_dict_post_hook(_without_wrapper)
        self.register_load_state_dict_pre_hook(_with_wrapper)

    def forward(self, images: Tensor) -> Features:
        """The backbone's features."""
        return self.inner(images)

    def trunk(self) -> Sequence[nn.Module]:
        """The backbone's parts."""
        return self.inner.trunk()

    def train(self, mode: bool = True) -> "Frozen":
        """Training mode for what is not frozen, which is nothing but the flag."""
        super().train(mode)
        self.inner.eval()
        return self


def _without_wrapper(module: nn.Module, state: MutableMapping[str, Any], prefix: str, _: Any) -> None:
    """Name what was just collected as the backbone itself names it."""
    _rename(state, prefix + _INNER, prefix)


def _with_wrapper(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """The reverse, before the names are looked up."""
    _rename(state, prefix, prefix + _INNER)


def _rename(state: MutableMapping[str, Any], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
