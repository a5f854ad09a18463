"""ViR: vision retention networks, a plain transformer whose attention is retention: one network in three forms.

Shapes: images (B, 3, H, W) of any size to one map at the stride of a patch, and tokens (B, 1 + N, dim) with the class
token in front; sides that are no multiple of the patch are padded. The scan meets the patches row by row and the class
token last, when it can read them all; in memory it is the first, as everywhere here.

`form` says how retention is computed ("parallel", "recurrent", "chunkwise", or "auto"), and can be set on a network
that is built: the weights stay, and so does what they compute. In evaluation and without gradients, the recurrent and
the chunkwise form send an image through the whole network piece by piece (so that hooks see pieces), and keep nothing
but a state of d x d numbers a head and block: `ViR.pooled` then takes the same memory for any image.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.attention import attention
from vertebra.blocks.positions import fitted
from vertebra.blocks.retention import CHUNK, Compat, Form, Retention, causal_decays, log_rates, retention
from vertebra.blocks.rows import Dense
from vertebra.contracts import Backbone, Check, Effect, Features, Level, Measured, Preprocess
from vertebra.data.dataset import Dataset, Split
from vertebra.errors import UsageError
from vertebra.growth import crossing, exponent, peak, seconds
from vertebra.paper import Paper
from vertebra.parity import convert

PAPER = Paper(
    id="vir",
    title="ViR: Vision Retention Networks",
    year=2023,
    arxiv="2310.19731",
    reference="anom63931/ViR",
    licence="none",
    claim=(
        "the first general vision backbone with equivalent parallel and recurrent forms; competitive accuracy, and"
        " throughput and memory that scale better than ViT's at high resolution (no numbers in the abstract)"
    ),
    note=(
        "The released parallel form has a softmax that the other two have not, so that it is another network:"
        " compat='released'. The 2-D retention and the hybrid networks of the paper's later version have no code and"
        " are not built. Throughput on a GPU is not measured yet."
    ),
)

VARIANTS = {
    "s16": {"dim": 384, "depth": 12, "heads": 6, "patch": 16},
    "b16": {"dim": 768, "depth": 12, "heads": 12, "patch": 16},
    "l16": {"dim": 1024, "depth": 24, "heads": 16, "patch": 16},
    "l14": {"dim": 1024, "depth": 24, "heads": 16, "patch": 14},
    "nano": {"dim": 96, "depth": 4, "heads": 3, "patch": 4, "layer_scale": 0.1, "image_size": 32},
}

PIECE = 192
"""Tokens at most that go through the network together in the chunkwise form: enough for fast matrix products."""

Direction = Literal["forward", "both"]
Turn = Literal["last", "first"]


class ViROptions(BackboneOptions, total=False):
    """Options; a variant sets the first four.

    Attributes:
        dim: width of a token; a multiple of heads.
        depth: blocks.
        heads: of the retention.
        patch: side of a patch in pixels.
        ratio: hidden channels of the feed-forward for each of its own.
        layer_scale: what the gains of the branches start from.
        form: of the retention, as in `vertebra.blocks.retention`.
        chunk: tokens a chunk at most.
        compat: "released" takes the softmax of the released parallel form.
        direction: "both" scans the sequence and then its mirror image; maps are of the second look, which has seen
            everything, and so is the pooled token, the last of all.
        class_token: when the scan meets it. A first one sees nothing but itself, unless the direction is both.
        mixer: dim -> a module of tokens (B, N, dim) that keeps the shape, in place of retention.
    """

    dim: int
    depth: int
    heads: int
    patch: int
    ratio: float
    layer_scale: float
    form: Form
    chunk: int
    compat: Compat
    direction: Direction
    class_token: Turn
    mixer: Callable[[int], nn.Module] | None


def vir(variant: str = "s16", **options: Unpack[ViROptions]) -> "ViR":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `ViROptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("vir", VARIANTS, variant, options, ViR, crop=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)


class ViR(Backbone):
    """Patches, positions, blocks and a norm; build it with `vir`.

    Attributes:
        embed: image to patches.
        positions: (1, N, dim), of the patches alone; stretched to other grids.
        class_token: (1, 1, dim).
        blocks: all of them.
        norm: of all tokens.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embed", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        ratio: float = 4.0,
        layer_scale: float = 1e-5,
        form: Form = "auto",
        chunk: int = CHUNK,
        compat: Compat = "paper",
        direction: Direction = "forward",
        class_token: Turn = "last",
        mixer: Callable[[int], nn.Module] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        _check(direction, class_token, ratio, dim=dim, depth=depth, heads=heads, patch=patch)
        super().__init__()
        both, late = direction == "both", class_token == "last" and direction == "forward"
        retains = {"heads": heads, "form": form, "chunk": chunk, "compat": compat, "late": int(late)}
        make: Callable[..., nn.Module] = mixer or (lambda width: retention(width, **retains))
        self.heads, self.patch, self.both, self.last = heads, patch, both, class_token == "last"
        self.grid = _grid(preprocess.size, patch)
        self.embed = nn.Conv2d(preprocess.channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        turn: Turn | None = class_token if both else None
        rates = drop_rates(drop_path, [depth])[0]
        self.blocks = nn.ModuleList(
            Block(dim, make(dim), ratio=ratio, layer_scale=layer_scale, drop=rate, both=turn) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.levels = (Level(dim, patch),)
        self.width = dim
        self.preprocess = preprocess
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.normal_(self.class_token, std=1e-6)

    @property
    def form(self) -> Form:
        """How retention is computed; set it at any time."""
        found = self._retentions()
        return found[0].form if found else "auto"

    @form.setter
    def form(self, form: Form) -> None:
        if not self._retentions():
            raise UsageError(f"vir: form is {form!r}, and the network has no retention; build it without mixer=...")
        for each in self._retentions():
            each.form = form

    def _retentions(self) -> list[Retention]:
        mixers = (getattr(block, "mixer", None) for block in self.blocks)
        return [mixer for mixer in mixers if isinstance(mixer, Retention)]

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        if self._by_pieces():
            return self._streamed(images)
        x = self.embed(self._padded(images))
        grid = x.shape[2], x.shape[3]
        x = x.flatten(2).mT + self._positions(grid)
        front = self.class_token.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat((front, front, x, x) if self.both else (front, x), 1)
        decays = self._decays(x)
        for block in self.blocks:
            x = block(x, decays)
        if self.both:
            second = grid[0] * grid[1] + 2
            pooled = second if self.last else 1  # the last that the scan meets
            x = torch.cat((x[:, pooled : pooled + 1], x[:, second:]), 1)
        return _features(self.norm(x), grid)

    def pooled(self, images: Tensor) -> Tensor:
        """The pooled vectors (B, dim) alone; in the recurrent and the chunkwise form, in the same memory for any image.

        Images (B, channels, H, W) are those of `forward`. Positions that have to be stretched are a table as long as
        the image; build the network for its size. With gradients, in training mode and in other forms it takes what
        the forward pass takes.
        """
        check_images(self, images)
        if not self._by_pieces():
            return self(images).pooled
        found = None
        for kind, x in self._passed(self._padded(images)):
            found = x[:, -1] if self.both or kind == "class" else found
        return self.norm(found)

    def trunk(self) -> list[nn.Module]:
        """The patches' convolution, the blocks, and the norm."""
        return [self.embed, *self.blocks, self.norm]

    def _padded(self, images: Tensor) -> Tensor:
        down, across = (-side % self.patch for side in images.shape[2:])
        return pad(images, (0, across, 0, down)) if down or across else images

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        return fitted(self.positions, self.grid, grid, smooth=True)

    def _decays(self, x: Tensor) -> Tensor | None:
        """What the parallel form multiplies by, once for all blocks."""
        found = self._retentions()
        if not found or any(each.heads != self.heads or each.taken(x.shape[1]) != "parallel" for each in found):
            return None
        return causal_decays(log_rates(self.heads, x), x.shape[1]).to(x.dtype)

    def _by_pieces(self) -> bool:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return self.form in ("recurrent", "chunkwise") and len(self._retentions()) == len(self.blocks)

    def _streamed(self, images: Tensor) -> Features:
        """The forward pass piece by piece; what grows with the image is its map alone."""
        images = self._padded(images)
        grid = _grid(images.shape[2:], self.patch)
        cells, done = grid[0] * grid[1], 0
        tokens = torch.empty(len(images), 1 + cells, self.width, dtype=self.norm.weight.dtype, device=images.device)
        for kind, x in self._passed(images):
            if kind == "mirrored":
                tokens[:, 1 + cells - done - x.shape[1] : 1 + cells - done] = self.norm(x.flip(1))
            elif kind == "patches" and not self.both:
                tokens[:, 1 + done : 1 + done + x.shape[1]] = self.norm(x)
            if self.both or kind == "class":
                tokens[:, 0] = self.norm(x[:, -1])
            done += x.shape[1] if kind == ("mirrored" if self.both else "patches") else 0
        return _features(tokens, grid)

    def _passed(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the last block makes of each piece, in the order of the scan."""
        blocks: list[Any] = list(self.blocks)
        states: list[Tensor | None] = [None] * len(blocks)
        for kind, x in self._pieces(images):
            for number, block in enumerate(blocks):
                x, states[number] = block.step(x, states[number])
            yield kind, x

    def _pieces(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Tokens (B, n, dim) as the scan meets them: "patches", the "class" token, and what is "mirrored"."""
        token = ("class", self.class_token.expand(len(images), -1, -1))
        there, back = (self._strips(images, mirrored) for mirrored in (False, True))
        if not self.both:
            return chain(there, [token]) if self.last else chain([token], there)
        return chain(there, [token, token], back) if self.last else chain([token], there, back, [token])

    def _strips(self, images: Tensor, mirrored: bool) -> Iterator[tuple[str, Tensor]]:
        """Patches of a few rows at a time, cut into pieces."""
        rows, columns = _grid(images.shape[2:], self.patch)
        positions = self._positions((rows, columns))
        most = max(1, PIECE // columns)
        tops = range(0, rows, most)
        for top in reversed(tops) if mirrored else tops:
            below = min(top + most, rows)
            x = self.embed(images[:, :, top * self.patch : below * self.patch]).flatten(2).mT
            x = x + positions[:, top * columns : below * columns]
            for piece in (x.flip(1) if mirrored else x).split(1 if self.form == "recurrent" else PIECE, 1):
                yield "mirrored" if mirrored else "patches", piece


def _check(direction: str, class_token: str, ratio: float, *, dim: int, depth: int, heads: int, patch: int) -> None:
    check_at_least("vir", 1, dim=dim, depth=depth, heads=heads, patch=patch)
    if dim % heads:
        raise UsageError(f"vir: {heads} heads do not divide dim {dim}; take a divisor")
    if ratio <= 0:
        raise UsageError(f"vir: ratio is {ratio}; it must be above 0")
    if direction not in get_args(Direction):
        raise UsageError(f"vir: direction is {direction!r}; it can be {' or '.join(get_args(Direction))}")
    if class_token not in get_args(Turn):
        raise UsageError(f"vir: class_token is {class_token!r}; it can be {' or '.join(get_args(Turn))}")


def _grid(size: Sequence[int], patch: int) -> tuple[int, int]:
    """Patches down and across, the last ones filled up."""
    return -(-size[0] // patch), -(-size[1] // patch)


def _features(tokens: Tensor, grid: tuple[int, int]) -> Features:
    return Features((tokens[:, 1:].mT.unflatten(2, grid),), tokens[:, 0], tokens)


class Block(nn.Module):
    """Retention and a feed-forward, each behind a norm, with a gain for each channel, beside a shortcut.

    Attributes:
        norm1: of what the mixer is given.
        mixer: retention, or the given module.
        scale1: gains of the mixer's branch, (dim,).
        norm2: of what the feed-forward is given.
        mlp: the feed-forward.
        scale2: its gains.
        both: when the scan meets the class token of a sequence that is scanned with its mirror image; None where it
            is scanned once.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, *, ratio: float, layer_scale: float, drop: float, both: Turn | None
    ) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.both: Turn | None = both
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        widen, narrow = Dense(dim, hidden), Dense(hidden, dim)
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](widen=widen, act=nn.GELU(), narrow=narrow))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor, decays: Tensor | None = None) -> Tensor:
        """Tokens (B, N, dim) to tokens of the same shape; `decays` as in `Retention`."""
        y = self.norm1(x)
        turn: Turn | None = self.both
        y = _scanned(y, turn) if turn else y
        y = self.mixer(y, decays) if isinstance(self.mixer, Retention) else self.mixer(y)
        y = _stored(y, turn) if turn else y
        return self._after(x, y)

    def step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next tokens (B, n, dim) of the scan and the state before them, to tokens and the state behind them."""
        mixer: Any = self.mixer
        y, after = mixer.step(self.norm1(x), state)
        return self._after(x, y), after

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        x = self._added(x, y, self.scale1)
        return self._added(x, self.mlp(self.norm2(x)), self.scale2)

    def _added(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(x, y, scale) if isinstance(self.drop, nn.Identity) else x + self.drop(y * scale)


def _scanned(x: Tensor, turn: Turn) -> Tensor:
    """Two class tokens, patches, and patches again (B, 2 + 2 N, C), in the order in which a scan of both ways goes."""
    cells = (x.shape[1] - 2) // 2
    one, other, there, back = x.split((1, 1, cells, cells), 1)
    back = back.flip(1)
    return torch.cat((there, one, other, back) if turn == "last" else (one, there, back, other), 1)


def _stored(x: Tensor, turn: Turn) -> Tensor:
    """What `_scanned` made, in the order of memory."""
    cells = (x.shape[1] - 2) // 2
    if turn == "last":
        there, one, other, back = x.split((cells, 1, 1, cells), 1)
    else:
        one, there, back, other = x.split((1, cells, cells, 1), 1)
    return torch.cat((one, other, there, back.flip(1)), 1)


_RULES = [
    (r"^module\.", ""),
    (r"^head\.", None),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "embed."),
    (r"\.retention\.out_proj\.", ".mixer.proj."),
    (r"\.retention\.", ".mixer."),
    (r"\.ls([12])\.gamma$", r".scale\1"),
    (r"\.mlp\.fc1\.", ".mlp.widen."),
    (r"\.mlp\.fc2\.", ".mlp.narrow."),
]


def published(state: Mapping[str, Tensor], backbone: ViR) -> dict[str, Tensor]:
    """Weights of the authors' code (anom63931/ViR) under our names; positions are stretched, the classifier left out.

    Args:
        state: tensors of a checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `vir`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    tensors = dict(state)
    for name in ("pos_embed", "module.pos_embed"):
        if name in tensors and tensors[name].shape != backbone.positions.shape:  # theirs are of a square
            side = isqrt(tensors[name].shape[1])
            tensors[name] = fitted(tensors[name], (side, side), backbone.grid, smooth=True)
    return convert(tensors, _RULES, backbone)


@dataclass(frozen=True)
class _Setting:
    """What a scale of the effect trains; and the grids of patches, whose sides are `sides`, that are measured."""

    dim: int
    depth: int
    heads: int
    images: int
    epochs: int
    sides: tuple[int, ...] = (14, 32, 64, 128)


_SETTINGS = {"toy": _Setting(96, 4, 3, 2000, 10), "gpu": _Setting(192, 6, 3, 50_000, 60)}

_ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vit": ("attention in the place of retention, all else equal", {}),
    "vir": ("class token last; measured in the chunkwise form", {"form": "chunkwise"}),
    "class_first": ("class token first: it sees nothing", {"class_token": "first"}),
    "recurrent": ("the recurrent form, not trained", {"form": "recurrent"}),
    "parallel": ("the parallel form, not trained", {"form": "parallel"}),
}
_TRAINED, _MEASURED = ("vit", "vir", "class_first"), ("vit", "vir", "recurrent", "parallel")
_PRODUCTS = 4096
"""Tokens up to which the parallel form is measured: it makes its whole matrix."""


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Retention beside attention: accuracy, the class token's turn, memory and time as tokens grow."""
    from vertebra.arms import parts

    setting = _SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        return _measure(arm, seed, setting, train, test)

    return Effect(
        claim=(
            "retention in place of attention is nearly as accurate, and infers in memory that does not grow with the"
            " tokens and in time that grows linearly"
        ),
        arms={name: what for name, (what, _) in _ARMS.items()},
        baseline="vit",
        metrics={"top1": "%", "nll": "", "time_growth": "", "memory_growth": "", "memory": "MB", "ahead_from": ""},
        measure=measure,
        checks=_checks,
        limits=(
            f"width {setting.dim}, {setting.depth} blocks, {len(train)} images of 32 pixels in patches of 4, layer"
            " scale from 0.1: below a point needs more seeds. Time and memory are of one block and one image, of"
            f" {setting.sides[0] ** 2} to {setting.sides[-1] ** 2} tokens, on one thread, for the pooled vector alone;"
            " the growth of time is the power law between the two longest. Memory is what tensors take at their peak"
            " beside weights and image, counted; attention is torch's fused kernel, which keeps its matrix to itself."
            " The crossing is this machine's"
        ),
        data=words,
    )


def _armed(arm: str, setting: _Setting, **options: Any) -> ViR:
    mixer = partial(attention, heads=setting.heads) if arm == "vit" else None
    return vir("nano", dim=setting.dim, heads=setting.heads, mixer=mixer, **{**_ARMS[arm][1], **options})


def _measure(arm: str, seed: int, setting: _Setting, train: Split, test: Split) -> Mapping[str, float]:
    from vertebra.arms import trained
    from vertebra.config import Plan, Views

    names = ("top1", "nll", "time_growth", "memory_growth", "memory", "ahead_from")
    found: dict[str, float] = dict.fromkeys(names, float("nan"))
    torch.manual_seed(seed)
    if arm in _MEASURED:
        found |= _growth(arm, setting)
    if arm in _TRAINED:
        torch.manual_seed(seed)
        plan = Plan(epochs=setting.epochs, batch=64, lr=2e-3, views=Views(scale=(0.6, 1.0)), seed=seed)
        scores = trained(_armed(arm, setting, depth=setting.depth, form="auto"), train, test, plan).scores
        found |= {"top1": scores["top1"], "nll": scores["nll"]}
    return found


def _growth(arm: str, setting: _Setting) -> dict[str, float]:
    """Exponents of an arm's time and memory as the tokens grow; of "vir", from how many on it is ahead of attention."""
    sides = [side for side in setting.sides if arm != "parallel" or side**2 <= _PRODUCTS]
    tokens, peaks, spent = [side**2 for side in sides], [], []
    for side in sides:
        both = [_armed(name, setting, depth=1, image_size=4 * side).eval() for name in dict.fromkeys((arm, "vit"))]
        images = torch.randn(1, 3, 4 * side, 4 * side)
        runs = [partial(backbone.pooled, images) for backbone in (both if arm == "vir" else both[:1])]
        peaks.append(peak(runs[0], (images, *both[0].parameters())))
        spent.append(seconds(runs, 3 if side < 128 else 1))
    own = [row[0] for row in spent]
    found = {
        "time_growth": exponent(tokens[-2:], own[-2:]),
        "memory_growth": exponent([tokens[0], tokens[-1]], [peaks[0], peaks[-1]]),
        "memory": peaks[-1] / 1e6,
    }
    return found | ({"ahead_from": crossing(tokens, own, [row[1] for row in spent])} if arm == "vir" else {})


def _checks(measured: Measured) -> Sequence[Check]:
    top1 = {arm: measured.mean(arm, "top1") for arm in _TRAINED}
    behind = measured.gain("vir", "vit", "top1")
    memory = {arm: measured.mean(arm, "memory_growth") for arm in ("vir", "recurrent")}
    time = {arm: measured.mean(arm, "time_growth") for arm in _MEASURED}
    start = measured.mean("vir", "ahead_from")
    return [
        Check(
            "within 2 points of the transformer of equal size",
            bool(behind.mean() >= -2),
            f"{behind.mean():+.2f} points (seeds: {', '.join(f'{gain:+.2f}' for gain in behind)})",
        ),
        Check(
            "the class token last is ahead of first",
            top1["vir"] > top1["class_first"],
            ", ".join(f"{arm} {value:.2f}" for arm, value in top1.items()),
        ),
        Check(
            "memory of the chunkwise and the recurrent form does not grow: exponent below 0.05",
            max(memory.values()) < 0.05,
            f"chunkwise {memory['vir']:.3f}, recurrent {memory['recurrent']:.3f}; attention "
            f"{measured.mean('vit', 'memory_growth'):.2f}, parallel {measured.mean('parallel', 'memory_growth'):.2f}",
        ),
        Check(
            "time of the chunkwise form grows linearly, of attention quadratically: exponents 0.8 to 1.2, above 1.7",
            0.8 <= time["vir"] <= 1.2 and time["vit"] > 1.7,
            ", ".join(f"{'chunkwise' if arm == 'vir' else arm} {value:.2f}" for arm, value in time.items()),
        ),
        Check("the chunkwise form passes attention", start == start, f"from {start:.0f} tokens on"),
    ]
