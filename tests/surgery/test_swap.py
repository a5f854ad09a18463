"""Swap: any kind of layer by any block, in any network, and nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.eca import ECA, eca
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap
from vertebra.tasks.classify import classify


def backbone(name: str = "test_resnet", size: int | None = 32):
    torch.manual_seed(0)
    return Spec(f"timm/{name}", {"image_size": size} if size else {}).build().eval()


def of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def test_by_class_name_by_class_by_pattern_and_by_predicate():
    model = backbone("efficientnet_b0")
    wanted = [name for name, module in model.named_modules() if type(module).__name__ == "SqueezeExcite"]
    kind = type(model.get_submodule(wanted[0]))
    for what in ("SqueezeExcite", kind, "*.se", lambda name, layer: isinstance(layer, kind)):
        operated = swap(model, what, "eca")
        assert list(operated.changed) == of(operated.model, ECA) == wanted and len(wanted) == 16
    assert operated.before.params > operated.after.params and operated.before.macs > operated.after.macs


def test_what_a_block_requires_comes_from_the_layer():
    model, seen = backbone(), {}

    def block(layer: nn.Conv2d, name: str) -> nn.Module:
        seen[name] = layer
        return nn.Conv2d(layer.in_channels, layer.out_channels, 3, layer.stride, 1, bias=False)

    operated = swap(model, lambda name, layer: name.endswith("conv2"), block)
    assert tuple(seen) == operated.changed and all(isinstance(layer, nn.Conv2d) for layer in seen.values())
    groups = swap(model, "BatchNorm2d", nn.GroupNorm, num_groups=4)
    for name in groups.changed:
        assert groups.model.get_submodule(name).num_channels == model.get_submodule(name).num_features
        assert groups.model.get_submodule(name).num_groups == 4
    smooth = swap(model, nn.ReLU, nn.GELU)
    assert of(smooth.model, nn.ReLU) == [] and len(of(smooth.model, nn.GELU)) == len(smooth.changed)
    given = swap(model, "*.act2", eca, kernel=9)
    assert given.model.get_submodule(given.changed[0]).conv.weight.shape == (1, 1, 9)


def test_channels_of_tokens_are_the_last_dimension():
    widths = []

    def block(dim: int) -> nn.Module:
        widths.append(dim)
        return nn.LayerNorm(dim)

    model = backbone("test_vit", None)
    swap(model, "*.norm1", block)
    assert widths == [model.width] * len(widths) and widths
    swin = backbone("swin_tiny_patch4_window7_224", 64)  # maps (B, H, W, C): the norm says its channels
    widths.clear()
    swap(swin, "*.blocks.0.norm1", block)
    assert widths == [96, 192, 384, 768]


def test_a_block_can_stand_before_or_after_the_layer():
    model = backbone()
    for place, position in (("after", 1), ("before", 0)):
        operated = swap(model, "*.bn2", "eca", place=place)
        for name in operated.changed:
            both = operated.model.get_submodule(name)
            assert isinstance(both[position], ECA)
            assert torch.equal(both[1 - position].weight, model.get_submodule(name).weight)
        added = sum(
            p.numel() for name in of(operated.model, ECA) for p in operated.model.get_submodule(name).parameters()
        )
        assert operated.after.params - operated.before.params == added > 0
    # after a convolution the block has as many channels as come out of it
    widths = []
    swap(model, "network.layer2.0.conv1", lambda c: widths.append(c) or nn.Identity(), place="after")
    assert widths == [model.network.layer2[0].conv1.out_channels]


def test_nothing_else_changes():
    model = backbone()
    x, state = images((2, 3, 32, 32)), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operated = swap(model, "*.layer4.*.act2", lambda layer: layer)
    assert torch.equal(operated.model(x).pooled, model(x).pooled)
    other = swap(model, "*.act2", "eca").model
    assert of(model, ECA) == [] and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert other.levels == model.levels and other.width == model.width
    with torch.inference_mode():
        features = other(images((2, 3, 47, 33)))
    assert [f.shape[1] for f in features.pyramid] == [level.channels for level in other.levels]
    assert features.pooled.shape == (2, model.width)
    assert [type(part) for part in other.trunk()] == [type(part) for part in model.trunk()]


def test_inplace_changes_the_model_itself():
    model = backbone()
    operated = swap(model, nn.ReLU, nn.SiLU, inplace=True)
    assert operated.model is model and len(of(model, nn.SiLU)) == len(operated.changed)


def test_device_type_mode_and_frozen_flags_are_kept():
    model = backbone().bfloat16()
    model.network.layer1.train()
    model.network.layer2.requires_grad_(False)
    changed = swap(model, "BatchNorm2d", nn.GroupNorm, num_groups=2).model
    first, second = changed.network.layer1[0].bn2, changed.network.layer2[0].bn2
    assert isinstance(second, nn.GroupNorm) and first.weight.dtype == torch.bfloat16
    assert first.training and not second.training and not changed.network.bn1.training
    assert first.weight.requires_grad and not second.weight.requires_grad and not second.bias.requires_grad
    # an added block is new, and is trained even behind a frozen layer
    assert swap(model, "*.layer2.0.bn2", "eca", place="after").model.network.layer2[0].bn2[1].conv.weight.requires_grad
    assert model.network.layer1.training and not model.network.layer2.training
    with torch.device("meta"):
        empty = Spec("timm/test_resnet", {"image_size": 32}).build()
    assert swap(empty, "*.act2", "eca").model.network.layer1[0].act2.conv.weight.device.type == "meta"


def test_a_layer_in_two_places_is_one_block_in_two_places():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.ReLU()
            self.idle = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) - 1)

    operated = swap(Twice(), nn.ReLU, "eca", images=(6, 4, 4))
    assert operated.changed == ("one", "two") and operated.model.one is operated.model.two
    assert isinstance(operated.model.idle, nn.ReLU), "the forward pass never meets it"


def test_outermost_layers_win():
    operated = swap(backbone(), lambda name, layer: "layer3" in name, lambda layer: layer)
    assert operated.changed == ("network.layer3",)


def test_a_task_model_is_changed_inside_and_still_trains():
    model = classify(backbone(), ["a", "b"]).train()
    operated = swap(model, "*.bn2", "eca", place="after")
    assert all(name.startswith("backbone.network.") for name in operated.changed)
    losses = operated.model.losses(operated.model(images((4, 3, 32, 32))), torch.tensor([0, 1, 0, 1]))
    losses["classify"].backward()
    assert all(p.grad is not None for name, p in operated.model.named_parameters() if "bn2.1" in name)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("SqueezeExcit", r"no layer of the Timm is 'SqueezeExcit'; did you mean SqueezeExcite.*it has Conv2d \(81\)"),
        ("*.bn9", r"is '\*\.bn9'"),
        (nn.LSTM, r"is LSTM; it has Conv2d"),
    ],
)
def test_nothing_changed_is_an_error_that_says_what_there_is(what, message):
    with pytest.raises(UsageError, match=message):
        swap(backbone("efficientnet_b0"), what, "eca")


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was():
    model = backbone()
    before = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match=r"the output .* would have shape \(1, 8, .* in place of"):
        swap(model, "network.layer4", lambda c: nn.Conv2d(c, 8, 1), inplace=True)
    with pytest.raises(UsageError, match=r"cannot run with 'eca' in these places|would have shape"):
        swap(model, "*.layer2.0.conv1", "eca", inplace=True)
    with pytest.raises(UsageError, match="requires num_groups and num_channels"):
        swap(model, "BatchNorm2d", nn.GroupNorm, inplace=True)
    with pytest.raises(UsageError, match="returned a str"):
        swap(model, "BatchNorm2d", lambda layer: "norm", inplace=True)
    with pytest.raises(UsageError, match="did you mean eca"):
        swap(model, "*.act2", "ecca", inplace=True)
    with pytest.raises(UsageError, match="has no option 'kernels'"):
        swap(model, "*.act2", "eca", inplace=True, kernels=3)
    with pytest.raises(UsageError, match="place is 'behind'"):
        swap(model, "*.act2", "eca", place="behind")
    with pytest.raises(UsageError, match=r"give images="):
        swap(nn.Sequential(nn.ReLU()), nn.ReLU, nn.GELU)
    assert [type(module) for module in model.modules()] == before


class _Attn(nn.Module):
    def forward(self, x: Tensor, attn_mask: bool | None = None, is_causal: bool = False) -> Tensor:
        return x


class _Masked(nn.Module):
    """Calls its layer as timm's transformers call attentions."""

    def __init__(self, mask: bool | None) -> None:
        super().__init__()
        self.attn, self.mask = _Attn(), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, attn_mask=self.mask, is_causal=False)


def test_a_block_need_not_take_what_says_nothing():
    made = swap(_Masked(None), "attn", lambda channels: nn.Conv2d(channels, channels, 1), images=(3, 8, 8)).model
    assert made(images((1, 3, 8, 8))).shape == (1, 3, 8, 8)
    model = _Masked(True)
    with pytest.raises(UsageError, match="Conv2d is called with attn_mask, which it does not take"):
        swap(model, "attn", lambda channels: nn.Conv2d(channels, channels, 1), images=(3, 8, 8), inplace=True)
    assert isinstance(model.attn, _Attn)


def test_swapped_networks_export():
    model = fill(swap(backbone(), "*.act2", "eca").model)
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        expected = model(x).pooled
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x).pooled, expected, rtol=1e-4, atol=1e-5)
