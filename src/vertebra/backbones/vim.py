"""Vision Mamba: a plain network whose patches are mixed by selective state spaces that scan in both directions.

Shapes: images (B, 3, H, W) to one map of `dim` channels at the stride of the patches. Patches and a class token in the
middle of them, each with a learned position, pass through residual blocks of one norm and one mixer
(`vertebra.blocks.bidirectional_ssm`), without any MLP; cost is linear in the number of tokens. The residual stream is
kept in 32 bit. `tokens` is the last sequence, with its class token in its place; `pooled` is the class token. Images
are padded with zeros to whole patches, and positions resized to their grid; the class token keeps its own. Departs from
arXiv 2401.09417 in nothing; what the authors' code has besides and no published network uses (rotary positions, one
mixer for both directions) is not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isqrt, prod, sqrt
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.attention import attention
from vertebra.blocks.bidirectional_ssm import Start, bidirectional_ssm
from vertebra.blocks.positions import fitted
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.growth import crossing, exponent, peak, seconds
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="vim",
    title="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    year=2024,
    arxiv="2401.09417",
    reference="hustvl/Vim",
    licence="Apache-2.0",
    claim=(
        "better than DeiT at equal size; on features of images of 1248 x 1248 pixels 2.8 times as fast and 86.8 % less "
        "GPU memory; better on COCO and ADE20K"
    ),
    parity="golden outputs of the authors' network, its scan in both directions by their own plain torch function",
    note=(
        "The published memory is against attention that keeps its matrix; the figures at 1248 pixels need a GPU, and "
        "those on COCO and ADE20K a detector and a segmenter."
    ),
)

VARIANTS = {
    "tiny": {"dim": 192},
    "small": {"dim": 384},
    "base": {"dim": 768},
    "tiny_plus": {"dim": 192, "stride": 8},
    "small_plus": {"dim": 384, "stride": 8},
    "nano": {"dim": 64, "depth": 4, "patch": 4, "image_size": 32},
}

Place = Literal["middle", "head", "tail", "double", "none"]
"""Where the class token is: among the patches, before them, after them, at both ends, or nowhere, for the mean."""

_CLASSES = {"middle": 1, "head": 1, "tail": 1, "double": 2, "none": 0}
_EPS = 1e-5


class VimOptions(BackboneOptions, total=False):
    """Options; a variant sets the first.

    Attributes:
        dim: width of a token.
        depth: blocks.
        patch: side in pixels of what a token sees.
        stride: pixels from one patch to the next, at most `patch`; `patch` itself by default. 8 in place of 16 is the
            fine-grained fine-tuning of the variants plus.
        state: numbers that a channel of a mixer remembers.
        place: of the class token; `pooled` is that token, the mean of both, or of all tokens.
        directions: "both", or "forward" alone.
        start: how backward directions are initialised, see `vertebra.blocks.bidirectional_ssm`.
    """

    dim: int
    depth: int
    patch: int
    stride: int | None
    state: int
    place: Place
    directions: Literal["both", "forward"]
    start: Start


def vim(variant: str = "tiny", **options: Unpack[VimOptions]) -> "Vim":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `VimOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("vim", VARIANTS, variant, options, Vim)


class Vim(Backbone):
    """Patches, blocks, norm; build it with `vim`.

    Attributes:
        stem: image to patches.
        class_token: (1, K, dim) of K class tokens, or None.
        positions: (1, N + K, dim), in the order of the tokens, for images of `preprocess.size`.
        blocks: in the order of the signal.
        norm: of the last tokens.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int = 24,
        patch: int = 16,
        stride: int | None = None,
        state: int = 16,
        place: Place = "middle",
        directions: Literal["both", "forward"] = "both",
        start: Start = "reference",
        drop_path: float = 0.0,
    ) -> None:
        stride = patch if stride is None else stride
        check_at_least("vim", 1, dim=dim, depth=depth, patch=patch, stride=stride)
        if stride > patch:
            raise UsageError(f"vim: stride is {stride}; above the patch of {patch} pixels it would leave pixels out")
        if place not in get_args(Place):
            raise UsageError(f"vim: place is {place!r}; it can be {', '.join(get_args(Place))}")
        super().__init__()
        self.patch, self.stride, self.place, self.preprocess = patch, stride, place, preprocess
        self.levels, self.width = (Level(dim, stride),), dim
        self.grid = self._cells(preprocess.size)
        classes = _CLASSES[place]
        self.stem = nn.Conv2d(preprocess.channels, dim, patch, stride)
        self.class_token = nn.Parameter(torch.empty(1, classes, dim)) if classes else None
        self.positions = nn.Parameter(torch.empty(1, prod(self.grid) + classes, dim))
        mixer = partial(bidirectional_ssm, dim, directions, state=state, start=start)
        self.blocks = nn.ModuleList(Block(dim, mixer(), rate) for rate in drop_rates(drop_path, [depth])[0])
        self.norm = Norm(dim, eps=_EPS)
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        lecun_normal_(self.stem.weight)
        assert self.stem.bias is not None
        nn.init.zeros_(self.stem.bias)
        for table in (self.class_token, self.positions):
            if table is not None:
                trunc_normal_(table, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                block.get_parameter("mixer.outputs.weight").div_(sqrt(depth))  # what all blocks add starts as if of one

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images)
        grid = self._cells(images.shape[2:])
        x = self.stem(self._padded(images, grid)).flatten(2).mT  # (B, N, dim)
        tokens = self._joined(x, self.class_token) + self._positions(grid)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        x, classes = self._parted(tokens)
        pooled = tokens.mean(1) if classes is None else classes.mean(1)
        return Features((x.mT.unflatten(2, grid),), pooled, tokens)

    def trunk(self) -> Sequence[nn.Module]:
        """The patches, the blocks, the norm; class token and positions come before the first block."""
        return [self.stem, *self.blocks, self.norm]

    def special_tokens(self, tokens: int, cells: int) -> tuple[int, ...]:
        """Where the class tokens are."""
        return {"double": (0, cells + 1), "none": ()}.get(self.place, (self._before(cells),))

    def _cells(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of whole patches that cover an image of (height, width) pixels."""
        rows, columns = (1 + max(0, ceil((side - self.patch) / self.stride)) for side in size)
        return rows, columns

    def _padded(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images with zeros below and to the right, which is the colour that normalisation takes off."""
        sides = [self.patch + (cells - 1) * self.stride for cells in grid]
        lacks = [side - have for side, have in zip(sides, images.shape[2:], strict=True)]
        return pad(images, (0, lacks[1], 0, lacks[0])) if any(lacks) else images

    def _joined(self, x: Tensor, classes: Tensor | None) -> Tensor:
        """Patches (B, N, dim) and class tokens (1, K, dim) as one sequence (B, N + K, dim)."""
        if classes is None:
            return x
        classes = classes.to(x.dtype).expand(len(x), -1, -1)
        if self.place == "double":
            return torch.cat([classes[:, :1], x, classes[:, 1:]], 1)
        before = self._before(x.shape[1])
        return torch.cat([x[:, :before], classes, x[:, before:]], 1)

    def _parted(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """A sequence as patches and class tokens: undoes `_joined`."""
        if self.place == "none":
            return tokens, None
        if self.place == "double":
            return tokens[:, 1:-1], tokens[:, :: tokens.shape[1] - 1]
        before = self._before(tokens.shape[1] - 1)
        return torch.cat([tokens[:, :before], tokens[:, before + 1 :]], 1), tokens[:, before : before + 1]

    def _before(self, cells: int) -> int:
        """Patches before the class token."""
        return {"middle": cells // 2, "tail": cells}.get(self.place, 0)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, N + K, dim) of a grid."""
        if grid == self.grid:
            return self.positions
        return self._resized(self.positions, self.grid, grid)

    def fitted(self, table: Tensor) -> Tensor:
        """Positions (1, M, dim) of a network for square images as this one has them; others stay as they are."""
        side = isqrt(max(0, table.shape[1] - _CLASSES[self.place]))
        square = side * side == table.shape[1] - _CLASSES[self.place]
        return self._resized(table, (side, side), self.grid) if square and side * side != prod(self.grid) else table

    def _resized(self, table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
        cells, classes = self._parted(table)
        return self._joined(fitted(cells, before, after, smooth=True), classes)


class Block(nn.Module):
    """x + drop(mixer(norm(x))), where x is in 32 bit whatever the mixer's weights are.

    The authors' blocks hand the sum on as two terms and add first: the same network with its parts cut elsewhere.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer = Norm(dim, eps=_EPS), mixer
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        return x + self.drop(self.mixer(self.norm(x)))


class Norm(nn.RMSNorm):
    """RMS norm that is computed in the number format of its input, and gives that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        assert self.weight is not None
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


_NAMES = (
    (r"^head\.", None),
    (r"^cls_token", "class_token"),
    (r"^pos_embed", "positions"),
    (r"^patch_embed\.proj\.", "stem."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.mixer\.in_proj\.", ".mixer.inputs."),
    (r"\.mixer\.out_proj\.", ".mixer.outputs."),
    (r"\.A_b_log$", ".A_log_b"),
    (r"\.mixer\.(A_log|D|conv1d|x_proj|dt_proj)_b\b", r".mixer.directions.1.\1"),
    (r"\.mixer\.(A_log|D|conv1d|x_proj|dt_proj)\b", r".mixer.directions.0.\1"),
    (r"\.A_log$", ".decay_log"),
    (r"\.D$", ".skip"),
    (r"\.conv1d\.", ".conv."),
    (r"\.x_proj\.", ".select."),
    (r"\.dt_proj\.", ".step."),
)


def published(state: Mapping[str, Tensor], backbone: Vim) -> dict[str, Tensor]:
    """The authors' released weights (hustvl/Vim-*, Apache-2.0) under our names; their classifier is left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)["model"]` gives them.
        backbone: of `vim`, the same network; for images of another size the positions, of a square grid in the
            checkpoint, are resized.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    ends = "cls_token_head", "cls_token_tail"
    state = dict(state)
    if all(end in state for end in ends):
        state["cls_token"] = torch.cat([state.pop(end) for end in ends], 1)
    if "pos_embed" in state:
        state["pos_embed"] = backbone.fitted(state["pos_embed"])
    return convert(state, _NAMES, backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains: width, blocks, pixels, images, epochs.

    The transformer has as many blocks as have the parameters of Vim's.
    """

    dim: int
    depth: int
    vit_depth: int
    size: int
    images: int
    epochs: int


_HELD = 2000
_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_SETTINGS = {"toy": _Setting(64, 5, 4, 24, 1250, 8), "gpu": _Setting(192, 12, 8, 32, 50_000, 60)}

_GROWTH = ("time_growth", "memory_growth", "faster_from", "less_from")
"""Exponents in tokens, and from how many tokens on Vim's mixer takes less time and less memory than attention."""

_ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vit": ("DeiT-like transformer of equal parameters", {}),
    "both": ("both directions, class token in the middle", {}),
    "head": ("both directions, class token first", {"place": "head"}),
    "forward": ("one direction, class token in the middle: it sees half of the patches", {"directions": "forward"}),
    "forward_tail": ("one direction, class token last: it sees all", {"directions": "forward", "place": "tail"}),
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Both directions beside one and beside attention, the class token's place, and growth with the tokens."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images, held=_HELD)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "a network that scans patches in both directions is as accurate as a transformer of its size and more "
            "accurate than one direction, and its time and memory grow linearly with the tokens"
        ),
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="vit",
        metrics={"top1": "%", "params": "M"} | dict.fromkeys(_GROWTH, ""),
        measure=measure,
        checks=_checks,
        limits=(
            f"width {setting.dim}, {setting.depth} blocks, {len(train)} images of {setting.size} pixels in patches of "
            "4: differences below a point need more seeds, and ImageNet's order is not shown. Growth is the exponent "
            f"of a power law through {_LENGTHS[0]} to {_LENGTHS[-1]} tokens, of one mixer beside attention that makes "
            "its matrix: a forward pass of one sequence, and what its tensors take at their peak, counted. From where "
            "on Vim takes less is this machine's; the paper's figures at 1248 pixels are of a GPU"
        ),
        data=words,
    )


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    growth = _growth(arm, seed, setting)
    torch.manual_seed(seed)
    backbone = _armed(arm, setting)
    plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
    top1 = trained(backbone, train, test, plan).scores["top1"]
    return {"top1": top1, "params": sum(p.numel() for p in backbone.parameters()) / 1e6, **growth}


def _armed(arm: str, setting: _Setting) -> Backbone:
    """The network of an arm, with patches of 4 pixels."""
    if arm != "vit":
        return vim("nano", dim=setting.dim, depth=setting.depth, image_size=setting.size, **_ARMS[arm][1])
    from vertebra.backbones.timm import timm

    network = {"embed_dim": setting.dim, "depth": setting.vit_depth, "num_heads": setting.dim // 16, "patch_size": 4}
    return timm("vit_tiny_patch16_224", image_size=setting.size, network=network)


def _growth(arm: str, seed: int, setting: _Setting) -> dict[str, float]:
    """Exponents of time and memory of an arm's mixer, and from how many tokens on it is ahead of attention."""
    nothing: dict[str, float] = dict.fromkeys(_GROWTH, float("nan"))
    if arm not in ("both", "vit"):
        return nothing
    torch.manual_seed(seed)
    both, naive = bidirectional_ssm(setting.dim).eval(), _Naive(setting.dim).eval()
    spent, peaks = [], []
    for length in _LENGTHS:
        x = torch.randn(1, length, setting.dim)
        runs = [partial(mixer, x) for mixer in (both, naive)]
        spent.append(seconds(runs))
        known = (x, *both.parameters(), *naive.parameters())
        peaks.append([peak(run, known) for run in runs])
    own = 0 if arm == "both" else 1
    found = {
        "time_growth": exponent(_LENGTHS, [pair[own] for pair in spent]),
        "memory_growth": exponent(_LENGTHS, [pair[own] for pair in peaks]),
    }
    if arm == "both":
        found["faster_from"] = crossing(_LENGTHS, *zip(*spent, strict=True))
        found["less_from"] = crossing(_LENGTHS, *zip(*peaks, strict=True))
    return nothing | found


class _Naive(nn.Module):
    """Attention that makes its whole matrix, as the paper's DeiT does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = attention(dim, heads=dim // 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner.qkv(x).unflatten(-1, (3, self.inner.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * self.inner.scale @ k.mT).softmax(-1)
        return self.inner.proj((weights @ v).transpose(1, 2).flatten(2))


def _checks(measured: Measured) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in measured.values}
    words = ", ".join(f"{arm} {value:.2f}" for arm, value in top1.items())
    single = max(top1["forward"], top1["forward_tail"])
    growth = {
        metric: (measured.mean("both", metric), measured.mean("vit", metric))
        for metric in ("time_growth", "memory_growth")
    }
    from_length = {name: measured.mean("both", name) for name in ("faster_from", "less_from")}
    return [
        Check(
            "both directions are at least 1 point ahead of one, wherever its class token is",
            top1["both"] >= single + 1,
            f"{top1['both'] - single:+.2f} points; all arms: {words}",
        ),
        Check(
            "at most 2 points behind a transformer of equal size",
            top1["both"] >= top1["vit"] - 2,
            f"{top1['both'] - top1['vit']:+.2f} points",
        ),
        Check(
            "a class token in the middle is at most 0.3 points behind one at the head",
            top1["both"] >= top1["head"] - 0.3,
            f"{top1['both'] - top1['head']:+.2f} points",
        ),
        *(
            Check(
                f"{what} grows with an exponent of at most 1.15, that of attention with at least 1.5",
                growth[f"{what}_growth"][0] <= 1.15 and growth[f"{what}_growth"][1] >= 1.5,
                f"{growth[f'{what}_growth'][0]:.2f} against {growth[f'{what}_growth'][1]:.2f}; less than attention from"
                f" {from_length[crossed]:.0f} tokens on",
            )
            for what, crossed in (("time", "faster_from"), ("memory", "less_from"))
        ),
    ]
