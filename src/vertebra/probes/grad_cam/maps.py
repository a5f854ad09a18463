"""Maps (B, H, W) of what speaks for a class: Grad-CAM, its counterfactual, Guided Grad-CAM, and simple gradients.

Scores are those before softmax, summed over the batch: in evaluation mode the gradient of the sum is each image's own.
The network is left as it was: no hook, no gradient in its parameters, its training mode and frozen parameters as
before, whatever the caller's own gradient mode is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vertebra.contracts import Features
from vertebra.errors import UsageError, near
from vertebra.probes.grad_cam.sites import Site, module_named, site_of

Method: TypeAlias = Literal["grad_cam", "counterfactual", "guided", "guided_backprop", "gradient_input"]
METHODS: dict[str, str] = {
    "grad_cam": "what speaks for the class",
    "counterfactual": "what speaks against it",
    "guided": "Grad-CAM at the sharpness of pixels: guided gradients where it is hot",
    "guided_backprop": "gradients through positive paths only; hardly depends on the class",
    "gradient_input": "gradient times input",
}
"""Method -> what it shows."""

Target: TypeAlias = int | str | Sequence[int] | Sequence[str] | Tensor | Callable[[Any], Tensor] | None
"""A class for all images or one an image, by index or name; or what the model gives to scores (B,); None asks for the
class that the model itself says."""


def explain(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    *,
    method: Method = "grad_cam",
    layer: str | nn.Module | Site | None = None,
    at: Literal["image", "cells"] = "image",
) -> Tensor:
    """Where a network finds what speaks for a class.

    Args:
        model: a task model with `logits`, or a backbone with a callable `target`; any network with `layer`.
        images: (B, channels, H, W), normalised.
        target: the class, or a callable that turns what the model gives into scores (B,): differentiable, and before
            softmax. Probabilities flatten the gradient of what is certain.
        method: one of `METHODS`.
        layer: a module, its name, or a site that was found before; None takes the deepest place whose cells reach the
            score.
        at: "image" resizes to the images' size (bilinear), "cells" leaves the maps as the layer has them, (B, h, w).

    Returns:
        (B, H, W) float32, 0 or more, unscaled: for display divide each by its maximum. All zero where nothing speaks
        for the class.

    Raises:
        UsageError: an unknown method, class or layer, or a network that has no place to look at.
    """
    if method not in METHODS:
        raise UsageError(f"method is {method!r}{near(method, METHODS)}; it can be {', '.join(METHODS)}")
    score = scores_of(model, target, len(images))
    with _prepared(model, images) as images:
        if method in ("guided_backprop", "gradient_input"):
            return _pixels(model, images, score, method, at)
        site = _site(model, images, target, layer)
        activations, gradients = _looked(model, images, score, site)
        maps = weighted(activations, -gradients if method == "counterfactual" else gradients)
        maps = resized(maps, images.shape[-2:]) if at == "image" else maps
        if method == "guided":
            fine = guided_backprop(model, images, score).abs().amax(1)
            return maps * (fine if at == "image" else F.adaptive_avg_pool2d(fine, site.grid))
        return maps


def weighted(activations: Tensor, gradients: Tensor) -> Tensor:
    """The formula: maps summed with the mean of their gradients as weights, and of that what is positive.

    Args:
        activations: (B, C, h, w).
        gradients: of the score at them, (B, C, h, w).

    Returns:
        (B, h, w).
    """
    alpha = gradients.mean((2, 3), keepdim=True)  # (B, C, 1, 1), eq. 1
    return (alpha * activations).sum(1).relu()  # eq. 2


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) at another size, bilinear, cells as areas."""
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def scaled(maps: Tensor) -> Tensor:
    """Maps (B, H, W) for display: each divided by its maximum. Not shifted, so that 15 % of the maximum stays that."""
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def activations_and_gradients(
    model: nn.Module, images: Tensor, target: Target, *, layer: str | nn.Module | Site | None = None
) -> tuple[Tensor, Tensor]:
    """What the maps are made of: activations of the layer and the gradient of the scores at them, (B, C, h, w) each."""
    score = scores_of(model, target, len(images))
    with _prepared(model, images) as images:
        return _looked(model, images, score, _site(model, images, target, layer))


def _site(model: nn.Module, images: Tensor, target: Target, layer: str | nn.Module | Site | None) -> Site:
    """Where to look; a callable may look at whatever the model gives, for all images, so it is asked itself."""
    if isinstance(layer, Site):
        return layer
    if callable(target) and layer is None:
        return site_of(model, images, score=target)
    return site_of(model, images[:1], layer=layer)


def channels(
    model: nn.Module, images: Tensor, target: Target, *, layer: str | nn.Module | Site | None = None
) -> Tensor:
    """Weight of each channel for the class, (B, C): the paper names the neurons of the largest and the smallest."""
    return activations_and_gradients(model, images, target, layer=layer)[1].mean((2, 3))


def guided_backprop(model: nn.Module, images: Tensor, target: Target) -> Tensor:
    """Gradients of the scores at the images through positive paths only (Springenberg et al., arXiv 1412.6806).

    Every activation function passes back what is positive, where its input was. ReLU is what the paper has; GELU, SiLU
    and their like are treated the same, which is ours.

    Returns:
        (B, channels, H, W).
    """
    with _prepared(model, images) as images:
        return _input_gradients(model, images, scores_of(model, target, len(images)), Guided())


def scores_of(model: nn.Module, target: Target, images: int) -> Callable[[Any], Tensor]:
    """What a model gives to the scores (B,) of a target.

    Raises:
        UsageError: a class that the model does not have, or as many classes as there are no images; and, when called,
            outputs without logits.
    """
    if callable(target):
        return target
    with torch.inference_mode(False):  # autograd keeps the indices
        wanted = class_indices(target, getattr(model, "classes", None))
        wanted = wanted.clone() if wanted is not None else None
    if wanted is not None and wanted.ndim and wanted.shape != (images,):
        raise UsageError(f"target has shape {tuple(wanted.shape)} for {images} images; give one class, or one an image")

    def score(outputs: Any) -> Tensor:
        logits = _logits(outputs)
        if wanted is None:
            return logits.amax(1)
        if wanted.min() < 0 or wanted.max() >= logits.shape[1]:
            raise UsageError(f"target {wanted.tolist()}: the model has the classes 0 to {logits.shape[1] - 1}")
        return logits.gather(1, wanted.to(logits.device).expand(len(logits))[:, None])[:, 0]

    return score


def class_indices(target: Any, classes: Sequence[str] | None) -> Tensor | None:
    """Indices () or (B,) of classes given by index or name; None stays None."""
    if target is None or isinstance(target, Tensor):
        return target if target is None else target.long()
    if isinstance(target, int):
        return torch.tensor(target)
    if isinstance(target, str):
        return torch.tensor(_index(target, classes))
    return torch.tensor([_index(one, classes) if isinstance(one, str) else int(one) for one in target])


def _index(name: str, classes: Sequence[str] | None) -> int:
    if classes is None:
        raise UsageError(f"class {name!r}: the model has no class names; give an index")
    if name not in classes:
        shown = near(name, classes) or f"; it has {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        raise UsageError(f"the model has no class {name!r}{shown}")
    return list(classes).index(name)


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Features):
        raise UsageError("a backbone has no classes; explain a task model, or give a callable: Features -> scores (B,)")
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise UsageError(f"the model gives {', '.join(outputs)} and no logits; give a callable that scores them")
        return outputs["logits"]
    return outputs


@contextmanager
def _prepared(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Images that gradients can be asked of, and the model in evaluation mode, as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield images.clone() if images.is_inference() else images.detach()
    finally:
        for module, training in modes.items():
            module.training = training


def _looked(model: nn.Module, images: Tensor, score: Callable[[Any], Tensor], site: Site) -> tuple[Tensor, Tensor]:
    """Activations and gradients at a site, (B, C, h, w) each; only what lies behind it is differentiated."""
    kept: list[Tensor] = []
    calls = 0

    def begin(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 != site.call:
            return None
        many = isinstance(output, tuple | list)
        leaf = (output[0] if many else output).detach().requires_grad_()
        kept.append(leaf)
        torch.set_grad_enabled(True)  # until the end of the forward pass: `no_grad` around it restores the mode
        passed = leaf.clone()  # what follows may work in place, and the kept activations must stay
        return type(output)([passed, *output[1:]]) if many else passed

    handle = module_named(model, site.layer).register_forward_hook(begin)
    try:
        with torch.no_grad():
            total = score(model(images)).sum()
    finally:
        handle.remove()
    if not kept:
        raise UsageError(f"layer {site.layer!r} was not called {site.call + 1} times in this forward pass")
    (gradient,) = torch.autograd.grad(total, kept[0], allow_unused=True) if total.requires_grad else (None,)
    if gradient is None:
        raise UsageError(f"the score does not depend on layer {site.layer!r}; take another layer or target")
    return site.maps(kept[0].detach()).float(), site.maps(gradient).float()


class Guide(torch.autograd.Function):
    """Passes back what is positive, where the input was positive."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs > 0)
        return inputs.clone()  # the activation behind it may work in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * positive


ACTIVATIONS = frozenset(
    {
        *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish),
        *(F.softplus, torch.relu, Tensor.relu),
    }
)


class Guided(TorchFunctionMode):
    """Within it every activation function is guided, whether a module or a function calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ACTIVATIONS and args:
            args = (Guide.apply(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _input_gradients(
    model: nn.Module, images: Tensor, score: Callable[[Any], Tensor], mode: TorchFunctionMode | None = None
) -> Tensor:
    """Gradient of the scores at the images, (B, channels, H, W)."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        if mode is None:
            total = score(model(leaf)).sum()
        else:
            with mode:
                total = score(model(leaf)).sum()
    return torch.autograd.grad(total, leaf)[0].float()


def _pixels(
    model: nn.Module, images: Tensor, score: Callable[[Any], Tensor], method: Method, at: Literal["image", "cells"]
) -> Tensor:
    """Maps at the images' own cells; "cells" averages them over the cells of the deepest site."""
    if method == "guided_backprop":
        maps = _input_gradients(model, images, score, Guided()).abs().amax(1)
    else:
        maps = (_input_gradients(model, images, score) * images).sum(1).relu()
    if at == "image":
        return maps
    return F.adaptive_avg_pool2d(maps, site_of(model, images[:1]).grid)
