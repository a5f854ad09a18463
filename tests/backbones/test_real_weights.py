"""Real weights on real images: a published MobileNetV2 must score what was measured for it elsewhere."""

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vertebra.backbones.timm import timm
from vertebra.shipping.weights import classifier

SHARED = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
WEIGHTS = SHARED / "weights" / "mobilenetv2_100_224_tf2.fp16.safetensors"
IMAGENET = SHARED / "cls" / "imagenet-sample-1000.zip"
CLOTHING = SHARED / "cls" / "clothing10-112.zip"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"needs {WEIGHTS}"),
]


@pytest.fixture(scope="module")
def mobilenet():
    return timm("mobilenetv2_100", weights=str(WEIGHTS)).eval()


def pooled(backbone, images: list[np.ndarray]) -> torch.Tensor:
    """Features (n, width) of uint8 images (H, W, 3) that have the network's size already."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.preprocess.mean, backbone.preprocess.std))
    found = []
    for start in range(0, len(images), 4):  # larger batches spend their time on fresh memory
        batch = torch.from_numpy(np.stack(images[start : start + 4])).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            found.append(backbone(((batch - mean) / std).contiguous()).pooled)
    return torch.cat(found)


def opened(archive: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(archive.read(name))).convert("RGB")


def test_the_file_says_how_to_build_and_to_feed_the_network(mobilenet):
    assert type(mobilenet.network.conv_stem).__name__ == "Conv2dSame"
    assert mobilenet.preprocess.mean == mobilenet.preprocess.std == (0.5, 0.5, 0.5)
    assert (mobilenet.preprocess.size, mobilenet.preprocess.crop) == ((224, 224), 0.875)
    assert mobilenet.weights_info.licence == "Apache-2.0"
    assert mobilenet.weights_info.sha256.startswith("c639ca767bc3945e")


def test_imagenet_top1(mobilenet):
    archive = zipfile.ZipFile(IMAGENET)
    table = next(name for name in archive.namelist() if name.endswith("labels.csv"))
    rows = list(csv.DictReader(archive.read(table).decode().splitlines()))
    files = {Path(name).name: name for name in archive.namelist()}
    images = [np.asarray(opened(archive, files[Path(row["file"]).name]).crop((16, 16, 240, 240))) for row in rows]
    assert {image.shape for image in images} == {(224, 224, 3)}  # the files are 256 pixels wide: 0.875 of that
    head = classifier("mobilenetv2_100", str(WEIGHTS))
    with torch.inference_mode():
        said = head(pooled(mobilenet, images)).argmax(1)
    truth = torch.tensor([int(row["index"]) for row in rows])
    assert 100 * (said == truth).float().mean().item() == pytest.approx(85.1, abs=0.5)


def test_linear_probe_on_clothing(mobilenet):
    archive = zipfile.ZipFile(CLOTHING)
    sets = {}
    for split in ("train", "test"):
        names = [name for name in archive.namelist() if f"/{split}/" in name and not name.endswith("/")]
        images = [np.asarray(opened(archive, name).resize((160, 160), Image.Resampling.BICUBIC)) for name in names]
        sets[split] = pooled(mobilenet, images).numpy(), np.array([Path(name).parent.name for name in names])
    scaler = StandardScaler().fit(sets["train"][0])
    probe = LogisticRegression(C=0.01, max_iter=500).fit(scaler.transform(sets["train"][0]), sets["train"][1])
    accuracy = 100 * probe.score(scaler.transform(sets["test"][0]), sets["test"][1])
    assert len(sets["train"][1]) == 900
    assert accuracy == pytest.approx(77.96, abs=1.0)
