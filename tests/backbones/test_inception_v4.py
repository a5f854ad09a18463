"""Inception-ResNet-v1 and the paper's v2: facenet-pytorch's outputs and keys, the figures' shapes, shared openings."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vertebra.backbones.inception_v4 import Branches, inception_v4, published
from vertebra.blocks.scaled_residual import ScaledResidual
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "inception_v4.json"


def theirs() -> dict[str, torch.Tensor]:
    """A checkpoint with facenet-pytorch's names and shapes, every number another one."""
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["resnet_v1_final"]
    shapes = {
        f"{module}.{name}".lstrip("."): shape
        for module, kind in keys["modules"].items()
        for name, shape in keys["names"][kind].items()
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_outputs_are_facenets():
    known = stored(GOLDEN, "resnet_v1_final")
    with torch.inference_mode():
        found = named(fill(inception_v4("resnet_v1", final=True)).eval()(images(known.shape)))
    assert max(check_golden(found, known.golden, 1e-5).values()) < 1e-5


def test_facenets_keys_become_ours():
    state = theirs()
    with torch.device("meta"):
        backbone = inception_v4("resnet_v1", final=True)
    found = published(state, backbone)
    assert found.keys() == backbone.state_dict().keys()
    shared = found["stages.2.3.layer.0.shared.0.weight"]  # three branches open with 32 channels each
    for number, name in enumerate(("branch0.conv", "branch1.0.conv", "branch2.0.conv")):
        assert torch.equal(shared[32 * number : 32 * number + 32], state[f"repeat_1.2.{name}.weight"])
    assert torch.equal(found["stages.3.0.branches.0.0.0.weight"], state["mixed_6a.branch0.conv.weight"])
    assert torch.equal(found["stages.3.0.branches.1.1.1.running_var"], state["mixed_6a.branch1.2.bn.running_var"])
    assert torch.equal(found["stages.4.6.layer.1.bias"], state["block8.conv2d.bias"])
    learned = sum(t.numel() for name, t in state.items() if "running" not in name)
    assert learned == 23_482_624
    assert learned - 512 * (1792 + 2) == sum(p.numel() for p in backbone.parameters())
    with torch.device("meta"), pytest.raises(ParityError, match=r"left over in the checkpoint: block8\."):
        published(state, inception_v4("resnet_v1"))


@pytest.mark.parametrize(
    ("variant", "channels"),
    [("resnet_v1", (64, 192, 256, 896, 1792)), ("resnet_v2_paper", (64, 192, 384, 1152, 2144))],
)
def test_maps_are_those_of_the_figures(variant, channels):
    with torch.device("meta"):
        backbone = inception_v4(variant)
        features = backbone(torch.empty(1, 3, 299, 299))
    assert [tuple(level.shape[1:]) for level in features.pyramid] == list(
        zip(channels, (147, 71, 35, 17, 8), (147, 71, 35, 17, 8), strict=True)
    )
    assert [level.stride for level in backbone.levels] == [2, 4, 8, 16, 32]
    blocks = [module for module in backbone.modules() if isinstance(module, ScaledResidual)]
    assert [block.scale for block in blocks] == [0.17] * 5 + [0.1] * 10 + [0.2] * 5


def test_last_module_is_unscaled_and_not_rectified():
    backbone = fill(inception_v4("nano", final=True)).eval()
    last = backbone.stages[-1][-1]
    assert last.scale == 1.0 and last.activation is None
    with torch.inference_mode():
        features = backbone(images((2, 3, 32, 32)))
    assert features.pyramid[-1].min() < 0 <= features.pyramid[-2].min()


def test_shared_opening_is_the_branches_side_by_side():
    """Against branches that run one by one, each with its slice of the convolution that opens them."""
    module = fill(inception_v4("nano").stages[2][1].layer[0]).eval()
    assert isinstance(module, Branches) and module.widths == [8, 8, 8]
    x = images((2, 64, 5, 4))
    conv, norm = module.shared[0], module.shared[1]
    expected = []
    with torch.inference_mode():
        for number, branch in enumerate(module.branches):
            part = slice(8 * number, 8 * number + 8)
            opened = nn.functional.conv2d(x, conv.weight[part])
            statistics = norm.running_mean[part], norm.running_var[part], norm.weight[part], norm.bias[part]
            expected.append(branch(nn.functional.batch_norm(opened, *statistics, eps=1e-3).relu()))
        torch.testing.assert_close(module(x), torch.cat(expected, 1))


@pytest.mark.parametrize(("stem_stride", "least"), [(2, 75), (1, 39)])
def test_smallest_images(stem_stride, least):
    with torch.device("meta"):
        backbone = inception_v4("resnet_v1", stem_stride=stem_stride).eval()
        assert backbone(torch.empty(1, 3, least, least)).pyramid[-1].shape[2:] == (1, 1)
        with pytest.raises(UsageError, match=f"at least {least}x{least}"):
            backbone(torch.empty(1, 3, least - 1, least))


def test_drop_path_drops_residuals_in_training_alone():
    backbone, x = fill(inception_v4("nano", drop_path=0.9, scales=(1.0, 1.0, 1.0))), images((4, 3, 32, 32))
    torch.manual_seed(0)
    assert not torch.equal(backbone.train()(x).pooled, backbone(x).pooled)
    with torch.inference_mode():
        assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="has no variant 'resnet_v3'"):
        inception_v4("resnet_v3")
    with pytest.raises(UsageError, match="v4 is timm's network and has no option final; resnet_v1"):
        inception_v4("v4", final=True)
    with pytest.raises(UsageError, match="nano is none of timm's networks"):
        inception_v4("nano", network={"pad_type": "same"})
    with pytest.raises(UsageError, match=r"depths \(1, 1\)"):
        inception_v4("nano", depths=(1, 1))  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="width is 0"):
        inception_v4("nano", width=0)
    with pytest.raises(UsageError, match="padding is 'full'; it can be valid or same"):
        inception_v4("nano", padding="full")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="stem_stride is 3"):
        inception_v4("nano", stem_stride=3)
