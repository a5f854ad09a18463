"""What the backbones written here share: their options, the images they are given, weights from a file.

No page: it builds nothing by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from vertebra.contracts import Backbone, Preprocess
from vertebra.errors import UsageError, near
from vertebra.shipping import weights as weight_files

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BackboneOptions(TypedDict, total=False):
    """Options of every backbone that is written here.

    Attributes:
        weights: "random" (the default), a .safetensors file, or a checkpoint folder of vertebra's. Published weights
            are renamed by the page's `published`.
        channels: image channels.
        image_size: side in pixels, or (height, width), that images are brought to.
        drop_path: largest probability that a residual branch is dropped, 0..1.
        allow_pickle: whether a .pth file may be read, as tensors only.
    """

    weights: str | None
    channels: int
    image_size: int | tuple[int, int] | None
    drop_path: float
    allow_pickle: bool


B = TypeVar("B", bound=Backbone)


def build(
    page: str,
    variants: Mapping[str, Mapping[str, Any]],
    variant: str,
    options: Mapping[str, Any],
    make: Callable[..., B],
    *,
    crop: float = 0.875,
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> B:
    """Build a page's variant.

    `make` gets `preprocess` and every option but `weights`, `allow_pickle`, `channels` and `image_size`. With weights,
    the network needs an attribute `pretrained_cfg`, as timm's have: `{"first_conv": NAME, "classifier": NAME}`.

    Args:
        page: its name, for messages.
        variants: variant -> options; `image_size` is 224 where neither side gives one.
        variant: one of them.
        options: win over the variant's.
        make: the backbone's class, or a function that returns one.
        crop: share of a resized image that the central crop keeps.
        interpolation: Pillow's filter by name.
        mean: of the three colours; one channel takes their mean, more repeat them.
        std: likewise.

    Raises:
        UsageError: an unknown variant, or an option out of range.
        VertebraError: weights that do not fit.
    """
    if variant not in variants:
        raise UsageError(f"{page} has no variant {variant!r}{near(variant, variants)}; it has {', '.join(variants)}")
    chosen = {**variants[variant], **options}
    weights, allow_pickle = chosen.pop("weights", None), chosen.pop("allow_pickle", False)
    channels, size = chosen.pop("channels", 3), chosen.pop("image_size", None) or 224
    if channels < 1:
        raise UsageError(f"{page}: channels is {channels}; it must be at least 1")
    if not 0 <= chosen.get("drop_path", 0.0) < 1:
        raise UsageError(f"{page}: drop_path is {chosen['drop_path']}; it must be in [0, 1), as 0.1")
    statistics = for_channels(mean, channels), for_channels(std, channels)
    preprocess = Preprocess(pair(size), *statistics, interpolation, crop)
    network = make(preprocess=preprocess, **chosen)
    if weights not in (None, "random"):
        network.weights_info = load(network, f"{page}/{variant}", weights, allow_pickle)  # type: ignore[assignment]
    return network


def load(network: Backbone, address: str, weights: str, allow_pickle: bool) -> weight_files.WeightsInfo:
    """Put a weight file into a backbone; returns where it comes from.

    Raises:
        UsageError: weights that would have to be fetched.
        VertebraError: weights that do not fit.
    """
    if weights == "pretrained":
        raise UsageError(f"{address} has no weights that are fetched; give the file of the published ones")
    opened = weight_files.locate(address, weights, allow_pickle=allow_pickle)
    weight_files.load(network, opened, network.preprocess.channels)
    return opened.info


def check_images(backbone: Backbone, images: Tensor, *, least: int = 1, exact: bool = False) -> None:
    """Refuse images that a backbone cannot take, before something fails deep inside; nothing while it is traced.

    Args:
        backbone: what they are for.
        images: (B, channels, H, W).
        least: smallest side in pixels.
        exact: whether sides must be those of `backbone.preprocess.size`.

    Raises:
        UsageError: another number of channels or dimensions, or a size that does not work; says which does.
    """
    if torch.compiler.is_compiling():
        return
    name, channels = type(backbone).__name__, backbone.preprocess.channels
    if images.ndim != 4 or images.shape[1] != channels:
        raise UsageError(
            f"{name} takes images (B, {channels}, H, W) and got {tuple(images.shape)}; the number of channels is set by"
            " channels=..."
        )
    height, width = images.shape[2:]
    wanted = backbone.preprocess.size
    if exact and (height, width) != tuple(wanted):
        raise UsageError(
            f"{name} is built for images of {wanted[0]}x{wanted[1]} pixels and got {height}x{width}; build it with"
            f" image_size=({height}, {width})"
        )
    if min(height, width) < least:
        raise UsageError(f"{name} takes images of at least {least}x{least} pixels and got {height}x{width}")


def check_at_least(page: str, least: int, **options: Any) -> None:
    """Refuse options, numbers or sequences of them, below `least`.

    Raises:
        UsageError: names the page, the option, its value and the bound.
    """
    for name, value in options.items():
        numbers = value if isinstance(value, Sequence) else (value,)
        if not numbers or min(numbers) < least:
            raise UsageError(f"{page}: {name} is {value}; it must be at least {least}")


def drop_rates(largest: float, depths: Sequence[int]) -> list[list[float]]:
    """Probabilities that a residual branch is dropped, rising linearly from 0 over all blocks: a list a stage."""
    total, rates, done = sum(depths), [], 0
    for depth in depths:
        rates.append([largest * (done + block) / max(1, total - 1) for block in range(depth)])
        done += depth
    return rates


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels.

    Raises:
        UsageError: it is neither a side nor two.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise UsageError(f"image_size is {size!r}; write a side in pixels or (height, width), as 224 or (224, 288)")
    return sides[0], sides[1]


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of three colours for any number of channels: their mean for one, repeated for more."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))
