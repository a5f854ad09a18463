import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.backbones.timm import timm
from vertebra.config import Plan, Views
from vertebra.contracts import Backbone, Measured, Preprocess, Progress, Settings
from vertebra.curricula import efficienttrain as page
from vertebra.curricula.efficienttrain import VARIANTS, EfficientTrain, effect, efficienttrain, relative_cost, scaled
from vertebra.data.digits import digits
from vertebra.data.loader import Batches
from vertebra.errors import Preempted, UsageError
from vertebra.methods.supervised import Supervised
from vertebra.spec import Spec
from vertebra.tasks.classify import classify
from vertebra.training import checkpoint
from vertebra.training.cost import count
from vertebra.training.loop import fit


def _sizes(curriculum: EfficientTrain, epochs: int) -> list[int]:
    found = []
    for epoch in range(epochs):
        asked = curriculum.settings(Progress(7 * epoch, 7 * epochs, epoch, epochs))
        assert (asked.band is None or asked.image_size is None) and asked.augmentation is None
        found.append(asked.band or asked.image_size or curriculum.image_size)
    return found


def test_the_published_schedule_and_what_it_costs() -> None:
    curriculum = EfficientTrain(224)
    assert _sizes(curriculum, 300) == [160] * 180 + [192] * 60 + [224] * 60
    policies = [curriculum.settings(Progress(e, 300, e, 300)).policy for e in (0, 59, 60, 120, 180, 239, 240, 299)]
    assert policies == pytest.approx([1 / 9, 1 / 9, 3 / 9, 5 / 9, 7 / 9, 7 / 9, 1, 1])
    assert round(relative_cost((160, 160, 160, 192, 224), 224), 3) == 0.653
    assert curriculum.cost == pytest.approx(0.6531, abs=1e-4) and 1 / curriculum.cost == pytest.approx(1.53, abs=0.01)


def test_parts_of_the_later_schedule_cost_the_same_and_make_smaller_views() -> None:
    curriculum = EfficientTrain(224, **VARIANTS["plus"])
    epochs = curriculum.epochs_for(200)
    assert epochs == 455  # 20 full-size epochs a part: 2 x 108.9, 4 x 39.2 and 4 x 20
    sizes = _sizes(curriculum, epochs)
    assert [sizes.count(size) for size in (96, 160, 224)] == pytest.approx([218, 157, 80], abs=1)
    spent = sum((size / 224) ** 2 for size in sizes)
    assert spent == pytest.approx(200, abs=0.7)
    costs = [share * size**2 for share, size in zip(curriculum.shares, curriculum.sizes, strict=True)]
    assert costs == pytest.approx([costs[-1]] * 10)
    asked = curriculum.settings(Progress(0, 100, 0, 100))
    assert (asked.image_size, asked.band, asked.policy) == (96, None, 0)
    assert EfficientTrain(224, **VARIANTS["plus_deit"]).sizes == (96,) * 2 + (160,) * 4 + (192,) * 2 + (224,) * 2
    assert EfficientTrain(224, **VARIANTS["plus_convnext"]).sizes == (160,) * 6 + (224,) * 4


@pytest.mark.parametrize(
    ("image_size", "sizes"),
    [
        (32, (20, 24, 32)),
        (28, (20, 24, 28)),
        (128, (80, 96, 128)),
        (256, (160, 192, 256)),
        (8, (4, 6, 8)),
        (225, (160, 192, 225)),
    ],
)
def test_bands_are_scaled_to_multiples_that_strided_networks_take(image_size: int, sizes: tuple[int, ...]) -> None:
    assert EfficientTrain(image_size).sizes == (sizes[0],) * 3 + sizes[1:]
    assert scaled(18, image_size, image_size) == 18  # written for this size: as they are


def test_a_part_begins_on_its_very_step() -> None:
    for steps in (5, 35, 1001, 99_995):
        curriculum = EfficientTrain(224)
        starts = [math.ceil(steps * part / 5) for part in range(5)]
        for part, start in enumerate(starts):
            asked = curriculum.settings(Progress(start, steps, 0, 9)).policy
            assert asked == pytest.approx((2 * part + 1) / 9), (steps, part)
            if start:
                assert curriculum.settings(Progress(start - 1, steps, 0, 9)).policy == pytest.approx((2 * part - 1) / 9)


def test_the_last_epoch_sees_whole_images_however_few_there_are() -> None:
    for variant, epochs in (("iccv", 3), ("plus_deit", 10), ("plus", 1)):
        sizes = _sizes(EfficientTrain(224, **VARIANTS[variant]), epochs)
        assert sizes[-1] == 224 and all(size < 224 for size in sizes[:-1])


def test_the_policy_can_be_left_alone() -> None:
    curriculum = EfficientTrain(32, magnitudes=None)
    assert {curriculum.settings(Progress(step, 20, 0, 9)).policy for step in range(21)} == {None}


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_macs_of_convolutional_networks_follow_the_square_of_the_band(name: str) -> None:
    with torch.device("meta"):
        backbone = timm(name)
        full = count(backbone, size=(224, 224)).macs
        for band in (96, 160, 192):
            assert count(backbone, size=(band, band)).macs / full == pytest.approx((band / 224) ** 2, rel=0.01)


def test_transformers_cost_what_the_card_says() -> None:
    found = {}
    with torch.device("meta"):
        for name in ("deit_small_patch16_224", "swin_tiny_patch4_window7_224"):
            backbone = timm(name)
            full = count(backbone, size=(224, 224)).macs
            found[name[:4]] = [round(count(backbone, size=(band, band)).macs / full, 2) for band in (160, 192)]
    assert found == {"deit": [0.49, 0.72], "swin": [0.62, 0.81]}


NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "swin": ("swin_tiny_patch4_window7_224", {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}),
}
VIEWS = Views(scale=(0.8, 1.0), flip=0.0)
PLAN = Plan(epochs=10, batch=32, lr=3e-3, warmup_epochs=1.0, views=VIEWS, evaluate_every=10)


def _method(name: str, seed: int = 0) -> Supervised:
    torch.manual_seed(seed)
    network, options = NETWORKS[name]
    return Supervised(classify(timm(network, image_size=28, network=options), digits().classes))


class Watch:
    """A meter that stops the run after one step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def epoch(self, row: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize("name", NETWORKS)
def test_a_switch_changes_neither_parameters_nor_moments_nor_the_loss(name: str, tmp_path: Path) -> None:
    """Sizes 20, 24 and 28 are to a ViT of 4 x 4 patches and a Swin of 7 x 7 windows what 160, 192 and 224 are."""

    def loss(method: Supervised, band: int | None) -> float:
        batch = next(batches.with_settings(Settings(band=band)).epoch(99))
        training = method.training
        with torch.no_grad():
            found = float(method.eval()(batch, Progress(0, 1, 0, 1))["classify"])
        method.train(training)
        return found

    method = _method(name)
    split = digits().split("train").select(np.arange(192))
    batches = Batches(split, method.backbone.preprocess, views=VIEWS, batch=32, seed=0, workers=0)
    curriculum = efficienttrain(batches)
    shapes = {key: tuple(tensor.shape) for key, tensor in method.state_dict().items()}
    with pytest.raises(Preempted):  # at the end of the part of 20 pixels: 6 of 10 epochs
        fit(method, batches, PLAN, curriculum=curriculum, run_dir=tmp_path, meter=Watch(36))
    last = tmp_path / "checkpoints" / "last"
    before = loss(method, 20)

    from_disk = _method(name, seed=5)
    assert loss(from_disk, 20) != before
    sizes: list[int] = []
    from_disk.backbone.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    from_disk.load_state_dict(dict(checkpoint.load(last).tensors["model"]))
    assert loss(from_disk, 20) == before  # at the same size on the same batch
    sizes.clear()
    history = fit(from_disk, batches, PLAN, curriculum=curriculum, resume_from=last)
    assert sizes == [24] * 12 + [28] * 12
    rows = [row["loss"] for row in history.rows]
    assert rows[6] < 1.1 * rows[5] and rows[8] < 1.1 * rows[7]  # epochs on either side of each switch
    assert {key: tuple(tensor.shape) for key, tensor in from_disk.state_dict().items()} == shapes
    moments = checkpoint.load(last).tensors["optimizer"]
    trained = sorted(tuple(p.shape) for p in from_disk.parameters())
    for kind in ("exp_avg", "exp_avg_sq"):
        assert sorted(tuple(t.shape) for key, t in moments.items() if key.split(".")[-1] == kind) == trained


def test_what_is_no_schedule_is_refused() -> None:
    for options, words in (
        ({"bands": (160, 192)}, r"the last band is 192; training ends on whole images, at 224"),
        ({"bands": ()}, r"bands are \(\)"),
        ({"bands": (0, 224)}, r"each in 1..224"),
        ({"bands": (160, 256), "side": 224}, r"each in 1..224"),
        ({"bands": (160, 224)}, r"5 magnitudes for 2 bands"),
        ({"magnitudes": (1, 3, 5, 9, 7)}, r"none may be below 0 or above the last"),
        ({"magnitudes": (0, 0, 0, 0, 0)}, r"none may be below 0 or above the last"),
        ({"low_pass": "corp"}, r"low_pass is 'corp'; did you mean crop\?"),
        ({"parts": "time"}, r"parts is 'time'.*steps, compute"),
    ):
        with pytest.raises(UsageError, match=words):
            EfficientTrain(224, **options)  # type: ignore[arg-type]
    batches = Batches(
        digits().split("val"), Preprocess((16, 24), (0.5,), (0.5,)), views=VIEWS, batch=8, seed=0, workers=0
    )
    with pytest.raises(UsageError, match="16x24 pixels; set a square size"):
        efficienttrain(batches)
    with pytest.raises(UsageError, match=r"no variant 'pluss'; did you mean plus"):
        efficienttrain(batches, "pluss")
    with pytest.raises(UsageError, match=r"no option 'band'; did you mean bands"):
        Spec("efficienttrain", {"band": 3}, kind="curricula")


def test_the_effect_judges_each_network_by_three_things() -> None:
    assert effect("toy", None).data == "sprites of one shape: 2000 images to train on, 2000 to score, 12 classes"
    found = effect("toy", digits())
    assert list(found.arms) == ["plain", "efficienttrain", "fewer_epochs", "no_magnitudes", "resized"]

    def arm(top1: float, macs: float) -> dict[str, np.ndarray]:
        values = {"top1": top1, "macs": macs, "fit_seconds": 10 * macs}
        return {f"{name}_{net}": np.full(3, value) for net in ("cnn", "vit") for name, value in values.items()}

    good = {"plain": arm(60, 1), "efficienttrain": arm(59.6, 0.55), "fewer_epochs": arm(58, 0.55)}
    assert [check.holds for check in found.checks(Measured(good))] == [True] * 6
    bad = {"plain": arm(60, 1), "efficienttrain": arm(59, 0.7), "fewer_epochs": arm(59, 0.55)}
    assert [check.holds for check in found.checks(Measured(bad))] == [False] * 6
    assert "1.82 times as fast" in found.checks(Measured(good))[0].found


def test_every_arm_of_the_effect_spends_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = {
        "images": 32,
        "held": 40,
        "epochs": 5,
        "batch": 16,
        "width": 4,
        "vit": {**page._SETUPS["toy"]["vit"], "depth": 1},
    }
    monkeypatch.setitem(page._SETUPS, "toy", {**page._SETUPS["toy"], **tiny})
    found = effect("toy", digits())
    assert "30 images to train on, 40 to score, 10 classes" in found.data
    spent = {arm: found.measure(arm, 0, tmp_path) for arm in found.arms}
    assert all(values.keys() == found.metrics.keys() for values in spent.values())
    assert all(0 <= values["top1_cnn"] <= 100 and values["fit_seconds_vit"] > 0 for values in spent.values())
    macs = {arm: round(values["macs_cnn"], 2) for arm, values in spent.items()}
    cut = 0.55  # 0.6 x (20 / 32)^2 + 0.2 x (24 / 32)^2 + 0.2
    assert macs == {"plain": 1, "efficienttrain": cut, "fewer_epochs": 0.6, "no_magnitudes": cut, "resized": cut}


def test_the_effects_networks_are_of_the_size_that_it_claims() -> None:
    setup = page._SETUPS["toy"]
    nets: dict[str, Backbone] = {
        "cnn": cifar_resnet(blocks=2, width=setup["width"]),
        "vit": page._vit(setup["vit"], 32),
    }
    for net in nets.values():
        assert 5e6 < count(net).macs < 25e6
        assert [level.channels for level in net.levels] == [m.shape[1] for m in net(torch.zeros(1, 3, 32, 32)).pyramid]
    layers = [module for module in nets["cnn"].modules() if isinstance(module, torch.nn.Conv2d)]
    assert sum(layer.kernel_size == (3, 3) for layer in layers) == 13  # and the classifier
