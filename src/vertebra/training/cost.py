"""What a network costs for one image: parameters, multiply-accumulates, activations.

Counting runs the forward pass on the meta device, which computes shapes and nothing else: it takes
milliseconds and no memory, whatever the network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vertebra.contracts import Backbone, Cost
from vertebra.errors import UsageError

_CONVOLUTIONS_AND_LINEARS = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm}


class _Counter(TorchDispatchMode):
    """Adds up torch's flops (two a multiply-accumulate) and the outputs of convolutions and linear layers.

    Linear layers arrive here as matrix products; those of attention are batched and so are told apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=out)
        if operation in _CONVOLUTIONS_AND_LINEARS:
            self.activations += out.numel()
        return out


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def count(model: nn.Module, *, size: tuple[int, int] | None = None, channels: int | None = None) -> Cost:
    """Count parameters, MACs and activations for one image.

    MACs are those of convolutions, linear layers and attention products (the two matrix products of each
    attention, fused or not); norms, activations and poolings count nothing.

    Args:
        model: any network of images; it may hold real weights, which are neither read nor copied.
        size: (height, width) in pixels; a backbone's own where None.
        channels: image channels; a backbone's own where None.

    Raises:
        UsageError: the size or the channels are unknown because `model` is no `Backbone`.
    """
    if size is None or channels is None:
        if not isinstance(model, Backbone):
            raise UsageError(f"count() needs size and channels for a {type(model).__name__}, which is no Backbone")
        size, channels = size or model.preprocess.size, channels or model.preprocess.channels
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, channels, *size, device="meta", dtype=kind)
    counter = _Counter()
    with evaluating(model), torch.no_grad(), torch.device("meta"), counter:
        functional_call(model, shapes, (image,))
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(params, counter.flops // 2, counter.activations, size)
