"""SGConvNeXt: ConvNeXt's counts and weights, with long convolutions in place of the 7 x 7 ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vertebra.backbones.sgconvnext import VARIANTS, sgconvnext
from vertebra.backbones.timm import timm
from vertebra.blocks.sgconv import Pieces, SGConv2d, scales_of
from vertebra.errors import UsageError, VertebraError
from vertebra.parity import fill, images
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden" / "sgconvnext.json"


@pytest.mark.parametrize(
    ("variant", "plain", "width", "deep"),
    [("tiny", 28_589_128, 96, 9), ("small", 50_223_688, 96, 27), ("base", 88_591_464, 128, 27)],
)
def test_golden_counts_are_convnexts_with_other_convolutions(variant, plain, width, deep):
    channels = [depth * width * 2**stage for stage, depth in enumerate((3, 3, deep, 3))]  # of all blocks of a stage
    added = sum(number * (16 * scales - 49) for number, scales in zip(channels, (10, 8, 6, 4), strict=True))
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))["variants"][variant]["params_m"]
    assert (plain + added) / 1e6 == pytest.approx(expected, rel=1e-5)


def test_only_the_convolutions_differ_from_convnext():
    nano = VARIANTS["nano"]
    with torch.device("meta"):
        plain, backbone = timm(nano["plain"], network=nano["network"], image_size=32), sgconvnext("nano")
    before, after = count(plain), count(backbone)
    stages = [(len(stage.blocks), 16 << n, 32 >> n) for n, stage in enumerate(plain.network.stages)]
    scales = [scales_of(side**2, 8) for *_, side in stages]
    assert scales == [8, 6, 4, 2]
    added = sum(d * c * (16 * s + 1 - 50) for (d, c, _), s in zip(stages, scales, strict=True))
    assert after.params == before.params + added
    assert after.macs == before.macs - sum(49 * d * c * side**2 for d, c, side in stages)


def test_kernels_are_as_long_as_the_stages_maps():
    backbone = sgconvnext("nano", image_size=(32, 16), piece=4)
    found = [m.whole().shape[-1] for m in backbone.modules() if isinstance(m, Pieces)]
    assert found == [512, 128, 32, 32, 32, 8]
    assert [level.stride for level in backbone.levels] == [1, 2, 4, 8]
    assert not any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in backbone.modules())


def test_every_pixel_sees_every_other_one_in_the_first_stage():
    backbone = fill(sgconvnext("nano", image_size=16)).eval()
    for module in backbone.modules():
        if isinstance(module, Pieces):
            module.measure()
    x = images((1, 3, 16, 16)).requires_grad_()
    backbone(x).pyramid[0][0, :, 0, 0].sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()


def test_a_file_holds_the_whole_network(tmp_path):
    trained = fill(sgconvnext("nano")).eval()
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    loaded = sgconvnext("nano", weights=str(tmp_path / "net.safetensors")).eval()
    x = images((2, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(loaded(x).pooled, trained(x).pooled)
    assert loaded.weights_info is not None and str(tmp_path) in loaded.weights_info.source
    with pytest.raises(VertebraError, match="do not fit"):
        sgconvnext("nano", weights=str(tmp_path / "net.safetensors"), piece=4)


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="no variant 'tinny'"):
        sgconvnext("tinny")
    with pytest.raises(UsageError, match="piece is 0"):
        sgconvnext("nano", piece=0)
    with pytest.raises(UsageError, match="decay is -1"):
        sgconvnext("nano", decay=-1)
    assert isinstance(sgconvnext("nano").network.stages[0].blocks[0].conv_dw, SGConv2d)
