"""ViTDet: detectron2's outputs and names, any plain ViT of timm, windows, convolutions across them, rates by depth."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model
from torch.nn.functional import interpolate

from vertebra.backbones.vitdet import ViTDet, published, vitdet
from vertebra.config import Plan
from vertebra.errors import ParityError, UsageError
from vertebra.methods.supervised import Supervised
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.spec import Spec
from vertebra.tasks.classify import classify
from vertebra.training.cost import count
from vertebra.training.optimizers import parameter_groups

GOLDEN = Path(__file__).parents[1] / "golden" / "vitdet.json"
SMALL = {
    "dim": 48, "depth": 4, "heads": 3, "window": 7, "crossings": 2, "pretrain_size": 112, "image_size": 224,
}  # fmt: skip
NETS = {
    "global at 224x224": SMALL,
    "global at 200x176": SMALL,
    "global at 240x336": SMALL,
    "conv at 200x176": {**SMALL, "propagation": "conv"},
    "b, 2 blocks, at 224x224": {"depth": 2, "crossings": 1, "image_size": 224},
}


@pytest.mark.parametrize("name", NETS)
def test_computes_what_the_reference_does(name):
    """At whole patches and at others, at whole windows and at others, and with tables and positions resized."""
    reference = stored(GOLDEN, name)
    backbone = fill(vitdet("b", **NETS[name])).eval()
    with torch.inference_mode():
        found = named(backbone(images(reference.shape)))
    tokens = found.pop("tokens")
    assert len(found) == 2 and max(check_golden(found, reference.golden).values()) < 1e-5
    assert torch.equal(tokens.mT.unflatten(2, found["pyramid.0"].shape[2:]), found["pyramid.0"])


def test_differs_from_a_plain_vit_by_the_tables_alone():
    """Eight blocks with tables of 27 rows and columns, four with 127; no class token, and no norm at the end."""
    with torch.device("meta"):
        ours, plain = vitdet("b"), Spec("timm/vit_base_patch16_224").build()
    tables = 8 * 2 * 27 * 64 + 4 * 2 * 127 * 64
    assert tables == 92_672
    assert count(ours).params == count(plain).params - 2 * 768 - 2 * 768 + tables == 85_888_256
    assert [len(block.attn.rows) for block in ours.blocks] == [27, 27, 127] * 4


def macs(side: int, **options) -> int:
    with torch.device("meta"):
        return count(vitdet("b", depth=2, image_size=side, **{"crossings": 1, **options})).macs


def test_windows_are_linear_in_the_area_and_global_attention_is_not():
    assert macs(896, crossings=0) == 4 * macs(448, crossings=0)
    found = []
    for side in (512, 1024):
        cells, dim = (side // 16) ** 2, 768
        linear = cells * dim * (3 * 16**2 + 2 * (4 * dim + 8 * dim))
        found.append(macs(side, window=0) - linear - 2 * 2 * cells * side // 16 * dim)  # without the tables' products
    assert found[1] == 16 * found[0] == 2 * 2 * 4096**2 * 768


def listed(name: str) -> dict[str, torch.Tensor]:
    """The reference's names and shapes, with numbers of their own in each tensor."""
    lines = (line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"][name].split())
    shapes = {key: [int(side) for side in sides.split("x")] for key, sides in lines}
    return {key: torch.arange(prod(shape)).float().view(shape) + i for i, (key, shape) in enumerate(shapes.items())}


PLACES = {
    "patch_embed.proj.weight": "embed.conv.weight",
    "blocks.1.attn.rel_pos_h": "blocks.1.attn.rows",
    "blocks.2.attn.rel_pos_w": "blocks.2.attn.columns",
    "blocks.0.attn.qkv.bias": "blocks.0.attn.qkv.bias",
    "blocks.2.mlp.fc1.weight": "blocks.2.mlp.fc1.weight",
    "blocks.1.norm2.weight": "blocks.1.norm2.weight",
}


@pytest.mark.parametrize("prefix", ["backbone.net.", "net."])
def test_names_of_the_reference_become_ours(prefix, tmp_path):
    """A detector's checkpoint, and its backbone's."""
    state = listed("b")
    whole = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if "backbone" in prefix:
        whole |= {"backbone.simfp_2.0.weight": torch.ones(3), "roi_heads.mask.bias": torch.ones(2)}
    save_file(whole, tmp_path / "theirs.safetensors")
    found = vitdet("b", depth=3, crossings=1, weights=str(tmp_path / "theirs.safetensors")).state_dict()
    for theirs, ours in PLACES.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    assert torch.equal(found["embed.positions"], state["pos_embed"][:, 1:])
    with pytest.raises(ParityError, match=r"missing from it: blocks\.3"):
        published(state, vitdet("b", depth=4, crossings=1))


def test_names_of_convolutions_become_ours():
    small = {**SMALL, "depth": 1, "crossings": 1, "propagation": "conv"}
    backbone, state = fill(vitdet("b", **small)), listed("conv")
    assert len(state) == 9
    rest = {name: tensor for name, tensor in backbone.state_dict().items() if "residual" not in name}
    found = published({**rest, **state}, backbone)
    assert torch.equal(found["blocks.0.residual.narrow.weight"], state["blocks.0.residual.conv1.weight"][:, :, 0, 0])
    assert torch.equal(found["blocks.0.residual.mix.weight"], state["blocks.0.residual.conv2.weight"])
    assert torch.equal(found["blocks.0.residual.norm3.bias"], state["blocks.0.residual.norm3.bias"])


def test_tables_and_positions_of_a_checkpoint_fit_another_size(tmp_path):
    """From 224 pixels to 320 x 160: the network that is built for them computes what the stretched one does."""
    first = fill(vitdet("b", **SMALL)).eval()
    save_file(first.state_dict(), tmp_path / "ours.safetensors")
    other = vitdet("b", **{**SMALL, "image_size": (320, 160)}, weights=str(tmp_path / "ours.safetensors")).eval()
    assert (len(other.blocks[1].attn.rows), len(other.blocks[1].attn.columns)) == (39, 19)
    assert (len(other.blocks[0].attn.rows), len(first.blocks[1].attn.rows)) == (13, 27)
    batch = images((2, 3, 320, 160))
    with torch.inference_mode():
        assert difference(other(batch).pooled, first(batch).pooled) < 1e-6
    larger = vitdet("b", **{**SMALL, "pretrain_size": 160}, weights=str(tmp_path / "ours.safetensors"))
    table = first.embed.positions.mT.unflatten(2, (7, 7))
    wanted = interpolate(table, (10, 10), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(larger.embed.positions, wanted)


def tokens_of(network: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Tokens of timm's ViT before its last norm."""
    return network.blocks(network.norm_pre(network._pos_embed(network.patch_embed(batch))))


VITS = {
    "test_vit2": {"reg_tokens": 0},
    "test_vit4": {"reg_tokens": 0, "qk_norm": True},
    "vit_tiny_patch16_224": {
        "depth": 3, "class_token": False, "global_pool": "avg", "pre_norm": True, "qkv_bias": False,
        "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1,
    },
    "vit_base_patch14_reg4_dinov2": {
        "embed_dim": 64, "depth": 2, "num_heads": 2, "reg_tokens": 0, "class_token": False, "global_pool": "avg",
        "img_size": 98,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VITS)
def test_any_plain_vit_becomes_one(name):
    """Norms of several kinds and places, scales of layers, other patches: without windows, to the last digits."""
    network = dict(VITS[name])
    size = network.pop("img_size", 160)
    source = fill(Spec(f"timm/{name}", {"network": network, "image_size": size}).build()).eval()
    ours = vitdet(vit=source, window=0, crossings=0, image_size=size).eval()
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    batch = images((2, 3, size, size))
    with torch.inference_mode():
        expected, found = tokens_of(source.network, batch), ours(batch)
        assert difference(found.tokens, expected) < 1e-5
        windowed = vitdet(vit=source, window=4, crossings=1, image_size=size).eval()(batch)
    assert difference(windowed.tokens, expected) > 1e-2
    fill(ours)  # a copy: the given network stays
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())


def test_class_token_and_registers_are_left_behind():
    """A ViT that had them computes what the same without them does."""
    source = fill(Spec("timm/test_vit2", {"network": {"class_token": True}}).build()).eval()
    ours, network, batch = vitdet(vit=source, window=0).eval(), source.network, images((2, 3, 160, 160))
    assert network.num_prefix_tokens == 2 and network.pos_embed.shape[1] == 102
    network.cls_token = network.reg_token = None
    network.pos_embed = torch.nn.Parameter(network.pos_embed[:, 2:])
    network.num_prefix_tokens = 0
    with torch.inference_mode():
        assert difference(ours(batch).tokens, tokens_of(network, batch)) < 1e-5


def test_weights_of_a_plain_vit_from_a_file(tmp_path):
    """By timm's name with its file, and by widths alone: the same numbers, and zero tables."""
    source = fill(Spec("timm/test_vit", {}).build())
    state = {**source.network.state_dict(), "head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    save_file(state, tmp_path / "vit.safetensors")
    file, rest = str(tmp_path / "vit.safetensors"), {"image_size": 160, "window": 4, "crossings": 2}
    live, named_one = vitdet(vit=source, **rest), vitdet(vit="test_vit", weights=file, **rest)
    shape = {"dim": 64, "depth": 6, "heads": 2, "ratio": 3, "pretrain_size": 160}
    bare = vitdet("b", **shape, **rest, weights=file)
    for other in (named_one, bare):
        assert other.state_dict().keys() == live.state_dict().keys()
        for name, tensor in live.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    assert not any(tensor.any() for name, tensor in live.state_dict().items() if "rows" in name or "columns" in name)
    conv = vitdet("b", **shape, **rest, propagation="conv", weights=file).eval()
    assert torch.equal(conv.blocks[2].mlp.fc1.weight, live.blocks[2].mlp.fc1.weight)
    assert not conv.blocks[2].residual.norm3.weight.any()


def test_preprocessing_weights_and_patches_of_a_vit():
    grey = vitdet(vit="vit_tiny_patch16_224", image_size=64, channels=1)
    assert grey.preprocess.mean == pytest.approx((0.5,)) and grey.preprocess.size == (64, 64)
    source = fill(Spec("timm/test_vit", {}).build())
    other = vitdet(vit=source, patch=20, image_size=200).eval()
    assert other.levels[0].stride == 20 and other.embed.conv.weight.shape[2:] == (20, 20)
    with torch.no_grad():
        flat = torch.ones(1, 3, 80, 80)
        found = other.embed.conv(flat)[0, :, 0, 0]
        expected = source.network.patch_embed.proj(flat)[0, :, 0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # a flat image is the same to larger patches
    assert vitdet(vit="test_vit").preprocess.size == (1024, 1024)  # ViTDet's, not the ViT's


def heard(backbone: ViTDet, size: int = 32) -> set[tuple[int, int]]:
    """Patches that the first one listens to."""
    x = images((1, 3, size, size)).requires_grad_(True)
    backbone(x).pyramid[0][0, :, 0, 0].sum().backward()
    patch = backbone.embed.patch
    return {(row // patch, column // patch) for row, column in x.grad[0].abs().sum(0).nonzero().tolist()}


def test_what_carries_across_windows():
    window = {(row, column) for row in range(3) for column in range(3)}
    assert heard(fill(vitdet("nano", crossings=0)).eval()) == window
    assert len(heard(fill(vitdet("nano", crossings=1)).eval())) == 64
    near = heard(fill(vitdet("nano", crossings=(0,), propagation="conv")).eval())
    assert window < near and (5, 5) in near and (6, 0) not in near  # one place further, in all of its windows
    fresh = vitdet("nano", crossings=(0,), propagation="conv").eval()
    assert heard(fresh) == window  # starts as a shortcut


def test_crossings_are_spaced_as_the_authors_space_them():
    def wide(**options) -> list[int]:
        with torch.device("meta"):
            return [number for number, block in enumerate(vitdet(**options).blocks) if not block.window]

    assert wide(variant="b") == [2, 5, 8, 11]
    assert wide(variant="l") == [5, 11, 17, 23]
    assert wide(variant="h") == [7, 15, 23, 31]
    assert wide(variant="nano", crossings=(0, 2)) == [0, 2] and wide(variant="nano", crossings=0) == []


def test_rates_fall_by_depth_as_the_authors_have_it():
    """Patches and positions are layer 0, block i is layer i + 1, the rest is the last: rate^(depth + 1 - layer)."""
    method = Supervised(classify(vitdet("nano"), ["one", "other"]))
    groups = parameter_groups(method, Plan(epochs=1, batch=4, lr=1e-3, layer_decay=0.7))
    scale = {id(tensor): group["lr_scale"] for group in groups for tensor in group["params"]}
    found = {name: scale[id(tensor)] for name, tensor in method.backbone.named_parameters()}
    for name, layer in [
        ("embed.positions", 0),
        ("embed.conv.weight", 0),
        ("blocks.0.attn.qkv.weight", 1),
        ("blocks.2.attn.rows", 3),
        ("blocks.3.mlp.fc2.bias", 4),
    ]:
        assert found[name] == pytest.approx(0.7 ** (5 - layer)), name
    assert scale[id(next(p for n, p in method.named_parameters() if "backbone" not in n))] == 1


def test_starts_as_the_reference_does():
    torch.manual_seed(0)
    block = vitdet("b", depth=1, crossings=1, propagation="conv", image_size=224, drop_path=0.1).blocks[0]
    assert block.norm1.eps == block.residual.norm2.eps == 1e-6
    assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(block.residual.mix.weight.detach().std()) == pytest.approx((2 / 9 / 384) ** 0.5, rel=0.03)
    assert not block.attn.rows.any() and not block.attn.qkv.bias.any() and not block.residual.norm3.weight.any()


def test_wrong_options_are_refused():
    with torch.device("meta"):
        hybrid = create_model("vit_tiny_r_s16_p8_224", depth=1)
    for options, message in [
        ({"heads": 5}, "dim 96, heads 5"),
        ({"crossings": 5}, r"crossings is 5; .* 0 to 4"),
        ({"crossings": (1, 4)}, r"crossings is \(1, 4\)"),
        ({"propagation": "none"}, "global or conv"),
        ({"window": -1}, "window is -1"),
        ({"vit": "test_vit", "depth": 3, "dim": 5}, "decides depth, dim; leave them out"),
        ({"vit": "resnet18"}, "vit is a ResNet"),
        ({"vit": hybrid}, "vit has HybridEmbed"),
        ({"vit": "test_vit", "weights": "random.safetensors"}, "no such file"),
        ({"vit": "test_vot"}, "timm has no network called 'test_vot'"),
        ({"vit": "test_vit", "weights": "nowhere"}, "nowhere"),
    ]:
        with pytest.raises(UsageError, match=message):
            vitdet("nano", **options)
