"""Adventurer: a plain sequence of Mamba-2 blocks that reads an image once, causally, down to patches of one pixel.

Shapes: images (B, 3, H, W) of any size to one map at the stride of the patch; sides that the patch does not divide are
filled with zeros at the right and the bottom. A class token at the end of the sequence sees all patches, and the mean
of all tokens is put before them, so that the first patch knows of the last. Cost grows with the number of tokens, not
with its square. The paper of the architecture is arXiv 2410.07599, that of patches down to 1 pixel arXiv 2502.03738.

Departs from the released code in the order of `Features.tokens` alone: the class token comes first there, as in other
networks here, and goes to the end inside of each mixer. Which blocks read backwards is the released code's, which is
not what its comment says: see `flip_rule`.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Literal, Unpack

import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.mamba2 import EPS, mamba2
from vertebra.blocks.positions import fitted
from vertebra.blocks.rows import Dense
from vertebra.blocks.state_space_duality import Form
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.parity import convert

FlipRule = Literal["released", "alternate", "none"]

VARIANTS = {
    "tiny": {"dim": 256},
    "small": {"dim": 512},
    "base": {"dim": 768},
    "large": {"dim": 1024, "depth": 24},
    "tiny_p1": {"dim": 256, "patch_size": 1},
    "small_p1": {"dim": 512, "patch_size": 1},
    "base_p1": {"dim": 768, "patch_size": 1},
    "nano": {"dim": 64, "depth": 4, "patch_size": 4, "state": 32, "image_size": 32},
}


class AdventurerOptions(BackboneOptions, total=False):
    """Options; a variant sets some of the first three.

    Attributes:
        dim: of the tokens.
        depth: blocks.
        patch_size: side of a patch in pixels.
        state: numbers that a channel of the scan remembers.
        head_dim: channels of the scan that share a step and a decay; None takes 64, or what of it divides them.
        flip_rule: which blocks read the patches from the last to the first: "released" the third and the fourth, as
            the code that the weights were trained with, "alternate" every second one, as its comment says, or "none".
        dropout: probability that a number of the embedded tokens is dropped, 0..1.
        form: how the scan is computed.
    """

    dim: int
    depth: int
    patch_size: int
    state: int
    head_dim: int | None
    flip_rule: FlipRule
    dropout: float
    form: Form


def adventurer(variant: str = "tiny", **options: Unpack[AdventurerOptions]) -> "Adventurer":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`; `_p1` has patches of one pixel.
        options: as in `AdventurerOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("adventurer", VARIANTS, variant, options, Adventurer, crop=1.0)


class Adventurer(Backbone):
    """Patches, blocks, a norm; build it with `adventurer`.

    Attributes:
        embed: image to tokens.
        blocks: the sequence.
        norm: of the last tokens.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "embed.patches", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int = 12,
        patch_size: int = 16,
        state: int = 64,
        head_dim: int | None = None,
        flip_rule: FlipRule = "released",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        form: Form = "chunked",
    ) -> None:
        check_at_least("adventurer", 1, dim=dim, depth=depth, patch_size=patch_size)
        if flip_rule not in ("released", "alternate", "none"):
            raise UsageError(f"adventurer: flip_rule is {flip_rule!r}; it can be released, alternate or none")
        if not 0 <= dropout < 1:
            raise UsageError(f"adventurer: dropout is {dropout}; it must be in [0, 1), as 0.1")
        super().__init__()
        sides = tuple(-(-side // patch_size) for side in preprocess.size)
        self.embed = Embedding(preprocess.channels, dim, patch_size, (sides[0], sides[1]), dropout)
        self.blocks = nn.ModuleList(
            Block(dim, state, head_dim, form, rate, backwards=_backwards(flip_rule, number))
            for number, rate in enumerate(drop_rates(drop_path, [depth])[0])
        )
        self.norm = nn.RMSNorm(dim, EPS)
        self.levels, self.width, self.preprocess = (Level(dim, patch_size),), dim, preprocess
        for block in self.blocks:
            with torch.no_grad():
                block.mixer.out.weight /= depth**0.5  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to one map, the class token, and all tokens, the class token first."""
        check_images(self, images)
        x, grid = self.embed(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Features((x[:, 1:].mT.unflatten(2, grid),), x[:, 0], x)

    def trunk(self) -> list[nn.Module]:
        """The embedding, the blocks and the norm."""
        return [self.embed, *self.blocks, self.norm]


class Embedding(nn.Module):
    """Patches to tokens, a class token before them, and positions.

    Attributes:
        patches: a convolution whose stride is its kernel.
        class_token: (1, 1, dim).
        positions: (1, 1 + N, dim), that of the class token first; resized for other images.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, grid: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.positions = nn.Parameter(trunc_normal_(torch.empty(1, 1 + grid[0] * grid[1], dim), std=0.02))
        self.dropout = nn.Dropout(dropout)
        lecun_normal_(self.patches.weight)
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, channels, H, W) to tokens (B, 1 + N, dim), and how many rows and columns of patches they are."""
        down, right = (-side % self.patch_size for side in images.shape[2:])
        maps = self.patches(pad(images, (0, right, 0, down)) if down or right else images)
        x = torch.cat([self.class_token.expand(len(maps), -1, -1), maps.flatten(2).mT], 1)
        grid = (maps.shape[2], maps.shape[3])
        return self.dropout(x + self.places(grid)), grid

    def places(self, grid: tuple[int, int]) -> Tensor:
        """Positions (1, 1 + h * w, dim) of a grid."""
        return fitted(self.positions, self.grid, grid, 1, smooth=True)


def _backwards(rule: FlipRule, number: int) -> bool:
    """Whether a block, counted from 0, reads the patches from the last to the first."""
    return {"released": number // 2 == 1, "alternate": number % 2 == 1, "none": False}[rule]


class Block(nn.Module):
    """A causal mixer over the tokens and a gated network of each token, both beside a shortcut.

    Attributes:
        backwards: whether the mixer reads the patches from the last to the first.
    """

    def __init__(
        self, dim: int, state: int, head_dim: int | None, form: Form, drop_path: float, *, backwards: bool
    ) -> None:
        super().__init__()
        self.backwards = backwards
        self.norm1, self.norm2 = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)
        self.mixer = mamba2(dim, state=state, head_dim=head_dim, form=form)
        self.mlp = SwiGLU(dim, int(2.5 * dim))
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, dim), the class token first, to tokens."""
        x = x + self.drop(self._mixed(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def _mixed(self, x: Tensor) -> Tensor:
        """The mixer over mean, patches and class token, without what it makes of the mean."""
        y = self.mixer(torch.cat([x.mean(1, keepdim=True), self._turned(x[:, 1:]), x[:, :1]], 1))
        return torch.cat([y[:, -1:], self._turned(y[:, 1:-1])], 1)

    def _turned(self, patches: Tensor) -> Tensor:
        return patches.flip(1) if self.backwards else patches


class SwiGLU(nn.Module):
    """Two layers whose hidden units are gated by SiLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value, self.out = Dense(dim, hidden), Dense(dim, hidden), Dense(hidden, dim)
        for layer in (self.gate, self.value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        return self.out(silu(self.gate(x)) * self.value(x))


_NAMES = [
    (r"^patch_embed\.proj\.", "embed.patches."),
    (r"^cls_token$", "embed.class_token"),
    (r"^pos_embed$", "embed.positions"),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.norm_mlp\.", ".norm2."),
    (r"^(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.mlp\.w1\.", ".mlp.gate."),
    (r"\.mlp\.w2\.", ".mlp.value."),
    (r"\.mlp\.w3\.", ".mlp.out."),
    (r"\.in_proj\.", ".project."),
    (r"\.conv1d\.", ".conv."),
    (r"\.dt_bias$", ".step_bias"),
    (r"\.A_log$", ".decay_log"),
    (r"\.D$", ".skip"),
    (r"\.out_proj\.", ".out."),
]
"""Names of the released weights -> ours."""


def published(state: Mapping[str, Tensor], backbone: Adventurer) -> dict[str, Tensor]:
    """The authors' released weights (wangf3014/Adventurer, wangf3014/Patch_Scaling) under our names, no classifier.

    Positions of square images are resized where the backbone is built for others.

    Args:
        state: tensors of a released checkpoint.
        backbone: of `adventurer`, of the same widths and patch size.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    state = dict(state)
    if "pos_embed" in state:
        table = state["pos_embed"].roll(1, 1)  # theirs has the class token last
        side = isqrt(table.shape[1] - 1)
        if table.shape[1] != backbone.embed.positions.shape[1]:
            table = fitted(table, (side, side), backbone.embed.grid, 1, smooth=True)
        state["pos_embed"] = table
    return convert(state, [(r"^head\.", None), *_NAMES], backbone)
