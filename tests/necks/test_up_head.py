import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from vertebra.contracts import Level
from vertebra.errors import UsageError
from vertebra.necks.up_head import UpHead, enlarged, up_head
from vertebra.parity import difference, fill, images

LEVELS = (Level(8, 4), Level(12, 8), Level(16, 16), Level(24, 32))
SIDES = ((19, 13), (10, 7), (5, 4), (3, 2))


def _pyramid() -> tuple[Tensor, ...]:
    return tuple(images((2, level.channels, *side)) for level, side in zip(LEVELS, SIDES, strict=True))


def _filled(variant: str, **options) -> UpHead:
    neck = up_head(LEVELS, variant, **options)
    return fill(neck).eval()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("variant", "inner", "channels"),
    [
        ("a", [64, 128, 256, 512], [128, 128, 128, 128]),
        ("b", [64, 128, 128, 256], [96, 96, 64, 32]),
        ("c", [128, 128, 128, 128], [128, 16, 16, 16]),
    ],
)
def test_variants(variant, inner, channels) -> None:
    neck = up_head(LEVELS, variant)
    assert neck.levels == tuple(Level(number, stride) for number, stride in zip(channels, (4, 8, 16, 32), strict=True))
    assert [adapter[0].out_channels for adapter in neck.adapters] == inner  # type: ignore[index, union-attr]
    ups = [(up[0].in_channels, up[0].out_channels) for up in neck.ups]  # type: ignore[index, union-attr]
    assert ups == list(zip(inner[1:], inner, strict=False))
    with torch.no_grad():
        assert [tuple(x.shape[1:]) for x in neck(_pyramid())] == [
            (number, *side) for number, side in zip(channels, SIDES, strict=True)
        ]


@pytest.mark.parametrize("mode", [{"mode": "bilinear", "align_corners": True}, {"mode": "nearest"}])
def test_the_path_runs_on_what_is_not_smoothed(mode) -> None:
    neck, pyramid = _filled("b", upsampling=mode["mode"]), _pyramid()
    with torch.inference_mode():
        x = neck.adapters[3](pyramid[3])
        expected = [neck.outputs[3](x)]
        for i in (2, 1, 0):
            x = F.interpolate(neck.ups[i](x), SIDES[i], **mode) + neck.adapters[i](pyramid[i])
            expected.insert(0, neck.outputs[i](x))
        found = neck(pyramid)
    assert max(difference(x, y) for x, y in zip(found, expected, strict=True)) < 1e-6


def test_enlarging_aligns_corners_or_repeats_cells() -> None:
    x, like = torch.tensor([0.0, 2.0]).reshape(1, 1, 1, 2), torch.zeros(1, 1, 1, 5)
    assert enlarged(x, like, "bilinear").flatten().tolist() == [0, 0.5, 1, 1.5, 2]
    assert enlarged(x, like, "nearest").flatten().tolist() == [0, 0, 0, 2, 2]


def test_fewer_levels_and_more() -> None:
    assert [level.channels for level in up_head(LEVELS[:2], "b").levels] == [96, 96]
    more = up_head((*LEVELS, Level(32, 64)), "b")
    assert [level.channels for level in more.levels] == [96, 96, 64, 32, 32]
    assert more.adapters[4][0].out_channels == 256  # type: ignore[index, union-attr]
    assert [level.channels for level in up_head(LEVELS, "b", channels=20).levels] == [20] * 4


def test_meaning_flows_down_and_not_up() -> None:
    neck, pyramid = _filled("c"), _pyramid()
    with torch.no_grad():
        before = neck(pyramid)
        coarse = neck((*pyramid[:3], pyramid[3] + 1))
        fine = neck((pyramid[0] + 1, *pyramid[1:]))
    assert not any(torch.equal(x, y) for x, y in zip(before, coarse, strict=True))
    assert [torch.equal(x, y) for x, y in zip(before, fine, strict=True)] == [False, True, True, True]


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match="no variant 'd'; it has a, b, c"):
        up_head(LEVELS, "d")
    with pytest.raises(UsageError, match="upsampling is 'linear'"):
        up_head(LEVELS, upsampling="linear")  # type: ignore[typeddict-item]
    with pytest.raises(UsageError, match="must rise"):
        up_head(LEVELS[::-1])
    with pytest.raises(UsageError, match="inner is 0"):
        up_head(LEVELS, inner=0)
    with pytest.raises(UsageError, match=r"channels is \(4, 0\)"):
        up_head(LEVELS, channels=(4, 0))
