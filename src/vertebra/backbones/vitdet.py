"""ViTDet's backbone: a plain ViT that attends within windows, with a few blocks that carry across them.

Shapes: images (B, 3, H, W) of any size to one map at the stride of the patches. The map is cut into windows of 14 x 14
patches that do not overlap and do not shift; what a window lacks at the bottom and on the right is zeros, which take
part in the attention, as in the reference. A few evenly spaced blocks attend to the whole map, or else add a residual
bottleneck of convolutions after their feed-forward (`propagation="conv"`), so that windows hear of each other. Relative
positions are decomposed (`vertebra.blocks.decomposed_relative_position`); positions of the pre-training size are
resized. There is no class token and no norm at the end, and `pooled` is the mean of the map.

    vitdet("b", weights="model.safetensors")                         detectron2's names
    vitdet(vit="vit_base_patch16_224.mae", weights="pretrained")     any plain ViT of timm, with its weights
    vitdet(vit="vit_base_patch16_224.mae", weights="vit.safetensors", patch=16, image_size=(512, 768))

The last two take width, depth, heads, norms and feed-forward from timm's network, and leave its class token, registers
and last norm behind. With `window=0` and without a class token in the ViT the map is the ViT's own, in front of its
last norm: tables of relative positions start at zero.

Departs from the reference at sizes that are no multiple of the patch: they are padded with zeros, where its convolution
leaves out what remains. The rate of layer-wise decay of a bottleneck is that of its block; the reference gives it the
head's. The authors drop paths of b, l and h with 0.1, 0.4 and 0.5, and decay rates by 0.7, 0.8 and 0.9.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates, pair
from vertebra.blocks import positions
from vertebra.blocks.decomposed_relative_position import decomposed_relative_position, fitted
from vertebra.blocks.rows import Dense, FeedForward
from vertebra.blocks.windows import Sides, group, padded, ungroup
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import Rules, convert

PAPER = Paper(
    id="vitdet",
    title="Exploring Plain Vision Transformer Backbones for Object Detection",
    year=2022,
    arxiv="2203.16527",
    reference="facebookresearch/detectron2",
    licence="Apache-2.0",
    claim=(
        "61.3 box AP on COCO with a plain backbone that was pretrained on ImageNet-1k alone; a pyramid from one map is"
        " as good as FPN, and windows without shift with four blocks across them suffice"
    ),
    numbers="parameters of the backbone alone; the authors give no multiply-accumulates, which are counted",
    note=(
        "The backbone; its pyramid from one map and its heads come with the detectors, and with them the effect, which"
        " is of detection."
    ),
)

VARIANTS = {
    "b": {"dim": 768, "depth": 12, "heads": 12, "image_size": 1024},
    "l": {"dim": 1024, "depth": 24, "heads": 16, "image_size": 1024},
    "h": {"dim": 1280, "depth": 32, "heads": 16, "image_size": 1024},
    "nano": {
        "dim": 96, "depth": 4, "heads": 3, "patch": 4, "window": 3, "crossings": 2, "pretrain_size": 32,
        "image_size": 32,
    },
}  # fmt: skip

Propagation = Literal["global", "conv"]

_FIXED = ("depth", "dim", "heads", "pretrain_size", "ratio")
"""Options that a given ViT decides."""


class ViTDetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three.

    Attributes:
        dim: width of a token.
        depth: blocks.
        heads: of the attention.
        ratio: hidden channels of the feed-forward for each of its own.
        patch: side in pixels of what a token sees.
        window: side of a window in tokens; 0 has every block attend to the whole map.
        crossings: blocks that carry across windows: how many, evenly spaced, or which, from 0.
        propagation: what those do, "global" attention or "conv", a bottleneck of convolutions.
        pretrain_size: side in pixels, or (height, width), of the images that positions are learnt on.
        vit: a plain ViT of timm, by its name or the network itself, that is taken over; then `weights` are also those
            of timm ("pretrained", a tag), and the options that it decides are left out.
    """

    dim: int
    depth: int
    heads: int
    ratio: float
    patch: int
    window: int
    crossings: int | Sequence[int]
    propagation: Propagation
    pretrain_size: int | tuple[int, int]
    vit: str | nn.Module | None


def vitdet(variant: str = "b", **options: Unpack[ViTDetOptions]) -> "ViTDet":
    """Build a variant, or a plain ViT with windows.

    Args:
        variant: one of `VARIANTS`.
        options: as in `ViTDetOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, an option out of range, or a `vit` that is no plain one.
        VertebraError: weights that are not here and cannot be fetched, or that do not fit.
    """
    vit = options.pop("vit", None)
    if vit is None:
        return build("vitdet", VARIANTS, variant, options, ViTDet)
    return _of_vit(vit, variant, dict(options))


class ViTDet(Backbone):
    """Patches and blocks; build it with `vitdet`.

    Attributes:
        embed: image to patches with their positions.
        blocks: in the order of the signal.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embed.conv", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int,
        heads: int,
        ratio: float = 4,
        patch: int = 16,
        window: int = 14,
        crossings: int | Sequence[int] = 4,
        propagation: Propagation = "global",
        pretrain_size: int | tuple[int, int] = 224,
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("vitdet", 1, dim=dim, depth=depth, heads=heads, patch=patch)
        check_at_least("vitdet", 0, window=window)
        if propagation not in get_args(Propagation):
            raise UsageError(f"vitdet: propagation is {propagation!r}; it can be {' or '.join(get_args(Propagation))}")
        if dim % heads or int(dim * ratio) < 1:
            raise UsageError(
                f"vitdet: dim {dim}, heads {heads}, ratio {ratio}; dim is a multiple of heads, ratio above 0"
            )
        super().__init__()
        grid = _cells(preprocess.size, patch)
        self.embed = Embed(preprocess.channels, dim, patch=patch, grid=_cells(pair(pretrain_size), patch))
        crossing, self.blocks = _crossing(crossings, depth), nn.ModuleList()
        for number, rate in enumerate(drop_rates(drop_path, [depth])[0]):
            side = 0 if number in crossing and propagation == "global" else window
            conv = number in crossing and propagation == "conv"
            self.blocks.append(Block(dim, heads=heads, ratio=ratio, window=side, grid=grid, conv=conv, drop_path=rate))
        self.levels, self.width, self.preprocess = (Level(dim, patch),), dim, preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        tokens = x.flatten(1, 2)
        return Features((x.movedim(3, 1),), tokens.mean(1), tokens)

    def trunk(self) -> list[nn.Module]:
        """The patches with their positions, and the blocks."""
        return [self.embed, *self.blocks]


def _cells(size: Sides, patch: int) -> Sides:
    return -(-size[0] // patch), -(-size[1] // patch)


def _crossing(crossings: int | Sequence[int], depth: int) -> set[int]:
    """Which blocks carry across windows; so many have the last one among them."""
    if isinstance(crossings, int):
        if 0 <= crossings <= depth:
            return {(number + 1) * depth // crossings - 1 for number in range(crossings)}
    elif all(0 <= number < depth for number in crossings):
        return set(crossings)
    raise UsageError(
        f"vitdet: crossings is {crossings}; it is a number of blocks, 0 to {depth}, or some of the blocks 0 to"
        f" {depth - 1}, as 4 or (2, 5, 8, 11)"
    )


class Embed(nn.Module):
    """Patches of an image as a map of tokens, with their positions.

    Attributes:
        conv: of kernel and stride p.
        norm: of patches, norm_pre: of tokens. Nothing, unless a ViT that has them put its own.
        positions: (1, N, dim), learnt on `grid`; None in a ViT without any.
    """

    def __init__(self, channels: int, dim: int, *, patch: int, grid: Sides) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.conv = nn.Conv2d(channels, dim, patch, patch)
        self.norm, self.norm_pre = nn.Identity(), nn.Identity()
        table = nn.init.trunc_normal_(torch.empty(1, prod(grid), dim), std=0.02)
        self.positions: nn.Parameter | None = nn.Parameter(table)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to maps (B, H / patch, W / patch, dim), rounded up."""
        more = [-side % self.patch for side in images.shape[2:]]
        x = self.norm(self.conv(pad(images, (0, more[1], 0, more[0])) if any(more) else images).permute(0, 2, 3, 1))
        if self.positions is not None:
            grid = x.shape[1], x.shape[2]
            x = x + positions.fitted(self.positions, self.grid, grid).unflatten(1, grid)
        return self.norm_pre(x.contiguous())


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the attention is given; norm2 of what the feed-forward is given.
        attn: of the tokens of a window, or of the whole map.
        mlp: the feed-forward.
        ls1: of what the attention adds, ls2 of what the feed-forward adds. Nothing, unless a ViT put its own.
        residual: convolutions across windows; None in most blocks.
    """

    def __init__(
        self, dim: int, *, heads: int, ratio: float, window: int, grid: Sides, conv: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = decomposed_relative_position(dim, heads=heads, sides=(window, window) if window else grid)
        self.mlp = FeedForward(dim, int(dim * ratio))
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.residual = Bottleneck(dim) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, dim) to maps of the same shape."""
        x = x + self.drop(self.ls1(self._attended(self.norm1(x))))
        x = x + self.drop(self.ls2(self.mlp(self.norm2(x))))
        return x if self.residual is None else self.residual(x)

    def _attended(self, x: Tensor) -> Tensor:
        real, sides = (x.shape[1], x.shape[2]), (self.window, self.window)
        if not self.window:
            return self.attn(x.flatten(1, 2), real).unflatten(1, real)
        x = padded(x, *sides)  # after the norm: what is padded is zero, and is attended to
        size, windows = (x.shape[1], x.shape[2]), group(x, sides)
        y = self.attn(windows.flatten(0, 1), sides).unflatten(0, windows.shape[:2])
        return ungroup(y, sides, (1, 1), size)[:, : real[0], : real[1]]


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 pixels through half of the channels, beside a shortcut, which they start as.

    Attributes:
        narrow: to half of the channels, norm1 behind it.
        mix: across 3 x 3 places, norm2 behind it.
        widen: back; norm3, the last one, starts with gains of zero.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = max(1, dim // 2)
        self.narrow, self.norm1 = Dense(dim, half, bias=False), nn.LayerNorm(half, eps=1e-6)
        self.mix, self.norm2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.LayerNorm(half, eps=1e-6)
        self.widen, self.norm3 = Dense(half, dim, bias=False), nn.LayerNorm(dim, eps=1e-6)
        self.act = nn.GELU()
        for layer in (self.narrow, self.mix, self.widen):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, dim) to maps of the same shape."""
        y = self.act(self.norm1(self.narrow(x)))
        y = self.act(self.norm2(self.mix(y.movedim(3, 1)).movedim(1, 3)))
        return x + self.norm3(self.widen(y))


def _of_vit(vit: str | nn.Module, variant: str, options: dict[str, Any]) -> ViTDet:
    """A plain ViT of timm with windows."""
    from vertebra.backbones.timm import Timm, timm

    own = sorted(options.keys() & set(_FIXED))
    if own:
        raise UsageError(f"vitdet: vit=... decides {', '.join(own)}; leave {'it' if len(own) == 1 else 'them'} out")
    if isinstance(vit, str):
        given = options.get("weights") or "random"
        wanted = "random" if _of_file(vit, given) else given
        pickles = options.get("allow_pickle", False)
        vit = timm(vit, weights=wanted, channels=options.get("channels", 3), allow_pickle=pickles)
        options["weights"] = given if wanted == "random" else None
    info, seen = getattr(vit, "weights_info", None), vit.preprocess if isinstance(vit, Timm) else None
    plain = _plain(vit.network if isinstance(vit, Timm) else vit)
    images = {} if seen is None else {"mean": seen.mean, "std": seen.std, "crop": seen.crop}
    images |= {} if seen is None else {"interpolation": seen.interpolation}
    decided = {*_FIXED, "patch"}
    variants = {name: {k: v for k, v in entry.items() if k not in decided} for name, entry in VARIANTS.items()}
    options = {"channels": plain.patch_embed.proj.in_channels, **options}
    backbone = build("vitdet", variants, variant, options, partial(_taken_over, plain), **images)
    if info is not None:
        backbone.weights_info = info
    return backbone


def _of_file(vit: str, weights: str) -> bool:
    """Whether weights are a file or a folder here, and none of timm's."""
    from vertebra.shipping.weights import published as tags

    known = {"random", "pretrained", *(row["tag"] for row in tags(vit))}
    if weights.startswith("hf-hub:") or weights.partition("@")[0] in known:
        return False
    path = Path(weights).expanduser()
    return path.exists() or bool(path.suffix) or "/" in weights


def _plain(vit: nn.Module) -> Any:
    """A ViT of timm whose blocks are plain ones.

    Raises:
        UsageError: any other network; the message says what it has.
    """
    from timm.layers.attention import Attention
    from timm.layers.patch_embed import PatchEmbed
    from timm.models import vision_transformer as models

    found: Any = vit
    if not isinstance(vit, models.VisionTransformer):
        raise UsageError(f"vitdet: vit is a {type(vit).__name__}; it has to be a plain ViT of timm (VisionTransformer)")
    parts = [(vit.patch_embed, PatchEmbed)]
    parts += [(block, models.Block) for block in vit.blocks]
    parts += [(block.attn, Attention) for block in found.blocks if isinstance(block, models.Block)]
    foreign = sorted({type(part).__name__ for part, kind in parts if type(part) is not kind})
    if foreign or any(block.attn.gate is not None for block in found.blocks):
        raise UsageError(
            f"vitdet: vit has {', '.join(foreign) or 'gated attention'}, which is not plain; it has to be patches by a"
            " convolution, then blocks of attention and a feed-forward, one after the other"
        )
    return found


def _taken_over(vit: Any, *, preprocess: Preprocess, patch: int | None = None, **options: Any) -> ViTDet:
    """The network of a plain ViT, with its weights: copies of its layers in our places."""
    vit, before = copy.deepcopy(vit), vit.patch_embed.patch_size
    if before[0] != before[1]:
        raise UsageError(f"vitdet: vit has patches of {before[0]} x {before[1]} pixels; they have to be square")
    side: int = before[0] if patch is None else patch
    sizes = {"dim": vit.embed_dim, "depth": len(vit.blocks), "heads": vit.blocks[0].attn.num_heads, "ratio": 1}
    backbone = ViTDet(preprocess=preprocess, patch=side, **sizes, **options)
    for ours, theirs in zip(backbone.blocks, vit.blocks, strict=True):
        for name in ("norm1", "norm2", "mlp", "ls1", "ls2"):
            setattr(ours, name, getattr(theirs, name))
        for name in ("qkv", "q_norm", "k_norm", "norm", "proj"):
            setattr(ours.attn, name, getattr(theirs.attn, name))
    _embedded(backbone.embed, vit, side)
    return backbone


def _embedded(embed: Embed, vit: Any, patch: int) -> None:
    """Patches and positions of a ViT; patches of another side are resampled (arXiv 2212.08013)."""
    proj, embed.grid = vit.patch_embed.proj, vit.patch_embed.grid_size
    if patch != proj.kernel_size[0]:
        conv = nn.Conv2d(proj.in_channels, proj.out_channels, patch, patch, bias=proj.bias is not None)
        state = {**proj.state_dict(), "weight": resample_patch_embed(proj.weight.detach(), [patch, patch])}
        conv.load_state_dict(state)
        proj = conv
    embed.conv, embed.norm, embed.norm_pre = proj, vit.patch_embed.norm, vit.norm_pre
    table = vit.pos_embed
    cells = prod(embed.grid)
    embed.positions = None if table is None else nn.Parameter(table.detach()[:, table.shape[1] - cells :].clone())


def published(state: Mapping[str, Tensor], backbone: ViTDet) -> dict[str, Tensor]:
    """Released weights under our names: detectron2's detectors or backbones, or a plain ViT's (timm's, MAE's).

    Positions lose those of the class token and are resized to the grid of `backbone`, tables of relative positions to
    its maps, patches to its side. A plain ViT has no such tables: they become zero; convolutions across windows stay as
    they are in `backbone`. Necks, heads, decoders, class tokens and last norms are left out.

    Args:
        state: tensors of a checkpoint; detectron2's own files are pickles of arrays, to be converted to tensors first.
        backbone: of `vitdet`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    own, tensors = backbone.state_dict(), dict(state)
    for name, tensor in state.items():
        if found := _TABLE.search(name):
            wanted = own.get(f"blocks.{found[1]}.attn.{'rows' if found[2] in ('rel_pos_h', 'rows') else 'columns'}")
            tensors[name] = tensor if wanted is None else fitted(tensor, (len(wanted) + 1) // 2)
        elif name.endswith(("pos_embed", "embed.positions")):
            tensors[name] = _placed(tensor, backbone.embed)
        elif name.endswith(("patch_embed.proj.weight", "embed.conv.weight")) and tensor.ndim == 4:
            sides = [backbone.embed.patch] * 2
            tensors[name] = tensor if list(tensor.shape[2:]) == sides else resample_patch_embed(tensor, sides)
    if not any(_TABLE.search(name) for name in state):  # a plain ViT
        new = {name: tensor for name, tensor in own.items() if _TABLE.search(name) or ".residual." in name}
        tensors |= {name: torch.zeros_like(tensor) if _TABLE.search(name) else tensor for name, tensor in new.items()}
    return convert(tensors, _NAMES, backbone)


def _placed(table: Tensor, embed: Embed) -> Tensor:
    """Positions (1, M, dim) of a square grid, perhaps behind those of other tokens, for an embedding."""
    if embed.positions is None or table.shape == embed.positions.shape:
        return table
    side = isqrt(table.shape[1])
    return positions.fitted(table[:, table.shape[1] - side * side :], (side, side), embed.grid)


_TABLE = re.compile(r"blocks\.(\d+)\.attn\.(rel_pos_h|rel_pos_w|rows|columns)$")

_NAMES: Rules = (
    (r"^(backbone\.)?simfp_\d|^(proposal_generator|roi_heads|pixel_mean|pixel_std)\b", None),
    (r"^(cls|dist|reg|mask)_token$|^(head|head_dist|fc_norm|norm|attn_pool|pre_logits)\.|^decoder_", None),
    (r"^(backbone\.)?net\.", ""),
    (r"^patch_embed\.proj\.", "embed.conv."),
    (r"^patch_embed\.norm\.", "embed.norm."),
    (r"^pos_embed$", "embed.positions"),
    (r"^norm_pre\.", "embed.norm_pre."),
    (r"\.attn\.rel_pos_h$", ".attn.rows"),
    (r"\.attn\.rel_pos_w$", ".attn.columns"),
    (r"\.residual\.conv1\.", ".residual.narrow."),
    (r"\.residual\.conv2\.", ".residual.mix."),
    (r"\.residual\.conv3\.", ".residual.widen."),
)
