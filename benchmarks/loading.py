"""Training images per second on one core: vertebra's loader against torchvision's ImageFolder and v2 transforms.

    python benchmarks/loading.py [--data FOLDER]

Both read the same JPEG files (in the page cache), crop at random to 112 x 112, flip, convert and normalise, in
batches of 64, in one process on one core, taking turns. The first epoch decodes; torchvision decodes in every
epoch, vertebra keeps what it decoded. Two ranges of crop area are shown: torchvision's default, and vertebra's.
"""

import argparse
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from vertebra.config import Views
from vertebra.contracts import Preprocess
from vertebra.data import read
from vertebra.data.loader import Batches
from vertebra.data.views import crop_box, generator

SIDE, BATCH = 112, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)
SHARED = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def photographs(folder: Path, count: int, width: int, height: int) -> Path:
    """JPEGs with the falling spectrum of photographs and about their size in bytes (2 to 5 bits a pixel)."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / width) ** 1.1
    for number in range(count):
        waves = rng.normal(size=(3, *falling.shape)) + 1j * rng.normal(size=(3, *falling.shape))
        planes = np.fft.irfft2(waves * falling, s=(height, width))
        planes = 0.6 * planes[:1] + 0.4 * planes  # channels of photographs go together
        pixels = 128 + 55 * planes / planes.std()
        path = folder / f"{width}x{height}" / f"class-{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=90)
    return folder / f"{width}x{height}"


def peer(folder: Path, scale: tuple[float, float]) -> DataLoader:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=scale, ratio=RATIO),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(ImageFolder(str(folder), transform), BATCH, shuffle=True, drop_last=True)


def ours(folder: Path, scale: tuple[float, float], cache_bytes: int = 2 << 30) -> Batches:
    (split,) = read(folder).splits.values()
    preprocess = Preprocess((SIDE, SIDE), MEAN, STD, interpolation="bilinear")  # torchvision's default filter
    views = Views(scale=scale, ratio=RATIO)
    return Batches(split, preprocess, views=views, batch=BATCH, seed=0, workers=0, cache_bytes=cache_bytes)


def speed(batches: Iterator) -> float:
    """Images a second of processor time, over all threads: other programs on the machine disturb it least."""
    start, seen = time.process_time(), 0
    for batch in batches:
        seen += len(batch[0])
    return seen / (time.process_time() - start)


def line(name: str, ours_speed: list[float], peer_speed: list[float]) -> str:
    ratios = [a / b for a, b in zip(ours_speed, peer_speed, strict=True)]
    return (
        f"  {name:<22} ours {statistics.median(ours_speed):7.0f} img/s   torchvision "
        f"{statistics.median(peer_speed):7.0f} img/s   ratio {statistics.median(ratios):5.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def race(folder: Path, scale: tuple[float, float], repeats: int) -> None:
    peer_loader, cold, later, theirs = peer(folder, scale), [], [], []
    speed(iter(peer_loader))  # files into the page cache, code warm
    speed(ours(folder, scale).epoch(0))
    for _ in range(repeats):
        batches = ours(folder, scale)
        cold.append(speed(batches.epoch(0)))
        theirs.append(speed(iter(peer_loader)))
        later.append(speed(batches.epoch(1)))
    print(line("first epoch (decodes)", cold, theirs))
    print(line("later epochs (kept)", later, theirs))


def compare(folder: Path, scale: tuple[float, float]) -> None:
    """Whether both see the same images: moments of the batches, quantiles of the crops' areas."""
    for name, batches in (("ours", ours(folder, scale).epoch(0)), ("torchvision", iter(peer(folder, scale)))):
        images = torch.cat([batch[0] for batch in batches])
        print(f"  {name:<12} mean {images.mean():+.3f}   std {images.std():.3f}   {tuple(images.shape)}")
    transform, draws, width, height = v2.RandomResizedCrop(SIDE, scale=scale, ratio=RATIO), 5000, 500, 375
    views, blank = Views(scale=scale, ratio=RATIO), torch.empty(3, height, width)
    theirs = [params["height"] * params["width"] for params in (transform.make_params([blank]) for _ in range(draws))]
    boxes = [crop_box(width, height, views, generator(0, 0, index)) for index in range(draws)]
    areas = {"ours": [(right - left) * (bottom - top) for left, top, right, bottom in boxes], "torchvision": theirs}
    for name, values in areas.items():
        quantiles = np.quantile(np.asarray(values) / (width * height), (0.05, 0.25, 0.5, 0.75, 0.95))
        print(f"  {name:<12} area shares, 5 25 50 75 95 %: {' '.join(f'{value:.3f}' for value in quantiles)}")


def folders(data: Path | None, count: int, temporary: Path) -> list[Path]:
    if data:
        return [data]
    found = [photographs(temporary, count, 500, 375), photographs(temporary, max(BATCH, count // 5), 1600, 1200)]
    archive = SHARED / "cls" / "clothing10-112.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as clothing:
            clothing.extractall(temporary, [name for name in clothing.namelist() if "/train/" in name])
        found.append(temporary / "clothing10" / "train")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder of JPEGs a class")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=400, help="images of the folder that is made up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        for folder in folders(arguments.data, arguments.images, Path(temporary)):
            for scale in ((0.08, 1.0), (0.5, 1.0)):
                print(f"{folder.name}: crops of {scale[0]:.0%} to {scale[1]:.0%} of the area")
                race(folder, scale, arguments.repeats)
                compare(folder, scale)


if __name__ == "__main__":
    main()
