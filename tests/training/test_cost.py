import pytest
import torch
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.errors import UsageError
from vertebra.training.cost import count


class Attention(nn.Module):
    """One head over the pixels of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, images):
        query, key, value = self.qkv(images.flatten(2).mT).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_convolution_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    cost = count(network, size=(10, 12), channels=3)
    assert (cost.params, cost.macs, cost.activations) == (3 * 8 * 9 + 16, 120 * 8 * 27, 120 * 8)
    assert cost.resolution == (10, 12)


def test_groups_and_strides():
    cost = count(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), size=(16, 16), channels=8)
    assert (cost.macs, cost.activations) == (64 * 8 * 9, 64 * 8)


def test_both_products_of_fused_attention_count():
    cost = count(Attention(4), size=(5, 5), channels=4)
    assert cost.macs == 25 * 4 * 12 + 2 * 25 * 25 * 4
    assert cost.activations == 25 * 12


@pytest.mark.parametrize(
    ("name", "gmacs", "activations_m"),
    [
        ("efficientnet_b0", 0.386, 6.75),  # activations as pycls counts them
        ("regnetz_005", 0.507, 5.86),
        ("deit_tiny_patch16_224", 1.25, None),
    ],
)
def test_published_counts(name, gmacs, activations_m):
    with torch.device("meta"):
        backbone = timm(name)
    cost = count(backbone)
    assert (cost.macs + 1000 * backbone.width) / 1e9 == pytest.approx(gmacs, rel=0.01)
    if activations_m:
        assert cost.activations / 1e6 == pytest.approx(activations_m, rel=0.01)


def test_counting_touches_nothing():
    torch.manual_seed(0)
    backbone = timm("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    cost = count(backbone, size=(64, 64))
    assert cost.macs > 0 and backbone.training
    for name, tensor in backbone.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, before[name])


def test_real_and_meta_networks_cost_the_same():
    with torch.device("meta"):
        twin = timm("test_vit")
    assert count(timm("test_vit").bfloat16()) == count(twin)


def test_size_must_be_known():
    with pytest.raises(UsageError, match="size and channels"):
        count(nn.Conv2d(3, 8, 3))
