"""SimCLRv2, stage one: two views of an image are told from the views of all others, through a deep head that is kept.

A three-layer projection head stands on the encoder. Pretraining needs no labels; fine-tuning goes on from the first
hidden layer of the head (`with_head`), not from the encoder's output. Shapes: images (B, C, H, W) and one further
view of them, pooled (B, width), projections (B, 128).
"""

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as distributed
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.contracts import Backbone, Batch, Effect, Features, Method, Progress
from vertebra.errors import UsageError, near
from vertebra.paper import Paper

if TYPE_CHECKING:
    from vertebra.data.dataset import Dataset

PAPER = Paper(
    id="simclr_v2",
    title="Big Self-Supervised Models are Strong Semi-Supervised Learners",
    year=2020,
    arxiv="2006.10029",
    reference="google-research/simclr",
    licence="Apache-2.0",
    claim=(
        "73.9 % ImageNet top-1 from 1 % of the labels and 77.5 % from 10 % with ResNet-50; the fewer the labels, the "
        "more a bigger network and fine-tuning from the middle of the head gain"
    ),
    numbers="7 encoders of sk_resnet",
    parity="the loss in numpy; golden outputs of the port's encoders (sk_resnet)",
    note=(
        "Stage one, pretraining, with the layer of the head from which fine-tuning goes on; the recipe of fine-tuning "
        "and distillation with unlabelled images, stages two and three, are not here yet. The encoders are `sk_resnet`."
    ),
)

VARIANTS = {"plain": {"memory": 0}, "memory": {"memory": 65536}}

HEAD_STD = 0.01


def simclr_v2(
    backbone: Backbone,
    variant: str = "plain",
    *,
    layers: int = 3,
    dim: int = 128,
    temperature: float = 0.1,
    memory: int | None = None,
    momentum: float = 0.999,
) -> "SimCLRv2":
    """Pretrain `backbone` by contrast (arXiv 2006.10029, section 2).

    Negatives are the other images of one forward pass over all ranks: a `micro_batch` below the batch has fewer.

    Args:
        backbone: the encoder; its pooled features are projected.
        variant: "plain", or "memory", which adds the negatives of earlier batches.
        layers: of the projection head; 3 in the paper, 2 in SimCLR.
        dim: of the projections.
        temperature: of the similarities.
        memory: projections that are kept as further negatives, in place of the variant's.
        momentum: decay of the averaged network that makes the kept ones.

    Raises:
        UsageError: an unknown variant, or an option out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"simclr_v2 has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    memory = VARIANTS[variant]["memory"] if memory is None else memory
    for name, value, least in (("layers", layers, 1), ("dim", dim, 1), ("memory", memory, 0)):
        if value < least:
            raise UsageError(f"simclr_v2: {name} is {value}; it must be at least {least}")
    if temperature <= 0:
        raise UsageError(f"simclr_v2: temperature is {temperature}; it must be above 0, as 0.1")
    if not 0 <= momentum < 1:
        raise UsageError(f"simclr_v2: momentum is {momentum}; it must be in [0, 1), as 0.999")
    head = ProjectionHead(backbone.width, layers=layers, dim=dim)
    return SimCLRv2(backbone, head, temperature=temperature, memory=memory, momentum=momentum)


class SimCLRv2(Method):
    """Two views of a batch through encoder and head in one pass; build it with `simclr_v2`.

    Over several ranks the loss sees all images and each batch norm its own rank's; the paper's norms see all too, as
    they do after `nn.SyncBatchNorm.convert_sync_batchnorm(method)`.

    Attributes:
        backbone: the encoder.
        head: the projection head.
        averaged: slow copies of both, where there is a memory, else None.
    """

    kept: Tensor
    written: Tensor

    def __init__(
        self, backbone: Backbone, head: "ProjectionHead", *, temperature: float, memory: int, momentum: float
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.temperature = temperature
        self.memory = memory
        self.momentum = momentum
        self.averaged: nn.ModuleList | None = None
        if memory:
            self.averaged = nn.ModuleList([copy.deepcopy(backbone), copy.deepcopy(head)]).requires_grad_(False)
            self.register_buffer("kept", torch.zeros(memory, head.dim))
            self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`{"contrast": loss}` of the images and their one further view; `progress` plays no part.

        Raises:
            UsageError: the batch has no second view, or one of another size, or no image to tell apart from.
        """
        images = torch.cat(_two_views(batch))  # one pass, so that batch norms see both views
        first, second = self.head(self.backbone(images).pooled).chunk(2)
        loss = nt_xent(first, second, temperature=self.temperature, others=self._remembered())
        if self.memory and self.training:
            self._remember(images)
        return {"contrast": loss}

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the averaged network towards the trained one."""
        if self.averaged is None:
            return
        targets: list[Tensor] = list(self.averaged.parameters())
        sources: list[Tensor] = [*self.backbone.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(targets, sources, 1 - self.momentum)  # pyright: ignore[reportPrivateImportUsage]

    def _remembered(self) -> Tensor | None:
        """Projections of earlier batches, (M, dim); None before there are any."""
        if not self.memory or not int(self.written):
            return None
        return self.kept[: int(self.written)].clone()  # they are overwritten before the gradient is asked for

    @torch.no_grad()
    def _remember(self, images: Tensor) -> None:
        """Write the averaged network's projections of a batch over the oldest ones."""
        assert self.averaged is not None
        encoder, head = self.averaged
        fresh = gathered(F.normalize(head(encoder(images).pooled).float()))[-self.memory :]
        places = (self.written + torch.arange(len(fresh), device=fresh.device)) % self.memory
        self.kept[places] = fresh.to(self.kept.dtype)
        self.written += len(fresh)


def _two_views(batch: Batch) -> tuple[Tensor, Tensor]:
    if len(batch.views) != 1:
        raise UsageError(
            f"simclr_v2 compares two views of each image and was given {1 + len(batch.views)}: plan.more_views needs"
            " one entry, as the recipe simclr_v2 has it"
        )
    if batch.images.shape != batch.views[0].shape:
        sizes = [tuple(view.shape) for view in (batch.images, batch.views[0])]
        raise UsageError(f"simclr_v2 takes two views of one size and was given {sizes[0]} and {sizes[1]}")
    return batch.images, batch.views[0]


class ProjectionHead(nn.Module):
    """[Linear, batch norm, ReLU] of the encoder's width, and at the end [Linear, batch norm without shift] to `dim`.

    (B, width) to (B, dim), not normalised. The key names are those of the published weights' PyTorch port.

    Attributes:
        width: of what comes in, and of the hidden layers.
        dim: of what comes out.
        hidden: number of hidden layers.
        layers: the modules, three a hidden layer and two at the end.
    """

    def __init__(self, width: int, *, layers: int = 3, dim: int = 128) -> None:
        super().__init__()
        self.width, self.dim, self.hidden = width, dim, layers - 1
        parts: list[nn.Module] = []
        for _ in range(self.hidden):
            parts += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        last = nn.BatchNorm1d(dim)
        last.bias.requires_grad_(False)  # it stays at zero
        self.layers = nn.Sequential(*parts, nn.Linear(width, dim, bias=False), last)
        for part in self.layers:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=HEAD_STD)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, width) to projections (B, dim)."""
        return self.layers(pooled)


def with_head(backbone: Backbone, head: ProjectionHead, *, layers: int = 1) -> Backbone:
    """The encoder with the first hidden layers of its head, as a backbone: what fine-tuning goes on from.

    Nothing is copied: training what comes back trains the parts that went in.

    Args:
        backbone: the encoder.
        head: that it was pretrained with.
        layers: hidden layers to keep; 1 in the paper, 0 is the encoder alone.

    Raises:
        UsageError: the head has fewer hidden layers, or is another encoder's.
    """
    if not 0 <= layers <= head.hidden:
        raise UsageError(f"layers is {layers}; the head has {head.hidden} hidden layers, so it can be 0..{head.hidden}")
    if backbone.width != head.width:
        raise UsageError(f"the head takes {head.width} features and the backbone gives {backbone.width}")
    return WithHead(backbone, head, layers) if layers else backbone


class WithHead(Backbone):
    """An encoder whose pooled features are those of a hidden layer of its projection head; see `with_head`.

    Pyramid and tokens are the encoder's.

    Attributes:
        encoder: the backbone inside.
        head: the kept layers, a part of the trunk each.
    """

    def __init__(self, encoder: Backbone, head: ProjectionHead, layers: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(*(head.layers[3 * layer : 3 * layer + 3] for layer in range(layers)))
        self.levels, self.width, self.preprocess = encoder.levels, head.width, encoder.preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to features."""
        features = self.encoder(images)
        return features._replace(pooled=self.head(features.pooled))

    def trunk(self) -> list[nn.Module]:
        """The encoder's parts, then the layers of the head."""
        return [*self.encoder.trunk(), *self.head]


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.1, others: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross entropy of two views: the sum of both directions, the mean over images.

    Each projection is to find its partner among the 2N - 1 others of the global batch of N images; see arXiv
    2002.05709, eq. 1. Under torch.distributed the gradient flows through the other ranks' projections too, and the
    mean of the ranks' losses is the loss of one rank with all images.

    Args:
        first: (B, dim) of one view; its length plays no part.
        second: (B, dim) of the other view, in the same order.
        temperature: of the cosines.
        others: (M, dim) of length one, further negatives.

    Raises:
        UsageError: one image alone, which has nothing to be told from.
    """
    with torch.autocast(first.device.type, enabled=False):  # cosines over 0.1 need more than eight bits
        pairs = torch.stack((F.normalize(first.float()), F.normalize(second.float())), 1)  # (B, 2, dim)
        everyone = gathered(pairs)  # (N, 2, dim)
        count, total = len(pairs), len(everyone)
        if total < 2 and others is None:
            raise UsageError("a contrastive loss needs at least 2 images in a batch and got 1; raise plan.batch")
        own = torch.arange(count, device=pairs.device) + rank() * count
        itself, partner = torch.cat((own, own + total)), torch.cat((own + total, own))
        logits = pairs.transpose(0, 1).flatten(0, 1) @ everyone.transpose(0, 1).flatten(0, 1).T  # (2B, 2N)
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        if others is not None:
            logits = torch.cat((logits, pairs.transpose(0, 1).flatten(0, 1) @ others.float().T), 1)
        return 2 * F.cross_entropy(logits / temperature, partner)


def rank() -> int:
    """This process among those that train together; 0 alone."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, (ranks * B, ...), in the order of the ranks; gradients come back to the rank they are of.

    Every rank gives as many rows.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """All-gather; backwards, each rank's share of the gradients' sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient)
        start = distributed.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> Effect:
    """Few labels: training from scratch beside fine-tuning from the encoder and from the head's first layer."""
    from vertebra.methods.simclr_v2.few_labels import experiment

    return experiment(scale, data)
