"""SMT: stages that modulate by convolutions of several sizes, then alternate with attention, then attend.

Shapes: images (B, 3, H, W) of any size from 3 pixels to maps at strides 4, 8, 16 and 32. The first two stages mix by
scale-aware modulation (`vertebra.blocks.scale_aware_modulation`), the last one by attention to the whole map, and the
third by both in turn, the first block by modulation. Each stage ends in a norm, and its map is what the norm gives;
`tokens` are the cells of the last map, `pooled` their mean. Maps lie in memory with channels last from the stem on.
Departs from the authors' code in nothing; like it, a side of 4k + 1 or 4k + 2 pixels gives a first map of k cells, so
that one or two pixels at the border are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.attention import attend
from vertebra.blocks.local_mlp import LocalMLP
from vertebra.blocks.rows import Dense
from vertebra.blocks.scale_aware_modulation import ScaleAwareModulation, start
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="smt",
    title="Scale-Aware Modulation Meet Transformer",
    year=2023,
    arxiv="2307.08579",
    reference="AFeng-x/SMT",
    licence="MIT",
    claim=(
        "82.2 % ImageNet top-1 at 11.5 M and 2.4 GFLOPs, 84.3 % at 32 M and 7.7; 87.1 and 88.1 % at 224 and 384 pixels"
        " after ImageNet-22k; Mask R-CNN +4.2 mAP (1x) and +1.3 (3x) over Swin, UPerNet +2.0 mIoU"
    ),
    note=(
        "The released configuration of the small network has 22.55 M parameters and 4.8 G, where the authors print 21 M"
        " and 4.7 G: one block less in the last stage would give 20.4 M. Printed FLOPs leave out the attention's two"
        " products. Detection, segmentation and ImageNet accuracy are not measured; Swin is compared with on a GPU."
    ),
)

VARIANTS = {
    "t": {"depths": (2, 2, 8, 1)},
    "s": {"depths": (3, 4, 18, 2)},
    "b": {"depths": (4, 6, 28, 2), "ratios": (8, 6, 4, 2), "kernel": 7},
    "l": {
        "depths": (4, 6, 28, 4),
        "dims": (96, 192, 384, 768),
        "ratios": (8, 6, 4, 2),
        "kernel": 7,
        "layer_scale": 1e-4,
    },
    "l_384": {
        "depths": (4, 6, 28, 4),
        "dims": (96, 192, 384, 768),
        "ratios": (8, 6, 4, 2),
        "kernel": 7,
        "layer_scale": 1e-4,
        "image_size": 384,
    },
    "nano": {"depths": (1, 1, 2, 1), "dims": (32, 64, 96, 128), "heads": (1, 2, 4, 8), "halvings": 1, "image_size": 32},
}

Mixer = Literal["modulation", "attention", "alternate"]


class SMTOptions(BackboneOptions, total=False):
    """Options; a variant sets depths. All sequences have a number for each of the four stages.

    Attributes:
        dims: channels; multiples of the number of kernels where a stage modulates, of its heads where it attends.
        depths: blocks.
        heads: of the attention, where a stage has one.
        ratios: hidden channels of a feed-forward for each of its own.
        mixers: "modulation", "attention", or "alternate": every second block attends, the first one modulates.
        kernels: odd sides of the modulation's convolutions, one a head, the same in all stages.
        kernel: odd side of the first convolution of the stem.
        halvings: how many of the stem's two convolutions halve the map, 1 or 2; 1 suits small images.
        layer_scale: what the branches are multiplied by at the start, channel by channel; None has no such factor.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    ratios: Sequence[float]
    mixers: Sequence[Mixer]
    kernels: Sequence[int]
    kernel: int
    halvings: int
    layer_scale: float | None


def smt(variant: str = "t", **options: Unpack[SMTOptions]) -> "SMT":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `SMTOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("smt", VARIANTS, variant, options, SMT)


class SMT(Backbone):
    """Four stages; build it with `smt`.

    Attributes:
        stages: each with what makes its map smaller, its blocks and its norm.
        least: smallest side of images in pixels.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stages.0.embed.conv.0", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        depths: Sequence[int],
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 16),
        ratios: Sequence[float] = (4, 4, 4, 2),
        mixers: Sequence[Mixer] = ("modulation", "modulation", "alternate", "attention"),
        kernels: Sequence[int] = (3, 5, 7, 9),
        kernel: int = 3,
        halvings: int = 2,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        _check(ratios, mixers, kernel, halvings, {"dims": dims, "depths": depths, "heads": heads})
        super().__init__()
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            dim, blocks = dims[stage], []
            for number, rate in enumerate(rates):
                kind = mixers[stage] if mixers[stage] != "alternate" else ("modulation", "attention")[number % 2]
                modulates = kind == "modulation"
                mixer = ScaleAwareModulation(dim=dim, kernels=kernels) if modulates else Attention(dim, heads[stage])
                mlp = LocalMLP(dim, max(1, int(dim * ratios[stage])), "before").apply(start)
                blocks.append(Block(dim, mixer, mlp, scale=layer_scale, drop=rate))
            embed = Embed(dims[stage - 1], dim) if stage else Stem(preprocess.channels, dim, kernel, halvings)
            self.stages.append(Stage(dim, embed, blocks))
        self.levels = tuple(Level(dim, 2 ** (halvings + stage)) for stage, dim in enumerate(dims))
        self.width, self.least = dims[-1], 1 + halvings  # the stem's second convolution needs two cells
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images, least=self.least)
        x, maps = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1), []
        for stage in self.stages:
            x = stage(x)  # (B, h, w, C)
            maps.append(x.permute(0, 3, 1, 2))
        tokens = x.flatten(1, 2)
        return Features(tuple(maps), tokens.mean(1), tokens)

    def trunk(self) -> list[nn.Module]:
        """What makes the map smaller, blocks and norm, stage by stage."""
        stages: list[Any] = list(self.stages)
        return [part for stage in stages for part in (stage.embed, *stage.blocks, stage.norm)]


def _check(
    ratios: Sequence[float], mixers: Sequence[str], kernel: int, halvings: int, each: Mapping[str, Sequence[int]]
) -> None:
    for name, values in {**each, "ratios": ratios, "mixers": mixers}.items():
        if len(values) != 4:
            raise UsageError(f"smt: {name} is {values}; it needs four, one a stage")
    check_at_least("smt", 1, **each)
    if min(ratios) <= 0:
        raise UsageError(f"smt: ratios is {ratios}; each must be above 0")
    if wrong := [kind for kind in mixers if kind not in get_args(Mixer)]:
        raise UsageError(f"smt: mixers has {wrong[0]!r}; each can be {', '.join(get_args(Mixer))}")
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"smt: kernel is {kernel}; it must be odd and at least 1")
    if halvings not in (1, 2):
        raise UsageError(f"smt: halvings is {halvings}; it must be 1 or 2")


class Stage(nn.Module):
    """Blocks on maps of one size.

    Attributes:
        embed: what makes the map smaller.
        blocks: all of them.
        norm: of each cell of what they give.
    """

    def __init__(self, dim: int, embed: nn.Module, blocks: Sequence["Block"]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, inputs) to rows of the stage."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Stem(nn.Module):
    """Two convolutions, and a norm of each cell.

    Attributes:
        conv: the first with its batch norm and ReLU, then 2 x 2 of stride 2.
        norm: behind them.
    """

    def __init__(self, colours: int, dim: int, kernel: int, halvings: int) -> None:
        super().__init__()
        first = nn.Conv2d(colours, dim, kernel, halvings, kernel // 2, bias=False)
        self.conv = nn.Sequential(first, nn.BatchNorm2d(dim), nn.ReLU(inplace=True), nn.Conv2d(dim, dim, 2, 2))
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the norms of the blocks
        self.apply(start)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, colours) to rows (B, H / 4, W / 4, dim); half of an odd side is rounded up, then down."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Embed(nn.Module):
    """A convolution that halves the map, and a norm of each cell.

    Attributes:
        conv: 3 x 3, of stride 2.
        norm: behind it.
    """

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the norms of the blocks
        self.apply(start)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, inputs) to rows (B, H / 2, W / 2, dim), sides rounded up."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """A mixer and a feed-forward, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the mixer is given.
        mixer: modulation or attention.
        scale1: gains of its branch, (dim,), or None.
        norm2: of what the feed-forward is given.
        mlp: the feed-forward.
        scale2: gains of its branch, or None.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, scale: float | None, drop: float) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim, eps=1e-6), mixer
        self.scale1 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp
        self.scale2 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        x = self._added(x, self.mixer(self.norm1(x)), self.scale1)
        return self._added(x, self.mlp(self.norm2(x)), self.scale2)

    def _added(self, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return x + self.drop(y)
        return torch.addcmul(x, y, scale) if isinstance(self.drop, nn.Identity) else x + self.drop(y * scale)


class Attention(nn.Module):
    """Attention to the whole map; what it gives has the values, seen by a depthwise convolution, added.

    Attributes:
        qkv: dim to 3 dim: all queries, head by head, then all keys, then all values.
        local: the convolution, 3 x 3.
        proj: dim to dim.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise UsageError(
                f"smt: {heads} heads do not divide dim {dim}; dims are multiples of heads where they attend"
            )
        self.heads = heads
        self.qkv = Dense(dim, 3 * dim)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = Dense(dim, dim)
        self.apply(start)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        found = self.qkv(x)
        q, k, v = found.unflatten(-1, (3, self.heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4)
        values = found[..., 2 * x.shape[-1] :].permute(0, 3, 1, 2)
        y = attend(q, k, v).view(x.shape)
        return self.proj(y + self.local(values).permute(0, 2, 3, 1))


_RULES = [
    (r"^module\.", ""),
    (r"^head\.", None),
    *((rf"^patch_embed{stage + 1}\.(?:proj|conv)\.", f"stages.{stage}.embed.conv.") for stage in range(4)),
    *((rf"^patch_embed{stage + 1}\.norm\.", f"stages.{stage}.embed.norm.") for stage in range(4)),
    *((rf"^block{stage + 1}\.", f"stages.{stage}.blocks.") for stage in range(4)),
    *((rf"^norm{stage + 1}\.", f"stages.{stage}.norm.") for stage in range(4)),
    *((rf"\.attn\.local_conv_{head + 1}\.", f".mixer.convs.{head}.") for head in range(4)),
    (r"\.attn\.local_conv\.", ".mixer.local."),
    (r"\.attn\.proj0\.", ".mixer.mix."),
    (r"\.attn\.bn\.", ".mixer.norm."),
    (r"\.attn\.proj1\.", ".mixer.narrow."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.fc1\.", ".mlp.widen."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.local."),
    (r"\.mlp\.fc2\.", ".mlp.narrow."),
    (r"\.gamma_([12])$", r".scale\1"),
]


def published(state: Mapping[str, Tensor], backbone: SMT) -> dict[str, Tensor]:
    """The authors' released weights (AFeng-x/SMT) under our names; the classifier is left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)["model"]` gives them.
        backbone: of `smt`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        both = state.get(name.replace(".attn.q.", ".attn.kv."))
        if ".attn.q." in name and both is not None:
            tensors[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat((tensor, both))
        elif ".attn.kv." not in name:
            tensors[name] = tensor.flatten(1) if name.endswith(".attn.proj1.weight") else tensor
    return convert(tensors, _RULES, backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains.

    Attributes:
        options: of `smt`.
        size: of the images in pixels.
        images: training images at most.
        held: test images at most.
        epochs: of each arm.
        swin: options of timm's Swin with as many parameters; None has no such arm.
    """

    options: Mapping[str, Any]
    size: int
    images: int
    held: int
    epochs: int
    swin: Mapping[str, Any] | None = None


_SETTINGS = {
    "toy": _Setting(
        {"dims": (24, 48, 96, 192), "depths": (1, 1, 4, 1), "heads": (1, 2, 4, 8), "halvings": 1}, 32, 2000, 3000, 8
    ),
    "gpu": _Setting(
        {**VARIANTS["t"], "dims": (64, 128, 256, 512), "heads": (2, 4, 8, 16), "halvings": 1},
        64,
        50_000,
        10_000,
        60,
        {"patch_size": 2, "embed_dim": 60, "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16), "window_size": 4},
    ),
}

_ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "full": ("modulation, both in turn in stage 3, attention in stage 4", {}),
    "modulated": ("stage 3 of modulation alone", {"mixers": ("modulation", "modulation", "modulation", "attention")}),
    "attended": ("stage 3 of attention alone", {"mixers": ("modulation", "modulation", "attention", "attention")}),
    "one_scale": ("four kernels of 3 x 3", {"kernels": (3, 3, 3, 3)}),
}
_SWIN = {"swin": "windows of 4 x 4 that shift, as many parameters"}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """The whole beside a third stage of one kind, and beside kernels of one size; on a GPU beside Swin."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=setting.held)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "modulation and attention in turn are ahead of either alone in the third stage, and kernels of several"
            " sizes of one size; the whole is ahead of Swin"
        ),
        arms={name: what for name, (what, _) in _ARMS.items()} | (_SWIN if setting.swin else {}),
        baseline="full",
        metrics={"top1": "%", "nll": "", "params": "M", "seconds": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of {setting.size} pixels, {setting.epochs} epochs, {len(test)} to test on: below a"
            " point needs more seeds than three, and the thresholds are of a third of a point. The stem halves once:"
            f" the third stage has maps of {setting.size // 8} x {setting.size // 8} cells, which large kernels see as"
            " a whole too"
        ),
        data=words,
    )


def _armed(arm: str, setting: _Setting) -> Backbone:
    if arm == "swin":
        from vertebra.backbones.swin import swin

        return swin("tiny", image_size=setting.size, network=dict(setting.swin or {}))
    return smt("nano", image_size=setting.size, **{**setting.options, **_ARMS[arm][1]})


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = _armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    params = sum(tensor.numel() for tensor in backbone.parameters()) / 1e6
    return {"top1": scores["top1"], "nll": scores["nll"], "params": params, "seconds": scores["seconds"]}


def _checks(measured: Measured) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in measured.values}
    params = {arm: measured.mean(arm, "params") for arm in measured.values}
    gains = {arm: measured.gain("full", arm, "top1") for arm in measured.values if arm != "full"}
    seeds = {arm: ", ".join(f"{one:+.2f}" for one in gain) for arm, gain in gains.items()}
    names = {"modulated": "modulation alone", "attended": "attention alone", "one_scale": "kernels of one size"}
    found = [
        Check(
            f"the whole is at most 0.3 points behind {words}",
            bool(gains[arm].mean() >= -0.3),
            f"{gains[arm].mean():+.2f} points (seeds: {seeds[arm]})",
        )
        for arm, words in names.items()
    ]
    either = (top1["modulated"] + top1["attended"]) / 2
    found += [
        Check(
            "modulation and attention in turn are ahead of the mean of either alone",
            top1["full"] > either,
            f"{top1['full'] - either:+.2f} points; all arms: "
            + ", ".join(f"{arm} {value:.2f}" for arm, value in top1.items()),
        ),
        Check(
            "the parameters of each arm are those of the whole within 3 %",
            all(abs(size / params["full"] - 1) <= 0.03 for size in params.values()),
            f"{params['full']:.3f} M; arms {min(params.values()):.3f} to {max(params.values()):.3f} M",
        ),
    ]
    if "swin" in gains:
        gain = float(gains["swin"].mean())
        found.append(Check("at least 1 point ahead of Swin", gain >= 1, f"{gain:+.2f} points (seeds: {seeds['swin']})"))
    return found
