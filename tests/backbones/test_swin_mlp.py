"""Swin-MLP: parity with the authors' network, its counts, their names, which windows move, any size."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vertebra.backbones.swin_mlp import published, swin_mlp
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "swin_mlp.json"
CASES: dict[str, tuple[str, Any]] = {
    "tiny_c24": ("tiny_c24", {}),
    "tiny_c6 of four blocks": ("tiny_c6", {"depths": (1, 2, 1, 1)}),
    "shifted everywhere": ("base", {"dim": 16, "depths": (2, 2, 2, 2), "heads": (2, 4, 2, 8), "window": 2}),
    "odd windows": ("base", {"dim": 12, "depths": (2, 4, 2), "heads": (1, 2, 12), "window": 5}),
}


def outputs(backbone: torch.nn.Module, case: str) -> dict[str, Tensor]:
    with torch.inference_mode():
        return named(fill(backbone).eval()(images(stored(GOLDEN, case).shape)))


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_authors_network_does(case):
    """The last two of images that are not square; in the last one a map is as high as a window and is not shifted."""
    variant, options = CASES[case]
    found = outputs(swin_mlp(variant, **options), case)
    assert max(check_golden(found, stored(GOLDEN, case).golden, 2e-5).values()) < 2e-5


def test_windows_that_stay_are_no_parity():
    variant, options = CASES["odd windows"]
    backbone: Any = swin_mlp(variant, **options)
    for blocks in backbone.stages[1:]:
        for block in blocks:
            block.mixer.shift = 0
    with pytest.raises(ParityError, match=r"pyramid\.1"):
        check_golden(outputs(backbone, "odd windows"), stored(GOLDEN, "odd windows").golden)


@pytest.mark.parametrize(
    ("variant", "params", "printed"),
    [
        ("tiny_c24", 20_386_632, 4.0),
        ("tiny_c12", 21_152_072, 4.0),
        ("tiny_c6", 22_682_952, 4.0),
        ("base", 60_659_416, 10.4),
    ],
)
def test_parameters_are_exact_and_macs_the_printed_ones(variant, params, printed):
    with torch.device("meta"):
        backbone = swin_mlp(variant)
    cost, classifier = count(backbone), 1000 * backbone.width
    assert cost.params + classifier + 1000 == params
    assert (cost.macs + classifier) / 1e9 == pytest.approx(printed, rel=0.01)


@pytest.mark.parametrize(("variant", "channels"), [("tiny_c24", 24), ("tiny_c12", 12), ("tiny_c6", 6), ("base", 32)])
def test_names_say_the_channels_of_a_head(variant, channels):
    with torch.device("meta"):
        backbone: Any = swin_mlp(variant)
    mixers = [blocks[0].mixer for blocks in backbone.stages]
    assert {level.channels / mixer.heads for level, mixer in zip(backbone.levels, mixers, strict=True)} == {channels}


def test_every_second_block_moves_its_windows():
    with torch.device("meta"):
        tiny: Any = swin_mlp()
        base: Any = swin_mlp("base", drop_path=0.46)
    shifts = [[block.mixer.shift for block in blocks] for blocks in tiny.stages]
    assert shifts == [[0, 4], [0, 4], [0, 4] * 3, [0, 4]]
    assert {block.mixer.shift for blocks in base.stages for block in blocks} == {0, 3}
    rates = [getattr(block.drop, "drop_prob", 0.0) for blocks in base.stages for block in blocks]
    assert rates == pytest.approx([0.02 * number for number in range(24)])


@pytest.mark.parametrize(
    ("size", "sides"),
    [((64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]), ((65, 29), [(17, 8), (9, 4), (5, 2), (3, 1)])],
)
def test_any_size(size, sides):
    backbone = swin_mlp(dim=24, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8)).eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, *size)))
        assert backbone(images((1, 3, 1, 1))).pooled.isfinite().all()
        torch.testing.assert_close(features.tokens, backbone.norm(features.pyramid[-1].flatten(2).mT))
    assert [tuple(x.shape[2:]) for x in features.pyramid] == sides
    assert features.tokens is not None and torch.equal(features.tokens.mean(1), features.pooled)


def test_blocks_leave_what_they_are_given():
    block: Any = fill(swin_mlp("nano")).eval().stages[0][1]  # type: ignore[index]
    x = images((2, 16, 12, 32))
    kept = x.clone()
    with torch.inference_mode():
        first = block(x)
        assert torch.equal(x, kept) and torch.equal(block(x), first)
    assert difference(block(x).detach(), first) < 1e-5  # with gradients too


def released() -> dict[str, Tensor]:
    """The authors' names and shapes of tiny_c12, with a number of its own in each tensor."""
    listed = [line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["tiny_c12"].split()]
    start = "layers.2.blocks.0."
    listed += [
        [name.replace(start, f"layers.2.blocks.{number}."), sides]
        for number in range(1, 6)
        for name, sides in listed
        if name.startswith(start)
    ]
    shapes = {name: [int(side) for side in sides.split("x")] for name, sides in listed}
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_released_names_become_ours():
    state = released()
    assert sum(tensor.numel() for tensor in state.values()) == 21_152_072
    with torch.device("meta"):
        backbone, other = swin_mlp("tiny_c12"), swin_mlp("tiny_c24")
    found = published(state, backbone)
    backbone.load_state_dict(found, assign=True)
    for theirs, ours in {
        "patch_embed.proj.weight": "embeds.0.proj.weight",
        "patch_embed.norm.bias": "embeds.0.norm.bias",
        "layers.0.downsample.reduction.weight": "embeds.1.reduce.weight",
        "layers.2.downsample.norm.weight": "embeds.3.norm.weight",
        "layers.0.blocks.1.spatial_mlp.bias": "stages.0.1.mixer.bias",
        "layers.2.blocks.5.norm2.weight": "stages.2.5.norm2.weight",
        "layers.3.blocks.0.mlp.fc1.weight": "stages.3.0.mlp.widen.weight",
        "layers.3.blocks.1.mlp.fc2.bias": "stages.3.1.mlp.narrow.bias",
        "norm.weight": "norm.weight",
    }.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    matrices = state["layers.1.blocks.1.spatial_mlp.weight"]  # theirs are of a convolution
    assert torch.equal(found["stages.1.1.mixer.weight"], matrices.squeeze(2)) and matrices.ndim == 3
    with pytest.raises(ParityError, match=r"other shapes: layers\.0\.blocks\.0\.spatial_mlp\.bias"):
        published(state, other)


def test_a_file_of_released_weights_is_loaded(tmp_path):
    ours = fill(swin_mlp("nano")).state_dict()
    state = {"head.weight": torch.zeros(7, 128), "head.bias": torch.zeros(7)}
    for name, tensor in ours.items():
        name = re.sub(r"^embeds\.0\.", "patch_embed.", name)
        name = re.sub(r"^embeds\.(\d)\.", lambda found: f"layers.{int(found[1]) - 1}.downsample.", name)
        name = re.sub(r"^stages\.(\d)\.", r"layers.\1.blocks.", name)
        for mine, theirs in (
            ("reduce", "reduction"),
            ("mixer", "spatial_mlp"),
            ("mlp.widen", "mlp.fc1"),
            ("mlp.narrow", "mlp.fc2"),
        ):
            name = name.replace(mine, theirs)
        state[name] = tensor[..., None] if name.endswith("spatial_mlp.weight") else tensor
    torch.save({"model": state}, tmp_path / "released.pth")
    backbone = swin_mlp("nano", weights=str(tmp_path / "released.pth"), allow_pickle=True)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in backbone.state_dict().items())


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    backbone: Any = swin_mlp("tiny_c24", depths=(1, 1, 1, 1))
    block = backbone.stages[2][0]
    for tensor in (
        block.mixer.weight,
        block.mlp.widen.weight,
        block.mlp.narrow.weight,
        backbone.embeds[2].reduce.weight,
    ):
        assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not block.mixer.bias.any() and not block.mlp.widen.bias.any() and block.norm1.eps == 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": (2, 0, 2)}, r"depths is \(2, 0, 2\); it must be at least 1"),
        ({"depths": (2, 2)}, r"heads is \(4, 8, 16\) and depths is \(2, 2\)"),
        ({"heads": (4, 8, 3)}, "3 heads do not divide 128 channels"),
        ({"window": 0}, "window is 0"),
        ({"patch": 0}, "patch is 0"),
        ({"ratio": 0}, "ratio 0 leaves no hidden channel"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        swin_mlp("nano", **options)
    with pytest.raises(UsageError, match="swin_mlp has no variant 'tiny'"):
        swin_mlp("tiny")
