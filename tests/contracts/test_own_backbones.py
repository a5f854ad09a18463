"""Every backbone written here keeps the contract with real numbers: all pages with a variant `nano`, by discovery.

`nano` takes images of 32 pixels, has less than about a million parameters, and runs in milliseconds.
"""

import copy

import pytest
import torch
from torch import nn

from vertebra.contracts import Backbone, Batch, Progress
from vertebra.errors import UsageError
from vertebra.methods.supervised import Supervised
from vertebra.paper import pages
from vertebra.parity import difference, fill, images
from vertebra.probes.grad_cam.sites import site_of
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.tasks.classify import classify

PAGES = [p.name for p in pages() if p.kind == "backbones" and "timm" not in p.variants.get("nano", {"timm": ""})]
SIZES = [(32, 32), (64, 64), (33, 47), (64, 49)]


def nano(page: str, **options) -> Backbone:
    torch.manual_seed(0)
    return Spec(f"{page}/nano", options).build()


def taken(backbone: Backbone, size: tuple[int, int]) -> torch.Tensor | None:
    """Images of a size, or None where the backbone says that it takes another."""
    batch = images((2, backbone.preprocess.channels, *size))
    try:
        with torch.inference_mode():
            backbone.eval()(batch)
    except UsageError as error:
        assert "image_size=" in str(error) or "at least" in str(error) or "multiple" in str(error)  # it says what works
        return None
    return batch


def test_there_are_some():
    assert PAGES


@pytest.mark.parametrize("page", PAGES)
def test_nano_is_small(page):
    with torch.device("meta"):
        backbone = nano(page)
    assert backbone.preprocess.size == (32, 32)
    assert sum(p.numel() for p in backbone.parameters()) < 1.2e6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", PAGES)
def test_levels_at_any_size(page, size):
    backbone = nano(page)
    batch = taken(backbone, size)
    if batch is None:  # built for one size: then it can be built for this one, where its sides allow
        backbone = nano(page, image_size=(64, 64))
        batch = taken(backbone, (64, 64))
        assert batch is not None
    with torch.inference_mode():
        features = backbone(batch)
    assert features.pooled.shape == (2, backbone.width) and features.pooled.isfinite().all()
    for level, feature in zip(backbone.levels, features.pyramid, strict=True):
        assert feature.shape[:2] == (2, level.channels)
        sides = zip(batch.shape[2:], feature.shape[2:], strict=True)
        assert all(abs(side / level.stride - cells) <= 1 for side, cells in sides)
    if features.tokens is not None:  # special ones, and the last map's cells row by row, with or without a norm
        last = features.pyramid[-1]
        _, found = backbone.parted(features.tokens, (last.shape[2], last.shape[3]))
        found, last = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (found, last))
        torch.testing.assert_close(found, last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("page", PAGES)
def test_gradients_reach_every_parameter(page):
    backbone = fill(nano(page)).train()  # filled: gates that start at zero would stop what is behind them
    features = backbone(images((4, backbone.preprocess.channels, 32, 32)))
    outputs = (features.pooled, *features.pyramid)
    sum((x * images(tuple(x.shape)).to(x)).sum() for x in outputs).backward()  # type: ignore[union-attr]
    missing = [n for n, p in backbone.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_state_dict_and_copies(page):
    backbone, other = fill(nano(page)).eval(), nano(page).eval()
    batch = images((2, backbone.preprocess.channels, 32, 32))
    with torch.inference_mode():
        expected = backbone(batch).pooled
        assert not torch.equal(other(batch).pooled, expected)
        other.load_state_dict(backbone.state_dict())
        assert torch.equal(other(batch).pooled, expected)
        twin = copy.deepcopy(backbone)
        nn.init.zeros_(next(p for p in backbone.parameters() if p.ndim > 1))
        assert torch.equal(twin(batch).pooled, expected)


@pytest.mark.parametrize("page", PAGES)
def test_an_image_does_not_depend_on_its_neighbours(page):
    backbone = fill(nano(page)).eval()
    batch = images((2, backbone.preprocess.channels, 32, 32))
    with torch.inference_mode():
        assert difference(backbone(batch[:1]).pooled, backbone(batch).pooled[:1]) < 1e-4


@pytest.mark.parametrize("page", PAGES)
def test_bfloat16_stays_near_float32(page):
    backbone = nano(page).eval()
    batch = images((2, backbone.preprocess.channels, 32, 32))
    with torch.inference_mode():
        exact = backbone(batch).pooled
        rough = backbone.to(torch.bfloat16)(batch.to(torch.bfloat16)).pooled
    assert rough.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(exact, rough.float()).min() > 0.98


@pytest.mark.parametrize("page", PAGES)
def test_channels_last_gives_the_same_numbers(page):
    backbone = nano(page).eval()
    batch = images((2, backbone.preprocess.channels, 32, 32))
    with torch.inference_mode():
        plain = backbone(batch)
        last = backbone.to(memory_format=torch.channels_last)(batch.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last.pooled, plain.pooled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last.pyramid, plain.pyramid, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("page", PAGES)
def test_exports_and_compiles_in_one_graph(page):
    backbone = nano(page).eval()
    batch = images((2, backbone.preprocess.channels, 32, 32))
    with torch.inference_mode():
        expected = backbone(batch)
    exported = torch.export.export(backbone, (batch,)).module()
    torch.testing.assert_close(exported(batch).pooled, expected.pooled, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch).pooled, expected.pooled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("page", PAGES)
def test_other_channels_and_wrong_images(page):
    backbone = nano(page, channels=1).eval()
    with torch.inference_mode():
        assert backbone(images((1, 1, 32, 32))).pooled.isfinite().all()
        for wrong in ((1, 3, 32, 32), (1, 32, 32)):
            with pytest.raises(UsageError, match=r"1, H, W"):
                backbone(torch.zeros(wrong))


@pytest.mark.parametrize("page", PAGES)
def test_a_training_step_changes_what_it_says(page):
    model = classify(nano(page), ["one", "other"])
    batch = Batch(images((4, 3, 32, 32)), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(12):
        loss = sum(Supervised(model).train()(batch, Progress(step, 12, 0, 1)).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(loss.item())  # type: ignore[union-attr]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("page", PAGES)
def test_what_fuses_keeps_its_outputs(page):
    backbone = fill(nano(page)).eval()
    able = any(callable(getattr(module, "fused", None)) for module in backbone.modules())
    try:
        operated = fuse(backbone)  # proves its outputs itself
    except UsageError as error:
        assert not able and "nothing to fold" in str(error)
    else:
        assert operated.after.params <= operated.before.params


@pytest.mark.parametrize("page", PAGES)
def test_there_is_a_place_to_explain(page):
    model = classify(fill(nano(page)), ["one", "other"]).eval()
    site = site_of(model, images((1, 3, 32, 32)), score=lambda outputs: outputs["logits"][:, 0])
    assert min(site.grid) >= 1
