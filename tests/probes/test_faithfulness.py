"""A right map scores what it must, a wrong one does not, and a flat one gains nothing from the order of pixels."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from vertebra.contracts import Backbone, Features, Level, Preprocess
from vertebra.errors import UsageError
from vertebra.probes import faithfulness
from vertebra.tasks.classify import classify

SIDE = 24


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Images (2, 3, S, S) with a bright square each, where it is (2, S, S), and its box (2, 4)."""
    images = 0.1 * torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    objects = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    objects[0, 4:12, 2:10], objects[1, 10:20, 12:20] = True, True
    images += 2 * objects[:, None]
    return images, objects, torch.tensor([[2.0, 4, 10, 12], [12, 10, 20, 20]])


def brightness(images: Tensor, rows: Tensor) -> Tensor:
    """A stand-in for a network: the share of the squares' light that is there."""
    light = torch.tensor([64.0, 80.0])[rows] * 2
    return (images.clamp(min=0.5).mean(1) - 0.5).sum((1, 2)) / (0.75 * light)


def test_the_object_itself_is_the_most_faithful_map() -> None:
    images, objects, _ = scene()
    maps = {"object": objects.float(), "rest": (~objects).float(), "flat": torch.ones(2, SIDE, SIDE)}
    gone = {name: faithfulness.area(faithfulness.deletion(brightness, images, one)) for name, one in maps.items()}
    come = {name: faithfulness.area(faithfulness.insertion(brightness, images, one)) for name, one in maps.items()}
    for row in range(2):
        assert gone["object"][row] < gone["flat"][row] < gone["rest"][row]
        assert come["object"][row] > come["flat"][row] > come["rest"][row]


def test_curves_run_from_the_whole_image_to_none_of_it() -> None:
    images, objects, _ = scene()
    everyone = torch.arange(2)
    gone = faithfulness.deletion(brightness, images, objects.float(), steps=8)
    come = faithfulness.insertion(brightness, images, objects.float(), steps=8)
    whole = brightness(images, everyone)
    mean = brightness(images.mean((2, 3), keepdim=True).expand_as(images), everyone)
    torch.testing.assert_close(gone[:, [0, -1]], torch.stack([whole, mean], 1))
    torch.testing.assert_close(
        come[:, [0, -1]], torch.stack([brightness(faithfulness.blurred(images), everyone), whole], 1)
    )
    assert gone.shape == come.shape == (2, 9)
    assert (gone[0, 1:-1] - mean[0]).abs().max() < 0.05  # the square is 64 of 576 pixels: the first of 8 parts


def test_area_is_the_trapezoids() -> None:
    curves = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.2, 0.2]])
    torch.testing.assert_close(faithfulness.area(curves), torch.tensor([0.5, 0.2]))


def test_order_is_of_the_values_and_ties_are_not_in_reading_order() -> None:
    maps = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(2))
    places = faithfulness.order(maps)
    for one, place in zip(maps, places, strict=True):
        expected = np.empty(63, dtype=np.int64)
        expected[np.argsort(-one.numpy().ravel())] = np.arange(63)
        np.testing.assert_array_equal(place.numpy().ravel(), expected)
    flat = faithfulness.order(torch.zeros(2, 20, 20))
    assert torch.equal(flat[0], flat[1]) and sorted(flat[0].flatten().tolist()) == list(range(400))
    assert abs(np.corrcoef(flat[0].flatten(), np.arange(400))[0, 1]) < 0.15


def test_occlusion_finds_what_a_network_goes_by() -> None:
    images, objects, _ = scene()
    lost = faithfulness.occlusion(brightness, images, window=4, stride=2)
    assert lost.shape == (2, 11, 11)
    shares = faithfulness.windowed(objects.float(), window=4, stride=2)
    assert shares.shape == lost.shape
    mean = images.mean((2, 3), keepdim=True)
    covered = images[:1].clone()
    covered[:, :, 6:10, 4:8] = mean[:1]
    expected = brightness(images[:1], torch.tensor([0])) - brightness(covered, torch.tensor([0]))
    torch.testing.assert_close(lost[0, 3, 2], expected[0])
    assert (lost[shares == 1] > 0.15).all() and (lost[shares == 0].abs() < 1e-3).all()


def test_rank_correlation_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(4)
    first = torch.randint(0, 6, (3, 5, 5), generator=generator).float()
    second = first + torch.randint(0, 4, (3, 5, 5), generator=generator)
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(faithfulness.rank_correlation(first, second), expected, atol=1e-12)
    assert faithfulness.rank_correlation(torch.ones(1, 3, 3), first[:1, :3, :3]).item() == 0


def test_pointing_counts_the_largest_values() -> None:
    _, objects, _ = scene()
    maps = torch.zeros(2, SIDE, SIDE)
    maps[0, 5, 5] = maps[1, 0, 0] = 1
    assert faithfulness.pointing(maps, objects).tolist() == [1, 0]
    maps[1, 15, 15] = 1
    assert faithfulness.pointing(maps, objects).tolist() == [1, 0.5]
    flat = faithfulness.pointing(torch.zeros(2, SIDE, SIDE), objects)
    torch.testing.assert_close(flat, objects.double().mean((1, 2)))


def test_boxes_enclose_the_largest_segment_above_the_threshold() -> None:
    maps = torch.zeros(3, SIDE, SIDE)
    maps[0, 4:12, 2:10], maps[0, 20:22, 20:22] = 0.16, 1.0
    maps[1, 4:12, 2:10], maps[1, 20:22, 20:22] = 0.14, 1.0
    assert faithfulness.boxes(maps).tolist() == [[2, 4, 10, 12], [20, 20, 22, 22], [0, 0, 0, 0]]
    diagonal = torch.eye(4)[None].clone()
    assert faithfulness.boxes(diagonal).tolist() == [[0, 0, 1, 1]]
    shifted = maps - 0.1  # a map that does not start at zero: 15 % of it is another place
    assert faithfulness.boxes(shifted)[0].tolist() == [20, 20, 22, 22]


def test_overlap_is_with_the_best_of_the_true_boxes() -> None:
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 0, 0]])
    truth = [torch.tensor([[20, 20, 30, 30], [5, 0, 15, 10]]), torch.zeros(0, 4), torch.tensor([[0, 0, 4, 4]])]
    torch.testing.assert_close(faithfulness.overlap(found, truth), torch.tensor([1 / 3, 0, 0]))


def test_masks_of_boxes() -> None:
    _, objects, boxes = scene()
    assert torch.equal(faithfulness.within([boxes[:1], boxes[1:]], SIDE, SIDE), objects)
    both = faithfulness.within([boxes, torch.zeros(0, 4)], SIDE, SIDE)
    assert torch.equal(both[0], objects.any(0)) and not both[1].any()


def test_mass_and_centres() -> None:
    _, objects, boxes = scene()
    maps = objects.float() + 0.1
    inside = objects.sum((1, 2)) * 1.1
    torch.testing.assert_close(
        faithfulness.mass(maps, objects).float(), inside / (inside + (~objects).sum((1, 2)) * 0.1)
    )
    middle = torch.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], 1)
    torch.testing.assert_close(faithfulness.centres(maps).float(), middle)  # what is dim does not pull
    assert faithfulness.mass(torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)).item() == 0
    assert faithfulness.centres(torch.zeros(1, 4, 6)).tolist() == [[3, 2]]


def test_confidence_is_of_each_images_own_class_in_batches() -> None:
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    images = torch.arange(7).float().view(7, 1, 1, 1)
    targets, rows = torch.tensor([3, 1, 0]), torch.tensor([0, 0, 1, 2, 2, 1, 0])
    for multi in (False, True):
        ask = faithfulness.confidence(lambda x: {"logits": logits[x.flatten().long()]}, targets, multi=multi, batch=3)
        shares = logits.sigmoid() if multi else logits.softmax(1)
        torch.testing.assert_close(ask(images, rows), shares[torch.arange(7), targets[rows]])


class Two(Backbone):
    """Two convolutions and a table that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(4, 1, 1))
        self.levels, self.width = (Level(4, 1),), 4
        self.preprocess = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)

    def forward(self, images: Tensor) -> Features:
        maps = self.second(self.first(images).relu() + self.table)
        return Features((maps,), maps.mean((2, 3)))

    def trunk(self) -> list[nn.Module]:
        return [self.first, self.second]


def test_weights_are_drawn_anew_from_the_output_back() -> None:
    model = classify(Two(), ("a", "b"))
    nn.init.normal_(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def changed(parts: int | None) -> set[str]:
        other = faithfulness.randomised(model, parts=parts, seed=3)
        return {name for name, tensor in other.state_dict().items() if not torch.equal(tensor, before[name])}

    head = {"head.weight", "head.bias"}
    second = {"backbone.second.weight", "backbone.second.bias"}
    assert changed(0) == head
    assert changed(1) == head | second
    assert changed(None) == head | second | {"backbone.first.weight", "backbone.first.bias", "backbone.table"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = [faithfulness.randomised(model, seed=3).head.weight for _ in range(2)]
    assert torch.equal(again[0], again[1])
    with pytest.raises(UsageError, match="parts is 3; the trunk has 2"):
        faithfulness.randomised(model, parts=3)


def test_what_is_refused() -> None:
    images, _, _ = scene()
    with pytest.raises(UsageError, match=r"maps have shape \(2, 6, 6\).*resize the maps"):
        faithfulness.deletion(brightness, images, torch.zeros(2, 6, 6))
    with pytest.raises(UsageError, match="steps is 0"):
        faithfulness.insertion(brightness, images, torch.zeros(2, SIDE, SIDE), steps=0)
    with pytest.raises(UsageError, match="window 30 and stride 2 do not fit images of 24x24"):
        faithfulness.occlusion(brightness, images, window=30, stride=2)
