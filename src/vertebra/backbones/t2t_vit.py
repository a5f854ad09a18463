"""T2T-ViT: a deep and narrow vision transformer on tokens that are made of overlapping neighbours, step by step.

Shapes: images (B, 3, H, W) to three maps: two of 64 channels within the tokenizer (strides 4 and 8), and the last
tokens (stride 16) after all blocks; `tokens` starts with the class token, which is `pooled`. Images may have any size:
the tokenizer (`vertebra.blocks.t2t`) pads by itself, and the table of positions, waves that no training changes, is
resized bicubically, as the authors do for checkpoints. Blocks are those of ViT without a bias of queries and keys.

The released networks exist with two scales of attention: the authors' code has head_dim^-0.5, and dim^-0.5 where it
fetches weights by itself; `scale` chooses. Their dense, squeezed and ghost variants are not here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.attention import attention
from vertebra.blocks.positions import fitted, sinusoids
from vertebra.blocks.rows import Dense
from vertebra.blocks.t2t import SPLITS, Split, t2t
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset
from vertebra.data.dataset import Split as Images
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="t2t_vit",
    title="Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
    year=2021,
    arxiv="2101.11986",
    reference="yitu-opensource/T2T-ViT",
    licence="Clear BSD",
    claim=(
        "half the parameters and MACs of ViT and more than 3 % better on ImageNet from scratch; 21.5 M parameters "
        "reach 83.3 % at 384 pixels"
    ),
    note=(
        "Counts include the fixed table of positions and the fixed directions, as the authors' do. CIFAR-100 at 48 "
        "pixels for 150 epochs needs a GPU and was not run."
    ),
)

VARIANTS = {
    "14": {"dim": 384, "depth": 14, "heads": 6, "ratio": 3.0},
    "7": {"dim": 256, "depth": 7, "heads": 4, "ratio": 2.0},
    "10": {"dim": 256, "depth": 10, "heads": 4, "ratio": 2.0},
    "12": {"dim": 256, "depth": 12, "heads": 4, "ratio": 2.0},
    "19": {"dim": 448, "depth": 19, "heads": 7, "ratio": 3.0},
    "24": {"dim": 512, "depth": 24, "heads": 8, "ratio": 3.0},
    "14_384": {"dim": 384, "depth": 14, "heads": 6, "ratio": 3.0, "image_size": 384},
    "t_14": {"dim": 384, "depth": 14, "heads": 6, "ratio": 3.0, "mix": "transformer"},
    "t_19": {"dim": 448, "depth": 19, "heads": 7, "ratio": 3.0, "mix": "transformer"},
    "t_24": {"dim": 512, "depth": 24, "heads": 8, "ratio": 3.0, "mix": "transformer"},
    "14_resnext": {"dim": 384, "depth": 14, "heads": 32, "ratio": 3.0},
    "14_wide": {"dim": 768, "depth": 4, "heads": 12, "ratio": 3.0},
    "nano": {
        "dim": 96,
        "depth": 4,
        "heads": 3,
        "ratio": 2.0,
        "splits": ((3, 1, 1), (3, 2, 1), (3, 2, 1)),
        "hidden": 32,
        "image_size": 32,
    },
}

Tokenizer = Callable[[int, int], nn.Module]
"""(channels, dim) -> images to maps, the last one of tokens; with `levels`, `least` and `grid` as `T2T` has them."""


class T2TViTOptions(BackboneOptions, total=False):
    """Options; a variant sets the first four.

    Attributes:
        dim: width of tokens.
        depth: blocks.
        heads: of each attention; they divide `dim`.
        ratio: hidden channels of a block's two linear layers, as a multiple of `dim`.
        mix: attention within the tokenizer: at linear cost, or a softmax.
        splits: kernel, stride and padding of each soft split.
        hidden: channels within the tokenizer.
        scale: of the blocks' attention; None is that of a head, dim^-0.5 that of some released weights.
        tokenizer: in place of T2T; then `mix`, `splits` and `hidden` mean nothing.
    """

    dim: int
    depth: int
    heads: int
    ratio: float
    mix: Literal["performer", "transformer"]
    splits: Sequence[Split]
    hidden: int
    scale: float | None
    tokenizer: Tokenizer | None


def t2t_vit(variant: str = "14", **options: Unpack[T2TViTOptions]) -> "T2TViT":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `T2TViTOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("t2t_vit", VARIANTS, variant, options, T2TViT, crop=0.9)


class T2TViT(Backbone):
    """Tokenizer, class token, positions, blocks and a norm; build it with `t2t_vit`.

    Attributes:
        tokenizer: images to maps.
        class_token: (1, 1, dim).
        positions: waves, (1, 1 + rows * columns, dim), for the grid of `preprocess.size`; not trained.
        blocks: attention and two linear layers each.
        norm: of all tokens.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "tokenizer.mixers.0.attn.kqv", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int,
        heads: int,
        ratio: float,
        mix: Literal["performer", "transformer"] = "performer",
        splits: Sequence[Split] = SPLITS,
        hidden: int = 64,
        scale: float | None = None,
        tokenizer: Tokenizer | None = None,
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("t2t_vit", 1, dim=dim, depth=depth, heads=heads)
        if ratio <= 0 or (scale is not None and scale <= 0):
            raise UsageError(f"t2t_vit: ratio is {ratio} and scale {scale}; both must be above 0")
        super().__init__()
        made: Any = tokenizer(preprocess.channels, dim) if tokenizer else None
        self.tokenizer = made or t2t(preprocess.channels, dim, mix=mix, splits=splits, hidden=hidden)
        self.least = self.tokenizer.least
        if min(preprocess.size) < self.least:
            raise UsageError(
                f"t2t_vit: image_size is {preprocess.size}; these splits need sides of at least {self.least} pixels"
            )
        self.grid = self.tokenizer.grid(preprocess.size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sinusoids(self.grid[0] * self.grid[1] + 1, dim)[None]
        self.positions = nn.Parameter(table, requires_grad=False)
        rates = drop_rates(drop_path, (depth,))[0]
        self.blocks = nn.ModuleList(Block(dim, heads, int(dim * ratio), scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)
        self.levels: tuple[Level, ...] = self.tokenizer.levels
        self.width, self.preprocess = dim, preprocess
        trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images, least=self.least)
        *maps, last = self.tokenizer(images)
        sides = last.shape[2], last.shape[3]
        x = torch.cat([self.class_token.expand(len(last), -1, -1), last.flatten(2).mT], 1)  # (B, 1 + N, dim)
        x = x + fitted(self.positions.detach(), self.grid, sides, 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Features((*maps, x[:, 1:].mT.unflatten(2, sides)), x[:, 0], x)

    def trunk(self) -> list[nn.Module]:
        """The tokenizer, the blocks and the norm."""
        return [self.tokenizer, *self.blocks, self.norm]


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut.

    Attributes:
        attn: of all tokens, without a bias of queries, keys and values.
        mlp: of each token by itself.
    """

    def __init__(self, dim: int, heads: int, hidden: int, scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention(dim, heads=heads, bias=False, scale=scale)
        self.mlp = nn.Sequential(Dense(dim, hidden), nn.GELU(), Dense(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def published(state: Mapping[str, Tensor], backbone: T2TViT) -> dict[str, Tensor]:
    """The authors' released weights (yitu-opensource/T2T-ViT) under our names; their classifier is left out.

    A table of positions of a square grid of another size is resized, as the authors' loader does.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `t2t_vit`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules = [
        (r"^module\.", ""),
        (r"^head\.", None),
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "positions"),
        (r"^tokens_to_token\.", "tokenizer."),
        (r"\.attention1\.", ".mixers.0."),
        (r"\.attention2\.", ".mixers.1."),
        (r"(mixers\.\d)\.(kqv|proj)\.", r"\1.attn.\2."),
        (r"(mixers\.\d)\.w$", r"\1.attn.directions"),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
    ]
    found = dict(state)
    for name in ("pos_embed", "module.pos_embed"):
        table = found.get(name)
        if table is not None and table.shape[1] != backbone.positions.shape[1]:
            side = round((table.shape[1] - 1) ** 0.5)
            if side * side == table.shape[1] - 1:
                found[name] = fitted(table, (side, side), backbone.grid, 1)
    return convert(found, rules, backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: a deep and narrow body, images, epochs."""

    dim: int
    depth: int
    hidden: int
    images: int
    epochs: int


_SETTINGS = {"toy": _Setting(64, 4, 16, 2000, 12), "gpu": _Setting(192, 12, 64, 50_000, 60)}

_ARMS: Mapping[str, str] = {
    "vit": "a linear layer on patches of 4 x 4",
    "t2t": "soft splits and performers",
    "conv": "three convolutions of 3 x 3, as wide as the performers",
    "wide": "as t2t, with twice the width and fewer blocks",
}

_HEAD_DIM = 16


class _Convolutions(nn.Sequential):
    """A tokenizer of convolutions, 4 pixels a token; for the effect."""

    least = 4

    def __init__(self, channels: int, dim: int, hidden: int) -> None:
        if hidden:
            widths = (channels, hidden, hidden, dim)
            layers: list[nn.Module] = []
            for number, (before, after) in enumerate(pairwise(widths)):
                layers.append(nn.Conv2d(before, after, 3, 1 if number == 0 else 2, 1))
                layers += [nn.BatchNorm2d(after), nn.ReLU()] if number < 2 else []
        else:
            layers = [nn.Conv2d(channels, dim, 4, 4)]
        super().__init__(*layers)
        self.levels = (Level(dim, 4),)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (super().forward(images),)

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        return size[0] // 4, size[1] // 4


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """T2T beside hard patches and beside convolutions, and a deep body beside a wide one, with equal parameters."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim="tokens of overlapping neighbours, made step by step, gain over hard patches with equal parameters",
        arms=_ARMS,
        baseline="vit",
        metrics={"top1": "%", "nll": "", "params": "M", "seconds": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"{len(train)} images of 32 pixels, {setting.epochs} epochs, {setting.depth} blocks of {setting.dim} "
            "channels: far less than a transformer needs, so that what brings neighbours together counts for more than "
            "on ImageNet; the sign of deep against wide is reported and not asked for. Layers of the tokenizer start "
            "with the deviation of their inputs' number: with the authors' 0.02, which suits hundreds of channels, "
            "tokens were a hundredth of their positions at first, and T2T was 12.8 points behind hard patches. A norm "
            "over squares of 3 x 3 pixels takes brightness away, one over the paper's 7 x 7 less so"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Images, test: Images) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    backbone = _arm(arm, setting, seed)
    plan = Plan(epochs=setting.epochs, batch=64, lr=1e-3, weight_decay=0.03, views=Views(scale=(0.6, 1.0)), seed=seed)
    scores = trained(backbone, train, test, plan).scores
    params = _trainable(backbone) / 1e6
    return {**{name: scores[name] for name in ("top1", "nll", "seconds")}, "params": params}


def _arm(arm: str, setting: _Setting, seed: int = 0) -> T2TViT:
    """A network of an arm, whose linear layers are as wide as gives all arms the parameters of t2t."""
    plain = _network(arm, setting, 2.0)
    short = _trainable(_network("t2t", setting, 2.0)) - _trainable(plain)
    more = round(short / (len(plain.blocks) * (2 * plain.width + 1)))
    torch.manual_seed(seed)
    return _network(arm, setting, 2.0 + more / plain.width)


def _network(arm: str, setting: _Setting, ratio: float) -> T2TViT:
    factor = 2 if arm == "wide" else 1
    dim, depth, hidden = setting.dim * factor, max(1, setting.depth // factor**2), setting.hidden
    options: Any = {"dim": dim, "depth": depth, "heads": dim // _HEAD_DIM, "hidden": hidden, "ratio": ratio}
    if arm in ("vit", "conv"):
        options["tokenizer"] = lambda channels, dim: _Convolutions(channels, dim, hidden if arm == "conv" else 0)
    network = t2t_vit("nano", **options)
    for layer in network.tokenizer.modules():
        if isinstance(layer, nn.Linear):  # as large at the start as what convolutions give, at any width
            trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    return network


def _trainable(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _checks(measured: Measured) -> Sequence[Check]:
    mean = {arm: measured.mean(arm, "top1") for arm in _ARMS}
    gains = measured.gain("t2t", "vit", "top1")
    params = [measured.mean(arm, "params") for arm in _ARMS]
    seeds, words = ", ".join(f"{gain:+.2f}" for gain in gains), ", ".join(f"{a} {v:.2f}" for a, v in mean.items())
    deep = measured.gain("t2t", "wide", "top1").mean()
    spread = 100 * (max(params) / min(params) - 1)
    return [
        Check(
            "T2T gains at least 2 points over hard patches",
            bool(gains.mean() >= 2),
            f"{gains.mean():+.2f} points (seeds: {seeds}); all arms: {words}; deep and narrow is {deep:+.2f} points "
            "from wide and shallow",
        ),
        Check("parameters are equal within 3 %", spread <= 3, f"{spread:.2f} % apart"),
    ]
