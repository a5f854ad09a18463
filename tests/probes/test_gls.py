"""GLS maps: the similarity that GLSim selects by, at the size of the image, for any backbone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.contracts import Backbone, Features, Level
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.probes import faithfulness
from vertebra.probes.gls import gls, gls_boxes
from vertebra.spec import Spec
from vertebra.surgery.glsim import glsim
from vertebra.tasks.classify import classify


def vit() -> Any:
    return fill(Spec("timm/test_vit", {"image_size": 32, "network": {"patch_size": 8}}).build()).eval()


def test_a_map_is_the_cosine_of_class_token_and_patches():
    backbone, x = vit(), images((3, 3, 32, 32))
    with torch.inference_mode():
        features = backbone(x)
    assert features.tokens is not None
    expected = F.cosine_similarity(features.tokens[:, 1:], features.tokens[:, :1], dim=2).view(3, 4, 4)
    expected = expected - expected.amin((1, 2), keepdim=True)
    torch.testing.assert_close(gls(backbone, x, at="cells"), expected)
    maps = gls(backbone, x)
    assert maps.shape == (3, 32, 32) and maps.dtype == torch.float32 and not maps.requires_grad
    torch.testing.assert_close(maps, F.interpolate(expected[:, None], (32, 32), mode="bilinear")[:, 0])
    assert not torch.allclose(gls(backbone, x, similarity="l1", at="cells"), expected)


def test_with_or_without_head_and_second_look():
    backbone, x = vit(), images((2, 3, 32, 32))
    twice = glsim(backbone, select=3).model
    model = classify(twice, ("a", "b")).train()  # type: ignore[arg-type]
    plain = gls(backbone, x)
    assert torch.equal(gls(twice, x), plain) and torch.equal(gls(model, x), plain)
    assert model.training and all(p.grad is None for p in model.parameters())
    found = gls_boxes(model, x, select=3, crop="reference")
    assert torch.equal(found[:, [1, 0, 3, 2]], twice.boxes(x, backbone(x)))  # type: ignore[operator]


class Red(Backbone):
    """Cells are the colours of places of 8 pixels, and the whole is red."""

    def __init__(self) -> None:
        super().__init__()
        plain = cifar_resnet("nano")
        self.levels, self.width, self.preprocess = (Level(3, 8),), 3, plain.preprocess

    def forward(self, images):
        cells = F.avg_pool2d(images, 8)
        vector = torch.tensor([[1.0, 0, 0]]).expand(len(images), 3)
        return Features((cells,), vector, torch.cat([vector[:, None], cells.flatten(2).mT], 1))

    def trunk(self):
        return []


def test_maps_point_at_what_is_like_the_whole():
    """The pointing game, and the box in the order x, y."""
    x = torch.zeros(1, 3, 32, 32)
    x[:, 1] = 0.5
    x[:, 0, 8:16, 16:32] = 2
    backbone = Red()
    assert gls_boxes(backbone, x, select=2).tolist() == [[16, 8, 32, 16]]
    assert gls_boxes(backbone, x, select=2, crop="reference").tolist() == [[16, 8, 24, 16]]
    objects = torch.zeros(1, 32, 32, dtype=torch.bool)
    objects[:, 8:16, 16:32] = True
    maps = gls(backbone, x)
    assert faithfulness.pointing(maps, objects).item() == 1
    assert faithfulness.overlap(faithfulness.boxes(maps, threshold=0.5), [torch.tensor([[16, 8, 32, 16]])]) > 0.6


def test_a_network_without_tokens_is_compared_with_the_mean_of_its_cells():
    backbone, x = fill(cifar_resnet("nano")).eval(), images((2, 3, 33, 47))
    with torch.inference_mode():
        cells = backbone(x).pyramid[-1]
    expected = F.cosine_similarity(cells, cells.mean((2, 3), keepdim=True))
    torch.testing.assert_close(gls(backbone, x, at="cells"), expected - expected.amin((1, 2), keepdim=True))


def test_what_does_not_work_is_refused():
    x = images((2, 3, 32, 32))
    with pytest.raises(UsageError, match="is no backbone, nor a task model on one"):
        gls(nn.Conv2d(3, 3, 1), x)
    with pytest.raises(UsageError, match="at is 'pixels'; it can be image, cells"):
        gls(vit(), x, at="pixels")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="similarity is 'dot'"):
        gls(vit(), x, similarity="dot")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="crop is 'all'"):
        gls_boxes(vit(), x, crop="all")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="select is 0"):
        gls_boxes(vit(), x, select=0)
    with pytest.raises(UsageError, match="no map of the Timm has two cells at 8x8 pixels"):
        gls(Spec("timm/test_vit", {"image_size": 8, "network": {"patch_size": 8}}).build(), images((2, 3, 8, 8)))
