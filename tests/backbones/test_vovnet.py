"""VoVNet and VoVNetV2: timm's and the authors' outputs, both forms, both places of the attention, the effect's nets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm import create_model

from vertebra.backbones.vovnet import _ARMS, _access, _matched, effect, published, vovnet
from vertebra.backbones.vovnet_v2 import vovnet_v2
from vertebra.contracts import Measured
from vertebra.data import read
from vertebra.errors import UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden"
TIMM = [
    (vovnet, "39", {}, "vovnet39a", 22_600_296),
    (vovnet, "57", {}, "vovnet57a", 36_640_296),
    (vovnet_v2, "19_dw", {"ese": "last"}, "ese_vovnet19b_dw", 6_543_080),
    (vovnet_v2, "39", {"ese": "last"}, "ese_vovnet39b", 24_568_936),
    (vovnet_v2, "57", {"ese": "last"}, "ese_vovnet57b", 38_608_936),
    (vovnet_v2, "99", {"ese": "last"}, "ese_vovnet99b", 63_199_272),
]


@pytest.mark.parametrize(("make", "variant", "options", "name", "params"), TIMM, ids=[case[3] for case in TIMM])
def test_timms_weights_fit(make, variant, options, name, params):
    with torch.device("meta"):
        ours, theirs = make(variant, **options), create_model(name)
    assert published(theirs.state_dict(), ours).keys() == ours.state_dict().keys()
    assert sum(p.numel() for p in ours.parameters()) + 1000 * ours.width + 1000 == params


@pytest.mark.parametrize("case", [TIMM[0], TIMM[2]], ids=["vovnet39a", "ese_vovnet19b_dw"])
def test_timms_weights_give_timms_outputs(case):
    make, variant, options, name, _ = case
    ours, theirs = make(variant, **options).eval(), fill(create_model(name)).eval()
    ours.load_state_dict(published(theirs.state_dict(), ours))
    batch = images((2, 3, 65, 47))
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(batch), pre_logits=True)
        assert difference(ours(batch).pooled, expected) < 1e-5


def test_the_authors_keys_and_outputs_with_shortcuts():
    keys = json.loads((GOLDEN / "vovnet.json").read_text(encoding="utf-8"))["keys"]["39"]
    backbone = vovnet(identity=True)
    state = {name: torch.zeros(shape) for name, shape in keys.items()}
    assert published(state, backbone).keys() == backbone.state_dict().keys()
    known = stored(GOLDEN / "vovnet.json", "39_identity")
    with torch.inference_mode():
        check_golden(fill(backbone).eval()(images(known.shape)).pyramid[-1], known.golden, 1e-5)


def test_the_second_versions_keys_and_outputs():
    keys = json.loads((GOLDEN / "vovnet_v2.json").read_text(encoding="utf-8"))["keys"]["19_slim_dw"]
    backbone = vovnet_v2("19_slim_dw")
    state = {name: torch.zeros(shape) for name, shape in keys.items()}
    assert published(state, backbone).keys() == backbone.state_dict().keys()
    for variant in ("19_slim_dw", "39"):
        known = stored(GOLDEN / "vovnet_v2.json", variant)
        with torch.inference_mode():
            check_golden(fill(vovnet_v2(variant)).eval()(images(known.shape)).pyramid, known.golden, 1e-5)


def test_poolings_round_up():
    shapes = [tuple(level.shape[2:]) for level in vovnet("27_slim").eval()(images((1, 3, 97, 65))).pyramid]
    assert shapes == [(25, 17), (12, 8), (6, 4), (3, 2)]


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="ese is 'first'"):
        vovnet_v2("nano", ese="first")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="a number for each of four stages"):
        vovnet("nano", depths=(1, 1))
    with pytest.raises(UsageError, match="layers is 0"):
        vovnet("nano", layers=0)


def test_the_effects_networks_cost_the_same():
    with torch.device("meta"):
        found = {arm: count(_matched(arm, 4, 32, (1, 1, 2))).macs for arm in _ARMS}
    assert max(found.values()) / min(found.values()) < 1.03


def test_access_is_the_papers_formula():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert _access(conv, torch.zeros(1, 3, 5, 4)) == 20 * (3 + 8) + 9 * 3 * 8


def test_checks_read_the_measurements():
    found = effect("toy", read("digits"))
    values = {}
    for arm, factor in (("osa", 1.0), ("residual", 1.2), ("dense", 1.5)):
        values[arm] = {name: np.full(2, factor * (10 + number % 3)) for number, name in enumerate(found.metrics)}
    assert [check.holds for check in found.checks(Measured(values))] == [True, True, False, True]
    values["osa"] = {name: numbers * 2 for name, numbers in values["osa"].items()}
    assert [check.holds for check in found.checks(Measured(values))] == [False, True, True, False]
