import pytest
import torch
from torch import nn

from vertebra.blocks.wave_mix import wave_mix
from vertebra.blocks.wavelet import haar
from vertebra.errors import UsageError
from vertebra.parity import fill, images
from vertebra.spec import Spec
from vertebra.surgery.fuse import fuse
from vertebra.surgery.swap import swap


def test_one_level_is_what_the_paper_says():
    block, x = fill(wave_mix(16)).eval(), images((2, 16, 6, 10))
    level = block.levels[0]
    bands = torch.cat(haar(block.reduce(x)), 1)
    assert bands.shape == (2, 16, 3, 5)
    hidden = nn.functional.gelu(level[0](bands))
    torch.testing.assert_close(block(x), level[5](level[4](level[3](hidden))))
    assert [tuple(level[i].weight.shape) for i in (0, 3, 4)] == [(32, 16, 1, 1), (16, 32, 1, 1), (16, 16, 4, 4)]


def test_levels_join_from_coarse_to_fine():
    block, x = fill(wave_mix(16, level=2)).eval(), images((1, 16, 8, 4))
    fine = haar(block.reduce(x))
    coarse = block.levels[1](torch.cat(haar(fine[0]), 1))
    assert coarse.shape == (1, 8, 4, 2)
    torch.testing.assert_close(block(x), block.levels[0](torch.cat((*fine, coarse), 1)))


@pytest.mark.parametrize("upsample", ["transposed", "nearest", "shuffle"])
@pytest.mark.parametrize("level", [1, 4])
def test_odd_sizes_are_continued_by_zeros_and_cut(level, upsample):
    block = fill(wave_mix(8, level=level, upsample=upsample)).eval()
    for size in ((1, 1), (5, 7), (16, 9)):
        assert block(images((2, 8, *size))).shape == (2, 8, *size)
    # the last row of an odd side does not touch what is far from it
    x = images((1, 8, 17, 8))
    changed = x.clone()
    changed[:, :, -1] += 1
    same = (block(x) - block(changed)).abs().amax((0, 1, 3)) == 0
    assert not same[-1] and (level > 1 or same[:14].all())


def test_dropout_is_on_in_training_alone():
    torch.manual_seed(0)
    block, x = wave_mix(8), images((2, 8, 4, 4))
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
    still = wave_mix(8, dropout=0.0).train()
    assert torch.equal(still(x), still(x))


def test_nearest_copies_after_the_norm_what_the_paper_copies_before_it():
    block, x = fill(wave_mix(8, upsample="nearest", dropout=0.0)).train(), images((3, 8, 4, 6))
    level, bands = block.levels[0], torch.cat(haar(block.reduce(x)), 1)
    up = nn.functional.interpolate(level[3](nn.functional.gelu(level[0](bands))), scale_factor=2)
    torch.testing.assert_close(block(x), nn.functional.batch_norm(up, None, None, level[4].weight, level[4].bias, True))


def test_bands_can_be_others():
    class Zeros(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels

        def forward(self, x):
            assert x.shape[1] == self.channels
            return (torch.zeros_like(x[:, :, ::2, ::2]),) * 4

    block = fill(wave_mix(16, bands=Zeros)).eval()
    assert torch.equal(block(images((1, 16, 4, 4))), block(torch.zeros(1, 16, 4, 4)))


def test_fuse_folds_the_norm_into_the_transposed_convolution():
    block = fill(wave_mix(16, level=2)).eval()
    operated = fuse(block, images=(16, 12, 10))
    assert set(operated.changed) == {"levels.0.5", "levels.1.5"}
    x = images((2, 16, 12, 10)).double()
    torch.testing.assert_close(operated.model.double()(x), block.double()(x), rtol=1e-5, atol=1e-6)


def test_swap_puts_it_in_the_place_of_convolutions():
    backbone = Spec("timm/resnet18", {"image_size": 64}).build()
    operated = swap(backbone, "*.layer?.1.conv2", "wave_mix", level=2)
    assert len(operated.changed) == 4
    blocks = [operated.model.get_submodule(name) for name in operated.changed]
    assert [block.reduce.in_channels for block in blocks] == [64, 128, 256, 512]
    with torch.inference_mode():
        assert operated.model(images((1, 3, 63, 33))).pooled.isfinite().all()


def test_options_that_are_refused():
    with pytest.raises(UsageError, match="channels is 6; it must be a multiple of 4"):
        wave_mix(6)
    with pytest.raises(UsageError, match="level is 0"):
        wave_mix(8, level=0)
    with pytest.raises(UsageError, match=r"dropout is 1\.0"):
        wave_mix(8, dropout=1.0)
    with pytest.raises(UsageError, match="upsample is 'bicubic'; it can be transposed, nearest, shuffle"):
        wave_mix(8, upsample="bicubic")  # type: ignore[arg-type]
