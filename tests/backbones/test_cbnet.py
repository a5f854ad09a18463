"""CBNet beside its authors' networks: numbers, outputs, checkpoints; and what composites of other networks do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vertebra.backbones.cbnet import CBNet, cbnet, published
from vertebra.backbones.cbnet.members import apart
from vertebra.contracts import Backbone
from vertebra.errors import UsageError, VertebraError
from vertebra.parity import check_golden, fill, images, stored
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.training.optimizers import freeze

FILE = Path(__file__).parents[1] / "golden" / "cbnet.json"
SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 2}
# a network of every kind that can be taken apart: address, its options
FAMILIES = [
    ("timm/test_resnet", {"image_size": 64}),
    ("timm/test_convnext", {"image_size": 64}),
    ("swin/tiny", {"network": SWIN, "image_size": (64, 64)}),
    ("vovnet/nano", {}),
    ("hornet/nano", {}),
    ("replknet/nano", {}),
    ("cifar_resnet/nano", {}),
]


def swin(**options) -> CBNet:
    return cbnet(member="swin/tiny", image_size=(128, 192), network={"network": SWIN}, **options)


def nano(**options) -> CBNet:
    torch.manual_seed(0)
    return cbnet("nano", **options)


def by_name(pyramids: tuple[tuple[torch.Tensor, ...], ...]) -> dict[str, torch.Tensor]:
    pairs = zip(("assist", "lead"), pyramids, strict=True)
    return {f"{member}.{level}": x for member, pyramid in pairs for level, x in enumerate(pyramid)}


def without_first_pool(composite: CBNet) -> CBNet:
    """As mmdetection has Res2Net: the first stage, which does not stride, averages nothing."""
    for member in composite.stages[0].members:
        member[0].pool = nn.Identity()
    return composite


CASES = {
    "resnet50": lambda: cbnet("resnet50"),
    "resnet18_shared_1": lambda: cbnet(member="timm/resnet18", shared=1),
    "resnet18_train": lambda: cbnet(member="timm/resnet18"),
    "swin": lambda: swin(),
    "swin_shared_2": lambda: swin(shared=2),
    "res2net50": lambda: without_first_pool(cbnet(member="res2net/50_v1b")),
}


@pytest.mark.parametrize("name", CASES)
def test_both_pyramids_are_the_authors(name):
    expected, ours = stored(FILE, name), fill(CASES[name]())
    ours.train(name.endswith("train"))
    with torch.no_grad():
        found = by_name(ours.pyramids(images(expected.shape)))
    check_golden(found, expected.golden, tolerance=1e-5)


@pytest.mark.parametrize(("name", "build"), [("resnet18", CASES["resnet18_train"]), ("swin", swin)])
def test_released_checkpoints_become_ours(name, build):
    keys = json.loads(FILE.read_text(encoding="utf-8"))["keys"][name]
    state = {f"backbone.{key}": torch.empty(shape, device="meta") for key, shape in keys.items()}
    state["neck.fpn_convs.0.conv.weight"] = torch.empty(1, device="meta")
    with torch.device("meta"):
        ours = build()
    assert {key: x.shape for key, x in published(state, ours).items()} == {
        key: x.shape for key, x in ours.state_dict().items()
    }
    del state["backbone.cb_linears.3.0.1.weight" if name == "resnet18" else "backbone.cb_linears.2.1.weight"]
    with pytest.raises(VertebraError, match="missing from it: links"):
        published(state, ours)


def detector_rest(channels: tuple[int, ...], *, stages: int = 1, masks: bool = False, convs: int = 0) -> int:
    """Parameters of mmdetection's FPN, region proposals and heads of 80 classes: a single backbone has the same."""
    conv = 9 * 256 * 256 + 256
    fpn = sum(c * 256 + 256 for c in channels) + 4 * conv
    proposals = conv + (256 * 3 + 3) + (256 * 12 + 12)
    hidden = 256 * 49 * 1024 + 1024 + (convs * (conv + 256) if convs else 1024 * 1024 + 1024)
    boxes = hidden + 1024 * 81 + 81 + 1024 * 320 + 320
    mask = 4 * conv + 256 * 256 * 4 + 256 + 256 * 80 + 80 if masks else 0
    return fpn + proposals + stages * (boxes + mask)


@pytest.mark.parametrize(
    ("variant", "rest", "published_m"),
    [
        ("resnet50", {}, 69.6),  # Faster R-CNN
        ("swin_tiny", {"masks": True}, 76),  # Mask R-CNN
        ("swin_small", {"masks": True, "stages": 3, "convs": 4}, 156),  # Cascade Mask R-CNN
    ],
)
def test_detectors_have_the_published_parameters(variant, rest, published_m):
    with torch.device("meta"):
        backbone = cbnet(variant)
    whole = sum(p.numel() for p in backbone.parameters())
    whole += detector_rest(tuple(level.channels for level in backbone.levels), **rest)
    assert whole / 1e6 == pytest.approx(published_m, rel=0.01)


def test_the_parts_of_a_dual_resnet50():
    """23.508 M and 23.283 M of members (the authors' lead has 128 that it never uses), 4.593 M of links."""
    with torch.device("meta"):
        composite = cbnet("resnet50")
    links = sum(p.numel() for p in composite.links.parameters())
    assert links == 256 * (512 + 1024 + 2048) + 512 * (1024 + 2048) + 1024 * 2048 + 2 * (3 * 256 + 2 * 512 + 1024)
    assert sum(p.numel() for p in composite.parameters()) - links == 23_508_032 + 23_282_816 - 128


@pytest.mark.parametrize(("address", "options"), FAMILIES, ids=[address for address, _ in FAMILIES])
def test_the_first_member_is_the_network_itself(address, options):
    torch.manual_seed(0)
    single = fill(Spec(address, options).build()).eval()
    composite = assembled(single, address).eval()
    batch = images((2, 3, *single.preprocess.size))
    with torch.inference_mode():
        torch.testing.assert_close(composite.each(batch)[0].pooled, single(batch).pooled, rtol=1e-4, atol=1e-4)
        assert composite(batch).pooled.shape == (2, single.width)


def assembled(single: Backbone, address: str) -> CBNet:
    parts, sizes = apart(single, address)
    return CBNet(single=single, parts=parts, sizes=sizes, address=address)


def test_a_lead_starts_as_the_single_network():
    """Zero gains: with batch norms, two copies of one network are that network, bit for bit."""
    composite = nano().eval()
    batch = images((2, 3, 32, 32))
    with torch.inference_mode():
        assistant, lead = composite.each(batch)
        assert torch.equal(lead.pooled, assistant.pooled)
        assert all(torch.equal(one, other) for one, other in zip(*composite.pyramids(batch), strict=True))
        fill(composite.links)
        assert not torch.allclose(composite(batch).pooled, assistant.pooled)


def test_members_inherit_the_same_weights(tmp_path):
    torch.manual_seed(1)
    single = Spec("cifar_resnet/nano").build().eval()
    save_file(single.state_dict(), tmp_path / "single.safetensors")
    composite = nano(weights=str(tmp_path / "single.safetensors"), members=3).eval()
    batch = images((2, 3, 32, 32))
    with torch.inference_mode():
        assert all(torch.equal(member.pooled, single(batch).pooled) for member in composite.each(batch))


def test_a_whole_composite_is_read_back(tmp_path):
    composite = fill(nano()).eval()
    save_file(composite.state_dict(), tmp_path / "composite.safetensors")
    batch = images((2, 3, 32, 32))
    with torch.inference_mode():
        again = nano(weights=str(tmp_path / "composite.safetensors")).eval()
        assert torch.equal(again(batch).pooled, composite(batch).pooled)


@pytest.mark.parametrize(
    ("links", "reaches"),
    [
        # [sources of the doors of the stages], -1 is the stem
        ("dense_higher", ((0, 1, 2), (1, 2), (2,))),
        ("higher", ((0,), (1,), (2,))),
        ("same", ((-1,), (0,), (1,))),
        ("lower", ((), (-1,), (0,))),
        ("full", ((0, 1, 2),) * 3),
    ],
)
def test_compositions(links, reaches):
    """Where a map of the assistant goes, seen by gradients: to all doors that it is linked to, and to no other."""
    composite = fill(nano(links=links, shared=0)).eval()
    assert composite.sources == reaches
    found = composite._passes(images((2, 3, 16, 16)))
    assistant = found[0]
    planes = {-1: assistant.stem, **dict(enumerate(assistant.maps))}
    for stage in range(3):
        door = found[1].entered[stage]
        feeds = composite._feeds(door, 1, stage, assistant)
        assert len(feeds) == len(reaches[stage]) and all(feed.shape == door.shape for feed in feeds)
        for feed, source in zip(feeds, reaches[stage], strict=True):
            assert torch.autograd.grad(feed.sum(), planes[source], retain_graph=True)[0].any()


def test_shared_parts_are_the_assistants():
    batch = images((2, 3, 32, 32))
    for shared, equal in ((0, 0), (1, 0), (2, 1), (3, 2)):
        composite = fill(nano(shared=shared)).eval()
        assert len(composite.stems) == (2 if shared == 0 else 1)
        with torch.inference_mode():
            same = [torch.equal(one, other) for one, other in zip(*composite.pyramids(batch), strict=True)]
        assert same == [True] * equal + [False] * (3 - equal)


def test_norms_of_links_keep_their_statistics():
    composite = fill(nano()).train()
    norms = [module for module in composite.links.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    composite(images((4, 3, 32, 32)))
    assert len(norms) == 3 and not any(norm.training for norm in norms)
    assert composite.stages[1].members[1][0].branch[1].training
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


def test_what_is_frozen_is_frozen_in_all_members():
    composite = nano(shared=0)
    freeze(composite, 2)
    trains = {name for name, p in composite.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("stems.", "stages.0.")) for name in trains)
    assert {name.split(".")[3] for name in trains if name.startswith("stages.1.members")} == {"0", "1"}
    assert any(name.startswith("links.0.0.") for name in trains)


def test_links_fold_away():
    operated = fuse(fill(nano()).eval())
    assert [type(link[1]) for stage in operated.model.links[0] for link in stage] == [nn.Identity] * 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"member": "timm/vit_tiny_patch16_224"}, "the stages of timm/vit_tiny_patch16_224 are not known"),
        ({"member": "cbnet/nano"}, "a composite of composites"),
        ({"members": 1}, "members is 1; it must be at least 2"),
        ({"shared": 4}, "share 3 parts at most"),
        ({"shared": -1}, "shared is -1"),
        ({"links": "dense"}, "no links 'dense'.*dense_higher"),
    ],
)
def test_what_cannot_be(options, says):
    with pytest.raises(UsageError, match=says), torch.device("meta"):
        cbnet("nano", **options)


def test_images_that_a_member_cannot_take():
    with torch.device("meta"):
        composite = cbnet(member="timm/test_convnext", image_size=64).eval()
        with pytest.raises(UsageError, match="cannot take 3x3; build it with image_size"):
            composite(torch.empty(1, 3, 3, 3))
