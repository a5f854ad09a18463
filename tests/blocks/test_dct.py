"""The cosine transform: scipy's numbers, energy, gradients, cost of both paths, tracing."""

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vertebra.blocks import dct as tool
from vertebra.blocks.dct import LONGEST, cosines, dct, dct2
from vertebra.errors import UsageError
from vertebra.parity import images

PATHS = ("matrix", "fft")
SIZES = [(1, 1), (1, 2), (3, 1), (4, 4), (7, 9), (14, 14), (64, 65), (33, 96)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES)
def test_numbers_are_scipys(size, path):
    x = images((2, 3, *size))
    theirs = scipy.fft.dctn(x.double().numpy(), type=2, axes=(2, 3), norm="ortho")
    exact, rough = dct2(x.double(), path=path), dct2(x, path=path)
    assert exact.dtype == torch.float64 and rough.dtype == torch.float32
    assert np.abs(exact.numpy() - theirs).max() < 1e-11
    assert np.abs(rough.numpy() - theirs).max() < 1e-5 * np.abs(theirs).max()
    back = scipy.fft.idctn(x.double().numpy(), type=2, axes=(2, 3), norm="ortho")
    assert np.abs(dct2(x.double(), inverse=True, path=path).numpy() - back).max() < 1e-11


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_inverts_and_energy_stays(size, path):
    x = images((2, 3, *size))
    spectrum = dct2(x, path=path)
    torch.testing.assert_close(dct2(spectrum, inverse=True, path=path), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(spectrum.square().sum((2, 3)), x.square().sum((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_gradients(path, inverse):
    x = images((1, 2, 4, 5)).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: dct2(x, inverse=inverse, path=path), x)
    assert torch.autograd.gradgradcheck(lambda x: dct2(x, inverse=inverse, path=path).square(), x)


@pytest.mark.parametrize("dims", [(-2, -1), (1, 2), (0, 3), (2, 0)])
def test_any_two_axes_in_any_layout(dims):
    x = images((5, 6, 7, 4))
    expected = scipy.fft.dctn(x.numpy(), axes=dims, norm="ortho")
    for layout in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        for path in PATHS:
            torch.testing.assert_close(dct2(layout, dims, path=path), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_a_cosine_is_one_frequency_and_a_ramp_has_no_edge():
    """What a Fourier transform taken for a cosine transform gets wrong: the borders."""
    place, length = torch.arange(16.0), 16
    for frequency in (0, 1, 5, 15):
        found = dct(((2 * place + 1) * frequency * torch.pi / (2 * length)).cos())
        assert found.argmax() == frequency and found.abs().sum() - found[frequency] < 1e-4
    ramp = place - place.mean()
    fourier = torch.fft.fft(ramp, norm="ortho").abs().square()  # 0, then each frequency twice
    cosine = dct(ramp).square()
    assert cosine[:2].sum() > 0.98 * cosine.sum() and fourier[[0, 1, 15]].sum() < 0.7 * fourier.sum()


def test_short_axes_take_the_matrix_and_long_ones_the_fft():
    for length, path in ((LONGEST, "matrix"), (LONGEST + 1, "fft")):
        x = images((2, length))
        assert torch.equal(dct(x), dct(x, path=path))
        assert torch.equal(dct(x, inverse=True), dct(x, inverse=True, path=path))
        other = dct(x, path=PATHS[path == "matrix"])
        torch.testing.assert_close(dct(x), other, rtol=0, atol=1e-5)
        assert not torch.equal(dct(x), other)


class Work(TorchDispatchMode):
    """Numbers that all operations write, and those that Fourier transforms read or write; products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.fourier = self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.macs += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        elif "_fft" in func.name():
            self.fourier += max(out.numel(), args[0].numel())
        else:
            self.plain += sum(tensor.numel() for tensor in (out if isinstance(out, list | tuple) else (out,)))
        return out


def test_cost_grows_as_n_log_n_by_fft_and_as_n_squared_by_the_matrix():
    found: dict[tuple[str, int], Work] = {}
    for length in (128, 512):
        x = images((4, length))
        for path in PATHS:
            dct(x, path=path)  # makes the constants
            with Work() as found[path, length]:
                dct(dct(x, path=path), inverse=True, path=path)
    slow, fast = ([found[path, length] for length in (128, 512)] for path in PATHS)
    assert [work.macs for work in slow] == [2 * 4 * 128**2, 2 * 4 * 512**2] and slow[0].fourier == 0
    assert [work.macs for work in fast] == [0, 0]
    assert [work.fourier for work in fast] == [2 * 4 * 128, 2 * 4 * 512]  # once each way, at n log n
    assert 3.8 < fast[1].plain / fast[0].plain <= 4.0  # all the rest is linear


def test_constants_are_made_once_and_can_be_trained_with():
    tool._kept.cache_clear()
    with torch.inference_mode():
        dct2(images((2, 11, 70)))
    made = tool._kept.cache_info().misses
    x = images((2, 11, 70)).requires_grad_(True)
    dct2(dct2(x), inverse=True).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0, atol=1e-5)
    assert made == 2 and tool._kept.cache_info().misses == made
    assert torch.func.vmap(torch.func.grad(lambda x: dct2(x).square().sum()))(images((3, 5, 5))).shape == (3, 5, 5)


def test_rough_types_and_the_meta_device():
    for path in PATHS:
        x = images((2, 3, 20, 30))
        rough = dct2(x.bfloat16(), path=path)
        assert rough.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(rough.float().flatten(1), dct2(x).flatten(1)).min() > 0.999
        assert dct2(torch.empty(2, 80, 9, device="meta"), path=path).shape == (2, 80, 9)


@pytest.mark.parametrize("path", PATHS)
def test_exports_and_compiles_in_one_graph(path):
    class Transform(nn.Module):
        def forward(self, x):
            return dct2(dct2(x, path=path) * 2, inverse=True, path=path)

    x = images((2, 3, 12, 9))
    compiled = torch.compile(Transform(), backend="eager", fullgraph=True)
    exported = torch.export.export(Transform(), (x,)).module()
    for network in (compiled, exported):
        torch.testing.assert_close(network(x), 2 * x, rtol=0, atol=1e-5)


def test_the_matrix_is_orthonormal():
    for length in (1, 2, 7, 64):
        matrix = cosines(length)
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(length, dtype=torch.float64), rtol=0, atol=1e-13)


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="path is 'slow'; it can be auto, matrix or fft"):
        dct(images((2, 4)), path="slow")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"dims is \(-1, 2\) for 3 dimensions; it needs two axes"):
        dct2(images((2, 4, 4)), (-1, 2))
