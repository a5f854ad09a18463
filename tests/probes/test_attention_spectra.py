"""Spectra, maps and landscapes: known matrices, known losses, and networks of several kinds."""

import pytest
import torch
from torch import Tensor, nn

from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.probes.attention_spectra import attention_maps, attention_spectra, effective_rank, landscape
from vertebra.spec import Spec
from vertebra.surgery.karat import karat

VIT = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}


def vit() -> nn.Module:
    return fill(Spec("timm/vit_tiny_patch16_224", {"image_size": 32, "network": VIT}).build()).eval()


def test_effective_rank_of_known_values():
    values = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [4, 1, 1, 0]]).double()
    shares = torch.tensor([2 / 3, 1 / 6, 1 / 6]).double()
    entropy = -(shares * shares.log()).sum()
    torch.testing.assert_close(effective_rank(values), torch.tensor([4, 1, 2, 1, entropy.exp()]).double())


def test_softmax_of_a_vit():
    network, x = vit(), images((3, 3, 32, 32))
    maps = attention_maps(network, x)
    assert [each.name for each in maps] == ["network.blocks.0.attn", "network.blocks.1.attn"]
    assert maps[0].before.shape == maps[0].after.shape == (3, 2, 17, 17)
    torch.testing.assert_close(maps[0].after, maps[0].before.softmax(-1))
    # the scores are those of the layer: its own output from them is its output
    given: list[Tensor] = []
    layer = network.network.blocks[1].attn
    layer.register_forward_hook(lambda _, args, out: given.extend((args[0], out)))
    with torch.no_grad():
        network(x)
        v = layer.qkv(given[0]).unflatten(-1, (3, 2, 6))[:, :, 2].transpose(1, 2)
        torch.testing.assert_close(layer.proj((maps[1].after @ v).transpose(1, 2).flatten(2)), given[1])
    spectra = attention_spectra(network, x)
    assert spectra[1].before.shape == spectra[1].after.shape == (2, 17)
    torch.testing.assert_close(spectra[1].after, torch.linalg.svdvals(maps[1].after.double()).mean(0))
    assert (spectra[1].after.diff() <= 0).all() and (spectra[1].rank_before <= 6).all()  # of 6 channels a head


def test_operators_have_at_most_their_rank():
    network = karat(vit(), "universal", r=3).model
    for spectrum in attention_spectra(network, images((2, 3, 32, 32))):
        assert (spectrum.after[:, 3:] < 1e-5 * spectrum.after[:, :1]).all() and (spectrum.after[:, 2] > 0).all()
        assert (spectrum.rank_after <= 3).all()
    maps = attention_maps(network, images((2, 3, 32, 32)))
    assert len(maps) == 2 and (maps[0].after < 0).any()  # rows may be negative


def test_windows_and_positions():
    network = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 4}
    swin = fill(Spec("timm/swin_tiny_patch4_window7_224", {"image_size": 32, "network": network}).build()).eval()
    plain, shifted = attention_maps(swin, images((2, 3, 32, 32)))
    assert plain.after.shape == shifted.after.shape == (8, 2, 16, 16)  # two images of four windows
    assert (plain.after > 0).all() and (shifted.after[-1] == 0).any() and shifted.before.abs().max() < 50
    gated = {**VIT, "local_up_to_layer": 1}
    convit = fill(Spec("timm/convit_tiny", {"image_size": 32, "network": gated}).build()).eval()
    x = images((2, 3, 32, 32))
    layer, given = convit.network.blocks[0].attn, []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    maps = attention_maps(convit, x)
    torch.testing.assert_close(maps[0].after, layer.get_attention(given[0]))


def test_networks_without_attention_are_refused(tiny):
    with pytest.raises(UsageError, match=r"the Tiny has no attention that is known; it has Conv2d \(1\)"):
        attention_maps(tiny.eval(), images((1, 1, 8, 8)))
    with pytest.raises(UsageError, match="is in training mode"):
        attention_spectra(vit().train(), images((1, 3, 32, 32)))


def test_landscape_of_a_bowl():
    """Squared distance from zero: (1 + a)^2 where a direction were the weights themselves; its middle is the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40)).eval()
    weight = model[0].weight
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = landscape(model, lambda: weight.square().sum(), radius=2.0, steps=5, seed=3)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    length = start["0.weight"].double().square().sum()
    torch.testing.assert_close(found[2, 2], length, rtol=1e-5, atol=0)
    # a step of 2 along a direction of the weights' length, nearly at right angles: 1 + 2^2 times as much
    torch.testing.assert_close(found[0, 2] + found[4, 2], 2 * 5 * length, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2, 0] + found[2, 4], 2 * 5 * length, rtol=1e-4, atol=0)
    assert torch.equal(landscape(model, lambda: weight.square().sum(), radius=2.0, steps=5, seed=3), found)
    assert not torch.equal(landscape(model, lambda: weight.square().sum(), radius=2.0, steps=5, seed=4), found)


def test_landscape_refuses_and_restores():
    model = nn.Linear(2, 2).eval()
    for options, words in [({"steps": 1}, "steps is 1"), ({"radius": 0.0}, "radius 0.0")]:
        with pytest.raises(UsageError, match=words):
            landscape(model, lambda: model.weight.sum(), **options)
    with pytest.raises(UsageError, match="is in training mode"):
        landscape(model.train(), lambda: model.weight.sum())
    start = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError):
        landscape(model.eval(), lambda: torch.tensor(1 / 0))
    assert torch.equal(model.weight, start)
