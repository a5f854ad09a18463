import pytest
import torch
from tiny import Memory, supervised

from vertebra.config import Plan
from vertebra.errors import UsageError
from vertebra.training.loop import fit
from vertebra.training.optimizers import freeze, optimizer_for, parameter_groups


def test_layer_decay_counts_parts_back_from_the_head() -> None:
    method = supervised()
    scales = {}
    for group in parameter_groups(method, Plan(layer_decay=0.5)):
        scales |= dict.fromkeys(group["params"], group["lr_scale"])
    backbone, head = method.backbone, method.task_model.head
    assert scales[head.weight] == 1 and scales[head.bias] == 1
    assert [scales[part[0].weight] for part in backbone.trunk()] == [0.125, 0.25, 0.5]
    assert scales[backbone.scale] == 0.0625  # in no part: before the first


def test_only_weights_of_rank_two_and_more_decay() -> None:
    for group in parameter_groups(supervised(), Plan(weight_decay=0.3)):
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    method = supervised()
    found = [p for group in parameter_groups(method, Plan(layer_decay=0.7)) for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(method.parameters()))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "nadamw", "lion", "adafactorbv", "muon"])
def test_timms_optimisers_keep_the_share_of_the_rate(name: str) -> None:
    optimizer = optimizer_for(supervised(), Plan(optimizer=name, layer_decay=0.5))
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1, 0.5, 0.25, 0.125, 0.0625}


def test_unknown_optimiser_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'adamww'; did you mean adamw"):
        optimizer_for(supervised(), Plan(optimizer="adamww"))


def test_frozen_parts_keep_weights_and_statistics() -> None:
    method = supervised()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    fit(method, Memory(), Plan(epochs=1, freeze=2, warmup_epochs=0))
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("parts.2." in name or "head." in name for name in changed)


def test_freezing_the_whole_backbone_leaves_the_head() -> None:
    method = supervised()
    assert freeze(method.backbone, -1) == (method.backbone,)
    assert {p for group in parameter_groups(method, Plan()) for p in group["params"]} == set(
        method.task_model.head.parameters()
    )


def test_too_many_frozen_parts_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(UsageError, match="this backbone has 3 parts"):
        freeze(supervised().backbone, 4)
