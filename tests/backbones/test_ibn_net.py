"""IBN-Net: the authors' counts, outputs in evaluation and training, names and weights; where the norms are."""

import json
from pathlib import Path

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from vertebra.backbones.building import load
from vertebra.backbones.ibn_net import VARIANTS, ibn_net, published, to_ibn
from vertebra.backbones.timm import timm
from vertebra.blocks.ibn import IBN
from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.errors import ParityError, UsageError, VertebraError
from vertebra.parity import check_golden, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "ibn_net.json"
SHALLOW = {"layers": [2, 2, 1, 1]}
CASES = {  # golden name -> variant and timm's keywords
    "resnet50_a": ("resnet50_a", SHALLOW),
    "resnet50_b": ("resnet50_b", SHALLOW),
    "resnet18_b": ("resnet18_b", SHALLOW),
    "resnext101_a": ("resnext101_a", SHALLOW),
    "se_resnet101_a": ("se_resnet101_a", SHALLOW),
    "densenet121_a": ("densenet121_a", {"growth_rate": 16, "block_config": [4, 4, 2, 1]}),
    "full resnet18_a": ("resnet18_a", {}),
}


def built(name: str, **options):
    variant, network = CASES[name.removeprefix("training ")]
    return fill(ibn_net(variant, network=network, **options))


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_authors(name):
    reference = stored(GOLDEN, name)
    with torch.inference_mode():
        found = named(built(name).eval()(images(reference.shape)))
    assert max(check_golden(found, reference.golden, 1e-5).values()) < 1e-5


@pytest.mark.parametrize("name", ["training resnet50_b", "training se_resnet101_a", "training densenet121_a"])
def test_training_outputs_and_running_statistics_are_the_authors(name):
    reference, backbone = stored(GOLDEN, name), built(name).train()
    with torch.no_grad():
        found = {**named(backbone(images(reference.shape))), **backbone.state_dict()}
    assert sum("running" in key for key in reference.golden) == 1
    check_golden({key: found[key] for key in reference.golden}, reference.golden, 1e-5)


def test_the_halves_are_not_swapped_unnoticed():
    reference, backbone = stored(GOLDEN, "resnet50_a"), built("resnet50_a").eval()
    for module in backbone.modules():
        if isinstance(module, IBN):
            module.first = "batch"
    with torch.inference_mode(), pytest.raises(ParityError):
        check_golden(backbone(images(reference.shape)), reference.golden)


# the row's table: to a thousandth, where the contract test allows a hundredth
@pytest.mark.parametrize(
    ("variant", "params", "gmacs"),
    [("resnet50_b", 25.559, 4.089), ("densenet121_a", 7.979, 2.834)],
)
def test_counts_to_a_thousandth(variant, params, gmacs):
    with torch.device("meta"):
        backbone = ibn_net(variant)
    cost, head = count(backbone, size=(224, 224)), backbone.width * 1000
    assert (cost.params + head + 1000) / 1e6 == pytest.approx(params, rel=1e-3)
    assert (cost.macs + head) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def norms(backbone: nn.Module) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in backbone.named_modules() if isinstance(m, IBN | InstanceNorm)}


def test_a_is_in_every_block_of_all_stages_but_the_last():
    with torch.device("meta"):
        found = norms(ibn_net("resnet50_a"))
    outer = {name for name, kind in found.items() if kind == "IBN"}
    places = {
        f"network.layer{stage}.{block}.bn1" for stage, depth in ((1, 3), (2, 4), (3, 6)) for block in range(depth)
    }
    assert outer == places and len(found) == 2 * len(places)


def test_b_is_in_the_stem_and_after_the_addition_of_two_blocks():
    backbone = fill(ibn_net("resnet50_b", network=SHALLOW)).eval()
    assert set(norms(backbone)) == {"network.bn1", "network.layer1.1.act3.0", "network.layer2.1.act3.0"}
    block, seen = backbone.network.layer1[1], []
    block.register_forward_hook(lambda _, args, out: seen.extend((args[0].clone(), out.clone())))
    with torch.inference_mode():
        backbone(images((2, 3, 64, 64)))
        x, out = seen
        inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
        norm = block.act3[0]
        added = nn.functional.instance_norm(block.bn3(block.conv3(inner)) + x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(out, added.relu(), rtol=1e-4, atol=1e-5)


def test_dense_networks_split_every_third_layer_of_three_blocks():
    with torch.device("meta"):
        backbone = ibn_net("densenet121_a")
    found = {name: module for name, module in backbone.named_modules() if isinstance(module, IBN)}
    layers = {1: (1, 4), 2: (1, 4, 7, 10), 3: (1, 4, 7, 10, 13, 16, 19, 22)}
    places = {f"network.features.denseblock{b}.denselayer{n}.norm1.0" for b, numbers in layers.items() for n in numbers}
    assert set(found) == places
    first = found["network.features.denseblock1.denselayer1.norm1.0"]
    assert (first.first, first.batch.num_features, first.instance.num_channels) == ("batch", 38, 26)


def theirs(name: str) -> dict[str, Tensor]:
    """A state dict with the authors' names and shapes, filled with noise."""
    entries = (entry.rpartition(":") for entry in json.loads(GOLDEN.read_text())["keys"][name].split())
    shapes = {key: tuple(map(int, shape.split("x"))) if shape else () for key, _, shape in entries}
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=generator) if shape else torch.tensor(7) for key, shape in shapes.items()}


SOME = {  # the authors' names -> ours, below `network.`
    "resnet50_b": {"bn1.weight": "bn1.weight", "layer2.1.IN.bias": "layer2.1.act3.0.bias"},
    "se_resnet101_a": {
        "layer3.0.bn1.IN.weight": "layer3.0.bn1.instance.weight",
        "layer1.0.bn1.BN.running_var": "layer1.0.bn1.batch.running_var",
        "layer4.0.se.fc.2.weight": "layer4.0.se.fc2.weight",
        "layer2.0.downsample.1.bias": "layer2.0.downsample.1.bias",
    },
    "densenet121_a": {
        "features.denseblock1.denselayer4.norm1.IN.bias": "features.denseblock1.denselayer4.norm1.0.instance.bias",
        "features.denseblock2.denselayer1.norm1.BN.running_mean": (
            "features.denseblock2.denselayer1.norm1.0.batch.running_mean"
        ),
        "features.denseblock2.denselayer2.norm1.weight": "features.denseblock2.denselayer2.norm1.weight",
    },
}


@pytest.mark.parametrize("name", SOME)
def test_released_names_become_ours(name):
    variant, network = CASES[name]
    backbone, state = ibn_net(variant, network=network), theirs(name)
    found = published(state, backbone)
    backbone.load_state_dict(found)
    for their, our in SOME[name].items():
        assert torch.equal(found[f"network.{our}"].flatten(), state[their].flatten()), their
    del state[next(iter(state))]
    with pytest.raises(ParityError, match=r"missing from it: network\."):
        published(state, backbone)


def test_released_files_and_ours_are_read(tmp_path):
    from safetensors.torch import save_file

    state, file = theirs("resnet50_b"), tmp_path / "resnet50_ibn_b.pth"
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, file)
    options = {"network": SHALLOW, "weights": str(file)}
    with pytest.raises(UsageError, match="allow_pickle"):
        ibn_net("resnet50_b", **options)
    backbone = ibn_net("resnet50_b", **options, allow_pickle=True)
    assert torch.equal(backbone.state_dict()["network.layer1.1.act3.0.weight"], state["layer1.1.IN.weight"])
    assert backbone.weights_info.source == str(file)
    grey = ibn_net("resnet50_b", **options, allow_pickle=True, channels=1)
    torch.testing.assert_close(grey.network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    ours = tmp_path / "ours.safetensors"
    save_file({f"backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}, ours)
    again = ibn_net("resnet50_b", network=SHALLOW, weights=str(ours))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in backbone.state_dict().items())
    with pytest.raises(VertebraError, match="does not become"):
        ibn_net("resnet50_a", network=SHALLOW, weights=str(ours))


def test_nano_reads_its_own_weights(tmp_path):
    from safetensors.torch import save_file

    source = fill(ibn_net("nano"))
    save_file(source.state_dict(), tmp_path / "nano.safetensors")
    found = ibn_net("nano", weights=str(tmp_path / "nano.safetensors"))
    assert torch.equal(found.layer1[0].bn1.instance.weight, source.layer1[0].bn1.instance.weight)
    assert set(norms(found)) >= {"layer1.0.bn1", "layer2.0.bn1"} and not any("layer3" in name for name in norms(found))
    assert load(found, "ibn_net/nano", str(tmp_path / "nano.safetensors"), False).sha256


def test_a_trained_network_keeps_what_its_norms_learned():
    plain = fill(timm("resnet18", image_size=64))
    norm = plain.network.layer2[1].bn1
    weight, mean = norm.weight.clone(), norm.running_mean.clone()
    assert len(to_ibn(plain, "a")) == 6
    made = plain.network.layer2[1].bn1
    assert torch.equal(torch.cat((made.instance.weight, made.batch.weight)), weight)
    assert torch.equal(made.batch.running_mean, mean[64:])
    dense = timm("densenet121", network={"growth_rate": 8, "block_config": [1, 1, 1, 1]})
    assert [name.split(".")[2] for name in to_ibn(dense, "a")] == ["denseblock1", "denseblock2", "denseblock3"]
    assert isinstance(dense.network.features.denseblock4.denselayer1.norm1, BatchNormAct2d)


def test_what_does_not_work_is_refused():
    for options, says in (
        ({"variant": "resnet50_c"}, "did you mean resnet50_"),
        ({"variant": "nano", "network": {"layers": [1]}}, "leave network"),
        ({"variant": "nano", "drop_path": 1.0}, "drop_path is 1.0"),
    ):
        with pytest.raises(UsageError, match=says):
            ibn_net(**options)
    with pytest.raises(UsageError, match="neither stages layer1"):
        to_ibn(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), "a")
    with pytest.raises(UsageError, match="which kind b needs"):
        to_ibn(timm("densenet121", network={"growth_rate": 8, "block_config": [1, 1, 1, 1]}), "b")
    with pytest.raises(UsageError, match="kind is 'c'"):
        to_ibn(nn.Identity(), "c")  # type: ignore[arg-type]
    backbone = ibn_net("resnet18_a").eval()
    with torch.inference_mode(), pytest.raises(UsageError, match="1x1 cells"):
        backbone(images((2, 3, 16, 16)))
    assert {name for name in VARIANTS if name.endswith("_b")} == {f"resnet{n}_b" for n in (18, 34, 50, 101, 152)}
