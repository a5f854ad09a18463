"""Swin-MLP: Swin's stages and shifted windows with a matrix for each head in place of attention.

Shapes: images (B, 3, H, W) of any size to maps at strides 4, 8, 16 and 32; `tokens` are the cells of the last map
behind a norm, `pooled` their mean. Blocks mix the places of a window by `vertebra.blocks.window_mlp`, every second one
in windows that are moved by half a window. Images are padded with zeros to whole patches, below and right, maps to
whole windows and to whole pairs of cells where they are merged.

Swin's authors name it in their abstract and published it with Swin's code; the card is `vertebra.backbones.swin`'s.
c24, c12 and c6 say how many channels a head has. Departs from that code in the images that it takes: theirs is built
for one size, whose maps are whole windows, and where a map is smaller than a window it shrinks the window, and the
weights. At any size with whole windows everywhere the two compute the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.rows import Dense, activated
from vertebra.blocks.window_mlp import WindowMLP
from vertebra.blocks.windows import padded
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.parity import convert

VARIANTS = {
    "tiny_c24": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (4, 8, 16, 32), "window": 8, "image_size": 256},
    "tiny_c12": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (8, 16, 32, 64), "window": 8, "image_size": 256},
    "tiny_c6": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (16, 32, 64, 128), "window": 8, "image_size": 256},
    "base": {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    "nano": {"dim": 32, "depths": (2, 2, 2), "heads": (4, 8, 16), "window": 4, "patch": 2, "image_size": 32},
}


class SwinMLPOptions(BackboneOptions, total=False):
    """Options; a variant sets the first three.

    Attributes:
        dim: channels of the first stage; each further one has twice as many.
        depths: blocks, a number a stage.
        heads: matrices of a block, a number a stage; each divides the stage's channels.
        window: side of a window in cells. Weights fit one side.
        patch: side of a patch in pixels, the first map's stride.
        ratio: hidden channels of a feed-forward for each of its own.
    """

    dim: int
    depths: Sequence[int]
    heads: Sequence[int]
    window: int
    patch: int
    ratio: float


def swin_mlp(variant: str = "tiny_c24", **options: Unpack[SwinMLPOptions]) -> "SwinMLP":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `SwinMLPOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("swin_mlp", VARIANTS, variant, options, SwinMLP)


class SwinMLP(Backbone):
    """Stages of an embedding and blocks; build it with `swin_mlp`.

    Attributes:
        embeds: images to the first map, and each map to the next smaller one.
        stages: blocks of each stage.
        norm: of the last map.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embeds.0.proj", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        patch: int = 4,
        ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("swin_mlp", 1, dim=dim, depths=depths, heads=heads, window=window, patch=patch)
        if len(heads) != len(depths):
            raise UsageError(f"swin_mlp: heads is {heads} and depths is {depths}; give one number a stage to each")
        dims = [dim * 2**stage for stage in range(len(depths))]
        if int(ratio * dim) < 1:
            raise UsageError(f"swin_mlp: ratio {ratio} leaves no hidden channel of {dim}; 4 is usual")
        super().__init__()
        self.embeds, self.stages = nn.ModuleList([Embed(preprocess.channels, dim, patch)]), nn.ModuleList()
        self.embeds.extend(Merge(inputs) for inputs in dims[:-1])
        for width, count, rates in zip(dims, heads, drop_rates(drop_path, depths), strict=True):
            blocks = []
            for number, rate in enumerate(rates):
                mixer = WindowMLP(width, count, side=window, shift=window // 2 if number % 2 else 0)
                blocks.append(Block(width, mixer, hidden=int(width * ratio), drop=rate))
            self.stages.append(nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.levels = tuple(Level(width, patch * 2**stage) for stage, width in enumerate(dims))
        self.width, self.preprocess = dims[-1], preprocess
        self.apply(_start)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        check_images(self, images)
        x, maps = images, []
        for embed, blocks in zip(self.embeds, self.stages, strict=True):
            x = embed(x)  # (B, h, w, C)
            for block in blocks:  # type: ignore[union-attr]
                x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
        tokens = self.norm(x).flatten(1, 2)
        return Features(tuple(maps), tokens.mean(1), tokens)

    def trunk(self) -> list[nn.Module]:
        """The embedding and the blocks of each stage, and the norm."""
        stages: Any = zip(self.embeds, self.stages, strict=True)
        return [*(part for embed, blocks in stages for part in (embed, *blocks)), self.norm]


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Embed(nn.Module):
    """Images to the first map.

    Attributes:
        proj: patches to cells.
        norm: of each cell.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to rows (B, H / patch, W / patch, dim), sides rounded up."""
        more = -images.shape[3] % self.patch, -images.shape[2] % self.patch
        if any(more):
            images = pad(images, (0, more[0], 0, more[1]))
        return self.norm(self.proj(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """Squares of 2 x 2 cells to one cell of twice the channels.

    Attributes:
        norm: of the four cells together, top left, bottom left, top right, bottom right.
        reduce: their channels to half as many.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = Dense(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows (B, H / 2, W / 2, 2 dim), sides rounded up."""
        x = padded(x, 2, 2).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H / 2, down, W / 2, across, dim)
        return self.reduce(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Block(nn.Module):
    """A mixer of places and a feed-forward, each behind a norm and beside a shortcut.

    Attributes:
        norm1: of what the mixer is given.
        mixer: within windows.
        norm2: of what the feed-forward is given.
        mlp: the feed-forward.
    """

    def __init__(self, dim: int, mixer: WindowMLP, *, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), FeedForward(dim, hidden)
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        x = x + self.drop(self.mixer(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class FeedForward(nn.Module):
    """Two linear layers of each cell with GELU between them.

    Attributes:
        widen: to the hidden channels.
        narrow: back.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.widen, self.narrow = Dense(dim, hidden), Dense(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, H, W, dim) to rows of the same shape."""
        return self.narrow(activated(self.widen(x)))


def published(state: Mapping[str, Tensor], backbone: SwinMLP) -> dict[str, Tensor]:
    """The authors' released weights (microsoft/Swin-Transformer) under our names; the classifier is left out.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)["model"]` gives them.
        backbone: of `swin_mlp`, the same network.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    rules = [
        (r"^head\.", None),
        (r"^patch_embed\.", "embeds.0."),
        *((rf"^layers\.{stage}\.downsample\.", f"embeds.{stage + 1}.") for stage in range(len(backbone.stages) - 1)),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^(embeds\.\d+)\.reduction\.", r"\1.reduce."),
        (r"\.spatial_mlp\.", ".mixer."),
        (r"\.mlp\.fc1\.", ".mlp.widen."),
        (r"\.mlp\.fc2\.", ".mlp.narrow."),
    ]
    return convert(state, rules, backbone)
