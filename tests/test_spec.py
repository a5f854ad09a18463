import sys
from pathlib import Path

import pytest

from vertebra.errors import UsageError
from vertebra.spec import Spec, addresses, options_of, timm_names


def test_timm_names_equal_what_timm_registers() -> None:
    import timm

    assert set(timm_names()) == set(timm.list_models())


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("swim/tiny", "did you mean swin"),
        ("swin/tinny", "did you mean tiny"),
        ("timm/resnet5O", "did you mean resnet50"),
        ("resnet50", "timm/resnet50"),
        ("timm/", "timm has no network called ''"),
        ("lab:", "module:callable"),
    ],
)
def test_misspelt_address_names_the_nearest(address: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Spec(address)


def test_misspelt_option_is_refused_before_anything_is_built() -> None:
    with pytest.raises(UsageError, match=r"no option 'chanels'; did you mean channels"):
        Spec("swin/tiny", {"chanels": 1})
    with pytest.raises(UsageError, match="no option 'pretrained_weights'"):
        Spec("timm/resnet18", {"pretrained_weights": "x"})


def test_module_address_calls_the_users_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab_nets.py").write_text("def big(*, width=3):\n    return ('big', width)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Spec("lab_nets:big", {"width": 5}).build() == ("big", 5)
    with pytest.raises(UsageError, match="no option 'widht'; did you mean width"):
        Spec("lab_nets:big", {"widht": 5})
    with pytest.raises(UsageError, match="has no attribute 'bog'"):
        Spec("lab_nets:bog").build()
    sys.modules.pop("lab_nets")


def test_spec_round_trips_through_json() -> None:
    spec = Spec("swin/tiny", {"channels": 1})
    assert Spec(**spec.to_json()) == spec


def test_every_address_is_a_spec() -> None:
    for address in addresses():
        assert Spec(address).name == address


def test_options_follow_a_typed_dict() -> None:
    from vertebra.backbones.swin import swin

    assert {"variant", "weights", "channels", "image_size"} <= set(options_of(swin))
