"""Masked layer norm: a layer norm of fewer channels, forward and backward, and the authors' numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.masked_layer_norm import MaskedLayerNorm, masked_layer_norm
from vertebra.errors import UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.spec import Spec
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "vit_resnas.json"
KEEP = [24, 9, 1, 16]


def gradients(norm: MaskedLayerNorm, x: Tensor, keep: int | Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(True)
    out = norm(x, keep)
    found = torch.autograd.grad((out * x.detach().flip(-1)).sum(), [x, norm.weight, norm.bias])
    return {"output": out.detach(), **dict(zip(("gradient", "weight", "bias"), found, strict=True))}


def sliced(norm: MaskedLayerNorm, x: Tensor, keep: list[int]) -> dict[str, Tensor]:
    """The same by torch's layer norm of each image's own channels, with zeros behind."""
    x, norm = x.clone().requires_grad_(True), norm.requires_grad_(True)
    rows = [
        nn.functional.layer_norm(one[..., :n], (n,), norm.weight[:n], norm.bias[:n], norm.eps)
        for one, n in zip(x, keep, strict=True)
    ]
    out = torch.stack([nn.functional.pad(row, (0, x.shape[-1] - row.shape[-1])) for row in rows])
    found = torch.autograd.grad((out * x.detach().flip(-1)).sum(), [x, norm.weight, norm.bias])
    return {"output": out.detach(), **dict(zip(("gradient", "weight", "bias"), found, strict=True))}


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(4, 7, 24), (4, 24), (4, 3, 2, 24)])
def test_is_a_layer_norm_of_the_channels_in_use(shape, kind, tolerance):
    norm, x = fill(masked_layer_norm(24)).to(kind), images(shape).to(kind)
    found, expected = gradients(norm, x, torch.tensor(KEEP)), sliced(norm.double(), x.double(), KEEP)
    for name, tensor in expected.items():
        assert difference(found[name], tensor) < tolerance, name
    used = torch.arange(24) < torch.tensor(KEEP).view(-1, *(1,) * (x.ndim - 1))
    assert not found["output"].where(~used, 0).any() and not found["gradient"].where(~used, 0).any()
    assert found["output"][0].all()  # all channels of the first are in use


def test_one_number_is_that_of_all():
    norm, x = fill(masked_layer_norm(24)).double(), images((2, 5, 24)).double()
    for keep in (1, 9, 24):
        one, each = gradients(norm, x, keep), gradients(norm, x, torch.tensor([keep, keep]))
        assert all(difference(one[name], each[name]) < 1e-13 for name in one)
    torch.testing.assert_close(norm(x, 24), norm(x))


def test_is_the_authors():
    """Outputs and gradients of their own function, which has a backward pass of its own."""
    reference = stored(GOLDEN, "masked layer norm")
    norm = fill(masked_layer_norm(24))
    found = gradients(norm, images(reference.shape), torch.tensor([24, 9, 16]))
    assert max(check_golden(found, reference.golden).values()) < 1e-6
    moved = gradients(norm, images(reference.shape), torch.tensor([24, 10, 16]))
    assert difference(moved["output"], found["output"]) > 0.1


def test_what_lies_out_of_use_does_not_matter():
    norm, x = fill(masked_layer_norm(8)), images((2, 3, 8))
    spoilt = x.clone()
    spoilt[0, :, 5:], spoilt[1, :, 2:] = float("nan"), float("inf")
    for keep in (torch.tensor([5, 2]), 2):
        assert torch.equal(norm(spoilt, keep), norm(x, keep))
        given = [one.clone().requires_grad_(True) for one in (spoilt, x)]
        ours, theirs = (torch.autograd.grad((norm(one, keep) * x).sum(), [one, norm.weight]) for one in given)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_without_a_number_it_is_torchs():
    norm, plain = fill(masked_layer_norm(16)), fill(nn.LayerNorm(16, eps=1e-6))
    x = images((2, 5, 16))
    assert torch.equal(norm(x), plain(x)) and norm.eps == 1e-6
    assert norm.state_dict().keys() == plain.state_dict().keys()


def test_sixteen_bit_is_near_thirty_two():
    norm, x, keep = fill(masked_layer_norm(64)), 100 + images((3, 9, 64)), torch.tensor([64, 20, 33])
    exact = norm(x.bfloat16().float(), keep)
    rough = norm.bfloat16()(x.bfloat16(), keep)
    assert rough.dtype == torch.bfloat16 and difference(rough.float(), exact) < 0.02


def test_compiles_in_one_graph_and_exports_with_numbers():
    norm, x, keep = fill(masked_layer_norm(16)), images((2, 5, 16)), torch.tensor([16, 6])
    expected = norm(x, keep)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(norm, backend="eager", fullgraph=True)(x, keep), expected)
    torch.testing.assert_close(torch.export.export(norm, (x, keep)).module()(x, keep), expected)


def test_swap_in_a_vit():
    vit = Spec("timm/vit_tiny_patch16_224", {"image_size": 32, "network": {"depth": 1}}).build().eval()
    operated = swap(vit, "LayerNorm", "masked_layer_norm")
    batch = images((2, 3, 32, 32))
    assert len(operated.changed) == 3 and operated.before.params == operated.after.params
    with torch.inference_mode():
        assert difference(operated.model(batch).pooled, vit(batch).pooled) < 1e-5  # both start with gains of 1


def test_wrong_numbers_are_refused():
    norm, x = masked_layer_norm(8), images((2, 3, 8))
    for keep, message in [
        (0, r"keep is 0; it must be in 1\.\.8"),
        (9, r"keep is 9"),
        (torch.tensor([3]), r"shape \(1,\); .* 2 images"),
        (torch.tensor(3), r"shape \(\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            norm(x, keep)
    with pytest.raises(UsageError, match="dim is 0"):
        masked_layer_norm(0)
