"""Hyena ViT: DeiT's plain transformer with Hyena in place of attention, in all blocks or in some.

Shapes: images (B, 3, H, W) to one map of width `dim` at the stride of a patch, and its tokens. The operator
(`vertebra.blocks.hyena_nd`, arXiv 2309.13600) looks to one corner in even blocks and to the opposite one in odd blocks.
There is no class token. Sides that no patch divides are padded with zeros below and right; on another grid than that of
`image_size` positions are resized and kernels stretched.

Departs from the authors' code in what a classifier reads: the mean over all tokens, since the first token alone, which
they take (`pooling="first"`), sees next to nothing of the image through kernels that look to one corner.
"""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.attention import attention
from vertebra.blocks.hyena_nd import HyenaOptions, hyena_nd, names
from vertebra.blocks.positions import fitted
from vertebra.blocks.rows import FeedForward
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError, near
from vertebra.parity import convert

VARIANTS = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "tiny_hybrid": {"dim": 192, "depth": 12, "heads": 3, "mixers": "hyena_attention"},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "small_hybrid": {"dim": 384, "depth": 12, "heads": 6, "mixers": "hyena_attention"},
    "nano": {"dim": 96, "depth": 4, "heads": 3, "patch": 4, "kernel_width": 16, "image_size": 32},
}

Mixers = Literal["hyena", "hyena_attention", "attention_hyena", "alternating", "attention"]
_MIXERS = ("hyena", "hyena_attention", "attention_hyena", "alternating", "attention")


class HyenaVitOptions(BackboneOptions, HyenaOptions, total=False):
    """Options, with those of the operator; a variant sets the first three.

    Attributes:
        dim: width of a token.
        depth: blocks.
        heads: of attention, where there is some.
        patch: side of a patch in pixels.
        ratio: width of the linear layers of a block, in widths of a token.
        mixers: which blocks have Hyena and which attention: "hyena_attention" has attention in those after number
            depth // 2, counted from 0, "attention_hyena" Hyena in them, "alternating" Hyena in the even ones.
        pooling: what a classifier reads: the "mean" of all tokens, or the "first" one.
        axes: of the operator; 1 reads the tokens row after row as one sequence.
    """

    dim: int
    depth: int
    heads: int
    patch: int
    ratio: float
    mixers: Mixers
    pooling: Literal["mean", "first"]
    axes: Literal[1, 2]


def hyena_vit(variant: str = "tiny", **options: Unpack[HyenaVitOptions]) -> "HyenaViT":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`; the hybrids are `hyena_attention`.
        options: as in `HyenaVitOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant or choice, or a number out of range.
    """
    return build("hyena_vit", VARIANTS, variant, options, HyenaViT, crop=0.9)


class HyenaViT(Backbone):
    """Patches, blocks of one width, a norm; build it with `hyena_vit`.

    Attributes:
        embed: image to patches.
        positions: (1, N, dim), added to the patches of `image_size`.
        blocks: one after the other.
        norm: of what comes out.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embed", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int,
        heads: int,
        patch: int = 16,
        ratio: float = 4.0,
        mixers: Mixers = "hyena",
        pooling: Literal["mean", "first"] = "mean",
        axes: Literal[1, 2] = 2,
        drop_path: float = 0.0,
        **hyena: Any,
    ) -> None:
        for option, value, allowed in (("mixers", mixers, _MIXERS), ("pooling", pooling, ("mean", "first"))):
            if value not in allowed:
                hint = near(value, allowed)
                raise UsageError(f"hyena_vit: {option} is {value!r}{hint}; it can be {', '.join(allowed)}")
        for option in hyena.keys() - HyenaOptions.__annotations__.keys():
            known = HyenaVitOptions.__annotations__
            raise UsageError(f"hyena_vit has no option {option!r}{near(option, known)}; it has {', '.join(known)}")
        if axes not in (1, 2):
            raise UsageError(f"hyena_vit: axes is {axes}; it can be 1 or 2")
        check_at_least("hyena_vit", 1, dim=dim, depth=depth, heads=heads, patch=patch, ratio=ratio)
        super().__init__()
        self.patch, self.pooling, self.preprocess = patch, pooling, preprocess
        self.window = hyena.get("window", "fixed")
        height, width = (-(-side // patch) for side in preprocess.size)
        self.grid, self.width, self.levels = (height, width), dim, (Level(dim, patch),)
        self.embed = nn.Conv2d(preprocess.channels, dim, patch, patch)
        self.positions = nn.Parameter(trunc_normal_(torch.empty(1, height * width, dim), std=0.02))
        self.blocks = nn.ModuleList()
        for number, (rate, kind) in enumerate(
            zip(drop_rates(drop_path, [depth])[0], kinds(mixers, depth), strict=True)
        ):
            if kind == "attention":
                mixer: nn.Module = attention(dim, heads=heads)
            else:
                grid = self.grid if axes == 2 else (height * width,)
                options: Any = {**hyena, "directions": _seen(hyena, number)}
                mixer = hyena_nd(dim, grid=grid, axes=axes, **options)
            self.blocks.append(Block(dim, mixer, ratio=ratio, maps=kind == "hyena" and axes == 2, drop_path=rate))
        self.norm = nn.LayerNorm(dim, 1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # those of the kernels too, as in the authors' code
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        height, width = images.shape[2:]
        x = self.embed(F.pad(images, (0, -width % self.patch, 0, -height % self.patch))).movedim(1, -1)
        x = x + self.positions_of((x.shape[1], x.shape[2]))  # (B, h, w, dim)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        tokens = x.flatten(1, 2)
        return Features((x.movedim(-1, 1),), tokens.mean(1) if self.pooling == "mean" else tokens[:, 0], tokens)

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid (h, w): (1, h, w, dim)."""
        return fitted(self.positions, self.grid, grid, smooth=True).unflatten(1, grid)

    def trunk(self) -> list[nn.Module]:
        """The patches, the blocks and the norm."""
        return [self.embed, *self.blocks, self.norm]


def kinds(mixers: Mixers, depth: int) -> list[Literal["hyena", "attention"]]:
    """What each block mixes tokens with."""
    first = {
        "hyena": lambda number: True,
        "attention": lambda number: False,
        "hyena_attention": lambda number: number <= depth // 2,
        "attention_hyena": lambda number: number > depth // 2,
        "alternating": lambda number: number % 2 == 0,
    }[mixers]
    return ["hyena" if first(number) else "attention" for number in range(depth)]


def _seen(hyena: Mapping[str, Any], number: int) -> Any:
    """Directions of a block: with "seq", which is the default, even and odd ones look to opposite corners."""
    directions = hyena.get("directions", "seq")
    return "standard" if directions == "seq" and number % 2 else directions


class Block(nn.Module):
    """A mixer of tokens and two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self, dim: int, mixer: nn.Module, *, ratio: float, maps: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.mixer, self.maps = mixer, maps
        self.mlp = FeedForward(dim, int(dim * ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, h, w, dim) to maps."""
        y = self.norm1(x)
        y = self.mixer(y) if self.maps else self.mixer(y.flatten(1, 2)).unflatten(1, x.shape[1:3])
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def published(state: Mapping[str, Tensor], backbone: HyenaViT) -> dict[str, Tensor]:
    """The authors' weights (Itamarzimm/HyenaND, Apache-2.0) under our names; their classifier is left out.

    Args:
        state: tensors of a checkpoint of their `VisionTransformer`.
        backbone: of the same options.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules = [(r"^head\.", None), (r"^patch_embed\.proj\.", "embed."), (r"^pos_embed$", "positions")]
    return convert(state, [*rules, (r"\.attn\.", ".mixer."), *names(backbone.window)], backbone)
