"""Assistant supervision: what is added to the lead's loss, and what is shared."""

import pytest
import torch

from vertebra.backbones.cbnet import cbnet
from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.contracts import Batch, Progress
from vertebra.errors import UsageError
from vertebra.methods.assisted import Assisted, supervised
from vertebra.methods.supervised import Supervised
from vertebra.parity import fill, images
from vertebra.tasks.classify import classify

BATCH = Batch(images((4, 3, 32, 32)), torch.tensor([0, 1, 0, 1]), torch.arange(4))
START = Progress(0, 4, 0, 1)


def model(**options):
    torch.manual_seed(0)
    return classify(fill(cbnet("nano", **options)).eval(), ["one", "other"])


def test_losses_are_the_leads_and_half_of_the_assistants():
    task = model().eval()
    losses = Assisted(task)(BATCH, START)
    assistant, lead = (task.head(found.pooled) for found in task.backbone.each(BATCH.images))
    cross = torch.nn.functional.cross_entropy
    assert set(losses) == {"classify", "assist1_classify"}
    torch.testing.assert_close(losses["classify"], cross(lead, BATCH.targets))
    torch.testing.assert_close(losses["assist1_classify"], 0.5 * cross(assistant, BATCH.targets))
    torch.testing.assert_close(losses["classify"], Supervised(task)(BATCH, START)["classify"])


def test_the_weights_of_three_members():
    task = model(members=3)
    assert Assisted(task).weights == (0.5, 1.0)
    assert list(Assisted(task, weights=(0.2, 0.4))(BATCH, START)) == [
        "classify",
        "assist1_classify",
        "assist2_classify",
    ]
    with pytest.raises(UsageError, match="needs 2 numbers"):
        Assisted(task, weights=(0.5,))


def test_assistance_reaches_what_the_lead_alone_does_not():
    """Links at zero: the lead says nothing to the assistant's own deep stages, the assistant's loss does."""
    torch.manual_seed(0)
    task = classify(cbnet("nano").train(), ["one", "other"])
    deepest = task.backbone.stages[2].members
    Supervised(task)(BATCH, START)["classify"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in deepest[0].parameters())
    assert all(p.grad.any() for p in deepest[1].parameters())
    sum(Assisted(task)(BATCH, START).values()).backward()
    assert all(p.grad.any() for p in deepest[0].parameters())


def test_the_backbone_says_its_own_again():
    task = model().eval()
    before = task(BATCH.images)["logits"]
    Assisted(task)(BATCH, START)
    torch.testing.assert_close(task(BATCH.images)["logits"], before)
    assert list(Assisted(task).state_dict()) == list(task.state_dict())


def test_which_method_a_task_model_gets():
    single = classify(cifar_resnet("nano"), ["one", "other"])
    assert type(supervised(single)) is Supervised
    assert type(supervised(model())) is Assisted
    with pytest.raises(UsageError, match="a CifarResNet has one"):
        Assisted(single)
