"""ECA: the authors' counts, parity with timm and the authors' arithmetic, and behaviour."""

from pathlib import Path

import pytest
import torch
from timm.layers.eca import EcaModule
from torch import Tensor, nn

from vertebra.backbones.eca_net import VARIANTS, eca_net, published
from vertebra.blocks.eca import eca, effect, kernel_of
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, compare, fill, fill_as, images, named, stored
from vertebra.spec import Spec
from vertebra.surgery.swap import swap
from vertebra.training.cost import count


@pytest.mark.parametrize(("channels", "kernel"), [(64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_kernel_follows_the_papers_rule(channels, kernel):
    assert kernel_of(channels) == kernel
    assert eca(channels).conv.weight.shape == (1, 1, kernel)
    assert EcaModule(channels).conv.weight.shape == (1, 1, kernel)


GOLDEN = Path(__file__).parents[1] / "golden" / "eca_net.json"


class Reference(nn.Module):
    """The authors' arithmetic, step by step: pool, channels as a line, convolution, gate."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=(kernel - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.adaptive_avg_pool2d(x, 1)  # (B, C, 1, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


@pytest.mark.parametrize("channels", [8, 64, 2048])
def test_parity_with_timm_and_the_reference(channels):
    ours = eca(channels)
    batches = [images((2, channels, 8, 8)), images((3, channels, 7, 5))]
    for theirs in (EcaModule(channels), Reference(kernel_of(channels))):
        assert max(compare(fill(ours), fill(theirs), batches).values()) < 1e-6
        theirs.load_state_dict(ours.state_dict())  # the same names


def test_a_gate_is_a_function_of_the_neighbours_means():
    block = eca(4, kernel=3)
    with torch.no_grad():
        block.conv.weight.copy_(torch.tensor([[[1.0, 2.0, -1.0]]]))
    x = torch.zeros(1, 4, 2, 2) + torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    gates = torch.sigmoid(torch.tensor([0 + 2 - 2, 1 + 4 - 3, 2 + 6 - 4, 3 + 8 - 0], dtype=torch.float32))
    torch.testing.assert_close(block(x), x * gates[:, None, None])


def test_number_formats_and_layouts():
    channels = 512
    block, x = fill(eca(channels)), images((2, channels, 6, 5))
    expected = block(x)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), expected)
    rough = eca(channels).bfloat16()
    rough.load_state_dict(block.state_dict())
    torch.testing.assert_close(rough(x.bfloat16()).float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="kernel is 4; it must be odd"):
        eca(8, kernel=4)
    with pytest.raises(UsageError, match="channels is 0"):
        eca(0)
    with pytest.raises(UsageError, match="gamma is 0"):
        eca(8, gamma=0)


# published: parameters of the plain network, kernels of its blocks
@pytest.mark.parametrize(
    ("variant", "plain", "kernels", "printed"),
    [
        ("resnet18", 11_689_512, 2 * 3 + 2 * 5 + 2 * 7 + 2 * 7, (11.15, 1.70)),
        ("resnet34", 21_797_672, 3 * 3 + 4 * 3 + 6 * 5 + 3 * 7, (20.79, 3.43)),
        ("resnet50", 25_557_032, 3 * 3 + 4 * 5 + 6 * 5 + 3 * 7, (24.37, 3.86)),
        ("resnet152", 60_192_808, 3 * 3 + 8 * 3 + 36 * 5 + 3 * 7, (57.41, 10.83)),
        ("mobilenetv2", 3_504_872, 10 * 1 + 7 * 3, (3.34, None)),
    ],
)
def test_counts_are_the_papers_in_both_units(variant, plain, kernels, printed):
    with torch.device("meta"):
        backbone = eca_net(variant)
    cost = count(backbone, size=(224, 224))
    head = backbone.width * 1000
    assert cost.params + head + 1000 == plain + kernels
    assert (cost.params + head + 1000) / 2**20 == pytest.approx(printed[0], abs=0.006)
    if printed[1]:  # MobileNetV2's is of another counter, see golden/eca_net.json
        assert (cost.macs + head) / 2**30 == pytest.approx(printed[1], rel=0.02)


@pytest.mark.parametrize("variant", ["resnet18", "resnet50", "mobilenetv2"])
def test_attention_follows_the_last_norm_of_every_branch(variant):
    backbone = fill(eca_net(variant, image_size=32)).eval()
    network, x = backbone.network, images((2, 3, 32, 32))
    block, given = (network.blocks[2][1] if variant == "mobilenetv2" else network.layer2[1]), []
    block.register_forward_hook(lambda _, args, out: given.extend((args[0].clone(), out.clone())))
    with torch.inference_mode():
        backbone(x)
        shortcut, out = given[:2]
        norm = block.bn3 if hasattr(block, "bn3") else block.bn2
        if variant == "mobilenetv2":
            inner = norm[0](block.conv_pwl(block.bn2(block.conv_dw(block.bn1(block.conv_pw(shortcut))))))
        elif variant == "resnet50":
            inner = block.bn2(block.conv2(block.bn1(block.conv1(shortcut)).relu())).relu()
            inner = norm[0](block.conv3(inner))
        else:
            inner = norm[0](block.conv2(block.bn1(block.conv1(shortcut)).relu()))
        expected = Reference.forward(norm[1], inner) + shortcut
    torch.testing.assert_close(out, expected if variant == "mobilenetv2" else expected.relu())
    kernels = [m.conv.weight.shape[2] for m in backbone.modules() if type(m).__name__ == "ECA"]
    assert len(kernels) == {"resnet18": 8, "resnet50": 16, "mobilenetv2": 17}[variant]


def test_kernels_can_follow_the_rule_or_be_given():
    with torch.device("meta"):
        rule = eca_net("resnet50", kernels=None)
        given = eca_net("resnet18", kernels=(9, 9, 9, 9))
    kernels = [m.conv.weight.shape[2] for m in rule.modules() if type(m).__name__ == "ECA"]
    assert kernels == [5] * 13 + [7] * 3
    assert {m.conv.weight.shape[2] for m in given.modules() if type(m).__name__ == "ECA"} == {9}
    with pytest.raises(UsageError, match=r"kernels is \(3, 5\); it needs 4"):
        eca_net("resnet18", kernels=(3, 5))
    with pytest.raises(UsageError, match="has no variant 'resnet51'"):
        eca_net("resnet51")


THEIRS = {  # names of some of the authors' tensors -> ours
    "resnet18": {"layer1.0.eca.conv.weight": "layer1.0.bn2.1.conv.weight", "layer3.1.bn2.bias": "layer3.1.bn2.0.bias"},
    "resnet50": {"layer2.3.eca.conv.weight": "layer2.3.bn3.1.conv.weight", "layer2.3.bn2.bias": "layer2.3.bn2.bias"},
    "mobilenetv2": {
        "features.1.conv.3.conv.weight": "blocks.0.0.bn2.1.conv.weight",
        "features.1.conv.0.0.weight": "blocks.0.0.conv_dw.weight",
        "features.17.conv.4.conv.weight": "blocks.6.0.bn3.1.conv.weight",
        "features.8.conv.1.1.running_mean": "blocks.3.1.bn2.running_mean",
        "features.8.conv.2.weight": "blocks.3.1.conv_pwl.weight",
        "features.18.1.weight": "bn2.weight",
    },
}


@pytest.mark.parametrize("variant", THEIRS)
def test_released_names_become_ours(variant):
    backbone = eca_net(variant)
    state = {f"module.{name}": tensor for name, tensor in authors_state(variant).items()}
    found = published(state, backbone)
    backbone.load_state_dict(found)
    for theirs, ours in THEIRS[variant].items():
        assert torch.equal(found[f"network.{ours}"], state[f"module.{theirs}"]), theirs
    del state["module.conv1.weight" if "resnet" in variant else "module.features.0.0.weight"]
    with pytest.raises(ParityError, match=r"missing from it: network\.conv"):
        published(state, backbone)


def authors_state(variant: str) -> dict[str, Tensor]:
    """A state dict with the authors' names and shapes, filled by name, from torchvision's networks and their blocks."""
    import torchvision

    theirs = {"mobilenetv2": "mobilenet_v2"}.get(variant, variant)
    network = torchvision.models.get_model(theirs)
    if variant == "mobilenetv2":
        for block in network.features[1:18]:
            block.conv.append(Reference(1 if block.out_channels < 96 else 3))
    else:
        for number in range(1, 5):
            for block in getattr(network, f"layer{number}"):
                block.eca = Reference(VARIANTS[variant]["kernels"][number - 1])
    return fill(network).state_dict()


@pytest.mark.parametrize("variant", ["resnet18", "resnet50", "mobilenetv2"])
def test_networks_compute_what_the_authors_do(variant):
    """Golden numbers of the authors' networks, filled under our names; an odd size that is not square."""
    reference = stored(GOLDEN, variant)
    with torch.inference_mode():
        found = named(fill(eca_net(variant)).eval()(images(reference.shape)))
    outputs = {name: found[name] for name in reference.golden}
    assert len(outputs) >= 5 and max(check_golden(outputs, reference.golden, 1e-5).values()) < 1e-5
    with torch.inference_mode(), pytest.raises(ParityError):
        moved = fill(eca_net(variant, kernels=None)).eval()  # the rule's kernels are not the released ones
        check_golden({name: named(moved(images(reference.shape)))[name] for name in outputs}, reference.golden)


def test_swap_puts_it_in_the_place_of_squeeze_and_excitation():
    backbone = Spec("timm/efficientnet_b0", {"image_size": 64}).build()
    operated = swap(backbone, "SqueezeExcite", "eca")
    blocks = [m for m in operated.model.modules() if type(m).__name__ == "ECA"]
    assert len(operated.changed) == len(blocks) == 16
    # the first block has 32 channels (k 3), the last 1152 (k 5)
    assert [blocks[0].conv.weight.shape[2], blocks[-1].conv.weight.shape[2]] == [3, 5]
    assert operated.before.params - operated.after.params == sum(
        p.numel() for name in operated.changed for p in backbone.get_submodule(name).parameters()
    ) - sum(p.numel() for block in blocks for p in block.parameters())


@pytest.fixture(scope="module")
def toy():
    return effect("toy", read("digits"))


def test_effect_compares_five_arms_that_differ_in_the_attention_alone(toy, tmp_path, monkeypatch):
    from vertebra.blocks import eca as page

    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(1, 8, 64, 1))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert set(found) == {"plain", "se", "eca", "eca_1", "permuted"} and small.baseline == "plain"
    assert found["plain"]["added"] == 0 < found["eca_1"]["added"] < found["eca"]["added"] < found["se"]["added"]
    assert found["permuted"]["added"] == found["eca"]["added"]
    assert found["eca"]["nll"] != found["permuted"]["nll"]
    assert small.measure("eca", 0, tmp_path) == found["eca"]


def test_effect_checks_what_the_row_asks(toy):
    import numpy as np

    def measured(eca_top1: float, se: float) -> Measured:
        values = {arm: {"top1": np.array([60.0, 61.0]), "added": np.array([0.0, 0.0])} for arm in toy.arms}
        values["eca"] = {"top1": np.array([eca_top1, eca_top1 + 1]), "added": np.array([0.02, 0.02])}
        values["se"]["top1"] = np.array([se, se + 1])
        return Measured(values)

    assert [check.holds for check in toy.checks(measured(60.5, 60.7))] == [True, True, True]
    assert [check.holds for check in toy.checks(measured(59.9, 60.7))] == [False, False, True]


def test_permuted_arm_is_the_block_with_channels_in_another_order():
    from vertebra.blocks.eca import _Permuted

    torch.manual_seed(0)
    permuted = fill(_Permuted(kernel=3, channels=8))
    plain, x = fill(eca(8, kernel=3)), images((2, 8, 4, 4))
    back = permuted.order.argsort()
    torch.testing.assert_close(permuted(x), plain(x[:, permuted.order])[:, back])
    assert not torch.allclose(permuted(x), plain(x))


def test_fill_as_reaches_timms_names():
    theirs = fill_as(EcaModule(64), {"conv.weight": "conv.weight"})
    assert torch.equal(theirs.conv.weight, fill(eca(64)).conv.weight)
