"""Global-local similarity (GLSim): a backbone that looks a second time, at what in an image is most like all of it.

    glsim(backbone)                          # any ViT: the box around the 8 patches most like the class token
    glsim(backbone, "sixteen")               # for objects that fill the image, as dogs
    glsim(backbone, crop="inclusive")        # the last selected row and column of patches belong to the box

The first pass sees the whole image. Its class token is compared with its patches, behind the final norm; the box around
the most similar ones is cut from the image, enlarged to the image's size, and seen by the same weights. Both class
tokens meet in one transformer block, whose first token is `pooled`. Maps and tokens are those of the first pass.

Departs from the reference (arXiv 2407.12891) where that has nothing to say: where a backbone does not classify by a
token, its cells are compared with their mean, which most of these pool. All crops of a batch are made at once.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.backbones.building import check_at_least, check_images
from vertebra.blocks.attention import attention
from vertebra.blocks.rows import FeedForward
from vertebra.contracts import Backbone, Effect, Features, Operated
from vertebra.data.dataset import Dataset
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.parity import convert
from vertebra.parity import images as fixed_images
from vertebra.surgery.glsim.crops import (
    CONVENTIONS,
    SIMILARITIES,
    Convention,
    Similarity,
    alike,
    boxes_of,
    cropped,
    deepest,
    extents,
    likeness,
    pools_a_token,
)
from vertebra.surgery.operation import images_of, measured
from vertebra.training.cost import evaluating

__all__ = ["GLSim", "alike", "boxes_of", "cropped", "effect", "extents", "glsim", "published"]

PAPER = Paper(
    id="glsim",
    title="Global-Local Similarity for Efficient Fine-Grained Image Recognition with Vision Transformers",
    year=2024,
    arxiv="2407.12891",
    reference="arkel23/GLSim",
    licence="",
    claim=(
        "best mean accuracy over ten fine-grained sets at 224 pixels (91.92 with ViT-B/16) with a selection that costs "
        "orders of magnitude less than those by attention"
    ),
    numbers="93,657,064 parameters of ViT-B/16 with the aggregator and 1,000 classes; N * D multiply-accumulates to "
    "select",
    note=(
        "Surgery on any backbone. The zero-initialised classifier and the dropout of the reference's blocks are left "
        "to the task and to drop_path. Fine-grained photographs and pretrained weights are not here: the effect is on "
        "drawn marks."
    ),
)

VARIANTS = {
    "eight": {"select": 8},
    "sixteen": {"select": 16},
}


def glsim(
    model: nn.Module,
    variant: str = "eight",
    *,
    select: int | None = None,
    similarity: Similarity = "cosine",
    crop: Convention = "reference",
    layers: int = 1,
    heads: int | None = None,
    inplace: bool = False,
) -> Operated:
    """Make a backbone look twice.

    Args:
        model: a backbone; a ViT is what the paper has. Of others the deepest map of at least two cells is looked at.
        variant: one of `VARIANTS`.
        select: most similar patches that the box is drawn around, in place of the variant's; all where there are fewer.
        similarity: of patches and class token: "cosine", or "l1" or "l2" for the smallest distance.
        crop: "reference" ends the box at the upper left corner of the last selected row and column, so that these are
            left out unless they are the only ones; "inclusive" has them in it.
        layers: transformer blocks of the aggregator.
        heads: of their attention; width / 64 where that divides the width, else the next smaller number that does.
        inplace: wrap `model` itself; otherwise a copy.

    Returns:
        The backbone around it (`changed` is "", the model itself), the cost before and after.

    Raises:
        UsageError: no backbone, no map of two cells, an unknown variant, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"glsim has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if not isinstance(model, Backbone):
        raise UsageError(
            f"glsim: a {type(model).__name__} is no backbone; wrap the backbone, as timm/vit_small_patch16_224, then"
            " put a head on it"
        )
    images = images_of(model, None)
    before = measured(model, images)
    wrapped = GLSim(
        model if inplace else copy.deepcopy(model),
        select=VARIANTS[variant]["select"] if select is None else select,
        similarity=similarity,
        crop=crop,
        layers=layers,
        heads=heads,
    )
    return Operated(wrapped, ("",), before.cost, measured(wrapped, images).cost)


class GLSim(Backbone):
    """A backbone that looks twice; build it with `glsim`, which explains the arguments.

    Batch norms, where the backbone has them, see images and crops one after the other. So do hooks: a layer's first
    call is at the image, at which explanations look too, its second at the crop.

    Attributes:
        inner: the backbone.
        select: patches that a box is drawn around.
        similarity: of patches and class token.
        crop: where a box ends.
        aggregator: transformer blocks over the two class tokens.
        norm: behind them.
    """

    def __init__(
        self,
        inner: Backbone,
        *,
        select: int = 8,
        similarity: Similarity = "cosine",
        crop: Convention = "reference",
        layers: int = 1,
        heads: int | None = None,
    ) -> None:
        check_at_least("glsim", 1, select=select, layers=layers, heads=1 if heads is None else heads)
        for name, value, known in (("similarity", similarity, SIMILARITIES), ("crop", crop, CONVENTIONS)):
            if value not in known:
                raise UsageError(f"glsim: {name} is {value!r}; it can be {', '.join(known)}")
        super().__init__()
        self.select = select
        self.similarity: Similarity = similarity
        self.crop: Convention = crop
        self.levels, self.width, self.preprocess = inner.levels, inner.width, inner.preprocess
        seen = _seen(inner)
        self._token, level = pools_a_token(inner, seen), deepest(seen)
        if level is None:
            height, width = inner.preprocess.size
            raise UsageError(
                f"glsim: no map of the {type(inner).__name__} has two cells at {height}x{width} pixels, of which one"
                " could be selected; build it with a larger image_size, or take a ViT"
            )
        self._level = level
        self.inner = inner
        heads = heads or next(n for n in range(max(1, self.width // 64), 0, -1) if self.width % n == 0)
        self.aggregator = nn.Sequential(*(_Block(self.width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        _follow(self, inner)

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to the first pass's maps and tokens, and the vector of both passes."""
        check_images(self, images)
        whole = self.inner(images)
        close = self.inner(cropped(images, self.boxes(images, whole)))
        both = torch.stack([whole.pooled, close.pooled], 1)  # (B, 2, width)
        return Features(whole.pyramid, self.norm(self.aggregator(both))[:, 0], whole.tokens)

    @torch.no_grad()
    def scores(self, features: Features) -> Tensor:
        """How much each cell of the deepest map is like the whole image, (B, h, w); no gradient."""
        return likeness(self.inner, features, self.similarity, level=self._level, token=self._token)

    @torch.no_grad()
    def boxes(self, images: Tensor, features: Features) -> Tensor:
        """Where the second pass looks: top, left, bottom, right in pixels, the last two exclusive.

        Args:
            images: (B, channels, H, W).
            features: what the backbone inside makes of them.

        Returns:
            (B, 4) int64.
        """
        scores = self.scores(features)
        size, grid = (images.shape[2], images.shape[3]), (scores.shape[1], scores.shape[2])
        return boxes_of(extents(scores, self.select), grid, size, self.levels[self._level].stride, self.crop)

    def special_tokens(self, tokens: int, cells: int) -> tuple[int, ...]:
        """Where the backbone has them."""
        return self.inner.special_tokens(tokens, cells)

    def trunk(self) -> Sequence[nn.Module]:
        """The backbone's parts, then the aggregator's."""
        return [*self.inner.trunk(), *self.aggregator, self.norm]


class _Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what came in; tokens (B, N, dim) to the same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _follow(model: GLSim, inner: Backbone) -> None:
    """Bring what is new to the mode, the device and the kind of numbers of the backbone; weights as ViT has them."""
    for module in model.aggregator.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    like = next((p for p in inner.parameters() if p.is_floating_point()), torch.empty(()))
    for module in (model.aggregator, model.norm):
        module.to(like.device, like.dtype)
    model.training = inner.training
    model.aggregator.train(inner.training)
    model.norm.train(inner.training)


def _seen(backbone: Backbone) -> Features:
    """What a backbone makes of one image of its own size."""
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(()))
    images = fixed_images((1, backbone.preprocess.channels, *backbone.preprocess.size)).to(like.device, like.dtype)
    with evaluating(backbone), torch.no_grad():
        return backbone(images)


def published(state: Mapping[str, Tensor], model: GLSim) -> dict[str, Tensor]:
    """A checkpoint of the reference as the weights of GLSim around timm's ViT; its classifier is left out.

    Args:
        state: the reference's names -> tensors; queries, keys and values apart.
        model: around `timm/vit_base_patch16_224` or another size of it, with as many blocks.

    Raises:
        ParityError: names or shapes that do not fit.
    """
    rules = (
        (r"^(head\.|anchor_class_token)", None),  # the second token of the reference's is never used
        (r"\.pwff\.", ".mlp."),
        (r"^(encoder\.blocks\.\d+|aggregator\.blocks\.\d+)\.proj\.", r"\1.attn.proj."),
        (r"^aggregator\.blocks\.", "aggregator."),
        (r"^aggregator_norm\.", "norm."),
        (r"^encoder\.blocks\.", "inner.network.blocks."),
        (r"^encoder_norm\.", "inner.network.norm."),
        (r"^class_token$", "inner.network.cls_token"),
        (r"^patch_embedding\.", "inner.network.patch_embed.proj."),
        (r"^positional_embedding\.pos_embedding$", "inner.network.pos_embed"),
    )
    return convert(_joined(state), rules, model)


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of each attention as one layer."""
    found = {name: tensor for name, tensor in state.items() if not re.search(r"\.proj_[qkv]\.", name)}
    for name in state:
        if ".proj_q." in name:
            found[name.replace("proj_q", "qkv")] = torch.cat(
                [state[name.replace("proj_q", f"proj_{x}")] for x in "qkv"]
            )
    return found


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Looking twice at drawn marks, beside one look, and beside other places to look at."""
    from vertebra.surgery.glsim.experiment import experiment

    return experiment(scale, data)
