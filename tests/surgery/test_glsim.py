"""Looking twice: the reference's boxes, crops and outputs, what it costs, and what it must not do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.backbones.vim import vim
from vertebra.contracts import Measured
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.probes.attention_spectra import attention_maps
from vertebra.probes.grad_cam import explain, site_of
from vertebra.spec import Spec
from vertebra.surgery.glsim import GLSim, alike, boxes_of, cropped, experiment, extents, glsim, published
from vertebra.tasks.classify import classify

GOLDEN = Path(__file__).parent.parent / "golden" / "glsim.json"

CASES = {
    "t16": {},
    "cos": {},
    "l1": {"similarity": "l1"},
    "l2": {"similarity": "l2"},
    "one": {"select": 1},
    "few": {"select": 3},
    "blocks2": {"layers": 2},
}


def vit() -> Any:
    shape = {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    return fill(Spec("timm/vit_tiny_patch16_224", {"image_size": 64, "network": shape}).build()).eval()


def twice(backbone: Any, *args, **options) -> GLSim:
    model = glsim(backbone, *args, **options).model
    assert isinstance(model, GLSim)
    return model


def reference_names(depth: int, dim: int, side: int, patch: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's checkpoint with ten classes."""
    found: dict[str, tuple[int, ...]] = {
        "class_token": (1, 1, dim),
        "anchor_class_token": (1, 1, dim),
        "patch_embedding.weight": (dim, 3, patch, patch),
        "patch_embedding.bias": (dim,),
        "positional_embedding.pos_embedding": (1, (side // patch) ** 2 + 1, dim),
    }

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    for part, blocks in (("encoder", depth), ("aggregator", layers)):
        for place in (f"{part}.blocks.{number}" for number in range(blocks)):
            for name in ("attn.proj_q", "attn.proj_k", "attn.proj_v", "proj"):
                layer(f"{place}.{name}", dim, dim)
            layer(f"{place}.norm1", dim)
            layer(f"{place}.pwff.fc1", 4 * dim, dim)
            layer(f"{place}.pwff.fc2", dim, 4 * dim)
            layer(f"{place}.norm2", dim)
        layer(f"{part}_norm", dim)
    layer("head", 10, dim)
    return found


def reference_state(**shape: int) -> dict[str, Tensor]:
    """A checkpoint of the reference, filled as the reference was for the golden numbers."""
    root = nn.Module()
    for name, sides in reference_names(**shape).items():
        *path, leaf = name.split(".")
        place = root
        for step in path:
            if step not in dict(place.named_children()):
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        place.register_parameter(leaf, nn.Parameter(torch.empty(sides)))
    return fill(root).state_dict()


def test_the_names_are_the_references():
    listed = (line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"].split())
    known = {name: tuple(map(int, sides.split("x"))) for name, sides in listed}
    assert reference_names(depth=2, dim=128, side=64, patch=8, layers=1) == known


@pytest.mark.parametrize("case", CASES)
def test_boxes_crops_and_outputs_are_the_references(case):
    """With the weights of its checkpoint under our names."""
    expected = stored(GOLDEN, case)
    shape = {"depth": 2, "dim": 128, "side": 64, "patch": 8, "layers": 2 if case == "blocks2" else 1}
    if case == "t16":
        shape = {"depth": 12, "dim": 192, "side": 224, "patch": 16, "layers": 1}
    state = reference_state(**shape)
    backbone = Spec("timm/vit_tiny_patch16_224").build().eval() if case == "t16" else vit()
    model, x = twice(backbone, **CASES[case]), images(expected.shape)
    model.load_state_dict(published(state, model))
    with torch.inference_mode():
        boxes = model.boxes(x, model.inner(x))
        found = {
            "crops": cropped(x, boxes),
            "logits": F.linear(model(x).pooled, state["head.weight"], state["head.bias"]),
        }
    assert boxes.tolist() == json.loads(GOLDEN.read_text(encoding="utf-8"))["boxes"][case]
    apart = check_golden(found, expected.golden, tolerance=1e-4)
    assert apart["crops"] < 1e-5


def test_a_checkpoint_that_does_not_fit_is_refused():
    state = reference_state(depth=2, dim=128, side=64, patch=8, layers=2)
    with pytest.raises(ParityError, match="left over in the checkpoint"):
        published(state, twice(vit()))


@pytest.mark.parametrize("size", [(64, 64), (37, 50)])
def test_crops_are_torchs_resize_image_by_image(size):
    x = images((4, 3, *size))
    boxes = torch.tensor([[0, 0, *size], [3, 5, 4, 6], [8, 16, 32, 33], [size[0] - 9, 0, size[0], 8]])
    expected = [
        F.interpolate(one[None, :, top:bottom, left:right], size, mode="bilinear", align_corners=True)
        for one, (top, left, bottom, right) in zip(x, boxes.tolist(), strict=True)
    ]
    torch.testing.assert_close(cropped(x, boxes), torch.cat(expected), rtol=0, atol=1e-5)
    assert torch.equal(cropped(x, boxes)[0], x[0])


def test_both_conventions_of_a_box():
    cells = torch.tensor([[1, 2, 3, 2], [0, 0, 3, 3], [2, 0, 2, 1]])  # rows first: not columns
    assert boxes_of(cells, (4, 4), (32, 32), 8).tolist() == [[8, 16, 24, 24], [0, 0, 24, 24], [16, 0, 24, 8]]
    inclusive = boxes_of(cells, (4, 4), (32, 30), 8, "inclusive")
    assert inclusive.tolist() == [[8, 16, 32, 24], [0, 0, 32, 30], [16, 0, 24, 16]]
    assert boxes_of(cells, (4, 4), (7, 32), 8)[:, 0].tolist() == [1, 0, 2]  # cells finer than their stride


def test_extents_are_those_of_the_best_cells():
    scores = torch.zeros(2, 3, 5)
    scores[0, 0, 4], scores[0, 2, 1], scores[1, 1, 1:4] = 2, 1, 1
    assert extents(scores, 2)[0].tolist() == [0, 1, 2, 4] and extents(scores, 3)[1].tolist() == [1, 1, 1, 3]
    assert extents(scores, 99).tolist() == [[0, 0, 2, 4]] * 2


def test_similarities():
    torch.manual_seed(0)
    cells, vector = torch.randn(2, 6, 3, 4), torch.randn(2, 6)
    apart = cells - vector[:, :, None, None]
    torch.testing.assert_close(alike(cells, vector), F.cosine_similarity(cells, vector[:, :, None, None]))
    torch.testing.assert_close(alike(cells, vector, "l1"), -apart.abs().sum(1))
    torch.testing.assert_close(alike(cells, vector, "l2"), -apart.square().sum(1).sqrt())


def test_cost_is_two_looks_the_selection_and_the_aggregator():
    with torch.device("meta"):
        operated = glsim(Spec("timm/vit_base_patch16_224").build())
    assert operated.before.params + 1000 * 769 == 86_567_656
    assert operated.after.params + 1000 * 769 == 93_657_064
    aggregator = 2 * 12 * 768**2 + 2 * 2 * 2 * 768
    assert operated.after.macs == 2 * operated.before.macs + aggregator + 196 * 768
    assert operated.changed == ("",) and operated.after.resolution == (224, 224)
    assert 196 * 768 / operated.before.macs < 1e-5


def test_the_first_look_stays_what_it_was():
    backbone, x = vit(), images((2, 3, 64, 64))
    model = twice(backbone)
    with torch.inference_mode():
        found, alone = model(x), backbone(x)
    assert found.tokens is not None and alone.tokens is not None and torch.equal(found.tokens, alone.tokens)
    assert (
        model.special_tokens(65, 64) == (0,)
        and torch.equal(found.pyramid[0], alone.pyramid[0])
        and not torch.allclose(found.pooled, alone.pooled)
    )
    assert model.levels == backbone.levels and model.width == backbone.width and not model.training
    assert model.inner is not backbone and twice(backbone, inplace=True).inner is backbone


def test_the_second_look_is_at_the_box_alone():
    model, x = twice(vit(), select=2), images((1, 3, 64, 64))
    with torch.inference_mode():
        features = model.inner(x)
        top, left, bottom, right = model.boxes(x, features)[0].tolist()
        changed = x.clone()
        changed[:, :, :top] += 3
        outside, inside = (model.inner(cropped(some, model.boxes(x, features))).pooled for some in (changed, x))
        changed[:, :, top:bottom, left:right] += 3
        touched = model.inner(cropped(changed, model.boxes(x, features))).pooled
    assert (top, left) != (0, 0) and torch.equal(outside, inside) and not torch.allclose(touched, inside)


def test_no_gradient_goes_through_the_selection():
    model, x = twice(vit()).train(), images((2, 3, 64, 64)).requires_grad_()
    features = model.inner(x)
    boxes = model.boxes(x, features)
    assert not model.scores(features).requires_grad and not boxes.is_floating_point()
    model(x).pooled.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and x.grad is not None
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    both = torch.stack([model.inner(x).pooled, model.inner(cropped(x.detach(), boxes)).pooled], 1)
    model.norm(model.aggregator(both))[:, 0].square().sum().backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize("kind", ["vim", "mean", "cnn"])
def test_other_backbones(kind):
    """A class token among the others is known by its numbers; without one the mean of the cells is the whole."""
    if kind == "vim":
        backbone = fill(vim("nano")).eval()
    elif kind == "cnn":
        backbone = fill(cifar_resnet("nano")).eval()
    else:
        backbone = fill(
            Spec("timm/test_vit", {"image_size": 32, "network": {"patch_size": 8, "global_pool": "avg"}}).build()
        )
    model, x = twice(backbone.eval()), images((2, 3, 33, 47) if kind != "mean" else (2, 3, 32, 32))
    with torch.inference_mode():
        features, found = model.inner(x), model(x)
        vector = features.pooled if kind == "vim" else features.pyramid[-1].mean((2, 3))
        expected = F.cosine_similarity(features.pyramid[-1], vector[:, :, None, None])
    torch.testing.assert_close(model.scores(features), expected)
    boxes = model.boxes(x, features)
    assert found.pooled.shape == (2, model.width) and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= torch.tensor(x.shape[2:])).all()


def test_explanations_of_the_first_look():
    """The last call of a layer sees the crop; explanations lie on the image."""
    head, x = classify(twice(vit(), select=2), ("a", "b")).eval(), images((2, 3, 64, 64))
    site = site_of(head, x[:1])
    maps = [explain(head, x, 0, layer=replace(site, call=call)) for call in (0, 1)]
    assert site.call == 0 and site.grid == (8, 8) and maps[0].shape == (2, 64, 64) and maps[0].amax() > 0
    assert not torch.allclose(maps[0], maps[1])


def test_it_trains_exports_and_takes_half_precision():
    model, x = twice(vit()), images((2, 3, 64, 64))
    with torch.inference_mode():
        expected = model(x).pooled
    exported = torch.export.export(model, (x,)).module()(x)
    assert difference(exported.pooled, expected) < 1e-5
    head = classify(model, ("a", "b"))
    assert head(x)["logits"].shape == (2, 2)
    with torch.inference_mode():
        rough = twice(vit().bfloat16())(x.bfloat16())
    assert rough.pooled.dtype == torch.bfloat16
    assert F.cosine_similarity(rough.pooled.float(), expected).min() > 0.95
    parts = [p for part in model.trunk() for p in part.parameters()]
    assert len(parts) == len(set(parts)) and {*model.parameters()} - {*parts} == {
        model.inner.get_parameter(f"network.{name}") for name in ("cls_token", "pos_embed")
    }


def test_what_does_not_work_is_refused():
    backbone = vit()
    with pytest.raises(UsageError, match="is no backbone; wrap the backbone"):
        glsim(classify(backbone, ("a", "b")))
    with pytest.raises(UsageError, match="no variant 'ate'"):
        glsim(backbone, "ate")
    with pytest.raises(UsageError, match="select is 0"):
        glsim(backbone, select=0)
    with pytest.raises(UsageError, match="similarity is 'dot'; it can be cosine, l1, l2"):
        glsim(backbone, similarity="dot")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="crop is 'centre'; it can be reference, inclusive"):
        glsim(backbone, crop="centre")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 heads do not divide dim 128"):
        glsim(backbone, heads=3)
    with pytest.raises(UsageError, match="no map of the Timm has two cells at 8x8 pixels"):
        glsim(Spec("timm/test_vit", {"image_size": 8, "network": {"patch_size": 8}}).build())
    with pytest.raises(UsageError, match="takes images"):
        twice(backbone)(images((1, 4, 64, 64)))


def test_rollout_of_the_effect():
    """As the product of all maps, each with its residual."""
    backbone = vit()
    maps = [maps.after for maps in attention_maps(backbone, images((2, 3, 64, 64)))]
    whole = torch.eye(65).expand(2, 65, 65)
    for attention in maps:
        whole = (0.5 * attention.mean(1) + 0.5 * torch.eye(65)) @ whole
    torch.testing.assert_close(experiment.rollout(maps), whole[:, 0])


def test_scenes_of_the_effect():
    scenes = experiment._scenes(None, "train", 20, 0)
    again, other = experiment._scenes(None, "train", 20, 0), experiment._scenes(None, "test", 20, 0)
    assert np.array_equal(scenes.pixels, again.pixels) and not np.array_equal(scenes.pixels, other.pixels)
    assert (scenes.fine // 2 == scenes.coarse).all() and scenes.pixels.shape == (20, 64, 64, 3)
    for pixels, fine, (left, top, right, bottom) in zip(scenes.pixels, scenes.fine, scenes.boxes, strict=True):
        thing = pixels[top:bottom, left:right]
        assert thing.shape == (12, 12, 3)
        bar = thing[8:11, 9] if fine % 2 == 0 else thing[9, 8:11]
        assert (bar == 255).all() and (thing[8:11, 8:11] == 255).sum() == 9


def test_other_looks_of_the_effect():
    backbone, x = vit(), images((4, 3, 64, 64))
    looks = {name: kind(backbone, select=4).eval() for name, kind in experiment._LOOKS.items()}
    features = backbone(x)
    torch.manual_seed(0)
    boxes = {name: look.boxes(x, features) for name, look in looks.items()}
    assert boxes["whole"].tolist() == [[0, 0, 64, 64]] * 4
    torch.testing.assert_close(looks["whole"](x).pooled, GLSim.forward(looks["whole"], x).pooled)
    assert torch.equal(boxes["random"][:, 2:] - boxes["random"][:, :2], boxes["glsim"][:, 2:] - boxes["glsim"][:, :2])
    assert not torch.equal(boxes["random"], boxes["glsim"]) and not torch.equal(boxes["rollout"], boxes["glsim"])
    assert all((found >= 0).all() and (found[:, 2:] <= 64).all() for found in boxes.values())


def test_checks_of_the_effect_can_fail():
    def measured(glsim: float, iou: float, untrained: float) -> Measured:
        rows = {"vit": (60, np.nan, np.nan, np.nan), "random": (61, 8, 7, 0.1), "rollout": (63, 30, 9, 0.5)}
        rows |= {"glsim": (glsim, iou, untrained, 0.1)}
        names = ("top1", "iou", "untrained", "select")
        return Measured(
            {arm: {n: np.full(3, float(v)) for n, v in zip(names, row, strict=True)} for arm, row in rows.items()}
        )

    assert [check.holds for check in experiment._checks(measured(63, 30, 9))] == [True] * 6
    assert [check.holds for check in experiment._checks(measured(61.5, 12, 14))] == [False] * 3 + [True, False, False]
