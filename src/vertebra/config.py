"""A run as frozen dataclasses: to JSON and back, and `--set a.b=c` edits, each checked when it is made.

Nothing here imports torch, so a misspelt field is refused in milliseconds.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from vertebra.errors import UsageError, near
from vertebra.spec import Spec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Views:
    """How training images are varied; each view is a function of (seed, epoch, index) alone.

    Attributes:
        scale: smallest and largest share of the image's area that a random crop keeps, 0..1.
        ratio: smallest and largest aspect ratio of that crop.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation changes, 0..1.
        hue: largest turn of the hue, as a share of the colour circle, 0..0.5.
        jitter_chance: probability that an image's colours are changed at all, by `jitter` and `hue`.
        grey: probability that an image loses its colours.
        blur: probability of a Gaussian blur, sigma 0.1 to 2 pixels at a side of 224.
        policy: "none", "randaugment", "trivialaugment" or "augmix", from torchvision.
        erase: probability that a random rectangle is erased.
        mixup: alpha of mixup; 0 switches it off.
        cutmix: alpha of cutmix; 0 switches it off.
        size: side of the view in pixels; None takes what the network sees.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    jitter: float = 0.0
    hue: float = 0.0
    jitter_chance: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    policy: Literal["none", "randaugment", "trivialaugment", "augmix"] = "none"
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train: everything that `fit` needs to know beside what to train on what.

    Attributes:
        epochs: passes over the training set.
        steps: optimiser steps; where given it ends the run before `epochs` do.
        batch: images a step, over all ranks.
        micro_batch: images a forward pass on one rank; None takes the rank's share of the batch at once.
        optimizer: timm's name of it ("adamw", "sgd", "lamb", ...).
        lr: peak learning rate at this batch.
        weight_decay: on weights of rank 2 and more; biases and norms have none.
        momentum: for optimisers that take one.
        layer_decay: factor a part, from the head back through `Backbone.trunk()`; 1 switches it off.
        schedule: the rate's shape after the warm-up.
        warmup_epochs: linear rise at the start.
        min_lr: where the schedule ends, as a share of `lr`.
        clip: largest gradient norm; None switches it off.
        ema: decay a step of the averaged weights; 0 switches them off.
        freeze: parts of the trunk, counted from the input, that stay as they are; -1 freezes the whole backbone.
        precision: Fabric's name; "auto" takes bf16 where it pays on this machine and 32 bit elsewhere.
        views: how images are varied.
        more_views: further views of each image, for methods that compare views of one image.
        evaluate_every: epochs between evaluations.
        checkpoint_every: seconds between checkpoints within an epoch.
        seed: of weights, order and views.
        workers: loader processes; "auto" measures nothing and takes what the machine has.
    """

    epochs: int = 30
    steps: int | None = None
    batch: int = 64
    micro_batch: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: float = 1.0
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    clip: float | None = 1.0
    ema: float = 0.0
    freeze: int = 0
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    views: Views = field(default_factory=Views)
    more_views: tuple[Views, ...] = ()
    evaluate_every: int = 1
    checkpoint_every: float = 600.0
    seed: int = 0
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"plan.{name} is {getattr(self, name)}; it must be at least 1")
        if self.lr <= 0:
            raise UsageError(f"plan.lr is {self.lr}; it must be above 0")
        if not 0 <= self.ema < 1:
            raise UsageError(f"plan.ema is {self.ema}; it must be in [0, 1), as 0.999")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, complete: `run.json` holds it and `vertebra resume` starts it again.

    Attributes:
        data: where the data is, as given.
        backbone: what to train.
        recipe: the recipe the plan came from, by name.
        plan: how.
        method: what the backbone is pretrained by; None trains a classifier on the labels.
        task: one label an image, many, or whatever the data says.
        label_smoothing: mass moved from the right class to all of them, 0..1.
        class_weights: "none" or "balanced" (inverse frequency, mean 1).
        image_size: side in pixels; None takes the backbone's own.
        on_error: what an unreadable image does.
        curriculum: what is seen when, a page of curricula; None sees the same throughout.
        adapter: few new parameters on the backbone, which stays as it is, a page of adapters; None trains all of it.
    """

    data: str
    backbone: Spec
    recipe: str = "finetune"
    plan: Plan = field(default_factory=Plan)
    method: Spec | None = None
    task: Literal["auto", "single", "multi"] = "auto"
    label_smoothing: float = 0.1
    class_weights: Literal["none", "balanced"] = "none"
    image_size: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    curriculum: Spec | None = None
    adapter: Spec | None = None


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON values."""
    if isinstance(value, Spec):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def _unions(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _one(hint: Any, value: Any, where: str) -> Any:
    """`value` as one member of a union, or ValueError."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if hint is type(None):
        if value is None or value in ("none", "None", "null"):
            return None
    elif origin is Literal:
        if value in typing.get_args(hint):
            return value
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return from_json(hint, value, where)
    elif origin is tuple:
        kinds = typing.get_args(hint)
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list | tuple):
            kinds = (kinds[0],) * len(items) if kinds[-1] is Ellipsis else kinds
            if len(items) == len(kinds):
                return tuple(_cast(k, v, where) for k, v in zip(kinds, items, strict=True))
    elif hint is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
    elif hint in (int, float):
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = float(value)
            if hint is float:
                return number
            if number.is_integer():
                return int(number)
    elif hint is str:
        if isinstance(value, str):
            return value
    elif (isinstance(hint, type) and isinstance(value, hint)) or (origin and isinstance(value, origin)):
        return value
    raise ValueError


def _cast(hint: Any, value: Any, where: str) -> Any:
    for member in _unions(hint):
        try:
            return _one(member, value, where)
        except UsageError:
            raise
        except (ValueError, TypeError):
            continue
    raise UsageError(f"{where} is {value!r}; it must be {describe(hint, value)}")


def describe(hint: Any, value: Any = None) -> str:
    """A type as a user reads it: `a number`, `one of cosine, linear`."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    parts = []
    for member in _unions(hint):
        if typing.get_origin(member) is Literal:
            allowed = [str(a) for a in typing.get_args(member)]
            parts.append(f"one of {', '.join(allowed)}{near(str(value), allowed).rstrip('?')}")
        else:
            parts.append(words.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(parts)


def from_json(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Read a dataclass back; unknown fields and wrong types are errors that name the field.

    Raises:
        UsageError: the message names the field, the value, what is allowed and the nearest field.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in names:
            raise UsageError(f"{prefix}{name} is no field{near(name, names)}; fields: {', '.join(names)}")
    return cls(**{name: _cast(hints[name], value, prefix + name) for name, value in values.items()})


def _leaf_paths(cls: type, prefix: str = "") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for f in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        found.setdefault(f.name, []).append(prefix + f.name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint is not Spec:
            for name, paths in _leaf_paths(hint, f"{prefix}{f.name}.").items():
                found.setdefault(name, []).extend(paths)
    return found


def edit(value: T, assignments: Sequence[str]) -> T:
    """A copy of a dataclass with `a.b=c` applied, in order.

    A field's last name alone will do where only one field has it: `lr=1e-3` for `plan.lr=1e-3`.

    Raises:
        UsageError: no `=`, no such field, or a value of the wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r}: write it as field=value, as plan.lr=0.001")
        known = _leaf_paths(type(value))
        if "." not in path:
            candidates = known.get(path, [])
            if len(candidates) > 1:
                raise UsageError(f"--set {path}: more than one field has that name: {', '.join(candidates)}")
            if not candidates:
                raise UsageError(f"--set {path}: no such field{near(path, known)}")
            path = candidates[0]
        value = _edit_one(value, path.split("."), text.strip(), "")
    return value


def _edit_one(value: Any, path: list[str], text: str, where: str) -> Any:
    name, rest = path[0], path[1:]
    place = f"{where}.{name}" if where else name
    if isinstance(value, Mapping):
        return (
            {**value, name: parse_value(text)}
            if not rest
            else {**value, name: _edit_one(value[name], rest, text, place)}
        )
    names = [f.name for f in dataclasses.fields(value)]
    if name not in names:
        raise UsageError(f"--set {place}: no such field{near(name, names)}; fields: {', '.join(names)}")
    if rest:
        return dataclasses.replace(value, **{name: _edit_one(getattr(value, name), rest, text, place)})
    hint = typing.get_type_hints(type(value))[name]
    return dataclasses.replace(value, **{name: _cast(hint, text, place)})


def parse_value(text: str) -> Any:
    """A command line's value: JSON where it is JSON (`3`, `true`, `[1, 2]`), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def split_address(text: str) -> tuple[str, dict[str, Any]]:
    """`address?option=value&option=value` as the address and its options.

    Raises:
        UsageError: an option without a value.
    """
    address, _, query = text.partition("?")
    return address, dict(_option(text, part) for part in query.split("&") if part)


def _option(text: str, part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise UsageError(f"{text}: option {part!r} has no value; write address?option=value&option=value")
    return name, parse_value(value)


def spec_of(text: str, kind: str = "backbones") -> Spec:
    """The spec that a user writes as `address` or `address?option=value&option=value`.

    Raises:
        UsageError: an unknown address or option, or an option without a value.
    """
    address, options = split_address(text)
    return Spec(address, options, kind)
