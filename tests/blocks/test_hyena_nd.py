"""Hyena N-D: the authors' counts and outputs in every mode, other grids and axes, drop-in use, and the effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.blocks import hyena_nd as page
from vertebra.blocks.hyena_nd import effect, hyena_nd, published
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "hyena_nd.json"
COUNTS = json.loads(GOLDEN.read_text(encoding="utf-8"))["params"]

CASES: dict[str, dict[str, Any]] = {
    **{
        f"{directions}_{kernel}": {"directions": directions, "kernel": kernel}
        for directions in ("standard", "seq", "4dir", "4dirp", "parallel")
        for kernel in ("joint", "product")
    },
    "learnt": {"window": "learnt", "directions": "standard"},
    "symmetric": {"window": "symmetric", "directions": "standard"},
    "none": {"window": "none", "directions": "standard"},
    "product_learnt": {"window": "learnt", "kernel": "product", "directions": "standard"},
    "root": {"power": 0.5, "directions": "standard"},
    "order_3_seq": {"order": 3, "directions": "seq"},
    "order_3_4dir": {"order": 3, "directions": "4dir"},
    "order_3_4dirp": {"order": 3, "directions": "4dirp", "kernel": "product"},
}


@pytest.mark.parametrize("mode", COUNTS)
def test_parameters_are_the_authors(mode):
    kernel, directions = mode.split("/")
    with torch.device("meta"):
        block = hyena_nd(192, kernel=kernel, directions=directions)
    assert sum(p.numel() for p in block.parameters()) == COUNTS[mode]


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_authors_operator(name):
    block = fill(hyena_nd(6, grid=7, kernel_width=10, **CASES[name])).eval()
    with torch.inference_mode():
        found = {"tokens": block(images((2, 49, 6)))}
    assert max(check_golden(found, stored(GOLDEN, name).golden, tolerance=1e-5).values()) < 1e-5


def theirs(block: page.HyenaND, window: str) -> dict[str, torch.Tensor]:
    """Our weights under the authors' names, with what their state has twice."""
    own, two = block.state_dict(), len(block.kernel.nets) == 2
    state = {name: own[name] for name in own if name.startswith(("in_proj", "short_filter", "out_proj"))}
    state |= {f"linear_mix.{name}": own[f"mix.{name}"] for name in ("weight", "bias") if block.mix is not None}
    state["filter_fn.bias"], state["filter_fn.pos_emb.z"] = own["skip"], own["kernel.places"]
    state["filter_fn.pos_emb.t"] = torch.zeros(1, 7, 1)
    for number, axis in enumerate(("X", "Y") if two else ("",)):
        prefix = f"filter_fn.{axis}implicit_filter"
        state |= {f"{prefix}.{place}.freq": own["kernel.frequency"] for place in (1, 3, 5)}
        for layer in range(4):
            for leaf in ("weight", "bias")[: 1 if layer == 3 else 2]:
                state[f"{prefix}.{2 * layer}.{leaf}"] = own[f"kernel.nets.{number}.linears.{layer}.{leaf}"]
        of = f"kernel.windows.{number}"
        rates = ("deltas",) if two or window == "symmetric" else ("Xdeltas", "Ydeltas")
        for place, rate in enumerate(rates):
            state[f"filter_fn.{axis}modulation.{rate}"] = own.get(f"{of}.rates.{place}", torch.zeros(1, 1, 6))
        if window in ("learnt", "symmetric"):
            state[f"filter_fn.{axis}modulation.shift"] = own[f"{of}.shift"]
    return state


@pytest.mark.parametrize("name", ["4dirp_joint", "4dir_product", "learnt", "symmetric", "product_learnt", "none"])
def test_the_authors_names_become_ours(name):
    block, other = (hyena_nd(6, grid=7, kernel_width=10, **CASES[name]) for _ in range(2))
    fill(block)
    state = theirs(block, CASES[name].get("window", "fixed"))
    other.load_state_dict(published(state, other))
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in other.state_dict().items())
    with pytest.raises(ParityError, match="order_of_things"):
        published({**state, "order_of_things": torch.ones(1)}, other)


def summed(block: page.HyenaND, x: torch.Tensor) -> torch.Tensor:
    """The operator of order 2 to the first corner, with its convolution as a sum over pairs of cells."""
    sides = x.shape[1:-1]
    u = block.short_filter(block.in_proj(x).movedim(-1, 1))
    first, gate, v = u.chunk(3, 1)
    v, kernel, y = gate * v, block.kernel(sides), torch.zeros_like(v)
    for cell in np.ndindex(*sides):
        for offset in np.ndindex(*(place + 1 for place in cell)):
            of = tuple(place - step for place, step in zip(cell, offset, strict=True))
            y[(..., *cell)] += kernel[(slice(None), *offset)] * v[(..., *of)]
    y = y + block.skip.view(-1, *(1,) * len(sides)) * v
    return block.out_proj((y * first).movedim(1, -1))


@pytest.mark.parametrize("sides", [(9,), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("kernel", ["joint", "product"])
def test_other_axes_and_rectangles_are_the_sum_over_pairs(sides, kernel):
    block, x = (
        hyena_nd(4, "standard", grid=sides, axes=len(sides), kernel_width=8, kernel=kernel),
        images((2, *sides, 4)),
    )
    fill(block)
    with torch.no_grad():
        assert difference(block(x), summed(block, x)) < 1e-5
        assert difference(block(x.flatten(1, -2)), block(x).flatten(1, -2)) < 1e-6


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("directions", ["seq", "4dir", "4dirp", "parallel"])
def test_directions_work_along_any_number_of_axes(directions, axes):
    block = fill(hyena_nd(4, directions=directions, grid=(5, 3, 4)[:axes], axes=axes, kernel_width=8))
    x = images((2, *(5, 3, 4)[:axes], 4))
    with torch.no_grad():
        found = block(x)
    assert found.shape == x.shape and found.std() > 0.01


def test_corners_that_a_cell_sees():
    x = images((1, 9, 9, 4)).double()
    changed = x.clone()
    changed[:, 4, 4] += 1
    seen = {}
    for directions in ("standard", "seq", "4dir", "4dirp", "parallel"):
        block = fill(hyena_nd(4, directions=directions, grid=9, kernel_width=8)).double()
        with torch.no_grad():
            moved = (block(changed) - block(x)).abs().amax((0, 3)) > 1e-10
        seen[directions] = [
            bool(moved[rows, columns].all())
            for rows in (slice(3), slice(6, None))
            for columns in (slice(3), slice(6, None))
        ]
    assert seen["standard"] == seen["parallel"] == [False, False, False, True]
    assert seen["seq"] == [True, False, False, False]
    assert seen["4dir"] == seen["4dirp"] == [True] * 4


@pytest.mark.parametrize("window", ["fixed", "learnt", "symmetric", "none"])
def test_on_another_grid_a_kernel_is_stretched_and_keeps_its_sum(window):
    block = hyena_nd(4, grid=16, kernel_width=8, window=window)
    with torch.no_grad():
        own, finer = block.kernel((16, 16)), block.kernel((31, 31))  # the ends stay: every second cell is an old one
        torch.testing.assert_close(finer[:, ::2, ::2] * 31**2, own * 16**2, rtol=1e-4, atol=1e-5)
        assert block.kernel((9, 20)).shape == (4, 9, 20)


def test_kernels_and_transforms_stay_in_32_bit():
    block = hyena_nd(8, "learnt", grid=6, kernel_width=8)
    exact = block.kernel((6, 6))
    rough = block.bfloat16()
    assert rough.kernel((6, 6)).dtype == torch.float32
    assert difference(rough.kernel((6, 6)), exact) < 0.05
    with torch.no_grad():
        assert rough(images((2, 36, 8)).bfloat16()).dtype == torch.bfloat16


def test_training_compiles_in_one_graph():
    torch.manual_seed(0)
    block, x = hyena_nd(4, grid=5, kernel_width=8), images((2, 25, 4))
    places = block.kernel.places
    block(x).square().sum().backward()
    expected, places.grad = places.grad, None
    torch.compile(block, backend="eager", fullgraph=True)(x).square().sum().backward()
    assert expected is not None and expected.any()
    torch.testing.assert_close(places.grad, expected, rtol=1e-4, atol=1e-6)


def test_takes_the_place_of_attention_in_timms_vit_and_deit():
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        net = timm(name, image_size=64, network={"depth": 2, "embed_dim": 24, "num_heads": 2})
        prefix = 2 if "distilled" in name else 1
        operated = swap(net, "Attention", "hyena_nd", grid=4, prefix=prefix, kernel_width=8)
        assert len(operated.changed) == 2
        model, x = operated.model.eval(), images((2, 3, 64, 64))
        changed = x.clone()
        changed[:, :, 40:50, 40:50] += 1
        with torch.inference_mode():
            assert not torch.allclose(model(changed).tokens[:, 0], model(x).tokens[:, 0], atol=1e-4)  # it sees them
    with pytest.raises(UsageError, match="prefix=1 for a class token"):
        swap(net, "Attention", "hyena_nd")


def test_takes_the_place_of_attention_in_swins_windows():
    network = {"depths": (2, 1), "embed_dim": 24, "num_heads": (2, 2)}
    net = timm("swin_tiny_patch4_window7_224", image_size=56, network=network)
    operated = swap(net, "WindowAttention", "hyena_nd/seq", grid=7, kernel_width=8)
    assert len(operated.changed) == 3  # the second of them in windows that are shifted
    with torch.inference_mode():
        assert operated.model.eval()(images((2, 3, 56, 56))).pooled.isfinite().all()


def test_a_class_token_is_given_the_mean_and_gives_nothing():
    block = fill(hyena_nd(4, grid=3, prefix=1, kernel_width=8))
    x = images((2, 10, 4))
    with torch.no_grad():
        y = block(x)
        torch.testing.assert_close(y[:, 0], y[:, 1:].mean(1))
        other = torch.cat([x[:, :1] + 1, x[:, 1:]], 1)
        assert torch.equal(block(other), y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "5dir"}, "no variant '5dir'"),
        ({"directions": "both"}, "directions is 'both'; it can be 4dir or standard"),
        ({"kernels": "joint"}, "no option 'kernels'; did you mean|no option 'kernels'"),
        ({"kernel": "product", "window": "symmetric"}, "goes with kernel='joint'"),
        ({"kernel": "product", "power": 0.5}, "goes with kernel='joint'"),
        ({"power": 0}, "power is 0; it must be above 0"),
        ({"grid": (3, 4, 5)}, "grid is \\(3, 4, 5\\); it needs 2 sides"),
        ({"grid": 0}, "grid is \\(0, 0\\)"),
        ({"axes": 4}, "axes is 4; it can be 1, 2 or 3"),
        ({"order": 1}, "order is 1; it must be at least 2"),
        ({"kernel_width": 0}, "kernel_width is 0"),
        ({"prefix": -1}, "prefix is -1"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        hyena_nd(8, **options)


def test_wrong_inputs_are_refused():
    block = hyena_nd(4, grid=(3, 5))
    assert block(images((1, 15, 4))).shape == (1, 15, 4) and block(images((1, 16, 4))).shape == (1, 16, 4)
    with pytest.raises(UsageError, match="17 tokens fill neither the grid"):
        block(images((1, 17, 4)))
    with pytest.raises(UsageError, match="takes tokens"):
        block(images((1, 2, 3, 5, 4)))


SMALL = page._Setting(12, 2, 4, 40, 1, (4, 8))


def test_effect_compares_arms_that_differ_in_the_mixer_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", SMALL)
    small = effect("toy", read("digits"))
    nets: dict[str, Any] = {arm: page.armed(arm, SMALL) for arm in small.arms}
    found = {arm: [type(block.mixer).__name__ for block in net.blocks] for arm, net in nets.items()}
    assert found["attention"] == ["Attention"] * 2 and found["hyena"] == found["hyena_1d"] == ["HyenaND"] * 2
    assert nets["hyena_1d"].blocks[0].mixer.grid == (64,) and nets["hyena"].blocks[0].mixer.grid == (8, 8)
    rest = {arm: [(n, p.shape) for n, p in net.named_parameters() if ".mixer." not in n] for arm, net in nets.items()}
    assert all(shapes == rest["attention"] for shapes in rest.values())
    measured = {arm: small.measure(arm, 0, tmp_path) for arm in ("attention", "hyena_1d")}
    assert np.isnan(measured["hyena_1d"]["slope"]) and measured["attention"]["nll"] != measured["hyena_1d"]["nll"]
    assert all(0 < one["field"] <= 100 for one in measured.values())


def test_effect_builds_hybrids_both_ways():
    nets: dict[str, Any] = {arm: page.armed(arm, page._SETTINGS["toy"]) for arm in ("hybrid", "reverse")}
    found = {arm: [type(block.mixer).__name__[0] for block in net.blocks] for arm, net in nets.items()}
    assert found == {"hybrid": ["H", "H", "H", "A"], "reverse": ["A", "A", "A", "H"]}


def test_costs_are_those_of_one_operator():
    found = page.costs("attention", SMALL)
    assert found["written"] > found["training"] > 0 and found["ms"] > 0 and np.isfinite(found["slope"])
    assert "written" not in page.costs("hyena", SMALL)


def test_attention_that_is_written_out_is_attention():
    from vertebra.blocks.attention import attention

    plain, x = fill(attention(12, heads=3)), images((2, 9, 12))
    torch.testing.assert_close(page._Written(plain)(x), plain(x))


def test_effect_checks_what_the_row_asks():
    toy = effect("toy", read("digits"))

    def measured(hyena: float, hybrid: float, cost: float) -> Measured:
        top1 = {"attention": 50.0, "hyena_1d": 52.0, "reverse": 50.0, "hyena": hyena, "hybrid": hybrid}
        values = {arm: {"top1": np.array([one, one])} for arm, one in top1.items()}
        for name in ("field", "slope", "ms", "training"):
            values["attention"][name], values["hyena"][name] = np.array([2.0]), np.array([cost])
        values["attention"]["written"] = np.array([2.0])
        return Measured(values)

    assert all(check.holds for check in toy.checks(measured(52.1, 52.2, 1.1)))
    assert not any(check.holds for check in toy.checks(measured(51.9, 49.9, 2.5)))


def test_a_swap_keeps_a_network_trainable():
    net = timm("vit_tiny_patch16_224", image_size=32, network={"depth": 1, "embed_dim": 12, "num_heads": 2})
    model: nn.Module = swap(net, "Attention", "hyena_nd", grid=2, prefix=1, kernel_width=4).model
    model(images((2, 3, 32, 32))).pooled.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".attn." in name)
