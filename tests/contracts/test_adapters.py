"""The contract of an adapter, over every one that is found: frozen inside, few new parameters, as before outside."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from vertebra.backbones.timm import timm
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone
from vertebra.data.digits import digits
from vertebra.data.loader import Batches
from vertebra.methods.supervised import Supervised
from vertebra.spec import Spec, addresses
from vertebra.tasks.classify import classify
from vertebra.training.loop import fit

ADAPTERS = addresses("adapters")
FAMILIES = ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_maxvit"]
SHARES = {"deit_tiny_patch16_224": 0.15, "resnet18": 0.15, "convnext_tiny": 0.15, "swin_tiny_patch4_window7_224": 0.15}
"""Networks of the usual size -> the most new parameters, as a share of those they had."""
VIEWS = Views(scale=(0.6, 1.0), flip=0.0)


def _plain(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    backbone = timm(name, image_size=64)
    with torch.no_grad():  # statistics that a training mode would change, and norms that start at zero
        for tensor in (*backbone.buffers(), *backbone.parameters()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return backbone


def _adapted(address: str, backbone: Backbone) -> Backbone:
    return Spec(address, kind="adapters").build(backbone)


def _images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def _old_and_new(adapted: Backbone, plain: Backbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapted backbone's tensors: those whose values its backbone had, and the others."""
    had = list(plain.state_dict().values())
    state = adapted.state_dict()
    old = {k: v for k, v in state.items() if any(v.shape == h.shape and torch.equal(v, h) for h in had)}
    return old, {k: v for k, v in state.items() if k not in old}


def _tensors(pyramid_pooled_tokens: tuple) -> Iterator[Tensor]:
    pyramid, pooled, tokens = pyramid_pooled_tokens
    yield from (*pyramid, pooled, *(() if tokens is None else (tokens,)))


@pytest.fixture(params=[(address, name) for address in ADAPTERS for name in FAMILIES], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_adapters_are_found() -> None:
    assert {"frozen", "lora"} <= set(ADAPTERS)


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("address", ADAPTERS)
def test_new_parameters_are_few(address: str, name: str) -> None:
    with torch.device("meta"):
        backbone = timm(name)
        before = sum(p.numel() for p in backbone.parameters())
        adapted = _adapted(address, backbone)
    new = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapted.parameters()) == before + new
    assert new <= SHARES[name] * before


def test_the_contract_outside_is_as_before(case: tuple[str, str]) -> None:
    address, name = case
    plain = _plain(name).eval()
    adapted = _adapted(address, copy.deepcopy(plain)).eval()
    assert (adapted.levels, adapted.width, adapted.preprocess) == (plain.levels, plain.width, plain.preprocess)
    with torch.no_grad():
        before, after = plain(_images()), adapted(_images())
    for one, other in zip(_tensors(before), _tensors(after), strict=True):
        assert one.shape == other.shape
    assert len(adapted.trunk()) >= len(plain.trunk())
    parts = [parameter for part in adapted.trunk() for parameter in part.parameters()]
    assert len(parts) == len(set(parts))
    assert {p for p in adapted.parameters() if p.requires_grad} <= set(parts) or address not in ("frozen", "lora")


def test_training_leaves_the_inside_alone(case: tuple[str, str]) -> None:
    address, name = case
    plain = _plain(name)
    adapted = _adapted(address, copy.deepcopy(plain))
    old, _ = _old_and_new(adapted, plain)
    assert len(old) >= len(plain.state_dict())
    old = {k: v.clone() for k, v in old.items()}
    split = digits().split("train").select(np.arange(24))
    method = Supervised(classify(adapted, digits().classes))
    start = {k: v.detach().clone() for k, v in method.named_parameters() if v.requires_grad}
    batches = Batches(split, adapted.preprocess, views=VIEWS, batch=8, seed=0, workers=0)
    history = fit(method, batches, Plan(epochs=1, batch=8, lr=1e-2, warmup_epochs=0.0, views=VIEWS))
    assert history.step == 3
    state = adapted.state_dict()
    frozen = {p for p in adapted.parameters() if not p.requires_grad}
    unmoved = [k for k, v in old.items() if torch.equal(state[k], v)]
    trained = dict(method.named_parameters())
    moved = [k for k, v in start.items() if not torch.equal(trained[k], v)]
    assert "task_model.head.weight" in moved and len(moved) == len(start), "everything that may train has moved"
    assert frozen and len(unmoved) >= len(plain.state_dict()), "a weight or statistic of the backbone has moved"


def test_training_mode_changes_no_output(case: tuple[str, str]) -> None:
    adapted = _adapted(case[0], _plain(case[1]))
    with torch.no_grad():
        quiet = adapted.eval()(_images()).pooled
        assert torch.equal(adapted.train()(_images()).pooled, quiet)
        assert torch.equal(adapted.eval()(_images()).pooled, quiet)


def test_state_dict_round_trip(case: tuple[str, str]) -> None:
    address, name = case
    adapted, other = (_adapted(address, _plain(name, seed)).eval() for seed in (0, 1))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
        expected = adapted(_images()).pooled
        assert not torch.equal(other(_images()).pooled, expected)
        other.load_state_dict(adapted.state_dict())
        assert torch.equal(other(_images()).pooled, expected)
        assert torch.equal(copy.deepcopy(adapted)(_images()).pooled, expected)


@pytest.mark.parametrize("address", ADAPTERS)
def test_forward_is_one_graph(address: str) -> None:
    adapted = _adapted(address, _plain("test_vit")).eval()
    with torch.no_grad():
        expected = adapted(_images()).pooled
        exported = torch.export.export(adapted, (_images(),)).module()
        torch.testing.assert_close(exported(_images()).pooled, expected, rtol=1e-4, atol=1e-5)
