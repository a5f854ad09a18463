import torch
from torch import nn

from vertebra.training.averaging import Average


def test_average_follows_its_equation_for_parameters_and_batch_norm_statistics() -> None:
    norm = nn.BatchNorm1d(1)
    average = Average(norm, decay=0.25)
    norm.weight.data.fill_(5.0)
    norm.running_mean.fill_(8.0)
    norm.num_batches_tracked.fill_(3)
    average.update()
    decay = 2 / 11  # (1 + t) / (10 + t) at t = 1
    torch.testing.assert_close(average.tensors["weight"], torch.tensor([decay * 1 + (1 - decay) * 5]))
    torch.testing.assert_close(average.tensors["running_mean"], torch.tensor([(1 - decay) * 8]))
    assert average.tensors["num_batches_tracked"] == 3
    average.update()
    average.update()
    mean = (1 - decay) * 8
    for decay in (0.25, 0.25):  # 3 / 12 and min(0.25, 4 / 13)
        mean = decay * mean + (1 - decay) * 8
    torch.testing.assert_close(average.tensors["running_mean"], torch.tensor([mean]))


def test_inside_lends_the_averages_and_gives_the_weights_back() -> None:
    layer = nn.Linear(2, 2)
    average, start = Average(layer, 0.9), layer.weight.detach().clone()
    layer.weight.data.add_(1)
    with average.inside():
        assert torch.equal(layer.weight, start)
    assert torch.equal(layer.weight, start + 1) and torch.equal(average.tensors["weight"], start)
