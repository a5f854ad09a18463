from dataclasses import replace

import numpy as np
import pytest

from vertebra.data.sprites.orbits.solids import Solids, cast
from vertebra.data.sprites.rooms import ACTIONS, CLASSES, House, ManyRooms, Rooms, at, free_steps, house, look, spl
from vertebra.data.sprites.rooms.eyes import CEILING, EYE
from vertebra.data.sprites.rooms.houses import RADIUS
from vertebra.data.sprites.textures import COLOURS
from vertebra.errors import UsageError

STOP, FORWARD, LEFT, RIGHT = range(4)


def hall(tiles=6, door=None):
    """A house of one empty room; with a door, of two rooms on both sides of a wall in the middle."""
    found = house(0, 0, tiles=tiles, things=0)
    upright, level = np.zeros((tiles + 1, tiles), dtype=bool), np.zeros((tiles, tiles + 1), dtype=bool)
    upright[[0, -1]] = level[:, [0, -1]] = True
    if door is not None:
        upright[tiles // 2] = True
        upright[tiles // 2, door] = False
    rooms = np.zeros((tiles, tiles), dtype=np.int64)
    return replace(found, upright=upright, level=level, rooms=rooms)


def bare(home):
    """A house without its things."""
    columns = ("kinds", "places", "halves", "turns", "labels", "patterns", "colours")
    return replace(home, **{name: getattr(home, name)[:0] for name in columns})


def slopes(size):
    return (np.arange(size) + 0.5) * 2 / size - 1


def crossed(walls, start, end):
    """Whether a way from `start` to `end` meets one of the walls (W, 4)."""
    for left, low, right, high in walls:
        axis = 0 if left == right else 1
        line, ends = (left, (low, high)) if axis == 0 else (low, (left, right))
        a, b = start[axis] - line, end[axis] - line
        if a * b < 0 and ends[0] < start[1 - axis] + a / (a - b) * (end[1 - axis] - start[1 - axis]) < ends[1]:
            return True
    return False


def walked(env, act, episodes, seed=0):
    """What is known at the end of episodes in which `act` chooses the actions."""
    found = []
    for number in range(episodes):
        env.begin(seed=seed, options={"episode": number})
        over = False
        while not over:
            _, terminated, truncated = env.act(act())
            over = terminated or truncated
        found.append(env.info())
    return found


def test_the_depth_of_a_wall_is_geometry():
    place, size = np.array([[2.0, 3.0]]), 64
    for degrees in (0, 90, 17, 200):
        angle = np.radians(degrees)
        seen = look([hall()], place, np.array([angle]), size=size)
        across = slopes(size)
        dx, dy = np.cos(angle) + across * np.sin(angle), np.sin(angle) - across * np.cos(angle)
        ahead = np.minimum(np.where(dx > 0, 4, -2) / dx, np.where(dy > 0, 3, -3) / dy)  # to the walls of the hall
        down = slopes(size)
        plane = np.where(down > 0, EYE, EYE - CEILING) / down
        np.testing.assert_allclose(seen.depth[0], np.minimum(ahead, plane[:, None]), rtol=1e-5)
    facing = look([hall()], place, np.zeros(1), size=size)
    np.testing.assert_allclose(facing.depth[0, size // 2 - 4 : size // 2 + 4, 8:56], 4.0, rtol=1e-6)
    assert (facing.things == 0).all()


def test_a_door_shows_the_room_behind():
    seen = look([hall(door=3)], np.array([[1.5, 3.5]]), np.zeros(1), size=64)
    np.testing.assert_allclose(seen.depth[0, 32, 24:40], 4.5, rtol=1e-5)
    np.testing.assert_allclose(seen.depth[0, 32, [4, 60]], 1.5, rtol=1e-5)


def test_things_are_where_rays_meet_them():
    compared = 0
    for number in range(6):
        home = house(3, number)
        count, size = len(home.labels), 48
        cos, sin, zero = np.cos(home.turns), np.sin(home.turns), np.zeros(count)
        turns = np.stack(
            [np.stack([cos, -sin, zero], 1), np.stack([sin, cos, zero], 1), np.tile([0, 0, 1], (count, 1))], 1
        )
        scene = Solids(
            home.kinds,
            np.c_[home.places, home.halves[:, 2]],
            turns,
            home.halves,
            np.zeros((count, 2, 3)),
            np.zeros(count, dtype=int),
            np.arange(count) + 1,
        )
        free = home.nodes[home.free.ravel()]
        random = np.random.default_rng(number)
        places, headings = free[random.integers(len(free), size=12)], random.uniform(0, 7, 12)
        seen = look([home], places, headings, size=size)
        empty = look([bare(home)], places, headings, size=size)
        across, down = (one.ravel() for one in np.meshgrid(slopes(size), slopes(size)))
        cos, sin = np.cos(headings)[:, None], np.sin(headings)[:, None]
        steps = np.stack([cos + across * sin, sin - across * cos, np.broadcast_to(-down, (12, size * size))], 1)
        hits = cast(scene, np.c_[places, np.full(12, EYE)], steps, ground=False)
        before = hits.distance.reshape(12, size, size) < empty.depth - 1e-4
        behind = hits.distance.reshape(12, size, size) > empty.depth + 1e-4
        np.testing.assert_array_equal(seen.things[before], hits.solid.reshape(12, size, size)[before] + 1)
        np.testing.assert_allclose(seen.depth[before], hits.distance.reshape(12, size, size)[before], rtol=1e-5)
        assert (seen.things[behind] == 0).all()
        np.testing.assert_array_equal(seen.depth[behind], empty.depth[behind])
        np.testing.assert_array_equal(seen.images[behind], empty.images[behind])
        compared += before.sum()
        for thing in range(count):
            if (seen.things == thing + 1).sum() > 30:
                pixels = seen.images[seen.things == thing + 1].mean(0)
                named = np.array(COLOURS[home.names[thing].split()[0]], dtype=float)
                assert np.corrcoef(pixels, named)[0, 1] > 0.9
    assert compared > 3000


def test_views_do_not_depend_on_their_neighbours():
    homes = [house(1, number) for number in range(4)]
    places = np.stack([home.nodes[home.free.ravel()][100] for home in homes])
    headings = np.arange(4.0)
    together = look(homes, places, headings, size=32)
    for row, home in enumerate(homes):
        alone = look([home], places[row : row + 1], headings[row : row + 1], size=32)
        np.testing.assert_array_equal(alone.images[0], together.images[row])
        np.testing.assert_array_equal(alone.depth[0], together.depth[row])
        np.testing.assert_array_equal(alone.things[0], together.things[row])
    without = look(homes, places, headings, size=32, rooms=False)
    np.testing.assert_array_equal(without.things, together.things)
    assert not without.images.any()


def test_an_odd_number_of_rows_has_one_that_looks_level():
    home = house(0, 1)
    place = home.nodes[home.free.ravel()][:1]
    seen = look([home], place, np.zeros(1), size=33)
    assert np.isfinite(seen.depth).all()
    assert seen.depth.max() < 8 * np.sqrt(2)


def test_what_cannot_be_seen_together_is_refused():
    homes, place = [house(0, 0), house(0, 1, tiles=6)], np.ones((2, 2))
    with pytest.raises(UsageError, match="as many tiles"):
        look(homes, place, np.zeros(2))
    with pytest.raises(UsageError, match="2 houses, 1 places"):
        look(homes, place[:1], np.zeros(1))
    with pytest.raises(UsageError, match="a place is outside"):
        look(homes[:1], 9 * place, np.zeros(2))


def test_the_way_on_foot():
    empty = hall(tiles=8)
    goal = np.array([[1.0625, 1.0625]])
    field = empty.distances(goal)
    points = np.random.default_rng(0).uniform(0.2, 7.8, (500, 2))
    straight = np.linalg.norm(points - goal, axis=1)
    far = straight > 1
    ratio = at(field, points)[far] / straight[far]
    assert ratio.min() > 0.97
    assert ratio.max() < 1.05
    halved = hall(tiles=8, door=7)  # the way from below leads around the wall's end at (4, 7)
    start = np.array([[6.9375, 1.0625]])
    around = np.linalg.norm([4 - RADIUS - 1.0625, 7 - 1.0625]) + np.linalg.norm([6.9375 - 4 - RADIUS, 7 - 1.0625])
    assert at(halved.distances(goal), start)[0] == pytest.approx(around + 2 * RADIUS, rel=0.03)
    with pytest.raises(UsageError, match="fits at none of the goals"):
        empty.distances(np.array([[0.01, 0.01]]))


def test_a_free_path_is_as_long_as_the_walker_finds_it():
    env = Rooms(max_steps=1000)
    counted = 0
    for episode in range(12):
        env.begin(seed=4, options={"episode": episode})
        told = int(free_steps(env.house, env.place[None], np.array([env.heading]))[0])
        taken = 0
        while taken < 10:
            env.act(FORWARD)
            if env.info()["collided"]:
                break
            taken += 1
        assert taken == told
        counted += 0 < told < 10
    assert counted >= 6


def test_walls_and_things_cannot_be_crossed():
    random, collided = np.random.default_rng(0), 0
    env = Rooms(max_steps=10_000)
    for episode in range(4):
        env.begin(seed=1, options={"episode": episode})
        for _ in range(600):
            before = env.place
            env.act(int(random.choice([FORWARD, FORWARD, FORWARD, LEFT, RIGHT])))
            assert not crossed(env.house.walls, before, env.place)
            collided += env.info()["collided"]
        assert (env.house.clearance(np.stack([before, env.place])) >= RADIUS).all()
    assert collided > 100, "it runs into things all the time"
    home = hall(tiles=6, door=0)
    assert crossed(home.walls, (2.9, 3.0), (3.1, 3.0))
    assert not crossed(home.walls, (2.9, 0.5), (3.1, 0.5))


@pytest.mark.parametrize("task", ["object", "image", "point"])
def test_the_oracle_gets_there_on_the_shortest_way(task):
    env = Rooms(task=task)
    found = walked(env, env.oracle, 30)
    assert all(one["success"] for one in found)
    assert np.mean([one["spl"] for one in found]) > 0.95
    assert min(one["spl"] for one in found) > 0.85
    assert all(one["distance"] <= 0.5 for one in found)


def test_chance_does_not_get_there():
    env, random = Rooms(max_steps=100), np.random.default_rng(0)
    with_stop = walked(env, lambda: int(random.integers(4)), 40)
    forever = walked(env, lambda: int(random.integers(1, 4)), 10)
    assert np.mean([one["spl"] for one in with_stop]) < 0.1
    assert not any(one["success"] for one in forever)
    assert all(one["steps"] == 100 for one in forever)


def test_a_seed_is_an_episode():
    actions = np.random.default_rng(0).integers(1, 4, 30)

    def played(env, **options):
        seen, info = env.reset(**options)
        rows = [(seen["rgb"], 0.0, info["distance"])]
        for action in actions:
            seen, reward, _, _, info = env.step(action)
            rows.append((seen["rgb"], reward, info["distance"]))
        return [np.stack(column) for column in zip(*rows, strict=True)]

    env, other = Rooms(size=32), Rooms(size=32)
    other.reset(seed=9)
    first, again, following = played(env, seed=5), played(other, seed=5), played(env)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], following[0])
    np.testing.assert_array_equal(played(other, options={"episode": 0})[0], first[0])
    np.testing.assert_array_equal(played(other)[0], following[0])


def test_a_step_returns_what_gymnasium_has():
    env = Rooms(size=64, depth=True, max_steps=3)
    seen, info = env.reset(seed=2)
    assert seen["rgb"].shape == (64, 64, 3)
    assert seen["rgb"].dtype == np.uint8
    assert seen["depth"].shape == (64, 64)
    assert CLASSES[int(seen["goal"])] == info["goal"]
    assert info["goal"] in env.house.names
    assert info["distance"] == info["shortest"] >= 2
    for number in (1, 2, 3):
        seen, reward, terminated, truncated, info = env.step(LEFT)
        assert reward == pytest.approx(-0.01)
        assert (terminated, truncated, info["steps"]) == (False, number == 3, number)
    assert info["spl"] == 0
    with pytest.raises(UsageError, match="the episode is over"):
        env.step(FORWARD)
    env.reset()
    _, reward, terminated, truncated, info = env.step(STOP)
    assert (terminated, truncated, info["success"]) == (True, False, False)
    np.testing.assert_array_equal(env.render(), env.look().images[0])


def test_rewards_sum_to_the_way():
    env = Rooms()
    env.begin(seed=3)
    total, over = 0.0, False
    while not over:
        reward, over, _ = env.act(env.oracle())
        total += reward
    info = env.info()
    assert total == pytest.approx(info["shortest"] - info["distance"] - 0.01 * info["steps"] + 5)
    assert info["spl"] == pytest.approx(info["shortest"] / max(info["walked"], info["shortest"]))


def test_a_photograph_is_what_is_seen_there():
    env = Rooms(task="image", size=48)
    seen, _ = env.reset(seed=8)
    over = False
    while not over:
        action = env.oracle()
        if action == STOP:
            break
        seen, *_ = env.step(action)
    errors = []
    for _ in range(12):
        seen, *_, info = env.step(LEFT)
        errors.append((info["heading_error"], np.abs(seen["rgb"].astype(float) - seen["goal"]).mean()))
    aligned = min(errors)
    assert aligned[0] == 0
    assert max(error for error, _ in errors) == pytest.approx(np.pi)
    assert aligned[1] == min(difference for _, difference in errors), "it looks most alike when the heading is right"


def test_a_point_is_told_from_where_one_stands():
    env = Rooms(task="point", size=16)
    for episode in range(5):
        seen, info = env.reset(seed=6, options={"episode": episode})
        away, left = seen["goal"].tolist()
        goal = info["place"] + away * np.array([np.cos(info["heading"] + left), np.sin(info["heading"] + left)])
        field = env.house.distances(goal[None])
        assert at(field, info["place"][None])[0] == pytest.approx(info["distance"], abs=0.2)
        seen, *_ = env.step(LEFT)
        turned = (left - seen["goal"][1] + np.pi) % (2 * np.pi) - np.pi
        assert turned == pytest.approx(np.pi / 6, abs=1e-5)


def test_many_walkers_are_many_rooms():
    options = {"size": 24, "max_steps": 15, "depth": True}
    many, alone = ManyRooms(3, **options), Rooms(**options)
    random = np.random.default_rng(1)
    actions = random.integers(1, 4, (20, 3))
    seen, infos = many.reset(seed=4)
    history = [(seen["rgb"][1], None, infos[1]["episode"])]
    for row in actions:
        seen, rewards, _, _, infos = many.step(row)
        assert seen["rgb"].shape == (3, 24, 24, 3)
        assert seen["depth"].shape == (3, 24, 24)
        assert seen["goal"].shape == (3,)
        history.append((seen["rgb"][1], rewards[1], infos[1]["episode"]))
    own, _ = alone.reset(seed=4, options={"episode": 1})
    np.testing.assert_array_equal(own["rgb"], history[0][0])
    for step, action in enumerate(actions[:15, 1], 1):
        own, reward, _, over, _ = alone.step(action)
        assert history[step][1] == pytest.approx(reward, abs=1e-6)
        if not over:
            np.testing.assert_array_equal(own["rgb"], history[step][0])
    assert [episode for *_, episode in history] == [1] * 15 + [4] * 6
    _, *_, infos = many.step(many.oracle())
    assert "final" not in infos[0]


def test_an_end_is_told_before_the_next_beginning():
    many = ManyRooms(2, size=16)
    many.reset(seed=0)
    _, _, terminated, _, infos = many.step([STOP, LEFT])
    assert terminated.tolist() == [True, False]
    assert infos[0]["final"]["episode"] == 0
    assert infos[0]["episode"] == 2
    assert infos[0]["steps"] == 0
    assert "final" not in infos[1]


def test_houses():
    homes = [house(0, number) for number in range(30)]
    counts = []
    for home in homes:
        counts.append(home.rooms.max() + 1)
        walkable = home.nodes[home.free.ravel()].astype(int)
        assert set(home.rooms[walkable[:, 0], walkable[:, 1]]) == set(range(counts[-1])), "one can walk to every room"
        assert len(set(home.labels)) == 6
        assert home.upright[[0, -1]].all()
        assert home.level[:, [0, -1]].all()
        reach = home.halves[:, 0] * np.where(home.kinds == 1, np.sqrt(2), 1)
        for place, radius in zip(home.places, reach, strict=True):
            left, low, right, high = home.walls.T
            away = np.hypot(np.clip(place[0], left, right) - place[0], np.clip(place[1], low, high) - place[1])
            assert away.min() >= radius, "no thing stands in a wall"
    assert min(counts) >= 2
    assert len(set(counts)) >= 3
    assert not np.array_equal(house(0, 0, part="val").places, homes[0].places)
    np.testing.assert_array_equal(house(0, 7).places, homes[7].places)
    few = house(0, 0, classes=["red ball", "blue cone"], things=2)
    assert set(few.names) == {"red ball", "blue cone"}
    assert isinstance(few, House)


def test_spl_is_the_formula():
    success, shortest, taken = np.array([True, True, False]), np.array([4.0, 3.0, 2.0]), np.array([5.0, 2.0, 2.0])
    assert spl(success, shortest, taken) == pytest.approx((0.8 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Rooms(task="objct"), "did you mean object"),
        (lambda: Rooms(part="dev"), "it can be train, val, test"),
        (lambda: Rooms(size=4), "size 4"),
        (lambda: house(0, 0, classes=["red bal"], things=1), "did you mean red ball"),
        (lambda: house(0, 0, things=40), "a house can hold 0 to 32"),
        (lambda: house(0, 0, things=12, tiles=4), "do not fit"),
        (lambda: house(0, 0, tiles=3), "4 to 32 tiles"),
        (lambda: Rooms().reset(options={"episod": 1}), "did you mean episode"),
        (lambda: ManyRooms(0), "at least one walker"),
    ],
)
def test_what_cannot_be_is_refused(made, message):
    with pytest.raises(UsageError, match=message):
        made()


def test_an_unknown_action_is_refused():
    env = Rooms(size=16)
    env.reset(seed=0)
    with pytest.raises(UsageError, match=", ".join(ACTIONS)):
        env.step(4)
