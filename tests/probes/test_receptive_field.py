import math

import pytest
import torch
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.probes.evidence import Evidence
from vertebra.probes.receptive_field import contributions, receptive_field, share_radius


class Stack(Backbone):
    """Any layers; two levels: the image itself and what they make of it."""

    def __init__(self, *layers: nn.Module, channels: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.levels, self.width = (Level(channels, 1), Level(channels, stride)), channels
        self.preprocess = Preprocess((33, 33), (0.5,) * channels, (0.5,) * channels)

    def forward(self, images: Tensor) -> Features:
        maps = self.layers(images)
        return Features((images, maps), maps.mean((2, 3)))

    def trunk(self) -> tuple[nn.Module, ...]:
        return (self.layers,)


def box(kernel: int, stride: int = 1) -> nn.Conv2d:
    """A mean over k x k."""
    conv = nn.Conv2d(1, 1, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.constant_(conv.weight, 1 / kernel**2)
    return conv


def noise(count: int = 2, channels: int = 1, side: int = 33) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", [1, 3, 7, 13])
@pytest.mark.parametrize("side", [32, 33])
def test_one_convolution_has_the_field_of_its_kernel(kernel: int, side: int) -> None:
    found = contributions(Stack(box(kernel)).eval(), noise(side=side))
    expected = torch.zeros(side, side, dtype=torch.float64)
    first = side // 2 - kernel // 2
    expected[first : first + kernel, first : first + kernel] = 1 / kernel**2
    torch.testing.assert_close(found, expected)
    assert share_radius(found, 1) == pytest.approx(kernel / side)


def test_shares_of_a_box_are_squares_inside_it() -> None:
    found = contributions(Stack(box(13)).eval(), noise())
    for share in (0.2, 0.3, 0.5, 0.99):
        side = next(odd for odd in range(1, 15, 2) if odd**2 >= share * 13**2)
        assert share_radius(found, share) == pytest.approx(side / 33)


def test_gradients_are_absolute_summed_over_colours_and_cells_and_averaged_over_images() -> None:
    net = nn.Conv2d(3, 5, 3, padding=1)
    images = noise(3, 3, 9)
    scaled = Stack(net, channels=3).eval()
    by_hand = net.weight.sum(0).abs().sum(0).double()  # (3, 3): the cells' sum first, then the absolute colours
    torch.testing.assert_close(contributions(scaled, images)[3:6, 3:6], by_hand.detach())
    gated = Stack(nn.ReLU()).eval()
    centre = torch.tensor([2.0, -1.0, 3.0, -4.0])[:, None, None, None].expand(4, 1, 5, 5)
    assert contributions(gated, centre)[2, 2] == 0.5  # open for two of four


def test_more_images_than_a_batch_give_the_mean_of_the_parts() -> None:
    net = Stack(nn.Conv2d(1, 4, 5, padding=2), nn.Tanh(), nn.Conv2d(4, 1, 5, padding=2)).eval()
    images = noise(40)
    whole = contributions(net, images)
    parts = (16 * contributions(net, images[:16]) + 24 * contributions(net, images[16:])) / 40
    torch.testing.assert_close(whole, parts)
    assert whole.dtype == torch.float64 and whole.shape == (33, 33)


def test_the_level_is_the_one_that_is_asked_for() -> None:
    net = Stack(box(5), box(5)).eval()
    assert share_radius(contributions(net, noise(), level=0), 1) == pytest.approx(1 / 33)
    assert share_radius(contributions(net, noise(), level=-1), 1) == pytest.approx(9 / 33)


def test_a_stack_of_means_grows_with_the_root_of_its_depth_and_with_its_kernel() -> None:
    """Luo et al., arXiv 1701.04128: n steps of variance (k^2 - 1) / 12 spread as the root of their sum."""

    def field(depth: int, kernel: int) -> float:
        return 401 * share_radius(contributions(Stack(*[box(kernel)] * depth).eval(), noise(1, side=401)), 0.5)

    shallow, deep = field(4, 5), field(64, 5)
    assert deep / shallow == pytest.approx(math.sqrt(64 / 4), rel=0.15)
    assert field(16, 21) / field(16, 5) == pytest.approx(math.sqrt((21**2 - 1) / (5**2 - 1)), rel=0.1)


def test_strides_widen_the_field_in_pixels() -> None:
    net = Stack(box(3, stride=2), box(3, stride=2), stride=4).eval()
    assert share_radius(contributions(net, noise()), 1) == pytest.approx(7 / 33)  # 3 + 2 * 2


def test_a_long_image_is_measured_by_its_longer_side() -> None:
    images = torch.randn(1, 1, 9, 41)
    assert share_radius(contributions(Stack(box(13)).eval(), images), 1) == pytest.approx(13 / 41)
    assert share_radius(torch.ones(9, 41), 1) == 1


def test_what_hears_nothing_has_no_field() -> None:
    dead = Stack(box(3))
    nn.init.zeros_(dead.layers[0].weight)  # type: ignore[arg-type]
    found = contributions(dead.eval(), noise())
    assert not found.any() and share_radius(found, 0.5) == 0


def test_works_within_inference_mode_and_leaves_the_backbone_alone() -> None:
    net = Stack(box(3)).eval()
    with torch.inference_mode():
        found = contributions(net, noise())
    torch.testing.assert_close(found, contributions(net, noise()))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_cannot_be_measured_is_refused() -> None:
    net = Stack(box(3))
    with pytest.raises(UsageError, match="training mode"):
        contributions(net.train(), noise())
    with pytest.raises(UsageError, match="no images"):
        contributions(net.eval(), noise()[:0])
    with pytest.raises(UsageError, match="level is 2; the pyramid has 2"):
        contributions(net.eval(), noise(), level=2)
    for share in (0, 1.5, math.nan):
        with pytest.raises(UsageError, match="share is"):
            share_radius(torch.ones(3, 3), share)
    with pytest.raises(UsageError, match=r"\(H, W\)"):
        share_radius(torch.ones(1, 3, 3), 0.5)
    with pytest.raises(UsageError, match="finite"):
        share_radius(torch.full((3, 3), math.nan), 0.5)
    with pytest.raises(UsageError, match="images is 0"):
        receptive_field(images=0)


def test_report_is_the_field_of_the_test_images(evidence: Evidence) -> None:
    report = receptive_field(images=30)(evidence.backbone, evidence)
    assert list(report.scores) == ["field_50", "field_20", "field_30", "field_99"]
    assert {name: score.n for name, score in report.scores.items()} == dict.fromkeys(report.scores, 30)
    assert report.scores["field_99"].value == pytest.approx(100 * 3 / 8)  # one 3 x 3 convolution on 8 pixels
    sides = [report.scores[f"field_{share}"].value for share in (20, 30, 50, 99)]
    assert sides == sorted(sides)
    assert report.details["within"]["share"][-1] == 100 and report.details["within"]["side"][-1] == 100
