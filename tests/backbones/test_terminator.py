"""Terminator: the authors' count, network, loss and optimiser, what the batch does, and the arms of its effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vertebra.backbones.terminator import (
    GroupStandardise,
    Kar3,
    SlowNeural,
    Terminator,
    effect,
    published,
    slow_neural_loss,
    terminator,
)
from vertebra.backbones.terminator import experiment as page
from vertebra.blocks.hyper_zzw import ContextSlowNet, SlowNet
from vertebra.contracts import Batch, Measured, Progress
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.tasks.classify import classify

GOLDEN = Path(__file__).parents[1] / "golden" / "terminator.json"
NUMBERS = json.loads(GOLDEN.read_text(encoding="utf-8"))
SMALL = {"dims": (12, 24, 48, 48, 48), "layers": (2, 1, 1, 1, 1), "local_dim": 8, "image_size": 17}
OPTIONS = {"cifar10": {}, "small_17": SMALL}


def outputs(backbone: Terminator, x: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        stages = backbone.stages(x)
        return {**named({"stages": stages}), "pooled": backbone(x).pooled}


def released() -> dict[str, Tensor]:
    """A state dict with the authors' names and shapes, filled with numbers of their own.

    The golden file has the names of one block; C, D and M stand for its channels, its outputs and all its maps'.
    """
    dims, more = (3, 12, 36, 72, 144, 288), (0, 0, 1, 1, 2)
    shapes: dict[str, list[int]] = {"out_layer.weight": [10, 288], "out_layer.bias": [10]}
    for number in range(5):
        sides = {"C": dims[number], "D": dims[number + 1], "M": dims[number] * (10 + more[number])}
        for name, *shape in (line.split() for line in NUMBERS["keys"]):
            shapes[f"blocks.{number}.{name}"] = [sides.get(side) or int(side) for side in shape]
    kernel = "blocks.0.fast_multi_branch.slow_net_g.Kernel"  # the first has a layer more
    shapes |= {f"{kernel}.linears.2.weight": [64, 64, 1, 1], f"{kernel}.linears.2.bias": [64]}
    shapes |= {f"{kernel}.filters.3.linear.weight": [64, 2, 1, 1], f"{kernel}.filters.3.linear.bias": [64]}
    state = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    return state | {"blocks.1.fast_multi_branch.slow_net_g.train_length": torch.zeros(1)}


def test_parameters_are_the_authors_to_the_last_one():
    with torch.device("meta"):
        backbone = terminator()
    assert sum(p.numel() for p in backbone.parameters()) + 10 * 288 + 10 == 1_336_855
    for kinds, expected in ((SlowNet, 220_800), ((SlowNet, ContextSlowNet), 318_976)):  # without and with contexts
        slow = {p for m in backbone.modules() if isinstance(m, kinds) for p in m.parameters()}
        assert sum(p.numel() for p in slow) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_network_computes_what_the_authors_does(name):
    """Golden numbers of every block, in evaluation, which looks at the batch there; an odd size too."""
    reference = stored(GOLDEN, name)
    backbone = fill(terminator(**OPTIONS[name], faithful=True)).eval()
    found = outputs(backbone, images(reference.shape))
    assert max(check_golden(found, reference.golden, 2e-5).values()) < 2e-5
    with torch.inference_mode(), pytest.raises(ParityError):
        backbone.blocks[1].gather.weight.copy_(backbone.blocks[1].gather.weight.flip(1))  # another order of the maps
        check_golden(outputs(backbone, images(reference.shape)), reference.golden)


def test_training_computes_what_the_authors_does_and_stores_it():
    reference = stored(GOLDEN, "small_17")
    backbone, x = fill(terminator(**SMALL, dropout=0.0)).train(), images(reference.shape)
    found = outputs(backbone, x)
    assert max(check_golden(found, reference.golden, 2e-5).values()) < 2e-5
    for _ in range(40):
        with torch.no_grad():
            backbone(x)
    after = outputs(backbone.eval(), x)
    assert difference(after["pooled"], found["pooled"]) < 0.05  # 0.9 ** 40, and variances of one pixel less
    alone = torch.cat([outputs(backbone, one)["pooled"] for one in x.split(1)])
    assert difference(alone, after["pooled"]) < 1e-4


def test_authors_names_become_ours(tmp_path):
    backbone, state = terminator(faithful=True), released()
    found = published(state, backbone)
    backbone.load_state_dict(found)
    for theirs, ours in {
        "fast_multi_branch.bias3": "local.2.bias",
        "fast_multi_branch.slow_net_l4.Kernel.fast_reduce.weight": "local.3.slow.reduce.weight",
        "fast_multi_branch.slow_net_l2.Kernel.bias_pk": "local.1.slow.slow.bias_map",
        "fast_multi_branch.Fast_Kernel_rgu_2.fast_linear_q.bias": "of_scores.query.bias",
        "fast_multi_branch.hyper_interact.slow_net_gc_hi.Kernel.linears.1.bias": "interaction.channel.hidden.1.bias",
        "bias": "bias",
    }.items():
        expected = state[f"blocks.2.{theirs}"]
        assert torch.equal(found[f"blocks.2.{ours}"], expected.reshape(found[f"blocks.2.{ours}"].shape)), theirs
    save_file({f"network.{name}": tensor for name, tensor in state.items()}, tmp_path / "authors.safetensors")
    opened = terminator(weights=str(tmp_path / "authors.safetensors"), faithful=True)
    assert torch.equal(opened.blocks[4].gather.weight, backbone.blocks[4].gather.weight)
    with pytest.raises(UsageError, match="faithful=True"):
        published(state, terminator(**SMALL))
    with pytest.raises(ParityError, match="other shapes"):
        published(state, terminator(**SMALL, faithful=True))


def test_slow_neural_loss_is_the_authors():
    backbone = fill(terminator())
    loss = slow_neural_loss(backbone)
    assert loss.item() == pytest.approx(NUMBERS["slow_neural_loss"]["cifar10"], rel=1e-5)
    loss.backward()
    reached = {name.split(".")[2] for name, p in backbone.named_parameters() if p.grad is not None}
    assert reached == {"zzw"}
    first, second = (block.zzw.slow()[:24] for block in terminator("nano", dims=(12, 12), channels=5).blocks)
    assert second.shape[0] == 12 and first.shape[0] == 5  # widths that do not divide are cut
    assert slow_neural_loss(terminator("nano", dims=(12, 12), channels=5)).isfinite()


def test_method_adds_the_loss():
    backbone = terminator("nano", image_size=8)
    method = SlowNeural(classify(backbone, ["one", "other"]), factor=2.0)
    batch = Batch(images((2, 3, 8, 8)), torch.tensor([0, 1]), torch.arange(2))
    losses = method(batch, Progress(0, 1, 0, 1))
    torch.testing.assert_close(losses["slow"], 2 * slow_neural_loss(backbone))
    assert set(method.state_dict()) == set(method.task_model.state_dict()) and len(losses) == 2
    from vertebra.backbones.cifar_resnet import cifar_resnet

    with pytest.raises(UsageError, match="this is a CifarResNet"):
        SlowNeural(classify(cifar_resnet("nano"), ["one", "other"]))


def test_optimiser_takes_the_authors_steps():
    parameter = nn.Parameter(images((5, 7)))
    optimizer = Kar3([parameter], lr=1e-2)
    for step in range(8):
        parameter.grad = images((5, 7 + step))[:, :7] * (-1) ** (step // 2)
        optimizer.step()
    check_golden({"p": parameter.detach()}, NUMBERS["kar3"]["outputs"], 1e-6)
    single = nn.Parameter(torch.tensor([2.0]))
    decayed = Kar3([single], lr=0.1, weight_decay=1.0)
    single.grad = torch.tensor([-1.0])
    decayed.step()
    assert single.item() == pytest.approx(1.9)  # the penalty turns the sign
    for wrong in ({"lr": -1.0}, {"betas": (0.5, 1.0)}, {"betas": (0.5,)}):
        with pytest.raises(UsageError, match="Kar3"):
            Kar3([single], **wrong)  # type: ignore[arg-type]


def test_groups_are_standardised_in_turn():
    norm, x = GroupStandardise(24, faithful=True), images((3, 24, 5, 5)) * 3 + 1
    parts = [
        nn.functional.batch_norm(part, None, None, training=True)
        if number % 2 == 0
        else nn.functional.instance_norm(part)
        for number, part in enumerate(x.chunk(12, dim=1))
    ]
    torch.testing.assert_close(norm(x), torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def test_batch_changes_predictions_in_the_faithful_mode_alone():
    x = images((4, 3, 8, 8))
    for faithful in (False, True):
        backbone = fill(terminator("nano", image_size=8, faithful=faithful)).eval()
        apart = difference(outputs(backbone, x[:1])["pooled"], outputs(backbone, x)["pooled"][:1])
        assert (apart > 0.01) if faithful else (apart < 1e-5)


def test_wrong_options_and_sizes_are_refused():
    for options, words in (
        ({"dims": (36, 140)}, "each must be a multiple of 12"),
        ({"layers": (2,)}, "have 2, 1 and 2 entries"),
        ({"earlier": ((), (1,))}, r"earlier\[1\] is \(1,\)"),
        ({"image_size": (32, 48)}, "need squares, as 48"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"drop_path": 0.1}, "no branch is residual; use dropout"),
        ({"slow_dim": 0}, "slow_dim is 0"),
    ):
        with pytest.raises(UsageError, match=words):
            terminator("nano", **options)
    with pytest.raises(UsageError, match=r"image_size=\(16, 16\)"):
        terminator("nano")(images((1, 3, 16, 16)))


TINY = page.Setting({"dims": (12, 24), "layers": (1, 1), "earlier": ((), ()), "slow_dim": 8, "local_dim": 8}, 8, 32, 1)


def test_effect_measures_every_arm(tmp_path, monkeypatch):
    monkeypatch.setitem(page.SETTINGS, "toy", TINY)
    monkeypatch.setattr(page, "ALONE", 8)
    monkeypatch.setattr(page, "BATCH", 8)
    small = effect("toy", read("digits"))
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert set(found) == {"plain", "resnet", "terminator", "no_slow_loss"} and small.baseline == "plain"
    assert all(set(scores) == set(small.metrics) for scores in found.values())
    assert found["plain"]["params"] == found["resnet"]["params"]
    assert found["terminator"]["flips"] == 0 and 20 < found["terminator"]["slow"] < 95
    assert 0 < found["terminator"]["offset_norm"] < 2 and found["terminator"]["fit"] in (1.0, 2.0)
    assert found["terminator"]["offset"] != found["no_slow_loss"]["offset"]


def test_arms_have_equal_parameters_and_the_plain_one_no_shortcut():
    sizes = {arm: sum(p.numel() for p in page.arm_of(arm, page.SETTINGS["toy"]).parameters()) for arm in page.ARMS}
    assert sizes["plain"] == sizes["resnet"] and sizes["terminator"] == sizes["no_slow_loss"]
    assert abs(sizes["plain"] / sizes["terminator"] - 1) < 0.05
    plain, resnet = (fill(page.arm_of(arm, TINY)).eval() for arm in ("plain", "resnet"))
    x = images((1, 3, 8, 8))
    with torch.inference_mode():
        first = plain.stem(x)  # type: ignore[operator]
        torch.testing.assert_close(plain.blocks[0](first), plain.blocks[0][0](first).relu())  # type: ignore[index]
    assert difference(outputs_of(plain, x), outputs_of(resnet, x)) > 0.01


def outputs_of(backbone: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return backbone(x).pooled


def test_effect_checks_what_the_row_asks():
    toy = effect("toy", read("digits"))

    def holds(fit: float, offset: float, without: float, flips: float) -> list[bool]:
        base = {"top1": 50.0, "fit": 9.0, "params": 100.0, "slow": 40.0, "offset": offset, "offset_norm": 0.0}
        base |= {"faithful": 50.0, "flips": flips, "flips_faithful": 5.0, "seconds": 1.0}
        values = {arm: {name: np.array([value]) for name, value in base.items()} for arm in page.ARMS}
        values["terminator"]["fit"], values["no_slow_loss"]["top1"] = np.array([fit]), np.array([without])
        return [check.holds for check in toy.checks(Measured(values))]

    assert holds(8.0, 0.01, 49.0, 0.0) == [True] * 5
    assert holds(9.0, 0.06, 51.0, 1.0) == [False, False, False, False, True]
