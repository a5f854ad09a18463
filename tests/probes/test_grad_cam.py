"""Equal to the packages that people use, to CAM where it must be, and harmless to the network that is explained."""

import base64
import importlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from PIL import Image
from torch import Tensor, nn

from vertebra.backbones.timm import timm
from vertebra.battle.report import write_report
from vertebra.contracts import Backbone, Features, Level, Measured, Preprocess
from vertebra.data.annotations import Objects
from vertebra.data.dataset import Split
from vertebra.data.digits import Arrays, digits
from vertebra.errors import UsageError
from vertebra.parity import fill
from vertebra.probes import NotApplicable, faithfulness
from vertebra.probes.evidence import Evidence
from vertebra.probes.grad_cam import effect, grad_cam, scenes
from vertebra.probes.grad_cam.maps import (
    Guided,
    activations_and_gradients,
    channels,
    explain,
    guided_backprop,
    resized,
    scaled,
)
from vertebra.probes.grad_cam.sites import Site, site_of
from vertebra.spec import Spec
from vertebra.tasks.classify import Classify, classify

CLASSES = ("cat", "dog", "owl", "yak")


def quietly(name: str) -> Any:
    """A reference package, whose import warns of what it imports itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


class Logits(nn.Module):
    """The same network as packages expect it: images to logits."""

    def __init__(self, model: Classify) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["logits"]


def built(name: str, size: int, seed: int = 0) -> Classify:
    torch.manual_seed(seed)
    model = classify(timm(name, image_size=size), CLASSES).eval()
    nn.init.normal_(model.head.weight)
    for module in model.modules():  # statistics that are not those of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def photos(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def cells(prefix: int, grid: int) -> Callable[[Tensor], Tensor]:
    """Tokens to maps, written as users of grad-cam write it."""
    return lambda tokens: tokens[:, prefix:].reshape(len(tokens), grid, grid, -1).permute(0, 3, 1, 2)


def rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


USUAL = {
    "resnet18": ("resnet18", 96, "layer4", None, None),
    "convnext": ("convnext_atto", 96, "stages.3", None, None),
    "vit": ("vit_tiny_patch16_224", 64, "blocks.11.norm1", cells(1, 4), None),
    "swin, final norm": ("swin_tiny_patch4_window7_224", 64, "norm", rows, None),
    "swin, norm1": ("swin_tiny_patch4_window7_224", 64, "layers.3.blocks.1.norm1", rows, "layers.3.blocks.1.norm1"),
}
"""Timm's name, image side, grad-cam's target layer and reshaping, and our `layer`, which is rarely needed."""


def unscaled(model: Classify, images: Tensor, target: list[int], layer: str, reshape: Any) -> tuple[Tensor, Tensor]:
    """The reference's maps: before its min-max display, and as it displays them."""
    reference = quietly("pytorch_grad_cam")
    targets = [quietly("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(i) for i in target]
    module = model.backbone.network.get_submodule(layer)
    with reference.GradCAM(Logits(model), [module], reshape_transform=reshape) as cam:
        shown = cam(images.clone(), targets)
        kept = cam.activations_and_grads
        arrays = [kept.activations[-1].numpy(), kept.gradients[-1].numpy()]
        raw = cam.get_cam_image(images, module, targets, *arrays)
    model.zero_grad(set_to_none=True)
    return torch.from_numpy(np.maximum(raw, 0)), torch.from_numpy(shown)


@pytest.mark.parametrize(("name", "size", "layer", "reshape", "ours"), USUAL.values(), ids=USUAL)
def test_equals_the_grad_cam_package(name: str, size: int, layer: str, reshape: Any, ours: str | None) -> None:
    model, images, target = built(name, size), photos(3, size), [0, 3, 1]
    raw, shown = unscaled(model, images, target, layer, reshape)
    assert raw.amax() > 0
    found = explain(model, images, target, layer=ours and f"network.{ours}", at="cells")
    torch.testing.assert_close(found, raw, rtol=1e-5, atol=1e-5 * raw.amax().item())

    maps = explain(model, images, target, layer=ours and f"network.{ours}")
    lowest = maps.flatten(1).amin(1)[:, None, None]
    displayed = scaled(maps - lowest)  # the reference shifts before it divides
    lit = raw.amax((1, 2)) > 1e-5
    torch.testing.assert_close(displayed[lit], shown[lit], rtol=0, atol=0.02)  # it shifts before it resizes, too


def test_equals_captums_layer_gradient() -> None:
    model, images = built("resnet18", 96), photos(2, 96)
    reference = quietly("captum.attr").LayerGradCam(Logits(model), model.backbone.network.layer4)
    expected = reference.attribute(images, target=torch.tensor([2, 1]), relu_attributions=True)[:, 0]
    found = explain(model, images, ["owl", "dog"], at="cells")
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    """A network whose ReLUs are used once and not in place, as captum needs them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU()),
        )
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


def test_guided_backprop_equals_captums() -> None:
    model, images = Plain().eval(), photos(3, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its hooks
        expected = quietly("captum.attr").GuidedBackprop(model).attribute(images.clone(), target=2)
    found = guided_backprop(model, images, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    plain = torch.autograd.grad(model(leaf := images.clone().requires_grad_())[:, 2].sum(), leaf)[0]
    assert not torch.allclose(plain, expected, atol=1e-3 * expected.abs().max().item())


def test_guided_grad_cam_equals_captums() -> None:
    model, images = Plain().eval(), photos(2, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = quietly("captum.attr").GuidedGradCam(model, model.body[5])
        expected = reference.attribute(images.clone(), target=1, interpolate_mode="bilinear")
    found = explain(model, images, 1, method="guided", layer="body.5")
    torch.testing.assert_close(
        found, expected.abs().amax(1).detach(), rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


def test_in_place_relus_are_guided_too_and_kept_activations_stay() -> None:
    plain, images = Plain().eval(), photos(2, 32)
    expected = guided_backprop(plain, images, 0), explain(plain, images, 0, layer="body.3", at="cells")
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    torch.testing.assert_close(guided_backprop(plain, images, 0), expected[0])
    torch.testing.assert_close(explain(plain, images, 0, layer="body.3", at="cells"), expected[1])
    torch.testing.assert_close(activations_and_gradients(plain, images, 0, layer="body.3")[0], plain.body[:4](images))


def test_guiding_is_over_after_the_call() -> None:
    values = torch.tensor([-1.0, 2.0], requires_grad=True)
    with Guided():
        F.gelu(values).sum()
    (gradient,) = torch.autograd.grad(-F.relu(values).sum(), values)
    assert gradient.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("name", ["mobilenetv2_100", "swin_tiny_patch4_window7_224"])
def test_equals_cam_where_the_network_averages_its_cells(name: str) -> None:
    """Zhou et al.: the class's weights themselves; alpha is w / (h w), so the maps differ by that factor alone."""
    model, images, target = built(name, 64), photos(2, 64), torch.tensor([1, 2])
    site = site_of(model, images)
    outputs: list[Tensor] = []
    module = model.backbone.get_submodule(site.layer)
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(site.maps(output).detach()))
    with torch.no_grad():
        logits = model(images)["logits"]
    handle.remove()
    assert site.grid == (2, 2)
    cam = torch.einsum("bk,bkhw->bhw", model.head.weight.detach()[target], outputs[0])
    torch.testing.assert_close(
        explain(model, images, target, at="cells") * 4, cam.relu(), rtol=0, atol=1e-6 * cam.max().item()
    )
    means = cam.mean((1, 2)) + model.head.bias.detach()[target]
    torch.testing.assert_close(means, logits.gather(1, target[:, None])[:, 0], rtol=1e-4, atol=1e-4)


def test_the_final_output_of_a_vit_has_no_gradient_at_its_cells() -> None:
    """Why the place is looked for: a class token alone is read behind the last block."""
    model, images = built("vit_tiny_patch16_224", 64), photos(1, 64)
    _, behind = activations_and_gradients(model, images, 0, layer="network.blocks.11")
    _, before = activations_and_gradients(model, images, 0)
    assert not behind.any() and before.abs().amin((0, 2, 3)).max() > 0
    assert not explain(model, images, 0, layer="network.blocks.11").any()
    assert site_of(model, images) == Site("network.blocks.11.norm1", 0, "tokens", (4, 4), (0,))


PLACES = {
    "deit_tiny_distilled_patch16_224": (64, "blocks.11.norm1", "tokens", (4, 4), (0, 1)),
    "cait_xxs24_224": (64, "blocks.23", "tokens", (4, 4), ()),
    "pit_ti_224": (224, "transformers.2.blocks.3.norm1", "tokens", (7, 7), (0,)),
    "densenet121": (64, "features.norm5", "map", (2, 2), ()),
    "resnet18": (32, "layer3.1", "map", (2, 2), ()),
    "mixer_s32_224": (224, "norm", "tokens", (7, 7), ()),
}
"""Where each family is looked at; a last map of one cell says nothing of places, so ResNet at 32 pixels goes back."""


@pytest.mark.parametrize("name", PLACES)
def test_the_place_is_found_without_naming_a_layer(name: str) -> None:
    size, layer, layout, grid, special = PLACES[name]
    site = site_of(timm(name, image_size=size).eval(), photos(1, size))
    assert (site.layer, site.layout, site.grid, site.special) == (f"network.{layer}", layout, grid, special)


def test_a_class_token_among_the_patches_shifts_no_cell() -> None:
    backbone, images = fill(Spec("vim/nano").build()).eval(), photos(1, 32)
    assert site_of(backbone, images) == Site("blocks.3.norm", 0, "tokens", (8, 8), (32,))
    seen = torch.arange(65.0).view(1, 65, 1)
    maps = site_of(backbone, images).maps(seen).flatten().tolist()
    assert maps == [*range(32), *range(33, 65)]


def test_oblong_images() -> None:
    model, images = built("vit_tiny_patch16_224", 64), photos(2, 128)[:, :, :64]
    assert site_of(model, images).grid == (4, 8)
    assert explain(model, images, 0).shape == (2, 64, 128)


class Twice(Backbone):
    """One shared block that runs twice, as recursive transformers do; it gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(3, 6, 3, 4, 1), Paired()
        self.levels, self.width = (Level(6, 4),), 6
        self.preprocess = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3)

    def forward(self, images: Tensor) -> Features:
        maps = self.stem(images)
        for _ in range(2):
            maps, _ = self.block(maps)
        return Features((maps,), maps.amax((2, 3)))

    def trunk(self) -> list[nn.Module]:
        return [self.stem, self.block]


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, maps: Tensor) -> tuple[Tensor, int]:
        return maps + self.conv(maps).relu_(), 1


def test_a_block_that_runs_twice_is_looked_at_the_last_time() -> None:
    model, images = classify(Twice(), CLASSES), photos(2, 16)
    site = site_of(model, images)
    assert (site.layer, site.call, site.grid) == ("block", 1, (4, 4))
    with torch.no_grad():
        maps = model.backbone(images).pyramid[-1]
    torch.testing.assert_close(activations_and_gradients(model, images, 1)[0], maps)


def test_counterfactual_turns_the_weights() -> None:
    model, images = built("resnet18", 64), photos(2, 64)
    activations, gradients = activations_and_gradients(model, images, [0, 1])
    alpha = gradients.mean((2, 3), keepdim=True)
    against = explain(model, images, [0, 1], method="counterfactual", at="cells")
    torch.testing.assert_close(against, (-alpha * activations).sum(1).relu())
    assert against.any() and not (against * explain(model, images, [0, 1], at="cells")).any()
    torch.testing.assert_close(channels(model, images, [0, 1]), alpha[:, :, 0, 0])


def test_each_image_has_its_own_map_whatever_else_is_in_the_batch() -> None:
    model, images, target = built("resnet18", 64), photos(4, 64), [0, 1, 2, 3]
    together = explain(model, images, target)
    alone = [explain(model, images[i : i + 1], target[i])[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_targets() -> None:
    model, images = built("resnet18", 64), photos(3, 64)
    with torch.no_grad():
        said = model(images)["logits"].argmax(1)
    torch.testing.assert_close(explain(model, images), explain(model, images, said))
    torch.testing.assert_close(explain(model, images, "owl"), explain(model, images, [2, 2, 2]))
    torch.testing.assert_close(explain(model, images, 2), explain(model, images, lambda out: out["logits"][:, 2]))
    pooled = explain(model.backbone, images, lambda features: features.pooled @ model.head.weight[2])
    torch.testing.assert_close(pooled, explain(model, images, 2), rtol=1e-4, atol=1e-5)
    each = torch.tensor([2, 0, 1])
    own = explain(model, images, lambda out: out["logits"][torch.arange(3), each])
    torch.testing.assert_close(own, explain(model, images, each))


def test_a_certain_networks_probability_has_no_gradient_to_show() -> None:
    """Why the score is the logit."""
    model, images = built("resnet18", 64), photos(1, 64)
    with torch.no_grad():
        model.head.weight *= 100
        said = int(model(images)["logits"].argmax())
    certain = explain(model, images, lambda out: out["logits"].softmax(1)[:, said])
    assert certain.amax() < 1e-3 * explain(model, images, said).amax()


@pytest.mark.parametrize("method", ["grad_cam", "counterfactual", "guided", "guided_backprop", "gradient_input"])
def test_the_network_stays_as_it_was(method: Any) -> None:
    model, images = built("resnet18", 64), photos(2, 64)
    model.train()
    model.backbone.network.layer1.eval()  # type: ignore[union-attr]
    for parameter in model.backbone.network.layer2.parameters():  # type: ignore[union-attr]
        parameter.requires_grad = False
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = images.clone()
    maps = explain(model, images, [0, 1], method=method)
    assert not maps.requires_grad and maps.shape == (2, 64, 64) and maps.amin() >= 0
    assert modes == [module.training for module in model.modules()]
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(images, before) and not images.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        torch.testing.assert_close(explain(model, images, [0, 1], method=method), maps)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        torch.testing.assert_close(explain(model, images * 1, [0, 1], method=method), maps)
        assert torch.is_inference_mode_enabled()
    for parameter in model.parameters():
        parameter.requires_grad = False
    torch.testing.assert_close(explain(model, images, [0, 1], method=method), maps)


def test_a_failing_network_keeps_no_hook() -> None:
    model = built("resnet18", 64).train()
    with pytest.raises(UsageError, match="channels"):
        explain(model, torch.randn(1, 4, 64, 64), 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and model.training


def test_any_network_where_a_layer_is_given() -> None:
    model, images = Plain(), photos(2, 32)
    by_name, by_module = (explain(model, images, 1, layer=layer) for layer in ("body.4", model.body[4]))
    assert torch.equal(by_name, by_module) and by_name.shape == (2, 32, 32)


def test_nothing_speaks_for_a_class_of_zero_weight() -> None:
    model, images = built("resnet18", 64), photos(1, 64)
    nn.init.zeros_(model.head.weight)
    maps = explain(model, images, 0)
    assert not maps.any() and torch.equal(scaled(maps), maps)


def test_scaling_keeps_zero_and_makes_one_of_the_largest() -> None:
    maps = torch.tensor([[[0.5, 1.0], [2.0, 4.0]]])
    assert scaled(maps).tolist() == [[[0.125, 0.25], [0.5, 1.0]]]
    assert resized(maps, (4, 4))[0, 0].tolist() == [0.5, 0.625, 0.875, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "grad_can"}, "method is 'grad_can'; did you mean grad_cam?"),
        ({"target": "dgo"}, "no class 'dgo'; did you mean dog?"),
        ({"target": 9}, "classes 0 to 3"),
        ({"target": [0, 1, 2]}, r"shape \(3,\) for 2 images"),
        ({"layer": "network.layer5"}, "no layer 'network.layer5'; did you mean network.layer"),
        ({"layer": "network.global_pool"}, "has no cells"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explain(built("resnet18", 64), photos(2, 64), **{"target": 0, **options})


def test_who_has_no_classes_is_told_what_to_give() -> None:
    with pytest.raises(UsageError, match="a backbone has no classes"):
        explain(timm("resnet18", image_size=64), photos(1, 64), 0)
    with pytest.raises(UsageError, match="say layer="):
        explain(Plain(), photos(1, 32), 0)
    with pytest.raises(UsageError, match="no class names"):
        explain(Plain(), photos(1, 32), "cat", layer="body.4")


class Bright(Backbone):
    """Maps are where an image is bright; the pooled features are their mean, so the map must be the thing itself."""

    def __init__(self, size: int, *, flat: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 4, stride=4)
        nn.init.constant_(self.conv.weight, 1 / 48)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.levels, self.width, self.flat = (Level(2, 4),), 2, flat
        self.preprocess = Preprocess((size, size), (0.0,) * 3, (1.0,) * 3, "bilinear", crop=0.5)

    def forward(self, images: Tensor) -> Features:
        if self.flat:
            return Features((images,), images.mean((2, 3))[:, :2])
        maps = self.conv(images)
        return Features((maps,), maps.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        return [self.conv]


def squares() -> dict[str, Split]:
    """Images (64, 96) with one bright square each, light or dark, in the part that half a crop keeps; its box known."""
    random = np.random.default_rng(0)
    pixels, labels, boxes = np.zeros((60, 64, 96, 3), np.uint8), np.arange(60) % 2, []
    for image, label in zip(pixels, labels, strict=True):
        top, left = 16 + 4 * random.integers(0, 6), 32 + 4 * random.integers(0, 6)  # on the grid of the cells
        image[top : top + 12, left : left + 12] = (255, 200)[label]
        boxes.append([left, top, left + 12, top + 12])
    first, sizes, no = np.arange(61), np.tile([64, 96], (60, 1)), np.zeros(60, dtype=bool)
    objects = Objects(first, sizes, np.array(boxes, float), labels, (0, 1), no, no, np.full(60, 144.0))
    whole = Split(
        "all", ("light", "dim"), np.array([f"{i:02d}" for i in range(60)]), labels, Arrays(pixels), first[:60], objects
    )
    return {name: whole.select(np.arange(start, 60, 3), name) for start, name in enumerate(("train", "val", "test"))}


def test_the_probe_scores_maps_and_finds_boxes_where_the_network_sees_them() -> None:
    splits = squares()
    splits["test"].targets[:3] ^= 1  # type: ignore[index]  # wrong labels, which the classifier will not follow
    evidence = Evidence(Bright(32), splits)
    evidence.head = lambda pooled: pooled @ torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    report = grad_cam(images=12, steps=4)(evidence.backbone, evidence)
    assert list(report.scores) == ["insertion_auc", "deletion_auc", "pointing", "box_iou50"]
    assert report.scores["pointing"].value == 100 and report.scores["pointing"].n == 12
    assert report.scores["box_iou50"].value == 100  # a pixel more on each side, by the resizing
    assert report.scores["deletion_auc"].better == "lower"
    assert (report.details["layer"], report.details["grid"]) == ("conv", [8, 8])
    wrong = report.details["explanations"]
    assert sorted(entry["index"] for entry in wrong) == [0, 1, 2]
    assert [entry["predicted"] for entry in wrong] == [("light", "dim")[label] for label in _labels(splits, wrong)]
    assert wrong[0]["seen"] == pytest.approx([1 / 3, 0.25, 2 / 3, 0.75], abs=1e-4)  # the middle 32 x 32 of 96 x 64
    cells = np.frombuffer(base64.b64decode(wrong[0]["cells"]), np.uint8).reshape(wrong[0]["grid"])
    assert cells.max() == 255


def _labels(splits: dict[str, Split], entries: list[dict[str, Any]]) -> list[int]:
    """What the images of entries show, by their boxes."""
    return [int(splits["test"].target(entry["index"])["labels"][0]) for entry in entries]


def test_boxes_as_the_network_sees_them() -> None:
    split = squares()["test"]
    found = faithfulness.true_boxes(split, 0, Bright(32).preprocess)
    (label,) = found
    box = np.asarray(split.target(0)["boxes"])[0]
    assert label == split.targets[0]  # type: ignore[index]
    np.testing.assert_allclose(found[label][0], box - [32, 16, 32, 16])
    np.testing.assert_allclose(faithfulness.true_boxes(split, 0, Preprocess((32, 48), (0,), (1,)))[label][0], box / 2)


def test_a_network_without_cells_is_not_applicable() -> None:
    evidence = Evidence(Bright(32, flat=True), squares())
    with pytest.raises(NotApplicable, match=r"grad_cam: no part of Bright .* say layer="):
        grad_cam()(evidence.backbone, evidence)


def test_variants_and_what_they_refuse() -> None:
    assert (grad_cam(variant="full").images, grad_cam(variant="full", steps=3).steps) == (256, 3)
    with pytest.raises(UsageError, match="no variant 'quik'; did you mean quick"):
        grad_cam(variant="quik")
    with pytest.raises(UsageError, match="images is 0"):
        grad_cam(images=0)
    work = grad_cam(images=10, steps=4).work({"train": 5, "val": 5, "test": 40}, 3)
    assert work.forward == 10 * 10 + 30 + 48


def test_the_effect_measures_each_arm_and_judges_by_the_atlas() -> None:
    found = effect("toy", None)
    tiny = scenes.Scale((4, 6), 64, 16, 1)
    train, test = scenes.scenes(tiny, 0)
    assert train.targets is not None and test.targets is not None
    assert (len(train), len(test)) == (64, 16) and set(train.targets.sum(1)) == {1, 2}
    seen = [len(faithfulness.true_boxes(test, i, Preprocess((64, 64), (0.5,), (0.5,)))) for i in range(16)]
    assert set(seen) <= {1, 2} and seen.count(2) > 5
    marked = scenes.patched(train, "first")
    corner = [np.asarray(marked.image(i))[0, 0].tolist() == [230, 60, 200] for i in range(64)]
    np.testing.assert_array_equal(corner, train.targets[:, 0] > 0)
    for arm in found.arms:
        values = scenes.measure(tiny, None, arm, 0, Path())
        told = {name for name, value in values.items() if value == value}
        biased = {"map", "misled", "bias_mass"}
        assert set(values) == set(found.metrics)
        assert told == biased if "bia" in arm or arm == "rebalanced" else told >= {"map", "pointing", "occlusion"}

    def measured(**changes: float) -> Measured:
        good = {
            "pointing": 90.0,
            "box_iou50": 60,
            "moved": 95,
            "insertion_auc": 90,
            "deletion_auc": 10,
            "occlusion": 0.5,
        }
        good |= {"sanity": 0.1, "attacked": 80, "bias_mass": 80, "misled": 50} | changes
        bad = dict.fromkeys(good, 20.0) | {"sanity": 0.5, "deletion_auc": 50}
        arms = {arm: good if arm in ("grad_cam", "biased") else bad for arm in found.arms}
        return Measured({arm: {m: np.full(3, v) for m, v in values.items()} for arm, values in arms.items()})

    assert all(check.holds for check in found.checks(measured()))
    for name, value in (("pointing", 84.0), ("moved", 79), ("sanity", 0.31), ("occlusion", 0.29), ("attacked", 69)):
        assert sum(not check.holds for check in found.checks(measured(**{name: value}))) == 1, name


def test_the_effect_wants_boxes() -> None:
    with pytest.raises(UsageError, match="needs boxes"):
        effect("toy", digits())


def test_a_report_shows_where_contenders_looked(tmp_path: Path) -> None:
    """Beside the worst mistakes, of the part that the network saw; names are escaped, and nothing is fetched."""
    evil = '"><script>alert(1)</script>'
    cells = base64.b64encode(bytes([0, 0, 0, 255])).decode()
    looked = {"index": 3, "predicted": evil, "seen": [0.25, 0, 0.75, 1], "grid": [2, 2], "cells": cells}
    mistake = {"contender": "a", "split": "test", "index": 3, "name": "x.png", "truth": "cat", "predicted": evil}
    report = {
        "contenders": [{"name": "a"}, {"name": "b"}],
        "mistakes": [{**mistake, "contender": "b", "confidence": 0.8}, {**mistake, "confidence": 0.9}],
        "explanations": {"a": [looked]},
    }
    page = write_report(report, tmp_path, lambda split, index: Image.new("RGB", (80, 40), (0, 128, 0)))
    html = page.read_text()
    assert evil not in html and "what spoke for" in html
    sources = re.findall(r'<img class="looked" src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(sources) == 1
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources[0]))).convert("RGB")).astype(int)
    assert picture.shape == (96, 96, 3)
    assert picture[85, 85].sum() > picture[10, 10].sum() + 200
    gone = write_report(report, tmp_path, raising)
    assert 'class="looked"' not in gone.read_text()


def raising(split: str, index: int) -> Image.Image:
    raise OSError("gone")
