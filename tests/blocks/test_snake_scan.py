"""Snake scans: the ways through a map, the authors' outputs and gradients, what is corrected, in other networks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vertebra.backbones.timm import timm
from vertebra.blocks.snake_scan import snake_scan, snakes
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "vcmamba.json"


def test_the_four_ways_through_three_by_three_cells():
    order, moves = snakes(3, 3)
    assert order.tolist() == [
        [0, 1, 2, 5, 4, 3, 6, 7, 8],
        [8, 7, 6, 3, 4, 5, 2, 1, 0],
        [0, 3, 6, 7, 4, 1, 2, 5, 8],
        [8, 5, 2, 1, 4, 7, 6, 3, 0],
    ]
    assert moves.tolist() == [
        [0, 1, 1, 4, 2, 2, 4, 1, 1],
        [0, 2, 2, 3, 1, 1, 3, 2, 2],
        [0, 4, 4, 1, 3, 3, 1, 4, 4],
        [0, 3, 3, 2, 4, 4, 2, 3, 3],
    ]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 1), (4, 3), (2, 6)])
def test_every_way_visits_all_cells_and_steps_to_neighbours(height, width):
    order, moves = snakes(height, width)
    assert order.shape == moves.shape == (4, height * width)
    steps = {1: (0, 1), 2: (0, -1), 3: (-1, 0), 4: (1, 0)}
    for cells, codes in zip(order.tolist(), moves.tolist(), strict=True):
        assert sorted(cells) == list(range(height * width)) and codes[0] == 0
        for before, cell, code in zip(cells, cells[1:], codes[1:], strict=False):
            row, column = divmod(before, width)
            assert divmod(cell, width) == (row + steps[code][0], column + steps[code][1])
    assert torch.equal(order[1::2], order[::2].flip(1))


def found(x: Tensor, block: nn.Module) -> dict[str, Tensor]:
    """The output, and gradients of what it is made of, under the names of the golden numbers."""
    x = x.requires_grad_()
    out = block(x)
    (out * images(tuple(out.shape))).sum().backward()
    names = {"select": "select.weight", "step": "step.weight", "shift": "step.bias", "decay": "decay_log"}
    names |= {"skip": "skip", "moves": "moves"}
    grads = {name: block.get_parameter(ours).grad for name, ours in names.items()}
    return {"output": out, "x": x.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("case", ["scan 5x4", "scan 3x7"])
def test_computes_what_the_authors_scan_does_and_learns_as_it_does(case):
    reference = stored(GOLDEN, case)
    block = fill(snake_scan(reference.shape[1], state=6, rank=3))
    assert max(check_golden(found(images(reference.shape), block), reference.golden).values()) < 1e-4


def test_parity_sees_what_is_corrected_and_the_moves():
    reference = stored(GOLDEN, "scan 5x4")
    channels, x = reference.shape[1], images(reference.shape)
    with pytest.raises(ParityError, match="output"):
        check_golden(found(x, fill(snake_scan(channels, "corrected", state=6, rank=3))), reference.golden)
    turned = fill(snake_scan(channels, state=6, rank=3))
    with torch.no_grad():
        turned.moves.copy_(turned.moves[[0, 2, 1, 3, 4]])
    with pytest.raises(ParityError, match="output"):
        check_golden(found(x, turned), reference.golden)


@pytest.mark.parametrize("variant", ["reference", "corrected"])
def test_the_equations_cell_by_cell(variant):
    block, x = fill(snake_scan(6, variant, state=3, rank=2)).double(), images((1, 6, 3, 4)).double()
    cells = x[0].flatten(1).T  # (12, 6)
    step, drive, read = block.select(cells).split((2, 3, 3), 1)
    step = step @ block.step.weight.T + (1 if variant == "corrected" else 2) * block.step.bias
    step, expected = softplus(step), torch.zeros_like(cells)
    for order, moves in zip(*snakes(3, 4), strict=True):
        state = torch.zeros(6, 3, dtype=torch.double)
        for number, cell in enumerate(order):
            of = cell if variant == "corrected" else number  # whose step, drive and readout it is scanned by
            now = step[of, :, None]
            state = (-now * block.decay_log.exp()).exp() * state
            state = state + now * (drive[of] + block.moves[moves[number]]) * cells[cell, :, None]
            expected[cell] += state @ read[of] + block.skip * cells[cell]
    assert difference(block(x), expected.T.reshape(1, 6, 3, 4)) < 1e-12


def test_corrected_scans_do_not_care_how_the_map_lies():
    """Turned by half on odd sides, or mirrored at its diagonal, a map has the same snakes; but for their moves."""
    x = images((2, 8, 5, 7))
    ways = {"turned": lambda maps: maps.flip(2, 3), "mirrored": lambda maps: maps.mT}
    for variant, alike in (("corrected", True), ("reference", False)):
        block = fill(snake_scan(8, variant))
        for name, way in ways.items():
            if name == "turned" or variant == "corrected":  # mirroring mixes up the order of the rows alone
                with torch.no_grad():
                    block.moves.zero_()
                    apart = difference(block(way(x)), way(block(x)))
                assert (apart < 1e-5) == alike, (variant, name, apart)


@pytest.mark.parametrize("variant", ["reference", "corrected"])
def test_every_cell_sees_every_other(variant):
    block, x = fill(snake_scan(8, variant)), images((1, 8, 6, 5)).requires_grad_()
    for row, column in ((0, 0), (3, 2), (5, 4)):
        (grad,) = torch.autograd.grad(block(x)[0, :, row, column].sum(), x)
        assert grad[0].abs().amax(0).min() > 0


def test_how_steps_start():
    torch.manual_seed(0)
    mamba, plain = snake_scan(256), snake_scan(256, start="plain")
    steps = softplus(mamba.step.bias)
    assert 1e-3 * 0.99 < steps.min() < 3e-3 and 0.03 < steps.max() < 0.1 * 1.01
    assert 0.3 < mamba.step.weight.abs().max() <= 8**-0.5
    assert not plain.step.bias.any() and plain.step.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for block in (mamba, plain):
        assert torch.equal(block.decay_log.exp()[5].round(), torch.arange(1.0, 17))
        assert block.skip.eq(1).all() and block.moves.std().item() == pytest.approx(0.02, rel=0.3)


def test_sizes():
    shapes = {name: tuple(p.shape) for name, p in snake_scan(48, state=4, rank=7).named_parameters()}
    assert shapes == {
        "decay_log": (48, 4),
        "skip": (48,),
        "moves": (5, 4),
        "select.weight": (15, 48),
        "step.weight": (48, 7),
        "step.bias": (48,),
    }
    assert snake_scan(576).step.weight.shape == (576, 18)


def test_number_formats_and_modes():
    torch.manual_seed(0)
    block, x = snake_scan(32, start="plain"), images((2, 32, 5, 4))
    expected, rough = block(x), snake_scan(32).bfloat16()
    rough.load_state_dict(block.state_dict())
    result = rough(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(result.float().flatten(), expected.flatten(), 0) > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    assert nn.functional.cosine_similarity(mixed.float().flatten(), expected.flatten(), 0) > 0.999
    mixed.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()  # nothing of an evaluation is left


def test_in_place_of_a_networks_depthwise_convolutions():
    torch.manual_seed(0)
    network = {"depths": (1, 1, 1, 2), "dims": (8, 16, 24, 32)}
    convnext = timm("convnext_atto", image_size=64, network=network).eval()
    operated = swap(convnext, "*stages.3.*.conv_dw", "snake_scan", state=4)
    assert len(operated.changed) == 2
    x = images((2, 3, 96, 64))
    with torch.inference_mode():
        result, before = operated.model(x), convnext(x)  # type: ignore[operator]
    assert result.pyramid[-1].shape == before.pyramid[-1].shape == (2, 32, 3, 2)
    assert not torch.allclose(result.pooled, before.pooled)


def test_wrong_options_are_refused():
    for options, words in (
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"channels": 16, "variant": "corected"}, "no variant 'corected'; did you mean corrected"),
        ({"channels": 16, "state": 0}, "state is 0"),
        ({"channels": 16, "rank": 0}, "rank is 0"),
        ({"channels": 16, "start": "zero"}, "start is 'zero'; it can be mamba or plain"),
    ):
        with pytest.raises(UsageError, match=words):
            snake_scan(**options)
