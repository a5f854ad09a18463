"""Terminator: no residuals and no strides; slow networks of coordinates make the weights that maps meet.

Shapes: square images (B, 3, S, S) of one fixed size to one map (B, 288, S, S). A block (SFNE) makes ten maps of its
input with the parts of `vertebra.blocks.hyper_zzw`, adds maps of earlier blocks, and draws them together. Departs from
the authors' code of 2024 in three things. An image's result depends on its batch there, in evaluation too; here
evaluation takes running statistics and a stored context, unless `faithful`. What nothing trains there (two factors, the
biases between blocks) is constant, and biases that a standardisation takes away at once are kept and not trained.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from vertebra.backbones.building import BackboneOptions, build, check_at_least, check_images
from vertebra.backbones.terminator.kar3 import Kar3
from vertebra.blocks.hyper_zzw import (
    EPS,
    FREQUENCY,
    RGU,
    GlobalHyperZZW,
    HyperChannel,
    HyperInteraction,
    LocalHyperZZW,
    mixer,
    standardise,
)
from vertebra.contracts import Backbone, Batch, Features, Level, Method, Preprocess, Progress, TaskModel
from vertebra.errors import UsageError
from vertebra.paper import Paper
from vertebra.parity import convert

if TYPE_CHECKING:
    from vertebra.contracts import Effect
    from vertebra.data.dataset import Dataset

__all__ = ["Kar3", "SlowNeural", "Terminator", "effect", "published", "slow_neural_loss", "terminator"]

PAPER = Paper(
    id="terminator",
    title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    year=2024,
    arxiv="2401.17948",
    reference="hyperevolnet/Terminator",
    licence="research use only, by its README of 2024; no licence file",
    claim=(
        "without residual connections and with fewer parameters ahead of residual and attention networks on classifying"
        " small images pixel by pixel, in fewer epochs, with features of zero mean; a log of a copy of the code has"
        " 95.3 % on CIFAR-10"
    ),
    note=(
        "2-D networks; code for 1-D was never released. Frequencies are 10, since the released configuration has none"
        " and its code falls back on 2000. `Kar3` and `slow_neural_loss` are in this page; plans name timm's optimisers"
        " only."
    ),
)

VARIANTS = {
    "cifar10": {
        "dims": (12, 36, 72, 144, 288),
        "layers": (3, 2, 2, 2, 2),
        "earlier": ((), (), (0,), (1,), (2, 1)),
        "image_size": 32,
    },
    "nano": {
        "dims": (36, 144),
        "layers": (2, 1),
        "earlier": ((), ()),
        "slow_dim": 16,
        "local_dim": 8,
        "image_size": 32,
    },
}

KERNELS = (3, 9, 5, 7)
GROUPS = 12


class TerminatorOptions(BackboneOptions, total=False):
    """Options of Terminator; a variant sets the first three.

    Attributes:
        dims: channels that come out of the blocks, multiples of 12.
        layers: of the slow network of the global branch, a block.
        earlier: for each block, numbers from 0 of earlier blocks whose outputs it sees again; at most two.
        slow_dim: width of slow networks of pixels.
        local_dim: width of those of local kernels and of channels (half of it in the hyper interaction).
        frequency: of the slow networks' sines.
        dropout: probability that a channel is dropped after each block but the first, 0..1.
        faithful: keep the batch's own statistics and context in evaluation.
    """

    dims: Sequence[int]
    layers: Sequence[int]
    earlier: Sequence[Sequence[int]]
    slow_dim: int
    local_dim: int
    frequency: float
    dropout: float
    faithful: bool


def terminator(variant: str = "cifar10", **options: Unpack[TerminatorOptions]) -> "Terminator":
    """Build a variant.

    Args:
        variant: one of `VARIANTS`.
        options: as in `TerminatorOptions`; they win over the variant's. Images are square, of `image_size`.

    Raises:
        UsageError: an unknown variant, or options that do not work together; says which do.
    """
    colours = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    return build("terminator", VARIANTS, variant, options, Terminator, crop=1.0, interpolation="bilinear", **colours)


class Terminator(Backbone):
    """Blocks at one resolution; build it with `terminator`.

    Attributes:
        blocks: in order.
        faithful: whether evaluation looks at the batch.
    """

    pretrained_cfg: Mapping[str, str] = {"first_conv": "", "classifier": "head"}

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        dims: Sequence[int],
        layers: Sequence[int],
        earlier: Sequence[Sequence[int]],
        slow_dim: int = 64,
        local_dim: int = 32,
        frequency: float = FREQUENCY,
        dropout: float = 0.05,
        drop_path: float = 0.0,
        faithful: bool = False,
    ) -> None:
        _check(preprocess, dims, layers, earlier, slow_dim, local_dim, dropout, drop_path)
        super().__init__()
        widths = (preprocess.channels, *dims)
        self.blocks = nn.ModuleList(
            SFNE(
                widths[i],
                dims[i],
                tuple(dims[j] for j in earlier[i]),
                preprocess.size[0],
                layers=layers[i],
                slow_dim=slow_dim,
                local_dim=local_dim,
                frequency=frequency,
                dropout=dropout if i else 0.0,
                faithful=faithful,
            )
            for i in range(len(dims))
        )
        self.earlier, self.faithful = tuple(map(tuple, earlier)), faithful
        self.levels, self.width, self.preprocess = (Level(dims[-1], 1),), dims[-1], preprocess

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, S, S) to features."""
        x = self.stages(images)[-1]
        return Features((x,), x.mean((2, 3)))

    def stages(self, images: Tensor) -> list[Tensor]:
        """What each block gives, (B, dim, S, S)."""
        check_images(self, images, exact=True)
        x, found = images.contiguous(), []  # products of maps want rows in a row
        for block, numbers in zip(self.blocks, self.earlier, strict=True):
            x = block(x, [found[number] for number in numbers])
            found.append(x)
        return found

    def trunk(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)


def _check(
    preprocess: Preprocess,
    dims: Sequence[int],
    layers: Sequence[int],
    earlier: Sequence[Sequence[int]],
    slow_dim: int,
    local_dim: int,
    dropout: float,
    drop_path: float,
) -> None:
    check_at_least("terminator", 1, dims=dims, layers=layers, slow_dim=slow_dim, local_dim=local_dim)
    height, width = preprocess.size
    if height != width:
        raise UsageError(
            f"terminator: image_size is {(height, width)}; products of maps need squares, as {max(height, width)}"
        )
    if any(dim % GROUPS for dim in dims):
        raise UsageError(f"terminator: dims is {dims}; each must be a multiple of {GROUPS}, as {GROUPS * 3}")
    if not len(dims) == len(layers) == len(earlier):
        counts = f"{len(dims)}, {len(layers)} and {len(earlier)}"
        raise UsageError(f"terminator: dims, layers and earlier have {counts} entries; they need one a block each")
    for i, numbers in enumerate(earlier):
        if len(numbers) > 2 or any(not 0 <= j < i or dims[i - 1] % dims[j] for j in numbers):
            raise UsageError(
                f"terminator: earlier[{i}] is {numbers}; it takes at most two blocks before {i}, whose channels divide"
                " those that the block is given"
            )
    if not 0 <= dropout < 1:
        raise UsageError(f"terminator: dropout is {dropout}; it must be in [0, 1), as 0.05")
    if drop_path:
        raise UsageError(f"terminator: drop_path is {drop_path}, but no branch is residual; use dropout=...")


class SFNE(nn.Module):
    """Slow-fast neural encoding: three global, four local and three gated maps of x, drawn together.

    Attributes:
        zzw: makes the scores; their matrix products with three maps are the global branches.
        local: depth-wise kernels of a context, each.
        gather: all maps to the block's channels.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        earlier: Sequence[int],
        size: int,
        *,
        layers: int,
        slow_dim: int,
        local_dim: int,
        frequency: float,
        dropout: float,
        faithful: bool,
    ) -> None:
        super().__init__()
        self.zzw = GlobalHyperZZW(channels, size=size, dim=slow_dim, layers=layers, frequency=frequency)
        self.of_scores, self.of_input = RGU(channels, size), RGU(channels, size)
        self.mix = mixer(channels, channels)
        self.hyper_channel = HyperChannel(channels, dim=local_dim, frequency=frequency)
        self.local = nn.ModuleList(
            LocalHyperZZW(channels, kernel=kernel, dim=local_dim, frequency=frequency, faithful=faithful)
            for kernel in KERNELS
        )
        self.interaction = HyperInteraction(
            channels, size, dim=slow_dim, channel_dim=max(1, local_dim // 2), frequency=frequency
        )
        self.gather = Gather(channels, 10 + len(earlier), dim)
        self.norm = GroupStandardise(dim, faithful=faithful)
        self.bias = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout2d(dropout)
        untrained = [self.mix.bias, self.of_scores.out.bias, self.of_input.out.bias, self.gather.bias]
        for bias in (*untrained, *(local.bias for local in self.local)):  # a standardisation follows each
            bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """Maps (B, channels, S, S) and those of earlier blocks to maps (B, dim, S, S)."""
        scores = self.zzw.scores(x)
        fast = standardise(self.of_scores(scores) + self.of_input(x))
        mixed, hyper = standardise(self.mix(x)), standardise(self.hyper_channel(x))
        out = scores @ fast
        pairs = ((hyper, x), (x, hyper), (x, mixed), (mixed, x))  # what is convolved, and the context of its kernels
        near = [local(value, context) for local, (value, context) in zip(self.local, pairs, strict=True)]
        maps = [out, near[1], *earlier[:1], fast, scores @ mixed, near[0], F.silu(out), near[2]]
        maps += [scores @ hyper, near[3], *earlier[1:], self.interaction(out, x)]
        return self.dropout(F.gelu(self.norm(self.gather(maps))) + self.bias)


class Gather(nn.Module):
    """A 1 x 1 convolution of concatenated maps that concatenates nothing.

    A map of fewer channels counts as repeated until it has as many as the others: its weights are added up instead.

    Attributes:
        weight: (outputs, maps * channels), in the order of the maps.
    """

    def __init__(self, channels: int, maps: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, maps * channels)), nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, channels or a divisor, H, W) to (B, outputs, H, W)."""
        found = self.bias[:, None]
        for weight, x in zip(self.weight.chunk(len(maps), dim=1), maps, strict=True):
            if x.shape[1] < weight.shape[1]:
                weight = weight.unflatten(1, (-1, x.shape[1])).sum(1)
            found = torch.baddbmm(found, weight.expand(x.shape[0], -1, -1), x.flatten(2))
        return found.unflatten(2, maps[0].shape[2:])


class GroupStandardise(nn.Module):
    """G-IBS: of 12 groups of channels, every second one is standardised in its image and the others over the batch.

    In evaluation the latter take running statistics, unless `faithful`.
    """

    shared: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, channels: int, *, faithful: bool, momentum: float = 0.1) -> None:
        super().__init__()
        group = torch.arange(channels) // (channels // GROUPS)
        self.register_buffer("shared", (group % 2 == 0)[:, None, None], persistent=False)
        self.register_buffer("running_mean", None if faithful else torch.zeros(channels))
        self.register_buffer("running_var", None if faithful else torch.ones(channels))
        self.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W), the same out."""
        mean = x.mean((2, 3), keepdim=True)
        centred = x - torch.where(self.shared, self._shared(self.running_mean, mean), mean)
        square = centred.square().mean((2, 3), keepdim=True)
        return centred * (torch.where(self.shared, self._shared(self.running_var, square), square) + EPS).rsqrt()

    def _shared(self, running: Tensor | None, found: Tensor) -> Tensor:
        """Mean over the batch, which the running one follows in training; or the running one."""
        if running is not None and not self.training:
            return running[:, None, None].to(found.dtype)
        whole = found.mean(0, keepdim=True)
        if running is not None:
            with torch.no_grad():
                running.lerp_(whole.flatten().to(running.dtype), self.momentum)
        return whole


def slow_neural_loss(backbone: Terminator) -> Tensor:
    """How far the global kernels of the blocks are apart: a scalar to be added to the loss.

    Sum over pairs of blocks of the mean squared difference; the kernel of fewer channels is repeated. It depends on
    parameters alone, and pulls every block's kernel towards those before it.
    """
    kernels = [block.zzw.slow() for block in backbone.blocks]  # type: ignore[operator, union-attr]
    total = kernels[0].new_zeros(())
    for number, later in enumerate(kernels):
        for before in kernels[:number]:
            times = -(-len(later) // len(before))
            total = total + (before.repeat(times, 1, 1)[: len(later)] - later).square().mean()
    return total


class SlowNeural(Method):
    """Training of a classifier on Terminator with the slow neural loss beside its own.

    Attributes:
        task_model: what is trained.
        factor: of the slow neural loss; the paper's is 1.
    """

    def __init__(self, task_model: TaskModel, *, factor: float = 1.0) -> None:
        if not isinstance(task_model.backbone, Terminator):
            raise UsageError(f"SlowNeural trains on a terminator; this is a {type(task_model.backbone).__name__}")
        super().__init__()
        self.task_model, self.factor = task_model, factor

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # a module registered twice would be saved twice
        return self.task_model.backbone

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The task model's losses and `slow`."""
        losses = self.task_model.losses(self.task_model(batch.images), batch.targets)
        return {**losses, "slow": self.factor * slow_neural_loss(self.task_model.backbone)}  # type: ignore[arg-type]

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The task model's."""
        return self.task_model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """The task model's."""
        return self.task_model.load_state_dict(*args, **options)


def published(state: Mapping[str, Tensor], backbone: Terminator) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names; its classifier is left out.

    Args:
        state: its tensors, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `terminator(..., faithful=True)`: the authors keep no running statistics.

    Raises:
        UsageError: the backbone wants running statistics.
        ParityError: the checkpoint is of another network; the message lists what is left over on both sides.
    """
    if not backbone.faithful:
        raise UsageError("terminator: the authors' checkpoints have no running statistics; build it with faithful=True")
    return convert(state, RULES, backbone)


def _rules() -> list[tuple[str, str | None]]:
    rules: list[tuple[str, str | None]] = [
        (r"^(module|network)\.", ""),
        (r"^out_layer\.|\.(train_length|kernel_coords|initialized)$", None),
        (r"\.fast_multi_branch\.", "."),
        (r"\.bias_pk?$", ".bias_map"),
        (r"\.(bias)([1-4])$", r".local_interact_conv_\2.bias"),
    ]
    parts = {
        "slow_net_g": "zzw.slow",
        r"channel_mixer_hci\.slow_net_gc": "hyper_channel.slow",
        r"hyper_interact\.slow_net_gc_hi": "interaction.channel",
        r"hyper_interact\.slow_net_gs_hi": "interaction.space",
        "channel_mixer_mlp": "mix",
        "bottleneck_layer": "gather",
        "Fast_Kernel_rgu_2": "of_scores",
        "Fast_Kernel_rgu": "of_input",
    }
    rules += [(rf"\.{theirs}\.", f".{ours}.") for theirs, ours in parts.items()]
    for number in range(4):
        rules.append((rf"\.slow_net_l{number + 1}\.Kernel\.", f".local.{number}.slow.Kernel."))
        rules.append((rf"\.local_interact_conv_{number + 1}\.(channel_mixer\.)?", rf".local.{number}.\1"))
    inside = {"fast_reduce": "reduce", "fast_fc1": "squeeze", "fast_linears_x": "gates", "channel_mixer": "mix"}
    rules += [(rf"\.(?:Kernel\.)?{theirs}\.", f".{ours}.") for theirs, ours in inside.items()]
    rules += [(r"(local\.\d\.slow)\.Kernel\.", r"\1.slow."), (r"\.Kernel\.", ".")]
    rules += [(r"\.filters\.(\d+)\.linear\.", r".sines.\1."), (r"\.linears\.", ".hidden.")]
    names = {"output_linear": "out", "fast_linear_k": "key", "fast_linear_v": "value", "fast_linear_q": "query"}
    return rules + [(rf"\.{theirs}\.", f".{ours}.") for theirs, ours in (names | {"fast_linear_y": "out"}).items()]


RULES = _rules()


def effect(scale: Literal["toy", "gpu"], data: "Dataset | None") -> "Effect":
    """Terminator beside a plain network and a residual one of as many parameters, and without its slow neural loss."""
    from vertebra.backbones.terminator.experiment import compared

    return compared(scale, data)
