"""Sound, series, clips and points as maps: against the definitions, written out, and known cases."""

import math

import numpy as np
import pytest
import torch

from vertebra.backbones.unireplknet import unireplknet
from vertebra.blocks.modality_maps import (
    PointMaps,
    SeriesMap,
    folded_clip,
    mel_bands,
    mel_map,
    standardised,
    tiled_clip,
)
from vertebra.errors import UsageError
from vertebra.parity import images


def kaldi(wave: np.ndarray, rate: int, bands: int, window: int, hop: int) -> np.ndarray:
    """Kaldi's filter bank, sample by sample and band by band, (frames, bands)."""
    wave, points = wave - wave.mean(), 1 << (window - 1).bit_length()
    mel = lambda hertz: 1127 * math.log(1 + hertz / 700)  # noqa: E731
    step = (mel(rate / 2) - mel(20)) / (bands + 1)
    rows = []
    for start in range(0, len(wave) - window + 1, hop):
        frame = wave[start : start + window] - wave[start : start + window].mean()
        sharp = np.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(window)])
        power = np.abs(np.fft.rfft(sharp * np.hanning(window), points)) ** 2
        row = []
        for band in range(bands):
            left = mel(20) + band * step
            total = 0.0
            for number in range(points // 2):
                place = (mel(number * rate / points) - left) / step
                total += power[number] * max(0.0, min(place, 2 - place))
            row.append(math.log(max(total, np.finfo(np.float32).eps)))
        rows.append(row)
    return np.array(rows)


def test_mel_maps_are_kaldis():
    waves = 0.5 * torch.sin(torch.arange(2000) * 0.3) + 0.1 * images((1, 2000))
    found = mel_map(torch.cat([waves, waves * 2]), rate=8000, bands=20)
    expected = kaldi(waves[0].double().numpy(), 8000, 20, 200, 80)
    assert found.shape == (2, 1, 20, 23)
    torch.testing.assert_close(found[0, 0].mT.double(), torch.from_numpy(expected), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(found[1] - found[0], torch.full_like(found[0], math.log(4)), rtol=0, atol=1e-3)


def test_a_tone_lies_in_its_band_and_frames_are_cut_and_padded():
    waves = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    found = mel_map(waves, rate=16_000)
    assert found.shape == (1, 1, 128, 98)
    centres = mel_bands(128, 512, 16_000).argmax(0) * 16_000 / 512
    assert abs(centres[found[0, 0].mean(1).argmax()].item() - 1000) < 50
    assert mel_map(waves, rate=16_000, frames=90).shape[3] == 90
    padded = mel_map(waves, rate=16_000, frames=110, mean=-6.0, std=5.0)
    torch.testing.assert_close(padded[..., :98], (found + 6) / 10)
    torch.testing.assert_close(padded[..., 98:], torch.full((1, 1, 128, 12), 0.6))
    with pytest.raises(UsageError, match="at least 400 samples"):
        mel_map(torch.zeros(1, 399), rate=16_000)


def test_clips_fold_as_released_and_tile_in_order():
    clips = torch.arange(2 * 3 * 16 * 4 * 8).reshape(2, 3, 16, 4, 8)
    assert torch.equal(folded_clip(clips), clips.reshape(2, 3, 16, 32))
    assert torch.equal(folded_clip(clips)[0, 0, 0], clips[0, 0, 0].flatten())  # a frame is one band of rows
    tiled = tiled_clip(clips)
    assert tiled.shape == (2, 3, 16, 32)
    assert torch.equal(tiled[1, 2, 4:8, 8:16], clips[1, 2, 5])
    with pytest.raises(UsageError, match="square number of frames"):
        tiled_clip(clips[:, :, :15])


def test_series_are_scaled_embedded_and_laid_out():
    values = 5 + 3 * images((2, 48, 3))
    scaled, mean, std = standardised(values)
    torch.testing.assert_close(scaled * std + mean, values)
    assert scaled.mean(1).abs().max() < 1e-5 and (scaled.var(1, correction=0) - 1).abs().max() < 1e-4
    torch.manual_seed(0)
    folded, rows = SeriesMap(variables=3, dim=768), SeriesMap(variables=3, dim=768, layout="rows")
    rows.load_state_dict(folded.state_dict())
    assert folded(values).shape == (2, 1, 192, 192) and rows(values).shape == (2, 1, 48, 768)
    assert torch.equal(folded(values).flatten(), rows(values).flatten())
    torch.testing.assert_close(rows(10 * values), rows(values), rtol=1e-3, atol=1e-4)  # its own scale does not matter
    step = torch.einsum("kvd,vk->d", folded.values.weight.permute(2, 1, 0), scaled[0, [47, 0, 1]].mT)
    torch.testing.assert_close(rows(values)[0, 0, 0], step)  # the first step sees the last: the ring is closed
    marked = SeriesMap(variables=3, dim=12, marks=2, layout="rows")
    assert not torch.allclose(marked(values, images((2, 48, 2))), marked(values))
    with pytest.raises(UsageError, match="48 steps of dim 7 do not fold"):
        SeriesMap(variables=3, dim=7)(values)


def test_points_fall_where_they_are_seen():
    front = PointMaps(views=10, size=16, neighbours=2)
    corners = torch.tensor([[-1.0, -1, 0], [1, 1, 0], [-1, 1, 0]])
    cells = front.cells(corners[None])
    assert cells.shape == (1, 10, 3, 9)
    middles = cells[0, 0, :, 4]
    rows, columns = middles // 16, middles % 16
    assert rows.tolist() == [1, 14, 1] and columns.tolist() == [1, 14, 14]  # a margin of a cell is left
    assert ((cells >= 0) & (cells < 256)).all()
    turns = front.turns
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(10, 3, 3), rtol=0, atol=1e-5)
    assert (turns[:, None] - turns[None]).abs().amax((2, 3)).add(torch.eye(10)).min() > 0.5  # ten different views
    flat = torch.tensor([[0.0, 0, 0], [0, 0, 1]])  # one behind the other from the front, apart from the side
    seen = front.cells(flat[None])[0, :2, :, 4]
    assert seen[0, 0] == seen[0, 1] and seen[1, 0] != seen[1, 1]


def test_points_do_not_depend_on_their_order_and_become_images():
    torch.manual_seed(0)
    front, points = PointMaps(views=3, size=24, dim=8, neighbours=4), images((2, 40, 3))
    found = front(points)
    assert found.shape == (6, 3, 24, 24)
    torch.testing.assert_close(front(points[:, torch.randperm(40)]), found, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(front(points[1:]), found[3:], rtol=1e-3, atol=1e-4)  # view by view of one cloud
    pooled = unireplknet("nano")(found).pooled
    (pooled * images(tuple(pooled.shape))).sum().backward()  # a norm's plain sum has no gradient
    assert all(p.grad is not None and p.grad.any() for p in front.parameters() if p.ndim > 1)
    with pytest.raises(UsageError, match="at least 4 of them"):
        front(points[:, :3])
    with pytest.raises(UsageError, match=r"views is 11 \(1 to 10\)"):
        PointMaps(views=11)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_class_takes_every_map(channels):
    torch.manual_seed(0)
    maps = {
        1: (mel_map(images((2, 4000)), rate=8000, bands=32), SeriesMap(variables=2, dim=12)(images((2, 48, 2)))),
        3: (tiled_clip(images((2, 3, 4, 96)).unflatten(3, (8, 12))), PointMaps(size=32, views=2)(images((1, 50, 3)))),
    }
    backbone = unireplknet("nano", channels=channels).eval()
    for given in maps[channels]:
        assert backbone(given).pooled.shape == (2, 128) and backbone(given).pooled.isfinite().all()
