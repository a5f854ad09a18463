"""Waves on a square by two solvers that check each other, and the boundary data of a zone for networks to forecast.

    report = wave()()                                       # how far the solvers are from the truth and each other
    found = trajectories(Task(), draws(250, seed=0))        # a source, what a network may know, what the zone sees
    inside = sub_model(Task(), found.draws, ring)           # finite elements in the zone, driven from its boundary

u_tt = c^2 (u_xx + u_yy) + source in space and time, from rest, on the unit square, whose boundary is fixed (u = 0) or
free (no normal derivative). Both solvers leap-frog in time and take all trajectories at once; in space one has finite
differences, the other linear finite elements with lumped mass. The task is that of `vertebra.surgery.a_priori`, whose
paper gives neither sizes nor ranges: these are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import log2, pi, sqrt
from typing import Literal, Protocol

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.sparse import coo_array, csr_array

from vertebra.contracts import Report, Score, Study
from vertebra.errors import UsageError

VARIANTS: dict[str, dict[str, object]] = {}

Array = np.ndarray
Shape = Literal["quads", "triangles"]

LIMIT = 0.7
"""Largest speed x time step / spacing; the five-point stencil is stable up to 1 / sqrt(2), quads up to 1."""
RANGES: Mapping[str, tuple[float, float]] = {
    "x": (0.05, 0.15),
    "y": (0.2, 0.8),
    "frequency": (1.5, 2.5),
    "speed": (0.8, 1.2),
}
"""What trajectories are drawn from, evenly; training and test alike."""
_RADIUS = 0.1
"""Of a source in space, which so stays clear of the zone."""


class Solver(Protocol):
    """The space part of a solver.

    Attributes:
        spacing: between nodes.
    """

    @property
    def spacing(self) -> float: ...

    def laplacian(self, u: Array) -> Array:
        """Of fields (N, nodes, nodes) with free boundaries."""
        ...


@dataclass(frozen=True)
class Differences:
    """The five-point stencil; beyond a free boundary lies its mirror image.

    Attributes:
        spacing: between nodes.
    """

    spacing: float

    def laplacian(self, u: Array) -> Array:
        """Of fields (N, nodes, nodes) with free boundaries."""
        wide = np.pad(u, ((0, 0), (1, 1), (1, 1)), mode="reflect")
        around = wide[:, 2:, 1:-1] + wide[:, :-2, 1:-1] + wide[:, 1:-1, 2:] + wide[:, 1:-1, :-2]
        return (around - 4 * u) / self.spacing**2


@dataclass(frozen=True)
class Elements:
    """Linear finite elements with lumped mass on a square of nodes x nodes.

    Attributes:
        nodes: a side.
        spacing: between nodes.
        shape: bilinear squares, or two right triangles in each: the latter are the five-point stencil again but for
            the corners.
    """

    nodes: int
    spacing: float
    shape: Shape = "quads"

    @cached_property
    def cells(self) -> Array:
        """Nodes of each element, (elements, 3 or 4)."""
        at = np.arange(self.nodes**2).reshape(self.nodes, self.nodes)
        a, b, c, d = at[:-1, :-1], at[:-1, 1:], at[1:, 1:], at[1:, :-1]
        corners = [[a, b, c, d]] if self.shape == "quads" else [[a, b, d], [c, d, b]]
        return np.concatenate([np.stack(nodes, -1).reshape(-1, len(nodes)) for nodes in corners])

    @cached_property
    def stiffness(self) -> csr_array:
        """(nodes^2, nodes^2): integrals of products of gradients, which know no spacing in two dimensions."""
        if self.shape == "quads":
            one = np.array([[4, -1, -2, -1], [-1, 4, -1, -2], [-2, -1, 4, -1], [-1, -2, -1, 4]]) / 6
        else:
            one = np.array([[2, -1, -1], [-1, 1, 0], [-1, 0, 1]]) / 2
        corners = one.shape[0]
        rows, columns = np.repeat(self.cells, corners, axis=1), np.tile(self.cells, corners)
        values = np.tile(one.ravel(), len(self.cells))
        return coo_array((values, (rows.ravel(), columns.ravel())), shape=(self.nodes**2,) * 2).tocsr()

    @cached_property
    def mass(self) -> Array:
        """(nodes^2,): each element's area, in equal parts to its nodes."""
        area = self.spacing**2 * (self.nodes - 1) ** 2 / self.cells.shape[0]
        return np.bincount(self.cells.ravel()) * (area / self.cells.shape[1])

    def laplacian(self, u: Array) -> Array:
        """Of fields (N, nodes, nodes) with free boundaries."""
        return -((self.stiffness @ u.reshape(len(u), -1).T).T / self.mass).reshape(u.shape)

    def energy(self, before: Array, after: Array, speed: Array, dt: float) -> Array:
        """(N,) kinetic and potential energy between two steps of fields (N, nodes, nodes)."""
        motion, middle = ((after - before) / dt).reshape(len(after), -1), ((after + before) / 2).reshape(len(after), -1)
        strain = (middle * (self.stiffness @ middle.T).T).sum(1)
        return 0.5 * (self.mass * motion**2).sum(1) + 0.5 * speed**2 * strain


def border(nodes: int) -> Array:
    """(nodes, nodes), true on the boundary; its nodes are taken row by row."""
    inside = np.zeros((nodes, nodes), bool)
    inside[1:-1, 1:-1] = True
    return ~inside


def simulate(
    solver: Solver,
    first: Array,
    speed: Array,
    *,
    dt: float,
    steps: int,
    every: int = 1,
    fixed: Array | None = None,
    source: tuple[Array, Array] | None = None,
    ring: Array | None = None,
) -> Array:
    """Waves that start at rest, by leap-frog, all trajectories at once.

    Args:
        solver: the space part.
        first: fields (N, nodes, nodes) at time 0.
        speed: (N,).
        dt: seconds a step.
        steps: to take.
        every: steps from one returned field to the next.
        fixed: (N,) whether the boundary is 0; otherwise it is free. None fixes none.
        source: its form in space (N, nodes, nodes), and in time (N, steps).
        ring: (N, steps + 1, boundary nodes) values that the boundary has; they win over `fixed`.

    Returns:
        (N, steps // every + 1, nodes, nodes), the first field first.

    Raises:
        UsageError: a time step at which the solvers are unstable.
    """
    number = float(np.max(speed)) * dt / solver.spacing
    if number > LIMIT:
        raise UsageError(f"wave: dt is {dt:g}, with which speed * dt / spacing is {number:.2f}; at most {LIMIT} works")
    edge, square = border(first.shape[-1]), speed[:, None, None] ** 2
    held = np.zeros(len(first), bool) if fixed is None else fixed

    def bound(u: Array, step: int) -> Array:
        u[:, edge] = np.where(held[:, None], 0, u[:, edge]) if ring is None else ring[:, step]
        return u

    def change(u: Array, step: int) -> Array:
        forced = 0 if source is None else source[0] * source[1][:, step, None, None]
        return dt**2 * (square * solver.laplacian(u) + forced)

    before = bound(first.astype(float), 0)
    saved, now = [before], bound(before + change(before, 0) / 2, 1)
    for step in range(1, steps + 1):
        if step % every == 0:
            saved.append(now)
        if step < steps:
            before, now = now, bound(2 * now - before + change(now, step), step + 1)
    return np.stack(saved, 1)


@dataclass(frozen=True)
class Draws:
    """Parameters of N trajectories, each (N,).

    Attributes:
        x: of the source.
        y: of the source.
        frequency: at which its wavelet is strongest.
        speed: of the waves.
        fixed: whether the boundary of the square is fixed.
    """

    x: Array
    y: Array
    frequency: Array
    speed: Array
    fixed: Array

    def __len__(self) -> int:
        return len(self.x)


def draws(count: int, *, seed: int = 0) -> Draws:
    """Parameters drawn evenly from `RANGES`, and a boundary of either kind."""
    random = np.random.default_rng(seed)
    values = {name: random.uniform(*limits, count) for name, limits in RANGES.items()}
    return Draws(**values, fixed=random.random(count) < 0.5)


@dataclass(frozen=True)
class Task:
    """What is simulated and what of it a network forecasts.

    Attributes:
        nodes: a side of the square.
        zone: nodes a side of the zone of interest, in the middle.
        saved: fields that are kept, after the first.
        every: steps from one of them to the next.
    """

    nodes: int = 32
    zone: int = 16
    saved: int = 40
    every: int = 2

    @property
    def spacing(self) -> float:
        """Between nodes of the unit square."""
        return 1 / (self.nodes - 1)

    @property
    def dt(self) -> float:
        """Seconds a step, for the fastest waves there are."""
        return 0.6 * self.spacing / RANGES["speed"][1]

    @property
    def inside(self) -> slice:
        """Rows, and columns, of the zone."""
        start = (self.nodes - self.zone) // 2
        return slice(start, start + self.zone)


@dataclass(frozen=True)
class Trajectories:
    """Simulations, as a network is given them.

    Attributes:
        draws: their parameters.
        inputs: (N, 3, saved, nodes, nodes) in 32 bit: the source in space and time, the speed on -1..1 and the
            boundary, 1 where it is fixed and -1 where it is free.
        zone: (N, saved, zone, zone) the fields in the zone.
    """

    draws: Draws
    inputs: Array
    zone: Array = field(repr=False)


def trajectories(task: Task, drawn: Draws) -> Trajectories:
    """Simulate by finite elements, in one pass for all."""
    steps, count = task.saved * task.every, len(drawn)
    form, signal = _form(task, drawn), _wavelet(drawn.frequency, task.dt * np.arange(steps + 1))
    fields = simulate(
        Elements(task.nodes, task.spacing),
        np.zeros((count, task.nodes, task.nodes)),
        drawn.speed,
        dt=task.dt,
        steps=steps,
        every=task.every,
        fixed=drawn.fixed,
        source=(form, signal),
    )[:, 1:]
    low, high = RANGES["speed"]
    flat = [2 * (drawn.speed - low) / (high - low) - 1, np.where(drawn.fixed, 1.0, -1.0)]
    inputs = np.empty((count, 3, *fields.shape[1:]), np.float32)
    inputs[:, 0] = form[:, None] * signal[:, task.every :: task.every, None, None]
    for channel, values in enumerate(flat, start=1):
        inputs[:, channel] = values[:, None, None, None]
    return Trajectories(drawn, inputs, fields[:, :, task.inside, task.inside])


def _form(task: Task, drawn: Draws) -> Array:
    """A smooth hill around each source, (N, nodes, nodes); rows are y."""
    at = np.linspace(0, 1, task.nodes)
    across, along = ((at - place[:, None]) ** 2 for place in (drawn.x, drawn.y))
    return np.clip(1 - (along[:, :, None] + across[:, None, :]) / _RADIUS**2, 0, None) ** 2


def _wavelet(frequency: Array, times: Array) -> Array:
    """Ricker's: a peak of 1 between two troughs, (N, times); it begins near 0."""
    phase = (pi * (frequency[:, None] * times - 1.2)) ** 2
    return (1 - 2 * phase) * np.exp(-phase)


def sub_model(task: Task, drawn: Draws, ring: Array) -> Array:
    """Fields of the zone by finite elements in the zone alone, driven by the values on its boundary.

    Between the saved times the boundary follows a cubic spline, from rest.

    Args:
        task: of the trajectories.
        drawn: their parameters; the zone holds no source.
        ring: (N, saved, boundary nodes) as `zone[:, :, border(task.zone)]` has them.

    Returns:
        (N, saved, zone, zone).
    """
    steps = task.saved * task.every
    rest = np.concatenate([np.zeros_like(ring[:, :1]), ring], axis=1)
    fine = CubicSpline(np.arange(0, steps + 1, task.every), rest, axis=1)(np.arange(steps + 1))
    still = np.zeros((len(ring), task.zone, task.zone))
    solver = Elements(task.zone, task.spacing)
    return simulate(solver, still, drawn.speed, dt=task.dt, steps=steps, every=task.every, ring=fine)[:, 1:]


def wave(*, sides: Sequence[int] = (17, 33, 65)) -> "Wave":
    """The study; see `Wave`."""
    return Wave(sides=sides)


class Wave(Study):
    """What the solvers are worth: against a standing wave, under refinement, against each other, over a thousand steps.

    Args:
        sides: nodes a side, each of twice the cells of the one before; at least two.

    Raises:
        UsageError: other sides.
    """

    def __init__(self, *, sides: Sequence[int]) -> None:
        if len(sides) < 2 or any(fine - 1 != 2 * (coarse - 1) for coarse, fine in pairwise(sides)):
            raise UsageError(f"wave: sides are {list(sides)}; each must halve the spacing of the last, as 17 33 65")
        self.sides = tuple(sides)

    def __call__(self) -> Report:
        """Scores are errors in percent, the lowest order of convergence of the two solvers, and the drift of energy."""
        errors = {kind: [_standing(solver, n) for n, solver in self._solvers(kind)] for kind in ("fe", "fd")}
        orders = {kind: [log2(a / b) for a, b in pairwise(found)] for kind, found in errors.items()}
        side = self.sides[-1]
        scores = {
            "disagreement": _percent(disagreement(side)),
            "standing": _percent(max(found[-1] for found in errors.values())),
            "order": Score(min(found[-1] for found in orders.values()), 1, unit=""),
            "drift": _percent(drift(side)),
        }
        return Report(scores, {"sides": list(self.sides), "errors": errors, "orders": orders})

    def _solvers(self, kind: str) -> list[tuple[int, Solver]]:
        return [(n, Elements(n, 1 / (n - 1)) if kind == "fe" else Differences(1 / (n - 1))) for n in self.sides]


def _percent(share: float) -> Score:
    return Score(100 * share, 1, better="lower")


def _standing(solver: Solver, nodes: int) -> float:
    """Relative error at time 1 of sin(pi x) sin(pi y) cos(sqrt(2) pi t)."""
    at = np.sin(pi * np.linspace(0, 1, nodes))
    form, steps = np.outer(at, at)[None], 2 * (nodes - 1)
    last = simulate(solver, form, np.ones(1), dt=1 / steps, steps=steps, every=steps, fixed=np.ones(1, bool))[:, -1]
    return apart(last, form * np.cos(sqrt(2) * pi))


def _pulse(nodes: int) -> Array:
    """A smooth hill off the middle, (1, nodes, nodes)."""
    at = np.linspace(0, 1, nodes)
    return np.exp(-((at[:, None] - 0.45) ** 2 + (at - 0.55) ** 2) / (2 * 0.12**2))[None]


def disagreement(nodes: int) -> float:
    """Relative difference of finite elements and finite differences over a hill's spread and its echoes, in time 1."""
    steps, spacing = 2 * (nodes - 1), 1 / (nodes - 1)
    first, kinds = _pulse(nodes).repeat(2, 0), np.array([True, False])
    elements, differences = (
        simulate(solver, first, np.ones(2), dt=1 / steps, steps=steps, fixed=kinds)
        for solver in (Elements(nodes, spacing), Differences(spacing))
    )
    return apart(elements, differences)


def drift(nodes: int, steps: int = 1000) -> float:
    """Largest change of the energy of a hill in a free square, as a share of what it began with."""
    solver = Elements(nodes, 1 / (nodes - 1))
    dt, speed = 0.5 * solver.spacing, np.ones(1)
    fields = simulate(solver, _pulse(nodes), speed, dt=dt, steps=steps)[0]
    energy = solver.energy(fields[:-1], fields[1:], speed, dt)
    return float(np.abs(energy / energy[0] - 1).max())


def apart(found: Array, truth: Array) -> float:
    """Norm of the difference over the norm of the truth."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
