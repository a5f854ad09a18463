"""Every page of surgery keeps what `Operated` promises: what changed, what it costs, and a model that still works."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from vertebra.contracts import Backbone, Operated
from vertebra.errors import UsageError
from vertebra.paper import pages
from vertebra.parity import fill, images
from vertebra.spec import Spec, addresses
from vertebra.training.cost import count

OPTIONS: Mapping[str, Mapping[str, Any]] = {"swap": {"what": "ReLU", "block": nn.GELU}}
"""What a page requires beside the model."""
PAGES = addresses("surgery")


def operation(address: str) -> Callable[..., Operated]:
    """The page as (model) -> Operated."""
    call, given = Spec(address, kind="surgery").resolve()
    given |= OPTIONS.get(address.partition("/")[0], {})
    found = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    required = [p.name for p in found if p.default is p.empty][1:]
    if set(required) - given.keys():
        pytest.skip(f"{address} requires {', '.join(required)}: its own test has to hold Operated's promises")
    return lambda model, **options: call(model, **given, **options)


def backbone() -> Backbone:
    torch.manual_seed(0)
    return fill(Spec("timm/test_resnet", {"image_size": 32}).build()).eval()


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Backbone, Operated]]:
    return {}


@pytest.fixture
def pair(request: pytest.FixtureRequest, results: dict) -> tuple[Backbone, Operated]:
    if request.param not in results:
        model = backbone()
        results[request.param] = model, operation(request.param)(model)
    return results[request.param]


every = pytest.mark.parametrize("pair", PAGES, indirect=True, ids=str)


def test_the_operations_are_found():
    found = {page.name: page for page in pages() if page.kind == "surgery"}
    assert set(found) >= {"fuse", "swap"}
    assert all(page.summary.endswith(".") for page in found.values())


@every
def test_names_what_changed(pair):
    model, operated = pair
    assert isinstance(operated, Operated) and operated.model is not model
    assert operated.changed and len(set(operated.changed)) == len(operated.changed)
    names = {name for name, _ in model.named_modules()}
    assert set(operated.changed) <= names


@every
def test_costs_are_those_of_the_two_models(pair):
    model, operated = pair
    assert operated.before == count(model)
    assert operated.after == count(operated.model)


@every
def test_the_model_that_was_given_stays_as_it_is(pair):
    model, operated = pair
    fresh = backbone()
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    mine = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in mine for parameter in operated.model.parameters())


@every
def test_the_contract_of_a_backbone_still_holds(pair):
    model, operated = pair
    changed = operated.model
    assert isinstance(changed, Backbone) and not any(module.training for module in changed.modules())
    for size in ((32, 32), (47, 33)):
        with torch.inference_mode():
            before, after = model(images((2, 3, *size))), changed(images((2, 3, *size)))
        assert [level.channels for level in changed.levels] == [feature.shape[1] for feature in after.pyramid]
        assert after.pooled.shape == (2, changed.width)
        if changed.levels == model.levels:
            assert [f.shape for f in after.pyramid] == [f.shape for f in before.pyramid]
    inside = [parameter for part in changed.trunk() for parameter in part.parameters()]
    assert len(inside) == len(set(inside)) and set(inside) == set(changed.parameters())


@every
def test_trains_and_saves_afterwards(pair):
    _, operated = pair
    state = {name: tensor.clone() for name, tensor in operated.model.state_dict().items()}
    operated.model.load_state_dict(state)
    operated.model.train()(images((2, 3, 32, 32))).pooled.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in operated.model.parameters())
    operated.model.load_state_dict(state)
    operated.model.zero_grad()
    operated.model.eval()


@pytest.mark.parametrize("address", PAGES)
def test_nothing_changed_is_an_error(address):
    """What wraps backbones alone takes no `images`, since a backbone says which it takes."""
    empty, call = nn.Sequential(nn.Tanh(), nn.Tanh()).eval(), operation(address)
    wraps = "images" not in inspect.signature(Spec(address, kind="surgery").resolve()[0]).parameters
    with pytest.raises(UsageError, match="a Sequential is no backbone" if wraps else r"Tanh \(2\)"):
        call(empty) if wraps else call(empty, images=(3, 8, 8))
