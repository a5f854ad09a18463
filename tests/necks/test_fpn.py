from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from vertebra.contracts import Level
from vertebra.errors import UsageError
from vertebra.necks.fpn import FPN, fpn
from vertebra.spec import Spec

LEVELS = (Level(8, 4), Level(12, 8), Level(16, 16), Level(24, 32))
SIDES = ((57, 49), (29, 25), (15, 13), (8, 7))  # of 225 x 193 pixels


def _pyramid() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, level.channels, *side, generator=generator) for level, side in zip(LEVELS, SIDES, strict=True)
    )


def _copied(neck: FPN, oracle: nn.Module) -> None:
    """torchvision's weights: per level the 1x1 convolutions, then the 3x3 ones, then P6 and P7."""
    names = [f"inner_blocks.{i}" for i in range(4)] + [f"layer_blocks.{i}" for i in range(4)]
    parts = [*neck.laterals, *neck.outputs]
    sources = [oracle.get_submodule(name) for name in names]
    if len(neck.extras):
        parts, sources = [*parts, *neck.extras], [*sources, oracle.extra_blocks.p6, oracle.extra_blocks.p7]  # type: ignore[union-attr]
    for part, source in zip(parts, sources, strict=True):
        tensors = list(source.state_dict().values())
        part.load_state_dict(dict(zip(part.state_dict(), tensors, strict=True)))


@pytest.mark.parametrize(
    ("options", "extra_blocks"),
    [
        ({}, lambda: None),
        ({"extra": "pool"}, LastLevelMaxPool),
        ({"extra": "p6p7"}, lambda: LastLevelP6P7(32, 32)),
        ({"extra": "p6p7", "source": "input"}, lambda: LastLevelP6P7(24, 32)),
        ({"norm": "batch"}, lambda: None),
    ],
)
def test_equals_torchvision_under_its_weights(options: dict[str, Any], extra_blocks: Any) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if options.get("norm") else None
    oracle = FeaturePyramidNetwork([8, 12, 16, 24], 32, extra_blocks(), norm_layer=norm)
    neck = fpn(LEVELS, channels=32, **options)
    _copied(neck, oracle)
    pyramid = _pyramid()
    named = OrderedDict((str(i), x) for i, x in enumerate(pyramid))
    torch.testing.assert_close(neck(pyramid), tuple(oracle(named).values()), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in neck.parameters()) == sum(p.numel() for p in oracle.parameters())


def test_levels_and_sizes_of_what_is_added() -> None:
    for extra, strides in (("none", (4, 8, 16, 32)), ("pool", (4, 8, 16, 32, 64)), ("p6p7", (4, 8, 16, 32, 64, 128))):
        neck = fpn(LEVELS, channels=8, extra=extra)  # type: ignore[arg-type]
        assert tuple(level.stride for level in neck.levels) == strides
        out = neck(_pyramid())
        assert [tuple(x.shape[2:]) for x in out] == [*SIDES, (4, 4), (2, 2)][: len(strides)]


def test_finer_maps_can_be_left_out() -> None:
    neck = fpn(LEVELS, channels=8, extra="p6p7", source="input", finest=8)
    assert [level.stride for level in neck.levels] == [8, 16, 32, 64, 128]
    assert [tuple(x.shape[2:]) for x in neck(_pyramid())] == [*SIDES[1:], (4, 4), (2, 2)]


def test_meaning_flows_down_and_not_up() -> None:
    neck, pyramid = fpn(LEVELS, channels=8), _pyramid()
    with torch.no_grad():
        before = neck(pyramid)
        coarse = neck((*pyramid[:3], pyramid[3] + 1))
        fine = neck((pyramid[0] + 1, *pyramid[1:]))
    assert all(not torch.equal(x, y) for x, y in zip(before, coarse, strict=True))
    assert [torch.equal(x, y) for x, y in zip(before, fine, strict=True)] == [False, True, True, True]


def test_what_cannot_be_is_refused() -> None:
    for levels, options, words in (
        ((), {}, "strides none; none is left"),
        (LEVELS, {"finest": 64}, r"finest is 64 and the levels have strides \[4, 8, 16, 32\]"),
        (LEVELS[::-1], {}, r"strides \[32, 16, 8, 4\]; they must rise"),
        (LEVELS, {"channels": 0}, "channels is 0"),
        (LEVELS, {"extra": "p6"}, r"extra is 'p6'; did you mean p6p7\?; it can be none, pool, p6p7"),
        (LEVELS, {"source": "outputs"}, r"source is 'outputs'; did you mean output"),
        (LEVELS, {"norm": "layer"}, "norm is 'layer'.*none, batch, group"),
        (LEVELS, {"norm": "group", "channels": 48}, "32 groups and channels is 48"),
    ):
        with pytest.raises(UsageError, match=words):
            fpn(levels, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no option 'channel'; did you mean channels"):
        Spec("fpn", {"channel": 8}, kind="necks")
