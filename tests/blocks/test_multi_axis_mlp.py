"""The multi-axis MLP and cross-gating, against the authors' flax modules in 64 bit and against who may see whom."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from vertebra.backbones.maxim.released import rules, turned_kernel
from vertebra.backbones.maxim.stage import ConvAttention, DenseAttention, SupervisedAttention
from vertebra.blocks.cross_gating import SpatialGates, cross_gating
from vertebra.blocks.multi_axis_mlp import MultiAxisMlp, SpatialMix, multi_axis_mlp
from vertebra.errors import UsageError
from vertebra.parity import check_golden, convert, fill, images, named, stored
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "maxim.json"
KEYS = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]
SIDES = {"block": 4, "grid": 2}
ENCODER = "stage_0_encoder_block_0/"
BLOCKS: dict[str, tuple[str, str, Any, list[tuple[int, ...]]]] = {  # theirs and ours around it, ours, inputs
    "mab": ("", "", lambda: MultiAxisMlp(8, ("grid", "block"), **SIDES), [(2, 8, 8, 16)]),
    "gates": (
        "stage_0_cross_gating_block_0/SplitHeadMultiAxisGating_x/",
        "stages.0.gates.0.gates_x.",
        lambda: SpatialGates(8, ("grid", "block"), **SIDES),
        [(2, 8, 8, 16)],
    ),
    "cross_gating": (
        "stage_0_cross_gating_block_0/",
        "stages.0.gates.0.",
        lambda: cross_gating(12, 16, channels=8, upsample=True, window=4, grid=2).layer,
        [(2, 12, 8, 16), (2, 16, 4, 8)],
    ),
    "cross_gating_same": (
        "stage_1_input_fuse_sam_0/",
        "stages.1.entries.0.fuse.",
        lambda: cross_gating(8, 8, window=4, grid=2).layer,
        [(2, 8, 8, 16), (2, 8, 8, 16)],
    ),
    "sam": (
        "stage_0_supervised_attention_module_0/",
        "stages.0.attentions.0.",
        lambda: SupervisedAttention(8, 3),
        [(2, 8, 8, 16), (2, 3, 8, 16)],
    ),
    "rcab": (
        f"{ENCODER}channel_attention_block_10/",
        "stages.0.encoders.0.group.blocks.1.",
        lambda: ConvAttention(8, 0.0),
        [(2, 8, 8, 16)],
    ),
    "rdcab": (
        "stage_0_global_block_0/channel_attention_block_1_0/",
        "stages.0.bottleneck.0.blocks.1.",
        lambda: DenseAttention(8, 0.0),
        [(2, 8, 8, 16)],
    ),
}


def released(tree: dict, above: str = "") -> dict[str, np.ndarray]:
    """Arrays with the authors' names and shapes, filled by name."""
    found = {}
    for name, inside in tree.items():
        if isinstance(inside, dict):
            found |= released(inside, f"{above}{name}/")
        else:
            layer, path = nn.Module(), above[:-1].split("/")
            leaf = "bias" if name == "bias" else "weight"
            layer.register_parameter(leaf, nn.Parameter(torch.zeros(inside[::-1])))
            for part in reversed(path):
                outer = nn.Module()
                outer.add_module(part, layer)
                layer = outer
            (tensor,) = fill(layer).state_dict().values()
            found[above + name] = tensor.numpy().T if len(inside) > 1 else tensor.numpy()
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_the_authors_to_the_eighth_digit(name):
    theirs, ours, make, shapes = BLOCKS[name]
    state = {theirs + key: turned_kernel(key, torch.tensor(value)) for key, value in released(KEYS[name]).items()}
    block = make().eval()
    own = [*rules(), (f"^{ours.replace('.', '[.]')}", ""), (r"project_x\.mix", "project_x")]
    block.load_state_dict(convert(state, own, block))
    block.double()
    with torch.inference_mode():
        found = block(*(images(shape).double().permute(0, 2, 3, 1) for shape in shapes))
    maps = [found] if isinstance(found, Tensor) else found
    outputs = {str(n): x.permute(0, 3, 1, 2) for n, x in enumerate(maps)} if len(maps) > 1 else maps[0]
    outputs = outputs if len(maps) > 1 else maps[0].permute(0, 3, 1, 2)
    assert max(check_golden(named(outputs), stored(GOLDEN, name).golden, 1e-7).values()) < 1e-7


def reached(layer: nn.Module, place: tuple[int, int], size: tuple[int, int]) -> list[list[int]]:
    """Places that the output of a place listens to."""
    x = images((1, *size, 4)).requires_grad_(True)
    layer(x)[0, place[0], place[1]].sum().backward()
    assert x.grad is not None
    return (x.grad.abs().sum((0, 3)) > 0).nonzero().tolist()


def test_who_is_mixed_with_whom():
    place, size = (5, 6), (8, 12)
    assert reached(SpatialMix("block", 4), place, size) == [[i, j] for i in range(4, 8) for j in range(4, 8)]
    # cells of 2 x 3 places: row 1 and column 0 of each
    assert reached(SpatialMix("grid", 4), place, size) == [[i, j] for i in (1, 3, 5, 7) for j in (0, 3, 6, 9)]


@pytest.mark.parametrize("axis", ["block", "grid"])
def test_the_matrix_goes_over_places_in_the_order_of_rows(axis):
    mix, x = SpatialMix(axis, 2, bias=0.5), images((1, 4, 4, 3))
    first = x[0, :2, :2] if axis == "block" else x[0, ::2, ::2]  # (2, 2, 3)
    expected = torch.einsum("pq,qc->pc", mix.weight, first.flatten(0, 1)) + 0.5
    found = mix(x)[0, :2, :2] if axis == "block" else mix(x)[0, ::2, ::2]
    torch.testing.assert_close(found.flatten(0, 1), expected)


def test_the_gate_is_added_to_one_and_starts_near_it():
    mlp = multi_axis_mlp(8, window=4, grid=4).layer.mlps[0]
    x = images((1, 8, 8, 8))
    nn.init.zeros_(mlp.mix.weight)
    passed = nn.functional.gelu(mlp.expand(mlp.norm(x)), approximate="tanh").chunk(2, -1)[0]
    torch.testing.assert_close(mlp(x), mlp.reduce(passed) + x)


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 11), (1, 3)])
@pytest.mark.parametrize("variant", ["multi_axis", "block", "grid"])
def test_any_size_continues_the_last_row_and_column(variant, size):
    block = fill(multi_axis_mlp(6, variant, window=4, grid=2)).eval()
    x = images((2, 6, *size))
    more = (0, -size[1] % block.layer.multiple, 0, -size[0] % block.layer.multiple)
    with torch.inference_mode():
        whole = block(nn.functional.pad(x, more, mode="replicate"))
        torch.testing.assert_close(block(x), whole[:, :, : size[0], : size[1]])


def test_variants_with_equal_sides_have_equal_parameters_and_differ():
    x, found = images((1, 8, 16, 16)), {}
    for variant in ("multi_axis", "block", "grid"):
        block = fill(multi_axis_mlp(8, variant, window=4, grid=4)).eval()
        found[variant] = block(x), sum(p.numel() for p in block.parameters())
    assert len({size for _, size in found.values()}) == 1
    assert not any(torch.allclose(found["multi_axis"][0], found[other][0]) for other in ("block", "grid"))


def test_cross_gating_of_maps():
    block = fill(cross_gating(6, 10, channels=8, window=4, grid=2, upsample=True)).eval()
    x, y = block(images((2, 6, 8, 12)), images((2, 10, 4, 6)))
    assert x.shape == y.shape == (2, 8, 8, 12)
    assert cross_gating(8, 8).layer.gates_x.mixes[0].bias.unique().tolist() == [1.0]
    odd = images((2, 6, 7, 9)), images((2, 10, 4, 5))
    continued = (
        nn.functional.pad(odd[0], (0, 3, 0, 1), mode="replicate"),
        nn.functional.pad(odd[1], (0, 1, 0, 0), mode="replicate"),
    )
    for found, whole in zip(block(*odd), block(*continued), strict=True):
        torch.testing.assert_close(found, whole[:, :, :7, :9])
    with pytest.raises(UsageError, match="half of the sides of x, rounded up"):
        block(images((2, 6, 8, 12)), images((2, 10, 8, 12)))
    with pytest.raises(UsageError, match="y has the sides of x"):
        cross_gating(4, 4)(images((1, 4, 12, 8)), images((1, 4, 6, 4)))
    with pytest.raises(UsageError, match="channels 0"):
        cross_gating(4, 4, channels=0)
    with pytest.raises(UsageError, match="has no variant 'blok'"):
        cross_gating(4, 4, "blok")


def test_swap_puts_it_into_a_network():
    network = timm.create_model("test_resnet", pretrained=False).eval()
    names = [name for name, module in network.named_modules() if name.endswith("conv2")][:1]
    options = {"place": "after", "window": 4, "grid": 4, "images": (3, 65, 97)}
    operated = swap(network, lambda name, _: name in names, "multi_axis_mlp", **options)
    assert operated.changed == tuple(names)
    x = images((2, 3, 65, 97))
    with torch.inference_mode():
        assert operated.model(x).isfinite().all() and not torch.equal(operated.model(x), network(x))


def test_wrong_options():
    with pytest.raises(UsageError, match=r"has no variant 'blocks'.*block"):
        multi_axis_mlp(8, "blocks")
    with pytest.raises(UsageError, match="window 0"):
        multi_axis_mlp(8, window=0)
    with pytest.raises(UsageError, match="ratio 1"):
        multi_axis_mlp(8, ratio=1)
