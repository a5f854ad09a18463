"""Grad-CAM maps an image and second, beside the package grad-cam (pytorch_grad_cam), in one interleaved run.

    python benchmarks/explain.py
    python benchmarks/explain.py --networks resnet18 vit_tiny_patch16_224 --batch 8 --rounds 9

Both sides explain the same images for the same classes with the same network, at the same layer, and end with maps
(B, H, W) scaled for display. Ours also looks for the layer in every call. A round times each side once, in an order
that alternates; `ratio` is ours over theirs, the median of the rounds' ratios with their quartiles. Target: 0.9.
The largest difference of the maps before scaling is printed, so that it is the same work that is timed.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TARGET = 0.9
LAYERS = {"resnet18": "layer4", "vit_tiny_patch16_224": "blocks.11.norm1", "convnext_tiny": "stages.3"}
"""grad-cam's usual target layers; ours finds them."""


class Logits(nn.Module):
    """The network as grad-cam wants it: images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["logits"]


def cells(tokens: Tensor) -> Tensor:
    """Tokens of a square image, without the class token, as maps."""
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


def sides(name: str, batch: int, size: int, device: str) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """Both calls, and the largest difference of their maps before scaling, relative to the largest value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own imports
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from vertebra.backbones.timm import timm
    from vertebra.probes.grad_cam import explain, scaled
    from vertebra.tasks.classify import classify

    torch.manual_seed(0)
    model = classify(timm(name, image_size=size), [str(i) for i in range(1000)]).eval().to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    wanted = torch.randint(0, 1000, (batch,)).tolist()
    targets = [ClassifierOutputTarget(i) for i in wanted]
    layer = model.backbone.network.get_submodule(LAYERS[name])
    cam = GradCAM(Logits(model), [layer], reshape_transform=cells if name.startswith("vit") else None)

    theirs = lambda: cam(images, targets)  # noqa: E731
    ours = lambda: scaled(explain(model, images, wanted)).cpu()  # noqa: E731
    theirs()
    kept = cam.activations_and_grads
    alpha = kept.gradients[-1].mean((2, 3), keepdim=True)
    raw = (alpha * kept.activations[-1]).sum(1).relu()
    found = explain(model, images, wanted, at="cells").cpu()
    return ours, theirs, ((found - raw).abs().max() / raw.max()).item()


def measured(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side, a value a round; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        order = [("ours", ours), ("theirs", theirs)]
        for side, call in order if number % 2 else order[::-1]:
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[side].append(time.perf_counter() - start)
    return {side: values[1:] for side, values in seconds.items()}


def main() -> None:
    """Measure, print a table and one JSON line; exit 1 below the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_tiny_patch16_224"], choices=list(LAYERS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    for name in arguments.networks:
        ours, theirs, difference = sides(name, arguments.batch, arguments.size, arguments.device)
        seconds = measured(ours, theirs, arguments.rounds, arguments.device)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ours_img_per_s": round(arguments.batch / statistics.median(seconds["ours"]), 2),
            "theirs_img_per_s": round(arguments.batch / statistics.median(seconds["theirs"]), 2),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "difference": difference,
        }
        one = found[name]
        print(
            f"{name:24} ours {one['ours_img_per_s']:7.2f} img/s  grad-cam {one['theirs_img_per_s']:7.2f} img/s  "
            f"ratio {middle:.2f} ({low:.2f} to {high:.2f})  maps differ by {difference:.1e}",
            flush=True,
        )
    print(json.dumps({"benchmark": "explain", **vars(arguments), "found": found, "target": TARGET}))
    if min(one["ratio"] for one in found.values()) < TARGET:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
