"""The vision transformer of experts: counts by hand, what a token pays for, its limit, tasks, layouts, sizes."""

import pytest
import torch
from torch import nn

from vertebra.backbones.moe_vit import VARIANTS, moe_vit
from vertebra.blocks.expert_attention import ExpertAttention, MultiQueryAttention
from vertebra.blocks.mixture_of_experts import MixtureOfExperts, doing, watched
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.training.cost import count

DIM, WIDTH, TOKENS = 384, 128, 197


def expected(mlps: int, attentions: int, tasks: int = 13) -> tuple[int, int]:
    """Parameters and active MACs by hand, of so many MLPs and attentions of experts in twelve blocks."""
    shared = DIM * 2 * WIDTH + 2 * WIDTH
    plain_attention, plain_mlp = 2 * DIM * 6 * WIDTH + 6 * WIDTH + DIM, 8 * DIM**2 + 5 * DIM
    params = 12 * (shared + 4 * DIM) + (12 - attentions) * plain_attention + (12 - mlps) * plain_mlp
    params += attentions * 15 * (2 * DIM * WIDTH + WIDTH + DIM) + mlps * 16 * (2 * DIM**2 + 2 * DIM)
    params += tasks * (2 * DIM * (15 * attentions + 16 * mlps) + DIM)  # gates with noise, vectors
    params += (3 * 256 + 1) * DIM + (TOKENS + 1) * DIM + 2 * DIM  # patches, positions and class token, the last norm
    a_token = 12 * (DIM * 2 * WIDTH + 2 * DIM * 6 * WIDTH + 8 * DIM**2) + DIM * (15 * attentions + 16 * mlps)
    return params, 196 * 3 * 256 * DIM + TOKENS * a_token + 12 * 2 * TOKENS**2 * 6 * WIDTH


@pytest.mark.parametrize(
    ("variant", "layout", "mlps", "attentions"),
    [
        ("small", "mlp", 12, 0),
        ("small", "every_other", 6, 0),
        ("attention", "alternate", 6, 6),
        ("attention", "both", 12, 12),
    ],
)
def test_parameters_and_active_macs_by_hand(variant, layout, mlps, attentions):
    with torch.device("meta"):
        backbone = moe_vit(variant, layout=layout)
    cost = count(backbone)
    assert (cost.params, cost.macs) == expected(mlps, attentions)
    kinds = [type(block.mlp) is MixtureOfExperts for block in backbone.blocks]
    assert kinds == [mlps == 12 or number % 2 == 0 for number in range(12)]
    kinds = [type(block.attn) is ExpertAttention for block in backbone.blocks]
    assert kinds == [attentions == 12 or (attentions == 6 and number % 2 == 1) for number in range(12)]
    assert VARIANTS[variant]["tasks"] == 13


def test_more_experts_cost_no_more_than_their_columns_of_the_gate():
    with torch.device("meta"):
        few, many = (count(moe_vit("small", depth=2, experts=experts)) for experts in (4, 32))
    assert many.macs - few.macs == 2 * TOKENS * DIM * 28
    assert many.params - few.params > 2 * 28 * 2 * DIM**2


def test_with_one_expert_each_it_is_the_plain_network_exactly():
    single = {"experts": 1, "k": 1, "attention_experts": 1, "heads": 1, "head_dim": 16, "depth": 2}
    backbone, plain = (fill(moe_vit("nano", layout=layout, **single)).eval() for layout in ("both", "both"))
    for block in plain.blocks:
        attention, mlp = MultiQueryAttention(dim=64, heads=1, head_dim=16), nn.Sequential()
        group = block.attn.members[0]
        attention.queries, attention.shared, attention.outputs = group.inputs, block.attn.shared, group.outputs
        attention.outputs.bias = group.bias
        group = block.mlp.members[0]
        mlp.extend([group.inputs, nn.GELU(), group.outputs])
        mlp[2].bias = group.bias
        block.attn, block.mlp = attention, mlp
    assert not any(isinstance(module, MixtureOfExperts | ExpertAttention) for module in plain.modules())
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(backbone(x).pooled, plain(x).pooled)


def test_a_task_has_gates_and_a_vector_of_its_own():
    backbone, x = fill(moe_vit("nano", tasks=3)).eval(), images((2, 3, 32, 32))
    with torch.inference_mode(), watched(backbone) as seen:
        first = backbone(x).pooled
        with doing(backbone, 2):
            third = backbone(x).pooled
        assert torch.equal(backbone(x).pooled, first)
    assert difference(third, first) > 0.01
    assert [routing.task for routing in seen["blocks.1.attn.router"]] == [0, 2, 0]
    assert list(seen) == ["blocks.0.mlp.router", "blocks.1.attn.router", "blocks.2.mlp.router", "blocks.3.attn.router"]
    backbone.zero_grad()
    with doing(backbone, 1):
        backbone.train()(x).pooled.square().sum().backward()
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    own = {name for name in dict(backbone.named_parameters()) if ".gates." in name or "vectors." in name}
    assert own & trained == {name for name in own if ".gates.1." in name or name.endswith("rs.1")}
    assert len(own) == 3 * (4 + 1)
    with pytest.raises(UsageError, match="task is 3; the MoEViT knows 3"), doing(backbone, 3):
        pass


def test_the_vector_is_added_before_every_block():
    backbone, x = fill(moe_vit("nano", tasks=2)).eval(), images((1, 3, 32, 32))
    given = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda block, args, out: given.append((args[0], out)))
    with torch.inference_mode(), doing(backbone, 1):
        backbone(x)
        vector, start = backbone.stem.vectors[1], backbone.stem(x)
    outputs = [start, *(out for _, out in given)]
    for (inputs, _), before in zip(given, outputs, strict=False):
        assert torch.equal(inputs, before + vector)


def test_images_are_padded_and_positions_resized():
    backbone = fill(moe_vit("nano")).eval()
    x = images((2, 3, 31, 18))
    with torch.inference_mode():
        found, padded = backbone(x), backbone(nn.functional.pad(x, (0, 2, 0, 1)))
    assert torch.equal(found.pooled, padded.pooled)
    assert found.pyramid[0].shape == (2, 64, 8, 5) and found.tokens.shape == (2, 41, 64)
    assert torch.equal(found.tokens[:, 0], found.pooled)
    assert torch.equal(found.tokens[:, 1:].mT.reshape(2, 64, 8, 5), found.pyramid[0])
    with torch.no_grad():
        backbone.stem.positions[:, 0] = 7.0
        backbone.stem.positions[:, 1:] = 0.5
        backbone.stem.class_token.zero_()
        backbone.stem.conv.weight.zero_()
        tokens = backbone.stem(x) - nn.functional.pad(backbone.stem.conv.bias.expand(40, -1), (0, 0, 1, 0))
    torch.testing.assert_close(tokens[:, 0], torch.full((2, 64), 7.0))
    torch.testing.assert_close(tokens[:, 1:], torch.full((2, 40, 64), 0.5))


def test_mixed_precision_trains_and_branches_drop():
    backbone, x = fill(moe_vit("nano", drop_path=0.6)).train(), images((4, 3, 32, 32))
    assert [getattr(block.drop, "drop_prob", 0.0) for block in backbone.blocks] == pytest.approx([0, 0.2, 0.4, 0.6])
    with torch.autocast("cpu", torch.bfloat16):
        loss = backbone(x).pooled.float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())
    assert torch.equal(backbone.eval()(x).pooled, backbone(x).pooled)


def test_wrong_options_are_refused():
    for options, words in (
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"k": 9}, "k is 9; of 8 experts a token can be given at most 8"),
        ({"heads": 5}, "k is 5; of 4 experts"),
        ({"layout": "some"}, "layout is 'some'; it can be mlp, every_other, alternate, both"),
        ({"tasks": 0}, "tasks is 0"),
        ({"ratio": 0.0}, "ratio is 0.0; it must be above 0"),
        ({"noise": "loud"}, "noise is 'loud'"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            moe_vit("nano", **options)
