import struct

import numpy as np
import pytest
from PIL import Image

from vertebra.data.sprites.orbits import (
    THINGS,
    Solids,
    backprojected,
    cast,
    export,
    look_at,
    orbit,
    pairs,
    projected,
    rays,
    tracks,
)
from vertebra.data.sprites.orbits.solids import GROUND, KINDS, NOTHING, covered, outward
from vertebra.data.sprites.orbits.things import placed, thing, turned
from vertebra.errors import UsageError


def solid(kind, centre=(0, 0, 2), halves=(1, 1, 1), turn=None):
    return Solids(
        np.array([KINDS.index(kind)]),
        np.array([centre], dtype=float),
        (np.eye(3) if turn is None else turn)[None],
        np.array([halves], dtype=float),
        np.zeros((1, 2, 3)),
        np.array([0]),
        np.array([1]),
    )


def inside(kind, local):
    """Whether places (N, 3) in unit coordinates are in a unit solid."""
    x, y, z = local.T
    return {
        "ball": x * x + y * y + z * z < 1,
        "box": np.abs(local).max(1) < 1,
        "cylinder": (np.hypot(x, y) < 1) & (np.abs(z) < 1),
        "cone": (np.hypot(x, y) < (1 - z) / 2) & (np.abs(z) < 1),
    }[kind]


def off(solids, number, points):
    """How far places (N, 3) are from the surface of a solid, in its unit coordinates."""
    local = (points - solids.centres[number]) @ solids.turns[number] / solids.halves[number]
    wide, z = np.hypot(local[:, 0], local[:, 1]), local[:, 2]
    kind = KINDS[solids.kinds[number]]
    if kind == "ball":
        return np.abs(np.linalg.norm(local, axis=1) - 1)
    if kind == "box":
        return np.abs(np.abs(local).max(1) - 1)
    if kind == "cylinder":
        return np.abs(np.maximum(wide, np.abs(z)) - 1)
    return np.minimum(np.abs(wide - (1 - z) / 2) + np.maximum(np.abs(z) - 1, 0), np.abs(z + 1))


@pytest.fixture(scope="module")
def seen():
    return orbit(0, 3, views=6, size=48, things=(3, 3), points=400)


@pytest.mark.parametrize("kind", KINDS)
def test_rays_meet_solids_where_a_march_along_them_does(kind):
    random = np.random.default_rng(KINDS.index(kind))
    turn = turned(33, 0) @ turned(71, 1) @ turned(12, 2)
    scene = solid(kind, (0.3, -0.2, 5.0), (0.9, 0.5, 0.7), turn)
    starts = scene.centres[0] + 4 * random.normal(size=(400, 3)) / np.sqrt(3) + [0, 0, 0]
    starts = starts[np.linalg.norm(starts - scene.centres[0], axis=1) > 1.5]
    steps = scene.centres[0] + random.uniform(-1, 1, starts.shape) - starts
    hits = cast(scene, starts, steps[:, :, None], ground=False)
    along = np.linspace(0, 2, 4001)
    places = starts[:, None] + along[:, None] * steps[:, None]
    local = (places - scene.centres[0]) @ turn / scene.halves[0]
    within = inside(kind, local.reshape(-1, 3)).reshape(len(starts), -1)
    met = within.any(1)
    assert 0.2 < met.mean() < 0.95
    grazed = np.isfinite(hits.distance[:, 0]) & ~met
    assert grazed.mean() < 0.02, "the march misses only what is thinner than its step"
    assert (hits.solid[met, 0] == 0).all()
    error = along[within.argmax(1)][met] - hits.distance[met, 0]
    assert error.min() > -1e-9
    assert error.max() < 0.0006  # of one step


@pytest.mark.parametrize(
    ("kind", "distance", "normal"),
    [("ball", 2, (0, 0, 1)), ("box", 2, (0, 0, 1)), ("cylinder", 2, (0, 0, 1)), ("cone", 3, (0.894427, 0, 0.447214))],
)
def test_solids_seen_from_above(kind, distance, normal):
    scene = solid(kind)
    x = 0.5 if kind == "cone" else 0.0
    hits = cast(scene, np.array([[x, 0.0, 5.0], [3.0, 0.0, 5.0]]), np.array([[[0.0], [0.0], [-1.0]]] * 2))
    np.testing.assert_allclose(hits.distance[:, 0], [distance, 5], atol=1e-9)
    assert hits.solid[:, 0].tolist() == [0, GROUND]
    point = np.array([[x, 0, 5 - distance]])
    np.testing.assert_allclose(outward(scene, point, 0)[0][0], normal, atol=1e-6)
    up = cast(scene, np.array([[3.0, 0.0, 5.0]]), np.array([[[0.0], [0.0], [1.0]]]))
    assert up.solid[0, 0] == NOTHING
    assert np.isinf(up.distance[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_normals_are_those_of_the_surface(kind):
    turn = turned(20, 0) @ turned(50, 2)
    scene = solid(kind, (0, 0, 2), (0.8, 0.6, 0.5), turn)
    poses = look_at(np.array([[3.0, 1.0, 3.5]]), np.array([0.0, 0, 2]))
    intrinsics = np.array([[200.0, 0, 50], [0, 200, 50], [0, 0, 1]])
    pixels = np.stack(np.meshgrid(np.arange(20, 80), np.arange(20, 80)), -1).reshape(-1, 2) + 0.5
    starts, steps = rays(poses, intrinsics, pixels)
    hits = cast(scene, starts, steps)
    met = np.flatnonzero(hits.solid[0] == 0)
    places = starts[0] + steps[0, :, met] * hits.distance[0, met, None]
    normals, _ = outward(scene, places, 0)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    assert (np.einsum("ni,ni->n", normals, steps[0, :, met]) < 0).all(), "they look at the camera"
    # A step along the surface, found by a second ray, is at right angles to the normal.
    _, beside = rays(poses, intrinsics, pixels + np.array([1e-5, 2e-5]))
    other = cast(scene, starts, beside)
    near = starts[0] + beside[0, :, met] * other.distance[0, met, None] - places
    smooth = other.solid[0, met] == 0
    turn_off = np.abs(np.einsum("ni,ni->n", near, normals))[smooth] / np.linalg.norm(near, axis=1)[smooth]
    assert np.quantile(turn_off, 0.98) < 1e-3


def test_an_orbit_depends_on_its_arguments_alone(seen):
    again = orbit(0, 3, views=6, size=48, things=(3, 3), points=400)
    for name in ("images", "depth", "masks", "parts", "normals", "poses", "points", "labels"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(again, name))
    for other in (orbit(1, 3), orbit(0, 13), orbit(0, 3, part="test")):
        assert not np.array_equal(other.solids.halves, orbit(0, 3).solids.halves)


def test_points_of_one_view_land_on_the_same_surface_in_another(seen):
    landed = hidden = 0
    for a, b in ((0, 1), (1, 2), (4, 2), (5, 0)):
        places = backprojected(seen.depth[a], seen.poses[a], seen.intrinsics)
        rows, columns = np.nonzero(seen.masks[a])
        points, parts = places[rows, columns], seen.parts[a, rows, columns]
        pixels, depth = projected(points, seen.poses[b], seen.intrinsics)
        hits = cast(seen.solids, *rays(seen.poses[b][None], seen.intrinsics, pixels))
        assert (hits.distance[0] <= depth + 1e-4).all(), "nothing is seen through a surface"
        same = np.abs(hits.distance[0] - depth) < 1e-4
        # Where two solids meet, either of them may be named.
        assert (hits.solid[0, same] + 1 == parts[same]).mean() > 0.99
        landed, hidden = landed + same.sum(), hidden + (~same).sum()
        back, there = projected(places[rows, columns], seen.poses[a], seen.intrinsics)
        np.testing.assert_allclose(back, np.stack([columns, rows], 1) + 0.5, atol=1e-3)
        np.testing.assert_allclose(there, seen.depth[a, rows, columns], atol=1e-5)
    assert landed > 0.25 * (landed + hidden)


def test_depth_masks_and_parts_agree(seen):
    assert seen.names[0] == THINGS[3]
    assert set(np.unique(seen.masks)) == {0, 1, 2, 3}
    assert np.array_equal(seen.masks > 0, seen.parts > 0)
    np.testing.assert_array_equal(np.r_[0, seen.solids.things][seen.parts], seen.masks)
    for view in range(len(seen)):
        places = backprojected(seen.depth[view], seen.poses[view], seen.intrinsics)
        ground = (seen.masks[view] == 0) & (seen.depth[view] > 0)
        height = np.abs(places[ground][:, 2])
        assert height.max() < 1e-5 * seen.depth[view].max() * 10
        for part in np.unique(seen.parts[view])[1:]:
            where = seen.parts[view] == part
            assert off(seen.solids, part - 1, places[where]).max() < 2e-4
            np.testing.assert_allclose(np.linalg.norm(seen.normals[view][where], axis=1), 1, atol=1e-6)
        sky = seen.depth[view] == 0
        assert (seen.normals[view][sky] == 0).all()
        np.testing.assert_allclose(seen.normals[view][ground], np.broadcast_to([0, 0, 1], (ground.sum(), 3)))


def test_cameras_go_around_and_see_all(seen):
    for pose in seen.poses:
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        pixels, depth = projected(seen.solids.corners.reshape(-1, 3), pose, seen.intrinsics)
        assert depth.min() > 0
        assert pixels.min() >= 0
        assert pixels.max() <= 48
        assert pose[1, 2] < 0, "down in the image is down in the world"
    around = np.degrees(np.unwrap(np.arctan2(*(seen.cameras - seen.cameras.mean(0))[:, 1::-1].T)))
    np.testing.assert_allclose(np.diff(around), 60, atol=8)
    half = orbit(0, 0, views=5, spread=180)
    turn = half.cameras[:, :2] - half.solids.corners.reshape(-1, 3)[:, :2].mean(0)
    assert np.degrees(np.arccos(turn[0] @ turn[-1] / np.prod(np.linalg.norm(turn[[0, -1]], axis=1)))) > 150


def test_pairs_have_the_angle_that_is_asked_for():
    seen = orbit(0, 1, views=24, size=16)
    for degrees in (15, 45, 90):
        chosen = pairs(seen, degrees, 400)
        assert chosen.shape == (400, 2)
        assert (chosen[:, 0] != chosen[:, 1]).all()
        assert np.abs(seen.angles[chosen[:, 0], chosen[:, 1]].mean() - degrees) < 2
    with pytest.raises(UsageError, match="takes two views"):
        pairs(orbit(0, 1, views=1, size=16), 15, 2)


def test_points_lie_on_the_things(seen):
    nearest = np.min([off(seen.solids, number, seen.points) for number in range(len(seen.solids))], axis=0)
    assert nearest.max() < 1e-4
    assert set(seen.point_things) == {1, 2, 3}
    for number in (1, 2, 3):
        of_it = seen.points[seen.point_things == number]
        box = seen.solids.corners[seen.solids.things == number].reshape(-1, 3)
        assert (of_it >= box.min(0) - 1e-5).all()
        assert (of_it <= box.max(0) + 1e-5).all()
    np.testing.assert_allclose(np.linalg.norm(seen.point_normals, axis=1), 1, atol=1e-6)


def test_a_ball_casts_a_shadow():
    scene = solid("ball", (0, 0, 2))
    light = np.array([0.6, 0, 0.8])
    under = np.array([[-1.5, 0, 0], [0, 0, 0], [-1.5, 2, 0], [0, 0, 3.001]])
    assert covered(scene, under, light).tolist() == [True, False, False, False]


def test_every_class_is_built_and_none_twice_alike():
    halves = []
    for name in THINGS:
        one, other = (thing(name, np.random.default_rng(seed)) for seed in (1, 2))
        assert one.corners[..., 2].min() > -0.12  # a leaning or lying part may dip
        assert np.linalg.norm(one.corners[..., :2], axis=-1).max() < 1.4
        assert len(one) != len(other) or not np.allclose(one.halves, other.halves)
        halves.append(one.halves.shape[0])
    assert min(halves) >= 2
    assert [orbit(0, index, views=1, size=16).names[0] for index in range(10)] == list(THINGS)
    moved = placed(one, (3.0, -1.0), 90)
    np.testing.assert_allclose(moved.centres[:, :2], one.centres[:, 1::-1] * [-1, 1] + [3, -1], atol=1e-12)


def test_things_do_not_touch():
    for index in range(6):
        scene = orbit(2, index, views=1, size=16, things=(4, 4)).solids
        reach = []
        for number in range(1, 5):
            of_it = scene.corners[scene.things == number].reshape(-1, 3)[:, :2]
            reach.append((of_it.min(0) + of_it.max(0), of_it))
        for a in range(4):
            for b in range(a):
                away = np.linalg.norm(reach[a][1][:, None] - reach[b][1], axis=2).min()
                assert away > 0


def read_text(folder):
    """COLMAP's three text files as its documentation has them."""
    lines = {
        name: [line for line in (folder / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
        for name in ("cameras", "images", "points3D")
    }
    camera = lines["cameras"][0].split()
    images = {}
    for head, sightings in zip(lines["images"][::2], lines["images"][1::2], strict=True):
        number, *pose, _, name = head.split()
        images[name] = int(number), np.array(pose, dtype=float), np.array(sightings.split(), dtype=float).reshape(-1, 3)
    points = {int(line.split()[0]): np.array(line.split()[1:], dtype=float) for line in lines["points3D"]}
    return camera, images, points


def pose_of(values):
    """A pose (4, 4) of a quaternion, w first, and a translation."""
    w, x, y, z = values[:4]
    found = np.eye(4)
    found[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    found[:3, 3] = values[4:]
    return found


def test_colmaps_text_gives_the_poses_back(seen, tmp_path):
    root = export(seen, tmp_path / "orbit")
    camera, images, points = read_text(root / "sparse" / "0")
    assert camera[:4] == ["1", "PINHOLE", "48", "48"]
    k = seen.intrinsics
    np.testing.assert_array_equal(np.array(camera[4:], dtype=float), [k[0, 0], k[1, 1], k[0, 2], k[1, 2]])
    assert list(images) == [f"{view:03d}.png" for view in range(6)]
    for view, (number, values, sightings) in enumerate(images.values()):
        assert number == view + 1
        np.testing.assert_allclose(pose_of(values), seen.poses[view], atol=1e-12)
        places = np.array([points[int(point)][:3] for point in sightings[:, 2]])
        pixels, depth = projected(places, pose_of(values), k)
        np.testing.assert_allclose(pixels, sightings[:, :2], atol=1e-3)
        row, column = np.floor(sightings[:, 1]).astype(int), np.floor(sightings[:, 0]).astype(int)
        np.testing.assert_allclose(depth, seen.depth[view, row, column], atol=0.0101)
    by_number = {number: sightings for number, _, sightings in images.values()}
    for point, values in points.items():
        for image, place in values[7:].reshape(-1, 2).astype(int):
            assert by_number[image][place, 2] == point
    assert len(points) == 400
    assert sum(len(values) > 7 for values in points.values()) > 390, "nearly every point is seen"
    for view in (0, 5):
        read = np.asarray(Image.open(root / "images" / f"{view:03d}.png"))
        np.testing.assert_array_equal(read, seen.images[view])
        np.testing.assert_array_equal(np.asarray(Image.open(root / "masks" / f"{view:03d}.png")), seen.masks[view])
        np.testing.assert_array_equal(np.load(root / "depth" / f"{view:03d}.npy"), seen.depth[view])
    with pytest.raises(UsageError, match="holds cameras already"):
        export(seen, root)


def test_colmaps_binary_says_the_same(seen, tmp_path):
    folder = export(seen, tmp_path, form="binary") / "sparse" / "0"
    count, number, model, width, height, *params = struct.unpack("<QIiQQ4d", (folder / "cameras.bin").read_bytes())
    assert (count, number, model, width, height) == (1, 1, 1, 48, 48)
    assert params[0] == seen.intrinsics[0, 0]
    data, found = (folder / "images.bin").read_bytes(), tracks(seen)
    place = 8
    for view in range(6):
        number, *values, _ = struct.unpack_from("<I7dI", data, place)
        assert number == view + 1
        np.testing.assert_allclose(pose_of(np.array(values)), seen.poses[view], atol=1e-12)
        place += 64
        end = data.index(b"\0", place)
        assert data[place:end].decode() == f"{view:03d}.png"
        (sightings,) = struct.unpack_from("<Q", data, end + 1)
        assert sightings == (found.views == view).sum()
        x, y, point = struct.unpack_from("<ddq", data, end + 9)
        assert [x, y, point - 1] == [*found.pixels[found.views == view][0], found.points[found.views == view][0]]
        place = end + 9 + 24 * sightings
    assert place == len(data)
    data, place = (folder / "points3D.bin").read_bytes(), 8
    for point in range(400):
        number, x, y, z, *_, length = struct.unpack_from("<Q3d3BdQ", data, place)
        assert number == point + 1
        np.testing.assert_array_equal(np.array([x, y, z], dtype=np.float32), seen.points[point])
        assert length == (found.points == point).sum()
        place += 51 + 8 * length
    assert place == len(data)
    header, body = (tmp_path / "points.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 400" in header
    np.testing.assert_array_equal(np.frombuffer(body[:12], "<f4"), seen.points[0])
    assert len(body) == 400 * 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "cart"}, "did you mean car"),
        ({"views": 0}, "at least 1, 8 and 1"),
        ({"things": (0, 1)}, "must rise within 1..9"),
        ({"spread": 400.0}, "0..360 degrees"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        orbit(0, 0, **options)
