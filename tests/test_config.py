import json

import pytest

from vertebra.config import Plan, Run, edit, from_json, parse_value, to_json
from vertebra.errors import UsageError
from vertebra.spec import Spec

RUN = Run(data="photos", backbone=Spec("timm/resnet18", {"channels": 1}))


def test_run_survives_json() -> None:
    assert from_json(Run, json.loads(json.dumps(to_json(RUN)))) == RUN


def test_edit_reaches_nested_fields_by_path_and_by_leaf() -> None:
    edited = edit(RUN, ["plan.lr=1e-2", "scale=0.1,1", "clip=none", "workers=2", "backbone.options.channels=3"])
    assert (edited.plan.lr, edited.plan.views.scale, edited.plan.clip, edited.plan.workers) == (
        0.01,
        (0.1, 1.0),
        None,
        2,
    )
    assert edited.backbone.options == {"channels": 3}
    assert RUN.plan.lr == Plan().lr


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("plan.epoch=3", "did you mean epochs"),
        ("lrr=3", "did you mean lr"),
        ("plan.views.flp=1", "did you mean flip"),
        ("plan.schedule=cosin", "one of cosine, linear, step, constant; did you mean cosine"),
        ("plan.epochs=1.5", "whole number"),
        ("plan.epochs=0", "at least 1"),
        ("plan.ema=1", r"in \[0, 1\)"),
        ("plan.lr", "field=value"),
        ("backbone.address=timm/resnet5O", "did you mean resnet50"),
    ],
)
def test_wrong_edit_names_field_value_and_remedy(assignment: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        edit(RUN, [assignment])


def test_unknown_field_in_a_file_is_refused() -> None:
    values = to_json(RUN)
    values["plan"]["leraning_rate"] = 1
    with pytest.raises(UsageError, match=r"plan\.leraning_rate is no field"):
        from_json(Run, values)


def test_values_are_json_where_they_are_json() -> None:
    assert [parse_value(t) for t in ("3", "true", "[1, 2]", "same")] == [3, True, [1, 2], "same"]
