"""Trained models at work: load a run or a checkpoint, predict images, measure it on other data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vertebra.config import from_json
from vertebra.contracts import Prediction, Preprocess
from vertebra.data.dataset import Split
from vertebra.data.images import IMAGE_SUFFIXES, decode
from vertebra.data.loader import Batches
from vertebra.data.pixels import available_cores, fitted, least_fitted, normalised
from vertebra.errors import DataError, UsageError, VertebraError, near
from vertebra.spec import Spec
from vertebra.tasks.classify import Classify, classify
from vertebra.training import checkpoint
from vertebra.training.launching import device_of
from vertebra.training.loop import evaluate

Source = str | Path | Image.Image


@dataclass(frozen=True)
class Answer:
    """What a model says of one image.

    Attributes:
        name: the file, or "image-N" for one that was given as pixels.
        labels: class names, best first.
        scores: in 0..1, falling.
        error: why the image could not be read, else "".
    """

    name: str
    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        if self.error:
            return {"name": self.name, "error": self.error}
        found = [{"label": label, "score": score} for label, score in zip(self.labels, self.scores, strict=True)]
        return {"name": self.name, "predictions": found}


class Loaded:
    """A trained classifier, ready to use.

    Attributes:
        model: the task model, in evaluation mode.
        classes: names, in the order of the outputs.
        preprocess: what happens to an image first.
        path: the checkpoint.
        device: where it runs.
    """

    def __init__(self, model: Classify, path: Path, device: torch.device) -> None:
        self.model = model.eval().to(device)
        self.classes = model.classes
        self.preprocess = model.backbone.preprocess
        self.path = path
        self.device = device

    def predict(self, sources: Source | Iterable[Source], *, top: int = 5, batch: int = 32) -> list[Answer]:
        """Classify images.

        Args:
            sources: files, folders, glob patterns or Pillow images, one or many.
            top: classes an image, best first.
            batch: images a forward pass.

        Returns:
            One answer an image, in order. An image that cannot be read has an `error`, and stops no other.

        Raises:
            DataError: a path or pattern that matches nothing.
        """
        images = expand([sources] if isinstance(sources, Source) else sources)
        with ThreadPoolExecutor(available_cores()) as pool:
            return [answer for some in _chunks(images, batch) for answer in self._answers(some, top, pool)]

    def _answers(self, images: Sequence[tuple[str, Source]], top: int, pool: ThreadPoolExecutor) -> list[Answer]:
        found = list(pool.map(lambda image: _pixels(image[0], image[1], self.preprocess), images))
        readable = [pixels for pixels in found if isinstance(pixels, np.ndarray)]
        predictions = iter(self._predictions(readable) if readable else [])
        return [
            self._answer(name, next(predictions), top) if isinstance(pixels, np.ndarray) else Answer(name, error=pixels)
            for (name, _), pixels in zip(images, found, strict=True)
        ]

    @torch.no_grad()
    def _predictions(self, pixels: Sequence[np.ndarray]) -> list[Prediction]:
        outputs = self.model(normalised(np.stack(pixels), self.preprocess).to(self.device))
        return self.model.predict(outputs, [self.preprocess.size] * len(pixels))

    def _answer(self, name: str, prediction: Prediction, top: int) -> Answer:
        labels = tuple(self.classes[i] for i in prediction.labels[:top].tolist())
        return Answer(name, labels, tuple(prediction.scores[:top].tolist()))

    def evaluate(self, split: Split, *, batch: int = 32) -> dict[str, float]:
        """Metrics on a split, its classes matched by name.

        Returns:
            Metric -> value, the one that ranks first; shares in percent.

        Raises:
            DataError: no labels, or classes that the model does not know.
        """
        matched = match(split, self.classes, multi=self.model.multi)
        batches = Batches(matched, self.preprocess, views=None, batch=batch, seed=0, workers=0)
        return evaluate(self.model, batches)


def load(path: str | Path, *, which: Literal["best", "last"] = "best", device: str = "auto") -> Loaded:
    """Load a trained model from a run directory or a checkpoint, after checking its files.

    The averaged weights are taken where the checkpoint has them.

    Args:
        path: a run directory, or one of its checkpoints.
        which: checkpoint of a run.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        UsageError: there is no checkpoint.
        VertebraError: it is corrupt; the message names the file.
    """
    place = locate(Path(path), which)
    saved = checkpoint.load(place, only=("model", "ema"))
    model = rebuild(saved.documents, place)
    state = saved.tensors.get("ema", saved.tensors["model"])
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise VertebraError(f"{place}: the weights do not fit {model.backbone.__class__.__name__}: {error}") from error
    return Loaded(model, place, device_of(device))


def locate(path: Path, which: Literal["best", "last"] = "best") -> Path:
    """The checkpoint that a path means.

    Raises:
        UsageError: there is none.
    """
    candidates = [path, path / "checkpoints" / which, path / "checkpoints" / "last"]
    for candidate in candidates:
        if (candidate / checkpoint.MANIFEST).is_file():
            return candidate
    if not path.exists():
        nearby = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UsageError(f"there is no run {path}{near(str(path), nearby)}")
    raise UsageError(f"{path} holds no checkpoint; give a run directory or a folder with {checkpoint.MANIFEST}")


def rebuild(documents: Mapping[str, Any], place: Path) -> Classify:
    """The network of a checkpoint, with random weights.

    Raises:
        VertebraError: the documents are missing or not of a classifier.
    """
    try:
        ours = documents["config.json"]["vertebra"]
        spec, classes, multi = Spec(**ours["backbone"]), documents["labels.json"], ours["multi"]
        preprocess = from_json(Preprocess, documents["preprocess.json"])
    except (KeyError, TypeError) as error:
        raise VertebraError(f"{place} lacks what a classifier is built from: {error}") from error
    model = classify(spec.build(), classes, multi=multi)
    model.backbone.preprocess = preprocess
    return model


def match(split: Split, classes: Sequence[str], *, multi: bool) -> Split:
    """A split with its targets in the order of a model's classes.

    Raises:
        DataError: no labels, labels of the other kind, or a class that the model does not have.
    """
    if split.targets is None:
        raise DataError(f"split {split.name!r} has no labels, so there is nothing to measure")
    if (split.targets.ndim == 2) != multi:
        kinds = ("one label an image", "many labels an image")
        raise DataError(f"split {split.name!r} has {kinds[not multi]}, the model was trained on {kinds[multi]}")
    unknown = [name for name in split.classes if name not in classes]
    if unknown:
        raise DataError(
            f"the model has no class {unknown[0]!r}{near(unknown[0], classes)}"
            f"{f'; {len(unknown)} classes are unknown' if len(unknown) > 1 else ''}; it has {', '.join(classes[:20])}"
        )
    places = np.array([classes.index(name) for name in split.classes], dtype=np.int64)
    if not multi:
        return replace(split, classes=tuple(classes), targets=places[split.targets])
    targets = np.zeros((len(split), len(classes)), dtype=split.targets.dtype)
    targets[:, places] = split.targets
    return replace(split, classes=tuple(classes), targets=targets)


def expand(sources: Iterable[Source]) -> list[tuple[str, Source]]:
    """Names and images behind files, folders, patterns and Pillow images, each file once.

    Raises:
        DataError: a path or pattern that matches nothing.
    """
    found: dict[str, Source] = {}
    for source in sources:
        if isinstance(source, Image.Image):
            found[f"image-{len(found)}"] = source
            continue
        found.update((str(file), file) for file in _files(Path(source)))
    return list(found.items())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path} has no images; known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}")
        return files
    pattern = str(path.relative_to(path.anchor))
    files = sorted(file for file in Path(path.anchor).glob(pattern) if file.is_file())
    if not files:
        raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    return files


def _pixels(name: str, source: Source, preprocess: Preprocess) -> np.ndarray | str:
    """(H, W, C) uint8, or why there are none."""
    try:
        image = (
            source
            if isinstance(source, Image.Image)
            else decode(Path(source), name=name, least=least_fitted(preprocess))
        )
        return fitted(image, preprocess)
    except DataError as error:
        return str(error)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
