"""Training steps per second: `fit` against a plain loop with the semantics of timm's train.py.

    python benchmarks/training.py [--rounds 9] [--steps 6] [--precision 32-true]

Both train the same network of timm's on the same random images in memory, with the same optimiser (timm's factory,
AdamW), loss, clipping, averaged weights and schedule, from building the optimiser to the last step. The two take turns,
so that what else the machine does meets both; a ratio is of one turn's two times. Target: at least 1.0 in the median.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from vertebra.backbones.timm import timm as timm_backbone
from vertebra.config import Plan
from vertebra.contracts import Batch
from vertebra.methods.supervised import Supervised
from vertebra.tasks.classify import classify
from vertebra.training.loop import fit

NETWORKS = (  # name, images a step, pixels
    ("resnet18", 16, 112),
    ("mobilenetv3_small_100", 32, 112),
    ("efficientnet_b0", 8, 112),
    ("convnext_atto", 16, 112),
    ("vit_tiny_patch16_224", 4, 224),
    ("test_resnet", 32, 64),
    ("test_vit", 32, 64),
)
CLASSES, LR, DECAY, CLIP, EMA, SMOOTHING = 10, 1e-3, 0.05, 1.0, 0.999, 0.1


class Same:
    """The same batch at every step."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, steps: int) -> None:
        self.batch, self.steps = Batch(images, targets, torch.arange(len(images))), steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return (self.batch for _ in range(start, self.steps))


def plain(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, steps: int, low: bool) -> None:
    """Optimiser, loss, averaged weights, and `steps` updates as timm's train_one_epoch makes them."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=DECAY)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    loss_of, average = LabelSmoothingCrossEntropy(SMOOTHING), ModelEmaV3(model, decay=EMA, use_warmup=True)
    optimizer.zero_grad()
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = loss_of(model(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
        schedule.step_update(step + 1)
        loss.item()


def pair(
    name: str, batch: int, size: int, steps: int, precision: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The two sides of a comparison, each ready to be called again and again."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    targets = torch.randint(0, CLASSES, (batch,), generator=generator)
    keywords = {"img_size": size} if "vit" in name else {}
    peer = timm.create_model(name, num_classes=CLASSES, **keywords)
    names = [str(i) for i in range(CLASSES)]
    method = Supervised(classify(timm_backbone(name, image_size=size), names, label_smoothing=SMOOTHING))
    plan = Plan(
        epochs=1,
        batch=batch,
        lr=LR,
        weight_decay=DECAY,
        clip=CLIP,
        ema=EMA,
        warmup_epochs=0,
        precision=precision,  # type: ignore[arg-type]
    )
    ours = Same(images, targets, steps)
    return (
        lambda: fit(method, ours, plan, device="cpu"),
        lambda: plain(peer, images, targets, steps, precision == "bf16-mixed"),
    )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--networks", nargs="*", help="names out of the list above")
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {asked.precision}, {asked.rounds} rounds of {asked.steps} steps")
    print(f"{'network':24} {'images':>6} {'pixels':>6} {'fit img/s':>10} {'plain img/s':>11} {'ratio':>6}  spread")
    for name, batch, size in NETWORKS:
        if asked.networks and name not in asked.networks:
            continue
        sides = pair(name, batch, size, asked.steps, asked.precision)
        turns = [[timed(side) for side in sides] for _ in range(asked.rounds + 1)][1:]
        ratios = sorted(plain / ours for ours, plain in turns)
        speeds = [batch * asked.steps / statistics.median(times) for times in zip(*turns, strict=True)]
        print(
            f"{name:24} {batch:6} {size:6} {speeds[0]:10.1f} {speeds[1]:11.1f} {statistics.median(ratios):6.2f}"
            f"  {ratios[0]:.2f}..{ratios[-1]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
