"""Training views: random crops, flips, colours, policies and mixes, each a function of (seed, epoch, index) alone.

Every random number comes from a Philox generator whose key is (seed, epoch) and whose counter is the image's
index, so a view needs no state: any worker, or a resumed run, makes the same one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from vertebra.config import Views
from vertebra.contracts import Preprocess
from vertebra.data.pixels import FILTERS, as_array, mode_of
from vertebra.errors import UsageError

STREAMS = ("view", "order", "mix")
CROP_TRIES = 10
BLUR_SIGMA, BLUR_SIDE = (0.1, 2.0), 224  # SimCLR, arXiv 2002.05709, appendix A
ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # Random Erasing, arXiv 1708.04896
RANDAUGMENT_MAGNITUDE, AUGMIX_SEVERITY = 9, 3
_WORD = (1 << 64) - 1

Box = tuple[int, int, int, int]


class Placement(NamedTuple):
    """Where a view lies in an image.

    Attributes:
        box: (left, top, right, bottom) in pixels of the image; right and bottom are outside.
        flipped: whether left and right are swapped afterwards.
    """

    box: Box
    flipped: bool


def generator(
    seed: int, epoch: int, index: int, stream: Literal["view", "order", "mix"] = "view", number: int = 0
) -> np.random.Generator:
    """Random numbers that depend on these five only; made in about 8 microseconds.

    The counter's lowest word is left to the draws, so that streams never overlap.
    """
    key = np.array([seed & _WORD, epoch & _WORD], dtype=np.uint64)
    counter = np.array([0, index & _WORD, STREAMS.index(stream), number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def check(views: Views) -> None:
    """Refuse views that cannot be drawn.

    Raises:
        UsageError: the message names the field, its value and what is allowed.
    """
    if not 0 < views.scale[0] <= views.scale[1] <= 1:
        raise UsageError(f"views.scale is {views.scale}; it must rise within 0..1 and start above 0, as (0.5, 1)")
    if not 0 < views.ratio[0] <= views.ratio[1]:
        raise UsageError(f"views.ratio is {views.ratio}; it must rise and start above 0, as (0.75, 1.333)")
    for name in ("flip", "jitter", "jitter_chance", "grey", "blur", "erase"):
        if not 0 <= getattr(views, name) <= 1:
            raise UsageError(f"views.{name} is {getattr(views, name)}; it must be in 0..1")
    if not 0 <= views.hue <= 0.5:
        raise UsageError(f"views.hue is {views.hue}; it must be in 0..0.5")
    if views.size is not None and views.size < 1:
        raise UsageError(f"views.size is {views.size}; it must be at least 1 pixel")
    for name in ("mixup", "cutmix"):
        if not 0 <= getattr(views, name) < math.inf:
            raise UsageError(f"views.{name} is {getattr(views, name)}; it must be 0 (off) or above")


def view(
    image: Image.Image | np.ndarray,
    index: int,
    epoch: int,
    seed: int,
    views: Views,
    preprocess: Preprocess,
    strength: float = 1.0,
    *,
    policy: float = 1.0,
    number: int = 0,
) -> np.ndarray:
    """The training view of one image in one epoch.

    Args:
        image: the source: mode "RGB" or "L", or what `source` made of it. See `least_viewed` for its size.
        index: position in the split.
        epoch: from 0.
        seed: of the run.
        views: how images are varied.
        preprocess: size, filter and channels.
        strength: 0 (the central square, not varied) to 1 (what `views` says).
        policy: strength of `views.policy` on top of that, 0..1.
        number: which view of the image, from 0, where a batch has several.

    Returns:
        (H, W, C) uint8; may be a strided or broadcast view of memory that nothing else holds.

    Raises:
        UsageError: the network takes neither 1 nor 3 channels.
    """
    pixels = source(image, preprocess) if isinstance(image, Image.Image) else image
    random = generator(seed, epoch, index, number=number)
    (left, top, right, bottom), flipped = place(pixels.shape[1], pixels.shape[0], views, random, strength)
    pixels = _scaled(pixels[top:bottom, left:right], preprocess)
    if flipped:
        pixels = pixels[:, ::-1]
    if strength and (views.policy != "none" or views.jitter or views.hue or views.grey or views.blur):
        pixels = _coloured(pixels, views, random, strength, policy)
    if random.random() < views.erase * strength:
        pixels = _erase(pixels, preprocess, random)
    return np.broadcast_to(pixels, (*pixels.shape[:2], preprocess.channels))  # grey to RGB costs nothing


def source(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """What views of an image are made from, whatever the epoch: (H, W, 1 or 3) uint8; grey stays grey."""
    mode = mode_of(preprocess)
    pixels = np.array(image if image.mode in ("L", mode) else image.convert(mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _scaled(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Pixels (h, w, c) at the network's size, antialiased.

    torch's kernel for uint8 differs from Pillow's by rounding and takes a quarter of its time; it has no
    "nearest" or "lanczos" of Pillow's kind.
    """
    height, width = preprocess.size
    if preprocess.interpolation in ("bilinear", "bicubic"):
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, c, h, w)
        planes = interpolate(planes, (height, width), mode=preprocess.interpolation, antialias=True)
        return planes[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return as_array(image.resize((width, height), FILTERS[preprocess.interpolation]))


def _eased(views: Views, strength: float) -> tuple[float, float, float, float]:
    """Smallest and largest area share and log aspect ratio at a strength; at 0 the whole image, square."""
    low, high = (1 + strength * (share - 1) for share in views.scale)
    narrow, wide = (strength * math.log(ratio) for ratio in views.ratio)
    return low, high, narrow, wide


def crop_box(width: int, height: int, views: Views, random: np.random.Generator, strength: float = 1.0) -> Box:
    """A random crop of an image: area uniform in `views.scale`, aspect log-uniform in `views.ratio`.

    The distribution of torchvision's `RandomResizedCrop` (Inception crops, arXiv 1409.4842), with its fallback to
    a central crop after ten misfits.

    Returns:
        (left, top, right, bottom) in pixels; right and bottom are outside.
    """
    low, high, narrow, wide = _eased(views, strength)
    for _ in range(CROP_TRIES):
        area = width * height * (low + (high - low) * random.random())
        aspect = math.exp(narrow + (wide - narrow) * random.random())
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(random.random() * (width - across + 1)), int(random.random() * (height - down + 1))
            return left, top, left + across, top + down
    aspect = min(max(width / height, math.exp(narrow)), math.exp(wide))
    across, down = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def place(width: int, height: int, views: Views, random: np.random.Generator, strength: float = 1.0) -> Placement:
    """Where a view lies in an image: the first random numbers of every view."""
    box = crop_box(width, height, views, random, strength)
    return Placement(box, random.random() < views.flip * strength)


def least_viewed(views: Views, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) that a source needs so that its smallest crop is not enlarged.

    A crop of area share `a` and aspect `r` is at least `side * sqrt(a * r)` wide in an image whose shorter side
    is `side`. The same for every epoch and strength, so that a decoded image can be kept.
    """
    height, width = preprocess.size
    share = views.scale[0]
    side = max(width / math.sqrt(share * views.ratio[0]), height * math.sqrt(views.ratio[1] / share))
    return math.ceil(side), math.ceil(side)


def _coloured(
    pixels: np.ndarray, views: Views, random: np.random.Generator, strength: float, policy: float
) -> np.ndarray:
    """Pixels (H, W, c) after the policy, the colour changes and the blur, which work on Pillow's images."""
    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
    if views.policy != "none":
        image = _policy(image, views.policy, random, strength * policy)
    if (views.jitter or views.hue) and (views.jitter_chance == 1 or random.random() < views.jitter_chance):
        if views.jitter:
            image = _jitter(image, views.jitter * strength, random)
        if views.hue and image.mode == "RGB":
            image = _turned(image, views.hue * strength, random)
    if views.grey and random.random() < views.grey * strength:
        image = image.convert("L")
    if views.blur and random.random() < views.blur * strength:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_SIGMA) * max(image.size) / BLUR_SIDE))
    return as_array(image)


def _jitter(image: Image.Image, amount: float, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each by a factor in 1 +- amount, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = 1 + amount * (2 * random.random(3) - 1)
    for place in random.permutation(3):
        if place < 2 or image.mode == "RGB":  # grey has no saturation
            image = enhancers[place](image).enhance(max(0.0, float(factors[place])))
    return image


def _turned(image: Image.Image, amount: float, random: np.random.Generator) -> Image.Image:
    """The hue turned by up to `amount` of the colour circle, either way."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(256 * amount * (2 * random.random() - 1))
    return Image.merge("HSV", (hue.point([(h + shift) % 256 for h in range(256)]), saturation, value)).convert("RGB")


def _erase(pixels: np.ndarray, preprocess: Preprocess, random: np.random.Generator) -> np.ndarray:
    """Fill a random rectangle with the mean colour, which is zero to the network."""
    height, width = pixels.shape[:2]
    for _ in range(CROP_TRIES):
        area = height * width * random.uniform(*ERASE_SCALE)
        aspect = math.exp(random.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        down, across = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < down < height and 0 < across < width:
            top, left = random.integers(height - down + 1), random.integers(width - across + 1)
            pixels = pixels.copy()  # what Pillow hands out is read-only
            pixels[top : top + down, left : left + across] = np.rint(255 * np.asarray(preprocess.mean))[
                : pixels.shape[2]
            ]
            break
    return pixels


@cache
def _policy_of(name: str, magnitude: int) -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import v2

    if name == "randaugment":
        return v2.RandAugment(magnitude=magnitude)
    if name == "augmix":
        return v2.AugMix(severity=magnitude)
    return v2.TrivialAugmentWide()


def _policy(image: Image.Image, name: str, random: np.random.Generator, strength: float) -> Image.Image:
    """One of torchvision's policies.

    Strength scales the magnitude of RandAugment and the severity of AugMix. TrivialAugment has neither: it is
    applied to that share of the images.
    """
    seed, chance = int(random.integers(1 << 62)), random.random()
    magnitude = {"randaugment": RANDAUGMENT_MAGNITUDE, "augmix": AUGMIX_SEVERITY}.get(name, 0)
    if strength == 0 or (name == "trivialaugment" and chance >= strength):
        return image
    with _torch_seeded(seed):
        return _policy_of(name, max(1, round(magnitude * strength)) if magnitude else 0)(image)


@contextmanager
def _torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which torchvision draws from, then give it back as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def mix(
    images: Tensor, targets: Tensor, classes: int, views: Views, seed: int, epoch: int, step: int, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch; where both are on, one of them by chance.

    Neighbours are mixed with each other, in place: the order is random already, and so a rank needs no image of
    another rank as long as its share of the batch is even. An odd last image stays as it is.

    Args:
        images: (B, C, H, W) float, changed in place.
        targets: (B,) int64 or (B, classes) float.
        classes: columns of the targets that come out.
        views: the alphas.
        seed: of the run.
        epoch: from 0.
        step: of the epoch, from 0.
        strength: share of the batches that are mixed, 0..1.

    Returns:
        The images, and targets (B, classes) float32 whose rows keep their sum.
    """
    soft = targets.float() if targets.ndim == 2 else one_hot(targets, classes).float()
    random = generator(seed, epoch, step, "mix")
    chances = random.random(2)
    if chances[0] >= strength or not (views.mixup or views.cutmix):
        return images, soft
    cut = views.cutmix > 0 and (views.mixup == 0 or chances[1] < 0.5)
    alpha = views.cutmix if cut else views.mixup
    share = float(random.beta(alpha, alpha))
    pairs = len(images) // 2 * 2
    if cut:
        share = _cut(images[:pairs], share, random)
    else:
        _blend(images[:pairs], share)
    _blend(soft[:pairs], share)
    return images, soft


def _blend(values: Tensor, share: float) -> None:
    """Make of each neighbouring pair (a, b), in place, share * a + (1 - share) * b and the reverse."""
    pairs = values.unflatten(0, (-1, 2))  # (B / 2, 2, ...)
    pairs.lerp_(pairs.flip(1), 1 - share)


def _cut(images: Tensor, share: float, random: np.random.Generator) -> float:
    """Swap a rectangle of area 1 - share between neighbours, in place; returns the share that was really kept."""
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    down, across = round(height * side), round(width * side)
    middle, centre = int(random.integers(height)), int(random.integers(width))
    top, bottom = max(0, middle - down // 2), min(height, middle + (down + 1) // 2)
    left, right = max(0, centre - across // 2), min(width, centre + (across + 1) // 2)
    window = images[:, :, top:bottom, left:right].unflatten(0, (-1, 2))
    window.copy_(window.flip(1))
    return 1 - (bottom - top) * (right - left) / (height * width)
