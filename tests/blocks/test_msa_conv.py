"""MSA-Conv: counts of the operator, parity with the authors' code, windows, gradients, and its place in networks."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, unfold

from vertebra.blocks.msa_conv import Window, attend_around, msa_conv, msa_conv_for, plain_attend, published
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.spec import Spec
from vertebra.surgery.swap import swap
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "tic.json"
LAYERS = {
    "layer": {},
    "layer_strided": {"stride": 2},
    "layer_dilated": {"dilation": 2},
    "layer_k5": {"kernel": 5},
}


def unfolded(q: Tensor, k: Tensor, v: Tensor, window: Window, heads: int) -> Tensor:
    """The same by unfolding, a softmax over the taps."""

    def taps(x: Tensor) -> Tensor:  # (B, heads, c, k * k, H, W)
        found = unfold(x, window.kernel, window.dilation, window.reach)
        return found.view(x.shape[0], heads, -1, window.kernel**2, *x.shape[2:])

    parts = q.unflatten(1, (heads, -1))
    logits = (parts[:, :, :, None] * taps(k)).sum(2) * parts.shape[2] ** -0.5
    if window.border == "masked":
        logits = logits.masked_fill(taps(torch.ones_like(k))[:, :, 0] == 0, float("-inf"))
    return (logits.softmax(2)[:, :, None] * taps(v)).sum(3).flatten(1, 2)


@pytest.mark.parametrize(("kernel", "stride", "outputs"), [(3, 1, 16), (5, 1, 24), (3, 2, 32)])
def test_counts_are_the_formulas(kernel, stride, outputs):
    cost = count(msa_conv(16, kernel=kernel, stride=stride, outputs=outputs), size=(12, 20), channels=16)
    assert cost.params == 3 * 16 * 17 + kernel**2 * 16 * outputs
    each = 3 * 16**2 + 2 * kernel**2 * 16 + kernel**2 * 16 * outputs // stride**2
    assert cost.macs == 12 * 20 * each


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (7, 1)])
def test_windows_and_their_gradients_are_the_authors(kernel, dilation):
    reference = stored(GOLDEN, f"window_k{kernel}_d{dilation}")
    given = [x.clone().requires_grad_() for x in images(reference.shape).chunk(3, 1)]
    scaled = given[0] * 16**0.5  # the authors' check leaves the scale out
    out = attend_around(scaled, given[1], given[2], Window(kernel, dilation))
    found = dict(
        zip(("grad_q", "grad_k", "grad_v"), torch.autograd.grad(out, given, images(tuple(out.shape))), strict=False)
    )
    worst = check_golden({"output": out, **found}, reference.golden, 1e-6)
    assert max(worst.values()) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_authors(name):
    reference = stored(GOLDEN, name)
    layer = fill(msa_conv(8, outputs=12, **LAYERS[name])).eval()
    with torch.inference_mode():
        assert check_golden(layer(images(reference.shape)), reference.golden, 1e-6)["output"] < 1e-6


def test_authors_names_become_ours():
    layer, kernel = msa_conv(8, outputs=12), 3
    shapes = {"qkv_conv.weight": (24, 8, 1, 1), "qkv_conv.bias": (24,), "mlp.weight": (12, 8, kernel, kernel)}
    state = {name: images(shape) for name, shape in shapes.items()}
    layer.load_state_dict(published(state, layer))
    assert torch.equal(layer.conv.weight, state["mlp.weight"])
    assert torch.equal(layer.attention.qkv.bias, state["qkv_conv.bias"])
    with pytest.raises(ParityError, match="missing from it: conv"):
        published({name: state[name] for name in list(shapes)[:2]}, layer)


@pytest.mark.parametrize(
    ("kernel", "dilation", "heads", "border"),
    [*list(product((3, 5), (1, 2), (1, 4), ("zeros", "masked"))), (1, 1, 2, "zeros"), (7, 1, 8, "masked")],
)
def test_every_form_is_the_unfolded_one(kernel, dilation, heads, border):
    window = Window(kernel, dilation, border)
    q, k, v = (x.double().requires_grad_() for x in images((2, 24, 6, 5)).chunk(3, 1))
    expected, plain = unfolded(q, k, v, window, heads), plain_attend(q * (8 / heads) ** -0.5, k, v, window, heads)
    cotangent = images((2, 8, 6, 5)).double()
    wanted = torch.autograd.grad(expected, (q, k, v), cotangent)
    assert difference(plain, expected) < 1e-12
    for layout in (torch.contiguous_format, torch.channels_last):
        given = [x.detach().contiguous(memory_format=layout).requires_grad_() for x in (q, k, v)]
        out = attend_around(*given, window, heads=heads)
        assert difference(out, expected) < 1e-12 and out.is_contiguous(memory_format=layout)
        for grad, want in zip(torch.autograd.grad(out, given, cotangent), wanted, strict=True):
            assert difference(grad, want) < 1e-12


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (5, 1)])
def test_gradients_in_double_precision(kernel, dilation):
    given = [x.double().requires_grad_() for x in images((1, 12, 4, 3)).chunk(3, 1)]
    assert torch.autograd.gradcheck(lambda *x: attend_around(*x, Window(kernel, dilation), heads=2), given)


def test_no_query_is_a_box_filter_and_a_window_of_one_its_value():
    v = images((2, 8, 7, 6))
    out = attend_around(torch.zeros_like(v), images((2, 8, 7, 6)).flip(1), v, Window(5))
    torch.testing.assert_close(out, avg_pool2d(v, 5, 1, 2))  # zeros beyond the border are averaged too
    torch.testing.assert_close(attend_around(v.flip(0), v.flip(1), v, Window(1)), v)


def test_dropout_keeps_the_mean_and_its_gradient_is_of_what_was_kept():
    q, k, v = (x.double().requires_grad_() for x in images((2, 24, 8, 8)).chunk(3, 1))
    torch.manual_seed(0)
    found = [attend_around(q, k, v, Window(3), drop=0.5) for _ in range(200)]
    exact = attend_around(q, k, v, Window(3))
    assert not torch.equal(found[0], found[1])
    assert (torch.stack(found).mean(0) - exact).abs().mean() < 0.1 * exact.abs().mean()
    (grad,) = torch.autograd.grad(found[0].sum(), v)
    torch.testing.assert_close((grad * v).sum(), found[0].sum())  # linear in the values
    layer = fill(msa_conv(8))
    with torch.no_grad():
        x = images((1, 8, 5, 5))
        assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_shift_comes_back_and_reaches_far():
    """A group is moved by a window in its direction, and back."""
    plain, shifted = (fill(msa_conv(8, shift=shift)).attention for shift in ("none", "back"))
    x = images((2, 8, 16, 17))
    assert torch.equal(shifted._rolled(shifted._rolled(x, 1), -1), x)
    moved = shifted._rolled(x, 1)
    assert torch.equal(moved[:, 0], x[:, 0].roll(3, 2)) and torch.equal(moved[:, 7], x[:, 7].roll((-3, 3), (1, 2)))
    for layer in (plain, shifted):
        nn.init.zeros_(layer.qkv.weight[:8])
        nn.init.zeros_(layer.qkv.bias[:8])
    found, expected = (layer.eval()(x)[:, :, 5:-5, 5:-5] for layer in (shifted, plain))  # away from the seam
    torch.testing.assert_close(found, expected)  # weights are uniform, and values are back in their places


@pytest.mark.parametrize(("options", "wide"), [({}, False), ({"shift": "back"}, True), ({"shift": "open"}, True)])
def test_field_of_two_layers(options, wide):
    assert heard_outside(options) == 0 if not wide else heard_outside(options) > 0


def test_pooling_widens_the_field():
    assert heard_outside({"pooling": "average"}) > 0
    x = images((1, 8, 2, 1))  # smaller than what is pooled
    assert fill(msa_conv(8, kernel=5, pooling="average"))(x).isfinite().all()


def heard_outside(options: dict) -> float:
    layers = nn.Sequential(*(fill(msa_conv(8, **options)) for _ in range(2))).eval()
    x = images((4, 8, 23, 23)).requires_grad_()
    (heard,) = torch.autograd.grad(layers(x)[:, :, 11, 11].sum(), x)
    heard = heard.abs().sum((0, 1))
    heard[7:16, 7:16] = 0  # 4 k - 3
    return float(heard.sum())


def test_takes_the_place_of_convolutions():
    backbone = Spec("timm/resnet18", {"image_size": 64}).build()
    operated = swap(backbone, "*.conv2", msa_conv_for)
    assert len(operated.changed) == 8
    name = operated.changed[0]
    assert torch.equal(operated.model.get_submodule(name).conv.weight, backbone.get_submodule(name).weight)
    widths = [backbone.get_submodule(name).in_channels for name in operated.changed]
    assert operated.after.params - operated.before.params == sum(3 * width * (width + 1) for width in widths)
    after = swap(backbone, "*.layer4.1.bn2", "msa_conv/masked", place="after", kernel=5)
    assert after.after.params - after.before.params == 3 * 512 * 513 + 25 * 512**2


def test_what_it_stands_for():
    depthwise = msa_conv_for(nn.Conv2d(8, 8, 3, 2, 1, groups=8))
    assert depthwise.conv.groups == depthwise.attention.heads == 8
    assert depthwise(images((1, 8, 7, 6))).shape == (1, 8, 4, 3)
    assert msa_conv_for(nn.Conv2d(4, 6, 3, padding="same", dilation=2)).attention.window == Window(3, 2)
    refused = (
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 4, 3, 1, 1, groups=2),
    )
    for layer in refused:
        with pytest.raises(UsageError, match="cannot stand for"):
            msa_conv_for(layer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kernel": 4}, "kernel is 4; it must be odd"),
        ({"heads": 3}, "heads is 3 with 8 channels"),
        ({"stride": 0}, "stride is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"border": "ones"}, "border is 'ones'; it can be zeros, masked"),
        ({"shift": "back", "directions": 5}, "directions is 5"),
        ({"form": "depthwise", "outputs": 4}, "outputs is 4"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        msa_conv(8, **options)
    with pytest.raises(UsageError, match="has no variant 'mask'"):
        msa_conv(8, "mask")


def test_bfloat16_and_automatic_mixed_precision():
    layer, x = fill(msa_conv(16, heads=2)).eval(), images((2, 16, 9, 8))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x.requires_grad_())
        mixed.float().sum().backward()
    assert difference(mixed, exact) < 0.05 and x.grad is not None and x.grad.isfinite().all()
    assert difference(layer.bfloat16()(x.bfloat16()), exact) < 0.05
