"""FFNet: the counts of the paper's networks, the authors' outputs in every family, the classification twin, weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18

from vertebra.backbones.ffnet import Twin, ffnet, published
from vertebra.contracts import Backbone, Level
from vertebra.errors import ParityError, UsageError
from vertebra.necks.up_head import enlarged, up_head
from vertebra.necks.up_head import published as published_neck
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.training.cost import count

FILE = Path(__file__).parents[1] / "golden" / "ffnet.json"
NUMBERS = json.loads(FILE.read_text(encoding="utf-8"))
DIMS = (16, 24, 32, 48)
TINY = {"depths": (1, 2, 1, 1), "dims": DIMS}
NARROW = {"depths": (1, 2, 1), "dims": DIMS}
NETWORK = re.compile(r"(\d+)([NS]*)_(d?)[ABC]([ABC])([ABC])(_mobile)?")


class _Whole(nn.Module):
    """A network for segmentation: backbone, up-head, maps at the finest one's size, and the paper's head A, B or C."""

    def __init__(self, backbone: Backbone, variant: str, head: str, upsampling: str = "bilinear") -> None:
        super().__init__()
        self.backbone, self.upsampling = backbone, upsampling
        self.neck = up_head(backbone.levels, variant, upsampling=upsampling)  # type: ignore[arg-type]
        middle, kernel = {"a": (512, 1), "b": (256, 3), "c": (128, 1)}[head]  # the first is 3x3 in all of the code
        inputs = sum(level.channels for level in self.neck.levels)
        first, last = nn.Conv2d(inputs, middle, 3, 1, 1), nn.Conv2d(middle, 19, kernel, 1, kernel // 2)
        self.head = nn.Sequential(first, nn.BatchNorm2d(middle), nn.ReLU(), last)

    def forward(self, batch: Tensor) -> Tensor:
        finest, *others = self.neck(self.backbone(batch).pyramid)
        return self.head(torch.cat([finest, *(enlarged(x, finest, self.upsampling) for x in others)], 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NUMBERS["networks"])
def test_the_papers_networks(name):
    match = NETWORK.fullmatch(name)
    assert match
    layers, family, halved, neck, head, mobile = match.groups()
    with torch.device("meta"):
        backbone = ffnet(f"{layers}{family.lower()}{halved and '_d'}")
        network = _Whole(backbone, neck.lower(), head.lower(), "nearest" if mobile else "bilinear")
    expected = NUMBERS["networks"][name]
    found = count(network, size=tuple(expected["resolution"]), channels=3)
    assert found.params == expected["params"]
    assert found.macs / 1e9 == pytest.approx(expected["gmacs"], rel=1e-4)


CASES = {
    "AAA": (("18", TINY), "a", "a", "bilinear"),
    "AAA_odd": (("18", TINY), "a", "a", "bilinear"),
    "AAA_bottleneck": (("50", {**TINY, "dims": (8, 12, 16, 24)}), "a", "a", "bilinear"),
    "dAAC": (("18_d", TINY), "a", "c", "bilinear"),
    "BBB": (("22s", TINY), "b", "b", "bilinear"),
    "BBB_mobile": (("22s", TINY), "b", "b", "nearest"),
    "BBB_mobile_pre_down": (("22s", {**TINY, "halving": "blur"}), "b", "b", "nearest"),
    "CBB": (("46n", NARROW), "b", "b", "bilinear"),
    "CCC_mobile": (("46n", NARROW), "c", "c", "nearest"),
    "46NS_CCC_mobile_pre_down": (("46ns", {"halving": "blur"}), "c", "c", "nearest"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_authors_logits(name):
    (variant, options), neck, head, upsampling = CASES[name]
    known = stored(FILE, name)
    network = fill(_Whole(ffnet(variant, **options), neck, head, upsampling)).eval()
    with torch.inference_mode():
        check_golden(network(images(known.shape)), known.golden, 2e-5)


@pytest.mark.parametrize(
    ("name", "variant", "options"),
    [
        ("AAX", "18", {"twin": "a"}),
        ("AAX_train", "18", {"twin": "a"}),
        ("BBX_mobile", "22s", {"twin": "b", "upsampling": "nearest"}),
    ],
)
def test_the_authors_classification_twin(name, variant, options):
    known = stored(FILE, name)
    twin = fill(ffnet(variant, **TINY, **options)).train(name.endswith("train"))
    with torch.no_grad():
        features = twin(images(known.shape))
    found = {"pyramid": features.pyramid, "pooled": features.pooled}
    check_golden(found, known.golden, 2e-5)


@pytest.mark.parametrize(("name", "variant", "options"), [("BBB", "22s", TINY), ("CBB", "46n", NARROW)])
def test_the_authors_keys(name, variant, options):
    state = {key: torch.rand(shape) for key, shape in NUMBERS["keys"][name].items()}
    network = _Whole(ffnet(variant, **options), "b", "b")
    network.backbone.load_state_dict(published(state, network.backbone))  # type: ignore[arg-type]
    network.neck.load_state_dict(published_neck(state, network.neck))
    assert torch.equal(network.neck.outputs[0][0].weight, state["head.layers.1.fam_4.layers.0.weight"])  # type: ignore[index]
    with pytest.raises(ParityError, match="left over in the checkpoint"):
        published(state, ffnet("18", **TINY))  # type: ignore[arg-type]


def test_a_twins_weight_files(tmp_path):
    theirs = {key: torch.rand(shape) for key, shape in NUMBERS["keys"]["AAX"].items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    twin = ffnet("18", **TINY, twin="a", weights=str(tmp_path / "theirs.safetensors"))
    assert torch.equal(
        twin.inner.stages[1][0].shortcut[0].weight, theirs["backbone_model.layer2.0.downsample.0.weight"]
    )  # type: ignore[index, union-attr]
    assert torch.equal(twin.last[0].bias, theirs["head.layers.2.final_layer.0.bias"])  # type: ignore[index, union-attr]
    save_file(twin.state_dict(), tmp_path / "ours.safetensors")
    again = ffnet("18", **TINY, twin="a", weights=str(tmp_path / "ours.safetensors"))
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in twin.state_dict().items())
    alone = ffnet("18_d", **TINY, weights=str(tmp_path / "theirs.safetensors"))  # stride 64 takes the weights of 32
    assert torch.equal(alone.stem[0][0].weight, theirs["backbone_model.conv1.weight"])  # type: ignore[index, union-attr]


def test_torchvisions_resnet_is_the_vanilla_family():
    theirs, ours = fill(resnet18()).eval(), ffnet("18").eval()
    ours.load_state_dict(published(theirs.state_dict(), ours))
    theirs.fc = nn.Identity()
    batch = images((2, 3, 75, 53))
    with torch.inference_mode():
        assert difference(ours(batch).pooled, theirs(batch)) < 1e-5


def test_levels():
    with torch.device("meta"):
        assert ffnet("50").levels == (Level(256, 4), Level(512, 8), Level(1024, 16), Level(2048, 32))
        assert ffnet("40s_d").levels == (Level(64, 8), Level(128, 16), Level(192, 32), Level(320, 64))
        assert ffnet("74n", halving="blur").levels == (Level(64, 8), Level(96, 16), Level(160, 32), Level(320, 64))
        twin = ffnet("46ns", twin="c")
    assert isinstance(twin, Twin) and twin.width == 2048
    assert twin.levels == (Level(128, 4), Level(16, 8), Level(16, 16), Level(16, 32))
    parts = [p for part in twin.trunk() for p in part.parameters()]
    assert len(parts) == len(set(parts)) == len(list(twin.parameters()))


def test_gradients_reach_every_parameter_of_a_twin():
    twin = fill(ffnet("nano", twin="b", drop_path=0.1)).train()
    features = twin(images((4, 3, 32, 32)))
    sum((x * images(tuple(x.shape))).sum() for x in (features.pooled, *features.pyramid)).backward()  # type: ignore[union-attr]
    assert not [name for name, p in twin.named_parameters() if p.grad is None or not p.grad.any()]


def test_branches_are_dropped_in_training_only():
    backbone, plain = fill(ffnet("nano", drop_path=0.9)).eval(), fill(ffnet("nano")).eval()
    batch = images((8, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(backbone(batch).pooled, plain(batch).pooled)
        torch.manual_seed(0)
        assert difference(backbone.train()(batch).pooled, plain.train()(batch).pooled) > 0.1


def test_wrong_options_and_images_are_refused():
    with pytest.raises(UsageError, match="family is 'b'"):
        ffnet("nano", family="b")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="block is 'basics'; did you mean basic"):
        ffnet("nano", block="basics")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="halving is 'pool'"):
        ffnet("nano", halving="pool")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="first_stride is 3"):
        ffnet("nano", first_stride=3)  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="each of 3 stages of family 'n'"):
        ffnet("46n", depths=(1, 1, 1, 1))
    with pytest.raises(UsageError, match=r"depths is \(1, 0, 1, 1\)"):
        ffnet("nano", depths=(1, 0, 1, 1))
    with pytest.raises(UsageError, match="no variant 'd'"):
        ffnet("nano", twin="d")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="at least 5x5"):
        ffnet("nano", halving="blur")(torch.zeros(1, 3, 64, 4))
