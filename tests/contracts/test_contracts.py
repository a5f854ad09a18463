"""The contracts that no page of this version stands on yet: a smallest part for each must be able to keep them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra import contracts
from vertebra.contracts import (
    Batch,
    Cost,
    Curriculum,
    Features,
    Level,
    Method,
    Neck,
    Operated,
    Preprocess,
    Progress,
    Report,
    Score,
    Settings,
    Space,
    Study,
)
from vertebra.spec import Spec


class Halve(Neck):
    def __init__(self, levels: tuple[Level, ...], *, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in levels)
        self.levels = tuple(Level(width, level.stride) for level in levels)

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(conv(x) for conv, x in zip(self.maps, pyramid, strict=True))


class Grow(Curriculum):
    def settings(self, progress: Progress) -> Settings:
        return Settings(image_size=32 if progress.fraction < 0.5 else 64)


class Reconstruct(Method):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"pixels": (self.scale * batch.images - batch.images).square().mean()}


class Depths(Space):
    def sample(self, rng: np.random.Generator) -> Spec:
        return Spec("timm/" + rng.choice(["resnet18", "resnet34"]))

    def cost(self, spec: Spec) -> Cost:
        return Cost(params=len(spec.address), macs=0, activations=0, resolution=(1, 1))


class Law(Study):
    def __call__(self) -> Report:
        return Report({"exponent": Score(value=2.0, n=3, unit="")})


def test_neck_maps_a_pyramid_to_the_levels_it_declares() -> None:
    levels = (Level(8, 4), Level(16, 8))
    neck = Halve(levels, width=4)
    out = neck((torch.zeros(2, 8, 6, 5), torch.zeros(2, 16, 3, 3)))
    assert [(o.shape[1], level.stride) for o, level in zip(out, neck.levels, strict=True)] == [(4, 4), (4, 8)]


def test_curriculum_is_a_function_of_progress() -> None:
    sizes = [Grow().settings(Progress(step, 10, 0, 1)).image_size for step in (0, 4, 5, 10)]
    assert sizes == [32, 32, 64, 64]


def test_method_runs_in_anyones_loop() -> None:
    method = Reconstruct()
    losses = method(Batch(torch.ones(1, 3, 2, 2), None, torch.zeros(1)), Progress(0, 1, 0, 1))
    method.after_step(Progress(1, 1, 0, 1))
    assert sum(losses.values()).item() == 0


def test_space_samples_specs_and_prices_them() -> None:
    space = Depths()
    spec = space.sample(np.random.default_rng(0))
    assert isinstance(spec, Spec) and space.cost(spec).params == len(spec.address)


def test_study_reports_scores_and_surgery_says_what_changed() -> None:
    assert Law()().scores["exponent"].value == 2
    cost = Cost(1, 1, 1, (1, 1))
    assert Operated(nn.Identity(), ("stem",), cost, cost).changed == ("stem",)


@pytest.mark.parametrize("name", ["Backbone", "Neck", "TaskModel", "Method", "Curriculum", "Probe", "Space", "Study"])
def test_a_contract_cannot_be_built_bare(name: str) -> None:
    with pytest.raises(TypeError, match="abstract"):
        getattr(contracts, name)()


def test_preprocess_counts_its_channels_and_features_default_to_no_tokens() -> None:
    assert Preprocess((4, 4), (0.5,) * 13, (0.2,) * 13).channels == 13
    assert Features((), torch.zeros(1, 2)).tokens is None
