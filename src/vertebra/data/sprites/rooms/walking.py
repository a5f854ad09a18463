"""Episodes: a walker, a goal, and how well it went."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from vertebra.data.sprites.pictures import PARTS, Part
from vertebra.data.sprites.rooms.houses import RADIUS, House, at, free_steps, house
from vertebra.data.sprites.rooms.seeing import Sights, look
from vertebra.data.sprites.scenes import generator
from vertebra.errors import UsageError, near

ACTIONS = ("stop", "forward", "left", "right")
"""Names of the actions; the position is the action."""

STRIDE, HEADINGS = 0.25, 12
"""Metres a step, and headings in a full turn: 30 degrees each."""

SUCCESS = 1.0
"""Metres on foot from the goal within which stopping there counts."""

START = 2.0
"""Metres on foot from the goal beyond which episodes start, where the house has such places."""

TRIES = 50
"""Houses that are drawn for an episode, until one has a goal that is far enough from somewhere."""

Task = Literal["object", "image", "point"]
Seen = dict[str, np.ndarray]


def spl(success: np.ndarray, shortest: np.ndarray, walked: np.ndarray) -> float:
    """Success weighted by path length, 0..1 (arXiv 1807.06757, eq. 1).

    Args:
        success: (N,) bool, whether the walker stopped at the goal.
        shortest: (N,) metres on foot from the start to the goal.
        walked: (N,) metres that were walked.
    """
    return float(np.mean(np.asarray(success) * shortest / np.maximum(np.maximum(walked, shortest), 1e-9)))


@lru_cache(maxsize=256)
def _house(world: int, number: int, part: Part, tiles: int, things: int, classes: tuple[str, ...] | None) -> House:
    return house(world, number, part=part, tiles=tiles, things=things, classes=classes)


class Rooms:
    """Episodes of one walker.

    Attributes:
        house: where the walker is.
        place: (2,) metres.
        heading: radians counterclockwise from x.
        distance: metres on foot to the goal.
    """

    def __init__(
        self,
        *,
        task: Task = "object",
        part: Part = "train",
        houses: int = 1000,
        size: int = 64,
        depth: bool = False,
        tiles: int = 8,
        things: int = 6,
        classes: Sequence[str] | None = None,
        max_steps: int = 200,
        world: int = 0,
    ) -> None:
        """Settle what episodes there are; `reset` begins one.

        Args:
            task: "object": stop next to a thing of a class; "image": stop where a photograph was taken; "point": stop
                at a place whose direction and distance are told.
            part: train, val and test share no house.
            houses: how many houses the part has.
            size: side of the images in pixels.
            depth: whether observations hold "depth".
            tiles: metres along a side of a house.
            things: in a house.
            classes: of things, names out of `CLASSES`; None means all.
            max_steps: actions after which an episode is cut short.
            world: seed of the houses; `reset` has the seed of the episodes.

        Raises:
            UsageError: an unknown task or part, or a number out of range.
        """
        for name, value, known in (("task", task, get_args(Task)), ("part", part, PARTS)):
            if value not in known:
                raise UsageError(f"{name} is {value!r}{near(value, known)}; it can be {', '.join(known)}")
        if houses < 1 or size < 8 or max_steps < 1 or (task == "object" and things < 1):
            raise UsageError(
                f"houses {houses}, size {size}, max_steps {max_steps}, things {things}: at least 1, 8, 1 and 1"
            )
        self.task: Task = task
        self.part: Part = part
        self.size, self.depth, self.max_steps = size, depth, max_steps
        self._houses, self._world = houses, world
        self._built = (part, tiles, things, None if classes is None else tuple(classes))
        self._seed, self._episode, self._over = 0, -1, True

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """Begin an episode: that of the next number, or number 0 of a new seed.

        Args:
            seed: of the episodes from now on.
            options: {"episode": number} begins that one.

        Returns:
            What is seen: "rgb" (S, S, 3) uint8; "depth" (S, S) float32 metres where asked for; and "goal", which is
            the number of a class, an image (S, S, 3) uint8, or metres and radians to the left (2,) float32. And what
            is known: see `step`.

        Raises:
            UsageError: an unknown option.
        """
        self.begin(seed=seed, options=options)
        return self.observed(self.look()), self.info()

    def step(self, action: int) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """Act.

        Args:
            action: position in `ACTIONS`.

        Returns:
            What is seen; the reward: metres that the goal came nearer, less 0.01, and 5 for stopping there; whether
            the walker stopped; whether time is up; and what is known: "distance" in metres on foot to the goal,
            "shortest" from the start, "walked", "steps", "collided", "success", "spl", "place", "heading",
            "heading_error" in radians for images, "house", "episode", and the "goal" in words.

        Raises:
            UsageError: no such action, or the episode is over.
        """
        reward, terminated, truncated = self.act(action)
        return self.observed(self.look()), reward, terminated, truncated, self.info()

    def begin(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> None:
        """`reset` without rendering."""
        for name in options or {}:
            if name != "episode":
                raise UsageError(f"reset has no option {name!r}{near(str(name), ['episode'])}; it has 'episode'")
        self._seed = self._seed if seed is None else int(seed)
        self._episode = 0 if seed is not None else self._episode + 1
        self._episode = int((options or {}).get("episode", self._episode))
        random = generator(self._seed, self.part, self._episode, "look")
        if not any(self._settled(random) for _ in range(TRIES)):
            raise UsageError(f"{TRIES} houses have no way of {START} metres to a goal; give more tiles or fewer things")
        self.distance = self._shortest = float(at(self._field, self.place[None])[0])
        self._steps, self._walked, self._collided, self._success, self._over = 0, 0.0, False, False, False

    def _settled(self, random: np.random.Generator) -> bool:
        """Draw house, goal and start; whether that worked."""
        self._number = int(random.integers(self._houses))
        self.house = _house(self._world, self._number, *self._built)
        free = self.house.nodes[self.house.free.ravel()]
        self._turn, self._thing = 0, -1
        if self.task == "object":
            self._thing = int(random.integers(len(self.house.labels)))
            goals = self.house.around(self._thing)
            if not len(goals):
                return False
        else:
            goals = free[random.integers(len(free))][None]
            self._turn = self._view_of(goals, random)
        self._goal, self._field = goals[0], self.house.distances(goals)
        away = self._field.ravel()[self.house.free.ravel()]
        starts = free[np.isfinite(away) & (away >= START)]
        if not len(starts):
            return False
        self.place, self._heading = starts[random.integers(len(starts))], int(random.integers(HEADINGS))
        self._photograph = None
        return True

    def _view_of(self, goal: np.ndarray, random: np.random.Generator) -> int:
        """A heading for a photograph that does not show a wall alone, where there is one."""
        steps = free_steps(self.house, goal.repeat(HEADINGS, 0), np.arange(HEADINGS) * (2 * np.pi / HEADINGS))
        return int(random.choice(np.flatnonzero(steps >= min(5, steps.max()))))

    @property
    def heading(self) -> float:
        """Radians counterclockwise from x."""
        return self._heading * (2 * np.pi / HEADINGS)

    def act(self, action: int) -> tuple[float, bool, bool]:
        """`step` without rendering: reward, terminated and truncated."""
        if self._over:
            raise UsageError("the episode is over; call reset() to begin the next one")
        if action not in range(len(ACTIONS)):
            raise UsageError(f"action is {action!r}; it must be 0 to 3: {', '.join(ACTIONS)}")
        before, self._collided = self.distance, False
        self._steps += 1
        if ACTIONS[action] == "forward":
            self._walk()
        elif ACTIONS[action] != "stop":
            self._heading = (self._heading + (1 if ACTIONS[action] == "left" else -1)) % HEADINGS
        stopped = ACTIONS[action] == "stop"
        self._success = stopped and self.distance <= SUCCESS
        truncated = not stopped and self._steps >= self.max_steps
        self._over = stopped or truncated
        return before - self.distance - 0.01 + 5 * self._success, stopped, truncated

    def _walk(self) -> None:
        """One step ahead, or none where something is in the way.

        A step is shorter than the walker is wide, so a walker that fits at both ends of it has crossed no wall.
        """
        target = self.place + STRIDE * np.array([np.cos(self.heading), np.sin(self.heading)])
        self._collided = bool(self.house.clearance(target[None])[0] < RADIUS)
        if not self._collided:
            self.place = target
            self._walked += STRIDE
            self.distance = float(at(self._field, target[None])[0])

    def oracle(self) -> int:
        """The action that leads to the goal on the shortest way, by what no walker can see."""
        if self.distance <= STRIDE / 2:
            return ACTIONS.index("stop")
        turns = (np.arange(HEADINGS) + HEADINGS // 2) % HEADINGS - HEADINGS // 2  # 0..5, -6..-1
        angles = (self._heading + turns) * (2 * np.pi / HEADINGS)
        targets = self.place + STRIDE * np.stack([np.cos(angles), np.sin(angles)], 1)
        after = np.where(self.house.clearance(targets) >= RADIUS, at(self._field, targets), np.inf)
        best = int((after + 0.004 * np.abs(turns)).argmin())
        if after[best] >= self.distance and self.distance <= SUCCESS:
            return ACTIONS.index("stop")
        if turns[best] == 0:
            return ACTIONS.index("forward")
        return ACTIONS.index("left" if turns[best] > 0 else "right")

    def look(self) -> Sights:
        """What the walker sees, with N = 1: also which pixels show which thing."""
        return look([self.house], self.place[None], np.array([self.heading]), size=self.size)

    def render(self) -> np.ndarray:
        """The image (S, S, 3) uint8 that the walker sees."""
        return self.look().images[0]

    def close(self) -> None:
        """Nothing is open; here because gymnasium's environments have it."""

    def observed(self, sights: Sights, row: int = 0) -> Seen:
        """An observation, as `reset` describes it, of row `row` of what is seen."""
        found: Seen = {"rgb": sights.images[row]}
        if self.depth:
            found["depth"] = sights.depth[row]
        return found | {"goal": self._goal_seen()}

    def _goal_seen(self) -> np.ndarray:
        if self.task == "object":
            return np.array(self.house.labels[self._thing])
        if self.task == "point":
            away = self._goal - self.place
            left = (np.arctan2(away[1], away[0]) - self.heading + np.pi) % (2 * np.pi) - np.pi
            return np.array([np.hypot(*away), left], dtype=np.float32)
        if self._photograph is None:
            turn = np.array([self._turn * (2 * np.pi / HEADINGS)])
            self._photograph = look([self.house], self._goal[None], turn, size=self.size).images[0]
        return self._photograph

    def info(self) -> dict[str, Any]:
        """What is known of the episode; see `step`."""
        off = (self._heading - self._turn + HEADINGS // 2) % HEADINGS - HEADINGS // 2
        words = self.house.names[self._thing] if self.task == "object" else self.task
        return {
            "distance": self.distance,
            "shortest": self._shortest,
            "walked": self._walked,
            "steps": self._steps,
            "collided": self._collided,
            "success": self._success,
            "spl": self._success * self._shortest / max(self._walked, self._shortest),
            "place": self.place.copy(),
            "heading": self.heading,
            "heading_error": abs(off) * (2 * np.pi / HEADINGS) if self.task == "image" else 0.0,
            "house": self._number,
            "episode": self._episode,
            "goal": words,
        }


class ManyRooms:
    """Walkers side by side, rendered together; an episode that ends makes room for the walker's next one.

    Attributes:
        walkers: one `Rooms` each.
    """

    def __init__(self, count: int, **options: Any) -> None:
        """Make `count` walkers; the options are those of `Rooms`.

        Raises:
            UsageError: fewer than one walker.
        """
        if count < 1:
            raise UsageError(f"count is {count}; there must be at least one walker")
        self.walkers = tuple(Rooms(**options) for _ in range(count))

    def reset(self, *, seed: int | None = None) -> tuple[Seen, list[dict[str, Any]]]:
        """Begin an episode for each walker; walker i takes the episodes i, i + count, i + 2 count ... of the seed."""
        for number, walker in enumerate(self.walkers):
            walker.begin(seed=seed, options={"episode": number})
        return self._observed(), [walker.info() for walker in self.walkers]

    def step(
        self, actions: Sequence[int] | np.ndarray
    ) -> tuple[Seen, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Act with every walker.

        Args:
            actions: (N,) positions in `ACTIONS`.

        Returns:
            As `Rooms.step`, with N first. Where an episode ended, what is seen is the start of the next one, and its
            information holds that of the end as "final".
        """
        found = [walker.act(int(action)) for walker, action in zip(self.walkers, actions, strict=True)]
        rewards, terminated, truncated = (np.array(column) for column in zip(*found, strict=True))
        infos = [walker.info() for walker in self.walkers]
        for number in np.flatnonzero(terminated | truncated):
            walker, final = self.walkers[number], infos[number]
            walker.begin(options={"episode": final["episode"] + len(self.walkers)})
            infos[number] = walker.info() | {"final": final}
        return self._observed(), rewards.astype(np.float32), terminated, truncated, infos

    def oracle(self) -> np.ndarray:
        """What the oracle would do, (N,) int64."""
        return np.array([walker.oracle() for walker in self.walkers])

    def _observed(self) -> Seen:
        places = np.stack([walker.place for walker in self.walkers])
        headings = np.array([walker.heading for walker in self.walkers])
        sights = look([walker.house for walker in self.walkers], places, headings, size=self.walkers[0].size)
        rows = [walker.observed(sights, row) for row, walker in enumerate(self.walkers)]
        return {"rgb": sights.images} | {
            name: sights.depth if name == "depth" else np.stack([row[name] for row in rows])
            for name in rows[0]
            if name != "rgb"
        }
