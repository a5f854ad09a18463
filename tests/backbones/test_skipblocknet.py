"""SkipblockNet: the authors' outputs and keys, and skips that follow the maps' sizes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vertebra.backbones.skipblocknet import published, skipblocknet
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, fill, images, stored

GOLDEN = Path(__file__).parents[1] / "golden" / "skipblocknet.json"


def test_parity_with_the_authors_code():
    known = stored(GOLDEN, "m")
    with torch.inference_mode():
        pooled = fill(skipblocknet()).eval()(images(known.shape)).pooled
    check_golden(pooled, known.golden, 1e-5)


def test_the_authors_keys_become_ours():
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["m"]
    with torch.device("meta"):
        backbone = skipblocknet()
        state = {f"module.{name}": torch.empty(shape) for name, shape in keys.items()}
    assert published(state, backbone).keys() == backbone.state_dict().keys()
    with pytest.raises(ParityError, match="missing"):
        published({name: tensor for name, tensor in state.items() if "skip1" not in name}, backbone)


@pytest.mark.parametrize("size", [(224, 224), (97, 65), (32, 32)])
def test_skips_follow_the_size(size):
    backbone = skipblocknet("m_075").eval()
    with torch.inference_mode():
        before = [tuple(level.shape[2:]) for level in backbone(images((1, 3, *size))).pyramid]
    assert before == [tuple(-(-side // level.stride) for side in size) for level in backbone.levels]


def test_both_skips_are_added():
    backbone, batch = fill(skipblocknet("nano")).eval(), images((2, 3, 32, 32))
    with torch.inference_mode():
        whole = backbone(batch).pyramid
        for skip, first in zip(backbone.skips, (2, 3), strict=True):
            nn.init.zeros_(skip[-1].weight)  # type: ignore[index]
            nn.init.zeros_(skip[-1].bias)  # type: ignore[index]
            changed = backbone(batch).pyramid
            assert torch.equal(changed[first - 1], whole[first - 1]) and not torch.equal(changed[first], whole[first])
            whole = changed


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="width is 0"):
        skipblocknet(width=0)
    with pytest.raises(UsageError, match="no stochastic depth"):
        skipblocknet(drop_path=0.1)
