"""STU-Net: the paper's counts for volumes, the reference's outputs in 2-D and 3-D, weights that move between plans."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vertebra.backbones.stunet import WIDTHS, Segmentation, plan_strides, published, segmentation, stunet
from vertebra.blocks.stu_unit import STUnit
from vertebra.contracts import Level
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.training.cost import count

FILE = Path(__file__).parents[1] / "golden" / "stunet.json"
NUMBERS = json.loads(FILE.read_text(encoding="utf-8"))
ANISOTROPIC = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
TINY = {"base": 2, "depth": 2, "axes": 3, "channels": 1}


def tiny(classes: int = 5, **options) -> Segmentation:
    upsampling = {"upsampling": options.pop("upsampling")} if "upsampling" in options else {}
    return segmentation(stunet("s", **{**TINY, **options}), classes, **upsampling)


@pytest.mark.parametrize("variant", ["s", "b", "l", "h"])
def test_the_published_networks_for_volumes(variant):
    with torch.device("meta"):
        network = segmentation(stunet(variant, axes=3, channels=1), 105)
    expected, side = NUMBERS["volumes"][variant], 128
    assert sum(p.numel() for p in network.parameters()) == expected["params"]
    # the reference's 1 x 1 convolutions see enlarged maps: eight cells for each of ours
    widths = [network.backbone.scales[0].channels * times for times in WIDTHS]
    more = sum(7 * (side >> i + 1) ** 3 * widths[i] * widths[i + 1] for i in range(5))
    macs = count(network, size=(side,) * 3, channels=1).macs  # type: ignore[arg-type]
    assert (macs + more) / 1e9 == pytest.approx(expected["gmacs"], rel=1e-6)
    assert 0.005 * macs < more < 0.02 * macs


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("s_volumes", lambda: segmentation(stunet("s", axes=3, channels=1, strides=(2, 2, 2, 2, 1)), 105)),
        ("tiny_volumes", tiny),
        ("tiny_anisotropic", lambda: tiny(strides=ANISOTROPIC)),
        ("tiny_short", lambda: tiny(strides=plan_strides([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]))),
        ("s_images", lambda: segmentation(stunet("s"), 19)),
    ],
)
def test_the_references_logits_full_resolution_first(name, make):
    known = stored(FILE, name)
    with torch.inference_mode():
        logits = fill(make()).eval()(images(known.shape))
    assert logits[0].shape[2:] == known.shape[2:]
    check_golden(logits, known.golden, 1e-4)


@pytest.mark.parametrize(("name", "options"), [("tiny_volumes_odd", TINY), ("s_images_odd", {})])
def test_the_references_maps_at_odd_sizes(name, options):
    known, network = stored(FILE, name), nn.Module()
    network.backbone = stunet("s", **options)  # the golden names begin with it
    with torch.inference_mode():
        features = fill(network).backbone.eval()(images(known.shape))
    check_golden(list(features.pyramid), known.golden, 1e-4)
    torch.testing.assert_close(features.pooled, features.pyramid[-1].flatten(2).mean(2))


def test_the_references_keys():
    state = {name: torch.rand(shape) for name, shape in NUMBERS["keys"]["tiny"].items()}
    network = tiny()
    network.load_state_dict(published(state, network))
    decoder = network.decoder
    assert torch.equal(decoder.stages[4][1].conv2.weight, state["conv_blocks_localization.0.1.conv2.weight"])  # type: ignore[index, union-attr]
    assert torch.equal(decoder.ups[0].conv.bias, state["upsample_layers.4.conv.bias"])  # type: ignore[union-attr]
    assert torch.equal(network.heads.heads[0].weight, state["seg_outputs.4.weight"])
    alone = published({f"module.{name}": tensor for name, tensor in state.items()}, network.backbone)
    assert torch.equal(alone["stages.0.0.shortcut.weight"], state["conv_blocks_context.0.0.conv3.weight"])
    with pytest.raises(ParityError, match=r"other shapes: conv_blocks_context\.0"):
        published(state, stunet("s", base=2, depth=2))


def test_weights_move_to_a_plan_of_other_strides():
    source, target = tiny(classes=9), tiny(classes=4, strides=ANISOTROPIC)
    for part in ("backbone", "decoder"):
        getattr(target, part).load_state_dict(getattr(source, part).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for heads"):
        target.heads.load_state_dict(source.heads.state_dict())
    batch = images((1, 1, 32, 32, 64))
    assert [tuple(x.shape[2:]) for x in target(batch)[:2]] == [(32, 32, 64), (32, 16, 32)]


def test_transposed_convolutions_do_not_move():
    source, target = tiny(upsampling="transposed"), tiny(upsampling="transposed", strides=ANISOTROPIC)
    tiny(upsampling="transposed").decoder.load_state_dict(source.decoder.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for ups\.0\.conv\.weight"):
        target.decoder.load_state_dict(source.decoder.state_dict())


def test_strides_of_a_plan():
    two = [2, 2, 2]
    assert plan_strides([[1, 1, 1], [1, 2, 2], two, two, two, two]) == ((1, 2, 2), *[(2, 2, 2)] * 4)
    assert plan_strides([[1, 1, 1], *[two] * 6]) == ((2, 2, 2),) * 5
    assert plan_strides([[1, 1], [2, 2], [2, 2]]) == ((2, 2), (2, 2), (1, 1), (1, 1), (1, 1))
    with pytest.raises(UsageError, match="first entry must be ones"):
        plan_strides([two] * 5)


def test_a_stride_that_does_not_rise_keeps_the_deeper_map():
    backbone = stunet("s", **{**TINY, "strides": ((1, 2, 2), (2, 2, 2), (1, 1, 1), (2, 1, 1), (1, 1, 1))})
    assert backbone.scales == tuple(map(Level, (2, 4, 8, 16, 32, 32), (1, 2, 4, 4, 4, 4)))
    assert backbone.levels == (Level(2, 1), Level(4, 2), Level(32, 4))
    batch = images((2, 1, 8, 8, 8))
    with torch.inference_mode():
        maps, features = backbone.eval().maps(batch), backbone(batch)
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 8, 8), (8, 4, 4), (4, 2, 2), (4, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert [difference(x, maps[i]) for x, i in zip(features.pyramid, (0, 1, 5), strict=True)] == [0, 0, 0]


def test_a_unit_is_torchs_layers():
    """Group norm of a group a channel is instance norm, and the biases before it are removed again."""
    unit = fill(STUnit(3, 6, axes=3, stride=(1, 2, 2), project=True)).double()
    batch = images((2, 3, 5, 8, 7)).double()
    norms = []
    for own in (unit.norm1, unit.norm2):
        norms.append(nn.InstanceNorm3d(6, affine=True).double())
        norms[-1].load_state_dict(own.state_dict())
    with torch.inference_mode():
        branch = nn.functional.leaky_relu(norms[0](unit.conv1(batch) + 3), 0.01)
        expected = nn.functional.leaky_relu(norms[1](unit.conv2(branch)) + unit.shortcut(batch), 0.01)
        assert difference(unit(batch), expected) < 1e-12


def test_branches_are_dropped_in_training_only():
    backbone = fill(stunet("nano", depth=2, drop_path=0.9)).eval()
    plain = fill(stunet("nano", depth=2)).eval()
    batch = images((8, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(backbone(batch).pooled, plain(batch).pooled)
        torch.manual_seed(0)
        assert difference(backbone.train()(batch).pooled, plain(batch).pooled) > 0.1


def test_wrong_options_and_images_are_refused():
    with pytest.raises(UsageError, match="axes is 4"):
        stunet("nano", axes=4)  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match=r"6 strides; it takes one to five.*plan_strides"):
        stunet("nano", strides=(1, 2, 2, 2, 2, 2))
    with pytest.raises(UsageError, match="does not fit 2 axes"):
        stunet("nano", strides=((1, 2, 2), 2))
    with pytest.raises(UsageError, match="depth is 0"):
        stunet("nano", depth=0)
    with pytest.raises(UsageError, match="classes is 0"):
        segmentation(stunet("nano"), 0)
    volumes = stunet("s", **TINY)
    with pytest.raises(UsageError, match=r"volumes \(B, 1, D, H, W\).*axes="):
        volumes(torch.zeros(1, 1, 64, 64))
    with pytest.raises(UsageError, match=r"at least \(33, 33, 33\)"):
        volumes(torch.zeros(1, 1, 32, 32, 32))
