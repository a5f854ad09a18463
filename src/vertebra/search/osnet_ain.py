"""OSNet-AIN's search: which blocks of an OSNet get an instance norm, and where, found by one training.

Each of the six blocks is a mixture of four omni-scale blocks (`vertebra.blocks.omni_scale`): without instance norm,
with one inside of the residual, outside of it, and both. All four run; their shares are a softmax over logarithms of
learned strengths plus Gumbel noise, at a temperature that falls from 10 to 1. Strengths and weights follow one loss on
the same images (arXiv 1910.06827, section 3.3). The placement found is the strongest block of each mixture:

    places = osnet_ain("x0_25", image_size=(64, 32))
    backbone = places.network()
    fit(Search(backbone, identities), batches, plan)
    spec = places.found(backbone)                    # of osnet, with that placement

Departs from the reference in two things: the noise is for training alone, and convolutions start as OSNet's do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from vertebra.backbones.osnet import OSNet, OSNetOptions, osnet
from vertebra.blocks.instance_norm import InstanceNorm
from vertebra.blocks.omni_scale import VARIANTS as CANDIDATES
from vertebra.blocks.omni_scale import omni_scale
from vertebra.contracts import Backbone, Batch, Cost, Method, Progress, Space
from vertebra.errors import UsageError, near
from vertebra.spec import Spec
from vertebra.tasks.classify import classify
from vertebra.training.cost import count

VARIANTS = {
    "x1_0": {"backbone": "x1_0"},
    "x0_75": {"backbone": "x0_75"},
    "x0_5": {"backbone": "x0_5"},
    "x0_25": {"backbone": "x0_25"},
    "nano": {"backbone": "nano"},
}

HOTTEST, COOLEST, HALVINGS = 10.0, 1.0, 6
"""The temperature starts at the first, never falls below the second, and is halved so often in a run."""

_BLOCKS, _TINY = 6, 1e-12


def osnet_ain(variant: str = "x1_0", **options: Unpack[OSNetOptions]) -> "Places":
    """The space of placements for an OSNet.

    Args:
        variant: of `vertebra.backbones.osnet`, whose stem gets an instance norm.
        options: of `vertebra.backbones.osnet`, without its `placement`.

    Raises:
        UsageError: an unknown variant, or options that already say where the instance norms are.
    """
    if variant not in VARIANTS:
        raise UsageError(f"osnet_ain has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    if "placement" in options:
        raise UsageError("osnet_ain: placement is what is searched for; leave it out")
    return Places(str(VARIANTS[variant]["backbone"]), options)


class Places(Space):
    """Four places for each of six blocks: 4,096 networks; build it with `osnet_ain`.

    Attributes:
        variant: of `vertebra.backbones.osnet`.
        options: of every network.
    """

    def __init__(self, variant: str, options: Mapping[str, Any]) -> None:
        self.variant, self.options = variant, {"stem_norm": "instance", **options}

    def sample(self, rng: np.random.Generator) -> Spec:
        """The spec of a network whose placement is drawn evenly."""
        return self.spec([str(name) for name in rng.choice(list(CANDIDATES), _BLOCKS)])

    def spec(self, placement: Sequence[str]) -> Spec:
        """The spec of the network with a placement."""
        return Spec(f"osnet/{self.variant}", {**self.options, "placement": tuple(placement)})

    def cost(self, spec: Spec) -> Cost:
        """What the network of `spec` costs; all placements cost nearly the same."""
        with torch.device("meta"):
            return count(spec.build())

    def network(self) -> OSNet:
        """The network whose blocks are mixtures; its norms have no gains and shifts."""
        backbone = osnet(self.variant, **{**self.options, "placement": ("both",) * _BLOCKS})  # type: ignore[arg-type]
        dims = [level.channels for level in backbone.levels]
        middles, rest = self.options.get("middles"), ("streams", "gate")
        blocks = {name: self.options[name] for name in rest if name in self.options}
        for number, stage in enumerate(backbone.stages):
            assert isinstance(stage, nn.Sequential)
            made = {"outputs": dims[number + 1], "middle": middles[number] if middles else None, **blocks}
            stage[0], stage[1] = Mixture(dims[number], **made), Mixture(dims[number + 1], **made)
        for norm in backbone.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | InstanceNorm):
                norm.affine = False
                norm.register_parameter("weight", None)
                norm.register_parameter("bias", None)
        return backbone

    def found(self, backbone: OSNet) -> Spec:
        """The spec of the network that a trained mixture stands for: the strongest block of each."""
        return self.spec([mixture.strongest for mixture in mixtures(backbone)])


class Mixture(nn.Module):
    """Four omni-scale blocks, of which one will stay.

    Attributes:
        candidates: in the order of `vertebra.blocks.omni_scale.VARIANTS`.
        strengths: (4,) learned; below 0 counts as 0.
        temperature: of the softmax: high mixes evenly, low leaves it to strengths and noise.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(omni_scale(channels, name, **options) for name in CANDIDATES)
        self.strengths = nn.Parameter(torch.ones(len(CANDIDATES)))
        self.temperature = HOTTEST

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to the candidates' mean (B, outputs, H, W) by their shares of the moment."""
        shares = self.shares()
        mixed = self.candidates[0](x) * shares[0]
        for candidate, share in zip(self.candidates[1:], shares[1:], strict=True):
            mixed = torch.addcmul(mixed, candidate(x), share)
        return mixed

    def shares(self) -> Tensor:
        """Shares (4,) of the candidates, which sum to 1; drawn anew at each call in training mode."""
        logits = (self.strengths.relu() + _TINY).log()
        if self.training:
            logits = logits - (_TINY - (torch.rand_like(logits) + _TINY).log()).log()  # Gumbel noise
        return (logits / self.temperature).softmax(0)

    @property
    def strongest(self) -> str:
        """Name of the candidate with the largest strength."""
        return list(CANDIDATES)[int(self.strengths.argmax())]


def mixtures(backbone: nn.Module) -> list[Mixture]:
    """The mixtures of a network in the order of the signal."""
    return [module for module in backbone.modules() if isinstance(module, Mixture)]


def temperature(progress: Progress) -> float:
    """Temperature of an epoch: 10, halved after each sixth of the run until it is 1 (every 20 epochs of 120)."""
    return max(COOLEST, HOTTEST * 0.5 ** (HALVINGS * progress.epoch // max(1, progress.epochs)))


class Search(Method):
    """Train a network of mixtures to tell identities apart; strengths and weights follow the same loss.

    Attributes:
        task_model: the classifier of identities.
        backbone: of `Places.network`.
    """

    def __init__(self, backbone: OSNet, classes: Sequence[str], *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        if not mixtures(backbone):
            raise UsageError(
                "osnet_ain: the backbone has no mixtures to search; build it with osnet_ain(...).network()"
            )
        self.task_model = classify(backbone, classes, label_smoothing=label_smoothing)

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # a module registered twice would be saved twice
        return self.task_model.backbone

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The classifier's loss at the temperature of the epoch."""
        for mixture in mixtures(self.task_model.backbone):
            mixture.temperature = temperature(progress)
        return self.task_model.losses(self.task_model(batch.images), batch.targets)
