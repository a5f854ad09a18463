"""Every block page keeps shape and gradients, loads its own weights and exports: all pages and variants by discovery.

The first parameter of a block's factory says what it takes: `channels` maps (B, C, H, W), `dim` tokens (B, N, dim).
A block that takes something else (a branch, say) is left to its own test.
"""

import inspect

import pytest
import torch
from torch import Tensor, nn

from vertebra.parity import fill, images
from vertebra.spec import Spec, addresses

SHAPES = {"channels": lambda width: (2, width, 9, 8), "dim": lambda width: (2, 49, width)}
WIDTHS = (16, 48)
BLOCKS = addresses("blocks")


def layout(address: str) -> str:
    call, given = Spec(address, kind="blocks").resolve()
    found = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    needs = [p.name for p in found if p.default is p.empty and p.name not in given]
    if len(needs) != 1 or needs[0] not in SHAPES:
        pytest.skip(f"{address} requires {', '.join(needs) or 'nothing'}: its own test has to cover it")
    return needs[0]


def block_and_input(address: str, width: int) -> tuple[nn.Module, Tensor]:
    shape = SHAPES[layout(address)](width)
    torch.manual_seed(0)
    return Spec(address, kind="blocks").build(width), images(shape)


def test_the_blocks_are_found():
    assert "eca" in BLOCKS


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("address", BLOCKS)
def test_keeps_shape_and_gradients_flow(address, width):
    block, x = block_and_input(address, width)
    x.requires_grad_(True)
    out = block.train()(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    (out * images(tuple(out.shape))).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize("address", BLOCKS)
def test_state_dict_round_trip(address):
    block, x = block_and_input(address, WIDTHS[0])
    filled = fill(block).eval()
    other = Spec(address, kind="blocks").build(WIDTHS[0]).eval()
    with torch.inference_mode():
        assert not torch.equal(other(x), filled(x))
        other.load_state_dict(filled.state_dict())
        assert torch.equal(other(x), filled(x))


@pytest.mark.parametrize("address", BLOCKS)
def test_an_image_does_not_depend_on_its_neighbours(address):
    block, x = block_and_input(address, WIDTHS[0])
    fill(block).eval()
    with torch.inference_mode():
        torch.testing.assert_close(block(x)[:1], block(x[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("address", BLOCKS)
def test_exports(address):
    block, x = block_and_input(address, WIDTHS[0])
    fill(block).eval()
    with torch.inference_mode():
        expected = block(x)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("address", BLOCKS)
def test_layout_in_memory_does_not_matter(address):
    block, x = block_and_input(address, WIDTHS[0])
    fill(block).eval()
    last = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT
    with torch.inference_mode():
        torch.testing.assert_close(block(last), block(x), rtol=1e-4, atol=1e-5)
