import pytest

from vertebra.battle import contenders
from vertebra.battle.contenders import PRETRAINED, SCRATCH, allows_commercial, defaults, inspect, parse, scratch_size
from vertebra.data import digits
from vertebra.errors import UsageError
from vertebra.spec import Spec


def test_addresses_carry_options() -> None:
    first, second = parse(["timm/resnet18?image_size=64&drop_path=0.1", Spec("timm/resnet34")], image_size=32)
    assert first.spec.options == {"image_size": 64, "drop_path": 0.1} and first.name == "timm/resnet18"
    assert second.spec.options == {"image_size": 32} and second.training is None


def test_the_same_address_twice_is_told_apart_by_its_options() -> None:
    names = [c.name for c in parse(["timm/resnet18?image_size=64", "timm/resnet18"])]
    assert names == ["timm/resnet18?image_size=64", "timm/resnet18"]


def test_pretrained_asks_for_the_weights_of_those_that_name_none() -> None:
    names = [
        "timm/resnet18",
        "timm/resnet50.a1_in1k",
        "timm/resnet34?training=scratch",
        "timm/resnet26?weights=bt_in1k",
    ]
    asked = [c.spec.options.get("weights") for c in parse(names, pretrained=True)]
    assert asked == ["pretrained", None, None, "bt_in1k"]


def test_weights_go_to_the_contender_of_that_address() -> None:
    (one,) = parse(["timm/resnet18"], {"timm/resnet18": "w.safetensors"})
    assert one.spec.options == {"weights": "w.safetensors"}


@pytest.mark.parametrize(
    ("addresses", "weights", "says"),
    [
        (["timm/resnet81"], {}, "no network called 'resnet81'.*resnet18"),
        (["timm/resnet18?imgsize=3"], {}, "no option 'imgsize'.*image_size"),
        (["timm/resnet18?image_size"], {}, "option 'image_size' has no value"),
        (["timm/resnet18?training=long"], {}, "training is 'long'; it must be pretrained or scratch"),
        (["timm/resnet18", "timm/resnet18"], {}, "given twice"),
        (["timm/resnet18"], {"timm/resnet81": "x"}, r"no contender has that address; did you mean timm/resnet18\?"),
        (["no_such_module:net"], {}, "no_such_module"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(addresses: list[str], weights: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(addresses, weights, image_size=32)


def test_default_contenders_are_real_and_of_different_families() -> None:
    parse(PRETRAINED)
    assert len({address.partition("/")[2].split("_")[0] for address in PRETRAINED}) >= 6
    assert len(parse(SCRATCH)) >= 6


def test_defaults_use_what_is_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "is_cached", lambda address: False)
    line_up, why = defaults(32)
    assert [c.spec.address for c in line_up] == list(SCRATCH) and "no pretrained weights are on this machine" in why
    assert line_up[0].spec.options["image_size"] == 32
    monkeypatch.setattr(contenders, "is_cached", lambda address: address in PRETRAINED[:3])
    line_up, why = defaults(32)
    assert [c.name for c in line_up] == list(PRETRAINED[:3]) and "are on this machine" in why


def test_download_and_offline_exclude_one_another() -> None:
    with pytest.raises(UsageError, match="VERTEBRA_OFFLINE or HF_HUB_OFFLINE is set"):
        defaults(32, pretrained=True)


def test_facts_of_a_contender_without_weights() -> None:
    facts = inspect(parse(["timm/test_resnet?image_size=32"])[0])
    assert (facts.training, facts.weights, facts.size) == ("scratch", None, (32, 32))
    assert facts.params_m == pytest.approx(0.37, abs=0.01) and 0 < facts.forward < facts.step * 5


def test_licences() -> None:
    assert all(map(allows_commercial, ("Apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")))
    assert not any(map(allows_commercial, ("cc-by-nc-4.0", "dinov3-license", "other", "")))


def test_small_images_are_trained_small() -> None:
    assert scratch_size(digits()) == 32
