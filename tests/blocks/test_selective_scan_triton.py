"""The selective scan's Triton kernels, under Triton's interpreter, against the sequential form."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_selective_scan import given
from vertebra.blocks.selective_scan import selective_scan
from vertebra.blocks.selective_scan_triton import scan_cuda

double, single = (torch.float64, 1e-12), (torch.float32, 1e-5)
long = (1, 33, 33, 3)  # two runs of tokens and two programs
cases = [((2, 5, 3, 4), False, double), ((2, 5, 3, 4), True, single), (long, False, single), (long, True, double)]
for shape, reverse, (kind, tolerance) in [*cases, ((1, 1, 2, 1), False, double)]:
    arguments = given(*shape, kind)[:5]
    expected = selective_scan(*arguments, reverse=reverse, form="sequential")
    found = scan_cuda(*arguments, reverse)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    pairs = (torch.autograd.grad(out, arguments, grad) for out in (found, expected))
    torch.testing.assert_close(*pairs, rtol=tolerance, atol=10 * tolerance)
    with torch.no_grad():
        assert torch.equal(scan_cuda(*arguments, reverse), found)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no build for this platform")
def test_kernels_under_the_interpreter():
    """Values and all gradients; in a process of its own, since the switch is read when kernels are made."""
    command = [sys.executable, "-c", KERNELS, str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]
