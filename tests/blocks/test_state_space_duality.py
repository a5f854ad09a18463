"""State space duality: both forms of the scan and Mamba-2's mixer against the recurrence, and what they cost."""

import pytest
import torch
from torch import Tensor, nn

from vertebra.blocks.mamba2 import mamba2
from vertebra.blocks.state_space_duality import GROUP, LENGTH, dual_scan
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.surgery.swap import swap

NAMES = ("x", "step", "decay", "drive", "read", "skip")


def arguments(tokens: int, *, heads: int = 4, groups: int = 1, wild: float = 1.0, dtype=torch.float64) -> list[Tensor]:
    """x, step, decay, drive, read, skip; `wild` spreads the steps over many orders of magnitude."""
    torch.manual_seed(tokens)
    x, step = torch.randn(2, tokens, heads, 8), nn.functional.softplus(wild * torch.randn(2, tokens, heads) - 2)
    drive, read = torch.randn(2, 2, tokens, groups, 6)
    made = [x, step, -torch.empty(heads).uniform_(1, 16), drive, read, torch.randn(heads)]
    return [values.to(dtype).requires_grad_() for values in made]


def recurrence(x: Tensor, step: Tensor, decay: Tensor, drive: Tensor, read: Tensor, skip: Tensor) -> Tensor:
    """Equation by equation, one head and token after the other: states (S, P)."""
    out = torch.zeros_like(x)
    per = x.shape[2] // drive.shape[2]
    for image in range(len(x)):
        for head in range(x.shape[2]):
            state = torch.zeros(drive.shape[3], x.shape[3], dtype=x.dtype)
            for n in range(x.shape[1]):
                kept = torch.exp(step[image, n, head] * decay[head])
                put = step[image, n, head] * torch.outer(drive[image, n, head // per], x[image, n, head])
                state = kept * state + put
                out[image, n, head] = read[image, n, head // per] @ state + skip[head] * x[image, n, head]
    return out


@pytest.mark.parametrize(("tokens", "groups", "form"), [(5, 1, "sequential"), (7, 2, "chunked"), (9, 4, "chunked")])
def test_both_forms_are_the_recurrence(tokens, groups, form):
    given = [values.detach() for values in arguments(tokens, groups=groups)]
    found = dual_scan(*given, form=form, length=3)
    torch.testing.assert_close(found, recurrence(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, LENGTH - 1, LENGTH + 1, 3 * LENGTH])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_forms_agree_with_their_gradients(tokens, dtype, bound):
    given = arguments(tokens, wild=3.0, dtype=dtype)
    found = {form: dual_scan(*given, form=form) for form in ("chunked", "sequential")}
    assert found["chunked"].dtype == dtype
    assert difference(found["chunked"], found["sequential"]) < bound
    towards = images(tuple(found["chunked"].shape)).to(dtype)
    grads = {form: torch.autograd.grad((out * towards).sum(), given) for form, out in found.items()}
    for name, ours, theirs in zip(NAMES, grads["chunked"], grads["sequential"], strict=True):
        # in 32 bit that of A is a difference of sums, times the steps: some 1e-5 where these differ a thousandfold
        loose = 5 if name == "decay" and dtype == torch.float32 else 1
        assert difference(ours, theirs, name) < loose * bound, name


def test_many_chunks_are_carried_through_groups_of_groups():
    tokens = 2 * GROUP**2 + 5  # chunks of one token: three levels
    given = arguments(tokens, heads=2, wild=2.0)
    assert difference(dual_scan(*given, length=1), dual_scan(*given, form="sequential")) < 1e-12
    assert difference(dual_scan(*given, length=7), dual_scan(*given, form="sequential")) < 1e-12


def test_gradients_are_the_slopes():
    given = [values.detach().requires_grad_() for values in arguments(5, heads=2)]
    few = (given[0][:1, :, :, :2], given[1][:1], given[2], given[3][:1, ..., :2], given[4][:1, ..., :2], given[5])
    few = [values.detach().requires_grad_() for values in few]
    assert torch.autograd.gradcheck(lambda *args: dual_scan(*args, length=2), few)


def test_a_state_that_is_wiped_out_does_not_cost_its_followers_their_digits():
    """Sums of large decays round by more than the differences that follow them; the coarse and fine parts do not."""
    exact = [values.detach() for values in arguments(2 * LENGTH)]
    exact[1][:, ::8] = 60.0  # exp(-960), then small steps
    exact[1][:, 1::8] = 1e-3
    expected = dual_scan(*exact, form="sequential")
    found = dual_scan(*(values.float() for values in exact))
    assert difference(found, expected) < 2e-6
    strong = [values.float() for values in exact]
    strong[2] = strong[2] * 1e4  # far below what 32 bit can hold
    assert dual_scan(*strong).isfinite().all()


def test_tokens_see_nothing_behind_them():
    given = [values.detach() for values in arguments(40)]
    before = dual_scan(*given, length=8)
    given[0][:, 21] += 1
    after = dual_scan(*given, length=8)
    assert torch.equal(before[:, :21], after[:, :21])
    assert (before[:, 21:24] != after[:, 21:24]).any()


def test_low_precision_sums_in_32_bit():
    given = [values.detach() for values in arguments(100, dtype=torch.float32)]
    rough = dual_scan(*(values.bfloat16() for values in given))
    rounded = dual_scan(*(values.bfloat16().float() for values in given))
    assert rough.dtype == torch.bfloat16
    assert difference(rough, rounded) < 2**-8


def test_wrong_arguments_are_refused():
    given = arguments(4)
    with pytest.raises(UsageError, match="form is 'parallel'; it can be chunked or sequential"):
        dual_scan(*given, form="parallel")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="length is 0"):
        dual_scan(*given, length=0)
    with pytest.raises(UsageError, match="3 groups do not divide 4 heads"):
        dual_scan(*arguments(4, groups=3))


# --- the mixer ---


class Reference(nn.Module):
    """Mamba-2's arithmetic, step by step, under the names of state-spaces/mamba's module."""

    def __init__(self, dim: int, head_dim: int, state: int) -> None:
        super().__init__()
        inner, self.head_dim, self.state = 2 * dim, head_dim, state
        heads, mixed = inner // head_dim, inner + 2 * state
        self.in_proj = nn.Linear(dim, inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, 4, padding=3, groups=mixed)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(heads)) for _ in range(3))
        self.norm = nn.RMSNorm(inner, 1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        inner, heads = self.norm.weight.numel(), self.D.numel()
        z, mixed, dt = self.in_proj(u).split([inner, inner + 2 * self.state, heads], -1)
        mixed = nn.functional.silu(self.conv1d(mixed.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        x, b, c = mixed.split([inner, self.state, self.state], -1)
        step = nn.functional.softplus(dt + self.dt_bias)
        heads_of = x.unflatten(2, (heads, self.head_dim))
        y = recurrence(heads_of, step, -self.A_log.exp(), b[:, :, None], c[:, :, None], self.D).flatten(2)
        return self.out_proj(self.norm(y * nn.functional.silu(z)))


THEIRS = {
    "in_proj.weight": "project.weight",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "dt_bias": "step_bias",
    "A_log": "decay_log",
    "D": "skip",
    "norm.weight": "norm.weight",
    "out_proj.weight": "out.weight",
}


@pytest.mark.parametrize("tokens", [3, 19])
def test_mixer_computes_what_the_reference_does(tokens):
    theirs = Reference(16, 8, 5)
    ours = fill(mamba2(16, state=5, head_dim=8))
    assert {THEIRS[name] for name, _ in theirs.named_parameters()} == {name for name, _ in ours.named_parameters()}
    theirs.load_state_dict({name: ours.state_dict()[mine] for name, mine in THEIRS.items()})
    x = images((2, tokens, 16))
    with torch.inference_mode():
        assert difference(ours(x), theirs(x)) < 1e-5


def test_mixer_is_sized_as_the_paper_has_it():
    block = mamba2(256)
    sizes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert sizes == {
        "step_bias": (8,),
        "decay_log": (8,),
        "skip": (8,),
        "project.weight": (2 * 512 + 2 * 64 + 8, 256),
        "conv.weight": (512 + 2 * 64, 1, 4),
        "conv.bias": (512 + 2 * 64,),
        "norm.weight": (512,),
        "out.weight": (256, 512),
    }
    steps, decays = nn.functional.softplus(block.step_bias), block.decay_log.exp()
    assert steps.min() >= 1e-3 and steps.max() <= 0.1 + 1e-6 and decays.min() >= 1 and decays.max() <= 16


def test_mixer_forms_agree_and_exports():
    x = images((2, 70, 16))
    block, other = fill(mamba2(16, state=8)).eval(), fill(mamba2(16, state=8, form="sequential")).eval()
    with torch.inference_mode():
        expected = other(x)
        assert difference(block(x), expected) < 1e-5
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_mixer_refuses_wrong_options():
    with pytest.raises(UsageError, match="state is 0; it must be at least 1"):
        mamba2(16, state=0)
    with pytest.raises(UsageError, match="96 channels inside do not divide into heads of 64 in 1 groups; head_dim=32"):
        mamba2(48, head_dim=64)
    with pytest.raises(UsageError, match="in 2 groups"):
        mamba2(32, groups=2)
    assert mamba2(64, groups=2)(images((1, 5, 64))).shape == (1, 5, 64)


def test_swap_puts_it_in_the_place_of_attention():
    from vertebra.backbones.timm import timm

    backbone = timm("vit_tiny_patch16_224", image_size=32, network={"embed_dim": 32, "depth": 2, "num_heads": 2})
    operated = swap(backbone, "Attention", "mamba2")
    assert operated.changed == ("network.blocks.0.attn", "network.blocks.1.attn")
    with torch.inference_mode():
        assert operated.model(images((2, 3, 32, 32))).pooled.shape == (2, 32)  # type: ignore[attr-defined]
