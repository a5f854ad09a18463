import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vertebra.config import Plan, Run
from vertebra.data import digits
from vertebra.errors import DataError, UsageError, VertebraError
from vertebra.spec import Spec
from vertebra.training import predicting, running
from vertebra.training.checkpoint import load as load_checkpoint

PLAN = Plan(steps=30, batch=64, ema=0.9, lr=2e-2, workers=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    running.train(Run(data="digits", backbone=Spec("tiny:net"), plan=PLAN, image_size=8), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    test = digits().split("test")
    for i in range(5):
        test.image(i).save(folder / f"{i}.png")
    (folder / "3x.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return folder


def test_what_was_measured_in_training_is_measured_again(run: Path) -> None:
    loaded = predicting.load(run)
    best = json.loads((loaded.path / "state.json").read_text())["best"]
    found = loaded.evaluate(digits().split("val"), batch=50)
    assert found == pytest.approx({name: best[name] for name in found}, rel=1e-4)
    assert loaded.classes == tuple("0123456789") and loaded.preprocess.size == (8, 8)


def test_averaged_weights_are_used(run: Path) -> None:
    saved = load_checkpoint(predicting.locate(run, "last")).tensors["ema"]
    loaded = predicting.load(run, which="last")
    assert torch.equal(loaded.model.head.weight, saved["head.weight"])


def test_folders_patterns_and_pixels_are_predicted_in_order_whatever_the_batch(run: Path, images: Path) -> None:
    loaded = predicting.load(run)
    found = loaded.predict([images, str(images / "[01].png")], top=3)
    assert [Path(answer.name).name for answer in found] == ["0.png", "1.png", "2.png", "3.png", "3x.jpg", "4.png"]
    assert "3x.jpg" in found[4].error and found[4].labels == ()
    assert all(len(a.labels) == 3 and list(a.scores) == sorted(a.scores, reverse=True) for a in found if not a.error)
    single = [loaded.predict(Image.open(images / f"{i}.png"), top=3)[0] for i in range(3)]
    assert [a.labels for a in single] == [a.labels for a in found[:3]]
    np.testing.assert_allclose([a.scores for a in single], [a.scores for a in found[:3]], rtol=1e-4)
    json.dumps([answer.to_json() for answer in found])


def test_sources_that_are_not_there_are_named(run: Path, tmp_path: Path) -> None:
    loaded = predicting.load(run)
    with pytest.raises(DataError, match=r"nowhere\*\.png: no such file or folder"):
        loaded.predict(tmp_path / "nowhere*.png")
    with pytest.raises(DataError, match="has no images"):
        loaded.predict(tmp_path)


def test_classes_are_matched_by_name_not_by_position(run: Path) -> None:
    loaded, test = predicting.load(run), digits().split("test")
    order = np.random.default_rng(0).permutation(10)
    shuffled = dataclasses.replace(
        test, classes=tuple(test.classes[i] for i in order), targets=np.argsort(order)[test.targets]
    )
    assert loaded.evaluate(shuffled) == pytest.approx(loaded.evaluate(test), rel=1e-5)
    few = test.select(np.flatnonzero(test.targets < 2))
    few = dataclasses.replace(few, classes=("0", "1"))
    assert predicting.match(few, loaded.classes, multi=False).targets.tolist() == few.targets.tolist()


def test_unknown_classes_are_refused_with_the_nearest_spelling(run: Path) -> None:
    test = digits().split("test")
    renamed = dataclasses.replace(test, classes=("zero", *test.classes[1:]))
    with pytest.raises(DataError, match=r"the model has no class 'zero'; it has 0, 1"):
        predicting.load(run).evaluate(renamed)
    with pytest.raises(DataError, match="has many labels an image, the model was trained on one label an image"):
        predicting.match(dataclasses.replace(test, targets=np.eye(10)[test.targets]), test.classes, multi=False)


def test_a_corrupt_checkpoint_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "checkpoints" / "last", broken)
    save_file({"x": torch.ones(1)}, broken / "ema.safetensors")
    with pytest.raises(VertebraError, match=r"ema\.safetensors is corrupt"):
        predicting.load(broken)


def test_a_run_that_is_not_there_names_the_nearest(run: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no run .*rum; did you mean .*run\?"):
        predicting.load(run.parent / "rum")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        predicting.load(run.parent)


def test_timms_networks_are_rebuilt_without_looking_for_weights(tmp_path: Path) -> None:
    spec = Spec("timm/test_vit", {"network": {"depth": 2}, "channels": 1})
    run = Run(data="digits", backbone=spec, plan=dataclasses.replace(PLAN, steps=1), image_size=32)
    running.train(run, tmp_path / "vit")
    loaded = predicting.load(tmp_path / "vit")
    assert loaded.preprocess.size == (32, 32) and loaded.preprocess.channels == 1
    config = json.loads((loaded.path / "config.json").read_text())
    assert config["architecture"] == "test_vit" and config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert len(loaded.predict(digits().split("test").image(0))[0].labels) == 5


def test_a_page_that_changes_timms_network_is_rebuilt_by_its_own_address(tmp_path: Path) -> None:
    spec = Spec("eca_net/resnet18", {"channels": 1, "image_size": 32, "kernels": [3, 3, 3, 3]})
    plan = dataclasses.replace(PLAN, steps=1, batch=8)
    running.train(Run(data="digits", backbone=spec, plan=plan), tmp_path / "run")
    loaded = predicting.load(tmp_path / "run", which="last")
    saved = load_checkpoint(loaded.path).tensors["ema"]
    found = loaded.model.state_dict()
    assert any("conv.weight" in name and value.shape == (1, 1, 3) for name, value in found.items())
    assert all(torch.equal(value, saved[name]) for name, value in found.items() if name in saved)


def test_a_checkpoint_serves_as_weights_for_other_classes(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, steps=2, ema=0.0)
    running.train(Run(data="digits", backbone=Spec("timm/test_resnet"), plan=plan, image_size=32), tmp_path / "first")
    place = tmp_path / "first" / "checkpoints" / "last"
    backbone = Spec("timm/test_resnet", {"weights": str(place), "image_size": 32}).build()
    saved = load_checkpoint(place).tensors["model"]
    assert all(torch.equal(tensor, saved[f"backbone.{name}"]) for name, tensor in backbone.state_dict().items())
