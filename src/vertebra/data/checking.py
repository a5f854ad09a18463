"""What is wrong with a dataset, before anything is trained on it.

=====================  =========  ==================================================================
kind                   rank       what it says
=====================  =========  ==================================================================
unreadable             defect     an image cannot be decoded
duplicate-across       defect     the same pixels are in two splits: scores on one flatter
one-class              defect     all labelled images have one class: there is nothing to tell apart
near-duplicate-across  warning    almost the same picture is in two splits
duplicate-within       warning    the same pixels are twice in one split
two-labels             warning    the same pixels have different labels
empty-class            warning    a class has no image in some split
few-images             warning    a class has fewer than 10 images to train on
imbalance              warning    the largest class has more than 10 times the images of the smallest
tiny-images            warning    images with a side under 32 pixels
note                   warning    what the reader had to say
=====================  =========  ==================================================================

Of boxes and keypoints, the kinds of `vertebra.data.geometry` besides; and of other annotations

=====================  =========  ==================================================================
mask                   defect     a mask of another size, or with a value that is no class
panoptic               defect     a PNG and its json disagree
pair                   defect     a clean image that does not fit its degraded one
video                  defect     a clip that cannot be decoded, or frames that are missing
mask-turned            warning    an image with an EXIF turn whose mask may not be turned
video-cut              warning    a clip that ends before its header says
caption-shared         warning    images of two splits with one caption
=====================  =========  ==================================================================

Equal means: equal pixels after decoding at 256 pixels or more. Almost equal means: the differences between
neighbours of the 16 x 16 pixel grey thumbnails correlate by 0.93 or more. Re-encoding, resizing and brightness
leave 0.95 and more; different photographs of one kind of object, up to 0.88 (clothing10, PACS). Images under 32
pixels and blank ones are too alike to be judged so.
"""

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vertebra.data.dataset import Dataset, Split
from vertebra.errors import DataError

_DECODED = (256, 256)
_TINY, _FEW, _IMBALANCE = 32, 10, 10
_THUMBNAIL, _NEAR, _BLANK, _BLOCK = 16, 0.93, 1.5, 1024
_CHUNK = 64

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: one of the kinds in the tables of `vertebra.data.checking` and `vertebra.data.geometry`.
        where: the image, class or split.
        message: what is wrong with it.
    """

    kind: str
    where: str
    message: str


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        path: the data.
        layout: what it was read as.
        label: one label an image, many, or none.
        defects: what makes results wrong; the command exits with 3.
        warnings: what a reader of the results should know.
        counts: split -> class -> images; unlabelled splits count their images under "".
        images: images looked at.
        seconds: what looking took.
    """

    path: str
    layout: str
    label: str
    defects: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    counts: Mapping[str, Mapping[str, int]]
    images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


class _Look(NamedTuple):
    """What is kept of one image: a reason where it cannot be read."""

    reason: str = ""
    pixels: bytes = b""
    edges: np.ndarray | None = None
    side: int = 0
    whole: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class _Seen:
    """A split and what was seen of its readable images.

    Attributes:
        split: the readable images.
        bad: (name, reason) of the others.
        pixels: a digest of the pixels an image.
        edges: (n, 480) float16, signatures; zero where an image is too small or blank for one.
        sides: (n,) shorter sides in pixels.
        sizes: (n, 2) height and width as shown.
    """

    split: Split
    bad: list[tuple[str, str]]
    pixels: list[bytes]
    edges: np.ndarray
    sides: np.ndarray
    sizes: np.ndarray


def check(dataset: Dataset, workers: int | None = None) -> CheckReport:
    """Decode every image and look for what makes results wrong.

    Args:
        dataset: the data, as `vertebra.data.read` returns it.
        workers: threads that decode; one a processor where not given.
    """
    from vertebra.data import geometry  # which needs Finding from here

    start = time.perf_counter()
    annotated = [finding for split in dataset.splits.values() for finding in _annotated(split)]
    if any(finding.kind in UNCOUNTABLE for finding in annotated):
        dataset = _without_targets(dataset)
    seen = [_see(split, workers) for split in dataset.splits.values()]
    annotated += [finding for one in seen for finding in geometry.faults(one.split, one.sizes)]
    wrong = {*geometry.DEFECTS, *DEFECTS}
    defects = [
        *(Finding("unreadable", name, reason) for one in seen for name, reason in one.bad),
        *_across(seen),
        *_one_class(dataset),
        *(finding for finding in annotated if finding.kind in wrong),
    ]
    warnings = [
        *_near_across(seen),
        *(finding for one in seen for finding in _within(one)),
        *_two_labels(seen),
        *_class_sizes(dataset),
        *(finding for one in seen for finding in _tiny(one)),
        *(finding for finding in annotated if finding.kind not in wrong),
        *(Finding("note", dataset.path, note) for note in dataset.notes),
    ]
    counts = {name: _counts(split) for name, split in dataset.splits.items()}
    images = sum(map(len, dataset.splits.values()))
    seconds = round(time.perf_counter() - start, 3)
    return CheckReport(
        dataset.path, dataset.layout, dataset.label, tuple(defects), tuple(warnings), counts, images, seconds
    )


DEFECTS = ("mask", "panoptic", "pair", "video")
"""Kinds of faults of annotations that make results wrong."""
UNCOUNTABLE = ("mask", "panoptic")
"""Kinds after which it cannot be said what classes an image shows."""


def _annotated(split: Split) -> Iterator[Finding]:
    """What is wrong with masks, pairs, words and videos; each module looks for its own."""
    from vertebra.data import image_text, masks, pairs, panoptic, videos

    for module in (masks, panoptic, pairs, image_text, videos):
        yield from module.faults(split)


def _without_targets(dataset: Dataset) -> Dataset:
    """The same images without classes, which broken masks do not tell."""
    splits = {
        name: Split(split.name, split.classes, split.names, None, split.store, split.rows, split.annotations)
        for name, split in dataset.splits.items()
    }
    return replace(dataset, label="none", splits=splits)


def quarantine(split: Split, workers: int | None = None) -> tuple[Split, list[tuple[str, str]]]:
    """Decode every image of a split and set aside those that cannot be read.

    Args:
        split: the images.
        workers: threads that decode; one a processor where not given.

    Returns:
        The readable images, and (name, reason) of the others.
    """
    reasons = _each(split, _reason, workers)
    good = [index for index, reason in enumerate(reasons) if not reason]
    bad = [(str(split.names[index]), reason) for index, reason in enumerate(reasons) if reason]
    return (split.select(good) if bad else split), bad


def _reason(split: Split, index: int) -> str:
    """Why an image cannot be read, or ""."""
    try:
        split.image(index, least=(1, 1))
    except DataError as error:
        return str(error)
    return ""


def _each(split: Split, look: Callable[[Split, int], Result], workers: int | None) -> list[Result]:
    """`look` at every image, in threads: decoders release the interpreter lock."""

    def some(start: int) -> list[Result]:
        return [look(split, index) for index in range(start, min(start + _CHUNK, len(split)))]

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return [result for results in pool.map(some, range(0, len(split), _CHUNK)) for result in results]


def _look(split: Split, index: int) -> _Look:
    try:
        image = split.image(index, least=_DECODED)
    except DataError as error:
        return _Look(str(error))
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    width, height = image.info.get("whole", image.size)
    return _Look("", digest.digest(), signature(image), min(image.size), (height, width))


def signature(image: Image.Image) -> np.ndarray:
    """Differences between neighbours in the grey thumbnail, (480,) float16 of length 1, so that products correlate.

    All zero for an image that has a side under 32 pixels or is almost blank.
    """
    grey = image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX, reducing_gap=2)
    pixels = np.asarray(grey, dtype=np.float32)
    edges = np.concatenate([np.diff(pixels, axis=0).ravel(), np.diff(pixels, axis=1).ravel()])
    length = float(np.linalg.norm(edges))
    if min(image.size) < _TINY or length < _BLANK * edges.size**0.5:
        return np.zeros(edges.size, np.float16)
    return (edges / length).astype(np.float16)


def _see(split: Split, workers: int | None) -> _Seen:
    looks = _each(split, _look, workers)
    good = [index for index, look in enumerate(looks) if not look.reason]
    bad = [(str(split.names[index]), look.reason) for index, look in enumerate(looks) if look.reason]
    edges = np.array([looks[index].edges for index in good], dtype=np.float16).reshape(
        -1, 2 * _THUMBNAIL * (_THUMBNAIL - 1)
    )
    sides = np.array([looks[index].side for index in good], dtype=np.int64)
    sizes = np.array([looks[index].whole for index in good], dtype=np.int64).reshape(-1, 2)
    return _Seen(split.select(good), bad, [looks[index].pixels for index in good], edges, sides, sizes)


def _pairs(seen: Sequence[_Seen]) -> Iterator[tuple[_Seen, _Seen]]:
    """Every two splits, the later one first: its images are the ones that leak."""
    for number, later in enumerate(seen):
        for earlier in seen[:number]:
            yield later, earlier


def _across(seen: Sequence[_Seen]) -> Iterator[Finding]:
    for later, earlier in _pairs(seen):
        known = {pixels: index for index, pixels in enumerate(earlier.pixels)}
        for index, pixels in enumerate(later.pixels):
            if pixels in known:
                other = earlier.split.names[known[pixels]]
                message = f"same pixels in {later.split.name} and {earlier.split.name}: {other}"
                yield Finding("duplicate-across", str(later.split.names[index]), message)


def _near_across(seen: Sequence[_Seen]) -> Iterator[Finding]:
    for later, earlier in _pairs(seen):
        equal = set(earlier.pixels)
        for index, other, correlation in _nearest(later.edges, earlier.edges):
            if later.pixels[index] not in equal:
                message = f"almost {earlier.split.names[other]} of {earlier.split.name} (correlation {correlation:.2f})"
                yield Finding("near-duplicate-across", str(later.split.names[index]), message)


def _nearest(queries: np.ndarray, edges: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """A query, its nearest signature among `edges` and their correlation, where that is high."""
    if not len(queries) or not len(edges):
        return
    known = edges.astype(np.float32).T  # (480, n)
    for start in range(0, len(queries), _BLOCK):
        correlations = queries[start : start + _BLOCK].astype(np.float32) @ known  # (block, n)
        best = correlations.argmax(1)
        highest = correlations[np.arange(len(best)), best]
        for place in np.flatnonzero(highest >= _NEAR):
            yield start + int(place), int(best[place]), float(highest[place])


def _within(seen: _Seen) -> Iterator[Finding]:
    first: dict[bytes, int] = {}
    for index, pixels in enumerate(seen.pixels):
        if pixels in first:
            message = f"same pixels as {seen.split.names[first[pixels]]}, both in {seen.split.name}"
            yield Finding("duplicate-within", str(seen.split.names[index]), message)
        first.setdefault(pixels, index)


def _two_labels(seen: Sequence[_Seen]) -> Iterator[Finding]:
    by_pixels: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for one in seen:
        if one.split.targets is not None:
            for pixels, name, label in zip(one.pixels, one.split.names, _label_words(one.split), strict=True):
                by_pixels[pixels].append((str(name), label))
    for copies in by_pixels.values():
        name, label = copies[0]
        for other, word in copies[1:]:
            if word != label:
                yield Finding("two-labels", other, f"is {word}; the same pixels are {label} in {name}")
                break


def _label_words(split: Split) -> list[str]:
    assert split.targets is not None
    if split.targets.ndim == 1:
        return [split.classes[target] for target in split.targets]
    return ["|".join(split.classes[number] for number in np.flatnonzero(row)) for row in split.targets]


def _counts(split: Split) -> dict[str, int]:
    if split.targets is None:
        return {"": len(split)}
    return dict(zip(split.classes, split.counts.tolist(), strict=True))


def _one_class(dataset: Dataset) -> Iterator[Finding]:
    if dataset.label == "single":
        total = np.sum([split.counts for split in dataset.splits.values()], axis=0)
        if np.count_nonzero(total) == 1:
            only = dataset.classes[int(total.argmax())]
            yield Finding("one-class", dataset.path, f"all images are of one class, {only}; add the other classes")


def _class_sizes(dataset: Dataset) -> Iterator[Finding]:
    if dataset.label == "none":
        return
    for name, split in dataset.splits.items():
        for number in np.flatnonzero(split.counts == 0):
            yield Finding("empty-class", dataset.classes[number], f"has no image in {name}")
    name = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    counts = dataset.splits[name].counts
    for number in np.flatnonzero((counts > 0) & (counts < _FEW)):
        yield Finding("few-images", dataset.classes[number], f"has only {counts[number]} images in {name}")
    present = counts[counts > 0]
    if present.size and present.max() > _IMBALANCE * present.min():
        most, least = (
            dataset.classes[int(counts.argmax())],
            dataset.classes[int(np.where(counts, counts, counts.max()).argmin())],
        )
        message = (
            f"{most} has {present.max()} images, {least} {present.min()}: {present.max() / present.min():.0f} times"
        )
        yield Finding("imbalance", name, message)


def _tiny(seen: _Seen) -> Iterator[Finding]:
    tiny = np.flatnonzero(seen.sides < _TINY)
    if tiny.size:
        smallest = int(seen.sides.argmin())
        message = (
            f"{tiny.size} of {len(seen.sides)} images have a side under {_TINY} pixels; "
            f"the smallest is {seen.split.names[smallest]} with {seen.sides[smallest]}"
        )
        yield Finding("tiny-images", seen.split.name, message)
