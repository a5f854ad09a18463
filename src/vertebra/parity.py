"""Parity: whether a network computes what its reference computes, and numbers to remember it by.

Weights are filled by a function of parameter name and shape alone, so that a reference in another place, or another
year, is filled with the same numbers. Where the reference cannot be here its outputs are kept as a few golden numbers.

    fill(ours)
    fill_as(reference, [(r"^stages", "layers")])            # its names -> ours
    assert max(compare(ours, reference, images((2, 3, 64, 49))).values()) < 1e-4
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from vertebra.errors import DataError, ParityError, UsageError, near
from vertebra.training.cost import evaluating

Rules: TypeAlias = Sequence[tuple[str, str | None]]
"""Regular expressions and what takes their place in a name, applied one after the other; None drops the name."""

Golden: TypeAlias = dict[str, dict[str, Any]]
"""Output -> its shape and a few numbers, JSON-ready."""

TOLERANCE = 1e-4
"""Largest difference in 32 bit, as a share of the output's largest value, that counts as equal."""

_STATISTICS = ("running_mean", "running_var")
_SHIFTS = ("bias", "beta", "running_mean")
_POINTWISE, _SPATIAL, _DEPTHWISE = 1.25, 2.0, 4.0
"""Variance of weights times their inputs: what keeps the networks of tests/test_parity_tool.py alive and in range."""
_PROJECTIONS, _SAMPLES, _DIGITS, _SHOWN, _DEAD = 4, 4, 8, 8, 1e-3


def fill(module: nn.Module) -> nn.Module:
    """Fill parameters and running statistics, in place, with numbers that depend on names and shapes alone.

    Weights are uniform with a variance of about 1 / inputs, gains lie around 1, shifts around 0 and running variances
    above 0. So the signal of an image neither dies in a plain network (EfficientNet, Inception) nor leaves the
    range of 32 bit in a deep residual one: ResNet-152 without its normalisation ends near 1e5. Parameters that end
    in dimensions of 1 get the numbers of their like without: a linear layer and a 1 x 1 convolution of one name
    compute the same. Other buffers are constants of the network (masks, tables, counters) and stay.

    Args:
        module: on any device but meta, in any floating type.

    Returns:
        The module.
    """
    return fill_as(module, ())


def fill_as(module: nn.Module, names: Mapping[str, str] | Callable[[str], str] | Rules) -> nn.Module:
    """Fill a reference whose names differ from ours with the numbers that `fill` gives ours.

    Args:
        module: the reference.
        names: its names -> ours: a mapping (names that it lacks stay), a function, or rules as in `convert`.

    Returns:
        The module.

    Raises:
        UsageError: two of its names become one of ours.
    """
    rename = _renamer(names)
    seen: dict[str, str] = {}
    with torch.no_grad():
        for name, tensor in _filled(module):
            ours = rename(name)
            if ours is None:
                continue
            if ours in seen:
                raise UsageError(
                    f"fill_as: {seen[ours]!r} and {name!r} both become {ours!r}; the rules must keep them apart"
                )
            seen[ours] = name
            tensor.copy_(torch.from_numpy(_values(ours, tuple(tensor.shape))))
    return module


def _filled(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if name.endswith(_STATISTICS) and buffer.is_floating_point():
            yield name, buffer


def _renamer(names: Mapping[str, str] | Callable[[str], str] | Rules) -> Callable[[str], str | None]:
    if callable(names):
        return names
    if isinstance(names, Mapping):
        return lambda name: names.get(name, name)
    return lambda name: _renamed(name, names)


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        if replacement is None:
            if re.search(pattern, name):
                return None
        else:
            name = re.sub(pattern, replacement, name)
    return name


def _noise(name: str, count: int) -> np.ndarray:
    """(count,) float64, uniform in -1..1, from a name: SplitMix64 in exact integer arithmetic."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a parameter or statistic, float32 of that shape."""
    noise, leaf = _noise(name, prod(shape)).reshape(shape), name.rpartition(".")[2]
    line = sum(side > 1 for side in shape) <= 1
    if leaf == "running_var":
        values = 1 + 0.4 * noise
    elif line and leaf.endswith(_SHIFTS):
        values = 0.025 * noise
    elif line and not (leaf == "weight" and len(shape) > 1):
        values = 1 + 0.4 * noise
    else:
        values = noise * sqrt(3 * _gain(shape) / _inputs(leaf, shape))
    return values.astype(np.float32)


def _inputs(leaf: str, shape: tuple[int, ...]) -> int:
    """Inputs of one output; a table of positions or queries often starts with a 1, and its inputs are its width."""
    return prod(shape[1:]) if shape[0] > 1 or leaf == "weight" else shape[-1]


def _gain(shape: tuple[int, ...]) -> float:
    if prod(shape[2:]) == 1:
        return _POINTWISE
    return _DEPTHWISE if shape[1] == 1 else _SPATIAL


def images(shape: tuple[int, ...]) -> Tensor:
    """Images (B, C, H, W) of mean 0 and variance 1 that differ in colour and slope: the same wherever they are made.

    Waves that are as long as the image, and noise. Any other shape is noise alone.
    """
    noise = _noise("images", prod(shape)).reshape(shape) * sqrt(3)
    if len(shape) == 4:
        down, across, turn = _noise("waves", 3 * shape[0] * shape[1]).reshape(3, *shape[:2], 1, 1)
        rows, columns = np.linspace(-1, 1, shape[2])[:, None], np.linspace(-1, 1, shape[3])
        noise = 0.6 * noise + 1.13 * np.cos(np.pi * (down * rows + across * columns + turn))
    return torch.from_numpy(noise.astype(np.float32))


def named(outputs: Any) -> dict[str, Tensor]:
    """The tensors of any output by name: `pyramid.0`, `pooled`; a lone tensor is `output`. None is left out.

    Raises:
        UsageError: something else than tensors in mappings, lists and tuples.
    """
    return dict(_walk("", outputs))


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping | list | tuple):
        fields = getattr(value, "_fields", None)  # of a named tuple
        items = value.items() if isinstance(value, Mapping) else zip(fields or range(len(value)), value, strict=True)
        for key, inner in items:
            yield from _walk(f"{name}.{key}" if name else str(key), inner)
    elif value is not None:
        raise UsageError(
            f"output {name or 'itself'} is a {type(value).__name__}; read=... must return tensors and names"
        )


def compare(
    ours: nn.Module,
    reference: nn.Module,
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    read: Callable[[Any], Any] = named,
    read_reference: Callable[[Any], Any] = named,
) -> dict[str, float]:
    """Run two networks on the same images, in evaluation mode and 32 bit, and measure how far apart they are.

    Args:
        ours: is given back in the mode it was in.
        reference: likewise.
        inputs: batches of at least two different images, so that what leaks from one to the next shows. None takes
            two images of a backbone's own size and two of an odd size that is not square.
        read: makes names and tensors of our output; both sides must have the same names.
        read_reference: likewise of the reference's.

    Returns:
        Output -> largest difference over all inputs, as a share of the reference's largest value; infinite where
        one side is not finite.

    Raises:
        UsageError: a network that is not in 32 bit, or no inputs for what is no backbone.
        ParityError: outputs of other names or shapes, or one that does not depend on the image, which proves nothing.
    """
    worst: dict[str, float] = {}
    batches = [inputs] if isinstance(inputs, Tensor) else inputs or _native_and_odd(ours)
    _check_exact(ours)
    _check_exact(reference)
    for batch in batches:
        with evaluating(ours), evaluating(reference), torch.inference_mode():
            mine, theirs = named(read(ours(batch))), named(read_reference(reference(batch)))
        _check_names(mine, theirs)
        for name, expected in theirs.items():
            _check_alive(name, expected)
            worst[name] = max(worst.get(name, 0.0), difference(mine[name], expected, name))
    return worst


def difference(found: Tensor, expected: Tensor, name: str = "output") -> float:
    """Largest difference of two tensors as a share of the largest value of `expected`; infinite where not finite.

    Raises:
        ParityError: their shapes differ.
    """
    if found.shape != expected.shape:
        raise ParityError(f"{name} has shape {tuple(found.shape)}, the reference's has {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    share = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return share if np.isfinite(share) else float("inf")


def _native_and_odd(ours: nn.Module) -> list[Tensor]:
    preprocess: Any = getattr(ours, "preprocess", None)
    if preprocess is None:
        raise UsageError(f"compare() needs inputs for a {type(ours).__name__}, which is no Backbone")
    height, width = preprocess.size
    odd = (height // 2 * 2 - 1, max(1, width // 2 * 2 - 15))
    return [images((2, preprocess.channels, *size)) for size in ((height, width), odd)]


def _check_exact(network: nn.Module) -> None:
    kinds = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()} - {torch.float32}
    if kinds:
        raise UsageError(
            f"the {type(network).__name__} is in {kinds.pop()}; parity is compared in 32 bit: call .float()"
        )


def _check_names(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    if mine.keys() != theirs.keys():
        raise ParityError(
            f"the outputs have other names; ours alone: {_listed(mine.keys() - theirs.keys())}; the reference's alone:"
            f" {_listed(theirs.keys() - mine.keys())}. Map them with read=... and read_reference=..."
        )


def _check_alive(name: str, expected: Tensor) -> None:
    if len(expected) < 2 or not expected.is_floating_point():
        return
    if difference(expected[1:], expected[:-1].expand_as(expected[1:])) < _DEAD:
        raise ParityError(
            f"{name} of the reference hardly depends on the image (below {_DEAD} of its size), so that equality proves"
            " nothing; fill the network with fill(), give batches of different images, or leave it out with read=..."
        )


def golden(outputs: Any) -> Golden:
    """A few numbers to remember outputs by: mean, root mean square, fixed random projections, single values.

    A projection moves with every value and with any change of their order. The numbers have the scale of the
    output, some eight digits, and take about 200 bytes an output.
    """
    return {name: _numbers(tensor) for name, tensor in named(outputs).items()}


def _numbers(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().double().cpu().numpy().ravel()
    found: dict[str, Any] = {"shape": list(tensor.shape)}
    found["mean"], found["rms"] = flat.mean(), sqrt((flat**2).mean())
    vectors = (_noise(f"projection {number}", flat.size) for number in range(_PROJECTIONS))
    found["projections"] = [float(vector @ flat) * sqrt(3 / flat.size) for vector in vectors]
    places = ((_noise("samples", _SAMPLES) + 1) / 2 * flat.size).astype(np.int64)
    found["samples"] = flat[places.clip(max=flat.size - 1)].tolist()
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def check_golden(outputs: Any, expected: Golden, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Compare outputs with golden numbers.

    Args:
        outputs: of the same filled weights and the same images.
        expected: of `golden`.
        tolerance: largest difference as a share of the output's root mean square.

    Returns:
        Output -> its largest difference.

    Raises:
        ParityError: other names or shapes, or a number further away; the message names it.
    """
    found = golden(outputs)
    if found.keys() != expected.keys():
        lacks, more = _listed(expected.keys() - found.keys()), _listed(found.keys() - expected.keys())
        raise ParityError(f"the outputs have other names than the golden numbers; missing: {lacks}; new: {more}")
    return {name: _check_numbers(name, found[name], expected[name], tolerance) for name in expected}


def _check_numbers(name: str, found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> float:
    if found["shape"] != list(expected["shape"]):
        raise ParityError(f"{name} has shape {found['shape']}, the golden one has {list(expected['shape'])}")
    worst = 0.0
    for key in ("mean", "rms", "projections", "samples"):
        pair = np.atleast_1d(found[key]), np.atleast_1d(expected[key])
        share = float(np.abs(pair[0] - pair[1]).max() / max(abs(expected["rms"]), 1e-30))
        if not share <= tolerance:  # NaN is no parity either
            raise ParityError(
                f"{name}: {key} {found[key]} is not the golden {expected[key]}; {share:.2g} of the root mean square"
                f" apart, where {tolerance:g} is allowed"
            )
        worst = max(worst, share)
    return worst


@dataclass(frozen=True)
class Stored:
    """What a golden file says of one network's outputs.

    Attributes:
        golden: the numbers.
        shape: of the `images` that went in.
        source: what the reference was: repository, commit, how it was called.
    """

    golden: Golden
    shape: tuple[int, ...]
    source: str


def store(file: Path, name: str, found: Golden, *, shape: tuple[int, ...], source: str) -> None:
    """Keep golden numbers in `tests/golden/<page>.json`, under "parity", beside what is there already.

    Args:
        file: made where there is none.
        name: of the variant or network.
        found: of `golden`, made by the reference with filled weights.
        shape: of the `images` that went in.
        source: what the reference was: repository, commit, how it was called.
    """
    whole: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    entry = {"source": source, "shape": list(shape), "outputs": found}
    whole["parity"] = {**whole.get("parity", {}), name: entry}
    file.write_text(_pretty(whole) + "\n", encoding="utf-8")


def stored(file: Path, name: str) -> Stored:
    """Golden numbers that `store` kept.

    Raises:
        DataError: the file has none of that name.
    """
    known = json.loads(file.read_text(encoding="utf-8")).get("parity", {}) if file.is_file() else {}
    if name not in known:
        raise DataError(f"{file} has no parity numbers of {name!r}{near(name, known)}; it has {_listed(known)}")
    return Stored(known[name]["outputs"], tuple(known[name]["shape"]), known[name]["source"])


def _pretty(value: Any, depth: int = 0) -> str:
    """JSON with a line an entry down to the second level, as the golden files are written."""
    if depth > 1 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    indent = "  " * (depth + 1)
    lines = (f"{indent}{json.dumps(key, ensure_ascii=False)}: {_pretty(one, depth + 1)}" for key, one in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}"


def convert(state: Mapping[str, Tensor], rules: Rules, target: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint under our names.

    Args:
        state: the checkpoint's tensors.
        rules: regular expressions and what takes their place (`re.sub`), one after the other over each name; None
            in place of a replacement drops the names that match. Tensors that only lack or have more dimensions of 1 at
            the end are reshaped.
        target: the network that they are for.

    Returns:
        A state dict for `target.load_state_dict`.

    Raises:
        ParityError: names or shapes that do not fit; the message lists what is left over on both sides.
    """
    wanted = target.state_dict()
    found: dict[str, Tensor] = {}
    clashes, shapes = [], []
    for name, tensor in state.items():
        ours = _renamed(name, rules)
        if ours is None:
            continue
        if ours in found:
            clashes.append(f"{name} -> {ours}")
        fits = ours not in wanted or _bare(tensor.shape) == _bare(wanted[ours].shape)
        if not fits:
            shapes.append(f"{name} {tuple(tensor.shape)} -> {ours} {tuple(wanted[ours].shape)}")
        found[ours] = tensor.reshape(wanted[ours].shape) if fits and ours in wanted else tensor
    left = [name for name in state if (ours := _renamed(name, rules)) is not None and ours not in wanted]
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    complaints = {
        "left over in the checkpoint": left,
        "missing from it": missing,
        "other shapes": shapes,
        "two become one": clashes,
    }
    if any(complaints.values()):
        raise ParityError(
            f"the checkpoint does not become a {type(target).__name__}: "
            + "; ".join(f"{what}: {_listed(names)}" for what, names in complaints.items() if names)
        )
    counters = {name: wanted[name] for name in wanted.keys() - found.keys()}  # old checkpoints count no batches
    return {**found, **counters}


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its end."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return tuple(sides)


def _listed(names: Any) -> str:
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (", ".join(found[:_SHOWN]) or "none") + more
