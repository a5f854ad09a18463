"""One-way convolutions: exact counts, any kernel at full rank, and one function however it is computed."""

import itertools
from typing import get_args

import pytest
import torch
from torch import nn

from vertebra.blocks.decomposition import decomposed, product
from vertebra.blocks.one_way import ONE_WAY, OneWayConv1d, OneWayConv2d, OneWayConv3d, Per, largest_rank, one_way
from vertebra.errors import UsageError
from vertebra.parity import images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap

DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GEOMETRIES = (
    {},
    {"padding": 1, "stride": 2, "groups": 2},
    {"padding": 2, "dilation": 2, "padding_mode": "reflect", "bias": False},
    {"padding": "same", "groups": 4, "padding_mode": "circular"},
    {"padding": "same", "dilation": 2},
)


def weights(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if "bias" not in name)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ways", [2, 3])
def test_parameters_follow_the_formulae(ways, groups, rank, kernel):
    """Stride, dilation and padding cost nothing."""
    given = {"groups": groups, "rank": rank, "stride": 2, "dilation": 2, "padding": 1, "bias": False}
    channels_in, channels_out = 8, 12
    count = {
        per: weights(ONE_WAY[ways - 1](channels_in, channels_out, kernel, per=per, **given))
        for per in ("kernel", "input", "layer")
    }
    pairs = channels_in * channels_out // groups
    assert count["kernel"] == pairs * rank * ways * kernel
    assert count["input"] == channels_in * rank * (ways - 1) * kernel + pairs * rank * kernel
    assert count["layer"] == rank * (channels_in + channels_out + groups * ways * kernel)


def test_examples_of_the_paper():
    assert weights(OneWayConv3d(1, 1, 3)) - 1 == 8  # 9 in place of 27
    assert sum(f.numel() for f in OneWayConv3d(1, 1, 3).factors) == 9
    assert sum(f.numel() for f in OneWayConv2d(1, 1, 5).factors) == 10  # in place of 25


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("per", ["kernel", "input", "layer"])
@pytest.mark.parametrize("ways", [1, 2, 3])
def test_a_chain_and_the_dense_equivalent_compute_the_same(ways, per, options):
    torch.manual_seed(0)
    rank = 1 if ways == 1 and per != "layer" else 2
    conv = ONE_WAY[ways - 1](4, 8, 3, per=per, rank=rank, **options).double()
    x = images((2, 4, *(11, 8, 7)[:ways])).double().requires_grad_(True)
    dense = conv.fused()
    assert type(dense) is DENSE[ways - 1] and dense.stride == conv.stride and not list(dense.children())
    torch.testing.assert_close(conv(x), dense(x), rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(conv(x))
    grads = torch.autograd.grad((conv(x) * direction).sum(), [x, *conv.parameters()])
    conv.compute = "chain"
    torch.testing.assert_close(conv(x), dense(x), rtol=1e-10, atol=1e-10)
    again = torch.autograd.grad((conv(x) * direction).sum(), [x, *conv.parameters()])
    for found, expected in zip(again, grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_kernels_of_other_shapes():
    torch.manual_seed(0)
    for kernel, stride, per in itertools.product([(5, 3, 1), (1, 3, 3), (3, 1, 1)], [1, 2], get_args(Per)):
        conv = OneWayConv3d(4, 6, kernel, stride=stride, padding=(2, 1, 1), groups=2, per=per)
        x = images((1, 4, 9, 8, 7))
        expected = conv(x)
        conv.compute = "chain"
        torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
        assert len(conv.factors) == sum(side > 1 for side in kernel) + 2 * (per == "layer")


@pytest.mark.parametrize("per", ["kernel", "input"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_rank_k_is_any_kernel(kernel, per):
    torch.manual_seed(1)
    dense = nn.Conv2d(6, 9, kernel, groups=3)
    x = images((2, 6, 12, 12))
    losses = []
    for rank in range(1, kernel + 1):
        conv = OneWayConv2d(6, 9, kernel, groups=3, rank=rank, per=per)
        losses.append(conv.approximate(dense.weight))
        assert dense.bias is not None and conv.bias is not None
        conv.bias.data.copy_(dense.bias.data)
    torch.testing.assert_close(conv(x), dense(x), rtol=1e-5, atol=1e-5)
    assert losses[-1] < 1e-6 and all(a > b for a, b in itertools.pairwise(losses))


def test_approximating_by_svd_is_the_best_there_is():
    torch.manual_seed(2)
    conv, weight = OneWayConv2d(3, 4, 5, rank=2), torch.randn(4, 3, 5, 5)
    lost = conv.approximate(weight)
    values = torch.linalg.svdvals(weight)
    assert lost == pytest.approx(float(values[..., 2:].norm() / values.norm()), rel=1e-5)


@pytest.mark.parametrize(("per", "rank"), [("kernel", 2), ("layer", 3), ("input", 2)])
def test_what_has_the_rank_is_found(per, rank):
    torch.manual_seed(3)
    target = OneWayConv3d(4, 6, 3, per=per, rank=rank).dense_weight().detach()
    conv = OneWayConv3d(4, 6, 3, per=per, rank=rank)
    assert conv.approximate(target) < 0.02
    exact = OneWayConv3d(4, 6, 3, per="kernel", rank=9)
    assert exact.approximate(torch.randn(6, 4, 3, 3, 3)) < 1e-5


def test_alternating_fits_are_better_than_their_beginning():
    torch.manual_seed(4)
    tensors = torch.randn(50, 3, 3, 3)
    start, fitted = (product(decomposed(tensors, 2, sweeps=sweeps)) for sweeps in (0, 40))
    before, after = ((tensors - found).flatten(1).norm(dim=1) for found in (start, fitted))
    assert (after <= before + 1e-9).all() and after.mean() < 0.97 * before.mean()
    norms = [factor.norm(dim=-1) for factor in decomposed(tensors, 2)]
    torch.testing.assert_close(norms[0], norms[2])


@pytest.mark.parametrize(
    ("per", "rank", "draws"), [("kernel", 1, 1), ("kernel", 3, 1), ("input", 2, 9), ("layer", 9, 99)]
)
@pytest.mark.parametrize("ways", [2, 3])
def test_fresh_weights_have_the_variance_of_he(ways, per, rank, draws):
    torch.manual_seed(5)
    drawn = [ONE_WAY[ways - 1](16, 64, 3, rank=rank, per=per).dense_weight() for _ in range(draws)]
    assert torch.stack(drawn).var().item() == pytest.approx(2 / (16 * 3**ways), rel=0.15)


def test_one_dimension_is_dense_per_kernel_and_saves_per_layer():
    assert weights(OneWayConv1d(8, 8, 5)) == 8 * 8 * 5
    assert weights(OneWayConv1d(8, 8, 5, per="layer", rank=3)) == 3 * (8 + 8 + 5)
    assert largest_rank([8, 8, 5]) == 40


def test_in_a_network_of_timm_and_fused_away():
    backbone = Spec("timm/resnet18", {"image_size": 32}).build().eval()
    torch.manual_seed(0)
    operated = swap(backbone, "*layer1*.conv?", "one_way")
    assert operated.changed == tuple(f"network.layer1.{block}.conv{n}" for block in (0, 1) for n in (1, 2))
    assert operated.before.params - operated.after.params == 4 * (64 * 64 * 3 - 64)  # a bias is new
    fused = fuse(operated.model).model
    assert not any(isinstance(module, OneWayConv2d) for module in fused.modules())
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        torch.testing.assert_close(fused(x).pooled, operated.model(x).pooled, rtol=1e-4, atol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match=r"rank is 4; .* 3 is any kernel"):
        OneWayConv2d(4, 4, 3, rank=4)
    with pytest.raises(UsageError, match="per can be kernel, input, layer, and compute dense or chain"):
        OneWayConv2d(4, 4, 3, per="filter")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="kernel is 4"):
        one_way(8, kernel=4)
    with pytest.raises(UsageError, match="no variant 'kernels'; did you mean"):
        one_way(8, "kernels")
    with pytest.raises(UsageError, match="multiple of groups"):
        one_way(8, groups=3)
    with pytest.raises(UsageError, match="meta device"):
        OneWayConv2d(4, 4, 3).approximate(torch.empty(4, 4, 3, 3, device="meta"))
