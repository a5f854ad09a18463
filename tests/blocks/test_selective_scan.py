"""The selective scan: its forms by the equation, by gradcheck, by each other and by the authors' numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vertebra.blocks.selective_scan import Form, first_biases, selective_scan
from vertebra.errors import UsageError
from vertebra.parity import check_golden, images, stored
from vertebra.training.cost import count

FORMS: list[Form] = ["chunked", "associative"]
ALL: list[Form] = ["sequential", *FORMS]
NAMES = ["x", "step", "decay", "drive", "read", "skip"]


def given(
    batch: int, tokens: int, channels: int, states: int, kind: torch.dtype = torch.float64, scale: float = 1.0
) -> list[Tensor]:
    """Arguments of `selective_scan` in its order; all want gradients. `scale` is the size of decay times step."""
    torch.manual_seed(0)
    made = [torch.randn(batch, tokens, channels), torch.rand(batch, tokens, channels)]
    made += [-4 * scale * torch.rand(channels, states)]
    made += [torch.randn(batch, tokens, states), torch.randn(batch, tokens, states), torch.randn(channels)]
    return [tensor.to(kind).requires_grad_() for tensor in made]


def test_the_equation_by_hand():
    x, step, decay, drive, read, skip = given(2, 4, 3, 2)
    expected = torch.zeros(2, 4, 3, dtype=torch.float64)
    for sample in range(2):
        for channel in range(3):
            state = torch.zeros(2, dtype=torch.float64)
            for token in range(4):
                now = step[sample, token, channel]
                state = (now * decay[channel]).exp() * state + now * drive[sample, token] * x[sample, token, channel]
                y = (read[sample, token] * state).sum() + skip[channel] * x[sample, token, channel]
                expected[sample, token, channel] = y.detach()
    for form in ALL:
        torch.testing.assert_close(selective_scan(x, step, decay, drive, read, skip, form=form), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ALL)
def test_gradients(form, reverse):
    arguments = given(2, 5, 3, 2)
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, reverse=reverse, form=form), arguments)


SHAPES = [(1, 1, 2, 1), (2, 32, 5, 3), (3, 67, 6, 4), (5, 70, 192, 16), (1, 33, 1600, 8)]
"""Batch, tokens, channels, states: one token, one full run, an odd rest, several tiles of samples, one wide sample."""


@pytest.mark.parametrize("kind, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forms_agree(shape, reverse, kind, tolerance):
    arguments = given(*shape, kind=kind)
    expected = selective_scan(*arguments, reverse=reverse, form="sequential")
    grad = torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, arguments, grad)
    for form in FORMS:
        found = selective_scan(*arguments, reverse=reverse, form=form)
        with torch.no_grad():  # takes other tiles
            alone = selective_scan(*arguments, reverse=reverse, form=form)
        pairs = [("value", found, expected), ("without gradients", alone, expected)]
        pairs += zip(NAMES, torch.autograd.grad(found, arguments, grad), slopes, strict=True)
        for name, one, other in pairs:
            difference = (one - other).abs().max() / other.abs().max().clamp(min=1e-12)
            assert difference < tolerance, (form, name)


def test_reverse_is_the_scan_of_flipped_tokens():
    x, step, decay, drive, read, skip = given(2, 37, 5, 3)
    expected = selective_scan(x.flip(1), step.flip(1), decay, drive.flip(1), read.flip(1), skip).flip(1)
    torch.testing.assert_close(selective_scan(x, step, decay, drive, read, skip, reverse=True), expected)


@pytest.mark.parametrize("form", ALL)
def test_large_steps_forget_and_nothing_overflows(form):
    """A decay of up to exp(-4e4) a token; step times decay of all tokens together would overflow by far."""
    arguments = given(2, 80, 4, 3, torch.float32, scale=1e4)
    y = selective_scan(*arguments, form=form)
    slopes = torch.autograd.grad(y.square().sum(), arguments)
    assert all(slope.isfinite().all() for slope in slopes)
    x, step, _, drive, read, skip = arguments
    forgetful = (read * drive).sum(2, keepdim=True) * step * x + skip * x
    torch.testing.assert_close(y, forgetful, rtol=1e-3, atol=2e-2)


def test_keeps_long_memories():
    """With no decay to speak of, the states are cumulative sums."""
    x, step, decay, drive, read, _ = given(1, 500, 3, 2)
    y = selective_scan(x, step, decay * 1e-12, drive, read)
    sums = ((step * x)[..., None] * drive[:, :, None]).cumsum(1)
    torch.testing.assert_close(y, (sums * read[:, :, None]).sum(3))


@pytest.mark.parametrize("form", FORMS)
def test_number_formats(form):
    arguments = [tensor.detach().bfloat16() for tensor in given(2, 40, 8, 4, torch.float32)]
    exact = selective_scan(*(tensor.float() for tensor in arguments), form="sequential")
    found = selective_scan(*arguments, form=form)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=1e-2, atol=1e-5)  # rounded once, at the end
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(*arguments, form=form), found)


def test_compiles_and_exports_in_one_graph():
    arguments = given(2, 13, 4, 3, torch.float32)
    expected = selective_scan(*arguments, form="sequential")
    grad = torch.randn_like(expected)
    found = torch.compile(selective_scan, backend="eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad(y, arguments, grad) for y in (found, expected))
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)

    class Scan(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return selective_scan(*given, reverse=True)

    plain = tuple(tensor.detach() for tensor in arguments)
    exported = torch.export.export(Scan(), plain).module()
    torch.testing.assert_close(exported(*plain), Scan()(*plain))


def test_training_keeps_no_state_of_every_token():
    """What is saved for the gradients grows with N C: 32 tokens share one state."""
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    tokens, channels, states = 256, 64, 16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(*given(1, tokens, channels, states, torch.float32))
    assert sum(saved) < tokens * channels * states / 2
    assert max(saved) <= tokens * channels


def test_costs_three_products():
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).mT  # (1, N, C)
            narrow = tokens[..., :4]
            return selective_scan(tokens, tokens.exp(), -torch.ones(16, 4), narrow, narrow)

    assert count(Scan(), size=(5, 7), channels=16).macs == 3 * 35 * 16 * 4


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_authors_numbers(form, reverse):
    """`selective_scan_ref` of state-spaces/mamba; backwards it was given flipped tokens and its output flipped."""
    known = stored(Path(__file__).parent.parent / "golden/selective_scan.json", "reversed" if reverse else "forward")
    check_golden(selective_scan(*published(known.shape), reverse=reverse, form=form), known.golden, tolerance=1e-5)


def published(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The arguments that the golden numbers belong to, cut from noise of that shape."""
    noise = images(shape)
    x, step = noise[..., :12], torch.nn.functional.softplus(noise[..., 12:24] - 2)
    decay = -torch.arange(1, 9).repeat(12, 1).float()
    return x, step, decay, noise[..., 20:28], noise[..., 28:36], noise[0, 0, :12]


def test_what_cannot_be_scanned_is_refused():
    x, step, decay, drive, read, _ = given(2, 4, 3, 2)
    with pytest.raises(UsageError, match=r"drive has shape \(2, 2, 4\); x and decay ask for \(2, 4, 2\)"):
        selective_scan(x, step, decay, drive.mT, read)
    with pytest.raises(UsageError, match="x has no tokens"):
        selective_scan(x[:, :0], step[:, :0], decay, drive[:, :0], read[:, :0])
    with pytest.raises(UsageError, match="form is 'serial'; it must be one of auto, sequential, chunked"):
        selective_scan(x, step, decay, drive, read, form="serial")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="form 'triton' needs CUDA and Triton, x is on cpu"):
        selective_scan(x, step, decay, drive, read, form="triton")


def test_first_biases_give_steps_between_the_shortest_and_the_longest():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(first_biases(4000))
    assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001
    assert abs(steps.log().mean().exp() - 1e-2) < 1e-3  # log-uniform: the geometric mean of both ends
