import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.config import Views
from vertebra.contracts import Preprocess, Settings
from vertebra.data.dataset import Split, Store
from vertebra.data.digits import digits
from vertebra.data.loader import Batches, automatic_workers
from vertebra.data.pixels import fitted, normalised
from vertebra.errors import DataError, UsageError

PREPROCESS = Preprocess((16, 16), (0.5,) * 3, (0.25,) * 3)
RICH = Views(jitter=0.3, erase=0.3, mixup=0.2, cutmix=1.0)


@dataclass(frozen=True, eq=False)
class Counting(Store):
    """Random images from memory; counts what it decodes, fails where it is told to."""

    pixels: np.ndarray
    broken: tuple[int, ...] = ()
    decoded: list[int] = field(default_factory=list)

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        self.decoded.append(index)
        if index in self.broken:
            raise DataError(f"image-{index}.png: is damaged")
        return Image.fromarray(self.pixels[index])

    def size_bytes(self, index: int) -> int:
        return 1


def split_of(count: int, broken: tuple[int, ...] = (), **changes) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    names = np.array([f"image-{index}.png" for index in range(count)])
    split = Split("train", ("a", "b", "c"), names, np.arange(count) % 3, Counting(pixels, broken), np.arange(count))
    return replace(split, **changes)


def loader(split: Split, views: Views | None = RICH, batch: int = 8, seed: int = 0, workers=0, **options) -> Batches:
    return Batches(split, PREPROCESS, views=views, batch=batch, seed=seed, workers=workers, **options)


def run(batches: Batches, epoch: int = 0, start: int = 0) -> list:
    return list(batches.epoch(epoch, start))


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (
            all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
            and not one.views
            and not other.views
        )


def ids(batches: list) -> list[int]:
    return torch.cat([batch.ids for batch in batches]).tolist()


def open_files() -> int:
    table = Path("/proc/self/fd")
    return len(list(table.iterdir())) if table.is_dir() else 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # three workers on two cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_byte(workers):
    split = split_of(37, broken=(5, 6, 30))
    alone = loader(split, on_error="skip")
    expected = [batch for epoch in range(2) for batch in run(alone, epoch)]
    open_before = open_files()
    batches = loader(split, workers=workers, on_error="skip")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    abandoned = batches.epoch(0)
    next(abandoned)
    abandoned.close()
    assert_same([batch for epoch in range(2) for batch in run(batches, epoch)], expected)
    assert_same(run(batches, 1, start=2), expected[-2:])
    assert torch.equal(torch.get_rng_state(), state)
    assert batches.bad == alone.bad and [bad.index for bad in batches.bad] == [5, 6, 30]
    batches.close()
    del abandoned, batches
    deadline = time.monotonic() + 10
    while open_files() > open_before + 2 and time.monotonic() < deadline:  # torch's own threads close theirs late
        time.sleep(0.05)
    assert open_files() <= open_before + 2  # the resource tracker's pipe stays


def test_an_unreadable_image_in_a_worker_is_named_as_in_this_process():
    batches = loader(split_of(16, broken=(4,)), workers=1)
    with pytest.raises(DataError) as caught:
        run(batches)
    assert str(caught.value) == "image-4.png: is damaged"
    batches.close()


def test_resuming_yields_the_rest_and_decodes_no_more():
    split = split_of(40)
    whole, resumed = run(loader(split), 3), loader(split, cache_bytes=0)
    split.store.decoded.clear()
    assert_same(run(resumed, 3, start=3), whole[3:])
    assert sorted(split.store.decoded) == sorted(ids(whole[3:]))
    assert run(resumed, 3, start=5) == []


def test_order_changes_with_epoch_and_seed_and_covers_the_split():
    split = split_of(32)
    batches = loader(split)
    first = ids(run(batches))
    assert sorted(first) == list(range(32))
    assert ids(run(batches)) == first
    assert ids(run(batches, 1)) != first
    assert ids(run(loader(split, seed=1))) != first


def test_evaluation_is_in_order_and_drops_nothing():
    split = split_of(19)
    batches = loader(split, None)
    found = run(batches)
    assert len(batches) == 3 and [len(batch.ids) for batch in found] == [8, 8, 3]
    assert ids(found) == list(range(19))
    expected = normalised(np.stack([fitted(split.image(index), PREPROCESS) for index in range(8)]), PREPROCESS)
    assert torch.equal(found[0].images, expected)
    assert found[0].targets.tolist() == split.targets[:8].tolist() and found[0].targets.dtype == torch.int64
    assert_same(run(batches, 1), found)


def test_training_drops_a_short_batch_unless_it_is_the_only_one():
    assert len(loader(split_of(19))) == 2 and len(run(loader(split_of(19)))) == 2
    assert [len(batch.ids) for batch in run(loader(split_of(19), drop_last=False))] == [8, 8, 3]
    assert [len(batch.ids) for batch in run(loader(split_of(5)))] == [5]
    assert [len(batch.ids) for batch in run(loader(split_of(5), world=2, rank=1))] == [2]


@pytest.mark.parametrize("views", [RICH, None])
def test_ranks_see_together_what_one_sees(views):
    split = split_of(29, broken=(3, 8))
    one = run(loader(split, views, batch=8, on_error="skip"))
    shares = [run(loader(split, views, batch=8, rank=rank, world=2, on_error="skip")) for rank in range(2)]
    for whole, left, right in zip(one, *shares, strict=True):
        for part, expected in enumerate(whole[:3]):
            assert torch.equal(torch.cat([left[part], right[part]]), expected)
    assert [len(batch.ids) for batch in shares[0]][:3] == [4, 4, 4]


def test_decoded_images_are_kept_and_change_nothing():
    for views in (RICH, None):
        split = split_of(24)
        kept, forgetful, small = (loader(split, views, cache_bytes=size) for size in (1 << 20, 0, 5000))
        expected = [batch for epoch in range(2) for batch in run(forgetful, epoch)]
        split.store.decoded.clear()
        assert_same([batch for epoch in range(2) for batch in run(kept, epoch)], expected)
        assert sorted(split.store.decoded) == list(range(24))
        assert_same([batch for epoch in range(2) for batch in run(small, epoch)], expected)


def test_an_unreadable_image_is_named_or_replaced():
    split = split_of(16, broken=(2, 9))
    with pytest.raises(DataError, match=r"image-\d\.png: is damaged"):
        run(loader(split))
    batches = loader(split, None, on_error="skip")
    found = run(batches)
    assert ids(found) == [0, 1, 3, 3, 4, 5, 6, 7, 8, 10, 10, 11, 12, 13, 14, 15]
    assert torch.equal(found[0].images[2], found[0].images[3]) and found[0].targets[2] == 0
    assert [tuple(bad) for bad in batches.bad] == [
        (2, "image-2.png", "image-2.png: is damaged"),
        (9, "image-9.png", "image-9.png: is damaged"),
    ]
    with pytest.raises(DataError, match=r"image-0\.png"):
        run(loader(split_of(8, broken=tuple(range(8))), None, on_error="skip"))


def test_targets_are_what_the_task_has():
    hard, mixed = run(loader(split_of(16), Views()))[0], run(loader(split_of(16)))[0]
    assert hard.targets.dtype == torch.int64 and torch.equal(hard.targets, hard.ids % 3)
    assert mixed.targets.shape == (8, 3)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(8))
    assert run(loader(split_of(16), mix_classes=5))[0].targets.shape == (8, 5)
    many = run(loader(split_of(16, targets=np.eye(3, dtype=np.uint8)[np.arange(16) % 3]), Views()))[0]
    assert many.targets.dtype == torch.float32 and many.targets.shape == (8, 3)
    unlabelled = split_of(16, targets=None)
    assert run(loader(unlabelled, Views()))[0].targets.tolist() == [-1] * 8
    with pytest.raises(DataError, match="no targets to mix"):
        loader(unlabelled)


def test_settings_make_copies_that_share_what_was_decoded():
    split = split_of(16)
    batches = loader(split, Views())
    plain = run(batches)
    small = batches.resized(8)
    assert run(small)[0].images.shape == (8, 3, 8, 8) and ids(run(small)) == ids(plain)
    calm = batches.with_settings(Settings(augmentation=0.0))
    split.store.decoded.clear()
    assert not torch.equal(run(calm)[0].images, plain[0].images)
    assert_same(run(calm), run(loader(split, Views(), strength=0.0)))
    assert_same(run(batches), plain)
    assert batches.with_settings(Settings()).preprocess == batches.preprocess


def test_weights_draw_more_of_what_weighs_more():
    batches = loader(split_of(40), Views())
    weights = torch.ones(40)
    weights[:10] = 9.0
    weights[39] = 0.0
    weighted = batches.with_settings(Settings(weights=weights))
    drawn = np.concatenate([weighted.order(epoch) for epoch in range(50)])
    assert (drawn < 10).mean() == pytest.approx(90 / 119, abs=0.03)
    assert 39 not in drawn
    np.testing.assert_array_equal(weighted.order(4), weighted.order(4))
    assert ids(run(weighted, 4)) == weighted.order(4).tolist()
    for wrong in (torch.ones(39), torch.zeros(40), -torch.ones(40), torch.full((40,), torch.nan)):
        with pytest.raises(UsageError, match="sampling weights"):
            batches.with_settings(Settings(weights=wrong))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": 9, "world": 2}, "multiple of the 2 ranks"),
        ({"rank": 2, "world": 2}, "rank is 2"),
        ({"workers": -1}, "workers is -1"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"views": Views(scale=(0.0, 1.0))}, "views.scale is"),
        ({"views": Views(ratio=(2.0, 1.0))}, "views.ratio is"),
        ({"views": Views(erase=-0.1)}, "views.erase is -0.1"),
        ({"views": Views(mixup=-1)}, "views.mixup is -1"),
    ],
)
def test_values_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(UsageError, match=message):
        loader(split_of(16), **options)


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="'train' has 0 images"):
        loader(split_of(0))


def test_automatic_workers():
    assert automatic_workers(Views(), 16) == automatic_workers(None, 16) == 0
    assert [automatic_workers(Views(policy="augmix"), cores) for cores in (1, 2, 4, 64)] == [0, 0, 3, 8]


def test_digits_for_a_network_of_one_channel():
    grey = Preprocess((32, 32), (0.5,), (0.5,))
    batches = Batches(digits().split("train"), grey, views=Views(), batch=64, seed=0)
    found = run(batches)
    assert len(found) == len(batches) == 16
    assert found[0].images.shape == (64, 1, 32, 32) and -1 <= found[0].images.min() < found[0].images.max() <= 1
