import pytest
import torch

from vertebra.errors import UsageError
from vertebra.probes.memory import Alive, inference_bytes, memory, training_bytes


def test_tensors_count_while_somebody_holds_them() -> None:
    with Alive() as alive:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = b.view(10, 100)  # a view is no new memory
        d = torch.zeros(500)  # 4,000 + 2,000
        del b, c, d
        torch.zeros(100)
    assert alive.most == 8000


def test_inference_holds_weights_input_and_the_larger_pair_of_maps(tiny) -> None:
    weights = 4 * (16 * 9 + 16)
    image, maps = 4 * 64, 4 * 16 * 16
    assert inference_bytes(tiny, 1) == weights + image + 2 * maps  # the convolution's and the rectified maps
    assert inference_bytes(tiny, 4) == weights + 4 * (image + 2 * maps)


def test_training_adds_gradients_and_moments_and_leaves_the_backbone_alone(tiny) -> None:
    before = tiny.conv.weight.clone()
    training = training_bytes(tiny, 4)
    assert training > inference_bytes(tiny, 4) + 3 * 4 * (16 * 9 + 16)
    assert training == training_bytes(tiny, 4)
    assert torch.equal(tiny.conv.weight, before) and tiny.conv.weight.grad is None and not tiny.conv.weight.is_meta


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="batch is 0"):
        memory(batch=0)
