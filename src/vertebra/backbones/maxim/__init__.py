"""MAXIM: a U-Net for restoring images whose blocks and skips mix places along two axes, within blocks and over a grid.

Shapes: images (B, channels, H, W) of any size, 0..1, to maps at strides 1, 2, 4 (the decoder's of the last stage) and
8 (its bottleneck) with 1, 2, 4 and 4 times `width` channels; `pooled` is the mean of the last. A stage is a U-Net; a
later one is given the scaled images again, gated with what the stage before made of them. Sides are brought to a
multiple (64 for the published networks) by reflection on both sides, as in the authors' evaluation, and cropped again.

A backbone has no head: with the convolutions that make images of the last decoder's maps it is the paper's network,

    restore = restorer(maxim("2s"))
    stages = restore(noisy)              # images of every stage, coarse to fine
    restored = stages[-1][-1]            # the result, of the size of the input

Maps of all levels that meet at one are projected before they are enlarged, and two projections in a row are one
(`stage.Fusion`): the same function with fewer multiply-adds. Departs from the reference in nothing else.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from math import lcm
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.backbones.maxim.released import rules, spread, turned_kernel
from vertebra.backbones.maxim.stage import DEPTH, Carried, Design, Stage
from vertebra.blocks.cross_gating import convolution
from vertebra.blocks.multi_axis_mlp import VARIANTS as MIXERS
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.parity import convert

if TYPE_CHECKING:
    from vertebra.contracts import Effect
    from vertebra.data.dataset import Dataset

__all__ = ["Maxim", "Restorer", "effect", "maxim", "published", "restorer"]

PAPER = Paper(
    id="maxim",
    title="MAXIM: Multi-Axis MLP for Image Processing",
    year=2022,
    arxiv="2201.02973",
    reference="google-research/maxim",
    licence="Apache-2.0",
    claim="state of the art on more than ten benchmarks of denoising, deblurring, deraining, dehazing and enhancement"
    " with no more parameters than its rivals: 39.96 dB on SIDD and 32.86 dB on GoPro with 22.2 M, 33.24 dB on Rain13k"
    " with 14.1 M",
    numbers="parameters to the last one, of five networks with the convolutions that make images; the GFLOPs that the"
    " authors print are a compiler's, about 2.2 times the multiply-adds",
    note="The network, its images of every stage and scale, and the conversion of released weights. Training for"
    " restoration (the loss over stages and scales) comes with that task; the comparison with Restormer needs a GPU and"
    " was not run.",
)

VARIANTS = {
    "2s": {"stages": 2, "scales": 3, "image_size": 256},
    "3s": {"stages": 3, "scales": 3, "image_size": 256},
    "1s": {"stages": 1, "scales": 3, "image_size": 256},
    "1s_single": {"stages": 1, "scales": 1, "image_size": 256},
    "2s_single": {"stages": 2, "scales": 1, "image_size": 256},
    "3s_single": {"stages": 3, "scales": 1, "image_size": 256},
    "nano": {
        "stages": 1,
        "scales": 3,
        "width": 12,
        "groups": 1,
        "bottlenecks": 1,
        "block": (4, 4),
        "grid": (4, 4),
        "image_size": 32,
    },
}

SKIPS = ("gated", "conv")


class MaximOptions(BackboneOptions, total=False):
    """Options of MAXIM; a variant sets the first two.

    Attributes:
        stages: U-Nets in a row.
        scales: resolutions, 1 to 3, at which images go into a stage and come out.
        width: channels at full resolution.
        groups: pairs of a multi-axis MLP and a channel attention block, a level.
        bottlenecks: groups of such pairs at the lowest resolution.
        block: side in places of the windows at strides 1 and 2, and below.
        grid: cells of the grid, down and across, likewise.
        mixer: "multi_axis", or blocks and gates that mix along one axis only: "block", "grid".
        skips: "gated", or "conv" for skips within a stage without gates.
    """

    stages: int
    scales: int
    width: int
    groups: int
    bottlenecks: int
    block: Sequence[int]
    grid: Sequence[int]
    mixer: Literal["multi_axis", "block", "grid"]
    skips: Literal["gated", "conv"]


def maxim(variant: str = "2s", **options: Unpack[MaximOptions]) -> "Maxim":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`: the stages; "single" ones have one scale.
        options: as in `MaximOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("maxim", VARIANTS, variant, options, Maxim, crop=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


class Maxim(Backbone):
    """Stages of gated U-Nets; build it with `maxim`.

    Attributes:
        stages: in a row.
        design: what they share.
        multiple: of which padded sides are.
    """

    pretrained_cfg: Mapping[str, Any] = {"first_conv": (), "classifier": "outputs"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        stages: int,
        scales: int,
        width: int = 32,
        groups: int = 2,
        bottlenecks: int = 2,
        block: Sequence[int] = (16, 8),
        grid: Sequence[int] = (16, 8),
        mixer: Literal["multi_axis", "block", "grid"] = "multi_axis",
        skips: Literal["gated", "conv"] = "gated",
        drop_path: float = 0.0,
    ) -> None:
        given = {"stages": stages, "scales": scales, "width": width, "groups": groups, "bottlenecks": bottlenecks}
        check_at_least("maxim", 1, **given, block=block, grid=grid)
        _check(scales, block, grid, mixer, skips)
        super().__init__()
        self.preprocess = preprocess
        self.design = Design(preprocess.channels, width, scales, groups, bottlenecks, block, grid, mixer, skips)
        blocks = 2 * groups * (2 * DEPTH + bottlenecks)
        rates = chain.from_iterable(drop_rates(drop_path, [blocks] * stages))
        order = range(1, stages + 1)
        self.stages = nn.ModuleList(Stage(self.design, rates, first=n == 1, last=n == stages) for n in order)
        sides = [self.design.sides(level) for level in range(DEPTH + 1)]
        self.multiple = lcm(*(lcm(side["block"], side["grid"]) << level for level, side in enumerate(sides)))
        strides = [1 << level for level in range(DEPTH + 1)]
        self.levels = tuple(map(Level, [*self.design.dims, self.design.dims[-1]], strides))
        self.width = self.levels[-1].channels

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W), 0..1, to features."""
        last, size = self.carried(images)[-1], (images.shape[2], images.shape[3])
        maps = zip((*last.decoded, last.deepest), self.levels, strict=True)
        pyramid = tuple(cropped(x, size, self.multiple, level.stride) for x, level in maps)
        return Features(pyramid, pyramid[-1].mean((2, 3)))

    def carried(self, images: Tensor) -> list[Carried]:
        """What every stage gives for images, not cropped."""
        check_images(self, images)
        scaled = self.scaled(images)
        found: list[Carried] = []
        for stage in self.stages:
            found.append(stage(scaled, found[-1] if found else None))
        return found

    def scaled(self, images: Tensor) -> list[Tensor]:
        """Extended images at each scale, (B, H / s, W / s, C): the pixels right of and below the centres of s x s."""
        images = extended(images, self.multiple).permute(0, 2, 3, 1)
        return [images[:, s // 2 :: s, s // 2 :: s].contiguous() for s in (1, 2, 4)[: self.design.scales]]

    def trunk(self) -> list[nn.Module]:
        """Entries, encoders, bottleneck, gates, decoders and attentions of each stage."""
        return [part for stage in self.stages for part in stage.parts()]  # type: ignore[union-attr]


class Restorer(nn.Module):
    """A backbone and the convolutions that make images of the last decoder's maps; build it with `restorer`.

    Attributes:
        backbone: its earlier stages make images of their own, for their attention.
        outputs: a convolution a scale.
    """

    def __init__(self, backbone: Maxim) -> None:
        super().__init__()
        self.backbone, design = backbone, backbone.design
        self.outputs = nn.ModuleList(convolution(dim, design.channels, 3) for dim in design.dims[: design.scales])

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Images (B, channels, H, W), 0..1, to restored ones.

        Returns:
            A tuple a stage, of images (B, channels, H / s, W / s) at the scales, coarse to fine: the last of the last
            is the result. Nothing keeps them in 0..1.
        """
        carried, scaled = self.backbone.carried(images), self.backbone.scaled(images)
        size, multiple = (images.shape[2], images.shape[3]), self.backbone.multiple
        last = [conv(x) + image for conv, x, image in zip(self.outputs, carried[-1].decoded, scaled, strict=False)]
        stages = [*(one.images for one in carried[:-1]), last]
        return tuple(
            tuple(cropped(image, size, multiple, 1 << n) for n, image in reversed(list(enumerate(stage))))
            for stage in stages
        )


def restorer(backbone: Maxim) -> Restorer:
    """The paper's network around a backbone."""
    return Restorer(backbone)


def extended(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W) with reflections on both sides, to sides that are multiples."""
    for axis in (2, 3):
        side = images.shape[axis]
        if side % multiple:
            images = images.index_select(axis, _reflected(side, -side % multiple, images.device))
    return images


def cropped(x: Tensor, size: tuple[int, int], multiple: int, stride: int) -> Tensor:
    """A map (B, H, W, C) of extended images as (B, C, h, w), of images of `size` before that."""
    slices = []
    for side in size:
        start = (-side % multiple) // 2 // stride
        slices.append(slice(start, start - (-side // stride)))
    return x[:, slices[0], slices[1]].permute(0, 3, 1, 2)


def _reflected(side: int, more: int, device: torch.device) -> Tensor:
    """Numbers of the places that a line of `side` + `more` takes; an odd side first gets one more at its end."""
    even = side + side % 2
    before = more // 2
    places = torch.arange(-before, side + more - before, device=device)
    return _turned(_turned(places, even), side)


def _turned(places: Tensor, side: int) -> Tensor:
    """Places on an endless line as those of 0..side - 1, where the line turns back at both ends."""
    period = max(1, 2 * (side - 1))
    return side - 1 - (places % period - (side - 1)).abs()


def _check(scales: int, block: Sequence[int], grid: Sequence[int], mixer: str, skips: str) -> None:
    if scales > DEPTH:
        raise UsageError(f"maxim: scales is {scales}; a stage has {DEPTH}, so 1 to {DEPTH} work")
    for name, sides in (("block", block), ("grid", grid)):
        if len(sides) != 2:
            raise UsageError(f"maxim: {name} is {sides}; it takes two sides, at strides 1 and 2 and below, as (16, 8)")
    for name, value, known in (("mixer", mixer, tuple(MIXERS)), ("skips", skips, SKIPS)):
        if value not in known:
            raise UsageError(f"maxim: {name} is {value!r}{near(value, known)}; it can be {', '.join(known)}")


def published(state: Mapping[str, Any], network: Maxim | Restorer) -> dict[str, Tensor]:
    """The authors' released weights under our names; for a backbone without the convolutions that make images.

    Args:
        state: flattened name -> array, as `dict(numpy.load("checkpoint.npz"))` gives them: "a/b/c", after
            "opt/target/" in the files of the authors. Kernels are (height, width, inputs, outputs).
        network: of `maxim` or `restorer`, of the same stages and scales.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    backbone = network if isinstance(network, Maxim) else network.backbone
    prefix = next((word for word in ("opt/target/", "params/") if any(name.startswith(word) for name in state)), "")
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    turned = {spread(name): turned_kernel(name, torch.as_tensor(value)) for name, value in own.items()}
    if network is backbone:
        return convert(turned, [(r"^stage_\d+_output_conv_", None), *rules()], network)
    last = len(backbone.stages) - 1
    outer = [(rf"^stage_{last}_output_conv_", "outputs."), *rules(), (r"^stages\.", "backbone.stages.")]
    return convert(turned, outer, network)


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> "Effect":
    """Both axes beside one, gated skips beside plain ones, and a U-Net of convolutions, at equal parameters."""
    from vertebra.backbones.maxim.experiment import compared

    return compared(scale, data)
