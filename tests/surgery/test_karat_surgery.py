"""Learned operators in the attentions of networks of every kind that is known, of each block's own or shared."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.blocks.attention import attention
from vertebra.blocks.karat import KArAttention, RowOperator
from vertebra.contracts import Backbone
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.karat import karat
from vertebra.training.cost import count

VIT = {"embed_dim": 12, "depth": 3, "num_heads": 2}
NETWORKS = {  # timm's name, size, keywords, tokens and heads of each attention
    "vit": ("vit_tiny_patch16_224", 32, {**VIT, "patch_size": 8}, [(17, 2)] * 3),
    "deit": ("deit_tiny_distilled_patch16_224", 32, {**VIT, "patch_size": 8}, [(18, 2)] * 3),
    "convit": ("convit_tiny", 32, {**VIT, "patch_size": 8, "local_up_to_layer": 2}, [(16, 2), (16, 2), (17, 2)]),
    "swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        [(16, 2), (16, 2), (16, 4), (16, 4)],
    ),
}


def backbone(name: str) -> Backbone:
    address, size, network, _ = NETWORKS[name]
    torch.manual_seed(0)
    return fill(Spec(f"timm/{address}", {"image_size": size, "network": network}).build()).eval()


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_attention_is_taken_over(name, mode):
    model, shapes = backbone(name), NETWORKS[name][3]
    operated = karat(model, mode, grid=2, r=3)
    blocks = [module for module in operated.model.modules() if isinstance(module, KArAttention)]
    assert len(operated.changed) == len(blocks) == len(shapes)
    assert [(block.operator.tokens, block.operator.heads) for block in blocks] == shapes
    assert not any(isinstance(module, KArAttention) for module in model.modules())  # the original stays
    own = shapes if mode == "blockwise" else sorted(set(shapes))
    added = sum(heads * (2 * 2 + 3) * tokens * 3 for tokens, heads in own)
    assert operated.after.params - operated.before.params == added
    assert operated.before == count(model) and operated.after == count(operated.model)
    keeps_the_contract(model, operated.model)


def keeps_the_contract(before: Backbone, after: nn.Module) -> None:
    """Shapes at the native and at an odd size, gradients, and every parameter in one part."""
    assert isinstance(after, Backbone)
    for size in ((32, 32), (47, 33)):
        try:
            expected = before(images((2, 3, *size)))
        except UsageError:
            continue  # ConViT has one size
        found = after(images((2, 3, *size)))
        assert [f.shape for f in found.pyramid] == [f.shape for f in expected.pyramid]
        assert found.pooled.isfinite().all() and not torch.allclose(found.pooled, expected.pooled)
    after.train()(images((2, 3, 32, 32))).pooled.square().sum().backward()
    trained = [p for p in after.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    inside = [parameter for part in after.trunk() for parameter in part.parameters()]
    assert len(inside) == len(set(inside))


def test_universal_operators_are_one():
    model = karat(backbone("vit"), "universal", operator="g1", r=3, base="silu").model
    blocks = [module for module in model.modules() if isinstance(module, KArAttention)]
    assert len({id(block.operator) for block in blocks}) == 1
    names = [name for name in model.state_dict() if ".operator." in name]
    assert len(names) == 4 and all(name.startswith("network.blocks.0.attn.operator.") for name in names)
    copied = [module for module in copy.deepcopy(model).modules() if isinstance(module, KArAttention)]
    assert len({id(block.operator) for block in copied}) == 1 and copied[0].operator is not blocks[0].operator
    x = images((2, 3, 32, 32))
    other = fill(karat(backbone("vit"), "universal", operator="g1", r=3, base="silu").model)
    assert not torch.equal(other(x).pooled, model(x).pooled)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x).pooled, model(x).pooled)
    with torch.no_grad():  # and the last block uses it
        moved = blocks[2](images((1, 17, 12)))
        blocks[0].operator.mixing.mul_(2)
        assert not torch.allclose(blocks[2](images((1, 17, 12))), moved)


def test_blockwise_operators_are_each_blocks_own():
    model = karat(backbone("vit"), "blockwise", r=3).model
    operators = [module for module in model.modules() if isinstance(module, RowOperator)]
    assert len(operators) == 3 and operators[0].basis_weight.shape == (2, 3, 17)
    assert not torch.equal(operators[0].coefficients, operators[1].coefficients)


def test_a_pattern_chooses_and_the_rest_stays():
    model = backbone("vit")
    operated = karat(model, "blockwise", what="*.blocks.1.*", r=2, inplace=True)
    assert operated.model is model and operated.changed == ("network.blocks.1.attn",)
    again = karat(model, "blockwise", r=2)  # what is inside of ours is left alone
    assert again.changed == ("network.blocks.0.attn", "network.blocks.2.attn")


def test_our_own_attention_in_any_network():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention(12, heads=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.flatten(2).mT)

    operated = karat(fill(Net()), "blockwise", images=(12, 4, 4), r=2)
    assert operated.changed == ("attention",) and operated.model(images((2, 12, 4, 4))).shape == (2, 16, 12)


def test_exports():
    model = karat(backbone("vit"), "universal", r=2).model.eval()
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        exported = torch.export.export(model, (x,)).module()(x)
        torch.testing.assert_close(exported.pooled, model(x).pooled, rtol=1e-4, atol=1e-5)


def test_nothing_changed_and_wrong_options_are_errors():
    with pytest.raises(UsageError, match=r"no attention of the Sequential .* Tanh \(2\)"):
        karat(nn.Sequential(nn.Tanh(), nn.Tanh()), "blockwise", images=(3, 8, 8))
    with pytest.raises(UsageError, match="no attention of the"):
        karat(cifar_resnet("nano"), "universal")
    with pytest.raises(UsageError, match=r"mode is 'global'; it can be blockwise or universal"):
        karat(cifar_resnet("nano"), "global")
    with pytest.raises(UsageError, match="has no operator 'g33'"):
        karat(cifar_resnet("nano"), "universal", operator="g33")
    with pytest.raises(UsageError, match="has no option tokens"):
        karat(cifar_resnet("nano"), "universal", tokens=4)
