"""Residual branches are found in networks of every kind, and gated by one scalar each."""

import pytest
import torch
from torch import nn

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.branches import branches
from vertebra.surgery.rezero import rezero

COUNTS = {
    "timm/resnet18": 8,
    "timm/resnet50d": 16,
    "timm/res2net50_26w_4s": 16,
    "timm/resnetv2_50": 16,
    "timm/efficientnet_b0": 9,
    "timm/convnext_atto": 12,
    "timm/vit_tiny_patch16_224": 24,
    "timm/swin_tiny_patch4_window7_224": 24,
    "timm/poolformer_s12": 24,
    "timm/densenet121": 0,
    "cifar_resnet/20": 9,
}


@pytest.mark.parametrize("address", COUNTS)
def test_every_branch_is_found(address):
    with torch.device("meta"):
        backbone = Spec(address).build()
    assert len(branches(backbone, (3, *backbone.preprocess.size))) == COUNTS[address]


def test_what_a_branch_is():
    found = branches(cifar_resnet("nano"), (3, 32, 32))
    assert [branch.end for branch in found] == [f"blocks.{number}.branch" for number in range(3)]
    assert found[0].inside[:2] == ("blocks.0.branch.0", "blocks.0.branch.1")
    assert found[0].activation == "blocks.0.activation"


def test_a_gated_network_starts_as_its_shortcuts():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    network, x = fill(Net()).eval(), images((2, 4, 8, 8))
    operated = rezero(network, images=(4, 8, 8))
    assert operated.changed == ("layers.0", "layers.1")
    assert operated.after.params - operated.before.params == 2
    assert torch.equal(operated.model(x), x)
    torch.testing.assert_close(rezero(network, start=1.0, images=(4, 8, 8)).model(x), network(x))
    assert not torch.equal(network(x), x)  # the original stays


def test_activations_move_inside_and_norms_go():
    backbone = cifar_resnet("nano")
    operated = rezero(backbone, activation="inside", norms="remove")
    model = operated.model
    assert operated.changed == ("blocks.0.branch", "blocks.1.branch", "blocks.2.branch")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.get_submodule("blocks").modules())
    assert isinstance(model.get_submodule("blocks.0.activation"), nn.Identity)
    assert isinstance(model.get_submodule("blocks.0.branch.1"), nn.ReLU)
    assert model.get_parameter("blocks.0.branch.2.alpha").item() == 0


def test_vits_lose_their_norms_and_learn():
    backbone = Spec("timm/test_vit", {"image_size": 32}).build()
    operated = rezero(backbone, norms="remove", inplace=True)
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)]
    assert operated.model is backbone and all("blocks" not in name for name in names)
    backbone.train()(images((2, 3, 32, 32))).pooled.square().sum().backward()
    gates = [backbone.get_parameter(f"{name}.1.alpha") for name in operated.changed]
    assert all(gate.grad is not None and gate.grad.abs() > 0 for gate in gates)


def test_what_has_no_branches_is_refused():
    with pytest.raises(UsageError, match="no residual branch"):
        rezero(Spec("timm/vgg11", {"image_size": 32}).build())
    with pytest.raises(UsageError, match="leave activation='behind'"):
        rezero(Spec("timm/test_vit", {"image_size": 32}).build(), activation="inside")
    with pytest.raises(UsageError, match="norms is 'drop'"):
        rezero(cifar_resnet("nano"), norms="drop")  # type: ignore[arg-type]
