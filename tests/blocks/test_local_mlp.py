"""The local MLP: both orders by hand, swap, errors."""

import pytest
import torch
from torch import nn

from vertebra.blocks.local_mlp import local_mlp
from vertebra.errors import UsageError
from vertebra.parity import difference, fill, images
from vertebra.spec import Spec
from vertebra.surgery.swap import swap


@pytest.mark.parametrize("variant", ["before", "after"])
def test_it_is_its_formula(variant):
    block, x = fill(local_mlp(6, variant, ratio=2)).double(), images((2, 6, 7, 9)).double()
    weights = {name.rpartition("layer.")[2]: tensor for name, tensor in block.named_parameters()}

    def cells(maps: torch.Tensor, layer: str) -> torch.Tensor:
        return nn.functional.conv2d(maps, weights[f"{layer}.weight"][:, :, None, None], weights[f"{layer}.bias"])

    def local(maps: torch.Tensor) -> torch.Tensor:
        return maps + nn.functional.conv2d(maps, weights["local.weight"], weights["local.bias"], padding=1, groups=12)

    u = cells(x, "widen")
    u = nn.functional.gelu(local(u)) if variant == "before" else local(nn.functional.gelu(u))
    assert difference(block(x), cells(u, "narrow")) < 1e-13
    with torch.inference_mode():
        assert torch.equal(block(x), block(x.clone()))  # what is activated in place is never what was given


def test_swap_in_a_convnext():
    network = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "conv_mlp": True}
    convnext = Spec("timm/convnext_atto", {"image_size": 64, "network": network}).build().eval()
    operated = swap(convnext, "Mlp", "local_mlp")
    assert len(operated.changed) == 4
    assert operated.after.params - operated.before.params == 4 * (8 + 16 + 24 + 32) * (9 + 1)
    with torch.inference_mode():
        assert operated.model(images((2, 3, 64, 48))).pooled.isfinite().all()


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="no variant 'befor'; did you mean before"):
        local_mlp(8, "befor")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="channels is 8 and hidden 0"):
        local_mlp(8, ratio=0)
