"""The residual unit of STU-Net over images or volumes: two 3 x 3 (x 3) convolutions, each map normed by itself.

    convolution - norm - LeakyReLU - convolution - norm, beside a shortcut; their sum; LeakyReLU

No page: what `vertebra.backbones.stunet` and `vertebra.necks.unet_decoder` share (arXiv 2304.06716). The norm is
instance norm with gain and shift, computed as a group norm of one group a channel: the same numbers from one class for
images and volumes, several times as fast on a CPU as torch's `InstanceNorm3d`. The biases of the two convolutions are
removed again by the norms; they are kept because released weights have them.
"""

from collections.abc import Sequence

from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.errors import UsageError

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
"""Spatial axes -> the convolution over them."""
SLOPE = 0.01
"""Of LeakyReLU below zero."""


class STUnit(nn.Module):
    """A unit; with `project` the shortcut is a 1 x 1 convolution, else it is the input itself.

    Args:
        inputs: channels that come in.
        outputs: channels that come out; with another number, or a stride, `project` is needed.
        axes: 2 for maps (B, C, H, W), 3 for maps (B, C, D, H, W).
        stride: of the first convolution and the shortcut, one number or one an axis.
        project: whether the shortcut has weights.
        drop_path: probability that the branch is dropped, 0..1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: int,
        stride: int | Sequence[int] = 1,
        project: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        convolution, steps = CONVOLUTIONS[axes], per_axis(stride, axes)
        self.conv1 = convolution(inputs, outputs, 3, steps, 1)  # type: ignore[arg-type]
        self.norm1 = nn.GroupNorm(outputs, outputs)
        self.conv2 = convolution(outputs, outputs, 3, 1, 1)
        self.norm2 = nn.GroupNorm(outputs, outputs)
        self.activation = nn.LeakyReLU(SLOPE, inplace=True)
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = convolution(inputs, outputs, 1, steps) if project else nn.Identity()  # type: ignore[arg-type]
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, ...) to maps (B, outputs, ...), smaller by the stride and rounded up."""
        branch = self.activation(self.norm1(self.conv1(x)))
        branch = self.drop(self.norm2(self.conv2(branch)))
        return self.activation(branch.add_(self.shortcut(x)))


def initialise(module: nn.Module) -> None:
    """He's initialisation for the slope, as nnU-Net has it, of all convolutions in a module."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(part.weight, a=SLOPE)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def per_axis(stride: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A stride an axis, from one number or one an axis.

    Raises:
        UsageError: another number of them, or one below 1.
    """
    steps = (stride,) * axes if isinstance(stride, int) else tuple(stride)
    if len(steps) != axes or min(steps) < 1:
        raise UsageError(f"a stride of {stride} does not fit {axes} axes; give one number, or {axes}, of 1 or more")
    return steps
