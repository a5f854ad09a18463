"""What the pixels of masks mean: numbers or colours, and the classes that they stand for.

====================  ==============================================================================
found                 what is made of it
====================  ==============================================================================
grey, palette         the number of a pixel, 0..255, is its value; bilevel counts as 0 and 255
16 bit                the number, 0..65535; without a list of classes these are instance ids
RGB, all grey         as grey
RGB with colours      the colour is the value: all masks of the data are read as colours
palettes that differ  likewise: each file has its own numbers, so its colours decide
255 (65535 of 16 bit) ignored, where the list of classes does not say otherwise
0 and 255 only        two classes, background and foreground
transparency          an error, unless all pixels are opaque; so is a JPEG, which blurs values
====================  ==============================================================================

A list of classes is a file beside the masks: `classes.csv` or `class_dict.csv` (name, and value or r, g, b),
`label_colors.txt` (r g b name), `labelmap.txt` (CVAT's name:r,g,b), or `classes.txt`, `class_names.txt` or
`labels.txt` with a name a line, alone or after its number (7 road). Names that mean nothing (void, ignore,
unlabelled, __ignore__, or "(... ignore)" behind the name) are not classes: their pixels count for nothing.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vertebra.data.annotations import IGNORE
from vertebra.data.partners import raw
from vertebra.errors import DataError

Coding = Literal["value", "colour"]

CLASS_FILES = (
    *("classes.csv", "class_dict.csv", "labelmap.txt", "label_colors.txt", "classes.txt", "class_names.txt"),
    *("labels.txt", "label_names.txt"),
)
"""Names, in lower case, of the files that list classes; the first that is there counts."""

_VOID = re.compile(r"_*(void|ignored?|unlabel+ed|don'?t[ _-]?care)_*|.*\(.*\bignored?\b.*\)", re.IGNORECASE)
_NAMES = ("name", "class", "class_name", "label", "names")
_VALUES = ("value", "id", "index", "pixel", "label_id")
_COLOURS = (("r", "g", "b"), ("red", "green", "blue"))
_CVAT = re.compile(r"(.+?):(\d+),(\d+),(\d+):.*")
_COLOURED = re.compile(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)")
_NUMBERED = re.compile(r"(\d+)\s*[\s:,=]\s*(\S.*)")
_MOST_COLOURS = 256
_MOST_VALUES = 65536


@dataclass(frozen=True)
class Listed:
    """A list of classes.

    Attributes:
        file: where it is.
        names: one an entry; None for what counts for nothing.
        values: pixel value or packed colour of each entry; empty where the list does not say.
        coding: what the values are.
    """

    file: Path
    names: tuple[str | None, ...]
    values: tuple[int, ...] = ()
    coding: Coding = "value"


@dataclass(frozen=True, eq=False)
class Meaning:
    """What pixel values stand for.

    Attributes:
        classes: names in order.
        values: (v,) int64 known pixel values, rising.
        targets: (v,) int64 index of the class of each, or `IGNORE`.
        coding: numbers or colours.
    """

    classes: tuple[str, ...]
    values: np.ndarray
    targets: np.ndarray
    coding: Coding = "value"


@dataclass(frozen=True, eq=False)
class Seen:
    """What one mask holds.

    Attributes:
        file: its path.
        mode: Pillow's mode.
        values: numbers of its pixels, rising; none where it has colours.
        colours: packed colours of its pixels; for a palette, those of `values`; none for grey.
    """

    file: Path
    mode: str
    values: np.ndarray
    colours: np.ndarray

    @property
    def deep(self) -> bool:
        """Whether it has 16 bits or more a pixel."""
        return self.mode.startswith("I")


def pack(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of 0..255 as one number each, r * 65536 + g * 256 + b."""
    wide = colours.astype(np.int64)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def packed(image: Image.Image) -> np.ndarray:
    """The colours of an RGB image as one number each, (H, W) uint32; a quarter of the time of `pack`."""
    return np.asarray(image.convert("RGBA")).view(">u4")[..., 0] >> np.uint32(8)


def places_of(pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where in `known`, which rises, each pixel's value stands, int64 of the same shape; -1 for one that is not there.

    Masks are runs of equal pixels, so each run is looked up once.
    """
    flat = pixels.ravel()
    firsts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]) if flat.size else np.empty(0, np.int64)
    values = flat[firsts].astype(np.int64)
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    places[known[places] != values] = -1
    return np.repeat(places, np.diff(firsts, append=flat.size)).reshape(pixels.shape)


def word(value: int, coding: Coding) -> str:
    """A pixel value for messages: 7, or #ff0080."""
    return f"#{value:06x}" if coding == "colour" else str(value)


def pixel_values(file: Path, coding: Coding) -> np.ndarray:
    """Decode a mask.

    Returns:
        (H, W) uint8, uint16 or wider whole numbers: values, or packed colours.

    Raises:
        DataError: the file cannot be read, is no mask, or is coded in another way.
    """
    image = _opaque(raw(file), file)
    if coding == "colour":
        return packed(image.convert("RGB"))
    if image.mode == "RGB":
        pixels = np.asarray(image)
        coloured = (pixels != pixels[..., :1]).any(-1)
        if coloured.any():
            y, x = np.argwhere(coloured)[0]
            colour = word(int(pack(pixels[y, x])), "colour")
            raise DataError(
                f"{file}: the pixel at x {x}, y {y} is coloured ({colour}), and masks here hold numbers; "
                "convert it, or list the colours in classes.csv (name,r,g,b)"
            )
        return pixels[..., 0]
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def _opaque(image: Image.Image, file: Path) -> Image.Image:
    """The image without its alpha; its mode is then 1, L, P, RGB or an I."""
    if image.mode in ("LA", "RGBA", "PA"):
        low = np.asarray(image.getchannel("A")).min()
        if low < 255:
            raise DataError(f"{file} is transparent in places (alpha {low}), which is no value; save it without alpha")
        return image.convert({"LA": "L", "PA": "P", "RGBA": "RGB"}[image.mode])
    if image.mode not in ("1", "L", "P", "RGB") and not image.mode.startswith("I"):
        raise DataError(f"{file} has pixels of mode {image.mode}; masks are grey, palette, RGB or 16 bit: convert it")
    return image


def look(file: Path) -> Seen:
    """Which values a mask holds.

    Raises:
        DataError: the file cannot be read, is no mask, or holds more colours than a colour map has.
    """
    image = _opaque(raw(file), file)
    nothing = np.empty(0, np.int64)
    if image.mode == "RGB":
        found = image.getcolors(_MOST_COLOURS)
        if found is None:
            raise DataError(
                f"{file} has more than {_MOST_COLOURS} colours, so it is no colour map; "
                "save masks without smoothing, as PNG (panoptic ids need their json)"
            )
        colours = np.array([colour for _, colour in found])
        codes = np.sort(pack(colours))
        return (
            Seen(file, "RGB", nothing, codes) if np.ptp(colours, axis=1).any() else Seen(file, "L", codes & 255, codes)
        )
    if image.mode.startswith("I"):
        values = np.unique(np.asarray(image)).astype(np.int64)
        return Seen(file, image.mode, values, nothing)
    values = np.flatnonzero(image.histogram()).astype(np.int64)
    if image.mode != "P":
        return Seen(file, image.mode, values, nothing)
    palette = np.array(image.getpalette("RGB") or [], dtype=np.int64).reshape(-1, 3)
    table = np.zeros((256, 3), np.int64)
    table[: len(palette)] = palette[:256]
    return Seen(file, "P", values, pack(table[values]))


def coding_of(seen: Sequence[Seen]) -> Coding:
    """Numbers or colours: colours where a mask has nothing else, or where palettes give one number two colours."""
    if any(one.mode == "RGB" for one in seen):
        return "colour"
    colour_of: dict[int, int] = {}
    for one in seen:
        if one.mode == "P":
            for value, colour in zip(one.values.tolist(), one.colours.tolist(), strict=True):
                if colour_of.setdefault(value, colour) != colour:
                    return "colour"
    return "value"


def codes(one: Seen, coding: Coding) -> np.ndarray:
    """The values of a mask in that coding."""
    if coding == "value":
        return one.values
    grey = one.values * 0x010101  # a grey mask among coloured ones
    return one.colours if one.mode in ("RGB", "P") else grey


def load_classes(file: Path) -> Listed:
    """Read a list of classes.

    Raises:
        DataError: the file is no such list; the message names the line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    listed = _csv(file, text) if file.suffix.lower() == ".csv" else _lines(file, text)
    names = [name for name in listed.names if name is not None]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{file} lists {min(twice)!r} twice; give every class its own name")
    if len(set(listed.values)) < len(listed.values):
        number = next(v for v in listed.values if listed.values.count(v) > 1)
        raise DataError(f"{file} gives {word(number, listed.coding)} to two classes; give every class its own")
    if not names:
        raise DataError(f"{file} lists no class; write a name a line")
    if len(names) > IGNORE:
        raise DataError(
            f"{file} lists {len(names)} classes; semantic masks hold {IGNORE} at most, as {IGNORE} is ignored"
        )
    return listed


def _csv(file: Path, text: str) -> Listed:
    lines = text.splitlines()
    rows = list(
        csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",", skipinitialspace=True)
    )
    known = {str(name).strip().lower(): name for name in rows[0]} if rows else {}
    name = next((known[word] for word in _NAMES if word in known), None)
    if name is None:
        raise DataError(f"{file} has no column called name; its columns are {', '.join(known) or 'none'}")
    names = tuple(_name(str(row[name] or "")) for row in rows)
    for trio in _COLOURS:
        if all(channel in known for channel in trio):
            cells = [[row[known[channel]] for channel in trio] for row in rows]
            return Listed(file, names, tuple(_colour(file, n, cell) for n, cell in enumerate(cells, 2)), "colour")
    column = next((known[word] for word in _VALUES if word in known), None)
    if column is None:
        return Listed(file, names)
    return Listed(file, names, tuple(_number(file, n, row[column], _MOST_VALUES) for n, row in enumerate(rows, 2)))


def _lines(file: Path, text: str) -> Listed:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for pattern, order in ((_CVAT, (1, 2, 3, 0)), (_COLOURED, (0, 1, 2, 3))):
        if lines and all(found := [pattern.fullmatch(line) for line in lines]):
            parts = [match.groups() for match in found if match]
            values = tuple(_colour(file, n, [part[i] for i in order[:3]]) for n, part in enumerate(parts, 1))
            return Listed(file, tuple(_name(part[order[3]]) for part in parts), values, "colour")
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        pairs = [match.groups() for match in numbered if match]
        values = tuple(_number(file, n, number, _MOST_VALUES) for n, (number, _) in enumerate(pairs, 1))
        return Listed(file, tuple(_name(name) for _, name in pairs), values)
    names = tuple(map(_name, lines))
    if lines and lines[0] == "__ignore__":  # labelme counts it as -1
        return Listed(file, names, (IGNORE, *range(len(names) - 1)))
    return Listed(file, names)


def _name(text: str) -> str | None:
    name = text.strip()
    return None if not name or _VOID.fullmatch(name) else name


def _number(file: Path, line: int, cell: str | None, below: int) -> int:
    text = str(cell or "").strip()
    if not text.isdecimal() or int(text) >= below:
        raise DataError(f"{file}, line {line}: {text!r} where a whole number under {below} is expected")
    return int(text)


def _colour(file: Path, line: int, cells: Sequence[str | None]) -> int:
    return int(pack(np.array([_number(file, line, cell, 256) for cell in cells])))


def meaning_of_list(listed: Listed) -> Meaning:
    """The meaning of a list that states its values."""
    assert listed.values
    classes = tuple(name for name in listed.names if name is not None)
    numbers = {name: number for number, name in enumerate(classes)}
    targets = [IGNORE if name is None else numbers[name] for name in listed.names]
    return meaning(classes, dict(zip(listed.values, targets, strict=True)), listed.coding)


def meaning(classes: Sequence[str], targets: dict[int, int], coding: Coding = "value") -> Meaning:
    """A meaning of values; 255 and 65535 are ignored where nothing else is said of them."""
    if coding == "value":
        targets = {IGNORE: IGNORE, _MOST_VALUES - 1: IGNORE, **targets}
    values = sorted(targets)
    return Meaning(
        tuple(classes), np.array(values, np.int64), np.array([targets[value] for value in values], np.int64), coding
    )


def meaning_of_masks(seen: Sequence[Seen], listed: Listed | None, notes: list[str]) -> Meaning:
    """The meaning of masks whose values had to be looked at.

    Args:
        seen: what the masks hold.
        listed: names without values, where there are some.
        notes: what the reader should know is added here.

    Raises:
        DataError: the masks and the list do not agree; the message names the file and the value.
    """
    coding = coding_of(seen)
    used = {int(value): one.file for one in reversed(seen) for value in codes(one, coding)}
    if listed is not None:
        return _meaning_of_names(listed, used, coding, notes)
    if coding == "colour":
        if len(used) > IGNORE:
            raise DataError(f"the masks have {len(used)} colours in all; list the classes in classes.csv (name,r,g,b)")
        names = [word(value, coding) for value in sorted(used)]
        notes.append("classes are called by their colours; classes.csv beside the masks (name,r,g,b) gives names")
        return meaning(names, {value: number for number, value in enumerate(sorted(used))}, coding)
    if _binary(used):
        notes.append("masks hold 0 and 255 only: read as background and foreground")
        return meaning(("background", "foreground"), {0: 0, IGNORE: 1})
    values = sorted(used.keys() - {IGNORE, _MOST_VALUES - 1})
    if not values:
        raise DataError(f"all masks are {IGNORE}, which is ignored, such as {used[IGNORE]}; there is no class")
    notes.append("classes are called by their pixel values; classes.csv beside the masks (value,name) gives names")
    return meaning([str(value) for value in values], {value: number for number, value in enumerate(values)})


def _binary(used: dict[int, Path]) -> bool:
    return IGNORE in used and used.keys() <= {0, IGNORE} and len(used) == 2


def _meaning_of_names(listed: Listed, used: dict[int, Path], coding: Coding, notes: list[str]) -> Meaning:
    """Names by position, for numbers from 0 or from 1."""
    file, count = listed.file, len(listed.names)
    if coding == "colour":
        shown = ", ".join(word(value, coding) for value in sorted(used)[:5])
        raise DataError(f"masks hold colours ({shown}) and {file} does not say whose; write classes.csv (name,r,g,b)")
    names = [name for name in listed.names if name is not None]
    values = sorted(used.keys() - {IGNORE, _MOST_VALUES - 1})
    if count == 1 and (_binary(used) or max(values, default=0) <= 1):
        notes.append(
            f"{file.name} has one name: 0 is read as background, {IGNORE if _binary(used) else 1} as {names[0]}"
        )
        return meaning(("background", *names), {0: 0, (IGNORE if _binary(used) else 1): 1})
    if count == 2 and _binary(used) and len(names) == 2:
        notes.append(f"masks hold 0 and 255 only: read as {names[0]} and {names[1]}")
        return meaning(names, {0: 0, IGNORE: 1})
    top = max(values, default=0)
    if top > count:
        raise DataError(
            f"{used[top]} holds the value {top}, and {file} lists {count} classes; "
            "add what is missing, or write classes.csv (value,name)"
        )
    numbers = {name: number for number, name in enumerate(names)}
    first = 1 if top == count else 0
    if first:
        notes.append(f"values go from 1 to {count}: 1 is {listed.names[0]}, and 0 is ignored")
    elif values and 0 not in values:
        notes.append(f"no mask holds 0: values are read as counted from 0, so {values[0]} is {listed.names[values[0]]}")
    targets = {n + first: IGNORE if name is None else numbers[name] for n, name in enumerate(listed.names)}
    return meaning(names, {0: IGNORE, **targets} if first else targets)
