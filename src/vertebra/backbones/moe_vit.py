"""A vision transformer whose MLPs, and attention too, are mixtures of experts with a gate for each task.

Shapes: images (B, 3, H, W) to one map of `dim` channels at the stride of the patches. `tokens` starts with the class
token, which is `pooled`. Before every block the tokens are told which task they are for: a learned vector is added.
Attention has one head of keys and values for all queries; of an MLP or an attention with experts a token pays for the k
that its gate gives it. Images are padded with zeros to whole patches, positions are resized to their grid.

    backbone = moe_vit("small", tasks=3)
    with doing(backbone, task=2):                            # vertebra.blocks.mixture_of_experts
        backbone(images)

The network of Mod-Squad (arXiv 2212.08066), on which the paper of the card `mthl` builds; written from descriptions,
since the code of the first is not free to use and of the second there is none. Losses that keep experts in use are
`vertebra.methods.mthl`; `vertebra.surgery.experts` cuts out what a task does not use, and adds experts for a new task.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import pad

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images, drop_rates
from vertebra.blocks.expert_attention import expert_attention, multi_query_attention
from vertebra.blocks.mixture_of_experts import Noise, PerTask, mixture_of_experts
from vertebra.blocks.positions import fitted
from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError

VARIANTS = {
    "small": {"dim": 384, "depth": 12, "heads": 6, "experts": 16, "k": 4, "tasks": 13},
    "attention": {
        "dim": 384,
        "depth": 12,
        "heads": 6,
        "experts": 16,
        "k": 4,
        "attention_experts": 15,
        "layout": "alternate",
        "tasks": 13,
    },
    "nano": {
        "dim": 64,
        "depth": 4,
        "heads": 2,
        "experts": 8,
        "k": 2,
        "attention_experts": 4,
        "layout": "alternate",
        "ratio": 3.0,
        "patch": 4,
        "image_size": 32,
    },
}

Layout = Literal["mlp", "every_other", "alternate", "both"]
"""Where experts are: in every MLP; in the MLPs of blocks 1, 3, 5, ...; in those and in the attention of blocks 2, 4, 6,
...; or in every MLP and every attention."""


class MoEViTOptions(BackboneOptions, total=False):
    """Options; a variant sets most of them.

    Attributes:
        dim: width of a token.
        depth: blocks.
        heads: query heads of a token, of head_dim channels each.
        head_dim: channels of a head; 2 * dim / heads by default.
        ratio: hidden channels that a token meets in an MLP, as a multiple of `dim`.
        experts: of an MLP with experts.
        k: experts that a token is given there.
        attention_experts: query heads that an attention with experts has; a token is given `heads` of them.
        layout: where experts are.
        tasks: how many gates and task vectors there are.
        noise: whether gates are noisy in training.
        patch: side in pixels of what a token sees.
    """

    dim: int
    depth: int
    heads: int
    head_dim: int | None
    ratio: float
    experts: int
    k: int
    attention_experts: int
    layout: Layout
    tasks: int
    noise: Noise
    patch: int


def moe_vit(variant: str = "small", **options: Unpack[MoEViTOptions]) -> "MoEViT":
    """Build a variant. The published ones have gates for the 13 tasks of Taskonomy.

    Args:
        variant: one of `VARIANTS`.
        options: as in `MoEViTOptions`; they win over the variant's.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    return build("moe_vit", VARIANTS, variant, options, MoEViT)


class MoEViT(Backbone):
    """Patches, blocks, norm; build it with `moe_vit`.

    Attributes:
        stem: images to tokens; knows the vectors of the tasks.
        blocks: in the order of the signal.
        norm: of the last tokens.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "stem.conv", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dim: int,
        depth: int,
        heads: int,
        experts: int,
        k: int,
        head_dim: int | None = None,
        ratio: float = 4.0,
        attention_experts: int = 15,
        layout: Layout = "mlp",
        tasks: int = 1,
        noise: Noise = "learned",
        patch: int = 16,
        drop_path: float = 0.0,
    ) -> None:
        check_at_least("moe_vit", 1, dim=dim, depth=depth, heads=heads, patch=patch, k=k, tasks=tasks)
        if ratio <= 0:
            raise UsageError(f"moe_vit: ratio is {ratio}; it must be above 0")
        if layout not in get_args(Layout):
            raise UsageError(f"moe_vit: layout is {layout!r}; it can be {', '.join(get_args(Layout))}")
        super().__init__()
        head_dim = head_dim or max(1, 2 * dim // heads)
        self.stem = Patches(preprocess.channels, dim, patch, preprocess.size, tasks)
        self.blocks = nn.ModuleList()
        for number, rate in enumerate(drop_rates(drop_path, [depth])[0]):
            odd = number % 2 == 0  # counted from 1, as the layouts are
            if layout == "both" or (layout == "alternate" and not odd):
                attn: nn.Module = expert_attention(
                    dim, experts=attention_experts, k=heads, head_dim=head_dim, tasks=tasks, noise=noise
                )
            else:
                attn = multi_query_attention(dim, heads=heads, head_dim=head_dim)
            if odd or layout in ("mlp", "both"):
                mlp: nn.Module = mixture_of_experts(dim, experts=experts, k=k, ratio=ratio, tasks=tasks, noise=noise)
            else:
                mlp = MLP(dim, int(ratio * dim))
            self.blocks.append(Block(dim, attn, mlp, rate))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.levels, self.width, self.preprocess = (Level(dim, patch),), dim, preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        check_images(self, images)
        x, told = self.stem(images), self.stem.vector()
        for block in self.blocks:
            x = block(x + told)
        x = self.norm(x)
        return Features((x[:, 1:].mT.unflatten(2, self.stem.cells(images.shape[2:])),), x[:, 0], x)

    def trunk(self) -> Sequence[nn.Module]:
        """The patches, the blocks, the norm."""
        return [self.stem, *self.blocks, self.norm]


class Patches(PerTask):
    """Images to tokens with their positions, a class token first; and a vector for each task.

    Attributes:
        conv: image to patches.
        class_token: (1, 1, dim).
        positions: (1, 1 + N, dim), for images of the size that the network was built for.
        vectors: (dim,), one a task.
    """

    def __init__(self, channels: int, dim: int, patch: int, size: tuple[int, int], tasks: int) -> None:
        super().__init__()
        self.patch = patch
        self.grid = self.cells(size)
        self.conv = nn.Conv2d(channels, dim, patch, patch)
        self.class_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.positions = nn.Parameter(trunc_normal_(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim), std=0.02))
        self.vectors = nn.ParameterList(trunc_normal_(torch.empty(dim), std=0.02) for _ in range(tasks))
        lecun_normal_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    @property
    def tasks(self) -> int:
        """How many vectors there are."""
        return len(self.vectors)

    def vector(self) -> Tensor:
        """The vector of the task, (dim,)."""
        return self.vectors[self.task]

    def cells(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches that cover an image of (height, width) pixels."""
        return ceil(size[0] / self.patch), ceil(size[1] / self.patch)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to tokens (B, 1 + N, dim)."""
        grid = self.cells(images.shape[2:])
        lacks = [cells * self.patch - side for cells, side in zip(grid, images.shape[2:], strict=True)]
        padded = pad(images, (0, lacks[1], 0, lacks[0])) if any(lacks) else images
        x = self.conv(padded).flatten(2).mT  # (B, N, dim)
        positions = fitted(self.positions, self.grid, grid, 1, smooth=True)
        return torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + positions

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Forget the vectors of all other tasks."""
        self.vectors, self.task = nn.ParameterList(self.vectors[task] for task in tasks), 0

    def add_tasks(self, tasks: int) -> list[nn.Parameter]:
        """Add a vector for each new task."""
        new = [nn.Parameter(trunc_normal_(torch.empty_like(self.vectors[0]), std=0.02)) for _ in range(tasks)]
        self.vectors.extend(new)
        return new


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut; either may be of experts."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to tokens."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class MLP(nn.Sequential):
    """What a token meets where there are no experts."""

    def __init__(self, dim: int, hidden: int) -> None:
        layers = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        super().__init__(layers[0], nn.GELU(), layers[1])
        for layer in layers:
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
