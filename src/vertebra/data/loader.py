"""Batches for training and evaluation: which images, in what order, in what view.

The order is f(seed, epoch) and a view f(seed, epoch, index), so what a step sees depends neither on how many
workers decode nor on where the run was resumed.
"""

import atexit
import copy
import math
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vertebra.config import Views
from vertebra.contracts import Batch, Preprocess, Settings
from vertebra.data.dataset import Split
from vertebra.data.frequencies import low_frequencies
from vertebra.data.pixels import Bad, OnError, available_cores, fitted, least_fitted, mode_of, normalised
from vertebra.data.views import check, generator, least_viewed, mix, source, view
from vertebra.errors import DataError, UsageError

CACHE_BYTES = 1 << 30
"""Memory for decoded images where nobody says otherwise: some 2,000 photographs of 500 x 375."""
MOST_WORKERS = 8
STEPS_AHEAD = 2
UNLABELLED = -1
"""Target of an image that has none."""


class Request(NamedTuple):
    """One worker's part of a step: everything that its pixels depend on.

    Attributes:
        epoch: from 0.
        indices: (B,) positions in the split of the whole batch, over all ranks.
        places: (P,) places in that batch which this part fills.
        preprocess: how the images reach the network.
        views: how they are varied, one entry a view; none in evaluation.
        strength: of the views, 0..1.
        policy: strength of the views' policy on top of that, 0..1.
        seed: of the run.
    """

    epoch: int
    indices: np.ndarray
    places: np.ndarray
    preprocess: Preprocess
    views: tuple[Views, ...]
    strength: float
    policy: float
    seed: int


class Part(NamedTuple):
    """What becomes of a request.

    Attributes:
        places: (P,) as asked.
        indices: (P,) int64 positions in the split that the pixels show; -1 where nothing could be read.
        planes: (P, C, H, W) uint8 of each view.
        bad: images that could not be read on the way.
    """

    places: np.ndarray
    indices: np.ndarray
    planes: tuple[Tensor, ...]
    bad: tuple[Bad, ...]


def _seen(request: Request) -> list[Preprocess]:
    """What the network sees of each view."""
    if not request.views:
        return [request.preprocess]
    return [
        request.preprocess if views.size is None else replace(request.preprocess, size=(views.size, views.size))
        for views in request.views
    ]


def _covering(image: Image.Image, least: tuple[int, int]) -> Image.Image:
    """An image over twice as large as needed, box-reduced by a whole factor: less to keep and to resize."""
    factor = min(image.height // (2 * least[0]), image.width // (2 * least[1]))
    return image.reduce(factor) if factor > 1 else image


class Decoder(Dataset):
    """Requests to pixels. Each worker process has its own; threads share one.

    Decoded images are kept until `cache_bytes` are full and nothing is evicted: every image comes once an epoch,
    so none has a better claim. Training keeps sources, evaluation keeps what the network sees.

    Args:
        split: the images.
        cache_bytes: memory for decoded images.
        on_error: "skip" shows the next readable image of the batch in place of an unreadable one.
    """

    def __init__(self, split: Split, cache_bytes: int, on_error: OnError) -> None:
        self.split = split
        self.on_error = on_error
        self.free = cache_bytes
        self.kept: dict[int, tuple[Hashable, np.ndarray]] = {}
        self.bad: dict[int, Bad] = {}
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def __getitem__(self, request: Request) -> Part:
        """Decode, vary and resize one part of a batch; unreadable images are reported, not raised."""
        count = len(request.places)
        planes = tuple(
            torch.empty((count, request.preprocess.channels, *seen.size), dtype=torch.uint8) for seen in _seen(request)
        )
        rows = [plane.permute(0, 2, 3, 1).numpy() for plane in planes]  # (P, H, W, C), the same memory
        shown, bad = np.full(count, -1, dtype=np.int64), {}
        for row, place in enumerate(request.places):
            for index in self._candidates(request, int(place)):
                found = self._drawn(index, request)
                if isinstance(found, Bad):
                    bad[index] = found
                else:
                    for view_rows, pixels in zip(rows, found, strict=True):
                        view_rows[row] = pixels
                    shown[row] = index
                    break
        return Part(request.places, shown, planes, tuple(bad.values()))

    def _candidates(self, request: Request, place: int) -> Iterator[int]:
        """The image at a place of the batch and, where others may stand in, those that follow it."""
        count = len(request.indices) if self.on_error == "skip" else 1
        return (int(request.indices[(place + offset) % len(request.indices)]) for offset in range(count))

    def _drawn(self, index: int, request: Request) -> list[np.ndarray] | Bad:
        if index in self.bad:
            return self.bad[index]
        try:
            return self._pixels(index, request)
        except DataError as error:
            self.bad[index] = Bad(index, str(self.split.names[index]), str(error))
            return self.bad[index]

    def _pixels(self, index: int, request: Request) -> list[np.ndarray]:
        """(H, W, C) uint8 of one image, a view each."""
        preprocess, sizes = request.preprocess, _seen(request)
        if not request.views:
            least = least_fitted(preprocess)
            return [self._keep(index, preprocess, lambda: fitted(self.split.image(index, least), preprocess))]
        needs = [least_viewed(views, size) for views, size in zip(request.views, sizes, strict=True)]
        least = (max(height for height, _ in needs), max(width for _, width in needs))
        key = least, preprocess.channels
        kept = self._keep(index, key, lambda: source(_covering(self.split.image(index, least), least), preprocess))
        return [
            view(
                kept,
                index,
                request.epoch,
                request.seed,
                views,
                size,
                request.strength,
                policy=request.policy,
                number=number,
            )
            for number, (views, size) in enumerate(zip(request.views, sizes, strict=True))
        ]

    def _keep(self, index: int, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What was kept of an image under `key`, or what `make` makes, kept if there is room."""
        kept = self.kept.get(index)
        if kept and kept[0] == key:
            return kept[1]
        pixels = make()
        with self.lock:
            if index in self.kept:
                self.free += self.kept.pop(index)[1].nbytes
            if pixels.nbytes <= self.free:
                self.free -= pixels.nbytes
                self.kept[index] = key, pixels
        return pixels


class Crew(Protocol):
    """Whoever works off the requests; `size` parts make a step."""

    size: int

    def parts(self, requests: Iterable[Request]) -> Generator[Part, None, None]:
        """One part a request, in order."""
        ...

    def close(self) -> None:
        """Let go of processes."""


class Threads:
    """Threads of this process: Pillow lets go of the interpreter's lock while it decodes and resizes.

    Args:
        decoder: shared by all.
        size: threads; 1 works in the caller's thread, without looking ahead.
    """

    def __init__(self, decoder: Decoder, size: int) -> None:
        self.decoder = decoder
        self.size = size

    def parts(self, requests: Iterable[Request]) -> Generator[Part, None, None]:
        if self.size == 1:
            yield from map(self.decoder.__getitem__, requests)
            return
        with ThreadPoolExecutor(self.size) as pool:
            waiting: deque = deque()
            try:
                for request in requests:
                    waiting.append(pool.submit(self.decoder.__getitem__, request))
                    if len(waiting) > STEPS_AHEAD * self.size:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def close(self) -> None:
        """Nothing outlives an epoch."""


class _Queue:
    """A sampler that can be given new requests, so that worker processes outlive an epoch."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def _deaf(worker: int) -> None:
    """Ctrl-C and SIGTERM are for the main process, which writes a checkpoint first and ends its workers then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_is(part: Any) -> Any:
    return part


class Processes:
    """Worker processes, spawned at the first epoch and kept.

    torch hands out requests in turn and each step is `size` requests, so an image always comes to the same worker,
    which is the one that kept it.

    Args:
        decoder: copied to each worker.
        size: processes.
    """

    def __init__(self, decoder: Decoder, size: int) -> None:
        self.size = size
        self.queue = _Queue()
        self.loader = DataLoader(
            decoder,
            batch_size=None,
            sampler=self.queue,
            collate_fn=_as_is,
            num_workers=size,
            multiprocessing_context="spawn",
            persistent_workers=True,
            prefetch_factor=STEPS_AHEAD,
            worker_init_fn=_deaf,
            generator=torch.Generator(),  # else each epoch draws from the global one, and the run depends on workers
        )
        _employed.add(self)

    def parts(self, requests: Iterable[Request]) -> Generator[Part, None, None]:
        self.queue.requests = requests
        yield from self.loader

    def close(self) -> None:
        """End the processes; a later epoch spawns new ones."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined] # torch offers no public way
            self.loader._iterator = None


_employed: weakref.WeakSet[Processes] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before multiprocessing's own hook, which would wait for ever for workers that are deaf to SIGTERM."""
    for crew in tuple(_employed):
        crew.close()


def automatic_workers(views: Views | None, cores: int) -> int:
    """Worker processes that pay on a machine of `cores`.

    Threads decode as well as processes do and share one cache, and they start at once. Processes pay for
    torchvision's policies alone, which are Python and draw from torch's one global generator; and not on two
    cores, where a worker would take from the network what it gives.
    """
    if views is None or views.policy == "none" or cores <= 2:
        return 0
    return min(cores - 1, MOST_WORKERS)


class Batches:
    """Batches of one split, epoch after epoch.

    With `world` ranks each batch is cut into equal contiguous shares: together the ranks see what one rank would
    see alone. Mixing keeps to that as long as a share is even.

    Args:
        split: the images.
        preprocess: size and normalisation that the network expects.
        views: how training images are varied; None for evaluation, in fixed order and dropping nothing.
        more_views: further views of each image, which come as `Batch.views`.
        batch: images a step, over all ranks.
        seed: of order and views.
        workers: processes that decode; 0 uses threads of this one, "auto" is `automatic_workers`.
        rank: this process among `world`.
        world: processes that train together.
        shuffle: whether the order changes each epoch; None shuffles where there are views.
        drop_last: whether a last short batch is left out; None leaves it out where the order is shuffled. A split
            smaller than one batch makes one short batch.
        cache_bytes: memory for decoded images on this rank, over all its workers; changes no result.
        mix_classes: columns of mixed targets; None takes the split's classes.
        on_error: what an unreadable image does: "raise", or "skip", which shows the next readable image of the
            batch (with its own target and id) and lists the name in `bad`.
        strength: of the views, 0 (none) to 1.

    Raises:
        UsageError: a value out of range, or images that the network cannot take.
        DataError: the split is empty, or has no targets to mix.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        views: Views | None,
        more_views: tuple[Views, ...] = (),
        batch: int,
        seed: int,
        workers: int | Literal["auto"] = "auto",
        rank: int = 0,
        world: int = 1,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        cache_bytes: int = CACHE_BYTES,
        mix_classes: int | None = None,
        on_error: OnError = "raise",
        strength: float = 1.0,
    ) -> None:
        mode_of(preprocess)
        self.split = split
        self.preprocess = preprocess
        self.views = views
        self.more_views = more_views
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.shuffle = views is not None if shuffle is None else shuffle
        self.drop_last = self.shuffle if drop_last is None else drop_last
        self.mix_classes = mix_classes or len(split.classes)
        self.strength = strength
        self.policy = 1.0
        self.band: int | None = None
        self.weights: np.ndarray | None = None
        self._bad: dict[int, Bad] = {}
        self._check()
        self._crew = self._crew_of(workers, cache_bytes, on_error)

    def _check(self) -> None:
        if self.batch < 1 or self.batch % self.world:
            raise UsageError(f"batch is {self.batch}; it must be at least 1 and a multiple of the {self.world} ranks")
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank is {self.rank}; with {self.world} ranks it must be in 0..{self.world - 1}")
        for name in ("strength", "policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in 0..1")
        if self.band is not None and not 0 < self.band <= min(self.preprocess.size):
            raise UsageError(f"band is {self.band}; it must be in 1..{min(self.preprocess.size)} pixels")
        for views in self._all_views:
            check(views)
        if self.more_views and (self.views is None or self.mixes):
            raise UsageError("more_views go with views, and without mixup and cutmix: mixed images have no second view")
        if len(self.split) < (self.world if self.drop_last else 1):
            raise DataError(f"split {self.split.name!r} has {len(self.split)} images; {self.world} ranks need as many")
        if self.mixes and self.split.targets is None:
            raise DataError(f"split {self.split.name!r} has no targets to mix; set views.mixup and views.cutmix to 0")

    def _crew_of(self, workers: int | Literal["auto"], cache_bytes: int, on_error: OnError) -> Crew:
        cores = max(1, available_cores() // self.world)
        count = automatic_workers(self.views, cores) if workers == "auto" else workers
        if count < 0:
            raise UsageError(f"workers is {count}; it must be at least 0, or 'auto'")
        if count:
            return Processes(Decoder(self.split, cache_bytes // count, on_error), count)
        # a policy borrows torch's global generator, which the caller's thread alone may do
        alone = self.views is not None and self.views.policy != "none"
        return Threads(Decoder(self.split, cache_bytes, on_error), 1 if alone else min(cores, MOST_WORKERS))

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        if self.drop_last:
            return max(1, len(self.split) // self.batch)
        return math.ceil(len(self.split) / self.batch)

    @property
    def _all_views(self) -> tuple[Views, ...]:
        return () if self.views is None else (self.views, *self.more_views)

    @property
    def mixes(self) -> bool:
        """Whether targets come out mixed, (B, classes) float."""
        return self.views is not None and (self.views.mixup > 0 or self.views.cutmix > 0)

    @property
    def bad(self) -> tuple[Bad, ...]:
        """Images that could not be read so far, by position; with "skip" others stood in for them."""
        return tuple(self._bad[index] for index in sorted(self._bad))

    def order(self, epoch: int) -> np.ndarray:
        """Positions in the split in the order of an epoch, (n,); weights draw them with replacement."""
        count = len(self.split)
        random = generator(self.seed, epoch, 0, "order")
        if self.weights is not None:
            return random.choice(count, size=count, p=self.weights)
        return random.permutation(count) if self.shuffle else np.arange(count)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; one epoch is under way at a time.

        Args:
            epoch: from 0.
            start: the first step to yield; what comes before it is not decoded.

        Raises:
            DataError: an image cannot be read (with "skip": no image of a batch can); the message names it.
        """
        order, steps = self.order(epoch), range(start, len(self))
        requests = (request for step in steps for request in self._requests(order, epoch, step))
        with closing(self._crew.parts(requests)) as parts:
            for step in steps:
                planes, ids = self._joined([next(parts) for _ in range(self._crew.size)])
                yield self._batch(planes, ids, epoch, step)

    def _requests(self, order: np.ndarray, epoch: int, step: int) -> list[Request]:
        """A step's work, cut by image so that each worker meets the same images every epoch."""
        indices = order[step * self.batch : (step + 1) * self.batch]
        count = len(indices)
        if self.drop_last:
            count -= count % self.world
        places = np.array_split(np.arange(count), self.world)[self.rank]
        worker = indices[places] % self._crew.size
        how = self._all_views, self.strength, self.policy, self.seed
        return [
            Request(epoch, indices, places[worker == turn], self.preprocess, *how) for turn in range(self._crew.size)
        ]

    def _joined(self, parts: list[Part]) -> tuple[tuple[Tensor, ...], np.ndarray]:
        """Planes (B, C, H, W) of each view and positions (B,) of this rank's share, in order."""
        for part in parts:
            self._bad.update((bad.index, bad) for bad in part.bad)
            if (part.indices < 0).any():
                raise DataError(part.bad[0].reason)
        if len(parts) == 1:
            return parts[0].planes, parts[0].indices
        places = np.concatenate([part.places for part in parts])
        first, ids = places.min(initial=len(self.split)), np.empty(len(places), dtype=np.int64)
        views = tuple(planes.new_empty(len(places), *planes.shape[1:]) for planes in parts[0].planes)
        for part in parts:
            ids[part.places - first] = part.indices
            for planes, some in zip(views, part.planes, strict=True):
                planes.index_copy_(0, torch.from_numpy(part.places - first), some)
        return views, ids

    def _batch(self, planes: tuple[Tensor, ...], ids: np.ndarray, epoch: int, step: int) -> Batch:
        images, *views = (normalised(plane.permute(0, 2, 3, 1), self.preprocess) for plane in planes)
        targets = self._targets(ids)
        if self.band is not None:
            # before mixing, which cuts edges into the image
            images, *views = (low_frequencies(view, self.band) for view in (images, *views))
        if self.views is not None and self.mixes:
            images, targets = mix(images, targets, self.mix_classes, self.views, self.seed, epoch, step, self.strength)
        return Batch(images, targets, torch.from_numpy(ids), tuple(views))

    def _targets(self, ids: np.ndarray) -> Tensor:
        targets = self.split.targets
        if targets is None:
            return torch.full((len(ids),), UNLABELLED)
        return torch.from_numpy(targets[ids].astype(np.float32 if targets.ndim == 2 else np.int64))

    def close(self) -> None:
        """End the worker processes, if there are any; copies share them. Leaving the program does it too."""
        self._crew.close()

    def resized(self, image_size: int) -> "Batches":
        """A copy at another size, square, in pixels; it shares the workers."""
        return self.with_settings(Settings(image_size=image_size))

    def with_settings(self, settings: Settings) -> "Batches":
        """A copy with what a curriculum asks for; it shares the workers, and `bad`.

        Raises:
            UsageError: a size or strength out of range, or weights that are no distribution over the split.
        """
        changed = copy.copy(self)
        if settings.image_size is not None:
            if settings.image_size < 1:
                raise UsageError(f"image size is {settings.image_size}; it must be at least 1 pixel")
            changed.preprocess = replace(self.preprocess, size=(settings.image_size, settings.image_size))
        if settings.augmentation is not None:
            changed.strength = settings.augmentation
        if settings.policy is not None:
            changed.policy = settings.policy
        if settings.band is not None:
            changed.band = settings.band
        if settings.weights is not None:
            changed.weights = self._distribution(settings.weights)
        changed._check()
        return changed

    def _distribution(self, weights: Tensor) -> np.ndarray:
        values = weights.detach().cpu().double().numpy()
        if values.shape != (len(self.split),) or not (values >= 0).all() or not 0 < values.sum() < math.inf:
            raise UsageError(
                f"sampling weights have shape {values.shape} and sum {values.sum():g}; "
                f"there must be one for each of the {len(self.split)} images, none below 0, and some above"
            )
        return values / values.sum()
