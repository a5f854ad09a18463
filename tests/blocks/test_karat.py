"""Kolmogorov-Arnold attention: published counts, a triple loop, gradients, memory, masks, other numbers of tokens."""

from collections.abc import Callable
from math import cos, exp, pi, sin, sqrt

import pytest
import torch
from timm import create_model
from timm.layers.attention import Attention
from timm.models.convit import GPSA
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vertebra.blocks.attention import attention
from vertebra.blocks.karat import VARIANTS, RowOperator, effect, karat, operations
from vertebra.blocks.karat import operator as page
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap
from vertebra.training.cost import count

# published: timm's name, classes, blocks, heads, grid, operators shared; millions of the operators, of all; G of both
PUBLISHED = [
    ("vit_tiny_patch16_224", 10, 12, 3, 3, False, 0.77, 6.29, 0.168, 1.425),
    ("vit_tiny_patch16_224", 10, 12, 3, 3, True, 0.06, 5.59, 0.168, 1.425),
    ("vit_small_patch16_224", 1000, 12, 6, 3, False, 1.53, 23.58, None, 4.941),
    ("vit_small_patch16_224", 1000, 12, 6, 3, True, 0.13, 22.18, None, 4.941),
    ("vit_base_patch16_224", 10, 12, 12, 1, False, 1.70, 87.51, 0.268, 17.847),
    ("vit_base_patch16_224", 10, 12, 12, 1, True, 0.14, 85.95, 0.268, 17.847),
]


@pytest.mark.parametrize(("name", "classes", "blocks", "heads", "grid", "shared", *"abcd"), PUBLISHED)
def test_published_counts(name, classes, blocks, heads, grid, shared, a, b, c, d):
    with torch.device("meta"):
        network = create_model(name, num_classes=classes)
        operator = RowOperator(heads=heads, tokens=197, grid=grid)
    own = sum(p.numel() for p in operator.parameters())
    assert own == heads * (2 * grid + 3) * 197 * 12
    own *= 1 if shared else blocks
    assert own / 1e6 == pytest.approx(a, abs=0.00501)
    assert (own + sum(p.numel() for p in network.parameters())) / 1e6 == pytest.approx(b, abs=0.0051)
    spent = blocks * heads * operations(197, grid=grid) / 1e9
    if c:
        assert spent == pytest.approx(c, abs=0.0005)
    if not shared:
        assert spent + count(network, size=(224, 224), channels=3).macs / 1e9 == pytest.approx(d, rel=0.005)


def psi(basis: str, x: float, c: list[float]) -> float:
    """One function of a basis, spelt out."""
    if basis == "fourier":
        grid = len(c) // 2
        return sum(c[m - 1] * cos(m * x) + c[grid + m - 1] * sin(m * x) for m in range(1, grid + 1))
    if basis == "rational":
        above, below = sum(c[k] * x**k for k in range(6)), sum(c[5 + k] * x**k for k in range(1, 5))
        return above / (1 + abs(below))
    t = (x - c[1]) / c[2]
    if basis == "mexican_hat":
        return c[0] * 2 / (sqrt(3) * pi**0.25) * (1 - t * t) * exp(-t * t / 2)
    if basis == "morlet":
        return c[0] * cos(5 * t) * exp(-t * t / 2)
    if basis == "dog":
        return c[0] * -t * exp(-t * t / 2)
    if basis == "meyer":
        far, ramp = abs(t), 2 * abs(t) - 1
        smooth = ramp**4 * (35 - 84 * ramp + 70 * ramp**2 - 20 * ramp**3)
        window = 1 if far <= 0.5 else 0 if far >= 1 else cos(pi / 2 * smooth)
        return c[0] * sin(pi * far) * window
    return c[0] * (sin(pi * t / 2) / (pi * t / 2)) * cos(1.5 * pi * t)


BASES: dict[str, Callable[[float], float]] = {
    "zero": lambda x: 0.0,
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + exp(-x)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("basis", page.BASES)
def test_equals_a_triple_loop(basis, base):
    operator, x = built(basis, base)
    found = operator(x)
    for b, head, row in [(0, 0, 0), (0, 1, 3), (1, 1, 2)]:
        values = x[b, head, row].tolist()
        y = [0.0] * 3
        for p in range(3):
            for q, value in enumerate(values):
                coefs = operator.coefficients[head, p, :, q].tolist()
                y[p] += operator.basis_weight[head, p, q].item() * psi(basis, value, coefs)
                y[p] += operator.base_weight[head, p, q].item() * BASES[base](value)
        w = operator.mixing[head].mT / sqrt(5)
        expected = w @ torch.tensor(y, dtype=torch.float64)
        torch.testing.assert_close(found[b, head, row], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(operator.float()(x.float()).double(), found, rtol=1e-4, atol=1e-4)


def built(basis: str, base: str = "zero") -> tuple[RowOperator, Tensor]:
    """Two heads, r 3, five tokens, with widths of wavelets that differ, and scores (2, 2, 4, 5)."""
    torch.manual_seed(0)
    operator = RowOperator(heads=2, tokens=5, r=3, basis=basis, base=base).double()
    with torch.no_grad():
        operator.basis_weight.add_(0.3 * torch.randn_like(operator.basis_weight))
        if basis not in ("fourier", "rational"):
            operator.coefficients[:, :, 1:].add_(0.2 * torch.randn_like(operator.coefficients[:, :, 1:]))
    return operator, 1.5 * torch.randn(2, 2, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize("basis", page.BASES)
def test_gradients_are_those_of_the_function(basis, monkeypatch):
    monkeypatch.setattr(page, "PIECE", 12)  # more than one piece
    operator, x = built(basis, "silu")
    names = [name for name, _ in operator.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(operator, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().requires_grad_() for p in operator.parameters()]
    assert torch.autograd.gradcheck(call, (x[:1, :, :2].requires_grad_(), *values), fast_mode=True)


def test_lean_form_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(page, "PIECE", 70)
    torch.manual_seed(0)
    rows, weights = torch.randn(2, 9, 7).double(), torch.randn(2, 8 * 7, 3).double()
    for keep in (None, (torch.rand(2, 9, 7) > 0.3).double()):
        results = []
        for form in (page.fourier, lambda x, w, k: page.waves(x, 4, k).flatten(2) @ w):
            x, w = rows.clone().requires_grad_(), weights.clone().requires_grad_()
            form(x, w, keep).square().sum().backward()
            results.append((form(x, w, keep).detach(), x.grad, w.grad))
        for lean, plain in zip(*results, strict=True):
            torch.testing.assert_close(lean, plain, rtol=1e-10, atol=1e-10)


def test_lean_form_needs_at_most_half_of_the_memory():
    rows, weights = torch.randn(3, 2 * 197, 197), torch.randn(3, 6 * 197, 12)
    plain = peak(lambda x, w: page.waves(x, 3).flatten(2) @ w, rows, weights)
    assert peak(page.fourier, rows, weights) < 0.5 * plain
    assert plain > 8 * rows.numel() * 4  # the waves at least


def test_functions_without_a_product_form_are_computed_again_for_the_gradient(monkeypatch):
    torch.manual_seed(0)
    operator, rows = RowOperator(heads=1, tokens=65, r=6, basis="morlet"), torch.randn(1, 65, 65)
    used = peak(lambda x, w: operator.reduced(x), rows, rows)
    monkeypatch.setattr(page, "_lean", lambda function, *inputs: function(*inputs))
    assert used < 0.5 * peak(lambda x, w: operator.reduced(x), rows, rows)


def peak(function: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> int:
    """Most bytes at a time of a forward and a backward pass, beside the inputs."""
    from torch.profiler import ProfilerActivity, profile

    given = [x.clone().requires_grad_() for x in inputs]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        function(*given).sum().backward()
    steps = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(steps, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_an_attention_is_at_most_of_rank_r():
    torch.manual_seed(0)
    operator = RowOperator(heads=2, tokens=26, r=4).double()
    found = torch.linalg.svdvals(operator(torch.randn(3, 2, 26, 26).double()))
    assert (found[..., 4:] < 1e-12).all() and (found[..., 3] > 1e-3).all()


def test_masked_keys_neither_count_nor_are_attended_to():
    operator, x = built("morlet", "silu")
    keep = torch.rand(2, 1, 4, 5) > 0.4
    moved = x.masked_fill(~keep, float("inf"))
    found = operator(moved, keep)
    assert torch.equal(found, operator(x, keep)) and found.isfinite().all()
    assert (found.masked_select(~keep) == 0).all() and (found.masked_select(keep) != 0).all()
    torch.testing.assert_close(operator(x, torch.ones_like(keep)), operator(x))


def test_other_numbers_of_tokens_interpolate_the_functions():
    operator = RowOperator(heads=1, tokens=17, r=2)  # one prefix token and 4 x 4
    assert operator.prefix == 1
    with torch.no_grad():
        columns = torch.cat([torch.tensor([9.0]), torch.arange(4.0).repeat(4)])
        operator.mixing.copy_(columns.expand(1, 2, 17))
    fitted = operator._fitted(operator.mixing, 65)[0, 0]
    assert fitted[0] == 9 and torch.equal(fitted[1:].view(8, 8), fitted[1:9].expand(8, 8))  # columns stay columns
    assert fitted[1:9].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    line = operator._fitted(torch.arange(17.0).expand(1, 2, 17), 13)[0, 0]  # 12 are no square: along the index
    assert line[0] == 0 and line[1:].diff().min() > 0 and line[-1] <= 16
    # equal functions of equal scores sum up to what they did, and W spreads over more keys what it spread over fewer
    with torch.no_grad():
        operator.coefficients.fill_(0.5)
    few, many = operator(torch.full((1, 1, 1, 17), 0.3)), operator(torch.full((1, 1, 1, 65), 0.3))
    torch.testing.assert_close(few.sum() - few[..., 0].sum(), many[..., 1:].sum() * (16 / 17) / (64 / 65))
    with pytest.raises(UsageError, match="has 1 prefix tokens and got 1"):
        operator(torch.zeros(1, 1, 1, 1))


def attentions() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    bias, mask = images((2, 9, 9)), images((3, 9, 9)) > -1
    swin = WindowAttention(16, 2, window_size=3)
    gated = GPSA(16, 2)
    gated.local_init()
    return {
        "timm": (Attention(16, 2, qkv_bias=True), {}),
        "normed": (Attention(16, 2, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm), {}),
        "biased": (Attention(16, 2), {"attn_mask": bias[None]}),
        "swin": (swin, {}),
        "shifted": (swin, {"mask": (~mask).float() * -100}),
        "convit": (gated, {}),
        "own": (attention(16, heads=2), {"bias": bias}),
    }


@pytest.mark.parametrize("kind", attentions())
def test_takes_over_an_attention(kind):
    layer, named = attentions()[kind]
    layer, x = fill(layer).eval(), images((6, 9, 16))
    block = karat(layer, tokens=None if "s" in kind[:1] else 9).eval()
    assert block.layer is layer and block.operator.tokens == 9
    found = block(x, **named)
    made = block.attention(x, **named)
    assert found.shape == x.shape and made.shape == (6, 2, 9, 9)
    # the layer with its own softmax in the operator's place is the layer
    softmax = karat(layer, operator=Softmax(), shared=True).eval()
    torch.testing.assert_close(softmax(x, **named), layer(x, **named), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(softmax.attention(x, **named).sum(-1), torch.ones(6, 2, 9))
    # and dropping nothing in training goes the way without the short cut
    if hasattr(layer, "attn_drop"):
        layer.attn_drop.p = 1e-12
        torch.testing.assert_close(block.train()(x, **named), found, rtol=1e-4, atol=1e-5)


class Softmax(RowOperator):
    """The operator that attention has had so far."""

    def __init__(self) -> None:
        super().__init__(heads=2, tokens=9, r=9)

    def forward(self, scores: Tensor, keep: Tensor | None = None) -> Tensor:
        return (scores if keep is None else scores.masked_fill(~keep, float("-inf"))).softmax(-1)

    def reduced(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        return rows.softmax(-1)

    def mixed(self, like: Tensor) -> Tensor:
        return torch.eye(9).expand(2, 9, 9)


def test_groups_of_our_own_attention():
    layer, x, mask = fill(attention(16, heads=2)).eval(), images((2, 3, 9, 16)), images((3, 9, 9)) > -1
    block = karat(layer, operator=Softmax(), shared=True).eval()
    torch.testing.assert_close(block(x, mask=mask), layer(x, mask=mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_block_keeps_what_blocks_promise(variant):
    torch.manual_seed(0)
    options = {"heads": 2, "tokens": 26, "r": 3}
    block, x = Spec(f"karat/{variant}", options, kind="blocks").build(16), images((2, 26, 16))
    fill(block)
    other = karat(16, variant, **options)
    x.requires_grad_()
    out = block.train()(x)
    out.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters() if p.requires_grad)
    assert [name for name, p in block.named_parameters() if not p.requires_grad] == ["operator.base_weight"]
    with torch.inference_mode():
        expected = block.eval()(x)
        assert not torch.equal(other.eval()(x), expected)
        other.load_state_dict(block.state_dict())
        assert torch.equal(other(x), expected)
        torch.testing.assert_close(block(x[:1]), expected[:1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block(x.mT.contiguous().mT), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(block, (x.detach(),)).module()
        torch.testing.assert_close(exported(x.detach()), expected, rtol=1e-4, atol=1e-5)


def test_compiles_trains_and_takes_half_precision():
    torch.manual_seed(0)
    block, x = karat(16, heads=2, tokens=26, base="silu"), images((2, 26, 16))
    expected = block(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip((p.grad for p in block.parameters()), grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = block(x)
        rough.float().square().sum().backward()
    torch.testing.assert_close(rough.float(), expected, rtol=0.1, atol=0.05 * expected.abs().max().item())
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_swap_takes_over_the_attentions_of_a_vit():
    backbone = fill(Spec("timm/test_vit", {"image_size": 32}).build()).eval()
    operated = swap(backbone, "Attention", "karat", tokens=5, grid=1, r=2)
    assert len(operated.changed) == 6 and all(name.endswith(".attn") for name in operated.changed)
    assert operated.after.params - operated.before.params == 6 * 2 * (2 + 3) * 5 * 2
    model = operated.model
    assert torch.equal(model.network.blocks[0].attn.layer.qkv.weight, backbone.network.blocks[0].attn.qkv.weight)
    for size in ((32, 32), (64, 48)):
        assert model.eval()(images((2, 3, *size))).pooled.shape == (2, 64)
    with pytest.raises(UsageError, match=r"give tokens=\.\.\., or use vertebra\.surgery\.karat"):
        swap(backbone, "Attention", "karat")
    with pytest.raises(UsageError, match="cannot take over a Mlp"):
        swap(backbone, "Mlp", "karat", tokens=5)


def test_wrong_options_are_refused():
    for options, words in [
        ({"variant": "g5"}, "has no variant 'g5'"),
        ({"heads": 3}, "3 heads do not divide dim 16"),
        ({"r": 0}, "r is 0; it must be at least 1"),
        ({"base": "relu"}, "base is 'relu'; it can be zero, silu, identity"),
        ({"basis": "meier"}, "basis is 'meier'; did you mean meyer"),
        ({"variant": "meyer", "grid": 2}, "grid is 2, but only the Fourier basis has one"),
        ({"prefix": 26}, "prefix is 26; it must be at least 0 and below the 26 tokens"),
        ({"operator": RowOperator(heads=3, tokens=26)}, "the operator has 3 heads, the layer 2"),
    ]:
        with pytest.raises(UsageError, match=words):
            karat(16, **{"heads": 2, "tokens": 26, **options})
    with pytest.raises(UsageError, match="heads is 2, but the Attention that is taken over has its own"):
        karat(Attention(16, 2), tokens=5, heads=2)
    with pytest.raises(UsageError, match="is_causal has no meaning"):
        karat(Attention(16, 2), tokens=5)(images((1, 5, 16)), is_causal=True)


def test_effect_compares_softmax_with_five_operators(tmp_path, monkeypatch):
    from vertebra.blocks import karat as block_page

    monkeypatch.setitem(block_page._SETTINGS, "toy", block_page._Setting(12, 2, 4, 8, 64, 1, 1e-3))
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("softmax", "g3u", "r4")}
    assert small.baseline == "softmax" and set(small.arms) == {"softmax", "g3b", "g3u", "g1b", "silu", "r4"}
    assert set(found["g3u"]) == set(small.metrics)
    assert found["g3u"]["added"] == pytest.approx(found["r4"]["added"] * 12 / 4 / 2)  # r 12 in one, r 4 in two blocks
    assert found["softmax"]["added"] == 0 and found["softmax"]["nll"] != found["g3u"]["nll"]
    assert 1 <= found["r4"]["rank"] < 4


def test_effect_checks_what_the_row_asks():
    import numpy as np

    toy = effect("toy", read("digits"))

    def holds(top1: float) -> list[bool]:
        values = {arm: {"top1": np.array([60.0, 61.0, 62.0])} for arm in toy.arms}
        values["g3b"] = {"top1": np.array([60.0, 61.0, 62.0]) + top1}
        return [check.holds for check in toy.checks(Measured(values))]

    assert [holds(gain) for gain in (0.5, -0.9, -1.1)] == [[True, True], [True, False], [False, False]]
