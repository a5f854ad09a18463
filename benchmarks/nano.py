"""What the `nano` variant of every own backbone learns on a folder of images in some seconds of one core.

    python benchmarks/nano.py FOLDER [--seconds 100] [--pages hornet vovnet]

Each network is trained from scratch by `vertebra.training.loop.fit`, all with the same plan but the number of epochs,
which is what fits in the time: one epoch is timed first. Accuracy is that of the last epoch on the test images, with a
95 % interval (Wilson). Seconds are of the process on one thread, views included.
"""

import argparse
import time
from pathlib import Path

import torch

from vertebra.arms import trained
from vertebra.battle.statistics import wilson
from vertebra.config import Plan, Views
from vertebra.data import read
from vertebra.data.dataset import Split
from vertebra.paper import pages
from vertebra.spec import Spec


def own() -> list[str]:
    """Pages with a `nano` that is no network of timm's."""
    found = [page for page in pages() if page.kind == "backbones"]
    return [page.name for page in found if "timm" not in page.variants.get("nano", {"timm": ""})]


def run(page: str, train: Split, test: Split, epochs: int) -> tuple[float, float, int]:
    """Accuracy in percent, seconds, parameters."""
    torch.manual_seed(0)
    backbone = Spec(f"{page}/nano").build()
    plan = Plan(epochs=epochs, batch=64, lr=2e-3, warmup_epochs=min(1.0, epochs / 4), views=Views(scale=(0.5, 1.0)))
    started = time.process_time()
    top1 = trained(backbone, train, test, plan).scores["top1"]
    return top1, time.process_time() - started, sum(p.numel() for p in backbone.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images in folders by class, with a test or val split")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--pages", nargs="*", default=own())
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = read(asked.folder)
    train, test = data.split("train"), data.split("test" if "test" in data.splits else "val")
    print(f"{Path(asked.folder).name}: {len(train)} training and {len(test)} test images, {len(data.classes)} classes")
    print("| network | parameters (M) | epochs | seconds | top-1 % | interval |\n|---|---|---|---|---|---|")
    for page in asked.pages:
        _, once, _ = run(page, train, test, 1)
        epochs = max(1, int(asked.seconds / once))
        top1, spent, params = run(page, train, test, epochs)
        low, high = wilson(top1 / 100, len(test))
        words = f"{100 * low:.1f}..{100 * high:.1f}"
        print(f"| {page}/nano | {params / 1e6:.2f} | {epochs} | {spent:.0f} | {top1:.1f} | {words} |", flush=True)


if __name__ == "__main__":
    main()
