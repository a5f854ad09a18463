"""Fuse: fold what evaluation does not need into the weights, and prove that the outputs stay.

    fused = fuse(model.eval()).model

A batch norm that follows a convolution or a linear layer is an affine map of fixed numbers in evaluation: it is folded
into the weights before it. Which norm follows which layer is not guessed from names: one forward pass is watched,
operation by operation, and a norm is folded only where the layer's output goes to it and nowhere else. Modules with a
`fused() -> nn.Module` method (re-parameterised ones) replace themselves first. Then the model runs again beside the
original, and what does not agree is refused.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vertebra.contracts import Operated
from vertebra.errors import ParityError, UsageError
from vertebra.parity import difference, named
from vertebra.parity import images as fixed_images
from vertebra.surgery.operation import Images, images_of, kinds, listed, measured, outermost, put

VARIANTS: dict[str, dict[str, object]] = {}

TOLERANCE = 1e-5
"""Largest difference of an output, as a share of its largest value, that counts as none."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
_AFFINE = frozenset(
    ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
)
_FLATTEN = frozenset(("flatten", "view", "reshape"))
_SHAPE_ONLY = frozenset(("reshape_as", "view_as", "expand_as", "type_as"))
"""Operations that look at no value of their second argument."""


def fuse(model: nn.Module, *, images: Images | None = None) -> Operated:
    """A copy of a model with its batch norms folded into the layers before them.

    Grouped, transposed and padded convolutions and linear layers are folded into; timm's norms leave their
    activation behind. A norm stays where its input is used twice, comes from elsewhere (a norm before the
    convolution, a concatenation), or where weights are shared.

    Args:
        model: in evaluation mode and 32 or 64 bit; it stays as it is.
        images: (channels, height, width) for a model that does not say what it takes.

    Returns:
        The model, the names of what was folded away ("" is the model itself), the cost before and after.

    Raises:
        UsageError: a model in training mode, in 16 bit or on the meta device, or nothing to fold; the message says
            what there is.
        ParityError: the outputs differ by more than `TOLERANCE`.
    """
    _check(model)
    images = images_of(model, images)
    before = measured(model, images)
    fused = copy.deepcopy(model)
    replaced = _replaced(fused)
    fused = replaced.get("", fused)
    batch = _batch(fused, images)
    with torch.inference_mode(), _Watch() as watch:
        watch.outputs = fused(batch)
    folds = list(_folds(fused, watch))
    if not folds and not replaced:
        raise UsageError(
            f"fuse: nothing to fold in the {type(model).__name__}: no batch norm is fed by one convolution or linear"
            f" layer alone; it has {listed(kinds(model))}"
        )
    for fold in folds:
        _fold(fused, fold)
    _prove(model, fused, batch)
    changed = (*replaced, *(fold.norm for fold in folds))
    return Operated(fused, changed, before.cost, measured(fused, images).cost)


def _check(model: nn.Module) -> None:
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise UsageError(
            f"fuse: {training[0]} is in training mode, where a batch norm depends on the batch; call model.eval() first"
        )
    if any(p.is_meta for p in model.parameters()):
        raise UsageError("fuse: the model is on the meta device and has no numbers to fold; build it on a real one")
    low = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if low:
        raise UsageError(
            f"fuse: the model is in {low.pop()}, where nothing can be proved; fuse it in 32 bit, then cast it"
        )


def _batch(model: nn.Module, images: Images) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    return fixed_images((2, *images)).to(like.device, like.dtype)


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Let modules that know their fused form take it; name -> what is there now, the name of the model itself is ""."""
    able = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if callable(getattr(module, "fused", None))
    }
    if "" in able:
        return {"": model.fused().eval()}  # type: ignore[operator]
    made: dict[nn.Module, nn.Module] = {}
    for name in outermost(able):
        module: Any = able[name]
        made[module] = made[module] if module in made else module.fused().eval()
        put(model, name, made[module])
    return {name: made[able[name]] for name in outermost(able)}


@dataclass(frozen=True, eq=False)
class _Affine:
    """A convolution or matrix product that was seen: the weights it took and what it gave."""

    weight: Tensor
    bias: Tensor | None
    out: Tensor
    linear: bool
    through: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class _Normed:
    """A batch norm that was seen."""

    given: Tensor
    gain: Tensor | None
    shift: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class _Fold:
    """A norm by name, the layer before it, and the numbers of both."""

    norm: str
    layer: nn.Module
    normed: _Normed


@dataclass
class _Watch(TorchDispatchMode):
    """Sees every operation of a forward pass in inference mode, where layers arrive whole (`aten.conv2d`).

    What is remembered is kept alive, so that an id means one tensor.
    """

    made: dict[int, _Affine] = field(default_factory=dict)
    norms: list[_Normed] = field(default_factory=list)
    uses: dict[int, int] = field(default_factory=dict)
    outputs: Any = None

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        read = args[:1] if name in _SHAPE_ONLY else (args, kwargs)
        for tensor in tree_leaves(read):
            if isinstance(tensor, Tensor):
                self.uses[id(tensor)] = self.uses.get(id(tensor), 0) + 1
        if name in _AFFINE:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            self._make(_Affine(args[1], bias, out, linear=name == "linear"))
        elif name in _FLATTEN and id(args[0]) in self.made:
            self._flattened(self.made[id(args[0])], out)
        elif name == "batch_norm" and args[3] is not None and not args[5]:
            self.norms.append(_Normed(args[0], args[1], args[2], args[3], args[4], args[7]))
        return out

    def _make(self, seen: _Affine) -> None:
        self.made[id(seen.out)] = seen
        self.uses[id(seen.out)] = 0  # an earlier tensor may have had this id

    def _flattened(self, seen: _Affine, out: Tensor) -> None:
        """A linear layer's output with all but its channels in one dimension is still its output."""
        if seen.linear and out.ndim == 2 and out.shape[1] == seen.out.shape[-1]:
            self._make(_Affine(seen.weight, seen.bias, out, linear=True, through=(*seen.through, seen.out)))


def _folds(model: nn.Module, watch: _Watch) -> Iterator[_Fold]:
    """What the forward pass proves to be foldable."""
    layers = _owners(model, "_parameters", "weight", _LAYERS)
    norms = _owners(model, "_buffers", "running_mean", _BatchNorm)
    names = {module: name for name, module in model.named_modules()}
    returned = {id(tensor) for tensor in tree_leaves(watch.outputs)}
    for normed in watch.norms:
        seen, norm = watch.made.get(id(normed.given)), norms.get(id(normed.mean))
        layer = layers.get(id(seen.weight)) if seen else None
        if seen is None or layer is None or norm is None or _remainder(norm) is None:
            continue
        once = [seen.weight, normed.mean, seen.out, *seen.through]
        alone = all(watch.uses.get(id(tensor)) == 1 and id(tensor) not in returned for tensor in once)
        # a matrix product ends in its channels, where a batch norm of more dimensions has them second
        aligned = normed.given.ndim == 2 if seen.linear else normed.given.ndim > 2
        watched = layer._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks
        if alone and aligned and not watched and seen.bias is layer.bias:
            yield _Fold(names[norm], layer, normed)


def _owners(model: nn.Module, where: str, name: str, kinds: Any) -> Mapping[int, nn.Module]:
    """Identity of a tensor -> the module of one of these kinds that registers it under `name`."""
    found = {}
    for module in model.modules():
        tensor = getattr(module, where).get(name)
        if tensor is not None and isinstance(module, kinds):
            found[id(tensor)] = module
    return found


def _remainder(norm: nn.Module) -> nn.Module | None:
    """What a norm does beside normalising; None for kinds that are not known."""
    if type(norm) in _NORMS:
        return nn.Identity()
    if isinstance(norm, BatchNormAct2d) and type(norm).forward is BatchNormAct2d.forward:
        whole: list[Any] = [norm.drop, norm.act]
        parts = [part for part in whole if not isinstance(part, nn.Identity)]
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()
    return None


def _fold(model: nn.Module, fold: _Fold) -> None:
    """Put a norm's map into the weights before it, in 64 bit, and what else the norm did in its place."""
    layer, normed = fold.layer, fold.normed
    weight: Any = layer.weight
    old: Any = layer.bias
    gain = (normed.variance.double() + normed.eps).rsqrt()
    gain = gain if normed.gain is None else gain * normed.gain.double()
    bias = -normed.mean.double() if old is None else old.double() - normed.mean.double()
    bias = bias * gain if normed.shift is None else bias * gain + normed.shift.double()
    scaled = weight.double() * _along_outputs(gain, layer)
    layer.weight = nn.Parameter(scaled.to(weight.dtype).detach(), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype).detach(), requires_grad=weight.requires_grad)
    norm = model.get_submodule(fold.norm)
    remainder = _remainder(norm)
    assert remainder is not None
    put(model, fold.norm, remainder.eval())


def _along_outputs(gain: Tensor, layer: nn.Module) -> Tensor:
    """A factor (outputs,) in the shape that multiplies a layer's weight."""
    weight: Any = layer.weight
    if not isinstance(layer, _TRANSPOSED):
        return gain.reshape(-1, *[1] * (weight.ndim - 1))
    inputs = weight.shape[0] // layer.groups  # weight (groups * inputs, outputs / groups, ...)
    spread = gain.reshape(layer.groups, 1, -1).expand(-1, inputs, -1)
    return spread.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))


def _prove(model: nn.Module, fused: nn.Module, batch: Tensor) -> None:
    """Run both; where 32 bit rounds too much to tell, 64 bit decides."""
    name, apart = _furthest(model, fused, batch)
    if apart > TOLERANCE and batch.dtype == torch.float32:
        name, apart = _furthest(copy.deepcopy(model).double(), copy.deepcopy(fused).double(), batch.double())
    if not apart <= TOLERANCE:
        raise ParityError(
            f"fuse: {name} would differ by {apart:.2g} of its size, and {TOLERANCE:g} is allowed; nothing was changed."
            " The forward pass takes other ways than the one that was watched, a layer makes no use of its bias, or the"
            " network magnifies rounding beyond all use"
        )


def _furthest(model: nn.Module, fused: nn.Module, batch: Tensor) -> tuple[str, float]:
    """The output that differs most, and by how much."""
    with torch.inference_mode():
        expected, found = named(model(batch)), named(fused(batch))
    return max(((name, difference(found[name], expected[name], name)) for name in expected), key=lambda pair: pair[1])
