"""COCO's `segmentation` fields as columns, and back: polygons, and runs that are compressed or not.

Nothing is decoded before it is known to fit its image: a run-length code of another size than the image's, or whose
runs do not add up to it, is at fault, and takes no more memory than its own text.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from vertebra.data.annotations import Outlines, starts
from vertebra.data.geometry import places

_LONGEST = 7  # characters of one compressed count: 35 bits


def read_outlines(
    entries: Sequence[dict], size: np.ndarray, faults: dict[int, str], notes: list[str]
) -> Outlines | None:
    """Polygons and runs of all annotations; None where there are none at all.

    Args:
        entries: COCO's annotations.
        size: (m, 2) height and width of their images.
        faults: takes position -> what is wrong, where nothing else is yet.
        notes: takes what was left out.
    """
    cells = [entry.get("segmentation") for entry in entries]
    if not any(cells):
        return None
    for index, cell in enumerate(cells):
        if cell and type(cell) not in (list, dict):
            faults.setdefault(index, f"segmentation is {type(cell).__name__}, neither polygons [[x, y, ...]] nor RLE")
    parts, corners, points = _polygons([cell if type(cell) is list else () for cell in cells], faults, notes)
    runs, counts = _runs([cell if type(cell) is dict else None for cell in cells], size, faults)
    return Outlines(parts, corners, points, runs, counts)


def _polygons(
    shapes: Sequence[Sequence], faults: dict[int, str], notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts of parts, starts of corners, and points."""
    shapes = list(shapes)
    for index, shape in enumerate(shapes):
        if not all(type(part) is list and len(part) % 2 == 0 for part in shape):
            flat = type(shape[0]) is not list
            why = "is a flat list; polygons are lists in a list" if flat else "has an odd number of coordinates"
            faults.setdefault(index, f"segmentation {why}")
            shapes[index] = ()
    polygons = list(chain.from_iterable(shapes))
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons)) // 2
    points = numeric(list(chain.from_iterable(polygons))).reshape(-1, 2)
    owner = np.repeat(np.arange(len(shapes)), [len(shape) for shape in shapes])
    broken = ~np.isfinite(points).all(1)
    for index in np.unique(np.repeat(owner, lengths)[broken]).tolist():
        faults.setdefault(index, "segmentation has coordinates that are no numbers")
    large = lengths >= 3
    if not large.all():
        notes.append(f"polygons of less than three corners, left out: {(~large).sum()}")
    points = np.where(np.isfinite(points), points, 0)[np.repeat(large, lengths)]
    return starts(np.bincount(owner[large], minlength=len(shapes))), starts(lengths[large]), points


def _runs(cells: Sequence[dict | None], size: np.ndarray, faults: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Starts of runs and their lengths, checked against the image's size before anything is made of them."""
    texts: list[bytes] = [b""] * len(cells)
    lists: list[list] = [[] for _ in cells]
    for index, cell in enumerate(cells):
        if cell is None:
            continue
        counts, said = cell.get("counts"), cell.get("size")
        if said != size[index].tolist():
            faults.setdefault(index, f"RLE of size {said} in an image of {size[index].tolist()} (height, width)")
        elif isinstance(counts, str) and counts.isascii():
            texts[index] = counts.encode()
        elif type(counts) is list:
            lists[index] = counts
        else:
            faults.setdefault(index, "RLE counts are neither a list nor a string")
    plain = numeric(list(chain.from_iterable(lists)))
    whole = np.where((plain >= 0) & (plain == np.floor(plain)) & (plain < 2**32), plain, -1).astype(np.int64)
    first, packed, sound = decode_runs(texts)
    lengths = np.array([len(cell) for cell in lists], np.int64) + np.diff(first)
    counts = np.empty(lengths.sum(), np.int64)
    packs = np.array([bool(text) for text in texts], bool)
    from_text = np.repeat(packs, lengths)
    counts[from_text], counts[~from_text] = packed, whole
    owner = np.repeat(np.arange(len(cells)), lengths)
    total = np.bincount(owner, np.minimum(counts, 2**40), minlength=len(cells))
    negative = np.bincount(owner[counts < 0], minlength=len(cells)) > 0
    wrong = (total != size.prod(1)).astype(bool) | negative | (packs & ~sound)
    for index, bad in enumerate(wrong.tolist()):
        if bad and cells[index] is not None:
            faults.setdefault(index, f"RLE runs do not add up to the image's {size[index].prod()} pixels")
    good = np.array([cell is not None and not bad for cell, bad in zip(cells, wrong, strict=True)], bool)
    good[list(faults)] = False
    return starts(np.where(good, lengths, 0)), counts[good[owner]].astype(np.uint32)


def write_outline(outlines: Outlines, index: int, size: list[int]) -> list | dict:
    """The `segmentation` of one object in an image of `size` (height, width)."""
    counts = outlines.run_lengths(index)
    if len(counts):
        return {"size": size, "counts": counts.tolist()}
    return [polygon.ravel().tolist() for polygon in outlines.polygons(index)]


def decode_runs(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run lengths from COCO's compressed strings: 5 bits a character, differences to the run before the last.

    Args:
        texts: one string an object.

    Returns:
        (m + 1,) starts and (r,) int64 run lengths, and (m,) bool whether a string is sound. A string that is not has
        no runs. No more memory is taken than the strings themselves are long.
    """
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    letters = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(texts)), lengths)
    sound = np.bincount(owner[(letters < 0) | (letters > 63)], minlength=len(texts)) == 0
    last = letters & 32 == 0  # of the characters of one number
    ends = starts(lengths)[1:]
    sound &= (lengths > 0) & last[np.maximum(ends, 1) - 1] if len(letters) else False
    first = np.concatenate([[True], last[:-1]]) if len(letters) else np.empty(0, bool)
    begin = np.flatnonzero(first)
    place = np.arange(len(letters)) - np.repeat(begin, np.diff(np.append(begin, len(letters))))
    sound &= np.bincount(owner[place >= _LONGEST], minlength=len(texts)) == 0
    good = sound[owner]
    letters, place, last, first, owner = letters[good], place[good], last[good], first[good], owner[good]
    if not len(letters):
        return starts(np.zeros(len(texts))), np.empty(0, np.int64), sound
    numbers = np.add.reduceat((letters & 31) << (5 * place), np.flatnonzero(first))
    numbers -= np.where(letters[last] & 16, 32 << (5 * place[last]), 0)  # two's complement
    runs = starts(np.bincount(owner[last], minlength=len(texts)))
    return runs, _undo_differences(numbers, runs), sound


def _undo_differences(numbers: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """From the third one on a run is written as its difference to the run two before, the third itself excepted."""
    position, lengths = places(runs), np.diff(runs)
    found = numbers.copy()
    for chained in (position % 2 == 1, (position % 2 == 0) & (position > 0)):
        sums = np.concatenate([[0], np.cumsum(np.where(chained, numbers, 0))])
        within = sums[1:] - np.repeat(sums[runs[:-1]], lengths)
        found[chained] = within[chained]
    return found


def floats(cells: Sequence[Any], width: int) -> np.ndarray:
    """(n, width) float64; a row of NaN where a cell is no list of so many numbers."""
    whole = np.fromiter((type(cell) is list and len(cell) == width for cell in cells), bool, len(cells))
    flat = list(chain.from_iterable(cell for cell, sound in zip(cells, whole, strict=True) if sound))
    values = np.full((len(cells), width), np.nan)
    values[whole] = numeric(flat).reshape(-1, width)
    return values


def numeric(cells: list) -> np.ndarray:
    """(n,) float64; NaN for what is no number."""
    try:
        return np.array(cells, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([cell if type(cell) in (int, float) and abs(cell) < 1e300 else np.nan for cell in cells])
