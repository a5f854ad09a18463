"""Vision Mamba's mixer: the authors' outputs and gradients, symmetry, its two starts, its place in a transformer."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import silu, softplus

from vertebra.backbones.timm import timm
from vertebra.blocks.bidirectional_ssm import bidirectional_ssm
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, stored
from vertebra.surgery.swap import swap

GOLDEN = Path(__file__).parents[1] / "golden" / "vim.json"


def found(variant: str, x: torch.Tensor, mixer: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The output, and gradients of what it is made of, under the names of the golden numbers."""
    mixer, x = mixer or fill(bidirectional_ssm(x.shape[-1], variant)), x.requires_grad_()
    out = mixer(x)
    (out * images(tuple(out.shape))).sum().backward()
    grads = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    named = {"output": out, "x": x.grad, "inputs": grads["inputs.weight"], "shift": grads["directions.0.step.bias"]}
    for number, end in enumerate(("", "_b")[: len(mixer.directions)]):  # type: ignore[arg-type]
        for name, ours in (("decay", "decay_log"), ("skip", "skip")):
            named[name + end] = grads[f"directions.{number}.{ours}"]
        for name in ("step", "select", "conv"):
            named[name + end] = grads[f"directions.{number}.{name}.weight"]
    return named


@pytest.mark.parametrize("variant", ["both", "forward"])
def test_computes_what_the_authors_mixer_does_and_learns_as_it_does(variant):
    reference = stored(GOLDEN, f"mixer {variant}")
    assert max(check_golden(found(variant, images(reference.shape)), reference.golden).values()) < 1e-4


def test_parity_sees_which_direction_is_which():
    reference = stored(GOLDEN, "mixer both")
    mixer = fill(bidirectional_ssm(reference.shape[-1]))
    for direction in mixer.directions:
        direction.reverse = not direction.reverse
    with pytest.raises(ParityError, match="output"):
        check_golden(found("both", images(reference.shape), mixer), reference.golden)


def test_the_equations_token_by_token():
    mixer, x = fill(bidirectional_ssm(6, state=3, kernel=2, rank=2)).double(), images((1, 5, 6)).double()
    inner, gate = (x @ mixer.inputs.weight.T).chunk(2, -1)
    total = torch.zeros_like(inner)
    for direction, flip in zip(mixer.directions, (False, True), strict=True):
        tokens = inner[0].flip(0) if flip else inner[0]
        state, seen, out = torch.zeros(12, 3, dtype=torch.double), torch.zeros(12, dtype=torch.double), []
        for token in tokens:
            weight, bias = direction.conv.weight[:, 0], direction.conv.bias
            now, seen = silu(weight[:, 0] * seen + weight[:, 1] * token + bias), token
            step, drive, read = direction.select(now).split((2, 3, 3))
            step = softplus(direction.step(step))[:, None]
            state = (-step * direction.decay_log.exp()).exp() * state + step * drive * now[:, None]
            out.append(state @ read + direction.skip * now)
        total[0] += torch.stack(out).flip(0) if flip else torch.stack(out)
    expected = (total / 2 * silu(gate)) @ mixer.outputs.weight.T
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)


def test_turning_the_sequence_and_exchanging_the_directions_turns_the_output():
    mixer, other = fill(bidirectional_ssm(16)).eval(), bidirectional_ssm(16).eval()
    turned = {"0": "1", "1": "0"}
    state = mixer.state_dict()
    for name in list(state):
        words = name.split(".")
        if words[0] == "directions":
            state[name] = mixer.state_dict()[".".join((words[0], turned[words[1]], *words[2:]))]
    other.load_state_dict(state)
    x = images((2, 11, 16))
    with torch.inference_mode():
        torch.testing.assert_close(other(x.flip(1)).flip(1), mixer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variant", "sees_later"), [("both", True), ("forward", False)])
def test_who_sees_whom(variant, sees_later):
    mixer, x = fill(bidirectional_ssm(16, variant)), images((1, 40, 16)).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[0, 20].sum(), x)
    reach = grad[0].abs().amax(1)
    assert reach[:21].min() > 0  # also those that the convolution does not
    assert bool(reach[21:].min() > 0) == sees_later and bool(reach[21:].any()) == sees_later


def test_how_the_directions_start():
    torch.manual_seed(0)
    reference, symmetric = bidirectional_ssm(64), bidirectional_ssm(64, start="symmetric")
    for mixer in (reference, symmetric):
        assert torch.equal(mixer.directions[1].decay_log.exp()[5].round(), torch.arange(1.0, 17))
        steps = softplus(mixer.directions[0].step.bias)
        assert 1e-3 * 0.99 < steps.min() < 3e-3 and 0.03 < steps.max() < 0.1 * 1.01
        assert mixer.directions[0].step.weight.abs().max() <= 0.5  # rank 4
    assert not reference.directions[1].step.bias.any()
    assert softplus(symmetric.directions[1].step.bias).max() < 0.1 * 1.01


def test_sizes():
    mixer = bidirectional_ssm(192)
    assert sum(p.numel() for p in mixer.parameters()) == 281_856
    mixer = bidirectional_ssm(20, "forward", state=4, expand=3, kernel=5, rank=7)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "inputs.weight": (120, 20),
        "directions.0.decay_log": (60, 4),
        "directions.0.skip": (60,),
        "directions.0.conv.weight": (60, 1, 5),
        "directions.0.conv.bias": (60,),
        "directions.0.select.weight": (15, 60),
        "directions.0.step.weight": (60, 7),
        "directions.0.step.bias": (60,),
        "outputs.weight": (20, 60),
    }
    assert mixer(torch.randn(2, 1, 20)).shape == (2, 1, 20)  # fewer tokens than the kernel


def test_number_formats():
    torch.manual_seed(0)
    mixer, x = bidirectional_ssm(32), images((2, 19, 32))
    expected, rough = mixer(x), bidirectional_ssm(32).bfloat16()
    rough.load_state_dict(mixer.state_dict())
    found = rough(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), 0) > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(x)
    assert nn.functional.cosine_similarity(mixed.float().flatten(), expected.flatten(), 0) > 0.999
    mixed.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_in_place_of_a_transformers_attention():
    torch.manual_seed(0)
    network = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    vit = timm("vit_tiny_patch16_224", image_size=32, network=network).eval()
    operated = swap(vit, "Attention", "bidirectional_ssm", state=4)
    assert operated.changed == ("network.blocks.0.attn", "network.blocks.1.attn")
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        found, before = operated.model(x), vit(x)  # type: ignore[operator]
    assert found.tokens.shape == before.tokens.shape == (2, 17, 24)
    assert not torch.allclose(found.pooled, before.pooled)


def test_wrong_options_are_refused():
    for options, words in (
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"dim": 16, "variant": "boht"}, "no variant 'boht'; did you mean both"),
        ({"dim": 16, "state": 0}, "state is 0"),
        ({"dim": 16, "rank": 0}, "rank is 0"),
        ({"dim": 16, "start": "zero"}, "start is 'zero'; it can be reference or symmetric"),
    ):
        with pytest.raises(UsageError, match=words):
            bidirectional_ssm(**options)
