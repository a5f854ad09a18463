import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vertebra.adapters.lora import layers, lora
from vertebra.backbones.timm import timm
from vertebra.cli.main import main
from vertebra.contracts import Backbone
from vertebra.errors import UsageError
from vertebra.training.predicting import load

NAMES = ["test_vit", "test_resnet", "test_convnext", "test_maxvit", "tf_efficientnet_b0"]  # the last pads as TensorFlow


def _backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    return timm(name, image_size=64).eval()


def _images(size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_backbone_and_merges_into_one(name: str) -> None:
    plain = _backbone(name)
    names = set(plain.state_dict())
    images = _images(64 if name == "test_maxvit" else 65)
    with torch.no_grad():
        before = plain(images)
        adapted = lora(plain, rank=3).eval()
        assert torch.equal(adapted(images).pooled, before.pooled)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
        trained = adapted(images)
        merged = adapted.merge()
        found = merged(images)
        assert not torch.equal(trained.pooled, before.pooled)
        scale = trained.pooled.abs().max()
        torch.testing.assert_close(found.pooled / scale, trained.pooled / scale, rtol=0, atol=1e-5)
        assert torch.equal(adapted(images).pooled, trained.pooled)  # merging is of a copy
    assert set(merged.state_dict()) == names and type(merged) is type(plain)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_the_update_is_of_the_rank_and_the_scale_that_was_asked_for() -> None:
    plain = _backbone("test_vit")
    weight = plain.get_submodule("network.blocks.0.mlp.fc1").weight.detach().clone()  # type: ignore[union-attr]
    adapted = lora(plain, rank=3, alpha=12.0)
    layer = adapted.inner.get_submodule("network.blocks.0.mlp.fc1")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()  # type: ignore[index,union-attr]
        a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
        changed = adapted.merge().get_submodule("network.blocks.0.mlp.fc1").weight  # type: ignore[union-attr]
        torch.testing.assert_close(changed - weight, 4 * b @ a, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(changed - weight, atol=1e-3) == 3


def test_layers_are_chosen_by_what_the_network_is_made_of() -> None:
    ends = {name: {n.rpartition(".")[2] for n in layers(_backbone(name), 2)} for name in NAMES}
    assert ends["test_vit"] == ends["test_maxvit"] == {"qkv", "proj", "fc1", "fc2"}
    assert ends["test_convnext"] == {"fc1", "fc2"}
    assert {"conv1", "conv2"} <= ends["test_resnet"]
    assert "conv_dw" not in ends["tf_efficientnet_b0"] and {"conv_pw", "conv_pwl"} <= ends["tf_efficientnet_b0"]
    vit = _backbone("test_vit")
    assert {n.rpartition(".")[2] for n in layers(vit, 2, "attention")} == {"qkv", "proj"}
    assert layers(vit, 2, ["blocks.1.attn.qkv"]) == ["network.blocks.1.attn.qkv"]
    assert layers(vit, 2, "conv") == ["network.patch_embed.proj"]


def test_layers_whose_weight_is_read_and_not_called_are_left_out() -> None:
    with torch.device("meta"):
        chosen = layers(timm("beit_base_patch16_224"), 4)
    assert {name.rpartition(".")[2] for name in chosen} == {"proj", "fc1", "fc2"}


def test_every_update_learns_from_the_second_step_on() -> None:
    adapted = lora(_backbone("test_maxvit"), rank=2).train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        features = adapted(_images())
        (features.pooled.square().sum() + sum(x.square().mean() for x in features.pyramid)).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


def test_dropout_is_for_training_alone() -> None:
    adapted = lora(_backbone("test_vit"), rank=2, dropout=0.5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        torch.manual_seed(0)
        loud = adapted.train()(_images()).pooled
        assert not torch.equal(adapted(_images()).pooled, loud)
        adapted.eval()
        assert torch.equal(adapted(_images()).pooled, adapted(_images()).pooled)
    norms = [m for m in adapted.train().modules() if isinstance(m, nn.LayerNorm)]
    assert norms and not any(m.training for m in norms)


def test_what_cannot_be_adapted_is_refused() -> None:
    vit = _backbone("test_vit")
    for options, words in (
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"targets": "lienar"}, r"targets is 'lienar'; did you mean linear"),
        ({"targets": ["qkw"]}, r"test_vit has no layer to adapt with targets=\['qkw'\].*there are fc1, fc2, proj, qkv"),
        ({"rank": 500}, "rank 500; none of its layers is plain"),
    ):
        with pytest.raises(UsageError, match=words):
            lora(vit, **options)  # type: ignore[arg-type]
    with torch.device("meta"), pytest.raises(UsageError, match="eca_nfnet_l0 has no layer"):
        lora(timm("eca_nfnet_l0"))  # its convolutions standardise their weights


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "vertebra.adapters.lora.find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest)
    )
    with pytest.raises(UsageError, match=r"pip install 'vertebra\[lora\]'"):
        lora(_backbone("test_vit"))


def test_a_run_with_an_adapter_can_be_loaded_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", "-m", "timm/test_vit", "--imgsz", "32", "--adapter", "lora", "--curriculum"]
    words += ["efficienttrain/plus", "--set", "adapter.options.rank=2", "--set", "steps=3", "-j", "0", "--json"]
    with pytest.raises(SystemExit) as leave:
        main([*words, "--name", "mine"])
    assert not leave.value.code
    result = json.loads(capsys.readouterr().out)
    run = json.loads((tmp_path / result["run"] / "run.json").read_text())["run"]
    assert run["adapter"] == {"address": "lora", "options": {"rank": 2}, "kind": "adapters"}
    assert run["curriculum"] == {"address": "efficienttrain/plus", "options": {}, "kind": "curricula"}
    adapted = load(result["run"]).model.backbone
    assert type(adapted).__name__ == "Lora"
    assert sum("lora_A" in name for name in adapted.state_dict()) == len(adapted.names)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as leave:
        main(["resume", result["run"], "--set", "adapter=none"])
    assert leave.value.code == 2 and "adapter cannot change on resume" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leave:
        main(["resume", result["run"], "--set", "steps=5", "--json"])
    assert not leave.value.code and json.loads(capsys.readouterr().out)["steps"] == 5
