"""MaxViT: sizes that no window divides, the global view of one block, its effect's arms and checks."""

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones import maxvit as page
from vertebra.backbones.maxvit import AnySize, armed, effect, maxvit
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.parity import difference, fill, images
from vertebra.tasks.classify import classify
from vertebra.training.cost import count

SMALL = page._Setting((32, 64), 1, (4, 3), 32, 40, 1)
TINY = {"embed_dim": (32, 64), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 32, "head_hidden_size": 64}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", SMALL)
    return effect("toy", read("digits"))


def block_of(arm: str) -> nn.Module:
    """One block of an arm without its convolutions, whose squeeze-and-excitation sees the whole map by itself."""
    block = fill(armed(arm, SMALL, 32)).eval().get_submodule("network.stages.0.blocks.0")
    block.conv = nn.Identity()
    return block


def heard(arm: str) -> set[tuple[int, int]]:
    """Cells of a map of 8 x 8 that the corner listens to after one block."""
    x = images((1, 32, 8, 8)).requires_grad_(True)
    block_of(arm)(x)[0, :, 0, 0].sum().backward()
    return {tuple(place) for place in x.grad[0].abs().sum(0).nonzero().tolist()}


def test_one_block_sees_the_whole_map_and_windows_alone_do_not():
    window = {(row, column) for row in range(4) for column in range(4)}
    assert heard("block") == window
    assert heard("grid") == {(row, column) for row in range(0, 8, 2) for column in range(0, 8, 2)}
    assert len(heard("full")) == 64


def part(kind: int) -> AnySize:
    """Attention within (0) or across (1) windows of 4 x 4."""
    backbone = fill(maxvit("tiny", image_size=32, network={**TINY, "transformer_window_size": (4, 4)})).eval()
    found = [module for module in backbone.modules() if isinstance(module, AnySize)]
    assert len(found) == 4 and all(module.partition_size == (4, 4) for module in found)
    return found[kind]


def by_hand(attn: nn.Module, x: torch.Tensor, groups: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Attention of one map (H, W, C) in groups of places of windows of 4 x 4, of which some are not on the map."""
    out, bias, (height, width) = torch.zeros_like(x), attn.rel_pos.get_bias(), x.shape[:2]
    for group in groups:
        real = [(number, place) for number, place in enumerate(group) if place[0] < height and place[1] < width]
        numbers = [number for number, _ in real]
        q, k, v = attn.qkv(torch.stack([x[place] for _, place in real])).chunk(3, 1)
        heads = []
        for head in range(attn.num_heads):
            slots = slice(head * attn.dim_head, (head + 1) * attn.dim_head)
            products = q[:, slots] @ k[:, slots].T * attn.scale
            products = products + bias.view(attn.num_heads, 16, 16)[head][numbers][:, numbers]
            heads.append(products.softmax(1) @ v[:, slots])
        y = attn.proj(torch.cat(heads, 1))
        for row, (_, place) in zip(y, real, strict=True):
            out[place] = row
    return out


def windows(rows: int, columns: int, interval: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """Places of the groups of a padded map: 4 x 4 of them, `interval` apart."""
    down, across = interval
    tops = [top for top in range(rows) if top // down % 4 == 0]
    lefts = [left for left in range(columns) if left // across % 4 == 0]
    return [[(top + i * down, left + j * across) for i in range(4) for j in range(4)] for top in tops for left in lefts]


@pytest.mark.parametrize("kind", [0, 1])
def test_what_is_padded_is_not_attended_to(kind):
    layer, x = part(kind), images((2, 6, 9, 32))
    padded_size, interval = (8, 12), ((1, 1), (2, 3))[kind]
    with torch.inference_mode():
        expected = torch.stack([by_hand(layer.attn, each, windows(*padded_size, interval)) for each in x])
        assert difference(layer._partition_attn(x), expected) < 1e-5
        whole = images((2, 8, 12, 32))  # whole windows take timm's way
        assert difference(layer._partition_attn(whole), layer_padded(layer, whole)) < 1e-5


def layer_padded(layer: AnySize, x: torch.Tensor) -> torch.Tensor:
    """Our way, where nothing is padded."""
    sides, size = (4, 4), (x.shape[1], x.shape[2])
    interval = (1, 1) if layer.partition_block else (size[0] // 4, size[1] // 4)
    return page.ungroup(layer._attended(page.group(x, sides, interval), None), sides, interval, size)


@pytest.mark.parametrize("size", [(64, 64), (45, 71), (33, 130), (7, 9)])
def test_takes_any_size(size):
    backbone = fill(maxvit("tiny", image_size=64, network={**TINY, "transformer_window_size": (4, 4)})).eval()
    batch = images((2, 3, *size))
    with torch.inference_mode():
        found = backbone(batch)
        assert found.pooled.isfinite().all() and difference(backbone(batch[:1]).pooled, found.pooled[:1]) < 1e-4
    for level, each in zip(backbone.levels, found.pyramid, strict=True):
        assert tuple(each.shape[2:]) == tuple(-(-side // level.stride) for side in size)


def test_a_checkpoint_is_loaded_into_what_takes_any_size():
    from vertebra.config import Run
    from vertebra.spec import Spec
    from vertebra.training.running import unweighted

    network = {**TINY, "transformer_window_size": (4, 4)}
    run = Run(data="photos", backbone=Spec("maxvit/tiny", {"image_size": 64, "network": network}))
    built = unweighted(run, run.backbone.build()).build()
    assert built.altered and any(isinstance(module, AnySize) for module in built.modules())
    assert not Spec("timm/maxvit_tiny_tf_224", {"image_size": 64, "network": network}).build().altered


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_have_the_same_parameters_and_cost_grows_fourfold(scale):
    setting = page._SETTINGS[scale]
    with torch.device("meta"):
        nets = {arm: armed(arm, setting, 64) for arm in page._ARMS}
    params = {arm: count(net).params for arm, net in nets.items()}
    assert params["full"] == params["block"] == params["grid"]
    assert all(0.95 < each / params["full"] < 1.05 for each in params.values())
    kinds = {
        arm: [module.partition_block for module in net.modules() if isinstance(module, AnySize)]
        for arm, net in nets.items()
    }
    blocks = 3 * setting.depth
    assert kinds == {
        "full": [True, False] * blocks,
        "block": [True] * 2 * blocks,
        "grid": [False] * 2 * blocks,
        "conv": [],
    }
    assert count(nets["full"], size=(128, 128)).macs == pytest.approx(4 * count(nets["full"]).macs, rel=0.01)


def test_effect_measures_every_arm(small, tmp_path):
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("full", "conv")}
    assert all(set(row) == set(small.metrics) for row in found.values())
    assert 0 <= found["full"]["resized"] <= 100 and 3.5 < found["full"]["macs_growth"] < 4.5
    assert found["conv"]["resized"] != found["conv"]["resized"]


def test_tables_are_resized_or_drawn_anew(small):
    """The network elsewhere has the weights of the trained one, windows of 6 x 6, and tables for them."""
    data, seen = read("digits"), []
    model = classify(fill(armed("full", SMALL, 32)), data.classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    test = data.split("test").select(np.arange(8))
    watch = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(module) if isinstance(module, AnySize) else None
    )
    try:
        scores = [page._elsewhere(model, SMALL, test, fresh=fresh) for fresh in (False, True)]
    finally:
        watch.remove()
    layers = list(dict.fromkeys(seen))
    assert all(0 <= score <= 100 for score in scores) and {layer.partition_size for layer in layers} == {(6, 6)}
    old = [layer for layer in model.modules() if isinstance(layer, AnySize)]
    assert len(layers) == 2 * len(old) == 8
    for first, resized, fresh in zip(old, layers[:4], layers[4:], strict=True):
        table = first.attn.rel_pos.relative_position_bias_table
        wanted = nn.functional.interpolate(table[None], (11, 11), mode="bilinear")[0]
        assert torch.equal(resized.attn.rel_pos.relative_position_bias_table, wanted)
        assert difference(fresh.attn.rel_pos.relative_position_bias_table, wanted) > 0.1
        assert torch.equal(fresh.mlp.fc1.weight, first.mlp.fc1.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checks_can_fail(small):
    def holds(ahead: float, growth: float, kept: float) -> list[bool]:
        rows = {arm: {"top1": 50.0, "params": 1.0} for arm in page._ARMS}
        rows["full"] = {"top1": 50 + ahead, "params": 1.0, "resized": 40 + kept, "fresh": 40.0}
        rows["full"] |= {"time": growth, "macs_growth": 4.0}
        values = {arm: {name: np.array([value]) for name, value in row.items()} for arm, row in rows.items()}
        return [check.holds for check in small.checks(Measured(values))]

    assert holds(0.3, 4.5, 1) == [True] * 5
    assert holds(0.1, 5.0, -1) == [False] * 5
