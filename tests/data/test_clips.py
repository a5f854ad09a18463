import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vertebra.data.sprites.clips import MOTIONS, clip, save_frames, save_video
from vertebra.data.sprites.pictures import backgrounds_in
from vertebra.data.sprites.shapes import draw, placed
from vertebra.errors import UsageError

STILL = MOTIONS.index("still")


def alone(motion, index=0, **options):
    options = {"objects": (1, 1), "classes": ["arrow"], "motions": [motion], "size": 96} | options
    return clip(3, index, **options)


def centroids(mask):
    """Centres (T, 2) x, y of masks (T, H, W)."""
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]] + 0.5
    area = mask.sum((1, 2))
    return np.stack([(mask * columns).sum((1, 2)) / area, (mask * rows).sum((1, 2)) / area], 1)


def slants(mask):
    """Angles (T,) of the longest axes of masks (T, H, W), clockwise, followed from frame to frame."""
    found = []
    for one in mask:
        rows, columns = np.nonzero(one)
        (a, b), (_, c) = np.cov(columns, rows)
        found.append(0.5 * np.arctan2(2 * b, a - c))
    return np.unwrap(found, period=np.pi)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def test_a_clip_depends_on_its_arguments_alone():
    first = clip(5, 8, camera="shake", crossings=0.5)
    assert same(first, clip(5, 8, camera="shake", crossings=0.5))
    for other in (clip(6, 8), clip(5, 9), clip(5, 8, part="val")):
        assert not np.array_equal(first.frames, other.frames)


def test_what_is_known_follows_from_what_shows():
    for index in range(12):
        seen = clip(0, index, objects=(2, 5), entries=0.5, crossings=0.5, frames=8)
        masks = seen.masks
        assert masks.sum(1).max() <= 1
        assert np.array_equal(masks.any(1), seen.ids > 0)
        for frame in range(8):
            for thing in range(len(seen.tracks)):
                rows, columns = np.nonzero(masks[frame, thing])
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
                assert seen.boxes[frame, thing].tolist() == box
                if len(rows):
                    whole = seen.whole[frame, thing]
                    assert (whole[:2] <= box[:2]).all()
                    assert (whole[2:] >= box[2:]).all()
        assert ((seen.visibility > 0) == masks.any((2, 3))).all()


def test_masks_are_those_of_the_glyphs_where_the_paths_say():
    seen = clip(1, 4, objects=(3, 3), classes=["star", "heart", "seven"], camera="pan")
    for frame in (0, 7, 15):
        expected = np.zeros(seen.ids.shape[1:], dtype=np.uint8)
        for thing in np.argsort(-seen.depth):
            name = seen.classes[seen.labels[thing]]
            if name == "seven":
                continue  # its handwriting is drawn at random
            x, y = seen.centres[frame, thing].tolist()
            stamp = draw(name, x, y, float(seen.radii[frame, thing]), float(seen.angles[frame, thing]))
            rows, columns, alpha = placed(stamp, *expected.shape)
            expected[rows, columns][alpha >= 0.5] = thing + 1
            hidden = np.isin(seen.ids[frame], [other + 1 for other in np.flatnonzero(seen.depth < seen.depth[thing])])
            wrong = ((expected == thing + 1) != (seen.ids[frame] == thing + 1)) & ~hidden & (expected == thing + 1)
            assert wrong.sum() <= 1, "at most a pixel at the edge, by rounding"


@pytest.mark.parametrize(("motion", "way"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_drifts_go_their_way_at_an_even_pace(motion, way):
    seen = alone(motion)
    steps = np.diff(centroids(seen.masks[:, 0]), axis=0)
    along, across = steps @ way, steps @ way[::-1]
    assert seen.action == MOTIONS.index(motion)
    np.testing.assert_allclose(along, along.mean(), atol=0.35)
    assert 0.016 * 96 < along.mean() < 0.034 * 96
    np.testing.assert_allclose(across, 0, atol=0.35)
    assert (seen.visibility == 1).all(), "a drift of 16 frames stays in the frame"


@pytest.mark.parametrize(("motion", "sign"), [("clockwise", 1), ("anticlockwise", -1)])
def test_turns_turn_and_stay(motion, sign):
    seen = alone(motion)
    turned = np.degrees(np.diff(slants(seen.masks[:, 0])))
    assert (turned * sign > 4).all()
    assert (turned * sign < 16).all()
    np.testing.assert_allclose(turned.sum(), np.degrees(seen.angles[-1, 0] - seen.angles[0, 0]), atol=4)
    assert np.ptp(seen.centres[:, 0], axis=0).max() == 0


@pytest.mark.parametrize(("motion", "ratio"), [("grow", 2.2**2), ("shrink", 2.2**-2)])
def test_areas_grow_and_shrink(motion, ratio):
    area = alone(motion).masks[:, 0].sum((1, 2))
    assert area[-1] / area[0] == pytest.approx(ratio, rel=0.1)
    assert (np.diff(area) * np.log(ratio) > 0).all()


def test_the_other_motions_are_what_they_are_called():
    shaken, still = (centroids(alone(motion).masks[:, 0]) for motion in ("shake", "still"))
    signs = np.sign(np.diff(shaken[:, 0]))
    assert (signs[1:] != signs[:-1]).sum() == 7, "to and fro every other frame"
    assert np.ptp(shaken[:, 0]) > 2
    assert np.ptp(shaken[:, 1]) < 0.2
    np.testing.assert_array_equal(still, np.broadcast_to(still[0], still.shape))
    circle = alone("circle", frames=32).centres[:, 0]
    middle = np.linalg.lstsq(np.c_[2 * circle, np.ones(32)], (circle**2).sum(1), rcond=None)[0][:2]  # of the circle
    radii = np.linalg.norm(circle - middle, axis=1)
    np.testing.assert_allclose(radii, radii.mean(), rtol=0.01)
    for index in range(8):
        bounced = alone("bounce", index)
        turns = np.sign(np.diff(bounced.centres[:, 0], axis=0))
        assert (turns[1:] != turns[:-1]).any(), "it meets an edge"
        assert (bounced.visibility > 0.98).all()


def test_two_things_cross_and_one_hides_the_other():
    parted = []
    for index in range(16):
        seen = clip(2, index, objects=(2, 2), classes=["circle", "square"], motions=["left", "up"], crossings=1.0)
        np.testing.assert_allclose(seen.centres[8, 0], seen.centres[8, 1], atol=1e-4)
        far = int(seen.depth.argmax())
        assert seen.visibility[8, 1 - far] > 0.9
        assert seen.visibility[8, far] < 0.75  # the smallest square hides 0.27 of the largest circle
        if seen.motions[0, 0] != seen.motions[0, 1]:
            parted.append(seen.visibility[0, far] - seen.visibility[8, far] > 0.2)
    assert len(parted) >= 5
    assert np.mean(parted) > 0.8


def test_things_come_late_and_leave_early():
    late = early = 0
    for index in range(30):
        seen = clip(4, index, objects=(1, 1), motions=["left", "right", "up", "down"], entries=1.0)
        shown = seen.visibility[:, 0]
        late += shown[0] == 0 and shown[-1] > 0.5
        early += shown[0] > 0.5 and shown[-1] == 0
        assert (seen.boxes[shown == 0] == 0).all()
    assert late + early == 30
    assert min(late, early) >= 8


def test_motions_change_in_step():
    seen = clip(0, 3, frames=12, changes=2, objects=(2, 2))
    spells = seen.motions.reshape(3, 4, 2)
    assert (spells == spells[:, :1]).all()
    assert (spells[1:, 0] != spells[:-1, 0]).all()
    assert seen.sentences[0][0].count(", then ") == 2


def test_a_camera_moves_the_world():
    seen = clip(0, 2, objects=(1, 1), motions=["still"], camera="shake", size=64)
    assert np.ptp(seen.camera, axis=0).min() >= 2
    world = seen.centres[:, 0] + seen.camera
    np.testing.assert_allclose(world, np.broadcast_to(world[0], world.shape), atol=1e-4)
    (dx, dy), both = seen.camera[1] - seen.camera[0], slice(10, 54)
    there = seen.frames[0, 10 + dy : 54 + dy, 10 + dx : 54 + dx]
    np.testing.assert_array_equal(seen.frames[1, both, both], there)
    panned = clip(0, 2, camera="pan").camera
    assert np.linalg.norm(panned[-1] - panned[0]) > 0.1 * 64


def test_sentences_single_things_out():
    said = 0
    for index in range(40):
        seen = clip(7, index, objects=(2, 5), classes=["one", "star", "ring"])
        sentences = [sentence for many in seen.sentences for sentence in many]
        assert len(set(sentences)) == len(sentences)
        assert all(len(many) >= 1 for many in seen.sentences)
        said += len(sentences)
    assert said > 300
    seen = clip(7, 0, objects=(1, 1), classes=["one"], motions=["left"])
    assert seen.sentences[0][0].endswith(" 1 moving left")


def test_all_things_show_somewhere():
    seen = [clip(9, index, objects=(1, 3)) for index in range(80)]
    best = np.concatenate([one.visibility.max(0) for one in seen])
    assert best.min() > 0.3
    assert np.mean([one.visibility.mean() for one in seen]) > 0.85
    assert {motion for one in seen for motion in one.motions[0].tolist()} == set(range(len(MOTIONS)))


def test_photographs_lie_behind(tmp_path):
    for number in range(2):
        Image.fromarray(np.full((80, 90, 3), 40 + 100 * number, np.uint8)).save(tmp_path / f"{number}.png")
    seen = clip(0, 1, backgrounds=backgrounds_in(tmp_path))
    outside = np.ones(seen.ids.shape, dtype=bool)
    for frame, boxes in enumerate(seen.whole):
        for left, top, right, bottom in boxes.astype(int):
            outside[frame, max(0, top - 4) : bottom + 4, max(0, left - 4) : right + 4] = False  # tips are faint
    assert np.unique(seen.frames[outside]).tolist() in ([40], [140])


def test_a_folder_of_frames_holds_everything(tmp_path):
    seen = clip(0, 5, frames=4, entries=1.0, objects=(3, 3))
    root = save_frames(seen, tmp_path / "a" / "b")
    for frame in range(4):
        read = np.asarray(Image.open(root / "frames" / f"{frame:05d}.png"))
        np.testing.assert_array_equal(read, seen.frames[frame])
        mask = Image.open(root / "masks" / f"{frame:05d}.png")
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), seen.ids[frame])
    known = json.loads((root / "clip.json").read_text())
    assert [thing["track"] for thing in known["things"]] == [1, 2, 3]
    for number, thing in enumerate(known["things"]):
        boxes = [[0.0] * 4 if box is None else box for box in thing["boxes"]]
        np.testing.assert_array_equal(boxes, seen.boxes[:, number])
        assert thing["sentences"] == list(seen.sentences[number])
        assert thing["motions"][0] == MOTIONS[seen.motions[0, number]]
    with pytest.raises(UsageError, match="holds a clip already"):
        save_frames(seen, root)


def test_a_video_shows_the_frames(tmp_path):
    av = pytest.importorskip("av")
    seen = clip(0, 6, frames=10)
    file = save_video(seen, tmp_path / "clips" / "0.mp4", rate=5)
    with av.open(str(file)) as container:
        assert container.streams.video[0].average_rate == 5
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == seen.frames.shape
    error = np.mean((read.astype(float) - seen.frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 26  # the colours' resolution is halved
    with pytest.raises(UsageError, match="is there already"):
        save_video(seen, file)
    with pytest.raises(UsageError, match="even"):
        save_video(clip(0, 0, size=33, frames=2), tmp_path / "odd.mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"motions": ["lefft"]}, "did you mean left"),
        ({"classes": ["hart"]}, "did you mean heart"),
        ({"camera": "pann"}, "did you mean pan"),
        ({"part": "dev"}, "there are train, val, test"),
        ({"frames": 0}, "1 to 256 frames"),
        ({"objects": (3, 2)}, "must rise within 1..9"),
        ({"changes": 16}, "changes is 16"),
        ({"crossings": 1.5}, "crossings is 1.5"),
        ({"motions": []}, "no motion is given"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        clip(0, 0, **options)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, vertebra.data.sprites.clips, vertebra.data.sprites.orbits, vertebra.data.sprites.rooms;"
        "print([name for name in ('torch', 'scipy', 'sklearn', 'av') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
