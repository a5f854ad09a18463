"""OSNet: parity with the authors' networks, their names, sizes, re-identification's scores, the effect's task."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones.osnet import VARIANTS, effect, osnet, published
from vertebra.backbones.osnet.cameras import ALIKE, CAMERAS, Seen, Sightings, _middles, reidentified, sight
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, named, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "osnet.json"
KEYS = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]


def authors_state(variant: str) -> dict[str, Tensor]:
    """A released checkpoint's names and shapes, filled as the reference was."""
    root = nn.Module()
    for name, (kind, *shape) in KEYS[variant].items():
        module = root
        for part in name.split("."):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.weight = nn.Parameter(torch.zeros(shape))
        if kind != "weight":
            module.bias = nn.Parameter(torch.zeros(shape[:1]))
        if kind == "norm":
            module.register_buffer("running_mean", torch.zeros(shape))
            module.register_buffer("running_var", torch.ones(shape))
            module.register_buffer("num_batches_tracked", torch.tensor(0))
    return fill(root).state_dict()


@pytest.fixture(scope="module")
def loaded() -> Mapping[str, tuple[nn.Module, dict[str, Tensor]]]:
    found = {}
    for variant in KEYS:
        state, backbone = authors_state(variant), osnet(variant)
        backbone.load_state_dict(published({f"module.{name}": tensor for name, tensor in state.items()}, backbone))
        found[variant] = (backbone, state)
    return found


@pytest.mark.parametrize(
    ("variant", "size"),
    [(v, s) for v in ("x0_25", "ain_x0_5") for s in ("256x128", "113x90")]
    + [("ibn_x1_0", "128x64"), ("ibn_x1_0", "113x90")],
)
def test_released_names_give_the_authors_outputs(loaded, variant, size):
    reference, backbone = stored(GOLDEN, f"{variant}_{size}"), loaded[variant][0].eval()
    with torch.inference_mode():
        found = named(backbone(images(reference.shape)))
    assert set(found) == {"pyramid.0", "pyramid.1", "pyramid.2", "pyramid.3", "pooled"}
    assert max(check_golden(found, reference.golden, 1e-4).values()) < 2e-5


@pytest.mark.parametrize("variant", KEYS)
def test_logits_in_training_mode_are_the_authors(loaded, variant):
    reference, (backbone, state) = stored(GOLDEN, f"{variant}_training"), loaded[variant]
    network = osnet(variant)
    network.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        pooled = network.double().train()(images(reference.shape).double()).pooled
        logits = pooled @ state["classifier.weight"].double().T + state["classifier.bias"].double()
    assert max(check_golden({"logits": logits}, reference.golden, 1e-6).values()) < 1e-7


@pytest.mark.parametrize("variant", KEYS)
def test_names_of_another_network_are_refused(loaded, variant):
    state = dict(loaded[variant][1])
    other = "x0_25" if variant != "x0_25" else "ain_x0_25"
    with pytest.raises(ParityError):
        published(state, osnet(other))
    del state["conv3.0.gate.fc1.weight"]
    with pytest.raises(ParityError, match=r"missing from it: stages\.1\.0\.gate\.squeeze\.weight"):
        published(state, loaded[variant][0])


PUBLISHED = {"x1_0": (2.170, 0.979), "x0_75": (1.286, 0.572), "x0_5": (0.630, 0.273), "x0_25": (0.202, 0.082)}
PUBLISHED |= {"ibn_x1_0": (2.171, 0.979), "ain_x1_0": (2.170, 0.979)}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_costs_at_256_by_128_are_the_published_ones(variant):
    with torch.device("meta"):
        backbone = osnet(variant)
    cost = count(backbone)
    assert cost.resolution == (256, 128) and backbone.width == 512
    assert (round(cost.params / 1e6, 3), round(cost.macs / 1e9, 3)) == PUBLISHED[variant]


def test_with_a_thousand_identities_it_has_the_papers_parameters():
    with torch.device("meta"):
        params = sum(p.numel() for p in osnet().parameters())
    assert round((params + 513 * 1000) / 1e6, 2) == 2.68


def test_pooled_is_the_embedding_after_norm_and_relu():
    backbone = fill(osnet("x0_25", image_size=(64, 32))).eval()
    with torch.inference_mode():
        features = backbone(images((2, 3, 64, 32)))
        linear, norm, _ = backbone.embed
        expected = norm(linear(features.pyramid[-1].mean((2, 3)))).relu()
    torch.testing.assert_close(features.pooled, expected)
    assert features.pooled.min() == 0 and features.pyramid[-1].shape == (2, 128, 4, 2)


@pytest.mark.parametrize(("variant", "options", "least"), [("x0_25", {}, 13), ("ain_x0_25", {}, 29), ("nano", {}, 15)])
def test_smallest_images(variant, options, least):
    backbone = fill(osnet(variant, **options)).eval()
    with torch.inference_mode():
        found = backbone(images((2, 3, least, least)))
        assert found.pooled.isfinite().all() and not torch.equal(found.pooled[0], found.pooled[1])
        with pytest.raises(UsageError, match=f"at least {least}x{least}"):
            backbone(images((2, 3, least - 1, 64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (16, 64, 96)}, "4 dims"),
        ({"placement": ("plain",) * 5}, "6 blocks"),
        ({"placement": ("plane",) * 6}, "did you mean plain"),
        ({"middles": (8, 8)}, "3 middles"),
        ({"stem": 3}, "stem is 3"),
        ({"stem_norm": "group"}, "batch or instance"),
        ({"features": 0}, "features is 0"),
        ({"drop_path": 0.1}, "drops no branches"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        osnet("x0_25", **options)


def brute_force(features: np.ndarray, identities: np.ndarray, cameras: np.ndarray) -> tuple[float, float, float]:
    """R1, R5 and mAP, a query and a rank at a time."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    first, fifth, precisions = [], [], []
    for query in range(len(unit)):
        left = [i for i in range(len(unit)) if (identities[i], cameras[i]) != (identities[query], cameras[query])]
        ranked = sorted(left, key=lambda i: -float(unit[i] @ unit[query]))
        right = [rank for rank, i in enumerate(ranked, start=1) if identities[i] == identities[query]]
        if right:
            first.append(right[0] == 1)
            fifth.append(right[0] <= 5)
            precisions.append(np.mean([(n + 1) / rank for n, rank in enumerate(right)]))
    return 100 * np.mean(first), 100 * np.mean(fifth), 100 * np.mean(precisions)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_brute_force_without_the_querys_camera(seed):
    rng = np.random.default_rng(seed)
    identities, cameras = rng.integers(0, 12, 60), rng.integers(0, 3, 60)
    identities[:3] = [50, 51, 51]  # one alone, and two that the same camera saw: no queries
    cameras[:3] = [0, 1, 1]
    features = rng.standard_normal((60, 8)) + 0.5 * rng.standard_normal((60, 8))[identities]
    seen = Seen(*(torch.from_numpy(values) for values in (features, identities, cameras)))
    found, expected = reidentified(seen, seen), brute_force(features, identities, cameras)
    assert [found["r1"], found["r5"], found["map"]] == pytest.approx(expected)
    blind = Seen(seen.features, seen.identities, torch.arange(60))  # with the query's camera left in
    assert reidentified(blind, blind)["map"] != pytest.approx(expected[2])


def test_a_camera_has_a_style_and_sightings_are_a_function_of_seed_and_epoch():
    pictures = images((5, 3, 48, 48)).sigmoid()
    batches = Sightings(pictures, CAMERAS, osnet("nano").preprocess, times=2, batch=10, seed=1)
    first, again, later = (list(batches.epoch(epoch)) for epoch in (0, 0, 1))
    assert len(batches) == len(first) == 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].images, later[0].images)
    assert torch.equal(next(batches.epoch(0, start=2)).images, first[2].images)
    assert torch.cat([b.targets for b in first]).bincount().tolist() == [6] * 5

    def seen(camera):
        return sight(pictures, camera, (32, 16), torch.Generator().manual_seed(0))

    looks = [seen(camera) for camera in CAMERAS]
    assert all(look.shape == (5, 3, 32, 16) and look.min() >= 0 and look.max() <= 1 for look in looks)
    assert looks[1].std((2, 3)).mean() < 0.8 * looks[0].std((2, 3)).mean()  # less contrast, and a blur
    assert torch.equal(seen(ALIKE[2]), looks[0])


def test_arms_without_scales_or_gate_have_the_parameters_of_the_whole():
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in osnet("x0_25", **options, **_middles(arm, "x0_25")).parameters())
            for arm, options in [("osnet", {}), ("one_scale", {"streams": 1}), ("no_gate", {"gate": "none"})]
        ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01) and sizes[2] == pytest.approx(sizes[0], rel=0.01)


@pytest.fixture(scope="module")
def small():
    from vertebra.backbones.osnet import cameras

    setting = cameras._Setting("x0_25", (32, 32), 10, 10, 1, 1, 1, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cameras._SETTINGS, "toy", setting)
        yield effect("toy", read("digits"))


def test_effect_runs_every_kind_of_arm(small, tmp_path, monkeypatch):
    from vertebra.backbones.osnet import cameras

    monkeypatch.setitem(cameras._SETTINGS, "toy", cameras._Setting("x0_25", (32, 32), 10, 10, 1, 1, 1, 10))
    assert len(small.arms) == 8 and small.baseline == "osnet"
    found = {arm: small.measure(arm, 0, tmp_path) for arm in ("one_scale", "ibn", "search")}
    assert all(set(values) == set(small.metrics) for values in found.values())
    assert 0 <= found["one_scale"]["r1_new"] <= 100 and np.isnan(found["ibn"]["normed"])
    assert found["search"]["normed"] in range(7) and 0 < found["search"]["plain"] < 100
    assert small.measure("ibn", 0, tmp_path)["map"] == found["ibn"]["map"]


def test_effect_checks_what_the_row_asks(small):
    def measured(**changed: float) -> Measured:
        values = {arm: dict.fromkeys(small.metrics, np.array([50.0, 51.0])) for arm in small.arms}
        values["search_alike"]["normed"] = np.array([2.0, 2.0])
        values["search"]["normed"] = np.array([3.0, 4.0])
        for arm in ("ibn", "ain"):
            values[arm]["r1_new"] = np.array([54.0, 55.0])
        for name, value in changed.items():
            arm, metric = name.split("__")
            values[arm][metric] = np.array([value, value])
        return Measured(values)

    def holds(**changed: float) -> list[bool]:
        return [check.holds for check in small.checks(measured(**changed))]

    assert holds() == [True] * 4
    assert holds(no_gate__r1=52) == [False, True, True, True]
    assert holds(ibn__r1_new=53) == [True, False, True, True]
    assert holds(ain__r1=48) == [True, True, False, True]
    assert holds(search__normed=0) == holds(search_alike__normed=5) == [True, True, True, False]


def test_variants_start_with_the_default_and_have_the_papers_placement():
    assert next(iter(VARIANTS)) == "x1_0"
    norms = [type(m.expand[1]).__name__ for stage in osnet("ain_x0_25").stages for m in stage]
    assert norms == ["InstanceNorm", "InstanceNorm", "BatchNorm2d", "InstanceNorm", "InstanceNorm", "BatchNorm2d"]
