from pathlib import Path

import numpy as np
import pytest
import torch

from vertebra.backbones import vir as page
from vertebra.backbones.vir import effect, published, vir
from vertebra.blocks.attention import attention
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.probes.memory import Alive
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "vir.json"
TINY = {"dim": 48, "depth": 3, "heads": 3, "image_size": 64}


def outputs(backbone: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found = named(backbone.eval()(x))
    return {name: found[name] for name in ("pyramid.0", "pooled")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recurrent", {"form": "recurrent"}),
        ("recurrent", {"form": "parallel"}),
        ("chunkwise", {"form": "chunkwise", "chunk": 5}),
        ("softmax", {"compat": "released"}),
        ("both", {"direction": "both"}),
        ("both", {"direction": "both", "form": "chunkwise"}),
        ("both", {"direction": "both", "form": "recurrent"}),
    ],
)
def test_parity_with_the_released_code(name, options):
    reference = stored(GOLDEN, name)
    found = outputs(fill(vir("s16", **TINY, **options)), images(reference.shape))
    assert max(check_golden(found, reference.golden, 1e-5).values()) < 1e-5


@pytest.mark.parametrize(("name", "options"), [("s16", {}), ("s16_softmax", {"compat": "released"})])
def test_parity_of_the_small_network_at_its_own_size(name, options):
    """Their rates are rounded to 32 bit before they are raised to powers, ours after: 5e-6 of the largest value."""
    reference = stored(GOLDEN, name)
    found = outputs(fill(vir("s16", **options)), images(reference.shape))
    assert max(check_golden(found, reference.golden, 5e-5).values()) < 5e-5


def test_the_softmax_is_no_parity():
    reference = stored(GOLDEN, "recurrent")
    with pytest.raises(ParityError):
        check_golden(outputs(fill(vir("s16", **TINY, compat="released")), images(reference.shape)), reference.golden)


@pytest.mark.parametrize("class_token", ["last", "first"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_three_forms_of_the_whole_network(direction, class_token):
    """By layers (with gradients) and piece by piece (without), on odd grids, in 64 bit and in 32."""
    backbone = fill(vir("nano", dim=48, depth=2, direction=direction, class_token=class_token)).double().eval()
    x = images((2, 3, 33, 47)).double()
    backbone.form = "parallel"
    expected = [tensor.detach() for tensor in (*backbone(x).pyramid, backbone(x).pooled, backbone(x).tokens)]
    tokens = 9 * 12 + 1
    for form, chunk in [("recurrent", 1), *(("chunkwise", chunk) for chunk in (1, 5, 16, tokens))]:
        backbone.form = form
        for block in backbone.blocks:
            block.mixer.chunk = chunk
        with torch.inference_mode():
            pieces, pooled = backbone(x), backbone.pooled(x)
        for found in (backbone(x), pieces):
            parts = (*found.pyramid, found.pooled, found.tokens)
            assert max(difference(one, other) for one, other in zip(parts, expected, strict=True)) < 1e-10
        assert difference(pooled, expected[1]) < 1e-10
    backbone.float()
    with torch.inference_mode():
        assert difference(backbone(x.float()).pooled, expected[1]) < 1e-5


def test_pieces_of_many_rows_and_of_rows_longer_than_a_piece(monkeypatch):
    monkeypatch.setattr(page, "PIECE", 10)
    backbone = fill(vir("nano", dim=24, depth=2, direction="both")).eval()
    for size in ((40, 16), (8, 64)):  # two rows of four and a half of them; rows of 16
        x = images((2, 3, *size))
        backbone.form = "auto"
        with torch.inference_mode():
            expected = backbone(x)
            backbone.form = "chunkwise"
            found = backbone(x)
        assert max(difference(a, b) for a, b in zip(found.pyramid, expected.pyramid, strict=True)) < 1e-5
        assert difference(found.pooled, expected.pooled) < 1e-5


def test_memory_of_the_pooled_vector_does_not_depend_on_the_image():
    peaks: dict[str, list[int]] = {}
    for form, sizes in (("chunkwise", ((128, 128), (256, 256))), ("recurrent", ((128, 64), (256, 64)))):
        for size in sizes:
            backbone, x = vir("nano", depth=2, image_size=size).eval(), images((1, 3, *size))
            for taken in (form, "parallel") if form == "chunkwise" else (form,):
                backbone.form = taken
                with torch.no_grad(), Alive((x, *backbone.parameters())) as alive:
                    backbone.pooled(x)
                peaks.setdefault(taken, []).append(alive.most)
    # 1,024 and 4,096 tokens in pieces of 192; 512 and 1,024 for the loop
    assert peaks["chunkwise"][1] < 1.05 * peaks["chunkwise"][0]
    assert peaks["recurrent"][1] < 1.05 * peaks["recurrent"][0] < 0.3 * peaks["chunkwise"][0]
    assert peaks["parallel"][1] > 5 * peaks["parallel"][0]


def test_the_class_token_reads_all_when_it_comes_last_and_nothing_when_first():
    x = images((1, 3, 32, 32)).requires_grad_()
    for options, reads in (({}, True), ({"class_token": "first"}, False)):
        (seen,) = torch.autograd.grad(fill(vir("nano", **options)).eval()(x).pooled.sum(), x, allow_unused=True)
        assert (seen is not None and bool((seen[0, 0, ::4, ::4] != 0).all())) == reads
    both = fill(vir("nano", direction="both")).eval()
    (seen,) = torch.autograd.grad(both(x).pyramid[0][0, :, 0, 0].sum(), x)
    assert (seen[0, 0, ::4, ::4] != 0).all()  # the first patch's second look has seen the last one
    (seen,) = torch.autograd.grad(fill(vir("nano")).eval()(x).pyramid[0][0, :, 0, 0].sum(), x)
    assert seen[0, :, :4, :4].any() and not seen[0, :, 4:].any() and not seen[0, :, :, 4:].any()


def test_released_names_become_ours():
    import json

    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["s16"]
    blocks = keys["blocks.0 to blocks.11"]
    shapes = keys["outside"] | {f"blocks.{n}.{name}": shape for n in range(12) for name, shape in blocks.items()}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    backbone = vir("s16")
    found = published(state, backbone)
    backbone.load_state_dict(found)
    assert sum(tensor.numel() for tensor in state.values()) == 22_059_496
    assert torch.equal(found["blocks.3.mixer.proj.bias"], state["blocks.3.retention.out_proj.bias"])
    assert torch.equal(found["blocks.11.scale2"], state["blocks.11.ls2.gamma"])
    assert torch.equal(found["blocks.5.mlp.narrow.weight"], state["blocks.5.mlp.fc2.weight"])
    assert published(state, vir("s16", image_size=(224, 288)))["positions"].shape == (1, 14 * 18, 384)
    del state["cls_token"]
    with pytest.raises(ParityError, match="missing from it: class_token"):
        published(state, backbone)


@pytest.mark.parametrize(("variant", "exact"), [("s16", 22_059_496), ("b16", 86_585_320), ("l16", 304_374_760)])
def test_parameters_are_exactly_those_of_the_released_code(variant, exact):
    with torch.device("meta"):
        backbone = vir(variant)
    assert count(backbone).params + 1000 * (backbone.width + 1) == exact


def test_a_mixer_of_ones_own_and_wrong_options():
    other = vir("nano", mixer=lambda dim: attention(dim, heads=3)).eval()
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in vir("nano").parameters())
    x = images((1, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(other.pooled(x), other(x).pooled)
    with pytest.raises(UsageError, match="has no retention"):
        other.form = "recurrent"
    for wrong, words in (
        ({"heads": 5}, "5 heads do not divide dim 96"),
        ({"patch": 0}, "patch is 0"),
        ({"ratio": 0.0}, "ratio is 0"),
        ({"direction": "back"}, "direction is 'back'; it can be forward or both"),
        ({"class_token": "middle"}, "class_token is 'middle'; it can be last or first"),
        ({"form": "linear"}, "form is 'linear'"),
        ({"compat": "released", "form": "recurrent"}, "parallel form alone"),
    ):
        with pytest.raises(UsageError, match=words):
            vir("nano", **wrong)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(page._SETTINGS, "toy", page._Setting(24, 1, 3, 64, 1, (2, 4, 8)))
    return effect("toy", read("digits"))


def test_effect_measures_every_arm(small, tmp_path):
    found = {arm: small.measure(arm, 0, tmp_path) for arm in small.arms}
    assert small.baseline == "vit" and all(set(row) == set(small.metrics) for row in found.values())
    trained = [arm for arm, row in found.items() if row["top1"] == row["top1"]]
    measured = [arm for arm, row in found.items() if row["memory"] == row["memory"]]
    assert trained == ["vit", "vir", "class_first"] and measured == ["vit", "vir", "recurrent", "parallel"]
    assert all(found[arm]["memory"] > 0 for arm in measured)  # at 4 to 64 tokens no form is ahead
    assert small.measure("class_first", 0, tmp_path)["nll"] == found["class_first"]["nll"] != found["vir"]["nll"]


def test_effect_checks_what_the_row_asks(small):
    def measured(top1: float, memory: float, time: float, start: float) -> list[bool]:
        rows = {
            "vit": (70.0, 0.9, 1.9),
            "vir": (top1, memory, time),
            "class_first": (10.0, np.nan, np.nan),
            "recurrent": (np.nan, 0.0, 1.0),
            "parallel": (np.nan, 1.8, 2.0),
        }
        names = ("top1", "memory_growth", "time_growth")
        values = {
            arm: {name: np.array([one, one]) for name, one in zip(names, row, strict=True)} for arm, row in rows.items()
        }
        values["vir"]["ahead_from"] = np.array([start, start])
        return [check.holds for check in small.checks(Measured(values))]

    assert measured(68.5, 0.01, 1.0, 700.0) == [True] * 5
    assert measured(9.0, 0.3, 1.5, np.nan) == [False] * 5
