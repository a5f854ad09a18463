"""Several views of an image: different, f(seed, epoch, index, number) alone, from one decoding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.config import Views
from vertebra.contracts import Preprocess
from vertebra.data.dataset import Split, Store
from vertebra.data.digits import Arrays
from vertebra.data.loader import Batches
from vertebra.data.views import view
from vertebra.errors import UsageError

SEEN = Preprocess((16, 16), (0.0,) * 3, (1.0,) * 3, "bilinear")
STRONG = Views(scale=(0.08, 1.0), jitter=0.8, hue=0.2, jitter_chance=0.8, grey=0.2, blur=0.5)


class Counting(Store):
    """Random images that count how often each is decoded."""

    def __init__(self, count: int = 12) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
        self.inner = Arrays(np.repeat(np.repeat(pixels, 4, 1), 4, 2))
        self.decoded = np.zeros(count, dtype=int)

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        self.decoded[index] += 1
        return self.inner.image(index, least)

    def size_bytes(self, index: int) -> int:
        return self.inner.size_bytes(index)


def split(store: Store | None = None) -> Split:
    names = np.array([f"{i}.png" for i in range(12)])
    return Split("train", ("a",), names, None, store or Counting(), np.arange(12))


def batches(**options) -> Batches:
    chosen = {"views": STRONG, "more_views": (STRONG,), "batch": 4, "seed": 1, "workers": 0, **options}
    return Batches(chosen.pop("split", None) or split(), SEEN, **chosen)


def all_of(found: Batches, epoch: int = 0) -> dict[int, tuple[torch.Tensor, ...]]:
    """Image -> its views."""
    return {
        int(index): views
        for batch in found.epoch(epoch)
        for index, *views in zip(batch.ids, batch.images, *batch.views, strict=True)
    }


def test_views_of_an_image_differ_from_each_other_and_between_epochs() -> None:
    found, next_epoch = batches(), all_of(batches(), epoch=1)
    for index, (first, second) in all_of(found).items():
        assert not torch.equal(first, second)
        assert not torch.equal(first, next_epoch[index][0]) and not torch.equal(second, next_epoch[index][1])
        assert not torch.equal(second, next_epoch[index][0])


def test_a_view_is_a_function_of_seed_epoch_index_and_number() -> None:
    found = all_of(batches(), epoch=2)
    store = Counting()
    for index, views in found.items():
        for number, pixels in enumerate(views):
            expected = view(store.image(index), index, 2, 1, STRONG, SEEN, number=number)
            assert np.array_equal((255 * pixels).round().byte().permute(1, 2, 0), expected)
    assert not torch.equal(found[0][1], all_of(batches(seed=2), epoch=2)[0][1])


def test_the_first_view_is_the_same_with_and_without_further_ones() -> None:
    alone, together = all_of(batches(more_views=())), all_of(batches(more_views=(STRONG, STRONG)))
    assert all(torch.equal(alone[index][0], together[index][0]) for index in alone)
    assert {len(views) for views in together.values()} == {3}


def test_workers_batches_and_starts_change_no_view() -> None:
    here = all_of(batches())
    worked = batches(workers=1, split=split(Arrays(Counting().inner.pixels)))
    there = all_of(worked)
    worked.close()
    other = all_of(batches(batch=6))
    assert list(here) == list(there) == list(other)
    for index in here:
        for mine, workers, others in zip(here[index], there[index], other[index], strict=True):
            assert torch.equal(mine, workers) and torch.equal(mine, others)
    late = next(batches().epoch(0, start=2))
    assert all(torch.equal(late.views[0][row], here[int(index)][1]) for row, index in enumerate(late.ids))


def test_ranks_together_see_what_one_sees() -> None:
    whole = all_of(batches())
    parts = {k: v for rank in (0, 1) for k, v in all_of(batches(rank=rank, world=2)).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(a, b) for index in whole for a, b in zip(whole[index], parts[index], strict=True))


def test_an_image_is_decoded_once_for_all_its_views_and_epochs() -> None:
    store = Counting()
    found = batches(split=split(store), more_views=(STRONG, STRONG, STRONG))
    all_of(found)
    all_of(found, epoch=1)
    assert store.decoded.tolist() == [1] * 12
    store = Counting()
    all_of(batches(split=split(store), cache_bytes=0, more_views=(STRONG, STRONG)))
    assert store.decoded.tolist() == [1] * 12


def test_views_may_have_sizes_of_their_own() -> None:
    small = replace(STRONG, scale=(0.05, 0.3), size=8)
    batch = next(batches(more_views=(STRONG, small, small)).epoch(0))
    assert batch.images.shape == (4, 3, 16, 16)
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 16, 16), (4, 3, 8, 8), (4, 3, 8, 8)]
    assert not torch.equal(batch.views[1], batch.views[2])


def test_grey_and_hue_do_what_they_say() -> None:
    still = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    image = Image.fromarray(np.full((16, 16, 3), (200, 40, 40), dtype=np.uint8))
    grey = view(image, 0, 0, 0, Views(**still, grey=1.0), SEEN)
    assert len(np.unique(grey)) == 1 and grey.shape == (16, 16, 3)
    turned = np.array([view(image, i, 0, 0, Views(**still, hue=0.5), SEEN)[0, 0] for i in range(400)])
    assert (np.ptp(turned, 1) >= 155).all() and turned.max() <= 202  # colours turn; saturation and value stay
    assert ((turned.argmax(1)[:, None] == np.arange(3)).mean(0) > 0.25).all()  # all the way round the circle
    slightly = np.array([view(image, i, 0, 0, Views(**still, hue=0.1), SEEN)[0, 0] for i in range(100)])
    assert (slightly.argmax(1) == 0).all() and len(np.unique(slightly, axis=0)) > 20


def test_chances_are_kept() -> None:
    still = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    image = Counting().inner.image(0).resize((16, 16))
    plain = view(image, 0, 0, 0, Views(**still), SEEN)

    def share(views: Views) -> float:
        return float(np.mean([not np.array_equal(view(image, i, 0, 0, views, SEEN), plain) for i in range(400)]))

    assert share(Views(**still, jitter=0.8, hue=0.2, jitter_chance=0.8)) == pytest.approx(0.8, abs=0.06)
    assert share(Views(**still, grey=0.2)) == pytest.approx(0.2, abs=0.06)
    assert share(Views(**still, blur=0.5)) <= 0.56


def test_views_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="more_views go with views"):
        batches(views=None)
    with pytest.raises(UsageError, match="without mixup"):
        batches(views=replace(STRONG, mixup=0.2))
    with pytest.raises(UsageError, match=r"views\.hue is 0\.6"):
        batches(more_views=(replace(STRONG, hue=0.6),))
