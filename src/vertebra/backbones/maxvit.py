"""MaxViT: convolution, attention within windows and attention across them, in every block.

A block is an inverted bottleneck with squeeze-and-excitation, then attention among the cells of each window, then
attention among the cells that share a place in all windows (a dilated grid), so each block sees the whole image at
linear cost. Both attentions have their own learned table of relative positions.

Windows are size/32 cells wide where the network is built with `image_size=...`, in multiples of 32. It then takes
images of any size: maps that are no whole number of windows are padded at the bottom and on the right, and what is
padded is not attended to, where timm's code and the authors' refuse. timm follows the authors' TensorFlow code ("same"
padding, BatchNorm eps 1e-3), with their weights. `pooled` comes after the head's linear layer and tanh; xlarge was
published for ImageNet-21k.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.models.maxxvit import PartitionAttentionCl
from torch import Tensor
from torch.nn.functional import interpolate

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.blocks.attention import attend
from vertebra.blocks.windows import group, padded, seen, ungroup
from vertebra.contracts import Check, Effect, Measured, TaskModel
from vertebra.data.dataset import Dataset, Split
from vertebra.growth import seconds
from vertebra.paper import Paper

PAPER = Paper(
    id="maxvit",
    title="MaxViT: Multi-Axis Vision Transformer",
    year=2022,
    arxiv="2204.01697",
    reference="google-research/maxvit",
    licence="Apache-2.0",
    claim=(
        "86.5 % ImageNet-1k top-1 without other data, 88.7 % with ImageNet-21k; strong detection, aesthetics and "
        "generation results"
    ),
)

VARIANTS = {
    "tiny": {"timm": "maxvit_tiny_tf_224"},
    "tiny_384": {"timm": "maxvit_tiny_tf_384"},
    "tiny_512": {"timm": "maxvit_tiny_tf_512"},
    "small": {"timm": "maxvit_small_tf_224"},
    "base": {"timm": "maxvit_base_tf_224"},
    "large": {"timm": "maxvit_large_tf_224"},
    "xlarge": {"timm": "maxvit_xlarge_tf_224"},
}


def maxvit(variant: str = "tiny", **options: Unpack[TimmOptions]) -> Timm:
    """Build a MaxViT; options as in `TimmOptions`."""
    backbone = build_variant(PAPER.id, VARIANTS, variant, options)
    for part in backbone.modules():
        if type(part) is PartitionAttentionCl:
            part.__class__ = AnySize  # the same parameters under the same names
    return backbone


class AnySize(PartitionAttentionCl):
    """timm's attention within or across windows, of maps (B, H, W, C) that are no whole number of windows too."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        real, sides = (x.shape[1], x.shape[2]), (int(self.partition_size[0]), int(self.partition_size[1]))
        if not (real[0] % sides[0] or real[1] % sides[1]):
            return super()._partition_attn(x)
        x = padded(x, *sides)
        size = x.shape[1], x.shape[2]
        interval = (1, 1) if self.partition_block else (size[0] // sides[0], size[1] // sides[1])
        mask = seen(real, size, sides, interval, device=x.device)
        y = self._attended(group(x, sides, interval), mask)
        return ungroup(y, sides, interval, size)[:, : real[0], : real[1]]

    def _attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Groups (B, G, n, C) to the same, by timm's layers."""
        attn: Any = self.attn
        qkv = attn.qkv(x)
        if attn.head_first:
            q, k, v = qkv.unflatten(-1, (attn.num_heads, -1)).transpose(-2, -3).chunk(3, -1)
        else:
            q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).movedim(-2, -4).unbind(-2)
        bias = None if attn.rel_pos is None else attn.rel_pos.get_bias()
        drop = attn.attn_drop.p if self.training else 0.0
        return attn.proj_drop(attn.proj(attend(q, k, v, bias=bias, mask=mask, scale=attn.scale, drop=drop)))


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains.

    Attributes:
        dims: of the stages.
        depth: blocks a stage.
        convolutions: blocks a stage of the network without attention, for as many parameters.
        side: of images in pixels, which two strides bring to those of the first maps.
        images: at most.
        epochs: over them.
    """

    dims: tuple[int, ...]
    depth: int
    convolutions: tuple[int, ...]
    side: int
    images: int
    epochs: int


_SETTINGS = {
    "toy": _Setting((32, 64, 128), 1, (4, 4, 3), 64, 2000, 4),
    "gpu": _Setting((64, 128, 256), 2, (7, 9, 6), 64, 50_000, 60),
}

_ARMS: Mapping[str, str] = {
    "full": "inverted bottlenecks, attention within windows, attention across them",
    "block": "the same with both attentions within windows",
    "grid": "the same with both attentions across windows",
    "conv": "inverted bottlenecks alone, more of them for as many parameters",
}
_WINDOW = 4
_LARGER = 1.5
"""Side of the images, and of the windows, at the other resolution, as a multiple of the trained one."""
_ONCE = ("resized", "fresh", "time", "macs_growth")


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The whole block beside either attention alone and none; cost; another resolution."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "convolution, attention within windows and attention across them are better together than each alone, at a"
            " cost linear in the pixels"
        ),
        arms=_ARMS,
        baseline="conv",
        metrics={"top1": "%", "nll": "", "params": "M", "macs": "M"}
        | {"resized": "%", "fresh": "%", "time": "", "macs_growth": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"three stages of {setting.depth} blocks, windows of {_WINDOW} x {_WINDOW} on maps of 16, 8 and 4 cells a"
            f" side, {len(train)} images scaled to {setting.side} pixels, {setting.epochs} epochs: differences of a"
            " point need more seeds. The first maps have 16 windows, so that few images tell a window from the whole."
            " `time` and `macs_growth` are those of sides twice as long, as multiples; `resized` and `fresh` are top-1"
            f" of images and windows {_LARGER} times as large without further training, by tables of relative positions"
            " that are resized or drawn anew. Windows grow with resolution, as the published ones do"
        ),
        data=words,
    )


def armed(arm: str, setting: _Setting, side: int, window: int = _WINDOW) -> Timm:
    """The network of an arm, for images of a side in pixels and windows of one in cells."""
    conv, stages = arm == "conv", len(setting.dims)
    network = {
        "embed_dim": setting.dims,
        "depths": setting.convolutions if conv else (setting.depth,) * stages,
        "block_type": ("C" if conv else "M",) * stages,
        "stem_width": setting.dims[0],
        "head_hidden_size": setting.dims[-1],
        "transformer_window_size": (window, window),
    }
    backbone = maxvit("tiny", image_size=side, network=network)
    for part in backbone.modules():
        if isinstance(part, PartitionAttentionCl) and arm in ("block", "grid"):
            part.partition_block = arm == "block"
    return backbone


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views
    from vertebra.training.cost import count

    torch.manual_seed(seed)
    backbone = armed(arm, setting, setting.side)
    more: dict[str, float] = dict.fromkeys(_ONCE, float("nan"))
    cost = count(backbone)
    if arm == "full":
        more |= _growth(setting)
        torch.manual_seed(seed)
        backbone = armed(arm, setting, setting.side)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    found = trained(backbone, train, test, plan)
    if arm == "full":
        more |= {name: _elsewhere(found.model, setting, test, fresh=name == "fresh") for name in ("resized", "fresh")}
    scores = {"top1": found.scores["top1"], "nll": found.scores["nll"]}
    return {**scores, "params": cost.params / 1e6, "macs": cost.macs / 1e6, **more}


def _growth(setting: _Setting) -> dict[str, float]:
    """Time and multiply-accumulates of images of twice the side, as multiples."""
    from vertebra.training.cost import count

    sides = (setting.side, 2 * setting.side)
    backbone = armed("full", setting, setting.side).eval()
    first, second = seconds([partial(backbone, torch.randn(4, 3, side, side)) for side in sides])
    small, large = (count(backbone, size=(side, side)).macs for side in sides)
    return {"time": second / first, "macs_growth": large / small}


def _elsewhere(model: TaskModel, setting: _Setting, test: Split, *, fresh: bool) -> float:
    """Top-1 at another resolution, in percent."""
    from vertebra.data.loader import Batches
    from vertebra.training.loop import evaluate

    window = round(_WINDOW * _LARGER)
    backbone = armed("full", setting, round(setting.side * _LARGER), window)
    own, known = backbone.state_dict(), model.backbone.state_dict()
    for name, table in own.items():
        if name.endswith("relative_position_bias_table"):  # (heads, 2 h - 1, 2 w - 1)
            sides = (table.shape[1], table.shape[2])
            known[name] = table if fresh else interpolate(known[name][None], sides, mode="bilinear")[0]
    backbone.load_state_dict(known)
    other = copy.deepcopy(model)
    other.backbone = backbone
    return evaluate(other, Batches(test, backbone.preprocess, views=None, batch=256, seed=0, workers=0))["top1"]


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in _ARMS}
    params = {arm: measured.mean(arm, "params") for arm in _ARMS}
    once = {name: measured.mean("full", name) for name in _ONCE}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    kept = measured.values["full"]["resized"] - measured.values["full"]["fresh"]
    checks = []
    for arm in ("block", "grid", "conv"):
        gains = measured.gain("full", arm, "top1")
        seeds = ", ".join(f"{gain:+.2f}" for gain in gains)
        found = f"{gains.mean():+.2f} points (seeds: {seeds}) with {params[arm] / params['full']:.3f} of the parameters"
        checks.append(
            Check(
                f"the whole block is at least 0.2 points ahead of {arm}", bool(gains.mean() >= 0.2), f"{found}; {words}"
            )
        )
    return [
        *checks,
        Check(
            "time and multiply-accumulates grow fourfold with the side doubled, within 20 %",
            all(3.2 <= once[name] <= 4.8 for name in ("time", "macs_growth")),
            f"time {once['time']:.2f} times, multiply-accumulates {once['macs_growth']:.2f} times",
        ),
        Check(
            "at another resolution tables that are resized are better than new ones",
            bool(kept.mean() > 0),
            f"top-1 {once['resized']:.2f} against {once['fresh']:.2f}, and {mean['full']:.2f} at the trained one",
        ),
    ]
