import torch

from vertebra.adapters import adapted
from vertebra.adapters.frozen import Frozen, frozen
from vertebra.backbones.timm import timm
from vertebra.spec import Spec
from vertebra.tasks.classify import classify


def test_nothing_of_the_backbone_trains_and_the_head_does() -> None:
    model = classify(frozen(timm("test_resnet")), ("a", "b"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    model.train()
    assert model.training and model.backbone.training
    assert not any(module.training for module in model.backbone.trunk())


def test_a_checkpoint_loads_with_and_without_the_adapter() -> None:
    torch.manual_seed(0)
    plain, wrapped = (classify(timm("test_resnet"), ("a", "b")) for _ in range(2))
    wrapped = classify(frozen(wrapped.backbone), ("a", "b"))
    assert list(wrapped.backbone.state_dict()) == list(plain.backbone.state_dict())
    assert set(wrapped.state_dict()) == set(plain.state_dict())
    images = torch.rand(2, 3, 64, 64)
    plain.load_state_dict(wrapped.state_dict())
    assert torch.equal(plain.eval()(images)["logits"], wrapped.eval()(images)["logits"])
    torch.nn.init.normal_(plain.backbone.network.conv1[0].weight)  # type: ignore[union-attr]
    wrapped.load_state_dict(plain.state_dict())
    assert torch.equal(plain(images)["logits"], wrapped(images)["logits"])


def test_gradients_pass_through_to_the_images() -> None:
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    frozen(timm("test_vit", image_size=64))(images).pooled.square()[:, :8].sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_a_backbone_and_its_adapter_from_their_specs() -> None:
    both = {"backbone": Spec("timm/test_resnet").to_json(), "adapter": Spec("frozen", kind="adapters").to_json()}
    spec = Spec("vertebra.adapters:adapted", both)
    assert isinstance(spec.build(), Frozen) and isinstance(adapted(**both), Frozen)
