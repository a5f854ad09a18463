"""A priori compression: dense convolutions become one-way convolutions, before training or from trained weights.

    a_priori(network, images=(3, 32, 32))                   # kernels of one term, to be trained
    a_priori(trained, start="fitted", rank=2)               # the factors nearest to what was learned
    a_priori(network, "cp_layer", keep=0.2)                 # one decomposition a layer, of a fifth of its parameters

Any network with convolutions of one, two or three dimensions. The layer is `vertebra.blocks.one_way`, the simulator of
the effect `vertebra.studies.wave`.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vertebra.blocks.one_way import ONE_WAY, Compute, Per, largest_rank, modes
from vertebra.contracts import Check, Effect, Measured, Operated
from vertebra.data.dataset import Dataset
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.surgery.operation import Images, kinds, listed
from vertebra.surgery.swap import swap

PAPER = Paper(
    id="a_priori",
    title="A priori compression of convolutional neural networks for wave simulators",
    year=2023,
    claim=(
        "convolutions decomposed before training do as well as dense ones on finite-element wave data, with fewer "
        "parameters, less memory and less over-fitting"
    ),
    parity="the dense equivalent of each layer; no public code exists",
    note=(
        "Only the abstract and summaries could be read: sizes, ranges, networks and factors per input or layer are "
        "ours. Made densely, a layer saves parameters and optimiser state and no multiply-accumulates."
    ),
)

VARIANTS = {
    "cp_r1": {"per": "kernel", "rank": 1, "compute": "dense"},
    "cp_r2": {"per": "kernel", "rank": 2, "compute": "dense"},
    "cp_layer": {"per": "layer", "keep": 0.3333, "compute": "chain"},
}

Start = Literal["fresh", "fitted"]

_DENSE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")


def a_priori(
    model: nn.Module,
    variant: str = "cp_r1",
    *,
    rank: int | None = None,
    keep: float | None = None,
    per: Per | None = None,
    compute: Compute | None = None,
    start: Start = "fresh",
    what: str = "*",
    inplace: bool = False,
    images: tuple[int, ...] | None = None,
) -> Operated:
    """Put one-way convolutions in place of torch's own wherever they have fewer parameters.

    A layer takes at most the rank asked for, and no rank that would save nothing or stand for no more kernels: of
    3 x 3 kernels it is 1. Pointwise and one-dimensional kernels stay, and so do subclasses with a forward of their own.
    Biases stay as they are.

    Args:
        model: any network.
        variant: one of `VARIANTS`.
        rank: terms a set of factors, in place of the variant's.
        keep: share of a layer's weights that sets its rank, above 0 and below 1, in place of a rank.
        per: what one set of factors is for, in place of the variant's: "kernel", "input" or "layer".
        compute: "dense", or a "chain" of one-dimensional convolutions, in place of the variant's; see `OneWayConv2d`.
        start: "fresh" draws factors with He's variance; "fitted" takes those nearest to the weights.
        what: pattern of the dotted names of layers to change.
        inplace: change `model` itself; otherwise a copy.
        images: (channels, height, width) for a model that does not say what it takes; a network of volumes or clips
            takes (channels, depth, height, width), one of sequences (channels, length).

    Returns:
        The model, the names of the changed layers, the cost before and after. The products of dense weights from
        factors count as multiply-accumulates.

    Raises:
        UsageError: no layer can be changed, or an option out of range.
    """
    options = _options(variant, rank=rank, keep=keep, per=per, compute=compute)
    way: Compute = options.pop("compute")
    ranks = _Ranks(**options)
    if start not in ("fresh", "fitted"):
        raise UsageError(f"a_priori: start is {start!r}; it can be fresh or fitted")
    if start == "fitted" and any(p.is_meta for p in model.parameters()):
        raise UsageError("a_priori: the model is on the meta device and has no weights to fit; build it on a real one")
    chosen = {n for n, layer in model.named_modules(remove_duplicate=False) if fnmatchcase(n, what) and ranks.of(layer)}
    if not chosen:
        raise UsageError(
            f"a_priori: no convolution of the {type(model).__name__} named {what!r} has fewer parameters per "
            f"{ranks.per} at {ranks.words}; it has {listed(kinds(model))}"
        )

    def make(layer: nn.Module) -> nn.Module:
        return _one_way(layer, ranks, way, start)

    # counting runs the model on one input of these sides, however many they are
    sides: Images | None = images  # type: ignore[assignment]
    return swap(model, lambda name, layer: name in chosen, make, inplace=inplace, images=sides)


def _options(variant: str, **given: Any) -> dict[str, Any]:
    if variant not in VARIANTS:
        raise UsageError(f"a_priori has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if given["rank"] is not None and given["keep"] is not None:
        raise UsageError("a_priori: rank and keep are both given; keep sets the rank")
    asked = {name: value for name, value in given.items() if value is not None}
    size = {"rank", "keep"}
    return {k: v for k, v in VARIANTS[variant].items() if not (k in size and size & asked.keys())} | asked


class _Ranks:
    """Which rank a layer takes."""

    def __init__(self, *, per: Per, rank: int | None = None, keep: float | None = None) -> None:
        if per not in ("kernel", "input", "layer"):
            raise UsageError(f"a_priori: per is {per!r}; it can be kernel, input or layer")
        if rank is not None and rank < 1:
            raise UsageError(f"a_priori: rank is {rank}; it must be at least 1")
        if keep is not None and not 0 < keep < 1:
            raise UsageError(f"a_priori: keep is {keep}; it must be above 0 and below 1, as 0.3")
        self.per: Per = per
        self.rank, self.keep = rank, keep
        self.words = f"rank {rank}" if rank else f"keep {keep}"

    def of(self, module: nn.Module) -> int:
        """0 for a layer that stays."""
        kind = next((kind for kind in _DENSE if isinstance(module, kind)), None)
        if kind is None or type(module).forward is not kind.forward:
            return 0
        layer: Any = module
        if max(layer.kernel_size) == 1:
            return 0
        channels = (layer.in_channels, layer.out_channels)
        sets, sides = modes(channels, layer.kernel_size, groups=layer.groups, per=self.per)
        dense, term = layer.weight.numel(), sets * sum(sides)
        wanted = self.rank or int((self.keep or 0) * dense / term)
        return min(wanted, largest_rank(sides), (dense - 1) // term)


def _one_way(layer: Any, ranks: _Ranks, compute: Compute, start: Start) -> nn.Module:
    """The layer that takes a dense one's place."""
    options = {name: getattr(layer, name) for name in _OPTIONS}
    with layer.weight.device:
        conv = ONE_WAY[len(layer.kernel_size) - 1](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            rank=ranks.of(layer),
            per=ranks.per,
            compute=compute,
            bias=layer.bias is not None,
            **options,
        )
    if start == "fitted":
        conv.approximate(layer.weight.detach())
    if conv.bias is not None:
        conv.bias.data.copy_(layer.bias.detach())
    return conv


_ARMS: Mapping[str, str] = {
    "dense": "a 3-D network of dense convolutions",
    "cp_r1": "each kernel one term, from the start",
    "cp_r2": "each kernel two terms, from the start",
    "shrunk": "dense and narrower, with the parameters of one term",
    "post_hoc": "the dense one cut to one term after its training, and tuned for a quarter of it",
    "dense_few": "dense, with a quarter of the trajectories",
    "cp_r1_few": "each kernel one term, with a quarter of the trajectories",
    "resnet8": "control: dense ResNet-8, classes of images",
    "resnet8_r1": "control: the same with each kernel one term",
}


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Decomposed kernels beside dense ones, narrower ones and ones cut after training, on simulated waves."""
    from vertebra.arms import parts
    from vertebra.surgery.a_priori.forecast import SETTINGS, classified, forecast, prepare

    setting = SETTINGS[scale]
    train, test, words = parts(PAPER.id, data, setting.images)

    def measure(arm: str, seed: int, folder: Path) -> Mapping[str, float]:
        if arm.startswith("resnet8"):
            return classified(arm, seed, train, test, setting)
        return forecast(arm, seed, folder, setting)

    task = setting.task
    return Effect(
        claim="one-way kernels from the start forecast waves as well as dense ones, with fewer parameters",
        arms=_ARMS,
        baseline="dense",
        metrics={
            "error": "%",
            "gap": "%",
            "interior": "%",
            "cut": "%",
            "rate": "",
            "conv_params": "",
            "checkpoint_kb": "",
            "training_state_kb": "",
            "top1": "%",
        },
        measure=measure,
        checks=_checks,
        limits=(
            f"a network of {setting.width} channels, a square of {task.nodes} nodes, sources on one side of the zone;"
            " the paper's networks and data are not public. Every arm learns at the best of four rates, chosen"
            " on further trajectories after a quarter of its epochs. Training state is gradients and the two moments of"
            " AdamW; activations, which are the same for all, are not in it"
        ),
        data=f"{setting.train} and {setting.test} trajectories, {task.saved} steps; control: {words}",
        prepare=lambda seed, folder: prepare(seed, folder, setting),
    )


def _checks(measured: Measured) -> Sequence[Check]:
    def mean(arm: str, metric: str = "error") -> float:
        return measured.mean(arm, metric)

    waves = [arm for arm in measured.values if not arm.startswith("resnet8")]
    words = ", ".join(f"{arm} {mean(arm):.2f}" for arm in waves)
    share = mean("cp_r1", "conv_params") / mean("dense", "conv_params")
    size = {arm: f"{mean(arm, 'checkpoint_kb'):.0f} and {mean(arm, 'training_state_kb'):.0f} KB" for arm in waves[:2]}
    return [
        Check(
            "one term is at most 1.1 times as far off as dense kernels",
            mean("cp_r1") <= 1.1 * mean("dense"),
            f"{mean('cp_r1') / mean('dense'):.3f} times, with {share:.3f} of the weights; % off: {words}",
        ),
        Check(
            "one term is no further off than a narrower dense network of as many parameters",
            mean("cp_r1") <= mean("shrunk"),
            f"{mean('cp_r1'):.2f} against {mean('shrunk'):.2f} %",
        ),
        Check(
            "with few trajectories one term loses no more from training to test than dense kernels",
            mean("cp_r1_few", "gap") <= mean("dense_few", "gap"),
            f"{mean('cp_r1_few', 'gap'):.2f} against {mean('dense_few', 'gap'):.2f} points; with all of them "
            f"{mean('cp_r1', 'gap'):.2f} against {mean('dense', 'gap'):.2f}",
        ),
        Check(
            "fields inside of the zone are at most 1.2 times as far off",
            mean("cp_r1", "interior") <= 1.2 * mean("dense", "interior"),
            f"{mean('cp_r1', 'interior'):.2f} against {mean('dense', 'interior'):.2f} %",
        ),
        Check(
            "checkpoint and training state of one term are less than half as large",
            mean("cp_r1", "checkpoint_kb") < 0.5 * mean("dense", "checkpoint_kb")
            and mean("cp_r1", "training_state_kb") < 0.5 * mean("dense", "training_state_kb"),
            f"{size['cp_r1']} against {size['dense']}",
        ),
        Check(
            "from the start is at least as good as cutting afterwards",
            mean("cp_r1") <= mean("post_hoc"),
            f"{mean('cp_r1'):.2f} against {mean('post_hoc'):.2f} %, and {mean('post_hoc', 'cut'):.2f} % before tuning;"
            f" ResNet-8 on images: {mean('resnet8_r1', 'top1'):.1f} % with one term, {mean('resnet8', 'top1'):.1f} %"
            " dense",
        ),
    ]


def weights_of(model: nn.Module) -> int:
    """Parameters of convolutions but for biases: what is compressed."""
    return sum(prod(p.shape) for p in model.parameters() if p.ndim > 1)
