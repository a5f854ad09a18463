from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from vertebra.config import Views
from vertebra.contracts import Preprocess
from vertebra.data.digits import digits
from vertebra.data.views import crop_box, generator, least_viewed, mix, source, view
from vertebra.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = Preprocess((32, 32), MEAN, STD)
PLAIN = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    cells = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((133, 100))


def seen(image, index=0, epoch=0, seed=0, views=None, strength=1.0, preprocess=PREPROCESS):
    return view(image, index, epoch, seed, views or Views(), preprocess, strength)


def test_a_generator_depends_on_all_four_and_on_nothing_else():
    draws = {
        tuple(generator(*key).integers(1 << 40, size=2))
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, "order"), (-1, 0, 0), (0, 1, 1)]
    }
    assert len(draws) == 7
    assert generator(5, 2, 9).random() == generator(5, 2, 9).random()


@pytest.mark.parametrize("policy", ["none", "randaugment", "trivialaugment", "augmix"])
def test_a_view_is_a_function_of_seed_epoch_and_index(photo, policy):
    views = Views(policy=policy, jitter=0.4, erase=0.5)
    first = seen(photo, 3, 1, 7, views)
    torch.rand(3)
    np.testing.assert_array_equal(seen(photo, 3, 1, 7, views), first)
    np.testing.assert_array_equal(seen(source(photo, PREPROCESS), 3, 1, 7, views), first)
    for index, epoch, seed in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert (seen(photo, index, epoch, seed, views) != first).any()


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "augmix"])
def test_a_policy_leaves_the_global_generator_as_it_was(photo, policy):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plain = seen(photo)
    changed = [seen(photo, index, views=Views(policy=policy)) for index in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert any((view != plain).any() for view in changed)


def test_crops_are_distributed_as_random_resized_crop():
    from torchvision.transforms import v2

    views, (width, height) = Views(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)), (160, 90)
    ours = np.array([crop_box(width, height, views, generator(0, 0, index)) for index in range(3000)])
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=views.scale, ratio=views.ratio)
    blank = torch.empty(3, height, width)
    boxes = [crop.make_params([blank]) for _ in range(3000)]
    theirs = np.array([(box["left"], box["top"], box["width"], box["height"]) for box in boxes])
    assert ours.min() >= 0 and ours[:, 2].max() <= width and ours[:, 3].max() <= height
    across, down = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    for mine, peer in (
        (across * down, theirs[:, 2] * theirs[:, 3]),
        (across / down, theirs[:, 2] / theirs[:, 3]),
        (ours[:, 0], theirs[:, 0]),
        (ours[:, 1], theirs[:, 1]),
    ):
        assert ks_2samp(mine, peer).pvalue > 0.01


def test_a_shape_that_no_crop_fits_gives_the_central_one():
    views = Views(scale=(1.0, 1.0), ratio=(0.75, 1.3333))
    assert crop_box(400, 100, views, generator(0, 0, 0)) == (133, 0, 266, 100)
    assert crop_box(100, 400, views, generator(0, 0, 0)) == (0, 133, 100, 266)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_whole_image_is_resized_as_pillow_does_it(photo, interpolation):
    square = photo.crop((16, 0, 116, 100))
    views = seen(square, views=PLAIN, preprocess=replace(PREPROCESS, interpolation=interpolation))
    pillow = np.asarray(square.resize((32, 32), Image.Resampling[interpolation.upper()]))
    assert np.abs(views.astype(int) - pillow).max() <= 1


def test_no_strength_gives_the_central_square(photo):
    views = Views(scale=(0.1, 0.2), jitter=0.5, policy="randaugment", erase=1.0)
    expected = seen(photo.crop((16, 0, 116, 100)), views=PLAIN)
    np.testing.assert_array_equal(seen(photo, 5, 1, 2, views, strength=0.0), expected)


def test_flips_come_as_often_as_asked(photo):
    square = photo.crop((16, 0, 116, 100))
    upright = seen(square, views=PLAIN)
    flipped = [(seen(square, i, views=replace(PLAIN, flip=0.3)) == upright[:, ::-1]).all() for i in range(400)]
    assert np.mean(flipped) == pytest.approx(0.3, abs=0.06)


def test_jitter_changes_colours_within_its_strength(photo):
    square = photo.crop((16, 0, 116, 100))
    means = [seen(square, index, views=replace(PLAIN, jitter=0.2)).mean() for index in range(60)]
    plain = seen(square, views=PLAIN).mean()
    assert 0.75 * plain < min(means) < 0.95 * plain
    assert 1.05 * plain < max(means) < 1.25 * plain


def test_an_erased_rectangle_is_zero_to_the_network(photo):
    square = photo.crop((16, 0, 116, 100))
    plain, erased = (seen(square, views=replace(PLAIN, erase=erase)) for erase in (0.0, 1.0))
    changed = (plain != erased).any(-1)
    assert 0.01 < changed.mean() < 0.4
    np.testing.assert_array_equal(np.unique(erased[changed], axis=0), [[124, 116, 104]])


def test_tiny_grey_images_work():
    digit = digits().split("train").image(0)
    assert digit.size == (8, 8) and digit.mode == "L"
    for policy in ("none", "randaugment", "trivialaugment", "augmix"):
        for index in range(20):
            shown = seen(digit, index, views=Views(policy=policy, jitter=0.4, erase=1.0))
            assert shown.shape == (32, 32, 3) and shown.dtype == np.uint8
    one = seen(digit, preprocess=Preprocess((32, 32), (0.5,), (0.5,)))
    assert one.shape == (32, 32, 1) and one.std() > 10


def test_only_grey_and_rgb_networks_have_views(photo):
    with pytest.raises(UsageError, match="4 channels"):
        seen(photo, preprocess=Preprocess((8, 8), (0.5,) * 4, (0.5,) * 4))


def test_the_least_source_never_enlarges_a_crop():
    views = Views(scale=(0.25, 1.0))
    least, _ = least_viewed(views, PREPROCESS)
    for width, height in ((least, least), (least * 2, least)):
        boxes = np.array([crop_box(width, height, views, generator(0, 0, index)) for index in range(500)])
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 32 - 1


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 3, 16, 16), torch.arange(6) % 4


def test_mixup_mixes_neighbours_and_their_targets_alike(batch):
    images, targets = batch
    mixed, soft = mix(images.clone(), targets, 4, Views(mixup=1.0), seed=0, epoch=0, step=0)
    share = soft[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed[0], share * images[0] + (1 - share) * images[1])
    torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[0])


def test_cutmix_targets_are_the_areas(batch):
    images, targets = batch
    shares = []
    for step in range(20):
        mixed, soft = mix(images.clone(), targets, 4, Views(cutmix=1.0), seed=0, epoch=0, step=step)
        own = (mixed == images).all(1).float().mean((1, 2))
        torch.testing.assert_close(soft[:4].max(1).values, torch.maximum(own, 1 - own)[:4])
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        assert torch.equal(mixed.sort(0).values, images.sort(0).values)  # pixels only changed places
        shares.append(float(own[0]))
    assert np.std(shares) > 0.1


def test_mixing_depends_on_seed_epoch_and_step_alone(batch):
    images, targets = batch
    views = Views(mixup=0.4, cutmix=1.0)
    first = mix(images.clone(), targets, 4, views, seed=1, epoch=2, step=3)
    torch.rand(5)
    again = mix(images.clone(), targets, 4, views, seed=1, epoch=2, step=3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(mix(images.clone(), targets, 4, views, seed=1, epoch=2, step=4)[0], first[0])


def test_two_ranks_mix_as_one(batch):
    images, targets = batch
    views = Views(cutmix=1.0)
    whole = mix(images.clone(), targets, 4, views, seed=0, epoch=0, step=1)
    shares = [mix(images[part].clone(), targets[part], 4, views, 0, 0, 1) for part in (slice(0, 4), slice(4, 6))]
    assert torch.equal(torch.cat([images for images, _ in shares]), whole[0])
    assert torch.equal(torch.cat([soft for _, soft in shares]), whole[1])


def test_an_odd_image_and_no_strength_leave_things_as_they_are(batch):
    images, targets = batch
    mixed, soft = mix(images[:5].clone(), targets[:5], 4, Views(mixup=1.0), 0, 0, 0)
    assert torch.equal(mixed[4], images[4]) and soft[4].tolist() == [1, 0, 0, 0]
    calm, hard = mix(images.clone(), targets, 4, Views(mixup=1.0), 0, 0, 0, strength=0.0)
    assert torch.equal(calm, images) and set(hard.unique().tolist()) == {0.0, 1.0}


def test_many_labels_are_mixed_as_they_are(batch):
    images, _ = batch
    labels = torch.tensor([[1.0, 1.0, 0.0]] * 3 + [[0.0, 0.0, 0.0]] * 3)[[0, 3, 1, 4, 2, 5]]
    _, soft = mix(images.clone(), labels, 3, Views(mixup=1.0), 0, 0, 0)
    torch.testing.assert_close(soft[0] + soft[1], torch.tensor([1.0, 1.0, 0.0]))
