"""`vertebra explain`: pictures, a table and a file of what was shown, of runs and of published networks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.cli.main import main
from vertebra.data.sprites import sprites
from vertebra.probes.grad_cam import pictures, showing
from vertebra.tasks.classify import classify
from vertebra.training.predicting import Loaded

SHARED = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
WEIGHTS = SHARED / "weights" / "mobilenetv2_100_224_tf2.fp16.safetensors"
TRAIN = ["train", "digits", "-m", "tiny:net", "--imgsz", "8", "--set", "steps=4", "-j", "0", "--precision", "32-true"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training"))


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(list(words))
    found = capsys.readouterr()
    return int(leave.value.code or 0), found.out, found.err


def loaded(size: int = 16) -> Loaded:
    import tiny

    torch.manual_seed(0)
    model = classify(tiny.net(image_size=size), ("cat", "dog", "owl"))
    torch.nn.init.normal_(model.head.weight)
    return Loaded(model, Path("model"), torch.device("cpu"))


def test_a_run_explains_files_and_says_what_it_showed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, *TRAIN, "--name", "mine", "--json")
    run = json.loads(out)["run"]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    Path("in").mkdir()
    photo.save("in/a b.png")
    Path("in/c.png").write_bytes(b"no image")

    code, out, err = _run(capsys, "explain", run, "in", "--out", "shown")
    assert code == 3 and "warning: in/c.png" in err
    first, row, place = out.splitlines()
    assert first.split() == ["image", "class", "probability", "rank", "centre", "(x,", "y)", "picture"]
    assert row.startswith("in/a b.png") and place == "pictures and explained.json: shown"
    document = json.loads(Path("shown/explained.json").read_text())
    assert (document["model"], document["method"]) == (run, "grad_cam")
    shown, bad = document["images"]
    assert bad["image"] == "in/c.png" and bad["error"] and set(bad) == {"image", "error"}
    assert shown["rank"] == 1 and 0.1 < shown["score"] <= 1 and Path(shown["picture"]).is_file()
    if shown["centre"] is not None:  # in pixels of the file: its middle square of 20 x 20 is what was seen
        x, y = shown["centre"]
        assert 0 <= x <= 20 and 5 <= y <= 25

    code, _, err = _run(capsys, "explain", run, "in/a b.png", "--out", "shown")
    assert code == 2 and "earlier explanations" in err
    words = (
        "in/a b.png",
        "--out",
        "shown",
        "--overwrite",
        "--class",
        "7",
        "--class",
        "3",
        "--method",
        "counterfactual",
    )
    code, out, _ = _run(capsys, "explain", run, *words, "--json")
    found = json.loads(out)
    assert code == 0 and [one["label"] for one in found["images"]] == ["7", "3"] and found["out"] == "shown"
    assert sorted(one["rank"] for one in found["images"])[0] >= 1
    assert sorted(path.name for path in Path("shown").glob("a-b-*.png")) == sorted(
        {"a-b-7.png", "a-b-3.png", Path(shown["picture"]).name}
    )
    code, _, err = _run(capsys, "explain", run, "in/a b.png", "--class", "seven")
    assert code == 2 and "no class 'seven'" in err and not Path("runs/explain").exists()
    code, out, _ = _run(capsys, "explain", run, "in/a b.png")
    assert code == 0 and Path("runs/explain/a-b/explained.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "in.png"], "there is no run nowhere"),
        (["timm/resnet1O", "in.png"], "there is no run timm/resnet1O"),
        (["timm/test_vit", "in.png"], "random weights have no classes"),
        (["timm/test_vit?weights", "in.png"], "has no value"),
        (["nowhere", "missing.png"], "no file matches"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    Image.new("RGB", (8, 8)).save("in.png")
    code, _, err = _run(capsys, "explain", *words)
    assert code in (2, 3) and message in err and not Path("runs").exists()


def test_unknown_classes_are_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="no class 'dgo'; did you mean dog"):
        list(showing.show(loaded(), [Image.new("RGB", (8, 8))], Path(), classes=["dgo"]))


def test_scores_are_the_models_and_images_of_any_shape_are_found_again(tmp_path: Path) -> None:
    model = loaded()
    split = sprites(splits={"test": 3}, size=48, objects=2).split("test")
    images = [split.image(i).resize((96, 48)) for i in range(3)]
    shown = list(showing.show(model, images, tmp_path))
    answers = model.predict(images, top=1)
    assert [one.label for one in shown] == [answer.labels[0] for answer in answers]
    assert [one.score for one in shown] == pytest.approx([answer.scores[0] for answer in answers], abs=1e-5)
    for one in shown:
        assert one.centre is not None and one.box is not None
        left, top, right, bottom = one.box
        assert 24 <= left < right <= 72 and 0 <= top < bottom <= 48  # the middle square of the file
        assert 24 <= one.centre[0] <= 72 and 0 <= one.centre[1] <= 48


def test_pictures_of_the_same_name_do_not_replace_each_other(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        Path(folder).mkdir()
        Image.new("RGB", (16, 16), (200, 30, 60)).save(f"{folder}/x.png")
    shown = list(showing.show(loaded(), ["one", "two"], tmp_path, classes=["owl"]))
    assert [Path(one.picture).name for one in shown] == ["x-owl.png", "x-owl-2.png"]


def test_overlays_are_bright_where_it_is_hot_and_grey_where_it_is_cold() -> None:
    image = Image.new("RGB", (40, 40), (40, 160, 90))
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[0, 3] = 1.0
    shown = np.asarray(pictures.overlay(image, heat)).astype(int)
    assert shown.shape == (40, 40, 3)
    hot, cold = shown[2, 37], shown[35, 5]
    assert hot.sum() > cold.sum() + 150
    assert cold.max() - cold.min() < 0.5 * (160 - 40)  # colours are for what is hot
    assert (pictures.coloured(np.array([[0.0, 1.0]]))[0].round() == [[0, 0, 4], [252, 255, 164]]).all()
    rise = pictures.coloured(np.linspace(0, 1, 256)[None])[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(rise) > -0.5).all()


def test_panels_hold_both_pictures_and_cut_long_captions() -> None:
    image = Image.new("RGB", (64, 32), (10, 200, 30))
    found = pictures.panel(image, np.ones((2, 4)), "w" * 500, "quiet", side=200)
    assert found.width == 2 * 16 + 2 * 200 + 2 * 12 + 10 and found.height == 100 + 2 * 16 + 58
    pixels = np.asarray(found)
    assert tuple(pixels[60, 100]) == (10, 200, 30)
    assert (pixels[:, -10:] == pictures.PAPER).all()


@pytest.mark.data
@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"needs {WEIGHTS}")
def test_a_published_network_sees_the_bird(capsys: pytest.CaptureFixture[str]) -> None:
    """The centre of the map is on the bird's neck, where people look, too."""
    import io
    import zipfile

    archive = zipfile.ZipFile(SHARED / "cls" / "imagenet-sample-1000.zip")
    name = next(name for name in archive.namelist() if "European_gallinule" in name)
    Image.open(io.BytesIO(archive.read(name))).convert("RGB").save("bird.png")
    code, out, _ = _run(capsys, "explain", f"timm/mobilenetv2_100?weights={WEIGHTS}", "bird.png", "--json")
    (found,) = json.loads(out)["images"]
    assert code == 0 and found["label"] == "European gallinule" and found["score"] == pytest.approx(0.978, abs=0.01)
    x, y = found["centre"]
    assert abs(x - 108) < 12 and abs(y - 90) < 12
