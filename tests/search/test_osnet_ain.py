"""The search for OSNet-AIN's instance norms: the mixture's arithmetic, its temperature, a run from start to finding."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.osnet import osnet
from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.config import Plan
from vertebra.contracts import Batch, Progress
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.search.osnet_ain import Mixture, Search, mixtures, osnet_ain, temperature
from vertebra.training.loop import fit

SMALL = {"dims": (8, 16, 16, 16), "features": 8, "streams": 2}


class Pictures:
    """Two batches an epoch of pictures whose class is their sign."""

    def __len__(self) -> int:
        return 2

    def epoch(self, epoch, start=0):
        for step in range(start, 2):
            targets = torch.arange(8) % 2
            noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(10 * epoch + step))
            yield Batch(noise + (2.0 * targets - 1)[:, None, None, None], targets, torch.arange(8))


def test_temperature_is_the_papers():
    at = [temperature(Progress(0, 1, epoch, 120)) for epoch in (0, 19, 20, 40, 60, 79, 80, 119)]
    assert at == [10, 10, 5, 2.5, 1.25, 1.25, 1, 1]
    twelve = [temperature(Progress(0, 1, epoch, 12)) for epoch in range(12)]
    assert twelve == [10, 10, 5, 5, 2.5, 2.5, 1.25, 1.25, 1, 1, 1, 1] and all(a >= b for a, b in pairwise(twelve))


def test_shares_are_the_softmax_of_log_strengths_and_gumbel_noise():
    mixture = Mixture(16, outputs=16)
    with torch.no_grad():
        mixture.strengths.copy_(torch.tensor([2.0, 1.0, -3.0, 1.0]))
    mixture.temperature = 1.0
    torch.testing.assert_close(mixture.eval().shares(), torch.tensor([0.5, 0.25, 0.0, 0.25]))
    assert mixture.strongest == "plain"
    mixture.train()
    torch.manual_seed(0)
    drawn = torch.stack([mixture.shares() for _ in range(4000)])
    torch.testing.assert_close(drawn.sum(1), torch.ones(4000))
    chosen = drawn.argmax(1).bincount(minlength=4) / 4000  # Gumbel's maximum draws in proportion to the strengths
    torch.testing.assert_close(chosen, torch.tensor([0.5, 0.25, 0.0, 0.25]), atol=0.025, rtol=0)
    mixture.temperature = 10.0
    hot = torch.stack([mixture.shares() for _ in range(400)])
    assert hot[:, [0, 1, 3]].std(0).max() < 0.5 * drawn[:, [0, 1, 3]].std(0).min()  # hotter is more even


def test_a_mixture_is_the_mean_of_its_candidates_by_share():
    mixture, x = fill(Mixture(16, outputs=24)).eval(), images((2, 16, 6, 5))
    with torch.inference_mode():
        expected = sum(share * block(x) for share, block in zip(mixture.shares(), mixture.candidates, strict=True))
        torch.testing.assert_close(mixture(x), expected)
    mixture.train()(x).square().sum().backward()
    assert mixture.strengths.grad.abs().sum() > 0


def test_the_network_is_of_six_mixtures_and_norms_without_gains():
    backbone = osnet_ain("nano", **SMALL).network()
    assert len(mixtures(backbone)) == 6 and backbone.width == 8
    assert [level.stride for level in backbone.levels] == [1, 2, 4, 8]
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | InstanceNorm)]
    assert norms and all(norm.weight is None and norm.bias is None for norm in norms)
    inner = {n.rpartition(".")[2] for n, _ in backbone.named_parameters()}
    assert inner == {"weight", "bias", "strengths"}


def test_a_run_finds_a_placement_and_moves_the_strengths():
    torch.manual_seed(0)
    places = osnet_ain("nano", **SMALL)
    backbone = places.network()
    method = Search(backbone, ["dark", "bright"])
    history = fit(method, Pictures(), Plan(epochs=6, batch=8, lr=5e-3, warmup_epochs=0, workers=0), device="cpu")
    assert history.losses[-1] < history.losses[0]
    assert {mixture.temperature for mixture in mixtures(backbone)} == {1.0}
    strengths = torch.stack([mixture.strengths.detach() for mixture in mixtures(backbone)])
    assert ((strengths - 1).abs().amax(1) > 1e-3).all()
    spec = places.found(backbone)
    assert spec.options["placement"] == tuple(mixture.strongest for mixture in mixtures(backbone))
    child = spec.build()
    assert child.stem[1].weight is not None  # the network that stays has gains and shifts again


def test_the_papers_placement_is_in_the_space():
    places = osnet_ain("x0_25")
    spec = places.spec(("inside", "inside", "plain", "inside", "inside", "plain"))
    with torch.device("meta"):
        found, known = spec.build().state_dict(), osnet("ain_x0_25").state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in known.items()}
    assert places.cost(spec).params == sum(p.numel() for p in osnet("ain_x0_25").parameters())
    drawn = [places.sample(np.random.default_rng(seed)).options["placement"] for seed in range(20)]
    assert len(set(drawn)) == 20 and {name for one in drawn for name in one} == {"plain", "inside", "outside", "both"}
    assert places.sample(np.random.default_rng(3)) == places.sample(np.random.default_rng(3))


def test_outside_of_training_nothing_is_drawn():
    mixture = Mixture(16).eval()
    assert torch.equal(mixture.shares(), mixture.shares()) and math.isclose(float(mixture.shares().detach().sum()), 1)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(UsageError, match="placement is what is searched for"):
        osnet_ain("nano", placement=("plain",) * 6)
    with pytest.raises(UsageError, match="no variant 'x1'"):
        osnet_ain("x1")
    with pytest.raises(UsageError, match="no mixtures to search"):
        Search(osnet("nano"), ["a", "b"])
