"""Discrete cosine transform (DCT-II, orthonormal) of maps and its inverse (DCT-III): any size, differentiable, exact.

Shapes: any tensor in, the same out, along one axis (`dct`) or two (`dct2`). Short axes are multiplied by a cosine
matrix that is made once; long ones go through an FFT of the values in another order (Makhoul 1980), at n log n. Both
give the same numbers. No page: a tool of the blocks that mix frequencies.

A cosine transform continues a map by its mirror image, so that an edge makes no jump; a Fourier transform continues it
by itself, and the left border meets the right one.
"""

from collections.abc import Callable
from functools import lru_cache
from math import pi
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from vertebra.errors import UsageError

Path: TypeAlias = Literal["auto", "matrix", "fft"]

LONGEST = 64
"""Values along an axis that "auto" transforms by a matrix."""


def dct2(x: Tensor, dims: tuple[int, int] = (-2, -1), *, inverse: bool = False, path: Path = "auto") -> Tensor:
    """The transform along two axes; frequency 0 comes first on both.

    Args:
        x: real numbers, as maps (B, C, H, W).
        dims: of rows and columns.
        inverse: back from frequencies to maps.
        path: as for `dct`.

    Returns:
        The shape and the sum of squares of `x`.

    Raises:
        UsageError: an unknown path, or two axes that are one.
    """
    if dims[0] % x.ndim == dims[1] % x.ndim:
        raise UsageError(f"dct2: dims is {dims} for {x.ndim} dimensions; it needs two axes")
    return dct(dct(x, dims[1], inverse=inverse, path=path), dims[0], inverse=inverse, path=path)


def dct(x: Tensor, dim: int = -1, *, inverse: bool = False, path: Path = "auto") -> Tensor:
    """The transform along one axis.

    Args:
        x: real numbers.
        dim: the axis.
        inverse: back from frequencies.
        path: "matrix" costs n multiply-accumulates a value, "fft" log n; "auto" takes the matrix up to `LONGEST`.

    Raises:
        UsageError: an unknown path.
    """
    if path not in ("auto", "matrix", "fft"):
        raise UsageError(f"dct: path is {path!r}; it can be auto, matrix or fft")
    length = x.shape[dim]
    if path == "matrix" or (path == "auto" and length <= LONGEST):
        return _by_matrix(x, dim % x.ndim, inverse)
    rough = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # an FFT needs 32 bit
    moved = rough.movedim(dim, -1)
    return (_unreordered(moved) if inverse else _reordered(moved)).movedim(-1, dim).to(x.dtype)


def cosines(length: int) -> Tensor:
    """The transform as a matrix (frequency, place) in 64 bit; its transpose is the inverse."""
    k = torch.arange(length, dtype=torch.float64, device="cpu")
    return _scales(length)[:, None] * torch.outer(k, (2 * k + 1) * (pi / (2 * length))).cos()


def _scales(length: int) -> Tensor:
    """What makes the cosines orthonormal: sqrt(2 / n), and sqrt(1 / n) for frequency 0."""
    return (torch.arange(length, dtype=torch.float64, device="cpu").clamp(max=1).add(1) / length).sqrt()


def _by_matrix(x: Tensor, dim: int, inverse: bool) -> Tensor:
    matrix = constant(cosines, x.shape[dim], like=x)
    matrix = matrix.mT if inverse else matrix
    if dim == x.ndim - 1:
        return nn.functional.linear(x, matrix)
    before, length, after = x.shape[:dim].numel(), x.shape[dim], x.shape[dim + 1 :].numel()
    # a batched product: torch.matmul would copy what has gradients to make one product of it
    return torch.bmm(matrix.expand(before, -1, -1), x.reshape(before, length, after)).view(x.shape)


def _reordered(x: Tensor) -> Tensor:
    """(..., n) to frequencies: the even places, the odd ones backwards, their FFT turned by quarters of a step."""
    length = x.shape[-1]
    both = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)
    turned = torch.fft.rfft(both) * torch.view_as_complex(constant(_turns, length, like=x))  # (..., n // 2 + 1)
    return torch.cat((turned.real, -turned.imag[..., 1 : (length + 1) // 2].flip(-1)), -1)


def _unreordered(x: Tensor) -> Tensor:
    """Frequencies (..., n) to values; the steps of `_reordered` backwards."""
    length, half = x.shape[-1], (x.shape[-1] + 1) // 2
    last = nn.functional.pad(x[..., length - length // 2 :].flip(-1), (1, 0))  # frequency n - k beside k; 0 beside 0
    turned = torch.complex(x[..., : length // 2 + 1], -last)
    turned = turned / torch.view_as_complex(constant(_turns, length, like=x))
    even, odd = torch.fft.irfft(turned, n=length).split((half, length - half), -1)
    odd = nn.functional.pad(odd.flip(-1), (0, 2 * half - length))
    return torch.stack((even, odd), -1).flatten(-2)[..., :length]


def _turns(length: int) -> Tensor:
    """Factors on the frequencies 0 to n // 2 of the reordered values, real and imaginary, (n // 2 + 1, 2)."""
    angles = torch.arange(length // 2 + 1, dtype=torch.float64, device="cpu") * (pi / (2 * length))
    return _scales(length)[: len(angles), None] * torch.stack((angles.cos(), -angles.sin()), -1)


def constant(make: Callable[..., Tensor], *sizes: int, like: Tensor) -> Tensor:
    """What `make` returns for some sizes, in the type and on the device of a tensor; made once, where nothing traces.

    Args:
        make: a function at the top of a module; sizes to a tensor on the CPU.
        sizes: what it is given.
        like: the tensor.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return make(*sizes).to(like)
    return _kept(make, sizes, like.dtype, like.device)


@lru_cache(maxsize=256)
def _kept(make: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a constant made for inference could not be trained with
        return make(*sizes).to(device, dtype)
