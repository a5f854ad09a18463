"""Long convolutions: direct sums in one, two and three dimensions, gradients, export, and the transforms' lengths."""

from itertools import product

import pytest
import torch
from torch import Tensor

from vertebra.blocks import sgconv
from vertebra.blocks.long_convolution import convolve, exact, transform_length
from vertebra.parity import difference, images


def direct(x: Tensor, kernel: Tensor, ahead: tuple[int, ...]) -> Tensor:
    """The sum itself, tap after tap: x (B, C, *sides), kernel (C, *taps)."""
    out, sides = torch.zeros_like(x), x.shape[2:]
    for tap in product(*map(range, kernel.shape[1:])):
        shift = [
            place - before for place, before in zip(tap, ahead, strict=True)
        ]  # the cell gets what lies so far before
        if any(abs(one) >= side for one, side in zip(shift, sides, strict=True)):
            continue
        to = tuple(slice(max(0, one), side + min(0, one)) for one, side in zip(shift, sides, strict=True))
        of = tuple(slice(max(0, -one), side + min(0, -one)) for one, side in zip(shift, sides, strict=True))
        weight = kernel[(slice(None), *tap)].view(-1, *(1,) * len(sides))
        out[(..., *to)] += weight * x[(..., *of)]
    return out


CASES = {
    "causal": ((11,), (11,), (0,)),
    "sequence, both sides": ((11,), (21,), (10,)),
    "more taps than meet a cell": ((5,), (16,), (9,)),
    "more causal taps than cells": ((5,), (9,), (0,)),
    "few taps": ((12,), (3,), (1,)),
    "one cell": ((1,), (1,), (0,)),
    "map": ((6, 9), (6, 9), (0, 0)),
    "map, centred": ((6, 9), (11, 17), (5, 8)),
    "map, turned": ((7, 4), (7, 4), (6, 3)),
    "map, one axis turned": ((7, 4), (7, 4), (0, 3)),
    "volume": ((3, 4, 5), (3, 4, 5), (0, 0, 0)),
    "volume, centred": ((3, 4, 5), (5, 7, 9), (2, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_direct_sum(name):
    sides, taps, ahead = CASES[name]
    x, kernel = images((2, 3, *sides)), images((3, *taps))
    expected = direct(x, kernel, ahead)
    with torch.no_grad():
        assert difference(convolve(x, kernel, axes=len(sides), ahead=ahead), expected) < 1e-5
    x.requires_grad_()  # the way with gradients is another one
    assert difference(convolve(x, kernel, axes=len(sides), ahead=ahead), expected) < 1e-5


def test_gradients_are_those_of_torchs_transforms():
    x, ahead = images((2, 2, 3, 4)).double().requires_grad_(), (2, 0)
    kernel = images((2, 5, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, kernel: convolve(x, kernel, axes=2, ahead=ahead), (x, kernel))
    several = images((3, 2, 4)).double().requires_grad_()  # kernels of each channel
    one = images((2, 1, 2, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(convolve, (one, several))
    volume, cube = (images(shape).double().requires_grad_() for shape in ((1, 1, 2, 3, 2), (1, 2, 3, 2)))
    assert torch.autograd.gradcheck(lambda x, kernel: convolve(x, kernel, axes=3), (volume, cube))
    shared = images((1, 2, 4)).double().requires_grad_()  # one kernel for several
    assert torch.autograd.gradcheck(convolve, (images((2, 3, 2, 4)).double().requires_grad_(), shared))


def test_gradients_of_gradients_are_refused():
    x, kernel = images((1, 2, 5)).requires_grad_(), images((2, 5)).requires_grad_()
    first = torch.autograd.grad(convolve(x, kernel).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("length", [12, 77, 150])
def test_sequences_are_those_of_sgconv(length):
    x, forth, back = images((2, 1, 3, length)), images((2, 3, length)), images((2, 3, length)) * -0.5
    both = torch.cat([back.flip(-1), forth], -1)
    assert difference(convolve(x, forth), sgconv.convolve(x, forth)) < 1e-6
    assert difference(convolve(x, both, ahead=(length,)), sgconv.convolve(x, forth, back)) < 1e-6


def test_compiles_and_exports_in_one_graph():
    x, kernel = images((2, 3, 5, 6)), images((3, 5, 6)).requires_grad_()
    convolve(x, kernel, axes=2).square().sum().backward()
    expected, kernel.grad = kernel.grad, None
    torch.compile(convolve, backend="eager", fullgraph=True)(x, kernel, axes=2).square().sum().backward()
    torch.testing.assert_close(kernel.grad, expected, rtol=1e-4, atol=1e-4)

    class Own(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return convolve(x, x[0])

    sides = {"x": {2: torch.export.Dim("length", min=2, max=64)}}
    exported = torch.export.export(Own(), (images((2, 3, 6)),), dynamic_shapes=sides).module()
    assert difference(exported(images((2, 3, 9))), Own()(images((2, 3, 9)))) < 1e-5


@pytest.mark.parametrize(("least", "length"), [(1, 4), (15, 16), (27, 28), (31, 32), (33, 36), (391, 400), (449, 480)])
def test_transforms_have_lengths_that_are_fast(least, length):
    assert transform_length(least) == length


def test_transforms_are_in_32_bit_at_least():
    assert exact(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert exact(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
