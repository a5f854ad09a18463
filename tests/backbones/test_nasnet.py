"""NASNet: exact counts, timm's and Cadene's outputs, paddings, any genotype, drop paths, the auxiliary head."""

import json
from pathlib import Path

import pytest
import torch
from timm.layers.pool2d_same import AvgPool2dSame
from timm.models.nasnet import NASNetALarge
from torch import nn

from vertebra.backbones.nasnet import auxiliary_head, nasnet, published
from vertebra.backbones.nasnet.cell import NASNET_A, OPERATIONS, Pool, SearchedCell
from vertebra.blocks.scheduled_drop_path import ScheduledDropPath, set_progress
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.surgery.operation import put

GOLDEN = Path(__file__).parents[1] / "golden" / "nasnet.json"
LARGE = {"depth": 6, "width": 168, "stem_width": 96, "skip_reduction": True}
COUNTS = [("mobile", {}, 1000, 5_289_978), ("mobile", LARGE, 1000, 88_753_150), ("cifar", {}, 10, 3_346_538)]


@pytest.mark.parametrize(("variant", "options", "classes", "params"), COUNTS, ids=["mobile", "large", "cifar"])
def test_counts_are_exact(variant, options, classes, params):
    with torch.device("meta"):
        backbone = nasnet(variant, **options)
    assert sum(p.numel() for p in backbone.parameters()) + (backbone.width + 1) * classes == params


def test_auxiliary_head_of_cifar_has_the_published_size():
    with torch.device("meta"):
        head = auxiliary_head(nasnet("cifar"), 10)
    assert sum(p.numel() for p in head.parameters()) == 1_631_498  # 1.631 M


def test_outputs_are_cadenes():
    known = stored(GOLDEN, "mobile")
    with torch.inference_mode():
        found = named(fill(nasnet("mobile")).eval()(images(known.shape)).pyramid)
    found = {f"pyramid.{name}": tensor for name, tensor in found.items()}
    assert max(check_golden(found, known.golden, 1e-5).values()) < 1e-5


def test_cadenes_keys_become_ours():
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["mobile"]
    names = [f"{cell}.{name}".lstrip(".") for cell, kind in keys["modules"].items() for name in keys["names"][kind]]
    with torch.device("meta"):
        backbone = nasnet("mobile")
    wanted = [name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")]
    assert len(names) == len(wanted) + 2 and len(set(names)) == len(names)  # their classifier
    with pytest.raises(ParityError, match="other shapes") as told:  # the names alone are known
        published({name: torch.empty(0) for name in names}, backbone)
    assert not any(words in str(told.value) for words in ("left over", "missing", "two become one"))


def tiny(padding: str) -> tuple[nn.Module, nn.Module]:
    """timm's network at a small width, and ours with its weights."""
    theirs = fill(
        NASNetALarge(num_features=192, stem_size=8, num_classes=3, pad_type="same" if padding == "same" else "")
    )
    ours = nasnet("mobile", depth=6, width=8, stem_width=8, skip_reduction=True, padding=padding)  # type: ignore[typeddict-item]
    ours.load_state_dict(published(theirs.state_dict(), ours))
    for name, module in list(theirs.named_modules()):
        if isinstance(module, AvgPool2dSame):  # counts the padding, as the released network does not
            put(theirs, name, Pool("avg", 3, 2, "same"))
    return ours, theirs


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_outputs_are_timms_at_odd_and_even_sides(padding):
    ours, theirs = tiny(padding)
    for size in ((97, 64), (66, 81)):
        batch = images((2, 3, *size))
        with torch.inference_mode():
            assert difference(ours.eval()(batch).pyramid[-1], theirs.eval().forward_features(batch)) < 1e-5
    with torch.no_grad():
        assert difference(ours.train()(batch).pyramid[-1], theirs.train().forward_features(batch)) < 1e-4


@pytest.mark.parametrize(("stem", "skipping"), [("cifar", [1, 3]), ("imagenet", [3, 5])])
def test_cells_after_a_reduction_can_skip_what_it_read(stem, skipping):
    backbone = nasnet("nano", stem=stem, width=8, skip_reduction=True)
    kinds = [len(cell.output) == 4 for cell in backbone.cells]
    assert [number for number, reduction in enumerate(kinds) if reduction][-2:] == skipping
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    for number, cell in enumerate(backbone.cells):
        cell.register_forward_hook(
            lambda _, args, out, at=number: inputs.update({at: args[1]}) or outputs.update({at: out})
        )
    with torch.inference_mode():
        backbone.eval()(images((1, 3, 64, 64)))
    after = skipping[-1] + 1
    assert inputs[after] is outputs[after - 3] and inputs[skipping[-1]] is outputs[skipping[-1] - 2]


def test_paddings_differ_on_even_sides_alone():
    same, symmetric = (Pool("max", 3, 2, padding) for padding in ("same", "symmetric"))
    odd, even = images((1, 2, 9, 7)), images((1, 2, 8, 6))
    assert torch.equal(same(odd), symmetric(odd)) and not torch.equal(same(even), symmetric(even))
    padded = nn.functional.pad(even, (0, 1, 0, 1), value=float("-inf"))  # TensorFlow's
    assert torch.equal(same(even), nn.functional.max_pool2d(padded, 3, 2))
    average = Pool("avg", 3, 2, "same")(torch.ones(1, 1, 8, 7))
    assert torch.equal(average, torch.ones(1, 1, 4, 4))  # the padding does not count


EVERYTHING = {
    "pairs": [
        ("identity", 0, "conv_1x1", 1),
        ("conv_3x3", 0, "conv_1x3_3x1", 1, "concat"),
        ("conv_1x7_7x1", 0, "dilated_3x3", 1),
        ("avg_3x3", 0, "max_3x3", 3),
        ("max_5x5", 1, "max_7x7", 0),
        ("sep_3x3", 2, "sep_5x5", 3, "concat"),
        ("sep_7x7", 3, "identity", 3),
    ]
}


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_any_genotype_at_any_depth_and_width(stem, padding):
    assert {word for pair in EVERYTHING["pairs"] for word in pair if word in OPERATIONS} == set(OPERATIONS)
    given = {"normal": EVERYTHING, "reduction": {**EVERYTHING, "output": [0, 4, 5, 6, 7, 8]}}
    given = json.loads(json.dumps(given))  # data: it survives a file
    backbone = fill(nasnet("nano", genotype=given, depth=2, width=8, stem_width=6, stem=stem, padding=padding))
    # unread states of the normal cell: 4, 5, 6, 7 (concatenated, twice as wide) and 8
    assert next(cell.width for cell in reversed(backbone.cells) if cell.output == (4, 5, 6, 7, 8)) == 6 * 32
    features = backbone.train()(images((3, 3, 70, 69)))
    assert [level.channels for level in backbone.levels] == [level.shape[1] for level in features.pyramid]
    sum(level.square().sum() for level in features.pyramid).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("sep_4x4", 0, "identity", 1), "there is no operation 'sep_4x4'"),
        (("identity", 0, "identity", 2), "it can read the states 0 to 1"),
        (("identity", 0, "identity", 1, "mean"), "it must be"),
        (("identity", 0, "identity"), "it must be"),
    ],
)
def test_wrong_genotypes_are_refused(pair, message):
    with pytest.raises(UsageError, match=message):
        nasnet("nano", genotype={"normal": {"pairs": [pair]}, "reduction": NASNET_A["reduction"]})
    with pytest.raises(UsageError, match="has no reduction cell"):
        nasnet("nano", genotype={"normal": NASNET_A["normal"]})  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="output of the normal cell"):
        nasnet("nano", genotype={**NASNET_A, "normal": {**NASNET_A["normal"], "output": (7,)}})


def test_drop_paths_grow_with_depth_and_progress_and_spare_identities():
    backbone = fill(nasnet("nano", drop_path=0.4))
    drops = [block.drop for block in backbone.modules() if isinstance(block, ScheduledDropPath)]
    assert drops == pytest.approx([0.4 * (number + 1) / 5 for number in range(5)])
    x = images((4, 3, 32, 32))
    backbone.train()
    assert set_progress(backbone, 0.0) == 5
    assert torch.equal(backbone(x).pooled, backbone(x).pooled)
    set_progress(backbone, 1.0)
    torch.manual_seed(0)
    assert not torch.equal(backbone(x).pooled, backbone(x).pooled)
    only = {"pairs": [("identity", 0, "identity", 0)]}
    options = {"stride": 1, "padding": "same", "eps": 1e-3, "drop_path": 0.9}
    cell = SearchedCell(only, (4, 1), (4, 1), 4, **options).train()  # type: ignore[arg-type]
    assert torch.equal(
        cell(x[:, :1].repeat(1, 4, 1, 1), x[:, :1].repeat(1, 4, 1, 1)), cell(*[x[:, :1].repeat(1, 4, 1, 1)] * 2)
    )


def test_auxiliary_head_reads_the_last_level_but_one():
    backbone = fill(nasnet("nano")).train()
    head = fill(auxiliary_head(backbone, 7)).train()
    features = backbone(images((3, 3, 32, 32)))
    logits = head(features)
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    reached = [bool(cell.squeeze[0].weight.grad is not None) for cell in backbone.cells]
    assert reached == [True, True, True, False, False]  # the last reduction and what follows it play no part
    with pytest.raises(UsageError, match="build it with the size"):
        head(backbone(images((2, 3, 64, 64))))
    with pytest.raises(UsageError, match="needs a map of 5 x 5 cells"):
        auxiliary_head(nasnet("mobile", image_size=64), 10)
    with torch.device("meta"):
        mobile = nasnet("mobile", image_size=(224, 209))
        assert auxiliary_head(mobile, 10).eval()(mobile.eval()(torch.empty(1, 3, 224, 209))).shape == (1, 10)


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="has no variant 'mobil'"):
        nasnet("mobil")
    with pytest.raises(UsageError, match="large is timm's network and has no option depth; mobile, cifar, nano have"):
        nasnet("large", depth=2)
    with pytest.raises(UsageError, match="mobile is none of timm's networks"):
        nasnet("mobile", network={"pad_type": "same"})
    with pytest.raises(UsageError, match="stem is 'plain'"):
        nasnet("nano", stem="plain")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="width is 4; it must be at least 8"):
        nasnet("mobile", width=4)
    with pytest.raises(UsageError, match="padding is 'valid'"):
        nasnet("nano", padding="valid")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="at least 3x3"):
        nasnet("nano")(torch.zeros(1, 3, 2, 2))
