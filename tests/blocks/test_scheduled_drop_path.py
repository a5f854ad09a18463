"""ScheduledDropPath: its probability, its mean, its progress, and its place in a network of timm's."""

import pytest
import torch

from vertebra.blocks.scheduled_drop_path import ScheduledDropPath, scheduled_drop_path, set_progress
from vertebra.errors import UsageError
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


@pytest.mark.parametrize("progress", [0.25, 0.5, 1.0])
def test_whole_images_are_dropped_with_the_scheduled_probability_and_the_mean_stays(progress):
    torch.manual_seed(0)
    block = scheduled_drop_path(drop=0.4, progress=progress).train()
    x = torch.ones(20_000, 3, 2, 1)
    out = block(x)
    per_image = out.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))  # an image is dropped as a whole
    stays = 1 - 0.4 * progress
    assert (per_image[:, 0] == 0).float().mean().item() == pytest.approx(1 - stays, abs=0.012)
    assert per_image.max().item() == pytest.approx(1 / stays)
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_nothing_is_dropped_at_the_start_and_in_evaluation():
    x = torch.randn(64, 5, 4)
    block = scheduled_drop_path(drop=0.9, progress=0.0).train()
    assert torch.equal(block(x), x)
    block.progress = 1.0
    torch.manual_seed(0)
    assert (block(x) == 0).flatten(1).all(1).sum() > 40
    assert torch.equal(block.eval()(x), x)


def test_gradients_are_those_of_what_survives_and_types_stay():
    torch.manual_seed(1)
    x = torch.ones(16, 3, dtype=torch.bfloat16, requires_grad=True)
    out = scheduled_drop_path(drop=0.5).train()(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


def test_it_takes_the_place_of_timms_drop_paths_and_a_network_is_told_its_progress():
    backbone = Spec("timm/convnext_atto", {"drop_path": 0.2, "image_size": 32}).build()
    changed = swap(backbone, "DropPath", "scheduled_drop_path", drop=0.3).model
    blocks = [module for module in changed.modules() if isinstance(module, ScheduledDropPath)]
    assert len(blocks) == 11 and set_progress(changed, 0.5) == 11
    assert {(block.drop, block.progress) for block in blocks} == {(0.3, 0.5)}
    assert set_progress(backbone, 0.5) == 0
    x = torch.randn(8, 3, 32, 32)
    changed.train()
    torch.manual_seed(0)
    first = changed(x).pooled
    assert not torch.equal(changed(x).pooled, first)
    set_progress(changed, 0.0)
    assert torch.equal(changed(x).pooled, changed(x).pooled)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(UsageError, match=r"drop is 1\.0; it must be in"):
        scheduled_drop_path(drop=1.0)
    with pytest.raises(UsageError, match="progress is 2"):
        scheduled_drop_path(progress=2)
    with pytest.raises(UsageError, match=r"progress is -0\.1"):
        set_progress(torch.nn.ReLU(), -0.1)
