"""Several scales of an image through one backbone: the reference's numbers, its costs, and what it must not do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.cifar_resnet import cifar_resnet
from vertebra.backbones.vim import vim
from vertebra.contracts import Backbone, Measured
from vertebra.errors import UsageError
from vertebra.parity import check_golden, difference, fill, images, stored
from vertebra.probes.grad_cam.sites import site_of
from vertebra.spec import Spec
from vertebra.surgery.s2 import S2, experiment, merge, s2, split
from vertebra.tasks.classify import classify

GOLDEN = Path(__file__).parent.parent / "golden" / "s2.json"

CASES = {
    "tokens_two": {"given": 1},
    "tokens_three": {"variant": "three", "given": 1, "onto": 1},
    "tokens_in_turn": {"variant": "three", "given": 1, "tiles": "in_turn"},
    "tokens_large": {"variant": "three"},
    "maps_two": {"given": 1},
    "maps_three": {"variant": "three", "onto": 1},
    "maps_half": {"scales": (1, 1.5), "given": 1, "tiles": "in_turn"},
    "maps_wide": {"given": 1, "tile": 32},
    "maps_padded": {"given": 1, "tile": 32, "fit": "pad"},
}


def vit() -> Backbone:
    return fill(Spec("timm/test_vit", {"image_size": 32, "network": {"patch_size": 8}}).build()).eval()


def cnn() -> Backbone:
    return fill(cifar_resnet("nano")).eval()


def over_scales(backbone: Backbone, *args, **options) -> S2:
    model = s2(backbone, *args, **options).model
    assert isinstance(model, S2)
    return model


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_references(case):
    expected = stored(GOLDEN, case)
    backbone = vit() if case.startswith("tokens") else cnn()
    with torch.inference_mode():
        found = over_scales(backbone, **CASES[case])(images(expected.shape))
    output = found.tokens if case.startswith("tokens") else found.pyramid[-1]
    assert max(check_golden(output, expected.golden, tolerance=1e-5).values()) < 1e-5


def test_tiles_come_in_the_order_row_column_image():
    x = torch.arange(2 * 1 * 4 * 6).view(2, 1, 4, 6)
    tiles = split(x, 2, 3)
    assert tiles.shape == (12, 1, 2, 2)
    assert torch.equal(tiles[0], x[0, :, :2, :2]) and torch.equal(tiles[1], x[1, :, :2, :2])
    assert torch.equal(tiles[2], x[0, :, :2, 2:4]) and torch.equal(tiles[6], x[0, :, 2:, :2])
    assert torch.equal(merge(tiles, 2, 3), x)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_pixel_changes_the_cells_of_its_tile_alone(row, column):
    model = over_scales(cnn(), onto=1)
    x = images((1, 3, 64, 64))
    changed = x.clone()
    changed[:, :, 32 * row + 16, 32 * column + 16] += 3
    with torch.inference_mode():
        second = (model(x).pyramid[-1] - model(changed).pyramid[-1])[0, 64:].abs().sum(0)  # scale 2 alone
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
    assert second[inside].any() and not second[~inside].any()


@pytest.mark.parametrize(
    ("address", "variant", "times"),
    [
        ("cifar_resnet/20", "two", 5),
        ("cifar_resnet/20", "three", 14),
        ("timm/vit_tiny_patch16_224", "two", 5),
        ("timm/convnext_atto", "three", 14),
    ],
)
def test_cost_is_that_of_the_tiles_and_no_parameter_is_new(address, variant, times):
    with torch.device("meta"):
        operated = s2(Spec(address).build(), variant)
    assert operated.changed == ("",) and operated.after.params == operated.before.params
    assert abs(operated.after.macs / operated.before.macs / times - 1) < 0.01
    assert operated.after.resolution == tuple(
        side * (2 if variant == "two" else 3) for side in operated.before.resolution
    )


def test_widths_grow_and_tokens_stay():
    with torch.device("meta"):
        backbone = Spec("timm/vit_base_patch16_224").build()
        model = over_scales(backbone, "three")
        found = model(torch.empty(1, 3, 672, 672))
    assert found.tokens is not None and found.tokens.shape == (1, 197, 2304)
    assert found.pyramid[0].shape == (1, 2304, 14, 14) and found.pooled.shape == (1, model.width) == (1, 2304)
    assert [(level.channels, level.stride) for level in model.levels] == [(2304, 48)]
    assert model.preprocess.size == (672, 672)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (64, 49), (96, 40)])
@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"tile": 32, "fit": "pad"}, {"scales": (1, 1.5), "onto": 1}])
def test_levels_at_any_size(size, options):
    model = over_scales(cnn(), **options)
    with torch.inference_mode():
        found = model(images((2, 3, *size)))
    assert found.pooled.shape == (2, model.width) == (2, 128) and found.tokens is None
    for level, x in zip(model.levels, found.pyramid, strict=True):
        assert x.shape[:2] == (2, level.channels) and x.isfinite().all()
        if "tile" not in options or options.get("fit") == "pad":  # else small images fill their tiles
            tiles = 2 if "onto" in options else 1  # each tile's cells are rounded up
            assert all(abs(side / level.stride - cells) <= tiles for side, cells in zip(size, x.shape[2:], strict=True))


def test_a_scale_is_made_of_the_pixels_that_were_given():
    backbone, x = vit(), images((2, 3, 64, 64))
    with torch.inference_mode():
        found = over_scales(backbone)(x)
        tiles, whole = backbone(split(x, 2, 2)), backbone(nn.functional.interpolate(x, (32, 32), mode="bicubic"))
    assert found.tokens is not None and tiles.tokens is not None and whole.tokens is not None
    torch.testing.assert_close(found.tokens[:, :1, 64:], tiles.tokens[:, :1].view(4, 2, 1, 64).mean(0))
    torch.testing.assert_close(found.tokens[:, :, :64], whole.tokens)
    torch.testing.assert_close(found.pooled[:, 64:], tiles.pooled.view(4, 2, 64).mean(0))
    torch.testing.assert_close(found.pyramid[0][:, 64:, :2, 2:], _area(tiles.pyramid[0][2:4]))


def _area(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.avg_pool2d(x, 2)


def test_antialiased_images_are_smoother():
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, smooth = (over_scales(cnn(), scales=(1,), given=4, resampling=kind) for kind in ("bicubic", "antialiased"))
    seen = [model._sized(noise, model._plan(64, 64, 1)) for model in (plain, smooth)]
    assert seen[0].shape == seen[1].shape == (1, 3, 16, 16) and smooth.preprocess.size == (128, 128)
    assert seen[1].var() < 0.2 < 0.3 < seen[0].var()


def test_a_class_token_comes_first_wherever_it_was():
    model = over_scales(fill(vim("nano")).eval())  # its class token has its place among the patches
    with torch.inference_mode():
        found = model(images((1, 3, 64, 64)))
    assert found.tokens is not None and found.tokens.shape == (1, 1 + 64, 2 * 64)
    assert torch.equal(found.tokens[:, 0], found.pooled)
    assert torch.equal(found.tokens[:, 1:], found.pyramid[-1].flatten(2).mT)


@pytest.mark.parametrize(
    ("options", "look"),
    [({}, 0), ({"scales": (2, 1)}, 1), ({"scales": (2, 1), "tiles": "in_turn"}, 4), ({"scales": (2,)}, None)],
)
def test_explanations_look_at_the_image_in_one_piece(options, look):
    model = over_scales(vit(), **options)
    assert model.whole_look == look
    if look is None:
        with pytest.raises(UsageError, match="no part of S2 gives more than one cell"):
            site_of(model, images((1, 3, 64, 64)))
        return
    site = site_of(model, images((1, 3, 64, 64)))
    assert (site.call, site.grid, site.special) == (look, (4, 4), (0,)) and site.layer.startswith("inner.")


def test_tiles_in_turn_and_copies():
    backbone, x = cnn(), images((2, 3, 64, 49))
    together, in_turn = over_scales(backbone), over_scales(backbone, tiles="in_turn", inplace=True)
    assert in_turn.inner is backbone and together.inner is not backbone
    with torch.inference_mode():
        assert difference(in_turn(x).pyramid[0], together(x).pyramid[0]) < 1e-5
    assert together.state_dict().keys() == {f"inner.{name}" for name in backbone.state_dict()}
    assert list(together.trunk()) == list(together.inner.trunk())


@pytest.mark.parametrize("statistics", ["kept", "updated"])
def test_statistics_in_training_mode(statistics):
    model = over_scales(cnn(), statistics=statistics).train()
    before = model.inner.stem[1].running_mean.clone()  # type: ignore[index,union-attr]
    model(images((2, 3, 64, 64))).pooled.sum().backward()
    same = torch.equal(model.inner.stem[1].running_mean, before)  # type: ignore[index,union-attr]
    assert same == (statistics == "kept") and model.training
    assert all(p.grad is not None for p in model.parameters())


def test_it_exports_and_takes_half_precision():
    model, x = over_scales(cnn()), images((2, 3, 64, 64))
    with torch.inference_mode():
        expected = model(x).pooled
    exported = torch.export.export(model, (x,)).module()(x)
    assert difference(exported.pooled, expected) < 1e-5
    with torch.inference_mode():
        rough = model.to(torch.bfloat16)(x.bfloat16())
    assert rough.pooled.dtype == rough.pyramid[0].dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(rough.pooled.float(), expected).min() > 0.98


def test_what_does_not_work_is_refused():
    backbone = cnn()
    with pytest.raises(UsageError, match="is no backbone"):
        s2(classify(backbone, ("a", "b")))
    with pytest.raises(UsageError, match="no variant 'tow'; did you mean two"):
        s2(backbone, "tow")
    with pytest.raises(UsageError, match="nothing changes"):
        s2(backbone, scales=(1,))
    with pytest.raises(UsageError, match=r"scales is \(1, 0\)"):
        s2(backbone, scales=(1, 0))
    with pytest.raises(UsageError, match="position of one of the 2 scales"):
        s2(backbone, onto=2)
    with pytest.raises(UsageError, match="finer than the images"):
        s2(backbone, given=1, onto=1)
    with pytest.raises(UsageError, match="given is -1"):
        s2(backbone, given=-1)
    with pytest.raises(UsageError, match="fit is 'crop'"):
        s2(backbone, fit="crop")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="takes images"):
        over_scales(backbone)(images((1, 4, 64, 64)))


def test_probes_of_the_effect():
    torch.manual_seed(0)
    cells = torch.randn(40, 6, 4, 4)
    turned = torch.einsum("dc,bchw->bdhw", torch.randn(5, 6), cells)
    seen, wanted = (
        {n: experiment._Seen(x.mean((2, 3)), x, torch.empty(0)) for n in ("train", "val", "test")}
        for x in (cells, turned)
    )
    assert experiment._ridge(seen, wanted) > 0.999
    assert experiment._ridge(seen, {n: one._replace(cells=torch.randn(40, 5, 4, 4)) for n, one in wanted.items()}) < 0.1
    masks = torch.zeros(1, 6, 6, dtype=torch.int64)
    masks[0, :3, 3:], masks[0, 4:, 3] = 1, 1  # all of one cell of four, and two of another's nine pixels
    assert experiment._majority(masks, 2).tolist() == [[[0, 1], [0, 0]]]


def test_checks_of_the_effect_can_fail():
    def measured(s2_miou: float) -> Measured:
        rows = {"large": (60, 50, 30, 0.0, 19), "small": (55, 45, 25, 0.5, 3), "s2": (59.5, 48, s2_miou, 0.6, 15)}
        rows |= {"two": (56, 46, 28, 0.55, 6), "unsplit": (56, 46, 28, 0.55, 15)}
        names = ("transfer", "sprites", "miou", "r2", "macs")
        return Measured(
            {a: {n: np.full(3, float(v)) for n, v in zip(names, row, strict=True)} for a, row in rows.items()}
        )

    assert [check.holds for check in experiment._checks(measured(31))] == [True] * 5
    assert [check.holds for check in experiment._checks(measured(25.5))] == [False, False, False, True, True]
