"""Swin: attention inside windows that shift by half a window from one block to the next.

Four stages at strides 4, 8, 16 and 32. Even blocks attend within a regular grid of 7x7 (or 12x12) windows, odd
blocks within the grid moved by half a window, so that information crosses the borders at a cost linear in the
image. A learned table of relative positions biases every attention; 2x2 patches merge between stages.

Any image whose sides are multiples of 4 will do: maps are padded to whole windows. timm pads after it has shifted the
map where the authors' dense-prediction code pads before, so features differ from theirs where a map is no whole
number of windows. Built with `image_size=...`, stages whose map is smaller than a window take the map as their
window, unshifted, as the authors' classifiers do. timm's patch merging opens stages 2 to 4 where the authors' closes
stages 1 to 3: the same network under other parameter names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.contracts import Check, Effect, Measured
from vertebra.data.dataset import Dataset, Split
from vertebra.growth import exponent, peak, seconds
from vertebra.paper import Paper

PAPER = Paper(
    id="swin",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    year=2021,
    arxiv="2103.14030",
    reference="microsoft/Swin-Transformer",
    licence="MIT",
    claim=(
        "87.3 % ImageNet-1k top-1 (large, 384 px, pretrained on ImageNet-22k), 58.7 box AP and 51.1 mask AP on "
        "COCO, 53.5 mIoU on ADE20K"
    ),
    note="Swin-MLP, which timm lacks, is a page of its own: `swin_mlp`.",
)

VARIANTS = {
    "tiny": {"timm": "swin_tiny_patch4_window7_224"},
    "small": {"timm": "swin_small_patch4_window7_224"},
    "base": {"timm": "swin_base_patch4_window7_224"},
    "base_384": {"timm": "swin_base_patch4_window12_384"},
    "large": {"timm": "swin_large_patch4_window7_224"},
    "large_384": {"timm": "swin_large_patch4_window12_384"},
}


def swin(variant: str = "tiny", **options: Unpack[TimmOptions]) -> Timm:
    """Build a Swin Transformer; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)


_ARMS = {
    "shifted": "every second grid of windows is moved by half a window",
    "still": "the same network, whose windows never move",
    "global": "windows as large as the map",
    "unbiased": "shifted, without the table of relative positions",
}
_GROWN = ("shifted", "global")


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains, and the sides in pixels at which cost is measured."""

    dim: int
    depths: tuple[int, ...]
    images: int
    epochs: int
    sides: tuple[int, ...]


_SETTINGS = {
    "toy": _Setting(32, (2, 4), 2000, 10, (32, 64, 128)),
    "gpu": _Setting(64, (2, 6), 50_000, 60, (32, 64, 128)),
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Windows that shift beside windows that stay, attention over the whole map, and no relative positions."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="windows that shift are more accurate than windows that stay, at a cost linear in the pixels",
        arms=_ARMS,
        baseline="still",
        metrics={"top1": "%", "nll": "", "params": "", "time": "", "memory": "", "attention": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"two stages of width {setting.dim} and {2 * setting.dim}, windows of 4 x 4 on maps of 16 x 16 and 8 x 8, "
            f"{len(train)} images, {setting.epochs} epochs: differences of a point need more seeds. Time and memory are"
            f" powers of the number of pixels, of one image with sides of {setting.sides[0]} to {setting.sides[-1]} "
            "pixels; `attention` is time of the first block's alone. Swin-MLP and the dense tasks are not measured"
        ),
        data=words,
    )


def armed(arm: str, setting: _Setting, side: int) -> Timm:
    """The network of an arm, for images of a side in pixels."""
    heads = tuple(2 * 2**stage for stage in range(len(setting.depths)))
    network: dict[str, Any] = {"patch_size": 2, "embed_dim": setting.dim, "depths": setting.depths, "num_heads": heads}
    network["window_size"] = side // 2 if arm == "global" else 4
    backbone = build_variant(PAPER.id, VARIANTS, "tiny", {"image_size": side, "network": network})
    for block in backbone.modules():
        if arm == "still" and hasattr(block, "shift_size"):
            block.shift_size, block.attn_mask = (0, 0), None  # type: ignore[assignment]
        table = getattr(block, "relative_position_bias_table", None)
        if arm == "unbiased" and isinstance(table, nn.Parameter):
            nn.init.zeros_(table).requires_grad_(False)
    return backbone


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    grown: dict[str, float] = dict.fromkeys(("time", "memory", "attention"), float("nan"))
    if arm in _GROWN:
        grown = _growth(arm, setting)
    torch.manual_seed(seed)
    backbone = armed(arm, setting, 32)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    params = float(sum(tensor.numel() for tensor in backbone.parameters() if tensor.requires_grad))
    return {"top1": scores["top1"], "nll": scores["nll"], "params": params, **grown}


def _growth(arm: str, setting: _Setting) -> dict[str, float]:
    """Powers of the pixels: time and memory of the network, time of its first attention."""
    spent, alone, peaks, met = [], [], [], []
    for side in setting.sides:
        backbone, images = armed(arm, setting, side).eval(), torch.randn(1, 3, side, side)
        first: nn.Module = backbone.get_submodule("network.layers.0.blocks.0.attn")
        hook = first.register_forward_pre_hook(lambda layer, args: met.append(args[0]))
        run = partial(backbone, images)
        peaks.append(peak(run, (images, *backbone.parameters())))
        hook.remove()
        spent += seconds([run])
        alone += seconds([partial(first, met[-1])])
    pixels = [side**2 for side in setting.sides]
    return {"time": exponent(pixels, spent), "memory": exponent(pixels, peaks), "attention": exponent(pixels, alone)}


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in measured.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    power = {arm: {name: measured.mean(arm, name) for name in ("time", "memory", "attention")} for arm in _GROWN}
    shift, bias = (measured.gain("shifted", other, "top1") for other in ("still", "unbiased"))
    return [
        Check(
            "windows that shift are at least 1 point ahead of windows that stay",
            bool(shift.mean() >= 1),
            f"{shift.mean():+.2f} points (seeds: {', '.join(f'{one:+.2f}' for one in shift)}); all arms: {words}",
        ),
        Check(
            "relative positions cost no accuracy",
            bool(bias.mean() >= 0),
            f"{bias.mean():+.2f} points (seeds: {', '.join(f'{one:+.2f}' for one in bias)})",
        ),
        Check(
            "time and memory of windows grow at most with the power 1.2 of the pixels",
            max(power["shifted"]["time"], power["shifted"]["memory"]) <= 1.2,
            f"time {power['shifted']['time']:.2f}, memory {power['shifted']['memory']:.2f}; over the whole map "
            f"{power['global']['time']:.2f} and {power['global']['memory']:.2f}",
        ),
        Check(
            "time of attention over the whole map grows at least with the power 1.7",
            power["global"]["attention"] >= 1.7,
            f"{power['global']['attention']:.2f}; within windows {power['shifted']['attention']:.2f}",
        ),
    ]
