import pytest
import torch
from tiny import Net
from torch import nn

from vertebra.errors import UsageError
from vertebra.training import speed


def test_auto_precision_follows_processor_and_network(monkeypatch) -> None:
    cpu, plain = torch.device("cpu"), Net()
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    monkeypatch.setattr(speed, "cpu_has_bf16", lambda: True)
    assert speed.resolve("auto", cpu, plain) == "bf16-mixed"
    assert speed.resolve("auto", cpu, depthwise) == "32-true"
    assert speed.resolve("auto", torch.device("mps"), plain) == "32-true"
    monkeypatch.setattr(speed, "cpu_has_bf16", lambda: False)
    assert speed.resolve("auto", cpu, plain) == "32-true"
    assert speed.resolve("bf16-mixed", cpu, depthwise) == "bf16-mixed"


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match="16-mixed, which needs a GPU"):
        speed.resolve("16-mixed", torch.device("cpu"), Net())


def test_channels_last_is_for_networks_of_convolutions() -> None:
    assert speed.prefers_channels_last(Net())
    assert not speed.prefers_channels_last(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Linear(4, 4)))
    assert not speed.prefers_channels_last(nn.Linear(2, 2))
