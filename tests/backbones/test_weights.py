import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vertebra.backbones.timm import timm
from vertebra.errors import UsageError, VertebraError
from vertebra.shipping.weights import WeightsInfo, classifier, describe, published

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source():
    torch.manual_seed(1)
    return timm("test_resnet").eval()


@pytest.fixture
def state(source):
    return {name: tensor.contiguous() for name, tensor in source.network.state_dict().items()}


def same(left, right) -> bool:
    with torch.inference_mode():
        return torch.equal(left.eval()(IMAGES).pooled, right.eval()(IMAGES).pooled)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.backbone.network.", "_orig_mod.network."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, source, state, prefix):
    path = tmp_path / "net.safetensors"
    save_file({prefix + name: tensor for name, tensor in state.items()}, path)
    loaded = timm("test_resnet", weights=str(path))
    assert same(loaded, source)
    assert loaded.weights_info == WeightsInfo(str(path), sha256=loaded.weights_info.sha256)
    assert len(loaded.weights_info.sha256) == 64


def test_heads_are_left_out_and_can_be_read(tmp_path, source, state):
    path = tmp_path / "net.safetensors"
    head = nn.Linear(source.width, 7)
    save_file({**state, "fc.weight": head.weight.detach(), "fc.bias": head.bias.detach()}, path)
    assert same(timm("test_resnet", weights=str(path)), source)
    read = classifier("test_resnet", str(path))
    assert torch.equal(read.weight, head.weight) and torch.equal(read.bias, head.bias)


def test_a_task_checkpoint_gives_its_backbone(tmp_path, source, state):
    folder = tmp_path / "last"
    folder.mkdir()
    tensors = {f"backbone.network.{name}": tensor for name, tensor in state.items()}
    save_file({**tensors, "head.weight": torch.zeros(3, source.width)}, folder / "model.safetensors")
    preprocess = {"size": [48, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (folder / "preprocess.json").write_text(json.dumps({**preprocess, "crop": 0.9, "fit": "squash"}))
    (folder / "config.json").write_text(json.dumps({"data": "digits"}))
    loaded = timm("test_resnet", weights=str(folder))
    assert same(loaded, source)
    assert (loaded.preprocess.size, loaded.preprocess.mean) == ((48, 64), (0.1, 0.2, 0.3))
    assert (loaded.preprocess.crop, loaded.preprocess.fit) == (0.9, "squash")


def hub_folder(folder, state, **config):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_folder_as_the_hub_keeps_it(tmp_path, source, state):
    images = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.5] * 3, "license": "mit"}
    path = hub_folder(tmp_path / "net", state, architecture="test_resnet", pretrained_cfg=images)
    loaded = timm("test_resnet", weights=path)
    assert same(loaded, source)
    assert (loaded.preprocess.size, loaded.preprocess.mean) == ((96, 96), (0.5, 0.5, 0.5))
    assert loaded.weights_info.licence == "mit"


def test_weights_of_another_network_are_refused_by_name(tmp_path, state):
    path = hub_folder(tmp_path / "net", state, architecture="test_resnet")
    with pytest.raises(UsageError, match="belong to test_resnet, not to test_convnext"):
        timm("test_convnext", weights=path)


def test_metadata_says_how_to_build_and_to_feed(tmp_path):
    torch.manual_seed(2)
    source = timm("test_efficientnet", network={"pad_type": "same"})
    path = tmp_path / "net.safetensors"
    said = {"architecture": "timm.create_model(test_efficientnet, pad_type=same)", "input": "64", "licence": "mit"}
    save_file(source.network.state_dict(), path, metadata={**said, "mean": "0.1,0.2,0.3", "std": "1,1,1"})
    loaded = timm("test_efficientnet", weights=str(path))
    assert same(loaded, source)
    assert (loaded.preprocess.mean, loaded.preprocess.size) == ((0.1, 0.2, 0.3), (64, 64))
    assert loaded.weights_info.licence == "mit"
    overruled = timm("test_efficientnet", weights=str(path), network={"pad_type": ""})
    assert not same(overruled, source)


def test_half_precision_files_become_float(tmp_path, source, state):
    path = tmp_path / "net.safetensors"
    save_file({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, path)
    loaded = timm("test_resnet", weights=str(path))
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded.eval()(IMAGES).pooled, source(IMAGES).pooled, rtol=0.01, atol=0.01)


def test_first_convolutions_and_position_tables_are_adapted(tmp_path):
    torch.manual_seed(3)
    source = timm("test_vit").eval()
    path = tmp_path / "net.safetensors"
    save_file(source.network.state_dict(), path)
    grey = timm("test_vit", weights=str(path), channels=1)
    expected = source.network.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.network.patch_embed.proj.weight, expected)
    small = timm("test_vit", weights=str(path), image_size=64).eval()
    assert small.network.pos_embed.shape[1] < source.network.pos_embed.shape[1]
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(small(images).pooled, source(images).pooled, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named(tmp_path, state):
    path = tmp_path / "net.safetensors"
    name = next(iter(state))
    save_file({**{k: v for k, v in state.items() if k != name}, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(VertebraError, match=rf"1 missing: {name}; 1 left over: extra.weight"):
        timm("test_resnet", weights=str(path))
    save_file({**state, name: torch.zeros(2, 2)}, path)
    with pytest.raises(VertebraError, match=rf"1 of the wrong shape: {name} is \(2, 2\), wanted"):
        timm("test_resnet", weights=str(path))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(VertebraError, match=r"net\.safetensors is no safetensors file"):
        timm("test_resnet", weights=str(path))


def test_pickles_need_leave_and_are_read_as_tensors_only(tmp_path, source, state):
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 91.7}, path)
    with pytest.raises(UsageError, match=r"are a pickle.*allow_pickle=True"):
        timm("test_resnet", weights=str(path))
    assert same(timm("test_resnet", weights=str(path), allow_pickle=True), source)


def test_tags_go_before_folders_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    with pytest.raises(VertebraError, match="would download"):
        timm("test_resnet", weights="pretrained")
    with pytest.raises(UsageError, match=r"no model\.safetensors there; weight files found: none"):
        timm("test_resnet", weights="./pretrained")


@pytest.mark.parametrize("path", ["nowhere.safetensors", "./nowhere", "runs/last"])
def test_missing_files_are_named(path):
    with pytest.raises(UsageError, match="there is no such file or folder"):
        timm("test_resnet", weights=path)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(root, repository, state, **config):
    """The hub's cache as a download would have left it."""
    repo = root / f"models--{repository.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots").mkdir()
    hub_folder(repo / "snapshots" / COMMIT, state, **config)


@pytest.mark.parametrize("weights", ["pretrained", "r160_in1k", f"r160_in1k@{COMMIT}"])
def test_pretrained_weights_come_from_the_cache_with_their_commit(tmp_path, monkeypatch, source, state, weights):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, "timm/test_resnet.r160_in1k", state)
    loaded = timm("test_resnet", weights=weights)
    assert same(loaded, source)
    info = loaded.weights_info
    assert (info.source, info.tag) == ("hf-hub:timm/test_resnet.r160_in1k", "r160_in1k")
    assert (info.revision, info.licence) == (COMMIT, "apache-2.0")
    assert same(timm("test_resnet.r160_in1k"), source)  # a tag in the name names the weights


def test_any_repository_of_the_hub(tmp_path, monkeypatch, source, state):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    images = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.5] * 3}
    hub_cache(tmp_path, "lab/net", state, architecture="test_resnet", pretrained_cfg=images)
    loaded = timm("test_resnet", weights="hf-hub:lab/net")
    assert same(loaded, source)
    assert (loaded.preprocess.size, loaded.weights_info.revision) == ((96, 96), COMMIT)


@pytest.mark.parametrize("name", ["mobilenetv2_100.ra_in1k", "mobilenetv2_100"])
def test_offline_weights_say_what_would_be_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("VERTEBRA_OFFLINE", "1")
    with pytest.raises(VertebraError) as caught:
        timm(name, weights="pretrained")
    for words in ("would download model.safetensors of hf-hub:timm/mobilenetv2_100.ra_in1k", "apache-2.0", "Remedy"):
        assert words in str(caught.value)


def test_unknown_tags_are_named_with_those_there_are():
    with pytest.raises(UsageError, match=r"no weights 'a1_in2k'; did you mean a1_in1k.*it has a1_in1k, a2_in1k"):
        timm("resnet18", weights="a1_in2k")
    with pytest.raises(UsageError, match="timm publishes no weights for vovnet39a"):
        timm("vovnet39a", weights="pretrained")


def test_published_rows_state_tag_licence_and_source():
    rows = published("swin_tiny_patch4_window7_224")
    assert rows[0] == {
        "tag": "ms_in1k",
        "licence": "mit",
        "source": "hf-hub:timm/swin_tiny_patch4_window7_224.ms_in1k",
        "size": [224, 224],
        "classes": 1000,
    }


def test_describe_is_json_and_exact():
    facts = json.loads(json.dumps(describe("efficientnet/b0")))
    assert (facts["network"], facts["size"], facts["width"]) == ("timm/tf_efficientnet_b0", [224, 224], 1280)
    assert facts["levels"][0] == {"channels": 16, "stride": 2}
    assert facts["params"] == 5_288_548 - 1_281_000
    assert facts["weights"][0]["licence"] == "apache-2.0"


def test_describing_tagged_weights_downloads_nothing():
    assert describe("timm/resnet50.a1_in1k")["crop"] == 0.95
