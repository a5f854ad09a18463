"""Glyphs, textures and a user's own pictures."""

import numpy as np
import pytest
from PIL import Image

from vertebra.data.digits import digits
from vertebra.data.sprites import pictures, shapes, textures
from vertebra.errors import DataError, UsageError

AXIS = np.linspace(-1.2, 1.2, 601, dtype=np.float32)
GRID = np.meshgrid(AXIS, AXIS)


@pytest.mark.parametrize("name", shapes.GLYPHS)
def test_a_glyph_fills_the_unit_circle_and_no_half_of_it_alone(name):
    sample = shapes.digit_samples("all")[shapes.DIGITS.index(name)][0] if name in shapes.DIGITS else 0
    x, y = GRID
    inside = shapes.distance(name, x, y, sample=sample) <= 0
    radius = np.hypot(x, y)[inside]
    assert radius.max() == pytest.approx(1, abs=0.02)
    touching = np.arctan2(y, x)[inside][radius > 0.96]
    assert len(touching), "nothing touches the circle"
    gaps = np.diff(np.sort(np.concatenate([touching, touching + 2 * np.pi])))
    assert gaps.max() < np.pi + 0.35  # the smallest circle around it: touched on both sides of every diameter


def test_areas_are_those_of_geometry():
    side = 40.0
    areas = {
        "circle": np.pi,
        "square": 2.0,
        "triangle": 3 * np.sqrt(3) / 4,
        "hexagon": 3 * np.sqrt(3) / 2,
        "pentagon": 2.5 * np.sin(2 * np.pi / 5),
        "ring": np.pi * (1 - 0.54**2),
        "diamond": 2 * 0.62,
    }
    for name, area in areas.items():
        for angle in (0.0, 0.3):
            alpha = shapes.draw(name, 50.3, 49.8, side, angle).alpha
            assert alpha.sum() == pytest.approx(area * side * side, rel=0.01), name


def test_a_mask_does_not_depend_on_where_it_is_drawn_and_turns_with_its_angle():
    here, there = shapes.draw("star", 20.25, 20.5, 9, 0.4), shapes.draw("star", 33.25, 41.5, 9, 0.4)
    np.testing.assert_allclose(here.alpha, there.alpha, atol=1e-4)
    assert (there.left - here.left, there.top - here.top) == (13, 21)
    quarter = shapes.draw("arrow", 20, 20, 9, np.pi / 2)
    np.testing.assert_allclose(quarter.alpha, np.rot90(shapes.draw("arrow", 20, 20, 9).alpha, -1), atol=1e-3)


def test_what_is_beside_the_canvas_is_cut_off():
    stamp = shapes.draw("circle", 2, 30, 10)
    rows, columns, alpha = shapes.placed(stamp, 32, 40)
    assert (rows, columns) == (slice(19, 32), slice(0, 13))
    assert alpha.shape == (13, 13)
    rows, columns, alpha = shapes.placed(shapes.draw("circle", -50, 500, 10), 32, 40)
    assert alpha.size == 0
    assert np.zeros((32, 40))[rows, columns].shape == alpha.shape


def test_handwriting_is_the_real_one_and_in_one_split_only():
    parts = {part: shapes.digit_samples(part) for part in ("train", "val", "test")}
    rows = np.concatenate([np.concatenate(some) for some in parts.values()])
    assert len(rows) == len(set(rows.tolist())) == 1797
    pixels = digits().split("train").store.pixels
    agreements = []
    for row in np.concatenate([some[:4] for some in parts["train"]]):  # drawn, shrunk to the sample's pixels again
        digit = int(digits().split("train").targets[np.flatnonzero(digits().split("train").rows == row)[0]])
        ink, stamp = pixels[row] > 128, shapes.draw(shapes.DIGITS[digit], 32, 32, 30, sample=row).alpha > 0.5
        small = Image.fromarray(_cropped(stamp)).resize(_cropped(ink).shape[::-1], Image.Resampling.BOX)
        agreements.append((np.asarray(small) == _cropped(ink)).mean())
    assert np.mean(agreements) > 0.85
    assert np.min(agreements) > 0.6


def _cropped(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(UsageError, match="no glyph is called 'sta'; did you mean star"):
        shapes.draw("sta", 0, 0, 4)
    with pytest.raises(UsageError, match=r"no texture is called 'stripd'; did you mean striped"):
        textures.pattern("stripd", *GRID)


@pytest.mark.parametrize("name", textures.PATTERNS)
def test_patterns_are_weights_that_repeat_the_same(name):
    table = textures.lattice(np.random.default_rng(3))
    x, y = GRID
    weights = textures.pattern(name, 9 * x, 9 * y, scale=2, angle=0.3, table=table)
    assert weights.shape == x.shape
    assert weights.dtype == np.float32
    assert weights.min() >= 0
    assert weights.max() <= 1
    np.testing.assert_array_equal(weights, textures.pattern(name, 9 * x, 9 * y, scale=2, angle=0.3, table=table))
    assert (weights.std() > 0.05) == (name != "plain")


def test_a_pattern_moves_with_its_coordinates():
    x, y = GRID
    striped = textures.pattern("striped", x, y, scale=0.4)
    np.testing.assert_allclose(striped, textures.pattern("striped", x, y + 0.4, scale=0.4), atol=2e-3)
    assert np.ptp(striped, axis=1).max() < 1e-6, "stripes lie across"


def test_second_colours_keep_the_hue_and_differ():
    for name, colour in textures.COLOURS.items():
        second = textures.second_colour(np.array(colour))
        assert np.abs(second - colour).max() > 40, name
        assert np.argmax(second) == np.argmax(colour), name


@pytest.fixture
def cutouts(tmp_path):
    """Two classes of cut-outs: a half-transparent frame around an opaque disc, and one with a few files only."""
    rows, columns = np.mgrid[:60, :80]
    disc = np.hypot(rows - 30, columns - 40) < 25
    for name, count in (("coin", 5), ("leaf", 2)):
        for number in range(count):
            pixels = np.zeros((60, 80, 4), np.uint8)
            pixels[..., 0], pixels[..., 3] = 200 - 10 * number, 255 * disc
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_a_cut_out_is_drawn_to_its_circle_in_its_own_colour(cutouts):
    found = pictures.cutouts_in(cutouts)
    assert {name: len(some.files) for name, some in found.items()} == {"coin": 5, "leaf": 2}
    for radius in (6.0, 12.0, 25.0):
        stamp, colours = pictures.draw_cutout(pictures.cutout(found["coin"].files[0]), 40, 40, radius, 0.7)
        assert stamp.alpha.sum() == pytest.approx(np.pi * radius**2, rel=0.06)
        rows, columns = shapes.placed(stamp, 80, 80)[:2]
        middle = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
        assert middle == pytest.approx((40, 40), abs=1)
        opaque = stamp.alpha > 0.9
        np.testing.assert_allclose(colours[opaque].mean(0), (200, 0, 0), atol=2)


def test_pictures_are_divided_among_splits_where_there_are_enough(cutouts):
    found = pictures.cutouts_in(cutouts)
    files = [found["coin"].of_part(part) for part in pictures.PARTS]
    assert [len(some) for some in files] == [3, 1, 1]
    assert len({file for some in files for file in some}) == 5
    assert found["leaf"].shared
    assert found["leaf"].of_part("test") == found["leaf"].files


def test_a_cut_out_without_transparency_is_refused_by_name(tmp_path):
    (tmp_path / "box").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "box" / "plain.png")
    with pytest.raises(DataError, match=r"plain\.png has no transparency"):
        pictures.cutout(pictures.cutouts_in(tmp_path)["box"].files[0])
    Image.new("RGBA", (20, 20)).save(tmp_path / "box" / "empty.png")
    with pytest.raises(DataError, match=r"empty\.png is transparent all over"):
        pictures.cutout(str(tmp_path / "box" / "empty.png"))
    with pytest.raises(DataError, match="there is none of that name"):
        pictures.cutouts_in(tmp_path / "nowhere")


def test_photographs_are_cropped_not_bent(tmp_path):
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    files = pictures.backgrounds_in(tmp_path).files
    cut = pictures.photograph(files, 50, np.random.default_rng(0))
    assert cut.shape == (50, 50, 3)
    steps = np.abs(np.diff(cut[20, :, 0]))
    assert 1 <= steps.mean() <= 2.1  # 100 pixels of height shown by 50 to 88
    assert np.ptp(cut, axis=0).max() <= 1
