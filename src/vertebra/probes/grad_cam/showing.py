"""From a trained model and image files to pictures of what it goes by: the work of `vertebra explain`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vertebra.config import split_address
from vertebra.data.images import decode
from vertebra.data.pixels import fitted, least_fitted, normalised
from vertebra.errors import DataError, UsageError
from vertebra.probes.faithfulness import boxes, centres, seen
from vertebra.probes.grad_cam.maps import METHODS, Method, explain, scaled
from vertebra.probes.grad_cam.pictures import panel
from vertebra.probes.grad_cam.sites import Site, site_of
from vertebra.shipping.weights import classifier
from vertebra.spec import Spec
from vertebra.tasks.classify import classify
from vertebra.training.launching import device_of
from vertebra.training.predicting import Loaded, Source, expand

BATCH = 16


@dataclass(frozen=True)
class Shown:
    """One map of one image.

    Attributes:
        image: the file.
        label: the class that was asked for.
        score: the model's probability of it, 0..1.
        rank: its place among the classes, from 1.
        centre: (x, y) in pixels of the file, of what is above 15 % of the map's maximum; None where the map is empty.
        box: xyxy in pixels of the file, around the largest segment above 15 % of the maximum; None likewise.
        picture: the PNG, or "" where none was written.
        error: why the image could not be read, else "".
    """

    image: str
    label: str = ""
    score: float = 0.0
    rank: int = 0
    centre: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None
    picture: str = ""
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON form; an image that could not be read has its error alone."""
        return {"image": self.image, "error": self.error} if self.error else {**asdict(self), "error": None}


def show(
    loaded: Loaded,
    sources: Iterable[Source],
    out: Path,
    *,
    method: Method = "grad_cam",
    classes: Sequence[str] = (),
    layer: str | None = None,
) -> Iterator[Shown]:
    """Explain images, each as soon as it is done, and write an overlay of each.

    Args:
        loaded: the model.
        sources: files, folders, patterns or Pillow images.
        out: an existing folder for the pictures.
        method: see `METHODS`.
        classes: names to ask for; none asks for the class that the model says.
        layer: name of a module of the backbone instead of the place that is found.

    Raises:
        DataError: a path or pattern that matches nothing.
        UsageError: an unknown class, method or layer.
    """
    preprocess, files, taken = loaded.preprocess, iter(expand(sources)), Counter[str]()
    site = None
    while some := list(islice(files, BATCH)):
        pictures = [_read(name, source, loaded) for name, source in some]
        good = [image for image in pictures if isinstance(image, Image.Image)]
        found: Iterator[list[Asked]] = iter(())
        if good:
            images = normalised(np.stack([fitted(image, preprocess) for image in good]), preprocess).to(loaded.device)
            site = site or site_of(loaded.model, images[:1], layer=layer)
            found = iter(_asked(loaded, images, classes, method, site))
        for (name, _), picture in zip(some, pictures, strict=True):
            if isinstance(picture, str):
                yield Shown(name, error=picture)
                continue
            for asked in next(found):
                yield _drawn(name, picture, asked, loaded, out, method, taken)


@dataclass(frozen=True)
class Asked:
    """A map (H, W) of one image for one class, and what the model says of that class."""

    label: str
    score: float
    rank: int
    heat: Tensor


def _asked(loaded: Loaded, images: Tensor, classes: Sequence[str], method: Method, site: Site) -> Iterator[list[Asked]]:
    """What was asked of each image."""
    with torch.inference_mode():
        chances = loaded.model.probabilities(loaded.model(images)).cpu()
    places = chances.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    wanted = [[label] * len(images) for label in classes] or [[loaded.classes[i] for i in chances.argmax(1).tolist()]]
    maps = [explain(loaded.model, images, labels, method=method, layer=site).cpu() for labels in wanted]
    for row in range(len(images)):
        yield [
            Asked(
                labels[row],
                chances[row, loaded.classes.index(labels[row])].item(),
                int(places[row, loaded.classes.index(labels[row])]) + 1,
                heat[row],
            )
            for labels, heat in zip(wanted, maps, strict=True)
        ]


def _read(name: str, source: Source, loaded: Loaded) -> Image.Image | str:
    """The image, or why there is none."""
    try:
        return (
            source
            if isinstance(source, Image.Image)
            else decode(Path(source), name=name, least=least_fitted(loaded.preprocess))
        )
    except DataError as error:
        return str(error)


def _drawn(
    name: str, picture: Image.Image, asked: Asked, loaded: Loaded, out: Path, method: Method, taken: Counter[str]
) -> Shown:
    """Write the picture of one map, and say where it is hot."""
    stem = re.sub(r"[^\w.-]+", "-", f"{Path(name).stem}-{asked.label}").strip("-.") or "image"
    taken[stem] += 1
    file = out / (f"{stem}.png" if taken[stem] == 1 else f"{stem}-{taken[stem]}.png")
    heat = scaled(asked.heat[None])
    view = Image.fromarray(fitted(picture, loaded.preprocess))
    caption = f"{asked.label}   {asked.score:.1%}"
    place = "" if asked.rank == 1 else f"; the model's choice number {asked.rank}"
    panel(view, heat[0].numpy(), caption, f"{METHODS[method]}{place}   ·   {Path(name).name}").save(file)
    centre, box = _in_file(heat, picture, loaded) if heat.any() else (None, None)
    return Shown(name, asked.label, round(asked.score, 6), asked.rank, centre, box, str(file))


def _in_file(
    heat: Tensor, picture: Image.Image, loaded: Loaded
) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    """Centre and box of a map (1, H, W) in pixels of the image as its file has it."""
    width, height = picture.info.get("whole", picture.size)
    left, top, right, bottom = seen(width, height, loaded.preprocess)
    down, across = loaded.preprocess.size
    x, y = (right - left) / across, (bottom - top) / down
    (cx, cy), (x1, y1, x2, y2) = centres(heat)[0].tolist(), boxes(heat)[0].tolist()
    box = (left + x1 * x, top + y1 * y, left + x2 * x, top + y2 * y)
    return (round(left + cx * x, 1), round(top + cy * y, 1)), tuple(round(value, 1) for value in box)  # type: ignore[return-value]


def published(text: str, device: str = "auto") -> Loaded:
    """A network with the classifier that its weights were published with.

    Args:
        text: an address with options, as `timm/resnet50.a1_in1k` or `timm/mobilenetv2_100?weights=FILE`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        UsageError: an unknown address, random weights, or weights without a linear classifier.
        VertebraError: weights that are not here and cannot be fetched.
    """
    address, options = split_address(text)
    backbone = Spec(address, options).build()
    name, weights = getattr(backbone, "name", None), options.get("weights")
    if getattr(backbone, "weights_info", None) is None or name is None:
        raise UsageError(f"{text}: random weights have no classes; write {address}?weights=pretrained, or give a run")
    head = classifier(name, weights or "pretrained", allow_pickle=bool(options.get("allow_pickle")))
    model = classify(backbone, class_names(name, head.out_features))
    model.head.load_state_dict(head.state_dict())
    return Loaded(model, Path(text), device_of(device))


def class_names(name: str, classes: int) -> tuple[str, ...]:
    """Names of the classes that a network of timm's was published with, "class-7" where timm does not know them."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    subset = infer_imagenet_subset({"num_classes": classes, **(config.to_dict() if config else {})})
    if not subset:
        return tuple(f"class-{i}" for i in range(classes))
    info = ImageNetInfo(subset)
    names = [info.index_to_description(i).partition(",")[0] for i in range(classes)]
    twice = {one for one, count in Counter(names).items() if count > 1}  # "crane" is a bird and a machine
    return tuple(f"{one} ({info.index_to_label_name(i)})" if one in twice else one for i, one in enumerate(names))
