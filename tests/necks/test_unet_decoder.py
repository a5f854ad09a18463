import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from vertebra.contracts import Level
from vertebra.errors import UsageError
from vertebra.necks.unet_decoder import Heads, unet_decoder
from vertebra.parity import difference, fill, images

LEVELS = (Level(4, 1), Level(6, 2), Level(8, 4))
SIDES = ((21, 13), (11, 7), (6, 4))


def _pyramid() -> tuple[Tensor, ...]:
    return tuple(images((2, level.channels, *side)) for level, side in zip(LEVELS, SIDES, strict=True))


def _by_hand(decoder, pyramid):
    """The reference's order: enlarge, then convolve; coarse to fine."""
    x, maps = pyramid[-1], [pyramid[-1]]
    for i in (1, 0):
        x = decoder.ups[i].conv(F.interpolate(x, size=pyramid[i].shape[2:], mode="nearest"))
        x = decoder.stages[i](torch.cat((x, pyramid[i]), 1))
        maps.insert(0, x)
    return maps


@pytest.mark.parametrize("options", [{}, {"channels": 5, "depth": 2}])
def test_convolving_before_enlarging_changes_nothing(options) -> None:
    decoder = fill(unet_decoder(LEVELS, **options)).double()
    pyramid = tuple(x.double() for x in _pyramid())
    with torch.inference_mode():
        found, expected = decoder(pyramid), _by_hand(decoder, pyramid)
    assert max(difference(x, y) for x, y in zip(found, expected, strict=True)) < 1e-12
    assert torch.equal(found[-1], pyramid[-1])


def test_channels_and_depth() -> None:
    own, wide = unet_decoder(LEVELS), unet_decoder(LEVELS, channels=5, depth=3)
    assert [level.channels for level in own.levels] == [4, 6, 8]
    assert [level.channels for level in wide.levels] == [5, 5, 8]
    assert [len(stage) for stage in wide.stages] == [3, 3]  # type: ignore[arg-type]
    maps = wide(_pyramid())
    assert [tuple(x.shape[1:]) for x in maps] == [(5, 21, 13), (5, 11, 7), (8, 6, 4)]


def test_transposed_convolutions_take_the_stride_and_any_size() -> None:
    decoder = unet_decoder(LEVELS, "transposed")
    assert [tuple(up.conv.weight.shape) for up in decoder.ups] == [(6, 4, 2, 2), (8, 6, 2, 2)]  # type: ignore[union-attr]
    assert [tuple(x.shape[2:]) for x in decoder(_pyramid())] == list(SIDES)
    volumes = unet_decoder(LEVELS, "transposed", axes=3, strides=((1, 2, 2), 2))
    assert [tuple(up.conv.weight.shape[2:]) for up in volumes.ups] == [(1, 2, 2), (2, 2, 2)]  # type: ignore[union-attr]
    even = tuple(
        torch.rand(1, level.channels, *side) for level, side in zip(LEVELS, ((8, 8), (4, 4), (2, 2)), strict=True)
    )
    up = decoder.ups[0]
    assert torch.equal(up(even[1], even[0].shape[2:]), up.conv(even[1]))  # type: ignore[operator, union-attr]


def test_heads_stand_on_decoded_maps() -> None:
    decoder = unet_decoder(LEVELS)
    logits = Heads(decoder.levels, 3)(decoder(_pyramid()))
    assert [tuple(x.shape) for x in logits] == [(2, 3, 21, 13), (2, 3, 11, 7)]


def test_one_level_comes_out_as_it_went_in() -> None:
    x = _pyramid()[:1]
    assert torch.equal(unet_decoder(LEVELS[:1])(x)[0], x[0])


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match="no variant 'neerest'; did you mean nearest"):
        unet_decoder(LEVELS, "neerest")
    with pytest.raises(UsageError, match="upsampling is 'bilinear'"):
        unet_decoder(LEVELS, upsampling="bilinear")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="must rise"):
        unet_decoder(LEVELS[::-1])
    with pytest.raises(UsageError, match="3 levels need 2 strides"):
        unet_decoder(LEVELS, strides=(2,))
    with pytest.raises(UsageError, match="axes is 1"):
        unet_decoder(LEVELS, axes=1)  # type: ignore[typeddict-item]
    for option in ("channels", "depth"):
        with pytest.raises(UsageError, match=f"{option} is 0"):
            unet_decoder(LEVELS, **{option: 0})
