"""Counts, parity with the PyTorch port of the published weights, selective kernels in numpy, TensorFlow's padding."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from safetensors.torch import save_file
from torch import Tensor, nn

from vertebra.backbones import sk_resnet as page
from vertebra.backbones.sk_resnet import VARIANTS, AveragePool, MaxPool, Selective, published, sk_resnet
from vertebra.errors import UsageError, VertebraError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sk_resnet.json").read_text(encoding="utf-8"))
TINY = {"depths": (1, 1, 2, 1), "dim": 4, "kernels": "selective"}


def filled(network: nn.Module) -> dict[str, Tensor]:
    """Weights that are a function of their names: He-scaled convolutions, norms near one."""
    state = network.state_dict()
    for name, tensor in state.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        shape = tuple(tensor.shape)
        if tensor.ndim == 4:
            values = random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            values = random.random(shape) + 0.5
        else:
            values = random.random(shape) / 2 + 0.25 if name.endswith("weight") else (random.random(shape) - 0.5) / 5
        if tensor.is_floating_point():
            state[name] = torch.from_numpy(values).float()
    return state


def pattern(height: int, width: int) -> Tensor:
    """Two images (2, 3, height, width) that are no noise and have no symmetry."""
    ramp = torch.linspace(0, 1, 3 * height * width, dtype=torch.float64).reshape(3, height, width)
    image = (ramp.sin() * 37).sin().float()
    return torch.stack([image, image.flip(2)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoders_have_the_published_counts(variant: str) -> None:
    with torch.device("meta"):
        network = sk_resnet(variant)
    found = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(found, 3) == GOLDEN["variants"][variant]["encoder_m"]
    assert network.width == 2048 * VARIANTS[variant]["width"]


@pytest.mark.parametrize("case", GOLDEN["outputs"], ids=lambda case: f"{case['variant']}-{case['size'][0]}")
def test_outputs_are_the_ports(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros_count(self: AveragePool, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, self.stride)

    # the port's own poolings: torch's padding of maxima, and at stride 1 means that count what was padded
    monkeypatch.setattr(MaxPool, "forward", lambda self, x: F.max_pool2d(x, 3, 2, 1))
    monkeypatch.setattr(AveragePool, "forward", zeros_count)
    network = sk_resnet(case["variant"]).eval()
    network.load_state_dict(filled(network))
    with torch.no_grad():
        pooled = network(pattern(*case["size"])).pooled
    torch.testing.assert_close(pooled[:, ::293].flatten(), torch.tensor(case["values"]), atol=1e-4, rtol=1e-4)


def test_a_selective_convolution_is_the_papers() -> None:
    torch.manual_seed(0)
    layer = Selective(dim=6, stride=2).eval()
    layer.load_state_dict(filled(layer))
    x = torch.randn(2, 6, 7, 9)
    with torch.no_grad():
        streams, found = layer.streams(x).numpy(), layer(x).numpy()
    first, second = streams[:, :6], streams[:, 6:]
    seen = (first + second).mean((2, 3))
    state = {name: tensor.numpy() for name, tensor in layer.mixing.state_dict().items()}
    hidden = seen @ state["0.weight"][:, :, 0, 0].T
    hidden = (hidden - state["1.running_mean"]) / np.sqrt(state["1.running_var"] + 1e-5)
    hidden = np.maximum(hidden * state["1.weight"] + state["1.bias"], 0)
    logits = (hidden @ state["3.weight"][:, :, 0, 0].T).reshape(2, 2, 6)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = first * shares[:, 0, :, None, None] + second * shares[:, 1, :, None, None]
    assert state["0.weight"].shape[0] == 32 and found.shape == (2, 6, 4, 5)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_poolings_pad_as_tensorflow_does() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert MaxPool()(x).tolist() == [[[[10.0, 11.0], [14.0, 15.0]]]]  # padded at the end alone
    assert MaxPool()(x[..., :3, :3]).tolist() == [[[[5.0, 6.0], [9.0, 10.0]]]]  # of an odd side, at both ends
    assert AveragePool(1)(x)[0, 0, 3].tolist() == [12.5, 13.5, 14.5, 15.0]  # what is padded does not count
    assert AveragePool(2)(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert AveragePool(2)(x[..., :3])[0, 0, :, 1].tolist() == [2.0, 6.0]  # here it does


def test_a_block_starts_as_its_shortcut_and_the_stem_follows_the_kernels() -> None:
    network = sk_resnet(**TINY)
    block = network.stages[2][1]
    x = torch.rand(2, 64, 5, 5)
    assert torch.equal(block.train()(x), x)
    convolutions = [tuple(m.weight.shape) for m in network.stem if isinstance(m, nn.Conv2d)]
    assert convolutions == [(2, 3, 3, 3), (2, 2, 3, 3), (4, 2, 3, 3)]
    assert sk_resnet(**{**TINY, "kernels": "plain"}).stem[0].kernel_size == (7, 7)
    small = sk_resnet(**TINY, stem="small")
    assert small.preprocess.size == (32, 32) and [level.stride for level in small.levels] == [1, 2, 4, 8]
    assert [tuple(m.shape[2:]) for m in small(torch.rand(2, 3, 32, 24)).pyramid] == [(32, 24), (16, 12), (8, 6), (4, 3)]


def test_weights_come_from_files_of_ours_and_of_the_port(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = sk_resnet(**TINY)
    save_file({f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "a.safetensors")
    again = sk_resnet(**TINY, weights=str(tmp_path / "a.safetensors"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.eval()(images).pooled, source.eval()(images).pooled)
    assert again.weights_info and again.weights_info.sha256
    port = {"net.0.4.weight": "stem.6.weight", "net.0.5.0.bias": "stem.7.bias"}
    port |= {"net.2.blocks.10.net.2.mixing_conv.1.0.running_var": "stages.1.10.middle.mixing.1.running_var"}
    port |= {"net.1.blocks.0.projection.shortcut.2.weight": "stages.0.0.shortcut.1.weight"}
    port |= {"net.4.blocks.2.net.3.0.weight": "stages.3.2.middle.1.weight", "fc.weight": "fc.weight"}
    port |= {"net.4.blocks.2.net.3.weight": "stages.3.2.expand.0.weight"}
    zeros = {name: torch.zeros(()) for name in port}
    assert list(published(zeros, source)) == list(port.values())
    with pytest.raises(VertebraError, match="do not fit"):
        sk_resnet(**{**TINY, "dim": 8}, weights=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "50_1x_skk"}, "did you mean 50_1x_sk"),
        ({"depths": (3, 4, 6)}, "four stages"),
        ({"width": 0}, "at least 1"),
        ({"kernels": "sk"}, "plain or selective"),
        ({"stem": "cifar"}, "large or small"),
        ({"weights": "pretrained"}, "no weights that are fetched"),
    ],
)
def test_options_are_checked(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        page.sk_resnet(**options)
