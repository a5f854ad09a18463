"""RMT: a pyramid of transformers whose attention fades with the Manhattan distance.

Shapes: images (B, 3, H, W) of any size to maps at strides 4, 8, 16 and 32, and a pooled vector of 1024 numbers, which
are those of a layer behind the last map. Stages of large maps attend along rows, then along columns; those of small
ones to the whole map (`vertebra.blocks.manhattan_attention`). A block has three branches: a depthwise convolution, so
that it knows where things are, attention, and a feed-forward with a depthwise convolution between its two layers.
Maps lie in memory with channels last from the stem on. Follows the released networks: decays are added before the
softmax, where the paper multiplies behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.local_mlp import LocalMLP
from vertebra.blocks.manhattan_attention import Form, ManhattanAttention, Prior
from vertebra.blocks.rows import Local
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="rmt",
    title="RMT: Retentive Networks Meet Vision Transformers",
    year=2023,
    arxiv="2309.11523",
    reference="qhfan/RMT",
    licence="none",
    claim="84.1 % ImageNet top-1 at 27 M and 4.5 GFLOPs, the best of its size under the same training",
    note=(
        "The cost of the decomposed stages grows with tokens times the sides of the map: nearly linear, not linear as"
        " the paper has it. Token labelling (the starred models) has a head and a loss of its own and is not built; its"
        " released backbones are these. Detection, segmentation and ImageNet accuracy are not measured yet."
    ),
)

VARIANTS = {
    "t": {"dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2), "heads": (4, 4, 8, 16), "whole": 2},
    "s": {"dims": (64, 128, 256, 512), "depths": (3, 4, 18, 4), "heads": (4, 4, 8, 16), "ratios": (4, 4, 3, 3)},
    "b": {
        "dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "heads": (5, 5, 10, 16),
        "ratios": (4, 4, 3, 3),
        "spreads": (5, 5, 6, 6),
        "scaled": 2,
    },
    "l": {
        "dims": (112, 224, 448, 640),
        "depths": (4, 8, 25, 8),
        "heads": (7, 7, 14, 20),
        "ratios": (4, 4, 3, 3),
        "spreads": (6, 6, 6, 6),
        "scaled": 2,
    },
    "nano": {
        "dims": (32, 64, 96, 128),
        "depths": (1, 1, 2, 1),
        "heads": (2, 4, 6, 8),
        "whole": 2,
        "halvings": 1,
        "width": 256,
        "image_size": 32,
    },
}


class RMTOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three.

    Attributes:
        dims: channels of the four stages.
        depths: blocks of the four stages.
        heads: of the attention, a stage; each divides its channels into even numbers.
        ratios: hidden channels of a feed-forward for each of its own, a stage.
        spreads: how far the heads' reaches differ, a stage; see `vertebra.blocks.manhattan_attention`.
        reach: places after which the first head of every stage fades; infinity fades nothing.
        whole: stages at the end that attend to the whole map, 0..4; those before them attend along rows and columns.
        scaled: stages at the end whose branches have gains that start from 1e-6, 0..4.
        halvings: convolutions of stride 2 in the stem, 1 or 2; 1 suits small images.
        width: of the pooled vector.
        local: side of the convolution that attention adds to its values (LePE); 0 has none.
        positions: "conditional" starts a block with the convolution that tells it where things are (CPE); "none" has
            none.
    """

    dims: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    ratios: Sequence[float]
    spreads: Sequence[float]
    reach: float
    whole: int
    scaled: int
    halvings: int
    width: int
    local: int
    positions: "Positions"


Positions = Literal["conditional", "none"]


def rmt(variant: str = "t", **options: Unpack[RMTOptions]) -> "RMT":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `RMTOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("rmt", VARIANTS, variant, options, RMT)


class RMT(Backbone):
    """Stem, four stages, and a layer in front of the pooling; build it with `rmt`.

    Attributes:
        stem: image to the first map.
        stages: each but the first halves its map first.
        head: the last map to the one that is pooled.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.0", "classifier": "classifier"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        ratios: Sequence[float] = (3.0, 3.0, 3.0, 3.0),
        spreads: Sequence[float] = (4.0, 4.0, 6.0, 6.0),
        reach: float = 4.0,
        whole: int = 1,
        scaled: int = 0,
        halvings: int = 2,
        width: int = 1024,
        local: int = 5,
        positions: Positions = "conditional",
        drop_path: float = 0.0,
    ) -> None:
        _check(dims, depths, heads, ratios, spreads, whole, scaled, halvings, width, positions)
        super().__init__()
        self.stem = _stem(preprocess.channels, dims[0], halvings)
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_rates(drop_path, depths)):
            form: Form = "whole" if stage >= 4 - whole else "decomposed"
            scale = 1e-6 if stage >= 4 - scaled else None
            blocks = []
            for rate in rates:
                mixer = ManhattanAttention(
                    dim=dims[stage], heads=heads[stage], form=form, reach=reach, spread=spreads[stage], local=local
                )
                ffn = LocalMLP(dims[stage], int(dims[stage] * ratios[stage]), "after")
                blocks.append(Block(dims[stage], mixer, ffn, positions=positions, scale=scale, drop=rate))
            self.stages.append(Stage(Down(dims[stage - 1], dims[stage]) if stage else nn.Identity(), blocks))
        # a convolution, since a norm that follows one can be folded
        self.head = nn.Sequential(nn.Conv2d(dims[-1], width, 1), nn.BatchNorm2d(width), nn.SiLU(inplace=True))
        self.levels = tuple(Level(dim, 2 ** (halvings + stage)) for stage, dim in enumerate(dims))
        self.width = width
        self.preprocess = preprocess
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) or module is self.head[0]:
                nn.init.trunc_normal_(module.weight, std=0.02)  # type: ignore[arg-type]
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = self.stem(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1), []
        for stage in self.stages:
            x = stage(x)  # (B, h, w, C)
            maps.append(x.permute(0, 3, 1, 2))
        return Features(tuple(maps), self.head(maps[-1]).mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        """The stem, downsamplings and blocks in order, and the layer in front of the pooling."""
        stages: list[Any] = list(self.stages)
        parts = [part for stage in stages for part in (stage.down, *stage.blocks)]
        return [self.stem, *parts[1:], self.head]  # the first stage halves nothing


def _check(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratios: Sequence[float],
    spreads: Sequence[float],
    whole: int,
    scaled: int,
    halvings: int,
    width: int,
    positions: str,
) -> None:
    four = {"dims": dims, "depths": depths, "heads": heads, "ratios": ratios, "spreads": spreads}
    for name, values in four.items():
        if len(values) != 4:
            raise UsageError(f"rmt: {name} is {values}; it needs four numbers, one a stage")
    check_at_least("rmt", 1, dims=dims, depths=depths, heads=heads, width=width)
    if min(ratios) <= 0:
        raise UsageError(f"rmt: ratios is {ratios}; each must be above 0")
    if not (0 <= whole <= 4 and 0 <= scaled <= 4):
        raise UsageError(f"rmt: whole is {whole} and scaled is {scaled}; they count stages, 0 to 4")
    if halvings not in (1, 2) or dims[0] % 2:
        raise UsageError(f"rmt: halvings is {halvings} and dims is {dims}; halvings is 1 or 2 and dims[0] even")
    if positions not in get_args(Positions):
        raise UsageError(f"rmt: positions is {positions!r}; it can be {' or '.join(get_args(Positions))}")


def _stem(colours: int, dim: int, halvings: int) -> nn.Sequential:
    """Four convolutions, the first of stride 2, the third too where there are two halvings; GELU between them."""
    widths, strides = (colours, dim // 2, dim // 2, dim, dim), (2, 1, halvings, 1)
    parts: list[nn.Module] = []
    for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True):
        parts += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.GELU()]
    return nn.Sequential(*parts[:-1])


class Down(nn.Module):
    """A convolution that halves a map, and its norm.

    Attributes:
        conv: 3 x 3, of stride 2.
        norm: behind it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, inputs) to rows (B, H / 2, W / 2, outputs), sides rounded up."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks on maps of one size, which share what the size decides.

    Attributes:
        down: what halves the map; nothing in the first stage.
        blocks: all of them.
    """

    def __init__(self, down: nn.Module, blocks: Sequence["Block"]) -> None:
        super().__init__()
        self.down = down
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, inputs) to rows of the stage."""
        x = self.down(x)
        prior: Prior | None = None
        for block in self.blocks:
            mixer = getattr(block, "mixer", None)
            if prior is None and isinstance(mixer, ManhattanAttention):
                prior = mixer.prior(x)
            x = block(x, prior)
        return x


class Block(nn.Module):
    """A depthwise convolution, attention and a feed-forward, each beside a shortcut.

    Attributes:
        position: the convolution with its shortcut (CPE), or nothing.
        norm1: of what the mixer is given.
        mixer: the attention.
        scale1: gains of its branch, (dim,), or None.
        norm2: of what the feed-forward is given.
        ffn: the feed-forward.
        scale2: gains of its branch, or None.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, ffn: nn.Module, *, positions: Positions, scale: float | None, drop: float
    ) -> None:
        super().__init__()
        self.position = Local(dim) if positions == "conditional" else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.scale1 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ffn
        self.scale2 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor, prior: Prior | None = None) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape; `prior` as in `ManhattanAttention`."""
        x = self.position(x)
        y = self.norm1(x)
        y = self.mixer(y, prior) if isinstance(self.mixer, ManhattanAttention) else self.mixer(y)
        x = self._added(x, y, self.scale1)
        return self._added(x, self.ffn(self.norm2(x)), self.scale2)

    def _added(self, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return x + self.drop(y)
        return torch.addcmul(x, y, scale) if isinstance(self.drop, nn.Identity) else x + self.drop(y * scale)


_RULES = [
    (r"^module\.", ""),
    (r"^(aux_)?head\.", None),
    (r"\.Relpos\.", None),
    (r"^patch_embed\.proj\.", "stem."),
    (r"^proj\.", "head.0."),
    (r"^norm\.", "head.1."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"\.pos\.conv\.", ".position."),
    (r"\.pos\.", ".position."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.gamma_([12])$", r".scale\1"),
    (r"\.retention\.v_proj\.", ".mixer.v."),
    (r"\.retention\.out_proj\.", ".mixer.proj."),
    (r"\.retention\.lepe\.(conv\.)?", ".mixer.local."),
    (r"\.retention\.", ".mixer."),
    (r"\.ffn\.fc1\.", ".ffn.widen."),
    (r"\.ffn\.fc2\.", ".ffn.narrow."),
    (r"\.ffn\.dwconv\.(conv\.)?", ".ffn.local."),
    # theirs halve at the end of a stage, ours at the start of the next
    *((rf"^layers\.{stage}\.downsample\.reduction\.", rf"stages.{stage + 1}.down.conv.") for stage in range(3)),
    *((rf"^layers\.{stage}\.downsample\.norm\.", rf"stages.{stage + 1}.down.norm.") for stage in range(3)),
]


def published(state: Mapping[str, Tensor], backbone: RMT) -> dict[str, Tensor]:
    """The authors' released weights (qhfan/RMT) under our names; classifiers, auxiliary ones too, are left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `rmt`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        keys = state.get(name.replace(".q_proj.", ".k_proj."))
        if ".q_proj." in name and keys is not None:
            tensors[name.replace(".q_proj.", ".qk.")] = torch.cat((tensor, keys))
        elif ".k_proj." not in name:
            tensors[name] = tensor.flatten() if ".gamma_" in name else tensor
    return convert(tensors, _RULES, backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: options of `rmt`, pixels, images to train and to test on, epochs."""

    options: Mapping[str, Any]
    size: int
    images: int
    held: int
    epochs: int


_SETTINGS = {
    "toy": _Setting(VARIANTS["nano"], 32, 2000, 3000, 8),
    "gpu": _Setting({**VARIANTS["t"], "drop_path": 0.1}, 128, 130_000, 20_000, 100),
}

_PLAIN = {"local": 0, "positions": "none"}
_ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "no_decay": ("attention to the whole map, nothing fades", {"whole": 4, "reach": float("inf")}),
    "whole": ("fades with distance", {"whole": 4}),
    "decomposed": ("along rows and columns in all stages but the last", {"whole": 1}),
    "plain": ("no_decay without LePE and CPE", {"whole": 4, "reach": float("inf"), **_PLAIN}),
    "decay_alone": ("whole without LePE and CPE", {"whole": 4, **_PLAIN}),
}
_COUNTED = ("whole", "decomposed")


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Attention that fades beside attention that does not, with and without convolutions; whole and decomposed."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=setting.held)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "attention that fades with the Manhattan distance is ahead of attention that does not, and its"
            " decomposition by rows and columns keeps the accuracy for a fraction of the cost"
        ),
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="no_decay",
        metrics={"top1": "%", "nll": "", "macs": "M", "attention": "M", "growth": "", "attention_growth": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of {setting.size} pixels, {setting.epochs} epochs, {len(test)} to test on: below a"
            " point needs more seeds. Where LePE and CPE are left out the feed-forwards are wider, for equal MACs."
            " Costs are counted, not timed: growth is the power of the number of tokens, from 224 to 448 pixels, of"
            " RMT-T with all its stages of one form, and of its attention's products alone"
        ),
        data=words,
    )


def _armed(arm: str, setting: _Setting) -> RMT:
    options: dict[str, Any] = {**setting.options, **_ARMS[arm][1], "image_size": setting.size}
    if "positions" in options:  # as many MACs as the 25 + 9 a channel and place that are left out
        options["ratios"] = tuple(3 + 34 / (2 * dim + 9) for dim in options["dims"])
    return rmt("nano", **options)


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    torch.manual_seed(seed)
    backbone = _armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    with torch.device("meta"):
        macs, products = _counted(_armed(arm, setting), setting.size)
    growth, of_products = _growth(arm) if arm in _COUNTED else (float("nan"),) * 2
    found = {"top1": scores["top1"], "nll": scores["nll"], "macs": macs / 1e6, "attention": products / 1e6}
    return found | {"growth": growth, "attention_growth": of_products}


def _growth(arm: str) -> tuple[float, float]:
    """Powers of the number of tokens that the MACs of RMT-T and of its attention grow with, all stages of one form."""
    from numpy import log

    with torch.device("meta"):
        backbone = rmt("t", whole=4 if arm == "whole" else 0)
    costs = [_counted(backbone, side) for side in (224, 448)]
    both = [float(log(large / small) / log(4)) for small, large in zip(*costs, strict=True)]
    return both[0], both[1]


def _counted(backbone: RMT, side: int) -> tuple[int, int]:
    """MACs for an image, and those of the attention's two products; the backbone is on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    others = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.eval()(torch.empty(1, 3, side, side, device="meta"))
    flops = counter.get_flop_counts()["Global"]
    products = sum(found for operation, found in flops.items() if operation not in others)
    return sum(flops.values()) // 2, products // 2


def _checks(measured: Measured) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in measured.values}
    macs = [measured.mean(arm, "macs") for arm in measured.values if arm != "decomposed"]
    gains = {pair: measured.gain(*pair, "top1") for pair in (("whole", "no_decay"), ("decomposed", "whole"))}
    seeds = {pair: ", ".join(f"{one:+.2f}" for one in gain) for pair, gain in gains.items()}
    share = measured.mean("decomposed", "attention") / measured.mean("whole", "attention")
    growth = {arm: measured.mean(arm, "growth") for arm in _COUNTED}
    alone = {arm: measured.mean(arm, "attention_growth") for arm in _COUNTED}
    behind = float(gains["decomposed", "whole"].mean())
    return [
        Check(
            "with decay is ahead of without, and that of attention without LePE and CPE",
            top1["whole"] > top1["no_decay"] > top1["plain"],
            f"{', '.join(f'{arm} {value:.2f}' for arm, value in top1.items())}; whole - no_decay by seed: "
            f"{seeds['whole', 'no_decay']}",
        ),
        Check(
            "without LePE and CPE, with decay is ahead of without",
            top1["decay_alone"] > top1["plain"],
            f"{top1['decay_alone'] - top1['plain']:+.2f} points",
        ),
        Check(
            "whole arms cost the same within 1 %",
            max(macs) <= 1.01 * min(macs),
            f"{min(macs):.2f} to {max(macs):.2f} M",
        ),
        Check(
            "decomposed is within 1 point of whole at no more than half the attention's products",
            behind >= -1 and share <= 0.5,
            f"{behind:+.2f} points (seeds: {seeds['decomposed', 'whole']}) at {100 * share:.0f} % of the products",
        ),
        Check(
            "the cost of decomposed stages grows linearly with tokens: a power of at most 1.1",
            growth["decomposed"] <= 1.1,
            f"decomposed {growth['decomposed']:.3f}, whole {growth['whole']:.3f}; the attention's products alone "
            f"{alone['decomposed']:.2f} and {alone['whole']:.2f}",
        ),
    ]
