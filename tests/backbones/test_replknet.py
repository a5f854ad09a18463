"""RepLKNet: the authors' outputs and names, re-parameterisation, and behaviour."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vertebra.backbones.replknet import RepLKNet, feed_forward, large_block, published, replknet
from vertebra.blocks.large_kernel import LargeDepthwise, LargeKernel, large_kernel
from vertebra.errors import ParityError, UsageError
from vertebra.parity import check_golden, difference, fill, images, named, stored
from vertebra.surgery.fuse import fuse

GOLDEN = Path(__file__).parents[1] / "golden" / "replknet.json"
THIN: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (2, 2, 18, 2)}
WIDE: dict[str, Any] = {"variant": "xl", "dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}


@pytest.mark.parametrize(("name", "options"), [("thin", THIN), ("wide", WIDE)])
def test_outputs_are_the_authors(name: str, options: dict) -> None:
    golden = stored(GOLDEN, name)
    backbone = fill(replknet(**options)).eval()
    with torch.inference_mode():
        found = backbone(images(golden.shape))
    assert max(check_golden(found, golden.golden).values()) < 1e-4


@pytest.mark.parametrize("path", ["direct", "fft"])
def test_outputs_in_training_mode_are_the_authors(path) -> None:
    golden = stored(GOLDEN, "thin in training mode")
    backbone = fill(replknet(**THIN, path=path)).train()
    with torch.no_grad():
        found = backbone(images(golden.shape))
    # deep in training mode, rounding grows with each norm over few cells: the last map has 2 x 2
    assert max(check_golden(found, golden.golden, 1e-3).values()) < 1e-3


def expanded(keys: dict[str, list]) -> dict[str, tuple[int, ...]]:
    """Module -> what it holds, to tensor -> shape; `even` and `odd` stand for the blocks of a stage."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (kind, *shape) in keys.items():
        stage = re.match(r"stages\.(\d)\.blocks\.(even|odd)\.", module)
        blocks = range(stage[2] == "odd", 2 * THIN["depths"][int(stage[1])], 2) if stage else [0]
        for block in blocks:
            name = re.sub(r"\.(even|odd)\.", f".{block}.", module)
            found[f"{name}.weight"] = tuple(shape)
            if kind != "weight":
                found[f"{name}.bias"] = tuple(shape[:1])
            if kind == "norm":
                statistics = {"running_mean": tuple(shape), "running_var": tuple(shape), "num_batches_tracked": ()}
                found |= {f"{name}.{statistic}": size for statistic, size in statistics.items()}
    return found


def test_released_checkpoints_fit() -> None:
    keys = json.loads(GOLDEN.read_text(encoding="utf-8"))["keys"]["31b"]
    with torch.device("meta"):
        backbone = replknet("31b")
        state = {name: torch.empty(shape) for name, shape in expanded(keys).items()}
    assert len(state) == 1171
    backbone.load_state_dict(published(state, backbone), assign=True)
    with torch.device("meta"), pytest.raises(ParityError):
        published(state, replknet("31l"))


def trained_a_little(options: dict) -> RepLKNet:
    """Statistics that differ from channel to channel."""
    return fill(replknet("nano", **options)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("policy", ["none", "small", "dilated"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_fused_outputs_are_equal(policy: str, kind: torch.dtype) -> None:
    backbone = trained_a_little({"policy": policy}).to(kind)
    fused = fuse(backbone).model
    assert not any(isinstance(module, LargeKernel) for module in fused.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) == 1  # the one before pooling
    assert sum(isinstance(module, LargeDepthwise) for module in fused.modules()) == 4
    batch = images((2, 3, 48, 33)).to(kind)
    with torch.inference_mode():
        expected, found = named(backbone(batch)), named(fused(batch))
    apart = max(difference(found[name], expected[name]) for name in expected)
    assert apart < (1e-5 if kind == torch.float32 else 1e-13)


def test_a_branch_alone_fuses_with_the_norm_before_its_first_convolution() -> None:
    for block in (large_block(8, large_kernel(12, kernel=7)), feed_forward(8)):
        fill(block).eval()
        x = images((2, 8, 9, 7))
        with torch.inference_mode():
            torch.testing.assert_close(block.fused()(x), block(x), rtol=1e-5, atol=1e-5)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in block.fused().modules())


def test_small_kernels_are_in_the_middle() -> None:
    """With the large kernel at zero, what is left is the small one."""
    block = fill(large_kernel(4, kernel=13, small=5))
    assert isinstance(block, LargeKernel)
    nn.init.zeros_(block.branches.convs[0].weight)  # type: ignore[arg-type]
    kernel: Tensor = block.eval().fused().weight.detach()
    assert kernel[:, :, 4:9, 4:9].abs().min() > 0
    assert torch.equal(nn.functional.pad(kernel[:, :, 4:9, 4:9], (4, 4, 4, 4)), kernel)


def test_strides_and_drop_path() -> None:
    backbone = replknet("nano", drop_path=0.3)
    assert [level.stride for level in backbone.levels] == [2, 4, 8]
    assert [level.stride for level in replknet("nano", stem_stride=4).levels] == [4, 8, 16]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in backbone.stages for block in stage]  # type: ignore[union-attr]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])


def test_the_trunk_holds_every_parameter_once() -> None:
    backbone = replknet("nano")
    held = [parameter for part in backbone.trunk() for parameter in part.parameters()]
    assert {id(p) for p in held} == {id(p) for p in backbone.parameters()} and len(held) == len(
        list(backbone.parameters())
    )


def test_xl_was_trained_on_other_colours() -> None:
    with torch.device("meta"):
        assert replknet("xl").preprocess.mean == (0.5, 0.5, 0.5)
        assert replknet("31b").preprocess.mean == (0.485, 0.456, 0.406)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match="one a stage"):
        replknet("nano", kernels=(7, 7))
    with pytest.raises(UsageError, match="stem_stride is 3"):
        replknet("nano", stem_stride=3)
    with pytest.raises(UsageError, match="odd"):
        replknet("nano", kernels=(8, 7, 7))
    with pytest.raises(UsageError, match="must fit into the large kernel of 3"):
        replknet("nano", kernels=(3, 7, 7))
    with pytest.raises(UsageError, match="at least one channel"):
        replknet("nano", ratio=0.01)
    with pytest.raises(UsageError, match=r"no variant '31x'"):
        replknet("31x")
