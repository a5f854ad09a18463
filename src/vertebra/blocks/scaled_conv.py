"""Scaled weight standardisation: convolutions that keep the variance of a signal without looking at it.

Shapes: (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)), padded as TensorFlow does ("SAME"): of
an even side at stride 2 at the end alone. The convolution of NF-ResNet (arXiv 2101.08692, section 4): each output's
weights lose their mean and get a variance of 1 / inputs, times a learned gain. No page: a tool of
`vertebra.backbones.nf_resnet`.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

ACTIVATION_GAINS = {"relu": 1.7139588594436646, "silu": 1.7881293296813965, "gelu": 1.7015043497085571}
"""What gives the activation of a standard normal signal a variance of 1."""

_LEAST = 1e-4
"""Of a variance times its inputs."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the class above
        """Maps to maps."""
        return self._convolved(input, self.weight)

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        side, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, weight, self.bias, 1, side // 2, 1, self.groups)
        return F.conv2d(same_padded(x, side, stride), weight, self.bias, stride, 0, 1, self.groups)


class ScaledConv(SameConv):
    """Build it with channels, kernel and stride; the weights in use are `standardised()`.

    Attributes:
        gain: (outputs, 1, 1, 1), 1 at the start.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type] # it has one
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the class above
        """Maps to maps."""
        return self._convolved(input, self.standardised())

    def standardised(self) -> Tensor:
        """(W - mean) * gain / sqrt(max(variance * inputs, 1e-4)), each output by itself (equation 4)."""
        inputs = self.weight[0].numel()
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (self.gain * (variance * inputs).clamp(min=_LEAST).rsqrt())

    def fused(self) -> SameConv:
        """The same without standardising at every pass."""
        side = self.kernel_size[0]
        plain = SameConv(self.in_channels, self.out_channels, side, self.stride[0], groups=self.groups)
        with torch.no_grad():
            plain.to(self.weight.device, self.weight.dtype).weight.copy_(self.standardised())
            plain.bias.copy_(self.bias)  # type: ignore[union-attr, arg-type]
        return plain


def same_padded(x: Tensor, side: int, stride: int, value: float = 0.0) -> Tensor:
    """A map with what a window of `side` needs around it, the odd cell at the end."""
    needed = [max((-(-length // stride) - 1) * stride + side - length, 0) for length in (x.shape[3], x.shape[2])]
    return F.pad(x, [part for n in needed for part in (n // 2, n - n // 2)], value=value)
