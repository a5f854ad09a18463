"""Fuse: every norm that can be folded is, none that cannot, and the outputs stay."""

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from vertebra.errors import ParityError, UsageError
from vertebra.parity import compare, fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.tasks.classify import classify


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def built(address: str, size: int | None = 64) -> nn.Module:
    return fill(Spec(address, {"image_size": size} if size else {}).build()).eval()


@pytest.mark.parametrize(
    ("address", "folded"),
    [
        ("timm/resnet18", 20),
        ("timm/mobilenetv2_100", 52),
        ("timm/efficientnet_b0", 49),
        ("timm/regnetx_002", 44),
        ("vovnet/39", 39),
        ("eca_net/resnet18", 20),
    ],
)
def test_every_norm_of_a_family_is_folded_and_outputs_stay(address, folded):
    model = built(address)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operated = fuse(model)
    assert len(operated.changed) == len(set(operated.changed)) == folded == len(norms(model))
    assert norms(operated.model) == []
    assert max(compare(operated.model, model).values()) < 1e-5  # at an odd size too
    assert operated.before.macs == operated.after.macs
    # gains are gone and shifts have become biases
    gains = sum(model.get_submodule(name).weight.numel() for name in operated.changed)
    assert operated.before.params - operated.after.params == gains
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_padding_of_tensorflow_and_squeezes_change_nothing():
    model = built("efficientnet/b0", 65)  # convolutions that pad by themselves
    assert max(compare(fuse(model).model, model, images((2, 3, 65, 51))).values()) < 1e-5


def test_norms_before_the_convolution_stay():
    model = built("timm/densenet121", 32)
    operated = fuse(model)
    left = norms(operated.model)
    assert [name for name in left if name.endswith("norm2")] == []
    assert len([name for name in left if name.endswith("norm1")]) == 58
    assert len(left) == 62 and len(operated.changed) == 59
    assert max(compare(operated.model, model, images((2, 3, 32, 33))).values()) < 1e-5


def test_linear_layers_with_a_norm_behind_a_flatten():
    torch.manual_seed(0)
    model = Spec("timm/levit_128s").build().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    operated = fuse(model)
    assert norms(operated.model) == [] and any("qkv.bn" in name for name in operated.changed)
    assert max(compare(operated.model, model, images((2, 3, 224, 224))).values()) < 1e-5


@pytest.mark.parametrize("address", ["timm/convnext_atto", "timm/test_vit", "timm/nf_resnet26"])
def test_nothing_to_fold_is_an_error_that_says_what_there_is(address):
    model = built(address, None)
    with pytest.raises(UsageError, match=r"nothing to fold in the Timm.*it has .*(Conv2d|Linear) \(\d+\)"):
        fuse(model)


def test_swin_has_none():
    model = Spec("timm/swin_tiny_patch4_window7_224", {"image_size": 64}).build().eval()
    with pytest.raises(UsageError, match=r"nothing to fold.*LayerNorm \(29\)"):
        fuse(model)


class Odd(nn.Module):
    """Grouped and transposed convolutions of every dimension, a norm without gain, timm's norm with activation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, 2, 1, groups=2)
        self.act = BatchNormAct2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2, groups=4, bias=False)
        self.plain = nn.BatchNorm2d(12, affine=False)
        self.line = nn.Conv1d(12, 6, 3, dilation=2, bias=False)
        self.norm1 = nn.BatchNorm1d(6)
        self.cube = nn.ConvTranspose3d(6, 6, 2, groups=3)
        self.norm3 = nn.BatchNorm3d(6)
        self.head = nn.Linear(6, 5, bias=False)
        self.norm0 = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.plain(self.up(self.act(self.down(x))))
        y = self.norm1(self.line(x.flatten(2)))
        z = self.norm3(self.cube(y[:, :, :8].unflatten(2, (2, 2, 2))))
        return {"map": x, "line": y, "logits": self.norm0(self.head(z.mean((2, 3, 4))))}


def test_every_kind_of_convolution():
    model = fill(Odd()).eval()
    operated = fuse(model, images=(4, 9, 8))
    assert operated.changed == ("act", "plain", "norm1", "norm3", "norm0")
    assert type(operated.model.act) is nn.ReLU and type(operated.model.plain) is nn.Identity
    assert max(compare(operated.model, model, images((2, 4, 9, 8))).values()) < 1e-6
    double = fuse(fill(Odd()).double().eval(), images=(4, 9, 8)).model
    assert double.up.weight.dtype == torch.float64


class Shared(nn.Module):
    """One norm can be folded; the others' input is used twice, returned, shared or normed by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.twice, self.given, self.both, self.batch = (nn.Conv2d(3, 3, 1) for _ in range(5))
        self.n_good, self.n_twice, self.n_given, self.n_one, self.n_two = (nn.BatchNorm2d(3) for _ in range(5))
        self.n_batch = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.n_good(self.good(x))
        y = self.twice(x)
        x = x + y + self.n_twice(y)
        y = self.given(x)
        x = self.n_given(y)
        x = self.n_one(self.both(x)) + self.n_two(self.both(-x))  # one convolution, a norm a use
        return {"given": y, "out": self.n_batch(self.batch(x))}


def test_what_the_dataflow_does_not_prove_stays():
    model = fill(Shared()).eval()
    operated = fuse(model, images=(3, 8, 8))
    assert operated.changed == ("n_good",)
    assert max(compare(operated.model, model, images((2, 3, 8, 8))).values()) < 1e-6


def test_a_norm_that_someone_watches_stays():
    model, seen = fill(Shared()).eval(), []
    model.n_good.register_forward_hook(lambda *call: seen.append(call[2]))
    with pytest.raises(UsageError, match="nothing to fold"):
        fuse(model, images=(3, 8, 8))


class Biasless(nn.Conv2d):
    """Makes no use of a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


def test_what_does_not_verify_is_refused():
    model = fill(nn.Sequential(Biasless(3, 4, 1, bias=False), nn.BatchNorm2d(4))).eval()
    with pytest.raises(ParityError, match=r"output would differ by .* nothing was changed"):
        fuse(model, images=(3, 4, 4))


class Branches(nn.Module):
    """A re-parameterised layer: two convolutions in training, one where it is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x)

    def fused(self) -> nn.Module:
        whole = nn.Conv2d(3, 4, 3, padding=1)
        with torch.no_grad():
            whole.weight.copy_(self.wide.weight + nn.functional.pad(self.narrow.weight, (1, 1, 1, 1)))
            whole.bias.copy_(self.wide.bias + self.narrow.bias)
        return whole


def test_modules_that_know_their_fused_form_take_it_and_are_folded_into():
    model = fill(nn.Sequential(Branches(), nn.BatchNorm2d(4), nn.ReLU())).eval()
    operated = fuse(model, images=(3, 8, 7))
    assert operated.changed == ("0", "1")
    assert [type(layer) for layer in operated.model] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert max(compare(operated.model, model, images((2, 3, 8, 7))).values()) < 1e-6
    alone = fuse(fill(Branches()).eval(), images=(3, 8, 8))
    assert type(alone.model) is nn.Conv2d and alone.after.params < alone.before.params
    assert alone.changed == ("",)


def test_training_mode_and_16_bit_are_refused_with_the_remedy():
    model = built("timm/test_resnet", 32)
    model.network.layer1.train()
    with pytest.raises(UsageError, match=r"network\.layer1 is in training mode.*call model\.eval\(\)"):
        fuse(model)
    with pytest.raises(UsageError, match="fuse it in 32 bit, then cast"):
        fuse(model.eval().bfloat16())
    with torch.device("meta"), pytest.raises(UsageError, match="meta device"):
        fuse(Spec("timm/test_resnet", {"image_size": 32}).build().eval())
    with pytest.raises(UsageError, match=r"give images=\(3, 224, 224\)"):
        fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())


def test_a_task_model_is_fused_as_a_whole_and_exports():
    model = fill(classify(Spec("timm/test_resnet", {"image_size": 32}).build(), ["a", "b"])).eval()
    operated = fuse(model)
    assert all(name.startswith("backbone.network.") for name in operated.changed)
    x = images((2, 3, 32, 32))
    exported = torch.export.export(operated.model, (x,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(x)["logits"], model(x)["logits"], rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in operated.model.parameters())


def test_frozen_weights_stay_frozen():
    model = built("timm/test_resnet", 32)
    model.network.conv1.requires_grad_(False)
    fused = fuse(model).model
    assert [p.requires_grad for p in fused.network.conv1.parameters()] == [False] * len(
        list(fused.network.conv1.parameters())
    )
    assert fused.network.layer1[0].conv1.bias.requires_grad
