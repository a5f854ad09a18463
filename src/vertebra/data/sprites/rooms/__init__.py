"""A small first-person simulator: walk through furnished rooms to a thing, a place or the place of a photograph.

`Rooms` has gymnasium's `reset` and `step` and does not need gymnasium; `ManyRooms` walks in many houses at once and
renders them together. The walker turns by 30 degrees, walks 0.25 m and says when it is there, as in Habitat. How far it
is to the goal on foot is known everywhere, so there is an oracle to imitate, a reward and a fair score.

>>> env = Rooms(task="object", size=64)
>>> seen, info = env.reset(seed=0)
>>> seen["rgb"].shape, info["goal"] in CLASSES
((64, 64, 3), True)
>>> seen, reward, terminated, truncated, info = env.step(env.oracle())
"""

from vertebra.data.sprites.rooms.houses import CLASSES, House, at, free_steps, house
from vertebra.data.sprites.rooms.seeing import Sights, look
from vertebra.data.sprites.rooms.walking import ACTIONS, ManyRooms, Rooms, Task, spl

__all__ = [
    "ACTIONS",
    "CLASSES",
    "House",
    "ManyRooms",
    "Rooms",
    "Sights",
    "Task",
    "at",
    "free_steps",
    "house",
    "look",
    "spl",
]
