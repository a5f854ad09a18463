"""Any of timm's networks as a backbone: `timm/convnext_tiny`, `timm/resnet50.a1_in1k`.

One forward pass yields all three kinds of features:

- `pyramid`: the deepest map of each stride, fine to coarse. A network of one stride (a plain ViT) has one
  level, its final map after the final norm.
- `pooled`: what timm's classifier would be given.
- `tokens`: the final sequence, where the network ends in one of `width` channels with at least one token a
  cell of its last map (prefix tokens come first). Networks that end in maps or in several sequences have none.

Levels, width and trunk are measured, not declared: see `vertebra.backbones.twin`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, NoReturn, TypedDict

import torch
from timm import is_model
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from vertebra.backbones.building import B, build, for_channels, pair
from vertebra.backbones.twin import FAILURES, Blueprint, Size, accepted, features, measure, runs, trial
from vertebra.contracts import Backbone, Features, Preprocess
from vertebra.errors import UsageError, near
from vertebra.shipping import weights as weight_files
from vertebra.spec import timm_names

_OURS = {
    "num_classes": "a backbone has no classes",
    "in_chans": "write channels=...",
    "img_size": "write image_size=...",
    "drop_path_rate": "write drop_path=...",
    "pretrained": "write weights='pretrained'",
    "features_only": "the pyramid is always there",
}
"""timm's keywords that have an option of ours, with what to write instead."""


class TimmOptions(TypedDict, total=False):
    """Options of every page that builds on timm.

    Attributes:
        weights: "random"; "pretrained" or a tag of timm's, either with "@revision"; "hf-hub:owner/name"; a
            .safetensors file or a folder. Those of the hub are fetched where they are not here yet. None is
            "pretrained" for a name with a tag and "random" for any other.
        channels: image channels.
        image_size: side in pixels, or (height, width); None takes the network's own.
        drop_path: largest probability that a residual branch is dropped, 0..1.
        network: further keywords of timm's own constructor, such as `{"pad_type": "same"}`.
        allow_pickle: whether a .pth or .bin file may be read, as tensors only.
    """

    weights: str | None
    channels: int
    image_size: int | tuple[int, int] | None
    drop_path: float
    network: Mapping[str, Any] | None
    allow_pickle: bool


def timm(
    name: str,
    *,
    weights: str | None = None,
    channels: int = 3,
    image_size: int | Size | None = None,
    drop_path: float = 0.0,
    network: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> "Timm":
    """Build one of timm's networks.

    Args:
        name: timm's name; one with a tag (`resnet50.a1_in1k`) names its weights too.
        weights: as in `TimmOptions`.
        channels: image channels; pretrained first convolutions are adapted.
        image_size: side in pixels, or (height, width); pretrained position tables are adapted.
        drop_path: largest probability that a residual branch is dropped, 0..1.
        network: further keywords of timm's constructor; they win over those that a weight file states.
        allow_pickle: whether a .pth or .bin file may be read, as tensors only.

    Raises:
        UsageError: an unknown name, tag or option, or a size that the network cannot take.
        VertebraError: weights that are not here and cannot be fetched, or that do not fit.
    """
    size = _checked(name, channels, image_size, drop_path, network or {})
    source = weights or ("pretrained" if "." in name else "random")
    opened = None if source == "random" else weight_files.locate(name, source, allow_pickle=allow_pickle)
    stated: Mapping[str, Any] = opened.config if opened else {}
    if size is None and "input_size" in stated:
        size = pair(stated["input_size"][1:])
    blueprint = _blueprint(name, channels, size, {**(opened.options if opened else {}), **(network or {})})
    built: Any = blueprint.build(drop_path)
    if opened:
        weight_files.load(built, opened, channels)
    return Timm(
        network=built,
        blueprint=blueprint,
        preprocess=preprocess_of({**built.pretrained_cfg, **stated}, channels, size),
        weights_info=opened.info if opened else None,
    )


def build_variant(
    page: str, variants: Mapping[str, Mapping[str, Any]], variant: str, options: Mapping[str, Any]
) -> "Timm":
    """Build a page's variant: `variants[variant]["timm"]` names the network, its other entries are options.

    Raises:
        UsageError: the page has no such variant; the message lists those it has.
    """
    if variant not in variants:
        raise UsageError(f"{page} has no variant {variant!r}{near(variant, variants)}; it has {', '.join(variants)}")
    defaults = dict(variants[variant])
    return timm(defaults.pop("timm"), **{**defaults, **options})


def build_either(
    page: str,
    variants: Mapping[str, Mapping[str, Any]],
    variant: str,
    options: Mapping[str, Any],
    make: Callable[..., B],
    **preprocessing: Any,
) -> "Timm | B":
    """Build a variant of a page that has timm's networks and ones of its own: those whose entry does not name timm's.

    Args:
        page: its name.
        variants: variant -> options.
        variant: one of them.
        options: those of `TimmOptions` for either kind (`network` for timm's alone), any other for its own.
        make: as in `vertebra.backbones.building.build`.
        preprocessing: likewise.

    Raises:
        UsageError: an unknown variant, or an option of the other kind of network.
    """
    if "timm" not in variants.get(variant, {"timm": ""}):
        if options.get("network"):
            raise UsageError(f"{page}/{variant} is none of timm's networks; leave network=... out")
        own = {name: value for name, value in options.items() if name != "network"}
        return build(page, variants, variant, own, make, **preprocessing)
    foreign = sorted(options.keys() - TimmOptions.__annotations__.keys())
    if foreign and variant in variants:
        others = [name for name, entry in variants.items() if "timm" not in entry]
        raise UsageError(
            f"{page}/{variant} is timm's network and has no option {', '.join(foreign)}; {', '.join(others)} have"
        )
    return build_variant(page, variants, variant, options)


class Timm(Backbone):
    """A network of timm's behind the backbone contract.

    Attributes:
        network: timm's module, without its classifier.
        name: timm's name of it.
        weights_info: where the weights come from, or None where they are random.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        blueprint: Blueprint,
        preprocess: Preprocess,
        weights_info: weight_files.WeightsInfo | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = blueprint.name
        self.preprocess = preprocess
        self.weights_info = weights_info
        self._blueprint = blueprint
        self._measured = measure(blueprint)
        self.levels = self._measured.levels
        self.width = self._measured.width

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features.

        Raises:
            UsageError: a shape that the network cannot take; the message says which it can.
        """
        if torch.compiler.is_compiling():
            return features(self.network, images, self._measured)
        try:
            return features(self.network, images, self._measured)
        except FAILURES as error:
            _blame_shape(self._blueprint, images, error)
            raise

    @property
    def options(self) -> dict[str, Any]:
        """Options of `timm` that build the same network again, without looking for weights."""
        found_by_itself = ("in_chans", "img_size", "dynamic_img_size", "dynamic_img_pad")
        keywords = json.loads(self._blueprint.keywords)
        network = {name: value for name, value in keywords.items() if name not in found_by_itself}
        return {"channels": self._blueprint.channels, "image_size": list(self._blueprint.size), "network": network}

    @property
    def altered(self) -> bool:
        """Whether the network has other layers or weights than timm's of that name: a page or surgery changed it."""
        with torch.device("meta"):
            plain = self._blueprint.build()
        layers = ([*map(type, network.modules())] for network in (plain, self.network))
        return plain.state_dict().keys() != self.network.state_dict().keys() or next(layers) != next(layers)

    def trunk(self) -> Sequence[nn.Module]:
        """The blocks in the order in which the signal meets them, stem first.

        Parts without parameters (activations, poolings) and parts that the forward pass never calls are left out.
        """
        parts = [self.network.get_submodule(name) for name in self._measured.parts]
        return [part for part in parts if next(part.parameters(), None) is not None]  # surgery may have emptied some


def _checked(
    name: str, channels: int, image_size: int | Size | None, drop_path: float, network: Mapping[str, Any]
) -> Size | None:
    """Refuse what can be refused before anything is read or built; returns `image_size` as a pair."""
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        raise UsageError(f"timm has no network called {architecture!r}{near(architecture, timm_names())}")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UsageError(f"timm/{architecture} has no tag {tag!r}{near(tag, tags)}; it has {', '.join(tags) or 'none'}")
    if channels < 1:
        raise UsageError(f"timm/{name}: channels is {channels}; it must be at least 1")
    if not 0 <= drop_path < 1:
        raise UsageError(f"timm/{name}: drop_path is {drop_path}; it must be in [0, 1), as 0.1")
    if drop_path and "drop_path_rate" not in accepted(name):
        raise UsageError(f"timm/{name} has no stochastic depth; leave drop_path={drop_path} out")
    for key in network:
        if key in _OURS:
            raise UsageError(f"timm/{name}: network has {key!r}, which is not passed on; {_OURS[key]}")
    return None if image_size is None else pair(image_size)


def _own_size(name: str) -> Size:
    config = get_pretrained_cfg(name)
    _, height, width = config.input_size if config else (3, 224, 224)
    return height, width


def _blueprint(name: str, channels: int, wanted: Size | None, network: Mapping[str, Any]) -> Blueprint:
    """The call that yields a network for these images; UsageError where there is none."""
    known = accepted(name)
    keywords: dict[str, Any] = {"in_chans": channels} if channels != 3 else {}
    keywords |= {freeing: True for freeing in ("dynamic_img_size", "dynamic_img_pad") if freeing in known}
    text = json.dumps({**keywords, **network}, sort_keys=True)
    as_it_is = Blueprint(name, channels, wanted or _own_size(name), text)
    # networks that are built for squares only may still run on any image as they are (MViTv2)
    if wanted and "img_size" in known and trial(sized := as_it_is.resized(wanted)) is None:
        return sized
    error = trial(as_it_is)
    if error is not None:
        _refuse(as_it_is, wanted, network, error)
    return as_it_is


def _refuse(blueprint: Blueprint, wanted: Size | None, network: Mapping[str, Any], error: Exception) -> NoReturn:
    name, reason = f"timm/{blueprint.name}", _first_line(error)
    for key in network:
        if f"'{key}'" in reason and isinstance(error, TypeError):
            hint = near(key, accepted(blueprint.name))
            raise UsageError(f"{name}: its constructor does not take {key}={network[key]!r}{hint}") from error
    remedy = _nearest(wanted, lambda size: trial(blueprint.resized(size)) is None) if wanted else ""
    raise UsageError(
        f"{name} cannot be built for {blueprint.channels}-channel images of {_words(blueprint.size)} pixels"
        f" with {dict(network) or 'its own options'}{remedy} (timm: {reason})"
    ) from error


def _blame_shape(blueprint: Blueprint, images: Tensor, error: Exception) -> None:
    """Raise UsageError where it is the shape of `images` that made the network fail."""
    name = f"timm/{blueprint.name}"
    if images.ndim != 4 or images.shape[1] != blueprint.channels:
        raise UsageError(
            f"{name} takes images (B, {blueprint.channels}, H, W) and got {tuple(images.shape)};"
            " the number of channels is set by channels=..."
        ) from error
    size: Size = (images.shape[2], images.shape[3])
    if runs(blueprint, size):
        return
    if "img_size" in accepted(blueprint.name) and trial(blueprint.resized(size)) is None:
        remedy = f"; build it with image_size={size}"
    else:
        remedy = _nearest(size, lambda other: runs(blueprint, other))
    raise UsageError(
        f"{name} is built for images of {_words(blueprint.size)} pixels and got {_words(size)}{remedy}"
        f" (timm: {_first_line(error)})"
    ) from error


def _nearest(size: Size, works: Callable[[Size], bool]) -> str:
    """A clause that names the first size from `size` up that works, or "" where none is near."""
    for step in (2, 4, 8, 14, 16, 24, 32, 48, 64, 120, 224, 256):
        rounded = ceil(size[0] / step) * step, ceil(size[1] / step) * step
        for candidate in dict.fromkeys([rounded, (max(rounded), max(rounded))]):
            if candidate != size and works(candidate):
                return f"; the nearest size that works is {_words(candidate)}"
    return ""


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def preprocess_of(config: Mapping[str, Any], channels: int = 3, size: Size | None = None) -> Preprocess:
    """What a pretrained configuration of timm's asks of the images.

    Args:
        config: timm's keys (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`).
        channels: image channels; one takes the mean of the colours' statistics, more repeat them.
        size: (height, width) in place of the configuration's.
    """
    _, height, width = config["input_size"]
    interpolation = config.get("interpolation")
    return Preprocess(
        size=size or (height, width),
        mean=for_channels(config["mean"], channels),
        std=for_channels(config["std"], channels),
        interpolation=interpolation if interpolation in ("nearest", "bilinear", "lanczos") else "bicubic",
        crop=config.get("crop_pct", 1.0),
        fit="squash" if config.get("crop_mode") == "squash" else "crop",
    )
