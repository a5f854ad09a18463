"""Who fights: addresses as a user writes them, the default line-up, and what is known of each before it runs."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vertebra.config import split_address
from vertebra.contracts import Backbone
from vertebra.data.dataset import Dataset
from vertebra.errors import UsageError, near
from vertebra.spec import Spec, options_of
from vertebra.training.running import has_weights

Training = Literal["pretrained", "scratch"]

PRETRAINED = (
    "timm/resnet50.a1_in1k",
    "timm/convnext_nano.in12k_ft_in1k",
    "timm/efficientnet_b0.ra_in1k",
    "timm/mobilenetv4_conv_medium.e500_r256_in1k",
    "timm/regnety_016.tv2_in1k",
    "timm/swin_tiny_patch4_window7_224.ms_in1k",
    "timm/vit_small_patch14_dinov2.lvd142m",
    "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
)
"""Good weights of different families, 5 to 30 M parameters."""

SCRATCH = (
    "timm/test_resnet",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "timm/test_byobnet",
    "timm/test_mambaout",
    "timm/test_vit",
)
"""Networks of different families, small enough to be trained here and now."""

COMMERCIAL = ("apache", "mit", "bsd", "isc", "cc0", "cc-by-4.0", "cc-by-3.0", "unlicense", "openrail")
"""Beginnings of licences that allow commercial use."""


@dataclass(frozen=True)
class Contender:
    """A backbone as a battle takes it.

    Attributes:
        name: short and unique in the battle.
        spec: what is built.
        training: "pretrained" (frozen for the feature probes) or "scratch" (trained on the training images first);
            None lets the weights decide: a backbone that says where its weights come from is pretrained.
    """

    name: str
    spec: Spec
    training: Training | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a contender before its cells run.

    Attributes:
        training: "pretrained" or "scratch".
        weights: source, tag, revision and licence, or None where they are made here.
        params_m: parameters in millions.
        gmacs: multiply-accumulates of one image, in 10^9.
        size: (height, width) that it sees.
        forward: seconds an image of a forward pass on this machine.
        step: seconds an image of a training step on this machine.
    """

    training: Training
    weights: Mapping[str, str] | None
    params_m: float
    gmacs: float
    size: tuple[int, int]
    forward: float
    step: float


def parse(
    addresses: Iterable[str | Spec],
    weights: Mapping[str, str] = {},
    image_size: int | None = None,
    *,
    pretrained: bool = False,
) -> tuple[Contender, ...]:
    """Addresses to contenders; all names and options are checked, nothing is built or downloaded.

    An address may carry options as a query: `timm/resnet18?weights=pretrained&image_size=160`. The option
    `training=pretrained|scratch` is the battle's own, for a `module:callable` that loads its weights by itself.

    Args:
        addresses: at least one.
        weights: address -> its weights, as the option would say.
        image_size: side in pixels for every contender that takes one and does not set its own.
        pretrained: whether contenders that say nothing of weights take their published ones.

    Raises:
        UsageError: an unknown name or option, or the same contender twice.
    """
    texts = list(addresses)
    known = [text.address if isinstance(text, Spec) else text.partition("?")[0] for text in texts]
    for name in weights:
        if name not in known:
            raise UsageError(
                f"--weights {name}=...: no contender has that address{near(name, known)}; they are {', '.join(known)}"
            )
    general = {"image_size": image_size, "weights": "pretrained" if pretrained else None}
    contenders = [_one(text, weights, general) for text in texts]
    plain = [contender.name for contender in contenders]
    named = [_full_name(c) if plain.count(c.name) > 1 else c for c in contenders]
    for contender in named:
        if [c.name for c in named].count(contender.name) > 1:
            raise UsageError(f"contender {contender.name} is given twice")
    return tuple(named)


def _one(text: str | Spec, weights: Mapping[str, str], general: Mapping[str, Any]) -> Contender:
    training = None
    if isinstance(text, Spec):
        address, options = text.address, dict(text.options)
    else:
        address, options = split_address(text)
        training = options.pop("training", None)
        if training not in (None, "pretrained", "scratch"):
            raise UsageError(f"{text}: training is {training!r}; it must be pretrained or scratch")
    if address in weights:
        options["weights"] = weights[address]
    spec = Spec(address, options)
    more = {name: value for name, value in general.items() if value and name not in options and _takes(spec, name)}
    if training == "scratch" or has_weights(spec):
        more.pop("weights", None)
    return Contender(address, replace(spec, options={**options, **more}), training)


def _takes(spec: Spec, option: str) -> bool:
    known = options_of(spec.resolve()[0])
    return option in known or "" in known


def _full_name(contender: Contender) -> Contender:
    options = "&".join(f"{name}={value}" for name, value in contender.spec.options.items())
    return replace(contender, name=f"{contender.name}?{options}" if options else contender.name)


def defaults(image_size: int, *, pretrained: bool = False) -> tuple[tuple[Contender, ...], str]:
    """The line-up of a user who names nobody, and a sentence that says which and why.

    Weights that are on this machine are used; the network is asked only where `pretrained` says so. With fewer than
    two pretrained contenders the line-up is one that trains from scratch.

    Args:
        image_size: side in pixels for contenders that train from scratch.
        pretrained: whether weights may be fetched.

    Raises:
        UsageError: `pretrained` while the hub's variables forbid it.
    """
    from vertebra.shipping.weights import offline

    if pretrained and offline():
        raise UsageError(
            "weights cannot be fetched while VERTEBRA_OFFLINE or HF_HUB_OFFLINE is set; unset it, or drop --pretrained"
        )
    here = [address for address in PRETRAINED if pretrained or is_cached(address)]
    if len(here) >= 2:
        why = "may be fetched" if pretrained else "are on this machine"
        return parse(here), f"contenders: {len(here)} pretrained networks of different families whose weights {why}"
    why = (
        f"contenders: {len(SCRATCH)} small networks of different families, trained here from scratch at {image_size} "
        "pixels, because no pretrained weights are on this machine; --pretrained fetches some, -m names your own"
    )
    return parse(SCRATCH, image_size=image_size), why


def scratch_size(data: Dataset, looks: int = 64) -> int:
    """Side in pixels for contenders that train from scratch: 32 for small images, 64 for others."""
    train = data.split("train")
    chosen = range(0, len(train), max(1, len(train) // looks))
    sides = sorted(min(train.image(index, least=(64, 64)).size) for index in chosen)
    return 32 if sides[len(sides) // 2] <= 32 else 64


def is_cached(address: str) -> bool:
    """Whether the hub's cache on this machine has the weights of `timm/NAME.TAG`."""
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(address.removeprefix("timm/"))
    if config is None or not config.hf_hub_id:
        return False
    return isinstance(try_to_load_from_cache(config.hf_hub_id, "model.safetensors"), str)


def inspect(contender: Contender, device: str = "cpu") -> Facts:
    """Build a contender, count it and time it on a few random images.

    Raises:
        VertebraError: it cannot be built; the message says why.
    """
    from vertebra.training.cost import count
    from vertebra.training.loop import random_states_kept

    with random_states_kept():
        backbone = contender.spec.build().eval().to(device)
    info = getattr(backbone, "weights_info", None)
    cost = count(backbone)
    weights = None
    if info is not None:
        weights = {name: getattr(info, name) for name in ("source", "tag", "revision", "licence")}
    training = contender.training or ("scratch" if info is None else "pretrained")
    forward, step = _seconds(backbone, device, training)
    return Facts(training, weights, cost.params / 1e6, cost.macs / 1e9, backbone.preprocess.size, forward, step)


def _seconds(backbone: Backbone, device: str, training: Training) -> tuple[float, float]:
    """Seconds an image of a forward pass and of a training step, the better of two after a warm-up.

    A contender that is not trained here is not asked for a step: it is taken as three forward passes.
    """
    import torch

    height, width = backbone.preprocess.size
    images = 32 if height * width <= 64 * 64 else 8
    batch = torch.rand(images, backbone.preprocess.channels, height, width, device=device)

    def forward() -> None:
        with torch.inference_mode():
            backbone(batch).pooled.sum().item()

    def step() -> None:
        backbone(batch).pooled.square().mean().backward()

    def best(call: Callable[[], None]) -> float:
        call()
        times = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times) / images

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have it; two threads on a busy machine would measure their waiting
    try:
        seconds = best(forward)
        return seconds, best(step) if training == "scratch" else 3 * seconds
    finally:
        torch.set_num_threads(threads)


def allows_commercial(licence: str) -> bool:
    """Whether a licence is known to allow commercial use."""
    return licence.lower().startswith(COMMERCIAL)
