"""SReT: the authors' outputs and names, loops, positions, slices at any size, its effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vertebra.backbones.sret import effect, published, sret
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import DivergedError, ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "sret.json"
WHOLE = ((1,), (1,), (1,))
TINY = {"dims": (16, 32, 64), "strides": (2, 2, 2), "image_size": 64}
CASES = {
    "t": {},
    "tiny": {"order": "random"},
    "tiny odd": {"order": "random"},
    "tiny training": {},
    "unsliced": {"groups": WHOLE},
    "three loops": {"groups": WHOLE, "depths": (2, 1, 1), "loops": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_authors_do(name):
    """In our order of tokens, in theirs (drawn from one seed), in training mode, whole, and with other loops."""
    reference = stored(GOLDEN, name)
    backbone = fill(sret() if name == "t" else sret("nano", **TINY, **CASES[name])).train(name == "tiny training")
    torch.manual_seed(0)
    with torch.inference_mode():
        found = named(backbone(images(reference.shape)))
    assert difference(found["tokens"], found["pyramid.2"].flatten(2).mT) == 0
    outputs = {name: found[name] for name in reference.golden}
    assert len(outputs) == 4 and max(check_golden(outputs, reference.golden).values()) < 1e-5


@pytest.mark.parametrize(
    ("variant", "params"),
    [("t", 4_755_979), ("lt", 4_988_024), ("s", 20_899_692)],
)
def test_parameters_are_the_published_ones(variant, params):
    with torch.device("meta"):
        both = [sret(name) for name in (variant, f"{variant}_wo_slice")]
    found = [sum(p.numel() for p in backbone.parameters()) + 1000 * backbone.width + 1000 for backbone in both]
    assert found == [params, params]


def released() -> dict[str, torch.Tensor]:
    """The authors' names and shapes of SReT_T, with a number of its own in each tensor; a block's are one."""
    listed = (line.split(":") for line in json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["t"].split())
    shapes = {name: [int(side) for side in sides.split("x") if side] for name, sides in listed}
    state = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    for name in state:
        parts = name.split(".")
        if parts[0] == "transformers" and int(parts[3]) % 4 == 2:  # the second application
            state[name] = state[".".join([*parts[:3], str(int(parts[3]) - 2), *parts[4:]])]
    return state


PLACES = {
    "patch_embed.conv1.weight": "stem.0.weight",
    "patch_embed.bn3.running_var": "stem.7.running_var",
    "pos_embed": "positions",
    "pools.1.conv.bias": "pools.1.bias",
    "transformers.0.blocks.0.attn.qkv.weight": "stages.0.0.layer.attn.qkv.weight",
    "transformers.1.blocks.18.mlp.fc2.bias": "stages.1.4.layer.mlp.2.bias",
    "transformers.1.blocks.16.coefficient3.bias": "stages.1.4.layer.sum2.shortcut",
    "transformers.2.blocks.5.mlp.fc1.weight": "stages.2.1.projections.0.mlp.0.weight",
    "transformers.2.blocks.7.norm1.bias": "stages.2.1.projections.1.norm.bias",
    "transformers.2.blocks.11.coefficient2.bias": "stages.2.2.projections.1.sum.branch",
    "norm.weight": "norm.weight",
}


def test_released_names_become_ours():
    state, backbone = released(), sret("t")
    found = published({f"module.{name}": tensor for name, tensor in state.items()}, backbone)
    backbone.load_state_dict(found)
    for theirs, ours in PLACES.items():
        assert torch.equal(found[ours], state[theirs]), theirs
    with pytest.raises(ParityError, match=r"other shapes: stages\.0\.0\.layer\.mlp"):
        published(state, sret("lt"))
    state["transformers.0.blocks.2.norm1.weight"] = torch.zeros(64)
    with pytest.raises(ParityError, match=r"transformers\.0\.blocks\.2\.norm1\.weight differs from the other"):
        published(state, backbone)


def test_positions_of_a_checkpoint_fit_another_size(tmp_path):
    """From 64 pixels to 96 x 160: the network that was built for it computes what the stretched one does."""
    small = fill(sret("nano", **TINY)).eval()
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    wide = sret("nano", **{**TINY, "image_size": (96, 160)}, weights=str(tmp_path / "small.safetensors")).eval()
    assert small.positions.shape == (1, 16, 8, 8) and wide.positions.shape == (1, 16, 12, 20)
    batch = images((2, 3, 96, 160))
    with torch.inference_mode():
        assert difference(wide(batch).pooled, small(batch).pooled) < 1e-6


def test_blocks_are_applied_in_a_row_and_told_so():
    backbone, seen = sret("nano", loops=3).eval(), []
    for number, blocks in enumerate(backbone.stages):
        for block, whole in enumerate(blocks):
            attn = whole.layer.attn
            attn.register_forward_hook(lambda _, args, out, at=(number, block): seen.append((*at, args[1])))
    backbone(images((1, 3, 32, 32)))
    assert seen == [
        (stage, block, loop) for stage in range(3) for block in range((2, 2, 1)[stage]) for loop in range(3)
    ]
    seeds = [whole.layer.attn.seed for blocks in backbone.stages for whole in blocks]
    assert seeds == [0, 1, 2, 3, 4]


def test_any_size_and_evaluation_without_chance():
    backbone = fill(sret("nano")).eval()
    with torch.inference_mode():
        for size in ((1, 1), (7, 50), (31, 33)):
            batch = images((2, 3, *size))
            found = backbone(batch)
            assert found.pooled.isfinite().all() and torch.equal(found.pooled, backbone(batch).pooled)
            assert [tuple(x.shape[2:]) for x in found.pyramid] == [
                tuple(-(-side // stride) for side in size) for stride in (2, 4, 8)
            ]


def test_arms_without_projections_or_scalars():
    plain = sret("nano", projection="none", scalars="none")
    names = {name.rpartition(".")[2] for name, _ in plain.named_parameters()}
    assert names == {"weight", "bias", "positions"} and not any("projections" in n for n, _ in plain.named_parameters())
    assert len(plain.stages[0][0].projections) == 2


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    backbone = sret("t", drop_path=0.1)
    block = backbone.stages[1][2].layer
    assert block.norm1.eps == backbone.norm.eps == backbone.stages[0][0].projections[0].norm.eps == 1e-6
    assert float(backbone.positions.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(block.mlp[0].weight.detach().std()) == pytest.approx(128**-0.5 / 3**0.5, rel=0.03)  # torch's own
    assert block.sum1.shortcut.item() == block.sum2.branch.item() == 1
    rates = [getattr(b.layer.drop, "drop_prob", 0.0) for blocks in backbone.stages for b in blocks]
    assert rates == pytest.approx(list(np.linspace(0, 0.1, 10)))


def test_wrong_options_are_refused():
    for options, message in [
        ({"dims": (48, 96)}, r"dims is \(48, 96\), heads"),
        ({"dims": (48, 100, 200)}, "each dim is a multiple of its heads and of the dim before it"),
        ({"heads": (2, 5, 8)}, "each dim is a multiple of its heads"),
        ({"depths": (2, 0, 1)}, "depths is"),
        ({"loops": 0}, "loops is 0"),
        ({"ratio": 0.0}, r"ratio 0\.0"),
        ({"strides": (2, 2)}, r"strides is \(2, 2\); the stem has three"),
        ({"strides": (2, 2, 0)}, "strides is"),
        ({"groups": ((8, 2), (4, 0), (1,))}, r"groups \(4, 0\)"),
        ({"order": "drawn"}, "order is 'drawn'; it can be fixed or random"),
        ({"projection": "linear"}, "projection is 'linear'"),
        ({"scalars": "fixed"}, "scalars is 'fixed'"),
    ]:
        with pytest.raises(UsageError, match=message):
            sret("nano", **options)
    with pytest.raises(UsageError, match=r"no variant 'lts'.*lt"):
        sret("lts")


def test_arms_have_equal_parameters():
    from vertebra.backbones import sret as page

    for setting in page._SETTINGS.values():
        with torch.device("meta"):
            arms = {arm: page._arm(arm, setting) for arm in page._ARMS}
        params = {arm: sum(p.numel() for p in backbone.parameters()) for arm, backbone in arms.items()}
        assert params["half"] / params["recursive"] == pytest.approx(1, abs=0.01)
        assert params["sliced"] == params["recursive"] < 0.65 * params["unshared"]
        deep = arms["deep"]
        assert sum(len(b.projections) for blocks in deep.stages for b in blocks) == 48
        assert sum(len(blocks) for blocks in deep.stages) == 4


def test_effect_measures_its_arms(tmp_path, monkeypatch):
    from vertebra.backbones import sret as page

    small = {"dims": (8, 8, 8), "heads": (1, 1, 1), "image_size": 12}
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(small, 32, 1, 2))
    monkeypatch.setitem(page._ARMS, "deep", ("four blocks, each three times", {**page._WHOLE, "loops": 3}))
    experiment = effect("toy", read("digits"))
    found = {arm: experiment.measure(arm, 0, tmp_path) for arm in ("half", "recursive", "sliced", "deep")}
    assert all(set(row) == set(experiment.metrics) for row in found.values()) and experiment.baseline == "half"
    assert len({row["nll"] for row in found.values()}) == 4 and found["sliced"]["macs"] < found["recursive"]["macs"]
    assert not any(row["diverged"] for row in found.values())
    assert found["half"]["first"] == found["half"]["last"] and found["deep"]["first"] != found["deep"]["last"]

    def burst(*args: object) -> None:
        raise DivergedError("the loss is nan at step 3")

    monkeypatch.setattr("vertebra.arms.trained", burst)
    row = experiment.measure("deep", 0, tmp_path)
    assert row["diverged"] == 1 and np.isnan(row["top1"]) and row["params"] > 0


def test_effect_checks_what_the_row_asks():
    experiment = effect("toy", read("digits"))  # ten classes

    def measured(recursive: float, sliced: float, macs: float, deep: float, diverged: float = 0.0) -> Measured:
        def row(top1: float, macs: float = 10.0) -> dict[str, np.ndarray]:
            pairs = {"top1": (top1 - 1, top1 + 1), "macs": (macs, macs), "params": (1, 1), "first": (2.3, 2.2)}
            pairs |= {"last": (1.9, 2.0), "diverged": (0, diverged)}
            return {name: np.array(pair, dtype=float) for name, pair in pairs.items()}

        rows = {"half": row(50), "recursive": row(recursive), "sliced": row(sliced, macs), "naive": row(50)}
        return Measured({**rows, "unshared": row(50), "deep": row(deep)})

    assert [check.holds for check in experiment.checks(measured(51.5, 51, 8.9, 21))] == [True] * 4
    assert [check.holds for check in experiment.checks(measured(50.5, 49.5, 9.1, 20))] == [False] * 4
    assert [check.holds for check in experiment.checks(measured(51.5, 51, 9.0, 21, 1.0))] == [True, True, True, False]
    stuck = measured(51.5, 51, 8.9, 21)
    stuck.values["deep"]["last"][1] = 2.2  # type: ignore[index]
    assert not experiment.checks(stuck)[3].holds
