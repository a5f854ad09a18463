"""Layout, rendering, determinism and shifts of sprite scenes."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vertebra.data.sprites import rendering, scene, scenes, world
from vertebra.data.sprites.textures import COLOURS, STRANGE, TEXTURES
from vertebra.errors import DataError, UsageError

CROWDED = world(size=96, objects=(8, 12), seed=5)


def test_boxes_areas_and_masks_are_what_shows():
    for index in range(20):
        render = rendering.render(CROWDED, "train", index)
        masks = render.masks
        assert len(masks) == len(render.boxes) >= 6
        assert masks.sum(0).max() == 1, "a pixel in two masks"
        for mask, box, area in zip(masks, render.boxes, render.area, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum() > 0


def test_the_nearer_thing_hides_the_farther_one():
    hidden_somewhere = 0
    for index in range(30):
        render = rendering.render(CROWDED, "train", index)
        assert sorted(render.plan.depth) == list(range(len(render.boxes)))
        solid = [render.alpha(thing) >= 0.5 for thing in range(len(render.boxes))]
        front = np.zeros_like(solid[0])
        for thing in np.argsort(render.plan.depth):
            np.testing.assert_array_equal(render.masks[thing], solid[thing] & ~front)
            assert render.hidden[thing] == pytest.approx(1 - (solid[thing] & ~front).sum() / solid[thing].sum())
            hidden_somewhere += render.hidden[thing] > 0
            front |= solid[thing]
    assert hidden_somewhere > 30


def test_something_of_each_thing_is_in_sight_and_depths_stay_as_planned():
    small = world(size=64, objects=(3, 8), overlap=0.45, touching=1.0)
    for index in range(300):
        render = rendering.render(small, "val", index)
        assert (render.area > 0).all()
        np.testing.assert_array_equal(render.plan.depth, scenes.plan(small, "val", index).depth)


def test_a_thing_that_is_hidden_altogether_comes_to_the_front():
    planned = scenes.plan(world(objects=2), "train", 0)
    parts = [(slice(0, 10), slice(0, 10), None), (slice(2, 5), slice(2, 5), None)]
    solid = [np.ones((10, 10), bool), np.ones((3, 3), bool)]
    fixed, ids = rendering._painted(16, planned._replace(depth=np.array([0, 1])), parts, solid)
    assert fixed.depth.tolist() == [1, 0]
    assert np.bincount(ids.ravel()).tolist() == [256 - 100, 91, 9]


def test_things_stay_inside_and_attributes_say_what_is_drawn():
    here = world(size=80, objects=(1, 4))
    for index in range(30):
        found = scene(0, index, size=80, objects=(1, 4))
        for thing in found.things:
            assert thing.radius <= thing.x <= 80 - thing.radius
            assert thing.radius <= thing.y <= 80 - thing.radius
            low, high = {name: (a, b) for name, a, b in here.sizes}[thing.size]
            assert low <= thing.radius / 80 <= high
            row, column = int(3 * thing.y / 80), int(3 * thing.x / 80)
            assert thing.position == scenes.POSITIONS[3 * row + column]
            if thing.texture == "plain" and thing.hidden < 0.5:
                inner = thing.visible & (thing.whole == 1)
                colour = np.median(found.image[inner], axis=0) if inner.any() else COLOURS[thing.colour]
                shares = colour / COLOURS[thing.colour]  # the outline is darker, and of the same hue
                assert np.ptp(shares) < 0.04
                assert 1 - rendering.RIM <= shares.mean() <= 1.01


def test_a_scene_is_the_same_whoever_draws_it_and_in_whatever_order():
    made = [rendering.render(CROWDED, "train", index).image for index in range(6)]
    with ThreadPoolExecutor(3) as pool:
        threads = list(pool.map(lambda index: rendering.rendered(CROWDED, "train", index).image, reversed(range(6))))
    sent = pickle.loads(pickle.dumps(CROWDED))
    assert sent == CROWDED
    for index in range(6):
        np.testing.assert_array_equal(made[index], threads[5 - index])
        np.testing.assert_array_equal(made[index], rendering.render(sent, "train", index).image)


def test_golden_scene():
    """A change of these numbers changes everybody's data: raise `targets.VERSION` with them."""
    planned = scenes.plan(world(), "train", 3)
    assert planned.labels.tolist() == [2, 15]
    np.testing.assert_allclose(planned.x, [14.988, 37.347], atol=1e-3)


def test_parts_seeds_and_indices_share_no_scene():
    places = {
        (part, seed, index): tuple(scenes.plan(world(seed=seed), part, index).x)
        for part in scenes.PARTS
        for seed in (0, 1)
        for index in range(200)
    }
    assert len(set(places.values())) == len(places)


def test_counts_are_even_and_crowds_find_room():
    counts = np.bincount([len(scenes.plan(world(), "train", index).labels) for index in range(3000)], minlength=4)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:] / 3000, 1 / 3, atol=0.035)
    crowd = [len(scenes.plan(world(size=256, objects=(60, 60)), "train", index).labels) for index in range(20)]
    assert np.mean(crowd) > 59


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7])
def test_the_long_tail_has_the_stated_frequencies(exponent):
    tailed = world(objects=(3, 3), long_tail=exponent, classes="shapes")
    labels = np.concatenate([scenes.plan(tailed, "train", index).labels for index in range(4000)])
    weights = np.arange(1, 13) ** -exponent
    wanted = weights / weights.sum()
    np.testing.assert_allclose(tailed.frequencies, wanted)
    found = np.bincount(labels, minlength=12) / len(labels)
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / len(labels))
    if exponent:
        slope = np.polyfit(np.log(np.arange(1, 13)), np.log(found), 1)[0]
        assert slope == pytest.approx(-exponent, abs=0.12)


def test_weights_of_classes_can_be_given():
    tailed = world(objects=1, long_tail=(0, 3, 1), classes=("star", "ring", "one"))
    labels = [scenes.plan(tailed, "train", index).labels[0] for index in range(2000)]
    np.testing.assert_allclose(np.bincount(labels, minlength=3) / 2000, (0, 0.75, 0.25), atol=0.035)


@pytest.mark.parametrize("shift", ["texture", "colour", "style"])
def test_a_shift_changes_the_look_and_leaves_the_layout(shift):
    differences = []
    for index in range(10):
        usual, shifted = scene(0, index), scene(0, index, shift=shift)
        np.testing.assert_array_equal(usual.ids, shifted.ids)
        assert [thing.name for thing in usual.things] == [thing.name for thing in shifted.things]
        assert [thing.colour for thing in usual.things] == [thing.colour for thing in shifted.things]
        textures = {thing.texture for thing in shifted.things}
        assert textures <= set(STRANGE if shift == "texture" else TEXTURES)
        differences.append(np.abs(usual.image.astype(float) - shifted.image).mean())
        half = scene(0, index, shift=shift, strength=0.0).image
        if shift != "texture":
            np.testing.assert_array_equal(half, usual.image)
    assert min(differences) > 3
    assert np.mean(differences) > 10


def test_sizes_can_be_given():
    found = [
        scene(0, index, size=96, objects=(2, 4), sizes={"tiny": (0.04, 0.05), "huge": (0.3, 0.35)})
        for index in range(40)
    ]
    radii = {name: [t.radius / 96 for one in found for t in one.things if t.size == name] for name in ("tiny", "huge")}
    assert 0.04 <= min(radii["tiny"]) <= max(radii["tiny"]) <= 0.05
    assert 0.3 <= min(radii["huge"]) <= max(radii["huge"]) <= 0.35
    assert any("huge" in one.caption for one in found)


def test_own_pictures_are_shown(tmp_path):
    rows, columns = np.mgrid[:64, :64]
    for number in range(8):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[..., 1], pixels[..., 3] = 255, 255 * (np.hypot(rows - 32, columns - 32) < 28)
        (tmp_path / "cut" / "ball").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "cut" / "ball" / f"{number}.png")
        Image.new("RGB", (90, 120), (10 * number, 0, 90)).save(tmp_path / "photos" / f"{number}.jpg")
    options = {"cutouts": tmp_path / "cut", "backgrounds": tmp_path / "photos", "classes": ("ball",), "objects": 1}
    found = scene(0, 0, **options)
    (thing,) = found.things
    assert (thing.name, thing.colour, thing.texture) == ("ball", "", "")
    assert found.caption.split(" ball ")[0] in ("a", "a small", "a large", "a little", "a big")
    np.testing.assert_allclose(found.image[thing.whole == 1].mean(0), (0, 255, 0), atol=4)
    assert np.abs(found.image[thing.whole == 0].mean(0)[1:] - (0, 90)).max() < 4
    (tmp_path / "cut" / "star").mkdir()
    with pytest.raises(DataError, match="has no images"):
        world(cutouts=tmp_path / "cut")
    Image.fromarray(pixels).save(tmp_path / "cut" / "star" / "0.png")
    with pytest.raises(DataError, match="has the name of a built-in one"):
        world(cutouts=tmp_path / "cut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("star", "hart")}, "sprites has no class 'hart'; did you mean heart"),
        ({"classes": "shape"}, "classes is 'shape'; did you mean shapes"),
        ({"classes": "cutouts"}, "names none; give cutouts="),
        ({"classes": ("star", "star")}, "each once"),
        ({"objects": (3, 2)}, "fewest and most"),
        ({"objects": 0}, "fewest and most"),
        ({"shift": "color"}, "shift is 'color'; did you mean colour"),
        ({"strength": 1.5}, r"strength is 1\.5; it must be in 0\.\.1"),
        ({"overlap": 0.6}, r"overlap is 0\.6; it must be in 0\.\.0\.45"),
        ({"long_tail": -1}, r"long_tail is -1\.0"),
        ({"long_tail": (1, 2)}, "give 22 weights"),
        ({"size": 16}, "size is 16 pixels"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        world(**options)


def test_unknown_parts_are_named():
    with pytest.raises(UsageError, match="part is 'training'; did you mean train"):
        scene(0, 0, part="training")
